"""Bytes of a shard, by offset."""

import os
from collections import OrderedDict
from pathlib import Path

_MOST_OPEN = 128  # per process; the usual limit is 1,024, and torch needs its share
_open_files: OrderedDict[Path, int] = OrderedDict()  # descriptors, the least recently used first


def read(path: Path, offset: int, size: int) -> bytes:
    """``size`` bytes of a local or network file from ``offset``; safe in forked processes, which share no position.

    Raises:
        OSError: when the file is missing, unreadable or shorter than ``offset + size``.
    """
    data = os.pread(_descriptor(path), size, offset)
    if len(data) != size:
        raise OSError(f"{path} ends after {len(data)} of the {size} bytes wanted at {offset}")
    return data


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
