"""What a run needs before its first step: data, vocabulary, and the checkpoint to continue from."""

import logging
from importlib.util import find_spec
from threading import Event

import torch

from captioning.config import Config, save_text
from captioning.data import captions as encoded
from captioning.data import vocabulary as vocab
from captioning.data.captions import EncodedCaptions
from captioning.data.loader import loader_workers
from captioning.data.splits import open_split
from captioning.distributed.ranks import Ranks
from captioning.distributed.stop_signals import StoppedError, StopSignals, stopped_by
from captioning.evaluation import provenance
from captioning.model.captioner import Captioner
from captioning.model.encoder_identity import check_encoder, encoder_part, first_encoder
from captioning.runs import checkpoint
from captioning.runs.checkpoint import Checkpoint, RunState
from captioning.runs.mirror import restore
from captioning.runs.progress import Progress, bar
from captioning.runs.run_folder import RunFolder
from captioning.training.checks import (
    check_overlap,
    compare_with_folder,
    enlarged,
    open_splits,
    refuse_lost_checkpoints,
)
from captioning.training.experiment import Experiment
from captioning.training.init_weights import init_weights, put
from captioning.training.objectives import OBJECTIVES
from captioning.training.reference_counts import count_references
from shards.errors import InputError
from shards.files import write_atomically
from shards.index import Index

logger = logging.getLogger(__name__)


def prepare_run(config: Config, folder: RunFolder, ranks: Ranks, stop: StopSignals) -> Experiment:
    """Rank 0 prepares the run; what it found, or what it objects to, reaches every rank.

    Raises:
        StoppedError: when a stop signal reaches a rank meanwhile.
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

        prepared = ranks.run_on_main(work, lambda: stop.received is not None)
        if prepared is None:
            raise stopped_by(ranks.all_gather(stop.received))
    return prepared


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
    train, val = open_splits(config, open_split)
    run = folder.path
    if config.checkpoint.mirror and config.resume:
        restore(config.checkpoint.mirror, folder, meanwhile=lambda: on_progress(0, len(train)))
    is_new = not folder.is_run
    changed = compare_with_folder(config, folder)
    shared = None
    if val is not None and (is_new or any(change.startswith("data.val:") for change in changed)):
        shared = check_overlap(train, val, config)
    if is_new and (told := enlarged(train, config)):
        logger.warning(told)
    refuse_lost_checkpoints(folder)
    if run.exists():
        folder.hold(meanwhile=lambda: on_progress(0, len(train)))
    saved = _checkpoint_to_continue(folder, train)
    stored = None
    if saved is None and (other := init_weights(config)):
        stored = other.vocabulary
        begun = Captioner(config, len(stored))
        put(other, config, begun)  # fails here, before anything is written
        encoder = begun.encoder
    elif saved is None:
        encoder = first_encoder(config)  # and so does this
    else:
        stored = vocab.from_json(saved.text("vocabulary.json"), str(saved.folder / "vocabulary.json"))
    for split in (train, val):
        check_encoder(split, config, encoder.state_dict if saved is None else lambda: encoder_part(saved.model()))
    folder.hold()
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
        if shared is not None or provenance.kept(run) is None:
            tokenizer = config.data.tokenizer
            provenance.keep(run, provenance.provenance(train.fingerprint, val, tokenizer, shared))
    references = None
    if OBJECTIVES[config.train.objective].needs_references:
        with_end = config.self_critical.end_is_a_word
        references = count_references(train, run / "encoded-references", with_end, on_progress)
    state = saved.state if saved else RunState(0, 0, world_size, train.fingerprint)
    return Experiment(
        train, val, vocabulary, captions, val_captions, references, saved, state, changed, loader_workers(config)
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


def _checkpoint_to_continue(folder: RunFolder, train: Index) -> Checkpoint | None:
    """The newest checkpoint that verifies, of this very data; None for a run without any."""
    passed_over: list[str] = []
    run = folder.path
    saved = checkpoint.newest(run, passed_over.append)
    for message in passed_over:
        logger.warning(message)
    if saved is None and passed_over:
        raise InputError(
            f"No checkpoint in {run} verifies. To start anew choose another run=FOLDER, or delete this one."
        )
    if saved is not None and saved.state.step < (told := folder.last_saved_step()):
        logger.warning(
            f"{run} was saved at step {told}; the newest checkpoint that is there is of step {saved.state.step}. "
            "The steps after it are computed again."
        )
    if saved is not None and saved.state.fingerprint != train.fingerprint:
        raise InputError(
            f"{saved.folder} was trained on other data: fingerprint {saved.state.fingerprint[:16]}, and data.train="
            f"{train.path} has {train.fingerprint[:16]}. Give the run its own data, or choose another run=FOLDER."
        )
    return saved
