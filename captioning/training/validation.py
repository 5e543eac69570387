"""Validation within a run: captions written and scored by all ranks, and the teacher-forced loss."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import Accelerator

from captioning.config import Config
from captioning.distributed.ranks import Ranks
from captioning.distributed.stop_signals import StopSignals, stopped_by
from captioning.distributed.watchdog import Watchdog
from captioning.evaluation.caption_split import CaptionSplit, score_captions
from captioning.evaluation.split_loss import SplitLoss
from captioning.runs.checkpoint import RunState
from captioning.training.best import update_best
from captioning.training.experiment import Experiment
from captioning.training.monitor import Monitor
from captioning.training.optim import decays_after
from captioning.training.train_step import TrainStep


@dataclass(frozen=True)
class Validation:
    """Validates the run's validation split, if it has one."""

    config: Config
    experiment: Experiment
    train_step: TrainStep
    accelerator: Accelerator
    ranks: Ranks
    stop: StopSignals
    watchdog: Watchdog
    monitor: Monitor

    def __call__(self, state: RunState) -> RunState:
        """Caption the split with every rank, score it on rank 0, show it; the state that follows.

        Raises:
            StoppedError: when a stop signal reaches a rank: it gives up at once.
        """
        val = self.experiment.val
        if val is None or self.experiment.val_captions is None:
            return state
        captioner, device = self.train_step.captioner, self.accelerator.device
        loss = SplitLoss(captioner, self.experiment.val_captions, self.config.evaluate.top_k)
        work = CaptionSplit(captioner, self.experiment.vocabulary, val, self.config, self.ranks, device)
        self.train_step.replica.share_buffers()
        with self.train_step.averaged(), self.accelerator.autocast(), self.monitor.validating() as on_progress:
            on_progress(0, work.stop - work.start)
            for images in work:
                on_progress(work.done, work.stop - work.start)
                if images is not None:
                    loss.add(images)
                self._stop_if_told(state)
        captions = work.gather()
        scores = self.ranks.run_on_main(
            lambda _: score_captions(captions, val), lambda: self._told_while_scoring(state)
        )
        if scores is None:
            raise stopped_by(self.ranks.all_gather(self.stop.received))
        forced = loss.means(self.ranks)
        updated = update_best(state, self.config.evaluate, {**scores, "loss": forced["loss"]})
        if self.ranks.is_main:
            path = Path(self.config.run) / f"captions-val-step-{state.step}.json"
            self.monitor.files.write(path, json.dumps(captions.results(val), ensure_ascii=False).encode())
            is_best = updated.best_step == state.step
            epoch = state.samples_seen / len(self.experiment.train)
            self.monitor.validated(state.step, epoch, scores, forced, captions.of_sample, is_best)
        return replace(updated, lr_decays=decays_after(updated, self.config.optim))

    def _stop_if_told(self, state: RunState) -> None:
        self.watchdog.at(state.step + 1, "waiting for the other ranks, validating")
        if self.ranks.all_reduce_sum([self.stop.received is not None])[0]:
            raise stopped_by(self.ranks.all_gather(self.stop.received))
        self.watchdog.at(state.step + 1, "captioning the validation split")

    def _told_while_scoring(self, state: RunState) -> bool:
        self.watchdog.at(state.step + 1, "waiting for rank 0 to score the captions")
        return self.stop.received is not None
