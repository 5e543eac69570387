"""This process among its peers: plain numbers and objects exchanged on the CPU, whatever the gradients travel over."""

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from shards.errors import InputError


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


def join(precision: str | None = None, expected: int | None = None) -> tuple[Accelerator, Ranks]:
    """Join the processes that `accelerate launch` (or torchrun, or srun) started; alone, be rank 0 of 1.

    Raises:
        InputError: when ``expected`` processes did not start, or Accelerate does not see those that did.
    """
    # Without a GPU, Accelerate 1.15 joins CPU processes only when told to: otherwise each believes it is alone,
    # and W copies of the model drift apart without a word.
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    accelerator = Accelerator(mixed_precision=precision, cpu=not torch.cuda.is_available(), kwargs_handlers=[ddp])
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        raise InputError(
            f"{started} processes were started, and Accelerate sees {accelerator.num_processes}: each would train "
            "a model of its own.\nOn CPUs set ACCELERATE_USE_CPU=true before `accelerate launch`."
        )
    if expected is not None and started != expected:
        raise InputError(
            f"train.world_size={expected}, but {started} process(es) started.\n"
            "`accelerate launch --cpu` always starts one: use --config_file launch/accelerate/cpu2.yaml instead."
        )
    if started == 1:
        return accelerator, Ranks(0, 1)
    return accelerator, Ranks(dist.get_rank(), started, dist.new_group(backend="gloo"))
