"""A disk without room: a run goes on, and has lost nothing once there is room again."""

import hashlib
import json
import shutil
import threading
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from captioning.config import load_config
from captioning.runs import checkpoint
from captioning.runs.patient_files import PatientFiles, PatientLog
from captioning.runs.run_folder import RunFolder, cut_after
from captioning.training.event_file import EventWriter
from shards.errors import InputError
from shards.storage import outages
from shards.storage.cache import Cache
from shards.storage.urls import Url
from tests.conftest import settings
from tests.distributed.test_faults import mounted
from tests.distributed.test_training import assert_each_image_of_each_epoch_once
from tests.processes import in_processes


def fill(disk: Path) -> Path:
    """Take all the room there is."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while file.write(b"\0" * size):
                    pass
            except OSError:
                continue
    return ballast


def test_a_log_on_a_full_disk_loses_and_repeats_nothing(tmp_path, caplog):
    with mounted(tmp_path / "disk", "1m"):
        log = PatientLog(tmp_path / "disk" / "log")
        lines = [f"line {number} {'x' * 90}\n".encode() for number in range(300)]
        for line in lines[:100]:
            log.add(line)
        assert log.write(synced=True) is None
        ballast = fill(tmp_path / "disk")
        for line in lines[100:200]:  # more than the page in use has room for
            log.add(line)
            assert log.write() is None or "No space left" in log.write(synced=True)
        assert "No space left" in log.write(synced=True)
        ballast.unlink()
        for line in lines[200:]:
            log.add(line)
        assert log.write(synced=True) is None
        assert log.path.read_bytes() == b"".join(lines)
        assert [record.message.rpartition("log ")[2] for record in caplog.records] == [
            "cannot be written, and is kept in memory until it can: No space left on device",
            "is written again, nothing of it is lost",
        ]


def test_small_files_wait_for_room(tmp_path):
    with mounted(tmp_path / "disk", "1m"):
        ballast = fill(tmp_path / "disk")
        files, names = PatientFiles(), [tmp_path / "disk" / name for name in "ab"]
        for name in names:
            files.write(name, b"first")
        files.write(names[0], b"second")
        ballast.unlink()
        files.retry()
        assert [name.read_bytes() for name in names] == [b"second", b"first"]
        assert len(list((tmp_path / "disk").iterdir())) == 2, "no temporary file is left"


def test_events_wait_for_room(tmp_path):
    with mounted(tmp_path / "disk", "1m"):
        board = EventWriter(str(tmp_path / "disk" / "board"))
        ballast = None
        for step in range(2000):
            if step == 5:
                ballast = fill(tmp_path / "disk")
            board.add_scalar("loss", step, step)
            board.flush()
        ballast.unlink()
        board.close()
        events = EventAccumulator(str(tmp_path / "disk" / "board"), size_guidance={"scalars": 0}).Reload()
        assert [event.step for event in events.Scalars("loss")] == list(range(2000))


def test_a_ledger_is_cut_on_a_full_disk(tmp_path):
    with mounted(tmp_path / "disk", "1m"):
        path = tmp_path / "disk" / "rank-0.txt"
        path.write_text("".join(f"{step}\t0\tkey\t1\n" for step in range(1000)) + "1000\t0\tke")
        fill(tmp_path / "disk")
        cut_after(path, lambda line: int(line.split("\t")[0]) <= 700)
        assert path.read_text().splitlines()[-1] == "700\t0\tkey\t1"


def train_on_a_disk_that_fills(config_path: Path, overrides: list[str], disk: Path, full: tuple[int, int]) -> None:
    """Train; the disk is full from the end of one step to the end of another."""
    from captioning.distributed.stop_signals import StopSignals
    from captioning.training import trainer

    config = load_config(config_path, overrides)
    shown, ballast = trainer.Monitor.step, disk / "ballast"

    def step(monitor, number, scalars):
        if monitor.is_main and number == full[0]:
            monitor_waits_for_saves()
            fill(disk)
        if monitor.is_main and number == full[1]:
            ballast.unlink()
        shown(monitor, number, scalars)

    def monitor_waits_for_saves():
        while list((disk / "run" / "checkpoints").glob("*.tmp")):
            pass

    trainer.Monitor.step = step
    trainer.train(config, StopSignals())


def assert_complete(run: Path, shards: Path, steps: list[int]) -> None:
    assert RunFolder(run).status() == ("finished", "step 18 of 18")
    assert_each_image_of_each_epoch_once(run, shards, epochs=3)
    validated = [json.loads(line)["step"] for line in (run / "scores.jsonl").read_text().splitlines()]
    assert validated == [3, 6, 9, 12, 15, 18]
    assert {f"captions-val-step-{step}.json" for step in validated} == {path.name for path in run.glob("captions-*")}
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 19))
    assert checkpoint.newest(run, pytest.fail).state.step == 18
    assert set(checkpoint.steps(run)) >= set(steps)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.sweep)])
def test_a_run_whose_disk_is_full_for_a_while_has_lost_nothing(scene_shards, tmp_path, empty_config, processes):
    """Full while two checkpoints and three validations are due: no line, curve, score or caption is missing."""
    with mounted(tmp_path / "disk", "500m"):
        run = tmp_path / "disk" / "run"
        overrides = settings(
            scene_shards, run, train__epochs=3, data__val=scene_shards / "val.json", evaluate__every_steps=3,
            encoder__trainable="none", evaluate__best_metric="loss",
        )  # fmt: skip
        in_processes(processes, train_on_a_disk_that_fills, empty_config, overrides, run.parent, (5, 13))
        assert_complete(run, scene_shards, [16, 18])


def delete_the_run(config_path: Path, overrides: list[str], run: Path) -> None:
    from captioning.distributed.stop_signals import StopSignals
    from captioning.training import trainer

    shown = trainer.Monitor.step

    def step(monitor, number, scalars):
        if number == 3:
            shutil.rmtree(run)
        shown(monitor, number, scalars)

    trainer.Monitor.step = step
    with pytest.raises(InputError, match="last checkpoint, of step 6, could not be written"):
        trainer.train(load_config(config_path, overrides), StopSignals())
    assert not run.exists()


@pytest.mark.parametrize("with_ledger", ["true", "false"])
def test_a_run_folder_that_is_deleted_is_told_at_the_end(scene_shards, tmp_path, empty_config, with_ledger):
    run = tmp_path / "run"
    overrides = settings(scene_shards, run, train__epochs=1, encoder__trainable="none", data__ledger=with_ledger)
    in_processes(1, delete_the_run, empty_config, overrides, run)


def test_a_cache_waits_for_room_on_its_disk(tmp_path, monkeypatch):
    """Its own oldest shards go first; then it waits for what others hold, as for storage that is away."""
    monkeypatch.setattr(outages, "FIRST_WAIT", 0.05)
    monkeypatch.setattr(outages, "_patience", 0.2)
    data = [bytes([number]) * 300_000 for number in range(4)]
    for number, content in enumerate(data):
        (tmp_path / f"s{number}.tar").write_bytes(content)
    with mounted(tmp_path / "disk", "1m"):
        disk = tmp_path / "disk"
        cache = Cache(disk / "cache", limit=10**9)

        def read(number: int) -> bytes:
            sha256 = hashlib.sha256(data[number]).hexdigest()
            return cache.read(Url(f"pipe:cat {tmp_path}/", f"s{number}.tar"), 300_000, sha256, 10, 5)

        assert [read(number) for number in range(4)] == [bytes([number]) * 5 for number in range(4)]
        assert len(list(cache.home.glob("*.tar"))) == 3, "there is room for three"
        for path in cache.home.glob("*.tar"):
            path.unlink()
        ballast = fill(disk)
        with pytest.raises(InputError, match=r"The disk of .* is full"):
            read(0)
        threading.Timer(0.1, ballast.unlink).start()
        monkeypatch.setattr(outages, "_patience", 60)
        assert read(0) == bytes(5)
