"""The machine and the processes as launched: devices, exchange between ranks, disk, Java."""

import os
import platform
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator

from captioning.distributed.ranks import Ranks
from captioning.doctor.checks import Check, look, size

EXCHANGED = {"cuda": 256e6, "cpu": 16e6}  # bytes of the all-reduce that is timed
REPEATS = 5


def machine(accelerator: Accelerator, ranks: Ranks) -> list[Check]:
    """Processes, devices and their exchange, Java. To be called on every rank; rank 0's answer is the one to show."""
    exchange = look("all-reduce", lambda: _all_reduce(accelerator, ranks))
    devices = ranks.all_gather((platform.node(), _device(accelerator.device)))
    return [
        Check("processes", _processes(ranks)),
        Check("devices", "; ".join(f"{count} × {name}" for (_, name), count in Counter(devices).items())),
        Check("nodes", ", ".join(dict.fromkeys(node for node, _ in devices))),
        look("driver", driver),
        Check("versions", f"Python {platform.python_version()}, torch {torch.__version__}"),
        Check("processor", f"{len(os.sched_getaffinity(0))} cores to use, load {os.getloadavg()[0]:.1f}"),
        exchange,
        look("Java", _java),
    ]


def _processes(ranks: Ranks) -> str:
    if ranks.world_size == 1:
        return "1 (start this under `accelerate launch`, as training, to see all of them)"
    return f"{ranks.world_size}, {os.environ.get('LOCAL_WORLD_SIZE', '?')} on this node"


def _device(device: torch.device) -> str:
    if device.type != "cuda":
        return "CPU"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} with {size(properties.total_memory)}"


def driver() -> Check:
    """The NVIDIA driver's version and CUDA's; whether torch sees the GPUs that the driver does."""
    if shutil.which("nvidia-smi") is None:
        return Check("driver", "no NVIDIA driver: CPU only")
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    if done.returncode != 0 or not torch.cuda.is_available():
        return Check("driver", f"nvidia-smi is there, torch sees no GPU: {(done.stderr or done.stdout).strip()}", False)
    return Check("driver", f"{done.stdout.split()[0]}, CUDA {torch.version.cuda}", True)


def _all_reduce(accelerator: Accelerator, ranks: Ranks) -> Check:
    """Whether a sum over the ranks is right, and how fast: bytes of a gradient a second."""
    if ranks.world_size == 1:
        return Check("all-reduce", "one process: nothing to exchange")
    device = accelerator.device
    tensor = torch.full((int(EXCHANGED[device.type] // 4),), float(ranks.rank + 1), device=device)
    dist.all_reduce(tensor)
    expected = ranks.world_size * (ranks.world_size + 1) / 2
    wrong = ranks.all_reduce_sum([float(not bool((tensor == expected).all()))])[0]
    seconds = []
    for _ in range(REPEATS):
        ranks.barrier()
        started = time.perf_counter()
        dist.all_reduce(tensor)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    rate = tensor.numel() * 4 / sorted(seconds)[REPEATS // 2]
    backend = dist.get_backend()
    if wrong:
        return Check("all-reduce", f"{backend}: the sum is wrong on {wrong:.0f} of {ranks.world_size} ranks", False)
    return Check("all-reduce", f"{backend}: right, {size(rate)}/s for {size(tensor.numel() * 4)}", True)


def _java() -> Check:
    if shutil.which("java") is None:
        return Check("Java", "not there: METEOR and SPICE are left out, all other metrics need none")
    done = subprocess.run(["java", "-version"], capture_output=True, text=True, timeout=60)
    lines = (done.stderr or done.stdout).strip().splitlines()
    return Check("Java", lines[0] if lines else "gives no version", done.returncode == 0)


def free_space(folder: Path) -> Check:
    """Free bytes where ``folder`` is or will be."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return Check("disk", f"{size(shutil.disk_usage(place).free)} free at {place}")
