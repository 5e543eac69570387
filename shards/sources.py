"""Readers of the datasets people have. Each gives a Source: records, and the folder or zip their images are in."""

import hashlib
import json
import re
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.errors import InputError, listed
from shards.tars import clean


@dataclass(frozen=True)
class Record:
    """One image to pack: its file name in the source, its cleaned captions, and what the dataset calls it."""

    image: str
    captions: tuple[str, ...]
    image_id: int | str
    label: str | None = None

    @property
    def key(self) -> str:
        """The sample's name in the tar: the file's, where that has no dot (WebDataset cuts names there), no space
        (DALI's index does) and at most 80 characters (tar allows 100); else what is left of it, and a hash of it."""
        stem = str(Path(self.image).with_suffix(""))
        plain = re.sub(r"[^A-Za-z0-9_-]", "_", stem)[:80]
        return plain if plain == stem else f"{plain}-{hashlib.sha256(self.image.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Source:
    """Records of one split, where their images are, and what was left out on the way (reason -> count)."""

    images: Path
    records: tuple[Record, ...]
    left_out: dict[str, int]


class ImageFiles:
    """Images by name, from a folder or straight from the zip people downloaded.

    Raises:
        InputError: when the path is neither, or the zip is broken.
    """

    def __init__(self, path: Path):
        self.path = path
        self._zip: zipfile.ZipFile | None = None
        if path.is_dir():
            return
        if not path.exists():
            raise InputError(f"There is no {path}. --images takes a folder of images, or a zip of them.")
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise InputError(f"{path} is neither a folder nor a readable zip ({error}). Download it again.") from error
        # COCO's zips hold "train2017/000000000009.jpg" where its json says "000000000009.jpg".
        self._members = {name.rsplit("/", 1)[-1]: name for name in self._zip.namelist() if not name.endswith("/")}

    def read(self, name: str) -> bytes:
        """The bytes of one image.

        Raises:
            OSError: when it is missing or cannot be read.
        """
        if self._zip is None:
            return (self.path / name).read_bytes()
        member = name if name in self._zip.NameToInfo else self._members.get(name.rsplit("/", 1)[-1])
        if member is None:
            raise FileNotFoundError(f"no such member in {self.path.name}")
        try:
            return self._zip.read(member)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            raise OSError(f"{member}: {error}") from error


def coco(images: Path, captions: Path) -> Source:
    """COCO 2014/2017: ``captions_*.json`` (https://cocodataset.org/#format-data, section 4) and its images.

    Raises:
        InputError: when the json is missing, is not COCO captions, or names no image with a caption.
    """
    document = _load_json(captions)
    _require_coco_captions(document, captions)
    by_image: dict[Any, list[str]] = {}
    empty = 0
    for annotation in document["annotations"]:
        caption = clean(annotation["caption"])
        empty += not caption
        if caption:
            by_image.setdefault(annotation["image_id"], []).append(caption)
    records = tuple(
        Record(image["file_name"], tuple(by_image[image["id"]]), image["id"])
        for image in document["images"]
        if image["id"] in by_image
    )
    if not records:
        raise InputError(f"{captions} names no image with a caption: there is nothing to pack.")
    _refuse_duplicates(records, captions)
    left_out = {"captions without text": empty, "images without a caption": len(document["images"]) - len(records)}
    return Source(images, records, {reason: count for reason, count in left_out.items() if count})


def _load_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"There is no {path}.") from error
    except IsADirectoryError as error:
        raise InputError(f"{path} is a folder; a json file is wanted.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON ({error}). Was the download cut short?") from error


def _require_coco_captions(document: Any, path: Path) -> None:
    wanted = {"images": ("id", "file_name"), "annotations": ("image_id", "caption")}
    for section, fields in wanted.items():
        entries = document.get(section) if isinstance(document, dict) else None
        if not isinstance(entries, list):
            raise InputError(f"{path} has no list {section!r}: it is not COCO captions (captions_train2017.json ...).")
        for number, entry in enumerate(entries):
            lacking = [field for field in fields if not isinstance(entry, dict) or field not in entry]
            if lacking:
                hint = " Is it instances_*.json or person_keypoints_*.json?" if "caption" in lacking else ""
                raise InputError(f"{path}: {section}[{number}] has no {lacking[0]!r}: not COCO captions.{hint}")
            text = entry[fields[1]]
            if not isinstance(text, str):
                raise InputError(f"{path}: {section}[{number}] has a {fields[1]} that is not text: {text!r}")


def _refuse_duplicates(records: tuple[Record, ...], path: Path) -> None:
    for what, counts in (("key", Counter(r.key for r in records)), ("id", Counter(r.image_id for r in records))):
        twice = [str(name) for name, count in counts.items() if count > 1]
        if twice:
            hint = "File names must differ in more than their ending." if what == "key" else ""
            raise InputError(
                f"{path}: {len(twice)} image {what}(s) occur more than once:\n{listed(twice)}\n{hint}".rstrip()
            )
