"""NAME.json may come from anybody, also from another machine: no field of it is believed before it was checked here.

What a field could do otherwise: a ``url`` or ``sha256`` becomes a file name, ``name`` a part of one, a count or size
becomes memory.
"""

import re
from typing import Any

from shards.errors import InputError
from shards.storage import SIDECAR_SUFFIXES, Shard
from shards.storage.urls import Place, sibling

KIND = "wids-shard-index-v1"
_LARGEST_SHARD = 2**42  # bytes, 4 TiB
_MOST_SHARDS = 2**24
_TAR_HEADER = 512  # bytes: no sample is smaller
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SPLIT_NAME = re.compile(r"\w[\w.-]{0,99}")


def is_sha256(value: Any) -> bool:
    """Whether a value is a sha256 as we write it: 64 hexadecimal digits."""
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def check_split_name(name: Any) -> None:
    """Files are named after a split.

    Raises:
        InputError: for what is no plain name.
    """
    if not (isinstance(name, str) and _SPLIT_NAME.fullmatch(name)):
        raise InputError(f"The split name {str(name)[:80]!r}: letters, digits, - _ and . are wanted, 100 at most.")


def checked_shards(place: Place, document: Any, trust_urls: bool) -> tuple[Shard, ...]:
    """The shards that the NAME.json at ``place`` lists; all its other fields are checked too.

    Args:
        trust_urls: let it name files on other hosts and in other folders, see ``urls.sibling``.

    Raises:
        ValueError: naming the field that cannot be.
        InputError: for a shard outside the index's folder, or an index of an older version.
    """
    if not isinstance(document, dict) or document.get("__kind__") != KIND:
        raise ValueError(f"its __kind__ is not {KIND!r}")
    try:
        check_split_name(document.get("name"))
    except InputError as error:
        raise ValueError(str(error)) from error
    entries = document.get("shardlist")
    if not isinstance(entries, list) or len(entries) > _MOST_SHARDS:
        raise ValueError("its shardlist is no list of shards")
    shards = tuple(_shard(place, number, entry, trust_urls) for number, entry in enumerate(entries))
    if not any(shard.nsamples for shard in shards):
        raise ValueError("it has no samples")
    if len({shard.path for shard in shards}) < len(shards):
        raise ValueError("it lists a shard twice")
    _check_packing(document)
    return shards


def _shard(place: Place, number: int, entry: Any, trust_urls: bool) -> Shard:
    if not isinstance(entry, dict) or not isinstance(entry.get("url"), str):
        raise ValueError(f"shard {number} has no url")
    filesize = _whole(entry, number, "filesize", _LARGEST_SHARD)
    nsamples = _whole(entry, number, "nsamples", filesize // _TAR_HEADER)
    if not is_sha256(entry.get("sha256")):
        raise ValueError(f"sha256 of shard {number} is not 64 hexadecimal digits")
    if "sidecars" not in entry:
        raise InputError(
            f"{place} lacks the hashes of the files beside its shards: an older version wrote it. Index the tars again "
            "(`captioning pack index TARS --split NAME`), or pack again."
        )
    sidecars = entry["sidecars"]
    if not isinstance(sidecars, dict) or not all(is_sha256(sidecars.get(suffix)) for suffix in SIDECAR_SUFFIXES):
        raise ValueError(f"sidecars of shard {number} are not the sha256 of {', '.join(SIDECAR_SUFFIXES)}")
    hashes = tuple(sidecars[suffix] for suffix in SIDECAR_SUFFIXES)
    return Shard(sibling(place, entry["url"], trust_urls), nsamples, filesize, entry["sha256"], hashes)


def _whole(entry: dict[str, Any], number: int, field: str, most: int) -> int:
    value = entry.get(field)
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{field} of shard {number} is not a whole number of 0 to {most:,}")
    return value


def _check_packing(document: dict[str, Any]) -> None:
    """How it was packed: shown in reports, nothing hangs on it."""
    packing, left_out, skipped = (
        document.get("packing", {}), document.get("left_out", {}), document.get("skipped", [])
    )  # fmt: skip
    if not isinstance(packing, dict):
        raise ValueError("packing is no set of names and values")
    if not (isinstance(left_out, dict) and all(type(count) is int for count in left_out.values())):
        raise ValueError("left_out is no set of reasons and counts")
    if not (isinstance(skipped, list) and all(isinstance(skip, dict) and _is_skip(skip) for skip in skipped)):
        raise ValueError("skipped is no list of images and reasons")


def _is_skip(skip: dict[str, Any]) -> bool:
    return all(isinstance(skip.get(field), str) for field in ("image", "reason"))
