"""The way from stored images to training batches: images a second beside other loaders, the time to the first batch
from the middle of an epoch, and what the order of very large sets costs."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from launch.bench import loading_scale as data_scale
from launch.bench.image_set import prepare
from launch.bench.runner import NAMES
from launch.bench.table import Table
from launch.bench.timing import Speed, side_by_side

BASE = "baseline"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=Path, metavar="DIR", help="original images, with --captions; else drawn ones")
    parser.add_argument("--captions", type=Path, metavar="JSON", help="their captions in COCO's form")
    parser.add_argument("--only", nargs="+", choices=sorted(NAMES), metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each runner (5)")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a turn (2)")
    parser.add_argument("--length", type=int, default=20_000, help="samples of the set whose middle is sought (20000)")


def measure(arguments: argparse.Namespace) -> list[Table]:
    with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
        places = prepare(arguments.images, arguments.captions, Path(folder))
        cores = sorted(os.sched_getaffinity(0))
        names = arguments.only or list(NAMES)
        one = _speeds("one process on one core", names, places, cores[-1:], 0, arguments)
        two = _speeds("two worker processes on two cores", names, places, cores[-2:], 2, arguments)
        first = data_scale.first_batches(places, Path(folder), arguments.length)
        return [one, two, first, *data_scale.large_sets()]


class _Runner:
    """A process that works when told to; calling it is a turn."""

    def __init__(self, name: str, places: Mapping[str, Path], cores: list[int], workers: int, seconds: float):
        command = [sys.executable, "-m", "launch.bench.runner", name, json.dumps(places, default=str)]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "NUMBA_NUM_THREADS": str(max(1, workers)),
        }
        self._process = subprocess.Popen(
            [*command, ",".join(map(str, cores)), str(workers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            start_new_session=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._ask, self._answers, self.seconds = self._process.stdin, self._process.stdout, seconds
        self.per_cpu_second: list[float] = []

    @cached_property
    def absent(self) -> str | None:
        """Why it cannot take part; None when it is ready. Waits until it knows."""
        answer = self._answers.readline().strip()
        return None if answer == "ready" else answer.removeprefix("missing ") or "it ended without a word"

    def __call__(self) -> int:
        self._ask.write(f"{self.seconds}\n")
        self._ask.flush()
        images, cpu = self._answers.readline().split()
        self.per_cpu_second.append(int(images) / float(cpu))
        return int(images)

    def end(self) -> None:
        """Its workers go with it."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, 9)
        self._process.wait()
        self._ask.close()
        self._answers.close()


def _speeds(
    title: str, names: list[str], places: Mapping[str, Path], cores: list[int], workers: int, chosen: argparse.Namespace
) -> Table:
    runners = {name: _Runner(name, places, cores, workers, chosen.seconds) for name in names}
    try:
        present = {name: one for name, one in runners.items() if one.absent is None}
        speeds: dict[str, Speed] = side_by_side(present, chosen.rounds)
        if not workers:  # a process's own time; that of its workers is known only at their end
            speeds = {name: Speed(tuple(one.per_cpu_second[-chosen.rounds :])) for name, one in present.items()}
    finally:
        for one in runners.values():
            one.end()
    unit = "second" if workers else "second of processor time"
    columns = ["runner", "images/s", "slowest-fastest", "captions/s", "ours is x times", "x the baseline script"]
    table = Table(f"Images to training batches of 64: {title}", columns)
    for name, speed in sorted(speeds.items(), key=lambda item: item[1].median):
        of_ours = speeds["ours"].over(speed) if "ours" in speeds else None
        of_base = speed.over(speeds[BASE]) if BASE in speeds else None
        captions, words = NAMES[name]
        table.rows.append([words, speed.median, speed.spread, captions * speed.median or None, of_ours, of_base])
    table.notes.append(
        f"images per {unit}, medians of {chosen.rounds} turns of {chosen.seconds:g} s, on core(s) "
        f"{', '.join(map(str, cores))}; from shards of 256-pixel images where nothing else is said"
    )
    table.notes += [f"left out: {NAMES[n][1]} ({one.absent[:150]})" for n, one in runners.items() if one.absent]
    return table
