"""Caption decoders. Each has ``forward`` for teacher forcing and ``start``/``step`` for search.

Shapes: B images, N captions, T words, E embedding size, H hidden size, L layers, V vocabulary size.
"""

import torch
from torch import Tensor, nn

from captioning.config import DecoderConfig
from captioning.data.vocabulary import PAD, START

State = tuple[Tensor, Tensor]


class LstmDecoder(nn.Module):
    """The image feature is the LSTM's first input, then <start> and the words: Vinyals et al., "Show and Tell"
    (https://arxiv.org/abs/1411.4555)."""

    def __init__(self, config: DecoderConfig, vocabulary_size: int):
        super().__init__()
        between = config.dropout if config.num_layers > 1 else 0.0
        self.embedding = nn.Embedding(vocabulary_size, config.embedding_size, padding_idx=PAD)
        self.lstm = nn.LSTM(
            config.embedding_size, config.hidden_size, config.num_layers, batch_first=True, dropout=between
        )
        self.classifier = nn.Linear(config.hidden_size, vocabulary_size)
        self.dropout = nn.Dropout(config.dropout)
        self._initialise()

    def _initialise(self) -> None:
        """Scales that let the image through from the first step on.

        With torch's defaults an LSTM fed unit-variance inputs answers with outputs of about 0.07, the classifier with
        logits of about 0.04: so little of the image reaches the loss that, trained from nothing, an encoder learned
        colours and hardly any shape in 400 steps where a linear classifier on the same feature learned both.
        """
        for name, parameter in self.lstm.named_parameters():
            if name.startswith("weight_ih"):
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)  # unit-variance gates for such inputs
            elif name.startswith("weight_hh"):
                for gate in parameter.data.chunk(4):
                    nn.init.orthogonal_(gate)
            else:
                nn.init.zeros_(parameter)
                if name.startswith("bias_ih"):  # remember at first: Jozefowicz et al., ICML 2015
                    nn.init.ones_(parameter.data.chunk(4)[1])
        nn.init.normal_(self.classifier.weight, std=2.0 * self.classifier.in_features**-0.5)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, features: Tensor, words: Tensor, lengths: Tensor) -> Tensor:
        """Teacher forcing: features [N, E], words [N, T], lengths [N] -> logits [sum(lengths), V].

        Row by row, logits for the first ``lengths`` words of each caption: no work is spent on padding's.
        """
        start = words.new_full((len(words), 1), START)
        embedded = self.dropout(self.embedding(torch.cat([start, words[:, :-1]], dim=1)))
        hidden, _ = self.lstm(torch.cat([features.to(embedded.dtype).unsqueeze(1), embedded], dim=1))
        return self.classifier(self.dropout(hidden[:, 1:][is_target(words, lengths)]))

    def start(self, features: Tensor) -> State:
        """State after the image: features [B, E] -> (hidden, cell), each [L, B, H]."""
        return self.lstm(features.unsqueeze(1))[1]

    def step(self, state: State, words: Tensor) -> tuple[Tensor, State]:
        """One word further: words [B] -> logits [B, V] for the next word, and the new state."""
        hidden, state = self.lstm(self.embedding(words).unsqueeze(1), state)
        return self.classifier(hidden.squeeze(1)), state


def is_target(words: Tensor, lengths: Tensor) -> Tensor:
    """Which places of padded words [N, T] hold a target: bool [N, T]."""
    return torch.arange(words.shape[1], device=words.device) < lengths.unsqueeze(1)
