"""Bytes of a shard by offset, wherever it is."""

import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shards.storage import http_ranges as ranges
from shards.storage import streams
from shards.storage.cache import Cache
from shards.storage.urls import Place, Url

_MOST_OPEN = 128  # per process; the usual limit is 1,024, and torch needs its share
_open_files: OrderedDict[Path, int] = OrderedDict()  # descriptors, the least recently used first
_without_ranges: set[str] = set()  # where servers were seen to ignore Range


@dataclass(frozen=True)
class Shard:
    """One tar: where it is, its samples, its size in bytes, its sha256."""

    path: Place
    nsamples: int
    filesize: int
    sha256: str

    @property
    def local(self) -> Path:
        """Where it is on a disk, for those who write shards."""
        assert isinstance(self.path, Path), f"{self.path} is not on a disk"
        return self.path


def read(shard: Shard, offset: int, size: int, cache: Cache) -> bytes:
    """``size`` bytes of a shard from ``offset``: by offset where it lies on a disk or an HTTP server that serves
    ranges, else through the cache.

    Raises:
        OSError: when the shard is missing, unreadable or not the one the index tells of.
        InputError: when the cache cannot hold it, or nothing installed can open it.
    """
    place = shard.path
    if isinstance(place, Path):
        return read_file(place, offset, size)
    if place.is_http and place.before not in _without_ranges:
        try:
            return ranges.read_range(place, offset, size, shard.filesize)
        except ranges.RangesRefusedError:
            _without_ranges.add(place.before)
    return cache.read(place, shard.filesize, shard.sha256, offset, size)


def read_file(path: Path, offset: int, size: int) -> bytes:
    """``size`` bytes of a local or network file from ``offset``; safe in forked processes, which share no position.

    Raises:
        OSError: when the file is missing, unreadable or shorter than ``offset + size``.
    """
    data = os.pread(_descriptor(path), size, offset)
    if len(data) != size:
        raise OSError(f"{path} ends after {len(data)} of the {size} bytes wanted at {offset}")
    return data


def read_all(place: Place) -> bytes:
    """A whole (small) file.

    Raises:
        OSError: when it is missing or unreadable.
        InputError: when nothing installed can open it.
    """
    return place.read_bytes() if isinstance(place, Path) else ranges.retried(lambda: b"".join(streams.stream(place)))


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
    return place.stat().st_size if isinstance(place, Path) else streams.size(place)


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


def close_files() -> None:
    """Forget open files, so that a file replaced under the same name is seen."""
    while _open_files:
        os.close(_open_files.popitem()[1])
