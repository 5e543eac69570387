"""How many processes read, and evaluation's batches through them; a ShardDataset has its own loader."""

from collections.abc import Iterator

from captioning.config import Config
from captioning.data.collate import ImageBatch
from captioning.data.dataset import EvaluationBatches
from captioning.distributed.ranks import cores_per_rank, ranks_per_machine
from shards.workers import READ_AHEAD, free_shared_memory, read_ahead


def loader_workers(config: Config) -> int:
    """Loader processes a rank: as configured, else one for each core of the rank but one, which is for the rank itself;
    fewer where their batches would take more than half of the free shared memory."""
    if config.data.num_workers is not None:
        return config.data.num_workers
    batch_bytes = config.train.micro_batch_size * 3 * config.data.image_size**2
    fitting = free_shared_memory() // 2 // ranks_per_machine() // (READ_AHEAD * batch_bytes)
    return max(0, min(cores_per_rank() - 1, fitting))


def evaluation_loader(
    batches: EvaluationBatches, start: int, stop: int, batch_size: int, workers: int, pin_memory: bool = False
) -> Iterator[ImageBatch]:
    """Samples start..stop-1 in batches of at most ``batch_size``, each once.

    Raises:
        InputError: when an ``.idx`` cannot be read, or a shard by no means that are installed.
    """
    parts = [(a, min(stop, a + batch_size)) for a in range(start, stop, batch_size)]
    return read_ahead(batches, parts, min(workers, len(parts)), pin_memory)
