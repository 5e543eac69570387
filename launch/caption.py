"""Caption image files, all images of folders, or a few of a packed split, with a trained run.

What cannot be read as an image is listed at the end and stops nothing; the exit status is 0 when anything at all was
captioned, and 2 when nothing was.
"""

import argparse
import json
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from captioning.runs.progress import bar
from launch.cli.command import at_least_one, command_parser, output_file, output_folder, run
from launch.cli.images import images_at, random_images
from launch.cli.sampling import add_sampling_arguments, sampling

MOST_IN_PICTURE = 24
# A file's name may be bytes of no encoding: they are escaped, in JSON so that the name read back opens the file.
_ESCAPED = "backslashreplace"


def main() -> int:
    arguments = parser().parse_args()
    sys.stdout.reconfigure(errors=_ESCAPED)  # type: ignore[union-attr]
    if arguments.random:
        images = [image for path in arguments.images for image in random_images(path, arguments.random, arguments.seed)]
    else:
        images = [image for path in arguments.images for image in images_at(path)]
    from captioning.distributed.arithmetic import allow_tf32
    from captioning.inference.predictor import Predictor
    from captioning.model.search import options_of
    from launch.cli.captions import Outlet

    predictor = Predictor.from_checkpoint([arguments.run, *arguments.ensemble], arguments.checkpoint, arguments.device)
    options = options_of(predictor.config.evaluate)
    if arguments.beam_size:
        options = replace(options, beam_size=arguments.beam_size)
    options = sampling(options, arguments, arguments.sample)
    allow_tf32(predictor.config.train.tf32)
    outlet = Outlet(arguments, predictor, MOST_IN_PICTURE)
    with ExitStack() as stack, bar("captioning") as on_progress:
        lines = (
            stack.enter_context(arguments.json.open("w", encoding="utf-8", errors=_ESCAPED)) if arguments.json else None
        )
        captions = predictor.each((source for _, source in images), arguments.batch, options)
        for number, (image, said) in enumerate(zip(images, captions, strict=True), start=1):
            entry = outlet.tell(image, said)
            if lines:
                lines.write(json.dumps(entry, ensure_ascii=False) + "\n")
            on_progress(number, len(images))
    return outlet.close()


def parser() -> argparse.ArgumentParser:
    parser = command_parser("caption", __doc__)
    add = parser.add_argument
    add(
        "run",
        type=Path,
        metavar="RUN",
        help="run folder, or a folder that `export` or `import_checkpoint` wrote",
    )
    add("images", nargs="+", metavar="IMAGE|DIR|GLOB|-", help="files, folders, patterns; - reads names from stdin")
    add("--checkpoint", default="best", metavar="best|latest|step-N", help="which checkpoint (best)")
    add("--ensemble", type=Path, nargs="+", default=[], metavar="RUN", help="further runs that vote on each word")
    add("--beam-size", type=at_least_one, metavar="N", help="beam size; 1 is greedy (as in validation)")
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
    add("--picture", type=output_file, metavar="PNG", help=f"one picture of the first {MOST_IN_PICTURE}")
    return parser


if __name__ == "__main__":
    run(main)
