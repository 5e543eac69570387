"""What a run needs before its first step: data, vocabulary, and the checkpoint to continue from."""

import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from threading import Event
from typing import TextIO

import torch

from captioning.config import IDENTITY, Config, flat, load_config, save_text
from captioning.data import captions as encoded
from captioning.data import vocabulary as vocab
from captioning.data.captions import EncodedCaptions
from captioning.data.dataset import open_split, train_dataset
from captioning.data.loader import loader_workers
from captioning.data.transforms import preprocessing_of
from captioning.data.vocabulary import Vocabulary
from captioning.distributed.ranks import Ranks
from captioning.distributed.stop_signals import StoppedError, StopSignals, stopped_by
from captioning.model.captioner import Captioner
from captioning.model.encoders import build_encoder
from captioning.runs import checkpoint, run_folder
from captioning.runs.checkpoint import Checkpoint, RunState
from captioning.runs.progress import Progress, bar
from captioning.training.init_weights import init_weights, put
from captioning.training.objectives import OBJECTIVES
from captioning.training.reference_counts import count_references
from shards.dataset import ShardDataset
from shards.errors import InputError, listed
from shards.files import write_atomically
from shards.hashing import key_of
from shards.index import Index
from shards.order import step_range, steps_per_epoch


@dataclass(frozen=True)
class Experiment:
    """What rank 0 found and settled, the same on every rank."""

    train: Index
    val: Index | None
    vocabulary: Vocabulary
    captions: EncodedCaptions
    val_captions: EncodedCaptions | None
    references: Path | None  # the training captions' n-grams, where the objective needs them
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

    def train_batches(self, config: Config, ranks: Ranks, pin_memory: bool) -> ShardDataset:
        return train_dataset(
            self.train,
            self.captions,
            preprocessing_of(config),
            config.data.captions_per_image,
            seed=config.seed,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
            num_workers=self.workers,
            pin_memory=pin_memory,
        )

    def build_model(self, config: Config, is_main: bool) -> Captioner:
        """The model to start from; weights of others on rank 0 alone, since DDP hands its parameters to all.

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
        elif is_main and (other := init_weights(config)):
            put(other, config, model)
        elif is_main:
            model.encoder.load_pretrained(config.encoder.weights)
        return model


_locks: list[TextIO] = []  # open for the life of the process


def holds_folder() -> bool:
    """Whether this process got as far as to hold its run folder, whose status is then its own to write."""
    return bool(_locks)


def take_folder(run: Path) -> None:
    """Hold the folder of a run that was stopped before it was prepared, to say so there; not that of others."""
    with suppress(InputError, OSError):
        run.mkdir(parents=True, exist_ok=True)
        if not _locks and (_is_empty(run) or (run / "config.yaml").is_file()):
            _locks.append(run_folder.lock(run, patience_s=0))


def _is_empty(run: Path) -> bool:
    """But for what a start leaves that was stopped at once."""
    return all(path.name.removesuffix(".tmp") in ("lock", "status", "config.yaml") for path in run.iterdir())


def prepare_run(config: Config, ranks: Ranks, stop: StopSignals) -> Experiment:
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
                return prepare(config, ranks.world_size, watched)
            except OSError as error:
                raise InputError(f"run={config.run} cannot be prepared: {error}") from error

        found = ranks.run_on_main(work, lambda: stop.received is not None)
        if found is None:
            raise stopped_by(ranks.all_gather(stop.received))
    return found


def prepare(config: Config, world_size: int, on_progress: Progress) -> Experiment:
    """Check everything a run needs, then make or continue its folder. Runs on rank 0 alone.

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
    run = Path(config.run)
    changed = _compare_with_folder(config, run)
    if run.exists():
        _locks.append(run_folder.lock(run, meanwhile=lambda: on_progress(0, len(train))))
    found = _checkpoint_to_continue(run, train)
    stored = None
    if found is None and (other := init_weights(config)):
        stored = other.vocabulary
        put(other, config, Captioner(config, len(stored)))  # fails here, before anything is written
    elif found is None:
        encoder = build_encoder(config.encoder, config.data.image_size)
        encoder.load_pretrained(config.encoder.weights)  # and so does this
    else:
        stored = vocab.from_json(found.text("vocabulary.json"), str(found.folder / "vocabulary.json"))
    if not _locks:
        run.mkdir(parents=True, exist_ok=True)
        _locks.append(run_folder.lock(run))
    write_atomically(run / "config.yaml", save_text(config).encode())  # first: it makes the folder a run's
    threshold, max_words = config.data.min_word_freq, config.data.max_words
    try:
        vocabulary = encoded.encode(
            train, run / "encoded", threshold, max_words, stored, on_progress,
            config.data.tokenizer, config.data.vocabulary_size,
        )  # fmt: skip
    except InputError:
        if stored is None:  # nothing was trained: the folder is not bound to settings that cannot be
            (run / "config.yaml").unlink()
        raise
    write_atomically(run / "vocabulary.json", vocabulary.to_json().encode())
    captions, val_captions = EncodedCaptions(run / "encoded"), None
    if val is not None:
        val_captions = EncodedCaptions(run / "encoded-val")
        encoded.encode(val, val_captions.folder, threshold, max_words, vocabulary, on_progress)
    references = None
    if OBJECTIVES[config.train.objective].needs_references:
        with_end = config.self_critical.end_is_a_word
        references = count_references(train, run / "encoded-references", with_end, on_progress)
    run_folder.set_status(run, "running")
    state = found.state if found else RunState(0, 0, world_size, train.fingerprint)
    return Experiment(
        train, val, vocabulary, captions, val_captions, references, found, state, changed, loader_workers(config)
    )


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
    if config.data.test is not None:
        test = open_split(config.data.test, config)  # what is wrong with it is said before training, not after
        for name, other in (("train", train), ("val", val)):
            if other is not None and other.fingerprint == test.fingerprint:
                raise InputError(f"data.test={config.data.test} holds the very samples of data.{name}.")
    return train, val


def _compare_with_folder(config: Config, run: Path) -> list[str]:
    """Settings changed since the run in the folder began; refuses those that would make it another experiment."""
    if run.exists() and not run.is_dir():
        raise InputError(f"run={run} is a file. Choose another run=FOLDER.")
    if not (run / "config.yaml").is_file() and (not run.exists() or _is_empty(run)):
        return []
    if not (run / "config.yaml").is_file():
        raise InputError(f"run={run} is a folder of other things (no config.yaml). Choose another run=FOLDER.")
    if not config.resume:
        raise InputError(
            f"run={run} holds a run already. Set resume=true to continue it, or choose another run=FOLDER."
        )
    before, now = flat(load_config(run / "config.yaml")), flat(config)
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
        print(f"warning: {message}", file=sys.stderr)
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
