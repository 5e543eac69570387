"""MobileNetV2 (https://arxiv.org/abs/1801.04381) and MobileNetV3 (https://arxiv.org/abs/1905.02244)."""

import itertools
from typing import Any

from torch import nn

from captioning.model.encoders.backbone import TorchvisionEncoder


class MobileNet(TorchvisionEncoder):
    """Stages ``layer1`` .. ``layer4`` at strides of 4, 8, 16 and 32 pixels, as ResNet's."""

    @staticmethod
    def cut(model: Any) -> tuple[list[nn.Module], int]:
        halving = [number for number, block in enumerate(model.features) if _halves(block)]
        first = [0, *halving[2:], len(model.features)]  # stem and strides 2 and 4 are layer1
        linear = next(layer for layer in model.classifier if isinstance(layer, nn.Linear))
        return [nn.Sequential(*model.features[a:b]) for a, b in itertools.pairwise(first)], linear.in_features


def _halves(block: nn.Module) -> bool:
    """Whether the output has half the rows and columns of the input."""
    return any(isinstance(module, nn.Conv2d) and module.stride == (2, 2) for module in block.modules())
