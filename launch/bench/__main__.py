"""Measure: ratios of runners timed in turns in one run, with machine, versions and command."""

import argparse
import importlib
import sys
from pathlib import Path

from launch.cli.command import command_parser, output_file, run

# Mode: a module here with ``arguments(parser)`` and ``measure(arguments) -> list[Table]``, and what it measures.
MODES = {
    "data": ("loading", "stored images to training batches, beside other loaders; seeking; very large sets"),
    "step": ("step", "the training step on batches of noise, against the encoder alone"),
    "profile": ("profile", "the training step, kernel by kernel: gaps, the longest, FLOP/s and bytes/s"),
    "train": ("training", "training from shards, against the step alone and the field's baseline script"),
    "reward": ("reward", "rewards of self-critical training, against pycocoevalcap; their share of a step"),
    "features": ("features", "training from features encoded once, against training from pixels"),
    "caption": ("search", "captioning in batches, against one image at a time"),
    "save": ("saving", "how long a checkpoint that is saved in the background holds up the training loop"),
    "systems": ("systems", "what decoders, geometries and frozen encoders are worth on drawn scenes; takes hours"),
    "scale": ("scaling", "training on 1, 2, 4 ... all GPUs, or 1 and 2 CPU processes; and a model of more"),
}


def main() -> None:
    mode = next((argument for argument in sys.argv[1:] if argument in MODES), None)
    arguments = parser(mode).parse_args()
    from launch.bench import table

    machine = table.machine()
    tables = _module(arguments.mode).measure(arguments)
    table.show(tables, machine)
    if arguments.json:
        table.write(Path(arguments.json), tables, machine)


def parser(mode: str | None = None) -> argparse.ArgumentParser:
    """Only the given mode has its arguments: their defaults depend on the machine, which takes torch to ask."""
    parser = command_parser("bench", __doc__)
    modes = parser.add_subparsers(dest="mode", required=True, metavar="{" + ",".join(MODES) + "}")
    for name, (_, what) in MODES.items():
        description = _module(name).__doc__ if name == mode else None
        of_mode = modes.add_parser(name, help=what, description=description)
        of_mode.add_argument("--json", type=output_file, metavar="FILE", help="write the tables there too")
        if name == mode:
            _module(name).arguments(of_mode)
    return parser


def _module(mode: str):
    return importlib.import_module(f"launch.bench.{MODES[mode][0]}")


if __name__ == "__main__":
    run(main)
