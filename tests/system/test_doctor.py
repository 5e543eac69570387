"""What the doctor tells is so, and a failed check is an exit status, not a crash."""

import shutil
import sys
from collections import Counter

import pytest
import torch

from captioning.config import Config, load_config, save_text
from captioning.data import vocabulary as vocab
from captioning.doctor import split
from captioning.doctor.checks import Check, look, size
from captioning.doctor.run import largest_micro_batch, run_checks, try_micro_batch
from launch import doctor
from shards import sources
from shards.packing.packer import pack
from shards.packing.plan import Settings
from tests.conftest import launcher, module, run_command, settings, with_one_broken_image, write_coco
from tests.system.test_pack import jpeg


def seen(checks: list[Check]) -> dict[str, str]:
    return {check.what: check.seen for check in checks}


@pytest.fixture
def index(tmp_path):
    captions = {f"{n}.jpg": ["A red cat.", *(["A dog runs."] if n < 4 else [])] for n in range(10)}
    source = sources.coco(*write_coco(tmp_path / "coco", captions, jpeg()))
    return pack(source, "train", tmp_path / "out", Settings())


def test_captions_are_counted_as_the_vocabulary_counts_them(index):
    told = seen(split.captions(index, lambda done, total: None))
    assert told["captions"] == "14"
    assert told["captions an image"] == "1 to 2, mean 1.40"
    assert told["words in all"] == "56, 6 different"
    words = len(vocab.build(Counter({"a": 14, "red": 10, "cat": 10, ".": 14, "dog": 4, "runs": 4}), 5))
    assert told["vocabulary, 5+ times"] == f"{words} words, 85.71% of the text"
    assert "labels" not in told


def test_feeding_tells_parts_accumulation_and_the_short_step(index):
    told = seen(split.feeding(index, world_size=3, global_batch=8, micro_batch=2))
    assert told["steps an epoch"] == "2 of 8 images"
    assert told["a step"] == "2 to 3 images a rank, in 2 micro-batches of at most 2"
    assert told["the last step"] == "2 images: 0 to 1 images a rank, 1 ranks without any, in 1 micro-batch of at most 2"
    assert told["shards a rank reads"] == "1 in a step, 1 in 2 steps, of 1"
    assert [check.well for check in split.feeding(index, 9, 8, 2) if check.what == "processes"] == [False]


@pytest.mark.parametrize("option", ["--world-size", "--global-batch", "--micro-batch"])
def test_numbers_below_one_are_bad_usage(monkeypatch, option, capsys):
    monkeypatch.setattr(sys, "argv", ["doctor", "train.json", option, "0"])
    with pytest.raises(SystemExit) as ended:
        doctor.main()
    assert ended.value.code == 2 and f"{option}: 0: a whole number of at least 1" in capsys.readouterr().err


def test_the_command_on_a_split(index):
    done = run_command(module("launch.doctor", index.path, "--world-size", 2, "--global-batch", 4))
    assert done.returncode == 0, done.stderr
    for words in ("14", "images/s", "2 images a rank", "vocabulary"):
        assert words in done.stdout
    index.shards[0].path.write_bytes(b"cut")
    done = run_command(module("launch.doctor", index.path))
    assert done.returncode == 1 and "FAILED" in done.stdout and "Traceback" not in done.stderr


def test_unreadable_samples_are_told(scene_shards, tmp_path):
    damaged, _ = with_one_broken_image(scene_shards, tmp_path / "shards")
    reading, decoding = split.speed(damaged, Config())
    assert (reading.well, decoding.well) == (False, False)
    assert reading.seen.startswith("1 of 44 could not be read, the first: train-000000.tar")


def test_a_run_is_looked_at_without_being_touched(scene_shards, tmp_path, empty_config):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copytree(scene_shards, tmp_path / "shards")
    config = load_config(empty_config, settings(tmp_path / "shards", run, train__epochs=1))
    (run / "config.yaml").write_text(save_text(config))
    assert [c.what for c in run_checks(run, config) if c.well is False] == []
    assert seen(run_checks(run, config))["newest checkpoint"] == "none yet"
    (run / "checkpoints" / "step-00000004").mkdir(parents=True)
    (tmp_path / "shards" / "train-000000.tar").unlink()
    failed = {check.what: check.seen for check in run_checks(run, config) if check.well is False}
    assert set(failed) == {"data.train", "newest checkpoint"}
    assert "train-000000.tar is missing" in failed["data.train"]
    assert "manifest.json cannot be read" in failed["newest checkpoint"]
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "config.yaml"]


def test_the_command_on_two_processes(scene_shards, tmp_path, empty_config):
    """As training is launched: both processes, their sum, and the run they would continue."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(save_text(load_config(empty_config, settings(scene_shards, run, train__epochs=1))))
    done = run_command([*launcher(2), "-m", "launch.doctor", str(run)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2, 2 on this node" in done.stdout and "gloo: right" in done.stdout
    assert done.stdout.count("all-reduce") == 1, "one table, not one a process"
    assert "44 images in 1 shard(s), 44 of them read" in done.stdout


def test_a_folder_that_is_no_run_is_bad_input(tmp_path):
    done = run_command(module("launch.doctor", tmp_path))
    assert done.returncode == 2 and "it is no run" in done.stderr


def test_whatever_a_check_meets_is_told_and_no_crash():
    assert look("x", lambda: 1 / 0) == Check("x", "ZeroDivisionError: division by zero", False)
    told = look("largest micro-batch", lambda: largest_micro_batch(Config(), 100, torch.device("cpu")))
    assert told == Check("largest micro-batch", "tried on a GPU only")
    assert (size(999), size(1_500_000)) == ("999 bytes", "1.5 MB")


@pytest.mark.parametrize("kind", ["lstm", "attention", "transformer", "updown"])
def test_what_is_tried_on_a_gpu_runs(empty_config, tmp_path, kind):
    """The pass whose memory is tried, on a CPU: of as many images, the longest captions, and every decoder."""
    config = load_config(empty_config, settings(tmp_path, tmp_path, decoder__name=kind, train__epochs=1))
    try_micro_batch(config, 10, 3, torch.device("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the largest micro-batch is tried on a GPU only")
def test_the_largest_micro_batch_on_a_gpu():
    told = largest_micro_batch(Config(), 100, torch.device("cuda"))
    assert told.well is not None and "images of 224 pixels" in told.seen
