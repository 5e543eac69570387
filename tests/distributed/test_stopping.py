"""Runs stopped at awkward moments by real signals, runs that hang, and what the next start makes of them."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from captioning.config import load_config, save_text
from captioning.runs import checkpoint
from captioning.runs.run_folder import RunFolder
from captioning.training.preparation import prepare
from shards.errors import InputError
from tests.conftest import CPU_PROCESSES, ROOT, module, run_command, settings, train_command, untrained_run
from tests.distributed.test_training import (
    assert_each_image_of_each_epoch_once,
    assert_same_bits,
    distance,
    ledger,
    parameters,
    trained,
)


def started(command: list[str], log: Path, **environment: str) -> subprocess.Popen:
    with log.open("a") as output:
        everything = {**os.environ, **CPU_PROCESSES, **environment}
        return subprocess.Popen(command, env=everything, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)


def wait_for(condition: Callable[[], object], process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"it ended too early, with {process.returncode}"
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.001)


def ranks_of(launcher: subprocess.Popen) -> list[psutil.Process]:
    """The training processes under a launcher, in rank order."""
    found = []
    for child in psutil.Process(launcher.pid).children():
        with suppress(psutil.Error):  # the launcher's other children come and go
            # A child just forked has the launcher's command line, which names train.py too, and no rank.
            if any(argument.endswith("train.py") for argument in child.cmdline()) and "RANK" in child.environ():
                found.append((int(child.environ()["RANK"]), child))
    return [child for _, child in sorted(found, key=lambda pair: pair[0])]


def notes_signals(pid: int) -> bool:
    """Whether a process has a handler of its own for SIGUSR1, by what the kernel says."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:"))
    return bool(caught >> (signal.SIGUSR1 - 1) & 1)


def stopped_step(run: Path) -> int:
    """The step a run was stopped at, by its status; its newest checkpoint is that very step."""
    status, detail = RunFolder(run).status()
    assert status == "preempted", (status, detail)
    step = int(detail.split()[1])
    assert checkpoint.newest(run, pytest.fail).state.step == step
    return step


def test_stopped_while_it_starts(scene_shards, tmp_path, empty_config):
    """At its imports, before there is a run folder; and while it waits for the folder that another process holds."""
    run = tmp_path / "run"
    command = train_command(1, settings(scene_shards, run, train__total_steps=2), empty_config)
    process = started(command, tmp_path / "log")
    wait_for(lambda: notes_signals(process.pid), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert RunFolder(run).status() == ("preempted", "before the first step, stopped by SIGTERM")
    with RunFolder(run) as held:
        held.hold()
        held.set_status("running", "the holder's word")
        process = started(command, tmp_path / "log")
        wait_for(lambda: notes_signals(process.pid), process)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 75
        assert held.status() == ("running", "the holder's word")
    trained(1, settings(scene_shards, run, train__total_steps=2), empty_config)
    assert RunFolder(run).status()[0] == "finished"


def test_loader_workers_leave_signals_to_their_rank(scene_shards, tmp_path, empty_config):
    """Every process of the job gets the signal, over and over, from the moment the first worker is forked."""
    run = tmp_path / "run"
    overrides = settings(scene_shards, run, train__total_steps=2000, data__num_workers=3)
    process = started(train_command(1, overrides, empty_config), tmp_path / "log")
    wait_for(lambda: RunFolder(run).status()[0] == "running" and psutil.Process(process.pid).children(), process)
    while process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.002)
    assert process.wait() == 75, (tmp_path / "log").read_text()[-2000:]
    assert stopped_step(run) < 2000


def test_a_rank_that_hangs_is_named_and_may_come_back(scene_shards, tmp_path, empty_config):
    run = tmp_path / "run"
    overrides = settings(scene_shards, run, train__epochs=2, train__hang_seconds=4)
    process = started(train_command(2, overrides, empty_config), tmp_path / "log")
    wait_for(lambda: checkpoint.steps(run), process)
    stuck = ranks_of(process)[1]
    stuck.suspend()
    wait_for(lambda: "does not answer" in (tmp_path / "log").read_text(), process)
    stuck.resume()
    said = (tmp_path / "log").read_text()
    report = (run / "hang-rank-0.txt").read_text()
    assert "rank 1 does not answer: it is stopped" in said and "rank 0 does not answer" not in said
    assert "train-000000.tar" in report and "trainer.py" in report and "in _fit" in report and "step " in report
    assert report in said.replace("hang: rank", "rank"), "the stack is in the job's output too"
    assert process.wait(120) == 0
    assert RunFolder(run).status() == ("finished", "step 12 of 12")
    assert_each_image_of_each_epoch_once(run, scene_shards, epochs=2)


@pytest.mark.sweep
def test_a_hung_run_ends_by_itself_and_is_started_again(scene_shards, tmp_path, empty_config):
    run = tmp_path / "run"
    overrides = settings(scene_shards, run, train__total_steps=500, train__hang_seconds=5)
    process = started(train_command(2, overrides, empty_config), tmp_path / "log")
    wait_for(lambda: checkpoint.steps(run), process)
    stuck = ranks_of(process)[1]
    stuck.suspend()
    assert process.wait(240) not in (0, None)
    assert RunFolder(run).status()[0] == "running" and "another process was lost" in RunFolder(run).status()[1]
    assert run_command(module("launch.status", run)).returncode == 75
    last = checkpoint.newest(run, pytest.fail).state.step
    trained(2, [*overrides, f"train.total_steps={last + 3}"], empty_config)


@pytest.mark.sweep
def test_stopped_while_it_validates_it_validates_first_when_continued(scene_shards, tmp_path, empty_config):
    run = tmp_path / "run"
    # The larger split, image by image with a wide beam: most of the time it validates.
    val = {"data__val": scene_shards / "train.json", "data__allow_overlap": "true", "evaluate__every_steps": 1}
    val |= {"evaluate__batch_size": 1, "evaluate__beam_size": 8}
    command = train_command(2, settings(scene_shards, run, train__total_steps=400, **val), empty_config)
    for number in range(8):
        process = started(command, tmp_path / "log")
        before = len(scored_steps(run))
        wait_for(lambda: len(scored_steps(run)) > before + 1, process)  # noqa: B023
        time.sleep(0.05 * number)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) != 0
        step = stopped_step(run)
        if checkpoint.newest(run, pytest.fail).state.evaluated_step < step:
            break
    else:
        pytest.fail("eight times no validation was hit")
    assert step not in scored_steps(run)
    trained(1, settings(scene_shards, run, train__total_steps=step + 2, **val), empty_config)
    assert scored_steps(run) == list(range(1, step + 3))


def scored_steps(run: Path) -> list[int]:
    path = run / "scores.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


# Which process gets which signal, and when.
TOLD = [
    ("all", [signal.SIGTERM], "starting"),
    ("launcher", [signal.SIGTERM], "stepping"),
    ("launcher", [signal.SIGINT, signal.SIGINT], "saving"),
    ("launcher", [signal.SIGUSR1], "stepping"),
    ("launcher", [signal.SIGHUP], "stepping"),
    ("rank 1", [signal.SIGUSR1], "saving"),
    ("rank 0", [signal.SIGINT], "stepping"),
    ("rank 1", [signal.SIGTERM, signal.SIGTERM], "starting"),
    ("all", [signal.SIGUSR1, signal.SIGTERM], "saving"),
    ("all", [signal.SIGTERM, signal.SIGTERM, signal.SIGINT], "stepping"),
]


@pytest.mark.sweep
def test_any_signal_to_anybody_at_any_moment(scene_shards, tmp_path, empty_config):
    """One run, stopped ten times on its way; in the end as if nothing had been."""
    run, last = tmp_path / "run", 0
    overrides = settings(scene_shards, run, train__epochs=50, data__num_workers=1)
    command = train_command(2, overrides, empty_config)
    for to, signals, moment in TOLD:
        process = started(command, tmp_path / "log", PET_SIGNALS_TO_HANDLE="SIGTERM,SIGINT,SIGHUP,SIGUSR1")
        wait_for(lambda: len(ranks_of(process)) == 2, process)  # noqa: B023
        ranks = ranks_of(process)
        wait_for(lambda: all(notes_signals(rank.pid) for rank in ranks), process)  # noqa: B023
        match moment:
            case "stepping":
                wait_for(lambda: max([0, *checkpoint.steps(run)]) > last, process)  # noqa: B023
            case "saving":
                wait_for(lambda: list((run / "checkpoints").glob("*.tmp")), process)
        told = {"launcher": [process], "rank 0": ranks[:1], "rank 1": ranks[1:], "all": [process, *ranks]}[to]
        for number in signals:
            for one in told:
                if one.poll() is None if isinstance(one, subprocess.Popen) else one.is_running():
                    one.send_signal(number)
            time.sleep(0.05)
        assert process.wait(60) != 0, (to, signals, moment)
        psutil.wait_procs(ranks, timeout=60)
        if RunFolder(run).status()[1].startswith("before the first step"):
            assert RunFolder(run).status()[0] == "preempted"
        else:
            assert stopped_step(run) >= last, (to, signals, moment)
            last = stopped_step(run)
    assert 0 < last < 300
    end = -(-(last + 1) // 6)
    trained(2, [*overrides, f"train.epochs={end}"], empty_config)
    assert_each_image_of_each_epoch_once(run, scene_shards, epochs=end)
    whole = tmp_path / "whole"
    trained(2, [*overrides, f"run={whole}", f"train.epochs={end}"], empty_config)
    assert_same_bits(run, whole, end * 6)


@pytest.mark.sweep
def test_continued_on_other_numbers_of_processes(scene_shards, tmp_path, empty_config):
    """1, 2, 4, 3 and 1 processes, three steps each: step for step the samples of an uninterrupted run."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    changes = {"encoder__trainable": "none", "checkpoint__every_steps": 3}
    for part, processes in enumerate((1, 2, 4, 3, 1), start=1):
        trained(processes, settings(scene_shards, run, train__total_steps=3 * part, **changes), empty_config)
    trained(1, settings(scene_shards, whole, train__total_steps=15, **changes), empty_config)
    assert sorted(ledger(run)) == sorted(ledger(whole))
    start = tmp_path / "start"
    trained(1, settings(scene_shards, start, train__total_steps=3, **changes), empty_config)
    assert distance(parameters(run, 15), parameters(whole, 15), parameters(start, 3)) < 1e-4


@pytest.mark.parametrize("status", [("running", ""), ("failed", "RuntimeError: x"), ("preempted", "step 1 of 6")])
def test_a_start_without_the_checkpoints_of_a_run_is_refused(scene_shards, tmp_path, empty_config, status):
    run = untrained_run(tmp_path / "run")
    changes = {"decoder__name": "attention", "encoder__grid_size": 3, "train__epochs": 1}
    config = load_config(empty_config, settings(scene_shards, run, **changes))
    (run / "config.yaml").write_text(save_text(config))
    RunFolder(run).set_status(*status)
    (run / "checkpoints").rename(tmp_path / "scratch")
    for _ in range(2):
        with pytest.raises(InputError, match=r"saved at step 1, and there is no checkpoint.*\n.*Mount it"):
            prepare(config, RunFolder(run), 1, lambda done, total: None)
    assert RunFolder(run).status() == status


def test_a_run_whose_checkpoints_are_away_is_not_begun_again(scene_shards, tmp_path, empty_config):
    """As where checkpoints/ is on a scratch disk that is not mounted: refused, and nothing is cut."""
    run = tmp_path / "run"
    command = train_command(1, settings(scene_shards, run, train__total_steps=4), empty_config)
    trained(1, settings(scene_shards, run, train__total_steps=4), empty_config)
    scratch = (run / "checkpoints").rename(tmp_path / "scratch")
    (run / "checkpoints").mkdir()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "lock"}
    done = run_command(command)
    assert done.returncode == 2, done.stderr
    assert "was saved at step 4" in done.stderr and "Mount it" in done.stderr and "Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in before} == before
    (run / "checkpoints").rmdir()
    (run / "checkpoints").symlink_to(scratch)  # mounted again
    done = run_command(command)
    assert done.returncode == 0, done.stderr
    assert RunFolder(run).status() == ("finished", "step 4 of 4")
