"""Checkpoints: whole or passed over, never unpickled, never the last one lost."""

import io
import json
import pickle
import shutil
import tracemalloc

import pytest
import safetensors.torch
import torch

from captioning.runs import checkpoint
from captioning.runs.checkpoint import RunState
from captioning.runs.hashed_file import HashedFile, write_safetensors, write_torch
from captioning.runs.saver import Saver
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


def test_safetensors_are_written_as_the_library_does(tmp_path):
    """Every type that a model may hold, in any order in memory, of any shape, under any name, to the byte."""
    tensors = {
        f"{number}.größe": torch.arange(6).view(2, 3).to(dtype)
        for number, dtype in enumerate([torch.float32, torch.int64, torch.bool, torch.bfloat16, torch.float16])
    }
    tensors |= {str(dtype): torch.ones(3, dtype=dtype) for dtype in (torch.float64, torch.int32, torch.int16)}
    tensors |= {"scalar": torch.tensor(2.5), "none": torch.empty(0, 4), 'a "name"\n': torch.ones(1, dtype=torch.uint8)}
    tensors |= {"channels_last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)}
    with HashedFile(tmp_path / "file") as file:
        write_safetensors(file, tensors)
        sha256 = file.finish()
    expected = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
    assert (tmp_path / "file").read_bytes() == expected
    assert file.size == len(expected) and sha256 == checkpoint.sha256_of(tmp_path / "file")


def test_what_torch_saves_is_written_as_it_makes_it(tmp_path):
    expected = io.BytesIO()
    torch.save(OPTIMIZER, expected)
    with HashedFile(tmp_path / "file") as file:
        write_torch(file, OPTIMIZER)
        sha256 = file.finish()
    assert (tmp_path / "file").read_bytes() == expected.getvalue()
    assert file.size == len(expected.getvalue()) and sha256 == checkpoint.sha256_of(tmp_path / "file")


def test_writing_makes_no_copy_of_the_state(tmp_path, monkeypatch):
    """A call that makes a tensor's bytes into an object of Python's holds the interpreter while it does: the training
    loop stands still. What is written and hashed is the tensors' own memory, a little at a time."""
    size, longest = 32_000_000, 0
    written = HashedFile.write

    def write(file, data):
        nonlocal longest
        assert isinstance(data, memoryview) or len(data) < 100_000, "a copy"
        longest = max(longest, len(data))
        return written(file, data)

    monkeypatch.setattr(HashedFile, "write", write)
    tensor = torch.zeros(size // 4)
    optimizer = {"optimizer": {"state": {0: {"exp_avg": torch.zeros(size // 4)}}}}
    tracemalloc.start()
    try:
        checkpoint.save(tmp_path, RunState(1, 8, 1, "data"), {"weight": tensor}, optimizer, TEXTS, keep=2)
        assert tracemalloc.get_traced_memory()[1] < size / 4
    finally:
        tracemalloc.stop()
    assert longest == size


def test_room_is_made_before_the_first_copy(tmp_path):
    """The copy then goes into memory that is there: no page of it has to be found while the loop waits."""
    saver = Saver(tmp_path, TEXTS, keep=2, background=True)
    state = ({"weight": torch.ones(1000)}, {"state": {0: {"exp_avg": torch.ones(1000), "step": 3}}})
    saver.make_room(*state)
    room = saver._room.result()
    places = {room[0]["weight"].data_ptr(), room[1]["state"][0]["exp_avg"].data_ptr()}
    saver.start(RunState(1, 8, 1, "data"), *state)
    model, optimizer, _ = saver._copy
    assert {model["weight"].data_ptr(), optimizer["state"][0]["exp_avg"].data_ptr()} == places
    assert saver.finish() is None and torch.equal(model["weight"], state[0]["weight"])
    assert optimizer["state"][0]["step"] == 3
