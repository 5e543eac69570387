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

from shards.errors import InputError, brief
from shards.files import parse_json, write_atomically

SCRATCH = "mirror.tmp"  # in the folder: a checkpoint that is being fetched


class RunFolder:
    """A run's folder: who holds it, how the run stands, and which lines of its logs a resumed run keeps.

    ``with RunFolder(path) as folder`` lets go of it at the end. Until ``hold`` it may be read, and is somebody else's.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._lock: TextIO | None = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @property
    def is_held(self) -> bool:
        """Whether this object holds it; its status is then its own to write."""
        return self._lock is not None

    @property
    def is_new(self) -> bool:
        """Nothing is in it but what a start leaves that was stopped at once; or it is not there."""
        left = ("lock", "status", "config.yaml", SCRATCH.removesuffix(".tmp"))
        return not self.path.exists() or all(path.name.removesuffix(".tmp") in left for path in self.path.iterdir())

    @property
    def is_run(self) -> bool:
        """A run began here: only then, or when it is new, may anything be written into it."""
        return (self.path / "config.yaml").is_file()

    def hold(self, patience_s: float = 30.0, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Make it, if need be, and hold it against a second start until the end of the ``with``, or of the process,
        however that ends (flock).

        Waits a while first: processes that were told to stop may still be saving. ``meanwhile`` is called now and then,
        and ends the wait by raising.

        Raises:
            InputError: when another process still holds it after ``patience_s`` seconds.
        """
        if self.is_held:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        file = (self.path / "lock").open("a+", encoding="utf-8")
        deadline = time.monotonic() + patience_s
        try:
            while not _locked(file):
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise InputError(
                        f"run={self.path} is being trained by {brief(file.read())}. Stop that one first, or choose "
                        "another run=FOLDER."
                    )
                meanwhile()
                time.sleep(0.2)
        except BaseException:
            file.close()
            raise
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self._lock = file

    def hold_if_free(self) -> None:
        """Hold the folder of a run that was stopped before it was prepared, to say so there; not that of others."""
        with suppress(InputError, OSError):
            if self.is_new or self.is_run:
                self.hold(patience_s=0)

    def set_status(self, status: str, detail: str = "") -> None:
        """Write ``RUN/status``: first line running, finished, preempted or failed; then details. Scripts read it."""
        write_atomically(self.path / "status", f"{status}\n{detail}\n".encode())

    def status(self) -> tuple[str, str]:
        """First line and details of ``RUN/status``; empty where no run has begun."""
        path = self.path / "status"
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        first, _, detail = text.partition("\n")
        return first, detail.strip()

    def last_saved_step(self) -> int:
        """The step whose checkpoint must be there, by the folder's records; 0 where none was written yet."""
        told = [re.match(r"step (\d{1,18}) of \d+", self.status()[1])]  # a run that stopped has saved where it stopped
        with suppress(OSError, UnicodeDecodeError):
            told.append(re.match(r"(\d{1,18})\n", (self.path / "saved-step").read_text(encoding="utf-8")))
        return max((int(match[1]) for match in told if match), default=0)

    def cut_logs(self, step: int, evaluated_step: int) -> None:
        """Drop what a resumed run will write again: every rank's ledger after ``step``, scores after
        ``evaluated_step``. Done by rank 0 alone, before any rank writes."""
        for path in (self.path / "ledger").glob("rank-*.txt"):
            cut_after(path, lambda line: int(line.split("\t", 1)[0]) <= step)
        if (scores := self.path / "scores.jsonl").exists():
            cut_after(scores, lambda line: parse_json(line)["step"] <= evaluated_step)


def _locked(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)  # else: a file system without locks, nothing to hold
    return True


def note_saved(run: Path, step: int) -> None:
    """Note in the run folder itself that a checkpoint of this step is on disk: ``checkpoints/`` may be a mount."""
    write_atomically(run / "saved-step", f"{step}\n".encode())


def cut_after(path: Path, is_kept: Callable[[str], bool]) -> None:
    """Drop a log's lines that a resumed run will write again; a half-written last line goes too, and any that
    ``is_kept`` cannot read: a power cut may leave zeros where lines were not yet on the disk."""

    def kept(line: str) -> bool:
        try:
            return is_kept(line)
        except (ValueError, LookupError, TypeError):
            return False

    before = path.read_bytes()
    *lines, _ = before.decode(errors="surrogateescape").split("\n")
    after = "".join(f"{line}\n" for line in lines if kept(line)).encode(errors="surrogateescape")
    if after == before[: len(after)]:
        os.truncate(path, len(after))  # in a moment, and on a full disk too
    else:
        write_atomically(path, after)
