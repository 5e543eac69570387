"""When nothing moves any more: every rank says where it stands, and one of them says who keeps the others waiting."""

import faulthandler
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from captioning.distributed.ranks import Ranks
from shards.storage.outages import last_wait

logger = logging.getLogger(__name__)
PATIENCE_S = 10.0  # at most, between a rank's own report and its judgement of the others'
_FIRST_LINE = re.compile(r"rank (\d+), place (\d+): (.*)")


class Watchdog:
    """A thread that looks whether this rank still moves. To wait for storage that is away is to move.

    All ranks pass the same places in the same order, so whoever has passed fewer is the one the others wait for. After
    ``hang_seconds`` at one place a rank writes where it is, and the stack of its threads, to standard error and to
    ``RUN/hang-rank-R.txt``; the lowest rank that could do so reads the others' and names those behind. It ends nothing:
    the time limit of the exchanges, a little longer (``ranks.init_distributed``), does.
    """

    def __init__(self, run: Path, ranks: Ranks, hang_seconds: int | None, samples_of: Callable[[int], str]):
        self._run, self._ranks, self._hang_seconds, self._samples_of = run, ranks, hang_seconds, samples_of
        self._places, self._step, self._what, self._since = 0, 0, "starting", time.monotonic()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._hang_seconds:
            if self._ranks.is_main:
                for path in self._run.glob("hang-rank-*.txt"):
                    with suppress(OSError):
                        path.unlink()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def at(self, step: int, what: str) -> None:
        """This rank moves: it is in step ``step`` (counted from 1) and about to do ``what``."""
        self._places, self._step, self._what, self._since = self._places + 1, step, what, time.monotonic()

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        limit, reported = float(self._hang_seconds or 0), -1
        while not self._closed.wait(min(1.0, limit / 10)):
            if self._places != reported and time.monotonic() - max(self._since, last_wait()) > limit:
                reported = self._places
                try:
                    self._report()
                    if not self._closed.wait(min(PATIENCE_S, limit / 2)) and self._places == reported:
                        self._judge()
                except OSError as error:
                    logger.warning(
                        f"rank {self._ranks.rank} hangs in step {self._step}, {self._what}, and {self._run} cannot be "
                        f"written: {error}"
                    )
                    faulthandler.dump_traceback(all_threads=True)

    def _report(self) -> None:
        path = self._path(self._ranks.rank)
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.write(
                f"rank {self._ranks.rank}, place {self._places}: step {self._step}, {self._what}\n"
                f"for {self._hang_seconds} s, process {os.getpid()} on {socket.gethostname()}\n"
                f"its samples of that step: {self._samples_of(self._step - 1)}\n"
            )
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        temporary.rename(path)
        logger.warning(f"hang: {path.read_text(encoding='utf-8')}")

    def _judge(self) -> None:
        """Say who is behind, by the reports of all ranks; the lowest rank that reported does so."""
        places: dict[int, tuple[int, str]] = {}
        for rank in range(self._ranks.world_size):
            if self._path(rank).is_file() and (
                match := _FIRST_LINE.match(self._path(rank).read_text(encoding="utf-8"))
            ):
                places[rank] = (int(match[2]), match[3])
        if self._ranks.rank != min(places, default=-1):
            return
        silent = sorted(set(range(self._ranks.world_size)) - set(places))
        first, last = min(place for place, _ in places.values()), max(place for place, _ in places.values())
        behind = [
            f"  rank {rank} is behind the others: {what}" for rank, (place, what) in places.items() if place < last
        ]
        behind += [f"  rank {rank} does not answer: it is stopped, or gone with its machine" for rank in silent]
        if first == last and not silent:
            behind = [f"  all ranks are at the same place: {places[self._ranks.rank][1]}"]
        logger.warning(
            f"hang: no progress for {self._hang_seconds} s (train.hang_seconds).\n" + "\n".join(behind) + "\n"
            f"  where each is: {self._run}/hang-rank-*.txt. The job ends when the exchange they wait in times out."
        )

    def _path(self, rank: int) -> Path:
        return self._run / f"hang-rank-{rank}.txt"
