"""Several training processes on this machine: started, told of stop signals, awaited.

They find in their environment what `torchrun` would put there. Unlike it, this lets them save for as long as they need
when they are told to stop, prints no traceback of its own, and gives the exit status they agree on.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from captioning.distributed.stop_signals import LAUNCHER, STOPPING, heeded
from launch.cli.command import BAD_INPUT, PREEMPTED

PATIENCE_S = 30.0  # for the others to end by themselves once one has failed: they see it go, or wait in an exchange


def is_started_by_launcher() -> bool:
    """Whether a launcher (this one, `accelerate launch`, torchrun) started this process as one of its own."""
    return "WORLD_SIZE" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def hold_stop_signals() -> None:
    """From here on stop signals wait until somebody notes them: `StopSignals` in this process, or those it starts."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)


def run_processes(count: int, script: Path, arguments: list[str]) -> int:
    """Run a Python script in ``count`` processes that train together, to their end. Every stop signal is handed on.

    Returns:
        Their exit status: 2 if any met bad input, 75 if they were stopped and saved, 0 if all are done, else 1.
    """
    hold_stop_signals()
    with _free_port() as port:
        ranks: list[subprocess.Popen] = []
        try:
            for rank in range(count):
                command = [sys.executable, str(script), *arguments]
                environment = {**os.environ, **_environment(rank, count, port)}
                ranks.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL))
            _await(ranks)
        finally:
            for process in ranks:
                process.kill()
    statuses = {process.wait() for process in ranks}
    if BAD_INPUT in statuses:
        return BAD_INPUT
    return max(statuses) if statuses <= {0, PREEMPTED} else 1


def _environment(rank: int, count: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # Accelerate asks for it; each its share of the cores, as without a launcher.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count))),
        LAUNCHER: str(os.getpid()),
    }


@contextmanager
def _free_port() -> Iterator[int]:
    """A port that nobody else is given: bound here, without listening, and shared with the rank that listens."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def _await(ranks: list[subprocess.Popen]) -> None:
    """Until all have ended: hand on stop signals; end those that outlive a failed one by ``PATIENCE_S``."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    failed_at = None
    while running := [process for process in ranks if process.poll() is None]:
        if failed_at is None and any(process.returncode not in (None, 0, PREEMPTED) for process in ranks):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > PATIENCE_S:
            break
        received = signal.sigtimedwait({*heeded(), signal.SIGCHLD}, 1.0)
        if received is not None and received.si_signo != signal.SIGCHLD:
            for process in running:
                process.send_signal(received.si_signo)
    _tell_killed(ranks)


def _tell_killed(ranks: list[subprocess.Popen]) -> None:
    """Whoever ends by an error says so; who is killed cannot. Bad input is the reason itself: Gloo may abort others."""
    if any(process.returncode == BAD_INPUT for process in ranks):
        return
    for rank, process in enumerate(ranks):
        if process.returncode is not None and process.returncode < 0:
            name = signal.Signals(-process.returncode).name
            print(f"error: rank {rank} was killed by {name}; out of memory?", file=sys.stderr, flush=True)
