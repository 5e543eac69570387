"""Saving while training goes on: the state is copied at once, and a thread writes the copy."""

import copy
import ctypes
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captioning.runs import checkpoint
from captioning.runs.checkpoint import RunState
from captioning.runs.mirror import Mirror


class Saver:
    """Writes the checkpoints of a run, on rank 0, one at a time.

    With ``background`` the loop waits for a copy in memory alone (the state's size once more, kept from save to save);
    without it, for the disk. The interpreter does not exit before a write has ended. Nothing the thread does holds the
    interpreter for long: see ``hashed_file``.
    """

    def __init__(self, run: Path, texts: dict[str, str], keep: int, background: bool, mirror: Mirror | None = None):
        self._run, self._texts, self._keep, self._background = run, texts, keep, background
        self._mirror = mirror
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[Path] | None = None
        self._room: Future[Any] | None = None
        self._copy: Any = None

    @property
    def is_writing(self) -> bool:
        return self._writing is not None and not self._writing.done()

    def make_room(
        self, model: dict[str, Tensor], optimizer: dict[str, Any], average: dict[str, Tensor] | None = None
    ) -> None:
        """Begin to set aside memory for the copies, in the thread: the first save does not wait for it then."""
        if self._background:
            self._room = self._thread.submit(_room_for, (model, optimizer, average))

    def start(
        self,
        state: RunState,
        model: dict[str, Tensor],
        optimizer: dict[str, Any],
        average: dict[str, Tensor] | None = None,
    ) -> None:
        """Begin to write; what is given may change as soon as this returns. An earlier save must be finished."""
        assert self._writing is None
        if self._background:
            if self._room is not None:
                self._copy, self._room = self._room.result(), None
            with _one_thread():
                self._copy = _copied((model, optimizer, average), self._copy)
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # the copies from the device were only begun
            model, optimizer, average = self._copy
        self._writing = self._thread.submit(self._write, state, model, optimizer, average)
        if not self._background:
            self._writing.exception()  # waits

    def _write(self, state: RunState, model: Any, optimizer: Any, average: Any) -> Path:
        written = checkpoint.save(self._run, state, model, optimizer, self._texts, self._keep, average)
        if self._mirror is not None:
            self._mirror.upload_later(written)
        return written

    def close(self, patience_s: float) -> None:
        """Wait for the write, if there is one, and for its upload to the mirror."""
        self.finish()
        if self._mirror is not None:
            self._mirror.close(patience_s)

    def finish(self) -> str | None:
        """Wait for the write, if there is one; what the disk objected to, None when all is well."""
        writing, self._writing = self._writing, None
        try:
            if writing is not None:
                writing.result()
        except OSError as error:
            return str(error)
        return None


@contextmanager
def _one_thread() -> Iterator[None]:
    """Within, this thread computes alone. Copying is bound by memory, and where others use the cores too, each tensor
    waits for the slowest thread: 75 of 4 MB took 580 ms with two threads on two busy cores, 20 ms with one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _room_for(value: Any) -> Any:
    """Memory for a copy of every tensor in ``value``: pages that are there, not just promised."""
    if isinstance(value, Tensor):
        place = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        ctypes.memset(place.data_ptr(), 0, place.nbytes)  # lets other threads run, and needs no others
        return place
    if isinstance(value, dict):
        return {name: _room_for(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_room_for, value))
    return None


def _copied(value: Any, earlier: Any) -> Any:
    """``value`` with every tensor copied to the CPU, into the memory of an earlier copy where that fits."""
    if isinstance(value, Tensor):
        fits = isinstance(earlier, Tensor) and (earlier.shape, earlier.dtype) == (value.shape, value.dtype)
        place = earlier if fits else torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return place.copy_(value.detach(), non_blocking=True)
    if isinstance(value, dict):
        parts = earlier if isinstance(earlier, dict) else {}
        return {name: _copied(part, parts.get(name)) for name, part in value.items()}
    if isinstance(value, list | tuple):
        old = earlier if isinstance(earlier, list | tuple) else ()
        return type(value)(_copied(part, known) for part, known in zip_longest(value, old[: len(value)]))
    return copy.deepcopy(value)
