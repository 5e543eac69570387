"""One run from its config to its end: set up, resume, fit, validate, save, stop.

The global step is the unit of everything: its samples are fixed by the order alone, its loss is divided by the target
tokens of all ranks, and between two steps the ranks agree whether to stop.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from threading import Event

from accelerate import Accelerator

from captioning import run_folder
from captioning.config import Config, save_text
from captioning.data.batches import CaptionBatch, train_steps
from captioning.progress import bar
from captioning.ranks import Ranks, join, lost_peer
from captioning.scoring.evaluate import caption_split, score_captions
from captioning.scoring.loss import SplitLoss
from captioning.training.ledger import Ledger, cut_ledgers
from captioning.training.monitor import Clock, Monitor, perplexity, start_up_table
from captioning.training.preemption import StoppedError, StopSignals
from captioning.training.saving import Saver
from captioning.training.setup import Experiment, holds_folder, prepare, take_folder
from captioning.training.step import Stepper, Update
from captioning.training.watchdog import Watchdog
from shards.errors import InputError, listed
from shards.index import write_atomically

SELECTION_METRIC = "CIDEr-D"  # what makes a checkpoint the best


def train(config: Config, stop: StopSignals) -> str:
    """Run a config to its end, or to a stop signal; the same call again continues it.

    Returns:
        "finished" or "preempted"; also written to RUN/status.

    Raises:
        InputError: for anything the user can mend: data, settings, a run folder of another experiment, a full disk.
    """
    accelerator, ranks = join(config.precision, config.train.world_size, config.train.hang_seconds)
    prepared = False
    try:
        found = _prepared(config, ranks, stop)
        prepared = True
        trainer = Trainer(config, found, accelerator, ranks, stop)
        try:
            status, detail = trainer.fit(), trainer.progress()
        finally:
            trainer.close()
    except StoppedError as stopped:
        status, detail = "preempted", f"before the first step, stopped by {stopped}"
        if ranks.is_main:
            take_folder(Path(config.run))
    except BaseException as error:
        if prepared or holds_folder():
            _note_failure(Path(config.run), error, ranks)
        raise
    if holds_folder():
        run_folder.set_status(Path(config.run), status, detail)
    ranks.barrier()
    trainer.stepper.release()
    accelerator.end_training()
    return status


def _note_failure(run: Path, error: BaseException, ranks: Ranks) -> None:
    """``failed`` in RUN/status, by the rank it happened to; the others see a peer go, which is no failure of theirs:
    the run then looks like one that was killed, to be started again."""
    try:
        if isinstance(error, InputError) and not ranks.is_main:
            return  # it is raised on all of them
        if not lost_peer(error):
            run_folder.set_status(run, "failed", f"{type(error).__name__}: {error}")
        elif ranks.is_main and run_folder.status(run)[0] == "running":
            run_folder.set_status(run, "running", f"until another process was lost: {error}")
    except OSError as unwritten:
        print(f"warning: {run / 'status'} could not be written: {unwritten}", file=sys.stderr)


def _prepared(config: Config, ranks: Ranks, stop: StopSignals) -> Experiment:
    """Rank 0 prepares the run; what it found, or what it objects to, reaches every rank.

    Raises:
        StoppedError: when a rank is told to stop meanwhile.
    """
    with bar("reading captions", shown=ranks.is_main) as on_progress:

        def work(unwanted: Event) -> Experiment:
            def watched(done: int, total: int) -> None:
                if unwanted.is_set():
                    raise StoppedError
                on_progress(done, total)

            try:
                return prepare(config, ranks.world_size, watched)
            except OSError as error:
                raise InputError(f"run={config.run} cannot be prepared: {error}") from error

        found = ranks.main_works(work, lambda: stop.received is not None)
        if found is None:
            raise _stopped(ranks, stop)
    return found


def _stopped(ranks: Ranks, stop: StopSignals) -> StoppedError:
    """By what, once the ranks agree that one of them was told to stop."""
    return StoppedError(next(why for why in ranks.gathered(stop.received) if why))


class Trainer:
    """The state of a run in this process. Attributes hold what lives across steps; ``fit`` is the whole story."""

    def __init__(self, config: Config, found: Experiment, accelerator: Accelerator, ranks: Ranks, stop: StopSignals):
        self.config, self.found, self.accelerator, self.ranks, self.stop = config, found, accelerator, ranks, stop
        self.run, self.why = Path(config.run), ""
        self.batches = found.train_batches(config, ranks)
        self.total_steps = found.total_steps(config)
        self.state = replace(found.state, world_size=ranks.world_size)
        captioner = found.build_model(config, ranks.is_main)
        self.stepper = Stepper(captioner, config, accelerator, ranks, self.total_steps, self.state.step)
        if found.checkpoint is not None:
            self.stepper.load(found.checkpoint)
        if ranks.is_main:
            cut_ledgers(self.run, self.state.step)
        ranks.barrier()
        self.ledger = Ledger(self.run, ranks.rank) if config.data.ledger else None
        self.monitor = Monitor(config, found, ranks.is_main)
        self.monitor.table(
            f"run {config.run}", start_up_table(config, found, self.batches, captioner, accelerator.device)
        )
        texts = {"config.yaml": save_text(config), "vocabulary.json": found.vocabulary.to_json()}
        self.saver = Saver(self.run, texts, config.checkpoint.keep, config.checkpoint.background)
        self.saved = self.state if found.checkpoint else None  # the last state on disk
        self.being_saved = self.saved
        self.watchdog = Watchdog(self.run, ranks, config.train.hang_seconds, self.batches.shards_of)
        self.clock = Clock()

    def fit(self) -> str:
        """Steps until the last, or until a rank is told to stop; validates and saves on the way."""
        try:
            self._fit()
            status = "finished"
        except StoppedError as stopped:
            self.why, status = f", stopped by {stopped}", "preempted"
            self.monitor.say(f"{stopped} received: saving at step {self.state.step} and stopping")
        self._save(last=True)
        return status

    def _fit(self) -> None:
        pin = self.accelerator.device.type == "cuda"
        steps = train_steps(self.batches, self.state.step, self.total_steps, self.found.workers, pin)
        evaluate_every = self.config.evaluate.every_steps or self.found.steps_per_epoch(self.config)
        self.clock.reset()
        self.watchdog.start()
        while True:
            # Before the first step too: a run stopped while it validated does that first when it is continued.
            if self._is_time(evaluate_every) and self.state.evaluated_step < self.state.step:
                self._validate()
            if self._is_time(self.config.checkpoint.every_steps) or self.state.best_step == self.state.step:
                self._save()
            if self.state.step == self.total_steps:
                return
            self._at("reading its samples")
            asked = time.perf_counter()
            micro_batches = next(steps)
            self.clock.waiting += time.perf_counter() - asked
            self._at("waiting for the other ranks to have read theirs")
            mine = [sum(b.targets for b in micro_batches), sum(len(b.holes) for b in micro_batches)]
            targets, holes, stopping = self.ranks.sums([*mine, self.stop.received is not None])
            if stopping:
                raise _stopped(self.ranks, self.stop)
            self._count_holes(micro_batches, int(holes))
            self._at("computing the update")
            logging = self._is_time(self.config.monitor.log_every_steps, self.state.step + 1)
            update = self.stepper.step(self.state.step, micro_batches, targets, with_top5=logging)
            self._advance(micro_batches, update)
            self.monitor.step(self.state.step, self._scalars(update, targets) if logging else None)

    def _at(self, what: str) -> None:
        self.watchdog.at(self.state.step + 1, what)

    def _is_time(self, every_steps: int, step: int | None = None) -> bool:
        step = self.state.step if step is None else step
        return step > 0 and (step % every_steps == 0 or step == self.total_steps)

    def _advance(self, micro_batches: list[CaptionBatch], update: Update) -> None:
        """The step is done: count its samples, enter them in the ledger, show it."""
        _, start, stop = self.found.step_range(self.state.step, self.config)
        self.state = replace(
            self.state,
            step=self.state.step + 1,
            samples_seen=self.state.samples_seen + stop - start,
            skipped_steps=self.state.skipped_steps + update.skipped,
        )
        if self.ledger:
            self.ledger.write(micro_batches)
        self.clock.count(micro_batches)
        if update.skipped:
            self.monitor.say(f"step {self.state.step}: the gradient is not finite; the update is skipped")
            if update.culprits:
                self.monitor.say(f"no finite loss:\n{listed(update.culprits)}")

    def _scalars(self, update: Update, targets: float) -> dict[str, float]:
        sums = self.ranks.sums([float(part) for part in (update.objective, update.loss, update.in_top5)])
        # Each rank's loss carries the factor W that DDP's averaging of gradients takes out again.
        objective, loss = (part / self.ranks.world_size for part in sums[:2])
        scalars = {
            "train/loss": loss,
            "train/perplexity": perplexity(loss),
            "train/objective": objective,
            "train/top5_accuracy": sums[2] / max(1.0, targets),
            "train/skipped_steps": float(self.state.skipped_steps),
            "train/gradient_norm": update.gradient_norm,
            "train/holes": float(self.state.epoch_holes),
            **{f"rate/{name}": rate for name, rate in update.rates.items()},
            **self.clock.reading(self.ranks.world_size),
        }
        self.clock.reset()
        return scalars

    def _count_holes(self, micro_batches: list[CaptionBatch], holes: int) -> None:
        """Tell of this step's holes; above the epoch's budget, stop with their list."""
        _, start, _ = self.found.step_range(self.state.step, self.config)
        so_far = holes + (self.state.epoch_holes if start else 0)
        self.state = replace(self.state, epoch_holes=so_far)
        if not holes:
            return
        parts = self.ranks.gathered([str(hole) for batch in micro_batches for hole in batch.holes])
        listing = listed(hole for part in parts for hole in part)
        self.monitor.say(f"unreadable, left out of step {self.state.step + 1}:\n{listing}")
        if so_far > self.config.data.hole_budget * len(self.found.train):
            raise InputError(
                f"{so_far} of {len(self.found.train)} samples unreadable in epoch {micro_batches[0].epoch}: more than "
                f"data.hole_budget={self.config.data.hole_budget} allows. The last:\n{listing}\n"
                "Check the shards with `python -m launch.pack verify`, pack again, or raise data.hole_budget."
            )

    def _stop_if_told(self) -> None:
        self._at("waiting for the other ranks, validating")
        if self.ranks.sums([self.stop.received is not None])[0]:
            raise _stopped(self.ranks, self.stop)
        self._at("captioning the validation split")

    def _validate(self) -> None:
        """Caption the validation split with every rank and score it on rank 0; told to stop, give up at once."""
        val, captioner = self.found.val, self.stepper.captioner
        if val is None or self.found.val_captions is None:
            return
        self.stepper.share_buffers()
        loss = SplitLoss(captioner, self.found.val_captions)
        with self.stepper.averaged(), self.accelerator.autocast():
            captions = caption_split(
                captioner, self.found.vocabulary, val, self.config, self.ranks, self.accelerator.device,
                self.found.workers, between_batches=self._stop_if_told, also=loss.add,
            )  # fmt: skip
        scores = self.ranks.main_works(lambda _: score_captions(captions, val), self._told_while_scoring)
        if scores is None:
            raise _stopped(self.ranks, self.stop)
        mean = loss.mean(self.ranks)
        scores = {"loss": mean, "perplexity": perplexity(mean), **scores}
        if self.ranks.is_main:
            results = captions.results(val)
            name = f"captions-val-step-{self.state.step}.json"
            write_atomically(self.run / name, json.dumps(results, ensure_ascii=False).encode())
            epoch = self.state.samples_seen / len(self.found.train)
            self.monitor.scores(self.state.step, epoch, scores, captions.of_sample)
        self.state = replace(self.state, evaluated_step=self.state.step)
        if self.state.best_score is None or scores[SELECTION_METRIC] > self.state.best_score:
            self.state = replace(self.state, best_score=scores[SELECTION_METRIC], best_step=self.state.step)
        self.clock.reset()

    def _told_while_scoring(self) -> bool:
        self._at("waiting for rank 0 to score the captions")
        return self.stop.received is not None

    def _save(self, last: bool = False) -> None:
        """Have the state saved, unless it is; the ``last`` time wait until it is on disk.

        Raises:
            InputError: when the disk takes no last checkpoint. Of an earlier one that failed people are told, and the
                run goes on: the disk may have room by the next.
        """
        self._at("saving")
        objection = self._finish_saving()
        if self.state != self.saved:
            if self.ledger:
                self.ledger.sync()
            self.monitor.flush()
            self.ranks.barrier()
            if self.ranks.is_main:
                self.saver.start(self.state, *self.stepper.saved_state())
            self.being_saved = self.state
            objection = self._finish_saving() if last else None
        if last and objection:
            raise InputError(
                f"The last checkpoint, of step {self.state.step}, could not be written: {objection}\nOn disk is step "
                f"{self.saved.step if self.saved else 0}. Make room in {self.run}, and give the same command again."
            )

    def _finish_saving(self) -> str | None:
        """Wait for the save in flight; what the disk objected to, on every rank. Its best checkpoint is then none."""
        objection = self.ranks.from_main(self.saver.finish() if self.ranks.is_main else None)
        if objection is None:
            self.saved = self.being_saved
        else:
            step = self.being_saved.step if self.being_saved else 0
            self.monitor.say(f"warning: step {step} could not be saved, training goes on: {objection}")
            best = (self.saved.best_score, self.saved.best_step) if self.saved else (None, None)
            self.state = replace(self.state, best_score=best[0], best_step=best[1])
            self.being_saved = self.saved
        return objection

    def progress(self) -> str:
        return f"step {self.state.step} of {self.total_steps}{self.why}"

    def close(self) -> None:
        self.watchdog.close()
        self.saver.finish()
        self.monitor.close()
