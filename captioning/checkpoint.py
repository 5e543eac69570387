"""What survives a crash: checkpoints that are whole or not there.

``RUN/checkpoints/step-00000100/`` holds ``model.safetensors``, ``optimizer.pt``, ``config.yaml``, ``vocabulary.json``,
``state.json``, and last ``manifest.json`` with every file's size and sha256. It is written under a temporary name,
fsynced and renamed; older ones go only after the new one has been read back and verified. Nothing is unpickled.
"""

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from shards.errors import InputError
from shards.index import sha256_of

_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class RunState:
    """Where a run stands. ``samples_seen`` counts samples of finished optimizer steps: the data order's only state."""

    step: int
    samples_seen: int
    world_size: int
    fingerprint: str
    best_score: float | None = None
    best_step: int | None = None
    evaluated_step: int = 0  # the last that was validated
    epoch_holes: int = 0  # unreadable samples so far in the epoch that the next step belongs to


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder."""

    folder: Path

    @property
    def state(self) -> RunState:
        return RunState(**json.loads((self.folder / "state.json").read_text()))

    def text(self, name: str) -> str:
        return (self.folder / name).read_text(encoding="utf-8")

    def model(self) -> dict[str, Tensor]:
        return safetensors.torch.load_file(self.folder / "model.safetensors")

    def optimizer(self) -> dict[str, Any]:
        return torch.load(self.folder / "optimizer.pt", map_location="cpu", weights_only=True)


def save(
    run: Path, state: RunState, model: dict[str, Tensor], optimizer: dict[str, Any], texts: dict[str, str], keep: int
) -> Path:
    """Write checkpoint ``step-N`` of a run (on one rank alone), then prune all but ``keep`` and the best.

    Raises:
        OSError: when it could not be written whole; earlier checkpoints are then untouched.
    """
    final = run / "checkpoints" / f"step-{state.step:08d}"
    if damage(final) is None and replace(Checkpoint(final).state, world_size=state.world_size) == state:
        return final
    temporary = final.with_name(final.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    files = {
        "model.safetensors": safetensors.torch.save({name: t.contiguous() for name, t in model.items()}),
        "optimizer.pt": _torch_bytes(optimizer),
        "state.json": json.dumps(asdict(state), indent=1).encode(),
        **{name: text.encode() for name, text in texts.items()},
    }
    manifest = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    for name, data in [*files.items(), ("manifest.json", json.dumps(manifest, indent=1).encode())]:
        with (temporary / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    _sync_folder(temporary)
    if final.exists():  # a damaged one
        shutil.rmtree(final)
    temporary.rename(final)
    _sync_folder(final.parent)
    if (reason := damage(final)) is not None:
        raise OSError(f"{final} does not read back as it was written: {reason}")
    _prune(run, keep, state)
    return final


def _torch_bytes(value: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def steps(run: Path) -> list[int]:
    """The steps of a run's checkpoints, whole or damaged, ascending."""
    folder = run / "checkpoints"
    names = [_NAME.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for match in names if match)


def damage(folder: Path) -> str | None:
    """Why a checkpoint cannot be trusted; None when every file has the size and sha256 its manifest gives."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, expected in manifest.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["size"] or sha256_of(path) != expected["sha256"]:
                return f"{name} is not what was written"
        lacking = {"model.safetensors", "optimizer.pt", "state.json", "config.yaml", "vocabulary.json"} - set(manifest)
        return f"{', '.join(sorted(lacking))} missing from the manifest" if lacking else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json cannot be read ({error})"


def newest(run: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies; those passed over are told to ``warn``. None when there is none."""
    return next(_sound(run, warn), None)


def _sound(run: Path, warn: Callable[[str], None]) -> Iterator[Checkpoint]:
    for step in reversed(steps(run)):
        folder = run / "checkpoints" / f"step-{step:08d}"
        reason = damage(folder)
        if reason is None:
            yield Checkpoint(folder)
        else:
            warn(f"passed over {folder}: {reason}")


def find(run: Path, which: str, warn: Callable[[str], None]) -> Checkpoint:
    """A run's checkpoint by name: ``best``, ``latest`` or ``step-N``.

    Raises:
        InputError: when the run has no such checkpoint, or it is damaged.
    """
    if not (run / "checkpoints").is_dir():
        raise InputError(f"{run} is not a run folder: it has no checkpoints. Train with run={run} first.")
    latest = newest(run, warn)
    if latest is None:
        raise InputError(f"{run} has no checkpoint that verifies.")
    if which == "latest":
        return latest
    step = latest.state.best_step if which == "best" else _step_number(which)
    if step is None:
        return latest  # never evaluated: the newest is the best that is known
    folder = run / "checkpoints" / f"step-{step:08d}"
    if (reason := damage(folder)) is not None:
        there = ", ".join(f"step-{number}" for number in steps(run))
        raise InputError(
            f"{folder} cannot be used: {reason}. The run has {there}; --checkpoint latest takes the newest."
        )
    return Checkpoint(folder)


def _step_number(which: str) -> int:
    match = re.fullmatch(r"step-(\d+)", which)
    if not match:
        raise InputError(f"--checkpoint {which}: best, latest or step-N is wanted.")
    return int(match[1])


def _prune(run: Path, keep: int, state: RunState) -> None:
    # What lies beyond the step just saved is damaged and was passed over: it must not count among the kept.
    kept = {*[step for step in steps(run) if step <= state.step][-keep:], state.best_step}
    for step in set(steps(run)) - kept:
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    for leftover in (run / "checkpoints").glob("step-*.tmp"):
        shutil.rmtree(leftover)
