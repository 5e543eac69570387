"""Saving while training goes on: how long a loop of short steps is held up by a checkpoint, while the loop copies its
state, and while a thread writes the copy. The loop computes on one core; a second one is for the thread.
"""

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captioning.runs.checkpoint import RunState
from captioning.runs.saver import Saver
from launch.bench.table import Table

TENSORS = 64  # of the model; AdamW has two moments of each
TEXTS = {"config.yaml": "seed: 0\n", "vocabulary.json": "{}"}
STEP_S = 0.002


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--megabytes", type=int, default=300, help="model and AdamW's moments, float32 (300)")
    parser.add_argument("--saves", type=int, default=5, help="saves of the run (5)")
    parser.add_argument("--folder", help="where the run is written (a temporary folder)")


def measure(arguments: argparse.Namespace) -> list[Table]:
    torch.set_num_threads(1)
    model, optimizer = adamw_state(arguments.megabytes * 1_000_000)
    step = step_of(STEP_S)
    alone: list[list[float]] = []  # seconds of each step while nothing is written, as long as a save takes
    copying: list[float] = []
    writing: list[list[float]] = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        saver = Saver(Path(folder), TEXTS, keep=2, background=True)
        saver.make_room(model, optimizer)
        for number in range(1, arguments.saves + 1):
            quiet = sum(writing[-1]) if writing else 2.0
            alone.append(steps_while(step, partial(_is_before, time.perf_counter() + quiet)))
            state = RunState(number, number, 1, "none")
            copying.append(timed(partial(saver.start, state, model, optimizer)))
            writing.append(steps_while(step, lambda: saver.is_writing))
            if (objection := saver.finish()) is not None:
                raise OSError(objection)
    return [_table(arguments.megabytes, alone, copying, writing)]


def _table(megabytes: int, alone: list[list[float]], copying: list[float], writing: list[list[float]]) -> Table:
    table = Table(
        f"A loop of {STEP_S * 1e3:g} ms a step, {megabytes} MB saved in the background",
        ["milliseconds", "median save", "longest", "each save"],
    )
    for what, seconds in (
        ("the loop waits for the copy", copying),
        ("longest step while the copy is written", list(map(max, writing))),
        ("longest step while nothing is, as many seconds", list(map(max, alone))),
        ("median step while the copy is written", list(map(statistics.median, writing))),
        ("median step while nothing is", list(map(statistics.median, alone))),
    ):
        each = ", ".join(f"{1e3 * value:.1f}" for value in seconds)
        table.rows.append([what, 1e3 * statistics.median(seconds), 1e3 * max(seconds), each])
    table.notes = ["without the time in which other programs had the loop's core, where Linux counts it"]
    return table


def adamw_state(size: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A model's state dict and its optimizer's, of ``size`` bytes together."""
    count = size // 3 // 4 // TENSORS
    model = {f"layer{number}.weight": torch.randn(count) for number in range(TENSORS)}
    moments = {
        number: {"step": torch.tensor(3.0), "exp_avg": torch.randn(count), "exp_avg_sq": torch.rand(count)}
        for number in range(TENSORS)
    }
    return model, {"optimizer": {"state": moments, "param_groups": [{"lr": 0.1, "params": list(range(TENSORS))}]}}


def step_of(seconds: float) -> Callable[[], None]:
    """Work of about so long, as a training loop's: small tensor operations, Python between them."""
    matrix = torch.rand(32, 32) / 32

    def work(rounds: int) -> None:
        value = matrix
        for _ in range(rounds):
            value = value @ matrix

    a_round = min(timed(lambda: work(100)) for _ in range(20)) / 100
    return lambda: work(max(1, round(seconds / a_round)))


def steps_while(step: Callable[[], None], is_wanted: Callable[[], bool]) -> list[float]:
    """Seconds of each step; at least one is done."""
    seconds = [timed(step)]
    while is_wanted():
        seconds.append(timed(step))
    return seconds


def _is_before(end: float) -> bool:
    return time.perf_counter() < end


def timed(work: Callable[[], object]) -> float:
    """Seconds it took this thread, without those in which other programs had its core."""
    queued, start = seconds_queued(), time.perf_counter()
    work()
    return max(1e-9, time.perf_counter() - start - (seconds_queued() - queued))


def seconds_queued() -> float:
    """For which this thread has been ready and waited for a core, so far; 0 where Linux does not count them."""
    try:
        return int(Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0
