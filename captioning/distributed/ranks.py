"""Collectives between the processes of a job: numbers and objects over the CPU, whatever the gradients travel over."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from threading import Event, Thread
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, parse_flag_from_env

from captioning.distributed.arithmetic import allow_tf32
from shards.errors import InputError

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

# What gloo and NCCL say, in no more words than these where an exchange had no name of its own yet.
_OF_PEERS = (
    "gloo", "nccl", "closed by peer", "reset by peer", "broken pipe", "socket closed", "socket unexpectedly closed",
    "timeout caused pair closure", "timed out waiting", "connection timed out", "operation timed out",
)  # fmt: skip


@dataclass(frozen=True)
class Ranks:
    """Rank r of W processes. With one process every exchange is the identity."""

    rank: int
    world_size: int
    group: Any = None  # a gloo group: numbers kept on the CPU do not make the device wait
    _totals: dict[int, torch.Tensor] = field(default_factory=dict, repr=False)  # after group: to be dropped after it

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce_sum(self, values: list[float]) -> list[float]:
        """Each value summed over all ranks (float64, so counts stay exact to 2^53)."""
        if self.world_size == 1:
            return values
        # The same tensor each time. gloo's threads let go of a tensor some time after its exchange; one that Python has
        # dropped by then makes them wait for the interpreter, which in torch 2.6 may be waiting, in the group's
        # destructor, for those very threads: a rank of a finished run then hangs.
        total = self._totals.setdefault(len(values), torch.empty(len(values), dtype=torch.float64))
        total.copy_(torch.tensor(values, dtype=torch.float64))
        dist.all_reduce(total, group=self.group)
        return total.tolist()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def run_on_main(self, work: Callable[[Event], Any], stopping: Callable[[], bool]) -> Any:
        """What ``work`` returns on rank 0, on every rank; None (it is forgotten) once any rank is ``stopping``.

        Rank 0 works in a thread while all ranks exchange signs of life, so that none of them waits past the time limit
        of an exchange, however long the work takes. What it raises is raised on every rank if it is an InputError, else
        on rank 0. ``work`` is given an event that is set when it is no longer wanted, and then ten seconds to end.
        """
        done: list[Any] = []
        unwanted = Event()
        thread = Thread(target=lambda: done.append(_outcome(work, unwanted)), daemon=True)
        if self.is_main:
            thread.start()
        pause = 0.01
        while True:
            if self.is_main:
                thread.join(pause)
            pause = min(2 * pause, 0.5)
            stops, finished = self.all_reduce_sum([bool(stopping()), bool(done)])
            if stops:
                unwanted.set()
                if self.is_main:
                    thread.join(10)  # in C++ code as the interpreter exits, it would end in an abort
                return None
            if finished:
                break
        value, error = done[0] if self.is_main else (None, None)
        if error is not None and not isinstance(error, InputError):
            raise error
        value, error = self.broadcast((value, error))
        if error is not None:
            raise error
        return value

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def together(self, work: Callable[[], Result]) -> Result:
        """What ``work`` returns on this rank; an InputError on any of them is raised on every one."""
        value, objection = None, None
        try:
            value = work()
        except InputError as error:
            objection = str(error)
        if said := next(filter(None, self.all_gather(objection)), None):
            raise InputError(said)
        return cast(Result, value)

    def barrier(self) -> None:
        self.all_reduce_sum([0.0])


def _outcome(work: Callable[[Event], Any], unwanted: Event) -> tuple[Any, BaseException | None]:
    try:
        return work(unwanted), None
    except BaseException as error:  # whatever it is: without an outcome all ranks would wait for ever
        return None, error


def is_peer_failure(error: BaseException) -> bool:
    """Whether an error says that another process is gone or silent, rather than that this one went wrong."""
    said = str(error).lower()
    return isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or any(w in said for w in _OF_PEERS))


def init_distributed(
    precision: str | None = None, expected: int | None = None, hang_seconds: int | None = None, tf32: bool = True
) -> tuple[Accelerator, Ranks]:
    """Join the processes that `accelerate launch` (or torchrun, or srun) started; alone, be rank 0 of 1.

    An exchange that a rank does not come to fails half as long again after ``hang_seconds``, at least half a minute;
    without them, after PyTorch's own limits. ``tf32`` is how a GPU multiplies float32, see arithmetic.py.

    Raises:
        InputError: when ``expected`` processes did not start, Accelerate does not see those that did, or there is no
            GPU for this one.
    """
    _check_gpu(int(os.environ.get("LOCAL_RANK", "0")))
    # Without a GPU, Accelerate 1.15 joins CPU processes only when told to: otherwise each believes it is alone,
    # and W copies of the model drift apart without a word.
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    limit = timedelta(seconds=hang_seconds + max(30, hang_seconds // 2)) if hang_seconds else None
    handlers = [ddp, *([InitProcessGroupKwargs(timeout=limit)] if limit else [])]
    accelerator = Accelerator(mixed_precision=precision, cpu=not torch.cuda.is_available(), kwargs_handlers=handlers)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        raise InputError(
            f"{started} processes were started, and Accelerate sees {accelerator.num_processes}: each would train "
            "a model of its own.\nOn CPUs set ACCELERATE_USE_CPU=true before `accelerate launch`."
        )
    if expected is not None and started != expected:
        raise InputError(
            f"train.world_size={expected}, but {started} process(es) started. Start {expected}: `captioning train "
            f"CONFIG --processes {expected}` (with --cpu, if they have no GPUs)."
        )
    if started > 1 and not (torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")):
        _warn_of_cpu(started)
    _limit_threads()
    allow_tf32(tf32)
    if started == 1:
        return accelerator, Ranks(0, 1)
    ranks = Ranks(dist.get_rank(), started, dist.new_group(backend="gloo", timeout=limit))
    if accelerator.device.type == "cuda":
        _warn_of_kinds(ranks.all_gather(torch.cuda.get_device_name(accelerator.device)))
    return accelerator, ranks


def _check_gpu(local_rank: int) -> None:
    """Each process on a machine with GPUs takes the one of its number."""
    if not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"):
        return
    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        processes = os.environ.get("LOCAL_WORLD_SIZE", "?")
        raise InputError(
            f"{processes} processes were started on this machine, which has {gpus} GPU(s) to use: one GPU a process.\n"
            f"Give `accelerate launch` --num_processes {gpus} (of all machines together); CUDA_VISIBLE_DEVICES="
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', '(unset)')} may hide some."
        )


def _warn_of_cpu(processes: int) -> None:
    """A launch config may have meant GPUs; which one it was, its processes cannot tell."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning(f"no GPU here: {processes} processes compute on CPUs (ACCELERATE_USE_CPU=true: as intended)")


def _warn_of_kinds(devices: list[str]) -> None:
    """Of different devices, one a rank."""
    if len(kinds := sorted(set(devices))) > 1 and os.environ.get("RANK", "0") == "0":
        logger.warning(
            f"the processes compute on {' and '.join(kinds)}: a step takes as long as on the slowest, and they do not "
            "round alike (TF32 and bfloat16 are not on all of them), so which rank is where changes the last digits"
        )


def _limit_threads() -> None:
    """No more threads than this process's share of the cores it may use. Accelerate counts the machine's, also where a
    container or a job was given a few of them: twice the threads made steps six times as slow."""
    torch.set_num_threads(max(1, min(cores_per_rank(), torch.get_num_threads())))


def cores_per_rank() -> int:
    """This process's share of the cores that the ranks of its machine may use; 0 where there are more ranks."""
    return len(os.sched_getaffinity(0)) // ranks_per_machine()


def ranks_per_machine() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
