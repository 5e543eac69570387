"""Training from features that were encoded once, against the same training from pixels with the encoder frozen.

Both read their samples from shards in this process and take the same steps, in turns: what differs is that one decodes
and encodes every image again. The images are drawn; the weights are random, which costs as much as trained ones.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import torch

from captioning.config import Config, from_dict
from captioning.data.captions import EncodedCaptions, encode
from captioning.data.dataset import train_dataset
from captioning.data.transforms import preprocessing_of
from captioning.distributed.ranks import Ranks, init_distributed
from captioning.inference.encode_split import Encoding, FrozenEncoder, encode_split
from captioning.model.captioner import Captioner
from captioning.training.objectives import CrossEntropy, scope_alone
from captioning.training.train_step import TrainStep
from launch.bench.cases import WORDS
from launch.bench.table import Table
from launch.bench.timing import side_by_side
from shards import sources
from shards.index import Index
from shards.packing.packer import Settings, pack
from shards.sources import scenes

COLUMNS = ["encoder, frozen", "pixels, captions/s", "features, captions/s", "times as fast", "lowest", "highest"]


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--encoder", nargs="+", default=["resnet50", "resnet152"], metavar="NAME", help="(resnet50 resnet152)")
    add("--decoder", default="lstm", help="lstm, attention or transformer (lstm)")
    add("--images", type=int, default=128, help="drawn images (128)")
    add("--batch-size", type=int, default=32, help="images a step (32)")
    add("--steps", type=int, default=4, help="steps a turn (4)")
    add("--rounds", type=int, default=5, help="turns each gets (5)")


def measure(arguments: argparse.Namespace) -> list[Table]:
    title = f"Training from features, {arguments.decoder}, {arguments.batch_size} images of 224 px a step"
    table = Table(title, COLUMNS)
    with tempfile.TemporaryDirectory() as folder:
        images, captions = scenes.write(Path(folder) / "drawn", "train", arguments.images, seed=0)
        index = pack(sources.coco(images, captions), "train", Path(folder) / "shards", Settings())
        for encoder in arguments.encoder:
            table.rows.append(_row(encoder, index, Path(folder) / encoder, arguments))
    table.notes = ["the median of the turns' own ratios; features are float16, one plain view"]
    return [table]


def _row(encoder: str, index: Index, folder: Path, arguments: argparse.Namespace) -> list:
    config = _config(encoder, arguments)
    accelerator, ranks = init_distributed("no")
    torch.manual_seed(0)
    model = Captioner(config, WORDS)
    for name, parameter in model.encoder.named_parameters():
        if name.endswith("bn3.weight"):  # random residual branches add up, in 152 layers beyond what float16 holds
            torch.nn.init.zeros_(parameter)
    train_step = TrainStep(model, CrossEntropy(), config, accelerator, ranks, 1_000_000)
    frozen = FrozenEncoder(model.encoder, config, not model.decoder.uses_grid, accelerator.device)
    features = encode_split(index, frozen, folder / "features", Encoding(), Ranks(0, 1))
    model.train()
    steps = count()
    runners = {
        name: _runner(split, folder / name, config, train_step, steps, arguments.steps)
        for name, split in (("pixels", index), ("stored", features))
    }
    speeds = side_by_side(runners, arguments.rounds)
    ratios = [fast / slow for fast, slow in zip(speeds["stored"].rounds, speeds["pixels"].rounds, strict=True)]
    faster = speeds["stored"].over(speeds["pixels"])
    return [encoder, speeds["pixels"].median, speeds["stored"].median, faster, min(ratios), max(ratios)]


def _config(encoder: str, arguments: argparse.Namespace) -> Config:
    sizes = {"global_batch_size": arguments.batch_size, "micro_batch_size": arguments.batch_size}
    return from_dict(
        {
            "run": "none",
            "data": {"train": "drawn"},
            "encoder": {"name": encoder},
            "decoder": {"name": arguments.decoder, "embedding_size": 512},
            "train": {**sizes, "total_steps": 1_000_000},
        },
        f"--encoder {encoder} --decoder {arguments.decoder}",
    )


def _runner(
    index: Index, folder: Path, config: Config, train_step: TrainStep, numbers: Iterator[int], steps: int
) -> Callable[[], int]:
    """Some steps of training on a split; returns how many captions they learned from."""
    encode(index, folder, 1, config.data.max_words)
    size = config.train.global_batch_size
    sizes = {"global_batch_size": size, "micro_batch_size": size, "rank": 0, "world_size": 1}
    dataset = train_dataset(index, EncodedCaptions(folder), preprocessing_of(config), 5, **sizes)
    batches = dataset.steps(0, 1_000_000)

    def work() -> int:
        captions = 0
        for _ in range(steps):
            micro = next(batches)
            train_step.step(scope_alone(next(numbers), micro), micro)
            captions += sum(len(batch.captions) for batch in micro)
        return captions

    return work
