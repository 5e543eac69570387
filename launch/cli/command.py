"""What every command does alike: its parser, and how an InputError or Ctrl-C ends it."""

import argparse
import errno
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

from captioning.runs.progress import QUIET
from shards.errors import InputError, RetryError, brief, printable

BAD_INPUT = 2
MOST_LINES = 40  # of an error
_DISK_REFUSES = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
INTERRUPTED = 128 + signal.SIGINT
PREEMPTED = 75  # sysexits.h EX_TEMPFAIL: stopped by a signal, saved; the same command continues


def command_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of ``captioning NAME``, with the options that every command takes."""
    parser = argparse.ArgumentParser(
        prog=f"captioning {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quiet", action=_Quiet, nargs=0, help="only results, warnings and errors: no progress")
    return parser


class _Quiet(argparse.Action):
    def __call__(self, *_: object) -> None:
        be_quiet()


def be_quiet() -> None:
    """No progress from here on, in this process and those that it starts."""
    os.environ[QUIET] = "1"


def at_least_one(text: str) -> int:
    """An argument that is a whole number, at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: a whole number of at least 1 is wanted")
    return int(text)


def output_file(text: str) -> Path:
    """An argument that names a file to write: its folder must be there before the work, not after it."""
    path = Path(text)
    if not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(
            f"{text}: {'it is a folder' if path.is_dir() else 'its folder does not exist'}"
        )
    return path


def output_folder(text: str) -> Path:
    """An argument that names a folder to write into, there or not."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: it is a file, a folder is wanted")
    return path


class _StandardError(logging.Handler):
    """To whatever is standard error now: a progress bar puts itself in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # standard error may be a file on a full disk
            print(f"{record.levelname.lower()}: {printable(record.getMessage())}", file=sys.stderr, flush=True)


def _show_logs() -> None:
    for name in ("captioning", "launch", "shards"):
        if not (logger := logging.getLogger(name)).handlers:
            logger.addHandler(_StandardError())


def on_a_screen(message: str) -> str:
    """A message cut to what a terminal shows at once: a wrong file may be megabytes, and what it says in an error."""
    lines = [brief(line, 1000) if len(line) > 1000 else line for line in printable(message).splitlines()]
    return "\n".join(lines if len(lines) <= MOST_LINES else [*lines[:MOST_LINES], "..."])


def run(main: Callable[[], int | None]) -> None:
    """Run a command's ``main`` and exit with its status: 0 done, 2 bad input, 130 interrupted.

    A file that may not be read or written, or a full disk, is bad input too, wherever it is met. What the libraries log
    goes to standard error, one line "warning: ..." each.
    """
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupt)
    _show_logs()
    try:
        sys.exit(main() or 0)
    except InputError as error:
        message = str(error)
    except RetryError as error:
        print(f"error: {on_a_screen(str(error))}\nThe same command continues.", file=sys.stderr)
        sys.exit(PREEMPTED)
    except OSError as error:
        if error.errno not in _DISK_REFUSES:
            raise
        message = f"{error.filename or 'a file'}: {error.strerror}"
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one, while Python ends: no traceback of it either
        sys.exit(INTERRUPTED)
    if os.environ.get("RANK", "0") == "0":  # one message, not one a process
        print(f"error: {on_a_screen(message)}", file=sys.stderr)
    sys.exit(BAD_INPUT)


def _interrupt(_number: int, frame: FrameType | None) -> None:
    """Ctrl-C. While modules are imported the process ends at once: an exception there comes out as any other (a library
    that "failed to import"), or is lost in a callback."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt
