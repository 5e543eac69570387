"""What of a split's samples goes to the model, pixels or stored features, and how a batch of it lies in memory."""

import io
import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from captioning.data.stored_features import StoredFeatures, stored_features
from captioning.data.transforms import Preprocessing, View
from shards.dataset import EpochSample
from shards.images import UnreadableImageError
from shards.index import Index
from shards.reader import Sample


class Buffer(Protocol):
    """A batch in the making."""

    def add(self, one: Any) -> None:
        """One more image's."""

    @property
    def inputs(self) -> Tensor:
        """Of the B images added: uint8 pixels [B, 3, S, S], or floating features [B, D] or [B, P, D]."""

    @property
    def valid(self) -> Tensor | None:
        """What of them is the image: see ``Captioner.encode``; None: all."""


class Inputs(Protocol):
    """How a sample becomes one image's part of a batch."""

    def for_training(self, sample: EpochSample) -> Any:
        """Raises UnreadableImageError when the sample's bytes are not what they should be."""

    def for_evaluation(self, sample: Sample) -> Any:
        """The same for what is scored: nothing random."""

    def buffer(self, most: int) -> Buffer:
        """For at most as many images."""


def inputs_for(index: Index, preprocessing: Preprocessing) -> "PixelInputs | FeatureInputs":
    """What a split holds: features, where it says so, else images."""
    stored = stored_features(index)
    return PixelInputs(preprocessing) if stored is None else FeatureInputs(stored)


@dataclass(frozen=True)
class PixelInputs:
    """Images, decoded and cut."""

    preprocessing: Preprocessing
    view_of: None = None

    def for_training(self, sample: EpochSample) -> Any:
        return self.preprocessing.for_training(sample.image_bytes, sample.run_seed, sample.epoch, sample.place)

    def for_evaluation(self, sample: Sample) -> Any:
        return self.preprocessing.for_evaluation(sample.image_bytes)

    def buffer(self, most: int) -> "PixelBuffer":
        return PixelBuffer(most, self.preprocessing.image_size)


@dataclass(frozen=True)
class FeatureInputs:
    """Features that an encoder gave once."""

    stored: StoredFeatures

    @property
    def view_of(self) -> Any:
        return self.stored.view_of if self.stored.views > 1 else None

    def for_training(self, sample: EpochSample) -> np.ndarray:
        return self.for_evaluation(sample)

    def for_evaluation(self, sample: Sample) -> np.ndarray:
        return read_features(sample.image_bytes, self.stored)

    def buffer(self, most: int) -> "FeatureBuffer | PaddedGridBuffer":
        return PaddedGridBuffer(self.stored) if self.stored.padded else FeatureBuffer(self.stored)


def read_features(data: bytes, stored: StoredFeatures) -> np.ndarray:
    """The array in a .npy file: [D], [P, D] or [h, w, D], over the file's own bytes.

    Raises:
        UnreadableImageError: when it is no such file, or not of this form.
    """
    try:
        array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UnreadableImageError(f"no .npy file ({error})") from error
    dimensions = 1 if stored.form == "pooled" else 3 if stored.padded else 2
    if array.ndim != dimensions or array.shape[-1] != stored.size or array.dtype != stored.dtype or not array.size:
        raise UnreadableImageError(
            f"features {array.dtype} {list(array.shape)}, not {stored.dtype} {stored.form} of {stored.size}"
        )
    return array


class PixelBuffer:
    """The images of a batch, each copied to its place when it was decoded: it is still in the cache then."""

    def __init__(self, most: int, image_size: int):
        self._rows = _empty((most, image_size, image_size, 3), torch.uint8)
        self._count = 0
        self._valid: list[tuple[int, int, int, int]] = []

    def add(self, view: View) -> None:
        """One more."""
        self._rows[self._count].copy_(view.pixels.permute(1, 2, 0))
        self._count += 1
        if view.valid is not None:
            self._valid.append(view.valid)

    @property
    def valid(self) -> Tensor | None:
        """int32 [B, 4]; None where no image was padded."""
        return torch.tensor(self._valid, dtype=torch.int32) if self._valid else None

    @property
    def inputs(self) -> Tensor:
        """uint8 [B, 3, S, S], channels last in memory: as decoders write them and convolutions like them."""
        return self._rows[: self._count].permute(0, 3, 1, 2)


class FeatureBuffer:
    """Features of a batch. Images with fewer places than others are filled up with zeros, which ``valid`` tells."""

    def __init__(self, stored: StoredFeatures):
        self._stored = stored
        self._rows: list[np.ndarray] = []

    def add(self, features: np.ndarray) -> None:
        """One more, [D] or [P, D]."""
        self._rows.append(features)

    @property
    def inputs(self) -> Tensor:
        """[B, D] or [B, P, D], as stored."""
        places = () if self._stored.form == "pooled" else (max([len(row) for row in self._rows], default=1),)
        dtype = getattr(torch, self._stored.dtype)
        batch = _empty((len(self._rows), *places, self._stored.size), dtype)
        into = batch.numpy()
        for number, row in enumerate(self._rows):
            if places:
                into[number, : len(row)] = row
                into[number, len(row) :] = 0
            else:
                into[number] = row
        return batch

    @property
    def valid(self) -> Tensor | None:
        """Which places there are, bool [B, P]; None for vectors, and for grids. Features of others may be boxes, and
        whether they are is not to depend on what shares a batch: their places are always told."""
        if self._stored.form == "pooled" or self._stored.weights_sha256 is not None:
            return None
        places = torch.tensor([len(row) for row in self._rows], dtype=torch.int64)
        return torch.arange(max(places.tolist(), default=1)) < places.unsqueeze(1)


class PaddedGridBuffer:
    """Grids [h, w, D] of padded images, each put back to where it was in the square of the longest side: the middle, as
    the image was in the pixels."""

    def __init__(self, stored: StoredFeatures):
        self._stored = stored
        self._grids: list[np.ndarray] = []

    def add(self, grid: np.ndarray) -> None:
        """One more."""
        self._grids.append(grid)

    @property
    def inputs(self) -> Tensor:
        """[B, P, D], as stored; padding is zero."""
        shape = (len(self._grids), self._side, self._side, self._stored.size)
        batch = _empty(shape, getattr(torch, self._stored.dtype))
        into = batch.zero_().numpy()
        for square, grid in zip(into, self._grids, strict=True):
            _middle(square, grid)[...] = grid
        return batch.flatten(1, 2)

    @property
    def valid(self) -> Tensor:
        """bool [B, side, side]"""
        squares = np.zeros((len(self._grids), self._side, self._side), dtype=bool)
        for square, grid in zip(squares, self._grids, strict=True):
            _middle(square, grid)[...] = True
        return torch.from_numpy(squares)

    @property
    def _side(self) -> int:
        return max((max(grid.shape[:2]) for grid in self._grids), default=1)


def _middle(square: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """The part of a square [S, S, ..] in which a grid [h, w, ..] was. An odd pixel of padding comes after the image, so
    there is never a place more before it than after it, at most one fewer."""
    height, width = grid.shape[:2]
    top, left = (len(square) - height) // 2, (len(square) - width) // 2
    return square[top : top + height, left : left + width]


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """In a worker process, memory that the rank sees too, as torch's own collation takes: else sending it copies it."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    shared = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(shared).view(shape)
