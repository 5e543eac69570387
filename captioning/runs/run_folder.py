"""The run folder itself: held by one run at a time, says how that run stands, keeps logs that fit the resumed step."""

import errno
import fcntl
import os
import re
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from shards.errors import InputError
from shards.files import write_atomically


def lock(run: Path, patience_s: float = 30.0, meanwhile: Callable[[], None] = lambda: None) -> TextIO:
    """Hold a run folder against a second start, until this process ends however it ends (flock).

    Waits a while first: processes that were told to stop may still be saving. ``meanwhile`` is called now and then, and
    ends the wait by raising.

    Raises:
        InputError: when another process still holds it after ``patience_s`` seconds.
    """
    file = (run / "lock").open("a+", encoding="utf-8")
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                break  # a file system without locks: nothing to hold on to
            if time.monotonic() > deadline:
                file.seek(0)
                holder = file.read().strip()
                raise InputError(
                    f"run={run} is being trained by {holder}. Stop that one first, or choose another run=FOLDER."
                ) from error
            meanwhile()
            time.sleep(0.2)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def set_status(run: Path, status: str, detail: str = "") -> None:
    """Write ``RUN/status``: first line running, finished, preempted or failed; then details. Scripts read it."""
    write_atomically(run / "status", f"{status}\n{detail}\n".encode())


def status(run: Path) -> tuple[str, str]:
    """First line and details of ``RUN/status``; empty where no run has begun."""
    path = run / "status"
    first, _, detail = path.read_text(encoding="utf-8").partition("\n") if path.is_file() else ("", "", "")
    return first, detail.strip()


def note_saved(run: Path, step: int) -> None:
    """Note in the run folder itself that a checkpoint of this step is on disk: ``checkpoints/`` may be a mount."""
    write_atomically(run / "saved-step", f"{step}\n".encode())


def last_saved_step(run: Path) -> int:
    """The step of which a checkpoint must be there, by what the run folder tells; 0 where none was written yet."""
    told = [re.match(r"step (\d{1,18}) of \d+", status(run)[1])]  # a run that stopped has saved where it stopped
    with suppress(OSError, UnicodeDecodeError):
        told.append(re.match(r"(\d{1,18})\n", (run / "saved-step").read_text(encoding="utf-8")))
    return max((int(match[1]) for match in told if match), default=0)


def cut_after(path: Path, is_kept: Callable[[str], bool]) -> None:
    """Drop a log's lines that a resumed run will write again; a half-written last line goes too, and any that
    ``is_kept`` cannot read: a power cut may leave zeros where lines were not yet on the disk."""

    def kept(line: str) -> bool:
        try:
            return is_kept(line)
        except (ValueError, LookupError, TypeError):
            return False

    *lines, _ = path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    write_atomically(path, "".join(f"{line}\n" for line in lines if kept(line)).encode(errors="surrogateescape"))
