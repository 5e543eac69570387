"""What LSTM decoders that look at places have in common: additive attention, and the walk through a batch of captions.
Shapes as in lstm.py."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from captioning.data.padded_captions import PaddedCaptions
from captioning.data.vocabulary import PAD
from captioning.model.decoders.fast_cpu import Linear, tanh
from captioning.model.decoders.lstm import words_read
from captioning.model.features import Features


@dataclass(frozen=True)
class Places:
    """What stays the same for an image's captions: ``grid`` [B, P, D] with its ``keys`` [B, P, H], the ``mask`` bool
    [B, P] of the places there are (None: all), and their ``mean`` [B, D]."""

    grid: Tensor
    keys: Tensor
    mask: Tensor | None
    mean: Tensor

    def __getitem__(self, images: slice | Tensor) -> "Places":
        mask = None if self.mask is None else self.mask[images]
        return Places(self.grid[images], self.keys[images], mask, self.mean[images])


@dataclass(frozen=True)
class LookingState:
    """Where each of N captions stands: ``recurrent``, the hidden and cell states [N, H] of its LSTMs; and where it
    looked for the last word: ``weights`` [N, P]. ``places`` are the B images', shared by N / B captions each."""

    places: Places
    recurrent: tuple[Tensor, ...]
    weights: Tensor

    @property
    def hidden(self) -> Tensor:
        """[N, H]: what the next word is read from."""
        return self.recurrent[-2]

    def select(self, rows: Tensor, images: Tensor | None = None) -> "LookingState":
        """The state of captions ``rows`` [M]. Every image keeps its place and gets M / B of them; or only ``images``
        [I] stay and get M / I each."""
        places = self.places if images is None else self.places[images]
        return LookingState(places, tuple(x[rows] for x in self.recurrent), self.weights[rows])

    def first(self, images: int, captions: int) -> "LookingState":
        """The state of the first ``images`` images, with ``captions`` captions each."""
        rows = images * captions
        if len(self.weights) == rows:
            return self
        recurrent = tuple(x[:rows] for x in self.recurrent)
        return LookingState(self.places[:images], recurrent, self.weights[:rows])


class AdditiveAttention(nn.Module):
    """One hidden layer scores each place for a query: Bahdanau et al., https://arxiv.org/abs/1409.0473."""

    def __init__(self, feature_size: int, query_size: int, hidden_size: int):
        super().__init__()
        self.key = Linear(feature_size, hidden_size)
        self.query = Linear(query_size, hidden_size, bias=False)
        self.energy = nn.Linear(hidden_size, 1, bias=False)  # a bias would not change the softmax

    def places(self, features: Features) -> Places:
        return Places(features.grid, self.key(features.grid), features.mask, features.mean())

    def forward(self, places: Places, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [N, H] of B images -> what they get [N, D], and from where: weights float32 [N, P]."""
        queries = self.query(hidden.unflatten(0, (len(places.grid), -1)))  # [B, K, H]
        energy = self.energy(tanh(places.keys.unsqueeze(1) + queries.unsqueeze(2))).squeeze(-1).float()
        if places.mask is not None:
            energy = energy.masked_fill(~places.mask.unsqueeze(1), torch.finfo(energy.dtype).min)
        weights = energy.softmax(dim=-1)  # [B, K, P]
        return (weights.to(places.grid.dtype) @ places.grid).flatten(0, 1), weights.flatten(0, 1)


def unroll(
    start: LookingState,
    advance: Callable[[LookingState, Tensor], LookingState],
    embed: Callable[[Tensor], Tensor],
    order: Tensor,
    captions: PaddedCaptions,
) -> tuple[Tensor, Tensor]:
    """Teacher forcing of N captions with M targets: hidden [M, H] and weights [M, P], caption by caption.

    ``start`` holds the B images in ``order``: from the one with the longest caption on, so that step t works on those
    that still have a word to come. ``embed`` makes [.., E] of the words they read. With at most two captions an image::

        image   slot   t = 0  1    2    3       rows of step t: the first active_images[t] images, two slots each,
        B       0      a      dog  runs <end>   one step's below the other's; row_offset says where a step's begin.
                1      it     <end>             What was computed in places without a word is not picked out.
        A       2      a      cat  <end>
                3      -
        active_images  2      2    2    1
        row_offset     0      4    8    12
    """
    words, most = captions.token_ids, captions.max_captions_per_image
    slot = order.argsort()[captions.image_index] * most + captions.caption_index
    read = words.new_full((len(order) * most, words.shape[1]), PAD)
    read[slot] = words_read(captions)
    embedded = embed(read)
    state, hidden, weights = start.select(torch.arange(len(read), device=words.device) // most), [], []
    for t, images in enumerate(count for count in captions.active_images if count):
        state = advance(state.first(images, most), embedded[: images * most, t])
        hidden.append(state.hidden)
        weights.append(state.weights)
    rows = (captions.row_offset + slot.unsqueeze(1)).flatten()[captions.target_index]
    return torch.cat(hidden)[rows], torch.cat(weights)[rows]


def longest_first(captions: PaddedCaptions, images: int) -> Tensor:
    """The images' numbers int64 [B], those with the longest captions first."""
    longest = captions.lengths.new_zeros(images).scatter_reduce(0, captions.image_index, captions.lengths, "amax")
    return longest.argsort(descending=True)
