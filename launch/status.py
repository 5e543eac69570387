"""Say how a run stands, by the words its start was given; the exit status tells a job script whether to start it again.

0: finished. 75: not finished, the same command continues it (preempted, or killed while running). 1: it failed, or
never began: starting it again would change nothing. 2: bad input.
"""

import argparse
from pathlib import Path

from captioning.config import load_config
from captioning.runs.run_folder import RunFolder
from launch.cli.command import PREEMPTED, command_parser, run
from launch.cli.shipped import config_path
from shards.errors import printable

EXIT = {"finished": 0, "preempted": PREEMPTED, "running": PREEMPTED}


def main() -> int:
    arguments = parser().parse_args()
    path = config_path(arguments.config)
    folder = path if path.is_dir() else Path(load_config(path, arguments.overrides).run)
    status, detail = RunFolder(folder).status()
    print(printable(f"{folder}: {status or 'no run has begun here'}{detail and ', '}{detail}"))
    return EXIT.get(status, 1)


def parser() -> argparse.ArgumentParser:
    parser = command_parser("status", __doc__)
    parser.add_argument("config", metavar="CONFIG|RUN", help="as given to train; or the run folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as given to train")
    return parser


if __name__ == "__main__":
    run(main)
