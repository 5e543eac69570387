"""Where captions go: the terminal, pages, pictures."""

import argparse
import os
import signal
import sys
from pathlib import Path

from captioning.inference.predictor import Caption, Predictor, opened
from captioning.report.gallery import Gallery
from captioning.report.pictures import annotated, caption_sheet
from launch.cli.command import BAD_INPUT
from launch.cli.images import Named
from shards.errors import InputError, printable


class Outlet:
    """Everything a caption goes into: the terminal, and whatever was asked for."""

    def __init__(self, arguments: argparse.Namespace, predictor: Predictor, most_in_picture: int):
        self.most_in_picture = most_in_picture
        self.arguments, self.preprocessing = arguments, predictor.preprocessing
        self.title = f"{arguments.run}, step {predictor.step}"
        self.gallery = Gallery(arguments.html, "Captions", self.title) if arguments.html else None
        self.shown: list[tuple[Named, str]] = []
        self.failed: list[str] = []
        self.captioned = 0
        if arguments.annotate:
            arguments.annotate.mkdir(parents=True, exist_ok=True)

    def tell(self, named: Named, said: Caption | InputError) -> dict[str, object]:
        name, source = named
        if isinstance(said, InputError):
            why = str(said) if name in str(said) else f"{name}: {said}"
            self.failed.append(why)
            if self.gallery:
                self.gallery.fail(why)
            return {"image": name, "error": why}
        self.captioned += 1
        for one in (said, *said.others) if self.arguments.sample > 1 else (said,):
            _say(f"{name}: {one}")
        if self.gallery:
            self.gallery.add(name, opened(source), said, self.preprocessing)
        if folder := self.arguments.annotate:
            file = f"{self.captioned:05d}-{Path(name).stem[:60]}.jpg"  # the name may be as long as names can be
            annotated(opened(source), said.text).save(folder / file, quality=90)
        if self.arguments.picture and len(self.shown) < self.most_in_picture:
            self.shown.append((named, said.text))
        entry = {"image": name, "caption": said.text, "log_probability": round(said.log_probability, 4)}
        if self.arguments.all_beams or self.arguments.sample > 1:
            others = [{"caption": o.text, "log_probability": round(o.log_probability, 4)} for o in said.others]
            return {**entry, "others": others}
        return entry

    def close(self) -> int:
        if self.gallery:
            print(f"page: {self.gallery.close()}", file=sys.stderr)
        if self.shown:
            pictures = [opened(source) for (_, source), _ in self.shown]
            captions = [caption for _, caption in self.shown]
            caption_sheet(pictures, captions, [None] * len(captions), self.arguments.picture, self.title)
        for message in self.failed:
            print(f"skipped: {printable(message)}", file=sys.stderr)
        if self.failed:
            total = self.captioned + len(self.failed)
            print(f"{len(self.failed):,} of {total:,} could not be captioned", file=sys.stderr)
        return 0 if self.captioned else BAD_INPUT


def _say(line: str) -> None:
    try:
        print(printable(line), flush=True)
    except BrokenPipeError:  # whoever read it, `head` say, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
