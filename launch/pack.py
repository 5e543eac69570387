"""Pack a captioned image dataset into WebDataset tar shards; index, merge or verify shards."""

import argparse
import tempfile
from collections import Counter
from pathlib import Path

from captioning.runs.progress import bar
from launch.cli import pack_arguments
from launch.cli.command import run
from shards import index as shard_index
from shards import sources
from shards.errors import InputError
from shards.index import Index
from shards.packing.index_tars import index_tars
from shards.packing.merge import merge, splits_in
from shards.packing.plan import Settings
from shards.sources import Source, scenes


def main() -> None:
    arguments = parser().parse_args()
    match arguments.source:
        case "coco":
            _pack({arguments.split: sources.coco(arguments.images, arguments.captions)}, arguments)
        case "karpathy":
            _pack(sources.karpathy(arguments.images, arguments.json), arguments)
        case "csv":
            _pack({arguments.split: sources.table(arguments.images, arguments.csv, arguments.list)}, arguments)
        case "classes":
            source = sources.classes(arguments.root, arguments.captions, arguments.template)
            _pack({arguments.split: source}, arguments)
        case "scenes":
            _pack_scenes(arguments)
        case "merge":
            _merge(arguments)
        case "index":
            with bar(f"indexing {arguments.split}") as on_progress:
                index = index_tars(arguments.tars, arguments.split, on_progress, arguments.any_sample)
            _tell(index)
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
            _pack({split: sources.coco(*drawn)}, arguments)


def _pack(splits: dict[str, Source], arguments: argparse.Namespace) -> None:
    from shards.packing.packer import pack_part  # stock webdataset, which imports torch

    settings = Settings(arguments.short_side, arguments.quality, arguments.shard_mb, arguments.shuffle_seed)
    out, part = arguments.out, arguments.part
    for split, source in splits.items():
        with bar(f"packing {split}") as on_progress:
            shards = pack_part(source, split, out, settings, part, arguments.workers, arguments.strict, on_progress)
        if part.count == 1:
            _tell(merge(split, out))
        else:
            images = sum(packed.shard.nsamples for packed in shards)
            print(f"{out}: part {part.number} of {part.count} of {split}: {images:,} images in {len(shards)} shard(s)")


def _merge(arguments: argparse.Namespace) -> None:
    splits = [arguments.split] if arguments.split else splits_in([arguments.out, *arguments.folders])
    if not splits:
        raise InputError(f"No packed shards in {arguments.out}. Pack the parts first, or name the folders they are in.")
    for split in splits:
        _tell(merge(split, arguments.out, arguments.folders))


def _tell(index: Index) -> None:
    size = sum(shard.filesize for shard in index.shards) / 1e6
    print(f"{index.path}: {len(index):,} images in {len(index.shards)} shard(s), {size:,.1f} MB")
    for reason, count in index.document["left_out"].items():
        print(f"  left out: {count:,} {reason}")
    skipped = index.document["skipped"]
    if len(skipped) <= 10:
        for entry in skipped:
            print(f"  skipped: {entry['image']}: {entry['reason']}")
        return
    for reason, count in Counter(entry["reason"] for entry in skipped).most_common(10):
        print(f"  skipped: {count:,} images: {reason}")
    print(f"  ... {len(skipped):,} skipped in all, each listed in {index.path}")


def parser() -> argparse.ArgumentParser:
    return pack_arguments.parser(__doc__)


if __name__ == "__main__":
    run(main)
