"""Loader processes that the system kills, or gives too little memory to share."""

import os
import shutil
import signal
import sys

import psutil
import pytest

from captioning.runs import checkpoint
from captioning.runs.run_folder import RunFolder
from shards.workers import lost_worker
from tests.conftest import ROOT, module, run_command, settings, train_command
from tests.distributed.test_stopping import started, wait_for


def test_a_loader_that_is_killed_is_to_be_started_again(scene_shards, tmp_path, empty_config):
    run = tmp_path / "run"
    changes = {"data__num_workers": 2, "encoder__trainable": "none", "checkpoint__every_steps": 2}
    command = train_command(1, settings(scene_shards, run, train__total_steps=2000, **changes), empty_config)
    process = started(command, tmp_path / "log")
    wait_for(lambda: checkpoint.steps(run), process)
    worker = next(child for child in psutil.Process(process.pid).children() if child.status() != "zombie")
    os.kill(worker.pid, signal.SIGKILL)
    assert process.wait(60) == 75
    said = (tmp_path / "log").read_text()
    assert "A loader worker was killed; out of memory?" in said and "Traceback" not in said, said[-2000:]
    assert RunFolder(run).status()[0] == "running" and "num_workers" in RunFolder(run).status()[1]
    assert run_command(module("launch.status", run)).returncode == 75


SHARES = """
import torch
from shards.workers import lost_worker, read_ahead
class Large(torch.utils.data.Dataset):
    def __getitem__(self, number):
        return torch.zeros(1_000_000)
def main():
    try:
        print(sum(1 for _ in read_ahead(Large(), range(20), 2)))
    except RuntimeError as error:
        print(*lost_worker(error))
if __name__ == "__main__":
    main()
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="unshare (util-linux) is not installed")
def test_too_little_shared_memory_is_told(tmp_path):
    script = tmp_path / "shares.py"
    script.write_text(SHARES)
    little = f"mount -t tmpfs -o size=6m tmpfs /dev/shm && exec {sys.executable} {script}"
    done = run_command(["unshare", "--mount", "sh", "-c", little], timeout=60, PYTHONPATH=str(ROOT))
    if "unshare failed" in done.stderr or "mount: " in done.stderr:
        pytest.skip("a small /dev/shm cannot be mounted here: this test runs as root")
    assert "too little shared memory: /dev/shm has" in done.stdout and done.stdout.endswith("False\n"), done.stderr


def test_other_errors_are_no_lost_workers():
    assert lost_worker(RuntimeError("DataLoader worker (pid 7) is killed by signal: Segmentation fault. ")) is None
    assert lost_worker(ValueError("DataLoader worker (pid 7) is killed by signal: Killed. ")) is None
