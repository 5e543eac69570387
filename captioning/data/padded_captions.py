"""The captions of a micro-batch as tensors, and where in them everything is."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captioning.data.vocabulary import PAD


@dataclass(frozen=True)
class PaddedCaptions:
    """N captions of B images, at most K an image and T words a caption, M words in all; made by ``of``.

    ``token_ids`` int64 [N, T], target ids with <end>, padded with <pad>; ``lengths`` int64 [N], targets per caption;
    ``image_index`` int64 [N], the row of the image a caption describes.

    The rest follows from these, and is worked out before they go to a device: a shape that depends on values there
    ("how many words are to be predicted?") makes it finish all its work before anybody knows what to ask of it next.
    ``target_index`` int64 [M], where the targets are in the flattened ``token_ids``, row by row; ``caption_index``
    int64 [N], a caption's number among its image's; ``max_captions_per_image``, K; ``active_images``, for each of the T
    words how many images have a caption that long; and ``row_offset`` int64 [T], K times their sum over earlier words.

    ``read_ids`` int64 [N, T], words that the decoder reads in place of ``token_ids`` before it predicts the next one;
    None: those themselves, as teacher forcing has it.
    """

    token_ids: Tensor
    lengths: Tensor
    image_index: Tensor
    target_index: Tensor
    caption_index: Tensor
    row_offset: Tensor
    max_captions_per_image: int
    active_images: tuple[int, ...]
    read_ids: Tensor | None = None

    @classmethod
    def of(cls, token_ids: Tensor, lengths: Tensor, image_index: Tensor) -> "PaddedCaptions":
        """From token ids, lengths and image indices on the CPU; N may be 0."""
        grouped, order = image_index.sort(stable=True)
        among_its_own = torch.arange(len(image_index)) - torch.searchsorted(grouped, grouped)
        caption_index = torch.empty_like(image_index).index_copy(0, order, among_its_own)
        most = int(caption_index.max()) + 1 if len(caption_index) else 0
        column = torch.arange(token_ids.shape[1])
        target_index = (column < lengths.unsqueeze(1)).flatten().nonzero().squeeze(1)
        images = int(image_index.max()) + 1 if len(image_index) else 0
        longest = lengths.new_zeros(images).scatter_reduce(0, image_index, lengths, "amax")
        active = (longest.unsqueeze(1) > column).sum(dim=0)
        row_offset = (active.cumsum(0) - active) * most
        return cls(
            token_ids, lengths, image_index, target_index, caption_index, row_offset, most, tuple(active.tolist())
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def followed_by(self, others: "PaddedCaptions") -> "PaddedCaptions":
        """These captions and then ``others`` of the same images; all on the CPU."""
        longest = max(self.token_ids.shape[1], others.token_ids.shape[1])
        both = [F.pad(x.token_ids, (0, longest - x.token_ids.shape[1]), value=PAD) for x in (self, others)]
        return PaddedCaptions.of(
            torch.cat(both),
            torch.cat([self.lengths, others.lengths]),
            torch.cat([self.image_index, others.image_index]),
        )

    @property
    def targets(self) -> Tensor:
        """int64 [M], row by row."""
        return self.token_ids.flatten()[self.target_index]

    def each(self, move: Callable[[Tensor], Tensor]) -> "PaddedCaptions":
        """With every tensor moved."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: move(v) for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)
