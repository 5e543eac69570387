"""Training on 1, 2, 4 ... all GPUs of this machine (without any, on 1 and 2 processes of its CPU), and a model of what
more devices would give on faster networks.

The model: every device does the step measured here; gradients are added up by a ring, 2 (W - 1) / W of their bytes
over the slowest link of a device, once a step. They travel while the backward pass goes on (about two thirds of what
is trained), so only what is longer than that is waited for; the other column lets nothing overlap.
"""

import argparse
import multiprocessing
import os
import socket
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import torch

from captioning.distributed.stragglers import RankTimes, Stragglers, gradient_wait
from captioning.training.objectives import StepScope
from launch.bench.cases import Case, add_case_arguments, cases, noise_batch, train_step_of
from launch.bench.table import Cell, Table

ON_GPU = ["resnet101:layer2:attention:bf16"]
ON_CPU = ["resnet18:layer2:lstm:no"]
# Bytes per second and device of all-reduce traffic: what links carry in each direction, and 80 % of that achieved.
LINKS = {"NVLink, 450 GB/s": 450e9, "400 Gb/s network": 50e9, "100 Gb/s network": 12.5e9}
ACHIEVED = 0.8
BACKWARD = 2 / 3  # of the step's time


@dataclass(frozen=True)
class Measured:
    """Seconds per step, the bytes of a rank's gradients, and how long the median rank waits for the slowest."""

    seconds: float
    gradient_bytes: int
    slowest_costs: float = 0.0  # seconds per step


def arguments(parser: argparse.ArgumentParser) -> None:
    add_case_arguments(parser, ON_GPU, ON_CPU)
    parser.add_argument("--steps", type=int, default=50 if torch.cuda.is_available() else 5, help="timed steps a round")


def measure(arguments: argparse.Namespace) -> list[Table]:
    tables = []
    for case in cases(arguments):
        sizes = process_counts(torch.cuda.device_count() if torch.cuda.is_available() else 2)
        rounds = [{w: _run(case, w, arguments.steps) for w in sizes} for _ in range(arguments.rounds)]
        best = {w: min((r[w] for r in rounds), key=lambda m: m.seconds) for w in sizes}
        tables += [_here(case, best), _model(case, best[1])]
    return tables


def process_counts(most: int) -> list[int]:
    """1, 2, 4 ... and ``most``."""
    return sorted({2**power for power in range(most.bit_length())} | {most})


def _here(case: Case, best: dict[int, Measured]) -> Table:
    cores = len(os.sched_getaffinity(0))
    columns = ["processes", "images/s", "efficiency", "waiting for the slowest"]
    table = Table(f"This machine, {case}: {case.batch_size} images a process", columns)
    for w, measured in best.items():
        efficiency, waiting = best[1].seconds / measured.seconds, measured.slowest_costs / measured.seconds
        table.rows.append([w, w * case.batch_size / measured.seconds, f"{efficiency:.0%}", f"{waiting:.0%}"])
    table.notes = ["waiting for the slowest: the share of the median rank's step, while the slowest computes"]
    if not torch.cuda.is_available():
        table.notes.append(
            f"every process computes on {max(1, cores // 2)} of {cores} cores; the fastest round of each"
        )
    return table


def _model(case: Case, alone: Measured) -> Table:
    columns = ["devices", "link", "images/s, overlapped", "efficiency", "images/s, no overlap", "efficiency "]
    table = Table(f"Modelled, not measured: {case}, {case.batch_size} images a device", columns)
    for w in (8, 64, 512):
        for link, rate in LINKS.items():
            if w > 8 and link.startswith("NVLink"):
                continue  # leaves the machine
            cells: list[Cell] = [w, link]
            for hidden in (BACKWARD * alone.seconds, 0.0):
                seconds = step_seconds(alone, w, rate * ACHIEVED, hidden)
                cells += [w * case.batch_size / seconds, f"{alone.seconds / seconds:.0%}"]
            table.rows.append(cells)
    table.notes = [
        f"from {alone.seconds:.4g} s a step and {alone.gradient_bytes / 1e6:,.1f} MB of gradients (fp32) measured here",
        f"assumed: {ACHIEVED:.0%} of the link, a ring, {BACKWARD:.0%} of the step to hide behind, no slow rank, data "
        "always there",
    ]
    return table


def step_seconds(alone: Measured, world_size: int, bytes_per_second: float, hidden_seconds: float) -> float:
    """Seconds of a step of W devices: the step alone, and what of the all-reduce is not hidden behind it."""
    travelling = 2 * (world_size - 1) / world_size * alone.gradient_bytes / bytes_per_second
    return alone.seconds + max(0.0, travelling - hidden_seconds)


def _run(case: Case, world_size: int, steps: int) -> Measured:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ProcessPoolExecutor(world_size, multiprocessing.get_context("spawn")) as processes:
        ranks = [processes.submit(_rank, case, rank, world_size, port, steps) for rank in range(world_size)]
        results = [rank.result() for rank in ranks]
    longest = max((measured for measured, _ in results), key=lambda measured: measured.seconds)
    stragglers = Stragglers.of([own for _, own in results])
    return replace(longest, slowest_costs=stragglers.slowest.step - stragglers.median.step)


def _rank(case: Case, rank: int, world_size: int, port: int, steps: int) -> tuple[Measured, RankTimes]:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    whole = replace(case, batch_size=case.batch_size * world_size)
    train_step, batch = train_step_of(whole), noise_batch(case, seed=rank)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // 2))  # one process too: two then have as much each
    batch = batch.to(train_step.accelerator.device)
    targets = train_step.ranks.all_reduce_sum([float(batch.targets)])[0]
    scope = StepScope(0, whole.batch_size, targets, world_size)
    for step in range(2):
        train_step.step(replace(scope, step=step), [batch])
    train_step.ranks.barrier()
    start, idle = time.perf_counter(), 0.0
    for step in range(steps):
        train_step.step(replace(scope, step=step), [batch])
        idle += gradient_wait(train_step.replica.model)
    seconds = (time.perf_counter() - start) / steps
    gradients = sum(p.numel() * p.element_size() for p in train_step.captioner.parameters() if p.requires_grad)
    train_step.accelerator.end_training()
    return Measured(seconds, gradients), RankTimes(seconds - idle / steps, 0.0)
