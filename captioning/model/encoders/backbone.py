"""What torchvision's backbones have in common as encoders: freezing, folding, checkpointing, pretrained weights.

A family's file derives from ``TorchvisionEncoder`` and says how its models are cut into stages, and how the last
stage's output becomes a feature map and a vector.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from captioning.config import ENCODERS, EncoderConfig
from captioning.model.encoders.batch_norm import Folded, eval_batch_norm, has_batch_norm, is_batch_norm, recomputation
from captioning.model.encoders.compiling import keep_graphs_of
from captioning.model.encoders.weights import read_weights
from captioning.model.features import masked_mean
from shards.errors import InputError, listed

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which torchvision's weights were trained with


class TorchvisionEncoder(nn.Module, ABC):
    """A torchvision backbone without its classifier; implements the ``Encoder`` protocol.

    Stages below ``config.trainable`` get no gradient, and their BatchNorm, dropout and stochastic depth stay in
    evaluation mode. What concerns BatchNorm does nothing in a backbone that has none.
    """

    no_weight_decay: tuple[str, ...] = ()
    mean: Tensor
    std: Tensor

    def __init__(self, config: EncoderConfig, image_size: int):
        super().__init__()
        self.name, self.image_size = config.name, image_size
        names = ENCODERS[config.name].stages
        stages, self.feature_size = self.cut(self.build())
        self.stages = nn.ModuleDict(dict(zip(names, stages, strict=True)))
        if config.last_stage is not None and config.last_stage != names[-1]:
            for name in names[names.index(config.last_stage) + 1 :]:
                del self.stages[name]
            self.feature_size = self._channels()
        self.freeze_batch_norm, self.gradient_checkpointing = config.freeze_batch_norm, config.gradient_checkpointing
        folding = [name for name, stage in self.stages.items() if config.fold_batch_norm and has_batch_norm(stage)]
        self._folded = {name: Folded() for name in folding}
        self._compiled: set[str] = set()  # stages
        self._batch_sizes: dict[bool, int] = {}  # of compiled graphs, in training and not
        self.train_from(config.trainable)
        self.register_buffer("mean", torch.tensor(_MEAN).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(3, 1, 1) * 255, persistent=False)

    # What a family says.

    def build(self) -> nn.Module:
        """torchvision's own model, randomly initialised."""
        return torchvision.models.get_model(self.name, weights=None)

    @staticmethod
    @abstractmethod
    def cut(model: Any) -> tuple[list[nn.Module], int]:
        """torchvision's model -> its stages bottom to top, and D. A stage takes the output of the one below it, the
        first takes normalised images [B, 3, S, S]. The stages share the model's parameters; its classifier is left
        out."""

    def feature_map(self, x: Tensor) -> Tensor:
        """The last stage's output -> feature map [B, D, h, w]."""
        return x

    def pool(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """The last stage's output -> what torchvision's classifier sees [B, D], padding left out (see masked_mean)."""
        return masked_mean(x, valid, self.image_size)

    def fit_to_image_size(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """torchvision's weights, of any image size -> those for ``image_size``."""
        return state

    # What they share.

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> feature map [B, D, h, w]."""
        return self.feature_map(self._last_stage(images))

    def pooled(self, images: Tensor, valid: Tensor | None = None) -> Tensor:
        """uint8 [B, 3, S, S] -> one vector an image [B, D]; ``valid`` int [B, 4] says where there is image."""
        return self.pool(self._last_stage(images), valid)

    def train_from(self, trainable: str) -> None:
        """Train this stage and those above it, ``all`` or ``none`` of them; the others are frozen.

        Raises:
            InputError: for what is no stage of this encoder.
        """
        names = tuple(self.stages)
        if trainable not in ("none", "all", *names):
            raise InputError(f"encoder.trainable={trainable}: {self.name} has none, all, {', '.join(names)}.")
        first = {"none": len(names), "all": 0}.get(trainable)
        self.frozen = names[: names.index(trainable) if first is None else first]
        for name, stage in self.stages.items():
            stage.requires_grad_(name not in self.frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> "TorchvisionEncoder":
        super().train(mode)
        for name in self.frozen:
            self.stages[name].eval()
        for name in self._folded.keys() - set(self.frozen) if mode else ():
            self._folded[name].forget()  # its weights are about to change
        if self.freeze_batch_norm:
            eval_batch_norm(self)
        return self

    def compile_stages(self, training_batch: int, evaluation_batch: int, **options: Any) -> None:
        """torch.compile, a graph for each stage: frozen and trained ones, and equal blocks, are graphs of their own.

        A graph is for one batch size; smaller batches are filled up to these, but where BatchNorm would see it. Stages
        with SyncBatchNorm are left alone: it exchanges values with other ranks in the middle of the graph.
        """
        keep_graphs_of(len(self.stages))
        options = {"dynamic": False, **options}
        self._batch_sizes = {True: training_batch, False: evaluation_batch}
        for name, stage in self.stages.items():
            if not any(isinstance(module, nn.SyncBatchNorm) for module in stage.modules()):
                stage.compile(**options)  # in place: its parameters keep their names
                self._compiled.add(name)
        for folded in self._folded.values():
            folded.compile(**options)

    def load_pretrained(self, weights: str | None) -> None:
        """Fill the stages with torchvision's weights of this name (IMAGENET1K_V2), or from a file of its state dict.

        Raises:
            InputError: for an unknown name, a missing or unfitting file, or weights that cannot be downloaded.
        """
        if weights is None:
            return
        state = read_weights(self.name, weights)
        try:
            self.stages.load_state_dict(self._weights_of_stages(state))
        except (RuntimeError, KeyError, ValueError) as error:
            first_lines = "\n".join(line[:160] for line in str(error).splitlines()[:4])
            raise InputError(
                f"encoder.weights={weights} does not fit encoder.name={self.name}:\n{first_lines}"
            ) from error

    def _weights_of_stages(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """torchvision's state dict -> that of our stages. torchvision's own model takes it: it knows older names."""
        with init_empty_weights():  # parameters alone: some models compute with tensors while they are built
            model = self.build()
        used = {id(tensor) for tensor in self._stages_of(model).state_dict(keep_vars=True).values()}
        classifier = {key for key, tensor in model.state_dict(keep_vars=True).items() if id(tensor) not in used}
        backbone = {key: value for key, value in state.items() if key not in classifier}
        fit = model.load_state_dict(self.fit_to_image_size(backbone), strict=False, assign=True)
        missing = [f"{key} is missing" for key in fit.missing_keys if key not in classifier]
        if wrong := missing + [f"{key} is unknown" for key in fit.unexpected_keys]:
            raise ValueError(listed(wrong, limit=3))
        return self._stages_of(model).state_dict()

    def _stages_of(self, model: nn.Module) -> nn.ModuleDict:
        """torchvision's model cut into our stages, without those above the last."""
        return nn.ModuleDict(dict(zip(self.stages, self.cut(model)[0], strict=False)))

    @torch.no_grad()
    def _channels(self) -> int:
        """D of the feature map, found without computing it: tensors on the meta device have shapes alone."""
        x = torch.empty(1, 3, self.image_size, self.image_size, device="meta")
        for stage in self.stages.values():
            tensors = {name: tensor.to("meta") for name, tensor in stage.state_dict().items()}
            x = functional_call(stage.eval(), tensors, x)
        return self.feature_map(x).shape[1]

    def _last_stage(self, images: Tensor) -> Tensor:
        given, missing = len(images), self._batch_sizes.get(self.training, 0) - len(images)
        if missing > 0:
            images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, missing))
        x = ((images.float() - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():  # nothing below the first trained stage is kept for a backward pass
            for name in self.frozen:
                x = self._fixed(name, x)
        if missing > 0 and any(is_batch_norm(m) and m.training for m in self.modules()):
            x = x[:given]
        fixed = not (self.training or torch.is_grad_enabled())
        for name in list(self.stages)[len(self.frozen) :]:
            x = self._fixed(name, x) if fixed else self._trained(self.stages[name], x)
        return x[:given]

    def _fixed(self, name: str, x: Tensor) -> Tensor:
        """The output of a stage in evaluation mode, without gradients. One that is trained at other times is not folded
        if it is compiled: each of its twins would be compiled anew."""
        fold = name in self._folded and (name in self.frozen or name not in self._compiled)
        return self._folded[name](self.stages[name], x) if fold else self.stages[name](x)

    def _trained(self, stage: nn.Module, x: Tensor) -> Tensor:
        """A stage's output; with gradient checkpointing its insides are computed again for the backward pass
        (https://arxiv.org/abs/1604.06174)."""
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return stage(x)
        return checkpoint(stage, x, use_reentrant=False, context_fn=lambda: recomputation(stage))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TorchvisionEncoder":
        for folded in self._folded.values():
            folded.forget()
        return super()._apply(fn, recurse)
