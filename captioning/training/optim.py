"""Parameter groups, and the learning rate as a pure function of the step."""

import math

import torch
from torch import nn

from captioning.config import OptimConfig
from captioning.model.captioner import Captioner


def adamw(model: Captioner, config: OptimConfig, fused: bool) -> torch.optim.AdamW:
    """AdamW (https://arxiv.org/abs/1711.05101) with a rate for the encoder and one for all the rest.

    Weight decay spares biases and normalisation, the vectors among the parameters. Groups carry their ``name`` and
    ``peak_rate``; frozen parameters are in none.
    """
    encoder = {id(p) for p in model.encoder.parameters()}
    groups = []
    for name, inside, rate in (
        ("encoder", True, config.encoder_learning_rate),
        ("decoder", False, config.decoder_learning_rate),
    ):
        mine = [p for p in model.parameters() if p.requires_grad and (id(p) in encoder) == inside]
        for decay, matrices in ((config.weight_decay, True), (0.0, False)):
            parameters: list[nn.Parameter] = [p for p in mine if (p.dim() > 1) == matrices]
            if parameters:
                groups.append({"params": parameters, "weight_decay": decay, "name": name, "peak_rate": rate})
    return torch.optim.AdamW(groups, lr=config.decoder_learning_rate, fused=fused)


def rate_factor(step: int, total_steps: int, config: OptimConfig) -> float:
    """What the peak rates are multiplied by for optimizer step ``step`` (0 is the first)."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Set every group's rate for the coming step; returns the rates by group name."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_rate"] * factor
    return {group["name"]: group["lr"] for group in optimizer.param_groups}
