"""What every objective is: batch and model in, the step's loss and what to log out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from torch import Tensor, nn

from captioning.config import Config
from captioning.data.collate import CaptionBatch

if TYPE_CHECKING:
    from captioning.training.experiment import Experiment


@dataclass(frozen=True)
class StepScope:
    """The optimizer step that a micro-batch is part of: what losses are divided by, whoever computes them.

    ``images`` and ``targets`` count readable images and target tokens of the whole global step, over all ranks and
    micro-batches. DDP averages gradients over ``world_size`` ranks; losses carry that factor, so that it cancels.
    ``detailed`` asks for what costs extra to log.
    """

    step: int  # from 0
    images: float
    targets: float
    world_size: int
    detailed: bool = False


def scope_alone(step: int, micro_batches: list[CaptionBatch], detailed: bool = False) -> StepScope:
    """The scope of a step that one process takes alone, with these micro-batches."""
    images, targets = sum(len(batch.keys) for batch in micro_batches), sum(batch.targets for batch in micro_batches)
    return StepScope(step, float(images), float(targets), 1, detailed)


@dataclass(frozen=True)
class Losses:
    """A micro-batch's part of the step's loss, [] with gradient, and of what is logged.

    ``sums`` have no gradient and may be on any device. They are to be added up over micro-batches and ranks; their
    names are the same in every micro-batch of a run, also in one without images.
    """

    loss: Tensor
    sums: dict[str, Tensor]


class Objective(Protocol):
    """An objective of training. A new one is a file beside this one and a line in ``OBJECTIVES``."""

    needs_references: ClassVar[bool]  # whether ``prepare`` counts the training captions' n-grams for it

    @classmethod
    def of(cls, config: Config, experiment: "Experiment") -> "Objective":
        """The one that a run's config asks for, made on every rank after rank 0 prepared the run."""
        ...

    def losses(self, model: nn.Module, batch: CaptionBatch, scope: StepScope) -> Losses:
        """Run the model on a micro-batch on its device. It is called exactly once, also for a batch without images:
        DDP counts on it. Added up over micro-batches and averaged over ranks, the loss's gradient is that of the whole
        step, however it was cut."""
        ...

    def scalars(self, sums: Mapping[str, float], scope: StepScope) -> dict[str, float]:
        """What to log of a step, from its sums over all micro-batches and ranks."""
        ...
