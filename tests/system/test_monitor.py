"""What a run shows of itself, read back from its event files and its output."""

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from rich.console import Console
from rich.text import Text
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from captioning import config as configuration
from captioning.data.captions import EncodedCaptions
from captioning.data.dataset import EvaluationBatches
from captioning.data.transforms import preprocessing_of
from captioning.data.vocabulary import END, START, from_json
from captioning.model.captioner import Captioner
from captioning.runs import checkpoint
from captioning.runs.progress import progress
from captioning.runs.run_folder import RunFolder
from shards import index as shard_index
from tests.conftest import CPU_PROCESSES, ROOT, free_ports, run_command, settings, train_command
from tests.system.test_launch import refused

SCALARS = {
    "train/loss", "train/perplexity", "train/gradient_norm", "train/unreadable", "train/skipped_steps",
    "train/top5_accuracy",
    "train/lr/encoder", "train/lr/decoder",
    "train/images_per_s", "train/captions_per_s", "train/data_wait_fraction", "train/step_ms", "train/peak_memory_gb",
    "val/loss", "val/perplexity", "val/CIDEr", "val/BLEU-4", "val/ROUGE-L",
}  # fmt: skip


def killed(command: list[str], done: Callable[[], bool]) -> None:
    """Start a run of one process and SIGKILL it once ``done``."""
    process = subprocess.Popen(command, env={**os.environ, **CPU_PROCESSES}, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not done():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def watched(scene_shards, tmp_path_factory, empty_config):
    """A run killed twice, with its curves on disk beyond its last checkpoint, and as soon as it had a checkpoint;
    continued by the same command. With what the last start said."""
    run = tmp_path_factory.mktemp("monitor") / "run"
    overrides = settings(
        scene_shards, run, train__epochs=3, data__val=scene_shards / "val.json", evaluate__every_steps=3,
        checkpoint__every_steps=5,
    )  # fmt: skip
    command = train_command(1, overrides, empty_config)
    scores = run / "scores.jsonl"
    killed(command, lambda: scores.exists() and '"step": 9' in scores.read_text())  # and the checkpoint is of step 5
    killed(command, lambda: 10 in checkpoint.steps(run))
    assert RunFolder(run).status()[0] == "running"
    done = run_command(command)
    assert done.returncode == 0, done.stderr[-2000:]
    return run, done.stderr


@pytest.fixture(scope="module")
def events(watched):
    return EventAccumulator(str(watched[0] / "tensorboard"), size_guidance={"images": 0, "scalars": 0}).Reload()


def test_curves_have_each_step_once_after_a_kill(watched, events):
    assert set(events.Tags()["scalars"]) >= SCALARS
    for tag in SCALARS:
        steps = [event.step for event in events.Scalars(tag)]
        assert steps == ([3, 6, 9, 12, 15, 18] if tag.startswith("val/") else list(range(1, 19))), tag
    assert len(list((watched[0] / "tensorboard").iterdir())) == 3, "one run with a file a start, no runs below it"


def test_values_are_what_they_are_called(events):
    last = {tag: events.Scalars(tag)[-1].value for tag in SCALARS}
    assert last["train/perplexity"] == pytest.approx(math.exp(last["train/loss"]), rel=1e-4)
    assert last["val/perplexity"] == pytest.approx(math.exp(last["val/loss"]), rel=1e-4)
    assert last["train/captions_per_s"] == pytest.approx(5 * last["train/images_per_s"], rel=1e-4)
    assert 0 <= last["train/data_wait_fraction"] <= 1 and 0.05 < last["train/peak_memory_gb"] < 20
    assert last["train/unreadable"] == last["train/skipped_steps"] == 0


@pytest.fixture
def one_thread():
    """Tensors this small only get slower by threads that wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_validation_loss_is_that_of_every_caption_word_by_word(watched, scene_shards, one_thread):
    run, _ = watched
    config = configuration.load_config(run / "config.yaml")
    saved = checkpoint.find(run, "step-18", pytest.fail)
    vocabulary = from_json(saved.text("vocabulary.json"), "")
    model = Captioner(config, len(vocabulary)).eval()
    model.load_state_dict(saved.model())
    index = shard_index.load(scene_shards / "val.json")
    captions = EncodedCaptions(run / "encoded-val")
    images = EvaluationBatches(index, preprocessing_of(config))[0, len(index)].inputs
    losses = []
    with torch.no_grad():
        features = model.encode(images)
        for number in range(len(images)):
            for caption in captions.of(number):
                state, previous = model.decoder.start(features[number : number + 1]), START
                for word in [*map(int, caption), END]:
                    logits, state = model.decoder.step(state, torch.tensor([previous]))
                    losses.append(-float(torch.log_softmax(logits, dim=-1)[0, word]))
                    previous = word
    scores = [json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines()]
    assert not {"loss", "perplexity"} & set(scores[-1]), "they are no scores"
    assert scores[-1]["teacher_forcing"]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_watched_images_are_shown_with_their_captions(events):
    pictures = events.Images("val/captions")
    assert [picture.step for picture in pictures] == [3, 6, 9, 12, 15, 18]
    assert pictures[-1].width > 1000 and pictures[0].encoded_image_string != pictures[-1].encoded_image_string


def test_output_is_plain_lines_where_nobody_watches(watched):
    _, said = watched
    assert "\x1b" not in said and "\r" not in said
    assert re.search(r"global batch +8 images = 1 process\(es\) x 2 micro-batch\(es\) of at most 4", said)
    assert re.search(r"data +44 training images in 1 shard\(s\), 10 to validate on, \d+ words", said)
    assert re.search(r"\d+ an epoch, \d+ done", said)
    lines = re.findall(r"step 18/18  eta 0:00:00  loss .*", said)
    assert len(lines) == 1
    for part in (
        "perplexity",
        "lr encoder 0.0001 decoder 0.001",
        "images/s",
        "captions/s",
        "data wait",
    ):
        assert part in lines[0]


def test_headline_scores_are_shown_and_the_best_is_marked(watched):
    run, said = watched
    lines = re.findall(r"validation at step (\d+):  CIDEr [\d.]+  BLEU-4 [\d.]+  ROUGE-L [\d.]+( +\* best)?", said)
    assert [int(step) for step, _ in lines][-1] == 18
    best = checkpoint.find(run, "best", pytest.fail).state.best_step
    assert all(not mark for step, mark in lines if int(step) > best)
    assert all(mark for step, mark in lines if int(step) == best)


def test_numbers_drop_out_as_the_terminal_narrows():
    """At 80 columns bar, step, time to go, loss and speed are there; at 60 no number is cut in half."""
    numbers = ("loss 2.345", "123 images/s", "data wait 3%", "perplexity 10.43")
    for width, shown in ((60, ()), (80, numbers[:2]), (100, numbers[:3]), (200, numbers)):
        console = Console(width=width, force_terminal=True, color_system=None, file=io.StringIO())
        with progress(console) as drawn:
            drawn.add_task("training", total=19950, completed=123, numbers=numbers)
            drawn.refresh()
            line = Text.from_ansi(console.file.getvalue()).plain.splitlines()[-1]
        assert "123/19950" in line and "eta" in line
        assert [number for number in numbers if number in line] == list(shown), (width, line)
        assert len(line.rstrip()) <= width


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed here")
def test_wandb_that_is_not_installed(scene_shards, tmp_path, empty_config):
    overrides = settings(scene_shards, tmp_path / "run", train__total_steps=1, monitor__trackers="wandb")
    refused(train_command(1, overrides, empty_config), "wandb is not installed", "monitor.trackers=none")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def board(watched):
    """TensorBoard on the run, at an address of this machine alone."""
    port = free_ports(1)[0]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(watched[0] / "tensorboard")]
    options = ["--host", "127.0.0.1", "--port", str(port), "--load_fast", "false", "--reload_interval", "1"]
    server = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 90
    while True:
        try:
            if asked(f"{address}/data/plugin/scalars/tags"):
                break
        except OSError:
            pass
        assert server.poll() is None and time.monotonic() < deadline, "TensorBoard does not answer"
        time.sleep(0.3)
    yield address
    server.terminate()
    server.wait(timeout=30)


def asked(address: str, body: dict | None = None):
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def test_tensorboard_serves_one_run_with_everything(board, watched):
    assert asked(f"{board}/data/runs") == ["."]
    assert set(asked(f"{board}/data/plugin/scalars/tags")["."]) >= SCALARS
    assert list(asked(f"{board}/data/plugin/images/tags")["."]) == ["val/captions"]
    query = {"experimentName": "", "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_RUNNING"]}
    query |= {"colParams": [], "startIndex": 0, "sliceSize": 10}
    groups = asked(f"{board}/data/plugin/hparams/session_groups", query)["sessionGroups"]
    assert len(groups) == 1
    assert groups[0]["hparams"]["train.global_batch_size"] == 8
    final = {metric["name"]["tag"]: metric["value"] for metric in groups[0]["metricValues"]}
    scores = [json.loads(line) for line in (watched[0] / "scores.jsonl").read_text().splitlines()]
    assert final["val/CIDEr"] == pytest.approx(scores[-1]["CIDEr"])


@pytest.mark.skipif(shutil.which("chromium") is None, reason="Chromium is not installed: apt-get install chromium")
def test_tensorboard_in_a_browser(board, tmp_path):
    """The page as a browser draws it, JavaScript and all."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    drawn = ["--dump-dom", "--window-size=1500,3000", "--virtual-time-budget=20000", f"{board}/#timeseries"]
    page = run_command(["chromium", *flags, f"--user-data-dir={tmp_path / 'profile'}", *drawn], timeout=120).stdout
    for text in ("captions_per_s", "data_wait_fraction", "train", "val", "lr", "HParams"):
        assert text.lower() in page.lower()
    assert "No dashboards are active" not in page
