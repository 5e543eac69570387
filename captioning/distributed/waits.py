"""Seconds in which a device had nothing to do because this process waited for something."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Waits:
    """``with waits():`` around what is waited for; ``seconds`` says how long, of all times since ``reset``.

    A GPU may have work for a part of that time, or for all of it: its own events tell, which it passes when the work
    given to it before is done. Without a GPU it is the clock's time.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self.reset()

    def reset(self) -> None:
        self._on_device: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._by_clock = 0.0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """One time of waiting."""
        started, before = time.perf_counter(), self._event()
        yield
        after = self._event()
        if before is None or after is None:
            self._by_clock += time.perf_counter() - started
        else:
            self._on_device.append((before, after))

    def _event(self) -> torch.cuda.Event | None:
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self) -> float:
        """Waits for the device's last event."""
        if self._on_device:
            self._on_device[-1][1].synchronize()
        return self._by_clock + sum(before.elapsed_time(after) for before, after in self._on_device) / 1e3
