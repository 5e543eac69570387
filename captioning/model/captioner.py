"""Encoder, projection and decoder as one model."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captioning.config import Config
from captioning.data.padded_captions import PaddedCaptions
from captioning.model.decoders import DECODERS
from captioning.model.decoders.looking import AdditiveAttention
from captioning.model.decoders.protocol import Decoder
from captioning.model.encoders import Encoder, build_encoder
from captioning.model.encoders.batch_norm import eval_batch_norm
from captioning.model.features import Features, valid_places


class Captioner(nn.Module):
    """Image -> caption.

    The LSTM gets the encoder's pooled feature, projected to the embedding size and batch-normalised; the
    decoders that look get the map itself, as a grid of P places.
    """

    def __init__(self, config: Config, vocabulary_size: int):
        super().__init__()
        self.encoder: Encoder = build_encoder(config.encoder, config.data.image_size)
        self.grid_size = config.encoder.grid_size
        self.projection: nn.Module = nn.Identity()
        size = self.encoder.feature_size
        kind = DECODERS[config.decoder.name]
        if not kind.uses_grid:
            width = config.decoder.embedding_size
            norm = nn.BatchNorm1d(width) if config.encoder.projection_batch_norm else nn.Identity()
            self.projection = nn.Sequential(nn.Linear(size, width), norm)
            size = width
        self.decoder: Decoder = kind(config.decoder, size, vocabulary_size)
        self.to(memory_format=torch.channels_last)

    def compile_parts(self, training_batch: int, evaluation_batch: int, **options: Any) -> None:
        """torch.compile, with its ``options``: the encoder's stages for these numbers of images, and the attention over
        places of a decoder that walks through captions. Its shapes change with every word: its graphs are dynamic."""
        self.encoder.compile_stages(training_batch, evaluation_batch, **options)
        for attention in self.attentions:
            attention.compile(**options)

    @property
    def attentions(self) -> list[AdditiveAttention]:
        """The decoder's, over places."""
        return [module for module in self.modules() if isinstance(module, AdditiveAttention)]

    def encode(self, inputs: Tensor, valid: Tensor | None = None) -> Features:
        """Pixels uint8 [B, 3, S, S], or features that an encoder gave before, [B, D] or [B, P, D] of any floating type
        -> what the decoder looks at: vectors [B, E] for the LSTM, else a grid [B, P, D].

        ``valid`` says what is part of the image: of pixels int [B, 4], where in them it is (left, top, right, bottom),
        of features which places there are, bool [B, P], or [B, side, side] of square grids; None: all. Other places
        are masked out, and left out of means.
        """
        if inputs.is_floating_point():
            mask = None if valid is None else valid.flatten(1)
            stored = Features(inputs.float(), mask, square=valid is None or valid.dim() == 3)
            if self.decoder.uses_grid:
                return stored
            return Features(self.projection(stored.mean() if inputs.dim() == 3 else stored.grid))
        features = encoder_features(self.encoder, inputs, not self.decoder.uses_grid, self.grid_size, valid)
        return features if self.decoder.uses_grid else Features(self.projection(features.grid))

    def forward(
        self,
        inputs: Tensor,
        captions: PaddedCaptions | Callable[[Decoder, Features], PaddedCaptions],
        valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits [M, V] of the captions' words, each image encoded once (see ``encode``); see PaddedCaptions.
        And the decoder's penalty [], which the training loss adds to the summed cross-entropy. Captions may also be
        what makes them from the decoder and the images' features, as samples are.

        An empty micro-batch gives logits [0, V] that depend on every parameter, so that its backward pass yields
        zero gradients and the rank takes part in the all-reduce.
        """
        if isinstance(captions, PaddedCaptions) and not len(captions):
            anchor = torch.stack([p.sum() for p in self.parameters() if p.requires_grad]).sum() * 0.0
            return anchor.expand(0, self.decoder.vocabulary_size), anchor
        # One image has no batch statistics: it is normalised by the stored ones.
        lone = self.training and len(inputs) == 1 and not any(isinstance(m, nn.SyncBatchNorm) for m in self.modules())
        if lone:
            eval_batch_norm(self)
        try:
            features = self.encode(inputs, valid)
        finally:
            if lone:  # a walk through all modules takes as long as a kernel or two
                self.train()
        if not isinstance(captions, PaddedCaptions):
            captions = captions(self.decoder, features)
        return self.decoder(features, captions)


def encoder_features(
    encoder: Encoder, images: Tensor, pooled: bool, grid_size: int | None = None, valid: Tensor | None = None
) -> Features:
    """uint8 [B, 3, S, S] -> what of the encoder's output is used: one vector an image [B, D], or a grid [B, P, D], of
    ``grid_size`` places a side where that is given. A frozen encoder's can be stored. ``valid`` int [B, 4]: places that
    show nothing of the image are masked out, and left out of the mean."""
    if pooled:
        return Features(encoder.pooled(images, valid))
    grid = encoder(images)
    if grid_size is not None:
        grid = F.adaptive_avg_pool2d(grid, grid_size)
    mask = None if valid is None else valid_places(valid, grid.shape[2], grid.shape[3], images.shape[3]).flatten(1)
    return Features(grid.flatten(2).transpose(1, 2).contiguous(), mask)
