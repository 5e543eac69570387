"""Pack a captioned image dataset into WebDataset tar shards; index, merge or verify shards."""

import argparse
import tempfile
from collections import Counter
from pathlib import Path

from captioning.runs.progress import bar
from launch.cli import pack_arguments
from launch.cli.command import run
from shards import index as shard_index
from shards.errors import InputError, printable
from shards.index import Index
from shards.packing.index_tars import Options, index_tars
from shards.packing.merge import merge, splits_in
from shards.packing.plan import Settings
from shards.sources import Source, divide
from shards.sources.records import WHOLE
from shards.storage.cache import Cache


def main() -> None:
    arguments = parser().parse_args()
    match arguments.source:
        case "merge":
            _merge(arguments)
        case "tars":
            _index_tars(arguments)
        case "verify":
            cache = Cache(arguments.cache_dir.absolute()) if arguments.cache_dir else None
            index = shard_index.load(arguments.index, cache, arguments.trust_urls)
            shard_index.verify(index)
            print(f"{arguments.index}: {len(index.shards)} shard(s), {len(index):,} samples, every byte as packed")
        case _:
            with tempfile.TemporaryDirectory() as scratch:
                splits = arguments.kind.read(arguments, Path(scratch))
                _pack(_named(splits, arguments.split, arguments.splits), arguments)


def _named(splits: dict[str, Source], name: str | None, fractions: dict[str, float] | None) -> dict[str, Source]:
    """The splits to pack: a dataset's own, all or the named one; or a whole dataset, named or divided."""
    if set(splits) == {WHOLE}:
        if fractions:
            return divide(splits[WHOLE], fractions)
        if not name:
            raise InputError("--split NAME is wanted, or --splits train=0.8,val=0.1,test=0.1 to divide the images.")
        return {name: splits[WHOLE]}
    if fractions:
        raise InputError(f"The dataset has splits of its own, {', '.join(splits)}: leave --splits out to pack them.")
    if name and name not in splits:
        raise InputError(f"--split {name}: the dataset's splits are {', '.join(splits)}. Name one, or leave it out.")
    return {name: splits[name]} if name else splits


def _index_tars(arguments: argparse.Namespace) -> None:
    with bar(f"indexing {arguments.split}") as on_progress:
        checkers = arguments.workers if arguments.check_images else 0
        index = index_tars(
            arguments.tars,
            arguments.split,
            on_progress,
            Options(arguments.caption_field, checkers, arguments.any_sample),
        )
    _tell(index)
    for remark, count in index.document["packing"].get("remarks", {}).items():
        print(f"  {count:,} {remark}")


def _pack(splits: dict[str, Source], arguments: argparse.Namespace) -> None:
    from shards.packing.packer import pack_part  # stock webdataset, which imports torch

    stored = (arguments.short_side, arguments.quality, arguments.shard_mb, arguments.shuffle_seed, arguments.long_side)
    settings = Settings(*stored)
    strict, retry = arguments.strict, arguments.retry_skipped
    out, part = arguments.out, arguments.part
    for split, source in splits.items():
        with bar(f"packing {split}") as on_progress:
            shards = pack_part(source, split, out, settings, part, arguments.workers, strict, on_progress, retry)
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
            print(printable(f"  skipped: {entry['image']}: {entry['reason']}"))
        return
    for reason, count in Counter(entry["reason"] for entry in skipped).most_common(10):
        print(printable(f"  skipped: {count:,} images: {reason}"))
    print(f"  ... {len(skipped):,} skipped in all, each listed in {index.path}")


def parser() -> argparse.ArgumentParser:
    return pack_arguments.parser(__doc__)


if __name__ == "__main__":
    run(main)
