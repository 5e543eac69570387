"""What the model and its training expect of an image encoder."""

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor, nn


class Encoder(Protocol):
    """An ``nn.Module`` that turns images into features.

    Shapes: B images, S pixels a side, D channels, h and w rows and columns of the grid.
    """

    stages: nn.ModuleDict  # bottom to top, under the names of config.ENCODERS: the units of freezing, rates, compiling
    feature_size: int  # D
    frozen: tuple[str, ...]  # the stages that are not trained now
    # Endings of the names of parameters that weight decay spares besides biases and scales, as those of positions.
    no_weight_decay: tuple[str, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> feature map [B, D, h, w], which the captioner flattens to a grid [B, h * w, D]."""

    def pooled(self, images: Tensor, valid: Tensor | None = None) -> Tensor:
        """uint8 [B, 3, S, S] -> one vector an image [B, D]: what the backbone was pretrained to classify by. A mean is
        taken over the places with image in them: ``valid`` int [B, 4], left, top, right and bottom in pixels."""

    def train_from(self, trainable: str) -> None:
        """Train this stage and those above it; ``all`` or ``none`` of them. The others get no gradient and stay in
        evaluation mode, also within ``train()``.

        Raises:
            InputError: for what is no stage of this encoder.
        """

    def compile_stages(self, training_batch: int, evaluation_batch: int, **options: Any) -> None:
        """torch.compile the stages, for so many images at a time in training and in evaluation."""

    def load_pretrained(self, weights: str | None) -> None:
        """Fill the stages with the weights of this name or file; None leaves them as initialised.

        Raises:
            InputError: for an unknown name, a missing or unfitting file, or weights that cannot be downloaded.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """As of nn.Module."""

    def eval(self) -> Any:
        """As of nn.Module."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """As of nn.Module: those of the stages."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As of nn.Module."""
