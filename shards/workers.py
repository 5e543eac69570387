"""Processes that read ahead: torch's DataLoader, made to outlive stop signals and to end with the process it serves."""

import errno
import multiprocessing.connection
import multiprocessing.queues
import multiprocessing.util
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

from shards.errors import InputError

READ_AHEAD = 2  # batches of each worker, in shared memory
_SHM = "/dev/shm"
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
        # Named, since Python 3.14 has another default: forked workers begin in milliseconds, without importing torch
        # again, share the index's memory, take any decode function, and hold back stop signals from their first moment.
        multiprocessing_context="fork" if num_workers else None,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        worker_init_fn=_set_up_worker,
        prefetch_factor=READ_AHEAD if num_workers else None,
    )
    try:
        yield from loader
    except InputError as error:  # DataLoader puts a worker's traceback before its words
        raise InputError(str(error).rpartition(f"{InputError.__name__}: ")[2].strip()) from None
    except (ConnectionError, EOFError, FileNotFoundError) as error:  # a batch whose worker is gone with its memory
        if str(error).startswith("Caught ") or (lost := loader.lost()) is None:
            raise
        raise lost from error
    except RuntimeError as error:
        if not str(error).endswith("exited unexpectedly") or (lost := loader.lost()) is None:
            raise
        raise lost from error  # torch noticed that a worker is gone before it learned how it ended


class _Loader(DataLoader):
    _running: Any = None

    def lost(self) -> RuntimeError | None:
        """What torch would say of a worker that has ended by itself; None when none has."""
        workers = getattr(self._running, "_workers", [])
        gone = multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=5)
        for worker in workers:
            if worker.sentinel in gone:
                worker.join(5)  # its pipes close a moment before it has an exit code
            if worker.exitcode and worker.exitcode < 0:
                name = signal.strsignal(-worker.exitcode)
                return RuntimeError(f"DataLoader worker (pid {worker.pid}) is killed by signal: {name}. ")
            if worker.exitcode:
                said = f"exited unexpectedly with exit code {worker.exitcode}. "
                return RuntimeError(f"DataLoader worker (pid {worker.pid}) {said}")
        return None

    def __iter__(self) -> Any:
        # Workers are forked with stop signals held back until they ignore them: torch's own handler, which they set
        # first, would let one end them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        try:
            self._running = super().__iter__()
            return self._running
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _unchanged(batch: Any) -> Any:
    """Instead of what DataLoader does to what is no batch yet: tuples become lists, arrays tensors."""
    return batch


def lost_worker(error: BaseException) -> tuple[str, bool] | None:
    """Whether an error of this process says that a worker is gone: what happened and what to do, and whether the same
    may go well another time. None for other errors. torch raises it wherever the process happens to be."""
    text = str(error)
    if not (isinstance(error, RuntimeError) and text.startswith("DataLoader worker (pid")):
        return None
    if f"exit code {errno.ENOSPC}." in text or "Bus error" in text:
        return (
            f"The loader's workers have too little shared memory: {_SHM} has {free_shared_memory() / 1e6:,.0f} MB "
            "free. Give the container more (docker run --shm-size=8g; Kubernetes: an emptyDir of medium Memory there), "
            "or lower num_workers; 0 needs none.",
            False,
        )
    if re.search("killed by signal: (Killed|Terminated)|exited unexpectedly$", text):
        return "A loader worker was killed; out of memory? Then lower num_workers, or ask for more memory.", True
    return None


def free_shared_memory() -> int:
    """Bytes that batches may still take on their way from workers."""
    try:
        return shutil.disk_usage(_SHM).free
    except OSError:
        return 0


def _end_for_want_of_memory(error: BaseException, _batch: object) -> None:
    """Of a queue whose thread cannot send a batch. Python's would print that and drop the batch, for which the loop
    would wait for ever."""
    out_of_memory = "shared memory" in str(error) or getattr(error, "errno", None) == errno.ENOSPC
    if not out_of_memory:
        print(f"error: a batch cannot be sent: {error}", file=sys.stderr, flush=True)
    os._exit(errno.ENOSPC if out_of_memory else 1)


def _set_up_worker(_worker: int) -> None:
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_for_want_of_memory)  # type: ignore
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
