"""One runner in a process of its own, on its cores: ``python -m launch.bench.runner NAME PLACES CORES WORKERS``.

It reads a number of seconds a line, works that long, and answers ``images processor-seconds``. A runner whose
library is not installed says so in its first line.
"""

import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# name -> captions an image, and what is done; PLACES (json) says where the images are
NAMES = {
    "baseline": (1, "baseline script: one caption a sample, Pillow on originals, float, tokenizing"),
    "webdataset-originals": (5, "stock webdataset on originals, float, tokenizing"),
    "webdataset-float": (5, "stock webdataset, float, tokenizing"),
    "webdataset-uint8": (0, "stock webdataset, uint8, no captions"),
    "mosaic": (5, "MosaicML streaming, uint8, tokenizing"),
    "mosaic-uint8": (0, "MosaicML streaming, uint8, no captions"),
    "litdata": (5, "LitData, uint8, tokenizing"),
    "litdata-uint8": (0, "LitData, uint8, no captions"),
    "ffcv": (0, "FFCV, random crop, uint8, no captions"),
    "dali": (0, "NVIDIA DALI on the CPU, uint8, captions as raw json"),
    "decoding": (0, "bare JPEG decoding, our decoder, bytes in memory"),
    "ours": (5, "ours, uint8, five encoded captions"),
    "squash": (5, "ours, data.crop_mode=squash"),
    "squash-long": (5, "ours, data.crop_mode=squash, from shards of --long-side 224"),
    "pad": (5, "ours, data.crop_mode=pad"),
    "pad-long": (5, "ours, data.crop_mode=pad, from shards of --long-side 224"),
}


def main() -> None:
    name, places, cores, workers = sys.argv[1:]
    multiprocessing.set_start_method("fork")  # Python 3.14 has another default, which takes no lambda of a pipeline
    _import_all()  # on all cores; threads and processes made from here on stay on the given ones
    os.sched_setaffinity(0, map(int, cores.split(",")))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not an answer
    try:
        batches = _batches(name, {key: Path(value) for key, value in json.loads(places).items()}, int(workers))
        next(batches)
    except (ImportError, OSError, AttributeError) as error:
        print(f"missing {type(error).__name__}: {error}".replace("\n", " "), file=answers)
        return
    print("ready", file=answers)
    for line in sys.stdin:
        stop, images, cpu = time.perf_counter() + float(line), 0, _cpu_seconds()
        while time.perf_counter() < stop:
            images += next(batches)
        print(images, _cpu_seconds() - cpu, file=answers)


def _import_all() -> None:
    import torch
    import torchvision  # noqa: F401

    import launch.bench.baselines.loaders  # noqa: F401

    torch.set_num_threads(1)


def _cpu_seconds() -> float:
    """Of all threads of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _batches(name: str, places: dict[str, Path], workers: int) -> Iterator[int]:
    from launch.bench.baselines import loaders

    small, originals, work = places["small"], places["originals"], places["work"] / name
    ids: Callable[[], dict[str, int]] = lambda: loaders.vocabulary_of(small)  # noqa: E731
    match name:
        case "baseline":
            return _baseline(places["images"], originals, ids(), workers)
        case "webdataset-originals":
            return loaders.webdataset(originals, workers, ids(), floats=True, tokenize=True)
        case "webdataset-float":
            return loaders.webdataset(small, workers, ids(), floats=True, tokenize=True)
        case "webdataset-uint8":
            return loaders.webdataset(small, workers, {}, floats=False, tokenize=False)
        case "mosaic" | "mosaic-uint8":
            return loaders.mosaic(small, work, workers, ids(), tokenize=name == "mosaic")
        case "litdata" | "litdata-uint8":
            return loaders.litdata(small, work, workers, ids(), tokenize=name == "litdata")
        case "ffcv":
            return loaders.ffcv(small, work, workers)
        case "dali":
            return loaders.dali(small, workers)
        case "decoding":
            return loaders.bare_decoding(small, workers)
        case "ours":
            return _ours(small, work, workers)
        case "squash" | "pad":
            return _ours(small, work, workers, name)
        case "squash-long" | "pad-long":
            return _ours(places["long-side"], work, workers, name.removesuffix("-long"))
    raise ValueError(name)


def _baseline(images: Path, originals: Path, ids: dict[str, int], workers: int) -> Iterator[int]:
    from torch.utils.data import DataLoader

    from launch.bench.baselines import loaders, script
    from shards import index as shard_index

    file_of = {path.stem: path for path in images.iterdir()}
    texts = shard_index.load(originals).texts()
    pairs = [(file_of[text.key], caption) for text in texts for caption in text.captions]
    dataset = script.BaselineCaptions(pairs, ids, 256, loaders.CROP)
    return loaders.endless(
        DataLoader(dataset, loaders.BATCH, shuffle=True, num_workers=workers, collate_fn=script.baseline_collate)
    )


def _ours(split: Path, work: Path, workers: int, crop_mode: str = "crop") -> Iterator[int]:
    for micro_batches in our_batches(split, work, workers, crop_mode).steps(0, 10**6):
        yield sum(len(batch.keys) for batch in micro_batches)


def our_batches(split: Path, work: Path, workers: int = 0, crop_mode: Any = "crop"):
    """The training batches of one process."""
    from captioning.data import captions as encoded
    from captioning.data.captions import EncodedCaptions
    from captioning.data.dataset import train_dataset
    from captioning.data.transforms import Preprocessing
    from launch.bench.baselines.loaders import BATCH, CROP
    from shards import index as shard_index

    index = shard_index.load(split)
    if not (work / "about.json").exists():
        encoded.encode(index, work, threshold=1, max_words=20)
    preprocessing = Preprocessing(256, CROP, True, crop_mode)
    sizes = {"global_batch_size": BATCH, "micro_batch_size": BATCH, "num_workers": workers}
    return train_dataset(index, EncodedCaptions(work), preprocessing, 5, **sizes, rank=0, world_size=1)


if __name__ == "__main__":
    main()
