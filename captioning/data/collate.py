"""Decoded samples -> micro-batches: images in memory that the rank sees too, captions padded."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from captioning.data.padded_captions import PaddedCaptions
from captioning.data.vocabulary import END, PAD
from shards.dataset import Part
from shards.reader import UnreadableSample


@dataclass(frozen=True)
class CaptionBatch:
    """One micro-batch: B images, each once, and their N captions. Unreadable samples are listed, and in no tensor.

    Shapes: ``images`` uint8 [B, 3, S, S]; of ``captions``, see there.
    """

    step: int
    epoch: int
    images: Tensor
    captions: PaddedCaptions
    keys: tuple[str, ...]  # of the B images
    unreadable: tuple[UnreadableSample, ...]
    samples: tuple[int, ...] = ()  # numbers of the B images in the split

    def to(self, device: torch.device) -> "CaptionBatch":
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def owned(self) -> "CaptionBatch":
        """A copy outside the memory shared with the process that made it, where each tensor keeps a file open."""
        return self._each(Tensor.clone)

    def pin_memory(self) -> "CaptionBatch":  # called by DataLoader
        return self._each(Tensor.pin_memory)

    def _each(self, move: Callable[[Tensor], Tensor]) -> "CaptionBatch":
        return replace(self, images=move(self.images), captions=self.captions.each(move))

    @property
    def targets(self) -> int:
        """Target tokens, what the loss is divided by."""
        return len(self.captions.target_index)


@dataclass(frozen=True)
class ImageBatch:
    """Images to caption: uint8 [B, 3, S, S], and each one's number in the split; unreadable ones are listed apart."""

    images: Tensor
    samples: tuple[int, ...]
    unreadable: tuple[UnreadableSample, ...]


class PixelBuffer:
    """The images of a batch, each copied to its place when it was decoded: it is still in the cache then."""

    def __init__(self, most: int, image_size: int):
        shape = (most, image_size, image_size, 3)
        if get_worker_info() is None:
            self._rows = torch.empty(shape, dtype=torch.uint8)
        else:  # memory the rank sees too, as torch's own collation takes: otherwise sending the batch copies it
            shared = torch.UntypedStorage._new_shared(math.prod(shape))
            self._rows = torch.empty(0, dtype=torch.uint8).set_(shared).view(shape)
        self._count = 0

    def add(self, image: Tensor) -> None:
        """One more, uint8 [3, S, S]."""
        self._rows[self._count].copy_(image.permute(1, 2, 0))
        self._count += 1

    @property
    def images(self) -> Tensor:
        """uint8 [B, 3, S, S], channels last in memory: as decoders write them and convolutions like them."""
        return self._rows[: self._count].permute(0, 3, 1, 2)


@dataclass(frozen=True)
class CaptionCollate:
    """A ShardDataset's ``collate``: image [3, S, S] and captions of each sample -> CaptionBatch, maybe an empty one."""

    image_size: int

    def __call__(self, part: Part) -> CaptionBatch:
        pixels = PixelBuffer(len(part), self.image_size)
        captions, keys, samples = [], [], []
        for sample, (key, decoded) in zip(part.places, part, strict=True):
            if isinstance(decoded, UnreadableSample):
                continue
            image, of_image = decoded
            pixels.add(image)
            captions.append(of_image)
            keys.append(key)
            samples.append(sample)
        padded = pad_captions(captions)
        unreadable = tuple(part.unreadable)
        return CaptionBatch(part.step, part.epoch, pixels.images, padded, tuple(keys), unreadable, tuple(samples))


def pad_captions(captions: Sequence[Sequence[np.ndarray]]) -> PaddedCaptions:
    """The captions (word ids without <end>) of each of B images; B may be 0, as a short step leaves some ranks."""
    flat = [caption for of_image in captions for caption in of_image]
    ends = np.array([len(caption) for caption in flat], dtype=np.int64)
    words = np.full((len(flat), int(ends.max()) + 1 if flat else 0), PAD, dtype=np.int64)
    if flat:
        words[np.arange(words.shape[1]) < ends[:, None]] = np.concatenate(flat)
        words[np.arange(len(flat)), ends] = END
    image_index = np.repeat(np.arange(len(captions)), [len(of_image) for of_image in captions])
    return PaddedCaptions.of(*map(torch.from_numpy, (words, ends + 1, image_index)))
