"""Whole files from anywhere: HTTP, what fsspec opens, and the output of ``pipe:`` commands."""

import os
import selectors
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from shards.errors import InputError, reason_of
from shards.storage import http_ranges as ranges
from shards.storage.urls import Url

PIPE_TIMEOUT = 120.0  # seconds in which a command must give its next byte
_CHUNK = 1 << 20
_ANSWERS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, InputError)  # of fsspec


def stream(url: Url) -> Iterator[bytes]:
    """A file's bytes in chunks; one attempt.

    Raises:
        OSError: when it is missing, or cannot be read to its end.
        InputError: for a scheme that nothing installed can open.
    """
    if url.is_http:
        return ranges.stream(url)
    return _pipe(url) if url.scheme == "pipe" else _fsspec(url)


def size(url: Url) -> int | None:
    """A file's size in bytes; None where only reading it would tell.

    Raises:
        OSError: when it is missing or cannot be reached.
        InputError: for a scheme that nothing installed can open.
    """
    if url.is_http:
        return ranges.size(url)
    if url.scheme == "pipe":
        return None
    filesystem, path = _filesystem(url)
    try:
        return filesystem.info(path)["size"]
    except _ANSWERS:
        raise
    except Exception as error:  # each of fsspec's file systems has errors of its own
        raise ConnectionError(f"{url}: {type(error).__name__}: {error}") from error


def _fsspec(url: Url) -> Iterator[bytes]:
    filesystem, path = _filesystem(url)
    try:
        with filesystem.open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk
    except _ANSWERS:
        raise
    except Exception as error:  # see above
        raise ConnectionError(f"{url}: {type(error).__name__}: {error}") from error


def _filesystem(url: Url) -> tuple[Any, str]:
    import fsspec  # which torch brings; its packages for s3:// and gs:// are the user's to install

    try:
        return fsspec.core.url_to_fs(url.text)
    except OSError as error:  # it connects as it is made
        raise ConnectionError(f"{url}: {reason_of(error)}") from error
    except Exception as error:  # reference://, dir:// and others are none to be opened by an address alone
        raise InputError(f"{url} cannot be opened: {reason_of(error)}") from error


def _pipe(url: Url) -> Iterator[bytes]:
    """What a command prints. It runs in a shell, as webdataset has it: the user wrote it."""
    command = url.text.removeprefix("pipe:")
    process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    try:
        with selectors.DefaultSelector() as waiting:
            waiting.register(process.stdout, selectors.EVENT_READ)
            while True:
                if not waiting.select(PIPE_TIMEOUT):
                    raise TimeoutError(f"{url} gave no byte for {PIPE_TIMEOUT:.0f} s")
                if not (chunk := os.read(process.stdout.fileno(), _CHUNK)):
                    break
                yield chunk
        if status := process.wait(PIPE_TIMEOUT):
            raise ConnectionError(f"{url} ended with status {status}")
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"{url} does not end") from error
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()
