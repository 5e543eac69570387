"""Whether attention points at what its word names, and that no picture is drawn where it does not."""

import pytest
import torch

from captioning.config import DecoderConfig
from captioning.inference import pointing
from captioning.inference.pointing import Pointing
from captioning.inference.predictor import Caption
from captioning.model.decoders.attention import AttentionDecoder
from captioning.model.features import Features
from shards.errors import InputError

HEART = {"heart": (0.5, 0.0, 1.0, 0.5)}  # the upper right quarter


def caption(*looks):
    """A caption on a grid of 2 rows and 4 columns: (word, place of its peak counted row by row)."""
    weights = torch.full((len(looks), 8), 0.1)
    for number, (_, place) in enumerate(looks):
        weights[number, place] = 0.3
    words = tuple(word for word, _ in looks)
    return Caption(" ".join(words), -1.0, words, weights.view(-1, 2, 4))


def test_a_peak_is_the_middle_of_its_place():
    weights = torch.zeros(2, 4)
    weights[1, 2] = 1.0
    assert pointing.peak(weights) == (0.625, 0.75)


def test_only_words_with_a_box_are_counted():
    captions = [caption(("a", 7), ("heart", 3)), caption(("a", 2), ("heart", 4)), caption(("star", 3))]
    found = pointing.pointing(captions, [HEART, HEART, HEART])
    assert (found.hits, found.words, found.chance) == (1, 2, 0.25)
    assert str(found).startswith("attention peaks in the box of the thing named for 50.0% of 2 words (by chance 25.0%")
    assert not found.is_believable


def test_nothing_to_measure_is_no_score():
    with pytest.raises(ValueError, match="no word"):
        pointing.pointing([caption(("star", 0))], [HEART])


def test_it_is_kept_in_the_run_folder(tmp_path):
    assert pointing.load(tmp_path) is None
    found = Pointing(hits=8, words=10, chance=0.1, rows=8, columns=8)
    found.save(tmp_path)
    assert pointing.load(tmp_path) == found and found.is_believable
    (tmp_path / "pointing.json").write_text("[1]")
    with pytest.raises(InputError, match=r"pointing\.json"):
        pointing.load(tmp_path)


def test_the_zero_state_knows_nothing_of_the_image():
    features = Features(torch.randn(2, 4, 6))
    zero = AttentionDecoder(DecoderConfig(hidden_size=8, initial_state="zero"), 6, 10).start(features)
    mean = AttentionDecoder(DecoderConfig(hidden_size=8), 6, 10).start(features)
    assert not any(state.any() for state in zero.recurrent)
    assert all(state.any() for state in mean.recurrent)
