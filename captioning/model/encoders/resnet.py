"""ResNet (https://arxiv.org/abs/1512.03385), ResNeXt (https://arxiv.org/abs/1611.05431) and Wide ResNet
(https://arxiv.org/abs/1605.07146)."""

from typing import Any

from torch import nn

from captioning.model.encoders.backbone import TorchvisionEncoder


class ResNet(TorchvisionEncoder):
    """Stages ``layer1`` .. ``layer4`` at strides of 4, 8, 16 and 32 pixels; the stem belongs to ``layer1``."""

    @staticmethod
    def cut(model: Any) -> tuple[list[nn.Module], int]:
        stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)
        return [nn.Sequential(stem, model.layer1), model.layer2, model.layer3, model.layer4], model.fc.in_features
