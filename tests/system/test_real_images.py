"""The main path on real COCO images: pack, train on two processes, SIGKILL, the same command, evaluate, caption."""

import json
import os
import subprocess
import time

import webdataset

from captioning.runs import checkpoint
from shards import index as shard_index
from tests.conftest import CPU_PROCESSES, ROOT, coco_mini, module, run_command, train_command
from tests.distributed.test_training import assert_each_image_of_each_epoch_once, kill_all


def test_real_coco_images(tmp_path):
    data, out, run = coco_mini(), tmp_path / "shards", tmp_path / "run"
    for split in ("train", "val"):
        annotations = data / "annotations" / f"captions_{split}2017.json"
        command = ["coco", "--images", data / f"{split}2017", "--captions", annotations, "--split", split, "--out", out]
        done = run_command(module("launch.pack", *command))
        assert done.returncode == 0, done.stderr
    train, val = (shard_index.load(out / f"{split}.json") for split in ("train", "val"))
    assert (len(train), len(val)) == (130, 206)
    theirs = webdataset.WebDataset([str(shard.path) for shard in train.shards], shardshuffle=False).decode()
    assert [(s["__key__"], s["json"]["captions"]) for s in theirs] == [(t.key, list(t.captions)) for t in train.texts()]

    overrides = [
        f"run={run}",
        f"data.train={out / 'train.json'}",
        f"data.val={out / 'val.json'}",
        "data.ledger=true",
        "data.resize_size=72",
        "data.image_size=64",
        "encoder.name=resnet18",
        "encoder.weights=null",
        "encoder.trainable=all",
        "train.global_batch_size=16",
        "train.micro_batch_size=8",
        "train.epochs=4",
        "checkpoint.every_steps=6",
        "evaluate.every_steps=1000",
    ]
    command = train_command(2, overrides, ROOT / "configs" / "coco_resnet152_lstm.yaml")
    environment = {**os.environ, **CPU_PROCESSES}
    process = subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while 12 not in checkpoint.steps(run):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    kill_all(process.pid)
    process.wait()
    done = run_command(command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (run / "status").read_text().splitlines() == ["finished", "step 36 of 36"]
    assert_each_image_of_each_epoch_once(run, out, epochs=4)
    losses = [float(line.split("loss ")[1].split(" ")[0]) for line in done.stderr.splitlines() if "loss " in line]
    assert losses[-1] < 5.5, "a uniform guess over the vocabulary is 6.2"

    scores = tmp_path / "scores.json"
    done = run_command(module("launch.evaluate", run, "--java-seconds", 0, "--json", scores))
    assert done.returncode == 0, done.stderr
    assert json.loads(scores.read_text())["images"] == 206
    photos = sorted((data / "val2017").iterdir())[:4]
    done = run_command(module("launch.caption", run, *photos))
    assert done.returncode == 0
    assert [line.split(": ")[0] for line in done.stdout.splitlines()] == list(map(str, photos))
    assert all(len(line.split(": ")[1].split()) > 2 for line in done.stdout.splitlines())
