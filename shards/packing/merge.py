"""Packed shards -> a split: what lies beside each tar says what it was made by, and NAME.json is written from that."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from shards import index as shard_index
from shards.document import is_sha256
from shards.errors import InputError, listed
from shards.files import parse_json, sha256_of, write_atomically
from shards.index import Index
from shards.packing.plan import tar_names
from shards.storage import SIDECAR_SUFFIXES, Shard

_NUMBER = "[0-9]" * 6


@dataclass(frozen=True)
class Packed:
    """A shard that was packed: the plan it was made by, and the images it had to leave out, each with the reason."""

    shard: Shard
    made_by: dict[str, Any] = field(hash=False)
    skipped: list[dict[str, str]] = field(hash=False)  # image, reason

    @property
    def name(self) -> str:
        return self.shard.path.name


def packed_in(folder: Path, split: str) -> dict[Path, Packed | None]:
    """Every tar named like one of the split's, and what it is: None for a tar of somebody else's."""
    return {tar: packed(tar) for tar in sorted(folder.glob(f"{split}-{_NUMBER}.tar"))}


def packed(tar: Path) -> Packed | None:
    """What lies beside a tar about it; None where there is no tar, or none of ours."""
    try:
        state = shard_index.captions_path(tar).stat()
        return _read(tar, state.st_mtime_ns, state.st_size) if tar.exists() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@lru_cache(maxsize=100_000)  # asked for several times, and holds every caption
def _read(tar: Path, _mtime: int, _size: int) -> Packed:
    data = shard_index.captions_path(tar).read_bytes()
    document = parse_json(data)
    sidecars = (*(document["sidecars"][suffix] for suffix in SIDECAR_SUFFIXES[:-1]), hashlib.sha256(data).hexdigest())
    if not all(map(is_sha256, (document["sha256"], *sidecars))):
        raise ValueError("no hashes of the tar and what lies beside it")
    shard = Shard(tar, len(document["samples"]), document["filesize"], document["sha256"], sidecars)
    return Packed(shard, document["made_by"], document["skipped"])


def merge(split: str, out: Path, folders: Sequence[Path] = ()) -> Index:
    """Write NAME.json once every shard of the split is there, copying into ``out`` those that lie in ``folders``.

    Raises:
        InputError: when shards are missing, were not packed from the same images, captions and settings, or hold no
            image.
    """
    found: dict[str, Packed] = {}
    for folder in dict.fromkeys([out, *folders]):
        for shard in packed_in(folder, split).values():
            if shard is not None:
                found.setdefault(shard.name, shard)
    if not found:
        raise InputError(f"No packed shard of split {split!r} in {', '.join(map(str, [out, *folders]))}.")
    first = next(iter(found.values()))
    if others := [shard.shard.path for shard in found.values() if shard.made_by != first.made_by]:
        raise InputError(
            f"Packed from other images, captions or settings than {first.shard.path}:\n{listed(others)}\n"
            "Pack all parts from the same data with the same settings."
        )
    names = tar_names(split, first.made_by)
    if missing := [name for name in names if name not in found]:
        raise InputError(
            f"{len(missing)} of {len(names)} shards are missing:\n{listed(missing)}\n"
            "Pack the parts that make them, or name the folders they are in."
        )
    out.mkdir(parents=True, exist_ok=True)
    return _write_index(split, out, [_copied(found[name], out) for name in names])


def splits_in(folders: Iterable[Path]) -> list[str]:
    """The splits that have packed shards in any of the folders."""
    names = {
        tar.name.rpartition("-")[0] for folder in folders for tar in folder.glob(f"*-{_NUMBER}.tar") if packed(tar)
    }
    return sorted(names)


def _copied(shard: Packed, out: Path) -> Packed:
    """The shard in ``out``, copied there with what lies beside it, the tar last, as packing writes them."""
    tar, to = shard.shard.local, out / shard.name
    if tar == to:
        return shard
    for path, sha256 in zip(map(tar.with_suffix, SIDECAR_SUFFIXES), shard.shard.sidecars, strict=True):
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise InputError(f"{path} is damaged: delete {tar} and pack its part again.")
        write_atomically(out / path.name, data)
    temporary = to.with_name(to.name + ".tmp")
    shutil.copyfile(tar, temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    if sha256_of(temporary) != shard.shard.sha256:
        temporary.unlink()
        raise InputError(f"{tar} is damaged: delete it and pack its part again.")
    temporary.replace(to)
    return replace(shard, shard=replace(shard.shard, path=to))


def refuse_nothing(shards: Iterable[Packed]) -> None:
    """Raises InputError when not one image could be read."""
    every = list(shards)
    if not any(shard.shard.nsamples for shard in every):
        reasons = [f"{skip['image']}: {skip['reason']}" for shard in every for skip in shard.skipped]
        raise InputError(f"None of the {len(reasons)} images could be read:\n{listed(reasons)}")


def _write_index(split: str, out: Path, every: list[Packed]) -> Index:
    refuse_nothing(every)
    path = out / f"{split}.json"
    shard_index.refuse_another_file(path)
    made_by, shards = every[0].made_by, [packed.shard for packed in every if packed.shard.nsamples]
    packing = {**made_by["packing"], "samples_per_shard": made_by["samples_per_shard"]}
    skipped = [skip for packed in every for skip in packed.skipped]
    document = shard_index.document_of(split, shards, out, packing, made_by["left_out"], skipped)
    write_atomically(path, json.dumps(document, indent=1, ensure_ascii=False).encode())
    return shard_index.load(path)
