"""An LSTM that looks at one place of the image after the other: Xu et al., "Show, Attend and Tell"
(https://arxiv.org/abs/1502.03044), with soft attention. Shapes as in decoder.py."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from captioning.config import DecoderConfig
from captioning.data.padded_captions import PaddedCaptions
from captioning.data.vocabulary import PAD
from captioning.model.decoders.lstm import initialise, shift_right


@dataclass(frozen=True)
class AttentionState:
    """Where each of N captions stands: ``hidden`` and ``cell`` [N, H], and where it looked for the last word:
    ``weights`` [N, P]. ``grid`` [B, P, D] and its ``keys`` [B, P, H] are the images', shared by N / B captions each."""

    grid: Tensor
    keys: Tensor
    hidden: Tensor
    cell: Tensor
    weights: Tensor

    def select(self, rows: Tensor) -> "AttentionState":
        """The state of captions ``rows`` [M]; every image keeps its place and gets M / B of them."""
        return replace(self, hidden=self.hidden[rows], cell=self.cell[rows], weights=self.weights[rows])


class AttentionDecoder(nn.Module):
    """Bahdanau attention over the grid, a gate on what it returns (the paper's beta), hidden and cell state begun from
    the mean feature (or from zero, so that what it says it has looked at), and the doubly stochastic regulariser."""

    uses_grid = True

    def __init__(self, config: DecoderConfig, feature_size: int, vocabulary_size: int):
        super().__init__()
        hidden = config.hidden_size
        self.vocabulary_size, self.regulariser = vocabulary_size, config.doubly_stochastic_weight
        self.embedding = nn.Embedding(vocabulary_size, config.embedding_size, padding_idx=PAD)
        self.hidden_size, self.starts_from_mean = hidden, config.initial_state == "mean"
        if self.starts_from_mean:
            self.first_hidden = nn.Linear(feature_size, hidden)
            self.first_cell = nn.Linear(feature_size, hidden)
        self.key = nn.Linear(feature_size, hidden)
        self.query = nn.Linear(hidden, hidden, bias=False)
        self.energy = nn.Linear(hidden, 1, bias=False)  # a bias would not change the softmax
        self.gate = nn.Linear(hidden, feature_size)
        self.lstm = nn.LSTMCell(config.embedding_size + feature_size, hidden)
        self.classifier = nn.Linear(hidden, vocabulary_size)
        self.dropout = nn.Dropout(config.dropout)
        initialise(self.lstm, self.classifier)

    def forward(self, features: Tensor, captions: PaddedCaptions) -> tuple[Tensor, Tensor]:
        """Teacher forcing: features [B, P, D], N captions of M words -> logits [M, V], penalty.

        Images go in the order of their longest caption, so that step t works on those that still have a word to come.
        The penalty is what the training loss adds to the summed cross-entropy; see ``_penalty``.
        """
        words, most = captions.token_ids, captions.max_captions_per_image
        longest = words.new_zeros(len(features)).scatter_reduce(0, captions.image_index, captions.lengths, "amax")
        order = longest.argsort(descending=True)
        slot = order.argsort()[captions.image_index] * most + captions.caption_index

        read = words.new_full((len(features) * most, words.shape[1]), PAD)
        read[slot] = shift_right(words)
        embedded = self.dropout(self.embedding(read))
        state, hidden, weights = self.start(features[order]), [], []
        state = state.select(torch.arange(len(read), device=words.device) // most)
        for t, images in enumerate(count for count in captions.active_images if count):
            state = self._advance(_first(state, images, most), embedded[: images * most, t])
            hidden.append(state.hidden)
            weights.append(state.weights)
        rows = (captions.row_offset + slot.unsqueeze(1)).flatten()[captions.target_index]
        logits = self.classifier(self.dropout(torch.cat(hidden)[rows]))
        return logits, self._penalty(torch.cat(weights)[rows], captions)

    def _penalty(self, weights: Tensor, captions: PaddedCaptions) -> Tensor:
        """lambda * mean over places of (1 - sum over words of a caption's attention there)^2, counted once for every
        word of the caption: divided by the step's target tokens, as all of the loss is, it becomes a mean over captions
        that any cut of the batch leaves the same. weights [M, P]."""
        by_word = weights.new_zeros(captions.token_ids.numel(), weights.shape[-1]).index_copy(
            0, captions.target_index, weights
        )
        uneven = (1 - by_word.view(*captions.token_ids.shape, -1).sum(dim=1)).square().mean(dim=1)
        return self.regulariser * (uneven * captions.lengths).sum()

    def start(self, features: Tensor) -> AttentionState:
        """State after the image, one caption an image: features [B, P, D]."""
        hidden = cell = features.new_zeros(len(features), self.hidden_size)
        if self.starts_from_mean:
            mean = features.mean(dim=1)
            hidden, cell = self.first_hidden(mean), self.first_cell(mean)
        return AttentionState(features, self.key(features), hidden, cell, features.new_zeros(features.shape[:2]))

    def step(self, state: AttentionState, words: Tensor) -> tuple[Tensor, AttentionState]:
        """One word further: words [N] -> logits [N, V] for the next word, and the new state."""
        state = self._advance(state, self.embedding(words))
        return self.classifier(state.hidden), state

    def _advance(self, state: AttentionState, embedded: Tensor) -> AttentionState:
        """Look, then read: embedded words [N, E]."""
        by_image = state.hidden.unflatten(0, (len(state.grid), -1))  # [B, K, H]
        energy = self.energy(torch.tanh(state.keys.unsqueeze(1) + self.query(by_image).unsqueeze(2))).squeeze(-1)
        weights = energy.float().softmax(dim=-1)  # [B, K, P]
        context = (weights.to(state.grid.dtype) @ state.grid).flatten(0, 1)  # [N, D]
        gated = torch.sigmoid(self.gate(state.hidden)) * context
        inputs = torch.cat([embedded, gated.to(embedded.dtype)], dim=1)
        hidden, cell = self.lstm(inputs, (state.hidden, state.cell))
        return AttentionState(state.grid, state.keys, hidden, cell, weights.flatten(0, 1))


def _first(state: AttentionState, images: int, captions: int) -> AttentionState:
    """The state of the first ``images`` images, with ``captions`` captions each."""
    rows = images * captions
    if len(state.hidden) == rows:
        return state
    by_caption = (x[:rows] for x in (state.hidden, state.cell, state.weights))
    return AttentionState(state.grid[:images], state.keys[:images], *by_caption)
