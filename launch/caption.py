"""Caption image files, or all images of folders, with a trained run."""

import argparse
import json
import sys
from pathlib import Path

from PIL import Image

from captioning.predict import Predictor, opened
from captioning.progress import bar
from captioning.report import caption_sheet
from launch.command import BAD_INPUT, output_file, run
from shards.errors import InputError
from shards.index import write_atomically

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
_BATCH = 32
_MOST_IN_PICTURE = 24


def main() -> int:
    arguments = _arguments()
    files = [file for path in arguments.images for file in _images_at(path)]
    predictor = Predictor.from_checkpoint(arguments.run, arguments.checkpoint)
    captioned: list[dict[str, str]] = []
    unreadable = []
    with bar("captioning") as on_progress:
        for start in range(0, len(files), _BATCH):
            images: list[tuple[Path, Image.Image]] = []
            for file in files[start : start + _BATCH]:
                try:
                    images.append((file, opened(file)))
                except InputError as error:
                    unreadable.append(str(error))
            captions = predictor.caption([image for _, image in images])
            for (file, _), caption in zip(images, captions, strict=True):
                captioned.append({"image": str(file), "caption": caption})
                print(f"{file}: {caption}")
            on_progress(start + len(images), len(files))
    if arguments.json:
        write_atomically(arguments.json, json.dumps(captioned, indent=1, ensure_ascii=False).encode())
    if arguments.picture and captioned:
        shown = captioned[:_MOST_IN_PICTURE]
        pictures = [opened(entry["image"]) for entry in shown]
        title = f"{arguments.run}, step {predictor.step}"
        caption_sheet(pictures, [entry["caption"] for entry in shown], [None] * len(shown), arguments.picture, title)
    for message in unreadable:
        print(f"skipped: {message}", file=sys.stderr)
    return BAD_INPUT if unreadable else 0


def _images_at(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES)
    if not files:
        raise InputError(f"{path} holds no images ({', '.join(sorted(_SUFFIXES))}).")
    return files


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m launch.caption", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE|DIR")
    parser.add_argument("--checkpoint", default="best", metavar="best|latest|step-N", help="which checkpoint (best)")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write image and caption there")
    parser.add_argument(
        "--picture", type=output_file, metavar="PNG", help=f"draw the first {_MOST_IN_PICTURE} with captions"
    )
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
