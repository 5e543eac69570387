"""Vision Transformer (https://arxiv.org/abs/2010.11929)."""

import math
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.vision_transformer import interpolate_embeddings

from captioning.config import EncoderConfig
from captioning.model.encoders.backbone import TorchvisionEncoder
from shards.errors import InputError


class VisionTransformer(TorchvisionEncoder):
    """A stage a block, ``block1`` and up: patch embedding and positions belong to the first, the final LayerNorm to
    the last. Between stages there are tokens [B, 1 + P, D], the class token first.

    The grid is the patch tokens: each has its place in the image. The class token, which pretraining classified by, is
    ``pooled``. The image size is fixed: pretrained positions of another one are interpolated.
    """

    no_weight_decay = ("class_token", "pos_embedding")

    def __init__(self, config: EncoderConfig, image_size: int):
        self.patch_size = int(config.name.rsplit("_", 1)[1])  # vit_b_16
        if image_size % self.patch_size:
            below = image_size // self.patch_size * self.patch_size
            raise InputError(
                f"data.image_size={image_size} does not fit encoder.name={config.name}, which sees patches of "
                f"{self.patch_size} pixels.\nSet data.image_size to a multiple: {below or ''}"
                f"{' or ' if below else ''}{below + self.patch_size}."
            )
        super().__init__(config, image_size)

    def build(self) -> nn.Module:
        return torchvision.models.get_model(self.name, weights=None, image_size=self.image_size)

    @staticmethod
    def cut(model: Any) -> tuple[list[nn.Module], int]:
        first, *middle, last = model.encoder.layers
        embedding = _Embedding(model.conv_proj, model.class_token, model.encoder.pos_embedding, model.encoder.dropout)
        return [nn.Sequential(embedding, first), *middle, nn.Sequential(last, model.encoder.ln)], model.hidden_dim

    def feature_map(self, x: Tensor) -> Tensor:
        side = math.isqrt(x.shape[1] - 1)
        return x[:, 1:].transpose(1, 2).unflatten(2, (side, side))

    def pool(self, x: Tensor, valid: Tensor | None) -> Tensor:
        return x[:, 0]

    def fit_to_image_size(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return interpolate_embeddings(self.image_size, self.patch_size, state)


class _Embedding(nn.Module):
    """Normalised images [B, 3, S, S] -> tokens [B, 1 + P, D]: a class token, then the patches row by row."""

    def __init__(self, patches: nn.Module, class_token: nn.Parameter, pos_embedding: nn.Parameter, dropout: nn.Module):
        super().__init__()
        self.patches, self.dropout = patches, dropout
        self.class_token, self.pos_embedding = class_token, pos_embedding

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), patches], dim=1)
        return self.dropout(tokens + self.pos_embedding)
