"""Rates, losses and averaged weights, against their formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from captioning.config import Config, DecoderConfig, EncoderConfig, OptimConfig
from captioning.model.captioner import Captioner
from captioning.model.losses import count_in_top5, token_loss
from captioning.training.ema import WeightAverage
from captioning.training.optim import adamw, lr_multiplier, set_lrs


def captioner(**encoder) -> Captioner:
    torch.manual_seed(0)
    return Captioner(Config(encoder=EncoderConfig("resnet18", **encoder), decoder=DecoderConfig("lstm", 8, 8, 1)), 9)


@pytest.mark.parametrize(
    ("schedule", "after_warm_up"),
    [
        ("constant", lambda done: 1.0),
        ("linear", lambda done: 1 - done),
        ("cosine", lambda done: math.cos(math.pi / 2 * done) ** 2),
    ],
)
def test_the_rate_is_a_function_of_the_step(schedule, after_warm_up):
    config = OptimConfig(warmup_steps=4, schedule=schedule)
    factors = [lr_multiplier(step, 24, config) for step in range(24)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:] == pytest.approx([after_warm_up((step - 4) / 20) for step in range(4, 24)], abs=1e-12)
    assert lr_multiplier(30, 24, config) == pytest.approx(after_warm_up(1.0), abs=1e-12), (
        "a run made shorter stays there"
    )


def test_each_stage_has_its_rate_and_what_is_frozen_has_none():
    model = captioner(trainable="layer3")
    optimizer = adamw(model, OptimConfig(encoder_lr=1e-4, layerwise_lr_decay=0.5, weight_decay=0.1))
    lrs = set_lrs(optimizer, 0.5)
    assert lrs == pytest.approx({"encoder-layer4": 5e-5, "encoder-layer3": 2.5e-5, "decoder": 5e-4})
    in_groups = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(in_groups) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    for group in optimizer.param_groups:
        assert all((p.dim() > 1) == (group["weight_decay"] > 0) for p in group["params"])
    model.encoder.train_from("none")
    assert list(set_lrs(optimizer, 1.0)) == ["decoder"]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_parts_of_the_loss_add_up_to_the_mean_over_the_step(smoothing):
    """Two ranks, one with two micro-batches and one with an empty one."""
    torch.manual_seed(0)
    logits, targets = torch.randn(7, 30), torch.randint(0, 30, (7,))
    parts = [
        token_loss(logits[rows], targets[rows], step_targets=7, world_size=2, label_smoothing=smoothing)
        for rows in (slice(0, 3), slice(3, 7), slice(7, 7))
    ]
    objective, loss = (sum(float(part[i]) for part in parts) / 2 for i in (0, 1))
    assert objective == pytest.approx(float(F.cross_entropy(logits, targets, label_smoothing=smoothing)), rel=1e-5)
    assert loss == pytest.approx(float(F.cross_entropy(logits, targets)), rel=1e-5), "perplexity is not smoothed"


def test_half_precision_logits_are_summed_in_single():
    torch.manual_seed(0)
    logits, targets = torch.randn(4096, 50).bfloat16(), torch.randint(0, 50, (4096,))
    loss = token_loss(logits, targets, 4096, 1)[1]
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(F.cross_entropy(logits.double(), targets)), rel=1e-5)


def test_top_five_counts_as_topk_does():
    torch.manual_seed(0)
    logits, targets = torch.randn(200, 12), torch.randint(0, 12, (200,))
    expected = (logits.topk(5).indices == targets.unsqueeze(1)).any(dim=1).sum()
    assert count_in_top5(logits, targets) == expected and 0 < expected < 200
    assert count_in_top5(logits[:0], targets[:0]) == 0


def test_averaged_weights_follow_their_formula_and_step_aside():
    model = captioner(trainable="layer4")
    average = WeightAverage(model, decay=0.15)
    weight, expected = model.decoder.classifier.weight, model.decoder.classifier.weight.detach().clone()
    for step in range(3):
        with torch.no_grad():
            weight.add_(1.0)
        average.update(step)
        decay = min(0.15, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight.detach()
    own = weight.detach().clone()
    with average.in_place():
        torch.testing.assert_close(weight.detach(), expected)
    assert torch.equal(weight, own)
    state = average.state()
    torch.testing.assert_close(state["decoder.classifier.weight"], expected)
    assert state.keys() == model.state_dict().keys()
    other = WeightAverage(captioner(trainable="layer4"), decay=0.15)
    other.load(state)
    torch.testing.assert_close(other.state()["decoder.classifier.weight"], expected)
