"""Timing runners side by side: in turns, so that a machine whose speed drifts drifts under all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from captioning.runs.progress import bar

Work = Callable[[], int]  # does some work and returns how many units (images, captions, ...) it did


@dataclass(frozen=True)
class Speed:
    """Units per second of one runner, a number per round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def spread(self) -> str:
        """Slowest and fastest round."""
        return f"{min(self.rounds):,.4g}-{max(self.rounds):,.4g}"

    def over(self, other: "Speed") -> float:
        """How many times as fast as ``other``: the median of the rounds' own ratios, which drift leaves alone."""
        return statistics.median(a / b for a, b in zip(self.rounds, other.rounds, strict=True))


def side_by_side(
    runners: Mapping[str, Work], rounds: int, warm_up: int = 1, before: Mapping[str, Work] | None = None
) -> dict[str, Speed]:
    """Time every runner once a round, in another order each round, after ``warm_up`` rounds not counted.

    What ``before`` has for a runner is done, untimed, before each of its turns.
    """
    names = list(runners)
    rates: dict[str, list[float]] = {name: [] for name in names}
    with bar("measuring") as on_progress:
        for round_number in range(warm_up + rounds):
            turn = round_number % len(names)
            for name in names[turn:] + names[:turn]:
                if before:
                    before[name]()
                rate = _timed(runners[name])
                if round_number >= warm_up:
                    rates[name].append(rate)
            on_progress(round_number + 1, warm_up + rounds)
    return {name: Speed(tuple(of_name)) for name, of_name in rates.items()}


def fastest(work: Callable[[], object], seconds: float = 1.0) -> float:
    """Seconds of the fastest call of those made in about so many ``seconds``."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        _wait_for_device()
        start = time.perf_counter()
        work()
        _wait_for_device()
        best = min(best, time.perf_counter() - start)
    return best


def _timed(work: Work) -> float:
    _wait_for_device()
    start = time.perf_counter()
    units = work()
    _wait_for_device()
    return units / (time.perf_counter() - start)


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
