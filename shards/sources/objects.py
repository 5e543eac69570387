"""Rows of a table whose rows are objects: JSON lines, a JSON list of objects, Parquet."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.captions import captions_in, captions_in_cell
from shards.errors import InputError
from shards.files import parse_json
from shards.sources.columns import Chosen, Row, find, wanted


def json_rows(text: str, path: Path, chosen: Chosen) -> Iterator[Row]:
    """The rows of JSON lines, of a JSON list of objects, or of one object: image -> caption or captions.

    Raises:
        InputError: when it is no such JSON, or a row names no image.
    """
    objects = _objects(text, path)
    if isinstance(objects, dict):
        yield from (Row(image, captions_in(value)) for image, value in objects.items())
        return
    fields = next((found for entry in objects if (found := _fields_of(list(entry), chosen))), None)
    if fields is None:
        held = f"the fields {', '.join(map(str, list(objects[0])[:20]))}" if objects else "no objects"
        raise InputError(f"{path} has {held}: not {wanted()}.")
    for number, entry in enumerate(objects, start=1):
        yield _row(entry, number, path, fields)


def parquet_rows(path: Path, chosen: Chosen, scratch: Path | None) -> Iterator[Row]:
    """The rows of a Parquet file. Images it holds itself (as Hugging Face's data sets do) are written to ``scratch``,
    and are named by their row.

    Raises:
        InputError: when pyarrow is not installed, or the file is damaged or lacks the columns.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError(f"{path} is Parquet, which needs pyarrow: pip install pyarrow.") from None
    try:
        file = ParquetFile(path)
        names = file.schema_arrow.names
        fields = _fields_of(names, chosen)
        if fields is None:
            raise InputError(f"{path} has the columns {', '.join(names)}: not {wanted()}.")
        number = 0
        for batch in file.iter_batches(256, columns=[name for name in names if name in fields.all]):
            for entry in batch.to_pylist():
                number += 1
                image = entry[fields.image]
                if isinstance(image, Mapping) and isinstance(image.get("bytes"), bytes):
                    entry[fields.image] = _written(image, f"{path.stem}-{number:08d}", path, scratch)
                yield _row(entry, number, path, fields)
    except (ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as Parquet: {error}") from error


def _written(image: Mapping[str, Any], name: str, path: Path, scratch: Path | None) -> str:
    if scratch is None:
        raise InputError(f"{path} holds the images themselves: `pack table` packs it, here a table of names is wanted.")
    (scratch / name).write_bytes(image["bytes"])
    return name


@dataclass(frozen=True)
class _Fields:
    image: str
    captions: tuple[str, ...]
    split: str | None

    @property
    def all(self) -> set[str | None]:
        return {self.image, *self.captions, self.split}


def _fields_of(names: list[str], chosen: Chosen) -> _Fields | None:
    columns = find(names, chosen)
    if columns is None:
        return None
    split = None if columns.split is None else names[columns.split]
    return _Fields(names[columns.image], tuple(names[column] for column in columns.captions), split)


def _row(entry: Mapping[str, Any], number: int, path: Path, fields: _Fields) -> Row:
    image = entry.get(fields.image)
    if isinstance(image, Mapping):
        image = image.get("path")
    if not isinstance(image, str) or not image.strip():
        raise InputError(f"{path}: row {number} names no image: {str(dict(entry))[:200]}")
    captions: list[str] = []
    for value in map(entry.get, fields.captions):
        captions += captions_in_cell(value) if isinstance(value, str) else captions_in(value)
    split = entry.get(fields.split) if fields.split else None
    return Row(image.strip(), captions, None if split is None else str(split).strip())


def _objects(text: str, path: Path) -> list[dict[str, Any]] | dict[str, Any]:
    """The objects of a JSON or JSON lines; a dictionary is one of image -> captions."""
    try:
        document = parse_json(text)
    except json.JSONDecodeError:
        document = _json_lines(text, path)
    except ValueError as error:
        raise InputError(f"{path} is no table: {error}") from None
    if isinstance(document, dict):
        _refuse_other_json(document, path)
        if find(list(document), Chosen()):
            return [document]
        if document and all(isinstance(v, str | list) and _is_caption(v) for v in document.values()):
            return document
        tables = [v for v in document.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        document = tables[0] if len(tables) == 1 else None
    if not isinstance(document, list) or not all(isinstance(entry, dict) for entry in document):
        raise InputError(f"{path} is JSON, but no list of objects that have {wanted()}.")
    return document


def _is_caption(value: str | list[Any]) -> bool:
    return isinstance(value, str) or all(isinstance(entry, str) for entry in value)


def _refuse_other_json(document: dict[str, Any], path: Path) -> None:
    if "shardlist" in document:
        raise InputError(f"{path} is a packed split already.")
    images = document.get("images")
    if isinstance(images, list) and "annotations" in document:
        raise InputError(f"{path} is COCO's JSON: `pack coco --captions {path}` reads it.")
    if isinstance(images, list) and images and isinstance(images[0], dict) and "sentences" in images[0]:
        raise InputError(f"{path} is Karpathy's JSON: `pack karpathy --json {path}` reads it.")


def _json_lines(text: str, path: Path) -> list[Any]:
    values = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                values.append(parse_json(line))
            except ValueError as error:
                raise InputError(f"{path}, line {number} is not JSON ({error}). Was the file cut short?") from error
    return values
