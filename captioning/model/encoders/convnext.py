"""ConvNeXt (https://arxiv.org/abs/2201.03545)."""

from typing import Any

from torch import Tensor, nn

from captioning.model.encoders.backbone import TorchvisionEncoder


class ConvNeXt(TorchvisionEncoder):
    """Stages ``stage1`` .. ``stage4`` at strides of 4, 8, 16 and 32 pixels, each with the down-sampling before it.

    torchvision normalises the mean of the map, so ``pooled`` does too; on the grid each place is normalised by itself.
    A lower last stage has no such norm.
    """

    no_weight_decay = ("layer_scale",)

    @staticmethod
    def cut(model: Any) -> tuple[list[nn.Module], int]:
        pairs = [nn.Sequential(*model.features[number : number + 2]) for number in (0, 2, 4, 6)]
        return [*pairs[:3], _Top(pairs[3], model.classifier[0])], model.classifier[2].in_features

    def feature_map(self, x: Tensor) -> Tensor:
        return self._norm(x)

    def pool(self, x: Tensor, valid: Tensor | None) -> Tensor:
        return self._norm(super().pool(x, valid)[:, :, None, None]).flatten(1)

    def _norm(self, x: Tensor) -> Tensor:
        *_, top = self.stages.values()
        return top.norm(x) if isinstance(top, _Top) else x


class _Top(nn.Module):
    """The last stage, with the LayerNorm that is applied after it: frozen, trained and saved together."""

    def __init__(self, blocks: nn.Module, norm: nn.Module):
        super().__init__()
        self.blocks, self.norm = blocks, norm

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)
