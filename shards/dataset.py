"""Global batches for any PyTorch loop: each sample once an epoch, the same batches for every number of processes.

    for batch in ShardDataset("data/train.json", global_batch_size=256, decode=decode):
        ...

Positions of the order (``shards.order``) become samples (``shards.reader``), ``decode`` makes values of them, and
``collate`` a batch. What a step holds is a pure function of (fingerprint, seed, step), so the state of a run is one
integer, and any number of processes can go on from it.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info

from shards import index as shard_index
from shards.errors import InputError, listed
from shards.hashing import key_of
from shards.images import UnreadableImageError
from shards.index import Index
from shards.order import EpochOrder, micro_batches, rank_part, step_range, steps_per_epoch
from shards.reader import Sample, UnreadableSample, read_samples, unreadable_of
from shards.workers import read_ahead

_STAND_IN_TRIES = 16  # samples looked at for one that can be read

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EpochSample(Sample):
    """A sample as ``decode`` gets it: which one of the split, and in which epoch of which run."""

    place: int  # number in the split
    epoch: int
    run_seed: int

    @property
    def seed(self) -> int:
        """For crops, flips and other draws: the same for whoever decodes this sample in this epoch, 63 bits."""
        return key_of("sample", self.run_seed, self.epoch, self.place) >> 1


@dataclass
class Part:
    """One rank's part of a global step, or one micro-batch of it; what ``collate`` gets.

    Iterating over it, once, reads and decodes: pairs of a key and what ``decode`` made of the sample, or the
    UnreadableSample at its place. ``step_size`` counts the samples of the whole step, on all ranks.
    """

    step: int  # from 0
    epoch: int
    step_size: int
    places: list[int]  # numbers in the split, in the epoch's order; may be empty
    dataset: "ShardDataset"
    unreadable: list[UnreadableSample] = field(default_factory=list)  # met so far

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for key, value in self.dataset.decoded(self.epoch, self.places):
            if isinstance(value, UnreadableSample):
                self.unreadable.append(value)
            yield key, value

    def stand_in(self) -> Any:
        """A decoded sample of the same step, to fill a place that has none.

        Raises:
            InputError: when the first few samples of the step cannot be read either.
        """
        places = self.dataset.step_places(self.step)[:_STAND_IN_TRIES]
        failed = []
        for _, value in self.dataset.decoded(self.epoch, places):
            if not isinstance(value, UnreadableSample):
                return value
            failed.append(value)
        raise InputError(f"The first {len(failed)} samples of step {self.step + 1} are unreadable:\n{listed(failed)}")


class Batch(NamedTuple):
    """B rows, at least one. Multiply each row's loss by its weight, and divide their sum by ``step_size``.

    A row of weight 0 is a stand-in: for an unreadable sample, which keeps its place, or (with an empty key) for a
    rank whose part of a short step is empty, so that every rank has something to send through its model.
    """

    data: Any  # what ``decode`` gave, with a first dimension of B; see torch's ``default_collate``
    weights: Tensor  # float32 [B], 1 or 0
    keys: tuple[str, ...]  # B
    step: int  # from 0
    epoch: int
    step_size: int  # samples of the whole step, on all ranks; unreadable ones count

    def owned(self) -> "Batch":
        """A copy outside the memory shared with the process that made it, where each tensor keeps a file open."""
        return self._replace(data=_cloned(self.data), weights=self.weights.clone())


def _cloned(data: Any) -> Any:
    if isinstance(data, Tensor):
        return data.clone()
    if isinstance(data, Mapping):
        return {key: _cloned(value) for key, value in data.items()}
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*map(_cloned, data))
    return type(data)(map(_cloned, data)) if isinstance(data, list | tuple) else data


def stack(part: Part) -> Batch:
    """The default ``collate``: torch's ``default_collate`` over the part, stand-ins where a sample is unreadable."""
    pairs = list(part)
    readable = [value for _, value in pairs if not isinstance(value, UnreadableSample)]
    stand_in = readable[0] if readable else part.stand_in()
    rows = [stand_in if isinstance(value, UnreadableSample) else value for _, value in pairs]
    weights = [float(not isinstance(value, UnreadableSample)) for _, value in pairs]
    keys = tuple(key for key, _ in pairs)
    if not pairs:
        rows, weights, keys = [stand_in], [0.0], ("",)
    return Batch(default_collate(rows), torch.tensor(weights), keys, part.step, part.epoch, part.step_size)


class ShardDataset(IterableDataset):
    """A split of tar shards as global batches. Iterating gives this rank's part of each global step.

    One ``for`` goes through the rest of the current epoch, the next one through the next; with ``epochs``, through all
    that is left of that many epochs. A step counts as finished once the loop was given it: save ``state_dict()`` after
    the optimizer step. Iterating again after a ``break``, or after ``load_state_dict``, goes on with the next step.

    Args:
        split: NAME.json as ``pack`` or ``pack index`` wrote it (path or URL), or an Index that was loaded.
        global_batch_size: samples a step, on all ranks together. An epoch's last step is short.
        decode: makes a value of an EpochSample, in a worker process. Raising UnreadableImageError or OSError (Pillow's
            errors are) makes the sample unreadable; any other error is raised in the loop.
        micro_batch_size: most samples at once. A step is then a list of batches, equally many on every rank.
        collate: makes the batch of a Part; ``stack`` by default.
        rank, world_size: by default those of torch.distributed, else RANK and WORLD_SIZE, else 0 and 1.
        num_workers: processes that read ahead; for a DataLoader around this dataset leave it at 0.
        max_unreadable_fraction: of the split, in one epoch on one rank, past which the loop ends with an InputError.
        view_of: (seed, epoch, sample's number in the split) -> which view is read of a sample that holds several.

    Raises:
        InputError: for a split that is missing or damaged, or settings that make no sense.
    """

    def __init__(
        self,
        split: str | Path | Index,
        *,
        global_batch_size: int,
        decode: Callable[[EpochSample], Any],
        micro_batch_size: int | None = None,
        collate: Callable[[Part], Any] = stack,
        seed: int = 0,
        epochs: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        max_unreadable_fraction: float = 0.001,
        view_of: Callable[[int, int, int], int] | None = None,
    ):
        sizes = {"global_batch_size": global_batch_size, "micro_batch_size": micro_batch_size, "epochs": epochs}
        for name, value in sizes.items():
            if value is not None and value < 1:
                raise InputError(f"{name}={value}: at least 1 is wanted.")
        self.index = split if isinstance(split, Index) else _opened(split)
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.decode, self.collate, self.seed, self.epochs = decode, collate, seed, epochs
        self.rank, self.world_size = _rank_of(rank, world_size)
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.max_unreadable_fraction, self.view_of = max_unreadable_fraction, view_of
        self.step = 0  # of the run: the next one
        self._stride: int | None = None  # of a DataLoader's worker that has given steps: how many there are of them
        self._unreadable = (0, 0)  # epoch, how many so far in it

    @property
    def epoch(self) -> int:
        """The epoch of the next step, from 0."""
        return self.step // self.steps_per_epoch

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.index), self.global_batch_size)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        end = self.steps_per_epoch * (self.epochs or self.epoch + 1)
        if worker is None:
            if self._stride:
                raise InputError("This state is of a DataLoader's worker: load it through the StatefulDataLoader.")
            steps, read = range(self.step, end), self._read_ahead
        else:
            steps, read = self._steps_of_worker(worker.id, worker.num_workers, end), self._read_here
        for step, (batches, unreadable) in zip(steps, read(steps), strict=True):
            self.step, self._stride = step + 1, worker.num_workers if worker else None
            self._report(step, unreadable)
            yield batches if self.micro_batch_size else batches[0]

    def _steps_of_worker(self, number: int, workers: int, end: int) -> range:
        """Every ``workers``-th step: a DataLoader takes from its workers in turn, so the order stays."""
        if self.num_workers or self.epochs is None:
            raise InputError(
                "A DataLoader around a ShardDataset: give the dataset epochs=..., since a worker's copy forgets which "
                "epoch it was in, and leave its own num_workers at 0."
            )
        if self._stride not in (None, workers):
            raise InputError(f"The state is of {self._stride} workers, this loader has {workers}. Use as many.")
        return range(self.step - 1 + workers if self._stride else self.step + number, end, workers)

    def state_dict(self) -> dict[str, Any]:
        """Samples consumed by finished steps, on all ranks, and what they were samples of. Equal on every rank."""
        epoch, in_epoch = divmod(self.step, self.steps_per_epoch)
        consumed = epoch * len(self.index) + in_epoch * self.global_batch_size
        return {"samples_seen": consumed, **self._identity(), **({"workers": self._stride} if self._stride else {})}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind the steps that ``state`` counts, on any number of ranks.

        Raises:
            InputError: when it is of other data, another seed or another global batch size, and names them.
        """
        identity = self._identity()
        differing = [f"{k}: {state.get(k)!r} there, {v!r} here" for k, v in identity.items() if state.get(k) != v]
        if differing:
            raise InputError(f"This state belongs to another run:\n{listed(differing)}")
        seen = state.get("samples_seen")
        epoch, in_epoch = divmod(seen, len(self.index)) if isinstance(seen, int) and seen >= 0 else (0, -1)
        if in_epoch % self.global_batch_size:
            raise InputError(f"samples_seen={seen!r} is not between two steps of this dataset.")
        self.step = epoch * self.steps_per_epoch + in_epoch // self.global_batch_size
        self._stride = state.get("workers")

    def _identity(self) -> dict[str, Any]:
        """What the order of the samples follows from."""
        size = self.global_batch_size
        return {"fingerprint": self.index.fingerprint, "seed": self.seed, "global_batch_size": size}

    def steps(self, first: int, last: int) -> Iterator[list[Any]]:
        """This rank's micro-batches of each step first..last-1, whatever was read before; unreadable samples are the
        caller's to report."""
        return (batches for batches, _ in self._read_ahead(range(first, last)))

    def micro_batches(self, step: int) -> int:
        """How many micro-batches every rank has in a step: enough for the rank with the largest part."""
        _, start, stop = step_range(step, len(self.index), self.global_batch_size)
        return micro_batches(stop - start, self.world_size, self.micro_batch_size or stop - start)

    def read(self, step: int, micro: int = 0) -> Any:
        """One micro-batch of this rank, read in this process."""
        return self.collate(self._part(step, micro))

    def step_places(self, step: int) -> list[int]:
        """The numbers in the split of a whole step's samples."""
        epoch, start, stop = step_range(step, len(self.index), self.global_batch_size)
        return self._order(epoch).samples(start, stop).tolist()

    def decoded(self, epoch: int, places: list[int]) -> Iterator[tuple[str, Any]]:
        """Key and decoded value, or UnreadableSample, of each of these samples of the split."""
        views = None if self.view_of is None else [self.view_of(self.seed, epoch, place) for place in places]
        for place, read in zip(places, read_samples(self.index, places, views), strict=True):
            yield read.key, self._decode(read, place, epoch)

    def describe(self, step: int) -> str:
        """For people: how many samples this rank reads for a step, and from which shards."""
        epoch, start, stop = step_range(step, len(self.index), self.global_batch_size)
        start, stop = rank_part(start, stop, self.rank, self.world_size)
        samples = self._order(epoch).samples(start, stop).tolist()
        names = sorted({self.index.locate(sample)[0].path.name for sample in samples})
        return (
            f"{len(samples)} at positions {start} to {stop - 1} of epoch {epoch}, in {', '.join(names) or 'no shard'}"
        )

    def _part(self, step: int, micro: int) -> Part:
        epoch, start, stop = step_range(step, len(self.index), self.global_batch_size)
        mine = rank_part(start, stop, self.rank, self.world_size)
        places = self._order(epoch).samples(*rank_part(*mine, micro, self.micro_batches(step))).tolist()
        return Part(step, epoch, stop - start, places, self)

    def _order(self, epoch: int) -> EpochOrder:
        return _order_of(len(self.index), self.index.order_key, self.seed, epoch, self.global_batch_size)

    def _decode(self, read: Sample | UnreadableSample, place: int, epoch: int) -> Any:
        if isinstance(read, UnreadableSample):
            return read
        try:
            return self.decode(EpochSample(**vars(read), place=place, epoch=epoch, run_seed=self.seed))
        except UnreadableImageError as error:
            return unreadable_of(read, str(error))
        except OSError as error:
            return unreadable_of(read, f"{type(error).__name__}: {error}")

    def _read_ahead(self, steps: range) -> Iterator[tuple[list[Any], list[UnreadableSample]]]:
        """Each step's micro-batches and unreadable samples."""
        places = ((step, micro) for step in steps for micro in range(self.micro_batches(step)))
        read = read_ahead(_MicroBatches(self), places, self.num_workers, self.pin_memory)
        for step in steps:
            count = self.micro_batches(step)
            shared = self.num_workers > 0 and not self.pin_memory
            copied = shared and count > 1  # hundreds would exceed the files a process may open
            batches, unreadable = [], []
            for _ in range(count):
                batch, lost = next(read)
                batches.append(batch.owned() if copied and hasattr(batch, "owned") else batch)
                unreadable += lost
            yield batches, unreadable

    def _read_here(self, steps: range) -> Iterator[tuple[list[Any], list[UnreadableSample]]]:
        here = _MicroBatches(self)
        for step in steps:
            read = [here[step, micro] for micro in range(self.micro_batches(step))]
            yield [batch for batch, _ in read], [one for _, lost in read for one in lost]

    def _report(self, step: int, unreadable: list[UnreadableSample]) -> None:
        if not unreadable:
            return
        epoch = step // self.steps_per_epoch
        count = len(unreadable) + (self._unreadable[1] if self._unreadable[0] == epoch else 0)
        self._unreadable = (epoch, count)
        logger.warning("unreadable in step %d, weight 0:\n%s", step + 1, listed(unreadable))
        if count > self.max_unreadable_fraction * len(self.index):
            raise InputError(
                f"{count} samples unreadable in epoch {epoch} on rank {self.rank}, more than max_unreadable_fraction="
                f"{self.max_unreadable_fraction} of {len(self.index)} allows. The last:\n{listed(unreadable)}"
            )


@dataclass(frozen=True)
class _MicroBatches(Dataset):
    """(step, micro) -> that micro-batch, and what of it was unreadable: what worker processes are asked for."""

    dataset: ShardDataset

    def __getitem__(self, place: tuple[int, int]) -> tuple[Any, tuple[UnreadableSample, ...]]:
        part = self.dataset._part(*place)
        batch = self.dataset.collate(part)
        return batch, tuple(part.unreadable)


@lru_cache(maxsize=2)
def _order_of(size: int, fingerprint: str, seed: int, epoch: int, global_batch_size: int) -> EpochOrder:
    return EpochOrder(size, fingerprint, seed, epoch, global_batch_size)


def _opened(split: str | Path) -> Index:
    index = shard_index.load(split)
    index.check_files()
    return index


def _rank_of(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """As given, or of torch.distributed, or of the environment that torchrun and Slurm's launchers set, or alone."""
    if (rank is None) != (world_size is None):
        raise InputError(f"rank={rank} and world_size={world_size}: give both, or neither.")
    if rank is None or world_size is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        found = {name: os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))}
        if not all(value.isdecimal() for value in found.values()):
            raise InputError(f"The environment has RANK={found['RANK']}, WORLD_SIZE={found['WORLD_SIZE']}: no numbers.")
        rank, world_size = int(found["RANK"]), int(found["WORLD_SIZE"])
    if not 0 <= rank < world_size:
        raise InputError(f"rank={rank} of world_size={world_size}: ranks are 0 to world_size - 1.")
    return rank, world_size
