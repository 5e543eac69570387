"""Tars made by others -> a split: an .idx and a captions file beside each tar, and NAME.json. No tar is touched."""

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from shards import index as shard_index
from shards import tars
from shards.document import check_split_name
from shards.errors import InputError, listed
from shards.files import sha256_of, write_atomically
from shards.index import Index, Shard
from shards.tars import SampleText, TarSample

_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")  # compressed ones, to say that they are


@dataclass(frozen=True)
class _Found:
    """What one tar holds that can be trained on, and how many samples were left out for which reason."""

    shard: Shard
    samples: list[TarSample]
    texts: list[SampleText]
    left_out: Counter[str]


def index_tars(
    places: Sequence[Path],
    split: str,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    any_sample: bool = False,
) -> Index:
    """Index tars in WebDataset's form as split ``split``: a folder's tars, or the named ones, in the order of names.

    Samples need an image and a caption (see ``tars.text_of``); others are left out and counted, unless ``any_sample``
    keeps them: sounds, class folders, whatever ``ShardDataset`` is given a ``decode`` for. NAME.json is written
    to the folder that holds them all.

    Raises:
        InputError: for a compressed, damaged or interleaved tar, keys that occur twice, names that DALI's index cannot
            hold, or when there is nothing to index; nothing has been written then.
    """
    check_split_name(split)
    paths = _tars(places)
    folder = Path(os.path.commonpath([path.parent for path in paths]))
    index_path = folder / f"{split}.json"
    shard_index.refuse_another_file(index_path)
    found = []
    for number, path in enumerate(paths, start=1):
        found.append(_examine(path, any_sample))
        on_progress(number, len(paths))
    _refuse_duplicates(found)
    left_out = sum((entry.left_out for entry in found), Counter())
    kept = [entry for entry in found if entry.samples]
    if not kept:
        reasons = "".join(f"\n  {count:,} {reason}" for reason, count in left_out.items())
        raise InputError(f"No sample of {len(paths)} tar(s) has an image and a caption.{reasons}")
    try:
        shards = [_write_beside(entry) for entry in kept]
        document = shard_index.document_of(split, shards, folder, {"adopted": True}, dict(left_out), [])
        write_atomically(index_path, json.dumps(document, indent=1, ensure_ascii=False).encode())
    except OSError as error:
        raise InputError(
            f"What belongs beside the tars cannot be written: {error}\n"
            "Link the tars into a folder of yours (ln -s) and index that."
        ) from error
    return shard_index.load(index_path)


def _write_beside(found: _Found) -> Shard:
    tar, shard = found.shard.local, found.shard
    about = {"filesize": shard.filesize, "sha256": shard.sha256, "samples": [asdict(text) for text in found.texts]}
    return replace(shard, sidecars=shard_index.write_sidecars(tar, tar, found.samples, about))


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


def _examine(path: Path, any_sample: bool) -> _Found:
    samples, texts, left_out = [], [], Counter[str]()
    with path.open("rb") as tar:
        for sample in tars.samples_of(path):
            if any(" " in name or "\n" in name for _ext, _offset, _size, name in sample.files):
                raise InputError(f"{path}: {sample.key!r}: an .idx cannot hold names with spaces. Rename the files.")
            text = tars.text_of(sample, tar)
            if sample.image is None and not any_sample:
                left_out["samples without an image"] += 1
            elif not text.captions and not any_sample:
                left_out["samples without a caption"] += 1
            else:
                samples.append(sample)
                texts.append(text)
    shard = Shard(path, len(samples), path.stat().st_size, sha256_of(path))
    return _Found(shard, samples, texts, left_out)


def _refuse_duplicates(found: list[_Found]) -> None:
    """Keys and ids must be distinct: results are told apart by them."""
    for what in ("key", "image_id"):
        tars_of: dict[Any, str] = {}
        twice = []
        for entry in found:
            for text in entry.texts:
                name = getattr(text, what)
                if name in tars_of:
                    twice.append(f"{name} in {tars_of[name]} and {entry.shard.path.name}")
                tars_of[name] = entry.shard.path.name
        if twice:
            raise InputError(f"{len(twice)} samples have a {what} that another one has:\n{listed(twice)}")
