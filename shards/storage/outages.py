"""Storage that does not answer is waited for, with growing pauses, and people are told once.

What passes (a broken connection, a busy server, a network file system that is away) is not an answer: only an
answer can make a sample unreadable. Whoever waits says so in memory that a process shares with those it forks, so that
a rank can tell a loader that waits for storage from one that hangs.
"""

import errno
import logging
import mmap
import time
from collections.abc import Callable
from typing import TypeVar

from shards.errors import InputError

FIRST_WAIT = 0.5  # seconds; doubled after each failure
LONGEST_WAIT = 30.0
LEAST_ATTEMPTS = 3  # also where one that hangs uses up all patience
TELL_AFTER = 5.0  # seconds without an answer
# What the system says of files on a network that is away, or of a process that is short of something for a moment.
_AWAY = frozenset((
    errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN, errno.ECONNRESET, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.EREMOTEIO, errno.EAGAIN, errno.EMFILE, errno.ENFILE,
))  # fmt: skip
_T = TypeVar("_T")
_log = logging.getLogger(__name__)
_patience = 7.5  # seconds; a command that somebody sits before should not wait long for a mistyped address
_shared = memoryview(mmap.mmap(-1, 16)).cast("d")  # when somebody last waited, until when the outage is known; forked


class PassingError(OSError):
    """Worth another attempt, after ``retry_after`` seconds where the storage names a time."""

    def __init__(self, message: str, retry_after: float = 0.0):
        super().__init__(message)
        self.retry_after = retry_after


def set_patience(seconds: float) -> None:
    """How long this process, and those it forks from now on, wait for storage that does not answer."""
    global _patience
    _patience = seconds


def last_wait() -> float:
    """When (``time.monotonic``) this process or one it forked last waited for storage; 0 if never."""
    return _shared[0]


def is_passing(error: OSError) -> bool:
    """Whether an error may be gone at the next attempt: the storage did not answer."""
    return isinstance(error, ConnectionError | TimeoutError | PassingError) or error.errno in _AWAY


def waited_for(attempt: Callable[[], _T]) -> _T:
    """What ``attempt`` returns, called again for as long as the storage does not answer.

    Raises:
        OSError: from ``attempt``, when it is an answer.
        InputError: when there was no answer in the whole of ``data.storage_patience_seconds``.
    """
    began, pause, told, attempts = time.monotonic(), FIRST_WAIT, False, 0
    while True:
        attempts += 1
        try:
            result = attempt()
        except OSError as error:
            if not is_passing(error):
                raise
            left = began + _patience - time.monotonic()
            if left <= 0 and attempts >= LEAST_ATTEMPTS:
                raise InputError(
                    f"{error}\nIt cannot be read: no answer for {_patience:g} s (data.storage_patience_seconds). Check "
                    "the storage and its address, then give the same command again."
                ) from error
            told = _tell(error, time.monotonic() - began) or told
            _sleep(min(max(left, FIRST_WAIT), max(pause, getattr(error, "retry_after", 0.0))))
            pause = min(2 * pause, LONGEST_WAIT)
            continue
        if told:
            _shared[1] = 0.0
            _log.warning("storage answers again, after %.0f s", time.monotonic() - began)
        return result


def _tell(error: OSError, waited: float) -> bool:
    """Say that there is an outage, unless this process or a relative just did; whether this call did."""
    if waited < TELL_AFTER:
        return False
    known, _shared[1] = time.monotonic() < _shared[1], time.monotonic() + 2 * LONGEST_WAIT
    if not known:
        _log.warning(
            "storage does not answer: %s. Waiting for up to %g s (data.storage_patience_seconds)", error, _patience
        )
    return not known


def _sleep(seconds: float) -> None:
    """Wait, and say all the while that this is a wait."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        _shared[0] = time.monotonic()
        time.sleep(min(1.0, left))
    _shared[0] = time.monotonic()
