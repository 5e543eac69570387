"""The commands as people type them: help that helps, and one short error with status 2 for bad input."""

import json
import logging
import shutil

import pytest
from PIL import Image

from captioning.distributed import ranks
from captioning.runs.run_folder import RunFolder
from launch.cli.command import BAD_INPUT, run
from shards import index
from shards.errors import InputError
from shards.sources import scenes
from tests.conftest import ROOT, module, run_command, settings, train_command, write_coco


def refused(command, *expected, processes_printing=1):
    """The command ends with status 2 and an error of at most a screen that says all that is expected."""
    done = run_command(command)
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stderr.count("error: ") == processes_printing
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 24
    for text in expected:
        assert text in done.stderr
    return done


def test_train_help_lists_every_key():
    from captioning.config import Config, flat

    text = run_command(module("launch.train", "--help")).stdout
    assert all(f"  {key}=" in text for key in flat(Config()))
    assert "images per optimizer step" in text


def test_the_reference_of_settings_is_current():
    from launch.cli.config_reference import markdown

    written = (ROOT / "configs" / "REFERENCE.md").read_text(encoding="utf-8")
    assert written == markdown(), "python -m launch.cli.config_reference > configs/REFERENCE.md"


def test_packing_bad_input(tmp_path):
    images, captions = write_coco(tmp_path / "coco", {"a.jpg": ["A cat."]}, b"no picture")
    out = tmp_path / "out"
    pack = ["launch.pack", "coco", "--split", "train", "--out", out]
    refused(module(*pack, "--images", tmp_path / "nowhere", "--captions", captions), "There is no", "folder of images")
    refused(module(*pack, "--images", images, "--captions", tmp_path / "no.json"), "There is no", "no.json")
    (tmp_path / "instances.json").write_text('{"images": [], "annotations": [{"image_id": 1, "bbox": []}]}')
    refused(module(*pack, "--images", images, "--captions", tmp_path / "instances.json"), "instances_")
    refused(module(*pack, "--images", images, "--captions", captions), "None of the 1 images", "a.jpg")
    refused(module(*pack, "--images", images, "--captions", captions, "--strict"), "a.jpg", "--strict")
    here = ["--images", images, "--captions", captions]
    refused(module(*pack, *here, "--quality", "200"), "quality")
    refused(module(*pack, *here, "--workers", "0"), "--workers 0")
    refused(module("launch.pack", "coco", "--split", "a/b", "--out", out, *here), "--split 'a/b'")
    refused(module("launch.pack", "coco", "--split", "train", "--out", captions, *here), "is a file")
    assert not out.exists(), "nothing half-written is left"


def test_training_bad_input(scene_shards, tmp_path, empty_config):
    run = tmp_path / "run"

    def train(*overrides, **changes):
        return train_command(1, [*settings(scene_shards, run, train__epochs=1, **changes), *overrides], empty_config)

    refused(train("encoder.nmae=x", "data.flip=5", "trian.epochs=2"), "3 mistake(s)", "did you mean encoder.name?")
    refused(train(data__train=tmp_path / "no.json"), "There is no shard index", "captioning pack")
    refused(train(data__val=scene_shards / "train.json"), "very samples of data.train")
    refused(train("encoder.weights=nowhere.pth"), "neither a file nor weights of resnet18", "IMAGENET1K_V1")
    refused(train(f"run={scene_shards / 'train.json'}"), "is a file")
    refused(train("train.world_size=2"), "1 process(es) started", "--processes 2")
    shutil.copytree(scene_shards, tmp_path / "cut")
    tar = tmp_path / "cut" / "train-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    refused(train(data__train=tmp_path / "cut" / "train.json"), "train-000000.tar has", "the index says")
    assert not run.exists(), "nothing half-written is left"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    refused(train(f"run={tmp_path / 'other'}"), "folder of other things")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.txt"]


def test_a_global_batch_smaller_than_the_world_is_refused(scene_shards, tmp_path, empty_config):
    overrides = settings(scene_shards, tmp_path / "run", train__epochs=1, train__global_batch_size=1)
    done = run_command(train_command(2, overrides, empty_config))
    assert done.returncode != 0, "the launcher answers with a status of its own"
    assert done.stderr.count("error: ") == 1 and "smaller than the 2 processes" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words",
    ["Application timeout caused pair closure", "[../gloo/transport/tcp/pair.cc:547] Connection closed by peer",
     "Socket closed [127.0.0.1]:1", "Timed out waiting 5000ms for recv operation to complete", "NCCL error: remote"],
)  # fmt: skip
def test_a_lost_process_is_told_from_an_error_of_its_own(words):
    """By what was seen, or stands in the libraries: the run then counts as killed, and job scripts start it again."""
    assert ranks.is_peer_failure(RuntimeError(words))
    assert not ranks.is_peer_failure(RuntimeError("The size of tensor a (3) must match")) and not ranks.is_peer_failure(
        OSError(words)
    )


def test_more_processes_than_gpus_are_refused(monkeypatch):
    """The words alone: no machine with a GPU runs these tests."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(InputError, match=r"4 processes .* has 2 GPU\(s\)(.|\n)*--num_processes 2"):
        ranks.init_distributed()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    ranks._check_gpu(3)


def test_a_run_folder_of_another_config_is_refused(scene_shards, tmp_path, empty_config):
    run = tmp_path / "run"
    assert (
        run_command(train_command(1, settings(scene_shards, run, train__total_steps=2), empty_config)).returncode == 0
    )

    def again(**changes):
        return train_command(1, settings(scene_shards, run, **{"train__total_steps": 2} | changes), empty_config)

    refused(again(seed=1, train__global_batch_size=4), "seed: 0 -> 1", "train.global_batch_size: 8 -> 4", "run=FOLDER")
    refused(again(decoder__hidden_size=32), "decoder.hidden_size: 16 -> 32")
    refused(again(resume="false"), "resume=true")
    refused(again(data__train=scene_shards / "val.json"), "trained on other data")
    for folder in (run / "checkpoints").iterdir():
        (folder / "model.safetensors").write_bytes(b"damaged")
    done = refused(again(), "No checkpoint in", "verifies")
    assert "passed over" in done.stderr
    assert RunFolder(run).status() == ("finished", "step 2 of 2"), "a refused start leaves it alone"


def test_evaluating_and_captioning(scene_shards, tmp_path, empty_config):
    run = tmp_path / "run"
    overrides = settings(scene_shards, run, train__total_steps=3, data__val=scene_shards / "val.json")
    assert run_command(train_command(1, overrides, empty_config)).returncode == 0
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        scenes.draw(scenes.scene(5, "train", number)).save(folder / f"{number}.png")
    Image.new("L", (300, 20), 90).save(folder / "grey.jpg")
    picture, results = tmp_path / "sheet.png", tmp_path / "captions.json"
    done = run_command(module("launch.caption", run, folder, "--json", results, "--picture", picture))
    assert done.returncode == 0, done.stderr
    assert [line.split(": ")[0] for line in done.stdout.splitlines()] == [str(p) for p in sorted(folder.iterdir())]
    entries = [json.loads(line) for line in results.read_text().splitlines()]
    assert [entry["image"] for entry in entries] == [str(p) for p in sorted(folder.iterdir())]
    assert Image.open(picture).width > 500
    (folder / "broken.jpg").write_bytes(b"no picture")
    done = run_command(module("launch.caption", run, folder))
    assert done.returncode == 0 and "skipped: " in done.stderr and "broken.jpg" in done.stderr
    assert len(done.stdout.splitlines()) == 4, "the others are captioned all the same"

    done = run_command(module("launch.evaluate", run, "--java-seconds", 0))
    assert done.returncode == 0 and "CIDEr" in done.stdout and "10 images" in done.stdout
    done = run_command(module("launch.evaluate", run, "--json", tmp_path / "nowhere" / "scores.json"))
    assert done.returncode == 2 and "its folder does not exist" in done.stderr
    refused(module("launch.evaluate", tmp_path), "not a run folder")
    refused(module("launch.evaluate", run, "--checkpoint", "step-77"), "step-3")
    refused(module("launch.evaluate", run, "--split", "holdout"), "There is no shard index holdout")
    refused(module("launch.evaluate", run, "--split", "test"), "The run has no data.test")
    (tmp_path / "empty").mkdir()
    refused(module("launch.caption", run, tmp_path / "empty"), "holds no images")
    (run / "checkpoints" / "step-00000003" / "model.safetensors").unlink()
    refused(module("launch.caption", run, folder / "0.png"), "no checkpoint that verifies")


def test_a_message_is_cut_to_a_screen(capsys):
    def main():
        raise InputError("x" * 1_000_000 + "\n" + "a line\n" * 1000)

    with pytest.raises(SystemExit):
        run(main)
    said = capsys.readouterr().err
    assert len(said) < 3000 and len(said.splitlines()) <= 41 and said.startswith("error: xxx")


def test_a_tar_in_place_of_an_index_is_a_short_error(scene_shards):
    with pytest.raises(InputError, match="not a shard index") as error:
        index.load(scene_shards / "train-000000.tar")
    assert len(str(error.value)) < 600


def test_what_libraries_log_comes_as_a_line_of_its_kind(capsys):
    with pytest.raises(SystemExit):
        run(lambda: logging.getLogger("captioning.runs").warning("the disk is slow"))
    logging.getLogger("shards").error("gone")
    assert capsys.readouterr().err == "warning: the disk is slow\nerror: gone\n"


@pytest.mark.parametrize(
    "refused", [PermissionError(13, "Permission denied", "runs/x"), OSError(28, "No space", "runs/x")]
)
def test_a_disk_that_refuses_is_a_short_error(refused, capsys):
    def main():
        raise refused

    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == BAD_INPUT
    assert capsys.readouterr().err == f"error: runs/x: {refused.strerror}\n"
