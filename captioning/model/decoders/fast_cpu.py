"""What decoders compute with: torch's own, but on a CPU, while nothing is differentiated (search, sampling,
validation), in ways that were quicker there and give the same to rounding.

torch multiplies float32 matrices by MKL; on an AMD EPYC with AVX-512 oneDNN took less than half the time. sigmoid takes
a fraction of tanh's. Other processors were not measured: those without AVX-512 keep to torch's own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SUITED = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def applies(x: Tensor) -> bool:
    """Whether what is computed from ``x`` is computed so. A graph that is compiled chooses its own ways."""
    return (
        _SUITED
        and not (torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
        and x.device.type == "cpu"
        and x.dtype == torch.float32
    )


class Linear(nn.Linear):
    """``nn.Linear``, by ``linear``."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``."""
    if applies(x):
        return F.linear(x.to_mkldnn(), weight, bias).to_dense()
    return F.linear(x, weight, bias)


def tanh(x: Tensor) -> Tensor:
    """``torch.tanh``; what was in ``x`` may be lost."""
    return x.mul_(2).sigmoid_().mul_(2).sub_(1) if applies(x) else torch.tanh(x)


def lstm_step(x: Tensor, hidden: Tensor, cell: Tensor, lstm: nn.LSTM | nn.LSTMCell) -> tuple[Tensor, Tensor]:
    """``nn.LSTMCell``, also with the weights of an ``nn.LSTM`` of one layer: inputs [N, D], hidden and cell state
    [N, H] -> the new ones."""
    weight_ih, weight_hh, bias_ih, bias_hh = lstm.parameters()
    gates = linear(x, weight_ih, bias_ih) + linear(hidden, weight_hh, bias_hh)
    enter, keep, new, show = gates.chunk(4, dim=1)
    cell = keep.sigmoid() * cell + enter.sigmoid() * new.tanh()
    return show.sigmoid() * cell.tanh(), cell
