"""The images a data benchmark reads: a folder with COCO captions, or drawn ones; packed as originals,
with shorter sides of 256 pixels and with longer sides of 224."""

import json
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from shards import index as shard_index
from shards import sources
from shards.errors import InputError
from shards.packing.index_tars import index_tars
from shards.packing.packer import Settings, pack
from shards.reader import Sample, read_sample
from shards.sources import scenes

DRAWN = 200


def prepare(images: Path | None, captions: Path | None, folder: Path) -> dict[str, Path]:
    """Where the images, their shards as they are, and their shards of smaller images are.

    Raises:
        InputError: when only one of images and captions is given, or they do not fit.
    """
    if (images is None) != (captions is None):
        raise InputError("--images and --captions go together.")
    if images is None or captions is None:
        images, captions = _draw(folder / "drawn")
    places = {"images": images, "work": folder / "work"}
    settings_of = {
        "originals": Settings(short_side=0, shard_mb=8),
        "small": Settings(short_side=256, shard_mb=2),
        "long-side": Settings(long_side=224, shard_mb=2),
    }
    for name, settings in settings_of.items():
        pack(sources.coco(images, captions), "train", folder / name, settings)
        places[name] = folder / name / "train.json"
    return places


def _draw(folder: Path) -> tuple[Path, Path]:
    """Scenes of 640 x 480 pixels with the grain of a photograph, so that they cost as much to decode as one."""
    drawn, captions = scenes.write(folder / "scenes", "train", DRAWN, seed=0)
    images = folder / "images"
    images.mkdir()
    grain = np.random.default_rng(0)
    document = json.loads(captions.read_text())
    for entry in document["images"]:
        with Image.open(drawn / entry["file_name"]) as scene:
            pixels = np.asarray(scene.resize((640, 480)), dtype=np.float32)
        name = f"{Path(entry['file_name']).stem}.jpg"
        grainy = (pixels + grain.normal(0, 12, pixels.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(grainy).save(images / name, quality=90)
        entry["file_name"] = name
    captions.write_text(json.dumps(document))
    return images, captions


def lengthen(split: Path, folder: Path, length: int) -> Path:
    """A split of ``length`` samples made of a few: the same pictures again and again, under other keys."""
    folder.mkdir()
    index = shard_index.load(split)
    samples = [sample for n in range(len(index)) if isinstance(sample := read_sample(index, n), Sample)]
    per_shard = 2000
    for start in range(0, length, per_shard):
        tar = folder / f"long-{start // per_shard:06d}.tar"
        with tar.open("wb") as file:
            writer = webdataset.TarWriter(file, encoder=False, mtime=0)
            for number in range(start, min(length, start + per_shard)):
                sample = samples[number % len(samples)]
                text = json.dumps({"captions": sample.captions, "image_id": number}).encode()
                writer.write({"__key__": f"{number:09d}", "jpg": sample.image_bytes, "json": text})
            writer.close()
    index_tars([folder], "long")
    return folder / "long.json"
