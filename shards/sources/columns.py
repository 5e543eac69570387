"""Which columns of a table matter: the image's name, its captions, its split."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from shards.captions import CAPTION_FIELDS

IMAGE_COLUMNS = (
    *("image", "image_name", "filename", "file_name", "filepath", "file_path", "image_path", "path", "file"),
    *("image_file", "image_filename", "image_file_name", "img", "img_path", "img_name"),
)
CAPTION_COLUMNS = tuple(name for name in CAPTION_FIELDS if name != "alt")
SPLIT_COLUMN = "split"


@dataclass(frozen=True)
class Chosen:
    """Columns the user named, where the names do not tell."""

    image: str | None = None
    caption: str | None = None


@dataclass(frozen=True)
class Columns:
    """Positions of the columns that matter. Several captions: numbered ones, caption_1, caption_2 ..."""

    image: int
    captions: tuple[int, ...]
    split: int | None = None


@dataclass(frozen=True)
class Row:
    """What one row says: an image, its captions as they were written, and its split where there is such a column."""

    image: str
    captions: list[str]
    split: str | None = None


def find(names: Sequence[object], chosen: Chosen) -> Columns | None:
    """The columns that matter among ``names``; None when there is no image or no caption column."""
    plain = [_plain(str(name)) for name in names]

    def first(known: Sequence[str]) -> int | None:
        return next((plain.index(name) for name in known if name in plain), None)

    image = first([_plain(chosen.image)] if chosen.image else IMAGE_COLUMNS)
    caption = first([_plain(chosen.caption)] if chosen.caption else CAPTION_COLUMNS)
    captions = (caption,) if caption is not None else () if chosen.caption else _numbered(plain)
    if image is None or not captions:
        return None
    return Columns(image, captions, first([SPLIT_COLUMN]))


def wanted() -> str:
    """What ``find`` looks for, for a message."""
    return (
        f"an image column ({', '.join(IMAGE_COLUMNS[:9])} ...)\nand a caption column ({', '.join(CAPTION_COLUMNS)});\n"
        "name yours with --image-column and --caption-column"
    )


def _plain(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def _numbered(plain: Sequence[str]) -> tuple[int, ...]:
    """caption_1, caption_2 ... or caption0, caption1 ..., of one name."""
    for name in CAPTION_COLUMNS:
        found = tuple(i for i, column in enumerate(plain) if re.fullmatch(rf"{name}_?\d+", column))
        if found:
            return found
    return ()
