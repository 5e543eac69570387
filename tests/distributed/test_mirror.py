"""checkpoint.mirror: a run whose machine is lost with its disk goes on elsewhere, to the same bits."""

import logging
import shutil
from pathlib import Path

import pytest
import torch

from captioning.config import load_config
from captioning.runs import checkpoint
from captioning.runs.checkpoint import RunState
from captioning.runs.mirror import Mirror, restore
from captioning.runs.run_folder import RunFolder
from captioning.runs.saver import Saver
from shards.errors import InputError
from tests.conftest import settings
from tests.distributed.test_faults import OPTIMIZER, TEXTS
from tests.processes import in_processes

MODEL = {"weight": torch.arange(6.0)}


def save(run: Path, url: str, steps: list[int], best_step: int | None = None) -> None:
    run.mkdir(exist_ok=True)
    for step in steps:
        saver = Saver(run, TEXTS, 2, background=False, mirror=Mirror(url))
        saver.start(RunState(step, step, 1, "data", 0.5, best_step), MODEL, OPTIMIZER)
        saver.close(60)


@pytest.fixture(params=["path", "file", "memory"])
def url(request, tmp_path) -> str:
    mirror = tmp_path / "mirror"
    return {"path": str(mirror), "file": f"file://{mirror}", "memory": f"memory://{tmp_path.name}"}[request.param]


def test_what_was_saved_is_fetched_where_it_is_gone(tmp_path, url):
    save(tmp_path / "run", url, [4, 8, 12], best_step=4)
    assert Mirror(url).steps() == [4, 8, 12], "the best is kept, and two others"
    shutil.rmtree(tmp_path / "run")
    with RunFolder(tmp_path / "run") as folder:
        assert folder.is_new
        restore(url, folder, lambda: None)
        assert folder.is_run and (folder.path / "config.yaml").read_text() == TEXTS["config.yaml"]
        assert sorted(path.name for path in folder.path.iterdir()) == ["checkpoints", "config.yaml", "lock"]
    found = checkpoint.newest(tmp_path / "run", pytest.fail)
    assert found.state.step == 12 and found.model()["weight"].tolist() == MODEL["weight"].tolist()


def test_damaged_and_unfinished_uploads_are_passed_over(tmp_path, caplog):
    mirror = tmp_path / "mirror"
    save(tmp_path / "run", str(mirror), [4, 8, 12])
    (mirror / "step-00000012" / "optimizer.pt").write_bytes(b"flipped")
    shutil.copytree(mirror / "step-00000012", mirror / "step-00000016")
    (mirror / "step-00000016" / "manifest.json").unlink()
    (mirror / "notes").mkdir()
    shutil.rmtree(tmp_path / "run")
    with RunFolder(tmp_path / "run") as folder:
        restore(str(mirror), folder, lambda: None)
    assert checkpoint.steps(tmp_path / "run") == [8]
    assert [f"passed over step {step}" in caplog.text for step in (16, 12)] == [True, True]
    shutil.rmtree(mirror / "step-00000008")
    shutil.rmtree(tmp_path / "run")
    with RunFolder(tmp_path / "run") as folder, pytest.raises(InputError, match="None of the 2 checkpoints"):
        restore(str(mirror), folder, lambda: None)
    assert RunFolder(tmp_path / "run").is_new and (mirror / "notes").is_dir()


def test_one_that_cannot_be_reached_is_told_and_stops_nothing(tmp_path, caplog):
    (tmp_path / "mirror").write_text("a file, where a folder should be")
    with caplog.at_level(logging.WARNING):
        save(tmp_path / "run", str(tmp_path / "mirror"), [4, 8])
    assert caplog.text.count("could not be mirrored") == 2
    assert checkpoint.newest(tmp_path / "run", pytest.fail).state.step == 8
    shutil.rmtree(tmp_path / "run")
    with RunFolder(tmp_path / "run") as folder, pytest.raises(InputError, match="cannot be read"):
        restore(str(tmp_path / "mirror"), folder, lambda: None)
    with pytest.raises(InputError, match=r"checkpoint.mirror=nowhere://x cannot be opened"):
        Mirror("nowhere://x")


def train(config_path: Path, *starts: list[str]) -> None:
    from captioning.distributed.stop_signals import StopSignals
    from captioning.training.trainer import train

    for overrides in starts:
        config = load_config(config_path, overrides)
        train(config, StopSignals())
        if config.checkpoint.mirror and config.train.total_steps == 6:
            shutil.rmtree(config.run)


def test_a_run_goes_on_through_its_mirror_to_the_same_bits(scene_shards, tmp_path, empty_config):
    undisturbed, lost = tmp_path / "undisturbed", tmp_path / "lost"
    mirrored = {"checkpoint__mirror": f"file://{tmp_path}/mirror", "data__ledger": "false"}
    in_processes(
        1, train, empty_config,
        settings(scene_shards, undisturbed, train__total_steps=10),
        settings(scene_shards, lost, train__total_steps=6, **mirrored),
        settings(scene_shards, lost, train__total_steps=10, **mirrored),
    )  # fmt: skip
    expected, found = (checkpoint.newest(run, pytest.fail).model() for run in (undisturbed, lost))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert RunFolder(lost).status() == ("finished", "step 10 of 10")
    assert checkpoint.steps(lost) == [8, 10], "it went on from step 6: that was fetched, and step 4 never written here"
    assert Mirror(str(tmp_path / "mirror")).steps() == [8, 10]
