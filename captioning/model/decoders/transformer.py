"""A Transformer decoder over the image's grid: Vaswani et al., "Attention Is All You Need"
(https://arxiv.org/abs/1706.03762), normalised before each part rather than after. Shapes as in lstm.py."""

from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captioning.config import DecoderConfig
from captioning.data.padded_captions import PaddedCaptions
from captioning.data.vocabulary import PAD
from captioning.model.decoders.fast_cpu import Linear, linear
from captioning.model.decoders.lstm import words_read
from captioning.model.features import Features

KeysValues = tuple[Tensor, Tensor]  # each [rows, heads, places or words, H / heads]


@dataclass(frozen=True)
class TransformerState:
    """Where each of N captions stands: for every layer the keys and values of its ``words`` so far, and those of the
    B ``images``, shared by N / B captions each, with the ``mask`` bool [B, P] of their places; where it looked for the
    last word: ``weights`` [N, P]."""

    images: tuple[KeysValues, ...]
    mask: Tensor | None
    words: tuple[KeysValues, ...] = ()
    weights: Tensor | None = None

    def select(self, rows: Tensor, images: Tensor | None = None) -> "TransformerState":
        """The state of captions ``rows`` [M]. Every image keeps its place and gets M / B of them; or only ``images``
        [I] stay and get M / I each."""
        weights = None if self.weights is None else self.weights[rows]
        words = tuple((k[rows], v[rows]) for k, v in self.words)
        if images is None:
            return replace(self, words=words, weights=weights)
        mask = None if self.mask is None else self.mask[images]
        return TransformerState(tuple((k[images], v[images]) for k, v in self.images), mask, words, weights)


class TransformerDecoder(nn.Module):
    """Places attend to each other, in ``encoder_layers`` layers; words attend to earlier words and to the places. Word
    embeddings are also the classifier's weights (Press & Wolf, https://arxiv.org/abs/1608.05859); positions of words
    and places are sinusoids, so no length is too long."""

    uses_grid = True

    def __init__(self, config: DecoderConfig, feature_size: int, vocabulary_size: int):
        super().__init__()
        width = config.hidden_size
        self.vocabulary_size = vocabulary_size
        self.embedding = nn.Embedding(vocabulary_size, width, padding_idx=PAD)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.bias = nn.Parameter(torch.zeros(vocabulary_size))
        self.place = nn.Sequential(Linear(feature_size, width), nn.LayerNorm(width))
        refining = (RefiningLayer(width, config.num_heads, config.dropout) for _ in range(config.encoder_layers))
        self.refining = cast("list[RefiningLayer]", nn.ModuleList(refining))
        self.refined = nn.LayerNorm(width) if config.encoder_layers else nn.Identity()
        layers = (Layer(width, config.num_heads, config.dropout) for _ in range(config.num_layers))
        self.layers = cast("list[Layer]", nn.ModuleList(layers))
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, features: Features, captions: PaddedCaptions) -> tuple[Tensor, Tensor]:
        """Teacher forcing: N captions of M words -> logits [M, V], penalty.

        Logits as LstmDecoder's; the penalty is nothing.
        """
        words, most = captions.token_ids, captions.max_captions_per_image
        slot = captions.image_index * most + captions.caption_index
        read = words.new_full((len(features) * most, words.shape[1]), PAD)
        read[slot] = words_read(captions)
        x = self._embed(read, first=0)
        start = self.start(features)
        for layer, image in zip(self.layers, start.images, strict=True):
            x, _, _ = layer(x, image, start.mask)
        logits = self._classify(x[slot].flatten(0, 1)[captions.target_index])
        return logits, logits.new_zeros(())

    def start(self, features: Features) -> TransformerState:
        """State after the image, one caption an image. Places that are no grid have no positions."""
        grid = self.place(features.grid)
        if features.square:
            grid = grid + _grid_positions(grid.shape[1], grid.shape[2], grid.device)
        for layer in self.refining:
            grid = layer(grid, features.mask)
        grid = self.refined(grid)
        return TransformerState(tuple(layer.cross_attn.keys_values(grid) for layer in self.layers), features.mask)

    def step(self, state: TransformerState, words: Tensor) -> tuple[Tensor, TransformerState]:
        """One word further: words [N] -> logits [N, V] for the next word, and the new state."""
        past = state.words or (None,) * len(self.layers)
        x = self._embed(words.unsqueeze(1), first=state.words[0][0].shape[2] if state.words else 0)
        after, queries = [], x
        for layer, image, before in zip(self.layers, state.images, past, strict=True):
            x, keys_values, queries = layer(x, image, state.mask, before)
            after.append(keys_values)
        weights = self.layers[-1].cross_attn.weights(queries, state.images[-1], state.mask)
        return self._classify(x.squeeze(1)), replace(state, words=tuple(after), weights=weights)

    def _embed(self, words: Tensor, first: int) -> Tensor:
        embedded = self.embedding(words) * self.embedding.embedding_dim**0.5
        at = torch.arange(first, first + words.shape[1], device=words.device)
        return self.dropout(embedded + _sinusoids(at, self.embedding.embedding_dim))

    def _classify(self, x: Tensor) -> Tensor:
        return linear(self.norm(x), self.embedding.weight, self.bias)


class Layer(nn.Module):
    """Read the caption so far, look at the image, think: each added to what came in."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.self_attn, self.cross_attn = Attention(width, heads), Attention(width, heads)
        self.mlp = _mlp(width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, image: KeysValues, mask: Tensor | None, before: KeysValues | None = None
    ) -> tuple[Tensor, KeysValues, Tensor]:
        """Words x [N, T, H], of whole captions or, with the words ``before``, the next one; the B images' keys and
        values, and the ``mask`` bool [B, P] of their places. Returns the words' new vectors, keys and values of all
        words, and the queries to the image [N, T, H]."""
        normed = self.norms[0](x)
        keys, values = self.self_attn.keys_values(normed)
        if before is not None:
            keys, values = torch.cat([before[0], keys], dim=2), torch.cat([before[1], values], dim=2)
        x = x + self.dropout(self.self_attn(normed, (keys, values), is_causal=before is None))
        queries = self.norms[1](x)
        # All captions of an image are queries to the same keys.
        looked = self.cross_attn(queries.reshape(len(image[0]), -1, queries.shape[2]), image, mask)
        x = x + self.dropout(looked.view_as(x))
        return x + self.dropout(self.mlp(self.norms[2](x))), (keys, values), queries


class RefiningLayer(nn.Module):
    """Places look at each other: each gets what it makes of all of them added."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.self_attn, self.mlp = Attention(width, heads), _mlp(width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Places x [B, P, H], valid where ``mask`` bool [B, P] -> [B, P, H]."""
        normed = self.norms[0](x)
        x = x + self.dropout(self.self_attn(normed, self.self_attn.keys_values(normed), mask))
        return x + self.dropout(self.mlp(self.norms[1](x)))


class Attention(nn.Module):
    """Multi-head scaled dot-product attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.out = Linear(width, width), Linear(width, width)
        self.key_value = Linear(width, 2 * width)

    def keys_values(self, x: Tensor) -> KeysValues:
        keys, values = self.key_value(x).chunk(2, dim=-1)
        return self._split(keys), self._split(values)

    def forward(
        self, x: Tensor, keys_values: KeysValues, mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """x [R, Q, H] and R rows of keys and values, valid where ``mask`` bool [R, P] -> [R, Q, H]."""
        keys, values = keys_values
        there = None if mask is None else mask[:, None, None]
        mixed = F.scaled_dot_product_attention(
            self._split(self.query(x)), keys, values, attn_mask=there, is_causal=is_causal
        )
        return self.out(mixed.transpose(1, 2).flatten(2))

    def weights(self, x: Tensor, keys_values: KeysValues, mask: Tensor | None) -> Tensor:
        """Where queries x [N, 1, H] look in B images: [N, P], the mean over heads."""
        keys = keys_values[0]
        queries = self._split(self.query(x.reshape(len(keys), -1, x.shape[2])))
        energy = (queries @ keys.transpose(2, 3) * keys.shape[3] ** -0.5).float()
        if mask is not None:
            energy = energy.masked_fill(~mask[:, None, None], torch.finfo(energy.dtype).min)
        return energy.softmax(dim=-1).mean(dim=1).flatten(0, 1)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


def _mlp(width: int) -> nn.Module:
    return nn.Sequential(Linear(width, 4 * width), nn.GELU(), Linear(4 * width, width))


def _sinusoids(at: Tensor, width: int) -> Tensor:
    """Positions [T] -> [T, width]: sines and cosines of wavelengths from 2 pi to 20,000 pi."""
    rates = torch.exp(torch.arange(0, width, 2, device=at.device) * (-9.210340371976184 / width))  # 10,000^(-i/width)
    angles = at.unsqueeze(1) * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _grid_positions(places: int, width: int, device: torch.device) -> Tensor:
    """[P, width] for a square grid row by row: half for the row, half for the column."""
    side = torch.arange(round(places**0.5), device=device)
    line = _sinusoids(side, width // 2)
    return torch.cat([line.repeat_interleave(len(side), dim=0), line.repeat(len(side), 1)], dim=1)
