"""BatchNorm with fixed statistics is a scale and a shift: they go into the convolution before it."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class Folded:
    """A twin of a module in evaluation mode, every BatchNorm multiplied into the convolution it follows.

    The outputs are the module's to rounding, with a pass over each feature map less. The twin is made when it is first
    wanted, and again after any parameter of the module was changed or replaced. Statistics alone are not watched: DDP
    writes rank 0's into every rank's before each step, the same ones again for as long as they are fixed. It is no part
    of the module, so that neither a state dict nor an optimizer knows of it.
    """

    def __init__(self) -> None:
        self._twin: nn.Module | None = None
        self._made_of: list[tuple[Tensor, int]] = []

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        """What ``module`` gives for ``x``, without gradients."""
        parameters = list(module.parameters())
        known = len(parameters) == len(self._made_of) and all(
            now is then and _version(now) == version
            for now, (then, version) in zip(parameters, self._made_of, strict=True)
        )
        if self._twin is None or not known:
            self._made_of = [(parameter, _version(parameter)) for parameter in parameters]
            with torch.inference_mode(False), torch.no_grad():
                self._twin = _fold(copy.deepcopy(module).eval())
        return self._twin(x)

    def forget(self) -> None:
        """For changes that parameters do not count: of device or type, and of statistics alone."""
        self._twin, self._made_of = None, []


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; those made in inference mode do not count it."""
    return 0 if tensor.is_inference() else tensor._version


def _fold(module: nn.Module) -> nn.Module:
    """In torchvision's backbones a BatchNorm registered right after a convolution is applied to it, and to it alone."""
    before: tuple[str, nn.Module] | None = None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and before and isinstance(before[1], nn.Conv2d):
            setattr(module, before[0], fuse_conv_bn_eval(before[1], child))
            setattr(module, name, nn.Identity())
        else:
            _fold(child)
        before = name, child
    return module
