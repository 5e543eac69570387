"""The likelihood of people's captions under teacher forcing."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from captioning.data.collate import CaptionBatch
from captioning.model.losses import count_in_top5, perplexity, token_loss
from captioning.training.objectives.objective import Losses, StepScope


@dataclass(frozen=True)
class CrossEntropy:
    """Mean over the step's target tokens, and the decoder's penalty."""

    label_smoothing: float = 0.0

    def losses(self, model: nn.Module, batch: CaptionBatch, scope: StepScope) -> Losses:
        logits, penalty = model(batch.inputs, batch.captions)
        wanted = batch.captions.targets
        loss, cross_entropy = token_loss(logits, wanted, scope.targets, scope.world_size, self.label_smoothing)
        loss = loss + penalty * (scope.world_size / max(1.0, scope.targets))
        in_top5 = count_in_top5(logits.detach(), wanted) if scope.detailed else torch.zeros_like(cross_entropy)
        return Losses(loss, {"objective": loss.detach(), "loss": cross_entropy, "in_top5": in_top5})

    def scalars(self, sums: Mapping[str, float], scope: StepScope) -> dict[str, float]:
        loss = sums["loss"] / scope.world_size
        return {
            "train/loss": loss,
            "train/perplexity": perplexity(loss),
            "train/objective": sums["objective"] / scope.world_size,
            "train/top5_accuracy": sums["in_top5"] / max(1.0, scope.targets),
        }
