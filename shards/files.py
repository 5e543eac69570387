"""Files on this machine: written whole or not at all, and told apart by their hash."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

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


def parse_json(text: str | bytes) -> Any:
    """What a JSON document from anywhere holds.

    Raises:
        ValueError: when it is none, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None
