"""One run from its config to its end: set up, resume, fit, validate, save, stop.

The global step is the unit of everything: its samples are fixed by the order alone, its loss is divided by the target
tokens of all ranks, and between two steps the ranks agree whether to stop.
"""

import logging
from collections.abc import Iterator
from dataclasses import replace

import torch
from accelerate import Accelerator

from captioning.config import Config, save_text
from captioning.data.collate import CaptionBatch
from captioning.distributed.arithmetic import enable_determinism
from captioning.distributed.ranks import Ranks, init_distributed, is_peer_failure
from captioning.distributed.stop_signals import StoppedError, StopSignals, stop_signals, stopped_by
from captioning.distributed.stragglers import gradient_wait
from captioning.distributed.watchdog import Watchdog
from captioning.runs.mirror import Mirror
from captioning.runs.run_folder import RunFolder
from captioning.runs.saver import Saver
from captioning.training.best import closing_summary, why_stop_early
from captioning.training.experiment import Experiment
from captioning.training.final_scores import score_test_split
from captioning.training.ledger import Ledger
from captioning.training.monitor import Clock, Monitor, start_up_table
from captioning.training.objectives import OBJECTIVES, StepScope
from captioning.training.preparation import prepare_run
from captioning.training.step_samples import StepSamples, agreed, own_samples
from captioning.training.train_step import StepResult, TrainStep
from captioning.training.unreadable import report_unreadable
from captioning.training.validation import Validation
from shards.errors import InputError, RetryError, listed
from shards.workers import lost_worker

logger = logging.getLogger(__name__)


def train(config: Config, stop: StopSignals | None = None) -> str:
    """Run a config to its end, or to a stop signal; the same call again continues it.

    Returns:
        "finished" or "preempted"; also written to RUN/status.

    Raises:
        InputError: for anything the user can mend: data, settings, a run folder of another experiment, a full disk.
    """
    if stop is None:
        with stop_signals() as stop:
            return train(config, stop)
    if config.train.deterministic:
        enable_determinism()
    wanted = config.train
    accelerator, ranks = init_distributed(config.precision, wanted.world_size, wanted.hang_seconds, wanted.tf32)
    try:
        with RunFolder(config.run) as folder:
            status, trainer = _fit_or_note(config, folder, accelerator, ranks, stop)
            ranks.barrier()
            if trainer is not None:
                trainer.train_step.replica.release()
            accelerator.end_training()
    except InputError:
        if accelerator.device.type == "cpu":  # Gloo aborts a process that leaves its threads; NCCL may wait for peers
            accelerator.end_training()
        raise
    return status


def _fit_or_note(
    config: Config, folder: RunFolder, accelerator: Accelerator, ranks: Ranks, stop: StopSignals
) -> tuple[str, "Trainer | None"]:
    """How the run ended, noted in RUN/status whatever happens; but for a start that is refused, which changes nothing
    there."""
    prepared, trainer = False, None
    try:
        experiment = prepare_run(config, folder, ranks, stop)
        prepared = True
        trainer = Trainer(config, folder, experiment, accelerator, ranks, stop)
        try:
            if ranks.is_main:
                _note(folder, "running")
            status, detail = trainer.fit(), trainer.progress()
        finally:
            trainer.close()
    except StoppedError as stopped:
        status, detail = "preempted", f"before the first step, stopped by {stopped}"
        if ranks.is_main:
            folder.hold_if_free()
    except BaseException as error:
        is_refused = trainer is None and isinstance(error, InputError)
        if (prepared or folder.is_held) and not is_refused:
            _note_failure(folder, error, ranks)
        if (lost := lost_worker(error)) is not None:
            raise (RetryError if lost[1] else InputError)(lost[0]) from error
        raise
    if folder.is_held:
        _note(folder, status, detail)
    return status, trainer


def _note(folder: RunFolder, status: str, detail: str = "") -> None:
    """Set RUN/status. For want of room the earlier one stays: a run that looks like a killed one is started again."""
    try:
        folder.set_status(status, detail)
    except OSError as error:
        logger.warning(f"{folder.path / 'status'} could not be written: {error.strerror}")


def _note_failure(folder: RunFolder, error: BaseException, ranks: Ranks) -> None:
    """``failed`` in RUN/status, by the rank it happened to; the others see a peer go, which is no failure of theirs:
    the run then looks like one that was killed, to be started again."""
    detail = f"{type(error).__name__}: {error}"
    if isinstance(error, torch.OutOfMemoryError):
        advice = "lower train.micro_batch_size, the global batch stays; while validating, evaluate.batch_size"
        detail = f"rank {ranks.rank} ran out of the device's memory: {advice}. {error}"
        logger.error(detail)
    lost = lost_worker(error)
    try:
        if isinstance(error, InputError) and not ranks.is_main:
            return  # it is raised on all of them
        if lost is not None:
            folder.set_status("running" if lost[1] else "failed", f"until rank {ranks.rank} lost a loader: {lost[0]}")
        elif not is_peer_failure(error):
            folder.set_status("failed", detail)
        elif ranks.is_main and folder.status() == ("running", ""):
            folder.set_status("running", f"until another process was lost: {error}")
    except OSError as unwritten:
        logger.warning(f"{folder.path / 'status'} could not be written: {unwritten}")


class Trainer:
    """The state of a run in this process. Attributes hold what lives across steps; ``fit`` is the whole story."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        experiment: Experiment,
        accelerator: Accelerator,
        ranks: Ranks,
        stop: StopSignals,
    ):
        self.config, self.experiment, self.stop = config, experiment, stop
        self.accelerator, self.ranks = accelerator, ranks
        self.run, self.why = folder.path, ""
        self.batches = experiment.train_batches(config, ranks, pin_memory=accelerator.device.type == "cuda")
        self.total_steps = experiment.total_steps(config)
        self.evaluate_every = config.evaluate.every_steps or experiment.steps_per_epoch(config)
        self.state = replace(experiment.state, world_size=ranks.world_size)
        captioner = experiment.build_model(config, ranks.is_main)
        objective = OBJECTIVES[config.train.objective].of(config, experiment)
        self.train_step = TrainStep(captioner, objective, config, accelerator, ranks, self.total_steps, self.state.step)
        if experiment.checkpoint is not None:
            self.train_step.load(experiment.checkpoint)
        if ranks.is_main:
            folder.cut_logs(self.state.step, self.state.evaluated_step)
        ranks.barrier()
        self.ledger = Ledger(self.run, ranks.rank) if config.data.ledger else None
        self.monitor = ranks.together(lambda: Monitor(config, experiment, ranks.is_main))  # rank 0's reads some images
        self.monitor.table(
            f"run {config.run}", start_up_table(config, experiment, self.batches, captioner, accelerator.device)
        )
        texts = {"config.yaml": save_text(config), "vocabulary.json": experiment.vocabulary.to_json()}
        place = config.checkpoint.mirror
        mirror = Mirror(place, config.checkpoint.keep) if place and ranks.is_main else None
        self.saver = Saver(self.run, texts, config.checkpoint.keep, config.checkpoint.background, mirror)
        self.saved = self.state if experiment.checkpoint else None  # the last state on disk
        self.being_saved = self.saved
        self.watchdog = Watchdog(self.run, ranks, config.train.hang_seconds, self.batches.describe)
        self.validation = Validation(
            config, experiment, self.train_step, accelerator, ranks, stop, self.watchdog, self.monitor
        )
        self.clock = Clock(accelerator.device)

    def fit(self) -> str:
        """Steps until the last, or until a stop signal reaches a rank; validates and saves on the way."""
        try:
            self._fit()
            self._save(last=True)
            self._test()
            self.monitor.say(
                f"finished: {self.progress()}\n{closing_summary(self.run, self.state, self.config.evaluate)}"
            )
            return "finished"
        except StoppedError as stopped:
            self.why = f", stopped by {stopped}"
            self.monitor.say(f"{stopped} received: saving at step {self.state.step} and stopping")
        self._save(last=True)
        return "preempted"

    def _test(self) -> None:
        """Score the test split, if there is one.

        Raises:
            StoppedError: when a stop signal reaches a rank: the same command then does it.
        """

        def on_round() -> None:
            self._at("captioning the test split")
            if self.ranks.all_reduce_sum([self.stop.received is not None])[0]:
                raise stopped_by(self.ranks.all_gather(self.stop.received))

        self._at("captioning the test split")
        document = score_test_split(self.config, self.ranks, self.accelerator.device, on_round)
        if document is not None:
            self.monitor.tested(document["step"], document["scores"])

    def _fit(self) -> None:
        steps = self.batches.steps(self.state.step, self.total_steps)
        samples: StepSamples | None = None
        self.clock.reset()
        self.watchdog.start()
        while True:
            # Before the first step too: a run stopped while it validated does that first when it is continued.
            if self._is_time(self.evaluate_every) and self.state.evaluated_step < self.state.step:
                self.state = self.validation(self.state)
                self.clock.reset()
            if self._is_time(self.config.checkpoint.every_steps) or self.state.best_step == self.state.step:
                self._save()
            if self.state.step == self.total_steps:
                return
            if why := why_stop_early(self.state, self.config.evaluate):
                self.why = f", {why}"
                return
            samples = self._take_step(samples or self._read(steps, self.state.step), steps)

    def _take_step(self, samples: StepSamples, steps: Iterator[list[CaptionBatch]]) -> StepSamples | None:
        """The next step. While the device computes it, the samples of the one after it are read, and returned: unless
        the run validates, saves or ends before that, which may take long, and signals come."""
        scope = self._begin(samples)
        self._at("computing the update")
        self.train_step.lr_decays = self.state.lr_decays
        started, then = self.train_step.start(scope, samples.micro_batches), self.state.step + 1
        pauses = self._is_time(self.evaluate_every, then) or self._is_time(self.config.checkpoint.every_steps, then)
        ahead = None if pauses else self._read(steps, then)
        if ahead is not None and ahead.error is None:
            self.train_step.copy_ahead(ahead.micro_batches)
        self._at("computing the update")
        result = self.train_step.finish(started)
        self._advance(samples.micro_batches, result)
        if self.ranks.is_main and self.state.step == self.monitor.first_step + 1:  # the optimizer has a state now
            self.saver.make_room(*self.train_step.saved_state())
        self.monitor.step(self.state.step, self._scalars(scope, result) if scope.detailed else None)
        return ahead

    def _read(self, steps: Iterator[list[CaptionBatch]], step: int) -> StepSamples:
        """The samples of optimizer step ``step`` (from 0), the next that ``steps`` gives."""
        self._at("reading its samples", step)
        own = own_samples(steps, self.clock)
        self._at("waiting for the other ranks to have read theirs", step)
        return agreed(*own, self.ranks, self.stop, self.clock)

    def _begin(self, samples: StepSamples) -> StepScope:
        """The scope of the step over ``samples``, whose unreadable ones are reported.

        Raises:
            StoppedError: on every rank, when one was told to stop.
            InputError: on every rank, when one cannot read its samples, or too many are unreadable.
        """
        if samples.error is not None:
            raise samples.error
        if samples.lone:
            self.train_step.replica.share_buffers()  # else a resumed run, which has rank 0's alone, would differ
        first = self.experiment.step_range(self.state.step, self.config)[1] == 0
        so_far = int(samples.unreadable) + (0 if first else self.state.epoch_unreadable)
        self.state = replace(self.state, epoch_unreadable=so_far)
        if samples.unreadable:
            total = len(self.experiment.train)
            report_unreadable(samples.micro_batches, so_far, total, self.config, self.ranks, self.monitor)
        logging = self._is_time(self.config.monitor.log_every_steps, self.state.step + 1)
        return samples.scope(self.state.step, self.ranks.world_size, logging)

    def _at(self, what: str, step: int | None = None) -> None:
        self.watchdog.at((self.state.step if step is None else step) + 1, what)

    def _is_time(self, every_steps: int, step: int | None = None) -> bool:
        step = self.state.step if step is None else step
        return step > 0 and (step % every_steps == 0 or step == self.total_steps)

    def _advance(self, micro_batches: list[CaptionBatch], result: StepResult) -> None:
        """The step is done: count its samples, enter them in the ledger, show it."""
        _, start, stop = self.experiment.step_range(self.state.step, self.config)
        self.state = replace(
            self.state,
            step=self.state.step + 1,
            samples_seen=self.state.samples_seen + stop - start,
            skipped_steps=self.state.skipped_steps + result.skipped,
        )
        if self.ledger:
            self.ledger.write(micro_batches)
        self.clock.count(micro_batches)
        self.clock.for_gradients += gradient_wait(self.train_step.replica.model)
        if result.skipped:
            self.monitor.say(f"step {self.state.step}: the gradient is not finite; the update is skipped")
            if result.culprits:
                self.monitor.say(f"no finite loss:\n{listed(result.culprits)}")

    def _scalars(self, scope: StepScope, result: StepResult) -> dict[str, float]:
        scalars = {
            **self.train_step.scalars(scope, result),
            "train/skipped_steps": float(self.state.skipped_steps),
            "train/unreadable": float(self.state.epoch_unreadable),
            **self.clock.reading(self.ranks),
        }
        self.clock.reset()
        return scalars

    def _save(self, last: bool = False) -> None:
        """Have the state saved, unless it is; the ``last`` time wait until it is on disk.

        Raises:
            InputError: when the disk takes no last checkpoint. Of an earlier one that failed people are told, and the
                run goes on: the disk may have room by the next.
        """
        self._at("saving")
        objection = self._finish_saving()
        if self.state != self.saved:
            self.monitor.flush()
            objections = self.ranks.all_gather(self.ledger.sync() if self.ledger else None)
            if objection := next(filter(None, objections), None):  # no checkpoint counts what the ledger lacks
                self._not_saved(self.state.step, objection)
            else:
                if self.ranks.is_main:
                    self.saver.start(self.state, *self.train_step.saved_state())
                self.being_saved = self.state
                objection = self._finish_saving() if last else None
        if last and objection:
            raise InputError(
                f"The last checkpoint, of step {self.state.step}, could not be written: {objection}\nOn disk is step "
                f"{self.saved.step if self.saved else 0}. Make room in {self.run}, and give the same command again."
            )

    def _finish_saving(self) -> str | None:
        """Wait for the save in flight; what the disk objected to, on every rank. Its best checkpoint is then none."""
        objection = self.ranks.broadcast(self.saver.finish() if self.ranks.is_main else None)
        if objection is None:
            self.saved = self.being_saved
        else:
            self._not_saved(self.being_saved.step if self.being_saved else 0, objection)
            self.being_saved = self.saved
        return objection

    def _not_saved(self, step: int, objection: str) -> None:
        """Tell people; the best checkpoint is again the one that is on disk."""
        self.monitor.say(f"warning: step {step} could not be saved, training goes on: {objection}")
        best = (self.saved.best_score, self.saved.best_step) if self.saved else (None, None)
        self.state = replace(self.state, best_score=best[0], best_step=best[1])

    def progress(self) -> str:
        return f"step {self.state.step} of {self.total_steps}{self.why}"

    def close(self) -> None:
        self.watchdog.close()
        self.saver.close(self.config.data.storage_patience_seconds)
        self.monitor.close()
