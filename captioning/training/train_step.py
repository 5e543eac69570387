"""The optimizer step: every rank's micro-batches of one global step, forwards, backwards, and one update."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from captioning.config import Config
from captioning.data.batches import CaptionBatch
from captioning.data.padded_captions import PaddedCaptions
from captioning.distributed.ranks import Ranks
from captioning.model.captioner import Captioner
from captioning.model.encoder import eval_batch_norm
from captioning.model.losses import count_in_top5, perplexity, token_loss
from captioning.runs.checkpoint import Checkpoint
from captioning.training.ema import WeightAverage
from captioning.training.optim import adamw, lr_multiplier, set_lrs
from shards.errors import InputError, listed
from shards.hashing import key_of

_CONFIGURED = ("name", "max_lr", "weight_decay", "fused")  # of an optimizer group: the config's, also when resumed


@dataclass(frozen=True)
class StepResult:
    """What a step did. Of the sums this is the rank's part: they are meant to be added up over all ranks.

    ``objective`` was minimised, ``loss`` is the cross-entropy in it; both are means over the step's target tokens,
    times W. ``in_top5`` counts target words among the five likeliest; 0 unless asked for. ``gradient_norm`` is the one
    before clipping. ``culprits`` tells which micro-batches had no finite loss, if the update was skipped for it.
    """

    objective: Tensor
    loss: Tensor
    in_top5: Tensor
    gradient_norm: float
    lrs: dict[str, float]
    skipped: bool
    culprits: tuple[str, ...]

    def scalars(self, ranks: Ranks, targets: float) -> dict[str, float]:
        """The step in numbers, of all ranks together: called on each of them."""
        objective, loss, in_top5 = ranks.all_reduce_sum(
            [float(part) for part in (self.objective, self.loss, self.in_top5)]
        )
        # Each rank's loss carries the factor W that DDP's averaging of gradients takes out again.
        loss /= ranks.world_size
        return {
            "train/loss": loss,
            "train/perplexity": perplexity(loss),
            "train/objective": objective / ranks.world_size,
            "train/top5_accuracy": in_top5 / max(1.0, targets),
            "train/gradient_norm": self.gradient_norm,
            **{f"train/lr/{name}": rate for name, rate in self.lrs.items()},
        }


class TrainStep:
    """Model and optimizer under Accelerate; ``step`` makes one update of the global batch.

    The loader is not prepared by Accelerate (it would hand out each batch W times or split it), and neither is a
    scheduler: the rate is a function of the step.
    """

    def __init__(
        self,
        captioner: Captioner,
        config: Config,
        accelerator: Accelerator,
        ranks: Ranks,
        total_steps: int,
        first_step: int = 0,
    ):
        self.captioner, self.config, self.accelerator, self.ranks = captioner, config, accelerator, ranks
        self.total_steps = total_steps
        self.skipped_in_a_row: list[tuple[str, ...]] = []  # what each of them blamed
        self.synced = config.train.sync_batch_norm and ranks.world_size > 1
        captioner.to(accelerator.device)
        self.average = WeightAverage(captioner, config.train.ema_decay) if config.train.ema_decay is not None else None
        self.optimizer = adamw(captioner, config.optim)
        if self.synced:
            nn.SyncBatchNorm.convert_sync_batchnorm(captioner)
        if config.train.compile:
            for stage in captioner.encoder.stages.values():
                stage.compile()  # in place: the parameters keep their names
        if first_step <= config.encoder.unfreeze_at_step > 0:
            captioner.encoder.train_from(
                "none"
            )  # until that step begins; the optimizer passes over what has no gradient
        self._wrap()
        if self.average is not None:
            self.average.load(
                captioner.state_dict()
            )  # DDP gave rank 0's weights to all: pretrained ones it alone reads

    def _wrap(self) -> None:
        self.model, self.optimizer = self.accelerator.prepare(self.captioner, self.optimizer)
        self._settle_gradient_buckets()
        self.model.train()
        self._statistics = [
            buffer for m in self.captioner.modules() if _is_batch_norm(m) and m.training for buffer in m.buffers()
        ]

    def _unfreeze(self) -> None:
        """The encoder is trained from now on. DDP knows the parameters it began with: it is made anew."""
        self.captioner.encoder.train_from(self.config.encoder.trainable)
        if self.ranks.world_size > 1:
            self.release()
        self._wrap()

    def release(self) -> None:
        """Let go of DDP, whose reducer must not outlive the process group that it talks over."""
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        del self.model
        self.accelerator.free_memory()

    def step(self, step: int, micro_batches: list[CaptionBatch], targets: float, with_top5: bool = False) -> StepResult:
        """Optimizer step ``step`` (from 0) on this rank's micro-batches; ``targets`` counts all ranks' target tokens.

        A step whose gradient is not finite, on whichever rank that began, changes nothing on any of them.

        Raises:
            InputError: after ``train.max_skipped_steps`` updates in a row without a finite gradient, naming samples.
        """
        if 0 < step == self.config.encoder.unfreeze_at_step:
            self._unfreeze()
        # Dropout is seeded by what it is for, so no generator state has to survive a restart.
        torch.manual_seed(key_of("dropout", self.config.seed, step, self.ranks.rank) >> 1)
        rates = set_lrs(self.optimizer, lr_multiplier(step, self.total_steps, self.config.optim))
        statistics = [buffer.clone() for buffer in self._statistics]
        parts = self._backward(micro_batches, targets, with_top5)
        norm, finite = self._update()
        culprits: tuple[str, ...] = ()
        if finite:
            self.skipped_in_a_row = []
            if self.average is not None:
                self.average.update(step)
        else:
            for buffer, before in zip(self._statistics, statistics, strict=True):
                buffer.copy_(before)
            culprits = self._culprits(step, micro_batches, parts)
            self._count_skipped(step, culprits)
        objective, loss, in_top5 = parts.sum(dim=0)
        return StepResult(objective, loss, in_top5, norm, rates, not finite, culprits)

    def _backward(self, micro_batches: list[CaptionBatch], targets: float, with_top5: bool) -> Tensor:
        """All gradients of the step; returns objective, loss and count in the top five of each micro-batch [n, 3]."""
        parts = []
        stored = self._without_statistics(micro_batches)
        for number, batch in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            if stored[number]:
                eval_batch_norm(self.captioner)
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                objective, loss, in_top5 = self._losses(batch.to(self.accelerator.device), targets, with_top5)
                self.accelerator.backward(objective)
            self.captioner.train()
            parts.append(torch.stack([objective.detach(), loss, in_top5.to(loss.dtype)]))
        return torch.stack(parts)

    def _without_statistics(self, micro_batches: list[CaptionBatch]) -> list[bool]:
        """Which micro-batches are normalised by stored statistics: where SyncBatchNorm would wait for a rank that has
        none."""
        if not self.synced:
            return [False] * len(micro_batches)
        return [
            empty > 0
            for empty in self.ranks.all_reduce_sum([float(not len(batch.captions)) for batch in micro_batches])
        ]

    def _losses(self, batch: CaptionBatch, targets: float, with_top5: bool) -> tuple[Tensor, Tensor, Tensor]:
        logits, penalty = self.model(batch.images, batch.captions)
        wanted = batch.captions.targets
        smoothing, world_size = self.config.optim.label_smoothing, self.ranks.world_size
        objective, loss = token_loss(logits, wanted, targets, world_size, smoothing)
        objective = objective + penalty * (world_size / max(1.0, targets))
        return objective, loss, count_in_top5(logits.detach(), wanted) if with_top5 else torch.zeros_like(loss)

    def _update(self) -> tuple[float, bool]:
        """Clip and update, unless the gradient is not finite. All ranks see the same one: it is all-reduced."""
        limit = self.config.optim.max_grad_norm or float("inf")
        norm = self.accelerator.clip_grad_norm_(self.captioner.parameters(), limit)
        finite = bool(torch.isfinite(norm))
        if finite or self.accelerator.scaler is not None:
            # fp16's scaler skips a step that overflowed by itself, and has to see it to lower its scale.
            self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm), finite

    def _culprits(self, step: int, micro_batches: list[CaptionBatch], parts: Tensor) -> tuple[str, ...]:
        """The micro-batches of all ranks whose loss is not finite, by the keys of their samples."""
        mine = [
            f"step {step + 1}, rank {self.ranks.rank}: {' '.join(batch.keys)}"
            for batch, loss in zip(micro_batches, parts[:, 0].tolist(), strict=True)
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

    def _settle_gradient_buckets(self) -> None:
        """A backward pass without data. DDP arranges its gradient buckets anew after its first one, and may add in
        another order from then on: done before the first step, a resumed run adds as the uninterrupted one does."""
        if self.ranks.world_size > 1:
            device = self.accelerator.device
            nothing = torch.empty(0, dtype=torch.int64)
            images = torch.empty(0, 3, 8, 8, dtype=torch.uint8, device=device)
            logits, _ = self.model(images, PaddedCaptions.of(nothing.view(0, 0), nothing, nothing))
            logits.sum().backward()
            self.optimizer.zero_grad()

    def share_buffers(self) -> None:
        """Rank 0's BatchNorm statistics to all: DDP does it at the next training step, evaluation cannot wait."""
        if self.ranks.world_size > 1:
            for buffer in self.captioner.buffers():
                torch.distributed.broadcast(buffer, src=0)

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
            for group, own in zip(state["optimizer"]["param_groups"], self.optimizer.param_groups, strict=True):
                group.update({key: own[key] for key in _CONFIGURED})
            self.optimizer.load_state_dict(state["optimizer"])
            self._check_moments()
            if self.accelerator.scaler is not None and "scaler" in state:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            average = saved.average()
            if self.average is not None and average is not None:
                self.average.load(average)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise saved.unfitting(error) from error

    def _check_moments(self) -> None:
        """A sum and a sum of squares of each gradient element: of what has another shape the kernel would read past."""
        for parameter, state in self.optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                if state[name].shape != parameter.shape:
                    raise ValueError(f"{name} has shape {list(state[name].shape)}, its weights {list(parameter.shape)}")


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)
