"""Whole shards on this machine's disk, for sources that cannot be read by offset; shared by all its processes.

It lives in a folder of its own below the one it is given, marked by a CACHEDIR.TAG (https://bford.info/cachedir), and
opens, empties and removes only what is named as it names files: 64 hexadecimal digits and .tar or .part.

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
import logging
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from shards.errors import InputError
from shards.storage import streams
from shards.storage.outages import PassingError, waited_for
from shards.storage.urls import Url

_FOLDER, _TAG = "captioning-shards-cache", "CACHEDIR.TAG"
_TAG_TEXT = (
    b"Signature: 8a477f597d28d172789f06886806bc55\n# Shards fetched by captioning; may be deleted at any time.\n"
)
_OURS = re.compile(r"[0-9a-f]{64}\.(tar|part)")
_PATIENCE = 600.0  # seconds to wait for room that others' reads and fetches take up
_REST = 60.0  # seconds in which a shard that could not be fetched is not tried again
_MENDINGS = 2  # times that a process removes its copy of a shard as damaged
_mended: dict[str, int] = {}  # sha256 -> times
_log = logging.getLogger(__name__)
_failed: dict[str, tuple[float, str]] = {}  # sha256 -> when, why


def default_folder() -> Path:
    """In the machine's own temporary folder: a home folder may lie on a network, and be small.

    Raises:
        InputError: when somebody else made it, or put a link there.
    """
    folder = Path(tempfile.gettempdir()) / f"captioning-shards-{os.getuid()}"
    with suppress(FileNotFoundError):
        if folder.lstat().st_uid == os.getuid():
            return folder
        raise InputError(f"{folder} belongs to another user. Set data.cache_dir.")
    return folder


@dataclass(frozen=True)
class Cache:
    """Shards below ``folder``, never more than ``limit`` bytes of them."""

    folder: Path = field(default_factory=default_folder)
    limit: int = 50 * 10**9

    @property
    def home(self) -> Path:
        """The cache's own folder, where nothing else is."""
        return self.folder / _FOLDER

    def read(self, url: Url, filesize: int, sha256: str, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset`` of a shard, which is fetched if it is not here.

        Raises:
            OSError: when it cannot be fetched, or is not the shard that ``filesize`` and ``sha256`` tell of.
            InputError: when the cache is too small for it, or its disk is full.
        """
        final = self.home / f"{sha256}.tar"
        if not _OURS.fullmatch(final.name):
            raise InputError(f"{url}: its sha256 {sha256[:80]!r} is not 64 hexadecimal digits.")
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
        self._make_home()
        part = final.with_suffix(".part")
        file = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file, part) or _has_size(final, filesize):
                return
            try:
                os.ftruncate(file, 0)
                waited_for(lambda: self._reserve(file, filesize))  # for room, where the disk is full of other things
                self._fetch_bytes(url, file, filesize, sha256)
                with _locked(self.home / "lock"):  # else whoever adds up what is here may meet it under neither name
                    part.replace(final)
            except OSError as error:
                _failed[sha256] = (time.monotonic(), str(error))
                raise
            finally:
                part.unlink(missing_ok=True)
        finally:
            os.close(file)

    def _fetch_bytes(self, url: Url, file: int, filesize: int, sha256: str) -> None:
        try:
            waited_for(lambda: _download(url, file, filesize, sha256))
        except _WrongBytesError as error:  # once may be a page of a proxy
            _log.warning("%s. It is fetched once more.", error)
            waited_for(lambda: _download(url, file, filesize, sha256))

    def damage(self, sha256: str) -> str | None:
        """What is wrong with the copy of a shard that is here; None where all is well, or there is none.

        Raises:
            OSError: when it cannot be read.
        """
        path = self.home / f"{sha256}.tar"
        with _opened(path) as file:
            return None if file is None or _sha256(file) == sha256 else f"{path}: its bytes are not those of its name"

    def mend(self, sha256: str) -> None:
        """Remove the copy of a shard that is here if it is damaged, so that it is fetched again; a few times, since a
        disk may damage it each time."""
        if _mended.get(sha256, 0) >= _MENDINGS or self.damage(sha256) is None:
            return
        _mended[sha256] = _mended.get(sha256, 0) + 1
        path = self.home / f"{sha256}.tar"
        with suppress(FileNotFoundError):
            file = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)  # whoever reads it now is done first
                if _is_at(file, path) and _sha256(file) != sha256:
                    path.unlink()
                    _log.warning("%s was damaged: it is fetched again (%d so far)", path, sum(_mended.values()))
            finally:
                os.close(file)

    def _make_home(self) -> None:
        """Make the cache's own folder and mark it.

        Raises:
            InputError: when there is one of that name that is not marked, and holds something.
        """
        tag = self.home / _TAG
        if tag.is_file():
            return
        self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(path.name != _TAG for path in self.home.iterdir()) and not tag.is_file():
            raise InputError(f"{self.home} holds files and no {_TAG}: it is no cache of shards. Set data.cache_dir.")
        with suppress(FileExistsError):  # of another process, just now
            marker = os.open(tag, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            os.write(marker, _TAG_TEXT)
            os.close(marker)

    def _reserve(self, file: int, size: int) -> None:
        """Allocate ``size`` bytes for a file of this folder, removing what was not read for longest."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            with _locked(self.home / "lock"):
                if self._make_room(size):
                    try:
                        return os.posix_fallocate(file, 0, size)
                    except OSError as error:
                        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                            raise
                        os.ftruncate(file, 0)
                        if not self._removed_oldest():
                            raise PassingError(
                                f"The disk of {self.home} is full. Lower data.cache_gb, or set data.cache_dir."
                            ) from error
                        continue
            if time.monotonic() > deadline:
                raise OSError(f"{self.home} is full of shards in use: raise data.cache_gb={self.limit / 1e9:g}")
            time.sleep(0.1)

    def _removed_oldest(self) -> bool:
        """Remove the shard that was not read for longest; False when there is none that nobody reads."""
        return any(_removed(path) for _, _, path in self._held() if path.suffix == ".tar")

    def _held(self) -> list[tuple[int, int, Path]]:
        """When each of our files was last read, its bytes, and where it is; the longest ago first."""
        held = []
        for path in [path for path in self.home.iterdir() if _OURS.fullmatch(path.name)]:
            with suppress(FileNotFoundError):
                state = path.lstat()
                if stat.S_ISREG(state.st_mode):
                    held.append((state.st_mtime_ns, state.st_size, path))
        return sorted(held)

    def _make_room(self, size: int) -> bool:
        held = self._held()
        used = sum(bytes_ for _, bytes_, _ in held)
        for _, bytes_, path in held:
            is_left_over = path.suffix == ".part"
            if (is_left_over or used + size > self.limit) and _removed(path):
                used -= bytes_
        return used + size <= self.limit


class _WrongBytesError(OSError):
    """The storage answers, with something else than the shard."""


def _sha256(file: int) -> str:
    digest, at = hashlib.sha256(), 0
    while chunk := os.pread(file, 1 << 20, at):
        digest.update(chunk)
        at += len(chunk)
    return digest.hexdigest()


def _download(url: Url, file: int, filesize: int, sha256: str) -> None:
    digest, at = hashlib.sha256(), 0
    for chunk in streams.stream(url):
        if at + len(chunk) > filesize:
            raise _WrongBytesError(f"{url} has more than the {filesize:,} bytes the index says: it was replaced")
        os.pwrite(file, chunk, at)
        digest.update(chunk)
        at += len(chunk)
    if at != filesize:
        raise _WrongBytesError(f"{url} gave {at:,} bytes, the index says {filesize:,}")
    if digest.hexdigest() != sha256:
        raise _WrongBytesError(f"{url}: its bytes are not those that were packed (sha256 {digest.hexdigest()[:16]})")
    os.fsync(file)


@contextmanager
def _opened(path: Path) -> Iterator[int | None]:
    """A descriptor with a shared lock; None where there is no such file, or it is being removed."""
    try:
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
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
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def _removed(path: Path) -> bool:
    """Whether a file could be removed: not while someone reads it or writes to it."""
    try:
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return True
    except OSError:  # a folder or link of that name: not ours
        return False
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
