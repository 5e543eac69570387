"""Training that shrinks and grows in place: PyTorch's elastic agent, one a machine, with what our runs need of it.

https://docs.pytorch.org/docs/stable/elastic/run.html
"""

import argparse
import os
import re
import signal
import sys
from pathlib import Path

from captioning.distributed.stop_signals import STOPPING
from shards.errors import InputError

MAX_RESTARTS = 100  # of an agent's processes after one of them failed; machines that come or go do not count
LAST_CALL_S = 5  # for more machines to join, once there are enough


def machines(text: str) -> str:
    """An argument MIN:MAX, of machines."""
    match = re.fullmatch(r"([1-9]\d{0,5}):([1-9]\d{0,5})", text)
    if match is None or int(match[1]) > int(match[2]):
        raise argparse.ArgumentTypeError(f"{text}: MIN:MAX is wanted, the fewest and the most machines, as in 1:4")
    return text


def agent_command(nodes: str, processes: int, meet: str, script: Path, arguments: list[str]) -> list[str]:
    """The command of one machine's agent; ``meet`` is HOST:PORT of the machine where the agents find each other."""
    if not re.fullmatch(r"[\w.-]+:\d+", meet):
        raise InputError(f"--meet {meet}: HOST:PORT is wanted, of one machine of the job, the same on all.")
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *(f"--nnodes={nodes}", f"--nproc-per-node={processes}", f"--max-restarts={MAX_RESTARTS}"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint={meet}", "--rdzv-id=captioning"),
        f"--rdzv-conf=last_call_timeout={LAST_CALL_S}",
        *(str(script), *arguments),
    ]


def become_agent(command: list[str]) -> None:
    """Replace this process by the agent, so that signals reach it."""
    environment = {
        # Else the processes share the agents' own store, and after a restart in place wait in it for ever.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        # Of SIGUSR1 the agent would die, and not hand it on.
        "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGUSR1",
    }
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    sys.stdout.flush()
    os.execve(command[0], command, {**os.environ, **environment})
