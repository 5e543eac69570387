"""Random words that depend on what they are for, and on nothing else."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from captioning.model.draws import caption_keys, draw_words, hash64, uniform
from captioning.model.search import SearchOptions, search
from shards import hashing
from tests.unit.test_search import KINDS, assert_same, peaked, pictures

CPU = torch.device("cpu")


@pytest.mark.parametrize("key", [0, 1, 2**63 - 1, 2**63, 2**64 - 1, hashing.key_of("a key", 5)])
def test_bits_are_those_of_the_hash_in_numpy(key):
    counters = np.array([0, 1, 2, 77, 2**31, 2**40 + 3, 2**63 - 1], dtype=np.int64)
    expected = hashing.hash64(key, counters)
    np.testing.assert_array_equal(hash64(key, torch.from_numpy(counters)).numpy().view(np.uint64), expected)
    np.testing.assert_array_equal(uniform(key, torch.from_numpy(counters)).numpy(), hashing.uniform(key, counters))
    for counter, bits in zip(counters.tolist(), expected, strict=True):
        as_tensor = torch.tensor([key - 2**64 if key >= 2**63 else key])
        assert hash64(as_tensor, counter).numpy().view(np.uint64)[0] == bits


def test_every_caption_has_numbers_of_its_own():
    keys = caption_keys(3, range(50), 4, CPU)
    assert keys.shape == (50, 4) and len(keys.unique()) == 200
    assert torch.equal(keys[[7, 40], :2], caption_keys(3, [7, 40], 2, CPU)), "whatever else is drawn"
    assert not (keys == caption_keys(4, range(50), 4, CPU)).any()
    numbers = torch.stack([uniform(keys, t) for t in range(40)])
    assert float(numbers.mean()) == pytest.approx(0.5, abs=0.02) and float(numbers.var()) == pytest.approx(1 / 12, 0.05)
    flat = numbers.flatten(1)
    assert float(torch.corrcoef(flat).triu(1).abs().max()) < 0.4 and float(torch.corrcoef(flat.T).triu(1).mean()) < 0.01


def test_words_invert_the_cumulative_distribution():
    probabilities = torch.tensor([0.25, 0.0, 0.5, 0.25])
    numbers = torch.tensor([0.0, 0.2499, 0.25, 0.7497, 0.75, 1 - 2**-53], dtype=torch.float64)
    scores = probabilities.log().expand(6, 4)
    assert draw_words(scores, numbers).tolist() == [0, 0, 2, 2, 3, 3]
    assert draw_words(scores + 100, numbers + 0.0002).tolist() == [0, 2, 2, 2, 3, 3], "logits do as well"
    nothing = torch.full((6, 4), -torch.inf)
    assert draw_words(nothing, numbers).tolist() == [0, 0, 1, 2, 3, 3]
    assert set(draw_words(nothing * torch.nan, numbers).tolist()) <= set(range(4))


def varied(kind: str, seed: int):
    """A model of which samples differ: the Transformer's logits are scaled down."""
    model = peaked(kind, seed)
    if kind == "transformer":
        model.decoder.embedding.weight.data *= 0.25
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_an_images_samples_do_not_depend_on_its_batch(kind):
    model, x = varied(kind, seed=7), pictures(5)
    options = SearchOptions(beam_size=3, temperature=1.5, seed=8)
    together = search([model], x, options, 6)
    alone = [search([model], image[None], options, 6, [number])[0] for number, image in enumerate(x)]
    assert_same(together, alone)
    assert len({h.ids for of_image in together for h in of_image}) > 5
    order = [3, 0, 4]
    assert_same(search([model], x[order], options, 6, order), [together[i] for i in order])
    fewer = search([model], x, replace(options, beam_size=2), 6)
    for two, three in zip(fewer, together, strict=True):
        assert {h.ids for h in two} <= {h.ids for h in three}, "the first draws are the same however many are asked for"
    others = search([model], x, replace(options, seed=9), 6)
    assert [[h.ids for h in of_image] for of_image in others] != [[h.ids for h in of_image] for of_image in together]
