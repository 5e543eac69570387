"""The test split, which a run looks at once: when it is finished, with the checkpoint that validation chose."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from captioning.config import Config
from captioning.distributed.ranks import Ranks
from captioning.evaluation.scores import evaluate
from captioning.inference.evaluate_run import caption_run
from captioning.inference.predictor import Predictor
from captioning.model.search import options_of
from shards.files import write_atomically

FILE = "scores-test.json"


def score_test_split(
    config: Config, ranks: Ranks, device: torch.device, on_round: Callable[[], None]
) -> dict[str, Any] | None:
    """Caption ``data.test`` with the best checkpoint and all ranks, and write RUN/scores-test.json, as launch.evaluate
    has it with ``--json``: scores, their intervals, every image's own. None where there is no test split, or the file
    is of that checkpoint already. ``on_round`` is called between batches, equally often on every rank.

    Raises:
        InputError: when the checkpoint does not verify, or nothing of the split can be read.
    """
    run = Path(config.run)
    if config.data.test is None:
        return None
    predictor = Predictor.from_checkpoint(run, "best", str(device))
    if ranks.broadcast(_scored_step(run / FILE) == predictor.step):
        return None
    options = options_of(predictor.config.evaluate)
    results = caption_run(predictor, run, "test", ranks, options, lambda done, total: on_round())

    def scored(_: object) -> dict[str, Any]:
        document = {**results.about, **evaluate(results.captions).document()}
        write_atomically(run / FILE, json.dumps(document, indent=1).encode())
        return document

    return ranks.run_on_main(scored, lambda: False)


def _scored_step(path: Path) -> int | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
