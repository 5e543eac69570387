"""Images as people name them: files, folders, patterns, names on standard input, a few of a packed split."""

import glob
import os
import random
import sys
from pathlib import Path

from shards import index as shard_index
from shards.errors import InputError, printable
from shards.images import SUFFIXES
from shards.reader import UnreadableSample, read_sample

Named = tuple[str, str | bytes]  # a name for people, and the file or its bytes


def images_at(place: str) -> list[Named]:
    """The images a name stands for: a file (there or not), a folder's images at any depth, a pattern's, or with ``-``
    those that standard input names: one a line, or ended by null bytes as ``find -print0`` does.

    Raises:
        InputError: when a folder holds no images, a pattern matches nothing, or standard input is empty.
    """
    if place == "-":
        text = os.fsdecode(sys.stdin.buffer.read())  # a file's name may be bytes of no encoding
        named = text.split("\0") if "\0" in text else [line.rstrip("\r") for line in text.split("\n")]
        files = [name for name in named if name.strip()]
        if not files:
            raise InputError("Standard input names no images: a file name a line is wanted.")
        return [(file, file) for file in files]
    path = Path(place)
    if path.is_dir():
        files = sorted(str(file) for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        if not files:
            raise InputError(
                f"{path} holds no images (.jpg, .png, .webp or any other of {len(SUFFIXES)} endings that are read)."
            )
        return [(file, file) for file in files]
    if not path.exists() and glob.has_magic(place):
        files = sorted(file for file in glob.glob(place, recursive=True) if Path(file).is_file())  # noqa: PTH207
        if not files:
            raise InputError(f"{place} matches no file.")
        return [(file, file) for file in files]
    if path.suffix == ".json" and path.exists():
        raise InputError(
            f"{path} is no image. For a packed split use `captioning evaluate`, or --random N for N of it."
        )
    return [(place, place)]


def random_images(place: str, count: int, seed: int) -> list[Named]:
    """One image of each of ``count`` random classes of a packed split, or ``count`` images where it has no classes.

    Raises:
        InputError: when ``place`` is no split's NAME.json, or none of the images can be read.
    """
    index = shard_index.load(place)
    texts, drawn = index.texts(), random.Random(seed)
    of_class: dict[str, list[int]] = {}
    for number, text in enumerate(texts):
        of_class.setdefault(text.label or text.key, []).append(number)
    chosen = drawn.sample(sorted(of_class), min(count, len(of_class)))
    images: list[Named] = []
    for name in chosen:
        sample = read_sample(index, drawn.choice(of_class[name]))
        if isinstance(sample, UnreadableSample):
            print(f"skipped: {printable(str(sample))}", file=sys.stderr)
        else:
            images.append((name if name == sample.key else f"{name} ({sample.key})", sample.image_bytes))
    if not images:
        raise InputError(f"None of the {len(chosen)} images chosen from {place} could be read.")
    return images
