"""Tell of a run on one HTML page: scores, curves, images and where the model looked, classes, model card, cost.

Writes RUN/report.html, which needs no network and nothing beside it, and RUN/loss.png and RUN/attention.png.
"""

import argparse
from pathlib import Path

from rich.console import Console

from captioning.runs.progress import is_quiet
from launch.cli.command import at_least_one, command_parser, run


def main() -> None:
    arguments = parser().parse_args()
    from captioning.inference import cost_profile as profile
    from captioning.report import page
    from captioning.report.facts import read_run

    with Console(stderr=True, quiet=is_quiet()).status("reading the run") as status:
        facts = read_run(arguments.run, arguments.checkpoint, arguments.examples, arguments.device)
        status.update("measuring its cost")
        costs = None if arguments.no_cost else profile.measure(facts.predictor)
        status.update("writing the page")
        written = page.write(facts, costs)
    for note in facts.notes:
        print(f"note: {note}")
    for path in written:
        print(f"{path}: {path.stat().st_size / 1e3:,.0f} kB")


def parser() -> argparse.ArgumentParser:
    parser = command_parser("report", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--checkpoint", default="best", metavar="best|latest|step-N", help="which checkpoint (best)")
    parser.add_argument(
        "--examples", type=at_least_one, default=6, metavar="N", help="best, typical, worst images shown (6 each)"
    )
    parser.add_argument("--device", metavar="cpu|cuda", help="where (on a GPU if there is one)")
    parser.add_argument("--no-cost", action="store_true", help="do not measure FLOPs and latency of the backbones")
    return parser


if __name__ == "__main__":
    run(main)
