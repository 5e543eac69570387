"""Runs on GPUs as people start them: every decoder in every precision, DDP over NCCL, and what a config can switch on.

`make gpu` runs them, with benchmarks, and writes a report. Without a GPU, `pytest tests/gpu -m gpu --gpu-tests-on-cpu`
runs the same bodies on the CPU, several processes over gloo.
"""

import json
import math
import os
import shutil
import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

from captioning.inference.predictor import Predictor
from captioning.runs import checkpoint
from shards import index as shard_index
from shards.reader import Sample, read_sample
from tests.conftest import launcher, module, run_command, settings, train_command, untrained_run
from tests.distributed.test_training import SAME, assert_same_bits, distance, killed_at, parameters

pytestmark = pytest.mark.gpu

STEPS, KILLED_AT = 6, 2
# TINY, but on a grid of 4 x 4 and wide enough for the kernels that GPUs have for attention.
SMALL = {
    "data__resize_size": 64,
    "data__image_size": 64,
    "data__max_words": 12,
    "encoder__last_stage": "layer3",
    "decoder__embedding_size": 64,
    "decoder__hidden_size": 64,
    "decoder__dropout": 0.2,
    "train__deterministic": "true",
    "train__total_steps": STEPS,
    "checkpoint__every_steps": KILLED_AT,
    "evaluate__every_steps": STEPS,
}


@dataclass(frozen=True)
class Machine:
    """Where the runs of these tests compute: on ``cuda`` or on the ``cpu``."""

    device: str

    @property
    def launch_config(self) -> str:
        return "node.yaml" if self.device == "cuda" else "cpu2.yaml"

    @property
    def processes(self) -> int:
        """One a GPU; without GPUs two."""
        return torch.cuda.device_count() if self.device == "cuda" else 2

    def environment(self, processes: int) -> dict[str, str]:
        """What ``processes`` see: the first GPUs of those this one may use, or none."""
        if self.device == "cpu":
            return {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
        ids = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        return {"ACCELERATE_USE_CPU": "false", "CUDA_VISIBLE_DEVICES": ",".join(ids.split(",")[:processes])}

    def train(self, overrides: list[str], config: Path, processes: int = 1) -> None:
        """Run to the end. Kernels that add in no fixed order, of which PyTorch warns, are told beside a failure."""
        done = run_command(
            train_command(processes, overrides, config, self.launch_config), **self.environment(processes)
        )
        assert done.returncode == 0, done.stderr[-3000:]
        print("\n".join(line for line in done.stderr.splitlines() if "deterministic" in line))

    def kill_and_continue(self, overrides: list[str], config: Path, run: Path, processes: int = 1) -> None:
        """SIGKILL once a checkpoint is there, and the same command again."""
        command = train_command(processes, overrides, config, self.launch_config)
        killed_at(KILLED_AT, signal.SIGKILL, command, run, with_ranks=True, **self.environment(processes))
        self.train(overrides, config, processes)


@pytest.fixture(scope="session")
def machine(request) -> Machine:
    if request.config.getoption("--gpu-tests-on-cpu"):
        return Machine("cpu")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no GPU here; --gpu-tests-on-cpu runs these tests on the CPU")
    return Machine("cuda")


def assert_continues_to_the_bit(
    machine: Machine, folder: Path, overrides_of, config: Path, processes: int = 1
) -> tuple[Path, Path]:
    """A run in one go and one killed on the way end alike: weights, averages and captions. Returns their folders."""
    whole, run = folder / "whole", folder / "killed"
    machine.train(overrides_of(whole), config, processes)
    machine.kill_and_continue(overrides_of(run), config, run, processes)
    assert_same_bits(run, whole, STEPS)
    ends = [checkpoint.find(path, "latest", pytest.fail) for path in (whole, run)]
    averages = [end.average() or {} for end in ends]
    assert all(torch.equal(averages[0][name], averages[1][name]) for name in averages[0])
    name = f"captions-val-step-{STEPS}.json"
    assert (whole / name).read_bytes() == (run / name).read_bytes()
    return whole, run


def assert_validated(run: Path) -> None:
    """Ten captions and their scores, at the last step."""
    last = json.loads((run / "scores.jsonl").read_text().splitlines()[-1])
    found = [last["CIDEr"], last["BLEU-4"], last["teacher_forcing"]["loss"]]
    assert last["step"] == STEPS and all(map(math.isfinite, found))
    captions = json.loads((run / f"captions-val-step-{STEPS}.json").read_text())
    assert sorted(entry["image_id"] for entry in captions) == list(range(10))


def skip_without(machine: Machine, precision: str) -> None:
    if machine.device == "cpu" and precision == "fp16":
        pytest.skip("fp16 needs a GPU; torch has no fp16 LSTM for CPUs")
    if machine.device == "cuda" and precision == "bf16" and torch.cuda.get_device_capability()[0] < 8:
        pytest.skip(f"{torch.cuda.get_device_name()} has no bf16")


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("decoder", ["lstm", "attention", "updown", "transformer"])
def test_it_trains_continues_to_the_bit_validates_and_captions(
    machine, scene_shards, tmp_path, empty_config, decoder, precision
):
    skip_without(machine, precision)
    changes = {**SMALL, "decoder__name": decoder, "precision": precision, "data__val": scene_shards / "val.json"}
    _, run = assert_continues_to_the_bit(machine, tmp_path, partial(settings, scene_shards, **changes), empty_config)
    assert_validated(run)
    sample = read_sample(shard_index.load(scene_shards / "val.json"), 0)
    assert isinstance(sample, Sample)
    caption = Predictor.from_checkpoint(run, "latest", machine.device).caption(sample.image_bytes)
    assert math.isfinite(caption.log_probability) and caption.log_probability < 0


SWITCHED_ON = {
    "gradient checkpointing": {"encoder__gradient_checkpointing": "true"},
    "averaged weights": {"train__ema_decay": 0.9},
    "unfreezing": {"encoder__unfreeze_at_step": 3, "optim__encoder_warmup_steps": 2},
    "compiling": {
        "train__compile": "true",
        "encoder__last_stage": "layer1",
        "data__image_size": 32,
    },  # one stage is enough
}


@pytest.mark.parametrize("what", SWITCHED_ON)
def test_what_a_config_switches_on_continues_to_the_bit(machine, scene_shards, tmp_path, empty_config, what):
    if what == "compiling" and shutil.which("gcc") is None:
        pytest.skip("torch.compile needs a C compiler (gcc), and there is none")
    changes = {**SMALL, **SWITCHED_ON[what], "decoder__name": "attention", "data__val": scene_shards / "val.json"}
    _, run = assert_continues_to_the_bit(machine, tmp_path, partial(settings, scene_shards, **changes), empty_config)
    assert_validated(run)


def test_self_critical_training_continues_to_the_bit(machine, scene_shards, tmp_path, empty_config):
    first = untrained_run(
        tmp_path / "first", decoder__name="lstm", encoder__grid_size="null", encoder__trainable="none",
        encoder__last_stage="layer3", decoder__embedding_size=64, decoder__hidden_size=64,
    )  # fmt: skip
    changes = {
        **SMALL, "decoder__name": "lstm", "decoder__dropout": 0.0, "encoder__trainable": "layer3",
        "train__objective": "self_critical", "self_critical__samples": 3, "init_from": first,
        "data__val": scene_shards / "val.json",
    }  # fmt: skip
    _, run = assert_continues_to_the_bit(machine, tmp_path, partial(settings, scene_shards, **changes), empty_config)
    assert_validated(run)


def test_training_from_stored_features_continues_to_the_bit(machine, scene_shards, tmp_path, empty_config):
    """Both splits encoded on the device, then trained from and validated on."""
    changes = {**SMALL, "decoder__name": "attention", "encoder__trainable": "none", "data__ledger": "false"}
    of_encoder = settings(scene_shards, tmp_path / "none", **changes)
    for split in ("train", "val"):
        source = [empty_config, *of_encoder, "--split", scene_shards / f"{split}.json", "--out", tmp_path / "features"]
        done = run_command(module("launch.encode", *source), **machine.environment(1))
        assert done.returncode == 0, done.stderr[-3000:]
    changes["data__val"] = tmp_path / "features" / "val.json"
    _, run = assert_continues_to_the_bit(
        machine, tmp_path, partial(settings, tmp_path / "features", **changes), empty_config
    )
    assert_validated(run)


@pytest.fixture
def processes(machine) -> int:
    if machine.processes < 2:
        pytest.skip("one GPU here: processes exchange over NCCL from two on")
    return machine.processes


def test_all_gpus_continue_to_the_bit(machine, processes, scene_shards, tmp_path, empty_config):
    changes = {**SMALL, "decoder__name": "attention", "data__val": scene_shards / "val.json"}
    overrides_of = partial(settings, scene_shards, **changes)
    _, run = assert_continues_to_the_bit(machine, tmp_path, overrides_of, empty_config, processes)
    assert_validated(run)


def test_all_gpus_train_as_one_does(machine, processes, scene_shards, tmp_path, empty_config):
    """Two images each, and one more. By SGD: Adam makes a whole step of a gradient that is all rounding, and GPUs round
    more than CPUs do."""
    changes = {
        **SMALL, "decoder__dropout": 0.0, "optim__name": "sgd", "optim__decoder_lr": 0.1, "checkpoint__keep": 3,
        "train__global_batch_size": 2 * processes + 1, "train__micro_batch_size": 2 * processes + 1,
    }  # fmt: skip
    for name, count in (("together", processes), ("alone", 1)):
        machine.train(settings(scene_shards, tmp_path / name, **changes), empty_config, count)
    together, alone = (parameters(tmp_path / name, STEPS) for name in ("together", "alone"))
    assert distance(together, alone, start=parameters(tmp_path / "alone", KILLED_AT)) < SAME["all"]


def test_batch_norm_synchronised_over_all_gpus_continues_to_the_bit(
    machine, processes, scene_shards, tmp_path, empty_config
):
    if machine.device == "cpu":
        pytest.skip("torch has no SyncBatchNorm for CPUs")
    changes = {**SMALL, "encoder__freeze_batch_norm": "false", "train__sync_batch_norm": "true"}
    changes["data__val"] = scene_shards / "val.json"
    overrides_of = partial(settings, scene_shards, **changes)
    _, run = assert_continues_to_the_bit(machine, tmp_path, overrides_of, empty_config, processes)
    assert_validated(run)


def test_the_exchange_between_all_gpus_is_right(machine, processes):
    command = [*launcher(processes, machine.launch_config), "-m", "launch.doctor"]
    done = run_command(command, **machine.environment(processes))
    assert done.returncode == 0, done.stderr[-3000:]
    assert ("nccl: right" if machine.device == "cuda" else "gloo: right") in done.stdout
