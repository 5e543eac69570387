"""Image captioning: train on shards with any number of processes, caption, evaluate.

    import captioning

    model = captioning.Predictor.from_checkpoint("runs/demo/run")
    print(model.caption("photo.jpg"))

Names are imported when they are first asked for: ``import captioning`` alone does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from captioning.version import __version__

if TYPE_CHECKING:
    from captioning.config import Config, load_config
    from captioning.inference.evaluate_run import evaluate
    from captioning.inference.predictor import Caption, Predictor
    from captioning.model.search import SearchOptions
    from captioning.training.trainer import train
    from shards.errors import InputError

_HOMES = {
    "Caption": "captioning.inference.predictor",
    "Config": "captioning.config",
    "InputError": "shards.errors",
    "Predictor": "captioning.inference.predictor",
    "SearchOptions": "captioning.model.search",
    "evaluate": "captioning.inference.evaluate_run",
    "load_config": "captioning.config",
    "train": "captioning.training.trainer",
}
__all__ = [
    "Caption",
    "Config",
    "InputError",
    "Predictor",
    "SearchOptions",
    "__version__",
    "evaluate",
    "load_config",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'captioning' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
