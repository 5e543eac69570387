"""A split's samples -> what models learn from and are scored on: training on a ShardDataset, evaluation in order."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from captioning.data.captions import EncodedCaptions
from captioning.data.collate import CaptionCollate, ImageBatch, PixelBuffer
from captioning.data.transforms import Preprocessing
from shards.dataset import EpochSample, ShardDataset
from shards.images import UnreadableImageError
from shards.index import Index
from shards.reader import UnreadableSample, read_samples, unreadable_of


@dataclass(frozen=True)
class CaptionDecoder:
    """What training makes of a sample: its image, cropped for this epoch, and the captions whose turn it is."""

    captions: EncodedCaptions
    preprocessing: Preprocessing
    captions_per_image: int

    def __call__(self, sample: EpochSample) -> tuple[Tensor, list[np.ndarray]]:
        """Image uint8 [3, S, S]; word ids of at most ``captions_per_image`` captions.

        Raises:
            UnreadableImageError: when the sample's bytes are no image.
        """
        image = self.preprocessing.for_training(sample.image_bytes, sample.run_seed, sample.epoch, sample.place)
        return image, choose_captions(self.captions.of(sample.place), self.captions_per_image, sample.epoch)


def train_dataset(
    index: Index, captions: EncodedCaptions, preprocessing: Preprocessing, captions_per_image: int, **settings: Any
) -> ShardDataset:
    """The split as CaptionBatches; ``settings`` are those of ShardDataset."""
    decoder = CaptionDecoder(captions, preprocessing, captions_per_image)
    return ShardDataset(index, decode=decoder, collate=CaptionCollate(preprocessing.image_size), **settings)


def choose_captions(captions: list[np.ndarray], count: int, epoch: int) -> list[np.ndarray]:
    """``count`` captions of an image, the next ones in each epoch; all of them where there are no more."""
    if len(captions) <= count:
        return captions
    first = epoch * count
    return [captions[(first + i) % len(captions)] for i in range(count)]


@dataclass(frozen=True)
class EvaluationBatches(Dataset):
    """The split's images in its own order: batch ``(start, stop)`` of sample numbers."""

    index: Index
    preprocessing: Preprocessing

    def __getitem__(self, part: tuple[int, int]) -> ImageBatch:
        pixels = PixelBuffer(len(range(*part)), self.preprocessing.image_size)
        samples, unreadable = [], []
        for number, read in zip(range(*part), read_samples(self.index, range(*part)), strict=True):
            if isinstance(read, UnreadableSample):
                unreadable.append(read)
                continue
            try:
                pixels.add(self.preprocessing.for_evaluation(read.image_bytes))
                samples.append(number)
            except UnreadableImageError as error:
                unreadable.append(unreadable_of(read, str(error)))
        return ImageBatch(pixels.images, tuple(samples), tuple(unreadable))
