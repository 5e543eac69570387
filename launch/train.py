"""Train a captioner: on all GPUs of this machine, or without any on its CPU in one process.

The same command again continues the run; SIGTERM, SIGINT or SIGUSR1 save and stop it. To start the processes another
way, over several machines say: accelerate launch [...] launch/train.py CONFIG [key=value ...]
"""

import argparse
import os
import sys
from pathlib import Path

from captioning.config import Config, load_config
from captioning.distributed.stop_signals import StopSignals
from captioning.training.best import closing_summary
from captioning.training.checks import check
from launch.cli.command import PREEMPTED, at_least_one, command_parser, run
from launch.cli.config_reference import help_text
from launch.cli.elastic import agent_command, become_agent, machines
from launch.cli.processes import hold_stop_signals, is_started_by_launcher, run_processes
from launch.cli.shipped import config_path, configs
from shards.errors import InputError


def main() -> int:
    arguments = parser().parse_intermixed_args()
    if arguments.list:
        print("\n".join(f"{name:30} {what}" for name, what in configs().items()))
        return 0
    if arguments.config is None:
        raise InputError("CONFIG.yaml is missing: a path, or one of those that --list names.")
    config = load_config(config_path(arguments.config), arguments.overrides)
    if is_started_by_launcher():
        if arguments.processes or arguments.cpu:
            raise InputError("--processes and --cpu: a launcher has started this process already, with its own.")
        return _train(config)
    state = check(config)
    if state is not None:
        print(f"{config.run} is finished, at step {state.step}; this config asks for no more steps.")
        print(closing_summary(Path(config.run), state, config.evaluate))
        return 0
    hold_stop_signals()  # before seconds of imports
    if arguments.cpu:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    processes = _processes(arguments)
    if arguments.elastic:
        script = [arguments.config, *arguments.overrides]
        become_agent(agent_command(arguments.elastic, processes, arguments.meet, Path(__file__), script))
    if processes == 1:
        return _train(config)
    return run_processes(processes, Path(__file__), [arguments.config, *arguments.overrides])


def _train(config: Config) -> int:
    """Train in this process, alone or as a rank."""
    stop = StopSignals()
    from captioning.training.trainer import train

    status = train(config, stop)
    stop.ignore()
    return PREEMPTED if status == "preempted" else 0


def _processes(arguments: argparse.Namespace) -> int:
    """How many processes to train in: one a GPU, or as many as are asked for."""
    if arguments.cpu:
        return arguments.processes or 1
    import torch

    gpus = torch.cuda.device_count()
    if arguments.processes and arguments.processes > gpus:
        raise InputError(
            f"--processes {arguments.processes}, and this machine has {gpus} GPU(s) to use: one GPU a process. "
            "Add --cpu to train on its CPU."
        )
    if not gpus:
        print("warning: no GPU here: training on the CPU, in one process (--cpu --processes N: in N)", file=sys.stderr)
    return arguments.processes or max(1, gpus)


def parser() -> argparse.ArgumentParser:
    parser = command_parser("train", __doc__)
    parser.usage = (
        "captioning train CONFIG [key=value ...] [--processes N] [--cpu] [--elastic MIN:MAX] [--list] [--quiet]"
    )
    parser.epilog = f"keys and their defaults:\n{help_text()}"
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="what differs from the defaults: a file, or a name")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. run=runs/mine train.epochs=5")
    parser.add_argument("--processes", type=at_least_one, metavar="N", help="processes (one a GPU)")
    parser.add_argument("--cpu", action="store_true", help="train on the CPU, whether there are GPUs or not")
    parser.add_argument(
        "--elastic", type=machines, metavar="MIN:MAX", help="on MIN to MAX machines: continue when one joins or leaves"
    )
    meet = ":".join((os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT", "29400")))
    parser.add_argument(
        "--meet", metavar="HOST:PORT", default=meet, help="for --elastic: where the machines meet (%(default)s)"
    )
    parser.add_argument("--list", action="store_true", help="name the configs that are installed")
    return parser


if __name__ == "__main__":
    run(main)
