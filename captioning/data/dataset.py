"""A split's samples -> what models learn from and are judged by: training on a ShardDataset, evaluation in order."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from captioning.config import Config
from captioning.data.captions import EncodedCaptions
from captioning.data.collate import CaptionCollate, ImageBatch, PixelBuffer
from captioning.data.transforms import Preprocessing, View
from shards import index as shard_index
from shards import storage
from shards.dataset import EpochSample, ShardDataset
from shards.images import UnreadableImageError
from shards.index import Index
from shards.reader import UnreadableSample, read_samples, unreadable_of
from shards.storage.cache import Cache, default_folder


def open_split(path: str, config: Config) -> Index:
    """A split's index, its shards checked as far as sizes tell, with the config's cache for remote ones.

    Raises:
        InputError: when the index is missing or its shards do not fit it.
    """
    index = shard_index.load(path, cache_of(config))
    index.check_files()
    fetched = sum(shard.filesize for shard in index.shards if storage.needs_cache(shard.path))
    if fetched > index.cache.limit and os.environ.get("RANK", "0") == "0":
        print(
            f"warning: {index.path} has {fetched / 1e9:.1f} GB and data.cache_gb={config.data.cache_gb:g}: an epoch "
            "reads from most shards at any time, so they will be fetched again and again. Raise it, or use http(s)://.",
            file=sys.stderr,
        )
    return index


def cache_of(config: Config) -> Cache:
    """Where a config keeps remote shards that are not read by offset."""
    folder = Path(config.data.cache_dir).absolute() if config.data.cache_dir else default_folder()
    return Cache(folder, int(config.data.cache_gb * 1e9))


@dataclass(frozen=True)
class CaptionDecoder:
    """What training makes of a sample: its image, cropped for this epoch, and the captions whose turn it is."""

    captions: EncodedCaptions
    preprocessing: Preprocessing
    captions_per_image: int

    def __call__(self, sample: EpochSample) -> tuple[View, list[np.ndarray]]:
        """The image as the model sees it; word ids of at most ``captions_per_image`` captions.

        Raises:
            UnreadableImageError: when the sample's bytes are no image.
        """
        image = self.preprocessing.for_training(sample.image_bytes, sample.run_seed, sample.epoch, sample.place)
        return image, choose_captions(self.captions.of(sample.place), self.captions_per_image, sample.epoch)


def train_dataset(
    index: Index, captions: EncodedCaptions, preprocessing: Preprocessing, captions_per_image: int, **settings
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
        return ImageBatch(pixels.images, tuple(samples), tuple(unreadable), pixels.valid)
