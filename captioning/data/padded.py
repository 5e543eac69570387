"""The captions of a micro-batch as tensors, and where in them everything is."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PaddedCaptions:
    """N captions of B images, at most K an image and T words a caption, M words in all; made by ``of``.

    ``words`` int64 [N, T], target ids with <end>, padded with <pad>; ``lengths`` int64 [N], targets per caption;
    ``owner`` int64 [N], the row of the image a caption describes.

    The rest follows from these, and is worked out before they go to a device: a shape that depends on values there
    ("how many words are to be predicted?") makes it finish all its work before anybody knows what to ask of it next.
    ``places`` int64 [M], where the targets are in the flattened words, row by row; ``number`` int64 [N], of a caption
    among its image's; ``most``, K; ``running``, for each of the T words how many images have a caption that long; and
    ``earlier`` int64 [T], K times their sum over the words before.
    """

    words: Tensor
    lengths: Tensor
    owner: Tensor
    places: Tensor
    number: Tensor
    earlier: Tensor
    most: int
    running: tuple[int, ...]

    @classmethod
    def of(cls, words: Tensor, lengths: Tensor, owner: Tensor) -> "PaddedCaptions":
        """From words, lengths and owners on the CPU; N may be 0."""
        grouped, order = owner.sort(stable=True)
        among_its_own = torch.arange(len(owner)) - torch.searchsorted(grouped, grouped)
        number = torch.empty_like(owner).index_copy(0, order, among_its_own)
        most = int(number.max()) + 1 if len(number) else 0
        column = torch.arange(words.shape[1])
        places = (column < lengths.unsqueeze(1)).flatten().nonzero().squeeze(1)
        longest = lengths.new_zeros(int(owner.max()) + 1 if len(owner) else 0).scatter_reduce(0, owner, lengths, "amax")
        running = (longest.unsqueeze(1) > column).sum(dim=0)
        earlier = (running.cumsum(0) - running) * most
        return cls(words, lengths, owner, places, number, earlier, most, tuple(running.tolist()))

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def targets(self) -> Tensor:
        """int64 [M], row by row."""
        return self.words.flatten()[self.places]

    def each(self, move: Callable[[Tensor], Tensor]) -> "PaddedCaptions":
        """With every tensor moved."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: move(v) for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)
