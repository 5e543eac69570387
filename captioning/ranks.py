"""This process among its peers: plain numbers and objects exchanged on the CPU, whatever the gradients travel over."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """Rank r of W processes. With one process every exchange is the identity."""

    rank: int
    world_size: int
    group: Any = None  # a gloo group: numbers kept on the CPU do not make the device wait

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sums(self, values: list[float]) -> list[float]:
        """Each value summed over all ranks (float64, so counts stay exact to 2^53)."""
        if self.world_size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.group)
        return total.tolist()

    def from_main(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def barrier(self) -> None:
        self.sums([0.0])


def joined() -> Ranks:
    """The ranks of the process group that is up (accelerate starts it); rank 0 of 1 when there is none."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Ranks(0, 1)
    return Ranks(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo"))
