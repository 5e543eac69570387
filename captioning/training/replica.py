"""This rank's copy of the model under DDP: wrapping, unfreezing, and BatchNorm's statistics."""

from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from captioning.config import Config
from captioning.data.padded_captions import PaddedCaptions
from captioning.distributed.ranks import Ranks
from captioning.model.captioner import Captioner
from captioning.model.encoders.batch_norm import is_batch_norm
from captioning.training.optim import build_optimizer
from shards.order import largest_micro_batch


class Replica:
    """``model`` is what is trained: the captioner, with several ranks wrapped in DDP; ``optimizer`` updates it.

    Neither the loader nor a scheduler is prepared by Accelerate: it would hand out each batch W times or split it, and
    the rate is a function of the step.
    """

    def __init__(self, captioner: Captioner, config: Config, accelerator: Accelerator, ranks: Ranks, first_step: int):
        self.captioner, self.config, self.accelerator, self.ranks = captioner, config, accelerator, ranks
        self.synced = config.train.sync_batch_norm and ranks.world_size > 1
        optimizer = build_optimizer(captioner, config.optim)
        if self.synced:
            nn.SyncBatchNorm.convert_sync_batchnorm(captioner)
        if config.train.compile:
            batch = largest_micro_batch(config.train.global_batch_size, ranks.world_size, config.train.micro_batch_size)
            captioner.compile_parts(batch, config.evaluate.batch_size)
        if first_step <= config.encoder.unfreeze_at_step > 0:
            # Until that step begins; the optimizer passes over what has no gradient.
            captioner.encoder.train_from("none")
        self._wrap(optimizer)

    def _wrap(self, optimizer: torch.optim.Optimizer) -> None:
        self.model: nn.Module
        self.optimizer: AcceleratedOptimizer
        self.model, self.optimizer = self.accelerator.prepare(self.captioner, optimizer)
        if self.ranks.world_size > 1:
            # Making it, DDP gave rank 0's buffers to all. It would do so again at each step, one small copy a buffer,
            # and nothing needs it: in training BatchNorm uses the batch's own statistics.
            assert isinstance(self.model, nn.parallel.DistributedDataParallel)
            self.model.broadcast_buffers = False
        self._settle_gradient_buckets()
        self.model.train()
        self.statistics = [
            buffer for m in self.captioner.modules() if is_batch_norm(m) and m.training for buffer in m.buffers()
        ]
        self._kept = [buffer.clone() for buffer in self.statistics]

    def unfreeze(self) -> None:
        """The encoder is trained from now on. DDP knows the parameters it began with: it is made anew."""
        self.captioner.encoder.train_from(self.config.encoder.trainable)
        if self.ranks.world_size > 1:
            self.release()
        self._wrap(self.optimizer)

    def release(self) -> None:
        """Let go of DDP, whose reducer must not outlive the process group that it talks over."""
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        del self.model
        self.accelerator.free_memory()

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Within, gradients are added up on this rank alone, unless it is the step's ``last`` micro-batch."""
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def update(self, max_norm: float | None) -> Tensor:
        """Clip the gradients to ``max_norm`` and update, unless they are not finite, which no kernel waits to hear: the
        fused optimizers look themselves. All ranks have the same ones. Returns their norm before clipping, []."""
        norm = self.accelerator.clip_grad_norm_(self.captioner.parameters(), max_norm or float("inf"))
        if self.accelerator.scaler is None:  # it tells the optimizer in the same way
            self.optimizer.optimizer.found_inf = (~norm.isfinite()).float()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def share_buffers(self) -> None:
        """Rank 0's BatchNorm statistics to all, where they are used rather than collected: in evaluation, and for a
        micro-batch of one image. One exchange for each type of number."""
        if self.ranks.world_size == 1:
            return
        buffers = list(self.captioner.buffers())
        for kind in dict.fromkeys(buffer.dtype for buffer in buffers):
            of_kind = [buffer for buffer in buffers if buffer.dtype == kind]
            flat = torch.cat([buffer.flatten() for buffer in of_kind])
            torch.distributed.broadcast(flat, src=0)
            for buffer, values in zip(of_kind, flat.split([b.numel() for b in of_kind]), strict=True):
                buffer.copy_(values.view_as(buffer))

    def keep_statistics(self) -> None:
        """Remember BatchNorm's statistics, for ``restore_statistics``."""
        if self.statistics:
            torch._foreach_copy_(self._kept, self.statistics)

    def restore_statistics(self) -> None:
        if self.statistics:
            torch._foreach_copy_(self.statistics, self._kept)

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
