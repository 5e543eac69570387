"""Files on this machine: written whole or not at all, and told apart by their hash."""

import hashlib
import os
from pathlib import Path

_BLOCK = 1 << 20


def write_atomically(path: Path, data: bytes) -> None:
    """Write so that ``path`` holds all of ``data`` or is not there: a temporary sibling, fsync, rename."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
