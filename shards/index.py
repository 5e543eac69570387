"""What is in a split's shards: names, counts, sizes, hashes, and the byte offset of every sample.

Beside each ``NAME-000000.tar`` lie ``NAME-000000.idx`` (NVIDIA DALI's text index, v1.2: a line a sample, for each of
its files the extension, offset, size and name), ``NAME-000000.crc32`` (a checksum of each sample's image, 4 bytes each)
and ``NAME-000000.captions.json`` (what each sample says, so that a vocabulary or references need no tar). ``NAME.json``
holds it together, in the ``wids-shard-index-v1`` form with our own keys: sha256 per shard and per file beside it (so
that training never takes an image's caption, offset or checksum from a file of another packing), a fingerprint of the
data, how it was packed, what was left out.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from shards import storage, tars
from shards.document import KIND, checked_shards, is_sha256
from shards.errors import InputError, listed
from shards.files import parse_json, write_atomically
from shards.storage import SIDECAR_SUFFIXES, Shard
from shards.storage.cache import Cache
from shards.storage.urls import Place, Url, place_of
from shards.tars import File, SampleText

T = TypeVar("T")


@dataclass(frozen=True)
class Extent:
    """Where a sample's main file (its image, if it has one) lies in its tar: ``size`` bytes from ``offset``, and their
    checksum."""

    key: str
    offset: int
    size: int
    crc32: int


class Extents(Sequence[Extent]):
    """The extents of a shard, from the bytes of its ``.idx`` and ``.crc32``. A line is parsed when it is asked for:
    a rank may read two samples of a shard of thousands.

    Raises:
        ValueError: when the bytes do not fit the shard; also from a line that names no files.
    """

    def __init__(self, shard: Shard, idx: bytes, crc32: bytes):
        self._idx, self._crc32, self._filesize = idx, np.frombuffer(crc32, dtype="<u4"), shard.filesize
        self._ends = np.flatnonzero(np.frombuffer(idx, dtype=np.uint8) == ord("\n"))
        header = idx.split(b"\n", 1)[0].decode(errors="replace")[:40]
        found = (header, len(self), len(self._crc32))
        self.views = max(1, len(self._crc32) // max(1, shard.nsamples))  # files of a sample that have a checksum
        if found != (f"v1.2 {shard.nsamples}", shard.nsamples, shard.nsamples * self.views):
            raise ValueError(
                f"header {header!r}, {len(self)} lines and {len(self._crc32)} checksums, the index says "
                f"{shard.nsamples} samples"
            )

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: Any) -> Any:  # a whole number, for an Extent
        return self.of_view(number, 0)

    def of_view(self, number: int, view: int) -> Extent:
        """Where a sample's main file is, or that of another of its views; see ``tars.view_file``."""
        files = self.files(number)
        if not 0 <= view < self.views:
            raise ValueError(f"its samples have {self.views} view(s), number {view} is asked for")
        ext, offset, size, name = tars.view_file(files, view)
        if not 0 <= offset <= offset + size <= self._filesize:
            raise ValueError(f"{name}: its line names bytes outside its tar")
        return Extent(name.removesuffix(f".{ext}"), offset, size, int(self._crc32[number * self.views + view]))

    def files(self, number: int) -> tuple[File, ...]:
        """Every file of a sample, in the order of the tar."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        line = self._idx[self._ends[number] + 1 : self._ends[number + 1]].decode()
        words = line.split(" ")
        if len(words) % 4:
            raise ValueError(f"the line {line[:80]!r} names no files")
        return tuple(
            (e, int(offset), int(size), name) for e, offset, size, name in zip(*[iter(words)] * 4, strict=True)
        )


@dataclass(frozen=True)
class Index:
    """A split: its shards and where each sample is."""

    path: Place
    name: str
    shards: tuple[Shard, ...]
    fingerprint: str
    document: dict[str, Any] = field(hash=False, compare=False)  # the whole NAME.json
    cache: Cache = field(default_factory=Cache, hash=False, compare=False)  # for shards that are not read by offset

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def order_key(self) -> str:
        """What the order of its samples follows from: its fingerprint or, where it was made of another split sample by
        sample (its features), that split's. So training from either takes the same batches."""
        packing = self.document.get("packing")
        made_of = packing.get("made_of") if isinstance(packing, dict) else None
        return str(made_of) if is_sha256(made_of) else self.fingerprint

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
        """Compare every shard's size with the index, and see that the files beside it are there, its .idx of as many
        samples. Of a remote split only what its server tells is compared.

        Raises:
            InputError: naming the shards that are missing, cut short or replaced.
        """
        with ThreadPoolExecutor(16) as pool:  # a remote file's size is a request
            wrong = [problem for problem in pool.map(_missing_or_cut, self.shards) if problem]
        if wrong:
            raise InputError(f"{len(wrong)} shard(s) do not match {self.path}:\n{listed(wrong)}\nCopy them again.")


def _missing_or_cut(shard: Shard) -> str | None:
    every: list[Place] = [shard.path, *(shard.path.with_suffix(suffix) for suffix in SIDECAR_SUFFIXES)]
    for path in every:
        try:
            size = storage.size_of(path)
        except FileNotFoundError:
            return f"{path} is missing"
        except OSError as error:
            return f"{path} cannot be read: {error}"
        if path == shard.path and size not in (None, shard.filesize):
            return f"{path} has {size:,} bytes, the index says {shard.filesize:,}"
    idx = shard.path.with_suffix(".idx")
    if isinstance(idx, Path):
        with idx.open(encoding="utf-8", errors="replace") as file:
            header = file.readline().rstrip("\n")
        if header != f"v1.2 {shard.nsamples}":
            return f"{idx} begins {header[:40]!r}, the index says {shard.nsamples} samples"
    return None


def load(path: str | Path, cache: Cache | None = None, trust_urls: bool = False) -> Index:
    """Read a split's NAME.json from a path, a URL (http, https, or what fsspec opens) or a ``pipe:`` command.

    The fingerprint is worked out from the shard list: the file's own may be that of another list.

    Args:
        trust_urls: let the index name files in other folders and on other hosts.

    Raises:
        InputError: when it is missing or is no shard index.
    """
    place = place_of(path)
    try:
        document = parse_json(storage.read_all(place))
        shards = checked_shards(place, document, trust_urls)
        return Index(place, document["name"], shards, fingerprint_of(shards), document, cache or Cache())
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputError(f"There is no shard index {place}. `captioning pack` writes one: DIR/NAME.json.") from error
    except OSError as error:
        raise InputError(f"{place} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is not a shard index written by `captioning pack` ({error}).") from error


def _sidecar(shard: Shard, suffix: str) -> bytes:
    """A file beside a tar, which must be the one that the index was written with.

    Raises:
        OSError: when it is missing, or another one at both of two attempts.
    """
    path, expected = shard.path.with_suffix(suffix), shard.sidecars[SIDECAR_SUFFIXES.index(suffix)]
    for _ in range(2):  # one wrong reply decides nothing
        data = storage.read_all(path)
        if hashlib.sha256(data).hexdigest() == expected:
            return data
    raise OSError(f"{path}: its bytes are not those that the index was written with")


def read_texts(shard: Shard) -> list[SampleText]:
    """The captions beside a tar.

    Raises:
        InputError: when the file is missing or does not belong to the tar.
    """
    path = shard.path.with_suffix(".captions.json")
    try:
        texts = [_text(sample) for sample in parse_json(_sidecar(shard, ".captions.json"))["samples"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}). Copy it again, with its tar.") from error
    if len(texts) != shard.nsamples:
        raise InputError(f"{path} lists {len(texts)} samples, the index says {shard.nsamples}. Copy it with its tar.")
    return texts


def _text(sample: Any) -> SampleText:
    key, captions, image_id, label = (sample[field] for field in ("key", "captions", "image_id", "label"))
    if not (
        isinstance(key, str)
        and isinstance(captions, list)
        and all(isinstance(caption, str) for caption in captions)
        and type(image_id) in (int, str)
        and isinstance(label, str | None)
    ):
        raise ValueError(f"a sample that is no key, captions, id and label: {str(sample)[:80]}")
    return SampleText(key, tuple(captions), image_id, label)


@lru_cache(maxsize=512)  # some 100 bytes a sample
def read_extents(shard: Shard) -> Extents:
    """Where each sample of a shard lies, from its ``.idx``.

    Raises:
        InputError: when the file is missing or does not fit the tar.
    """
    idx, crc32 = shard.path.with_suffix(".idx"), shard.path.with_suffix(".crc32")
    try:
        return Extents(shard, _sidecar(shard, ".idx"), _sidecar(shard, ".crc32"))
    except (OSError, ValueError) as error:
        raise InputError(f"{idx} or {crc32.name} cannot be read ({error}). Copy them again, with their tar.") from error


def extent_of(shard: Shard, number: int, view: int = 0) -> Extent:
    """Where the main file of one sample of a shard lies, or that of another of its views.

    Raises:
        InputError: when the shard's ``.idx`` cannot be read, or says nonsense of this sample.
    """
    return _said_of(shard, number, lambda sample: read_extents(shard).of_view(sample, view))


def files_of(shard: Shard, number: int) -> tuple[File, ...]:
    """Every file of one sample of a shard: (extension, offset, size, name).

    Raises:
        InputError: see ``extent_of``.
    """
    return _said_of(shard, number, read_extents(shard).files)


def _said_of(shard: Shard, number: int, ask: Callable[[int], T]) -> T:
    try:
        return ask(number)
    except ValueError as error:
        raise InputError(f"{shard.path.with_suffix('.idx')}: {error}. Copy it again, with its tar.") from error


def captions_path(tar: Path) -> Path:
    return tar.with_suffix(".captions.json")


def sha256_of_place(place: Place) -> str:
    digest = hashlib.sha256()
    for block in storage.chunks(place):
        digest.update(block)
    return digest.hexdigest()


def fingerprint_of(shards: Sequence[Shard]) -> str:
    """What makes two splits the same data: their tars' bytes, in order. The names and folders do not count."""
    return hashlib.sha256("\n".join(f"{s.sha256} {s.nsamples}" for s in shards).encode()).hexdigest()


def write_sidecars(tar: Path, content: Path, samples: list[tars.TarSample], about: dict[str, Any]) -> tuple[str, ...]:
    """Write what belongs to a tar, whose bytes are in ``content`` for now; ``about`` is its captions file, which also
    takes the hashes of the other two, and tells of several ``views`` of each image. Returns the sha256 of each file, as
    ``Shard.sidecars`` has them."""
    checksums = tars.checksums(content, samples, about.get("views", 1))
    files = {".idx": tars.idx_text(samples).encode(), ".crc32": checksums}
    about = {**about, "sidecars": {suffix: hashlib.sha256(data).hexdigest() for suffix, data in files.items()}}
    files[".captions.json"] = json.dumps(about, ensure_ascii=False).encode()
    for suffix, data in files.items():
        write_atomically(tar.with_suffix(suffix), data)
    return tuple(hashlib.sha256(files[suffix]).hexdigest() for suffix in SIDECAR_SUFFIXES)


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
                "url": shard.local.relative_to(folder).as_posix(),
                "nsamples": shard.nsamples,
                "filesize": shard.filesize,
                "sha256": shard.sha256,
                "sidecars": dict(zip(SIDECAR_SUFFIXES, shard.sidecars, strict=True)),
            }
            for shard in shards
        ],
        "fingerprint": fingerprint_of(shards),
        "packing": packing,
        "left_out": left_out,
        "skipped": skipped,  # image and reason
    }


def refuse_another_file(path: Path) -> None:
    """An index we wrote may be written again; another file of that name is somebody's, often the captions themselves.

    Raises:
        InputError: when something that is no shard index is at ``path``.
    """
    if path.exists():
        try:
            ours = parse_json(path.read_text(encoding="utf-8"))["__kind__"] == KIND
        except (OSError, ValueError, KeyError, TypeError):
            ours = False
        if not ours:
            raise InputError(f"{path} is there and is no shard index. Choose another folder or --split.")


def verify(index: Index) -> None:
    """Compare every byte of every shard with the index, and (of a local one) the files beside it with the tar.

    Raises:
        InputError: listing every shard that differs.
    """
    index.check_files()
    wrong = [problem for shard in index.shards if (problem := _damage_or_reason(shard, index.cache))]
    if wrong:
        raise InputError(f"{len(wrong)} shard(s) of {index.path} are damaged:\n{listed(wrong)}\nCopy them again.")


def _damage_or_reason(shard: Shard, cache: Cache) -> str | None:
    """What is wrong with a shard; one that cannot be read does not keep the others from being looked at."""
    try:
        return _damage(shard, cache)
    except InputError as error:
        return str(error)
    except OSError as error:
        return f"{shard.path} cannot be read: {error}"


def _damage(shard: Shard, cache: Cache) -> str | None:
    if isinstance(shard.path, Url):
        if problem := cache.damage(shard.sha256):
            return f"{problem} (a copy of {shard.path}; delete it, and it is fetched again)"
        # What the tar's hash proves need not be looked for in the tar.
        if sha256_of_place(shard.path) != shard.sha256:
            return f"{shard.path}: its bytes are not those that were packed"
        keys = [extent.key for extent in read_extents(shard)]
        return None if keys == [text.key for text in read_texts(shard)] else f"{shard.path}: .idx and captions differ"
    return _damage_on_disk(shard, shard.path)


def _damage_on_disk(shard: Shard, path: Path) -> str | None:
    if sha256_of_place(path) != shard.sha256:
        return f"{path}: its bytes are not those that were packed"
    read_extents.cache_clear()  # what is there now
    read_extents(shard)
    texts = read_texts(shard)
    known = {text.key for text in texts}
    about = parse_json(captions_path(path).read_text(encoding="utf-8"))  # of tars of others: how they were read
    samples = [sample for sample in tars.samples_of(path, about.get("prefix", "")) if sample.key in known]
    if tars.idx_text(samples) != path.with_suffix(".idx").read_text(encoding="utf-8", errors="replace"):
        return f"{path.with_suffix('.idx')}: does not match its tar"
    if tars.checksums(path, samples, about.get("views", 1)) != path.with_suffix(".crc32").read_bytes():
        return f"{path.with_suffix('.crc32')}: does not match its tar"
    with path.open("rb") as tar:
        for sample, text in zip(samples, texts, strict=True):
            if tars.text_of(sample, tar, about.get("caption_field")) != text:
                return f"{captions_path(path)}: sample {sample.key} is not what its tar says"
    return None
