"""Which types a GPU would compute in, on a machine without one: PyTorch's fake tensors say they are on a GPU, and have
the type that an operation there would give, without a value."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from captioning.config import Config, DecoderConfig, EncoderConfig
from captioning.data.padded_captions import PaddedCaptions
from captioning.model.captioner import Captioner
from captioning.model.losses import token_loss
from captioning.model.sampling import policy

KINDS = ["lstm", "attention", "transformer", "updown"]
RECURRENT = ["lstm", "attention", "updown"]
TYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = list(TYPES)


@contextmanager
def gpu_autocast(precision: str) -> Iterator[None]:
    """As Accelerate has it around the model; ``torch.autocast`` itself asks for a real GPU."""
    cudnn = torch.backends.cudnn.flags(enabled=False)  # it would ask for a driver; without it the types are as telling
    with warnings.catch_warnings(), cudnn, FakeTensorMode(), torch.device("cuda"):
        warnings.simplefilter("ignore")
        if TYPES[precision] is not None:
            torch.set_autocast_enabled("cuda", True)
            torch.set_autocast_dtype("cuda", TYPES[precision])
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()


def on_gpu(model: nn.Module) -> nn.Module:
    """With fake tensors on a GPU in place of its own."""
    for module in model.modules():
        tensors = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        for name, tensor in tensors.items():
            fake = torch.empty(tensor.shape, dtype=tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            setattr(module, name, nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_parameter else fake)
    return model


def captioner(kind: str) -> Captioner:
    layers = 2 if kind in ("lstm", "transformer") else 1
    decoder = DecoderConfig(kind, 12, 12, layers, num_heads=3, dropout=0.1)
    encoder = EncoderConfig("resnet18", trainable="layer4", fold_batch_norm=False)  # fake tensors cannot be folded
    return Captioner(Config(encoder=encoder, decoder=decoder), 9)


class Recorded:
    """What every recurrence of a model gives and computes with."""

    def __init__(self, model: nn.Module):
        self.types: list[torch.dtype] = []
        for module in model.modules():
            if isinstance(module, nn.LSTM | nn.LSTMCell):
                module.register_forward_hook(self)

    def __call__(self, module: nn.Module, inputs: tuple, outputs: tuple) -> None:
        tensors = [t for t in torch.utils._pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor)]
        self.types += [tensor.dtype for tensor in [*tensors, *module.parameters()]]


def said() -> PaddedCaptions:
    words = torch.tensor([[4, 5, 2, 0], [4, 5, 6, 2], [5, 2, 0, 0]])
    return PaddedCaptions.of(words, torch.tensor([3, 4, 2]), torch.tensor([0, 0, 1]))


def images() -> torch.Tensor:
    return torch.empty(2, 3, 64, 64, dtype=torch.uint8)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_training_keeps_recurrences_and_the_loss_in_float32(kind, precision):
    model, captions = captioner(kind).train(), said()
    with gpu_autocast(precision):
        on_gpu(model)
        recorded, captions = Recorded(model), captions.each(lambda t: torch.empty(t.shape, dtype=t.dtype))
        logits, penalty = model(images(), captions)
        loss, cross_entropy = token_loss(logits, captions.targets, 9.0, 1, label_smoothing=0.1)
        assert logits.device.type == "cuda" and logits.dtype == (TYPES[precision] or torch.float32)
        assert loss.dtype == cross_entropy.dtype == penalty.float().dtype == torch.float32
    assert set(recorded.types) == ({torch.float32} if kind in RECURRENT else set())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_search_and_samples_keep_recurrences_and_log_probabilities_in_float32(kind, precision):
    model = captioner(kind).eval()
    with gpu_autocast(precision), torch.no_grad():
        on_gpu(model)
        recorded, rows = Recorded(model), torch.arange(8) // 4
        state = model.decoder.start(model.encode(images())).select(rows)
        for _ in range(2):
            logits, state = model.decoder.step(state, torch.ones(8, dtype=torch.int64))
            state = state.select(rows)
        assert policy(logits).dtype == torch.float32
    assert set(recorded.types) == ({torch.float32} if kind in RECURRENT else set())


def test_a_plain_lstm_would_be_noticed():
    """torch's own under bfloat16 autocast: on a GPU it is cuDNN's, in float16."""
    model = nn.LSTM(4, 4)
    with gpu_autocast("bf16"):
        on_gpu(model)
        recorded = Recorded(model)
        model(torch.zeros(1, 1, 4))
    assert set(recorded.types) != {torch.float32}
