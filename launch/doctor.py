"""Look at a split (NAME.json), at a run (its folder), or with neither at this machine; exit status 1 if a check fails.

With --gpu, try out this machine's GPUs: tests and short benchmarks, within ten minutes, into a report to send in.

Start it as training is started, `accelerate launch [...] -m launch.doctor`, to see the processes exchange.
"""

import argparse
import os
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from captioning.config import Config, load_saved
from captioning.data.splits import cache_of
from captioning.doctor.checks import Check, look
from captioning.runs.progress import bar
from launch.cli.command import at_least_one, command_parser, output_folder, run
from shards import index as shard_index
from shards.errors import InputError


def main() -> int:
    arguments = parser().parse_args()
    if arguments.gpu or arguments.on_cpu:
        return _of_gpus(arguments)
    target = arguments.target
    if target is not None and not Path(target).is_dir():
        return _of_split(target, arguments) if os.environ.get("RANK", "0") == "0" else 0
    return _of_machine(Path(target) if target else None)


def _of_split(path: str, arguments: argparse.Namespace) -> int:
    from captioning.doctor import split

    config = Config()
    index = shard_index.load(path, cache_of(config))
    failed = _show(f"{path}", checks := split.contents(index))
    if failed:
        return 1
    with bar("counting words") as on_progress:
        checks = split.captions(index, on_progress)
    _show("what it says", checks)
    failed |= _show("how fast this storage gives it", split.speed(index, config))
    world_size, batch = arguments.world_size, arguments.global_batch
    fed = split.feeding(index, world_size, batch, arguments.micro_batch)
    return int(failed | _show(f"on {world_size} process(es), {batch} images a step", fed))


def _of_machine(folder: Path | None) -> int:
    from captioning.distributed.ranks import init_distributed
    from captioning.doctor.machine import free_space, machine
    from captioning.doctor.run import largest_micro_batch, run_checks, vocabulary_size

    config = Config()
    if folder is not None:
        if not (folder / "config.yaml").is_file():
            raise InputError(f"{folder} holds no config.yaml: it is no run. Give a run folder, or a split's NAME.json.")
        config = load_saved(folder / "config.yaml")
    accelerator, ranks = init_distributed(config.precision, tf32=config.train.tf32)
    checks = machine(accelerator, ranks)
    failed = False
    if ranks.is_main:
        failed = _show("this machine", checks if folder else [*checks, free_space(Path())])
        if folder is not None:
            tried = look(
                "largest micro-batch",
                lambda: largest_micro_batch(config, vocabulary_size(folder), accelerator.device),
            )
            failed |= _show(f"{folder}", [*run_checks(folder, config), tried])
    failed = ranks.broadcast(failed)
    accelerator.end_training()
    return int(failed)


def _of_gpus(arguments: argparse.Namespace) -> int:
    if arguments.on_cpu and not arguments.gpu:
        raise InputError("--on-cpu is a way to run --gpu: give both.")
    import torch

    from launch.bench import gpu_check

    if not (torch.cuda.is_available() or arguments.on_cpu):
        gpu_check.say_what_would_be_done()
        return 0
    return gpu_check.check(arguments.out, arguments.on_cpu)


def _show(title: str, checks: list[Check]) -> bool:
    """Print a table; whether a check failed."""
    table = Table("", "", "", title=title, title_justify="left", show_header=False)
    for check in checks:
        mark = {True: "[green]ok[/]", False: "[bold red]FAILED[/]", None: ""}[check.well]
        table.add_row(check.what, mark, escape(check.seen))
    Console(highlight=False).print(table)
    return any(check.well is False for check in checks)


def parser() -> argparse.ArgumentParser:
    parser = command_parser("doctor", __doc__)
    parser.add_argument("target", nargs="?", metavar="RUN|NAME.json", help="a run folder, or a split (path or URL)")
    defaults = Config().train
    parser.add_argument("--world-size", type=at_least_one, default=1, help="processes a split is to feed (1)")
    parser.add_argument(
        "--global-batch", type=at_least_one, default=defaults.global_batch_size, help="images a step (%(default)s)"
    )
    parser.add_argument(
        "--micro-batch", type=at_least_one, default=defaults.micro_batch_size, help="most at once (%(default)s)"
    )
    parser.add_argument("--gpu", action="store_true", help="tests and short benchmarks on this machine's GPUs")
    parser.add_argument("--on-cpu", action="store_true", help="with --gpu: the same in small on the CPU, a rehearsal")
    parser.add_argument(
        "--out", type=output_folder, default=Path("gpu-report"), metavar="DIR", help="of --gpu's report (%(default)s)"
    )
    return parser


if __name__ == "__main__":
    run(main)
