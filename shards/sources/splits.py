"""Dividing a dataset by a hash of each image: captions of an image, and images of the same bytes, never part."""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from shards.errors import InputError
from shards.sources.image_files import ImageFiles
from shards.sources.records import Record, Source

_THREADS = 8


def divide(source: Source, fractions: Mapping[str, float]) -> dict[str, Source]:
    """Splits of about the given fractions. An image's split is a function of its bytes and the fractions alone: it
    stays where it is when others are added. Every image is read once for it.

    Raises:
        InputError: when a split gets no image.
    """
    images = ImageFiles(source.images)
    with ThreadPoolExecutor(_THREADS) as pool:
        places = list(pool.map(lambda record: _place(images, record), source.records))
    splits: dict[str, list[Record]] = {name: [] for name in fractions}
    for record, place in zip(source.records, places, strict=True):
        splits[_split_at(place, fractions)].append(record)
    if empty := [name for name, records in splits.items() if not records]:
        raise InputError(f"--splits leaves no image for {', '.join(empty)}, of {len(places):,}. Give it a larger part.")
    # What was left out of the whole is reported with the first split, and so once.
    left_out = {name: source.left_out if number == 0 else {} for number, name in enumerate(splits)}
    return {name: replace(source, records=tuple(records), left_out=left_out[name]) for name, records in splits.items()}


def _place(images: ImageFiles, record: Record) -> float:
    """A number in [0, 1) that only the image's bytes decide; its name where it cannot be read, and is left out."""
    try:
        data = images.read(record.image)
    except (OSError, ValueError):
        data = record.image.encode()
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") / 2**64


def _split_at(place: float, fractions: Mapping[str, float]) -> str:
    end = 0.0
    for name, fraction in fractions.items():
        end += fraction
        if place < end:
            return name
    return name  # the sum may be a hair below 1
