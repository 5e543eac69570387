"""The whole system on drawn scenes: pack, train on two processes, be interrupted, resume, evaluate, caption, draw.

It fails where fewer than 80 % of the captions are right, or CIDEr is less than 3 times CIDEr-shuffled. Attention is
drawn only where it points: where 70 % of the shape words have its peak in the shape's box.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from captioning.runs import checkpoint
from captioning.runs.run_folder import RunFolder
from launch.cli.command import PREEMPTED, command_parser, run
from shards import index as shard_index
from shards.sources import scenes

if TYPE_CHECKING:
    from captioning.inference.pointing import Box, Pointing

FOLDER = Path("runs/demo")
RUN, SHARDS, SCORES = FOLDER / "run", FOLDER / "shards", FOLDER / "scores.json"
TRAIN = "captioning train demo --cpu --processes 2"
INTERRUPT_AT = 500  # optimizer steps; about half
RIGHT_SHARE, TIMES_WRONG_IMAGES = 0.8, 3.0  # what the demo promises: it fails below


def main() -> int:
    parser().parse_args()
    started = time.monotonic()
    shutil.rmtree(FOLDER, ignore_errors=True)
    _do("Pack drawn scenes", f"captioning pack scenes --count 6000 --out {SHARDS}")
    _train_and_interrupt()
    _do("The same command again: it continues", TRAIN)
    _do("Evaluate on scenes it has not seen", f"captioning evaluate {RUN} --json {SCORES}")
    _draw_unseen(count=12)
    _do("Caption image files", f"captioning caption {RUN} {FOLDER}/unseen")
    right, total = _right_captions()
    pointed = _pointing()
    pointed.save(RUN)
    _do("Report on one page", f"captioning report {RUN}")
    looking, blind = (json.loads(SCORES.read_text())["scores"][f"CIDEr{what}"] for what in ("", "-shuffled"))
    print(f"\nright colour and shape of everything in it: {right} of {total} unseen scenes ({right / total:.1%})")
    print(f"CIDEr {looking:.2f}; the same captions beside the wrong images {blind:.2f} ({looking / blind:.1f} times)")
    print(f"{pointed}; {'drawn' if pointed.is_believable else 'too few: not drawn'}")
    print(f"all about the run: {RUN}/report.html    pictures with captions: {FOLDER}/captions.png")
    print(f"all of it in {(time.monotonic() - started) / 60:.1f} minutes")
    return 0 if right >= RIGHT_SHARE * total and looking >= TIMES_WRONG_IMAGES * blind else 1


def _start(what: str, command: str) -> subprocess.Popen:
    """Say what is run, as a person would type it, and run it with this very Python."""
    print(f"\n== {what}\n$ {command}", flush=True)
    return subprocess.Popen([sys.executable, "-m", "launch", *command.split()[1:]])


def _do(what: str, command: str) -> None:
    if code := _start(what, command).wait():
        sys.exit(f"demo: that command failed with status {code}")


def _train_and_interrupt() -> None:
    """Train, and once checkpoint INTERRUPT_AT is there ask for a stop as a cluster does, with SIGTERM."""
    training = _start(f"Train on two processes, to be interrupted at step {INTERRUPT_AT}", TRAIN)
    while training.poll() is None and INTERRUPT_AT not in checkpoint.steps(RUN):
        time.sleep(0.2)
    training.send_signal(signal.SIGTERM)
    code = training.wait()
    print(f"exit status {code}; {RUN}/status says: {', '.join(RunFolder(RUN).status())}", flush=True)
    if code != PREEMPTED:
        sys.exit("demo: training was not interrupted as it was meant to be")


def _draw_unseen(count: int) -> None:
    """Scenes that were neither trained nor evaluated on, as image files and, captioned, on one sheet."""
    from captioning.inference.predictor import Predictor
    from captioning.report.pictures import caption_sheet

    drawn = [scenes.scene(0, "unseen", number) for number in range(count)]
    pictures = [scenes.draw(scene) for scene in drawn]
    (FOLDER / "unseen").mkdir()
    for number, picture in enumerate(pictures):
        picture.save(FOLDER / "unseen" / f"{number:02d}.png")
    captions = [caption.text for caption in Predictor.from_checkpoint(RUN).caption([*pictures])]
    right = [scenes.is_right(caption, scene) for caption, scene in zip(captions, drawn, strict=True)]
    caption_sheet(pictures, captions, right, FOLDER / "captions.png", "Scenes the model has not seen, and what it says")


def _pointing() -> "Pointing":
    """How often attention peaks in a shape's box when the validation scenes' captions name the shape; a shape that is
    there twice has no box of its own."""
    from captioning.inference.pointing import pointing
    from captioning.inference.predictor import Predictor

    predictor = Predictor.from_checkpoint(RUN)
    side = predictor.config.data.resize_size / predictor.config.data.image_size  # the model saw a square out of this
    drawn = [scenes.scene(0, "val", number) for number in range(len(shard_index.load(SHARDS / "val.json")))]
    boxes: list[dict[str, Box]] = []
    for scene in drawn:
        shapes = Counter(thing.shape for thing in scene.things)
        once = [thing for thing in scene.things if shapes[thing.shape] == 1]
        boxes.append({thing.shape: _on_the_square(scenes.box(thing, scene), side) for thing in once})
    return pointing(predictor.caption([scenes.draw(scene) for scene in drawn]), boxes)


def _on_the_square(box: "Box", side: float) -> "Box":
    """A box in the picture -> in its central square, which is 1 / ``side`` of the picture each way."""
    left, top, right, bottom = (0.5 + side * (at - 0.5) for at in box)
    return left, top, right, bottom


def _right_captions() -> tuple[int, int]:
    """How many validation captions name exactly the coloured shapes in their scene, and how many there are."""
    val = shard_index.load(SHARDS / "val.json")
    results = json.loads((RUN / f"captions-val-step-{json.loads(SCORES.read_text())['step']}.json").read_text())
    truth = {text.image_id: scenes.things_named(text.captions[0]) for text in val.texts()}
    return sum(scenes.things_named(r["caption"]) == truth[r["image_id"]] for r in results), len(results)


def parser() -> argparse.ArgumentParser:
    return command_parser("demo", __doc__)


if __name__ == "__main__":
    run(main)
