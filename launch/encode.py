"""Encode the images of a split once with a frozen encoder: what it makes of them, as a split to train from.

CONFIG's encoder (encoder.name, encoder.weights; without weights, the one its seed draws), or that of a RUN's best
checkpoint. Under `accelerate launch` the processes share the work; the same command again continues it.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from captioning.config import Config, load_config
from captioning.data.splits import check_split
from captioning.runs.progress import bar
from launch.cli.command import at_least_one, command_parser, output_folder, run
from launch.cli.shipped import config_path
from shards.errors import InputError

if TYPE_CHECKING:
    import torch

    from captioning.inference.encode_split import FrozenEncoder


def main() -> None:
    arguments = parser().parse_intermixed_args()
    source = Path(arguments.source)
    config = None if source.is_dir() else load_config(config_path(arguments.source), arguments.overrides)
    if config is None and arguments.overrides:
        raise InputError(f"{arguments.overrides[0]}: a run has its settings; key=value goes with a CONFIG.")
    from captioning.data.loader import loader_workers
    from captioning.distributed.arithmetic import allow_tf32
    from captioning.distributed.ranks import init_distributed
    from captioning.inference.encode_split import Encoding, encode_split

    accelerator, ranks = init_distributed("no")
    how = Encoding(arguments.views, arguments.dtype, arguments.batch_size, arguments.samples_per_shard)
    model = _of_run(source, arguments, accelerator.device) if config is None else _of_config(config, accelerator.device)
    model = _with_form(model, arguments.form)
    allow_tf32(model.config.train.tf32)
    index = check_split(arguments.split, model.config)
    with bar(f"encoding {index.name}", shown=ranks.is_main) as on_progress:
        encoded = encode_split(index, model, arguments.out, how, ranks, loader_workers(model.config), on_progress)
    accelerator.end_training()
    if ranks.is_main:
        size = sum(shard.filesize for shard in encoded.shards) / 1e6
        print(f"{encoded.path}: features of {len(encoded):,} images in {len(encoded.shards)} shard(s), {size:,.1f} MB")
        for entry in encoded.document["skipped"][:10]:
            print(f"  skipped: {entry['image']}: {entry['reason']}")


def _of_config(config: Config, device: "torch.device") -> "FrozenEncoder":
    import torch

    from captioning.inference.encode_split import FrozenEncoder
    from captioning.model.decoders import DECODERS
    from captioning.model.encoder_identity import first_encoder

    encoder = first_encoder(config)
    assert isinstance(encoder, torch.nn.Module)
    encoder.to(device).to(memory_format=torch.channels_last)
    return FrozenEncoder(encoder, config, not DECODERS[config.decoder.name].uses_grid, device)


def _of_run(folder: Path, arguments: argparse.Namespace, device: "torch.device") -> "FrozenEncoder":
    from captioning.inference.encode_split import FrozenEncoder
    from captioning.inference.predictor import Predictor

    predictor = Predictor.from_checkpoint(folder, arguments.checkpoint, str(device))
    uses_grid = predictor.model.decoder.uses_grid
    return FrozenEncoder(predictor.model.encoder, predictor.config, not uses_grid, predictor.device)


def _with_form(model: "FrozenEncoder", form: str | None) -> "FrozenEncoder":
    from dataclasses import replace

    return model if form is None else replace(model, pooled=form == "pooled")


def parser() -> argparse.ArgumentParser:
    parser = command_parser("encode", __doc__)
    parser.usage = "captioning encode CONFIG|RUN [key=value ...] --split NAME.json --out DIR [--views N] ..."
    add = parser.add_argument
    add("source", metavar="CONFIG|RUN", help="a config file or its name, or a run folder: whose encoder")
    add("overrides", nargs="*", metavar="key=value", help="of the config, e.g. encoder.weights=FILE")
    add("--split", required=True, metavar="NAME.json", help="the images: a split's path or URL")
    add("--out", type=output_folder, required=True, metavar="DIR", help="folder for NAME-000000.tar ... and NAME.json")
    add(
        "--views", type=at_least_one, default=1, metavar="N",
        help="encode each image in the random crops of N epochs; 1: as it is evaluated (1)",
    )  # fmt: skip
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--pooled", dest="form", action="store_const", const="pooled", help="one vector an image, for lstm"
    )
    form.add_argument("--grid", dest="form", action="store_const", const="grid", help="the grid (as the decoder needs)")
    add("--dtype", choices=("float16", "float32"), default="float16", help="of the stored numbers (float16)")
    add("--batch-size", type=at_least_one, default=32, metavar="N", help="images encoded together (32)")
    add(
        "--samples-per-shard", type=at_least_one, default=1024, metavar="N", help="what a killed process repeats (1024)"
    )
    add("--checkpoint", default="best", metavar="best|latest|step-N", help="of a run (best)")
    return parser


if __name__ == "__main__":
    run(main)
