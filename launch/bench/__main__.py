"""Measure: ratios of runners timed in turns in one run, with machine, versions and command."""

import argparse
import importlib
from pathlib import Path

from launch.bench import table
from launch.cli.command import output_file, run

# Mode: a module here with ``arguments(parser)`` and ``measure(arguments) -> list[Table]``, and what it measures.
MODES = {
    "data": ("loading", "stored images to training batches, beside other loaders; seeking; very large sets"),
    "step": ("step", "the training step on batches of noise, against the encoder alone"),
    "train": ("training", "training from shards, against the step alone and the field's baseline script"),
    "reward": ("reward", "rewards of self-critical training, against pycocoevalcap; their share of a step"),
    "caption": ("search", "captioning in batches, against one image at a time"),
    "scale": ("scaling", "training on 1 and 2 processes, and a model of more"),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m launch.bench", description=__doc__)
    modes = parser.add_subparsers(dest="mode", required=True, metavar="{" + ",".join(MODES) + "}")
    modules = {mode: importlib.import_module(f"launch.bench.{name}") for mode, (name, _) in MODES.items()}
    for mode, module in modules.items():
        of_mode = modes.add_parser(mode, help=MODES[mode][1], description=module.__doc__)
        of_mode.add_argument("--json", type=output_file, metavar="FILE", help="write the tables there too")
        module.arguments(of_mode)
    arguments = parser.parse_args()
    found = table.machine()
    tables = modules[arguments.mode].measure(arguments)
    table.show(tables, found)
    if arguments.json:
        table.write(Path(arguments.json), tables, found)


if __name__ == "__main__":
    run(main)
