"""Checkpoints: whole or passed over, never unpickled, never the last one lost."""

import json
import pickle
import shutil

import pytest
import torch

from captioning.runs import checkpoint
from captioning.runs.checkpoint import RunState
from shards.errors import InputError

MODEL = {"weight": torch.arange(6.0).view(2, 3)}
OPTIMIZER = {"optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}}
TEXTS = {"config.yaml": "seed: 0\n", "vocabulary.json": "{}"}


def save(run, step, best_step=None, keep=2):
    state = RunState(step, step * 8, 1, "data", 0.5, best_step)
    return checkpoint.save(run, state, MODEL, OPTIMIZER, TEXTS, keep)


def test_what_is_saved_is_what_is_loaded(tmp_path):
    save(tmp_path, 100)
    found = checkpoint.newest(tmp_path, pytest.fail)
    assert found.folder.name == "step-00000100"
    assert found.state == RunState(100, 800, 1, "data", 0.5, None)
    assert torch.equal(found.model()["weight"], MODEL["weight"])
    assert found.optimizer() == OPTIMIZER
    assert found.text("config.yaml") == "seed: 0\n"


@pytest.mark.parametrize("name", [*TEXTS, "model.safetensors", "optimizer.pt", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_newest_is_passed_over_loudly(tmp_path, name, harm):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    data = bytearray(path.read_bytes())
    match harm:
        case "flip":
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        case "cut":
            path.write_bytes(data[:-1])
        case "remove":
            path.unlink()
    said = []
    assert checkpoint.newest(tmp_path, said.append).state.step == 1
    assert len(said) == 1 and "step-00000002" in said[0]


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step, best_step=2)
    assert checkpoint.steps(tmp_path) == [2, 5, 6]


def test_damaged_ones_passed_over_do_not_push_out_sound_ones(tmp_path):
    """Resumed from 8 because 12 and 16 are damaged: saving 10 must not keep those two and prune 8 and 10."""
    for step in (8, 12, 16):
        save(tmp_path, step, keep=3)
    for step in (12, 16):
        (tmp_path / "checkpoints" / f"step-{step:08d}" / "state.json").unlink()
    save(tmp_path, 10)
    assert checkpoint.steps(tmp_path) == [8, 10]
    assert checkpoint.newest(tmp_path, pytest.fail).state.step == 10


def test_saving_again_with_other_processes_touches_nothing(tmp_path, monkeypatch):
    save(tmp_path, 3)
    monkeypatch.setattr("os.fsync", lambda _: pytest.fail("it is written again"))
    state = RunState(3, 24, 4, "data", 0.5, None)
    checkpoint.save(tmp_path, state, MODEL, OPTIMIZER, TEXTS, 2)
    assert checkpoint.newest(tmp_path, pytest.fail).state.step == 3


def test_a_failed_save_leaves_the_earlier_ones(tmp_path, monkeypatch):
    save(tmp_path, 1)
    save(tmp_path, 2)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 3)
    monkeypatch.undo()
    assert checkpoint.newest(tmp_path, pytest.fail).state.step == 2
    assert not list((tmp_path / "checkpoints").glob("*.tmp")), "what was written of it takes no room"


def test_a_checkpoint_is_saved_though_an_older_one_cannot_be_removed(tmp_path, monkeypatch, caplog):
    for step in (1, 2):
        save(tmp_path, step)
    refused = PermissionError(13, "Permission denied")
    monkeypatch.setattr(shutil, "rmtree", lambda folder, ignore_errors=False: None if ignore_errors else fail(refused))
    save(tmp_path, 3)
    assert "step 3 is saved, but an older one cannot be removed: [Errno 13]" in caplog.text
    monkeypatch.undo()
    assert checkpoint.newest(tmp_path, pytest.fail).state.step == 3
    save(tmp_path, 4)
    assert checkpoint.steps(tmp_path) == [3, 4], "the next one removes what it can"


def fail(error: Exception):
    raise error


def test_saving_a_step_again_is_harmless(tmp_path):
    folder = save(tmp_path, 3)
    (folder / "model.safetensors").write_bytes(b"damaged")
    save(tmp_path, 3)
    assert checkpoint.newest(tmp_path, pytest.fail).state.step == 3


@pytest.mark.parametrize("name", [*TEXTS, "model.safetensors", "optimizer.pt", "state.json", "manifest.json"])
def test_a_planted_pickle_is_not_run(tmp_path, name):
    """In any file, even with a manifest that vouches for it: it is not run, and a text file of it is no harm."""

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    torch.save(Evil(), path)
    if name != "manifest.json":
        manifest = json.loads((path.parent / "manifest.json").read_text())
        manifest[name] = {"size": path.stat().st_size, "sha256": checkpoint.sha256_of(path)}
        (path.parent / "manifest.json").write_text(json.dumps(manifest))
    said = []
    found = checkpoint.newest(tmp_path, said.append)
    assert found.state.step == 1 and found.optimizer() == OPTIMIZER
    assert len(said) == 1 and "step-00000002" in said[0] and name in said[0]
    path.write_bytes(pickle.dumps(Evil()))
    assert checkpoint.newest(tmp_path, said.append).state.step == 1
    assert not (tmp_path / "ran").exists()


def test_a_folder_under_another_step_s_name_is_passed_over(tmp_path):
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "checkpoints" / "step-00000001", tmp_path / "checkpoints" / "step-00000007")
    said = []
    assert checkpoint.newest(tmp_path, said.append).state.step == 1
    assert "is of step 1" in said[0]


def test_find_by_name(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, best_step=2)
    assert checkpoint.find(tmp_path, "latest", pytest.fail).state.step == 3
    assert checkpoint.find(tmp_path, "best", pytest.fail).folder.name == "step-00000002"
    assert checkpoint.find(tmp_path, "step-3", pytest.fail).state.step == 3
    for which, message in (("step-9", "The run has step-2, step-3"), ("newest", "best, latest or step-N")):
        with pytest.raises(InputError, match=message):
            checkpoint.find(tmp_path, which, pytest.fail)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(InputError, match="not a run folder"):
        checkpoint.find(tmp_path, "best", pytest.fail)
