"""Pack a captioned image dataset into WebDataset tar shards, or verify packed ones."""

import argparse
import os
import tempfile
from pathlib import Path

from captioning.progress import bar
from launch.command import run
from shards import index as shard_index
from shards import scenes, sources
from shards.errors import InputError
from shards.index import Index
from shards.pack import Settings, pack
from shards.sources import Source


def main() -> None:
    arguments = _parser().parse_args()
    match arguments.source:
        case "coco":
            source = sources.coco(arguments.images, arguments.captions)
            _pack(source, arguments.split, arguments)
        case "scenes":
            _pack_scenes(arguments)
        case "verify":
            index = shard_index.load(arguments.index)
            shard_index.verify(index)
            print(f"{arguments.index}: {len(index.shards)} shard(s), {len(index):,} samples, every byte as packed")


def _pack_scenes(arguments: argparse.Namespace) -> None:
    if arguments.count < 1:
        raise InputError(f"--count {arguments.count}: at least one scene is wanted.")
    with tempfile.TemporaryDirectory() as folder:
        for split, count in (("train", arguments.count), ("val", max(1, arguments.count // 10))):
            drawn = scenes.write(Path(folder), split, count, arguments.seed)
            _pack(sources.coco(*drawn), split, arguments)


def _pack(source: Source, split: str, arguments: argparse.Namespace) -> None:
    settings = Settings(arguments.short_side, arguments.quality, arguments.shard_mb)
    with bar(f"packing {split}") as on_progress:
        index = pack(source, split, arguments.out, settings, arguments.workers, arguments.strict, on_progress)
    _tell(index)


def _tell(index: Index) -> None:
    size = sum(shard.filesize for shard in index.shards) / 1e6
    print(f"{index.path}: {len(index):,} images in {len(index.shards)} shard(s), {size:,.1f} MB")
    for reason, count in index.document["left_out"].items():
        print(f"  left out: {count:,} {reason}")
    skipped = index.document["skipped"]
    for entry in skipped[:10]:
        print(f"  skipped: {entry['image']}: {entry['reason']}")
    if len(skipped) > 10:
        print(f"  ... {len(skipped):,} skipped in all, listed in {index.path}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch.pack", description=__doc__)
    kinds = parser.add_subparsers(dest="source", required=True, metavar="{coco,scenes,verify}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, required=True, help="folder for SPLIT-000000.tar ... and SPLIT.json")
    common.add_argument("--short-side", type=int, default=256, help="pixels; larger images shrink, 0 keeps them (256)")
    common.add_argument("--quality", type=int, default=90, help="JPEG quality, 1..95 (90)")
    common.add_argument("--shard-mb", type=int, default=256, help="megabytes a shard, about (256)")
    common.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (all cores)")
    common.add_argument("--strict", action="store_true", help="stop at an unreadable image instead of skipping it")
    coco = kinds.add_parser("coco", parents=[common], help="COCO 2014/2017: images and captions_*.json")
    coco.add_argument("--images", type=Path, required=True, metavar="DIR|ZIP", help="folder of images, or their zip")
    coco.add_argument("--captions", type=Path, required=True, metavar="JSON", help="captions_train2017.json, ...")
    coco.add_argument("--split", required=True, metavar="NAME", help="what to call the split: train, val, ...")
    drawn = kinds.add_parser("scenes", parents=[common], help="drawn scenes with exact captions; needs no download")
    drawn.add_argument("--count", type=int, default=4000, help="training scenes; a tenth of it is drawn as val (4000)")
    drawn.add_argument("--seed", type=int, default=0, help="another seed draws other scenes (0)")
    verify = kinds.add_parser("verify", help="compare every byte of a split with its index")
    verify.add_argument("index", type=Path, metavar="NAME.json")
    return parser


if __name__ == "__main__":
    run(main)
