"""The benchmark's own arithmetic."""

import itertools
import json
import time

import pytest
import torch
from PIL import Image

from captioning.data.vocabulary import END, START, UNK
from launch.bench import profile, table
from launch.bench.baselines.models import BaselineAttention, BaselineLstm, baseline_step
from launch.bench.baselines.script import BaselineCaptions, baseline_collate
from launch.bench.scaling import Measured, process_counts, step_seconds
from launch.bench.table import Table
from launch.bench.timing import Speed, side_by_side
from tests.conftest import module, run_command


def test_contenders_take_turns_and_the_faster_one_is_told_so():
    turns = []

    def worker(name, seconds):
        def work():
            turns.append(name)
            time.sleep(seconds)
            return 10

        return work

    speeds = side_by_side({"slow": worker("slow", 0.2), "fast": worker("fast", 0.02)}, rounds=3)
    assert turns == ["slow", "fast", "fast", "slow", "slow", "fast", "fast", "slow"]  # the first round only warms up
    assert len(speeds["slow"].rounds) == 3
    assert 2 < speeds["fast"].over(speeds["slow"]) < 20
    assert 20 < speeds["slow"].median <= 50


def test_a_ratio_is_taken_round_by_round():
    drifting = [1.0, 10.0, 100.0]
    assert Speed(tuple(2 * x for x in drifting)).over(Speed(tuple(drifting))) == pytest.approx(2.0)


def test_tables_are_written_as_they_are_shown(tmp_path, capsys):
    counted = itertools.count()
    shown = Table("what", ["runner", "images/s"], [["ours", 1234.5], [f"row {next(counted)}", None]], ["a note"])
    table.show([shown], {"cores": 4, "devices": []})
    text = capsys.readouterr().out
    assert "1,23" in text and "a note" in text and "devices none" in text
    table.write(tmp_path / "bench.json", [shown], table.machine())
    document = json.loads((tmp_path / "bench.json").read_text())
    assert document["tables"][0]["rows"][0] == ["ours", 1234.5]
    assert document["machine"]["cores"] >= 1


def test_all_gpus_are_among_those_that_scaling_is_measured_on():
    assert [process_counts(gpus) for gpus in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_adding_up_gradients_costs_what_is_not_hidden():
    alone = Measured(seconds=0.1, gradient_bytes=100_000_000)
    assert step_seconds(alone, 1, 1e9, 0.0) == pytest.approx(0.1)
    assert step_seconds(alone, 2, 1e9, 0.0) == pytest.approx(0.2)  # half of them out, the other half's sum back
    assert step_seconds(alone, 10**6, 1e9, 0.0) == pytest.approx(0.3)
    assert step_seconds(alone, 2, 1e9, 0.04) == pytest.approx(0.16)
    assert step_seconds(alone, 2, 1e9, 5.0) == pytest.approx(0.1)


@pytest.mark.parametrize("model", [BaselineLstm, BaselineAttention])
def test_the_script_compared_with_learns(model, tmp_path):
    torch.manual_seed(0)
    paths = []
    for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
        paths.append(tmp_path / f"{name}.jpg")
        Image.new("RGB", (80, 70), colour).save(paths[-1])
    ids = {"a": 4, "red": 5, "blue": 6, "thing": 7}
    data = BaselineCaptions(
        [(paths[0], "A red thing."), (paths[1], "A blue thing")], ids, resize_size=64, image_size=64
    )
    images, captions, lengths = baseline_collate([data[0], data[1]])
    assert images.shape == (2, 3, 64, 64) and lengths == [6, 5]  # the full stop is a word
    assert captions.tolist() == [[START, 4, 5, 7, UNK, END], [START, 4, 6, 7, END, 0]]
    script = model("resnet18", 8)
    losses = [baseline_step(script, images, captions, lengths) for _ in range(12)]
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("mode", ["step", "train", "caption", "profile"])
def test_every_mode_runs(mode, scene_shards, tmp_path):
    """Shrunken to seconds: one case, two images, one round."""
    more = {"step": [], "train": ["--steps", "1", "--workers", "0", "--data", scene_shards / "train.json"]}
    more |= {"caption": ["--one-by-one", "1"], "profile": ["--steps", "1"]}
    case = ["--case", "resnet18:layer4:attention:no", "--batch-size", "2", "--image-size", "64", "--rounds", "1"]
    out = tmp_path / "bench.json"
    done = run_command(module("launch.bench", mode, *case, *more[mode], "--json", out))
    assert done.returncode == 0, done.stderr
    found, *_ = json.loads(out.read_text())["tables"]
    assert found["rows"] and all(isinstance(row[1], float) and row[1] > 0 for row in found["rows"])


def test_gaps_and_own_times_of_a_gpus_trace():
    """Two streams that overlap, then a gap of 30 of 100 us; what the CPU did and annotations are left out."""
    kernel = {"ph": "X", "cat": "kernel", "pid": 0}
    document = {
        "traceEvents": [
            {**kernel, "name": "gemm", "tid": 7, "ts": 1000.0, "dur": 40},
            {**kernel, "name": "all-reduce", "tid": 20, "ts": 1030, "dur": 20},
            {**kernel, "name": "gemm", "tid": 7, "ts": 1080, "dur": 20},
            {**kernel, "name": "ProfilerStep#1", "cat": "gpu_user_annotation", "tid": 7, "ts": 1000, "dur": 500},
            {**kernel, "name": "aten::mm", "cat": "cpu_op", "tid": 1, "ts": 900, "dur": 1000},
            {"ph": "M", "name": "process_name", "pid": 0, "tid": 0},
        ]
    }
    events = profile.events_of(document, ("kernel",))
    assert profile.busy_and_whole(events) == (70, 100)
    assert profile.own_times(events) == {"gemm": 60, "all-reduce": 20}


def test_an_operators_own_time_is_without_those_that_it_calls():
    lane = (1, 1)
    nested = [profile.Event("linear", lane, 0, 10), profile.Event("addmm", lane, 2, 6), profile.Event("t", lane, 3, 1)]
    assert profile.own_times([*nested, profile.Event("addmm", (1, 2), 0, 5)]) == {"linear": 4, "addmm": 10, "t": 1}


def test_bytes_are_counted_once_for_each_input_and_output():
    a, b = torch.ones(10), torch.ones(1)
    assert profile.count_bytes(lambda: a + b) == 40 + 4 + 40
    assert profile.count_bytes(lambda: a.view(2, 5)) == profile.count_bytes(lambda: torch.empty(9)) == 0
    assert profile.count_bytes(lambda: a.add_(b.expand(10))) == 40 + 4 + 40, "what is expanded is as small as before"


def test_the_saving_benchmark_runs(tmp_path):
    small = ["--megabytes", "3", "--saves", "2", "--folder", tmp_path]
    done = run_command(module("launch.bench", "save", *small, "--json", tmp_path / "bench.json"))
    assert done.returncode == 0, done.stderr
    [found] = json.loads((tmp_path / "bench.json").read_text())["tables"]
    assert all(0 < median <= longest for _, median, longest, _ in found["rows"])


@pytest.mark.sweep
def test_the_rewards_benchmark_runs_on_drawn_scenes(tmp_path):
    case = ["--case", "resnet18:none:lstm:no", "--batch-size", "2", "--image-size", "64", "--rounds", "1"]
    done = run_command(module("launch.bench", "reward", *case, "--images", "20", "--json", tmp_path / "bench.json"))
    assert done.returncode == 0, done.stderr
    rates, step = json.loads((tmp_path / "bench.json").read_text())["tables"]
    named = [row[0] for row in rates["rows"]]
    assert named[:2] == ["ours, CIDEr", "ours, CIDEr and BLEU-4"] and named[-1] == "pycocoevalcap, CIDEr"
    assert named[2:-1] == [f"ours, CIDEr, from ids of {name}" for name in ("words", "bpe", "characters")]
    assert step["rows"][0][1] > step["rows"][0][2] > 0, "rewards are part of the step"


def test_a_mistyped_case_is_a_short_error():
    done = run_command(module("launch.bench", "step", "--case", "resnet18:layer9:lstm:no"))
    assert done.returncode == 2 and "layer9" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.sweep
def test_the_data_benchmark_runs_on_drawn_images(tmp_path):
    options = ["--only", "ours", "decoding", "baseline", "--rounds", "1", "--seconds", "0.2", "--length", "600"]
    done = run_command(module("launch.bench", "data", *options, "--json", tmp_path / "bench.json"), timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two, first, order, rank = json.loads((tmp_path / "bench.json").read_text())["tables"]
    assert len(one["rows"]) == len(two["rows"]) == 3 and len(first["rows"]) == 2
    assert order["rows"] and rank["rows"]


@pytest.mark.sweep
def test_systems_are_trained_and_compared(tmp_path):
    """Shrunken to a minute: three systems, two seeds, three steps. Features change nothing but where they are from."""
    frozen = "attention, squash, frozen"
    only = ["--only", "lstm", frozen, f"{frozen}, float32 features"]
    small = ["--scenes", "60", "--steps", "3", "--pretrain-steps", "2", *only]
    files = ["--out", tmp_path / "runs", "--markdown", tmp_path / "table.md", "--json", tmp_path / "table.json"]
    done = run_command(module("launch.bench", "systems", *small, *files), timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    scores, right = json.loads((tmp_path / "table.json").read_text())["tables"]
    assert [row[:2] for row in scores["rows"]] == [
        ["lstm", "greedy"],
        ["lstm", "beam 3"],
        [frozen, "greedy"],
        [f"{frozen}, float32 features", "greedy"],
    ]
    assert scores["rows"][2][2:] == scores["rows"][3][2:] and right["rows"][2][2:] == right["rows"][3][2:]
    assert (tmp_path / "table.md").read_text().count("\n| ") == 10  # two headers and their rows
    assert right["columns"][2:] == ["things", "count", "relation", "size", "place"]
