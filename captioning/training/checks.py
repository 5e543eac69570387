"""What can be checked of a run before anything is started: its splits, its folder, whether it is finished already.
Nothing here imports torch, whose import alone takes seconds."""

import logging
from collections.abc import Callable

from captioning.config import IDENTITY, Config, flat, load_saved
from captioning.data.splits import check_split
from captioning.data.stored_features import check_settings
from captioning.runs import checkpoint
from captioning.runs.checkpoint import RunState
from captioning.runs.run_folder import RunFolder
from shards.errors import InputError, listed
from shards.index import Index
from shards.order import steps_per_epoch
from shards.overlap import Overlap, overlap

logger = logging.getLogger(__name__)


def check(config: Config) -> RunState | None:
    """Check the data and the run folder of a config. Returns the state of its run if that is finished, and the config
    asks for no more steps.

    Raises:
        InputError: when a split is missing or damaged, or the folder holds another run.
    """
    train, _ = open_splits(config, check_split)
    folder = RunFolder(config.run)
    changed = compare_with_folder(config, folder)
    if not config.checkpoint.mirror:  # else the start looks there first
        refuse_lost_checkpoints(folder)
    return _finished(config, folder, train, changed)


def open_splits(config: Config, open_split: Callable[[str, Config], Index]) -> tuple[Index, Index | None]:
    """The training and the validation split.

    Raises:
        InputError: when one cannot be opened, holds the samples of another, or features of another encoder.
    """
    train = open_split(config.data.train, config)
    val = open_split(config.data.val, config) if config.data.val else None
    if val is not None and val.fingerprint == train.fingerprint and not config.data.allow_overlap:
        raise InputError(f"data.val={config.data.val} holds the very samples of data.train: scores would mean nothing.")
    if config.data.test is not None:
        test = open_split(config.data.test, config)  # what is wrong with it is said before training, not after
        for name, other in (("train", train), ("val", val)):
            if other is not None and other.fingerprint == test.fingerprint:
                raise InputError(f"data.test={config.data.test} holds the very samples of data.{name}.")
    check_settings(train, config, in_training=True)
    if val is not None:
        check_settings(val, config, in_training=False)
    return train, val


def check_overlap(train: Index, val: Index, config: Config) -> Overlap:
    """What the splits share; warns of validation images that look like training images, and of another packing.

    Raises:
        InputError: when the splits share images and ``data.allow_overlap`` does not allow it.
    """
    shared = overlap(train, val)
    audit = f"`captioning audit {train.path} {val.path} --html DIR` shows them"
    if shared.same and not config.data.allow_overlap:
        raise InputError(
            f"data.val={config.data.val} holds {shared.same:,} images of data.train ({shared}): its scores would be "
            f"too good.\n{audit}. Divide the data otherwise (`pack table --splits`), or set data.allow_overlap=true."
        )
    if shared.same or shared.near_duplicates:
        logger.warning(f"{shared}; {audit}")
    for difference in shared.packing_differs:
        logger.warning(f"data.val is packed otherwise than data.train: {difference}")
    return shared


def enlarged(train: Index, config: Config) -> str | None:
    """What is to be said where photographs of the usual 4 : 3 were packed smaller than training shows them."""
    packing, data = train.document.get("packing", {}), config.data
    short_side, long_side = (
        side if type(side := packing.get(name)) is int else 0 for name in ("short_side", "long_side")
    )
    if "features" in packing or not (short_side or long_side):
        return None
    packed = f"--long-side {long_side}" if long_side else f"--short-side {short_side}"
    if data.crop_mode == "crop":
        have, setting, wanted = short_side or long_side * 3 / 4, "resize_size", data.resize_size
        remedy = f"--short-side {wanted}"
    else:
        have, setting, wanted = long_side or short_side * 4 / 3, "image_size", data.image_size
        remedy = f"--long-side {wanted}" if data.crop_mode == "pad" else f"--short-side {wanted}"
    if have >= wanted:
        return None
    return (
        f"data.train={config.data.train} was packed with {packed}, and data.crop_mode="
        f"{data.crop_mode} asks for data.{setting}={wanted}: images are enlarged. Pack them with {remedy}."
    )


def compare_with_folder(config: Config, folder: RunFolder) -> list[str]:
    """Settings changed since the run in the folder began, as ``key: before -> now``.

    Raises:
        InputError: when they make it another experiment, or the folder holds other things.
    """
    run = folder.path
    if run.exists() and not run.is_dir():
        raise InputError(f"run={run} is a file. Choose another run=FOLDER.")
    if not folder.is_run and folder.is_new:
        return []
    if not folder.is_run:
        raise InputError(f"run={run} is a folder of other things (no config.yaml). Choose another run=FOLDER.")
    if not config.resume:
        raise InputError(
            f"run={run} holds a run already. Set resume=true to continue it, or choose another run=FOLDER."
        )
    before, now = flat(load_saved(run / "config.yaml")), flat(config)
    differing = {key: f"{key}: {before[key]} -> {now[key]}" for key in now if before[key] != now[key]}
    refused = [differing[key] for key in IDENTITY if key in differing]
    if refused:
        raise InputError(
            f"run={run} holds a run with other settings:\n{listed(refused, limit=20)}\n"
            "Continue it with its own settings, or choose another run=FOLDER for these."
        )
    return list(differing.values())


def refuse_lost_checkpoints(folder: RunFolder) -> None:
    """A run that has saved does not begin again at step 0 because the disk with its checkpoints is not there. Asked
    before the folder is held, so that its status stays.

    Raises:
        InputError: when the run folder tells of a checkpoint, and there is none at all.
    """
    run = folder.path
    if (told := folder.last_saved_step()) and not checkpoint.steps(run):
        raise InputError(
            f"run={run} was saved at step {told}, and there is no checkpoint in {run / 'checkpoints'}.\n"
            "Is that on a disk which is not mounted? Mount it, or put the checkpoints back. To start anew choose "
            "another run=FOLDER, or delete this one."
        )


def total_steps(config: Config, samples: int) -> int:
    """Optimizer steps of the whole run, on a training split of ``samples`` samples."""
    return config.train.total_steps or steps_per_epoch(samples, config.train.global_batch_size) * (
        config.train.epochs or 0
    )


def _finished(config: Config, folder: RunFolder, train: Index, changed: list[str]) -> RunState | None:
    if folder.status()[0] != "finished":
        return None
    state = checkpoint.latest_state(folder.path)
    if state is None or state.fingerprint != train.fingerprint:  # the start itself says what is wrong
        return None
    # A run that stopped early is before its last step; another validation split is to be scored first.
    if changed and (state.step < total_steps(config, len(train)) or any(c.startswith("data.val:") for c in changed)):
        return None
    return state
