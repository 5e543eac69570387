"""COCO's captions, and Karpathy's splits of COCO, Flickr8k and Flickr30k."""

import argparse
import io
from collections.abc import Collection
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO

from shards.errors import InputError
from shards.files import parse_json
from shards.sources.kind import add_images
from shards.sources.records import WHOLE, Places, Record, Source, source_of
from shards.sources.text import read_text
from shards.tars import clean


class Coco:
    """``pack coco``."""

    names = ("coco",)
    help = "COCO 2014/2017: captions_*.json"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_images(parser)
        parser.add_argument("--captions", type=Path, required=True, metavar="JSON", help="captions_train2017.json, ...")

    def read(self, arguments: argparse.Namespace, scratch: Path) -> dict[str, Source]:
        return {WHOLE: coco(arguments.images, arguments.captions)}


class Karpathy:
    """``pack karpathy``."""

    names = ("karpathy",)
    help = "Karpathy's dataset_*.json, all its splits"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_images(parser)
        parser.add_argument("--json", type=Path, required=True, help="dataset_coco.json, dataset_flickr8k.json, ...")

    def read(self, arguments: argparse.Namespace, scratch: Path) -> dict[str, Source]:
        return karpathy(arguments.images, arguments.json)


def coco(images: Places, captions: Path) -> Source:
    """COCO 2014/2017: ``captions_*.json`` (https://cocodataset.org/#format-data, section 4) and its images.

    Raises:
        InputError: when the json is missing, is not COCO captions, or names no image with a caption.
    """
    document = _load_json(captions)
    _require_coco_captions(document, captions)
    annotations = _indexed(document)
    records, empty = [], 0
    for image in annotations.dataset["images"]:
        texts = [clean(annotation["caption"]) for annotation in annotations.imgToAnns.get(image["id"], ())]
        empty += texts.count("")
        if any(texts):
            records.append(Record(image["file_name"], tuple(filter(None, texts)), image["id"]))
    left_out = {
        "captions without text": empty,
        "images without a caption": len(document["images"]) - len(records),
        "captions whose image is not listed": sum(
            len(of_image) for image, of_image in annotations.imgToAnns.items() if image not in annotations.imgs
        ),
    }
    return source_of(images, records, left_out, captions)


def _indexed(document: dict[str, Any]) -> COCO:
    """The annotations as pycocotools has them: imgs by id, imgToAnns by image."""
    for number, annotation in enumerate(document["annotations"]):
        annotation.setdefault("id", number)  # which a captions file of others may lack
    annotations = COCO()
    annotations.dataset = document
    with redirect_stdout(io.StringIO()):  # it prints what it does
        annotations.createIndex()
    return annotations


def karpathy(images: Places, path: Path) -> dict[str, Source]:
    """Karpathy's ``dataset_coco.json``, ``dataset_flickr8k.json`` or ``dataset_flickr30k.json``: split -> source.

    The splits are its own, ``restval`` going into train, as the field has it
    (https://cs.stanford.edu/people/karpathy/deepimagesent/). COCO's images are in train2014 and val2014, whatever the
    split: name both folders or zips, or the folder that holds them.

    Raises:
        InputError: when the json is missing, is none of them, or has no image with a caption in a split.
    """
    document = _load_json(path)
    _require_karpathy(document, path)
    records: dict[str, list[Record]] = {}
    left_out: dict[str, dict[str, int]] = {}
    for image in document["images"]:
        split = "train" if image["split"] == "restval" else image["split"]
        captions = [clean(sentence["raw"]) for sentence in image["sentences"]]
        counts = left_out.setdefault(split, {"captions without text": 0, "images without a caption": 0})
        counts["captions without text"] += captions.count("")
        counts["images without a caption"] += not any(captions)
        if any(captions):
            name = "/".join(filter(None, (image.get("filepath"), image["filename"])))
            image_id = image.get("cocoid", image.get("imgid", name))
            records.setdefault(split, []).append(Record(name, tuple(filter(None, captions)), image_id))
    return {split: source_of(images, records.get(split, ()), left_out[split], path) for split in sorted(left_out)}


def _load_json(path: Path) -> Any:
    try:
        return parse_json(read_text(path))
    except ValueError as error:
        raise InputError(
            f"{path} is not JSON ({error}). Was the download cut short? `pack table` reads CSV and JSON lines."
        ) from error


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
            _require_ids(entry, {fields[0], "id"}, f"{path}: {section}[{number}]")


def _require_ids(entry: dict[str, Any], names: Collection[str], where: str) -> None:
    for name in names:
        if name in entry and not isinstance(entry[name], int | str):
            raise InputError(f"{where} has the {name} {str(entry[name])[:80]!r}: a whole number or text is wanted.")


def _require_karpathy(document: Any, path: Path) -> None:
    entries = document.get("images") if isinstance(document, dict) else None
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path} has no list 'images': it is not dataset_coco.json or the like.")
    for number, entry in enumerate(entries):
        wanted = {"filename": str, "split": str, "sentences": list}
        wrong = [n for n, kind in wanted.items() if not isinstance(entry, dict) or not isinstance(entry.get(n), kind)]
        if wrong:
            hint = " COCO's own captions_*.json are read by `pack coco`." if "annotations" in document else ""
            raise InputError(f"{path}: images[{number}] has no {wrong[0]!r}: not Karpathy's splits.{hint}")
        _require_ids(entry, ("cocoid", "imgid"), f"{path}: images[{number}]")
        if not isinstance(entry.get("filepath", ""), str):
            raise InputError(f"{path}: images[{number}] has a filepath that is not text: not Karpathy's splits.")
        if any(not isinstance(s, dict) or not isinstance(s.get("raw"), str) for s in entry["sentences"]):
            raise InputError(f"{path}: images[{number}] has a sentence without text 'raw': not Karpathy's splits.")
