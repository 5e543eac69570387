"""Caption image files, all images of folders, or a few of a packed split, with a trained run.

What cannot be read as an image is listed at the end and stops nothing; the exit status is 0 when anything at all was
captioned, and 2 when nothing was.
"""

import argparse
import json
import os
import signal
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from captioning.inference.predictor import Caption, Predictor, opened
from captioning.model.search import options_of
from captioning.report.gallery import Gallery
from captioning.report.pictures import annotated, caption_sheet
from captioning.runs.progress import bar
from launch.cli.command import BAD_INPUT, at_least_one, output_file, output_folder, run
from launch.cli.images import Named, images_at, random_images
from launch.cli.sampling import add_sampling_arguments, sampling
from shards.errors import InputError

_MOST_IN_PICTURE = 24
# A file's name may be bytes of no encoding: they are escaped, in JSON so that the name read back opens the file.
_ESCAPED = "backslashreplace"


def main() -> int:
    arguments = _arguments()
    sys.stdout.reconfigure(errors=_ESCAPED)  # type: ignore[union-attr]
    if arguments.random:
        images = [image for path in arguments.images for image in random_images(path, arguments.random, arguments.seed)]
    else:
        images = [image for path in arguments.images for image in images_at(path)]
    predictor = Predictor.from_checkpoint([arguments.run, *arguments.ensemble], arguments.checkpoint, arguments.device)
    options = options_of(predictor.config.evaluate)
    if arguments.beam:
        options = replace(options, beam_size=arguments.beam)
    options = sampling(options, arguments, arguments.sample)
    outlet = _Outlet(arguments, predictor)
    with ExitStack() as stack, bar("captioning") as on_progress:
        lines = (
            stack.enter_context(arguments.json.open("w", encoding="utf-8", errors=_ESCAPED)) if arguments.json else None
        )
        found = predictor.each((source for _, source in images), arguments.batch, options)
        for number, (image, said) in enumerate(zip(images, found, strict=True), start=1):
            entry = outlet.tell(image, said)
            if lines:
                lines.write(json.dumps(entry, ensure_ascii=False) + "\n")
            on_progress(number, len(images))
    return outlet.close()


class _Outlet:
    """Everything a caption goes into: the terminal, and whatever was asked for."""

    def __init__(self, arguments: argparse.Namespace, predictor: Predictor):
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
        if self.arguments.picture and len(self.shown) < _MOST_IN_PICTURE:
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
            print(f"skipped: {message}", file=sys.stderr)
        if self.failed:
            total = self.captioned + len(self.failed)
            print(f"{len(self.failed):,} of {total:,} could not be captioned", file=sys.stderr)
        return 0 if self.captioned else BAD_INPUT


def _say(line: str) -> None:
    try:
        print(line, flush=True)
    except BrokenPipeError:  # whoever read it, `head` say, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.caption", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "run",
        type=Path,
        metavar="RUN",
        help="run folder, or a folder that launch.export or launch.import_checkpoint wrote",
    )
    add("images", nargs="+", metavar="IMAGE|DIR|GLOB|-", help="files, folders, patterns; - reads names from stdin")
    add("--checkpoint", default="best", metavar="best|latest|step-N", help="which checkpoint (best)")
    add("--ensemble", type=Path, nargs="+", default=[], metavar="RUN", help="further runs that vote on each word")
    add("--beam", type=at_least_one, metavar="N", help="beam size; 1 is greedy (as in validation)")
    add("--sample", type=at_least_one, default=1, metavar="N", help="with --temperature: draw N captions an image (1)")
    add_sampling_arguments(parser)
    add("--batch", type=at_least_one, default=32, metavar="N", help="images captioned at once (32)")
    add("--device", metavar="cpu|cuda", help="where (on a GPU if there is one)")
    add("--random", type=at_least_one, metavar="N", help="IMAGE is a split's NAME.json: caption one image of each of N")
    add("--seed", type=int, default=0, help="of --random and --temperature (0)")
    add("--json", type=output_file, metavar="FILE", help="JSON lines: image, caption, log_probability; or error")
    add("--all-beams", action="store_true", help="the other beams too, in --json")
    add("--html", type=output_folder, metavar="DIR", help="a page with thumbnails, and where the model looked")
    add("--annotate", type=output_folder, metavar="DIR", help="each image as a JPEG with its caption below")
    add("--picture", type=output_file, metavar="PNG", help=f"one picture of the first {_MOST_IN_PICTURE}")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
