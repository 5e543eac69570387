"""Training that shrinks and grows in place: ranks and whole agents killed, the ledger compared."""

import argparse
import os
import signal
import socket
import subprocess
import time

import psutil
import pytest

from captioning.runs import checkpoint
from captioning.runs.run_folder import RunFolder
from launch.cli.elastic import agent_command, machines
from shards.errors import InputError
from tests.conftest import CPU_PROCESSES, ROOT, free_ports, module, settings
from tests.distributed.test_training import assert_each_image_of_each_epoch_once


def test_what_is_asked_of_the_agent(tmp_path):
    assert machines("1:4") == "1:4"
    for wrong in ("4", "0:2", "3:2", "1:", "1:2:3", "-1:2", "1:x"):
        with pytest.raises(argparse.ArgumentTypeError, match="MIN:MAX"):
            machines(wrong)
    command = agent_command("1:4", 2, "node1:29400", tmp_path / "train.py", ["c.yaml", "run=x"])
    assert {"--nnodes=1:4", "--nproc-per-node=2", "--rdzv-endpoint=node1:29400"} <= set(command)
    assert command[-3:] == [str(tmp_path / "train.py"), "c.yaml", "run=x"]
    with pytest.raises(InputError, match="HOST:PORT"):
        agent_command("1:4", 2, "node1", tmp_path / "train.py", [])


def agent(port: int, overrides: list[str], config, log) -> subprocess.Popen:
    command = module("launch.train", config, *overrides, "--cpu", "--processes", 1, "--elastic", "1:2")
    environment = {**os.environ, **CPU_PROCESSES, "OMP_NUM_THREADS": "1"}
    with log.open("a") as out:
        return subprocess.Popen(
            [*command, "--meet", f"127.0.0.1:{port}"],
            env=environment, cwd=ROOT, stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip


def ranks_under(process: subprocess.Popen) -> list[psutil.Process]:
    try:
        return [child for child in psutil.Process(process.pid).children() if "train.py" in " ".join(child.cmdline())]
    except psutil.Error:
        return []


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.sweep
def test_ranks_and_agents_killed_over_and_over(scene_shards, tmp_path, empty_config):
    """2 -> 1 -> 2 processes, and restarts in place, by themselves; each image of each epoch once."""
    run, (port,) = tmp_path / "run", free_ports(1)
    overrides = settings(scene_shards, run, train__epochs=30, encoder__trainable="none", train__hang_seconds=60)
    logs = [tmp_path / f"log-{number}" for number in range(2)]
    agents = [agent(port, overrides, empty_config, logs[0])]
    while not listens(port):  # this agent holds the meeting place, and is not the one that is lost
        assert agents[0].poll() is None
        time.sleep(0.2)
    agents.append(agent(port, overrides, empty_config, logs[1]))

    def until_step(step: int) -> None:
        deadline = time.monotonic() + 300
        while max(checkpoint.steps(run), default=0) < step:
            assert time.monotonic() < deadline and agents[0].poll() is None, logs[0].read_text()[-3000:]
            time.sleep(0.2)

    try:
        until_step(8)
        ranks_under(agents[1])[0].kill()  # both agents start theirs again
        until_step(40)
        for process in [*ranks_under(agents[1]), psutil.Process(agents[1].pid)]:
            process.kill()  # a machine is gone
        agents[1].wait()
        until_step(80)
        agents[1] = agent(port, overrides, empty_config, logs[1])  # and comes back
        until_step(120)
        ranks_under(agents[0])[0].kill()
        assert [process.wait(400) for process in agents] == [0, 0], logs[0].read_text()[-3000:]
    finally:
        for process in agents:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert RunFolder(run).status() == ("finished", "step 180 of 180")
    assert_each_image_of_each_epoch_once(run, scene_shards, epochs=30)
    said = logs[0].read_text()
    assert "2 process(es)" in said and "1 process(es)" in said, "it shrank, and grew again"
