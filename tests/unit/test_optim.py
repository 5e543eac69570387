"""Rates, losses and averaged weights, against their formulas."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from captioning.config import Config, DecoderConfig, EncoderConfig, EvaluateConfig, OptimConfig, from_dict
from captioning.model import losses
from captioning.model.captioner import Captioner
from captioning.model.losses import count_in_top, token_loss
from captioning.runs.checkpoint import RunState
from captioning.training.best import update_best
from captioning.training.ema import WeightAverage
from captioning.training.optim import (
    build_optimizer,
    decays_after,
    encoder_multiplier,
    load_optimizer,
    lr_multiplier,
    set_lrs,
)
from shards.errors import InputError


def captioner(**encoder) -> Captioner:
    torch.manual_seed(0)
    return Captioner(Config(encoder=EncoderConfig("resnet18", **encoder), decoder=DecoderConfig("lstm", 8, 8, 1)), 9)


@pytest.mark.parametrize(
    ("schedule", "after_warm_up"),
    [
        ("constant", lambda done: 1.0),
        ("linear", lambda done: 1 - done),
        ("cosine", lambda done: math.cos(math.pi / 2 * done) ** 2),
        ("step", lambda done: 0.5 ** (round(20 * done) // 6)),
        ("plateau", lambda done: 0.25),
        ("noam", lambda done: math.sqrt(4 / (4 + round(20 * done) + 1))),
    ],
)
def test_the_rate_is_a_function_of_the_step(schedule, after_warm_up):
    config = OptimConfig(warmup_steps=4, schedule=schedule, decay_steps=6)
    factors = [lr_multiplier(step, 24, config, decays=2) for step in range(24)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:] == pytest.approx([after_warm_up((step - 4) / 20) for step in range(4, 24)], abs=1e-12)
    if schedule in ("linear", "cosine"):
        assert lr_multiplier(30, 24, config) == pytest.approx(0, abs=1e-12), "a run made shorter stays there"


def test_the_rate_falls_when_validations_stay_without_a_better_one():
    """After every two in a row; a better one begins the count anew, and other schedules never fall so."""
    config, evaluation = OptimConfig(schedule="plateau", decay_patience=2), EvaluateConfig(best_metric="CIDEr")
    state, decays = RunState(1, 8, 1, "f"), []
    for step, score in enumerate([0.3, 0.2, 0.3, 0.1, 0.1, 0.4, 0.3, 0.5, 0.1, 0.1], start=1):
        state = update_best(replace(state, step=step), evaluation, {"CIDEr": score})
        state = replace(state, lr_decays=decays_after(state, config))
        decays.append(state.lr_decays)
    assert decays == [0, 0, 1, 1, 2, 2, 2, 2, 2, 3]
    assert decays_after(replace(state, lr_decays=0), OptimConfig(schedule="cosine")) == 0


def test_the_encoder_warms_up_from_where_it_is_unfrozen():
    config = OptimConfig(encoder_lr=1e-4, decoder_lr=1e-3, encoder_warmup_steps=4)
    optimizer = build_optimizer(captioner(trainable="layer4"), config)
    factors = []
    for step in range(8, 16):
        rates = set_lrs(optimizer, 1.0, encoder_multiplier(step, 10, config))
        factors.append(rates["encoder"] / 1e-4)
        assert rates["decoder"] == 1e-3
    assert factors == pytest.approx([0, 0, 0.25, 0.5, 0.75, 1, 1, 1])
    assert encoder_multiplier(0, 0, OptimConfig()) == 1


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_an_optimizer_goes_on_from_its_state_to_the_bit(name):
    config = OptimConfig(name=name, weight_decay=0.01, momentum=0.8)

    def stepped(model: Captioner, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn_like(p) if p.requires_grad else None
            optimizer.step()

    whole, first, second = (captioner(trainable="layer4") for _ in range(3))
    stepped(whole, build_optimizer(whole, config), range(4))
    stepped(first, before := build_optimizer(first, config), range(2))
    second.load_state_dict(first.state_dict())
    after = build_optimizer(second, replace(config, momentum=0.8))
    load_optimizer(after, before.state_dict())
    stepped(second, after, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(second.parameters(), whole.parameters(), strict=True))
    other = build_optimizer(second, replace(config, name="adamw" if name == "sgd" else "sgd"))
    with pytest.raises((LookupError, ValueError, TypeError)):
        load_optimizer(other, before.state_dict())


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"schedule": "step"}, "optim.decay_steps"),
        ({"schedule": "cosine", "decay_steps": 3}, "optim.decay_steps"),
        ({"schedule": "plateau"}, "optim.schedule"),
        ({"schedule": "noam"}, "optim.warmup_steps"),
    ],
)
def test_a_schedule_that_lacks_what_it_goes_by_is_refused(section, key):
    with pytest.raises(InputError, match=key):
        from_dict({"run": "r", "data": {"train": "t"}, "train": {"epochs": 1}, "optim": section}, "test")


def test_each_stage_has_its_rate_and_what_is_frozen_has_none():
    model = captioner(trainable="layer3")
    optimizer = build_optimizer(model, OptimConfig(encoder_lr=1e-4, layerwise_lr_decay=0.5, weight_decay=0.1))
    rates = set_lrs(optimizer, 0.5)
    assert rates == pytest.approx({"encoder-layer4": 5e-5, "encoder-layer3": 2.5e-5, "decoder": 5e-4})
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


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_loss_has_torch_s_gradient_whatever_the_rows_are_cut_into(smoothing, kind, monkeypatch):
    torch.manual_seed(0)
    logits, targets = torch.randn(23, 30).to(kind).requires_grad_(), torch.randint(0, 30, (23,))
    F.cross_entropy(logits.float(), targets, label_smoothing=smoothing, reduction="sum").backward()
    expected, logits.grad = logits.grad, None
    monkeypatch.setattr(losses, "_parts", lambda x: (slice(start, start + 5) for start in range(0, len(x), 5)))
    token_loss(logits, targets, 1.0, 1, label_smoothing=smoothing)[0].backward()
    assert logits.grad.dtype == kind
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_loss_keeps_nothing_of_the_logits_size_but_the_logits(kind):
    logits, kept = torch.randn(40, 3000).to(kind).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        token_loss(logits, torch.zeros(40, dtype=torch.int64), 40.0, 1, label_smoothing=0.1)
    assert [x.data_ptr() for x in kept if x.numel() >= logits.numel()] == [logits.data_ptr()]


def test_half_precision_logits_are_summed_in_single():
    torch.manual_seed(0)
    logits, targets = torch.randn(4096, 50).bfloat16(), torch.randint(0, 50, (4096,))
    loss = token_loss(logits, targets, 4096, 1)[1]
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(F.cross_entropy(logits.double(), targets)), rel=1e-5)


@pytest.mark.parametrize("k", [1, 5, 11])
def test_the_likeliest_are_counted_as_topk_does(k):
    torch.manual_seed(0)
    logits, targets = torch.randn(200, 12), torch.randint(0, 12, (200,))
    expected = (logits.topk(k).indices == targets.unsqueeze(1)).any(dim=1).sum()
    assert count_in_top(k, logits, targets) == expected and 0 < expected < 200
    assert count_in_top(k, logits[:0], targets[:0]) == 0


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
