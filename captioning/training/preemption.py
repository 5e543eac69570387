"""Stop signals: noted when they come, acted on between steps, agreed by all ranks."""

import signal

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """From its making on, SIGTERM, SIGINT and SIGUSR1 no longer kill this process: they set ``received``.

    The ranks learn of each other's through the numbers they sum before every step, so that all stop before the same
    one, whichever of them was told, and however often.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        for number in STOPPING:
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: object) -> None:
        self.received = signal.Signals(number).name
