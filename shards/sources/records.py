"""What every reader of a dataset makes: records, and the count of what was left out."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.errors import InputError, listed

Places = Path | Sequence[Path]  # folders and zips that hold a dataset's images
WHOLE = ""  # what a dataset that has no splits of its own calls its one split
SPLIT_NAME = "[A-Za-z0-9_-]+"  # files are named after a split


@dataclass(frozen=True)
class Record:
    """One image to pack: its file name in the source, its cleaned captions, and what the dataset calls it."""

    image: str
    captions: tuple[str, ...]
    image_id: int | str
    label: str | None = None

    @property
    def key(self) -> str:
        """The sample's name in the tar: the file's, where that has no dot (WebDataset cuts names there), no space
        (DALI's index does) and at most 80 characters (tar allows 100); else what is left of it, and a hash of it."""
        stem = str(Path(self.image).with_suffix(""))
        plain = re.sub(r"[^A-Za-z0-9_-]", "_", stem)[:80]
        return plain if plain == stem else f"{plain}-{hashlib.sha256(self.image.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Source:
    """Records of one split, where their images are, and what was left out on the way (reason -> count). Of features in
    place of images, ``features`` is what NAME.json says of them."""

    images: Places
    records: tuple[Record, ...]
    left_out: dict[str, int]
    features: dict[str, Any] | None = None


def source_of(images: Places, records: Iterable[Record], left_out: dict[str, int], path: Path) -> Source:
    """A Source of the records read from ``path``.

    Raises:
        InputError: when there are none, or two have the same key or id.
    """
    found = tuple(records)
    for record in found:
        try:
            _ = record.key, record.image.encode()
        except ValueError:  # nothing before the dot, or a file name that is no UTF-8
            raise InputError(
                f"{path} names an image {record.image!r}, which no sample can be called. Rename it."
            ) from None
    if not found:
        reasons = "".join(f"\n  left out: {count:,} {reason}" for reason, count in left_out.items() if count)
        raise InputError(f"{path} names no image with a caption: there is nothing to pack.{reasons}")
    for what, counts in (("key", Counter(r.key for r in found)), ("id", Counter(r.image_id for r in found))):
        twice = [str(name) for name, count in counts.items() if count > 1]
        if twice:
            hint = "File names must differ in more than their ending." if what == "key" else ""
            raise InputError(
                f"{path}: {len(twice)} image {what}(s) occur more than once:\n{listed(twice)}\n{hint}".rstrip()
            )
    return Source(images, found, {reason: count for reason, count in left_out.items() if count})
