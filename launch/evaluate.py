"""Caption every image of a split and score the captions. Under `accelerate launch` the processes share the work."""

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from captioning.predict import Predictor
from captioning.progress import bar
from captioning.ranks import join
from captioning.scoring.evaluate import caption_split, score_captions
from captioning.scoring.ptb import TOKENIZER
from captioning.training.setup import loader_workers
from launch.command import output_file, run
from shards import index as shard_index
from shards.errors import InputError
from shards.index import write_atomically


def main() -> None:
    arguments = _arguments()
    predictor = Predictor.from_checkpoint(arguments.run, arguments.checkpoint, device="cpu")
    config = predictor.config
    accelerator, ranks = join(config.precision)
    splits = {"train": config.data.train, "val": config.data.val}
    path = splits.get(arguments.split, arguments.split)
    if not path:
        raise InputError(f"The run has no data.{arguments.split}. Give --split the path of a split's NAME.json.")
    index = shard_index.load(path)
    index.check_files()
    model = predictor.model.to(accelerator.device)
    with bar("captioning", shown=ranks.is_main) as on_progress, accelerator.autocast():
        captions = caption_split(
            model,
            predictor.vocabulary,
            index,
            config,
            ranks,
            accelerator.device,
            loader_workers(config),
            on_progress,
        )
    if ranks.is_main:
        scores = score_captions(captions, index)
        split = arguments.split if arguments.split in splits else f"{index.name}-{index.fingerprint[:8]}"
        name = f"captions-{split}-step-{predictor.step}.json"
        write_atomically(arguments.run / name, json.dumps(captions.results(index), ensure_ascii=False).encode())
        summary = {"split": str(path), "step": predictor.step, "images": len(captions.of_sample), "scores": scores}
        if arguments.json:
            details = {**summary, "holes": captions.holes, "tokenizer": TOKENIZER}
            write_atomically(arguments.json, json.dumps(details, indent=1).encode())
        _show(summary, captions.holes, arguments.run / name)
    ranks.barrier()
    accelerator.end_training()


def _show(summary: dict, holes: list[str], results: Path) -> None:
    title = f"{summary['images']:,} images of {summary['split']}, checkpoint step {summary['step']}, greedy search"
    table = Table("metric", "score", title=title, title_justify="left")
    for name, value in summary["scores"].items():
        table.add_row(name, f"{value:.4f}")
    console = Console(highlight=False)
    console.print(table)
    console.print(f"words by {TOKENIZER}; captions in {results}", soft_wrap=True)
    for hole in holes:
        console.print(f"not scored: {hole}", soft_wrap=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m launch.evaluate", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--split", default="val", help="val, train, or the path of any split's NAME.json (val)")
    parser.add_argument("--checkpoint", default="best", metavar="best|latest|step-N", help="which checkpoint (best)")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write the scores there")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
