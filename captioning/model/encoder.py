"""torchvision backbones as image encoders, with frozen stages that are truly frozen."""

import urllib.error
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from captioning.config import EncoderConfig
from captioning.model.folding import Folded
from shards.errors import InputError

STAGES = ("layer1", "layer2", "layer3", "layer4")  # the stem belongs to layer1
# MobileNetV2's blocks by the stride at which they work, as ResNet's stages are: 4, 8, 16 and 32.
_MOBILENET_STAGES = {"layer1": (0, 4), "layer2": (4, 7), "layer3": (7, 14), "layer4": (14, 19)}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which torchvision's weights were trained with


class Encoder(nn.Module):
    """Image -> map of features: a torchvision backbone without its pooling and classifier.

    Stages below ``config.trainable`` get no gradient, and their BatchNorm stays in evaluation mode.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.stages, self.feature_size = _stages_of(config.name)
        self.freeze_batch_norm, self.gradient_checkpointing = config.freeze_batch_norm, config.gradient_checkpointing
        self._folded = {name: Folded() for name in STAGES} if config.fold_batch_norm else {}
        self.train_from(config.trainable)
        self.register_buffer("mean", torch.tensor(_MEAN).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(3, 1, 1) * 255, persistent=False)

    def train_from(self, trainable: str) -> None:
        """Train this stage and those above it, of STAGES, ``all`` or ``none`` of them; the others are frozen."""
        first = {"none": len(STAGES), "all": 0}.get(trainable)
        self.frozen = STAGES[: STAGES.index(trainable) if first is None else first]
        for name, stage in self.stages.items():
            stage.requires_grad_(name not in self.frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Encoder":
        super().train(mode)
        for name in self.frozen:
            self.stages[name].eval()
        for name in self._folded.keys() - set(self.frozen) if mode else ():
            self._folded[name].forget()  # its weights are about to change
        if self.freeze_batch_norm:
            eval_batch_norm(self)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> feature map [B, D, S/32, S/32], rounded up."""
        x = ((images.float() - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():  # nothing below the first trained stage is kept for a backward pass
            for name in self.frozen:
                x = self._fixed(name, x)
        fixed = not (self.training or torch.is_grad_enabled())
        for name in STAGES[len(self.frozen) :]:
            x = self._fixed(name, x) if fixed else self._trained(self.stages[name], x)
        return x

    def _fixed(self, name: str, x: Tensor) -> Tensor:
        """The output of a stage that is in evaluation mode, without gradients. A compiled one folds by itself."""
        stage = self.stages[name]
        return stage(x) if not self._folded or stage._compiled_call_impl else self._folded[name](stage, x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Encoder":
        for folded in self._folded.values():
            folded.forget()
        return super()._apply(fn, recurse)

    def _trained(self, stage: nn.Module, x: Tensor) -> Tensor:
        """A stage's output; with gradient checkpointing its insides are computed again for the backward pass
        (https://arxiv.org/abs/1604.06174)."""
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return stage(x)
        return checkpoint(stage, x, use_reentrant=False, context_fn=lambda: _recomputed(stage))


def eval_batch_norm(module: nn.Module) -> None:
    """Make every BatchNorm below ``module`` use its stored statistics."""
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            child.eval()


def _recomputed(stage: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Contexts of a stage's forward pass and of its second one: there BatchNorm works in the mode it had in the first,
    on copies of its running statistics, which have seen this batch already."""
    norms = [m for m in stage.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    first = [norm.training for norm in norms]

    @contextmanager
    def again() -> Iterator[None]:
        now = [(norm.training, dict(norm.named_buffers())) for norm in norms]
        for norm, training in zip(norms, first, strict=True):
            norm.training = training
            for name, statistic in norm.named_buffers():
                setattr(norm, name, statistic.clone())
        try:
            yield
        finally:
            for norm, (training, statistics) in zip(norms, now, strict=True):
                norm.training = training
                for name, statistic in statistics.items():
                    setattr(norm, name, statistic)

    return nullcontext(), again()


def _stages_of(name: str) -> tuple[nn.ModuleDict, int]:
    """A randomly initialised backbone cut into STAGES, and the number of channels D it ends with."""
    backbone = torchvision.models.get_model(name, weights=None)
    if name == "mobilenet_v2":
        blocks = backbone.features
        stages = {stage: nn.Sequential(*blocks[a:b]) for stage, (a, b) in _MOBILENET_STAGES.items()}
        return nn.ModuleDict(stages), backbone.last_channel
    stem = nn.Sequential(backbone.conv1, backbone.bn1, backbone.relu, backbone.maxpool)
    later = {stage: getattr(backbone, stage) for stage in STAGES[1:]}
    return nn.ModuleDict({"layer1": nn.Sequential(stem, backbone.layer1), **later}), backbone.fc.in_features


def load_pretrained(encoder: Encoder, config: EncoderConfig) -> None:
    """Fill the backbone with ``config.weights``: a torchvision weights name, or a file of its state dict.

    Raises:
        InputError: for an unknown name, a missing or unfitting file, or weights that cannot be downloaded.
    """
    if config.weights is None:
        return
    state = _read_weights(config)
    if not all(isinstance(value, Tensor) for value in state.values()):
        keys = ", ".join(list(state)[:6])
        raise InputError(
            f"encoder.weights={config.weights} is no state dict of tensors: it holds {keys}. Save that part."
        )
    try:
        renamed = _renamed(state, config.name)
        # Files written before 2018 lack the count of batches a BatchNorm has seen; it is not used.
        own = encoder.stages.state_dict()
        counters = {key: value for key, value in own.items() if key.endswith("num_batches_tracked")}
        encoder.stages.load_state_dict({**counters, **renamed})
    except (RuntimeError, KeyError, ValueError) as error:
        first_lines = "\n".join(line[:160] for line in str(error).splitlines()[:4])
        raise InputError(
            f"encoder.weights={config.weights} does not fit encoder.name={config.name}:\n{first_lines}"
        ) from error


def _read_weights(config: EncoderConfig) -> dict[str, Tensor]:
    weights = str(config.weights)
    known = torchvision.models.get_model_weights(config.name)
    if weights in known.__members__ or weights == "DEFAULT":
        choice = known[weights]
        try:
            return choice.get_state_dict(progress=False, check_hash=True)
        except (urllib.error.URLError, OSError, RuntimeError) as error:
            cache = Path(torch.hub.get_dir()) / "checkpoints" / choice.url.rsplit("/", 1)[-1]
            raise InputError(
                f"encoder.weights={weights} could not be downloaded ({error}).\nOn a machine with a network fetch\n"
                f"  {choice.url}\nand put it at\n  {cache}\nor anywhere, and set encoder.weights=FILE."
            ) from error
    path = Path(weights)
    if not path.is_file():
        names = ", ".join(known.__members__)
        raise InputError(f"encoder.weights={weights} is neither a file nor weights of {config.name} ({names}).")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch and safetensors raise their own kinds for a file that is something else
        raise InputError(f"encoder.weights={weights} cannot be read as a state dict: {error}") from error


def _renamed(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """torchvision's parameter names -> ours; the classifier on top is left out."""
    if name == "mobilenet_v2":
        stage_of = {i: (stage, i - a) for stage, (a, b) in _MOBILENET_STAGES.items() for i in range(a, b)}
        parts = [(key.split(".", 2), value) for key, value in state.items() if key.startswith("features.")]
        return {f"{stage_of[int(i)][0]}.{stage_of[int(i)][1]}.{rest}": value for (_, i, rest), value in parts}
    places = {"conv1": "layer1.0.0", "bn1": "layer1.0.1", "layer1": "layer1.1"}
    pairs = [(key.split(".", 1), value) for key, value in state.items() if not key.startswith("fc.")]
    return {f"{places.get(top, top)}.{rest}": value for (top, rest), value in pairs}
