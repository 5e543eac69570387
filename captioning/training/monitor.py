"""What a run shows of itself: TensorBoard events, a progress bar in a terminal, plain lines elsewhere. Rank 0 only."""

import json
import logging
import resource
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import WandBTracker
from rich.console import Console
from rich.table import Table
from torch.utils.tensorboard.summary import hparams

from captioning.config import Config, flat, to_dict
from captioning.data.collate import CaptionBatch
from captioning.data.stored_features import stored_features
from captioning.distributed.ranks import Ranks, cores_per_rank
from captioning.distributed.stragglers import RankTimes, Stragglers
from captioning.distributed.waits import Waits
from captioning.evaluation import provenance
from captioning.model.captioner import Captioner
from captioning.runs.patient_files import PatientFiles, PatientLog
from captioning.runs.progress import Progress, is_quiet, progress
from captioning.training.event_file import EventWriter
from captioning.training.experiment import Experiment
from shards.dataset import ShardDataset
from shards.errors import printable, reason_of
from shards.files import write_atomically
from shards.images import open_rgb
from shards.index import Index
from shards.order import largest_micro_batch
from shards.reader import UnreadableSample, read_sample

logger = logging.getLogger(__name__)
WATCHED_IMAGES = 8  # of the validation split, spread over it, the same at every validation
HEADLINES = ("CIDEr", "BLEU-4", "ROUGE-L")  # scores shown in the terminal; all are in scores.jsonl and TensorBoard
SLOW = 1.2  # times the median rank's step: a slower rank is named in the terminal
LOG_COLUMNS = 160  # width of a line where there is no terminal to fit
VARIED = ("seed", "precision", "encoder", "decoder", "train", "optim")  # what runs are compared by, in TensorBoard's
OF_SCORES = ("val/loss", "val/CIDEr", "val/BLEU-4")  # table of hyper-parameters, and how they ended


class Clock:
    """Images, captions and seconds since the last reading, and in which of them the device waited: for ``data``, for
    ``peers``, the other ranks, and ``for_gradients`` of theirs."""

    def __init__(self, device: torch.device) -> None:
        self.data, self.peers = Waits(device), Waits(device)
        self.reset()

    def reset(self) -> None:
        self.data.reset()
        self.peers.reset()
        self.started, self.for_gradients = time.perf_counter(), 0.0
        self.images, self.captions, self.steps = 0, 0, 0

    def count(self, micro_batches: list[CaptionBatch]) -> None:
        """A step over these micro-batches is done."""
        self.images += sum(len(batch.keys) for batch in micro_batches)
        self.captions += sum(len(batch.captions) for batch in micro_batches)
        self.steps += 1

    def reading(self, ranks: Ranks) -> dict[str, float]:
        """Rates of the whole job, taking the other ranks to have as many images as this one; this rank's waiting; and
        which rank is slow. Called on all ranks."""
        waited, idle = self.data.seconds(), self.peers.seconds() + self.for_gradients
        seconds, steps = max(1e-9, time.perf_counter() - self.started), max(1, self.steps)
        mine = RankTimes((seconds - idle) / steps, waited / steps)
        return {
            "train/images_per_s": self.images * ranks.world_size / seconds,
            "train/captions_per_s": self.captions * ranks.world_size / seconds,
            "train/data_wait_fraction": waited / seconds,
            "train/step_ms": 1e3 * seconds / steps,
            "train/peak_memory_gb": peak_memory() / 1e9,
            **(_stragglers(Stragglers.of(ranks.all_gather(mine))) if ranks.world_size > 1 else {}),
        }


def _stragglers(stragglers: Stragglers) -> dict[str, float]:
    return {
        "train/slowest_rank": float(stragglers.slowest_rank),
        "train/step_ms_slowest": 1e3 * stragglers.slowest.step,
        "train/step_ms_median": 1e3 * stragglers.median.step,
        "train/data_wait_ms_slowest": 1e3 * stragglers.slowest.data_wait,
        "train/data_wait_ms_median": 1e3 * stragglers.median.data_wait,
    }


def peak_memory() -> int:
    """Most bytes this process held: of the GPU's memory for tensors, or without one of the machine's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Monitor:
    """Writes RUN/tensorboard and RUN/scores.jsonl and talks to the terminal; on other ranks it does nothing."""

    def __init__(self, config: Config, experiment: Experiment, is_main: bool):
        self.is_main, self.total_steps, self.first_step = is_main, experiment.total_steps(config), experiment.state.step
        self.console = Console(stderr=True, quiet=not is_main, highlight=False, markup=False)
        if not is_main:
            return
        if not self.console.is_terminal:
            self.console.width = LOG_COLUMNS
        run = Path(config.run)
        self._scores, self.files = PatientLog(run / "scores.jsonl"), PatientFiles()
        self._provenance = provenance.kept(run)
        # Events that a killed run wrote past its last checkpoint are hidden: the resumed run writes those steps again.
        self._board = EventWriter(str(run / "tensorboard"), purge_step=self.first_step + 1)
        self._write_settings(config)
        self._wandb = wandb_run(config) if config.monitor.trackers == "wandb" else None
        self._watched = _watched_images(experiment.val) if experiment.val else {}
        self._started = time.monotonic()
        self._progress = progress(self.console)
        self._task = self._progress.add_task("training", total=self.total_steps, completed=self.first_step, numbers=())
        self._progress.start()

    def _write_settings(self, config: Config) -> None:
        """Into the run's own events, for TensorBoard's table of runs: ``add_hparams`` would begin a run for each."""
        settings = {
            key: "null" if value is None else value
            for key, value in flat(config).items()
            if key.partition(".")[0] in VARIED
        }
        for summary in hparams(settings, dict.fromkeys(OF_SCORES, 0.0)):
            self._board._get_file_writer().add_summary(summary, self.first_step)

    def say(self, message: str) -> None:
        """A line for people."""
        with suppress(OSError):  # the log it goes to may be on a full disk
            self.console.print(printable(message), soft_wrap=True)

    def table(self, title: str, rows: dict[str, str]) -> None:
        """Name and value, a row each."""
        if is_quiet():
            return
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
        for name, value in rows.items():
            table.add_row(name, printable(value))
        with suppress(OSError):
            self.console.print(table, soft_wrap=True)

    def step(self, step: int, scalars: dict[str, float] | None) -> None:
        """Show that a step is done; ``scalars`` (at logging steps) go to TensorBoard and the terminal."""
        if not self.is_main:
            return
        if scalars is not None:
            self._log(scalars, step)
            numbers = _numbers(scalars)
            self._progress.update(self._task, numbers=numbers)
            if not (self.console.is_terminal or is_quiet()):
                self.say("  ".join((f"step {step}/{self.total_steps}", f"eta {self._time_to_go(step)}", *numbers)))
        self._progress.update(self._task, completed=step)

    def _time_to_go(self, step: int) -> timedelta:
        a_step = (time.monotonic() - self._started) / (step - self.first_step)
        return timedelta(seconds=round(a_step * (self.total_steps - step)))

    def _log(self, scalars: dict[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()
        if self._wandb is not None:
            try:
                self._wandb.log(dict(scalars), step=step)
            except Exception as error:  # whatever it meets, a full disk say: training does not depend on it
                logger.warning(f"wandb could not log step {step}: {reason_of(error)}")

    @contextmanager
    def validating(self) -> Iterator[Progress]:
        """A bar of its own for a validation; yields a function to call with (done, total)."""
        if not self.is_main:
            yield lambda done, total: None
            return
        task = self._progress.add_task("validation", total=None, numbers=())
        try:
            yield lambda done, total: self._progress.update(task, completed=done, total=total)
        finally:
            self._progress.remove_task(task)

    def validated(
        self,
        step: int,
        epoch: float,
        scores: dict[str, float],
        forced: dict[str, float],
        captions: dict[int, str],
        is_best: bool,
    ) -> None:
        """Log the scores of a validation, and the captions of the watched images.

        Args:
            forced: loss and perplexity of the references under teacher forcing, which are no scores.
            captions: by sample number.
            is_best: by ``evaluate.best_metric``, of the run so far.
        """
        if not self.is_main:
            return
        line = {"step": step, "epoch": epoch, **scores, "teacher_forcing": forced, "provenance": self._provenance}
        self._scores.add(f"{json.dumps(line)}\n".encode())
        self._scores.write()
        self._log({f"val/{name}": value for name, value in scores.items()}, step)
        self._log({f"val/{name}": value for name, value in forced.items()}, step)
        self._show_captions(step, captions)
        self.flush()
        if is_quiet():
            return
        values = "  ".join(f"{name} {scores[name]:.3f}" for name in HEADLINES)
        self.say(f"validation at step {step}:  {values}{'  * best' if is_best else ''}")

    def tested(self, step: int, scores: dict[str, float]) -> None:
        """Scores of the test split, with the checkpoint of ``step``."""
        if self.is_main:
            self._log({f"test/{name}": value for name, value in scores.items()}, step)
            self.say(f"test split, step {step}: " + "  ".join(f"{name} {value:.3f}" for name, value in scores.items()))

    def _show_captions(self, step: int, captions: dict[int, str]) -> None:
        from captioning.report.pictures import caption_figure  # matplotlib takes a second to import

        shown = {sample: image for sample, image in self._watched.items() if sample in captions}
        if shown:
            said = [captions[sample] for sample in shown]
            figure = caption_figure(list(shown.values()), said, [None] * len(said), f"Validation at step {step:,}")
            self._board.add_figure("val/captions", figure, step)  # which also closes it

    def flush(self) -> None:
        """Events and scores into their files, for which a checkpoint waits: those of steps before it are not written
        again. It does not wait for a full disk."""
        if self.is_main:
            self._board.flush()
            self._scores.write(synced=True)
            self.files.retry()

    def close(self) -> None:
        if self.is_main:
            with suppress(OSError):
                self._progress.stop()
            self.flush()
            if self._wandb is not None:
                try:
                    self._wandb.finish()
                except Exception as error:
                    logger.warning(f"wandb could not finish: {reason_of(error)}")


def wandb_run(config: Config) -> WandBTracker:
    """Accelerate's tracker of Weights & Biases; RUN/wandb-id keeps a resumed run the same run there."""
    kept = Path(config.run) / "wandb-id"
    if not kept.exists():
        write_atomically(kept, secrets.token_hex(8).encode())
    tracker = WandBTracker(
        "captioning", name=Path(config.run).name, id=kept.read_text(), resume="allow", dir=config.run
    )
    tracker.start()
    tracker.store_init_configuration(to_dict(config))
    return tracker


def _watched_images(val: Index) -> dict[int, Any]:
    """Sample number -> picture of a few readable samples, spread over the split; none of a split of features."""
    if stored_features(val) is not None:
        return {}
    chosen = sorted({number * len(val) // WATCHED_IMAGES for number in range(WATCHED_IMAGES)})
    samples = {number: read_sample(val, number) for number in chosen}
    return {
        number: open_rgb(sample.image_bytes)
        for number, sample in samples.items()
        if not isinstance(sample, UnreadableSample)
    }


def _numbers(scalars: dict[str, float]) -> tuple[str, ...]:
    """For the terminal, what matters most first: a narrow one leaves out the last."""
    lrs = " ".join(
        f"{name.removeprefix('train/lr/')} {value:.2g}"
        for name, value in scalars.items()
        if name.startswith("train/lr/")
    )
    first, *others = _learning(scalars)
    return (
        first,
        f"{scalars['train/images_per_s']:.0f} images/s",
        f"data wait {scalars['train/data_wait_fraction']:.0%}",
        *_slow_rank(scalars),
        f"lr {lrs}",
        *others,
        f"{scalars['train/captions_per_s']:.0f} captions/s",
    )


def _slow_rank(scalars: dict[str, float]) -> tuple[str, ...]:
    """The slowest rank, if it is much slower than the median one; its time for data with it, if that is the cause."""
    if scalars.get("train/step_ms_slowest", 0.0) <= SLOW * scalars.get("train/step_ms_median", 0.0):
        return ()
    slowest, median = scalars["train/step_ms_slowest"], scalars["train/step_ms_median"]
    waits = scalars["train/data_wait_ms_slowest"] - scalars["train/data_wait_ms_median"]
    cause = " for data" if waits > (slowest - median) / 2 else ""
    return (f"rank {scalars['train/slowest_rank']:.0f} takes {slowest / median:.1f}x as long{cause}",)


def _learning(scalars: dict[str, float]) -> tuple[str, ...]:
    """How well it learns, in numbers of its objective."""
    if "train/reward" not in scalars:
        return f"loss {scalars['train/loss']:.3f}", f"perplexity {scalars['train/perplexity']:.2f}"
    return (
        f"reward {scalars['train/reward']:.3f}",
        f"baseline {scalars['train/baseline']:.3f}",
        f"{scalars['train/caption_length']:.1f} words",
        f"distinct {scalars['train/distinct_fraction']:.0%}",
    )


def _precision(config: Config, device: torch.device) -> str:
    tf32 = " with TF32" if device.type == "cuda" and config.train.tf32 else ""
    return f"{config.precision}, float32{tf32}" if config.precision != "no" else f"float32{tf32}"


def _compiled(config: Config, world_size: int, model: Captioner) -> str:
    batch = largest_micro_batch(config.train.global_batch_size, world_size, config.train.micro_batch_size)
    attention = "; attention" if model.attentions else ""
    return (
        f"each stage of the encoder, for {batch} images, to validate {config.evaluate.batch_size}{attention}; "
        "it starts slowly"
    )


def start_up_table(
    config: Config, experiment: Experiment, batches: ShardDataset, model: Captioner, device: torch.device
) -> dict[str, str]:
    """What is about to run, for the terminal: processes, batch arithmetic, data, parameters, steps."""
    trained, frozen = (
        sum(p.numel() for p in model.parameters() if p.requires_grad == wanted) / 1e6 for wanted in (True, False)
    )
    val = f"{len(experiment.val):,} to validate on" if experiment.val else "none to validate on"
    rows = {
        "processes": f"{batches.world_size} on {device.type}, precision {_precision(config, device)}, "
        f"{torch.get_num_threads()} thread(s) and {experiment.workers} loader worker(s) each"
        f"{_why_so_many(config, experiment.workers)}",
        "global batch": f"{config.train.global_batch_size} images = {batches.world_size} process(es) x "
        f"{batches.micro_batches(0)} micro-batch(es) of at most {config.train.micro_batch_size}, "
        f"up to {config.data.captions_per_image} captions an image",
        "data": f"{len(experiment.train):,} training images in {len(experiment.train.shards)} shard(s), {val}, "
        f"{len(experiment.vocabulary):,} words",
        "model": f"{config.encoder.name} and {config.decoder.name}, "
        f"{trained:.2f} M parameters trained, {frozen:.2f} M frozen",
        **({"compiled": _compiled(config, batches.world_size, model)} if config.train.compile else {}),
        "steps": f"{experiment.total_steps(config):,}, {experiment.steps_per_epoch(config):,} an epoch, "
        f"{experiment.state.step:,} done",
    }
    return rows | ({"changed": "\n".join(experiment.changed)} if experiment.changed else {})


def _why_so_many(config: Config, workers: int) -> str:
    """Where data.num_workers does not say it, what a number of loader workers comes from."""
    if config.data.num_workers is not None:
        return ""
    short = ", few for want of shared memory" if workers < cores_per_rank() - 1 else ""
    return f", for {cores_per_rank()} core(s) a process{short}"
