"""Which checkpoint is the best, what to do with it, and when there is no hope of a better one: pure functions of the
run's state."""

import math
from dataclasses import replace
from pathlib import Path

from captioning.config import EvaluateConfig
from captioning.runs.checkpoint import RunState
from shards.errors import InputError


def update_best(state: RunState, config: EvaluateConfig, values: dict[str, float]) -> RunState:
    """The state after a validation that found ``values``, by name.

    Raises:
        InputError: when ``evaluate.best_metric`` is not among them.
    """
    if config.best_metric not in values:
        raise InputError(
            f"evaluate.best_metric={config.best_metric} is none of this run's values. "
            f"Choose one of {', '.join(values)}."
        )
    value, best = values[config.best_metric], state.best_score
    lower_is_better = config.best_metric == "loss"
    better = best is None or (value < best if lower_is_better else value > best)
    state = replace(state, evaluated_step=state.step)
    if better and not math.isnan(value):
        return replace(state, best_score=value, best_step=state.step, validations_since_best=0)
    return replace(state, validations_since_best=state.validations_since_best + 1)


def why_stop_early(state: RunState, config: EvaluateConfig) -> str | None:
    """Why the run should end before its last step; None while it should go on."""
    if config.patience is None or state.validations_since_best < config.patience:
        return None
    best = "none" if state.best_score is None else f"{state.best_score:.4f} at step {state.best_step}"
    return f"no better {config.best_metric} in {state.validations_since_best} validations (best: {best})"


def closing_summary(run: Path, state: RunState, config: EvaluateConfig) -> str:
    """Where the best checkpoint of a finished run is, and what to do next."""
    step, which = state.step, "last checkpoint (none was scored)"
    if state.best_step is not None:
        step, which = state.best_step, f"best checkpoint ({config.best_metric} {state.best_score:.4f})"
    return (
        f"{which}: {run}/checkpoints/step-{step:08d}\n"
        f"next:  captioning caption {run} IMAGE|DIR ...    captions of your images\n"
        f"       captioning evaluate {run}    all scores, with intervals\n"
        f"       captioning report {run}    everything about the run on one page"
    )
