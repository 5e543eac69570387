"""Train a captioner. The same command again continues the run; SIGTERM, SIGINT or SIGUSR1 save and stop it."""

import argparse

from captioning.config import load
from captioning.distributed.stop_signals import StopSignals
from launch.cli.command import PREEMPTED, run
from launch.cli.config_reference import help_text


def main() -> int:
    config = load(*_arguments())
    stop = StopSignals()
    from captioning.training.trainer import train  # seconds of imports, in which a signal may come already

    status = train(config, stop)
    stop.ignore()
    return PREEMPTED if status == "preempted" else 0


def _arguments() -> tuple[str, list[str]]:
    parser = argparse.ArgumentParser(
        prog="accelerate launch [...] launch/train.py",
        description=__doc__,
        epilog=f"keys and their defaults:\n{help_text()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="what differs from the defaults; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. run=runs/mine train.epochs=5")
    arguments = parser.parse_args()
    return arguments.config, arguments.overrides


if __name__ == "__main__":
    run(main)
