"""Image bytes -> the model's input. One object for training, validation and prediction, stored with the checkpoint."""

import math
import warnings
from dataclasses import dataclass, fields
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from captioning.config import Config
from shards.hashing import key_of, uniforms
from shards.images import MAX_PIXELS, open_rgb

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # torchvision 0.29 calls it deprecated; without it Pillow decodes, slower
    decode_jpeg = None
warnings.filterwarnings("ignore", message="The image decoding and encoding capabilities of TorchVision")


_MEAN_COLOUR = (124, 116, 104)  # ImageNet's, which encoders subtract: padding is near 0 for them
_RATIOS = (3 / 4, 4 / 3)  # of a random region's width to its height, relative to a square


class View(NamedTuple):
    """An image as the model sees it: ``pixels`` uint8 [3, S, S], and where in them the image is, the rest is padding:
    ``valid`` (left, top, right, bottom) in pixels; None: everywhere."""

    pixels: Tensor
    valid: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a square of ``image_size`` pixels.

    ``crop``: its shorter side to ``resize_size``, then a square of it, random in training and central elsewhere.
    ``squash``: all of it, whatever its shape, stretched to the square. ``pad``: all of it in its own shape, centred on
    the mean colour. In training it is also mirrored, and augmented where that is asked for.
    """

    resize_size: int
    image_size: int
    flip: bool
    crop_mode: Literal["crop", "squash", "pad"] = "crop"
    random_resized_crop: float | None = None
    color_jitter: float = 0.0
    rand_augment: bool = False

    def for_training(self, data: bytes, seed: int, epoch: int, sample: int) -> View:
        """All that is random is a function of (seed, epoch, sample), not of who asks or when.

        Raises:
            UnreadableImageError: when the bytes are no image.
        """
        x, y, mirror = uniforms(key_of("crop", seed, epoch, sample), 3)
        pixels = decode(data)
        if self.random_resized_crop is not None:
            region = _random_region(pixels, self.random_resized_crop, key_of("region", seed, epoch, sample))
            pixels = self._whole(region)
        else:
            pixels = self._cropped(pixels, x, y) if self.crop_mode == "crop" else self._whole(pixels)
        if self.flip and mirror < 0.5:
            pixels = pixels.flip(1)
        if self.color_jitter or self.rand_augment:
            pixels = self._augmented(pixels, seed, epoch, sample)
        return self._padded(pixels)

    def for_evaluation(self, image: bytes | Image.Image) -> View:
        """The central crop or the whole image, neither mirrored nor augmented.

        Raises:
            UnreadableImageError: when the bytes are no image.
        """
        pixels = decode(image) if isinstance(image, bytes) else torch.from_numpy(np.array(image))
        return self._padded(self._cropped(pixels, 0.5, 0.5) if self.crop_mode == "crop" else self._whole(pixels))

    def seen(self, image: Image.Image) -> Image.Image:
        """The square picture that ``for_evaluation`` shows the model."""
        return Image.fromarray(self.for_evaluation(image).pixels.permute(1, 2, 0).numpy())

    def evaluates_like(self, other: "Preprocessing") -> bool:
        """Whether both show the model the same pixels outside training."""
        mine, theirs = ((p.crop_mode, p.image_size, p.crop_mode == "crop" and p.resize_size) for p in (self, other))
        return mine == theirs

    def _cropped(self, pixels: Tensor, x: float, y: float) -> Tensor:
        """uint8 [H, W, 3] -> [S, S, 3] at fractions ``x``, ``y`` of the free room; only what it needs is resized."""
        size = (pixels.shape[1], pixels.shape[0])
        scale = self.resize_size / min(size)
        width, height = (max(self.resize_size, round(side * scale)) for side in size)
        left, top = (round(free * at) for free, at in ((width - self.image_size, x), (height - self.image_size, y)))
        corners = (left, top, left + self.image_size, top + self.image_size)
        if (width, height) == size:
            return pixels[top : corners[3], left : corners[2]]
        right, lower = (min(side, at / scale) for side, at in zip(size, corners[2:], strict=True))
        box = (left / scale, top / scale, right, lower)  # rounding may put the far corner just outside
        square = (self.image_size, self.image_size)
        image = Image.fromarray(pixels.numpy()).resize(square, Image.Resampling.BILINEAR, box=box)
        return torch.from_numpy(np.array(image))

    def _whole(self, pixels: Tensor) -> Tensor:
        """uint8 [H, W, 3] -> [S, S, 3], or with ``pad`` the largest of its shape that fits into the square.

        torch's antialiased resizing takes 0.24 ms for 256 x 341 pixels where Pillow's takes 0.5 to 1.3 (one core, torch
        2.15); their pixels differ by 1 of 255 at most.
        """
        size = (self.image_size, self.image_size)
        if self.crop_mode == "pad":
            scale = self.image_size / max(pixels.shape[:2])
            size = (max(1, round(pixels.shape[0] * scale)), max(1, round(pixels.shape[1] * scale)))
        if size == pixels.shape[:2]:
            return pixels
        image = pixels.permute(2, 0, 1).unsqueeze(0)
        return F.interpolate(image, size=size, mode="bilinear", antialias=True)[0].permute(1, 2, 0)

    def _padded(self, pixels: Tensor) -> View:
        """uint8 [h, w, 3], at most S x S -> the square around it."""
        if self.crop_mode != "pad":
            return View(pixels.permute(2, 0, 1))
        height, width = pixels.shape[:2]
        left, top = (self.image_size - width) // 2, (self.image_size - height) // 2
        square = _blank(self.image_size).clone()
        square[top : top + height, left : left + width] = pixels
        return View(square.permute(2, 0, 1), (left, top, left + width, top + height))

    def _augmented(self, pixels: Tensor, seed: int, epoch: int, sample: int) -> Tensor:
        """uint8 [h, w, 3] in other colours, and through two operations of RandAugment (arXiv 1909.13719)."""
        from torchvision.transforms import v2  # takes half a second to import, for this alone

        image = pixels.permute(2, 0, 1)
        if self.color_jitter:
            strengths = uniforms(key_of("colour", seed, epoch, sample), 3)
            adjust = (v2.functional.adjust_brightness, v2.functional.adjust_contrast, v2.functional.adjust_saturation)
            for change, strength in zip(adjust, strengths, strict=True):
                image = change(image, 1 + self.color_jitter * (2 * strength - 1))
        if self.rand_augment:
            with torch.random.fork_rng(devices=[]):  # it draws from torch's own generator
                torch.manual_seed(key_of("rand augment", seed, epoch, sample) >> 1)
                image = v2.RandAugment(fill=list(_MEAN_COLOUR))(image)
        return image.permute(1, 2, 0)


@cache
def _blank(side: int) -> Tensor:
    """uint8 [side, side, 3] of the mean colour."""
    return torch.tensor(_MEAN_COLOUR, dtype=torch.uint8).repeat(side, side, 1)


def _random_region(pixels: Tensor, smallest: float, key: int) -> Tensor:
    """A rectangle of uint8 [H, W, 3] with at least the share ``smallest`` of its area, as Inception's training cuts it
    (arXiv 1409.4842)."""
    height, width = pixels.shape[:2]
    share, ratio, x, y = uniforms(key, 4)
    area = height * width * (smallest + (1 - smallest) * share)
    shape = math.exp(math.log(_RATIOS[0]) + math.log(_RATIOS[1] / _RATIOS[0]) * ratio)
    w, h = (
        max(1, min(side, round(length)))
        for side, length in ((width, (area * shape) ** 0.5), (height, (area / shape) ** 0.5))
    )
    left, top = round((width - w) * x), round((height - h) * y)
    return pixels[top : top + h, left : left + w]


def decode(data: bytes) -> Tensor:
    """Any image to upright RGB, uint8 [H, W, 3].

    Ordinary JPEGs go through torchvision.io: the very pixels Pillow gives, in three quarters of the time (0.42 against
    0.59 ms for 34 kB at 256 x 341 on one core of an AMD EPYC, torchvision 0.29, Pillow 13). The rest is Pillow's.

    Raises:
        UnreadableImageError: when the bytes are no image.
    """
    if decode_jpeg is not None and _is_ordinary_jpeg(data):
        try:
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return decode_jpeg(encoded, mode=ImageReadMode.RGB).permute(1, 2, 0)  # its memory lies so
        except RuntimeError:
            pass  # Pillow says what is wrong with it, or reads it all the same
    return torch.from_numpy(np.array(open_rgb(data)))


def _is_ordinary_jpeg(data: bytes) -> bool:
    """Whether a JPEG's header promises three 8-bit components, no rotation (no Exif), no other colours (no Adobe
    segment) and at most MAX_PIXELS. Markers: ITU-T T.81, table B.1."""
    at = 2
    while data[:2] == b"\xff\xd8" and at + 10 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in (0xC0, 0xC1, 0xC2):
            height, width = (int.from_bytes(data[at + i : at + i + 2], "big") for i in (5, 7))
            return data[at + 4] == 8 and data[at + 9] == 3 and width * height <= MAX_PIXELS
        if marker in (0xE1, 0xEE) or marker not in (0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)):
            return False
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


def preprocessing_of(config: Config) -> Preprocessing:
    """The preprocessing a config asks for."""
    return Preprocessing(**{field.name: getattr(config.data, field.name) for field in fields(Preprocessing)})
