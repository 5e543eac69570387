"""A line a sample, so that anyone can audit that each image of each epoch was delivered exactly once."""

from pathlib import Path

from captioning.data.collate import CaptionBatch
from captioning.runs.patient_files import PatientLog
from shards.errors import printable


class Ledger:
    """``RUN/ledger/rank-R.txt``: step, epoch, key, weight (1, or 0: unreadable), tab-separated; steps from 1.

    Lines are kept in memory until they are on the disk, which they are before the checkpoint that counts them.
    """

    def __init__(self, run: Path, rank: int):
        folder = run / "ledger"
        folder.mkdir(exist_ok=True)
        self._log = PatientLog(folder / f"rank-{rank}.txt")
        self._log.write(synced=True)  # a rank that delivers nothing has an empty one

    def write(self, batches: list[CaptionBatch]) -> None:
        for batch in batches:
            for key, weight in [*((key, 1) for key in batch.keys), *((sample.key, 0) for sample in batch.unreadable)]:
                on_a_line = printable(key).replace("\t", "\\t").replace("\n", "\\n")
                self._log.add(f"{batch.step + 1}\t{batch.epoch}\t{on_a_line}\t{weight}\n".encode())

    def sync(self) -> str | None:
        """On disk before the checkpoint that counts these samples as consumed; what the disk objected to, else None:
        without these lines that checkpoint may not be written."""
        return self._log.write(synced=True)
