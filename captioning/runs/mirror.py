"""A second place for checkpoints, for machines whose disk goes with them: a path, or any URL that fsspec opens.

``MIRROR/step-00000100/`` holds what the run's own folder of that step does, the manifest uploaded last. Uploads go on
beside the training, which never waits for them nor fails with them; the run's end waits for the last one.
"""

import logging
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from captioning.runs import checkpoint
from captioning.runs.run_folder import SCRATCH, RunFolder
from shards.errors import InputError, reason_of
from shards.files import write_atomically

logger = logging.getLogger(__name__)
_STEP = re.compile(r"step-(\d{8})")
_MANIFEST = "manifest.json"


class Mirror:
    """The checkpoints of one run in its second place. Used by rank 0 alone."""

    def __init__(self, url: str, keep: int = 2):
        import fsspec

        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
        except Exception as error:  # each of fsspec's file systems has errors of its own
            raise InputError(f"checkpoint.mirror={url} cannot be opened: {reason_of(error)}") from error
        self.url, self._keep = url, keep
        self._waiting: Path | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def upload_later(self, folder: Path) -> None:
        """Begin to upload a checkpoint, when the upload before it has ended; of several that wait only the newest."""
        with self._lock:
            self._waiting = folder
            if self._thread is None:
                self._thread = threading.Thread(target=self._upload_waiting, name="mirror", daemon=True)
                self._thread.start()

    def close(self, patience_s: float) -> None:
        """Wait for what is being uploaded."""
        thread = self._thread
        if thread is not None:
            thread.join(patience_s)
            if thread.is_alive():
                logger.warning(f"checkpoint.mirror={self.url}: the last upload did not end in {patience_s:g} s")

    def _upload_waiting(self) -> None:
        while True:
            with self._lock:
                folder, self._waiting = self._waiting, None
                if folder is None:
                    self._thread = None
                    return
            try:
                self._upload(folder)
            except Exception as error:  # each of fsspec's file systems has errors of its own
                logger.warning(f"{folder.name} could not be mirrored to {self.url}: {reason_of(error)}")

    def _upload(self, folder: Path) -> None:
        target = self._place(folder.name)
        names = sorted(path.name for path in folder.iterdir() if path.name != _MANIFEST)
        self._files.makedirs(target, exist_ok=True)
        if self._files.exists(f"{target}/{_MANIFEST}"):
            self._files.rm_file(f"{target}/{_MANIFEST}")  # of the same step before it was validated
        for name in [*names, _MANIFEST]:
            self._files.put_file(str(folder / name), f"{target}/{name}")
        best = checkpoint.Checkpoint(folder).state.best_step
        older = [step for step in self.steps() if step <= int(folder.name.removeprefix("step-"))]
        for step in older[: -self._keep]:
            if step != best:
                self._files.rm(self._place(f"step-{step:08d}"), recursive=True)

    def steps(self) -> list[int]:
        """The steps that it has, ascending; those of an upload that was cut off too."""
        self._files.invalidate_cache()
        try:
            listing: list[Any] = self._files.ls(self._root, detail=False)
        except FileNotFoundError:
            return []
        if [str(name).rstrip("/") for name in listing] == [self._root.rstrip("/")]:
            raise NotADirectoryError(f"{self.url} is a file")
        names = [_STEP.fullmatch(str(name).rstrip("/").rpartition("/")[2]) for name in listing]
        return sorted(int(match[1]) for match in names if match)

    def download(self, step: int, folder: Path) -> None:
        """Copy a checkpoint's files to a folder that is not there yet."""
        folder.mkdir(parents=True)
        for place in self._files.ls(self._place(f"step-{step:08d}"), detail=False):
            name = str(place).rstrip("/").rpartition("/")[2]
            if re.fullmatch(r"\w[\w.-]*", name):  # a listing from elsewhere names no other folder
                self._files.get_file(str(place), str(folder / name))

    def _place(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


def restore(url: str, folder: RunFolder, meanwhile: Callable[[], None]) -> None:
    """Where a run has no checkpoint of its own, fetch the newest one that verifies, and the run's config with it.

    Raises:
        InputError: when the mirror cannot be reached, or none of its checkpoints verifies: to begin anew at step 0 is
            the user's to decide.
    """
    if checkpoint.steps(folder.path):
        return
    mirror = Mirror(url)
    try:
        steps = mirror.steps()
        if not steps:
            return
        folder.hold(meanwhile=meanwhile)
        if any(_fetched(mirror, step, folder.path) for step in reversed(steps)):
            return
    except InputError:
        raise
    except Exception as error:  # as above
        raise InputError(
            f"checkpoint.mirror={url} cannot be read: {reason_of(error)}\n{folder.path} has no checkpoint either. "
            "Give the same command again when it can; to begin anew set checkpoint.mirror=null, or another place."
        ) from error
    raise InputError(
        f"None of the {len(steps)} checkpoints in checkpoint.mirror={url} verifies. To begin anew give another place."
    )


def _fetched(mirror: Mirror, step: int, run: Path) -> bool:
    """Fetch a checkpoint, unless it does not verify. Killed at any moment, the next start fetches it again."""
    final, scratch = run / "checkpoints" / f"step-{step:08d}", run / SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)
    fetched = scratch / final.name
    mirror.download(step, fetched)
    if (reason := checkpoint.damage(fetched)) is not None:
        logger.warning(f"passed over step {step} of checkpoint.mirror={mirror.url}: {reason}")
        shutil.rmtree(scratch)
        return False
    if not (run / "config.yaml").is_file():
        write_atomically(run / "config.yaml", (fetched / "config.yaml").read_bytes())
    final.parent.mkdir(exist_ok=True)
    fetched.rename(final)
    scratch.rmdir()
    logger.warning(f"{run} had no checkpoint: step {step} was fetched from checkpoint.mirror={mirror.url}")
    return True
