"""`captioning doctor --gpu`: the tests marked gpu, then short benchmarks, each within its time, into one report.

A part that fails or takes too long is told in the report, and the next one begins.
"""

import getpass
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from captioning.doctor.checks import look, size
from captioning.doctor.machine import driver
from launch.bench import gpu_report, table
from shards.files import write_atomically

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests" / "gpu"  # not in a wheel
TEN_MINUTES_S = 600
PATIENCE_S = 8  # for a part that is out of time to write what it has
REHEARSAL = 5  # a CPU may take this many times as long
LAST_LINES = 40  # of what a part printed, kept where it failed


@dataclass(frozen=True)
class Part:
    """One command: ``arguments`` are those of Python, ``results`` the option that names a file for its results, and
    ``read`` makes that file a part of the report."""

    name: str
    what: str
    limit_s: int
    arguments: list[str]
    results: str
    read: Callable[[Path], dict[str, Any]]

    @property
    def command(self) -> str:
        """As people would type it."""
        return shlex.join(["python", *self.arguments])


def parts(on_cpu: bool) -> list[Part]:
    """What is done: on GPUs within ten minutes in all, each part's ``PATIENCE_S`` counted in; on a CPU in small."""
    cores = len(os.sched_getaffinity(0))
    if on_cpu:
        encoders, precision, how = ("resnet18", "resnet18:layer4"), "no", ["--gpu-tests-on-cpu"]
        batch, pixels, steps = "4", "64", "2"
    else:
        encoders, precision = ("resnet152", "resnet101:layer2"), half_precision()
        how = ["-n", str(max(1, min(6, cores // 2)))]  # most of a test is the start of Python processes
        batch, pixels, steps = "64", "224", "20"
    frozen, trained = f"{encoders[0]}:none:lstm:{precision}", f"{encoders[1]}:attention:{precision}"

    def bench(mode: str, what: str, limit_s: int, cases: list[str], *options: str) -> Part:
        shape = ["--batch-size", batch, "--image-size", pixels]
        command = ["-m", "launch.bench", mode, "--case", *cases, *shape, *options]
        return Part(f"bench {mode}", what, limit_s, command, "--json", read_tables)

    tests = ["-m", "pytest", "tests/gpu", "-m", "gpu", "-o", "junit_logging=system-out", *how]
    what = "tests marked gpu: training, exact resuming, validation, captions"
    both, workers = [frozen, trained], str(min(4, cores - 1))
    return [
        Part("tests", what, 270, tests, "--junitxml", read_tests),
        bench("step", "the training step, against the encoder alone", 60, both, "--rounds", "2"),
        bench("train", "training from shards", 60, [frozen], "--rounds", "1", "--steps", steps, "--workers", workers),
        bench("caption", "captioning, greedy and with beams", 45, [trained], "--rounds", "2", "--one-by-one", "2"),
        bench("scale", "training on 1, 2, 4 ... all GPUs", 70, [trained], "--rounds", "1", "--steps", steps),
        bench("profile", "kernels, gaps, achieved TFLOP/s and GB/s", 45, both, "--rounds", "1"),
    ]


def half_precision() -> str:
    """bf16, but for GPUs that only imitate it, slowly."""
    is_old = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 8
    return "fp16" if is_old else "bf16"


def check(out: Path, on_cpu: bool) -> int:
    """Run all parts and write ``gpu-report.json`` and ``gpu-report.html`` into ``out``; 1 if a part failed.

    Both files are written after every part, so that one that is interrupted leaves those before it.
    """
    out.mkdir(parents=True, exist_ok=True)
    began, factor = time.monotonic(), REHEARSAL if on_cpu else 1
    document: dict[str, Any] = {
        "device": "cpu" if on_cpu else "cuda",
        "began": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(on_cpu),
        "parts": [],
    }
    for part in parts(on_cpu):
        print(f"{part.name}: {part.what} (at most {part.limit_s * factor} s)", flush=True)
        result = run_part(part, part.limit_s * factor, on_cpu)
        print(f"  {result['state']} in {result['seconds']:.0f} s", flush=True)
        document["parts"].append(result)
        document["seconds"] = round(time.monotonic() - began)
        write_atomically(out / "gpu-report.json", (json.dumps(document, indent=1) + "\n").encode())
        write_atomically(out / "gpu-report.html", gpu_report.html(document).encode())
    print(f"\n{out / 'gpu-report.json'}\n{out / 'gpu-report.html'}\nLook through them before you send them to anybody.")
    return int(any(result["state"] != "passed" for result in document["parts"]))


def say_what_would_be_done() -> None:
    """Where there is no GPU."""
    print(f"torch {torch.__version__} sees no GPU here. With one this would run, in {TEN_MINUTES_S // 60} minutes:\n")
    for part in parts(on_cpu=False):
        print(f"{part.name}: {part.what} (at most {part.limit_s} s)\n    {part.command}")
    print("\nand write gpu-report.json and gpu-report.html. --on-cpu does it in small on the CPU: a rehearsal.")


def machine(on_cpu: bool) -> dict[str, Any]:
    """The benchmarks' facts of a machine; its GPUs, and the versions of what drives them."""
    facts = table.machine()
    if on_cpu:
        return {**facts, "devices": []}
    facts["devices"] = [
        f"{gpu.name}, {size(gpu.total_memory)}, compute capability {gpu.major}.{gpu.minor}"
        for gpu in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return {**facts, "driver": look("driver", driver).seen, "cudnn": torch.backends.cudnn.version(), "nccl": nccl}


def run_part(part: Part, limit_s: float, on_cpu: bool) -> dict[str, Any]:
    """Its entry in the report; never raises for what the part does."""
    began = time.monotonic()
    entry = {"name": part.name, "what": part.what, "command": part.command, "limit_s": limit_s}
    if part.name == "tests" and not TESTS.is_dir():
        return {**entry, "state": "not run", "seconds": 0.0, "said": "The tests are not in a wheel: run `make gpu`."}
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        status, said = _run([*part.arguments, part.results, str(results)], limit_s, on_cpu)
        try:
            entry |= part.read(results)
        except (OSError, ValueError, KeyError, ElementTree.ParseError) as error:
            said = f"{said}\nno results: {type(error).__name__}"
    state = {0: "passed", None: "took too long"}.get(status, f"failed, status {status}")
    if status != 0:
        entry["said"] = private(last_lines(said))
    return {**entry, "state": state, "seconds": round(time.monotonic() - began, 1)}


def _run(arguments: list[str], limit_s: float, on_cpu: bool) -> tuple[int | None, str]:
    """Exit status, None for one that was stopped, and all that it printed."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {}
    environment = {**os.environ, **hidden, "CAPTIONING_QUIET": "1", "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            status: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
        output.seek(0)
        return status, output.read().decode(errors="replace")


def _end(process: subprocess.Popen) -> None:
    """Interrupt it and all that it started, so that pytest writes what it has; then kill what is left."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read_tables(path: Path) -> dict[str, Any]:
    return {"tables": json.loads(path.read_text(encoding="utf-8"))["tables"]}


def read_tests(path: Path) -> dict[str, Any]:
    """Every test of a JUnit file: name, state, seconds, and why it failed or was skipped."""
    return {"tests": [_test(case) for case in ElementTree.parse(path).iter("testcase")]}


def _test(case: ElementTree.Element) -> dict[str, Any]:
    entry = {"name": case.get("name", ""), "seconds": round(float(case.get("time", 0)), 1)}
    if (skipped := case.find("skipped")) is not None:
        return {**entry, "state": "skipped", "why": skipped.get("message", "")}
    for failed in [*case.iter("failure"), *case.iter("error")]:
        why = [failed.text or "", case.findtext("system-out") or ""]
        return {**entry, "state": "failed", "why": private("\n".join(map(last_lines, why)))}
    return {**entry, "state": "passed"}


def last_lines(text: str) -> str:
    return "\n".join(text.splitlines()[-LAST_LINES:])


def private(text: str) -> str:
    """Without the names of the folders and the account of whoever runs this."""
    of_pytest = (f"pytest-of-{getpass.getuser()}", "pytest")
    for secret, shown in ((str(ROOT), "."), (str(Path.home()), "~"), of_pytest):
        text = text.replace(secret, shown)
    return text
