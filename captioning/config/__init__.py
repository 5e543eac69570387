"""A run's config: every setting with its default (sections.py), read from YAML and ``key.name=value`` overrides.

A config file holds only what differs from the defaults.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from captioning.config.limits import impossible
from captioning.config.sections import (
    DECODERS,
    ENCODERS,
    IDENTITY,
    SETTINGS,
    CheckpointConfig,
    Config,
    DataConfig,
    DecoderConfig,
    EncoderConfig,
    EncoderEntry,
    EvaluateConfig,
    MonitorConfig,
    OptimConfig,
    SelfCriticalConfig,
    TrainConfig,
)
from captioning.config.settings import build, merged, read_text, shown
from shards.errors import InputError, brief, listed

__all__ = [
    "DECODERS", "ENCODERS", "IDENTITY", "RENAMED", "SETTINGS", "CheckpointConfig", "Config", "DataConfig",
    "DecoderConfig", "EncoderConfig", "EncoderEntry", "EvaluateConfig", "MonitorConfig", "OptimConfig",
    "SelfCriticalConfig", "TrainConfig", "flat", "from_dict", "load_config", "load_saved", "save_text", "to_dict",
]  # fmt: skip

# What settings and their values were called before: an error for the old name tells the new one.
RENAMED = {
    "data.workers": "data.num_workers",
    "data.vocabulary_threshold": "data.min_word_freq",
    "data.hole_budget": "data.max_unreadable_fraction",
    "decoder.kind": "decoder.name",
    "decoder.attention_regulariser": "decoder.doubly_stochastic_weight",
    "optim.encoder_learning_rate": "optim.encoder_lr",
    "optim.decoder_learning_rate": "optim.decoder_lr",
    "optim.stage_decay": "optim.layerwise_lr_decay",
    "optim.clip_norm": "optim.max_grad_norm",
    "CIDEr-D": "CIDEr",
    "CIDEr, plain": "CIDEr-plain",
    "class accuracy": "class_accuracy",
}


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a user's YAML config and apply ``key.name=value`` overrides. OmegaConf's ``${...}`` in them is resolved,
    unless the file lies in a run or an exported folder.

    Raises:
        InputError: listing every unknown key (with the nearest right one), ill-typed and impossible value at once.
    """
    given = overrides or []
    malformed = [item for item in given if "=" not in item or item.startswith(("=", "-"))]
    if malformed:
        raise InputError(f"Overrides are written key.name=value; these are not:\n{listed(map(shown, malformed))}")
    path = Path(path)
    is_own = not (path.parent / "vocabulary.json").exists()
    values = merged(read_text(path), _replacing(given), brief(path), resolve=is_own)
    return from_dict(values, f"{brief(path)} and its overrides" if given else brief(path))


def load_saved(path: Path) -> Config:
    """Read the config of a run, a checkpoint or an exported folder, whoever made it: nothing in it is resolved.

    Raises:
        InputError: see ``load_config``.
    """
    return from_dict(merged(read_text(path), [], str(path), resolve=False), str(path))


def _replacing(overrides: list[str]) -> list[str]:
    """With an override of a run's length taking the place of the other way to give it, where that came earlier."""
    other = {"train.epochs": "train.total_steps", "train.total_steps": "train.epochs"}
    every: list[str] = []
    for item in overrides:
        key, _, value = item.partition("=")
        if key in other and value not in ("", "null"):
            every.append(f"{other[key]}=null")
        every.append(item)
    return every


def from_dict(values: Any, where: str) -> Config:
    """A Config from nested dictionaries; see ``load_config``.

    Raises:
        InputError: listing every mistake at once.
    """
    config, mistakes = build(Config, values, RENAMED)
    told = {mistake.split(":")[0] for mistake in mistakes}
    mistakes += [mistake for mistake in impossible(config) if mistake.split(":")[0] not in told]
    if mistakes:
        raise InputError(f"{len(mistakes)} mistake(s) in {where}:\n{listed(mistakes, limit=20)}")
    return config


def to_dict(config: Config) -> dict[str, Any]:
    return asdict(config)


def save_text(config: Config) -> str:
    """The whole config as YAML, defaults and all."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def flat(config: Config) -> dict[str, Any]:
    """Dotted key -> value of every setting."""
    return {
        f"{section}.{name}" if isinstance(value, dict) else section: inner
        for section, value in to_dict(config).items()
        for name, inner in (value.items() if isinstance(value, dict) else [("", value)])
    }
