"""Tars made by others -> a split: an .idx and a captions file beside each tar, and NAME.json. No tar is touched."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from shards import index as shard_index
from shards import tars
from shards.errors import InputError, listed
from shards.files import sha256_of, write_atomically
from shards.images import UnreadableImageError, open_rgb
from shards.index import Index, Shard
from shards.perceptual import ImageHashes, bytes_hash, perceptual_hash
from shards.tars import SampleText, TarSample

_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")  # compressed ones, to say that they are
_TOGETHER = 64  # images decoded at once, to check them


@dataclass(frozen=True)
class Options:
    """How tars are read: the field or ending that holds the captions where it is not plain, how many threads decode
    every image to see whether it does (0: none is decoded), and whether samples without an image or a caption are kept
    (sounds, class folders, whatever ``ShardDataset`` is given a ``decode`` for)."""

    caption_field: str | None = None
    checkers: int = 0
    any_sample: bool = False


@dataclass
class _IndexedTar:
    """What one tar holds that can be trained on, and what was left out for which reason."""

    shard: Shard
    prefix: str = ""
    samples: list[TarSample] = field(default_factory=list)
    texts: list[SampleText] = field(default_factory=list)
    hashes: list[ImageHashes] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    skipped: list[dict[str, str]] = field(default_factory=list)  # image and reason
    remarks: Counter[str] = field(default_factory=Counter)  # what was chosen on the way
    captionless: str | None = None  # what the first sample without a caption holds


def index_tars(
    places: Sequence[Path],
    split: str,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    options: Options | None = None,
) -> Index:
    """Index tars in WebDataset's form as split ``split``: a folder's tars, or the named ones, in the order of names.

    Samples need an image and a caption (see ``tars.text_of``); others are left out and counted. Where keys begin anew
    in each tar, the tar's name is put before them. NAME.json is written to the folder that holds them all.

    Raises:
        InputError: for a compressed, damaged or interleaved tar, samples that occur twice, names that DALI's index
            cannot hold, or when there is nothing to index; nothing has been written then.
    """
    options = options or Options()
    paths = _tars(places)
    folder = Path(os.path.commonpath([path.parent for path in paths]))
    index_path = folder / f"{split}.json"
    shard_index.refuse_another_file(index_path)
    indexed = []
    for number, path in enumerate(paths, start=1):
        indexed.append(_examine(path, options))
        on_progress(number, len(paths))
    indexed = _distinct(indexed, folder)
    left_out = sum((entry.left_out for entry in indexed), Counter())
    kept = [entry for entry in indexed if entry.samples]
    if not kept:
        raise InputError(_nothing(indexed, left_out, options))
    packing: dict[str, Any] = {"indexed": True}
    if options.caption_field:
        packing["caption_field"] = options.caption_field
    if remarks := sum((entry.remarks for entry in indexed), Counter()):
        packing["remarks"] = dict(remarks)
    skipped = [skip for entry in indexed for skip in entry.skipped]
    try:
        shards = [_write_sidecars(entry, options) for entry in kept]
        document = shard_index.document_of(split, shards, folder, packing, dict(left_out), skipped)
        write_atomically(index_path, json.dumps(document, indent=1, ensure_ascii=False).encode())
    except OSError as error:
        raise InputError(
            f"What belongs next to the tars cannot be written: {error}\n"
            "Link the tars into a folder of yours (ln -s) and index that."
        ) from error
    return shard_index.load(index_path)


def _nothing(indexed: list[_IndexedTar], left_out: Counter[str], options: Options) -> str:
    """Why there is nothing to index, and what the first sample without a caption holds."""
    reasons = "".join(f"\n  {count:,} {reason}" for reason, count in left_out.items())
    held = next((f"\n{entry.captionless}" for entry in indexed if entry.captionless), "")
    sought = f" (--caption-field {options.caption_field})" if options.caption_field else ""
    return f"No sample of {len(indexed)} tar(s) has an image and a caption{sought}.{reasons}{held}"


def _write_sidecars(indexed: _IndexedTar, options: Options) -> Shard:
    tar, shard = indexed.shard.local, indexed.shard
    samples = [
        {**asdict(text), "image_sha256": hashes.sha256, "image_phash": hashes.perceptual}
        for text, hashes in zip(indexed.texts, indexed.hashes, strict=True)
    ]
    about = {"filesize": shard.filesize, "sha256": shard.sha256, "samples": samples}
    # What verifying needs to read the tar as it was read here.
    about |= {"prefix": indexed.prefix, "caption_field": options.caption_field}
    return replace(shard, sidecars=shard_index.write_sidecars(tar, tar, indexed.samples, about))


def _tars(places: Sequence[Path]) -> list[Path]:
    paths: list[Path] = []
    for place in places:
        if not place.exists():
            raise InputError(f"There is no {place}. A folder of tars, or tars, are wanted.")
        paths += [path for path in place.iterdir() if path.name.endswith(_ENDINGS)] if place.is_dir() else [place]
    if not paths:
        raise InputError(f"No .tar in {', '.join(map(str, places))}.")
    twice = [path for path, count in Counter(path.with_suffix("") for path in paths).items() if count > 1]
    if twice:
        raise InputError(f"Tars of one name, which would share one .idx:\n{listed(twice)}")
    return sorted(path.absolute() for path in paths)


def _examine(path: Path, options: Options) -> _IndexedTar:
    indexed = _IndexedTar(Shard(path, 0, path.stat().st_size, sha256_of(path)))
    samples, archives = tars.read_tar(path)
    if archives > 1:
        indexed.remarks["tars written one after another: the stock library reads the first alone"] += archives
    with path.open("rb") as tar, closing(_Images(tar, options.checkers)) as images:
        for sample in samples:
            if any(" " in name or "\n" in name for _ext, _offset, _size, name in sample.files):
                raise InputError(f"{path}: {sample.key!r}: an .idx cannot hold names with spaces. Rename the files.")
            if sample.image is None and not options.any_sample:
                indexed.left_out["samples without an image"] += 1
            elif text := _text(indexed, sample, tar, options):
                if sample.image is not None and sample.images > 1:
                    indexed.remarks[f"samples of several images: .{sample.image[0]} was taken"] += 1
                indexed.samples.append(sample)
                indexed.texts.append(text)
        checked = images.of(indexed.samples)
    good = [number for number, hashes in enumerate(checked) if isinstance(hashes, ImageHashes)]
    indexed.skipped = [
        {"image": f"{path.name}: {text.key}", "reason": hashes}
        for text, hashes in zip(indexed.texts, checked, strict=True)
        if isinstance(hashes, str)
    ]
    indexed.samples, indexed.texts = [indexed.samples[n] for n in good], [indexed.texts[n] for n in good]
    indexed.hashes = [hashes for hashes in checked if isinstance(hashes, ImageHashes)]
    indexed.shard = replace(indexed.shard, nsamples=len(good))
    return indexed


def _text(indexed: _IndexedTar, sample: TarSample, tar: BinaryIO, options: Options) -> SampleText | None:
    """What a sample says; None, counted, where that cannot be read or holds no caption."""
    try:
        text = tars.text_of(sample, tar, options.caption_field)
    except InputError as error:
        indexed.left_out["samples whose text or json cannot be read"] += 1
        indexed.captionless = indexed.captionless or str(error)
        return None
    if text.captions or options.any_sample:
        return text
    indexed.left_out["samples without a caption"] += 1
    indexed.captionless = indexed.captionless or _held(sample, tar)
    return None


def _held(sample: TarSample, tar: BinaryIO) -> str:
    """What a sample without a caption holds, so that the user sees which field it is in."""
    files = ", ".join(f".{ext}" for ext, *_ in sample.files)
    about = [f"  {name}: {str(value)[:60]!r}" for name, value in tars.json_of(sample, tar).items()]
    fields = f" and its json:\n{listed(about, 20)}\n" if about else ". "
    return f"The first without one, {sample.key}, has {files}{fields}Name the field or the ending with --caption-field."


class _Images:
    """The images of samples, hashed; decoded by ``threads`` threads (0: not at all)."""

    def __init__(self, tar: BinaryIO, threads: int):
        self._tar, self._pool = tar, ThreadPoolExecutor(threads) if threads else None

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def of(self, samples: list[TarSample]) -> list[ImageHashes | str]:
        """Hashes of each sample's image, or why it cannot be decoded."""
        hashes: list[ImageHashes | str] = []
        for start in range(0, len(samples), _TOGETHER):
            images = [self._read(sample) for sample in samples[start : start + _TOGETHER]]
            hashes += self._pool.map(_checked, images) if self._pool else map(_hashed, images)
        return hashes

    def _read(self, sample: TarSample) -> bytes:
        _ext, offset, size, _name = tars.main_file(sample.files)
        self._tar.seek(offset)
        return self._tar.read(size)


def _hashed(data: bytes) -> ImageHashes:
    return ImageHashes(bytes_hash(data), None)


def _checked(data: bytes) -> ImageHashes | str:
    try:
        return ImageHashes(bytes_hash(data), perceptual_hash(open_rgb(data)))
    except UnreadableImageError as error:
        return str(error)


def _distinct(indexed: list[_IndexedTar], folder: Path) -> list[_IndexedTar]:
    """The tars with distinct keys and ids, which results are told apart by: where keys begin anew in each tar, its
    name is put before them.

    Raises:
        InputError: when a sample occurs twice.
    """
    tar_of: dict[str, tuple[_IndexedTar, str]] = {}
    anew, twice = False, []
    for entry in indexed:
        for text, hashes in zip(entry.texts, entry.hashes, strict=True):
            other, sha256 = tar_of.setdefault(text.key, (entry, hashes.sha256))
            if other is not entry:
                anew = True
                if sha256 == hashes.sha256:
                    twice.append(f"{text.key} in {other.shard.path.name} and {entry.shard.path.name}")
    if twice:
        raise InputError(f"{len(twice)} samples are there twice, key and image:\n{listed(twice)}")
    if anew:
        for entry in indexed:
            _put_before(entry, _prefix(entry.shard.local.relative_to(folder)))
        indexed[0].remarks["tars whose keys begin anew: the tar's name was put before them"] += len(indexed)
    ids = Counter(text.image_id for entry in indexed for text in entry.texts)
    if same := [str(image_id) for image_id, count in ids.items() if count > 1]:
        raise InputError(f"{len(same)} image_ids occur more than once:\n{listed(same)}")
    return indexed


def _prefix(path: Path) -> str:
    """ "part1/00000.tar" -> "part1/00000/", without what a key cannot hold."""
    return re.sub(r"[^A-Za-z0-9_/-]", "_", path.with_suffix("").as_posix()) + "/"


def _put_before(entry: _IndexedTar, prefix: str) -> None:
    def renamed(text: SampleText) -> SampleText:
        image_id = prefix + text.key if text.image_id == text.key else text.image_id
        return replace(text, key=prefix + text.key, image_id=image_id)

    entry.prefix = prefix
    entry.texts = [renamed(text) for text in entry.texts]
    entry.samples = [
        TarSample(prefix + s.key, tuple((ext, offset, size, prefix + name) for ext, offset, size, name in s.files))
        for s in entry.samples
    ]
