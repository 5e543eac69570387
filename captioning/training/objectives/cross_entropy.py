"""The likelihood of people's captions under teacher forcing."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from captioning.config import Config
from captioning.data.collate import CaptionBatch
from captioning.data.padded_captions import PaddedCaptions
from captioning.model.losses import count_in_top, perplexity, token_loss
from captioning.training.objectives.objective import Losses, StepScope
from captioning.training.objectives.scheduled_sampling import ScheduledSampling
from shards.hashing import key_of

if TYPE_CHECKING:
    from captioning.training.experiment import Experiment


@dataclass(frozen=True)
class CrossEntropy:
    """Mean over the step's target tokens, and the decoder's penalty.

    Of the words read, a share are the decoder's own: ``scheduled_sampling`` in step ``total_steps``, less before.
    """

    needs_references: ClassVar[bool] = False

    label_smoothing: float = 0.0
    scheduled_sampling: float = 0.0
    total_steps: int = 1
    seed: int = 0
    top_k: int = 5

    @classmethod
    def of(cls, config: Config, experiment: "Experiment") -> "CrossEntropy":
        sampled = config.train.scheduled_sampling
        steps, top_k = experiment.total_steps(config), config.evaluate.top_k
        return cls(config.optim.label_smoothing, sampled, steps, config.seed, top_k)

    def losses(self, model: nn.Module, batch: CaptionBatch, scope: StepScope) -> Losses:
        logits, penalty = model(batch.inputs, self._read(batch, scope.step), batch.valid)
        wanted = batch.captions.targets
        loss, cross_entropy = token_loss(logits, wanted, scope.targets, scope.world_size, self.label_smoothing)
        loss = loss + penalty * (scope.world_size / max(1.0, scope.targets))
        in_top = torch.zeros_like(cross_entropy)
        if scope.detailed:
            in_top = count_in_top(self.top_k, logits.detach(), wanted)
        return Losses(loss, {"objective": loss.detach(), "loss": cross_entropy, "in_top": in_top})

    def _read(self, batch: CaptionBatch, step: int) -> PaddedCaptions | ScheduledSampling:
        """The captions, or what makes those with words of the decoder's own from its features."""
        probability = self.scheduled_sampling * min(1.0, step / self.total_steps)
        if not probability or not len(batch.captions):
            return batch.captions
        return ScheduledSampling(batch.captions, batch.samples, key_of("scheduled", self.seed, step), probability)

    def scalars(self, sums: Mapping[str, float], scope: StepScope) -> dict[str, float]:
        loss = sums["loss"] / scope.world_size
        return {
            "train/loss": loss,
            "train/perplexity": perplexity(loss),
            "train/objective": sums["objective"] / scope.world_size,
            f"train/top{self.top_k}_accuracy": sums["in_top"] / max(1.0, scope.targets),
        }
