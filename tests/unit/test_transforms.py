"""How an image becomes what the model sees: crop, squash, pad, and augmentation."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from captioning.data.dataset import EvaluationBatches
from captioning.data.inputs import PixelBuffer
from captioning.data.transforms import Preprocessing, decode
from shards import index as shard_index

SIZES = [(32, 32), (33, 32), (31, 77), (500, 37), (37, 500), (1, 1), (640, 3)]


def gradient(size: tuple[int, int]) -> Image.Image:
    """Red grows to the right, green downwards."""
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.linspace(0, 255, width)[None], np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels)


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize("size", SIZES)
def test_squash_shows_all_of_every_shape(size):
    view = Preprocessing(32, 32, False, "squash").for_evaluation(gradient(size))
    expected = np.array(gradient(size).resize((32, 32), Image.Resampling.BILINEAR))
    assert view.valid is None and view.pixels.shape == (3, 32, 32)
    assert int((view.pixels.permute(1, 2, 0).int() - torch.from_numpy(expected).int()).abs().max()) <= 1


@pytest.mark.parametrize("size", SIZES)
def test_pad_keeps_the_shape_and_says_where_the_image_is(size):
    view = Preprocessing(32, 32, False, "pad").for_evaluation(gradient(size))
    left, top, right, bottom = view.valid
    width, height = (max(1, round(side * 32 / max(size))) for side in size)
    assert (right - left, bottom - top) == (width, height) and 32 in (width, height)
    assert abs(left - (32 - right)) <= 1 and abs(top - (32 - bottom)) <= 1, "in the middle"
    outside = torch.ones(32, 32, dtype=torch.bool)
    outside[top:bottom, left:right] = False
    assert view.pixels[:, outside].T.unique(dim=0).tolist() in ([], [[124, 116, 104]])
    expected = np.array(gradient(size).resize((width, height), Image.Resampling.BILINEAR))
    inside = view.pixels[:, top:bottom, left:right].permute(1, 2, 0)
    assert int((inside.int() - torch.from_numpy(expected).int()).abs().max()) <= 1


def test_a_mirrored_padded_image_is_where_it_was():
    data, preprocessing = png(gradient((50, 31))), Preprocessing(32, 32, True, "pad")
    views = [preprocessing.for_training(data, 0, epoch, 0) for epoch in range(8)]
    plain = preprocessing.for_evaluation(data)
    left, top, right, bottom = plain.valid
    assert {view.valid for view in views} == {plain.valid}
    looks = {bool(torch.equal(view.pixels, plain.pixels)) for view in views}
    assert looks == {True, False}
    mirrored = next(view.pixels for view in views if not torch.equal(view.pixels, plain.pixels))
    assert torch.equal(mirrored[:, top:bottom, left:right].flip(2), plain.pixels[:, top:bottom, left:right])


@pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
@pytest.mark.parametrize("augmentation", [{"random_resized_crop": 0.3}, {"color_jitter": 0.4}, {"rand_augment": True}])
def test_augmentation_is_a_function_of_seed_epoch_and_sample(mode, augmentation):
    data, preprocessing = png(gradient((50, 40))), Preprocessing(36, 32, False, mode, **augmentation)
    generator = torch.random.get_rng_state()
    names = [(0, 0, 0), (0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1)]
    first, again, *others = (preprocessing.for_training(data, *name) for name in names)
    assert torch.equal(first.pixels, again.pixels) and first.valid == again.valid
    assert any(not torch.equal(first.pixels, other.pixels) for other in others)
    assert torch.equal(generator, torch.random.get_rng_state()), "nobody else's random numbers are used up"
    plain = Preprocessing(36, 32, False, mode).for_evaluation(data)
    assert torch.equal(preprocessing.for_evaluation(data).pixels, plain.pixels)


def test_random_regions_are_as_large_as_asked_and_everywhere():
    data, preprocessing = png(gradient((200, 100))), Preprocessing(64, 64, False, "squash", random_resized_crop=0.25)
    red = [preprocessing.for_training(data, 0, 0, sample).pixels[0, 32].int() for sample in range(60)]
    shares = [float(row.max() - row.min()) / 255 for row in red]
    assert min(shares) > 0.25 * 0.75 * 0.9 and max(shares) > 0.6
    assert min(int(row.min()) for row in red) < 20 and max(int(row.max()) for row in red) > 235


def test_where_the_images_are_travels_with_the_batch(scene_shards):
    index = shard_index.load(scene_shards / "val.json")
    padded = EvaluationBatches(index, Preprocessing(32, 32, False, "pad"))[0, 3]
    assert padded.valid.shape == (3, 4) and padded.valid.dtype == torch.int32
    assert EvaluationBatches(index, Preprocessing(32, 32, False, "squash"))[0, 3].valid is None
    assert PixelBuffer(0, 32).valid is None


def test_pad_of_a_square_image_is_the_image():
    image = gradient((32, 32))
    assert torch.equal(
        Preprocessing(32, 32, False, "pad").for_evaluation(image).pixels, decode(png(image)).permute(2, 0, 1)
    )
