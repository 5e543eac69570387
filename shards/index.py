"""What is in a split's shards: names, counts, sizes, hashes, and the byte offset of every sample.

Beside each ``NAME-000000.tar`` lie ``NAME-000000.idx`` (NVIDIA DALI's text index, v1.2: a line a sample, for each of
its files the extension, offset, size and name), ``NAME-000000.crc32`` (a checksum of each sample's image, 4 bytes each)
and ``NAME-000000.captions.json`` (what each sample says, so that a vocabulary or references need no tar). ``NAME.json``
holds it together, in the ``wids-shard-index-v1`` form with our own keys: sha256 per shard, a fingerprint of the data,
how it was packed, what was left out.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from shards import tars
from shards.errors import InputError, listed
from shards.tars import SampleText

KIND = "wids-shard-index-v1"


@dataclass(frozen=True)
class Shard:
    """One tar: its path, its samples, its size in bytes, its sha256."""

    path: Path
    nsamples: int
    filesize: int
    sha256: str


@dataclass(frozen=True)
class Extent:
    """Where a sample's image lies in its tar: ``size`` bytes from ``offset``, and their checksum."""

    key: str
    offset: int
    size: int
    crc32: int


class Extents(Sequence[Extent]):
    """The extents of a shard, from the bytes of its ``.idx`` and ``.crc32``. A line is parsed when it is asked for:
    a rank may read two samples of a shard of thousands.

    Raises:
        ValueError: when the bytes do not fit the shard; also from a line that names no image.
    """

    def __init__(self, shard: Shard, idx: bytes, crc32: bytes):
        self._idx, self._crc32 = idx, np.frombuffer(crc32, dtype="<u4")
        self._ends = np.flatnonzero(np.frombuffer(idx, dtype=np.uint8) == ord("\n"))
        header = idx.split(b"\n", 1)[0].decode(errors="replace")[:40]
        found = (header, len(self), len(self._crc32))
        if found != (f"v1.2 {shard.nsamples}", shard.nsamples, shard.nsamples):
            raise ValueError(
                f"header {header!r}, {len(self)} lines and {len(self._crc32)} checksums, the index says "
                f"{shard.nsamples} samples"
            )

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number):
        if not 0 <= number < len(self):
            raise IndexError(number)
        line = self._idx[self._ends[number] + 1 : self._ends[number + 1]].decode()
        for ext, offset, size, name in zip(*[iter(line.split(" "))] * 4, strict=True):
            if tars.is_image(ext):
                return Extent(name.removesuffix(f".{ext}"), int(offset), int(size), int(self._crc32[number]))
        raise ValueError(f"the line {line[:80]!r} names no image")


@dataclass(frozen=True)
class Index:
    """A split: its shards and where each sample is."""

    path: Path
    name: str
    shards: tuple[Shard, ...]
    fingerprint: str
    document: dict[str, Any] = field(hash=False, compare=False)  # the whole NAME.json

    def __len__(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum([shard.nsamples for shard in self.shards])])

    def locate(self, sample: int) -> tuple[Shard, int]:
        """The shard a sample is in, and its number there."""
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return self.shards[shard], sample - int(self._starts[shard])

    def texts(self) -> list[SampleText]:
        """Captions, id and label of every sample, in the split's order; no tar is opened."""
        return [text for shard in self.shards for text in read_texts(shard)]

    def check_files(self) -> None:
        """Compare every shard's size with the index, and see that its .idx is there and speaks of as many samples.

        Raises:
            InputError: naming the shards that are missing, cut short or replaced.
        """
        wrong = [problem for shard in self.shards if (problem := _missing_or_cut(shard))]
        if wrong:
            raise InputError(f"{len(wrong)} shard(s) do not match {self.path}:\n{listed(wrong)}\nCopy them again.")


def _missing_or_cut(shard: Shard) -> str | None:
    for path in (shard.path, *files_beside(shard.path)):
        if not path.is_file():
            return f"{path} is missing"
    if (size := shard.path.stat().st_size) != shard.filesize:
        return f"{shard.path} has {size:,} bytes, the index says {shard.filesize:,}"
    with shard.path.with_suffix(".idx").open(encoding="utf-8", errors="replace") as file:
        header = file.readline().rstrip("\n")
    if header != f"v1.2 {shard.nsamples}":
        return f"{shard.path.with_suffix('.idx')} begins {header[:40]!r}, the index says {shard.nsamples} samples"
    return None


def load(path: str | Path) -> Index:
    """Read a split's NAME.json.

    Raises:
        InputError: when it is missing or is no shard index.
    """
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        shards = tuple(
            Shard(path.parent / entry["url"], int(entry["nsamples"]), int(entry["filesize"]), str(entry["sha256"]))
            for entry in document["shardlist"]
        )
        if document["__kind__"] != KIND:
            raise ValueError(f"its __kind__ is {document['__kind__']!r}, not {KIND!r}")
        if not sum(shard.nsamples for shard in shards):
            raise ValueError("it has no samples")
        return Index(path, document["name"], shards, document["fingerprint"], document)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputError(
            f"There is no shard index {path}. `python -m launch.pack` writes one: DIR/NAME.json."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a shard index written by launch.pack ({error!r}).") from error


def read_texts(shard: Shard) -> list[SampleText]:
    """The captions beside a tar.

    Raises:
        InputError: when the file is missing or does not fit the tar.
    """
    path = captions_path(shard.path)
    try:
        samples = json.loads(path.read_text(encoding="utf-8"))["samples"]
        texts = [SampleText(s["key"], tuple(s["captions"]), s["image_id"], s["label"]) for s in samples]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error!r}). Copy it again, with its tar.") from error
    if len(texts) != shard.nsamples:
        raise InputError(f"{path} lists {len(texts)} samples, the index says {shard.nsamples}. Copy it with its tar.")
    return texts


@lru_cache(maxsize=512)  # some 100 bytes a sample
def read_extents(shard: Shard) -> Extents:
    """Where each sample of a shard lies, from its ``.idx``.

    Raises:
        InputError: when the file is missing or does not fit the tar.
    """
    idx, crc32 = shard.path.with_suffix(".idx"), shard.path.with_suffix(".crc32")
    try:
        return Extents(shard, idx.read_bytes(), crc32.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{idx} or {crc32.name} cannot be read ({error}). Copy them again, with their tar.") from error


def extent_of(shard: Shard, number: int) -> Extent:
    """Where one sample of a shard lies.

    Raises:
        InputError: when the shard's ``.idx`` cannot be read, or says nonsense of this sample.
    """
    try:
        return read_extents(shard)[number]
    except ValueError as error:
        raise InputError(f"{shard.path.with_suffix('.idx')}: {error}. Copy it again, with its tar.") from error


def captions_path(tar: Path) -> Path:
    return tar.with_suffix(".captions.json")


def files_beside(tar: Path) -> list[Path]:
    """The files that belong to a tar."""
    return [tar.with_suffix(".idx"), tar.with_suffix(".crc32"), captions_path(tar)]


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint_of(shards: list[Shard]) -> str:
    """What makes two splits the same data: their tars' bytes, in order. The names and folders do not count."""
    return hashlib.sha256("\n".join(f"{s.sha256} {s.nsamples}" for s in shards).encode()).hexdigest()


def write_beside(tar: Path, content: Path, samples: list[tars.TarSample], about: dict[str, Any]) -> None:
    """Write what belongs to a tar, whose bytes are in ``content`` for now; ``about`` is its captions file."""
    write_atomically(tar.with_suffix(".idx"), tars.idx_text(samples).encode())
    write_atomically(tar.with_suffix(".crc32"), tars.checksums(content, samples))
    write_atomically(captions_path(tar), json.dumps(about, ensure_ascii=False).encode())


def document_of(
    split: str,
    shards: list[Shard],
    folder: Path,
    packing: dict[str, Any],
    left_out: dict[str, int],
    skipped: list[dict[str, str]],
) -> dict[str, Any]:
    """The contents of NAME.json, to be written to ``folder``, where or below which the shards are."""
    return {
        "__kind__": KIND,
        "wids_version": 1,
        "name": split,
        "shardlist": [
            {
                "url": shard.path.relative_to(folder).as_posix(),
                "nsamples": shard.nsamples,
                "filesize": shard.filesize,
                "sha256": shard.sha256,
            }
            for shard in shards
        ],
        "fingerprint": fingerprint_of(shards),
        "packing": packing,
        "left_out": left_out,
        "skipped": skipped,  # image and reason
    }


def write_atomically(path: Path, data: bytes) -> None:
    """Write so that ``path`` holds all of ``data`` or is not there: a temporary neighbour, fsync, rename."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def verify(index: Index) -> None:
    """Compare every byte of every shard with the index, and its .idx and captions with the tar.

    Raises:
        InputError: listing every shard that differs.
    """
    index.check_files()
    wrong = [problem for shard in index.shards if (problem := _damage(shard))]
    if wrong:
        raise InputError(f"{len(wrong)} shard(s) of {index.path} are damaged:\n{listed(wrong)}\nCopy them again.")


def _damage(shard: Shard) -> str | None:
    if sha256_of(shard.path) != shard.sha256:
        return f"{shard.path}: its bytes are not those that were packed"
    texts = read_texts(shard)
    known = {text.key for text in texts}
    samples = [sample for sample in tars.samples_of(shard.path) if sample.key in known]
    if tars.idx_text(samples) != shard.path.with_suffix(".idx").read_text(encoding="utf-8", errors="replace"):
        return f"{shard.path.with_suffix('.idx')}: does not match its tar"
    if tars.checksums(shard.path, samples) != shard.path.with_suffix(".crc32").read_bytes():
        return f"{shard.path.with_suffix('.crc32')}: does not match its tar"
    with shard.path.open("rb") as tar:
        for sample, text in zip(samples, texts, strict=True):
            if tars.text_of(sample, tar) != text:
                return f"{captions_path(shard.path)}: sample {sample.key} is not what its tar says"
    return None
