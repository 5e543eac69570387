"""Write a run's model as a folder of safetensors and JSON to hand on; it takes RUN's place in caption and evaluate."""

import argparse
from pathlib import Path

from launch.cli.command import command_parser, run


def main() -> None:
    arguments = parser().parse_args()
    from captioning.inference import model_bundle
    from captioning.inference.predictor import loaded

    bundle = loaded(arguments.run, arguments.checkpoint)
    model_bundle.write(bundle, arguments.folder)
    size = sum(path.stat().st_size for path in arguments.folder.iterdir()) / 1e6
    print(f"{arguments.folder}: checkpoint of step {bundle.step}, {size:,.1f} MB")
    print(f"use it as a run: captioning caption {arguments.folder} IMAGE|DIR ...")


def parser() -> argparse.ArgumentParser:
    parser = command_parser("export", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("folder", type=Path, metavar="DIR", help="new or empty folder to write")
    parser.add_argument("--checkpoint", default="best", metavar="best|latest|step-N", help="which checkpoint (best)")
    return parser


if __name__ == "__main__":
    run(main)
