"""Encoder, projection and decoder as one model."""

import torch
from torch import Tensor, nn

from captioning.config import Config
from captioning.model.decoder import LstmDecoder
from captioning.model.encoder import Encoder, eval_batch_norm


class Captioner(nn.Module):
    """Image -> caption. The encoder's feature is projected to the decoder's embedding size and batch-normalised."""

    def __init__(self, config: Config, vocabulary_size: int):
        super().__init__()
        size = config.decoder.embedding_size
        self.encoder = Encoder(config.encoder)
        norm = nn.BatchNorm1d(size) if config.encoder.projection_batch_norm else nn.Identity()
        self.projection = nn.Sequential(nn.Linear(self.encoder.feature_size, size), norm)
        self.decoder = LstmDecoder(config.decoder, vocabulary_size)
        self.to(memory_format=torch.channels_last)

    def encode(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> features [B, E]."""
        return self.projection(self.encoder(images))

    def forward(self, images: Tensor, words: Tensor, lengths: Tensor, owner: Tensor) -> Tensor:
        """Logits [sum(lengths), V] of each caption's words, each image encoded once; see CaptionBatch for the shapes.

        An empty micro-batch gives logits [0, V] that depend on every parameter, so that its backward pass yields
        zero gradients and the rank takes part in the all-reduce.
        """
        if not len(images):
            anchor = torch.stack([p.sum() for p in self.parameters() if p.requires_grad]).sum()
            return (anchor * 0.0).expand(0, self.decoder.classifier.out_features)
        if self.training and len(images) == 1:
            # One image has no batch statistics: it is normalised by the stored ones.
            eval_batch_norm(self)
        try:
            features = self.encode(images)
        finally:
            self.train(self.training)
        return self.decoder(features[owner], words, lengths)
