"""Arguments of the commands that may draw captions rather than search for the likeliest."""

import argparse
from dataclasses import replace

from captioning.model.search import SearchOptions
from launch.cli.command import at_least_one
from shards.errors import InputError


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """--temperature, --top-k and --top-p; the command's own --seed goes with them."""
    add = parser.add_argument
    add("--temperature", type=_positive, metavar="T", help="draw words, of probabilities sharpened by T < 1 (search)")
    add("--top-k", type=at_least_one, metavar="N", help="with --temperature: among the N likeliest words")
    add("--top-p", type=_positive, default=1.0, metavar="P", help="with --temperature: among the likeliest that hold P")


def sampling(options: SearchOptions, arguments: argparse.Namespace, captions: int = 1) -> SearchOptions:
    """These options, or if --temperature asks for it ``captions`` draws an image. What is drawn for an image depends on
    --seed and on its number, not on how images are batched or shared out among processes.

    Raises:
        InputError: for values that make no sense.
    """
    if arguments.temperature is None:
        if captions > 1 or arguments.top_k is not None or arguments.top_p != 1.0:
            raise InputError("--sample, --top-k, --top-p are for drawing: give --temperature too, 1 for none.")
        return options
    drawn = {"temperature": arguments.temperature, "top_k": arguments.top_k, "top_p": arguments.top_p}
    try:
        return replace(options, beam_size=captions, beam_groups=1, seed=arguments.seed, **drawn)
    except ValueError as error:
        raise InputError(f"--temperature, --top-k, --top-p: {error}.") from error


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text}: a number above 0 is wanted")
    return value
