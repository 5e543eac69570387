"""What the tests share: tiny datasets, packed splits, and a way to run the real commands."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

# Before torch is imported: on tiny tensors, threads that wait for one another cost more than they do.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from captioning import config as configuration
from captioning.data import vocabulary as vocab
from captioning.data.vocabulary import Vocabulary
from captioning.model.captioner import Captioner
from captioning.runs import checkpoint
from captioning.runs.checkpoint import RunState
from shards import index as shard_index
from shards import sources
from shards.index import Index
from shards.packing.packer import Settings, pack
from shards.sources import scenes

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"  # real images, where the developers and CI have them
CPU_PROCESSES = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""} if torch.cuda.is_available() else {}

# The smallest run that has everything: a real ResNet-18 on 32-pixel images, an LSTM of 16, BatchNorm held still so
# that the cut of a batch cannot matter, no dropout.
TINY = {
    "data.min_word_freq": 1,
    "data.resize_size": 32,
    "data.image_size": 32,
    "data.flip": "false",
    "data.ledger": "true",
    "data.num_workers": 0,
    "encoder.name": "resnet18",
    "encoder.trainable": "all",
    "encoder.freeze_batch_norm": "true",
    "encoder.projection_batch_norm": "false",
    "decoder.embedding_size": 16,
    "decoder.hidden_size": 16,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 4,
    "optim.encoder_lr": 1e-4,
    "checkpoint.every_steps": 4,
    "monitor.log_every_steps": 1,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-tests-on-cpu", action="store_true", help="run the tests marked gpu on the CPU, over gloo")


@pytest.fixture(scope="session")
def scene_shards(tmp_path_factory) -> Path:
    """44 training and 10 validation scenes; the folder holds train.json and val.json."""
    folder = tmp_path_factory.mktemp("scenes")
    for split, count in (("train", 44), ("val", 10)):
        images, captions = scenes.write(folder / "drawn", split, count, seed=0)
        pack(sources.coco(images, captions), split, folder / "shards", Settings())
    return folder / "shards"


def write_coco(folder: Path, captions_of: dict[str, list[str]], image: bytes) -> tuple[Path, Path]:
    """A COCO dataset whose images all hold the same bytes: file name -> captions."""
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number, (name, captions) in enumerate(captions_of.items()):
        (folder / name).write_bytes(image)
        images.append({"id": number, "file_name": name})
        annotations += [{"image_id": number, "caption": caption} for caption in captions]
    path = folder / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder, path


def settings(shards: Path, run: Path, **changes) -> list[str]:
    """TINY as overrides, with data, run folder and a test's own changes ('train__epochs' for train.epochs)."""
    values = {"run": run, "data.train": shards / "train.json", **TINY}
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return [f"{key}={value}" for key, value in values.items()]


def launcher(processes: int, launch_config: str = "cpu2.yaml") -> list[str]:
    """``accelerate launch`` with one of the launch configurations that are here."""
    accelerate = [str(Path(sys.executable).with_name("accelerate")), "launch"]
    how = ROOT / "launch" / "accelerate" / launch_config
    return [*accelerate, "--config_file", str(how), "--num_processes", str(processes)]


def train_command(processes: int, overrides: list[str], config: Path, launch_config: str = "cpu2.yaml") -> list[str]:
    """The command a user types: ``accelerate launch`` for several processes, plain Python for one."""
    script = [str(ROOT / "launch" / "train.py"), str(config), *overrides]
    return [*launcher(processes, launch_config), *script] if processes > 1 else [sys.executable, *script]


def run_command(command: list[str], timeout: float = 240, **environment: str) -> subprocess.CompletedProcess:
    """Run to the end; what it printed is in ``stdout`` and ``stderr``."""
    everything = {**os.environ, **CPU_PROCESSES, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=everything, cwd=ROOT)


def module(name: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", name, *map(str, arguments)]


def with_one_broken_image(shards: Path, copy: Path) -> tuple[Index, shard_index.Extent]:
    """A copy of the shards in which one training image's first bytes are zeros; the training split, and which one."""
    shutil.copytree(shards, copy)
    index = shard_index.load(copy / "train.json")
    extent = shard_index.read_extents(index.shards[0])[7]
    with index.shards[0].path.open("r+b") as file:
        file.seek(extent.offset)
        file.write(b"\0" * 200)
    return index, extent


@pytest.fixture(scope="session")
def empty_config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "empty.yaml"
    path.write_text("{}\n")
    return path


UNTRAINED_WORDS = Vocabulary((*vocab.SPECIAL, "a", "red", "blue", "star", "moon", "."))


def untrained_run(folder: Path, seed: int = 0, vocabulary: Vocabulary = UNTRAINED_WORDS, **changes) -> Path:
    """A run folder with a checkpoint of step 1 whose model has learned nothing; in all else like a trained one."""
    changes = {"decoder__name": "attention", "encoder__grid_size": 3, "train__epochs": 1} | changes
    changes = {"data__train": folder / "train.json"} | changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("{}\n")
    config = configuration.load_config(folder / "config.yaml", settings(folder, folder, **changes))
    torch.manual_seed(seed)
    model = Captioner(config, len(vocabulary))
    model.decoder.classifier.bias.data[vocab.END] = -1.0  # captions of some words
    texts = {"config.yaml": configuration.save_text(config), "vocabulary.json": vocabulary.to_json()}
    checkpoint.save(folder, RunState(1, 8, 1, "f"), model.state_dict(), {}, texts, keep=2)
    return folder


def coco_mini() -> Path:
    folder = DATA / "coco-mini"
    if not folder.is_dir():
        pytest.skip(f"real COCO images are not here ({folder}): this test runs where the developers' data is")
    return folder


def coco_references() -> dict[int, list[str]]:
    """The captions of COCO's 5,000 validation images, as they are in the official file, by image id."""
    path = DATA / "coco-captions-val2017.json"
    if not path.is_file():
        pytest.skip(f"COCO's captions are not here ({path}): this test runs where the developers' data is")
    captions: dict[int, list[str]] = {}
    for annotation in json.loads(path.read_text(encoding="utf-8"))["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    return captions


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
