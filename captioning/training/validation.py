"""Validation within a run: captions written and scored by all ranks, and the teacher-forced loss."""

import json
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from captioning.checkpoint import RunState
from captioning.config import Config
from captioning.ranks import Ranks
from captioning.scoring.evaluate import caption_split, score_captions
from captioning.scoring.loss import SplitLoss
from captioning.training.losses import perplexity
from captioning.training.monitor import Monitor
from captioning.training.preemption import StopSignals, stopped_by
from captioning.training.selection import judged
from captioning.training.setup import Experiment
from captioning.training.step import Stepper
from captioning.training.watchdog import Watchdog
from shards.index import write_atomically


@dataclass(frozen=True)
class Validation:
    """Validates the run's validation split, if it has one."""

    config: Config
    found: Experiment
    stepper: Stepper
    accelerator: Accelerator
    ranks: Ranks
    stop: StopSignals
    watchdog: Watchdog
    monitor: Monitor

    def __call__(self, state: RunState) -> RunState:
        """Caption the split with every rank, score it on rank 0, show it; the state that follows.

        Raises:
            StoppedError: when a rank is told to stop: it gives up at once.
        """
        val = self.found.val
        if val is None or self.found.val_captions is None:
            return state
        captioner, device, workers = self.stepper.captioner, self.accelerator.device, self.found.workers
        loss = SplitLoss(captioner, self.found.val_captions)
        self.stepper.share_buffers()
        with self.stepper.averaged(), self.accelerator.autocast():
            captions = caption_split(
                captioner, self.found.vocabulary, val, self.config, self.ranks, device, workers,
                between_batches=lambda: self._stop_if_told(state), also=loss.add,
            )  # fmt: skip
        scores = self.ranks.main_works(lambda _: score_captions(captions, val), lambda: self._told_while_scoring(state))
        if scores is None:
            raise stopped_by(self.ranks.gathered(self.stop.received))
        mean = loss.mean(self.ranks)
        forced = {"loss": mean, "perplexity": perplexity(mean)}
        if self.ranks.is_main:
            path = Path(self.config.run) / f"captions-val-step-{state.step}.json"
            write_atomically(path, json.dumps(captions.results(val), ensure_ascii=False).encode())
            epoch = state.samples_seen / len(self.found.train)
            self.monitor.validated(state.step, epoch, scores, forced, captions.of_sample)
        return judged(state, self.config.evaluate, {**scores, "loss": mean})

    def _stop_if_told(self, state: RunState) -> None:
        self.watchdog.at(state.step + 1, "waiting for the other ranks, validating")
        if self.ranks.sums([self.stop.received is not None])[0]:
            raise stopped_by(self.ranks.gathered(self.stop.received))
        self.watchdog.at(state.step + 1, "captioning the validation split")

    def _told_while_scoring(self, state: RunState) -> bool:
        self.watchdog.at(state.step + 1, "waiting for rank 0 to score the captions")
        return self.stop.received is not None
