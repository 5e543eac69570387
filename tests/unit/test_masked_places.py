"""Places that are not there, padding's and those of fewer boxes, have no part in anything a decoder does."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from captioning.config import Config, DataConfig, DecoderConfig, EncoderConfig
from captioning.data.inputs import FeatureInputs, PaddedGridBuffer
from captioning.data.padded_captions import PaddedCaptions
from captioning.data.stored_features import StoredFeatures
from captioning.data.transforms import Preprocessing
from captioning.data.vocabulary import START
from captioning.model.captioner import Captioner
from captioning.model.decoders import DECODERS
from captioning.model.draws import caption_keys
from captioning.model.features import Features, valid_places
from captioning.model.sampling import sample
from tests.unit.test_model import LOOKING, images, tiny, tiny_decoder

MASK = torch.tensor([[1, 1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]], dtype=torch.bool)


def decoder_of(kind: str, **changes):
    torch.manual_seed(0)
    config: DecoderConfig = tiny_decoder(kind, **({"encoder_layers": 2} if kind == "transformer" else {}), **changes)
    return DECODERS[kind](config, 6, 9)


def boxes(junk: float) -> Features:
    """Three images with 4, 1 and 7 boxes of 7; where there is none stands ``junk``."""
    grid = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(0))
    return Features(grid.masked_fill(~MASK.unsqueeze(2), junk), MASK, square=False)


@pytest.mark.parametrize("kind", LOOKING)
def test_what_stands_at_a_masked_place_changes_nothing(kind):
    """Logits, penalty and gradients, word by word too; and nobody looks there."""
    results = []
    for junk in (0.0, 1e4):
        decoder = decoder_of(kind)
        captions = PaddedCaptions.of(
            torch.tensor([[4, 5, 2], [6, 2, 0], [7, 8, 2], [5, 2, 0]]),
            torch.tensor([3, 2, 3, 2]),
            torch.tensor([0, 0, 1, 2]),
        )
        logits, penalty = decoder(boxes(junk), captions)
        (logits.square().sum() + penalty).backward()
        _, state = decoder.step(decoder.start(boxes(junk)), torch.full((3,), START))
        assert not state.weights[~MASK].any()
        torch.testing.assert_close(state.weights.sum(dim=1), torch.ones(3))
        results.append([logits, penalty, state.weights, *(p.grad for p in decoder.parameters())])
    for clean, dirty in zip(*results, strict=True):
        torch.testing.assert_close(clean, dirty)


@pytest.mark.parametrize("kind", LOOKING)
def test_fewer_boxes_are_as_if_there_were_no_more(kind):
    """An image with 4 of 7 boxes is captioned as from its 4 alone."""
    decoder = decoder_of(kind).eval()
    words = PaddedCaptions.of(torch.tensor([[4, 5, 2]]), torch.tensor([3]), torch.tensor([0]))
    for image in range(3):
        one = boxes(0.0)[image : image + 1]
        alone = Features(one.grid[:, MASK[image]], square=False)
        for masked, short in zip(decoder(one, words), decoder(alone, words), strict=True):
            torch.testing.assert_close(masked, short, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", LOOKING)
def test_all_places_masked_in_is_no_mask(kind):
    decoder = decoder_of(kind).eval()
    grid, words = (
        torch.randn(2, 9, 6),
        PaddedCaptions.of(torch.tensor([[4, 2]] * 2), torch.tensor([2, 2]), torch.arange(2)),
    )
    for masked, plain in zip(
        decoder(Features(grid, torch.ones(2, 9, dtype=torch.bool)), words), decoder(Features(grid), words), strict=True
    ):
        torch.testing.assert_close(masked, plain)


@pytest.mark.parametrize("kind", LOOKING)
def test_samples_do_not_look_at_masked_places(kind):
    decoder, keys = decoder_of(kind), caption_keys(0, range(3), 4, torch.device("cpu"))
    clean, dirty = (sample(decoder, boxes(junk), keys, with_greedy=True, max_words=5) for junk in (0.0, 1e4))
    assert torch.equal(clean.token_ids, dirty.token_ids)


def test_places_of_a_padded_image():
    """Of a grid of 4 x 4 over 64 pixels: an image of 20 columns in the middle, and one that fills its first row."""
    valid = torch.tensor([[22, 0, 42, 64], [0, 0, 64, 1], [16, 16, 32, 48]])
    expected = [[[0, 1, 1, 0]] * 4, [[1] * 4, *[[0] * 4] * 3], [[0] * 4, [0, 1, 0, 0], [0, 1, 0, 0], [0] * 4]]
    assert valid_places(valid, 4, 4, 64).int().tolist() == expected


@pytest.mark.parametrize(("image_size", "side"), [(32, 7), (50, 6), (64, 8), (224, 7), (224, 9), (256, 14)])
def test_stored_places_go_back_where_they_were(image_size, side):
    """For an image of any width: the columns that show it, put into the middle, are those of its pixels."""
    stored = StoredFeatures(**{field.name: None for field in fields(StoredFeatures)} | {"size": 1, "dtype": "float32"})
    for width in range(1, image_size + 1):
        view = Preprocessing(image_size, image_size, False, "pad")._padded(
            torch.zeros(image_size, width, 3, dtype=torch.uint8)
        )
        shown = valid_places(torch.tensor([view.valid]), side, side, image_size)
        buffer = PaddedGridBuffer(stored)
        buffer.add(np.ones((side, int(shown[0, 0].sum()), 1), np.float32))
        assert torch.equal(buffer.valid, shown) and torch.equal(buffer.inputs.view(1, side, side) > 0, shown)


@pytest.mark.parametrize("others", [5, 7])
def test_what_a_transformer_sees_of_boxes_does_not_depend_on_the_batch(others):
    """Four boxes are no grid of 2 x 2, alone or among more; and five alone are no trouble."""
    stored = StoredFeatures("features", None, None, "grid", None, 6, {}, 1, 0, "float32", 1)
    config = Config(
        data=DataConfig("x"),
        encoder=EncoderConfig("features", feature_size=6),
        decoder=tiny_decoder("transformer", encoder_layers=1),
    )
    model, boxes = Captioner(config, 9).eval(), np.random.default_rng(0).normal(size=(7, 6)).astype(np.float32)
    seen = []
    for counts in ([4], [4, others], [others]):
        buffer = FeatureInputs(stored).buffer(2)
        for count in counts:
            buffer.add(boxes[:count])
        words = PaddedCaptions.of(torch.tensor([[4, 2]]), torch.tensor([2]), torch.tensor([0]))
        seen.append(model(buffer.inputs, words, buffer.valid)[0])
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", LOOKING)
def test_the_captioner_masks_padding(kind):
    model = tiny(kind).eval()
    x, valid = images(2, 128), torch.tensor([[0, 32, 128, 96], [0, 0, 128, 128]])
    features = model.encode(x, valid)
    assert features.mask.int().tolist() == [[0] * 4 + [1] * 8 + [0] * 4, [1] * 16]
    words = PaddedCaptions.of(torch.tensor([[4, 2]] * 2), torch.tensor([2, 2]), torch.arange(2))
    logits, _ = model(x, words, valid)
    torch.testing.assert_close(logits, model.decoder(features, words)[0])
    unmasked, _ = model.decoder(replace(features, mask=None), words)
    assert not torch.isclose(logits[:2], unmasked[:2]).all()
    torch.testing.assert_close(logits[2:], unmasked[2:])


def test_the_lstms_vector_is_the_mean_over_the_image_alone():
    model = tiny("lstm").eval()
    x, valid = images(2, 224), torch.tensor([[0, 64, 224, 160], [0, 0, 224, 224]])
    grid, pooled = model.encoder(x), model.encoder.pooled(x, valid)
    torch.testing.assert_close(pooled[0], grid[0, :, 2:5].mean(dim=(1, 2)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pooled[1], grid[1].mean(dim=(1, 2)), rtol=1e-4, atol=1e-5)
