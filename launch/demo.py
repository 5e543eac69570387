"""The whole system on drawn scenes: pack, train on two processes, be interrupted, resume, evaluate, caption, draw."""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from captioning import checkpoint
from captioning.predict import Predictor
from captioning.report import caption_sheet
from launch.command import run
from shards import index as shard_index
from shards import scenes

FOLDER = Path("runs/demo")
RUN = FOLDER / "run"
CONFIG = "configs/demo.yaml"
TRAIN = ["accelerate", "launch", "--config_file", "launch/accelerate/cpu2.yaml", "launch/train.py", CONFIG]
INTERRUPT_AT = 400  # optimizer steps; about half
RIGHT_SHARE, TIMES_WRONG_IMAGES = 0.8, 3.0  # what the demo promises; it fails below


def main() -> int:
    argparse.ArgumentParser(prog="python -m launch.demo", description=__doc__).parse_args()
    started = time.monotonic()
    shutil.rmtree(FOLDER, ignore_errors=True)
    _do("Pack drawn scenes", *_python("launch.pack", "scenes", "--count", "4000", "--out", str(FOLDER / "shards")))
    _train_and_interrupt()
    _do("The same command again: it continues", *_train())
    scores_file = FOLDER / "scores.json"
    _do("Evaluate on unseen scenes", *_python("launch.evaluate", str(RUN), "--json", str(scores_file)))
    unseen = _draw_unseen(12)
    files = [str(path) for path in unseen[:5]]
    _do("Caption image files", *_python("launch.caption", str(RUN), *files))
    picture = _picture(unseen)
    scores = json.loads(scores_file.read_text())["scores"]
    right, total = _right_captions()
    looked, blind = scores["CIDEr-D"], scores["CIDEr-D, wrong images"]
    print(f"\nright colour and shape of everything: {right} of {total} unseen scenes ({right / total:.1%})")
    print(f"CIDEr-D {looked:.3f}, and {blind:.3f} for the same captions beside the wrong images")
    print(f"pictures with their captions: {picture}   curves: tensorboard --logdir {RUN}/tensorboard")
    print(f"all of it in {(time.monotonic() - started) / 60:.1f} minutes")
    return 0 if right >= RIGHT_SHARE * total and looked >= TIMES_WRONG_IMAGES * blind else 1


def _python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def _train() -> list[str]:
    return [str(Path(sys.executable).with_name(TRAIN[0])), *TRAIN[1:]]


def _do(what: str, *command: str) -> None:
    _say(what, command)
    subprocess.run(command, check=True)


def _say(what: str, command: tuple[str, ...] | list[str]) -> None:
    shown = " ".join(["python" if part == sys.executable else part.rsplit("/bin/", 1)[-1] for part in command])
    print(f"\n== {what}\n$ {shown}", flush=True)


def _train_and_interrupt() -> None:
    """Start training; once checkpoint INTERRUPT_AT is there, ask it to stop as a cluster would: with SIGTERM."""
    _say(f"Train on two processes, and interrupt at step {INTERRUPT_AT}", _train())
    process = subprocess.Popen(_train(), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "Traceback" in line:  # the launcher's own, about the signal it was sent
            break
        print(line, end="", file=sys.stderr, flush=True)
        if process.poll() is None and INTERRUPT_AT in checkpoint.steps(RUN):
            process.send_signal(signal.SIGTERM)
    process.stderr.read()
    process.wait()
    print(f"interrupted; {RUN}/status says: {', '.join((RUN / 'status').read_text().splitlines())}", flush=True)


def _draw_unseen(count: int) -> list[Path]:
    """New scenes, of a split that was neither trained nor evaluated on, as image files."""
    folder = FOLDER / "unseen"
    images, _ = scenes.write(folder, "unseen", count, seed=0)
    return sorted(images.iterdir())


def _picture(files: list[Path]) -> Path:
    drawn = [scenes.scene(0, "unseen", number) for number in range(len(files))]
    captions = Predictor.from_checkpoint(RUN).caption(files)
    right = [
        scenes.things_named(caption) == scenes.things_named(scenes.captions(scene)[0])
        for caption, scene in zip(captions, drawn, strict=True)
    ]
    path = FOLDER / "captions.png"
    caption_sheet(
        [scenes.draw(scene) for scene in drawn], captions, right, path, "Unseen scenes, captions by the model"
    )
    return path


def _right_captions() -> tuple[int, int]:
    """How many validation captions name exactly the coloured shapes in their scene."""
    index = shard_index.load(FOLDER / "shards" / "val.json")
    step = Predictor.from_checkpoint(RUN).step
    results = json.loads((RUN / f"captions-{index.name}-step-{step}.json").read_text())
    truth = {text.image_id: scenes.things_named(text.captions[0]) for text in index.texts()}
    return sum(scenes.things_named(result["caption"]) == truth[result["image_id"]] for result in results), len(results)


if __name__ == "__main__":
    run(main)
