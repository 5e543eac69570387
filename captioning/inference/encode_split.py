"""A split of images -> a split of what a frozen encoder makes of them, by any number of processes.

Shards take a fixed number of samples of the split's own order, and batches a fixed number of a shard's: which images
are encoded together does not depend on who encodes them, so neither do the bytes. Rank r of W makes every W-th shard.
A shard is finished when its tar is there: an encoding that was killed leaves whole shards, and the same command makes
the rest.
"""

import io
import json
import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import webdataset
from torch import Tensor

from captioning.config import Config
from captioning.data.dataset import EvaluationBatches
from captioning.data.stored_features import TRAINING_ONLY, StoredFeatures, stored_features
from captioning.data.transforms import preprocessing_of
from captioning.distributed.ranks import Ranks
from captioning.model.captioner import encoder_features
from captioning.model.encoders import Encoder
from captioning.model.encoders.weights import weights_sha256
from captioning.runs.progress import Progress
from shards import index as shard_index
from shards import storage
from shards.errors import InputError
from shards.index import Index
from shards.packing.merge import merge, packed_in
from shards.packing.plan import tar_names
from shards.packing.shard_writer import Written, is_finished, refuse_another_packing, write_shard
from shards.workers import read_ahead

_CARRIED = ("short_side", "long_side", "quality", "adopted")  # of the images' packing: what `audit` compares


@dataclass(frozen=True)
class FrozenEncoder:
    """An encoder and what it is shown; it computes in float32. ``config`` has its name, preprocessing and, for a grid,
    ``grid_size``."""

    encoder: Encoder
    config: Config
    pooled: bool
    device: torch.device

    @torch.inference_mode()
    def __call__(self, images: Tensor, valid: Tensor | None, dtype: str) -> list[np.ndarray]:
        """uint8 [B, 3, S, S], and where in them the images are (see ``Captioner.encode``) -> each image's [D] or
        [P, D]; of a padded one's grid, the h rows and w columns that show any of it, [h, w, D].

        Raises:
            InputError: when a feature is no finite number of this type.
        """
        where = None if valid is None else valid.to(self.device)
        grid_size = self.config.encoder.grid_size
        seen = encoder_features(self.encoder, images.to(self.device), self.pooled, grid_size, where)
        features = seen.grid
        stored = features.float().cpu().to(getattr(torch, dtype))
        if not bool(stored.isfinite().all()):
            raise InputError(
                f"A feature of this encoder is no finite {dtype} number (the largest that are: "
                f"{float(features.float().abs().max()):.3g}). Try --dtype float32; weights that diverged stay so."
            )
        return list(stored.numpy()) if seen.mask is None else _unpadded(stored, seen.mask.cpu())


@dataclass(frozen=True)
class Encoding:
    """How features are stored. ``views`` 1: of the image as it is evaluated; N: of N epochs' random crops."""

    views: int = 1
    dtype: str = "float16"
    batch_size: int = 32
    samples_per_shard: int = 1024


def encode_split(
    index: Index, model: FrozenEncoder, out: Path, how: Encoding, ranks: Ranks, workers: int = 0,
    on_progress: Progress = lambda done, total: None,
) -> Index:  # fmt: skip
    """Encode every image of a split once (each of N views once) with all ranks, which share the folder ``out``; an
    encoding that was interrupted is continued. Unreadable images are left out and listed, as in packing.

    Raises:
        InputError: on every rank, when ``out`` holds other shards of this name, or one of them cannot read or write.
    """
    if stored_features(index) is not None:
        raise InputError(f"{index.path} holds features already. Name a split of images.")
    model.encoder.train_from("none")
    model.encoder.eval()
    made_by = _made_by(index, model, how)
    work = _Work(index, model, out, how, made_by, workers)
    objection: str | None = None
    try:
        shard_index.refuse_another_file(out / f"{index.name}.json")
        refuse_another_packing(out, index.name, packed_in(out, index.name), made_by)
        out.mkdir(parents=True, exist_ok=True)
    except (InputError, OSError) as error:
        objection = str(error)
    names = tar_names(index.name, made_by)
    for first in range(0, len(names), ranks.world_size):
        number = first + ranks.rank
        if objection is None and number < len(names):
            objection = work.make(number, names[number])
        if ranks.all_reduce_sum([objection is not None])[0]:
            raise InputError(next(filter(None, ranks.all_gather(objection))))
        on_progress(min(len(index), (first + ranks.world_size) * how.samples_per_shard), len(index))
    ranks.run_on_main(lambda _: bool(merge(index.name, out)), lambda: False)
    return shard_index.load(out / f"{index.name}.json")


def _made_by(index: Index, model: FrozenEncoder, how: Encoding) -> dict[str, Any]:
    """What tells one encoding of a split from another; as JSON gives it back."""
    config, preprocessing = model.config, asdict(preprocessing_of(model.config))
    stored = StoredFeatures(
        encoder=config.encoder.name,
        weights_sha256=weights_sha256(model.encoder.state_dict()),
        last_stage=config.encoder.last_stage,
        form="pooled" if model.pooled else "grid",
        grid_size=None if model.pooled else config.encoder.grid_size,
        size=model.encoder.feature_size,
        preprocessing={k: v for k, v in preprocessing.items() if how.views > 1 or k not in TRAINING_ONLY},
        views=how.views,
        seed=config.seed,
        dtype=how.dtype,
        batch_size=how.batch_size,
    )
    packing = index.document.get("packing", {})
    carried = {name: packing[name] for name in _CARRIED if name in packing}
    made_by = {
        "records": index.fingerprint,
        "left_out": index.document.get("left_out", {}),
        "packing": {**carried, "made_of": index.fingerprint, "features": stored.to_json()},
        "samples_per_shard": how.samples_per_shard,
        "shards": -(-len(index) // how.samples_per_shard),
    }
    return json.loads(json.dumps(made_by))


@dataclass(frozen=True)
class _Work:
    index: Index
    model: FrozenEncoder
    out: Path
    how: Encoding
    made_by: dict[str, Any]
    workers: int

    def make(self, number: int, name: str) -> str | None:
        """Write shard ``number``, unless it is finished; what is wrong if it cannot be."""
        tar = self.out / name
        try:
            if not is_finished(tar, self.made_by):
                start = number * self.how.samples_per_shard
                stop = min(len(self.index), start + self.how.samples_per_shard)
                write_shard(tar, self.made_by, lambda file: self._write(file, start, stop), self.how.views)
        except (InputError, OSError) as error:
            return f"{tar} cannot be written: {error}\nFinished shards stay: the same command makes the rest."
        return None

    def _write(self, file: BinaryIO, start: int, stop: int) -> Written:
        texts = _texts(self.index, start, stop)
        samples, skipped = [], []
        # No time stamp, so that the same input gives the same bytes.
        with closing(webdataset.TarWriter(file, encoder=False, mtime=0)) as writer:
            for numbers, views, unreadable in self._batches(start, stop):
                for row, number in enumerate(numbers):
                    text = texts[number - start]
                    stored = {name: text[name] for name in ("captions", "image_id", "label") if text[name] is not None}
                    content = json.dumps(stored, ensure_ascii=False).encode()
                    features = {ending: _npy(view[row]) for ending, view in views.items()}
                    writer.write({"__key__": text["key"], **features, "json": content})
                    samples.append(text)
                skipped += unreadable
        return samples, skipped

    def _batches(self, start: int, stop: int) -> Iterator[tuple[list[int], dict[str, list[np.ndarray]], list[dict]]]:
        """Each batch's readable samples, their features by the ending of their file, and the unreadable ones."""
        how = self.how
        plain = EvaluationBatches(self.index, preprocessing_of(self.model.config))
        width = len(str(how.views - 1))
        for view_of_batch in _grouped(self._read(plain, start, stop), how.views):
            kept = set.intersection(*(set(batch.samples) for batch in view_of_batch))
            unreadable = {str(one): one for batch in view_of_batch for one in batch.unreadable}
            numbers = sorted(kept)
            views = {}
            for number, batch in enumerate(view_of_batch):
                rows = [row for row, sample in enumerate(batch.samples) if sample in kept]
                ending = "npy" if how.views == 1 else f"{number:0{width}d}.npy"
                if rows:
                    valid = None if batch.valid is None else batch.valid[rows]
                    views[ending] = self.model(batch.inputs[rows], valid, how.dtype)
            yield numbers, views, [{"image": one.key, "reason": one.reason} for one in unreadable.values()]

    def _read(self, plain: EvaluationBatches, start: int, stop: int) -> Iterator[Any]:
        """Batches of pixels; of several views each one after another."""
        how, seed = self.how, self.model.config.seed
        seen = [plain] if how.views == 1 else [replace(plain, augmented=(seed, view)) for view in range(how.views)]
        parts = [
            (view, (first, min(stop, first + how.batch_size)))
            for first in range(start, stop, how.batch_size)
            for view in range(how.views)
        ]
        return read_ahead(_Views(seen), parts, min(self.workers, len(parts)))


@dataclass(frozen=True)
class _Views(torch.utils.data.Dataset):
    """(view, (start, stop)) -> that batch."""

    seen: list[EvaluationBatches]

    def __getitem__(self, place: tuple[int, tuple[int, int]]) -> Any:
        view, part = place
        return self.seen[view][part]


def _grouped(batches: Iterator[Any], size: int) -> Iterator[list[Any]]:
    group = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []


def _unpadded(grids: Tensor, masks: Tensor) -> list[np.ndarray]:
    """Square grids [B, P, D] with masks bool [B, P], each of a rectangle -> the rectangles' places [h, w, D]."""
    side = math.isqrt(masks.shape[1])
    cut = []
    for grid, mask in zip(grids.unflatten(1, (side, side)), masks.unflatten(1, (side, side)), strict=True):
        cut.append(grid[mask.any(dim=1)][:, mask.any(dim=0)].numpy())
    return cut


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _texts(index: Index, start: int, stop: int) -> list[dict[str, Any]]:
    """What lies beside the tars of samples start .. stop - 1: captions, and the hashes of their images."""
    samples, first = [], 0
    for shard in index.shards:
        low, high = max(start - first, 0), min(stop - first, shard.nsamples)
        if low < high:
            shard_index.read_texts(shard)  # which checks that they are this shard's
            samples += json.loads(storage.read_all(shard.path.with_suffix(".captions.json")))["samples"][low:high]
        first += shard.nsamples
    return samples
