"""Swin Transformer (https://arxiv.org/abs/2103.14030) and its second version (https://arxiv.org/abs/2111.09883)."""

from typing import Any

from torch import Tensor, nn

from captioning.model.encoders.backbone import TorchvisionEncoder


class Swin(TorchvisionEncoder):
    """Stages ``stage1`` .. ``stage4`` at strides of 4, 8, 16 and 32 pixels, each with the patch merging before it, the
    last with the final LayerNorm. Between stages maps are [B, h, w, D]. Any image size fits: windows are padded."""

    no_weight_decay = ("relative_position_bias_table", "logit_scale")

    @staticmethod
    def cut(model: Any) -> tuple[list[nn.Module], int]:
        pairs = [nn.Sequential(*model.features[number : number + 2]) for number in (0, 2, 4, 6)]
        return [*pairs[:3], nn.Sequential(pairs[3], model.norm)], model.head.in_features

    def feature_map(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)

    def pool(self, x: Tensor, valid: Tensor | None) -> Tensor:
        return super().pool(self.feature_map(x), valid)
