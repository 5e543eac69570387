"""A save under fault: killed at every single operation, with the disk full, in a folder that cannot be written."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from captioning.config import load_config
from captioning.runs import checkpoint
from captioning.runs.checkpoint import RunState
from captioning.runs.run_folder import RunFolder
from captioning.runs.saver import Saver
from captioning.training.preparation import prepare
from tests.conftest import run_command, settings, train_command

MODEL = {"weight": torch.arange(6.0).view(2, 3)}
OPTIMIZER = {"optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}}
TEXTS = {"config.yaml": "seed: 0\n", "vocabulary.json": "{}"}
# What changes a file system: methods of Python's file objects and functions of os, by name.
OPERATIONS = {"open", "write", "flush", "fsync", "close", "mkdir", "rename", "replace", "unlink", "remove", "rmdir"}


def save(run: Path, step: int, best_step: int | None = None, evaluated_step: int = 0) -> Path:
    state = RunState(step, step * 8, 1, "data", 0.5, best_step, evaluated_step)
    run.mkdir(parents=True, exist_ok=True)
    return checkpoint.save(run, state, MODEL, OPTIMIZER, TEXTS, 2)


def watching(work: Callable[[], object], at: Callable[[int, str, object], None]) -> None:
    """Run ``work`` and call ``at`` with number, name and object of each file operation just before it is made."""
    count = 0

    def on_event(frame, event, called):
        nonlocal count
        if event == "c_call" and called.__name__ in OPERATIONS:
            count += 1
            at(count, called.__name__, getattr(called, "__self__", None))

    sys.setprofile(on_event)
    try:
        work()
    finally:
        sys.setprofile(None)


def killed_before(operation: int, work: Callable[[], object]) -> bool:
    """Do ``work`` in a fork that is killed just before its n-th file operation; False when it had fewer."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # OpenMP's threads did not come along
            watching(work, lambda n, *_: os.kill(os.getpid(), signal.SIGKILL) if n == operation else None)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or status == 0
    return os.WIFSIGNALED(status)


def damaged(folder: Path) -> None:
    (folder / "optimizer.pt").write_bytes(b"")


# name -> what is there, what is saved, the oldest step that may then be the newest
SAVES = {
    "first": (lambda run: None, lambda run: save(run, 4), 0),
    "prunes": (lambda run: [save(run, step, best_step=4) for step in (4, 8, 12)], lambda run: save(run, 16, 4), 12),
    "new best": (lambda run: [save(run, step, best_step=4) for step in (4, 8, 12)], lambda run: save(run, 16, 16), 12),
    "over a damaged one": (
        lambda run: [save(run, 4), save(run, 8), damaged(save(run, 12))],
        lambda run: save(run, 12),
        8,
    ),
    "again, validated": (
        lambda run: [save(run, 4), save(run, 8), save(run, 10)],
        lambda run: save(run, 10, 10, evaluated_step=10),
        8,
    ),
}


@pytest.mark.parametrize("stride", [11, pytest.param(1, marks=pytest.mark.sweep)])
@pytest.mark.parametrize("name", SAVES)
def test_killed_before_any_file_operation_of_a_save(tmp_path, name, stride):
    """At each of them: a checkpoint at most one save old verifies, and the next save works and clears what was left."""
    before, act, oldest = SAVES[name]
    operation, killed, seen = 0, True, set()
    (tmp_path / "run").mkdir()
    before(tmp_path / "run")
    while killed:
        operation += stride
        run = tmp_path / "killed"
        shutil.copytree(tmp_path / "run", run)
        killed = killed_before(operation, lambda run=run: act(run))
        found = checkpoint.newest(run, lambda _: None)
        seen.add(step := found.state.step if found else 0)
        assert step >= oldest, f"operation {operation}"
        save(run, 20)
        assert checkpoint.newest(run, pytest.fail).state.step == 20
        assert not list((run / "checkpoints").glob("*.tmp"))
        shutil.rmtree(run)
    assert operation > 30, "the operations were not seen"
    assert max(seen) > oldest


@pytest.mark.parametrize("stride", [13, pytest.param(1, marks=pytest.mark.sweep)])
def test_killed_before_any_file_operation_of_a_start(scene_shards, tmp_path, empty_config, stride):
    """Whatever a start leaves that was killed, first or later, the next one begins or continues the run."""
    operation, killed = 0, True
    while killed:
        operation += stride
        run = tmp_path / f"run-{operation}"
        config = load_config(empty_config, settings(scene_shards, run, train__epochs=1))

        def start(config=config) -> None:
            prepare(config, RunFolder(config.run), 1, lambda done, total: None)

        killed = killed_before(operation, start)
        assert not killed_before(10**6, start)
        assert RunFolder(run).is_run and (run / "vocabulary.json").is_file()
    assert operation > 20, "the operations were not seen"


def test_a_power_cut_cannot_reorder_a_save(tmp_path):
    """Each file, then its folder is synced before the rename, the parent after it, and only then an older one goes."""
    for step in (4, 8):
        save(tmp_path, step)
    log: list[str] = []
    watching(lambda: save(tmp_path, 12), lambda _, name, __: log.append(name))
    renamed = log.index("rename")
    before, after = log[:renamed], log[renamed:]
    assert before.count("fsync") == 1 + 6 + 1, "new folder's parent, six files, the folder"
    assert before[-2:] != ["write", "rename"] and "write" not in before[-(before[::-1].index("fsync")) :]
    first_gone = min(after.index(name) for name in ("unlink", "rmdir") if name in after)
    assert "fsync" in after[:first_gone]


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[Callable[[str], None]]:
    """A small file system of its own; yields a function to mount it again with other options."""
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a file system cannot be mounted here ({error}): this test runs as root")
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.sweep
def test_a_run_on_a_full_disk_goes_on_and_fails_at_its_end(scene_shards, tmp_path, empty_config):
    """Room for two checkpoints of 134 MB: the third is reported, the last one missing ends the run as failed."""
    with mounted(tmp_path / "disk", "360m") as remount:
        run = tmp_path / "disk" / "run"
        command = train_command(2, settings(scene_shards, run, train__epochs=3), empty_config)
        done = run_command(command)
        assert done.returncode != 0 and "OSError" not in done.stderr, done.stderr
        assert "warning: step 12 could not be saved, training goes on" in done.stderr, done.stderr
        assert "The last checkpoint, of step 18, could not be written" in done.stderr
        assert RunFolder(run).status()[0] == "failed"
        assert checkpoint.newest(run, pytest.fail).state.step == 8
        remount("size=600m")
        assert run_command(command).returncode == 0
        assert RunFolder(run).status() == ("finished", "step 18 of 18")
        remount("ro")
        done = run_command(train_command(1, settings(scene_shards, run, train__epochs=4), empty_config))
        assert done.returncode == 2 and "Read-only file system" in done.stderr and "Traceback" not in done.stderr
        remount("rw")


BIG = {"weight": torch.zeros(300_000)}  # 1.2 MB


def test_a_full_disk_keeps_the_earlier_ones_and_is_told(tmp_path):
    with mounted(tmp_path / "disk", "3m") as remount:
        run = tmp_path / "disk" / "run"
        run.mkdir()
        saver = Saver(run, TEXTS, keep=2, background=True)
        said = []
        for step in (1, 2, 3):
            saver.start(RunState(step, step, 1, "data"), BIG, OPTIMIZER)
            said.append(saver.finish())
        assert said[:2] == [None, None] and "No space left on device" in said[2]
        assert checkpoint.newest(run, pytest.fail).state.step == 2
        (run / "log").write_bytes(b"x" * 100_000)  # there is room for what is small
        remount("size=6m")
        saver.start(RunState(4, 4, 1, "data"), BIG, OPTIMIZER)
        assert saver.finish() is None
        assert checkpoint.newest(run, pytest.fail).state.step == 4


def test_a_disk_that_became_read_only_is_told(tmp_path):
    with mounted(tmp_path / "disk", "6m") as remount:
        run = tmp_path / "disk" / "run"
        save(run, 1)
        remount("ro")
        saver = Saver(run, TEXTS, keep=2, background=False)
        saver.start(RunState(2, 2, 1, "data"), BIG, OPTIMIZER)
        assert "Read-only file system" in saver.finish()
        assert checkpoint.newest(run, pytest.fail).state.step == 1
        remount("rw")


def test_what_is_saved_is_the_state_of_that_moment(tmp_path):
    """The loop goes on and changes its tensors in place while the thread writes; a second save reuses the copy."""
    run, saver = tmp_path, Saver(tmp_path, TEXTS, keep=2, background=True)
    weight, moment = torch.zeros(1_000_000), torch.zeros(1_000_000)
    state = RunState(0, 0, 1, "data")
    for step in (1, 2):
        weight.fill_(step), moment.fill_(-step)
        optimizer = {"optimizer": {"state": {0: {"exp_avg": moment}}, "param_groups": [{"lr": 0.1, "params": [0]}]}}
        saver.start(replace(state, step=step), {"weight": weight}, optimizer)
        weight.fill_(100), moment.fill_(100)
        assert saver.finish() is None
        found = checkpoint.newest(run, pytest.fail)
        assert found.state.step == step
        assert (found.model()["weight"] == step).all()
        assert (found.optimizer()["optimizer"]["state"][0]["exp_avg"] == -step).all()
