"""Which rank is slow. By the clock all are equally slow: they wait for one another in every step. What tells them apart
is how long each of them did not wait."""

from dataclasses import dataclass

from torch import nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class RankTimes:
    """Seconds a step that a rank itself took, those it waited for its data among them."""

    step: float
    data_wait: float


@dataclass(frozen=True)
class Stragglers:
    """The slowest rank, and the median one: of an even number the faster of two."""

    slowest_rank: int
    slowest: RankTimes
    median: RankTimes

    @classmethod
    def of(cls, times: list[RankTimes]) -> "Stragglers":
        """From the times of all ranks, in rank order."""
        ranks = sorted(range(len(times)), key=lambda rank: times[rank].step)
        return cls(ranks[-1], times[ranks[-1]], times[ranks[(len(ranks) - 1) // 2]])


def gradient_wait(model: nn.Module) -> float:
    """Seconds for which the backward pass before the latest waited for other ranks' gradients when its own were there;
    0 without DDP, whose logging measures it (CUDA events on a GPU)."""
    if not isinstance(model, DistributedDataParallel):
        return 0.0
    model._set_ddp_runtime_logging_sample_rate(1)  # else one pass in a hundred is measured
    times = model._get_ddp_logging_data()
    return max(0, times.get("backward_comm_time", 0) - times.get("backward_compute_comm_overlap_time", 0)) / 1e9
