"""A sample's number -> its image and captions, or an unreadable sample that keeps its place."""

import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from shards import storage
from shards.index import Extent, Index, extent_of, files_of, read_extents, read_texts
from shards.storage import Shard
from shards.storage.cache import Cache
from shards.tars import SampleText, view_file

_REQUESTS = 16  # at once, a process
_GAP = 64 << 10  # bytes between two images that are rather fetched along than asked for apart
_BLOCK = 4 << 20  # most bytes in a request for several images


@dataclass(frozen=True)
class Sample:
    """One sample, as stored. Its image (its first file, where it has none) is read with it, and is the file that has a
    checksum; what it says comes from beside its tar, any other file from the tar, when it is asked for."""

    key: str
    image_bytes: bytes
    shard: Shard
    number: int  # in the shard
    view: int  # of the sample's views, which one was read
    cache: Cache = field(repr=False, compare=False)

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

    @property
    def files(self) -> tuple[str, ...]:
        """The extensions of its files, in the order of the tar."""
        return tuple(ext for ext, *_ in files_of(self.shard, self.number))

    def read(self, ext: str) -> bytes:
        """A file of the sample by its extension: ``read("cls")`` for KEY.cls. One more read of the shard, unless it is
        the file that came with the sample; without a checksum then.

        Raises:
            FileNotFoundError: when the sample has no such file.
            OSError: when it cannot be read.
        """
        files = files_of(self.shard, self.number)
        for name, offset, size, _ in files:
            if name == ext:
                with_it = name == view_file(files, self.view)[0]
                return self.image_bytes if with_it else storage.read(self.shard, offset, size, self.cache)
        raise FileNotFoundError(f"sample {self.key} has no .{ext}, only {', '.join(self.files)}")


_texts = lru_cache(maxsize=4)(read_texts)


@dataclass(frozen=True)
class UnreadableSample:
    """A sample that could not be read. It keeps its place with weight 0: a skip would shift all that follow."""

    key: str
    shard: str
    offset: int
    reason: str

    def __str__(self) -> str:
        return f"{self.shard} at byte {self.offset:,}, sample {self.key}: {self.reason}"


def read_sample(index: Index, sample: int) -> Sample | UnreadableSample:
    """Read one sample of a split by number (0 .. len(index) - 1), in one read of its shard.

    Raises:
        InputError: see ``read_samples``.
    """
    return next(read_samples(index, [sample]))


def read_samples(
    index: Index, samples: Sequence[int], views: Sequence[int] | None = None
) -> Iterator[Sample | UnreadableSample]:
    """Samples by number, in the order asked for. Those on other machines are fetched ahead, all at once, and near
    neighbours in one request. Of samples that hold several views of their image, the one of ``views`` is read (the
    first).

    Raises:
        InputError: when an ``.idx`` cannot be read, or a shard by no means that are installed.
    """
    chosen = views or [0] * len(samples)
    located = [(*index.locate(sample), view) for sample, view in zip(samples, chosen, strict=True)]
    if all(isinstance(shard.path, Path) for shard, *_ in located):
        yield from (_read(index, _wanted(*one)) for one in located)
        return
    list(_pool().map(read_extents, {shard for shard, *_ in located}))
    wanted = [_wanted(*one) for one in located]
    read: dict[_Wanted, Future[dict[_Wanted, Sample | UnreadableSample]]] = {}
    for block in _blocks(wanted):
        future = _pool().submit(_read_block, index, block)
        read.update(dict.fromkeys(block, future))
    yield from (read[one].result()[one] for one in wanted)


@dataclass(frozen=True)
class _Wanted:
    shard: Shard
    extent: Extent
    number: int  # in the shard
    view: int


def _wanted(shard: Shard, number: int, view: int) -> _Wanted:
    return _Wanted(shard, extent_of(shard, number, view), number, view)


def _blocks(wanted: list[_Wanted]) -> list[list[_Wanted]]:
    """What is wanted of each shard, cut where the gap between two images or the whole grows too large to be fetched
    at once. The blocks come in the order in which the first of each is wanted."""
    place = {one: at for at, one in reversed(list(enumerate(wanted)))}
    blocks: list[list[_Wanted]] = []
    for one in sorted(place, key=lambda w: (str(w.shard.path), w.extent.offset)):
        if blocks and blocks[-1][-1].shard == one.shard:
            first, last = blocks[-1][0].extent, blocks[-1][-1].extent
            near = one.extent.offset - (last.offset + last.size) <= _GAP
            if near and one.extent.offset + one.extent.size - first.offset <= _BLOCK:
                blocks[-1].append(one)
                continue
        blocks.append([one])
    return sorted(blocks, key=lambda block: min(place[one] for one in block))


def _read_block(index: Index, block: list[_Wanted]) -> dict[_Wanted, Sample | UnreadableSample]:
    start = block[0].extent.offset
    size = block[-1].extent.offset + block[-1].extent.size - start
    try:
        data = storage.read(block[0].shard, start, size, index.cache)
    except OSError:  # a shard cut short: what lies before the cut is whole
        return {one: _read(index, one) for one in block}
    cut = {one: data[one.extent.offset - start :][: one.extent.size] for one in block}
    return {one: _checked(index, one, image) or _read(index, one, again=True) for one, image in cut.items()}


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    """Of this process: threads do not survive a fork."""
    return ThreadPoolExecutor(_REQUESTS, thread_name_prefix="fetch")


os.register_at_fork(after_in_child=_pool.cache_clear)


def _read(index: Index, one: _Wanted, again: bool = False) -> Sample | UnreadableSample:
    """One image, asked for a second time (or, ``again``, for the second time) when the first reply was wrong: one reply
    alone makes nothing unreadable."""
    reason = ""
    for is_second in (False, True)[again:]:
        try:
            data = storage.read(one.shard, one.extent.offset, one.extent.size, index.cache, again=is_second)
        except OSError as error:
            reason = _reason(error)
            continue
        if (sample := _checked(index, one, data)) is not None:
            return sample
        reason = "its bytes are not those that were packed"
    return _unreadable(one.shard, one.extent, reason)


def _checked(index: Index, one: _Wanted, image: bytes) -> Sample | None:
    """The sample, if the bytes are those that were packed."""
    right = len(image) == one.extent.size and zlib.crc32(image) == one.extent.crc32
    return Sample(one.extent.key, image, one.shard, one.number, one.view, index.cache) if right else None


def _reason(error: OSError) -> str:
    return f"{type(error).__name__}: {error}"


def _unreadable(shard: Shard, extent: Extent, reason: str) -> UnreadableSample:
    return UnreadableSample(extent.key, shard.path.name, extent.offset, reason)


def unreadable_of(sample: Sample, reason: str) -> UnreadableSample:
    """What stands for a sample whose bytes were read but cannot be decoded."""
    return _unreadable(sample.shard, extent_of(sample.shard, sample.number, sample.view), reason)
