"""Features that others computed: a .npy or .npz an image (bottom-up attention's boxes, CLIP grids), and captions."""

import argparse
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from shards.errors import InputError
from shards.sources.arrays import as_places, read_array
from shards.sources.coco import coco
from shards.sources.image_files import ImageFiles
from shards.sources.records import WHOLE, Record, Source, source_of
from shards.sources.table import table_splits

ENDINGS = (".npy", ".npz")


class Features:
    """``pack features``."""

    names = ("features",)
    help = "features of others, a .npy or .npz an image, with captions from COCO's json or a table"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add(
            "--features", type=Path, nargs="+", required=True, metavar="DIR|ZIP",
            help="files named like the images, or by their ids: [D], [P, D] (P may vary) or [D, h, w]",
        )  # fmt: skip
        captions = parser.add_mutually_exclusive_group(required=True)
        captions.add_argument("--captions", type=Path, metavar="JSON", help="COCO's captions_*.json")
        captions.add_argument("--table", type=Path, nargs="+", metavar="FILE", help="image names and captions")
        add("--dtype", choices=("float16", "float32"), default="float16", help="of the stored numbers (float16)")

    def read(self, arguments: argparse.Namespace, scratch: Path) -> dict[str, Source]:
        if arguments.captions:
            splits = {WHOLE: coco(arguments.features, arguments.captions)}
        else:
            splits = table_splits(arguments.features, arguments.table)
        files = ImageFiles(arguments.features)
        by_stem = {PurePosixPath(name).stem: name for name in files.names() if name.endswith(ENDINGS)}
        if not by_stem:
            raise InputError(f"No .npy or .npz in {', '.join(map(str, arguments.features))}.")
        about = _about(files, next(iter(by_stem.values())), arguments.dtype)
        path = arguments.captions or arguments.table[0]
        return {name: _with_features(source, by_stem, about, path) for name, source in splits.items()}


def _with_features(source: Source, by_stem: dict[str, str], about: dict[str, Any], path: Path) -> Source:
    """The source with the file of features in place of each image's, by the name of the image, else by its id."""
    records: list[Record] = []
    for record in source.records:
        stem = PurePosixPath(record.image).stem
        name = by_stem.get(stem) or by_stem.get(str(record.image_id))
        if name is not None:
            records.append(replace(record, image=name))
    left_out = {**source.left_out, "images without a file of features": len(source.records) - len(records)}
    return replace(source_of(source.images, records, left_out, path), features=about)


def _about(files: ImageFiles, first: str, dtype: str) -> dict[str, Any]:
    """What NAME.json says of features like those in the file ``first``; see captioning/data/stored_features.py."""
    try:
        array = as_places(read_array(files.read(first)))
    except (OSError, ValueError) as error:
        raise InputError(f"{first}: {error}") from error
    return {
        "encoder": "features", "weights_sha256": None, "last_stage": None,
        "form": "pooled" if array.ndim == 1 else "grid", "grid_size": None, "size": array.shape[-1],
        "preprocessing": {}, "views": 1, "seed": 0, "dtype": dtype, "batch_size": 1,
    }  # fmt: skip
