"""Stop signals: noted when they come, acted on between steps, agreed by all ranks."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
LAUNCHER = "CAPTIONING_LAUNCHER"  # in the environment of the processes that `captioning train` starts: its process id


def heeded() -> list[signal.Signals]:
    """The stop signals that mean this process: under nohup, SIGHUP does not."""
    return [n for n in STOPPING if n != signal.SIGHUP or signal.getsignal(signal.SIGHUP) != signal.SIG_IGN]


class StoppedError(Exception):
    """A rank was told to stop, and all have agreed to; says by what."""


def stopped_by(received: list[str | None]) -> StoppedError:
    """The error to raise once the ranks agree that one of them was told to stop; ``received`` by every rank."""
    return StoppedError(next(why for why in received if why))


class StopSignals:
    """From its making on, SIGTERM, SIGINT, SIGUSR1 and SIGHUP no longer kill this process: they are noted.

    The ranks learn of each other's through the numbers they sum before every step, so that all stop before the same
    one, whichever of them was told, and however often. Make it before the imports that take seconds.
    """

    def __init__(self) -> None:
        self._signal: str | None = None
        # Killing a launcher leaves its ranks running, and the user's next start would find them in its run folder.
        launcher = os.environ.get(LAUNCHER, os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None)
        self._launcher = int(launcher) if launcher is not None else None
        for number in heeded():
            signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)  # a launcher may have held them back until here

    def _note(self, number: int, _frame: object) -> None:
        if self._signal is None and os.environ.get("RANK", "0") == "0":
            # os.write: what was interrupted may be a print.
            name = signal.Signals(number).name
            with suppress(OSError):  # standard error may be a file on a full disk
                os.write(2, f"\n{name}: saving and stopping at the end of this step\n".encode())
        self._signal = signal.Signals(number).name

    def ignore(self) -> None:
        """All is saved and said: as it exits, Python would let go of its handlers, and a signal would kill again."""
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)

    @property
    def received(self) -> str | None:
        """Why this process should stop: a signal's name, or the launcher's death; None while it should go on."""
        if self._launcher is not None and os.getppid() != self._launcher:
            return "the end of its launcher"
        return self._signal


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Stop signals are noted inside the block alone: for a process that does other things after it."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    try:
        yield StopSignals()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
