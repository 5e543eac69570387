"""What the choices are worth: every decoder and the main alternatives, trained alike on rich drawn scenes, on the CPU.

Each system is trained by `captioning train`, for the same number of steps, once a seed, and captions scenes that nobody
trained on. Runs are kept in --out: the same command again continues where it was stopped. What is left to do, and about
how long it takes, is said after every run. With the defaults it takes about two hours of two cores: run it by hand.

Every system begins from one encoder, pretrained here by captioning the demo's scenes; "frozen" leaves it as it is, and
"features" are what it made of the training scenes once, by `captioning encode`. All caption the pictures themselves.
"""

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
from torch import nn
from torchvision.models import get_model

from captioning.config import DECODERS, SETTINGS
from captioning.distributed.ranks import Ranks
from captioning.evaluation.results import ScoredCaptions
from captioning.evaluation.scores import evaluate
from captioning.inference.evaluate_run import caption_run
from captioning.inference.predictor import Predictor
from captioning.metrics.intervals import intervals
from captioning.metrics.metric import Metric, mean_of
from captioning.model.encoders.backbone import TorchvisionEncoder
from captioning.model.search import SearchOptions
from captioning.runs import checkpoint
from launch.bench.table import Table, write_markdown
from shards import sources
from shards.errors import InputError
from shards.files import write_atomically
from shards.packing.packer import Settings, pack
from shards.sources import rich_scenes, scenes

SCORES = ("CIDEr", "BLEU-4", "ROUGE-L", "CIDEr-shuffled")
RIGHT = ("things", *rich_scenes.ASPECTS)  # shares of captions, each of the scenes that ask for it
ENCODER = "resnet18"
BASE = {
    "data.resize_size": 96, "data.image_size": 96, "data.flip": "false", "data.min_word_freq": 1,
    "encoder.name": ENCODER, "encoder.last_stage": "layer3", "encoder.trainable": "all",
    "decoder.embedding_size": 128, "decoder.hidden_size": 128, "decoder.doubly_stochastic_weight": 0,
    "train.global_batch_size": 32, "train.micro_batch_size": 32,
    "optim.encoder_lr": 1e-3, "optim.decoder_lr": 1e-3, "optim.weight_decay": 0.01, "optim.schedule": "cosine",
    "optim.warmup_steps": 50, "checkpoint.every_steps": 100, "evaluate.every_steps": 10**9,
}  # fmt: skip


@dataclass(frozen=True)
class System:
    """A row of the table: what it changes in BASE, the numbers of beams its captions are searched with, and the type of
    the stored features it is trained from; None: pixels."""

    name: str
    changes: dict[str, object]
    beam_sizes: tuple[int, ...] = (1,)
    features: str | None = None


def systems() -> list[System]:
    """Those that this version can train: decoders and image geometries that it does not have are left out."""
    systems = [System(name, {"decoder.name": name}, (1, 3)) for name in DECODERS]
    systems += [
        System(f"attention, {mode}", {"decoder.name": "attention", "data.crop_mode": mode})
        for mode in ("squash", "pad")
        if "data.crop_mode" in SETTINGS
    ]
    # Of a squashed picture training sees what features are of: nothing is cut at random.
    frozen: dict[str, object] = {"decoder.name": "attention", "data.crop_mode": "squash", "encoder.trainable": "none"}
    systems.append(System("attention, squash, frozen", frozen))
    systems += [
        System(f"attention, squash, frozen, {dtype} features", frozen, features=dtype)
        for dtype in ("float32", "float16")
    ]
    return systems


def arguments(parser: argparse.ArgumentParser) -> None:
    names = [system.name for system in systems()]
    add = parser.add_argument
    add("--only", nargs="+", choices=names, default=names, metavar="NAME", help=f"of: {'; '.join(names)}")
    add("--scenes", type=int, default=4000, help="training scenes; a tenth as many are captioned (4000)")
    add("--steps", type=int, default=800, help="optimizer steps of every system, of 32 scenes each (800)")
    add("--pretrain-steps", type=int, default=600, help="steps of the encoder's pretraining (600)")
    add("--seeds", type=int, default=2, help="runs a system (2)")
    add("--out", type=Path, default=Path("runs/systems"), metavar="DIR", help="shards and runs (runs/systems)")
    add("--markdown", type=Path, metavar="FILE", help="write the table there too, as Markdown")


def measure(arguments: argparse.Namespace) -> list[Table]:
    if min(arguments.scenes, arguments.steps, arguments.pretrain_steps, arguments.seeds) < 1:
        raise InputError("--scenes, --steps, --pretrain-steps and --seeds are 1 at least.")
    out, started = arguments.out, time.monotonic()
    for name, module in (("simple", scenes), ("rich", rich_scenes)):
        _pack(out / "shards" / name, arguments.scenes, module)
    encoder = _pretrained(out, arguments.pretrain_steps)
    chosen = [system for system in systems() if system.name in arguments.only]
    runs = [(system, seed) for seed in range(arguments.seeds) for system in chosen]
    for done, (system, seed) in enumerate(runs):
        changes = {**system.changes, "encoder.weights": encoder}
        _train(_run(out, system, seed), _shards(out, system, changes), arguments.steps, seed, changes)
        each = (time.monotonic() - started) / (done + 1) / 60
        _say(f"{done + 1} of {len(runs)} trained; about {each * (len(runs) - done - 1):.0f} minutes left")
    tables = _tables([(system, beams) for system in chosen for beams in system.beam_sizes], arguments)
    tables[-1].notes.append(f"all of this command: {(time.monotonic() - started) / 60:.1f} minutes")
    if arguments.markdown:
        write_markdown(arguments.markdown, tables)
    return tables


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _run(out: Path, system: System, seed: int) -> Path:
    return out / f"{system.name.replace(', ', '-').replace(' ', '-')}-seed-{seed}"


def _pack(shards: Path, count: int, drawn) -> None:
    """Draw and pack scenes, unless they are there from an earlier start."""
    for split, number in (("train", count), ("val", max(1, count // 10))):
        if not (shards / f"{split}.json").exists():
            images, captions = scenes.write(shards / "drawn", split, number, 0, drawn.scene, drawn.captions)
            pack(sources.coco(images, captions), split, shards, Settings())


def _shards(out: Path, system: System, changes: dict[str, object]) -> Path:
    """Where a system's training split is: rich scenes, or their features, which are encoded unless they are there."""
    images = out / "shards/rich"
    if system.features is None:
        return images
    features = out / "shards" / f"rich-{system.features}"
    if not (features / "train.json").exists():
        values = {"run": out / "encoding", "data.train": images / "train.json", "train.total_steps": 1, **changes}
        more = ["--split", images / "train.json", "--out", features, "--dtype", system.features]
        _captioning("encode", out / "encoding", values, *more)
    return features


def _train(run: Path, shards: Path, steps: int, seed: int, changes: dict[str, object]) -> None:
    """What is trained already is left alone."""
    values = {**changes, "run": run, "seed": seed, "data.train": shards / "train.json", "train.total_steps": steps}
    _captioning("train", run, values, "--cpu", "--quiet")


def _captioning(name: str, run: Path, changes: dict[str, object], *more: object) -> None:
    """Give a command as a person would, in a process of its own.

    Raises:
        InputError: when it does not come to its end.
    """
    config = run.with_suffix(".yaml")
    write_atomically(config, b"{}\n")
    options = [f"{key}={value}" for key, value in {**BASE, **changes}.items()]
    _say(f"{name} {run}")
    command = [sys.executable, "-m", "launch", name, config, *options, *more]
    if code := subprocess.run(list(map(str, command)), check=False).returncode:
        raise InputError(f"{name} {run} failed (exit status {code}). The same command again goes on there.")


def _pretrained(out: Path, steps: int) -> Path:
    """The encoder of a captioner of simple scenes, as a file of torchvision's state dict."""
    path, run = out / "encoder.safetensors", out / "pretraining"
    if not path.exists():
        _train(run, out / "shards/simple", steps, 0, {"decoder.name": "attention"})
        trained, model = Predictor.from_checkpoint(run, "latest", "cpu").model.encoder, get_model(ENCODER, weights=None)
        assert isinstance(trained, TorchvisionEncoder)
        ours = nn.ModuleDict(dict(zip(trained.stages, trained.cut(model)[0], strict=False)))
        ours.load_state_dict(trained.stages.state_dict())  # the same tensors as the model's
        write_atomically(path, safetensors.torch.save(model.state_dict()))
    return path


def _tables(rows: list[tuple[System, int]], arguments: argparse.Namespace) -> list[Table]:
    """Scores, and shares of right captions, with a row for every system and search."""
    seeds = range(arguments.seeds)
    about = f"{arguments.scenes:,} rich drawn scenes, {arguments.steps:,} steps, {len(seeds)} seed(s)"
    scores = Table(f"Scores of systems: {about}", ["system", "search", *SCORES])
    right = Table(f"Captions that are right, %: {about}", ["system", "search", *RIGHT])
    for system, beam_size in rows:
        _say(f"captioning with {system.name}, {beam_size} beam(s)")
        measured = [_metrics(_run(arguments.out, system, seed), arguments.out, beam_size) for seed in seeds]
        for table, scale in ((scores, 1), (right, 100)):
            cells = [_cell([metrics[name] for metrics in measured], scale) for name in table.columns[2:]]
            table.rows.append([system.name, f"beam {beam_size}" if beam_size > 1 else "greedy", *cells])
    scores.notes += ["mean of the seeds (its 95 % bootstrap interval over scenes) / how far apart the seeds are"]
    right.notes += scores.notes
    right.notes += [
        "things: every shape with its colour, no other; the rest: said and true, of the scenes that ask for it"
    ]
    return [scores, right]


def _cell(of_seeds: list[Metric], scale: int) -> str | None:
    """Mean (interval) / spread; None where no scene asks for it."""
    with np.errstate(invalid="ignore"):
        mean = _mean_of_seeds(of_seeds)
        if np.isnan(mean.value):
            return None
        low, high = intervals([mean])[mean.name]
        digits, apart = 0 if scale == 100 else 2, np.ptp([metric.value for metric in of_seeds])
    text = [f"{scale * number:.{digits}f}" for number in (mean.value, low, high, apart)]
    return f"{text[0]} ({text[1]}-{text[2]}) / {text[3]}"


def _metrics(run: Path, out: Path, beam_size: int) -> dict[str, Metric]:
    """A run's scores and shares of right captions, over the validation scenes."""
    if not checkpoint.steps(run):
        raise InputError(f"{run} has no checkpoint. Delete it, and give the same command again.")
    predictor = Predictor.from_checkpoint(run, "latest", "cpu")
    options = SearchOptions(beam_size=beam_size)
    said = caption_run(predictor, run, str(out / "shards/rich/val.json"), Ranks(0, 1), options).captions
    scores = {metric.name: metric for metric in evaluate(said).metrics if metric.name in SCORES}
    return {**scores, **_right(said)}


def _right(said: ScoredCaptions) -> dict[str, Metric]:
    right = [
        rich_scenes.aspects_right(caption, rich_scenes.scene(0, "val", int(number)))
        for number, caption in zip(said.image_ids, said.captions, strict=True)
    ]
    scores = {}
    for name in RIGHT:
        asked = np.array([name in one for one in right], dtype=np.float64)
        hits = np.array([one.get(name, False) for one in right], dtype=np.float64)
        scores[name] = Metric(name, hits, np.stack([hits, asked], axis=1), mean_of(name, hits).total)
    return scores


def _mean_of_seeds(metrics: list[Metric]) -> Metric:
    """One metric of several runs on the same images: an image that is drawn is drawn for all of them."""
    ends = np.cumsum([0, *(metric.sums.shape[1] for metric in metrics)])
    return Metric(
        metrics[0].name,
        np.mean([metric.each for metric in metrics], axis=0),
        np.concatenate([metric.sums for metric in metrics], axis=1),
        lambda sums: np.mean(
            [metric.total(sums[..., a:b]) for metric, a, b in zip(metrics, ends[:-1], ends[1:], strict=True)], axis=0
        ),
    )
