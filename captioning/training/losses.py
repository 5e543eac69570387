"""The training objective."""

import torch.nn.functional as F
from torch import Tensor


def token_loss(logits: Tensor, targets: Tensor, step_targets: float, world_size: int) -> Tensor:
    """A micro-batch's part of the step's loss: summed cross-entropy over the targets of the *whole* global step.

    DDP averages gradients over ranks, so each rank's part is multiplied by their number; added up over micro-batches
    and ranks it is the mean over every target token of the step, however the step was cut.

    Args:
        logits: [M, V] for the M target tokens of this micro-batch.
        targets: [M] their word ids.
        step_targets: target tokens of the global step, over all ranks and micro-batches.
    """
    total = F.cross_entropy(logits.float(), targets, reduction="sum")
    return total * (world_size / max(1.0, step_targets))
