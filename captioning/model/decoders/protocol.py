"""What a decoder is, for the captioner and the search."""

from typing import Any, Protocol

from torch import Tensor

from captioning.config import DecoderConfig
from captioning.data.padded_captions import PaddedCaptions
from captioning.model.features import Features


class DecoderState(Protocol):
    """Where each of N captions stands, between two words.

    ``weights`` float [N, P]: where each looked for its last word; None for a decoder that does not look.
    """

    @property
    def weights(self) -> Tensor | None: ...

    def select(self, rows: Tensor, images: Tensor | None = None) -> Any:
        """The state of captions ``rows`` int64 [M]. Every image keeps its place and gets M / B of them; or only
        ``images`` int64 [I] stay, in this order, and get M / I each."""


class Decoder(Protocol):
    """A caption decoder: an ``nn.Module`` built as ``kind(config.decoder, feature_size, vocabulary_size)``.

    Shapes: B images, N captions, T words a caption, M target words, P places of the grid, D width of the features,
    V vocabulary size.
    """

    uses_grid: bool  # whether it gets the grid [B, P, D], or one projected vector an image [B, D]
    vocabulary_size: int

    def __init__(self, config: DecoderConfig, feature_size: int, vocabulary_size: int): ...

    def __call__(self, features: Features, captions: PaddedCaptions) -> tuple[Tensor, Tensor]:
        """Teacher forcing: logits [M, V], caption by caption for its targets alone, and a penalty []: what the loss
        adds to the summed cross-entropy. Places that ``features.mask`` leaves out have no part in either."""

    def start(self, features: Features) -> DecoderState:
        """State after the image, one caption an image."""

    def step(self, state: Any, words: Tensor) -> tuple[Tensor, Any]:
        """One word further: words int64 [N] -> logits [N, V] for the next word, and the new state."""
