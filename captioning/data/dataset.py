"""A split's samples -> what models learn from and are scored on: training on a ShardDataset, evaluation in order."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from captioning.data.captions import EncodedCaptions
from captioning.data.collate import CaptionCollate, ImageBatch
from captioning.data.inputs import Inputs, inputs_for
from captioning.data.transforms import Preprocessing
from shards.dataset import EpochSample, ShardDataset
from shards.images import UnreadableImageError
from shards.index import Index
from shards.reader import Sample, UnreadableSample, read_samples, unreadable_of


@dataclass(frozen=True)
class CaptionDecoder:
    """What training makes of a sample: its image, cropped for this epoch, or its features, and the captions whose turn
    it is."""

    captions: EncodedCaptions
    inputs: Inputs
    captions_per_image: int

    def __call__(self, sample: EpochSample) -> tuple[Any, list[np.ndarray]]:
        """Inputs of one image; word ids of at most ``captions_per_image`` captions.

        Raises:
            UnreadableImageError: when the sample's bytes are no image.
        """
        one = self.inputs.for_training(sample)
        return one, choose_captions(self.captions.of(sample.place), self.captions_per_image, sample.epoch)


def train_dataset(
    index: Index, captions: EncodedCaptions, preprocessing: Preprocessing, captions_per_image: int, **settings: Any
) -> ShardDataset:
    """The split as CaptionBatches; ``settings`` are those of ShardDataset."""
    inputs = inputs_for(index, preprocessing)
    decoder = CaptionDecoder(captions, inputs, captions_per_image)
    return ShardDataset(index, decode=decoder, collate=CaptionCollate(inputs), view_of=inputs.view_of, **settings)


def choose_captions(captions: list[np.ndarray], count: int, epoch: int) -> list[np.ndarray]:
    """``count`` captions of an image, the next ones in each epoch; all of them where there are no more."""
    if len(captions) <= count:
        return captions
    first = epoch * count
    return [captions[(first + i) % len(captions)] for i in range(count)]


@dataclass(frozen=True)
class EvaluationBatches(Dataset):
    """The split's images, or their features, in its own order: batch ``(start, stop)`` of sample numbers."""

    index: Index
    preprocessing: Preprocessing
    augmented: tuple[int, int] | None = None  # (seed, epoch): images as training sees them then

    def __getitem__(self, part: tuple[int, int]) -> ImageBatch:
        inputs = inputs_for(self.index, self.preprocessing)
        batch = inputs.buffer(len(range(*part)))
        samples, unreadable = [], []
        for number, read in zip(range(*part), read_samples(self.index, range(*part)), strict=True):
            if isinstance(read, UnreadableSample):
                unreadable.append(read)
                continue
            try:
                batch.add(self._of(read, number, inputs))
                samples.append(number)
            except UnreadableImageError as error:
                unreadable.append(unreadable_of(read, str(error)))
        return ImageBatch(batch.inputs, tuple(samples), tuple(unreadable), batch.valid)

    def _of(self, read: Sample, number: int, inputs: Inputs) -> Any:
        if self.augmented is None:
            return inputs.for_evaluation(read)
        seed, epoch = self.augmented
        return inputs.for_training(EpochSample(**vars(read), place=number, epoch=epoch, run_seed=seed))
