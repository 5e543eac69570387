"""Positions of the order -> tensors. The only door from `captioning` to the samples in `shards`."""

import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from captioning.data.captions import EncodedCaptions
from captioning.data.transforms import Preprocessing
from captioning.data.vocabulary import END, PAD
from shards.images import UnreadableImageError
from shards.index import Index
from shards.order import EpochOrder, rank_part, step_range
from shards.reader import Hole, hole_of, read_sample


@dataclass(frozen=True)
class CaptionBatch:
    """One micro-batch: B images, each once, and their N captions. Holes are listed, and in no tensor.

    Shapes: ``images`` uint8 [B, 3, S, S]; ``words`` int64 [N, T], target ids with <end>, padded with <pad>;
    ``lengths`` int64 [N], targets per caption; ``owner`` int64 [N], the row of ``images`` a caption describes.
    """

    step: int
    epoch: int
    images: Tensor
    words: Tensor
    lengths: Tensor
    owner: Tensor
    keys: tuple[str, ...]  # of the B images
    holes: tuple[Hole, ...]

    def to(self, device: torch.device) -> "CaptionBatch":
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in _TENSORS}
        return replace(self, **moved)

    def pin_memory(self) -> "CaptionBatch":  # called by DataLoader
        return replace(self, **{name: getattr(self, name).pin_memory() for name in _TENSORS})

    @property
    def targets(self) -> int:
        """Target tokens, what the loss is divided by; needs no device synchronisation when taken before ``to``."""
        return int(self.lengths.sum())


_TENSORS = ("images", "words", "lengths", "owner")


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
        largest = -(-(stop - start) // self.world_size)
        return -(-largest // self.micro_batch_size)

    def __getitem__(self, place: tuple[int, int]) -> CaptionBatch:
        step, micro = place
        epoch, start, stop = step_range(step, len(self.index), self.global_batch_size)
        start, stop = rank_part(start, stop, self.rank, self.world_size)
        start, stop = rank_part(start, stop, micro, self.micro_batches(step))
        samples = _order(self.index, self.seed, epoch, self.global_batch_size).samples(start, stop)
        images, captions, keys, holes = [], [], [], []
        for sample in samples.tolist():
            read = read_image(self.index, sample, lambda data, s=sample: self._image(data, epoch, s))
            if isinstance(read, Hole):
                holes.append(read)
                continue
            key, image = read
            images.append(image)
            captions.append(choose_captions(self.captions.of(sample), self.captions_per_image, epoch))
            keys.append(key)
        return collate(step, epoch, images, captions, keys, holes, self.preprocessing.image_size)

    def shards_of(self, step: int) -> str:
        """For people: how many samples this rank reads for a step, and from which shards."""
        epoch, start, stop = step_range(step, len(self.index), self.global_batch_size)
        start, stop = rank_part(start, stop, self.rank, self.world_size)
        samples = _order(self.index, self.seed, epoch, self.global_batch_size).samples(start, stop).tolist()
        names = sorted({self.index.locate(sample)[0].path.name for sample in samples})
        return (
            f"{len(samples)} at positions {start} to {stop - 1} of epoch {epoch}, in {', '.join(names) or 'no shard'}"
        )

    def _image(self, data: bytes, epoch: int, sample: int) -> Tensor:
        return self.preprocessing.for_training(data, self.seed, epoch, sample)


@lru_cache(maxsize=2)
def _order(index: Index, seed: int, epoch: int, global_batch_size: int) -> EpochOrder:
    return EpochOrder(len(index), index.fingerprint, seed, epoch, global_batch_size)


def read_image(index: Index, sample: int, preprocess) -> tuple[str, Tensor] | Hole:
    """Key and preprocessed image of a sample; a hole when its bytes cannot be read or decoded."""
    read = read_sample(index, sample)
    if isinstance(read, Hole):
        return read
    try:
        return read.key, preprocess(read.image_bytes)
    except UnreadableImageError as error:
        return hole_of(index, sample, str(error))


def choose_captions(captions: list[np.ndarray], count: int, epoch: int) -> list[np.ndarray]:
    """``count`` captions of an image, the next ones in each epoch; all of them where there are no more."""
    if len(captions) <= count:
        return captions
    first = epoch * count
    return [captions[(first + i) % len(captions)] for i in range(count)]


def collate(step, epoch, images, captions, keys, holes, image_size: int) -> CaptionBatch:
    """Stack images and pad their captions; both may be empty (a short step leaves some ranks nothing)."""
    flat = [caption for of_image in captions for caption in of_image]
    lengths = torch.tensor([len(caption) + 1 for caption in flat], dtype=torch.int64)
    words = torch.full((len(flat), int(lengths.max()) if flat else 0), PAD, dtype=torch.int64)
    for row, caption in zip(words, flat, strict=True):
        row[: len(caption)] = torch.from_numpy(caption.astype(np.int64))
        row[len(caption)] = END
    owner = torch.tensor([i for i, of_image in enumerate(captions) for _ in of_image], dtype=torch.int64)
    stacked = torch.stack(images) if images else torch.empty(0, 3, image_size, image_size, dtype=torch.uint8)
    return CaptionBatch(step, epoch, stacked, words, lengths, owner, tuple(keys), tuple(holes))


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
        yield [next(loader) for _ in range(batches.micro_batches(step))]


@dataclass(frozen=True)
class ImageBatch:
    """Images to caption: uint8 [B, 3, S, S], and each one's number in the split; holes are listed apart."""

    images: Tensor
    samples: tuple[int, ...]
    holes: tuple[Hole, ...]


@dataclass(frozen=True)
class EvaluationBatches(Dataset):
    """The split's images in its own order: batch ``(start, stop)`` of sample numbers."""

    index: Index
    preprocessing: Preprocessing

    def __getitem__(self, part: tuple[int, int]) -> ImageBatch:
        numbered = [(s, read_image(self.index, s, self.preprocessing.for_evaluation)) for s in range(*part)]
        good = [(sample, read[1]) for sample, read in numbered if not isinstance(read, Hole)]
        size = self.preprocessing.image_size
        images = torch.stack([i for _, i in good]) if good else torch.empty(0, 3, size, size, dtype=torch.uint8)
        return ImageBatch(images, tuple(s for s, _ in good), tuple(h for _, h in numbered if isinstance(h, Hole)))


def evaluation_loader(
    batches: EvaluationBatches, start: int, stop: int, batch_size: int, workers: int
) -> DataLoader[ImageBatch]:
    """Samples start..stop-1 in batches of at most ``batch_size``, each once."""
    parts = [(a, min(stop, a + batch_size)) for a in range(start, stop, batch_size)]
    return _loader(batches, parts, min(workers, len(parts)), pin=False)


def _loader(dataset: Dataset, places, workers: int, pin: bool) -> DataLoader:
    return DataLoader(
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
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
