"""Broken ends, repetition and sameness of captions."""

import numpy as np
import pytest

from captioning.metrics import references as counted
from captioning.metrics.degenerate import distinct_captions, ends_badly, repeats
from captioning.metrics.ptb import words_for_scoring
from captioning.metrics.reward import Words
from tests.conftest import coco_references
from tests.unit.test_reward import numbered_words

REFERENCES = counted.count([[["a", "cat", "sits", "on", "a", "mat"]] * 5] * 20)


def of(*texts: str) -> Words:
    return numbered_words([text.split() for text in texts], REFERENCES)


def test_ends_that_no_reference_has():
    captions = of("a cat sits on a", "", "a cat on a mat", "a cat on an owl", "a cat sits on")
    assert ends_badly(captions, REFERENCES).tolist() == [True, True, False, False, True]
    assert ends_badly(of(), REFERENCES).tolist() == []


def test_words_said_twice():
    captions = of("a cat cat", "cat", "cat", "a cat on a cat", "a cat on a cat on", "", "sits on a mat sits on a mat")
    assert repeats(captions).tolist() == [True, False, False, False, True, False, True]
    assert repeats(of()).tolist() == []


def test_distinct_captions_are_counted_by_image():
    captions = of("a cat", "a cat", "a", "a cat", "", "")
    assert distinct_captions(captions, np.array([0, 0, 0, 1, 1, 1])) == 4
    assert distinct_captions(of(), np.array([], dtype=np.int64)) == 0


def test_hardly_any_caption_that_people_wrote_is_degenerate():
    captions = [[words_for_scoring(c) for c in of_image] for of_image in coco_references().values()]
    references = counted.count(captions)
    words = numbered_words([c for of_image in captions for c in of_image], references)
    assert ends_badly(words, references).mean() == pytest.approx(0.003, abs=0.001)
    assert repeats(words).mean() == pytest.approx(0.004, abs=0.001)
