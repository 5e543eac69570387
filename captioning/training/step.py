"""The optimizer step: every rank's micro-batches of one global step, forwards, backwards, and one update."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from captioning.config import Config
from captioning.data.batches import CaptionBatch
from captioning.model.captioner import Captioner
from captioning.model.decoder import is_target
from captioning.ranks import Ranks
from captioning.training.losses import token_loss
from captioning.training.optim import adamw, rate_factor, set_rates
from shards.errors import InputError
from shards.hashing import key_of

_CONFIGURED = ("peak_rate", "weight_decay", "fused")  # of an optimizer group: the config's, also after a resume


@dataclass(frozen=True)
class Update:
    """What a step did: this rank's part of the loss (times W), the gradient's norm before clipping, the rates."""

    loss: Tensor
    gradient_norm: float
    rates: dict[str, float]
    skipped: bool


class Stepper:
    """Model and optimizer under Accelerate; ``step`` makes one update of the global batch.

    The loader is not prepared by Accelerate (it would hand out each batch W times or split it), and neither is a
    scheduler: the rate is a function of the step.
    """

    def __init__(self, captioner: Captioner, config: Config, accelerator: Accelerator, ranks: Ranks, total_steps: int):
        self.captioner, self.config, self.accelerator, self.ranks = captioner, config, accelerator, ranks
        self.total_steps, self.skipped_in_a_row = total_steps, 0
        optimizer = adamw(captioner, config.optim, fused=accelerator.device.type == "cuda")
        self.model, self.optimizer = accelerator.prepare(captioner, optimizer)
        self._settle_gradient_buckets()
        self.model.train()

    def step(self, step: int, micro_batches: list[CaptionBatch], targets: float) -> Update:
        """Update number ``step`` (from 0) on this rank's micro-batches; ``targets`` counts all ranks' target tokens.

        Raises:
            InputError: after ``train.max_skipped_steps`` updates in a row without a finite gradient.
        """
        # Dropout is seeded by what it is for, so no generator state has to survive a restart.
        torch.manual_seed(key_of("dropout", self.config.seed, step, self.ranks.rank) >> 1)
        rates = set_rates(self.optimizer, rate_factor(step, self.total_steps, self.config.optim))
        loss = torch.zeros((), device=self.accelerator.device)
        for number, micro_batch in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                part, penalty = self._loss(micro_batch.to(self.accelerator.device), targets)
                self.accelerator.backward(part + penalty)
            loss += part.detach()
        norm, finite = self._update()
        self._count_skipped(step, finite)
        return Update(loss, norm, rates, not finite)

    def _loss(self, batch: CaptionBatch, targets: float) -> tuple[Tensor, Tensor]:
        """Cross-entropy, which perplexity is made of, and the decoder's penalty, which is none of it."""
        logits, penalty = self.model(batch.images, batch.words, batch.lengths, batch.owner)
        wanted = batch.words[is_target(batch.words, batch.lengths)]
        world_size = self.ranks.world_size
        return token_loss(logits, wanted, targets, world_size), penalty * (world_size / max(1.0, targets))

    def _update(self) -> tuple[float, bool]:
        """Clip and update, unless the gradient is not finite. All ranks see the same one: it is all-reduced."""
        limit = self.config.optim.clip_norm or float("inf")
        norm = self.accelerator.clip_grad_norm_(self.captioner.parameters(), limit)
        finite = bool(torch.isfinite(norm))
        if finite or self.accelerator.scaler is not None:
            # fp16's scaler skips a step that overflowed by itself, and has to see it to lower its scale.
            self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm), finite

    def _count_skipped(self, step: int, finite: bool) -> None:
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= self.config.train.max_skipped_steps:
            raise InputError(
                f"{self.skipped_in_a_row} steps in a row had no finite gradient, up to step {step + 1}.\n"
                "Lower optim.*_learning_rate, add optim.warmup_steps, or use precision=bf16 instead of fp16."
            )

    def _settle_gradient_buckets(self) -> None:
        """A backward pass without data. DDP arranges its gradient buckets anew after its first one, and may add in
        another order from then on: done before the first step, a resumed run adds as the uninterrupted one does."""
        if self.ranks.world_size > 1:
            device = self.accelerator.device
            nothing = torch.empty(0, dtype=torch.int64, device=device)
            images = torch.empty(0, 3, 8, 8, dtype=torch.uint8, device=device)
            logits, _ = self.model(images, nothing.view(0, 0), nothing, nothing)
            logits.sum().backward()
            self.optimizer.zero_grad()

    def share_buffers(self) -> None:
        """Rank 0's BatchNorm statistics to all: DDP does it at the next training step, evaluation cannot wait."""
        if self.ranks.world_size > 1:
            for buffer in self.captioner.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def model_state(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.captioner.state_dict().items()}

    def optimizer_state(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {"optimizer": self.optimizer.state_dict(), **({"scaler": scaler.state_dict()} if scaler else {})}

    def load_optimizer_state(self, saved: dict[str, Any]) -> None:
        configured = [{key: group[key] for key in _CONFIGURED} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(saved["optimizer"])
        for group, settings in zip(self.optimizer.param_groups, configured, strict=True):
            group.update(settings)
        if self.accelerator.scaler is not None and "scaler" in saved:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
