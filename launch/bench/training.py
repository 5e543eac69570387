"""Training from packed shards, against the same step on batches already there, and the field's baseline script.

The three take turns in one process, on the same images and device, with as many loader workers each. The baseline
script (baselines/) takes one caption as one sample. It reads the shards' JPEGs from a folder: smaller than the
originals it usually opens, which is in its favour. Where the decoder attends, it stops at its batch's longest caption.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from captioning.data.collate import CaptionBatch
from captioning.distributed.waits import Waits
from captioning.runs.run_folder import RunFolder
from captioning.training.experiment import Experiment
from captioning.training.objectives import scope_alone
from captioning.training.preparation import prepare
from captioning.training.train_step import TrainStep
from launch.bench.baselines.models import BaselineAttention, BaselineLstm, baseline_step
from launch.bench.baselines.script import BaselineCaptions, baseline_collate
from launch.bench.cases import Case, add_case_arguments, alone, cases, train_step_of
from launch.bench.table import Table
from launch.bench.timing import side_by_side
from shards import index as shard_index
from shards import sources
from shards.index import Index
from shards.packing.packer import Settings, pack
from shards.reader import UnreadableSample, read_sample
from shards.sources import scenes

ON_GPU = ["resnet152:none:lstm:bf16", "resnet101:layer2:attention:bf16"]
ON_CPU = ["resnet50:none:lstm:no"]
PREFETCHED = 2  # batches a worker reads ahead: torch's default, and ours
COLUMNS = ["", "images/s", "captions/s", "captions/s, times the baseline script", "slowest-fastest round"]


def arguments(parser: argparse.ArgumentParser) -> None:
    add_case_arguments(parser, ON_GPU, ON_CPU)
    parser.add_argument("--data", metavar="NAME.json", help="a packed split (without it: 1,000 drawn scenes)")
    parser.add_argument("--steps", type=int, default=50 if torch.cuda.is_available() else 4, help="timed steps a turn")
    parser.add_argument("--workers", type=int, default=12 if torch.cuda.is_available() else 1, help="loader processes")


def measure(arguments: argparse.Namespace) -> list[Table]:
    with tempfile.TemporaryDirectory() as folder:
        index = shard_index.load(Path(arguments.data)) if arguments.data else _drawn(Path(folder))
        images = _extract(index, Path(folder) / "images")
        tables = []
        for number, case in enumerate(cases(arguments)):
            tables.append(alone(_table, case, index, images, Path(folder) / f"run-{number}", arguments))
    return tables


@dataclass
class Turn:
    """A runner: ``step`` makes one update and returns its captions. Of the timed steps, seconds: all, and those in
    which the device waited for data."""

    step: Callable[[], int]
    captions_per_image: float
    waits: Waits
    timed_waiting: float = 0.0
    timed: float = 0.0


def _table(case: Case, index: Index, images: list[tuple[Path, str]], run: Path, arguments: argparse.Namespace) -> Table:
    turns = _contenders(case, index, images, run, arguments.workers)
    works = {name: _timed_steps(turn, arguments.steps) for name, turn in turns.items()}
    # Before its time is taken each runner uses up what its workers read ahead while the others had their turn.
    settle = {name: _steps(turn, PREFETCHED * arguments.workers + 1) for name, turn in turns.items()}
    speeds = side_by_side(works, arguments.rounds, before=settle)
    baseline = speeds["baseline script"]
    table = Table(f"Training, {case}: batches of {case.batch_size}, {arguments.workers} worker(s)", COLUMNS)
    for name, turn in turns.items():
        speed = speeds[name]
        table.rows.append(
            [name, speed.median / turn.captions_per_image, speed.median, speed.over(baseline), speed.spread]
        )
    ours = turns["from shards"]
    table.notes = [
        f"from shards over synthetic: {speeds['from shards'].over(speeds['synthetic']):.3f} (1 = data never waits); "
        f"waiting for data: {ours.timed_waiting / ours.timed:.1%} of its time",
        "synthetic: the same batches, read before; an image is encoded once for all its captions in both",
    ]
    return table


def _steps(turn: Turn, count: int) -> Callable[[], int]:
    return lambda: sum(turn.step() for _ in range(count))


def _timed_steps(turn: Turn, count: int) -> Callable[[], int]:
    def work() -> int:
        turn.waits.reset()
        start = time.perf_counter()
        captions = sum(turn.step() for _ in range(count))
        turn.timed += time.perf_counter() - start
        turn.timed_waiting += turn.waits.seconds()
        return captions

    return work


def _contenders(case: Case, index: Index, images: list[tuple[Path, str]], run: Path, workers: int) -> dict[str, Turn]:
    data = replace(case.config.data, train=str(index.path), min_word_freq=1)
    config = replace(case.config, run=str(run), data=data)
    experiment = prepare(config, RunFolder(config.run), 1, lambda done, total: None)
    train_step = train_step_of(case, len(experiment.vocabulary))
    experiment = replace(experiment, workers=workers)
    streamed = experiment.train_batches(config, train_step.ranks, torch.cuda.is_available()).steps(0, 1_000_000)
    device = train_step.accelerator.device
    ready = [[b.to(device) for b in next(streamed)] for _ in range(4)]
    per_image = sum(len(b.captions) for step in ready for b in step) / sum(
        len(b.inputs) for step in ready for b in step
    )
    baseline = Turn(_baseline(case, experiment, images, device, workers), 1.0, Waits(device))
    return {
        "from shards": _our_turn(train_step, streamed, per_image),
        "synthetic": _our_turn(train_step, itertools.cycle(ready), per_image),
        "baseline script": baseline,
    }


def _our_turn(train_step: TrainStep, steps: Iterator[list[CaptionBatch]], captions_per_image: float) -> Turn:
    """As the trainer goes: the next batch is read and copied while the device computes."""
    waits, ahead = Waits(train_step.accelerator.device), [next(steps)]

    def step() -> int:
        micro_batches = ahead.pop()
        started = train_step.start(scope_alone(0, micro_batches), micro_batches)
        with waits():
            ahead.append(next(steps))
        train_step.copy_ahead(ahead[0])
        train_step.finish(started)
        return sum(len(batch.captions) for batch in micro_batches)

    return Turn(step, captions_per_image, waits)


def _baseline(
    case: Case, experiment: Experiment, images: list[tuple[Path, str]], device: torch.device, workers: int
) -> Callable[[], int]:
    data = case.config.data
    dataset = BaselineCaptions(images, experiment.vocabulary.ids, data.resize_size, data.image_size)
    loader = DataLoader(
        dataset, case.batch_size, shuffle=True, num_workers=workers, collate_fn=baseline_collate, drop_last=True,
        persistent_workers=workers > 0, pin_memory=device.type == "cuda",
    )  # fmt: skip
    kind = BaselineLstm if case.decoder == "lstm" else BaselineAttention
    model = kind(case.encoder, len(experiment.vocabulary)).to(device).train()
    endless = itertools.chain.from_iterable(itertools.repeat(loader))

    def step() -> int:
        pixels, captions, lengths = next(endless)
        baseline_step(model, pixels.to(device), captions.to(device), lengths)
        return len(lengths)

    return step


def _drawn(folder: Path) -> Index:
    images, captions = scenes.write(folder, "train", 1000, seed=0)
    return pack(sources.coco(images, captions), "train", folder / "shards", Settings())


def _extract(index: Index, folder: Path) -> list[tuple[Path, str]]:
    """Every image of a split as a file, once for each of its captions."""
    folder.mkdir()
    pairs = []
    for number in range(len(index)):
        sample = read_sample(index, number)
        if not isinstance(sample, UnreadableSample):
            path = folder / f"{number}.jpg"
            path.write_bytes(sample.image_bytes)
            pairs += [(path, caption) for caption in sample.captions]
    return pairs
