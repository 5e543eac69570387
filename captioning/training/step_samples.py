"""A step's samples on every rank, and what the ranks agree on before they take it."""

from collections.abc import Iterator
from dataclasses import dataclass

from captioning.data.collate import CaptionBatch
from captioning.distributed.ranks import Ranks
from captioning.distributed.stop_signals import StoppedError, StopSignals, stopped_by
from captioning.training.monitor import Clock
from captioning.training.objectives import StepScope, scope_alone
from shards.errors import InputError


@dataclass(frozen=True)
class StepSamples:
    """This rank's micro-batches. The counts are of all ranks together: readable images, target tokens, unreadable
    samples, and ``lone``, micro-batches of one image. ``error``, the same on all of them, says why there is to be no
    such step."""

    micro_batches: list[CaptionBatch]
    images: float
    targets: float
    unreadable: float
    lone: float
    error: InputError | StoppedError | None

    def scope(self, step: int, world_size: int, detailed: bool) -> StepScope:
        return StepScope(step, self.images, self.targets, world_size, detailed)


def own_samples(steps: Iterator[list[CaptionBatch]], clock: Clock) -> tuple[list[CaptionBatch], str | None]:
    """This rank's micro-batches of the next step; or none, and what is wrong with its data."""
    with clock.data():
        try:
            return next(steps), None
        except InputError as error:
            return [], str(error)


def agreed(
    micro_batches: list[CaptionBatch], objection: str | None, ranks: Ranks, stop: StopSignals, clock: Clock
) -> StepSamples:
    """Counts of all ranks, and whether one of them met an ``objection`` or was told to stop. Called on every rank."""
    mine = scope_alone(0, micro_batches)
    lone = sum(len(batch.keys) == 1 for batch in micro_batches)  # normalised by stored statistics, see Captioner
    unreadable = sum(len(batch.unreadable) for batch in micro_batches)
    values = [mine.images, mine.targets, unreadable, lone, objection is not None, stop.received is not None]
    with clock.peers():
        images, targets, missing, alone, failed, stopping = ranks.all_reduce_sum([float(value) for value in values])
    error: InputError | StoppedError | None = None
    if failed:
        error = InputError(next(filter(None, ranks.all_gather(objection))))
    elif stopping:
        error = stopped_by(ranks.all_gather(stop.received))
    return StepSamples(micro_batches, images, targets, missing, alone, error)
