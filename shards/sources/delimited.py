"""Rows of delimited text: CSV, TSV, flickr30k's ``|`` table, ``name#0<TAB>caption`` token files."""

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.captions import captions_in_cell
from shards.errors import InputError
from shards.sources.columns import Chosen, Columns, Row, find, wanted
from shards.tars import IMAGE_EXTENSIONS

_IMAGE_NAME = rf"[^\n]*?\.(?:{'|'.join(IMAGE_EXTENSIONS)})"
_HUGE = 1 << 27  # bytes of a cell: beyond it a quotation mark was never closed


def delimited_rows(text: str, path: Path, chosen: Chosen) -> Iterator[Row]:
    """The rows of a table in delimited text, with or without a header.

    Raises:
        InputError: when it is no such table, or a row does not fit.
    """
    if re.match(r"[^\t\n]+#\d+\t", text):
        yield from _token_rows(text)
        return
    text = re.sub(r"\Asep=.\r?\n", "", text)  # what Excel writes for itself
    layout = _layout(text, path, chosen)
    for number, cells in _cells(text, path, layout):
        yield _row(cells, number, path, layout)


def _token_rows(text: str) -> Iterator[Row]:
    """Flickr8k.token.txt: ``name.jpg#0<TAB>caption``."""
    for line in filter(str.strip, text.split("\n")):
        name, _, caption = line.partition("\t")
        yield Row(name.rsplit("#", 1)[0].strip(), [caption])


@dataclass(frozen=True)
class _Layout:
    delimiter: str
    columns: Columns
    width: int  # columns the header names, or 2
    has_header: bool

    @property
    def caption_is_last(self) -> bool:
        """What stands behind the last column belongs to the caption then: commas left unquoted."""
        return self.columns.captions == (self.width - 1,)


def _layout(text: str, path: Path, chosen: Chosen) -> _Layout:
    first = text.split("\n", 1)[0].rstrip("\r")
    for delimiter in ",|\t;":
        names = next(csv.reader([first], delimiter=delimiter, skipinitialspace=True), [])
        if columns := find(names, chosen):
            return _Layout(delimiter, columns, len(names), has_header=True)
    named = re.match(rf'"?{_IMAGE_NAME}"?\s*([,|\t;])', first, re.IGNORECASE)
    if named is None or chosen != Chosen():
        raise InputError(
            f"{path} begins {first[:80]!r}: neither a header that names {wanted()}, nor an image's name and a caption."
        )
    return _Layout(named[1], Columns(0, (1,)), 2, has_header=False)


def _cells(text: str, path: Path, layout: _Layout) -> list[tuple[int, list[str]]]:
    """Line number and cells of each row, read by the first way of quoting that fits the whole table."""
    problem = None
    for options in _dialects(text, layout.delimiter):
        try:
            return _read(text, layout, options)
        except (csv.Error, ValueError) as error:
            problem = error  # the last way is the most lenient: what it objects to is wrong
    raise InputError(f"{path}: {problem}") from problem


def _dialects(text: str, delimiter: str) -> Iterator[dict[str, Any]]:
    quoted_after_space = re.search(rf'{re.escape(delimiter)} +"', text) is not None
    if quoted_after_space:
        yield {"strict": True, "skipinitialspace": True}
    yield {"strict": True}
    if '\\"' in text:
        yield {"strict": True, "escapechar": "\\", "doublequote": False}
    # Where nobody quotes, a quotation mark is a quotation mark; in comma tables a cell may begin with a word in quotes.
    yield {"quoting": csv.QUOTE_NONE} if delimiter in "\t|" else {}


def _read(text: str, layout: _Layout, options: dict[str, Any]) -> list[tuple[int, list[str]]]:
    """Raises csv.Error or ValueError when the table is not quoted in this way."""
    csv.field_size_limit(_HUGE)
    if "escapechar" in options:
        text = re.sub(r'\\(?!")', r"\\\\", text)  # only quotation marks are escaped: others are in Windows' paths
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=layout.delimiter, **options)
    swallowed = re.compile(rf"\n{_IMAGE_NAME}{re.escape(layout.delimiter)}", re.IGNORECASE)
    rows = []
    for cells in reader:
        if any("\n" in cell and swallowed.search(cell) for cell in cells):
            raise ValueError(f"a quotation mark before line {reader.line_num} is never closed: {cells[0]!r}")
        if options.get("skipinitialspace") and len(cells) > layout.width:
            raise ValueError("blanks after commas are text")
        if any(cells):
            rows.append((reader.line_num, cells))
    return rows[1:] if layout.has_header else rows


def _row(cells: list[str], number: int, path: Path, layout: _Layout) -> Row:
    columns = layout.columns
    if len(cells) > layout.width and not layout.caption_is_last and any(map(str.strip, cells[layout.width :])):
        raise InputError(
            f"{path}, line {number}: {len(cells)} cells, and {layout.width} columns: {cells!r}\n"
            f"Quote captions that hold {layout.delimiter!r}."
        )

    def cell(column: int) -> str:
        return cells[column] if column < len(cells) else ""

    image = cell(columns.image).strip()
    if not image:
        raise InputError(f"{path}, line {number}: no image is named: {cells!r}")
    if layout.caption_is_last:
        texts = [layout.delimiter.join(cells[columns.captions[0] :])]
    else:
        texts = [cell(column) for column in columns.captions]
    captions = [caption for text in texts for caption in captions_in_cell(text)]
    return Row(image, captions, None if columns.split is None else cell(columns.split).strip())
