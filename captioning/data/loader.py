"""How many processes read, and evaluation's batches through them; a ShardDataset has its own loader."""

import os
from collections.abc import Iterator

from captioning.config import Config
from captioning.data.collate import ImageBatch
from captioning.data.dataset import EvaluationBatches
from shards.workers import read_ahead


def loader_workers(config: Config) -> int:
    """Loader processes a rank: as configured, else this machine's cores shared by its ranks, one left for each rank."""
    if config.data.num_workers is not None:
        return config.data.num_workers
    cores = len(os.sched_getaffinity(0))
    return max(0, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))


def evaluation_loader(
    batches: EvaluationBatches, start: int, stop: int, batch_size: int, workers: int, pin_memory: bool = False
) -> Iterator[ImageBatch]:
    """Samples start..stop-1 in batches of at most ``batch_size``, each once.

    Raises:
        InputError: when an ``.idx`` cannot be read, or a shard by no means that are installed.
    """
    parts = [(a, min(stop, a + batch_size)) for a in range(start, stop, batch_size)]
    return read_ahead(batches, parts, min(workers, len(parts)), pin_memory)
