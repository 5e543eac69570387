"""Records -> shards. Parallel over images, atomic per shard, restartable, and byte-identical however it was done.

Records are shuffled once (so that neighbours are not alike), and a shard takes a fixed number of them (see plan.py). An
unreadable image makes its shard shorter and moves nothing else. So any number of workers, and any number of machines
that pack a part each, make the same shards.

A shard is finished when its tar is there: what lies beside it, and then the tar, are each written to a temporary name
and renamed, so a killed packing leaves whole shards and the same command makes the rest. A shard that had to leave out
images is made again where that is asked for, as they may have been mended. The captions file says what its shard was
made by, and holds hashes of the files its images were made from (see overlap.py).
"""

import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import webdataset

from shards import index as shard_index
from shards import storage
from shards.errors import InputError
from shards.index import Index
from shards.packing.convert import Converter
from shards.packing.merge import Packed, merge, packed, packed_in, refuse_nothing
from shards.packing.plan import Part, Plan, Settings, plan
from shards.packing.shard_writer import Written, is_finished, refuse_another_packing, write_shard
from shards.perceptual import perceptual_hashes
from shards.sources import ImageFiles, Record, Source

Progress = Callable[[int, int], None]


def pack(
    source: Source,
    split: str,
    out: Path,
    settings: Settings,
    workers: int = 1,
    strict: bool = False,
    on_progress: Progress = lambda done, total: None,
    retry_skipped: bool = False,
) -> Index:
    """Pack a source as split ``split`` into folder ``out``; an interrupted packing is continued.

    Args:
        workers: processes that decode and encode images.
        strict: make the first unreadable image an error instead of skipping and listing it.
        on_progress: called with (records done, records in all).
        retry_skipped: make finished shards again that had to leave out images; ``strict`` does too.

    Raises:
        InputError: when ``out`` holds another packing of this split, no image can be read, or (strict) one cannot.
            Finished shards stay.
    """
    pack_part(source, split, out, settings, Part(), workers, strict, on_progress, retry_skipped)
    return merge(split, out)


def pack_part(
    source: Source,
    split: str,
    out: Path,
    settings: Settings,
    part: Part,
    workers: int = 1,
    strict: bool = False,
    on_progress: Progress = lambda done, total: None,
    retry_skipped: bool = False,
) -> list[Packed]:
    """Pack one part's shards, as ``pack`` does, and write no NAME.json: ``merge`` does when all parts are there.

    Parts may share ``out`` or have a folder each. Returns the part's shards.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", split):
        raise InputError(f"--split {split!r}: letters, digits, - and _ are wanted, since files are named after it.")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; a folder is wanted.")
    if workers < 1:
        raise InputError(f"--workers {workers}: at least 1 is wanted.")
    ImageFiles(source.images)  # a wrong --images is reported at once, not as ten thousand unreadable files
    shard_index.refuse_another_file(out / f"{split}.json")
    new_folder = not out.exists()
    size_and_quality = (settings.short_side, settings.quality, settings.long_side)
    with Converter(source.images, size_and_quality, workers, source.features) as convert:
        try:
            present = packed_in(out, split)
            planned = plan(source, split, settings, [found.made_by for found in present.values() if found], convert)
            refuse_another_packing(out, split, present, planned.made_by)
            out.mkdir(parents=True, exist_ok=True)
            retry = strict or retry_skipped
            shards = _pack_shards(out, planned, part, convert, strict, retry, on_progress)
            if part.count == 1:
                _refuse_nothing(shards)
        except InputError:
            if new_folder:
                with suppress(OSError):  # not empty, or not made yet
                    out.rmdir()
            raise
        except (OSError, BrokenProcessPool) as error:
            hint = " Out of memory? Try fewer --workers." if isinstance(error, BrokenProcessPool) else ""
            raise InputError(
                f"Packing {split!r} into {out} failed: {error}{hint}\n"
                "Finished shards stay: the same command makes the rest."
            ) from error
    return shards


def _pack_shards(
    out: Path,
    planned: Plan,
    part: Part,
    convert: Converter,
    strict: bool,
    retry: bool,
    on_progress: Progress,
) -> list[Packed]:
    """The part's shards, each made unless it is finished."""
    mine = planned.shards()[part.number - 1 :: part.count]
    total, done = sum(len(records) for _, records in mine), 0
    finished = []
    for name, records in mine:
        tar = out / name
        if not is_finished(tar, planned.made_by, retry):
            _pack_shard(tar, planned, records, convert, strict, partial(_later, on_progress, done, total))
        shard = packed(tar)
        assert shard is not None
        finished.append(shard)
        done += len(records)
        on_progress(done, total)
    return finished


def _later(on_progress: Progress, before: int, total: int, done: int) -> None:
    on_progress(before + done, total)


def _pack_shard(
    tar: Path,
    plan: Plan,
    records: Sequence[Record],
    convert: Converter,
    strict: bool,
    on_progress: Callable[[int], None],
) -> None:
    """Write one shard and what lies beside it, the tar last."""
    write_shard(tar, plan.made_by, lambda file: _write_tar(file, records, convert, strict, on_progress))


def _write_tar(
    file: BinaryIO, records: Sequence[Record], convert: Converter, strict: bool, on_progress: Callable[[int], None]
) -> Written:
    """KEY.jpg (of features KEY.npy) and KEY.json for each readable record. Returns what the samples say, and the images
    left out."""
    samples: list[dict[str, Any]] = []
    thumbnails: list[bytes] = []  # of images
    skipped: list[dict[str, str]] = []
    # No time stamp, so that the same input gives the same bytes.
    with closing(webdataset.TarWriter(file, encoder=False, mtime=0)) as writer:
        converted = convert([record.image for record in records])
        for number, (record, one) in enumerate(zip(records, converted, strict=True), start=1):
            if not isinstance(one, str):
                text = {"captions": record.captions, "image_id": record.image_id, "label": record.label}
                stored = {name: value for name, value in text.items() if value is not None}
                content = json.dumps(stored, ensure_ascii=False).encode()
                ending = "npy" if one.thumbnail is None else "jpg"
                writer.write({"__key__": record.key, ending: one.data, "json": content})
                samples.append({"key": record.key, **text, "image_sha256": one.sha256})
                thumbnails += [] if one.thumbnail is None else [one.thumbnail]
            elif strict:
                raise InputError(
                    f"{record.image}: {one}\nRepair or remove it, or leave out --strict to skip and list it."
                )
            else:
                skipped.append({"image": record.image, "reason": one})
            on_progress(number)
    for sample, perceptual in zip(samples if thumbnails else (), perceptual_hashes(thumbnails), strict=True):
        sample["image_phash"] = perceptual
    return samples, skipped


def _refuse_nothing(shards: list[Packed]) -> None:
    """Raises InputError when not one image could be read; shards without any are removed."""
    try:
        refuse_nothing(shards)
    except InputError:
        for tar in [shard.shard.local for shard in shards]:
            for path in (tar, *map(tar.with_suffix, storage.SIDECAR_SUFFIXES)):
                path.unlink(missing_ok=True)
        raise
