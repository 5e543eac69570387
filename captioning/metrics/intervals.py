"""How far a score could be chance: bootstrap intervals, and paired tests of two sets of captions of the same images.

Images are the unit that is drawn. Document frequencies and the information of n-grams stay those of the whole set.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from captioning.metrics.metric import Metric
from captioning.metrics.ngrams import Floats

LEVEL, RESAMPLES, SEED = 0.95, 2000, 0
_BLOCK_VALUES = 4_000_000  # numbers drawn at once: 32 MB

Interval = tuple[float, float]


@dataclass(frozen=True)
class Difference:
    """Score B minus score A, its bootstrap interval, and how probable so large a difference is by chance."""

    name: str
    a: float
    b: float
    interval: Interval
    p_value: float


def intervals(metrics: Sequence[Metric]) -> dict[str, Interval]:
    """95 % percentile bootstrap interval of every metric (Efron & Tibshirani 1993), 2,000 resamples, seeded."""
    drawn = _totals(metrics, _with_replacement)
    return {metric.name: _middle(values) for metric, values in zip(metrics, drawn, strict=True)}


def differences(a: Sequence[Metric], b: Sequence[Metric]) -> list[Difference]:
    """Every metric of two sets of captions of the same images, in the same order.

    The interval is a paired bootstrap's (Koehn, EMNLP 2004). The two-sided p-value is approximate randomisation's
    (Noreen 1989; Riezler & Maxwell 2005): how often captions dealt at random to A and B differ as much.
    """
    drawn_a, drawn_b = _totals(a, _with_replacement), _totals(b, _with_replacement)
    # B - A, added to A for the images whose captions change hands and taken from B for them.
    moved = [Metric(y.name, y.each - x.each, y.sums - x.sums, lambda sums: sums) for x, y in zip(a, b, strict=True)]
    shuffled = _totals(moved, _every_other)
    results = []
    for x, y, resampled_a, resampled_b, change in zip(a, b, drawn_a, drawn_b, shuffled, strict=True):
        sum_a, sum_b = x.sums.sum(axis=0), y.sums.sum(axis=0)
        by_chance = np.abs(y.total(sum_b - change) - x.total(sum_a + change))
        observed = abs(y.value - x.value)
        p_value = (1 + int((by_chance >= observed - 1e-12).sum())) / (1 + len(by_chance))
        results.append(Difference(x.name, x.value, y.value, _middle(resampled_b - resampled_a), p_value))
    return results


def _middle(values: Floats) -> Interval:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


Draw = Callable[[np.random.Generator, int, int], Floats]


def _with_replacement(rng: np.random.Generator, count: int, images: int) -> Floats:
    """How often each image is drawn, in each of ``count`` draws of as many images as there are: [count, images]."""
    drawn = rng.integers(images, size=(count, images)) + images * np.arange(count)[:, None]
    return np.bincount(drawn.ravel(), minlength=count * images).reshape(count, images).astype(np.float64)


def _every_other(rng: np.random.Generator, count: int, images: int) -> Floats:
    """Each image in or out, as a coin falls: [count, images] of 0 and 1."""
    return rng.integers(2, size=(count, images)).astype(np.float64)


def _totals(metrics: Sequence[Metric], draw: Draw) -> list[Floats]:
    """Each metric's total over RESAMPLES draws of the images; all metrics see the same draws."""
    distinct = list({id(metric.sums): metric.sums for metric in metrics}.values())
    columns = np.cumsum([0, *(sums.shape[1] for sums in distinct)])
    place = {id(sums): slice(columns[i], columns[i + 1]) for i, sums in enumerate(distinct)}
    everything = np.concatenate(distinct, axis=1)
    summed = np.concatenate([weights @ everything for weights in _draws(draw, len(everything))])
    return [metric.total(summed[:, place[id(metric.sums)]]) for metric in metrics]


def _draws(draw: Draw, images: int) -> Iterator[Floats]:
    rng = np.random.default_rng(SEED)
    at_once = max(1, _BLOCK_VALUES // images)
    for start in range(0, RESAMPLES, at_once):
        yield draw(rng, min(at_once, RESAMPLES - start), images)
