"""A run with whole images, Up-Down, scheduled sampling, a plateau schedule and a test split: killed and continued."""

import json
import os
import subprocess
import time

import pytest
import safetensors.torch
import torch

from captioning.config import load_config
from captioning.runs import checkpoint
from captioning.runs.run_folder import RunFolder
from captioning.training.preparation import prepare
from shards import sources
from shards.errors import InputError
from shards.packing.packer import Settings, pack
from shards.sources import scenes
from tests.conftest import CPU_PROCESSES, ROOT, module, run_command, settings, train_command
from tests.distributed.test_training import kill_all


@pytest.fixture(scope="module")
def three_splits(scene_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("test-split")
    pack(sources.coco(*scenes.write(folder / "drawn", "test", 7, seed=5)), "test", folder, Settings())
    return scene_shards, folder / "test.json"


def test_a_killed_run_ends_as_the_uninterrupted_one_and_scores_its_test_split_once(
    three_splits, tmp_path, empty_config
):
    shards, test = three_splits
    changes = {
        "data__val": shards / "val.json", "data__test": test, "data__crop_mode": "pad", "data__flip": "true",
        "data__color_jitter": 0.2, "decoder__name": "updown", "decoder__dropout": 0.2, "train__total_steps": 16,
        "train__scheduled_sampling": 0.5, "optim__schedule": "plateau", "optim__decay_patience": 1,
        "encoder__unfreeze_at_step": 4, "optim__encoder_warmup_steps": 3, "evaluate__every_steps": 3,
        "checkpoint__every_steps": 3,
    }  # fmt: skip
    commands = [train_command(1, settings(shards, tmp_path / name, **changes), empty_config) for name in "ab"]
    done = run_command(commands[0])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "test split, step" in done.stderr

    process = subprocess.Popen(
        commands[1], env={**os.environ, **CPU_PROCESSES}, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while 6 not in checkpoint.steps(tmp_path / "b"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    kill_all(process.pid)
    process.wait()
    assert not (tmp_path / "b" / "scores-test.json").exists()
    assert run_command(commands[1]).returncode == 0

    ends = [checkpoint.find(tmp_path / name, "latest", pytest.fail) for name in "ab"]
    states = [end.state for end in ends]
    assert states[0] == states[1] and states[0].step == 16 and states[0].lr_decays > 0
    whole, resumed = (safetensors.torch.load_file(end.folder / "model.safetensors") for end in ends)
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []

    documents = [json.loads((tmp_path / name / "scores-test.json").read_text()) for name in "ab"]
    assert documents[0]["scores"] == documents[1]["scores"] and documents[0]["images"] == 7
    assert documents[0]["step"] == states[0].best_step
    before = (tmp_path / "b" / "scores-test.json").stat().st_mtime_ns
    again = run_command(commands[1])
    assert again.returncode == 0 and "test split, step" not in again.stderr
    assert (tmp_path / "b" / "scores-test.json").stat().st_mtime_ns == before, "once"
    scores = tmp_path / "evaluated.json"
    done = run_command(
        module("launch.evaluate", tmp_path / "a", "--split", "test", "--java-seconds", 0, "--json", scores)
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(scores.read_text())["scores"] == documents[0]["scores"]


def test_a_test_split_that_was_trained_or_selected_on_is_refused(scene_shards, tmp_path, empty_config):
    for split in ("train", "val"):
        changes = {"data__val": scene_shards / "val.json", "data__test": scene_shards / f"{split}.json"}
        config = load_config(empty_config, settings(scene_shards, tmp_path / split, train__epochs=1, **changes))
        with pytest.raises(InputError, match=f"holds the very samples of data.{split}"):
            prepare(config, RunFolder(config.run), 1, lambda done, total: None)
