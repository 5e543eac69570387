"""BatchNorm folded into convolutions: the same features, always those of the present weights, and no BatchNorm left."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from captioning.config import ENCODERS, EncoderConfig
from captioning.model.encoders import build_encoder
from captioning.model.encoders.backbone import TorchvisionEncoder

NAMES = ["resnet18", "resnet50", "resnext50_32x4d", "mobilenet_v2", "mobilenet_v3_small"]  # each kind of block


def encoder(name: str = "resnet18", **changes) -> TorchvisionEncoder:
    """With statistics and scales of BatchNorm that would be noticed if they were left out."""
    torch.manual_seed(1)
    made = build_encoder(EncoderConfig(name, **changes))
    with torch.no_grad():
        for module in made.modules():
            if isinstance(module, nn.BatchNorm2d):
                for vector in (module.weight, module.running_var):
                    vector.uniform_(0.5, 1.5)
                for vector in (module.bias, module.running_mean):
                    vector.uniform_(-0.3, 0.3)
    return made


def unfolded(made: TorchvisionEncoder) -> TorchvisionEncoder:
    """A copy that does not fold."""
    plain = copy.deepcopy(made)
    plain._folded = {}
    return plain


def assert_same(made: TorchvisionEncoder, x: torch.Tensor) -> None:
    with torch.no_grad():
        got, expected = made(x), unfolded(made)(x)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


IMAGES = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NAMES)
def test_every_backbone_gives_the_same_features_without_batch_norm(name):
    made = encoder(name).eval()
    assert_same(made, IMAGES)
    assert list(made._folded) == list(ENCODERS[name].stages)
    for folded in made._folded.values():
        assert folded._twin is not None and not any(isinstance(m, nn.BatchNorm2d) for m in folded._twin.modules())


def test_what_changes_the_weights_changes_the_features():
    made, other = encoder().eval(), encoder().eval()
    assert_same(made, IMAGES)
    with torch.no_grad():
        made.stages["layer3"][0].conv1.weight.mul_(3)
        assert_same(made, IMAGES)
        made.stages["layer4"][0].bn1.weight = nn.Parameter(torch.full((512,), 2.0))
        assert_same(made, IMAGES)
    made.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert torch.equal(made(IMAGES), other(IMAGES))
        twice = made.double().float()
        assert torch.equal(twice(IMAGES), other(IMAGES)) and twice.mean.dtype == torch.float32


def test_a_twin_is_made_once():
    made = encoder().eval()
    with torch.inference_mode():
        made(IMAGES)
        first = {name: folded._twin for name, folded in made._folded.items()}
        made(IMAGES)
    assert all(made._folded[name]._twin is twin for name, twin in first.items())


def test_training_above_frozen_stages_learns_the_same():
    folding = encoder(trainable="layer4").train()
    plain = unfolded(folding)
    for each in (folding, plain):
        each(IMAGES).square().mean().backward()
    assert folding._folded["layer3"]._twin is not None and folding._folded["layer4"]._twin is None
    for (name, mine), theirs in zip(folding.named_parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-2, atol=1e-3 * float(theirs.grad.abs().max()))
    with torch.no_grad():
        folding.stages["layer4"][1].conv2.weight.add_(0.1)
    assert_same(folding.eval(), IMAGES)
    assert folding.train()._folded["layer4"]._twin is None, "no memory for what is about to change"


def test_it_can_be_turned_off():
    assert build_encoder(replace(EncoderConfig("resnet18"), fold_batch_norm=False)).eval()._folded == {}


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_within_autocast_the_twin_has_weights_of_its_type_and_gives_the_same(name):
    """As autocast itself rounds them, image by image; its own copies of frozen weights it makes in every step."""
    made = encoder(name).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = made(IMAGES).float(), unfolded(made)(IMAGES).float()
        twins = {stage: folded._twin for stage, folded in made._folded.items()}
        assert made(IMAGES).dtype == torch.bfloat16 and all(made._folded[s]._twin is twin for s, twin in twins.items())
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))
    convolutions = [m for twin in twins.values() for m in twin.modules() if isinstance(m, nn.Conv2d)]
    assert {m.weight.dtype for m in convolutions} == {torch.bfloat16}
    assert {p.dtype for p in made.parameters()} == {torch.float32}
    assert_same(made, IMAGES)  # without autocast again: in float32


def test_state_dict_and_parameters_know_of_no_twin():
    made = encoder().eval()
    before = list(made.state_dict()), len(list(made.parameters()))
    with torch.no_grad():
        made(IMAGES)
    assert (list(made.state_dict()), len(list(made.parameters()))) == before
