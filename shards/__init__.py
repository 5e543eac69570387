"""Datasets as WebDataset tar shards: packing, indexing, the order of an epoch, reading; ``ShardDataset`` for training.

    from shards import ShardDataset

The rest knows bytes, not tensors: torch is imported when one of the names below is first asked for.
"""

from typing import TYPE_CHECKING, Any

from shards.errors import InputError

if TYPE_CHECKING:
    from shards.dataset import Batch, EpochSample, Part, ShardDataset, stack
    from shards.reader import UnreadableSample

__all__ = ["Batch", "EpochSample", "InputError", "Part", "ShardDataset", "UnreadableSample", "stack"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from shards import dataset

    return getattr(dataset, name)
