"""The Java-free metrics have the values of pycocoevalcap, the reference implementation, given the same tokens."""

import random

import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from captioning.scoring import metrics

WORDS = "a the cat dog sits on mat red runs two people with of and near street".split(" ")  # noqa: SIM905


def corpus(seed: int, images: int = 40):
    """Random references, and candidates that are perturbed references, some empty, very short or very long."""
    rng = random.Random(seed)
    references = [
        [[rng.choice(WORDS) for _ in range(rng.randint(1, 14))] for _ in range(rng.randint(1, 6))]
        for _ in range(images)
    ]
    candidates = []
    for refs in references:
        words = [word if rng.random() < 0.7 else rng.choice(WORDS) for word in rng.choice(refs)]
        candidates.append(rng.choice([words, words, words[:2], words * 3, rng.sample(WORDS, 5)]))
    return candidates, references


def as_theirs(candidates, references):
    hypotheses = {i: [" ".join(words)] for i, words in enumerate(candidates)}
    return {i: [" ".join(ref) for ref in refs] for i, refs in enumerate(references)}, hypotheses


@pytest.mark.parametrize("seed", range(5))
def test_values_are_those_of_pycocoevalcap(seed):
    candidates, references = corpus(seed)
    theirs = as_theirs(candidates, references)
    assert metrics.bleu(candidates, references) == pytest.approx(Bleu(4).compute_score(*theirs, verbose=0)[0], abs=1e-9)
    mean, each = Rouge().compute_score(*theirs)
    assert metrics.rouge_l(candidates, references) == pytest.approx(list(each), abs=1e-9)
    assert metrics.score(candidates, references)["ROUGE-L"] == pytest.approx(mean, abs=1e-9)
    mean, each = Cider().compute_score(*theirs)
    assert metrics.cider_d(candidates, references) == pytest.approx(list(each), abs=1e-9)
    assert metrics.score(candidates, references)["CIDEr-D"] == pytest.approx(mean, abs=1e-9)


def test_a_perfect_caption_and_an_empty_one():
    references = [[["a", "red", "cat", "sits"]], [["two", "dogs", "run", "fast"]], [["a", "street"]]]
    perfect = metrics.score([refs[0] for refs in references], references)
    assert perfect["BLEU-1"] == pytest.approx(1) and perfect["ROUGE-L"] == pytest.approx(1)
    assert metrics.cider_d([references[0][0], [], []], references)[0] == pytest.approx(10)
    empty = metrics.score([[], [], []], references)
    assert empty["ROUGE-L"] == empty["CIDEr-D"] == 0 and empty["BLEU-4"] < 1e-6


def test_words_for_scoring_are_lower_case_without_punctuation():
    words = metrics.words_for_scoring('A "big" dog\'s ball, red -- and wet.')
    assert words == ["a", "big", "dog", "'s", "ball", "red", "and", "wet"]
