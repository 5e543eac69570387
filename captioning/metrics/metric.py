"""What a metric is: a score of a set of captions that is a function of sums over its images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from captioning.metrics.ngrams import Corpus, Floats, Tokens, corpus

ORDERS = 5  # n-grams of 1 to 5 words are counted


@dataclass(frozen=True)
class TokenizedCaptions:
    """What is scored: of each image one candidate, a token list, and its references, a list of token lists."""

    candidates: list[Tokens]
    references: list[list[Tokens]]

    @cached_property
    def counted(self) -> Corpus:
        """Their n-grams.

        Raises:
            ValueError: when there is no image, or an image has no reference.
        """
        return corpus(self.candidates, self.references, ORDERS)


@dataclass(frozen=True)
class Metric:
    """One metric of a set of captions.

    ``sums`` [images, k] are its sufficient statistics; ``total`` turns them, summed over any images, [..., k], into
    scores [...]. ``each`` [images] is what every image gets alone.
    """

    name: str
    each: Floats
    sums: Floats
    total: Callable[[Floats], Floats]

    @property
    def value(self) -> float:
        """The score of all images together."""
        return float(self.total(self.sums.sum(axis=0)))


def mean_of(name: str, each: Sequence[float] | Floats) -> Metric:
    """A metric whose total is the mean over the images."""
    values = np.asarray(each, dtype=np.float64)
    return Metric(name, values, np.stack([values, np.ones_like(values)], axis=1), _mean)


def _mean(sums: Floats) -> Floats:
    return sums[..., 0] / sums[..., 1]


class Measure(Protocol):
    """One entry of the table ``METRICS``: the scores of a set of captions; several where they share their sums."""

    def __call__(self, captions: TokenizedCaptions) -> list[Metric]: ...
