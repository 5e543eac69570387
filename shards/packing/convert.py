"""Images read and converted by worker processes, the results in the order asked for."""

import os
import signal
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, get_context, parent_process
from threading import Thread
from typing import Any, NamedTuple

from shards.images import UnreadableImageError, training_image
from shards.perceptual import bytes_hash, thumbnail
from shards.sources.arrays import stored_array
from shards.sources.image_files import ImageFiles
from shards.sources.records import Places

LEAVE_S = 2.0  # seconds for workers to end what they are at, after an error; killed at once, they break the pool
TOGETHER = 8  # images a task: a message each would cost more than it spreads


class Converted(NamedTuple):
    """An image as it is stored, the hash of the file it was made from, and what its perceptual hash is made from; of
    features, none."""

    data: bytes
    sha256: str
    thumbnail: bytes | None


class Converter:
    """``workers`` processes that make training JPEGs of the named images in ``places``, ``to_training_jpeg`` with
    (short side, quality, long side); of ``features``, .npy files as it says of them."""

    def __init__(
        self,
        places: Places,
        size_and_quality: tuple[int, int, int],
        workers: int,
        features: dict[str, Any] | None = None,
    ):
        # Forked workers would inherit whatever threads the caller runs; a fork server starts clean.
        context = get_context("forkserver")
        self._others = set(active_children())
        self._pool = ProcessPoolExecutor(workers, context, _start_worker, (places, size_and_quality, features))

    def __enter__(self) -> "Converter":
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self._pool.shutdown(wait=error is None, cancel_futures=True)
        if error is not None:  # a pool interrupted while it starts may never tell its workers to end, and wait for them
            deadline = time.monotonic() + LEAVE_S
            for worker in set(active_children()) - self._others:
                worker.join(max(0.0, deadline - time.monotonic()))
                worker.kill()

    def __call__(self, names: Iterable[str]) -> Iterator[Converted | str]:
        """The JPEG, or the reason why there is none, for each image."""
        return self._pool.map(_convert, names, chunksize=TOGETHER)


_images: ImageFiles  # of a worker process, set when it starts: an open zip cannot be sent with each task
_size_and_quality: tuple[int, int, int]
_features: dict[str, Any] | None


def _start_worker(places: Places, size_and_quality: tuple[int, int, int], features: dict[str, Any] | None) -> None:
    global _images, _size_and_quality, _features
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    Thread(target=_die_with_parent, daemon=True).start()
    _images, _size_and_quality, _features = ImageFiles(places), size_and_quality, features


def _die_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # killed: nobody will ask for anything more


def _convert(name: str) -> Converted | str:
    try:
        data = _images.read(name)
        sha256 = bytes_hash(data)  # first, while the processor's cache still holds the bytes
        if _features is not None:
            return Converted(stored_array(data, _features), sha256, None)
        jpeg, image = training_image(data, *_size_and_quality)
        return Converted(jpeg, sha256, thumbnail(image))
    except FileNotFoundError:
        return "file not found"
    except (OSError, ValueError, UnreadableImageError) as error:  # ValueError: a name no file can have
        return str(error)
