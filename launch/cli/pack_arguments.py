"""The arguments of `captioning pack`, one subcommand a kind of dataset."""

import argparse
import os
import re
from pathlib import Path

from launch.cli.command import at_least_one, command_parser
from shards.packing.plan import Part
from shards.sources import KINDS
from shards.sources.records import SPLIT_NAME

PART = """pack the i-th of n parts, i from 1, on one machine of n: every n-th shard. Parts share --out or have a folder
each; `merge` joins them. In a Slurm array 1-n: --part $SLURM_ARRAY_TASK_ID/n"""
CORES = len(os.sched_getaffinity(0))


def parser(description: str | None) -> argparse.ArgumentParser:
    """The command's parser. ``source`` holds the subcommand, ``kind`` the kind of dataset where it is one."""
    main = command_parser("pack", description)
    commands = main.add_subparsers(dest="source", required=True, metavar="KIND")
    common = _common()
    for kind in KINDS:
        name, *others = kind.names
        command = commands.add_parser(name, aliases=others, parents=[common], help=kind.help)
        kind.add_arguments(command)
        command.set_defaults(source=name, kind=kind)
    merge = commands.add_parser("merge", help="join the parts that --part packed into what one machine would have made")
    merge.add_argument("folders", nargs="*", type=Path, metavar="DIR", help="folders of parts, where not --out itself")
    merge.add_argument(
        "--out", type=Path, required=True, help="folder for the whole; shards elsewhere are copied there"
    )
    merge.add_argument("--split", metavar="NAME", help="only this split (all that are there)")
    _add_tars(commands)
    verify = commands.add_parser("verify", help="compare every byte of a split with its index")
    verify.add_argument("index", metavar="NAME.json", help="a path or a URL")
    verify.add_argument("--cache-dir", type=Path, metavar="DIR", help="as data.cache_dir: its copies are compared too")
    verify.add_argument("--trust-urls", action="store_true", help="as data.trust_urls=true")
    return main


def _add_tars(commands) -> None:
    tars = commands.add_parser("tars", aliases=["index"], help="index WebDataset tars made elsewhere")
    tars.set_defaults(source="tars")
    add = tars.add_argument
    add("tars", nargs="+", type=Path, metavar="DIR-OR-TARS", help="a folder of tars, or tars")
    add("--split", required=True, metavar="NAME", help="what to call the split: train, val, ...")
    add("--caption-field", metavar="NAME", help="the field of the json, or the file's ending, that holds the captions")
    add("--any-sample", action="store_true", help="also samples without an image or a caption, for ShardDataset")
    add("--check-images", action="store_true", help="decode every image; what does not decode is left out and listed")
    add("--workers", type=int, default=CORES, help="threads for --check-images (all cores)")


def _common() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("--out", type=Path, required=True, help="folder for SPLIT-000000.tar ... and SPLIT.json")
    names = common.add_mutually_exclusive_group()
    names.add_argument("--split", metavar="NAME", help="what to call the split; or which of the dataset's to pack")
    names.add_argument(
        "--splits", type=_fractions, metavar="train=0.8,val=0.1,test=0.1", help="divide by a hash of each image's bytes"
    )
    sides = common.add_mutually_exclusive_group()
    sides.add_argument("--short-side", type=int, default=256, help="pixels; larger images shrink, 0 keeps them (256)")
    sides.add_argument(
        "--long-side", type=at_least_one, default=0, metavar="N", help="pixels of the longer side, for crop_mode=pad"
    )
    add("--quality", type=int, default=90, help="JPEG quality, 1..95 (90)")
    add("--shard-mb", type=int, default=256, help="megabytes a shard, about (256)")
    add("--shuffle-seed", type=int, default=0, help="samples are shuffled; another seed, otherwise (0)")
    add("--workers", type=int, default=CORES, help="processes (all cores)")
    add("--part", type=_part, default=Part(), metavar="i/n", help=PART)
    add("--strict", action="store_true", help="stop at an unreadable image instead of skipping it")
    add("--retry-skipped", action="store_true", help="make shards again that had to leave out images: they were mended")
    return common


def _part(text: str) -> Part:
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}: i/n is wanted, such as 1/4")
    return Part(int(number), int(count))


def _fractions(text: str) -> dict[str, float]:
    """ "train=0.8,val=0.2" -> fractions that add up to 1."""
    shares: dict[str, float] = {}
    for item in text.split(","):
        name, _, value = item.strip().partition("=")
        if not re.fullmatch(SPLIT_NAME, name) or not re.fullmatch(r"\d*\.?\d+", value) or name in shares:
            raise argparse.ArgumentTypeError(f"{item!r}: train=0.8,val=0.1,test=0.1 or the like is wanted")
        shares[name] = float(value)
    if abs(sum(shares.values()) - 1) > 1e-6 or not all(shares.values()):
        raise argparse.ArgumentTypeError(f"{text!r}: parts above 0 that add up to 1 are wanted")
    return shares
