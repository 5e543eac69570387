"""Bytes of a shard by offset, wherever it is.

Storage that does not answer is waited for (outages.py): an OSError from here is an answer.
"""

import errno
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shards.storage import http_ranges as ranges
from shards.storage import outages, streams
from shards.storage.cache import Cache
from shards.storage.outages import PassingError, waited_for
from shards.storage.urls import Place, Url

SIDECAR_SUFFIXES = (".idx", ".crc32", ".captions.json")  # of the files that belong to a tar
_MOST_OPEN = 128  # per process; the usual limit is 1,024, and torch needs its share
_open_files: OrderedDict[Path, int] = OrderedDict()  # descriptors, the least recently used first
_REFUSALS = 3  # whole files in a row for a range: then the server is taken to serve no ranges
_without_ranges: set[str] = set()  # where servers were seen to do so
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """One tar: where it is, its samples, its size in bytes, its sha256, and that of each file beside it."""

    path: Place
    nsamples: int
    filesize: int
    sha256: str
    sidecars: tuple[str, ...] = ()  # in the order of SIDECAR_SUFFIXES; empty while they are not written yet

    @property
    def local(self) -> Path:
        """Where it is on a disk, for those who write shards."""
        assert isinstance(self.path, Path), f"{self.path} is not on a disk"
        return self.path


def read(shard: Shard, offset: int, size: int, cache: Cache, again: bool = False) -> bytes:
    """``size`` bytes of a shard from ``offset``: by offset where it lies on a disk or an HTTP server that serves
    ranges, else through the cache.

    Args:
        again: they were missing or wrong before: the file is opened again, caches on the way are passed over, and a
            cached shard that is damaged is fetched again.

    Raises:
        OSError: when the shard is missing, unreadable or not the one the index tells of.
        InputError: when the storage does not answer, the cache cannot hold the shard, or nothing installed can open it.
    """
    place = shard.path
    if isinstance(place, Path):
        if again:
            _close(place)
        return read_file(place, offset, size)
    if place.is_http and place.before not in _without_ranges:
        for _ in range(_REFUSALS):
            try:
                return ranges.read_range(place, offset, size, shard.filesize, again)
            except ranges.RangesRefusedError:
                time.sleep(outages.FIRST_WAIT)
        _without_ranges.add(place.before)
        _log.warning("%s: the server ignores Range, so whole shards are fetched through the cache", place)
    if again:
        cache.mend(shard.sha256)
    return cache.read(place, shard.filesize, shard.sha256, offset, size)


def read_file(path: Path, offset: int, size: int) -> bytes:
    """``size`` bytes of a local or network file from ``offset``; safe in forked processes, which share no position.

    Raises:
        OSError: when the file is missing, unreadable or shorter than ``offset + size``.
        InputError: when its file system is away for too long.
    """
    data = waited_for(lambda: _pread(path, offset, size))
    if len(data) != size:
        raise OSError(f"{path} ends after {len(data)} of the {size} bytes wanted at {offset}")
    return data


def _pread(path: Path, offset: int, size: int) -> bytes:
    try:
        return os.pread(_descriptor(path), size, offset)
    except OSError as error:
        _close(path)  # of a file that a server has forgotten (ESTALE) another descriptor is wanted
        if _is_away(path, error):
            raise PassingError(f"{path}: {error.strerror}") from error
        raise


def _is_away(path: Path, error: OSError) -> bool:
    """Whether an error about a shard is one of its whole file system: a mount that is gone takes the shard's .idx
    along, and one that fails has no answer about itself either."""
    try:
        if error.errno == errno.ENOENT:
            return not path.with_suffix(SIDECAR_SUFFIXES[0]).exists()
        if error.errno == errno.EIO:
            os.statvfs(path.parent)
        return outages.is_passing(error)
    except OSError:
        return True


def read_all(place: Place) -> bytes:
    """A whole (small) file.

    Raises:
        OSError: when it is missing or unreadable.
        InputError: when nothing installed can open it.
    """
    return waited_for(lambda: place.read_bytes() if isinstance(place, Path) else b"".join(streams.stream(place)))


def chunks(place: Place) -> Iterator[bytes]:
    """A whole file of any size, in chunks; one attempt.

    Raises:
        OSError: when it is missing or unreadable.
        InputError: when nothing installed can open it.
    """
    if isinstance(place, Url):
        yield from streams.stream(place)
        return
    with place.open("rb") as file:
        while chunk := file.read(1 << 20):
            yield chunk


def size_of(place: Place) -> int | None:
    """A file's size in bytes; None where only reading it would tell.

    Raises:
        OSError: when it is missing or unreadable.
        InputError: when nothing installed can open it.
    """
    return waited_for(lambda: place.stat().st_size if isinstance(place, Path) else streams.size(place))


def needs_cache(place: Place) -> bool:
    """Whether a shard at this place is certain to be read through the cache."""
    return isinstance(place, Url) and not place.is_http


def _descriptor(path: Path) -> int:
    """An open descriptor: opening costs more than reading, and neighbours are read from the same shard."""
    if path not in _open_files:
        _open_files[path] = os.open(path, os.O_RDONLY)
        if len(_open_files) > _MOST_OPEN:
            os.close(_open_files.popitem(last=False)[1])
    _open_files.move_to_end(path)
    return _open_files[path]


def _close(path: Path) -> None:
    if (file := _open_files.pop(path, None)) is not None:
        os.close(file)


def close_files() -> None:
    """Forget open files, so that a file replaced under the same name is seen."""
    while _open_files:
        os.close(_open_files.popitem()[1])
