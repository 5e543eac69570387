"""In place of an encoder, where the images' features are given: others computed them, with an encoder that is not here
(bottom-up attention, https://arxiv.org/abs/1707.07998, say)."""

from typing import Any, NoReturn

from torch import Tensor, nn

from captioning.config import EncoderConfig
from shards.errors import InputError


class GivenFeatures(nn.Module):
    """Implements the ``Encoder`` protocol, without stages; it cannot see an image."""

    no_weight_decay: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()

    def __init__(self, config: EncoderConfig, image_size: int):
        super().__init__()
        assert config.feature_size is not None  # see config.py
        self.stages, self.feature_size = nn.ModuleDict(), config.feature_size

    def forward(self, images: Tensor, valid: Tensor | None = None) -> NoReturn:
        """Raises InputError: there is no encoder for pixels."""
        raise InputError(
            "This run was trained on features that were computed elsewhere (encoder.name=features): it cannot see an "
            "image. Give it a split of such features (`captioning pack features`)."
        )

    pooled = forward

    def train_from(self, trainable: str) -> None:
        """There is nothing to train."""

    def compile_stages(self, training_batch: int, evaluation_batch: int, **options: Any) -> None:
        """There is nothing to compile."""

    def load_pretrained(self, weights: str | None) -> None:
        """There are no weights."""
