"""A slow rank is named, and so is what it is slow at, though by the clock all ranks take the same."""

import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from captioning.config import load_config
from captioning.distributed.stragglers import RankTimes, Stragglers
from captioning.training.monitor import _numbers
from tests.conftest import settings
from tests.processes import in_processes

SLEEP_S = 0.4


def test_the_slowest_and_the_median_of_the_ranks():
    times = [RankTimes(step, step / 2) for step in (2.0, 3.0, 6.0, 1.0)]
    assert Stragglers.of(times) == Stragglers(2, RankTimes(6.0, 3.0), RankTimes(2.0, 1.0))
    assert Stragglers.of(times[:1]) == Stragglers(0, times[0], times[0])


@pytest.mark.parametrize(
    "slowest, wait, said",
    [
        (119.0, 0.0, None),
        (130.0, 20.0, "rank 7 takes 1.3x as long for data"),
        (130.0, 5.0, "rank 7 takes 1.3x as long"),
    ],
)
def test_the_terminal_names_a_rank_that_is_much_slower(slowest, wait, said):
    scalars = dict.fromkeys(["loss", "perplexity", "images_per_s", "captions_per_s", "data_wait_fraction"], 1.0)
    scalars |= {"slowest_rank": 7.0, "step_ms_slowest": slowest, "step_ms_median": 100.0}
    scalars |= {"data_wait_ms_slowest": wait, "data_wait_ms_median": 0.0}
    numbers = _numbers({f"train/{name}": value for name, value in scalars.items()})
    assert [number for number in numbers if "rank" in number] == ([said] if said else [])


def slow_reading(batches):
    """The dataset's steps, each of which takes longer to read."""
    read = batches.steps

    def steps(first, last):
        for micro_batches in read(first, last):
            time.sleep(SLEEP_S)
            yield micro_batches

    batches.steps = steps


def slow_computing(objective):
    """The objective's losses, each of which takes longer."""
    compute = objective.losses

    def losses(*arguments):
        computed = compute(*arguments)
        time.sleep(SLEEP_S)
        return computed

    object.__setattr__(objective, "losses", losses)


def train_with_a_slow_rank(config_path: Path, overrides: list[str], slow_at: str) -> None:
    from captioning.distributed.stop_signals import StopSignals
    from captioning.training import trainer

    fit = trainer.Trainer.fit

    def slow_fit(run):
        if run.ranks.rank == 1:
            slow_reading(run.batches) if slow_at == "reading" else slow_computing(run.train_step.objective)
        return fit(run)

    trainer.Trainer.fit = slow_fit
    trainer.train(load_config(config_path, overrides), StopSignals())


@pytest.mark.parametrize("slow_at", ["reading", "computing"])
def test_a_slow_rank_is_found_by_all(scene_shards, tmp_path, empty_config, slow_at):
    run = tmp_path / "run"
    sizes = {"train__total_steps": 6, "train__global_batch_size": 8, "train__micro_batch_size": 4}
    overrides = settings(scene_shards, run, **sizes, encoder__trainable="none", monitor__log_every_steps=2)
    in_processes(2, train_with_a_slow_rank, empty_config, overrides, slow_at)
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()

    def last(tag: str) -> float:
        return events.Scalars(f"train/{tag}")[-1].value

    assert last("slowest_rank") == 1
    assert last("step_ms") >= last("step_ms_slowest") >= 1e3 * SLEEP_S, "by the clock all wait for it"
    assert last("step_ms_median") < last("step_ms_slowest") - 1e3 * SLEEP_S / 2, "the other is faster by itself"
    waits_for_data = last("data_wait_ms_slowest") > 1e3 * SLEEP_S
    assert waits_for_data == (slow_at == "reading")
