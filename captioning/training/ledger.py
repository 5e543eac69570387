"""A line a sample, so that anyone can audit that each image of each epoch was delivered exactly once."""

import os
from pathlib import Path

from captioning.data.collate import CaptionBatch


class Ledger:
    """``RUN/ledger/rank-R.txt``: step, epoch, key, weight (1, or 0: unreadable), tab-separated; steps from 1."""

    def __init__(self, run: Path, rank: int):
        folder = run / "ledger"
        folder.mkdir(exist_ok=True)
        self._file = (folder / f"rank-{rank}.txt").open("a", encoding="utf-8")

    def write(self, batches: list[CaptionBatch]) -> None:
        for batch in batches:
            for key, weight in [*((key, 1) for key in batch.keys), *((sample.key, 0) for sample in batch.unreadable)]:
                self._file.write(f"{batch.step + 1}\t{batch.epoch}\t{key}\t{weight}\n")

    def sync(self) -> None:
        """On disk before the checkpoint that counts these samples as consumed."""
        self._file.flush()
        os.fsync(self._file.fileno())
