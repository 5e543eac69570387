"""Records -> shards. Parallel over images, atomic per shard, restartable, and byte-identical however it was done.

Records are shuffled once (so that neighbours are not alike), and a shard takes a fixed number of them (see plan.py). An
unreadable image makes its shard shorter and moves nothing else. So any number of workers, and any number of machines
that pack a part each, make the same shards.

A shard is finished when its tar is there: what lies beside it, and then the tar, are each written to a temporary name
and renamed, so a killed packing leaves whole shards and the same command makes the rest. A shard that had to leave out
images is made again where that is asked for, as they may have been mended. The captions file says what its shard was
made by, and holds hashes of the files its images were made from (see overlap.py).
"""

import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import webdataset

from shards import index as shard_index
from shards import storage, tars
from shards.errors import InputError, listed
from shards.files import sha256_of
from shards.index import Index
from shards.packing.convert import Converter
from shards.packing.merge import Packed, merge, packed, packed_in, refuse_nothing
from shards.packing.plan import Part, Plan, Settings, plan, tar_names
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
    ImageFiles(source.images)  # a wrong --images is told at once, not as ten thousand unreadable files
    shard_index.refuse_another_file(out / f"{split}.json")
    new_folder = not out.exists()
    with Converter(source.images, settings.short_side, settings.quality, workers) as convert:
        try:
            present = packed_in(out, split)
            planned = plan(source, split, settings, [found.made_by for found in present.values() if found], convert)
            _refuse_another_packing(out, present, planned)
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
        if not _is_finished(tar, planned, retry):
            _pack_shard(tar, planned, records, convert, strict, partial(_later, on_progress, done, total))
        shard = packed(tar)
        assert shard is not None
        finished.append(shard)
        done += len(records)
        on_progress(done, total)
    return finished


def _later(on_progress: Progress, before: int, total: int, done: int) -> None:
    on_progress(before + done, total)


def _refuse_another_packing(out: Path, present: dict[Path, Packed | None], plan: Plan) -> None:
    names = set(tar_names(plan.split, plan.made_by))
    foreign = [
        tar.name
        for tar, found in present.items()
        if tar.name not in names or found is None or found.made_by != plan.made_by
    ]
    if foreign:
        raise InputError(
            f"{out} already holds split {plan.split!r} packed from other images, captions or settings:\n"
            f"{listed(foreign)}\nChoose another --out or --split, or delete {out / plan.split}-*."
        )


def _pack_shard(
    tar: Path,
    plan: Plan,
    records: Sequence[Record],
    convert: Converter,
    strict: bool,
    on_progress: Callable[[int], None],
) -> None:
    """Write one shard and what lies beside it, the tar last."""
    temporary = tar.with_name(tar.name + ".tmp")
    with _taken(temporary) as file:
        try:
            samples, skipped = _write_tar(file, records, convert, strict, on_progress)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        size, sha256 = temporary.stat().st_size, sha256_of(temporary)
        finished = {"made_by": plan.made_by, "filesize": size, "sha256": sha256, "skipped": skipped, "samples": samples}
        shard_index.write_sidecars(tar, temporary, tars.samples_of(temporary), finished)
        temporary.replace(tar)


@contextmanager
def _taken(path: Path) -> Iterator[BinaryIO]:
    """A file to write, emptied, that no other process writes: the same command may have been started twice."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
        except BlockingIOError:
            taken = False
        except OSError:  # a network file system without locks
            taken = True
        if not taken:
            raise InputError(f"{path} is being written by another packing. Wait for it, or end it.")
        file.truncate(0)
        yield file


def _write_tar(
    file: BinaryIO, records: Sequence[Record], convert: Converter, strict: bool, on_progress: Callable[[int], None]
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """KEY.jpg and KEY.json for each readable record. Returns what the samples say, and the images left out."""
    samples: list[dict[str, Any]] = []
    thumbnails: list[bytes] = []
    skipped: list[dict[str, str]] = []
    # No time stamp, so that the same input gives the same bytes.
    with closing(webdataset.TarWriter(file, encoder=False, mtime=0)) as writer:
        converted = convert([record.image for record in records])
        for number, (record, one) in enumerate(zip(records, converted, strict=True), start=1):
            if not isinstance(one, str):
                text = {"captions": record.captions, "image_id": record.image_id, "label": record.label}
                stored = {name: value for name, value in text.items() if value is not None}
                content = json.dumps(stored, ensure_ascii=False).encode()
                writer.write({"__key__": record.key, "jpg": one.jpeg, "json": content})
                samples.append({"key": record.key, **text, "image_sha256": one.sha256})
                thumbnails.append(one.thumbnail)
            elif strict:
                raise InputError(
                    f"{record.image}: {one}\nRepair or remove it, or leave out --strict to skip and list it."
                )
            else:
                skipped.append({"image": record.image, "reason": one})
            on_progress(number)
    for sample, perceptual in zip(samples, perceptual_hashes(thumbnails), strict=True):
        sample["image_phash"] = perceptual
    return samples, skipped


def _is_finished(tar: Path, plan: Plan, retry: bool) -> bool:
    """Whether a tar and all that belongs to it is there, whole, made by this plan and, to ``retry``, lacks no image."""
    found = packed(tar)
    return (
        found is not None
        and all(tar.with_suffix(suffix).is_file() for suffix in storage.SIDECAR_SUFFIXES)
        and tar.stat().st_size == found.shard.filesize
        and found.made_by == plan.made_by
        and not (retry and found.skipped)
    )


def _refuse_nothing(shards: list[Packed]) -> None:
    """Raises InputError when not one image could be read; shards without any are removed."""
    try:
        refuse_nothing(shards)
    except InputError:
        for tar in [shard.shard.local for shard in shards]:
            for path in (tar, *map(tar.with_suffix, storage.SIDECAR_SUFFIXES)):
                path.unlink(missing_ok=True)
        raise
