"""What a search decided, step by step, and the captions that come of it, read back once a batch.

Shapes: B images, K captions kept of each while searching, T steps, P places.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from captioning.model.beam_step import BeamStep


@dataclass(frozen=True)
class Hypothesis:
    """A caption: word ids without <end>, and the natural logarithm of its probability, <end> counted in.

    ``attention`` float32 [len(ids), P] says where the model looked for each word; None where it does not look.
    """

    ids: tuple[int, ...]
    log_probability: float
    attention: Tensor | None = None


class Trace:
    """The steps of a search, on its device: at each, of every caption, the one it continues and with which word, the
    log-probability of those that ended (-inf for the others), and where they looked: [T, B, K] and [T, B, K, P]."""

    def __init__(self, steps: int, images: int, captions: int, device: torch.device):
        shape = (steps, images, captions)
        self.parents = torch.zeros(shape, dtype=torch.int64, device=device)
        self.words = torch.zeros_like(self.parents)
        self.ends = torch.full(shape, -torch.inf, device=device)
        self.weights: Tensor | None = None
        self.steps = 0

    def add(self, images: Tensor, step: BeamStep, ends: Tensor, weights: Tensor | None) -> None:
        """A step of ``images`` int64 [I], those still searched for; ``weights`` float [I, K, P]."""
        self.parents[self.steps].index_copy_(0, images, step.parents)
        self.words[self.steps].index_copy_(0, images, step.words)
        self.ends[self.steps].index_copy_(0, images, ends)
        if weights is not None:
            if self.weights is None:
                self.weights = weights.new_zeros(*self.words.shape, weights.shape[2])
            self.weights[self.steps].index_copy_(0, images, weights)
        self.steps += 1

    def best(self, groups: int, length_penalty: float) -> "Paths":
        """The ended captions of each image, the best first: of every group as many as it has beams, K in all."""
        order = self._ranked(groups, length_penalty)
        captions = self.words.shape[2]
        values = self.ends[: self.steps].transpose(0, 1).flatten(1).gather(1, order)
        lengths, beams = order // captions, order % captions
        path = [beams]  # from the last word to the first: the beams after it, at last those before the first
        for t in range(self.steps - 2, -1, -1):
            path.append(torch.where(t < lengths, self.parents[t].gather(1, path[-1]), path[-1]))
        beams = torch.stack(path[::-1])
        ids = self.words[: self.steps - 1].gather(2, beams[1:])
        weights = None
        if self.weights is not None:
            looked = beams[:-1].unsqueeze(3).expand(-1, -1, -1, self.weights.shape[3])
            weights = self.weights[: self.steps - 1].gather(2, looked).permute(1, 2, 0, 3)
        return Paths(lengths, values, ids.permute(1, 2, 0), weights)

    def _ranked(self, groups: int, length_penalty: float) -> Tensor:
        """Which of the T * K beams of each image hold the captions to be kept, int64 [B, K]; of equal ones those that
        ended first. Where fewer have ended, beams that did not fill the end."""
        ends = self.ends[: self.steps].transpose(0, 1)  # [B, T, K]
        divisors = [(t + 1) ** length_penalty for t in range(self.steps)]
        ranks = -ends.double() / torch.tensor(divisors, dtype=torch.float64, device=ends.device).unsqueeze(1)
        ranks = torch.where(ends > -torch.inf, ranks, torch.inf)  # NaN too is no caption
        by_group = ranks.unflatten(2, (groups, -1)).transpose(1, 2)  # [B, groups, T, K / groups]
        size = by_group.shape[3]
        surplus = by_group.flatten(2).argsort(dim=2, stable=True)[:, :, size:]
        kept = by_group.flatten(2).scatter(2, surplus, torch.inf).view_as(by_group)
        return kept.transpose(1, 2).flatten(1).argsort(dim=1, stable=True)[:, : ends.shape[2]]


@dataclass(frozen=True)
class Paths:
    """K captions of each of B images: ``lengths`` in words and ``log_probabilities`` (not above -inf: there is none)
    [B, K], ``ids`` [B, K, T] and where they looked, ``weights`` [B, K, T, P]."""

    lengths: Tensor
    log_probabilities: Tensor
    ids: Tensor
    weights: Tensor | None

    def hypotheses(self) -> list[list[Hypothesis]]:
        """Read from the device."""
        weights = None if self.weights is None else self.weights.cpu()
        numbers = zip(self.lengths.tolist(), self.log_probabilities.tolist(), self.ids.tolist(), strict=True)
        return [
            [
                # A copy: one caption's attention does not hold all of the batch's.
                Hypothesis(tuple(ids[:n]), value, None if weights is None else weights[image, place, :n].clone())
                for place, (n, value, ids) in enumerate(zip(*of_image, strict=True))
                if value > -math.inf
            ]
            for image, of_image in enumerate(numbers)
        ]
