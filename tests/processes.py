"""Real processes for a function of the tests, forked from one that has imported all: seconds cheaper than commands."""

import multiprocessing
import os
import socket
from collections.abc import Callable

TIMEOUT_S = 400


def in_processes(count: int, function: Callable, *arguments: object) -> None:
    """Call ``function(*arguments)`` in ``count`` processes that see each other as if `accelerate launch` began them.

    Any that fails fails the test; what it raised is on standard error.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["captioning.training.trainer"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [
        context.Process(target=_rank, args=(rank, count, port, function, arguments), daemon=True)
        for rank in range(count)
    ]
    for process in started:
        process.start()
    try:
        for process in started:
            process.join(TIMEOUT_S)
        assert [process.exitcode for process in started] == [0] * count
    finally:
        for process in started:
            process.kill()


def _rank(rank: int, count: int, port: int, function: Callable, arguments: tuple) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1"}
    if count > 1:
        os.environ |= {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
        os.environ |= {name: str(count) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
        os.environ["MASTER_PORT"] = str(port)
    import torch

    torch.set_num_threads(1)
    function(*arguments)
