"""An exponential moving average of the weights: often a better captioner than the weights themselves."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from captioning.model.captioner import Captioner


class WeightAverage:
    """Averages of the parameters that are trained, now or later; every rank keeps the same.

    BatchNorm's running statistics are not averaged: they are averages already.
    """

    def __init__(self, captioner: Captioner, decay: float):
        self._captioner, self._decay = captioner, decay
        self._own = {name: p for name, p in captioner.named_parameters() if p.requires_grad}
        self._averages = {name: p.detach().clone() for name, p in self._own.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Optimizer step ``step`` (from 0) is done. Early averages forget faster, or the initial weights would stay."""
        decay = min(self._decay, (1 + step) / (10 + step))
        averages, own = list(self._averages.values()), list(self._own.values())
        get_ema_multi_avg_fn(decay)(averages, own, None)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the model has the averages for weights."""
        own = {name: p.detach().clone() for name, p in self._own.items()}
        self._put(self._averages)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._own.items():
            parameter.copy_(values[name])

    def state(self) -> dict[str, Tensor]:
        """State dict of the whole captioner with the averages for weights."""
        return {**self._captioner.state_dict(), **self._averages}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        for name, average in self._averages.items():
            average.copy_(state[name])
