"""One run from its config to its end: set up, resume, fit, validate, save, stop.

The global step is the unit of everything: its samples are fixed by the order alone, its loss is divided by the target
tokens of all ranks, and between two steps the ranks agree whether to stop.
"""

import json
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn

from captioning import checkpoint
from captioning.checkpoint import Checkpoint
from captioning.config import Config, save_text
from captioning.data.batches import CaptionBatch, train_steps
from captioning.model.decoder import is_target
from captioning.progress import bar
from captioning.ranks import Ranks, joined
from captioning.scoring.evaluate import caption_split, score_captions
from captioning.training.ledger import Ledger, cut_ledgers
from captioning.training.losses import token_loss
from captioning.training.monitor import Clock, Monitor, perplexity
from captioning.training.optim import adamw, rate_factor, set_rates
from captioning.training.preemption import StopSignals
from captioning.training.setup import Experiment, prepare
from shards.errors import InputError, listed
from shards.hashing import key_of
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
    accelerator = _accelerator(config)
    ranks = joined()
    run = Path(config.run)
    with bar("reading captions", shown=ranks.is_main) as on_progress:
        found = ranks.from_main(
            _settled(lambda: prepare(config, ranks.world_size, on_progress)) if ranks.is_main else None
        )
    if isinstance(found, InputError):
        raise found
    trainer = Trainer(config, found, accelerator, ranks, stop)
    try:
        status = trainer.fit()
    except BaseException as error:
        if ranks.is_main:
            checkpoint.set_status(run, "failed", f"{type(error).__name__}: {error}")
        raise
    finally:
        trainer.monitor.close()
    if ranks.is_main:
        checkpoint.set_status(run, status, f"step {trainer.state.step} of {trainer.total_steps}{trainer.why}")
    ranks.barrier()
    accelerator.end_training()
    return status


def _settled(work) -> Any:
    """What rank 0's work gave, or the InputError it ended with, to be told to all ranks."""
    try:
        return work()
    except InputError as error:
        return error


def _accelerator(config: Config) -> Accelerator:
    # static shapes of the graph do not hold (empty micro-batches), every parameter is always used.
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True, find_unused_parameters=False)
    accelerator = Accelerator(mixed_precision=config.precision, kwargs_handlers=[ddp])
    wanted = config.train.world_size
    if wanted is not None and accelerator.num_processes != wanted:
        raise InputError(
            f"train.world_size={wanted}, but {accelerator.num_processes} process(es) started.\n"
            "`accelerate launch --cpu` starts one always: use --config_file launch/accelerate/cpu2.yaml, or see README.md."
        )
    return accelerator


class Trainer:
    """The state of a run in this process. Attributes hold what lives across steps; ``fit`` is the whole story."""

    def __init__(self, config: Config, found: Experiment, accelerator: Accelerator, ranks: Ranks, stop: StopSignals):
        self.config, self.found, self.accelerator, self.ranks, self.stop = config, found, accelerator, ranks, stop
        self.run, self.why = Path(config.run), ""
        self.batches = found.train_batches(config, ranks)
        self.total_steps = found.total_steps(config)
        self.state = replace(found.state, world_size=ranks.world_size)
        self.captioner = found.build_model(config, ranks.is_main)
        optimizer = adamw(self.captioner, config.optim, fused=accelerator.device.type == "cuda")
        self.model, self.optimizer = accelerator.prepare(self.captioner, optimizer)
        if found.checkpoint is not None:
            self._load_optimizer(found.checkpoint)
        self._settle_gradient_buckets()
        if ranks.is_main:
            cut_ledgers(self.run, self.state.step)
        ranks.barrier()
        self.ledger = Ledger(self.run, ranks.rank) if config.data.ledger else None
        self.monitor = Monitor(self.run, self.state.step, self.total_steps, ranks.is_main)
        self.clock, self.skipped_in_a_row, self.holes_this_epoch = Clock(), 0, (0, 0)
        self._announce()

    def fit(self) -> str:
        """Steps until the last, or until a rank is told to stop; validates and saves on the way."""
        self.model.train()
        steps = train_steps(
            self.batches, self.state.step, self.total_steps, self.found.workers, self.accelerator.device.type == "cuda"
        )
        self.clock.reset()
        while self.state.step < self.total_steps:
            asked = time.perf_counter()
            micro_batches = next(steps)
            self.clock.waiting += time.perf_counter() - asked
            mine = [sum(b.targets for b in micro_batches), sum(len(b.holes) for b in micro_batches)]
            targets, holes, stopping = self.ranks.sums([*mine, self.stop.received is not None])
            if stopping:
                return self._preempted()
            self._count_holes(micro_batches, int(holes))
            scalars = self._step(micro_batches, targets)
            self._advance(micro_batches)
            self.monitor.step(self.state.step, scalars)
            if self._is_time(
                self.state.step, self.config.evaluate.every_steps or self.found.steps_per_epoch(self.config)
            ):
                self._validate()
            if self._is_time(self.state.step, self.config.checkpoint.every_steps):
                self._save()
        self._save()
        return "finished"

    def _is_time(self, step: int, every_steps: int) -> bool:
        return step % every_steps == 0 or step == self.total_steps

    def _step(self, micro_batches: list[CaptionBatch], targets: float) -> dict[str, float] | None:
        """One optimizer step over the rank's micro-batches; scalars to log, at logging steps."""
        # Dropout is seeded by what it is for, so no generator state has to survive a restart.
        torch.manual_seed(key_of("model", self.config.seed, self.state.step, self.ranks.rank) >> 1)
        rates = set_rates(self.optimizer, rate_factor(self.state.step, self.total_steps, self.config.optim))
        loss = torch.zeros((), device=self.accelerator.device)
        for number, micro_batch in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                batch = micro_batch.to(self.accelerator.device)
                logits = self.model(batch.images, batch.words, batch.lengths, batch.owner)
                wanted = batch.words[is_target(batch.words, batch.lengths)]
                part = token_loss(logits, wanted, targets, self.ranks.world_size)
                self.accelerator.backward(part)
            loss += part.detach()
        norm = self._update()
        self.clock.images += sum(len(b.keys) for b in micro_batches)
        self.clock.captions += sum(len(b.lengths) for b in micro_batches)
        self.clock.steps += 1
        if not self._is_time(self.state.step + 1, self.config.monitor.log_every_steps):
            return None
        return self._scalars(loss, norm, rates)

    def _update(self) -> float:
        """Clip and step, unless the gradient is not finite (the same on all ranks: it is all-reduced already)."""
        limit = self.config.optim.clip_norm or float("inf")
        norm = float(self.accelerator.clip_grad_norm_(self.captioner.parameters(), limit))
        if norm == norm and norm != float("inf"):
            self.optimizer.step()
            self.skipped_in_a_row = 0
        else:
            if self.accelerator.scaler is not None:
                self.optimizer.step()  # lets the fp16 scaler see the overflow and lower its scale; it skips the step
            self.skipped_in_a_row += 1
            self.monitor.say(f"step {self.state.step + 1}: the gradient is not finite; the update is skipped")
        self.optimizer.zero_grad()
        if self.skipped_in_a_row >= self.config.train.max_skipped_steps:
            raise InputError(
                f"{self.skipped_in_a_row} steps in a row had no finite gradient, up to step {self.state.step + 1}.\n"
                "Lower optim.*_learning_rate, add optim.warmup_steps, or use precision=bf16 instead of fp16."
            )
        return norm

    def _scalars(self, loss: torch.Tensor, norm: float, rates: dict[str, float]) -> dict[str, float]:
        # Each rank's loss carries the factor W that DDP's averaging of gradients takes out again.
        mean_loss = self.ranks.sums([float(loss)])[0] / self.ranks.world_size
        scalars = {
            "train/loss": mean_loss,
            "train/perplexity": perplexity(mean_loss),
            "train/gradient_norm": norm,
            "train/holes": float(self.holes_this_epoch[1]),
            **{f"rate/{name}": rate for name, rate in rates.items()},
            **self.clock.reading(self.ranks.world_size),
        }
        self.clock.reset()
        return scalars

    def _advance(self, micro_batches: list[CaptionBatch]) -> None:
        _, start, stop = self.found.step_range(self.state.step, self.config)
        self.state = replace(self.state, step=self.state.step + 1, samples_seen=self.state.samples_seen + stop - start)
        if self.ledger:
            self.ledger.write(micro_batches)

    def _count_holes(self, micro_batches: list[CaptionBatch], holes: int) -> None:
        """Tell of this step's holes; above the epoch's budget, stop with the list of all ranks' last ones."""
        epoch, before = self.holes_this_epoch
        now = micro_batches[0].epoch
        self.holes_this_epoch = (now, holes + (before if epoch == now else 0))
        mine = [str(hole) for batch in micro_batches for hole in batch.holes]
        if holes:
            for hole in [hole for part in self.ranks.gathered(mine) for hole in part]:
                self.monitor.say(f"hole: {hole}")
        allowed = self.config.data.hole_budget * len(self.found.train)
        if self.holes_this_epoch[1] > allowed:
            listing = listed(hole for part in self.ranks.gathered(mine) for hole in part)
            raise InputError(
                f"{self.holes_this_epoch[1]} unreadable sample(s) in epoch {now}, more than data.hole_budget="
                f"{self.config.data.hole_budget} of {len(self.found.train)} allows. The last:\n{listing}\n"
                "Run `python -m launch.pack verify` on the split, pack it again, or raise data.hole_budget."
            )

    def _preempted(self) -> str:
        signals = [name for name in self.ranks.gathered(self.stop.received) if name]
        self.why = f", stopped by {signals[0]}"
        self.monitor.say(f"stopping before step {self.state.step + 1}: {signals[0]} received; saving")
        self._save()
        return "preempted"

    def _validate(self) -> None:
        """Caption the validation split with every rank, score it on rank 0, and save if it is the best so far."""
        if self.found.val is None:
            return
        self._share_buffers()
        with self.accelerator.autocast():
            captions = caption_split(
                self.captioner,
                self.found.vocabulary,
                self.found.val,
                self.config,
                self.ranks,
                self.accelerator.device,
                self.found.workers,
            )
        scores = self.ranks.from_main(score_captions(captions, self.found.val) if self.ranks.is_main else None)
        epoch = self.state.samples_seen / len(self.found.train)
        if self.ranks.is_main:
            name = f"captions-{self.found.val.name}-step-{self.state.step}.json"
            results = captions.results(self.found.val)
            write_atomically(self.run / name, json.dumps(results, ensure_ascii=False).encode())
            examples = [(str(result["image_id"]), str(result["caption"])) for result in results[:8]]
            self.monitor.scores(self.state.step, epoch, scores, examples)
        score = scores[SELECTION_METRIC]
        if self.state.best_score is None or score > self.state.best_score:
            self.state = replace(self.state, best_score=score, best_step=self.state.step)
            self._save()
        self.clock.reset()

    def _share_buffers(self) -> None:
        """Rank 0's BatchNorm statistics are the model's (DDP gives them to all at the next step, and so do we here)."""
        if self.ranks.world_size > 1:
            for buffer in self.captioner.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def _save(self) -> None:
        if self.ledger:
            self.ledger.sync()
        self.ranks.barrier()
        if self.ranks.is_main:
            optimizer: dict[str, Any] = {"optimizer": self.optimizer.state_dict()}
            if self.accelerator.scaler is not None:
                optimizer["scaler"] = self.accelerator.scaler.state_dict()
            texts = {"config.yaml": save_text(self.config), "vocabulary.json": self.found.vocabulary.to_json()}
            model = {name: tensor.detach().cpu() for name, tensor in self.captioner.state_dict().items()}
            checkpoint.save(self.run, self.state, model, optimizer, texts, self.config.checkpoint.keep)
        self.ranks.barrier()

    def _load_optimizer(self, found: Checkpoint) -> None:
        saved = found.optimizer()
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.accelerator.scaler is not None and "scaler" in saved:
            self.accelerator.scaler.load_state_dict(saved["scaler"])

    def _settle_gradient_buckets(self) -> None:
        """A backward pass without data: DDP arranges its buckets anew after its first one, and sums in another order
        from then on. Doing that before the first step makes a resumed run add as the uninterrupted one does."""
        if self.ranks.world_size > 1:
            empty = torch.empty(0, 3, 8, 8, dtype=torch.uint8, device=self.accelerator.device)
            none = torch.empty(0, dtype=torch.int64, device=self.accelerator.device)
            self.model(empty, none.view(0, 0), none, none).sum().backward()
            self.optimizer.zero_grad()

    def _announce(self) -> None:
        config, world_size = self.config, self.ranks.world_size
        trained, frozen = (_millions(self.captioner, requires_grad) for requires_grad in (True, False))
        rows = {
            "processes": f"{world_size} on {self.accelerator.device.type}, precision {config.precision}, "
            f"{torch.get_num_threads()} thread(s) and {self.found.workers} loader worker(s) each",
            "global batch": f"{config.train.global_batch_size} images = {world_size} process(es) x "
            f"{self.batches.micro_batches(0)} micro-batch(es) of at most {config.train.micro_batch_size}",
            "data": f"{len(self.found.train):,} training images, {len(self.found.vocabulary):,} words",
            "model": f"{config.encoder.name}, {config.decoder.kind}: {trained} trained, {frozen} frozen parameters",
            "steps": f"{self.total_steps:,}, of which {self.state.step:,} are done",
        }
        self.monitor.table(f"run {config.run}", rows)
        if self.found.changed:
            self.monitor.say("changed since the run began:\n" + listed(self.found.changed))


def _millions(model: nn.Module, requires_grad: bool) -> str:
    return f"{sum(p.numel() for p in model.parameters() if p.requires_grad == requires_grad) / 1e6:.2f} M"
