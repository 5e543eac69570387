"""LSTMs that compute in their weights' own type, float32, also within autocast.

Autocast sends cuDNN's LSTM to float16 even where bfloat16 was asked for, without the loss scaling that keeps float16's
gradients from vanishing. Shapes as in lstm.py.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captioning.model.decoders.fast_cpu import applies, lstm_step


class Lstm(nn.ModuleList):
    """L layers, with ``dropout`` between them.

    Each is an ``nn.LSTM`` of its own: cuDNN's dropout makes its state anew whenever it is seeded, which is each step.
    """

    def __init__(self, input_size: int, hidden_size: int, num_layers: int, dropout: float):
        sizes = [input_size] + [hidden_size] * (num_layers - 1)
        super().__init__(_Layer(size, hidden_size, batch_first=True) for size in sizes)
        self.dropout = dropout

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Inputs [N, T, D], state [L, N, H] twice (None: zero) -> hidden states of the last layer [N, T, H], and the
        state after the last input."""
        hidden, cell = [], []
        with _without_autocast(x):
            x = x.to(next(self.parameters()).dtype)
            for number, layer in enumerate(self):
                if number:
                    x = F.dropout(x, self.dropout, self.training)
                before = None if state is None else tuple(part[number : number + 1] for part in state)
                x, after = layer(x, before)
                hidden.append(after[0])
                cell.append(after[1])
            return x, (torch.cat(hidden), torch.cat(cell))


class _Layer(nn.LSTM):
    """One layer. oneDNN's own for a CPU lays out its weights anew at each call, which one step is not worth."""

    def forward(  # type: ignore[override]
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if state is None or x.shape[1] > 1 or not applies(x):
            return super().forward(x, state)
        hidden, cell = lstm_step(x.squeeze(1), state[0].squeeze(0), state[1].squeeze(0), self)
        return hidden.unsqueeze(1), (hidden.unsqueeze(0), cell.unsqueeze(0))


class LstmCell(nn.LSTMCell):
    """One layer, one step."""

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Inputs [N, D], hidden and cell state [N, H] -> the new ones."""
        own = self.weight_ih.dtype
        with _without_autocast(x):
            x, hidden, cell = x.to(own), state[0].to(own), state[1].to(own)
            if applies(x):
                return lstm_step(x, hidden, cell, self)
            return super().forward(x, (hidden, cell))


def _without_autocast(x: Tensor) -> AbstractContextManager:
    """Entered where it is needed alone: it takes 15 us, as long as a word's step on a GPU."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()
