"""What a run shows of itself: TensorBoard events, a progress bar in a terminal, plain lines elsewhere. Rank 0 only."""

import json
import math
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from captioning.config import Config
from captioning.data.batches import CaptionBatch, TrainBatches
from captioning.run_folder import cut_after
from captioning.training.setup import Experiment


class Clock:
    """Images, captions and seconds since the last reading; ``waiting`` seconds of them were spent on data."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.started, self.waiting, self.images, self.captions, self.steps = time.perf_counter(), 0.0, 0, 0, 0

    def count(self, micro_batches: list[CaptionBatch]) -> None:
        """A step over these micro-batches is done."""
        self.images += sum(len(batch.keys) for batch in micro_batches)
        self.captions += sum(len(batch.lengths) for batch in micro_batches)
        self.steps += 1

    def reading(self, world_size: int) -> dict[str, float]:
        """Rates of the whole job, taking the other ranks to be as fast as this one, and this rank's waiting."""
        seconds = max(1e-9, time.perf_counter() - self.started)
        return {
            "speed/images_per_s": self.images * world_size / seconds,
            "speed/captions_per_s": self.captions * world_size / seconds,
            "speed/data_wait_share": self.waiting / seconds,
            "speed/step_ms": 1e3 * seconds / max(1, self.steps),
        }


class Monitor:
    """Writes RUN/tensorboard and RUN/scores.jsonl and talks to the terminal; on other ranks it does nothing."""

    def __init__(self, run: Path, first_step: int, total_steps: int, is_main: bool):
        self.is_main, self.total_steps = is_main, total_steps
        self.console = Console(stderr=True, quiet=not is_main, highlight=False)
        if not is_main:
            return
        self._scores = run / "scores.jsonl"
        if self._scores.exists():
            cut_after(self._scores, lambda line: json.loads(line)["step"] <= first_step)
        # Events that a killed run wrote past its last checkpoint are hidden: the resumed run writes those steps again.
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)
        self._progress = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(),
            console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=total_steps, completed=first_step, numbers="")
        self._progress.start()

    def say(self, message: str) -> None:
        """A line for people."""
        self.console.print(message, soft_wrap=True)

    def table(self, title: str, rows: dict[str, str]) -> None:
        """Name and value, a row each."""
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
        for name, value in rows.items():
            table.add_row(name, value)
        self.console.print(table, soft_wrap=True)

    def step(self, step: int, scalars: dict[str, float] | None) -> None:
        """Show that a step is done; ``scalars`` (at logging steps) go to TensorBoard and the terminal."""
        if not self.is_main:
            return
        if scalars is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)
            numbers = (
                f"loss {scalars['train/loss']:.3f}  perplexity {scalars['train/perplexity']:.2f}  "
                f"{scalars['speed/images_per_s']:.0f} images/s  data wait {scalars['speed/data_wait_share']:.0%}"
            )
            self._progress.update(self._task, numbers=numbers)
            if not self.console.is_terminal:
                self.say(f"step {step}/{self.total_steps}  {numbers}")
        self._progress.update(self._task, completed=step)

    def scores(self, step: int, epoch: float, scores: dict[str, float], examples: list[dict[str, object]]) -> None:
        """Validation scores and a few captions of fixed images."""
        if not self.is_main:
            return
        with self._scores.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "epoch": epoch, **scores}) + "\n")
        for name, value in scores.items():
            self._board.add_scalar(f"val/{name}", value, step)
        self._board.add_text("val/captions", "\n\n".join(f"`{e['image_id']}` {e['caption']}" for e in examples), step)
        self._board.flush()
        self.say(f"validation at step {step}: " + "  ".join(f"{name} {value:.3f}" for name, value in scores.items()))

    def close(self) -> None:
        if self.is_main:
            self._progress.stop()
            self._board.close()


def start_up_table(
    config: Config, found: Experiment, batches: TrainBatches, model: nn.Module, device: torch.device
) -> dict[str, str]:
    """What is about to run, for the terminal: processes, batch arithmetic, data, parameters, steps."""
    trained, frozen = (
        sum(p.numel() for p in model.parameters() if p.requires_grad == wanted) / 1e6 for wanted in (True, False)
    )
    rows = {
        "processes": f"{batches.world_size} on {device.type}, precision {config.precision}, "
        f"{torch.get_num_threads()} thread(s) and {found.workers} loader worker(s) each",
        "global batch": f"{config.train.global_batch_size} images = {batches.world_size} process(es) x "
        f"{batches.micro_batches(0)} micro-batch(es) of at most {config.train.micro_batch_size}",
        "data": f"{len(found.train):,} training images, {len(found.vocabulary):,} words",
        "model": f"{config.encoder.name} and {config.decoder.kind}, "
        f"{trained:.2f} M parameters trained, {frozen:.2f} M frozen",
        "steps": f"{found.total_steps(config):,}, of which {found.state.step:,} are done",
    }
    return rows | ({"changed": "\n".join(found.changed)} if found.changed else {})


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))
