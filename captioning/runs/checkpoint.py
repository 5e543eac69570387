"""What survives a crash: checkpoints that are whole or not there.

``RUN/checkpoints/step-00000100/`` holds ``model.safetensors``, ``optimizer.pt``, ``config.yaml``, ``vocabulary.json``,
``state.json``, with ``train.ema_decay`` also ``average.safetensors``, and last ``manifest.json`` with every file's size
and sha256. It is written under a temporary name, fsynced and renamed; older ones go only after the new one has been
read back and verified. Nothing is unpickled.
"""

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from captioning.runs.hashed_file import HashedFile, write_safetensors, write_torch
from captioning.runs.run_folder import note_saved
from shards.errors import InputError
from shards.files import sha256_of

if TYPE_CHECKING:  # what reads no tensors, the state of a run say, need not wait for torch's import
    from torch import Tensor

logger = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{8})")
_MALFORMED = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)  # of files in a checkpoint


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
    epoch_unreadable: int = 0  # unreadable samples so far in the epoch that the next step belongs to
    validations_since_best: int = 0
    skipped_steps: int = 0
    lr_decays: int = 0  # how often the learning rate has fallen on a plateau


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder."""

    folder: Path

    @property
    def state(self) -> RunState:
        return RunState(**json.loads((self.folder / "state.json").read_text()))

    def text(self, name: str) -> str:
        return (self.folder / name).read_text(encoding="utf-8")

    def model(self) -> "dict[str, Tensor]":
        import safetensors.torch

        return safetensors.torch.load_file(self.folder / "model.safetensors")

    def optimizer(self, mapped: bool = False) -> dict[str, Any]:
        """Tensors and numbers alone, anything else raises; ``mapped``: read as they are used."""
        import torch

        return torch.load(self.folder / "optimizer.pt", map_location="cpu", weights_only=True, mmap=mapped)

    def average(self) -> "dict[str, Tensor] | None":
        """State dict with the averaged weights, if the run keeps them."""
        import safetensors.torch

        path = self.folder / "average.safetensors"
        return safetensors.torch.load_file(path) if path.exists() else None

    def captioner(self) -> "dict[str, Tensor]":
        """The state dict to write captions with: averaged weights, where they are kept."""
        return self.average() or self.model()

    def unfitting(self, error: Exception) -> InputError:
        """The error to raise when what is in it, sound as it is, belongs to another model or optimizer."""
        return InputError(
            f"{self.folder} does not fit this run's model: {' '.join(str(error).split())[:300]}\nAnother version wrote "
            "it, or somebody changed it. Continue with the version that wrote it, or choose another run=FOLDER."
        )


def save(
    run: Path,
    state: RunState,
    model: "dict[str, Tensor]",
    optimizer: dict[str, Any],
    texts: dict[str, str],
    keep: int,
    average: "dict[str, Tensor] | None" = None,
) -> Path:
    """Write checkpoint ``step-N`` of a run (on one rank alone), then prune all but ``keep`` and the best.

    Raises:
        OSError: when it could not be written whole; earlier checkpoints are then untouched.
    """
    final = run / "checkpoints" / f"step-{state.step:08d}"
    if damage(final) is None and replace(Checkpoint(final).state, world_size=state.world_size) == state:
        return final
    temporary = final.with_name(final.name + ".tmp")
    _remove(temporary)
    writers: dict[str, Callable[[HashedFile], object]] = {
        "model.safetensors": partial(write_safetensors, tensors=model),
        "optimizer.pt": partial(write_torch, value=optimizer),
        "state.json": partial(HashedFile.write, data=json.dumps(asdict(state), indent=1).encode()),
        **{name: partial(HashedFile.write, data=text.encode()) for name, text in texts.items()},
    }
    if average is not None:
        writers["average.safetensors"] = partial(write_safetensors, tensors=average)
    try:
        _make_folder(temporary)
        _check_room(temporary, _tensors_size((model, optimizer, average)))
        _write(temporary, writers)
    except BaseException:
        _remove(temporary)  # a full disk needs the room, for its logs at least
        raise
    if final.exists():  # damaged, or of the same step before it was validated
        final.rename(aside := final.with_name(final.name + ".old.tmp"))
        temporary.rename(final)
        _remove(aside)
    else:
        temporary.rename(final)
    _sync_folder(final.parent)
    if (reason := damage(final)) is not None:
        raise OSError(f"{final} does not read back as it was written: {reason}")
    for act, what in (
        (lambda: note_saved(run, state.step), "that cannot be noted in the run folder"),
        (lambda: _prune(run, keep, state), "an older one cannot be removed"),
    ):
        try:
            act()
        except OSError as error:
            logger.warning(f"step {state.step} is saved, but {what}: {error}")
    return final


def _check_room(folder: Path, needed: int) -> None:
    """Refuse before the disk is full, not once it is: the ledger and events of the run that goes on are on it too."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        lacking = f"{os.strerror(errno.ENOSPC)}, {needed / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free"
        raise OSError(errno.ENOSPC, lacking, str(folder))


def _tensors_size(value: Any) -> int:
    """Bytes of all tensors in nested dicts, lists and tuples."""
    from torch import Tensor

    if isinstance(value, Tensor):
        return value.nbytes
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(map(_tensors_size, parts))


def _write(folder: Path, writers: dict[str, Callable[[HashedFile], object]]) -> None:
    """Write files, and last the manifest of what they should hold; all on disk at the end."""
    manifest: dict[str, dict[str, object]] = {}
    for name, write in writers.items():
        with HashedFile(folder / name) as file:
            write(file)
            manifest[name] = {"size": file.size, "sha256": file.finish()}
    with HashedFile(folder / "manifest.json") as file:
        file.write(json.dumps(manifest, indent=1).encode())
        file.finish()
    _sync_folder(folder)


def _make_folder(folder: Path) -> None:
    """Make a checkpoint's folder, and the one it is in; not the run's, which somebody may have removed."""
    if not folder.parent.is_dir():
        folder.parent.mkdir()
        _sync_folder(folder.parent.parent)
    folder.mkdir()
    _sync_folder(folder.parent)


def _remove(folder: Path) -> None:
    """Remove a folder if it is there; of one that cannot be removed, people are told by the next write into it."""
    shutil.rmtree(folder, ignore_errors=True)


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
    """Why a checkpoint cannot be used; None when every file has the size and sha256 its manifest gives, and its state
    and tensors can be read: somebody may have put in files that were never written here. Nothing is unpickled."""
    try:
        return _unlike_manifest(folder) or _unreadable(Checkpoint(folder))
    except _MALFORMED as error:
        return f"manifest.json cannot be read ({error})"


def _unlike_manifest(folder: Path) -> str | None:
    """Which file of a checkpoint is not as its manifest says, or is missing there."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, expected in manifest.items():
        if not re.fullmatch(r"\w[\w.-]*", name):  # of a run from elsewhere: nothing outside its folder is opened
            raise ValueError(f"it names {name[:80]!r}")
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"] or sha256_of(path) != expected["sha256"]:
            return f"{name} is not what was written"
    lacking = {"model.safetensors", "optimizer.pt", "state.json", "config.yaml", "vocabulary.json"} - set(manifest)
    return f"{', '.join(sorted(lacking))} missing from the manifest" if lacking else None


def _unreadable(checkpoint: Checkpoint) -> str | None:
    """Which file of a checkpoint is not of its kind."""
    import safetensors

    name = "state.json"
    try:
        if checkpoint.folder.name != f"step-{checkpoint.state.step:08d}":
            return f"state.json is of step {checkpoint.state.step}"
        for path in sorted(checkpoint.folder.glob("*.safetensors")):
            name = path.name
            with safetensors.safe_open(path, "pt"):
                pass
        name = "optimizer.pt"
        checkpoint.optimizer(mapped=True)
        for name in ("config.yaml", "vocabulary.json"):
            checkpoint.text(name)
    except UnpicklingError:
        return f"{name} holds other things than tensors and numbers, which are not loaded"
    except (OSError, ValueError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        return f"{name} is not such a file ({str(error).splitlines()[0]})"
    return None


def latest_state(run: Path) -> RunState | None:
    """The state in the newest checkpoint, if its files are those of its manifest; opens none of the tensors."""
    if not (there := steps(run)):
        return None
    folder = run / "checkpoints" / f"step-{there[-1]:08d}"
    try:
        return None if _unlike_manifest(folder) else Checkpoint(folder).state
    except _MALFORMED:
        return None


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
