"""A sample's number -> its image and captions, or a hole that keeps its place."""

import json
from dataclasses import dataclass

from shards import storage
from shards.index import Index, read_extents


@dataclass(frozen=True)
class Sample:
    """One image and all its captions, as stored."""

    key: str
    image_bytes: bytes
    captions: tuple[str, ...]
    image_id: int | str
    label: str | None


@dataclass(frozen=True)
class Hole:
    """A sample that could not be read. It keeps its place with weight 0: a skip would shift all that follow."""

    key: str
    shard: str
    offset: int
    reason: str

    def __str__(self) -> str:
        return f"{self.shard} at byte {self.offset:,}, sample {self.key}: {self.reason}"


def read_sample(index: Index, sample: int) -> Sample | Hole:
    """Read one sample of a split by number (0 .. len(index) - 1), in one read of its shard."""
    shard, number = index.locate(sample)
    extent = read_extents(shard)[number]
    try:
        data = storage.read(shard.path, extent.offset, extent.json_skip + extent.json_size)
        text = json.loads(data[extent.json_skip :])
        captions, image_id, label = tuple(text["captions"]), text["image_id"], text.get("label")
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Hole(extent.key, shard.path.name, extent.offset, f"{type(error).__name__}: {error}")
    return Sample(extent.key, data[: extent.image_size], captions, image_id, label)


def hole_of(index: Index, sample: int, reason: str) -> Hole:
    """The hole a sample leaves whose bytes were read but are no image."""
    shard, number = index.locate(sample)
    extent = read_extents(shard)[number]
    return Hole(extent.key, shard.path.name, extent.offset, reason)
