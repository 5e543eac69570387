"""An attention LSTM below a language LSTM: Anderson et al., "Bottom-Up and Top-Down Attention"
(https://arxiv.org/abs/1707.07998). The places are those of a grid, or the boxes of a detector. Shapes as in lstm.py."""

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


class UpDownDecoder(nn.Module):
    """The first LSTM reads what the second last said, the mean feature and the word; its hidden state is the query for
    the places; the second reads what came back and that hidden state, and the next word is read from its own."""

    uses_grid = True

    def __init__(self, config: DecoderConfig, feature_size: int, vocabulary_size: int):
        super().__init__()
        hidden = config.hidden_size
        self.vocabulary_size, self.hidden_size = vocabulary_size, hidden
        self.embedding = nn.Embedding(vocabulary_size, config.embedding_size, padding_idx=PAD)
        self.attention_lstm = LstmCell(hidden + feature_size + config.embedding_size, hidden)
        self.attention = AdditiveAttention(feature_size, hidden, hidden)
        self.language_lstm = LstmCell(feature_size + hidden, hidden)
        self.classifier = Linear(hidden, vocabulary_size)
        self.dropout = nn.Dropout(config.dropout)
        initialise(self.attention_lstm, self.classifier)
        initialise(self.language_lstm, self.classifier)

    def forward(self, features: Features, captions: PaddedCaptions) -> tuple[Tensor, Tensor]:
        """Teacher forcing: N captions of M words -> logits [M, V], and no penalty."""
        order = longest_first(captions, len(features))
        start, embed = self.start(features[order]), lambda words: self.dropout(self.embedding(words))
        hidden, _ = unroll(start, self._advance, embed, order, captions)
        logits = self.classifier(self.dropout(hidden))
        return logits, logits.new_zeros(())

    def start(self, features: Features) -> LookingState:
        """State after the image, one caption an image."""
        places = self.attention.places(features)
        nothing = places.mean.new_zeros(len(features), self.hidden_size)
        return LookingState(places, (nothing,) * 4, places.mean.new_zeros(features.grid.shape[:2]))

    def step(self, state: LookingState, words: Tensor) -> tuple[Tensor, LookingState]:
        """One word further: words [N] -> logits [N, V] for the next word, and the new state."""
        state = self._advance(state, self.embedding(words))
        return self.classifier(state.hidden), state

    def _advance(self, state: LookingState, embedded: Tensor) -> LookingState:
        """Read, look, speak: embedded words [N, E]."""
        query, query_cell, spoken, spoken_cell = state.recurrent
        captions = len(embedded) // len(state.places.mean)
        mean = state.places.mean.repeat_interleave(captions, dim=0)
        inputs = torch.cat([spoken.to(embedded.dtype), mean.to(embedded.dtype), embedded], dim=1)
        query, query_cell = self.attention_lstm(inputs, (query, query_cell))
        context, weights = self.attention(state.places, query)
        inputs = torch.cat([context.to(query.dtype), query], dim=1)
        spoken, spoken_cell = self.language_lstm(inputs, (spoken, spoken_cell))
        return LookingState(state.places, (query, query_cell, spoken, spoken_cell), weights)
