"""Captioning in batches, against one image at a time without early stop, as the field's scripts do it; and the search
alone, on features encoded before.

Models are random and images noise. A random model seldom ends a caption, so all captions run to the limit: what is
saved where captions end, by stopping and by leaving finished images behind, is not in these figures.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from captioning.data.vocabulary import START
from captioning.distributed.ranks import init_distributed
from captioning.model.captioner import Captioner
from captioning.model.search import SearchOptions, search, search_features
from launch.bench.baselines.models import BaselineAttention, BaselineLstm
from launch.bench.cases import WORDS, Case, add_case_arguments, alone, cases, noise_batch
from launch.bench.table import Cell, Table
from launch.bench.timing import side_by_side

ON_GPU = ["resnet152:none:lstm:bf16", "resnet101:none:attention:bf16"]
ON_CPU = ["resnet18:none:lstm:no", "resnet18:none:attention:no"]
COLUMNS = ["", "captions/s", "times one at a time", "slowest-fastest round"]
BEAM = 5


def arguments(parser: argparse.ArgumentParser) -> None:
    add_case_arguments(parser, ON_GPU, ON_CPU)
    parser.add_argument("--max-words", type=int, default=20, help="words a caption (20)")
    parser.add_argument("--one-by-one", type=int, default=8, help="images a turn of the one-by-one runner (8)")


def measure(arguments: argparse.Namespace) -> list[Table]:
    return [alone(_table, case, arguments) for case in cases(arguments)]


def _table(case: Case, arguments: argparse.Namespace) -> Table:
    torch.manual_seed(0)
    accelerator, _ = init_distributed(case.precision)
    device = accelerator.device
    images = noise_batch(case).inputs.to(device)
    ours = Captioner(case.config, WORDS).to(device).eval()

    def batched(beam_size: int) -> Callable[[], int]:
        def work() -> int:
            with accelerator.autocast():
                return len(search([ours], images, SearchOptions(beam_size), arguments.max_words))

        return work

    with torch.inference_mode(), accelerator.autocast():
        features = ours.encode(images)

    def search_alone() -> int:
        with accelerator.autocast():
            return len(search_features([ours], [features], SearchOptions(BEAM), arguments.max_words))

    baseline = _baseline(case, images[: arguments.one_by_one], arguments.max_words)
    name = f"one at a time, {'greedy' if case.decoder == 'lstm' else f'beam {BEAM}'}, fp32"
    works = {f"batched, beam {BEAM}": batched(BEAM), "batched, greedy": batched(1), name: baseline}
    works[f"batched, beam {BEAM}, search alone"] = search_alone
    speeds = side_by_side(works, arguments.rounds)
    rows: list[list[Cell]] = [
        [which, speed.median, speed.over(speeds[name]), speed.spread] for which, speed in speeds.items()
    ]
    title = f"Captioning, {case}: batches of {case.batch_size}, {arguments.max_words} words"
    return Table(
        title, COLUMNS, rows, ["one at a time: the baseline script's model and loop, images normalised before"]
    )


def _baseline(case: Case, images: Tensor, max_words: int) -> Callable[[], int]:
    pixels = images.float() / 255
    if case.decoder == "lstm":
        plain = BaselineLstm(case.encoder, WORDS).to(images.device).eval()
        return lambda: len([plain.caption(image, max_words) for image in pixels.split(1)])
    looking = BaselineAttention(case.encoder, WORDS).to(images.device).eval()
    return lambda: len([looking.caption(image, max_words, START, BEAM) for image in pixels.split(1)])
