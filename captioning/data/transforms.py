"""Image bytes -> the model's input. One object for training, validation and prediction, stored with the checkpoint."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captioning.config import Config
from shards.hashing import key_of, uniform
from shards.images import open_rgb


@dataclass(frozen=True)
class Preprocessing:
    """Shorter side to ``resize_size`` pixels, then a square crop of ``image_size``: random and mirrored in training."""

    resize_size: int
    image_size: int
    flip: bool

    def for_training(self, data: bytes, seed: int, epoch: int, sample: int) -> Tensor:
        """uint8 [3, S, S]; crop and flip are a function of (seed, epoch, sample), not of who asks or when.

        Raises:
            UnreadableImageError: when the bytes are no image.
        """
        x, y, mirror = uniform(key_of("crop", seed, epoch, sample), np.arange(3))
        return self._cropped(open_rgb(data), float(x), float(y), self.flip and bool(mirror < 0.5))

    def for_evaluation(self, image: bytes | Image.Image) -> Tensor:
        """uint8 [3, S, S]: the central crop, unmirrored.

        Raises:
            UnreadableImageError: when the bytes are no image.
        """
        return self._cropped(open_rgb(image) if isinstance(image, bytes) else image, 0.5, 0.5, False)

    def seen(self, image: Image.Image) -> Image.Image:
        """The square picture that ``for_evaluation`` shows the model."""
        return Image.fromarray(self.for_evaluation(image).permute(1, 2, 0).numpy())

    def _cropped(self, image: Image.Image, x: float, y: float, mirror: bool) -> Tensor:
        """Crop at fractions ``x``, ``y`` of the free room; only what the crop needs is resized."""
        scale = self.resize_size / min(image.size)
        width, height = (max(self.resize_size, round(side * scale)) for side in image.size)
        left, top = (round(free * at) for free, at in ((width - self.image_size, x), (height - self.image_size, y)))
        corners = (left, top, left + self.image_size, top + self.image_size)
        if (width, height) == image.size:
            image = image.crop(corners)
        else:
            right, lower = (min(side, at / scale) for side, at in zip(image.size, corners[2:], strict=True))
            box = (left / scale, top / scale, right, lower)  # rounding may put the far corner just outside
            image = image.resize((self.image_size, self.image_size), Image.Resampling.BILINEAR, box=box)
        if mirror:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def preprocessing_of(config: Config) -> Preprocessing:
    """The preprocessing a config asks for."""
    return Preprocessing(config.data.resize_size, config.data.image_size, config.data.flip)
