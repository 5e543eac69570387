"""Whole shards on this machine's disk, for sources that cannot be read by offset; shared by all its processes.

A cached shard is a file named by its sha256, which was checked when it was fetched. Three kinds of ``flock`` keep the
processes apart, and the kernel frees those of a killed one:

- a reader holds a shared lock on the shard while it reads, so that it is not removed under it;
- who fetches a shard holds its ``.part`` file; the others that want it wait for the rename. Nobody's ``.part`` is left
  over from a kill, and is removed;
- room is reckoned and reserved under the folder's ``lock``: the least recently read shards go first, and the space of
  a ``.part`` file is allocated before its first byte arrives. So the folder never exceeds its bound.
"""

import errno
import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from shards.errors import InputError
from shards.storage import streams
from shards.storage.http_ranges import retried
from shards.storage.urls import Url

_PATIENCE = 600.0  # seconds to wait for room that others' reads and fetches take up
_REST = 60.0  # seconds in which a shard that could not be fetched is not tried again
_failed: dict[str, tuple[float, str]] = {}  # sha256 -> when, why


def default_folder() -> Path:
    """In the machine's own temporary folder: a home folder may lie on a network, and be small.

    Raises:
        InputError: when somebody else made it.
    """
    folder = Path(tempfile.gettempdir()) / f"captioning-shards-{os.getuid()}"
    if folder.exists() and folder.stat().st_uid != os.getuid():
        raise InputError(f"{folder} belongs to another user. Set data.cache_dir.")
    return folder


@dataclass(frozen=True)
class Cache:
    """A folder of shards that never holds more than ``limit`` bytes."""

    folder: Path = field(default_factory=default_folder)
    limit: int = 50 * 10**9

    def read(self, url: Url, filesize: int, sha256: str, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset`` of a shard, which is fetched if it is not here.

        Raises:
            OSError: when it cannot be fetched, or is not the shard that ``filesize`` and ``sha256`` tell of.
            InputError: when the cache is too small for it, or its disk is full.
        """
        final = self.folder / f"{sha256}.tar"
        while True:
            with _opened(final) as file:
                if file is not None and os.fstat(file).st_size == filesize:
                    os.utime(file)
                    data = os.pread(file, size, offset)
                    if len(data) != size:
                        raise OSError(f"{url} ends before byte {offset + size:,}")
                    return data
            self._fetch(url, filesize, sha256, final)

    def _fetch(self, url: Url, filesize: int, sha256: str, final: Path) -> None:
        """Bring a shard here, unless another process just did."""
        when, why = _failed.get(sha256, (-_REST, ""))
        if time.monotonic() - when < _REST:
            raise OSError(why)
        if filesize > self.limit:
            raise InputError(
                f"{url} has {filesize / 1e9:.2f} GB: more than data.cache_gb={self.limit / 1e9:g} can hold."
            )
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = final.with_suffix(".part")
        file = os.open(part, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file, part) or _has_size(final, filesize):
                return
            try:
                os.ftruncate(file, 0)
                self._reserve(file, filesize)
                retried(lambda: _download(url, file, filesize, sha256))
                part.replace(final)
            except OSError as error:
                _failed[sha256] = (time.monotonic(), str(error))
                raise
            finally:
                part.unlink(missing_ok=True)
        finally:
            os.close(file)

    def _reserve(self, file: int, size: int) -> None:
        """Allocate ``size`` bytes for a file of this folder, removing what was not read for longest."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            with _locked(self.folder / "lock"):
                if self._make_room(size):
                    try:
                        return os.posix_fallocate(file, 0, size)
                    except OSError as error:
                        if error.errno != errno.ENOSPC:
                            raise
                        raise InputError(
                            f"The disk of {self.folder} is full. Lower data.cache_gb, or set data.cache_dir."
                        ) from error
            if time.monotonic() > deadline:
                raise OSError(f"{self.folder} is full of shards in use: raise data.cache_gb={self.limit / 1e9:g}")
            time.sleep(0.1)

    def _make_room(self, size: int) -> bool:
        held = []
        for path in [*self.folder.glob("*.tar"), *self.folder.glob("*.part")]:
            with suppress(FileNotFoundError):
                held.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        used = sum(bytes_ for _, bytes_, _ in held)
        for _, bytes_, path in sorted(held):
            is_left_over = path.suffix == ".part"
            if (is_left_over or used + size > self.limit) and _removed(path):
                used -= bytes_
        return used + size <= self.limit


def _download(url: Url, file: int, filesize: int, sha256: str) -> None:
    digest, at = hashlib.sha256(), 0
    for chunk in streams.stream(url):
        if at + len(chunk) > filesize:
            raise OSError(f"{url} has more than the {filesize:,} bytes the index says: it was replaced")
        os.pwrite(file, chunk, at)
        digest.update(chunk)
        at += len(chunk)
    if at != filesize:
        raise ConnectionError(f"{url} gave {at:,} bytes, the index says {filesize:,}")
    if digest.hexdigest() != sha256:
        raise OSError(f"{url}: its bytes are not those that were packed (sha256 {digest.hexdigest()[:16]} ...)")
    os.fsync(file)


@contextmanager
def _opened(path: Path) -> Iterator[int | None]:
    """A descriptor with a shared lock; None where there is no such file, or it is being removed."""
    try:
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        yield None
        return
    try:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield file if os.fstat(file).st_nlink else None
    finally:
        os.close(file)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def _removed(path: Path) -> bool:
    """Whether a file could be removed: not while someone reads it or writes to it."""
    try:
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(file)


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False
