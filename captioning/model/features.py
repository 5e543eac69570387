"""What a decoder sees of images, and which of its places there are."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Features:
    """Features of B images.

    ``grid`` [B, P, D] for decoders that look at places; for the others one vector an image [B, D]. ``mask`` bool [B, P]
    says which places there are: nothing is ever read from the others, whatever stands there; None: all are. Each image
    has at least one. ``square``: the places are those of a square grid, row by row; else they are anywhere, as boxes
    that a detector found.
    """

    grid: Tensor
    mask: Tensor | None = None
    square: bool = True

    def __len__(self) -> int:
        return len(self.grid)

    def __getitem__(self, images: slice | Tensor) -> "Features":
        return replace(self, grid=self.grid[images], mask=None if self.mask is None else self.mask[images])

    @property
    def device(self) -> torch.device:
        return self.grid.device

    def detach(self) -> "Features":
        return replace(self, grid=self.grid.detach())

    def mean(self) -> Tensor:
        """[B, D]: the mean over an image's places."""
        if self.mask is None:
            return self.grid.mean(dim=1)
        present = self.mask.unsqueeze(2)
        return self.grid.masked_fill(~present, 0).sum(dim=1) / present.sum(dim=1)


def valid_places(valid: Tensor, rows: int, columns: int, image_size: int) -> Tensor:
    """Which places of a grid over images of ``image_size`` pixels show any of the image: bool [B, rows, columns], from
    where it is in the pixels, ``valid`` int [B, 4] (left, top, right, bottom)."""
    left, top, right, bottom = valid.unbind(1)
    by_row = _covered(top, bottom, rows, image_size)
    by_column = _covered(left, right, columns, image_size)
    return by_row.unsqueeze(2) & by_column.unsqueeze(1)


def masked_mean(grid: Tensor, valid: Tensor | None, image_size: int) -> Tensor:
    """Feature map [B, D, h, w] -> [B, D], the mean over the places that show any of the image (see valid_places)."""
    if valid is None:
        return grid.mean(dim=(2, 3))
    present = valid_places(valid, grid.shape[2], grid.shape[3], image_size).unsqueeze(1)
    return (grid * present).sum(dim=(2, 3)) / present.sum(dim=(2, 3))


def _covered(start: Tensor, stop: Tensor, places: int, image_size: int) -> Tensor:
    """bool [B, places]: whether a place along one side overlaps [start, stop)."""
    edges = torch.arange(places + 1, device=start.device) * image_size  # times ``places``: exact, as fractions are not
    return (edges[:-1] < places * stop.unsqueeze(1)) & (edges[1:] > places * start.unsqueeze(1))
