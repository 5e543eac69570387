"""The best checkpoint by any metric, and when a run ends early."""

import json
from dataclasses import replace

import pytest
import torch

from captioning.config import EvaluateConfig
from captioning.runs import checkpoint
from captioning.runs.checkpoint import RunState
from captioning.training.best import update_best, why_stop_early
from shards.errors import InputError
from tests.conftest import run_command, settings, train_command


def after(values: list[float], config: EvaluateConfig) -> RunState:
    """The state after validations at steps 1, 2, ... found these values of the metric."""
    state = RunState(0, 0, 1, "")
    for step, value in enumerate(values, start=1):
        state = update_best(replace(state, step=step), config, {config.best_metric: value, "other": -value})
    return state


def test_the_best_is_the_highest_score_or_the_lowest_loss():
    scores = [0.1, 0.5, 0.5, 0.3, float("nan")]
    highest, lowest = after(scores, EvaluateConfig()), after(scores, EvaluateConfig(best_metric="loss"))
    assert (highest.best_step, highest.best_score, highest.validations_since_best) == (2, 0.5, 3)
    assert (lowest.best_step, lowest.best_score, lowest.validations_since_best) == (1, 0.1, 4)
    assert after([float("nan"), 0.2], EvaluateConfig()).best_step == 2
    with pytest.raises(InputError, match=r"best_metric=class_accuracy .* Choose one of CIDEr"):
        update_best(RunState(1, 8, 1, ""), EvaluateConfig(best_metric="class_accuracy"), {"CIDEr": 1.0})


def test_patience_counts_validations_without_a_better_one():
    patient = EvaluateConfig(patience=2)
    assert why_stop_early(after([0.1, 0.0, 0.2, 0.2], patient), patient) is None
    reason = why_stop_early(after([0.1, 0.2, 0.2, 0.1], patient), patient)
    assert reason == "no better CIDEr in 2 validations (best: 0.2000 at step 2)"
    assert why_stop_early(after([0.2] * 9, EvaluateConfig()), EvaluateConfig()) is None


def test_a_run_that_gets_no_better_stops_says_so_and_stays_stopped(scene_shards, tmp_path, empty_config):
    run = tmp_path / "run"
    changes = {
        "data__val": scene_shards / "val.json",
        "evaluate__every_steps": 2,
        "evaluate__best_metric": "loss",
        "evaluate__patience": 2,
        "optim__decoder_lr": 3.0,  # the loss only rises
        "optim__schedule": "linear",
        "train__total_steps": 40,
        "train__ema_decay": 0.5,
    }
    stopped = []
    for patience in (2, 3):
        overrides = settings(scene_shards, run, **{**changes, "evaluate__patience": patience})
        done = run_command(train_command(1, overrides, empty_config))
        assert done.returncode == 0, done.stderr[-2000:]
        name, detail = (run / "status").read_text().splitlines()
        assert name == "finished" and f"no better loss in {patience} validations (best:" in detail
        stopped.append(int(detail.split()[1]))
    assert stopped[1] == stopped[0] + 2, "it counts on where it stopped"
    lines = [json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines()]
    best = checkpoint.find(run, "best", pytest.fail)
    assert best.state.step == min(lines, key=lambda line: line["teacher_forcing"]["loss"])["step"]
    assert best.captioner().keys() == best.model().keys()
    weight = "decoder.classifier.weight"
    assert not torch.equal(best.captioner()[weight], best.model()[weight]), "captions are written with averaged weights"
