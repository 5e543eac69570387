"""Evaluate a run on a split: caption it with all ranks, and match the captions with their references."""

import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from captioning.data.captions import EncodedCaptions, encode
from captioning.data.splits import open_split, saved_split
from captioning.data.stored_features import check_settings
from captioning.distributed.arithmetic import allow_tf32
from captioning.distributed.ranks import Ranks
from captioning.evaluation import provenance
from captioning.evaluation.caption_split import CaptionSplit
from captioning.evaluation.results import ScoredCaptions
from captioning.evaluation.scores import Evaluation
from captioning.evaluation.scores import evaluate as score
from captioning.evaluation.split_loss import SplitLoss
from captioning.inference.predictor import Predictor
from captioning.model.encoder_identity import check_encoder
from captioning.model.search import SearchOptions, options_of
from shards.errors import InputError
from shards.files import write_atomically
from shards.index import Index

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunCaptions:
    """A run's captions of a split with their references, and where they come from, for JSON."""

    captions: ScoredCaptions
    about: dict[str, Any]


def evaluate(
    run: str | Path, split: str = "val", *, beam_size: int | None = None, checkpoint: str = "best",
    device: str | None = None, java_seconds: float = 0.0,
) -> Evaluation:  # fmt: skip
    """Scores of a run on ``val``, ``test``, ``train`` or any split's NAME.json, in this process alone.

    METEOR and SPICE are computed too when they may take ``java_seconds`` each and Java is there.

    Raises:
        InputError: when there is no such run, checkpoint or split, or nothing to score.
    """
    predictor = Predictor.from_checkpoint(run, checkpoint, device)
    options = options_of(predictor.config.evaluate)
    if beam_size:
        options = replace(options, beam_size=beam_size)
    return score(caption_run(predictor, Path(run), split, Ranks(0, 1), options).captions, java_seconds)


def caption_run(
    predictor: Predictor,
    run: Path,
    split: str,
    ranks: Ranks,
    options: SearchOptions,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> RunCaptions:
    """Caption a split with all ranks and keep the captions in the run folder, in COCO's results format.

    Raises:
        InputError: when the run has no such split, or nothing of it can be read.
    """
    config = predictor.config
    allow_tf32(config.train.tf32)
    splits = {"train": config.data.train, "val": config.data.val, "test": config.data.test}
    path = saved_split(splits[split]) if split in splits else split
    if not path:
        raise InputError(f"The run has no data.{split}. Give --split the path of a split's NAME.json.")
    index = open_split(path, config)
    check_settings(index, config, in_training=False)
    check_encoder(index, config, predictor.model.encoder.state_dict)
    with tempfile.TemporaryDirectory() as encoded, predictor.autocast():
        encode(index, Path(encoded), 1, config.data.max_words, predictor.vocabulary)
        loss = SplitLoss(predictor.model, EncodedCaptions(Path(encoded)), config.evaluate.top_k)
        work = CaptionSplit(predictor.model, predictor.vocabulary, index, config, ranks, predictor.device, options)
        for images in work:
            if images is not None:
                loss.add(images)
            on_progress(work.done, work.stop - work.start)
        captions = work.gather()
        forced = loss.means(ranks)
    name = split if split in splits else f"{index.name}-{index.fingerprint[:8]}"
    if options != options_of(config.evaluate):  # the report tells of captions searched for as the run's own config says
        name += f"-beam{options.beam_size}" if options.temperature is None else f"-drawn-seed{options.seed}"
    results = run / f"captions-{name}-step-{predictor.step}.json"
    if ranks.is_main:
        try:
            write_atomically(results, json.dumps(captions.results(index), ensure_ascii=False).encode())
        except OSError as error:  # someone else's run: its scores can be had all the same
            _log.warning("%s cannot be written: %s", results, error.strerror)
    about = {
        "split": str(path), "step": predictor.step, "search": _described(options),
        "results": str(results), "unreadable": captions.unreadable,
        "teacher_forcing": forced,
        "provenance": _provenance(run, index, predictor) if ranks.is_main else None,
    }  # fmt: skip
    return RunCaptions(captions.match_references(index), about)


def _provenance(run: Path, index: Index, predictor: Predictor) -> dict[str, Any]:
    config = predictor.config
    try:
        train = open_split(saved_split(config.data.train) or "", config)
    except InputError:  # the training data may be elsewhere by now
        train = None
    return provenance.of_run(run, train, index, config.data.tokenizer)


def _described(options: SearchOptions) -> str:
    """For people: how captions were looked for."""
    if options.temperature is None:
        return f"beam {options.beam_size}" if options.beam_size > 1 else "greedy search"
    limits = [f"top-k {options.top_k}"] * (options.top_k is not None) + [f"top-p {options.top_p}"] * (options.top_p < 1)
    return ", ".join([f"drawn at temperature {options.temperature:g}", *limits, f"seed {options.seed}"])
