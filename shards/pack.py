"""Records -> shards. Parallel over images, atomic per shard, restartable, and byte-identical for any number of workers.

Which record goes into which shard is settled before the first image is converted: records are shuffled once (so that
neighbours are not alike), and a shard takes a fixed number of them, estimated from a sample of converted images. An
unreadable image makes its shard shorter and moves nothing else. A shard is finished when its tar is there: .idx,
checksums, captions and tar are each written to a temporary name and renamed, the tar last, so a killed packing leaves
whole shards and the same command makes the rest. A shard that had to leave out images is made again, as they may have
been mended.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from shards import index as shard_index
from shards import tars
from shards.errors import InputError, listed
from shards.hashing import hash64, key_of
from shards.images import UnreadableImageError, to_training_jpeg
from shards.index import Index, Shard
from shards.sources import ImageFiles, Record, Source

ESTIMATE_FROM = 64  # images converted to learn how many fit a shard
TAR_OVERHEAD = 2048  # bytes a sample beside its JPEG: two tar headers, padding, the json


@dataclass(frozen=True)
class Settings:
    """How images are stored: shorter side in pixels (0 keeps files as they are), JPEG quality, shard size in MB."""

    short_side: int = 256
    quality: int = 90
    shard_mb: int = 256

    def __post_init__(self):
        if self.short_side < 0 or not 1 <= self.quality <= 95 or self.shard_mb < 1:
            raise InputError(
                f"{self}: short side >= 0, quality 1..95 (as Pillow advises) and shard MB >= 1 are wanted."
            )


@dataclass(frozen=True)
class Skipped:
    """An image that could not be packed, and why."""

    image: str
    reason: str


def pack(
    source: Source,
    split: str,
    out: Path,
    settings: Settings,
    workers: int = 1,
    strict: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Index:
    """Pack a source as split ``split`` into folder ``out``; an interrupted packing is continued.

    Args:
        workers: processes that decode and encode images.
        strict: make the first unreadable image an error instead of skipping and listing it.
        on_progress: called with (records done, records in all).

    Raises:
        InputError: when ``out`` holds another packing of this split, no image can be read, or (strict) one cannot.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", split):
        raise InputError(f"--split {split!r}: letters, digits, - and _ are wanted, since files are named after it.")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; a folder is wanted.")
    if workers < 1:
        raise InputError(f"--workers {workers}: at least 1 is wanted.")
    records = shuffled(source.records)
    ImageFiles(source.images)  # a wrong --images is told at once, not as ten thousand unreadable files
    new_folder = not out.exists()
    created: list[Path] = []
    with _Converter(source.images, settings, workers) as convert:
        try:
            planned = _plan(records, split, settings, convert)
            _refuse_another_packing(out, split, planned)
            out.mkdir(parents=True, exist_ok=True)
            shards, skipped, done = [], [], 0
            for tar_name, plan, part in planned:
                tar = out / tar_name
                if not _is_finished(tar, plan):
                    created += [] if tar.exists() else [tar]
                    _pack_shard(tar, plan, part, convert, strict, partial(_later, on_progress, done, len(records)))
                done += len(part)
                on_progress(done, len(records))
                shard, left = _read_finished(tar)
                shards += [shard] if shard.nsamples else []
                skipped += left
            if not shards:
                raise InputError(f"None of the {len(records)} images could be read:\n{_reasons(skipped)}")
        except InputError:
            _remove(created, out if new_folder else None)
            raise
    _write_index(out / f"{split}.json", split, shards, skipped, source, settings)
    return shard_index.load(out / f"{split}.json")


def _later(on_progress: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    on_progress(before + done, total)


def shuffled(records: Iterable[Record]) -> list[Record]:
    """Records in an order that depends on their keys alone: datasets come sorted, neighbours should not be alike."""
    ordered = sorted(records, key=lambda record: record.key)
    places = np.argsort(hash64(key_of("pack"), np.arange(len(ordered))), kind="stable")
    return [ordered[place] for place in places]


class _Converter:
    """Reads and converts images in worker processes, results in the order asked for."""

    def __init__(self, images: Path, settings: Settings, workers: int):
        # Forked workers would inherit whatever threads the caller runs; a fork server starts clean.
        self._pool = ProcessPoolExecutor(workers, get_context("forkserver"), _open_images, (images, settings))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._pool.shutdown(cancel_futures=True)

    def __call__(self, records: list[Record]) -> Iterator[bytes | str]:
        """JPEG bytes, or the reason why there are none, for each record."""
        return self._pool.map(_convert, [record.image for record in records], chunksize=8)


_images: ImageFiles  # of a worker process, set when it starts: an open zip cannot be sent with each task
_settings: Settings


def _open_images(path: Path, settings: Settings) -> None:
    global _images, _settings
    _images, _settings = ImageFiles(path), settings


def _convert(name: str) -> bytes | str:
    try:
        return to_training_jpeg(_images.read(name), _settings.short_side, _settings.quality)
    except FileNotFoundError:
        return "file not found"
    except (OSError, UnreadableImageError) as error:
        return str(error)


def _plan(
    records: list[Record], split: str, settings: Settings, convert: _Converter
) -> list[tuple[str, str, list[Record]]]:
    """For each shard its tar's name, a hash of its records and the settings, and its records."""
    spread = [records[i * len(records) // ESTIMATE_FROM] for i in range(min(ESTIMATE_FROM, len(records)))]
    sizes = [len(jpeg) + TAR_OVERHEAD for jpeg in convert(spread) if isinstance(jpeg, bytes)]
    per_shard = max(1, int(settings.shard_mb * 1e6 / np.mean(sizes))) if sizes else len(records)
    plan = []
    for number, start in enumerate(range(0, len(records), per_shard)):
        part = records[start : start + per_shard]
        content = repr((settings.short_side, settings.quality, part)).encode()
        plan.append((f"{split}-{number:06d}.tar", hashlib.sha256(content).hexdigest(), part))
    return plan


def _refuse_another_packing(out: Path, split: str, planned: list[tuple[str, str, list[Record]]]) -> None:
    plans = {name: plan for name, plan, _ in planned}
    present = sorted(out.glob(f"{split}-[0-9]*.tar"))
    foreign = [tar.name for tar in present if _document(tar).get("plan") != plans.get(tar.name)]
    if foreign:
        raise InputError(
            f"{out} already holds split {split!r} packed from other images, captions or settings:\n{listed(foreign)}\n"
            f"Choose another --out or --split, or delete {out / split}-*."
        )


def _pack_shard(
    tar: Path, plan: str, records: list[Record], convert: _Converter, strict: bool, on_progress: Callable[[int], None]
) -> None:
    """Write one shard: KEY.jpg and KEY.json for each readable record, then its .idx, then its captions."""
    temporary = tar.with_name(tar.name + ".tmp")
    skipped: list[Skipped] = []
    samples: list[dict[str, Any]] = []
    # No time stamp, so that the same input gives the same bytes.
    with temporary.open("wb") as file, closing(webdataset.TarWriter(file, encoder=False, mtime=0)) as writer:
        for number, (record, jpeg) in enumerate(zip(records, convert(records), strict=True), start=1):
            if isinstance(jpeg, bytes):
                text = {"captions": record.captions, "image_id": record.image_id, "label": record.label}
                stored = {name: value for name, value in text.items() if value is not None}
                writer.write({"__key__": record.key, "jpg": jpeg, "json": _json(stored)})
                samples.append({"key": record.key, **text})
            elif strict:
                temporary.unlink()
                raise InputError(
                    f"{record.image}: {jpeg}\nRepair or remove it, or leave out --strict to skip and list it."
                )
            else:
                skipped.append(Skipped(record.image, jpeg))
            on_progress(number)
    _sync(temporary)
    members = tars.samples_of(temporary)
    shard_index.write_atomically(tar.with_suffix(".idx"), tars.idx_text(members).encode())
    shard_index.write_atomically(tar.with_suffix(".crc32"), tars.checksums(temporary, members))
    size, sha256 = temporary.stat().st_size, shard_index.sha256_of(temporary)
    finished = {"plan": plan, "filesize": size, "sha256": sha256, "skipped": [asdict(s) for s in skipped]}
    shard_index.write_atomically(shard_index.captions_path(tar), _json({**finished, "samples": samples}))
    temporary.replace(tar)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _is_finished(tar: Path, plan: str) -> bool:
    """Whether a tar is there, whole, made from this plan, and lacks no image."""
    document = _document(tar)
    whole = tar.exists() and tar.stat().st_size == document.get("filesize")
    return whole and document["plan"] == plan and not document["skipped"]


def _document(tar: Path) -> dict[str, Any]:
    """What lies beside a tar of ours about it; empty for a tar of somebody else's."""
    try:
        document = json.loads(shard_index.captions_path(tar).read_text(encoding="utf-8"))
        return document if {"plan", "filesize", "skipped"} <= set(document) else {}
    except (OSError, ValueError, TypeError):
        return {}


def _read_finished(tar: Path) -> tuple[Shard, list[Skipped]]:
    document = _document(tar)
    shard = Shard(tar, len(document["samples"]), document["filesize"], document["sha256"])
    return shard, [Skipped(**entry) for entry in document["skipped"]]


def _write_index(
    path: Path, split: str, shards: list[Shard], skipped: list[Skipped], source: Source, settings: Settings
) -> None:
    document = {
        "__kind__": shard_index.KIND,
        "wids_version": 1,
        "name": split,
        "shardlist": [
            {"url": s.path.name, "nsamples": s.nsamples, "filesize": s.filesize, "sha256": s.sha256} for s in shards
        ],
        "fingerprint": shard_index.fingerprint_of(shards),
        "packing": asdict(settings),
        "left_out": source.left_out,
        "skipped": [asdict(skip) for skip in skipped],
    }
    shard_index.write_atomically(path, json.dumps(document, indent=1, ensure_ascii=False).encode())


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def _reasons(skipped: list[Skipped]) -> str:
    return listed(f"{skip.image}: {skip.reason}" for skip in skipped)


def _remove(tars: list[Path], new_folder: Path | None) -> None:
    """Take back what a failed packing wrote."""
    for tar in tars:
        for path in (tar, *shard_index.files_beside(tar)):
            path.unlink(missing_ok=True)
    if new_folder and new_folder.exists():
        new_folder.rmdir()
