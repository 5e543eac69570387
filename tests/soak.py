"""Training in a storm: at random moments ranks, loaders, the launcher or all are killed or stopped, the disk fills, the
server is away, bits flip in the cache and in the newest checkpoint, and each start has another number of processes.

    make soak MINUTES=30        or  python -m tests.soak --minutes 30 [--seed 7]

Rounds of a short run each, until the time is up. At the end of each: every image of every epoch is in the ledger once;
where the number of processes never changed, the weights equal those of a run that nothing happened to, bit for bit; and
each restart was needed once: the same command did not fail twice in a row. Exit status 0, and the counts.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import torch

from captioning.runs import checkpoint
from captioning.runs.run_folder import RunFolder
from shards import sources
from shards.packing.packer import Settings, pack
from shards.sources import scenes
from tests.conftest import CPU_PROCESSES, ROOT, settings
from tests.distributed.test_full_disk import fill
from tests.distributed.test_training import assert_each_image_of_each_epoch_once
from tests.servers import nginx

EPOCHS = 20
PAUSE_S = (1.0, 8.0)  # between two faults
LONGEST_START_S = 240.0


class Storm:
    """One run, what happens to it, and what is left of it at the end."""

    def __init__(self, folder: Path, shards: Path, url: str, draw: random.Random):
        self.folder, self.shards, self.draw = folder, shards, draw
        self.server: subprocess.Popen | None = None
        self.run, self.log = folder / "run", folder / "log"
        self.config = folder / "empty.yaml"
        self.config.write_text("{}\n")
        self.fixed = draw.random() < 0.5  # the number of processes, so that bits can be compared
        self.processes = draw.choice([1, 2])
        self.overrides = settings(
            shards, self.run, data__train=f"{url}/train.json", data__num_workers=1, data__cache_dir=folder / "cache",
            train__epochs=EPOCHS, encoder__trainable="none", train__hang_seconds=60,
        )  # fmt: skip
        self.faults: Counter[str] = Counter()

    def end(self) -> None:
        """Nothing of it is left running, or mounted."""
        with suppress(ProcessLookupError, AttributeError):
            os.killpg(self.job.pid, signal.SIGKILL)
        subprocess.run(["umount", "-l", self.folder], stderr=subprocess.DEVNULL)

    def start(self) -> psutil.Popen:
        if not self.fixed:
            self.processes = self.draw.choice([1, 2, 3])
        command = [sys.executable, str(ROOT / "launch" / "train.py"), str(self.config), *self.overrides]
        environment = {**os.environ, **CPU_PROCESSES, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with self.log.open("a") as out:
            return psutil.Popen(
                [*command, "--cpu", "--processes", str(self.processes)],
                cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip

    def weather(self, job: psutil.Popen) -> None:
        """One fault, of those that are possible now."""
        kinds: list[Callable[[psutil.Popen], None]] = [
            self.kill_one, self.kill_launcher, self.kill_all, self.stop_one, self.full_disk, self.outage,
            self.flip_cache, self.flip_checkpoint, self.tell_to_stop,
        ]  # fmt: skip
        act = self.draw.choice(kinds)
        with suppress(psutil.Error, ProcessLookupError):
            act(job)
            self.faults[act.__name__] += 1

    def kill_one(self, job: psutil.Popen) -> None:
        """A rank or a loader."""
        self.draw.choice(job.children(recursive=True) or [job]).kill()

    def kill_launcher(self, job: psutil.Popen) -> None:
        job.kill()

    def kill_all(self, job: psutil.Popen) -> None:
        os.killpg(job.pid, signal.SIGKILL)

    def stop_one(self, job: psutil.Popen) -> None:
        stopped = self.draw.choice(job.children(recursive=True) or [job])
        stopped.suspend()
        time.sleep(self.draw.uniform(0.5, 5))
        stopped.resume()

    def full_disk(self, job: psutil.Popen) -> None:
        ballast = fill(self.folder)
        time.sleep(self.draw.uniform(1, 6))
        ballast.unlink()

    def outage(self, job: psutil.Popen) -> None:
        if self.server is not None:
            self.server.send_signal(signal.SIGSTOP)
            time.sleep(self.draw.uniform(1, 10))
            self.server.send_signal(signal.SIGCONT)

    def flip_cache(self, job: psutil.Popen) -> None:
        _flip(self.draw, sorted((self.folder / "cache").rglob("*.tar")))

    def flip_checkpoint(self, job: psutil.Popen) -> None:
        steps = checkpoint.steps(self.run)
        if len(steps) > 1:  # of a single one, the run would have to begin anew
            _flip(self.draw, sorted((self.run / "checkpoints" / f"step-{steps[-1]:08d}").iterdir()))
            os.killpg(job.pid, signal.SIGKILL)  # so that it is read before a newer one takes its place

    def tell_to_stop(self, job: psutil.Popen) -> None:
        job.send_signal(self.draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]))

    def survive(self, until: float) -> bool:
        """Start it again and again to its end, in fair weather once the time is up; whether it got there."""
        in_vain = 0
        while RunFolder(self.run).status()[0] != "finished":
            before, calm = max(checkpoint.steps(self.run), default=0), time.monotonic() > until or in_vain > 0
            job, began = self.start(), time.monotonic()
            self.job = job
            faults = self.faults.total()
            while job.poll() is None and time.monotonic() - began < LONGEST_START_S:
                with suppress(psutil.TimeoutExpired):
                    job.wait(2 if calm else self.draw.uniform(*PAUSE_S))
                if not calm and job.poll() is None and max(checkpoint.steps(self.run), default=0) > before:
                    self.weather(job)
            with suppress(ProcessLookupError):  # ranks whose launcher was killed make way by themselves, or here
                time.sleep(1)
                os.killpg(job.pid, signal.SIGKILL)
            undisturbed = self.faults.total() == faults and RunFolder(self.run).status()[0] != "finished"
            in_vain = in_vain + 1 if undisturbed else 0
            if in_vain > 1:
                print(self.log.read_text()[-5000:], file=sys.stderr)
                return False
        return True


def _flip(draw: random.Random, files: list[Path]) -> None:
    files = [path for path in files if path.is_file() and path.stat().st_size]
    if files:
        with draw.choice(files).open("r+b") as file:
            data = file.read()
            at = draw.randrange(len(data))
            file.seek(at)
            file.write(bytes([data[at] ^ 1 << draw.randrange(8)]))


def soak(minutes: float, seed: int) -> int:
    draw, until = random.Random(seed), time.monotonic() + 60 * minutes
    faults: Counter[str] = Counter()
    runs = compared = 0
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        images, captions = scenes.write(home / "drawn", "train", 44, seed=0)
        pack(sources.coco(images, captions), "train", home / "shards", Settings())
        served = stack.enter_context(nginx(home / "shards", home / "nginx"))
        expected: dict[int, dict[str, torch.Tensor]] = {}
        while time.monotonic() < until:
            disk = home / f"disk-{runs}"
            disk.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600m", "tmpfs", disk], check=True)
            storm = Storm(disk, home / "shards", f"{served.url}/{draw.choice(['split', 'whole'])}", draw)
            storm.server = served.process
            stack.callback(storm.end)
            if not storm.survive(until):
                print(f"round {runs} (seed {seed}): the same command failed twice in a row", file=sys.stderr)
                return 1
            assert_each_image_of_each_epoch_once(storm.run, storm.shards, EPOCHS)
            newest = checkpoint.newest(storm.run, print)
            assert newest is not None
            weights, last = newest.model(), checkpoint.steps(storm.run)[-1]
            # The last checkpoint may be hit between the run's end and the kill: then it is an earlier one's weights.
            is_whole = newest.state.step == last or not storm.faults["flip_checkpoint"]
            if storm.fixed and is_whole:
                if storm.processes not in expected:
                    expected[storm.processes] = _undisturbed(storm, home)
                same = all(torch.equal(weights[name], expected[storm.processes][name]) for name in weights)
                assert same, f"round {runs} (seed {seed}): the weights differ"
                compared += 1
            faults += storm.faults
            runs += 1
            print(f"round {runs}: {dict(storm.faults)}", flush=True)
            storm.end()
            shutil.rmtree(disk, ignore_errors=True)
    print(f"{runs} runs to their end, {faults.total()} faults: {dict(faults)}; {compared} equal to the last bit")
    return 0


def _undisturbed(storm: Storm, home: Path) -> dict[str, torch.Tensor]:
    """The weights of a run that nothing happens to, on as many processes."""
    run = home / f"calm-{storm.processes}"
    calm = Storm(home, storm.shards, "", random.Random(0))
    calm.fixed, calm.processes, calm.run, calm.log = True, storm.processes, run, home / "calm-log"
    calm.overrides = [f"run={run}" if item.startswith("run=") else item for item in storm.overrides]
    assert calm.survive(0.0), "a run that nothing happens to did not finish"
    found = checkpoint.newest(run, print)
    assert found is not None
    return found.model()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    sys.exit(soak(arguments.minutes, arguments.seed))
