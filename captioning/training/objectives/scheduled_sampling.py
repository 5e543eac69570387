"""Scheduled sampling: a share of the words that the decoder reads in training are its own, as all are later.

Bengio et al., https://arxiv.org/abs/1506.03099. Words are drawn for all places of a caption at once, from what the
decoder expects there after the true words (Duckworth et al., https://arxiv.org/abs/1906.04331): one pass more, with
gradients in neither the drawing nor the encoder, for decoders of every kind.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from captioning.data.padded_captions import PaddedCaptions
from captioning.model.decoders.protocol import Decoder
from captioning.model.draws import caption_keys, draw_words, uniform
from captioning.model.features import Features
from captioning.model.sampling import policy


@dataclass(frozen=True)
class ScheduledSampling:
    """Called by the model with its decoder and the features it just computed: ``captions`` with words to read in place
    of the true ones, each with this ``probability``.

    What is drawn is a function of ``seed``, the image's number in the split (``samples`` [B]), the caption's among its
    own, and the word's place: the same however the step was cut.
    """

    captions: PaddedCaptions
    samples: tuple[int, ...]
    seed: int
    probability: float

    @torch.no_grad()
    def __call__(self, decoder: Decoder, features: Features) -> PaddedCaptions:
        captions = self.captions
        expected = _expected(decoder, features.detach(), captions)
        keys = caption_keys(self.seed, self.samples, captions.max_captions_per_image, features.device)
        keys = keys[captions.image_index, captions.caption_index].unsqueeze(1)  # [N, 1]
        place = torch.arange(captions.token_ids.shape[1], device=features.device)
        coin, number = (uniform(keys, 2 * place + i).flatten()[captions.target_index] for i in (0, 1))  # [M]
        own = torch.where(coin < self.probability, draw_words(policy(expected), number), captions.targets)
        read = captions.token_ids.flatten().index_copy(0, captions.target_index, own)
        return replace(captions, read_ids=read.view_as(captions.token_ids))


def _expected(decoder: Any, features: Features, captions: PaddedCaptions) -> Tensor:
    """Logits [M, V] after the true words, without dropout."""
    training = decoder.training
    decoder.eval()
    try:
        logits, _ = decoder(features, captions)
    finally:
        decoder.train(training)
    return logits
