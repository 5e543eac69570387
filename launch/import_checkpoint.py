"""Turn the two checkpoint files of the well-known PyTorch captioning tutorial into a model folder that `caption` and
`evaluate` take in a run's place. Nothing is unpickled."""

import argparse
from pathlib import Path

from launch.cli.command import command_parser, run


def main() -> None:
    arguments = parser().parse_args()
    from captioning.inference import model_bundle
    from captioning.inference.foreign_checkpoints import from_tutorial

    imported = from_tutorial(arguments.encoder, arguments.decoder, arguments.vocabulary)
    model_bundle.write(imported, arguments.folder)
    config = imported.config
    print(
        f"{arguments.folder}: {config.encoder.name}, {config.decoder.num_layers} LSTM layer(s) of "
        f"{config.decoder.hidden_size}, {len(imported.vocabulary):,} words"
    )
    print(f"use it as a run: captioning caption {arguments.folder} IMAGE|DIR ...")


def parser() -> argparse.ArgumentParser:
    parser = command_parser("import_checkpoint", __doc__)
    parser.add_argument(
        "--encoder", type=Path, required=True, metavar="FILE", help="resnet.*, linear.*, bn.*; any names"
    )
    parser.add_argument(
        "--decoder", type=Path, required=True, metavar="FILE", help="embed.*, lstm.*, linear.*; any names"
    )
    parser.add_argument(
        "--vocabulary",
        type=Path,
        required=True,
        metavar="FILE",
        help="words in id order: JSON, or text of a word a line",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="new or empty folder to write")
    return parser


if __name__ == "__main__":
    run(main)
