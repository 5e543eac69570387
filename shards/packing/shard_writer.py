"""One shard written whole or not at all: what lies beside its tar first, the tar last, each renamed into place."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from shards import index as shard_index
from shards import storage, tars
from shards.errors import InputError, listed
from shards.files import sha256_of
from shards.packing.merge import Packed, packed
from shards.packing.plan import tar_names

Written = tuple[list[dict[str, Any]], list[dict[str, str]]]  # what the samples say; what was left out, with the reason


def write_shard(tar: Path, made_by: dict[str, Any], write: Callable[[BinaryIO], Written], views: int = 1) -> None:
    """Write one shard and what lies beside it. ``write`` writes the tar; it begins anew after a killed one.

    Args:
        views: .npy files of each sample, each a view of its image.

    Raises:
        InputError: when another process is writing this shard.
        OSError: when the disk does not take it; nothing is there then.
    """
    temporary = tar.with_name(tar.name + ".tmp")
    with _taken(temporary) as file:
        try:
            samples, skipped = write(file)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        size, sha256 = temporary.stat().st_size, sha256_of(temporary)
        finished = {"made_by": made_by, "filesize": size, "sha256": sha256, "skipped": skipped, "samples": samples}
        if views > 1:
            finished["views"] = views
        shard_index.write_sidecars(tar, temporary, tars.samples_of(temporary), finished)
        temporary.replace(tar)


def is_finished(tar: Path, made_by: dict[str, Any], retry: bool = False) -> bool:
    """Whether a tar and all that belongs to it is there, whole, made by this plan and, to ``retry``, lacks no image."""
    found = packed(tar)
    return (
        found is not None
        and all(tar.with_suffix(suffix).is_file() for suffix in storage.SIDECAR_SUFFIXES)
        and tar.stat().st_size == found.shard.filesize
        and found.made_by == made_by
        and not (retry and found.skipped)
    )


def refuse_another_packing(out: Path, split: str, present: dict[Path, Packed | None], made_by: dict[str, Any]) -> None:
    """Raises InputError when ``present``, the tars of this name in ``out``, are of another plan than ``made_by``."""
    names = set(tar_names(split, made_by))
    foreign = [
        tar.name for tar, found in present.items() if tar.name not in names or found is None or found.made_by != made_by
    ]
    if foreign:
        raise InputError(
            f"{out} already holds split {split!r} packed from other images, captions or settings:\n"
            f"{listed(foreign)}\nChoose another --out or --split, or delete {out / split}-*."
        )


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
