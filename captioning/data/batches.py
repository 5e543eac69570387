"""Positions of the order -> tensors. The only door from `captioning` to the samples in `shards`."""

import logging
import math
import multiprocessing.util
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from captioning.config import Config
from captioning.data.captions import EncodedCaptions
from captioning.data.padded_captions import PaddedCaptions
from captioning.data.transforms import Preprocessing
from captioning.data.vocabulary import END, PAD
from shards import index as shard_index
from shards import storage
from shards.errors import InputError
from shards.images import UnreadableImageError
from shards.index import Index
from shards.order import EpochOrder, micro_batches, rank_part, step_range
from shards.reader import Sample, UnreadableSample, read_samples, unreadable_of
from shards.storage.cache import Cache, default_folder

logger = logging.getLogger(__name__)


def open_split(path: str, config: Config) -> Index:
    """A split's index, its shards checked as far as sizes tell, with the config's cache for remote ones.

    Raises:
        InputError: when the index is missing or its shards do not fit it.
    """
    index = shard_index.load(path, cache_of(config))
    index.check_files()
    fetched = sum(shard.filesize for shard in index.shards if storage.needs_cache(shard.path))
    if fetched > index.cache.limit and os.environ.get("RANK", "0") == "0":
        logger.warning(
            f"{index.path} has {fetched / 1e9:.1f} GB and data.cache_gb={config.data.cache_gb:g}: an epoch reads from "
            "most shards at any time, so they will be fetched again and again. Raise it, or use http(s)://."
        )
    return index


def cache_of(config: Config) -> Cache:
    """Where a config keeps remote shards that are not read by offset."""
    folder = Path(config.data.cache_dir).absolute() if config.data.cache_dir else default_folder()
    return Cache(folder, int(config.data.cache_gb * 1e9))


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
    holes: tuple[UnreadableSample, ...]

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
class TrainBatches(Dataset):
    """Micro-batch ``(step, micro)`` of one rank, for any step of the run: resuming is asking for a later one."""

    index: Index
    captions: EncodedCaptions
    preprocessing: Preprocessing
    seed: int
    global_batch_size: int
    micro_batch_size: int
    captions_per_image: int
    rank: int
    world_size: int

    def micro_batches(self, step: int) -> int:
        """How many micro-batches every rank runs in a step: enough for the rank with the largest part."""
        _, start, stop = step_range(step, len(self.index), self.global_batch_size)
        return micro_batches(stop - start, self.world_size, self.micro_batch_size)

    def __getitem__(self, place: tuple[int, int]) -> CaptionBatch:
        step, micro = place
        epoch, start, stop = step_range(step, len(self.index), self.global_batch_size)
        start, stop = rank_part(start, stop, self.rank, self.world_size)
        start, stop = rank_part(start, stop, micro, self.micro_batches(step))
        samples = self._order(epoch).samples(start, stop).tolist()
        pixels = _Pixels(len(samples), self.preprocessing.image_size)
        captions, keys, holes = [], [], []
        for sample, read in zip(samples, read_samples(self.index, samples), strict=True):
            image = _decoded(read, partial(self.preprocessing.for_training, seed=self.seed, epoch=epoch, sample=sample))
            if isinstance(image, UnreadableSample):
                holes.append(image)
                continue
            pixels.add(image)
            captions.append(choose_captions(self.captions.of(sample), self.captions_per_image, epoch))
            keys.append(read.key)
        return collate(step, epoch, pixels.images, captions, keys, holes)

    def shards_of(self, step: int) -> str:
        """For people: how many samples this rank reads for a step, and from which shards."""
        epoch, start, stop = step_range(step, len(self.index), self.global_batch_size)
        start, stop = rank_part(start, stop, self.rank, self.world_size)
        samples = self._order(epoch).samples(start, stop).tolist()
        names = sorted({self.index.locate(sample)[0].path.name for sample in samples})
        return (
            f"{len(samples)} at positions {start} to {stop - 1} of epoch {epoch}, in {', '.join(names) or 'no shard'}"
        )

    def _order(self, epoch: int) -> EpochOrder:
        return _order_of(len(self.index), self.index.fingerprint, self.seed, epoch, self.global_batch_size)


@lru_cache(maxsize=2)
def _order_of(size: int, fingerprint: str, seed: int, epoch: int, global_batch_size: int) -> EpochOrder:
    return EpochOrder(size, fingerprint, seed, epoch, global_batch_size)


def _decoded(read: Sample | UnreadableSample, preprocess: Callable[[bytes], Tensor]) -> Tensor | UnreadableSample:
    """A sample's preprocessed image; a hole when its bytes could not be read, or cannot be decoded."""
    if isinstance(read, UnreadableSample):
        return read
    try:
        return preprocess(read.image_bytes)
    except UnreadableImageError as error:
        return unreadable_of(read, str(error))


def choose_captions(captions: list[np.ndarray], count: int, epoch: int) -> list[np.ndarray]:
    """``count`` captions of an image, the next ones in each epoch; all of them where there are no more."""
    if len(captions) <= count:
        return captions
    first = epoch * count
    return [captions[(first + i) % len(captions)] for i in range(count)]


class _Pixels:
    """The images of a batch, each copied to its place when it was decoded: it is still in the cache then."""

    def __init__(self, most: int, size: int):
        shape = (most, size, size, 3)
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


def collate(
    step: int,
    epoch: int,
    images: Tensor,
    captions: Sequence[Sequence[np.ndarray]],
    keys: Iterable[str],
    holes: Iterable[UnreadableSample],
) -> CaptionBatch:
    """Pad the captions of images; both may be empty (a short step leaves some ranks nothing)."""
    flat = [caption for of_image in captions for caption in of_image]
    ends = np.array([len(caption) for caption in flat], dtype=np.int64)
    words = np.full((len(flat), int(ends.max()) + 1 if flat else 0), PAD, dtype=np.int64)
    if flat:
        words[np.arange(words.shape[1]) < ends[:, None]] = np.concatenate(flat)
        words[np.arange(len(flat)), ends] = END
    owner = np.repeat(np.arange(len(captions)), [len(of_image) for of_image in captions])
    padded = PaddedCaptions.of(*map(torch.from_numpy, (words, ends + 1, owner)))
    return CaptionBatch(step, epoch, images, padded, tuple(keys), tuple(holes))


@dataclass(frozen=True)
class _MicroBatches:
    """The places (step, micro) of steps first..last-1, in order."""

    batches: TrainBatches
    first: int
    last: int

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for step in range(self.first, self.last):
            for micro in range(self.batches.micro_batches(step)):
                yield step, micro


def train_steps(batches: TrainBatches, first: int, last: int, workers: int, pin: bool) -> Iterator[list[CaptionBatch]]:
    """The rank's micro-batches of each step first..last-1, read ahead by ``workers`` processes."""
    loader = iter(_loader(batches, _MicroBatches(batches, first, last), workers, pin))
    for step in range(first, last):
        count = batches.micro_batches(step)
        copied = workers > 0 and not pin and count > 1  # hundreds would exceed the files a process may open
        yield [next(loader).owned() if copied else next(loader) for _ in range(count)]


def error_message(error: InputError) -> str:
    """What an error says, without the traceback that DataLoader puts before the words of its workers."""
    return str(error).rpartition(f"{InputError.__name__}: ")[2].strip()


@dataclass(frozen=True)
class ImageBatch:
    """Images to caption: uint8 [B, 3, S, S], and each one's number in the split; holes are listed apart."""

    images: Tensor
    samples: tuple[int, ...]
    holes: tuple[UnreadableSample, ...]


@dataclass(frozen=True)
class EvaluationBatches(Dataset):
    """The split's images in its own order: batch ``(start, stop)`` of sample numbers."""

    index: Index
    preprocessing: Preprocessing

    def __getitem__(self, part: tuple[int, int]) -> ImageBatch:
        pixels = _Pixels(len(range(*part)), self.preprocessing.image_size)
        samples, holes = [], []
        for sample, read in zip(range(*part), read_samples(self.index, range(*part)), strict=True):
            image = _decoded(read, self.preprocessing.for_evaluation)
            if isinstance(image, UnreadableSample):
                holes.append(image)
            else:
                pixels.add(image)
                samples.append(sample)
        return ImageBatch(pixels.images, tuple(samples), tuple(holes))


def evaluation_loader(
    batches: EvaluationBatches, start: int, stop: int, batch_size: int, workers: int
) -> DataLoader[ImageBatch]:
    """Samples start..stop-1 in batches of at most ``batch_size``, each once."""
    parts = [(a, min(stop, a + batch_size)) for a in range(start, stop, batch_size)]
    return _loader(batches, parts, min(workers, len(parts)), pin=False)


_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class _Loader(DataLoader):
    def __iter__(self) -> Any:
        # Workers are forked with stop signals held back until they ignore them: torch's own handler, which they set
        # first, would let one end them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _loader(dataset: Dataset, places: Any, workers: int, pin: bool) -> DataLoader:
    if workers:
        multiprocessing.util.Finalize(None, _end_loaders, exitpriority=0)  # before multiprocessing's own farewell
    return _Loader(
        dataset,
        batch_size=None,
        sampler=places,
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=_leave_signals_to_the_rank,
        prefetch_factor=2 if workers else None,
    )


def _leave_signals_to_the_rank(_worker: int) -> None:
    # A stop signal sent to the whole job must not kill the loaders under the step that is being finished.
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end_loaders() -> None:
    """A process that ends by an error still holds its loaders, and multiprocessing would ask them to go by SIGTERM,
    which they ignore, and wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report the end of each as an error
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
