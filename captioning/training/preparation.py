"""What a run needs before its first step: data, vocabulary, and the checkpoint to continue from."""

import logging
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from threading import Event

import torch

from captioning.config import IDENTITY, Config, flat, load_saved, save_text
from captioning.data import captions as encoded
from captioning.data import vocabulary as vocab
from captioning.data.batches import TrainBatches, open_split
from captioning.data.captions import EncodedCaptions
from captioning.data.transforms import preprocessing_of
from captioning.data.vocabulary import Vocabulary
from captioning.distributed.ranks import Ranks
from captioning.distributed.stop_signals import StoppedError, StopSignals, stopped_by
from captioning.model.captioner import Captioner
from captioning.model.encoder import Encoder, load_pretrained
from captioning.runs import checkpoint
from captioning.runs.checkpoint import Checkpoint, RunState
from captioning.runs.progress import Progress, bar
from captioning.runs.run_folder import RunFolder
from shards.errors import InputError, listed
from shards.files import write_atomically
from shards.hashing import key_of
from shards.index import Index
from shards.order import step_range, steps_per_epoch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Experiment:
    """What rank 0 found and settled, the same on every rank."""

    train: Index
    val: Index | None
    vocabulary: Vocabulary
    captions: EncodedCaptions
    val_captions: EncodedCaptions | None
    checkpoint: Checkpoint | None
    state: RunState
    changed: list[str]  # settings that differ from the ones the run began with
    workers: int  # loader processes a rank

    def step_range(self, step: int, config: Config) -> tuple[int, int, int]:
        return step_range(step, len(self.train), config.train.global_batch_size)

    def steps_per_epoch(self, config: Config) -> int:
        return steps_per_epoch(len(self.train), config.train.global_batch_size)

    def total_steps(self, config: Config) -> int:
        return config.train.total_steps or self.steps_per_epoch(config) * (config.train.epochs or 0)

    def train_batches(self, config: Config, ranks: Ranks) -> TrainBatches:
        return TrainBatches(
            self.train,
            self.captions,
            preprocessing_of(config),
            config.seed,
            config.train.global_batch_size,
            config.train.micro_batch_size,
            config.data.captions_per_image,
            ranks.rank,
            ranks.world_size,
        )

    def build_model(self, config: Config, is_main: bool) -> Captioner:
        """The model to start from; pretrained weights on rank 0 alone, since DDP hands its parameters to all.

        Raises:
            InputError: when the checkpoint to continue from holds another model.
        """
        torch.manual_seed(key_of("model", config.seed) >> 1)
        model = Captioner(config, len(self.vocabulary))
        if self.checkpoint is not None:
            try:
                model.load_state_dict(self.checkpoint.model())
            except RuntimeError as error:
                raise self.checkpoint.unfitting(error) from error
        elif is_main:
            load_pretrained(model.encoder, config.encoder)
        return model


def prepare_run(config: Config, folder: RunFolder, ranks: Ranks, stop: StopSignals) -> Experiment:
    """Rank 0 prepares the run; what it found, or what it objects to, reaches every rank.

    Raises:
        StoppedError: when a rank is told to stop meanwhile.
    """
    with bar("reading captions", shown=ranks.is_main) as on_progress:

        def work(unwanted: Event) -> Experiment:
            def watched(done: int, total: int) -> None:
                if unwanted.is_set():
                    raise StoppedError
                on_progress(done, total)

            try:
                return prepare(config, folder, ranks.world_size, watched)
            except OSError as error:
                raise InputError(f"run={config.run} cannot be prepared: {error}") from error

        found = ranks.run_on_main(work, lambda: stop.received is not None)
        if found is None:
            raise stopped_by(ranks.all_gather(stop.received))
    return found


def prepare(config: Config, folder: RunFolder, world_size: int, on_progress: Progress) -> Experiment:
    """Check everything a run needs, then make or continue its folder, which is held from then on. Runs on rank 0 alone.

    Raises:
        InputError: when data, weights or run folder do not fit the config; nothing has been written then.
    """
    if config.train.global_batch_size < world_size:
        raise InputError(
            f"train.global_batch_size={config.train.global_batch_size} is smaller than the {world_size} processes: "
            "some would never get an image. Raise it, or start fewer processes."
        )
    _check_machine(config)
    train, val = _splits(config)
    run = folder.path
    changed = _compare_with_folder(config, folder)
    if run.exists():
        folder.hold(meanwhile=lambda: on_progress(0, len(train)))
    found = _checkpoint_to_continue(run, train)
    stored = None
    if found is None:
        load_pretrained(Encoder(config.encoder), config.encoder)  # fails here, before anything is written
    else:
        stored = vocab.from_json(found.text("vocabulary.json"), str(found.folder / "vocabulary.json"))
    folder.hold()
    write_atomically(run / "config.yaml", save_text(config).encode())  # first: it makes the folder a run's
    threshold, max_words = config.data.min_word_freq, config.data.max_words
    vocabulary = encoded.encode(train, run / "encoded", threshold, max_words, stored, on_progress)
    write_atomically(run / "vocabulary.json", vocabulary.to_json().encode())
    captions, val_captions = EncodedCaptions(run / "encoded"), None
    if val is not None:
        val_captions = EncodedCaptions(run / "encoded-val")
        encoded.encode(val, val_captions.folder, threshold, max_words, vocabulary, on_progress)
    state = found.state if found else RunState(0, 0, world_size, train.fingerprint)
    return Experiment(train, val, vocabulary, captions, val_captions, found, state, changed, loader_workers(config))


def _check_machine(config: Config) -> None:
    if config.monitor.trackers == "wandb" and find_spec("wandb") is None:
        raise InputError(
            "monitor.trackers=wandb, and wandb is not installed. Install it, or set monitor.trackers=none."
        )
    if torch.cuda.is_available():
        return
    if config.precision == "fp16":
        raise InputError("precision=fp16 needs a GPU; torch has no fp16 LSTM for CPUs. Set precision=bf16, or no.")
    if config.train.sync_batch_norm:
        raise InputError(
            "train.sync_batch_norm=true needs GPUs; torch has no SyncBatchNorm for CPUs. Set it to false, or hold the "
            "statistics still with encoder.freeze_batch_norm=true and encoder.projection_batch_norm=false."
        )


def _splits(config: Config) -> tuple[Index, Index | None]:
    train = open_split(config.data.train, config)
    val = open_split(config.data.val, config) if config.data.val else None
    if val is not None and val.fingerprint == train.fingerprint:
        raise InputError(f"data.val={config.data.val} holds the very samples of data.train: scores would mean nothing.")
    return train, val


def _compare_with_folder(config: Config, folder: RunFolder) -> list[str]:
    """Settings changed since the run in the folder began; refuses those that would make it another experiment."""
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


def _checkpoint_to_continue(run: Path, train: Index) -> Checkpoint | None:
    """The newest checkpoint that verifies, of this very data; None for a run without any."""
    passed_over: list[str] = []
    found = checkpoint.newest(run, passed_over.append)
    for message in passed_over:
        logger.warning(message)
    if found is None and passed_over:
        raise InputError(
            f"No checkpoint in {run} verifies. To start anew choose another run=FOLDER, or delete this one."
        )
    if found is not None and found.state.fingerprint != train.fingerprint:
        raise InputError(
            f"{found.folder} was trained on other data: fingerprint {found.state.fingerprint[:16]}, and data.train="
            f"{train.path} has {train.fingerprint[:16]}. Give the run its own data, or choose another run=FOLDER."
        )
    return found


def loader_workers(config: Config) -> int:
    """Loader processes a rank: as configured, else this machine's cores shared by its ranks, one left for each rank."""
    if config.data.num_workers is not None:
        return config.data.num_workers
    cores = len(os.sched_getaffinity(0))
    return max(0, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))
