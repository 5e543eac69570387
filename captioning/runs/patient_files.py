"""Files of a run that can wait: what a full disk does not take is kept in memory, and written when there is room.

Only a checkpoint that cannot be written may end a run, and only the last one.
"""

import logging
import os
from contextlib import suppress
from pathlib import Path

from shards.files import write_atomically

logger = logging.getLogger(__name__)


class PatientLog:
    """A file that is only appended to. Whatever fails, it holds a beginning of what was added, and memory the rest."""

    def __init__(self, path: Path):
        self.path = path
        self._pending = bytearray()
        self._end = path.stat().st_size if path.exists() else 0
        self._is_failing = False

    def add(self, data: bytes) -> None:
        """To be written at the next ``write``."""
        self._pending += data

    def write(self, synced: bool = False) -> str | None:
        """Write what was added, ``synced``: onto the disk itself. Returns the disk's objection, None when all is there;
        people are told when it begins to object, and when it takes everything again."""
        if not self._pending and not synced:
            return None
        try:
            with os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as file:
                file.truncate(self._end)  # a part of these bytes, from an attempt that failed
                file.seek(self._end)
                left = memoryview(bytes(self._pending))
                while left:
                    left = left[file.write(left) :]
                if synced:
                    os.fsync(file.fileno())
        except OSError as error:
            if not self._is_failing:
                logger.warning(f"{self.path} cannot be written, and is kept in memory until it can: {error.strerror}")
            self._is_failing = True
            return f"{self.path}: {error.strerror}"
        self._end += len(self._pending)
        self._pending.clear()
        if self._is_failing:
            logger.warning(f"{self.path} is written again, nothing of it is lost")
        self._is_failing = False
        return None


class PatientFiles:
    """Small files, each written whole; the latest of each that could not be is written later."""

    def __init__(self) -> None:
        self._kept: dict[Path, bytes] = {}

    def write(self, path: Path, data: bytes) -> None:
        """Write it now, or with a later one."""
        self._kept[path] = data
        self.retry()

    def retry(self) -> None:
        """Write what is waiting, if the disk takes it by now."""
        for path, data in list(self._kept.items()):
            try:
                write_atomically(path, data)
            except OSError as error:
                with suppress(OSError):
                    path.with_name(path.name + ".tmp").unlink(missing_ok=True)
                logger.warning(f"{path} cannot be written, and is kept in memory until it can: {error.strerror}")
                return
            del self._kept[path]
