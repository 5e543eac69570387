"""Captions in a table: CSV and TSV, JSON lines and lists, Parquet, Hugging Face's folders with a metadata file."""

import argparse
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path, PurePosixPath

from shards.errors import InputError, listed
from shards.filetypes import ENOUGH, kind_of
from shards.sources.columns import Chosen, Row
from shards.sources.delimited import delimited_rows
from shards.sources.objects import json_rows, parquet_rows
from shards.sources.records import SPLIT_NAME, WHOLE, Places, Record, Source, source_of
from shards.sources.text import read_text
from shards.tars import clean

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_MOST_SPLITS = 20


class Table:
    """``pack table``."""

    names = ("table", "csv")
    help = "any table: CSV, TSV, JSON lines, Parquet, metadata.csv folders, Flickr8k/30k, token files"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--images", type=Path, nargs="+", default=[], metavar="DIR|ZIP", help="folder(s) or zip(s) of the images")
        add(
            "--table", "--csv", type=Path, nargs="+", default=[], metavar="FILE",
            help="image names and captions; without it, the metadata.csv, .jsonl or .parquet in --images",
        )  # fmt: skip
        add("--list", type=Path, metavar="FILE", help="image names, one a line: only these")
        add("--image-column", metavar="NAME", help="the column of image names, where its name does not tell")
        add("--caption-column", metavar="NAME", help="the column of captions, where its name does not tell")
        add("--encoding", metavar="NAME", help="of a text that is neither UTF-8 nor UTF-16: cp1252 ...")

    def read(self, arguments: argparse.Namespace, scratch: Path) -> dict[str, Source]:
        reading = Reading(Chosen(arguments.image_column, arguments.caption_column), arguments.encoding, scratch)
        if arguments.table:
            return table_splits(arguments.images, arguments.table, arguments.list, reading)
        if len(arguments.images) != 1:
            raise InputError("--table FILE is wanted, or one --images folder that holds a metadata.csv.")
        return metadata_splits(arguments.images[0], arguments.list, reading)


@dataclass(frozen=True)
class Reading:
    """How a table is read: columns and encoding the user named, and where images that it holds itself are written."""

    chosen: Chosen = field(default_factory=Chosen)
    encoding: str | None = None
    scratch: Path | None = None


def table(images: Places, path: Path, only: Path | None = None) -> Source:
    """A table of image names and captions; the rows of an image are gathered, whatever split they are in.

    Args:
        only: a list of image names, one a line (with or without their ending), that chooses the split.

    Raises:
        InputError: when a file is missing, is no such table, or leaves nothing to pack.
    """
    return _source(images, _gathered(_rows(path, Reading()), path), path, only)


def table_splits(
    images: Sequence[Path], paths: Sequence[Path], only: Path | None = None, reading: Reading | None = None
) -> dict[str, Source]:
    """The splits of a table, or of several files of one: those its split column names, else one, called WHOLE.

    Raises:
        InputError: as ``table``; also when an image is in two splits.
    """
    reading = reading or Reading()
    first = paths[0]
    gathered = _gathered(chain.from_iterable(_rows(path, reading) for path in paths), first)
    scratch = reading.scratch
    places = list(images) or ([scratch] if scratch and any(scratch.iterdir()) else [first.parent])
    splits = {split for split in gathered.split_of.values() if split is not None}
    if only is not None or not splits:
        return {WHOLE: _source(places, gathered, first, only)}
    wrong = sorted(split for split in splits if not re.fullmatch(SPLIT_NAME, split))
    if wrong or len(splits) > _MOST_SPLITS:
        raise InputError(
            f"{first}: its column 'split' names {len(splits)} splits, {listed(wrong or sorted(splits), 3).strip()}: "
            "letters, digits, - and _ are wanted. Rename the column if it is about something else."
        )
    blank = sum(split is None for split in gathered.split_of.values())
    return {
        split: _source(places, gathered.of_split(split), first, None, {"images in no split": blank})
        for split in sorted(splits)
    }


def metadata_splits(folder: Path, only: Path | None = None, reading: Reading | None = None) -> dict[str, Source]:
    """Hugging Face's image folder: ``metadata.csv`` (.jsonl, .parquet) beside the images it names, or one in each of
    the folders train, validation ..., which are the splits then
    (https://huggingface.co/docs/datasets/image_dataset#imagefolder).

    Raises:
        InputError: as ``table_splits``, and when there is no such file.
    """
    if found := _metadata_in(folder):
        return table_splits([folder], [found], only, reading)
    folders = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    inner = {path.name: found for path in folders if (found := _metadata_in(path))}
    if not inner:
        raise InputError(f"--table FILE is wanted: {folder} holds no {', '.join(METADATA)}, nor do folders in it.")
    splits: dict[str, Source] = {}
    for name, path in inner.items():
        of_folder = table_splits([path.parent], [path], only, reading)
        splits |= {name: of_folder[WHOLE]} if WHOLE in of_folder else of_folder
    return splits


def _metadata_in(folder: Path) -> Path | None:
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def captions_by_image(path: Path) -> tuple[dict[str, list[str]], int]:
    """The cleaned captions of each image a table names, in its order, and how many captions had no text.

    Raises:
        InputError: when the file is missing or is no such table.
    """
    gathered = _gathered(_rows(path, Reading()), path)
    return gathered.captions_of, gathered.empty_of.total()


def _rows(path: Path, reading: Reading) -> Iterator[Row]:
    """The rows of a table of any kind: what it holds tells, not what it is called."""
    if path.is_file():
        with path.open("rb") as file:
            if kind_of(file.read(ENOUGH)) == "Parquet":
                return parquet_rows(path, reading.chosen, reading.scratch)
    text = read_text(path, reading.encoding)
    if not text.strip():
        raise InputError(f"{path} is empty. Lines of image,caption are wanted.")
    rows = json_rows if text.lstrip()[0] in "{[" else delimited_rows
    return rows(text, path, reading.chosen)


@dataclass
class _Gathered:
    """The rows of a table, by image, in the table's order."""

    captions_of: dict[str, list[str]] = field(default_factory=dict)
    split_of: dict[str, str | None] = field(default_factory=dict)
    empty_of: Counter[str] = field(default_factory=Counter)  # captions without text

    def of_split(self, split: str) -> "_Gathered":
        of_split = {image: captions for image, captions in self.captions_of.items() if self.split_of[image] == split}
        empty = Counter({image: count for image, count in self.empty_of.items() if image in of_split})
        return _Gathered(of_split, dict.fromkeys(of_split, split), empty)


def _gathered(rows: Iterable[Row], path: Path) -> _Gathered:
    gathered = _Gathered()
    for row in rows:
        if re.match(r"https?://", row.image):
            raise InputError(f"{path} names images on the web ({row.image[:80]}). Download them first (img2dataset).")
        image = row.image.replace("\\", "/")  # as Windows writes paths
        captions = [clean(caption) for caption in row.captions]
        gathered.empty_of[image] += captions.count("")
        gathered.captions_of.setdefault(image, []).extend(filter(None, captions))
        split = "train" if row.split == "restval" else row.split or None  # as Karpathy's splits are used
        if gathered.split_of.setdefault(image, split) != split:
            splits = f"{gathered.split_of[image] or 'none'} and {split or 'none'}"
            raise InputError(f"{path}: {image} is in two splits, {splits}. The captions of an image must not part.")
    return gathered


def _source(
    images: Places, gathered: _Gathered, path: Path, only: Path | None, left_out: dict[str, int] | None = None
) -> Source:
    left_out = {"captions without text": gathered.empty_of.total(), **(left_out or {})}
    by_image = gathered.captions_of
    if only is not None:
        by_image, missing, others = _chosen(by_image, only)
        left_out |= {"listed images without a caption": missing, f"images not listed in {only.name}": others}
    left_out["images without a caption"] = sum(not captions for captions in by_image.values())
    records = [Record(image, tuple(captions), image) for image, captions in by_image.items() if captions]
    return source_of(images, records, left_out, path)


def _chosen(by_image: dict[str, list[str]], only: Path) -> tuple[dict[str, list[str]], int, int]:
    """The images on a list, how many of the list are not in the table, and how many of the table not on the list."""
    names = list(dict.fromkeys(filter(None, map(str.strip, read_text(only).splitlines()))))
    by_stem = {str(PurePosixPath(image).with_suffix("")): image for image in by_image}
    found = [name if name in by_image else by_stem.get(name) for name in names]
    chosen = {name: by_image[name] for name in found if name is not None}
    if not chosen:
        raise InputError(f"{only} names no image of the table (its first line is {(names or [''])[0]!r}).")
    return chosen, len(names) - len(chosen), len(by_image) - len(chosen)
