"""Bootstrap intervals and paired tests, against theory and full enumeration."""

import itertools

import numpy as np
import pytest

from captioning.metrics import Metric, measure
from captioning.metrics.intervals import differences, intervals
from captioning.metrics.metric import mean_of
from tests.unit.test_metrics import corpus


def test_the_interval_of_a_mean_is_the_normal_one():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    low, high = intervals([mean_of("x", values)])["x"]
    error = values.std() / np.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.15 * error)


def test_intervals_hold_the_score_and_come_out_the_same_again():
    found = measure(*corpus(0))
    first, again = intervals(found), intervals(found)
    assert first == again and set(first) == {metric.name for metric in found}
    for metric in found:
        low, high = first[metric.name]
        assert low < metric.value < high, metric.name


def test_more_images_narrow_the_interval():
    candidates, references = corpus(2)
    few, many = (intervals(measure(candidates * k, references * k)) for k in (1, 16))
    for name in ("BLEU-4", "CIDEr", "ROUGE-L"):
        width = [high - low for low, high in (few[name], many[name])]
        assert width[1] == pytest.approx(width[0] / 4, rel=0.25), name


def test_captions_do_not_differ_from_themselves():
    found = measure(*corpus(1))
    for difference in differences(found, found):
        assert difference.p_value == 1 and difference.interval == (0, 0)


def test_the_p_value_is_that_of_all_ways_to_deal_the_captions():
    rng = np.random.default_rng(5)
    a, b = rng.normal(0, 1, size=9), rng.normal(0.6, 1, size=9)
    dealt = [abs(np.mean(np.where(swap, a - b, b - a))) for swap in itertools.product([False, True], repeat=9)]
    exact = np.mean(np.array(dealt) >= abs(np.mean(b - a)) - 1e-12)
    found = differences([mean_of("x", a)], [mean_of("x", b)])[0]
    assert found.p_value == pytest.approx(exact, abs=0.03) and 0.02 < exact < 0.9
    assert found.b - found.a == pytest.approx(np.mean(b - a))
    assert found.interval[0] < found.b - found.a < found.interval[1]


def test_a_paired_test_sees_what_two_intervals_do_not():
    """Images differ much, captions of an image little, and always to the same side."""
    easy = np.random.default_rng(0).uniform(0, 1, size=200)
    a, b = mean_of("x", easy), mean_of("x", easy + 0.01)
    alone = [intervals([metric])["x"] for metric in (a, b)]
    assert alone[0][1] > alone[1][0], "the intervals overlap"
    found = differences([a], [b])[0]
    assert found.p_value < 0.001 and found.interval == pytest.approx((0.01, 0.01))


def test_corpus_scores_are_compared_as_corpus_scores():
    """A difference in BLEU is that of the totals, not the mean of the images' differences."""
    candidates, references = corpus(4)
    worse = [words[:-1] or words for words in candidates]
    a, b = measure(candidates, references), measure(worse, references)
    for x, y, difference in zip(a, b, differences(a, b), strict=True):
        assert isinstance(x, Metric) and difference.b - difference.a == pytest.approx(y.value - x.value)
        assert difference.interval[0] <= difference.b - difference.a <= difference.interval[1]
        assert 0 < difference.p_value <= 1
