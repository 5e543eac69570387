"""The training objective."""

import math

import torch.nn.functional as F
from torch import Tensor


def token_loss(
    logits: Tensor, targets: Tensor, step_targets: float, world_size: int, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """A micro-batch's part of the step's loss: summed cross-entropy over the targets of the *whole* global step.

    DDP averages gradients over ranks, so each rank's part is multiplied by their number; added up over micro-batches
    and ranks it is the mean over every target token of the step, however the step was cut.

    Args:
        logits: [M, V] for the M target tokens of this micro-batch.
        targets: [M] their word ids.
        step_targets: target tokens of the global step, over all ranks and micro-batches.
        label_smoothing: share of a target's probability that all V words get alike (https://arxiv.org/abs/1512.00567).

    Returns:
        What to minimise, and the cross-entropy alone, which perplexity is taken from (it carries no gradient).
    """
    log_likelihoods = F.log_softmax(logits.float(), dim=-1)
    scale = world_size / max(1.0, step_targets)
    cross_entropy = F.nll_loss(log_likelihoods, targets, reduction="sum") * scale
    objective = cross_entropy
    if label_smoothing:
        against_all = -log_likelihoods.mean(dim=-1).sum() * scale
        objective = (1 - label_smoothing) * cross_entropy + label_smoothing * against_all
    return objective, cross_entropy.detach()


def count_in_top(k: int, logits: Tensor, targets: Tensor) -> Tensor:
    """How many of the targets [M] are among the k likeliest words of their row of logits [M, V]."""
    own = logits.gather(1, targets.unsqueeze(1))
    return ((logits > own).sum(dim=1) < k).sum()


def perplexity(loss: float) -> float:
    """Of a mean cross-entropy in nats; past what a float holds, the largest."""
    return math.exp(min(loss, 700.0))
