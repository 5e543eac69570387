"""Where the time of a training step goes: the device's kernels, the gaps between them, its limits.

Each case trains on a batch of noise that is already there, in a process of its own: timed, then traced by torch's
profiler. A CPU has no kernels; its operators stand for them.
"""

import argparse
import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, schedule
from torch.profiler import profile as torch_profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launch.bench.cases import Case, add_case_arguments, alone, cases
from launch.bench.step import LIMITS, count_flops, matrix_rate, noise_steps, often
from launch.bench.table import Cell, Table
from launch.bench.timing import fastest, side_by_side
from shards.errors import InputError

ON_GPU = ["resnet152:none:lstm:bf16", "resnet101:layer2:attention:bf16", "resnet101:layer2:transformer:bf16"]
ON_CPU = ["resnet18:layer2:attention:no"]
SHOWN = 15  # kernels of a case, the longest
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of the trace


def arguments(parser: argparse.ArgumentParser) -> None:
    add_case_arguments(parser, ON_GPU, ON_CPU)
    parser.add_argument("--steps", type=int, default=3, help="steps that are traced (3)")


def measure(arguments: argparse.Namespace) -> list[Table]:
    what = "kernel" if torch.cuda.is_available() else "operator"
    columns = [
        "case", "ms a step", "ms a step, traced", "idle", f"{what}s a step", "TFLOP/s", "of matrix rate",
        "GB/s", "of copy rate",
    ]  # fmt: skip
    summary = Table(f"Profile, {arguments.batch_size} images of {arguments.image_size} px", columns)
    summary.notes = [
        f"idle: share of the traced steps in which no {what} ran; tracing itself makes such gaps longer",
        *LIMITS,
        "GB/s, an estimate: bytes of every operator's inputs and outputs, each once, over the same time; caches save "
        "some of that traffic, and kernels that pass over their data twice need more",
        "copy rate: bytes read and written by the fastest copy, measured here",
    ]
    tables = [summary]
    for case in cases(arguments):
        row, kernels = alone(_profile, case, arguments.rounds, arguments.steps)
        summary.rows.append(row)
        columns = [what, "share of their time", "ms a step", "calls a step"]
        tables.append(Table(f"The longest {what}s of {case}", columns, kernels))
    return tables


def _profile(case: Case, rounds: int, steps: int) -> tuple[list[Cell], list[list[Cell]]]:
    _, _, step = noise_steps(case)
    flops, moved = count_flops(step), count_bytes(step)
    repeats = 10 if torch.cuda.is_available() else 1
    speed = side_by_side({"step": often(step, repeats)}, rounds, warm_up=1)["step"]
    seconds = case.batch_size / speed.median
    if not (events := trace(step, steps)):
        raise InputError("torch's profiler saw nothing run on the device: is it allowed to trace here?")
    busy, whole = busy_and_whole(events)
    row: list[Cell] = [
        str(case), 1e3 * seconds, whole / 1e3 / steps, f"{1 - busy / whole:.1%}", len(events) / steps,
        flops / seconds / 1e12, f"{flops / seconds / matrix_rate(case.precision):.0%}",
        moved / seconds / 1e9, f"{moved / seconds / copy_rate():.0%}",
    ]  # fmt: skip
    own, calls = own_times(events), Counter(event.name for event in events)
    kernels: list[list[Cell]] = [
        [name[:100], f"{microseconds / sum(own.values()):.1%}", microseconds / 1e3 / steps, calls[name] / steps]
        for name, microseconds in sorted(own.items(), key=lambda item: -item[1])[:SHOWN]
    ]
    return row, kernels


class Event(NamedTuple):
    """A kernel, or an operator, of a trace; ``lane`` is its stream or thread. Microseconds."""

    name: str
    lane: tuple[Any, Any]
    start: float
    duration: float

    @property
    def end(self) -> float:
        return self.start + self.duration


def trace(step: Callable[[], int], steps: int) -> list[Event]:
    """What ran on the device in ``steps`` steps, after one that the profiler itself warms up in."""
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        with torch_profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=1, active=steps, repeat=1),
            on_trace_ready=lambda done: done.export_chrome_trace(str(path)),
        ) as profiler:
            for _ in range(1 + steps):
                step()
                profiler.step()
        return events_of(json.loads(path.read_text(encoding="utf-8")), _ON_DEVICE if cuda else ("cpu_op",))


def events_of(document: dict[str, Any], categories: Iterable[str]) -> list[Event]:
    """The events of a trace in Chrome's format, of these categories."""
    return [
        Event(entry["name"], (entry["pid"], entry["tid"]), float(entry["ts"]), float(entry["dur"]))
        for entry in document["traceEvents"]
        if entry.get("ph") == "X" and entry.get("cat") in categories
    ]


def busy_and_whole(events: list[Event]) -> tuple[float, float]:
    """Microseconds in which at least one ran, and from the first one's start to the last one's end."""
    ordered = sorted(events, key=lambda event: event.start)
    busy, reached = 0.0, ordered[0].start
    for event in ordered:
        busy += max(0.0, event.end - max(reached, event.start))
        reached = max(reached, event.end)
    return busy, reached - ordered[0].start


def own_times(events: list[Event]) -> dict[str, float]:
    """Microseconds by name, without those of the operators that one calls."""
    own: dict[str, float] = defaultdict(float)
    lanes = defaultdict(list)
    for event in events:
        lanes[event.lane].append(event)
    for lane in lanes.values():
        around: list[Event] = []
        for event in sorted(lane, key=lambda event: (event.start, -event.duration)):
            while around and around[-1].end <= event.start:
                around.pop()
            if around:
                own[around[-1].name] -= event.duration
            own[event.name] += event.duration
            around.append(event)
    return own


class _ByteCounter(TorchDispatchMode):
    """Adds up the bytes of every operator's inputs and outputs; one that is written in place is both."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        if not operator.is_view and "empty" not in operator.name():  # those touch no values
            self.total += sum(map(_size, tree_leaves((args, kwargs, result))))
        return result


def _size(value: object) -> int:
    """Of a tensor in memory: one that is expanded has fewer bytes than elements say."""
    return min(value.nbytes, value.untyped_storage().nbytes()) if isinstance(value, Tensor) else 0


def count_bytes(work: Callable[[], int]) -> int:
    with _ByteCounter() as counter:
        work()
    return counter.total


def copy_rate() -> float:
    """Bytes a second, read and written, of the fastest copy of 256 MB."""
    source = torch.ones(64_000_000, device="cuda" if torch.cuda.is_available() else "cpu")
    target = torch.empty_like(source)
    return 2 * source.nbytes / fastest(lambda: target.copy_(source))
