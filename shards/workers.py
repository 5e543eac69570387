"""Processes that read ahead: torch's DataLoader, made to outlive stop signals and to end with the process it serves."""

import multiprocessing.util
import signal
from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

from shards.errors import InputError

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def read_ahead(dataset: Dataset, places: Iterable, num_workers: int, pin_memory: bool = False) -> Iterator[Any]:
    """``dataset[place]`` for every place, in their order, read ahead by ``num_workers`` processes (0: read here, when
    it is asked for).

    Raises:
        InputError: as the dataset raised it, in whichever process.
    """
    if num_workers:
        multiprocessing.util.Finalize(None, _end_workers, exitpriority=0)  # before multiprocessing's own farewell
    loader = _Loader(
        dataset,
        batch_size=None,
        sampler=places,
        num_workers=num_workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_parent,
        prefetch_factor=2 if num_workers else None,
    )
    try:
        yield from loader
    except InputError as error:  # DataLoader puts a worker's traceback before its words
        raise InputError(str(error).rpartition(f"{InputError.__name__}: ")[2].strip()) from None


class _Loader(DataLoader):
    def __iter__(self) -> Any:
        # Workers are forked with stop signals held back until they ignore them: torch's own handler, which they set
        # first, would let one end them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _unchanged(batch: Any) -> Any:
    """Instead of what DataLoader does to what is no batch yet: tuples become lists, arrays tensors."""
    return batch


def _leave_signals_to_the_parent(_worker: int) -> None:
    # A stop signal sent to the whole job must not kill the workers under the step that is being finished.
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    """A process that ends by an error still holds its workers, and multiprocessing would ask them to go by SIGTERM,
    which they ignore, and wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report the end of each as an error
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
