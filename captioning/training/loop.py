"""One run from its config to its end: set up, resume, fit, validate, save, stop.

The global step is the unit of everything: its samples are fixed by the order alone, its loss is divided by the target
tokens of all ranks, and between two steps the ranks agree whether to stop.
"""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

from captioning import checkpoint, run_folder
from captioning.config import Config, save_text
from captioning.data.batches import CaptionBatch, train_steps
from captioning.progress import bar
from captioning.ranks import Ranks, join
from captioning.scoring.evaluate import caption_split, score_captions
from captioning.training.ledger import Ledger, cut_ledgers
from captioning.training.monitor import Clock, Monitor, perplexity, start_up_table
from captioning.training.preemption import StopSignals
from captioning.training.setup import Experiment, prepare
from captioning.training.step import Stepper, Update
from shards.errors import InputError, listed
from shards.index import write_atomically

SELECTION_METRIC = "CIDEr-D"  # what makes a checkpoint the best


def train(config: Config) -> str:
    """Run a config to its end, or to a stop signal; the same call again continues it.

    Returns:
        "finished" or "preempted"; also written to RUN/status.

    Raises:
        InputError: for anything the user can mend: data, settings, a run folder of another experiment.
    """
    stop = StopSignals()
    accelerator, ranks = join(config.precision, config.train.world_size)
    found = _prepared(config, ranks)
    try:
        trainer = Trainer(config, found, accelerator, ranks, stop)
        try:
            status = trainer.fit()
        finally:
            trainer.monitor.close()
    except BaseException as error:
        if ranks.is_main:
            run_folder.set_status(Path(config.run), "failed", f"{type(error).__name__}: {error}")
        raise
    if ranks.is_main:
        run_folder.set_status(trainer.run, status, f"step {trainer.state.step} of {trainer.total_steps}{trainer.why}")
    ranks.barrier()
    accelerator.end_training()
    return status


def _prepared(config: Config, ranks: Ranks) -> Experiment:
    """Rank 0 prepares the run; what it found, or what it objects to, reaches every rank."""

    def attempt(on_progress: Callable[[int, int], None]) -> Experiment | InputError:
        try:
            return prepare(config, ranks.world_size, on_progress)
        except InputError as error:
            return error

    with bar("reading captions", shown=ranks.is_main) as on_progress:
        found = ranks.from_main(attempt(on_progress) if ranks.is_main else None)
    if isinstance(found, InputError):
        raise found
    return found


class Trainer:
    """The state of a run in this process. Attributes hold what lives across steps; ``fit`` is the whole story."""

    def __init__(self, config: Config, found: Experiment, accelerator: Accelerator, ranks: Ranks, stop: StopSignals):
        self.config, self.found, self.accelerator, self.ranks, self.stop = config, found, accelerator, ranks, stop
        self.run, self.why = Path(config.run), ""
        self.batches = found.train_batches(config, ranks)
        self.total_steps = found.total_steps(config)
        self.state = replace(found.state, world_size=ranks.world_size)
        captioner = found.build_model(config, ranks.is_main)
        self.stepper = Stepper(captioner, config, accelerator, ranks, self.total_steps)
        if found.checkpoint is not None:
            self.stepper.load_optimizer_state(found.checkpoint.optimizer())
        if ranks.is_main:
            cut_ledgers(self.run, self.state.step)
        ranks.barrier()
        self.ledger = Ledger(self.run, ranks.rank) if config.data.ledger else None
        self.monitor = Monitor(self.run, self.state.step, self.total_steps, ranks.is_main)
        self.monitor.table(
            f"run {config.run}", start_up_table(config, found, self.batches, captioner, accelerator.device)
        )
        self.clock, self.holes_of_epoch = Clock(), (0, 0)  # (epoch, holes in it so far)

    def fit(self) -> str:
        """Steps until the last, or until a rank is told to stop; validates and saves on the way."""
        pin = self.accelerator.device.type == "cuda"
        steps = train_steps(self.batches, self.state.step, self.total_steps, self.found.workers, pin)
        evaluate_every = self.config.evaluate.every_steps or self.found.steps_per_epoch(self.config)
        self.clock.reset()
        while self.state.step < self.total_steps:
            asked = time.perf_counter()
            micro_batches = next(steps)
            self.clock.waiting += time.perf_counter() - asked
            mine = [sum(b.targets for b in micro_batches), sum(len(b.holes) for b in micro_batches)]
            targets, holes, stopping = self.ranks.sums([*mine, self.stop.received is not None])
            if stopping:
                return self._preempted()
            if holes:
                self._count_holes(micro_batches, int(holes))
            update = self.stepper.step(self.state.step, micro_batches, targets)
            self._advance(micro_batches, update)
            if self._is_time(evaluate_every):
                self._validate()
            if self._is_time(self.config.checkpoint.every_steps):
                self._save()
        self._save()
        return "finished"

    def _is_time(self, every_steps: int) -> bool:
        return self.state.step % every_steps == 0 or self.state.step == self.total_steps

    def _advance(self, micro_batches: list[CaptionBatch], update: Update) -> None:
        """The step is done: count its samples, enter them in the ledger, show it."""
        _, start, stop = self.found.step_range(self.state.step, self.config)
        self.state = replace(self.state, step=self.state.step + 1, samples_seen=self.state.samples_seen + stop - start)
        if self.ledger:
            self.ledger.write(micro_batches)
        self.clock.count(micro_batches)
        if update.skipped:
            self.monitor.say(f"step {self.state.step}: the gradient is not finite; the update is skipped")
        logging = self._is_time(self.config.monitor.log_every_steps)
        self.monitor.step(self.state.step, self._scalars(update) if logging else None)

    def _scalars(self, update: Update) -> dict[str, float]:
        # Each rank's loss carries the factor W that DDP's averaging of gradients takes out again.
        loss = self.ranks.sums([float(update.loss)])[0] / self.ranks.world_size
        scalars = {
            "train/loss": loss,
            "train/perplexity": perplexity(loss),
            "train/gradient_norm": update.gradient_norm,
            "train/holes": float(self.holes_of_epoch[1]),
            **{f"rate/{name}": rate for name, rate in update.rates.items()},
            **self.clock.reading(self.ranks.world_size),
        }
        self.clock.reset()
        return scalars

    def _count_holes(self, micro_batches: list[CaptionBatch], holes: int) -> None:
        """Tell of this step's holes; above the epoch's budget (counted anew after a resume), stop with their list."""
        epoch = micro_batches[0].epoch
        so_far = holes + (self.holes_of_epoch[1] if self.holes_of_epoch[0] == epoch else 0)
        self.holes_of_epoch = (epoch, so_far)
        parts = self.ranks.gathered([str(hole) for batch in micro_batches for hole in batch.holes])
        listing = listed(hole for part in parts for hole in part)
        self.monitor.say(f"unreadable, left out of step {self.state.step + 1}:\n{listing}")
        if so_far > self.config.data.hole_budget * len(self.found.train):
            raise InputError(
                f"{so_far} of {len(self.found.train)} samples unreadable in epoch {epoch}: more than data.hole_budget="
                f"{self.config.data.hole_budget} allows. The last:\n{listing}\n"
                "Check the shards with `python -m launch.pack verify`, pack again, or raise data.hole_budget."
            )

    def _preempted(self) -> str:
        signals = [name for name in self.ranks.gathered(self.stop.received) if name]
        self.why = f", stopped by {signals[0]}"
        self.monitor.say(f"{signals[0]} received: saving at step {self.state.step} and stopping")
        self._save()
        return "preempted"

    def _validate(self) -> None:
        """Caption the validation split with every rank, score it on rank 0, and save if it is the best so far."""
        val, captioner = self.found.val, self.stepper.captioner
        if val is None:
            return
        self.stepper.share_buffers()
        device, workers = self.accelerator.device, self.found.workers
        with self.accelerator.autocast():
            captions = caption_split(captioner, self.found.vocabulary, val, self.config, self.ranks, device, workers)
        scores = self.ranks.from_main(score_captions(captions, val) if self.ranks.is_main else None)
        if self.ranks.is_main:
            results = captions.results(val)
            name = f"captions-val-step-{self.state.step}.json"
            write_atomically(self.run / name, json.dumps(results, ensure_ascii=False).encode())
            epoch = self.state.samples_seen / len(self.found.train)
            self.monitor.scores(self.state.step, epoch, scores, results[:8])
        if self.state.best_score is None or scores[SELECTION_METRIC] > self.state.best_score:
            self.state = replace(self.state, best_score=scores[SELECTION_METRIC], best_step=self.state.step)
            self._save()
        self.clock.reset()

    def _save(self) -> None:
        if self.ledger:
            self.ledger.sync()
        self.ranks.barrier()
        if self.ranks.is_main:
            texts = {"config.yaml": save_text(self.config), "vocabulary.json": self.found.vocabulary.to_json()}
            model, optimizer = self.stepper.model_state(), self.stepper.optimizer_state()
            checkpoint.save(self.run, self.state, model, optimizer, texts, self.config.checkpoint.keep)
        self.ranks.barrier()
