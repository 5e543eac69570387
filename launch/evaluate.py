"""Score captions: a trained run's, those of anyone's results file, or two of these against each other.

A run captions every image of a split first; under `accelerate launch` the processes share that work.
"""

import argparse
import json
import math
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from rich.console import Console

from captioning.runs.progress import bar, is_quiet
from launch.cli.command import at_least_one, command_parser, output_file, run
from shards.errors import InputError
from shards.files import write_atomically

if TYPE_CHECKING:
    import torch

    from captioning.distributed.ranks import Ranks
    from captioning.evaluation.results import ScoredCaptions

Found: TypeAlias = "tuple[ScoredCaptions, dict]"  # captions beside their references, and where they come from


def main() -> None:
    arguments = parser().parse_args()
    from captioning.distributed.ranks import init_distributed
    from captioning.evaluation.results import in_common
    from captioning.evaluation.scores import compare, evaluate
    from captioning.metrics.ptb import TOKENIZER
    from launch.cli.score_tables import show_differences, show_left_out, show_scores, show_teacher_forcing

    accelerator, ranks = init_distributed("no")
    sources = arguments.compare or [arguments.results or arguments.run]
    captioned, about = zip(*[_captions(s, arguments, accelerator.device, ranks) for s in sources], strict=True)
    accelerator.end_training()
    if not ranks.is_main:
        return  # the others need not wait while one scores
    with Console(stderr=True, quiet=is_quiet()).status("scoring"):
        if arguments.compare:
            of_a, of_b, found = compare(*in_common(*captioned), arguments.java_seconds)
            document = {
                "a": about[0], "b": about[1], "images": len(of_a.captioned), "tokenizer": TOKENIZER,
                "skipped": of_a.skipped | of_b.skipped, "differences": [asdict(difference) for difference in found],
            }  # fmt: skip
        else:
            evaluation = evaluate(captioned[0], arguments.java_seconds)
            document = {**about[0], **evaluation.document()}
    if arguments.json:
        write_atomically(arguments.json, json.dumps(document, indent=1).encode())
    if arguments.compare:
        show_differences((str(sources[0]), str(sources[1])), len(of_a.captioned), found)
        show_left_out(of_a)
    else:
        show_scores(_title(document), evaluation)
        if "teacher_forcing" in document:
            show_teacher_forcing(**document["teacher_forcing"])


def _captions(source: Path, arguments: argparse.Namespace, device: "torch.device", ranks: "Ranks") -> Found:
    """The captions of a run folder or a results file."""
    from captioning.evaluation.results import match_references, read_references, read_results

    if source == arguments.run or (arguments.compare and source.is_dir()):
        return _of_run(source, arguments, device, ranks)
    if not arguments.captions:
        raise InputError(f"{source} needs --captions REFERENCES.json: COCO captions, or a split's NAME.json.")
    captioned = match_references(read_results(source), read_references(arguments.captions), source)
    return captioned, {"results": str(source), "references": str(arguments.captions)}


def _of_run(folder: Path, arguments: argparse.Namespace, device: "torch.device", ranks: "Ranks") -> Found:
    from captioning.data.captions import EncodedCaptions, encode
    from captioning.data.splits import open_split
    from captioning.evaluation.caption_split import caption_split
    from captioning.evaluation.split_loss import SplitLoss
    from captioning.inference.predictor import Predictor
    from captioning.training.preparation import loader_workers

    predictor = Predictor.from_checkpoint(folder, arguments.checkpoint, device=str(device))
    config = predictor.config
    if arguments.beam:
        config = replace(config, evaluate=replace(config.evaluate, beam_size=arguments.beam))
    splits = {"train": config.data.train, "val": config.data.val}
    path = splits.get(arguments.split, arguments.split)
    if not path:
        raise InputError(f"The run has no data.{arguments.split}. Give --split the path of a split's NAME.json.")
    index = open_split(path, config)
    with (
        tempfile.TemporaryDirectory() as encoded,
        bar("captioning", shown=ranks.is_main) as on_progress,
        predictor.autocast(),
    ):
        encode(index, Path(encoded), 1, config.data.max_words, predictor.vocabulary)
        loss = SplitLoss(predictor.model, EncodedCaptions(Path(encoded)))
        captions = caption_split(
            predictor.model, predictor.vocabulary, index, config, ranks, device, loader_workers(config), on_progress,
            also=loss.add,
        )  # fmt: skip
        mean = loss.mean(ranks)
    split = arguments.split if arguments.split in splits else f"{index.name}-{index.fingerprint[:8]}"
    if config != predictor.config:  # the report tells of captions searched for as the run's own config says
        split += f"-beam{config.evaluate.beam_size}"
    results = folder / f"captions-{split}-step-{predictor.step}.json"
    if ranks.is_main:
        try:
            write_atomically(results, json.dumps(captions.results(index), ensure_ascii=False).encode())
        except OSError as error:  # someone else's run: its scores can be had all the same
            print(f"note: {results} cannot be written: {error.strerror}", file=sys.stderr)
    about = {
        "split": str(path), "step": predictor.step, "beam_size": config.evaluate.beam_size,
        "results": str(results), "holes": captions.holes,
        "teacher_forcing": {"loss": mean, "perplexity": math.exp(min(mean, 700.0))},
    }  # fmt: skip
    return captions.match_references(index), about


def _title(document: dict) -> str:
    if "step" not in document:
        return f"{document['images']:,} images, captions of {document['results']}"
    search = f"beam {document['beam_size']}" if document["beam_size"] > 1 else "greedy search"
    return f"{document['images']:,} images of {document['split']}, checkpoint step {document['step']}, {search}"


def parser() -> argparse.ArgumentParser:
    parser = command_parser("evaluate", __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("run", type=Path, nargs="?", metavar="RUN", help="run folder")
    what.add_argument("--results", type=Path, metavar="FILE", help="captions in COCO's results format")
    what.add_argument(
        "--compare", type=Path, nargs=2, metavar=("A", "B"), help="two run folders or results files: a paired test"
    )
    parser.add_argument("--captions", type=Path, metavar="FILE", help="references of results: COCO captions, NAME.json")
    parser.add_argument("--split", default="val", help="val, train, or the path of any split's NAME.json (val)")
    parser.add_argument("--beam", type=at_least_one, metavar="N", help="beam size (the run's evaluate.beam_size)")
    parser.add_argument("--checkpoint", default="best", metavar="best|latest|step-N", help="which checkpoint (best)")
    parser.add_argument(
        "--java-seconds",
        type=float,
        default=600,
        metavar="S",
        help="limit of METEOR and SPICE each; 0: none of them (600)",
    )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write the scores there")
    return parser


if __name__ == "__main__":
    run(main)
