"""An LSTM that looks at one place of the image after the other: Xu et al., "Show, Attend and Tell"
(https://arxiv.org/abs/1502.03044), with soft attention. Shapes as in lstm.py."""

import torch
from torch import Tensor, nn

from captioning.config import DecoderConfig
from captioning.data.padded_captions import PaddedCaptions
from captioning.data.vocabulary import PAD
from captioning.model.decoders.fast_cpu import Linear
from captioning.model.decoders.looking import AdditiveAttention, LookingState, longest_first, unroll
from captioning.model.decoders.lstm import initialise
from captioning.model.decoders.recurrence import LstmCell
from captioning.model.features import Features


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
            self.first_hidden = Linear(feature_size, hidden)
            self.first_cell = Linear(feature_size, hidden)
        self.attention = AdditiveAttention(feature_size, hidden, hidden)
        self.gate = Linear(hidden, feature_size)
        self.lstm = LstmCell(config.embedding_size + feature_size, hidden)
        self.classifier = Linear(hidden, vocabulary_size)
        self.dropout = nn.Dropout(config.dropout)
        initialise(self.lstm, self.classifier)

    def forward(self, features: Features, captions: PaddedCaptions) -> tuple[Tensor, Tensor]:
        """Teacher forcing: N captions of M words -> logits [M, V], penalty; see ``_penalty``."""
        order = longest_first(captions, len(features))
        start, embed = self.start(features[order]), lambda words: self.dropout(self.embedding(words))
        hidden, weights = unroll(start, self._advance, embed, order, captions)
        return self.classifier(self.dropout(hidden)), self._penalty(weights, features.mask, captions)

    def _penalty(self, weights: Tensor, mask: Tensor | None, captions: PaddedCaptions) -> Tensor:
        """lambda * mean over places of (1 - sum over words of a caption's attention there)^2, counted once for every
        word of the caption: divided by the step's target tokens, as all of the loss is, it becomes a mean over captions
        that any cut of the batch leaves the same. weights [M, P], of images with the places of mask [B, P]."""
        by_word = weights.new_zeros(captions.token_ids.numel(), weights.shape[-1]).index_copy(
            0, captions.target_index, weights
        )
        uneven = (1 - by_word.view(*captions.token_ids.shape, -1).sum(dim=1)).square()
        if mask is None:
            mean = uneven.mean(dim=1)
        else:
            present = mask[captions.image_index]
            mean = (uneven * present).sum(dim=1) / present.sum(dim=1)
        return self.regulariser * (mean * captions.lengths).sum()

    def start(self, features: Features) -> LookingState:
        """State after the image, one caption an image."""
        places = self.attention.places(features)
        nowhere = places.mean.new_zeros(features.grid.shape[:2])
        if self.starts_from_mean:
            begun = (self.first_hidden(places.mean), self.first_cell(places.mean))
        else:
            begun = (places.mean.new_zeros(len(places.mean), self.hidden_size),) * 2
        return LookingState(places, begun, nowhere)

    def step(self, state: LookingState, words: Tensor) -> tuple[Tensor, LookingState]:
        """One word further: words [N] -> logits [N, V] for the next word, and the new state."""
        state = self._advance(state, self.embedding(words))
        return self.classifier(state.hidden), state

    def _advance(self, state: LookingState, embedded: Tensor) -> LookingState:
        """Look, then read: embedded words [N, E]."""
        context, weights = self.attention(state.places, state.hidden)
        gated = torch.sigmoid(self.gate(state.hidden)) * context
        inputs = torch.cat([embedded, gated.to(embedded.dtype)], dim=1)
        return LookingState(state.places, self.lstm(inputs, state.recurrent), weights)
