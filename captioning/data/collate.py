"""Decoded samples -> micro-batches: inputs in memory that the rank sees too, captions padded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from captioning.data.inputs import Inputs
from captioning.data.padded_captions import PaddedCaptions
from captioning.data.vocabulary import END, PAD
from shards.dataset import Part
from shards.reader import UnreadableSample


@dataclass(frozen=True)
class CaptionBatch:
    """One micro-batch: B images, each once, and their N captions. Unreadable samples are listed, and in no tensor.

    ``inputs`` are pixels uint8 [B, 3, S, S], or stored features, floating, [B, D] or [B, P, D]; the model encodes
    either. ``valid`` says what of them is the image: see ``Captioner.encode``; None: all. Shapes of ``captions``: see
    there.
    """

    step: int
    epoch: int
    inputs: Tensor
    captions: PaddedCaptions
    keys: tuple[str, ...]  # of the B images
    unreadable: tuple[UnreadableSample, ...]
    samples: tuple[int, ...] = ()  # numbers of the B images in the split
    valid: Tensor | None = None

    def to(self, device: torch.device) -> "CaptionBatch":
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def owned(self) -> "CaptionBatch":
        """A copy outside the memory shared with the process that made it, where each tensor keeps a file open."""
        return self.each(Tensor.clone)

    def pin_memory(self) -> "CaptionBatch":  # called by DataLoader
        return self.each(Tensor.pin_memory)

    def each(self, move: Callable[[Tensor], Tensor]) -> "CaptionBatch":
        """With every tensor moved."""
        valid = None if self.valid is None else move(self.valid)
        return replace(self, inputs=move(self.inputs), captions=self.captions.each(move), valid=valid)

    @property
    def targets(self) -> int:
        """Target tokens, what the loss is divided by."""
        return len(self.captions.target_index)


@dataclass(frozen=True)
class ImageBatch:
    """Images to caption: ``inputs`` and ``valid`` as in CaptionBatch, and each one's number in the split; unreadable
    ones are listed apart."""

    inputs: Tensor
    samples: tuple[int, ...]
    unreadable: tuple[UnreadableSample, ...]
    valid: Tensor | None = None

    def to(self, device: torch.device) -> "ImageBatch":
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "ImageBatch":  # called by DataLoader
        return self._each(Tensor.pin_memory)

    def _each(self, move: Callable[[Tensor], Tensor]) -> "ImageBatch":
        return replace(self, inputs=move(self.inputs), valid=None if self.valid is None else move(self.valid))


@dataclass(frozen=True)
class CaptionCollate:
    """A ShardDataset's ``collate``: inputs and captions of each sample -> CaptionBatch, maybe an empty one."""

    inputs: Inputs

    def __call__(self, part: Part) -> CaptionBatch:
        batch = self.inputs.buffer(len(part))
        captions, keys, samples = [], [], []
        for sample, (key, decoded) in zip(part.places, part, strict=True):
            if isinstance(decoded, UnreadableSample):
                continue
            one, of_image = decoded
            batch.add(one)
            captions.append(of_image)
            keys.append(key)
            samples.append(sample)
        rest = (tuple(keys), tuple(part.unreadable), tuple(samples), batch.valid)
        return CaptionBatch(part.step, part.epoch, batch.inputs, pad_captions(captions), *rest)


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
