"""The training step on batches of noise that are already on the device, and how far it is from the encoder alone.

Each case runs in a process of its own. The encoder alone, forwards and (where it is trained) backwards, is the limit:
what the captioning part adds to it is what this project can do something about.
"""

import argparse
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from captioning.data.collate import CaptionBatch
from captioning.training.objectives import scope_alone
from captioning.training.train_step import TrainStep
from launch.bench.cases import Case, add_case_arguments, alone, cases, noise_batch, train_step_of
from launch.bench.table import Cell, Table
from launch.bench.timing import fastest, side_by_side

CAPTIONS = 5  # of each image
ON_GPU = [
    "resnet152:none:lstm:bf16",
    "resnet152:none:lstm:no",
    "resnet101:layer2:attention:bf16",
    "resnet101:layer2:attention:no",
    "resnet101:layer2:transformer:bf16",
]
ON_CPU = ["resnet50:none:lstm:no", "resnet50:none:lstm:bf16", "resnet18:layer2:attention:no"]
LIMITS = [
    "TFLOP/s: multiplications and additions of convolutions and matrix products, counted by torch, over the "
    "step's time; fused LSTM kernels are not counted",
    "matrix rate: the fastest product of square matrices this device did in the case's precision, measured here",
]
COLUMNS = [
    "case", "images/s", "captions/s", "encoder alone, images/s", "captioning part", "TFLOP/s", "of matrix rate",
    "peak memory, GB",
]  # fmt: skip


def arguments(parser: argparse.ArgumentParser) -> None:
    add_case_arguments(parser, ON_GPU, ON_CPU)


def measure(arguments: argparse.Namespace) -> list[Table]:
    table = Table(f"Training step, {arguments.batch_size} images of {arguments.image_size} px", COLUMNS)
    for case in cases(arguments):
        table.rows.append(alone(_row, case, arguments.rounds))
    table.notes = [
        "captioning part: share of the step that is not the encoder (decoder, loss, clipping, optimizer)",
        *LIMITS,
    ]
    return [table]


def noise_steps(case: Case) -> tuple[TrainStep, CaptionBatch, Callable[[], int]]:
    """The training step of a case, a batch of noise on its device, and the call that makes one step of that batch."""
    train_step, batch = train_step_of(case), noise_batch(case)
    batch = batch.to(train_step.accelerator.device)
    counter = iter(range(1_000_000))

    def step() -> int:
        train_step.step(scope_alone(next(counter), [batch]), [batch])
        return case.batch_size

    return train_step, batch, step


def _row(case: Case, rounds: int) -> list[Cell]:
    train_step, batch, whole = noise_steps(case)

    def encoder() -> int:
        with train_step.accelerator.autocast():
            features = train_step.captioner.encoder(batch.inputs)
        if features.requires_grad:
            features.float().sum().backward()
            train_step.optimizer.zero_grad()
        return case.batch_size

    flops = count_flops(whole)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    repeats = 10 if torch.cuda.is_available() else 1
    speeds = side_by_side({"whole": often(whole, repeats), "encoder": often(encoder, repeats)}, rounds, warm_up=2)
    speed, limit = speeds["whole"], speeds["encoder"]
    memory = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None
    achieved = flops * speed.median / case.batch_size
    share = 1 - speed.over(limit)
    rate = matrix_rate(case.precision)
    return [
        str(case), speed.median, speed.median * CAPTIONS, limit.median, f"{share:.1%}", achieved / 1e12,
        f"{achieved / rate:.0%}", memory,
    ]  # fmt: skip


def often(work: Callable[[], int], times: int) -> Callable[[], int]:
    return lambda: sum(work() for _ in range(times))


def count_flops(work: Callable[[], int]) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def matrix_rate(precision: str) -> float:
    """FLOP/s of square matrix products in the precision autocast would use."""
    cuda = torch.cuda.is_available()
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    size = 8192 if cuda else 2048
    a, b = (torch.randn(size, size, device="cuda" if cuda else "cpu").to(dtype) for _ in range(2))
    return 2 * size**3 / fastest(lambda: a @ b)
