"""A run folder: held by one, its status told to scripts, its logs cut to the step a run resumes from."""

import os

import pytest

from captioning.runs.run_folder import RunFolder, cut_after, note_saved
from shards.errors import InputError
from tests.conftest import module, run_command, settings


def test_a_run_folder_is_held_by_one(tmp_path):
    with RunFolder(tmp_path / "run") as folder, RunFolder(tmp_path / "run") as other:
        assert folder.is_new and not folder.is_run and not folder.path.exists()
        folder.hold()
        folder.hold()
        with pytest.raises(InputError, match=rf"being trained by process {os.getpid()} on "):
            other.hold(patience_s=0.1)
        other.hold_if_free()
        assert folder.is_held and not other.is_held
    with RunFolder(tmp_path / "run") as next_one:
        next_one.hold(patience_s=0.1)
        assert next_one.is_held and next_one.is_new


def test_a_folder_of_other_things_is_never_held(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with RunFolder(tmp_path) as folder:
        folder.hold_if_free()
        assert not folder.is_held and [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_every_log_is_cut_to_its_own_step(tmp_path):
    (tmp_path / "ledger").mkdir()
    for rank in (0, 1):
        (tmp_path / "ledger" / f"rank-{rank}.txt").write_text("1\t0\ta\t1\n2\t0\tb\t1\n3\t0\tc\t1\n")
    (tmp_path / "scores.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    RunFolder(tmp_path).cut_logs(step=2, evaluated_step=1)
    assert (tmp_path / "ledger" / "rank-1.txt").read_text() == "1\t0\ta\t1\n2\t0\tb\t1\n"
    assert (tmp_path / "scores.jsonl").read_text() == '{"step": 1}\n'


def test_logs_are_cut_back_to_the_resumed_step(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text("1\ta\n2\tb\x1c\u2028\n\0\0\0\n\n3\tc\n4\thalf a li")
    cut_after(path, lambda line: int(line.split("\t")[0]) <= 2)
    assert path.read_text() == "1\ta\n2\tb\x1c\u2028\n"
    path.write_bytes(b"1\ta\xff\n\xff\xfe\n9\tz\n")
    cut_after(path, lambda line: int(line.split("\t")[0]) <= 2)
    assert path.read_bytes() == b"1\ta\xff\n"


def test_status_tells_a_job_script_whether_to_start_again(scene_shards, tmp_path, empty_config):
    run = tmp_path / "run"
    as_trained = [empty_config, *settings(scene_shards, run, train__epochs=1)]
    done = run_command(module("launch.status", *as_trained))
    assert done.returncode == 1 and "no run has begun" in done.stdout
    run.mkdir()
    for status, code in (("finished", 0), ("preempted", 75), ("running", 75), ("failed", 1)):
        RunFolder(run).set_status(status, "step 4 of 12")
        done = run_command(module("launch.status", *as_trained))
        assert (done.returncode, done.stdout) == (code, f"{run}: {status}, step 4 of 12\n")
    assert run_command(module("launch.status", run)).returncode == 1
    assert run_command(module("launch.status", tmp_path / "nothing")).returncode == 2


def test_the_last_saved_step_is_told_by_the_folder_itself(tmp_path):
    assert RunFolder(tmp_path).last_saved_step() == 0
    RunFolder(tmp_path).set_status("preempted", "before the first step, stopped by SIGTERM")
    assert RunFolder(tmp_path).last_saved_step() == 0
    RunFolder(tmp_path).set_status("preempted", "step 12 of 40, stopped by SIGTERM")
    assert RunFolder(tmp_path).last_saved_step() == 12
    note_saved(tmp_path, 20)
    assert RunFolder(tmp_path).last_saved_step() == 20
    RunFolder(tmp_path).set_status("failed", "InputError: step 99 of 100 is no word of a status")
    (tmp_path / "saved-step").write_bytes(b"\xff\0")
    assert RunFolder(tmp_path).last_saved_step() == 0
