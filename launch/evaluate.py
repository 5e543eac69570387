"""Score captions: a trained run's, those of anyone's results file, or two of these against each other.

A run captions every image of a split first; under `accelerate launch` the processes share that work.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from captioning.runs.progress import bar, is_quiet
from launch.cli.command import at_least_one, command_parser, output_file, run
from launch.cli.sampling import add_sampling_arguments, sampling
from shards.errors import InputError
from shards.files import write_atomically

if TYPE_CHECKING:
    import torch

    from captioning.distributed.ranks import Ranks
    from captioning.inference.evaluate_run import RunCaptions


def main() -> None:
    arguments = parser().parse_args()
    from captioning.distributed.ranks import init_distributed
    from captioning.evaluation.results import in_common
    from captioning.evaluation.scores import compare, evaluate
    from launch.cli.score_tables import show_differences, show_left_out, show_scores, show_teacher_forcing

    accelerator, ranks = init_distributed("no")
    sources = arguments.compare or [arguments.results or arguments.run]
    of_each = [_captions(source, arguments, accelerator.device, ranks) for source in sources]
    accelerator.end_training()
    if not ranks.is_main:
        return  # the others need not wait while one scores
    with Console(stderr=True, quiet=is_quiet()).status("scoring"):
        if arguments.compare:
            of_a, of_b, differences = compare(*in_common(*(one.captions for one in of_each)), arguments.java_seconds)
            document: dict[str, Any] = {
                "a": of_each[0].about, "b": of_each[1].about, "images": len(of_a.captioned),
                "tokenizer": of_a.captioned.tokenizer,
                "skipped": of_a.skipped | of_b.skipped, "differences": [asdict(one) for one in differences],
            }  # fmt: skip
        else:
            evaluation = evaluate(of_each[0].captions, arguments.java_seconds)
            document = {**of_each[0].about, **evaluation.document()}
    if arguments.json:
        write_atomically(arguments.json, json.dumps(document, indent=1).encode())
    if arguments.compare:
        show_differences((str(sources[0]), str(sources[1])), of_a.captioned, differences)
        show_left_out(of_a)
    else:
        show_scores(_title(document), evaluation)
        if "teacher_forcing" in document:
            show_teacher_forcing(document["teacher_forcing"])


def _captions(source: Path, arguments: argparse.Namespace, device: "torch.device", ranks: "Ranks") -> "RunCaptions":
    """The captions of a run folder or a results file."""
    from captioning.evaluation.results import match_references, read_references, read_results
    from captioning.inference.evaluate_run import RunCaptions, caption_run
    from captioning.inference.predictor import Predictor
    from captioning.model.search import options_of

    if source == arguments.run or (arguments.compare and source.is_dir()):
        predictor = Predictor.from_checkpoint(source, arguments.checkpoint, device=str(device))
        options = options_of(predictor.config.evaluate)
        if arguments.beam_size:
            options = replace(options, beam_size=arguments.beam_size)
        options = sampling(options, arguments)
        with bar("captioning", shown=ranks.is_main) as on_progress:
            return caption_run(predictor, source, arguments.split, ranks, options, on_progress)
    if not arguments.captions:
        raise InputError(f"{source} needs --captions REFERENCES.json: COCO captions, or a split's NAME.json.")
    captions = match_references(read_results(source), read_references(arguments.captions), source)
    return RunCaptions(captions, {"results": str(source), "references": str(arguments.captions)})


def _title(document: dict) -> str:
    if "step" not in document:
        return f"{document['images']:,} images, captions of {document['results']}"
    images, step = f"{document['images']:,} images of {document['split']}", f"checkpoint step {document['step']}"
    return f"{images}, {step}, {document['search']}"


def parser() -> argparse.ArgumentParser:
    parser = command_parser("evaluate", __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("run", type=Path, nargs="?", metavar="RUN", help="run folder")
    what.add_argument("--results", type=Path, metavar="FILE", help="captions in COCO's results format")
    what.add_argument(
        "--compare", type=Path, nargs=2, metavar=("A", "B"), help="two run folders or results files: a paired test"
    )
    parser.add_argument("--captions", type=Path, metavar="FILE", help="references of results: COCO captions, NAME.json")
    parser.add_argument("--split", default="val", help="val, test, train, or the path of any split's NAME.json (val)")
    parser.add_argument("--beam-size", type=at_least_one, metavar="N", help="beam size (the run's evaluate.beam_size)")
    add_sampling_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="of --temperature (0)")
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
