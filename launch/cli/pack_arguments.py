"""The arguments of `captioning pack`, one subcommand a kind of dataset."""

import argparse
import os
from pathlib import Path

from launch.cli.command import command_parser
from shards.packing.plan import Part
from shards.sources.class_folders import TEMPLATE

PART = """pack the i-th of n parts, i from 1, on one machine of n: every n-th shard. Parts share --out or have a folder
each; `merge` joins them. In a Slurm array 1-n: --part $SLURM_ARRAY_TASK_ID/n"""


def parser(description: str | None) -> argparse.ArgumentParser:
    """The command's parser; ``source`` holds the subcommand."""
    main = command_parser("pack", description)
    kinds = main.add_subparsers(dest="source", required=True, metavar="KIND")
    common, named, pictures = _common(), _split(), _images()
    coco = kinds.add_parser("coco", parents=[pictures, named, common], help="COCO 2014/2017: captions_*.json")
    coco.add_argument("--captions", type=Path, required=True, metavar="JSON", help="captions_train2017.json, ...")
    karpathy = kinds.add_parser(
        "karpathy", parents=[pictures, common], help="Karpathy's dataset_*.json, all its splits"
    )
    karpathy.add_argument("--json", type=Path, required=True, help="dataset_coco.json, dataset_flickr8k.json, ...")
    table = kinds.add_parser("csv", parents=[pictures, named, common], help="any CSV, Flickr8k/30k, token files")
    table.add_argument(
        "--csv", type=Path, required=True, help="image,caption; image|...|comment; or name#0<TAB>caption"
    )
    table.add_argument("--list", type=Path, metavar="FILE", help="image names, one a line: only these")
    classes = kinds.add_parser("classes", parents=[named, common], help="class folders: root/class/image.jpg")
    classes.add_argument("--root", type=Path, required=True, metavar="DIR|ZIP", help="folder or zip of class folders")
    texts = classes.add_mutually_exclusive_group()
    texts.add_argument("--captions", type=Path, metavar="CSV", help="captions of class/image.jpg")
    texts.add_argument("--template", default=TEMPLATE, metavar="TEXT", help=f'caption of every image ("{TEMPLATE}")')
    drawn = kinds.add_parser("scenes", parents=[common], help="drawn scenes with exact captions; needs no download")
    drawn.add_argument("--count", type=int, default=4000, help="training scenes; a tenth of it is drawn as val (4000)")
    drawn.add_argument("--seed", type=int, default=0, help="another seed draws other scenes (0)")
    merge = kinds.add_parser("merge", help="join the parts that --part packed into what one machine would have made")
    merge.add_argument("folders", nargs="*", type=Path, metavar="DIR", help="folders of parts, where not --out itself")
    merge.add_argument(
        "--out", type=Path, required=True, help="folder for the whole; shards elsewhere are copied there"
    )
    merge.add_argument("--split", metavar="NAME", help="only this split (all that are there)")
    index = kinds.add_parser("index", parents=[named], help="index WebDataset tars made elsewhere (img2dataset, ...)")
    index.add_argument("tars", nargs="+", type=Path, metavar="DIR-OR-TARS", help="a folder of tars, or tars")
    index.add_argument("--any-sample", action="store_true", help="also samples without an image or a caption")
    verify = kinds.add_parser("verify", help="compare every byte of a split with its index")
    verify.add_argument("index", metavar="NAME.json", help="a path or a URL")
    return main


def _common() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, required=True, help="folder for SPLIT-000000.tar ... and SPLIT.json")
    common.add_argument("--short-side", type=int, default=256, help="pixels; larger images shrink, 0 keeps them (256)")
    common.add_argument("--quality", type=int, default=90, help="JPEG quality, 1..95 (90)")
    common.add_argument("--shard-mb", type=int, default=256, help="megabytes a shard, about (256)")
    common.add_argument("--shuffle-seed", type=int, default=0, help="samples are shuffled; another seed, otherwise (0)")
    common.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (all cores)")
    common.add_argument("--part", type=_part, default=Part(), metavar="i/n", help=PART)
    common.add_argument("--strict", action="store_true", help="stop at an unreadable image instead of skipping it")
    return common


def _part(text: str) -> Part:
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}: i/n is wanted, such as 1/4")
    return Part(int(number), int(count))


def _images() -> argparse.ArgumentParser:
    images = argparse.ArgumentParser(add_help=False)
    images.add_argument("--images", type=Path, nargs="+", required=True, metavar="DIR|ZIP", help="folder(s) or zip(s)")
    return images


def _split() -> argparse.ArgumentParser:
    split = argparse.ArgumentParser(add_help=False)
    split.add_argument("--split", required=True, metavar="NAME", help="what to call the split: train, val, ...")
    return split
