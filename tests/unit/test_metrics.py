"""Given the same tokens, the metrics have the values of the reference implementations: pycocoevalcap, nltk."""

import random

import numpy as np
import pytest
from nltk.translate.nist_score import corpus_nist
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider import cider_scorer
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from captioning import metrics
from captioning.metrics.ptb import words_for_scoring
from tests.conftest import coco_references

WORDS = "a the cat dog sits on mat red runs two people with of and near street".split(" ")  # noqa: SIM905


def corpus(seed: int, images: int = 40):
    """Random references, and candidates that are perturbed references; some of both are empty, short or very long."""
    rng = random.Random(seed)
    references = [
        [[rng.choice(WORDS) for _ in range(rng.randint(0, 14))] for _ in range(rng.randint(1, 6))]
        for _ in range(images)
    ]
    candidates = []
    for refs in references:
        words = [word if rng.random() < 0.7 else rng.choice([*WORDS, "unheard"]) for word in rng.choice(refs)]
        candidates.append(rng.choice([words, words, words[:2], words * 3, rng.sample(WORDS, 5), []]))
    return candidates, references


def measured(candidates, references) -> dict[str, metrics.Metric]:
    return {metric.name: metric for metric in metrics.measure(candidates, references)}


def as_theirs(candidates, references):
    hypotheses = {i: [" ".join(words)] for i, words in enumerate(candidates)}
    return {i: [" ".join(ref) for ref in refs] for i, refs in enumerate(references)}, hypotheses


def assert_values_of_pycocoevalcap(candidates, references):
    ours, theirs = measured(candidates, references), as_theirs(candidates, references)
    totals, each = Bleu(4).compute_score(*theirs, verbose=0)
    expected = {f"BLEU-{n + 1}": (totals[n], each[n]) for n in range(4)}
    expected |= {"ROUGE-L": Rouge().compute_score(*theirs), "CIDEr": Cider().compute_score(*theirs)}
    for name, (total, of_each) in expected.items():
        assert ours[name].value == pytest.approx(total, abs=1e-9), name
        np.testing.assert_allclose(ours[name].each, of_each, rtol=0, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("seed", range(5))
def test_values_are_those_of_pycocoevalcap(seed):
    assert_values_of_pycocoevalcap(*corpus(seed))


def test_values_on_real_captions_are_those_of_pycocoevalcap():
    """The first caption of each of 500 COCO images scored against its other four."""
    captions = [[words_for_scoring(c) for c in of_image] for of_image in coco_references().values()][:500]
    assert_values_of_pycocoevalcap([c[0] for c in captions], [c[1:] for c in captions])


def test_plain_cider_is_their_cider_without_clipping_and_length_penalty(monkeypatch):
    candidates, references = corpus(7)
    with_both = Cider().compute_score(*as_theirs(candidates, references))[0]
    monkeypatch.setattr(cider_scorer, "min", lambda candidate, reference: candidate, raising=False)
    total, each = Cider(sigma=1e30).compute_score(*as_theirs(candidates, references))
    ours = measured(candidates, references)["CIDEr-plain"]
    assert ours.value == pytest.approx(total, abs=1e-9) and total > with_both
    np.testing.assert_allclose(ours.each, each, rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_nist_is_nltks(seed):
    candidates, references = corpus(seed)
    ours = measured(candidates, references)
    for n in range(1, 6):
        assert ours[f"NIST-{n}"].value == pytest.approx(corpus_nist(references, candidates, n), abs=1e-9)


def test_nist_of_captions_shorter_than_its_order_counts_what_there_is():
    """Where nltk divides by zero."""
    ours = measured([["a", "cat"]], [[["a", "cat"], ["the", "dog"]]])
    assert ours["NIST-5"].value == pytest.approx(2)  # each word one of four: log2(4/1); "cat" is sure after "a"


def test_a_perfect_caption_and_an_empty_one():
    references = [[["a", "red", "cat", "sits"]], [["two", "dogs", "run", "fast"]], [["a", "street"]]]
    perfect = measured([refs[0] for refs in references], references)
    assert perfect["BLEU-1"].value == pytest.approx(1) and perfect["ROUGE-L"].value == pytest.approx(1)
    assert measured([references[0][0], [], []], references)["CIDEr"].each[0] == pytest.approx(10)
    empty = measured([[], [], []], references)
    assert all(empty[name].value == 0 for name in ("ROUGE-L", "CIDEr", "CIDEr-plain", "NIST-5"))
    assert empty["BLEU-4"].value < 1e-6


def test_totals_come_from_the_sums_of_any_images():
    """What intervals rest on: the score of some images is ``total`` of their sums, document frequencies held."""
    candidates, references = corpus(3)
    some = np.array([0, 0, 3, 8, 9, 9, 20])  # with repetition, as a bootstrap draws them
    chosen = measured([candidates[i] for i in some], [references[i] for i in some])
    for name, metric in measured(candidates, references).items():
        assert metric.total(metric.sums.sum(axis=0)) == metric.value
        if name.startswith(("BLEU", "ROUGE")):
            assert metric.total(metric.sums[some].sum(axis=0)) == pytest.approx(chosen[name].value)
        if name.startswith("CIDEr"):
            assert metric.total(metric.sums[some].sum(axis=0)) == pytest.approx(metric.each[some].mean())


def test_an_image_without_a_reference_is_refused():
    with pytest.raises(ValueError, match="one reference or more"):
        metrics.measure([["a"], ["b"]], [[["a"]], []])
