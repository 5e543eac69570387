"""The embedded dataset of drawn scenes, as `pack scenes` makes it."""

import argparse
from pathlib import Path

from shards.errors import InputError
from shards.sources import rich_scenes, scenes
from shards.sources.coco import coco
from shards.sources.records import Source


class Scenes:
    """``pack scenes``."""

    names = ("scenes",)
    help = "drawn scenes with exact captions; needs no download"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--count", type=int, default=4000, help="training scenes; a tenth of it is drawn as val (4000)")
        add(
            "--rich",
            action="store_true",
            help="wide and tall scenes that count to four, compare sizes and name corners",
        )
        add("--seed", type=int, default=0, help="another seed draws other scenes (0)")

    def read(self, arguments: argparse.Namespace, scratch: Path) -> dict[str, Source]:
        if arguments.count < 1:
            raise InputError(f"--count {arguments.count}: at least one scene is wanted.")
        counts = {"train": arguments.count, "val": max(1, arguments.count // 10)}
        kind = (rich_scenes.scene, rich_scenes.captions) if arguments.rich else (scenes.scene, scenes.captions)
        drawn = {split: scenes.write(scratch, split, count, arguments.seed, *kind) for split, count in counts.items()}
        return {split: coco(*files) for split, files in drawn.items()}
