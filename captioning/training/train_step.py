"""The optimizer step: every rank's micro-batches of one global step, forwards, backwards, and one update.

``start`` gives the device all of its work and waits for nothing; ``finish`` asks how it went. In between the caller has
the next step's samples read.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from captioning.config import Config
from captioning.data.collate import CaptionBatch
from captioning.distributed.ranks import Ranks
from captioning.model.captioner import Captioner
from captioning.model.encoders.batch_norm import eval_batch_norm
from captioning.runs.checkpoint import Checkpoint
from captioning.training.device_copies import DeviceCopies
from captioning.training.ema import WeightAverage
from captioning.training.objectives.objective import Objective, StepScope
from captioning.training.optim import encoder_multiplier, load_optimizer, lr_multiplier, set_lrs
from captioning.training.replica import Replica
from shards.errors import InputError, listed
from shards.hashing import key_of


@dataclass(frozen=True)
class StartedStep:
    """A step whose numbers the device may still be computing: each micro-batch's loss [n], and the rest as in
    StepResult."""

    step: int
    micro_batches: list[CaptionBatch]
    losses: Tensor
    sums: dict[str, Tensor]
    gradient_norm: Tensor
    lrs: dict[str, float]


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    ``sums`` are this rank's part of what the objective counts, to be added up over all ranks. ``gradient_norm`` is the
    one before clipping. ``culprits`` names the micro-batches without a finite loss, if the update was skipped for it.
    """

    sums: dict[str, Tensor]
    gradient_norm: float
    lrs: dict[str, float]
    skipped: bool
    culprits: tuple[str, ...]


class TrainStep:
    """``step`` makes one update of the global batch; optimizer, averaged weights and BatchNorm follow."""

    def __init__(
        self,
        captioner: Captioner,
        objective: Objective,
        config: Config,
        accelerator: Accelerator,
        ranks: Ranks,
        total_steps: int,
        first_step: int = 0,
    ):
        self.captioner, self.config, self.accelerator, self.ranks = captioner, config, accelerator, ranks
        self.objective = objective
        self.total_steps = total_steps
        self.lr_decays = 0  # plateaus that validation has found so far; the trainer says
        self.skipped_in_a_row: list[tuple[str, ...]] = []  # what each of them blamed
        self._copies = DeviceCopies(accelerator.device)
        captioner.to(accelerator.device)
        # Before the replica freezes an encoder that is to be trained later: its weights are averaged too.
        self.average = WeightAverage(captioner, config.train.ema_decay) if config.train.ema_decay is not None else None
        self.replica = Replica(captioner, config, accelerator, ranks, first_step)
        if self.average is not None:
            # DDP gave rank 0's weights to all: pretrained ones it alone reads.
            self.average.load(captioner.state_dict())

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.replica.optimizer

    def step(self, scope: StepScope, micro_batches: list[CaptionBatch]) -> StepResult:
        """The optimizer step of ``scope`` on this rank's micro-batches: ``start`` and ``finish``."""
        return self.finish(self.start(scope, micro_batches))

    def start(self, scope: StepScope, micro_batches: list[CaptionBatch]) -> StartedStep:
        """All of the step's work for the device, the update too. It has to be finished before the next is started."""
        step = scope.step
        if 0 < step == self.config.encoder.unfreeze_at_step:
            self.replica.unfreeze()
        # Dropout is seeded by what it is for, so no generator state has to survive a restart.
        torch.manual_seed(key_of("dropout", self.config.seed, step, self.ranks.rank) >> 1)
        optim, unfrozen_at = self.config.optim, self.config.encoder.unfreeze_at_step
        lrs = set_lrs(
            self.optimizer,
            lr_multiplier(step, self.total_steps, optim, self.lr_decays),
            encoder_multiplier(step, unfrozen_at, optim),
        )
        self.replica.keep_statistics()
        losses, sums = self._backward(scope, micro_batches)
        norm = self.replica.update(optim.max_grad_norm)
        return StartedStep(step, micro_batches, losses, sums, norm, lrs)

    def finish(self, started: StartedStep) -> StepResult:
        """Wait for the step. One whose gradient is not finite, on whichever rank that began, changes nothing on any.

        Raises:
            InputError: after ``train.max_skipped_steps`` updates in a row without a finite gradient, naming samples.
        """
        # The device is asked once: whatever it was given to do has to be done before it answers.
        norm = float(started.gradient_norm)
        culprits: tuple[str, ...] = ()
        if finite := math.isfinite(norm):
            self.skipped_in_a_row = []
            if self.average is not None:
                self.average.update(started.step)
        else:
            self.replica.restore_statistics()
            culprits = self._culprits(started)
            self._count_skipped(started.step, culprits)
        return StepResult(started.sums, norm, started.lrs, not finite, culprits)

    def copy_ahead(self, micro_batches: list[CaptionBatch]) -> None:
        """Copy the first of the next step's micro-batches to the device, beside what it computes."""
        self._copies.begin(micro_batches[0])

    def scalars(self, scope: StepScope, result: StepResult) -> dict[str, float]:
        """The step in numbers, of all ranks together: called on each of them."""
        sums = self.ranks.all_reduce_sum([float(value) for value in result.sums.values()])
        return {
            **self.objective.scalars(dict(zip(result.sums, sums, strict=True)), scope),
            "train/gradient_norm": result.gradient_norm,
            **{f"train/lr/{name}": rate for name, rate in result.lrs.items()},
        }

    def _backward(self, scope: StepScope, micro_batches: list[CaptionBatch]) -> tuple[Tensor, dict[str, Tensor]]:
        """All gradients of the step; returns each micro-batch's loss [n], and the objective's sums over them."""
        parts = []
        stored = self._without_statistics(micro_batches)
        for number, batch in enumerate(micro_batches):
            moved, last = self._copies.take(batch), number == len(micro_batches) - 1
            if not last:
                self._copies.begin(micro_batches[number + 1])
            if stored[number]:
                eval_batch_norm(self.captioner)
            with self.replica.accumulating(last):
                losses = self.objective.losses(self.replica.model, moved, scope)
                self.accelerator.backward(losses.loss)
            if stored[number]:
                self.captioner.train()
            parts.append(replace(losses, loss=losses.loss.detach()))
        sums = {name: torch.stack([part.sums[name] for part in parts]).sum(dim=0) for name in parts[0].sums}
        return torch.stack([part.loss for part in parts]), sums

    def _without_statistics(self, micro_batches: list[CaptionBatch]) -> list[bool]:
        """Which micro-batches are normalised by stored statistics: where SyncBatchNorm would wait for a rank that has
        none, having no image, or no caption of any."""
        if not self.replica.synced:
            return [False] * len(micro_batches)
        return [
            empty > 0
            for empty in self.ranks.all_reduce_sum([float(not len(batch.captions)) for batch in micro_batches])
        ]

    def _culprits(self, started: StartedStep) -> tuple[str, ...]:
        """The micro-batches of all ranks whose loss is not finite, by the keys of their samples."""
        mine = [
            f"step {started.step + 1}, rank {self.ranks.rank}: {' '.join(batch.keys)}"
            for batch, loss in zip(started.micro_batches, started.losses.tolist(), strict=True)
            if not math.isfinite(loss)
        ]
        return tuple(line for part in self.ranks.all_gather(mine) for line in part)

    def _count_skipped(self, step: int, culprits: tuple[str, ...]) -> None:
        self.skipped_in_a_row.append(culprits)
        if len(self.skipped_in_a_row) < self.config.train.max_skipped_steps:
            return
        lines = [line for skipped in reversed(self.skipped_in_a_row) for line in skipped]
        blame = f"No finite loss, the latest first:\n{listed(lines)}" if lines else "Every loss was finite."
        raise InputError(
            f"{len(self.skipped_in_a_row)} steps in a row had no finite gradient, up to step {step + 1}. {blame}\n"
            "Lower optim.*_lr, add optim.warmup_steps, or use precision=bf16 instead of fp16."
        )

    def averaged(self) -> AbstractContextManager[None]:
        """Within, the model has its averaged weights, if they are kept: those that captions are written with."""
        return nullcontext() if self.average is None else self.average.in_place()

    def saved_state(self) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor] | None]:
        """What a checkpoint holds: model, optimizer (and fp16's scaler), and the averaged weights where they are kept.
        The tensors are the living ones."""
        scaler = self.accelerator.scaler
        optimizer = {"optimizer": self.optimizer.state_dict(), **({"scaler": scaler.state_dict()} if scaler else {})}
        average = None if self.average is None else self.average.state()
        return self.captioner.state_dict(), optimizer, average

    def load(self, saved: Checkpoint) -> None:
        """Continue as a checkpoint left off: all but the weights themselves.

        Raises:
            InputError: when it holds another optimizer than this one, or averages of other weights.
        """
        state = saved.optimizer()
        try:
            load_optimizer(self.optimizer, state["optimizer"])
            if self.accelerator.scaler is not None and "scaler" in state:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            average = saved.average()
            if self.average is not None and average is not None:
                self.average.load(average)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise saved.unfitting(error) from error
