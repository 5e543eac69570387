"""What two splits share: ids, files of the same bytes, and pictures that look alike.

Packing stores hashes of each image in the captions file beside its tar (see shards/perceptual.py); no tar is opened.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from shards import storage
from shards.errors import InputError
from shards.files import parse_json
from shards.index import Index
from shards.perceptual import BITS, NEAR_BITS, split_signs

_BLOCK = 4096  # train images compared at once: 80 MB against 5,000


class Pair(NamedTuple):
    """An image of val, and the image of train that it is a copy of; numbers of samples in their splits."""

    val: int
    train: int
    why: str  # "same bytes", "near" or "near, mirrored"
    bits: int  # of the perceptual hashes that differ; 0 where the bytes are the same


@dataclass(frozen=True)
class Overlap:
    """What a validation split shares with a training split; counts are images of val.

    ``same`` counts those that are surely, or as far as anybody can tell, images of train: the same bytes, or the same
    id or key where no hash says that the pictures differ.
    """

    train: str
    val: str
    train_images: int
    val_images: int
    shared_ids: int
    shared_keys: int
    shared_bytes: int | None  # None where a split was packed without hashes
    near_duplicates: int | None
    same: int
    packing_differs: list[str] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)

    def numbers(self) -> dict[str, Any]:
        """All but the pairs, for JSON."""
        return {name: value for name, value in vars(self).items() if name != "pairs"}

    def __str__(self) -> str:
        told = [f"{self.shared_ids:,} ids", f"{self.shared_keys:,} keys"]
        told += [] if self.shared_bytes is None else [f"{self.shared_bytes:,} files of the same bytes"]
        told += [] if self.near_duplicates is None else [f"{self.near_duplicates:,} near duplicates"]
        return f"{self.val} shares with {self.train}: {', '.join(told)}; of {self.val_images:,} images"


@dataclass(frozen=True)
class _Sample:
    key: str
    image_id: int | str
    sha256: str | None
    perceptual: str | None


def overlap(train: Index, val: Index) -> Overlap:
    """Compare two splits by what lies beside their tars.

    Raises:
        InputError: when a captions file cannot be read.
    """
    of_train, of_val = list(_samples(train)), list(_samples(val))
    hashed = all(sample.sha256 for sample in (*of_train, *of_val))
    seen = any(sample.perceptual for sample in of_train) and any(sample.perceptual for sample in of_val)
    by_bytes = {sample.sha256: number for number, sample in enumerate(of_train) if sample.sha256}
    pairs = [
        Pair(number, by_bytes[sample.sha256], "same bytes", 0)
        for number, sample in enumerate(of_val)
        if sample.sha256 in by_bytes
    ]
    known = {pair.val for pair in pairs}
    near = [pair for pair in _near(of_train, of_val) if pair.val not in known]
    ids, keys = {sample.image_id for sample in of_train}, {sample.key for sample in of_train}
    if hashed:  # ids and keys are often mere numbers: the same picture must be there under the same name
        same = known | {pair.val for pair in near if _named_alike(of_val[pair.val], of_train[pair.train])}
    else:
        same = known | {number for number, s in enumerate(of_val) if s.image_id in ids or s.key in keys}
    return Overlap(
        train=train.name,
        val=val.name,
        train_images=len(of_train),
        val_images=len(of_val),
        shared_ids=sum(sample.image_id in ids for sample in of_val),
        shared_keys=sum(sample.key in keys for sample in of_val),
        shared_bytes=len(known) if hashed else None,
        near_duplicates=len(near) if seen else None,
        same=len(same),
        packing_differs=_differing(train, val),
        pairs=[*pairs, *near],
    )


def _named_alike(one: _Sample, other: _Sample) -> bool:
    return one.image_id == other.image_id or one.key == other.key


def _samples(index: Index) -> Iterator[_Sample]:
    for shard in index.shards:
        path = shard.path.with_suffix(".captions.json")
        try:
            for s in parse_json(storage.read_all(path))["samples"]:
                yield _Sample(s["key"], s["image_id"], s.get("image_sha256"), s.get("image_phash"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} cannot be read ({error!r}). Copy it again, with its tar.") from error


def _near(of_train: list[_Sample], of_val: list[_Sample]) -> list[Pair]:
    """The nearest image of train for each of val that has one within NEAR_BITS."""
    train, val = ([n for n, s in enumerate(of_split) if s.perceptual] for of_split in (of_train, of_val))
    if not train or not val:
        return []
    # Mirroring changes the signs of some columns alone: both comparisons come from one pair of products.
    same, turned = split_signs([of_val[n].perceptual or "" for n in val])
    best = [Pair(n, -1, "", NEAR_BITS + 1) for n in val]
    for start in range(0, len(train), _BLOCK):
        numbers = train[start : start + _BLOCK]
        block_same, block_turned = split_signs([of_train[n].perceptual or "" for n in numbers])
        product, product_turned = same @ block_same.T, turned @ block_turned.T  # [val, block]
        product += np.abs(product_turned)
        nearest = product.argmax(axis=1)
        bits = ((BITS - product[np.arange(len(val)), nearest]) / 2).round().astype(int)
        for row in np.flatnonzero(bits <= NEAR_BITS):
            if bits[row] < best[row].bits:
                is_mirrored = product_turned[row, nearest[row]] < 0
                why = "near, mirrored" if is_mirrored else "near"
                best[row] = Pair(val[row], numbers[nearest[row]], why, int(bits[row]))
    return [pair for pair in best if pair.train >= 0]


def _differing(train: Index, val: Index) -> list[str]:
    """Packing settings that change what a model sees, and differ; not the sizes of shards or the shuffle."""
    ours, theirs = train.document.get("packing", {}), val.document.get("packing", {})
    return [
        f"{name} {ours.get(name)} in {train.name}, {theirs.get(name)} in {val.name}"
        for name in ("short_side", "long_side", "quality", "indexed")
        if ours.get(name) != theirs.get(name)
    ]
