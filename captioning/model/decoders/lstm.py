"""Caption decoders. Each has ``forward`` for teacher forcing and ``start``/``step`` for search.

Shapes: B images, N captions, K captions an image (the most any has), T words a caption, M words in all, P places of the
image's grid, D width of its features, E embedding size, H hidden size, L layers, V vocabulary size. An image's features
are computed once, and its captions share them: where they look, captions are laid out as K to an image.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from captioning.config import DecoderConfig
from captioning.data.padded_captions import PaddedCaptions
from captioning.data.vocabulary import PAD, START
from captioning.model.decoders.fast_cpu import Linear
from captioning.model.decoders.recurrence import Lstm
from captioning.model.features import Features


@dataclass(frozen=True)
class LstmState:
    """Where each of N captions stands: ``hidden`` and ``cell`` [L, N, H]."""

    hidden: Tensor
    cell: Tensor
    weights: None = None  # this decoder does not say where it looks

    def select(self, rows: Tensor, images: Tensor | None = None) -> "LstmState":
        """The state of captions ``rows`` [M]; which ``images`` they belong to does not matter here."""
        return LstmState(self.hidden[:, rows], self.cell[:, rows])


class LstmDecoder(nn.Module):
    """The image feature is the LSTM's first input, then <start> and the words: Vinyals et al., "Show and Tell"
    (https://arxiv.org/abs/1411.4555)."""

    uses_grid = False

    def __init__(self, config: DecoderConfig, feature_size: int, vocabulary_size: int):
        super().__init__()
        self.vocabulary_size = vocabulary_size
        elsewhere = config.dropout if config.dropout_at == "all" else 0.0
        self.embedding = nn.Embedding(vocabulary_size, config.embedding_size, padding_idx=PAD)
        self.lstm = Lstm(feature_size, config.hidden_size, config.num_layers, config.dropout)
        self.classifier = Linear(config.hidden_size, vocabulary_size)
        self.dropout = nn.Dropout(elsewhere)
        for layer in self.lstm:
            initialise(layer, self.classifier)

    def forward(self, features: Features, captions: PaddedCaptions) -> tuple[Tensor, Tensor]:
        """Teacher forcing: vectors [B, E], N captions of M words -> logits [M, V], penalty.

        Logits caption by caption, for its words alone: no work is spent on padding's. The penalty is what the training
        loss adds to the summed cross-entropy: nothing here.
        """
        embedded = self.dropout(self.embedding(words_read(captions)))
        image = features.grid[captions.image_index].to(embedded.dtype).unsqueeze(1)
        hidden, _ = self.lstm(torch.cat([image, embedded], dim=1))
        logits = self.classifier(self.dropout(hidden[:, 1:].flatten(0, 1)[captions.target_index]))
        return logits, logits.new_zeros(())

    def start(self, features: Features) -> LstmState:
        """State after the image, one caption an image: vectors [B, E]."""
        return LstmState(*self.lstm(features.grid.unsqueeze(1))[1])

    def step(self, state: LstmState, words: Tensor) -> tuple[Tensor, LstmState]:
        """One word further: words [N] -> logits [N, V] for the next word, and the new state."""
        hidden, after = self.lstm(self.embedding(words).unsqueeze(1), (state.hidden, state.cell))
        return self.classifier(hidden.squeeze(1)), LstmState(*after)


def initialise(lstm: nn.Module, classifier: nn.Linear) -> None:
    """Scales that let the image through from the first step on.

    With torch's defaults an LSTM fed unit-variance inputs answers with outputs of about 0.07, the classifier with
    logits of about 0.04: so little of the image reaches the loss that, trained from nothing, an encoder learned
    colours and hardly any shape in 400 steps where a linear classifier on the same feature learned both.
    """
    for name, parameter in lstm.named_parameters():
        if name.startswith("weight_ih"):
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)  # unit-variance gates for such inputs
        elif name.startswith("weight_hh"):
            for gate in parameter.data.chunk(4):
                nn.init.orthogonal_(gate)
        else:
            nn.init.zeros_(parameter)
            if name.startswith("bias_ih"):  # remember at first: Jozefowicz et al., ICML 2015
                nn.init.ones_(parameter.data.chunk(4)[1])
    nn.init.normal_(classifier.weight, std=2.0 * classifier.in_features**-0.5)
    nn.init.zeros_(classifier.bias)


def words_read(captions: PaddedCaptions) -> Tensor:
    """What a decoder reads int64 [N, T] to predict the captions' words: <start>, then the words but the last, or those
    that stand in for them."""
    words = captions.token_ids if captions.read_ids is None else captions.read_ids
    return torch.cat([words.new_full((len(words), 1), START), words[:, :-1]], dim=1)
