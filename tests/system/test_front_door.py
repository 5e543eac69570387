"""The `captioning` command: quick help, several processes without a launcher's noise, Ctrl-C, completion, a wheel."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from captioning import __version__
from captioning.runs import checkpoint
from captioning.runs.run_folder import RunFolder
from launch.cli.front import COMMANDS
from tests.conftest import ROOT, run_command, settings
from tests.distributed.test_stopping import ranks_of, started, stopped_step, wait_for
from tests.distributed.test_training import assert_each_image_of_each_epoch_once

HEAVY = {"torch", "torchvision", "accelerate", "matplotlib", "webdataset", "tensorboard"}


def captioning(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "launch", *map(str, arguments)]


def imported_by(command: list[str]) -> tuple[subprocess.CompletedProcess, set[str]]:
    """Run it; and the modules that it imported."""
    done = run_command([command[0], "-X", "importtime", *command[1:]])
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return done, {line.rpartition("|")[2].strip() for line in lines}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_there_before_anything_heavy_is_imported(name):
    done, imported = imported_by(captioning(name, "--help"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"usage: captioning {name}" in done.stdout and "argparse" in imported
    assert not HEAVY & imported


def test_the_command_itself():
    assert run_command(captioning("--version")).stdout == f"captioning {__version__}\n"
    done = run_command(captioning("--help"))
    assert done.returncode == 0 and all(f"  {name} " in done.stdout for name in COMMANDS)
    done = run_command(captioning("trian"))
    assert done.returncode == 2 and "trian" in done.stderr and "'train'" in done.stderr
    assert run_command(captioning("train")).returncode == 2


def test_completion(tmp_path):
    script = run_command(captioning("--completion", "bash")).stdout
    asked = f'{script}\nask() {{ COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _captioning; echo "${{COMPREPLY[*]}}"; }}\n'
    asked += "ask captioning tr; ask captioning evaluate --j; ask captioning pack ver; ask captioning caption photo"
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["train", "--java-seconds --json", "verify", ""] and not done.stderr
    assert "complete -c captioning -n '__fish_seen_subcommand_from train' -l processes" in (
        run_command(captioning("--completion", "fish")).stdout
    )
    assert "bashcompinit" in run_command(captioning("--completion", "zsh")).stdout


def train(scene_shards: Path, run: Path, config: Path, *options: object, **changes) -> list[str]:
    return captioning("train", config, *settings(scene_shards, run, **changes), *options)


def test_two_processes_stopped_continued_and_finished(scene_shards, tmp_path, empty_config):
    run, log = tmp_path / "run", tmp_path / "log"
    command = train(scene_shards, run, empty_config, "--cpu", "--processes", 2, train__epochs=2)
    process = started([*command, "train.epochs=200"], log)
    wait_for(lambda: checkpoint.steps(run), process)
    ranks = ranks_of(process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert not any(rank.is_running() for rank in ranks)
    assert log.read_text().count("SIGTERM: saving") == 1 and "Traceback" not in log.read_text()
    epochs = stopped_step(run) // 6 + 1
    again = [*command, f"train.epochs={epochs}"]
    done = run_command([*again, "--quiet"])
    assert done.returncode == 0, done.stderr[-2000:]
    assert RunFolder(run).status() == ("finished", f"step {6 * epochs} of {6 * epochs}")
    assert f"captioning evaluate {run}" in done.stderr and f"checkpoints/step-{6 * epochs:08d}" in done.stderr
    assert "loss " not in done.stderr and "global batch" not in done.stderr, "--quiet"
    assert_each_image_of_each_epoch_once(run, scene_shards, epochs)

    done, imported = imported_by(again)
    assert done.returncode == 0 and "is finished" in done.stdout and f"captioning report {run}" in done.stdout
    assert not HEAVY & imported, "it says so at once"


def test_bad_input_is_one_message(scene_shards, tmp_path, empty_config):
    run = tmp_path / "run"
    two = ("--cpu", "--processes", 2, "--quiet")

    def refused(message: str, *options: object, **changes) -> set[str]:
        done, imported = imported_by(train(scene_shards, run, empty_config, *options, train__epochs=1, **changes))
        said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
        assert done.returncode == 2 and said[-1].startswith("error: ") and message in said[-1], said
        assert "Traceback" not in done.stderr and done.stderr.count("error: ") == 1
        return imported

    for mistake in ({"data__train": tmp_path / "no.json"}, {"data__val": scene_shards / "train.json"}):
        assert not HEAVY & refused(str(next(iter(mistake.values()))), *two, **mistake), "nothing was started"
    refused("encoder.weights=nowhere.pth", *two, encoder__weights="nowhere.pth")  # found by the processes
    if "CUDA_VISIBLE_DEVICES" not in os.environ:
        refused("this machine has", "--processes", 99)
    assert not run.exists()


def test_a_machine_without_a_gpu_says_so(scene_shards, tmp_path, empty_config):
    command = train(scene_shards, tmp_path / "run", empty_config, train__total_steps=1, checkpoint__every_steps=9)
    done = run_command(command, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0 and "warning: no GPU here" in done.stderr
    assert RunFolder(tmp_path / "run").status() == ("finished", "step 1 of 1")


def test_ctrl_c_while_processes_start(scene_shards, tmp_path, empty_config):
    """Sent to all of them, as a terminal does, long before they can note it."""
    run, log = tmp_path / "run", tmp_path / "log"
    process = started(train(scene_shards, run, empty_config, "--cpu", "--processes", 2, train__epochs=99), log)
    wait_for(lambda: len(ranks_of(process)) == 2, process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(120) == 75
    assert RunFolder(run).status()[0] == "preempted" and "Traceback" not in log.read_text()


def test_the_command_alone_is_killed(scene_shards, tmp_path, empty_config):
    """Its processes notice, save, and make way for the next start."""
    run = tmp_path / "run"
    command = train(scene_shards, run, empty_config, "--cpu", "--processes", 2, train__epochs=99)
    process = started(command, tmp_path / "log")
    wait_for(lambda: checkpoint.steps(run), process)
    ranks = ranks_of(process)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert not alive
    assert stopped_step(run) > 0 and "the end of its launcher" in RunFolder(run).status()[1]


def test_one_process_is_killed(scene_shards, tmp_path, empty_config):
    run, log = tmp_path / "run", tmp_path / "log"
    process = started(train(scene_shards, run, empty_config, "--cpu", "--processes", 2, train__epochs=99), log)
    wait_for(lambda: checkpoint.steps(run), process)
    ranks_of(process)[1].kill()
    assert process.wait(120) == 1
    assert "error: rank 1 was killed by SIGKILL" in log.read_text()
    assert run_command(captioning("status", run)).returncode == 75, "the same command continues"


@pytest.mark.parametrize("name", ["caption", "evaluate", "report"])
def test_ctrl_c_while_a_command_imports(name, tmp_path):
    """Sent to a real process, while torch is being loaded."""
    log = tmp_path / "log"
    process = started(captioning(name, tmp_path, *([ROOT] if name == "caption" else [])), log)
    wait_for(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text(), process)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert not log.read_text()


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel, built from a copy of the repository and installed into a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("captioning", "configs", "launch", "shards", "slurm"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), str(source)]
    subprocess.run(build, check=True)
    (wheel,) = folder.glob("*.whl")
    assert f"-{__version__}-" in wheel.name
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--target", str(folder / "site"), str(wheel)], check=True
    )
    shutil.rmtree(source)
    return folder / "site"


def test_an_installed_wheel_works_from_any_folder(installed, tmp_path, scene_shards):
    def command(*arguments: object) -> subprocess.CompletedProcess:
        return subprocess.run(
            [installed / "bin" / "captioning", *map(str, arguments)],
            capture_output=True, text=True, cwd=tmp_path, timeout=120,
            env={**os.environ, "PYTHONPATH": str(installed)},
        )  # fmt: skip

    assert command("--version").stdout == f"captioning {__version__}\n"
    shipped = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert {line.split()[0] for line in command("train", "--list").stdout.splitlines()} == shipped
    for config in ("demo", "configs/demo.yaml"):
        done = command("train", config)
        assert done.returncode == 2 and "runs/demo/shards/train.json" in done.stderr, "its own data, packed here"
    assert "no config file elsewhere/demo.yaml" in command("train", "elsewhere/demo.yaml").stderr
    assert command("status", "demo").stdout.startswith("runs/demo/run: no run has begun")
    assert command("slurm").returncode == 0 and command("slurm").returncode == 2
    assert {path.name for path in (tmp_path / "slurm").iterdir()} == {path.name for path in (ROOT / "slurm").iterdir()}
    accelerate = {path.name for path in (installed / "launch" / "accelerate").iterdir()}
    assert accelerate == {path.name for path in (ROOT / "launch" / "accelerate").iterdir()}
    data = [f"data.{split}={scene_shards / split}.json" for split in ("train", "val")]
    small = ["train.epochs=null", "train.total_steps=1", "data.image_size=32", "decoder.hidden_size=16"]
    done = command("train", "demo", "--cpu", *data, *small)
    assert done.returncode == 0, done.stderr
    assert RunFolder(tmp_path / "runs" / "demo" / "run").status() == ("finished", "step 1 of 1")
