"""A step that was started: nothing waits for it, the next one's samples are read meanwhile; it may yet be skipped."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from captioning.config import DECODERS
from captioning.distributed.ranks import Ranks
from captioning.model.captioner import Captioner
from captioning.training import trainer
from captioning.training.objectives import CrossEntropy, StepScope
from captioning.training.train_step import TrainStep
from tests.conftest import settings
from tests.distributed.test_train_step import batch_of, everything_of, run_config, same, tiny

GOOD, BAD = [4, 5, 6], [8, 5, 6]


class ReadBacks(TorchDispatchMode):
    """Counts how often a tensor's value is asked for, for which a GPU has to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*args, **(kwargs or {}))


def train_step_with(decoder: str = "lstm", **optim) -> TrainStep:
    config, captioner = tiny(max_skipped_steps=9, ema_decay=0.9)
    config = replace(config, optim=replace(config.optim, **optim))
    if decoder != "lstm":
        config = replace(config, decoder=replace(config.decoder, name=decoder, num_heads=2))
        captioner = Captioner(config, 9)
    accelerator = Accelerator(mixed_precision="no", cpu=True)
    return TrainStep(captioner, CrossEntropy(), config, accelerator, Ranks(0, 1), total_steps=9)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_step_is_started_without_waiting_for_it_and_asked_once(decoder):
    train_step, batches = train_step_with(decoder), [batch_of(GOOD, 0), batch_of(GOOD, 1)]
    train_step.step(StepScope(0, 4, 12.0, 1), batches)
    with ReadBacks() as starting:
        started = train_step.start(StepScope(1, 4, 12.0, 1), batches)
    with ReadBacks() as finishing:
        result = train_step.finish(started)
    assert (starting.count, finishing.count, result.skipped) == (0, 1, False)


@pytest.mark.parametrize("optim", [{}, {"name": "adam"}, {"name": "sgd"}, {"name": "sgd", "momentum": 0.0}])
def test_a_run_whose_first_steps_are_skipped_begins_as_if_they_had_not_been(optim):
    skipping, other = train_step_with(**optim), train_step_with(**optim)
    for step in range(2):
        assert skipping.step(StepScope(step, 2, 6.0, 1), [batch_of(BAD, 0)]).skipped
    for train_step in (skipping, other):
        assert not train_step.step(StepScope(2, 2, 6.0, 1), [batch_of(GOOD, 0)]).skipped
    assert same(everything_of(skipping), everything_of(other))


def test_the_next_samples_are_read_while_a_step_is_computed_but_not_before_a_pause(
    scene_shards, tmp_path, empty_config, monkeypatch
):
    """Before a checkpoint or a validation they are not: signals are heard when samples are read, and it may be long."""
    happened = []

    def noted(name, function):
        def call(*args):
            happened.append(name)
            return function(*args)

        return call

    monkeypatch.setattr(TrainStep, "start", noted("start", TrainStep.start))
    monkeypatch.setattr(TrainStep, "finish", noted("finish", TrainStep.finish))
    monkeypatch.setattr(trainer, "own_samples", noted("read", trainer.own_samples))
    changes = {"train__total_steps": 5, "checkpoint__every_steps": 3}
    run_config(settings(scene_shards, tmp_path / "run", **changes), empty_config)
    ahead, alone = ["start", "read", "finish"], ["start", "finish"]
    assert happened == ["read", *ahead, *ahead, *alone, "read", *ahead, *alone]
