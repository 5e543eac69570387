"""Random words without a generator: every draw is a hash of what it is for, on any device.

A draw is named by (seed, image, caption, word), in training by (seed, step, image, caption, word). Its uniform number
is a hash of that name (shards/hashing.py's SplitMix64, in torch's integers), the same bits on every device and however
images are batched, cut into micro-batches or shared out among processes. The word is a function of that number and of
the probabilities, rounded to 2^-40; those come from matrix products whose last bits may depend on the batch's shape.
So a caption changes with the batching only where a uniform number falls into that rounding, one word in about a
million; for the same shapes on the same kind of machine (a run resumed, say) it never does.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from shards.hashing import key_of

_FIXED_POINT = 2.0**40


def _signed(value: int) -> int:
    """The 64 bits of an unsigned number as torch's int64 has them."""
    return (value & (2**64 - 1)) - (value >> 63 & 1) * 2**64


_GOLDEN, _FIRST, _SECOND = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shifted(value: Tensor, by: int) -> Tensor:
    """Shifted right with zeros moving in; torch's own shift of a negative number moves ones in."""
    return (value >> by) & (2 ** (64 - by) - 1)


def hash64(key: Tensor | int, counter: Tensor | int) -> Tensor:
    """``shards.hashing.hash64`` on tensors: int64 with the bits of its uint64; ``key`` and ``counter`` broadcast, one
    of them a tensor."""
    step = counter * _GOLDEN if isinstance(counter, Tensor) else torch.tensor(_signed(counter * _GOLDEN))
    z = step + (key if isinstance(key, Tensor) else _signed(key))
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


def uniform(key: Tensor | int, counter: Tensor | int) -> Tensor:
    """``shards.hashing.uniform`` on tensors: float64 in [0, 1)."""
    return _shifted(hash64(key, counter), 11).double() * 2.0**-53


def caption_keys(seed: int, images: Sequence[int], captions: int, device: torch.device) -> Tensor:
    """A key for each caption to be drawn, int64 [B, K]; ``images`` [B] are their numbers. The uniform number of word t
    is ``uniform(keys, t)``."""
    of_images = hash64(key_of("captions", seed), torch.tensor(images, dtype=torch.int64, device=device))
    return hash64(of_images.unsqueeze(1), torch.arange(captions, device=device))


def draw_words(scores: Tensor, numbers: Tensor) -> Tensor:
    """Words int64 [...] by inverting the cumulative distribution: ``scores`` [..., V] are logits, or log-probabilities
    up to a constant, ``numbers`` float64 [...] uniform. Where nothing is finite any word may come.

    In whole numbers, because sums of floats depend on how a device adds them, and CUDA's are not deterministic.
    """
    probabilities = scores.float().softmax(dim=-1).nan_to_num(1.0)
    cumulative = (probabilities * _FIXED_POINT).to(torch.int64).cumsum(dim=-1)
    total = cumulative[..., -1:]
    wanted = torch.minimum((numbers.unsqueeze(-1) * total).to(torch.int64), total - 1)
    return torch.searchsorted(cumulative, wanted, right=True).squeeze(-1)
