"""Captions in a table: CSV with or without header, flickr30k's ``|`` table, ``name#0<TAB>caption`` token files."""

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from shards.errors import InputError
from shards.sources.records import Places, Record, Source, read_text, source_of
from shards.tars import IMAGE_EXTENSIONS, clean

IMAGE_COLUMNS = ("image", "image_name", "filename", "file_name", "filepath", "file_path", "image_path", "path", "file")
CAPTION_COLUMNS = ("caption", "captions", "comment", "text", "sentence", "description", "raw", "title")
_IMAGE_NAME = rf"[^\n]*?\.(?:{'|'.join(IMAGE_EXTENSIONS)})"


def table(images: Places, path: Path, only: Path | None = None) -> Source:
    """A table of image names and captions, one caption a row; rows of one image are gathered.

    Args:
        only: a list of image names, one a line (with or without their ending), that chooses the split.

    Raises:
        InputError: when a file is missing, is no such table, or leaves nothing to pack.
    """
    by_image, empty = captions_by_image(path)
    left_out = {"captions without text": empty}
    if only is not None:
        by_image, missing, others = _chosen(by_image, only)
        left_out = {"listed images without a caption": missing, f"images not listed in {only.name}": others}
    left_out["images without a caption"] = sum(not captions for captions in by_image.values())
    records = [Record(image, tuple(captions), image) for image, captions in by_image.items() if captions]
    return source_of(images, records, left_out, path)


def captions_by_image(path: Path) -> tuple[dict[str, list[str]], int]:
    """The cleaned captions of each image a table names, in its order, and how many captions had no text.

    Raises:
        InputError: when the file is missing or is no such table.
    """
    text = read_text(path)
    if not text.strip():
        raise InputError(f"{path} is empty. Lines of image,caption are wanted.")
    by_image: dict[str, list[str]] = {}
    empty = 0
    for image, raw in _token_rows(text) if _is_token_file(text) else _rows(text, path):
        captions = by_image.setdefault(image, [])
        caption = clean(raw)
        empty += not caption
        captions += [caption] if caption else []
    return by_image, empty


def _chosen(by_image: dict[str, list[str]], only: Path) -> tuple[dict[str, list[str]], int, int]:
    """The images on a list, how many of the list are not in the table, and how many of the table not on the list."""
    names = list(dict.fromkeys(filter(None, map(str.strip, read_text(only).splitlines()))))
    by_stem = {str(PurePosixPath(image).with_suffix("")): image for image in by_image}
    found = [name if name in by_image else by_stem.get(name) for name in names]
    chosen = {name: by_image[name] for name in found if name is not None}
    if not chosen:
        raise InputError(f"{only} names no image of the table (its first line is {(names or [''])[0]!r}).")
    return chosen, len(names) - len(chosen), len(by_image) - len(chosen)


def _is_token_file(text: str) -> bool:
    return re.match(r"[^\t\n]+#\d+\t", text) is not None


def _token_rows(text: str) -> Iterator[tuple[str, str]]:
    """Flickr8k.token.txt: ``name.jpg#0<TAB>caption``."""
    for line in filter(str.strip, text.split("\n")):
        name, _, caption = line.partition("\t")
        yield name.rsplit("#", 1)[0].strip(), caption


@dataclass(frozen=True)
class _Layout:
    """How a table is laid out: its delimiter, which columns matter, and whether its first row names them."""

    delimiter: str
    image: int
    caption: int
    last: int  # column; what stands behind it belongs to the caption, if that is the last: commas left unquoted
    has_header: bool


def _rows(text: str, path: Path) -> Iterator[tuple[str, str]]:
    layout = _layout(text, path)
    # Only comma tables quote; in the others a quotation mark is a quotation mark.
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if layout.delimiter in ",;" else csv.QUOTE_NONE
    reader: Any = csv.reader(io.StringIO(text, newline=""), delimiter=layout.delimiter, quoting=quoting)
    try:
        for row in reader:
            if not any(row) or (layout.has_header and reader.line_num == 1):
                continue
            image = row[layout.image].strip() if layout.image < len(row) else ""
            last = len(row) if layout.caption == layout.last else layout.caption + 1
            caption = layout.delimiter.join(row[layout.caption : last])
            if re.search(rf"\n{_IMAGE_NAME}{re.escape(layout.delimiter)}", caption):
                raise InputError(f"{path}: a quotation mark before line {reader.line_num} is never closed: {row[0]!r}")
            if not image:
                raise InputError(f"{path}, line {reader.line_num}: no image is named: {row!r}")
            yield image, caption
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}") from error


def _layout(text: str, path: Path) -> _Layout:
    first = text.split("\n", 1)[0].rstrip("\r")
    for delimiter in ",|\t;":
        names = [name.strip().lower() for name in next(csv.reader([first], delimiter=delimiter), [])]
        image, caption = (next((names.index(n) for n in known if n in names), None) for known in _COLUMNS)
        if image is not None and caption is not None:
            return _Layout(delimiter, image, caption, len(names) - 1, has_header=True)
    named = re.match(rf'"?{_IMAGE_NAME}"?\s*([,|\t;])', first, re.IGNORECASE)
    if named is None:
        raise InputError(
            f"{path} begins {first[:80]!r}: neither a header that names an image column ({', '.join(IMAGE_COLUMNS)})\n"
            f"and a caption column ({', '.join(CAPTION_COLUMNS)}), nor an image's name and a caption."
        )
    return _Layout(named[1], 0, 1, 1, has_header=False)


_COLUMNS = (IMAGE_COLUMNS, CAPTION_COLUMNS)
