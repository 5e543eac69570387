"""Say how a run stands, by the words its start was given; the exit status tells a job script whether to start it again.

0: finished. 75: not finished, the same command continues it (preempted, or killed while running). 1: it failed, or
never began: starting it again would change nothing. 2: bad input.
"""

import argparse
from pathlib import Path

from captioning.config import load
from captioning.runs.run_folder import RunFolder
from launch.cli.command import PREEMPTED, run

EXIT = {"finished": 0, "preempted": PREEMPTED, "running": PREEMPTED}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch.status", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG.yaml|RUN", help="as given to launch/train.py; or the run folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as given to launch/train.py")
    arguments = parser.parse_args()
    path = Path(arguments.config)
    folder = path if path.is_dir() else Path(load(path, arguments.overrides).run)
    status, detail = RunFolder(folder).status()
    print(f"{folder}: {status or 'no run has begun here'}{detail and ', '}{detail}")
    return EXIT.get(status, 1)


if __name__ == "__main__":
    run(main)
