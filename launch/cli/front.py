"""The front door: which commands there are, and how one of them is started."""

import argparse
import importlib
import importlib.util
import sys

from captioning.version import __version__
from launch.cli.command import be_quiet, run
from launch.cli.completion import SHELLS, completion

# A command is launch/NAME.py (or a package with __main__.py) that has `parser()` and `main()`, and a line here. It
# imports what takes long, torch above all, only once its arguments are parsed.
COMMANDS = {
    "pack": "pack a dataset of images and captions into tar shards; index, merge or verify shards",
    "audit": "report what splits share: ids, bytes, near duplicates",
    "encode": "encode a split's images once, to train from the features",
    "train": "train a captioner, or continue its run",
    "evaluate": "score a run's captions, a results file, or compare two",
    "caption": "caption image files with a trained run",
    "report": "write a run's report on one HTML page",
    "export": "write a run's model as a folder to hand on",
    "import_checkpoint": "turn a tutorial's checkpoint files into a model folder",
    "doctor": "check this machine, a split, or a run",
    "status": "say how a run stands",
    "bench": "measure loading, training and captioning",
    "demo": "the whole system on drawn scenes, in a few minutes",
    "slurm": "copy the job scripts for Slurm into a folder",
}


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.completion:
        parsers = {name: _module(name).parser() for name in COMMANDS}
        print(completion(arguments.completion, COMMANDS, parsers))
        return
    if arguments.command is None:
        _parser().print_help()
        sys.exit(2)
    if arguments.quiet:
        be_quiet()
    sys.argv = [sys.argv[0], *arguments.arguments]
    run(_module(arguments.command).main)


def _module(name: str):
    module = f"launch.{name}"
    spec = importlib.util.find_spec(module)
    is_package = spec is not None and spec.submodule_search_locations is not None
    return importlib.import_module(f"{module}.__main__" if is_package else module)


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:{width}}  {what}" for name, what in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="captioning",
        usage="captioning [--quiet] COMMAND ...",
        description="Distributed training of image captioners on WebDataset shards.",
        epilog=f"commands (`captioning COMMAND --help` explains each):\n{listed}\n\n"
        "exit status: 0 done, 2 bad input, 75 stopped and saved (the same command continues), others failed",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"captioning {__version__}")
    parser.add_argument(
        "--quiet", action="store_true", help="only results, warnings and errors: no progress, no tables"
    )
    parser.add_argument("--completion", choices=SHELLS, help='print completion for a shell: eval "$(captioning ...)"')
    parser.add_argument("command", nargs="?", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser
