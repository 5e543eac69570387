"""Copy the job scripts for Slurm into FOLDER/slurm; its README.md says how to submit them."""

import argparse
import shutil
from pathlib import Path

from launch.cli.command import command_parser, run
from launch.cli.shipped import SHIPPED
from shards.errors import InputError


def main() -> None:
    target = parser().parse_args().folder / "slurm"
    if target.exists():
        raise InputError(f"{target} is there already. Move it away, or name another folder.")
    shutil.copytree(SHIPPED / "slurm", target)
    print(f"{target}: {', '.join(sorted(path.name for path in target.iterdir()))}")


def parser() -> argparse.ArgumentParser:
    parser = command_parser("slurm", __doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(), metavar="FOLDER", help="where to (here)")
    return parser


if __name__ == "__main__":
    run(main)
