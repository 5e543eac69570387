"""Which record goes into which shard: settled before the first image is converted, and the same on every machine."""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from shards.errors import InputError
from shards.hashing import hash64, key_of
from shards.packing.convert import Converter
from shards.sources import Record, Source

ESTIMATE_FROM = 64  # images converted to learn how many fit a shard
TAR_OVERHEAD = 2048  # bytes a sample beside its JPEG: two tar headers, padding, the json


@dataclass(frozen=True)
class Settings:
    """How images are stored: shorter side in pixels (0 keeps files as they are), JPEG quality, shard size in MB, and
    the seed of the shuffle that makes neighbours differ. A ``long_side`` that is not 0 decides in place of
    ``short_side``."""

    short_side: int = 256
    quality: int = 90
    shard_mb: int = 256
    shuffle_seed: int = 0
    long_side: int = 0

    def __post_init__(self) -> None:
        if (
            min(self.short_side, self.long_side) < 0
            or not 1 <= self.quality <= 95
            or self.shard_mb < 1
            or not 0 <= self.shuffle_seed < 2**63
        ):
            raise InputError(
                f"{self}: sides >= 0, quality 1..95 (as Pillow advises), shard MB >= 1, seed >= 0 are wanted."
            )

    def to_json(self) -> dict[str, int]:
        """What NAME.json says of them: the side that decides, not the other."""
        unused = "short_side" if self.long_side else "long_side"
        return {name: value for name, value in asdict(self).items() if name != unused}


@dataclass(frozen=True)
class Part:
    """Part ``number`` (1 .. ``count``) of a packing shared by ``count`` machines: every count-th shard."""

    number: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise InputError(f"--part {self.number}/{self.count}: the parts of n are 1/n, 2/n ... n/n.")


@dataclass(frozen=True)
class Plan:
    """What goes where, and what every shard of the packing must have been made by."""

    split: str
    records: tuple[Record, ...]
    made_by: dict[str, Any]  # stored beside each shard

    def shards(self) -> list[tuple[str, tuple[Record, ...]]]:
        """Each shard's tar name and records."""
        size = self.made_by["samples_per_shard"]
        return [
            (name, self.records[number * size : (number + 1) * size])
            for number, name in enumerate(tar_names(self.split, self.made_by))
        ]


def tar_names(split: str, made_by: dict[str, Any]) -> list[str]:
    """The tars of a packing."""
    return [f"{split}-{number:06d}.tar" for number in range(made_by["shards"])]


def shuffled(records: Iterable[Record], seed: int) -> list[Record]:
    """Records in an order that depends on their keys and the seed alone: datasets come sorted, and neighbours, which
    are read together, should not be alike."""
    ordered = sorted(records, key=lambda record: record.key)
    places = np.argsort(hash64(key_of("pack") ^ seed, np.arange(len(ordered))), kind="stable")
    return [ordered[place] for place in places]


def plan(source: Source, split: str, settings: Settings, earlier: Iterable[dict[str, Any]], convert: Converter) -> Plan:
    """Settle what goes where.

    Args:
        earlier: what shards that are already there were made by. An estimate begun with is kept, though images that
            were mended since would give another one.
    """
    records = shuffled(source.records, settings.shuffle_seed)
    packing = settings.to_json() | ({} if source.features is None else {"features": source.features})
    begun = next((made_by for made_by in earlier if made_by["packing"] == packing), None)
    per_shard = begun["samples_per_shard"] if begun else _samples_per_shard(records, settings, convert)
    made_by = {
        "records": hashlib.sha256(repr(records).encode()).hexdigest(),
        "left_out": source.left_out,
        "packing": packing,
        "samples_per_shard": per_shard,
        "shards": -(-len(records) // per_shard),
    }
    return Plan(split, tuple(records), made_by)


def _samples_per_shard(records: list[Record], settings: Settings, convert: Converter) -> int:
    spread = [records[i * len(records) // ESTIMATE_FROM] for i in range(min(ESTIMATE_FROM, len(records)))]
    converted = convert([record.image for record in spread])
    sizes = [len(one.data) + TAR_OVERHEAD for one in converted if not isinstance(one, str)]
    return max(1, int(settings.shard_mb * 1e6 / np.mean(sizes))) if sizes else len(records)
