"""Seeking into an epoch, and sets so large that only what a rank computes for itself may grow."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from launch.bench.image_set import lengthen
from launch.bench.table import Table

_SELF = "launch.bench.loading_scale"


def first_batches(places: Mapping[str, Path], folder: Path, length: int) -> Table:
    """Seconds from a process that has imported everything to the batch at a place of the epoch."""
    split = lengthen(places["small"], folder / "long", length)
    _child("first", "ours", split, folder / "first", 0)  # encodes the captions, as the first start of a run does
    table = Table(
        f"Seconds to the first batch of an epoch of {length:,} images", ["runner", "at 0 %", "at 50 %", "at 99 %"]
    )
    for name, words in (("ours", "ours: seeks"), ("stock", "stock webdataset: reads again what it skips, undecoded")):
        seconds = [_child("first", name, split, folder / "first", length * percent // 100) for percent in (0, 50, 99)]
        table.rows.append([words, *seconds])
    table.notes.append("in a fresh process each, after its imports; the shards are in the page cache")
    return table


def large_sets() -> list[Table]:
    order = _child("order", 10_000_000)
    rank = _child("rank", 100_000_000, 1024)
    ten = Table("The order of 10 million samples, one process", ["", ""], [[k, v] for k, v in order.items()])
    hundred = Table(
        "One of 1,024 ranks on 100 million samples in 20,000 shards, global batch 32,768",
        ["", ""],
        [[k, v] for k, v in rank.items()],
        ["simulated: a real index, real orders and offset tables of the shards it touches; no image is read"],
    )
    return [ten, hundred]


def _child(*arguments: object):
    done = subprocess.run(
        [sys.executable, "-m", _SELF, *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def _main() -> None:
    match sys.argv[1:]:
        case ["first", name, split, work, position]:
            print(json.dumps(_first(name, Path(split), Path(work), int(position))))
        case ["order", size]:
            print(json.dumps(_order(int(size))))
        case ["rank", size, world_size]:
            print(json.dumps(_rank(int(size), int(world_size))))


def _first(name: str, split: Path, work: Path, position: int) -> float:
    import itertools
    import time

    import webdataset

    from launch.bench.baselines.loaders import BATCH, Transform, collate
    from launch.bench.runner import our_batches
    from shards import index as shard_index

    urls = [str(shard.path) for shard in shard_index.load(split).shards]
    start = time.perf_counter()
    if name == "ours":
        first = position // BATCH
        next(our_batches(split, work).steps(first, first + 1))
    else:
        raw = webdataset.WebDataset(urls, shardshuffle=100).shuffle(1000)
        transform, decoder = Transform({}, False, False), webdataset.autodecode.imagehandler("pil")
        taken = itertools.islice(raw, position, position + BATCH)
        collate([transform(decoder("jpg", sample["jpg"]), []) for sample in taken])
    return time.perf_counter() - start


def _order(size: int) -> dict[str, float]:
    import time

    from shards.order import EpochOrder

    before, start = _memory(), time.perf_counter()
    order = EpochOrder(size, "fingerprint", 0, 0, 256)
    made = time.perf_counter() - start
    held = _memory() - before
    step = 1 << 20
    for position in range(0, size, step):
        order.samples(position, min(size, position + step))
    every = time.perf_counter() - start
    start = time.perf_counter()
    order.samples(size // 2, size // 2 + 256)
    return {
        "seconds until any position can be asked for": made,
        "seconds for all positions": every,
        "milliseconds for a batch of 256 in the middle": 1e3 * (time.perf_counter() - start),
        "MB held": held,
        "MB at most": _peak() - before,
    }


def _rank(size: int, world_size: int) -> dict[str, float]:
    import tempfile
    import time
    from collections import OrderedDict

    from shards import index as shard_index
    from shards.index import Extents
    from shards.order import EpochOrder, rank_part
    from shards.storage import SIDECAR_SUFFIXES

    per_shard, batch, steps = 5000, 32 * world_size, 200
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.json"
        entries = [
            {
                "url": f"train-{n:06d}.tar",
                "nsamples": per_shard,
                "filesize": 10**9 + n,
                "sha256": f"{n:064x}",
                "sidecars": dict.fromkeys(SIDECAR_SUFFIXES, f"{n:064x}"),
            }
            for n in range(size // per_shard)
        ]
        kind = {"__kind__": shard_index.KIND, "name": "train", "fingerprint": "f"}
        path.write_text(json.dumps({**kind, "shardlist": entries}))
        del entries
        before, start = _memory(), time.perf_counter()
        index = shard_index.load(path)
        loaded, index_mb = time.perf_counter() - start, _memory() - before
    start, before = time.perf_counter(), _memory()
    order = EpochOrder(size, "f", 0, 0, batch)
    made, order_mb = time.perf_counter() - start, _memory() - before
    lines = [f"jpg {n * 40960} 34000 {n:012d}.jpg json {n * 40960 + 35840} 400 {n:012d}.json" for n in range(per_shard)]
    idx, crc32 = "\n".join([f"v1.2 {per_shard}", *lines, ""]).encode(), bytes(4 * per_shard)
    tables: OrderedDict[str, Extents] = OrderedDict()
    before, seconds, touched = _memory(), 0.0, set()
    for step in range(steps):
        start = time.perf_counter()
        samples = order.samples(*rank_part(step * batch, (step + 1) * batch, 3, world_size)).tolist()
        for sample in samples:
            shard, number = index.locate(sample)
            touched.add(shard.path.name)
            if shard.path.name not in tables:
                tables[shard.path.name] = Extents(shard, bytes(bytearray(idx)), crc32)
                if len(tables) > 512:  # as shards.index.read_extents keeps
                    tables.popitem(last=False)
            tables[shard.path.name][number]
        seconds += time.perf_counter() - start
    return {
        "seconds to load the index": loaded,
        "MB of the index": index_mb,
        "seconds to make an epoch's order": made,
        "MB of the order": order_mb,
        "milliseconds a step of 32 samples to know shards and offsets": 1e3 * seconds / steps,
        f"shards touched in {steps} steps": float(len(touched)),
        "MB of their offset tables (at most 512 kept)": _memory() - before,
        "MB of the whole process at most, libraries included": _peak(),
    }


def _memory() -> float:
    """Resident memory of this process, MB."""
    import os

    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _peak() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


if __name__ == "__main__":
    _main()
