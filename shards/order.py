"""The order of an epoch: a permutation of the split that does not know how many processes read it.

Position p of an epoch belongs to global step p // G (G the global batch size); a step's positions are cut into
contiguous parts, one a rank. To let a rank read few shards, neighbours on disk are kept together in three moves:

1. the split is cut into blocks of consecutive samples, and the blocks are permuted;
2. the permuted sequence is cut into *lanes*; lane l fills the same share of every global batch, so a rank's part of
   every step comes from the same few lanes;
3. within its lane each sample is moved by a random distance of up to ``window`` samples.

Nothing is materialised but the permutation of blocks (8 bytes a block): any position is computed from its number,
so a resumed run asks for what is left and replays nothing.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from shards.errors import InputError
from shards.hashing import hash64, key_of, uniform

_STRETCH = 1024  # ranks of a lane that are computed together


@dataclass(frozen=True)
class Locality:
    """How far the order strays from a uniform shuffle to read neighbours together; all in samples but ``lanes``."""

    lanes: int = 64
    block: int = 32
    window: int = 1024


class EpochOrder:
    """The order of one epoch of a split of ``size`` samples: a pure function of its arguments.

    Raises:
        InputError: for an empty split or a global batch size below 1.
    """

    def __init__(
        self,
        size: int,
        fingerprint: str,
        seed: int,
        epoch: int,
        global_batch_size: int,
        locality: Locality | None = None,
    ):
        if size < 1 or global_batch_size < 1:
            raise InputError(
                f"No order for {size} samples in global batches of {global_batch_size}: both must be >= 1."
            )
        self.size, self.global_batch_size = size, global_batch_size
        self.locality = locality or Locality()
        self._kept: dict[int, tuple[int, np.ndarray]] = {}  # of each lane, the stretch last asked for
        self._lanes = min(self.locality.lanes, global_batch_size)
        self._jitter_key = key_of("window", fingerprint, seed, epoch, global_batch_size, self.locality)
        blocks = -(-size // self.locality.block)
        block_key = key_of("blocks", fingerprint, seed, epoch, global_batch_size, self.locality)
        self._blocks = np.argsort(hash64(block_key, np.arange(blocks)), kind="stable")
        # The last block may be short; where it landed shifts all that follow it in the permuted sequence.
        self._short_at = int(np.flatnonzero(self._blocks == blocks - 1)[0])
        self._missing = blocks * self.locality.block - size

    def samples(self, start: int, stop: int) -> np.ndarray:
        """Sample numbers [stop - start] (int64) at positions start..stop of the epoch."""
        if not 0 <= start <= stop <= self.size:
            raise IndexError(f"positions {start}..{stop} of an epoch of {self.size}")
        positions = np.arange(start, stop, dtype=np.int64)
        step, within = np.divmod(positions, self.global_batch_size)
        batch = np.minimum(self.global_batch_size, self.size - step * self.global_batch_size)
        lane = within * self._lanes // batch
        rank_in_lane = step * _first(lane + 1, self.global_batch_size, self._lanes)
        rank_in_lane -= step * _first(lane, self.global_batch_size, self._lanes)
        rank_in_lane += within - _first(lane, batch, self._lanes)
        result = np.empty_like(positions)
        for number in np.unique(lane):
            mine = lane == number
            result[mine] = self._lane_samples(int(number), rank_in_lane[mine])
        return result

    def _lane_samples(self, lane: int, ranks: np.ndarray) -> np.ndarray:
        """Samples at the given (consecutive) ranks of a lane. A loader asks for few at a time, in order: the stretch
        they are in is kept, or each batch would sort ``window`` neighbours of every lane again."""
        stretch = int(ranks[0]) // _STRETCH
        if int(ranks[-1]) // _STRETCH != stretch:
            return self._shuffled(lane, ranks)
        if self._kept.get(lane, (-1, ranks))[0] != stretch:
            last = min((stretch + 1) * _STRETCH, self._lane_start(lane + 1) - self._lane_start(lane))
            self._kept[lane] = (stretch, self._shuffled(lane, np.arange(stretch * _STRETCH, last)))
        return self._kept[lane][1][ranks - stretch * _STRETCH]

    def _shuffled(self, lane: int, ranks: np.ndarray) -> np.ndarray:
        """Samples at ascending ranks of a lane, each lane being shuffled within ``window``.

        Element i of a lane sorts by i + uniform(0, window), so it lands less than ``window`` from its place: sorting
        the neighbourhood of the wanted ranks alone gives what sorting the whole lane would.
        """
        lane_start, lane_stop = self._lane_start(lane), self._lane_start(lane + 1)
        window = self.locality.window
        low = max(lane_start, lane_start + int(ranks[0]) - window)
        high = min(lane_stop, lane_start + int(ranks[-1]) + 1 + window)
        sequence = np.arange(low, high, dtype=np.int64)
        order = np.argsort(sequence + window * uniform(self._jitter_key, sequence), kind="stable")
        return self._sample_of(sequence[order[lane_start + ranks - low]])

    def _lane_start(self, lane: int) -> int:
        """Where a lane begins in the permuted sequence: its predecessors' share of all full batches and of the tail."""
        full, tail = divmod(self.size, self.global_batch_size)
        return int(full * _first(lane, self.global_batch_size, self._lanes) + _first(lane, tail, self._lanes))

    def _sample_of(self, sequence: np.ndarray) -> np.ndarray:
        """Sample numbers for places in the sequence of permuted blocks."""
        block = self.locality.block
        after_short = sequence >= (self._short_at + 1) * block - self._missing
        place, offset = np.divmod(sequence + after_short * self._missing, block)
        return self._blocks[place] * block + offset


def _first(lane: Any, batch: Any, lanes: int) -> Any:
    """The first position of a batch that belongs to ``lane``, when position p belongs to lane p * lanes // batch.
    Numbers, or arrays of them."""
    return -(-lane * batch // lanes)


def rank_part(start: int, stop: int, rank: int, world_size: int) -> tuple[int, int]:
    """The contiguous part of positions start..stop that ``rank`` of ``world_size`` takes; parts differ by at most 1."""
    size = stop - start
    return start + size * rank // world_size, start + size * (rank + 1) // world_size


def largest_micro_batch(images: int, world_size: int, micro_batch_size: int) -> int:
    """The most images that a rank has at once in a step of ``images``."""
    of_rank = -(-images // world_size)
    return -(-of_rank // micro_batches(images, world_size, micro_batch_size))


def micro_batches(images: int, world_size: int, micro_batch_size: int) -> int:
    """How many micro-batches every rank runs for a step of ``images``: enough for the rank with the largest part."""
    return -(-images // (world_size * micro_batch_size))


def steps_per_epoch(size: int, global_batch_size: int) -> int:
    """Global steps in an epoch of ``size`` samples, the short last one included."""
    return -(-size // global_batch_size)


def step_range(step: int, size: int, global_batch_size: int) -> tuple[int, int, int]:
    """A global step's epoch, its first position, and the one after its last. An epoch's last step is short."""
    epoch, in_epoch = divmod(step, steps_per_epoch(size, global_batch_size))
    start = in_epoch * global_batch_size
    return epoch, start, min(size, start + global_batch_size)
