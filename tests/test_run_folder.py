"""A run folder: held by one, its status told to scripts, its logs cut to the step a run resumes from."""

import os

import pytest

from captioning.runs import run_folder
from shards.errors import InputError
from tests.conftest import module, run_command, settings


def test_a_run_folder_is_held_by_one(tmp_path):
    held = run_folder.lock(tmp_path)
    with pytest.raises(InputError, match=rf"being trained by process {os.getpid()} on "):
        run_folder.lock(tmp_path, patience_s=0.1)
    held.close()
    run_folder.lock(tmp_path, patience_s=0.1).close()


def test_logs_are_cut_back_to_the_resumed_step(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text("1\ta\n2\tb\x1c\u2028\n\0\0\0\n\n3\tc\n4\thalf a li")
    run_folder.cut_after(path, lambda line: int(line.split("\t")[0]) <= 2)
    assert path.read_text() == "1\ta\n2\tb\x1c\u2028\n"
    path.write_bytes(b"1\ta\xff\n\xff\xfe\n9\tz\n")
    run_folder.cut_after(path, lambda line: int(line.split("\t")[0]) <= 2)
    assert path.read_bytes() == b"1\ta\xff\n"


def test_status_tells_a_job_script_whether_to_start_again(scene_shards, tmp_path, empty_config):
    run = tmp_path / "run"
    as_trained = [empty_config, *settings(scene_shards, run, train__epochs=1)]
    done = run_command(module("launch.status", *as_trained))
    assert done.returncode == 1 and "no run has begun" in done.stdout
    run.mkdir()
    for status, code in (("finished", 0), ("preempted", 75), ("running", 75), ("failed", 1)):
        run_folder.set_status(run, status, "step 4 of 12")
        done = run_command(module("launch.status", *as_trained))
        assert (done.returncode, done.stdout) == (code, f"{run}: {status}, step 4 of 12\n")
    assert run_command(module("launch.status", run)).returncode == 1
    assert run_command(module("launch.status", tmp_path / "nothing")).returncode == 2


def test_the_last_saved_step_is_told_by_the_folder_itself(tmp_path):
    assert run_folder.last_saved_step(tmp_path) == 0
    run_folder.set_status(tmp_path, "preempted", "before the first step, stopped by SIGTERM")
    assert run_folder.last_saved_step(tmp_path) == 0
    run_folder.set_status(tmp_path, "preempted", "step 12 of 40, stopped by SIGTERM")
    assert run_folder.last_saved_step(tmp_path) == 12
    run_folder.note_saved(tmp_path, 20)
    assert run_folder.last_saved_step(tmp_path) == 20
    run_folder.set_status(tmp_path, "failed", "InputError: step 99 of 100 is no word of a status")
    (tmp_path / "saved-step").write_bytes(b"\xff\0")
    assert run_folder.last_saved_step(tmp_path) == 0
