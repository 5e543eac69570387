"""Bytes of a shard, by offset."""

import os
from functools import lru_cache
from pathlib import Path


def read(path: Path, offset: int, size: int) -> bytes:
    """``size`` bytes of a local or network file from ``offset``; safe in threads and forked processes (pread).

    Raises:
        OSError: when the file is missing, unreadable or shorter than ``offset + size``.
    """
    data = os.pread(_descriptor(path), size, offset)
    if len(data) != size:
        raise OSError(f"{path} ends after {len(data)} of the {size} bytes wanted at {offset}")
    return data


@lru_cache(maxsize=256)
def _descriptor(path: Path) -> int:
    # Kept open for the life of the process: opening costs more than reading, and a split has few shards.
    return os.open(path, os.O_RDONLY)
