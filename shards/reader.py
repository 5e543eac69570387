"""A sample's number -> its image and captions, or a hole that keeps its place."""

import zlib
from dataclasses import dataclass
from functools import lru_cache

from shards import storage
from shards.index import Index, Shard, extent_of, read_texts
from shards.tars import SampleText


@dataclass(frozen=True)
class Sample:
    """One image, as stored. What it says is read from beside its tar when asked for: training has it encoded."""

    key: str
    image_bytes: bytes
    shard: Shard
    number: int  # in the shard

    @property
    def text(self) -> SampleText:
        return _texts(self.shard)[self.number]

    @property
    def captions(self) -> tuple[str, ...]:
        return self.text.captions

    @property
    def image_id(self) -> int | str:
        return self.text.image_id

    @property
    def label(self) -> str | None:
        return self.text.label


_texts = lru_cache(maxsize=4)(read_texts)


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
    extent = extent_of(shard, number)
    try:
        data = storage.read(shard.path, extent.offset, extent.size)
    except OSError as error:
        return Hole(extent.key, shard.path.name, extent.offset, f"{type(error).__name__}: {error}")
    if zlib.crc32(data) != extent.crc32:
        return Hole(extent.key, shard.path.name, extent.offset, "its bytes are not those that were packed")
    return Sample(extent.key, data, shard, number)


def hole_of(index: Index, sample: int, reason: str) -> Hole:
    """The hole a sample leaves whose bytes were read but are no image."""
    shard, number = index.locate(sample)
    extent = extent_of(shard, number)
    return Hole(extent.key, shard.path.name, extent.offset, reason)
