"""The job scripts on a real Slurm: two nodes on this machine, a CPU process each, real signals, real requeueing."""

import json
import re
import sys
import time
from pathlib import Path

import pytest

from captioning.runs import checkpoint
from tests.conftest import module, run_command, settings
from tests.distributed.test_training import assert_each_image_of_each_epoch_once, status
from tests.slurm_cluster import Cluster, missing

pytestmark = pytest.mark.skipif(
    bool(missing()), reason=f"Slurm is not installed ({', '.join(missing())}): apt-get install slurmctld slurmd munge"
)
TRAIN = "slurm/train.sbatch"


@pytest.fixture(scope="module")
def cluster():
    cluster = Cluster()
    yield cluster
    cluster.stop()


def after_checkpoint(cluster: Cluster, run: Path, step: int) -> None:
    """Wait until a run has a checkpoint of at least this step."""
    cluster.until(f"a checkpoint of step {step}", lambda: max(checkpoint.steps(run), default=0) >= step, seconds=120)


def ended(cluster: Cluster, job: str, output: Path) -> str:
    """The state a job ends in; in a report of a failure, with what it said."""
    states = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
    cluster.wait(job, *states, seconds=1200)
    print(output.read_text() if output.exists() else "no output")
    return cluster.job(job, "JobState")


def resumed_at(output: Path) -> list[int]:
    """The step each start of a job began with."""
    return [int(number) for number in re.findall(r"an epoch, (\d+) done", output.read_text())]


@pytest.fixture(scope="module")
def trained(cluster, scene_shards, tmp_path_factory, empty_config):
    """A run of four epochs on two nodes that was told to stop, and whose second node then lost its processes."""
    run = tmp_path_factory.mktemp("slurm") / "run"
    overrides = settings(
        scene_shards, run, train__epochs=4, data__val=scene_shards / "val.json", evaluate__every_steps=99
    )
    job, output = cluster.submit("--nodes=2", TRAIN, empty_config, *overrides)
    after_checkpoint(cluster, run, 4)
    cluster.told("scancel", "--signal=USR1", "--batch", job)  # what Slurm does shortly before the time is up
    cluster.wait(job, "PENDING")
    stopped_at = int(status(run)[1].split(" ")[1])
    assert status(run)[0] == "preempted"
    after_checkpoint(cluster, run, stopped_at + 4)
    cluster.kill_node("n2", with_daemon=False)
    cluster.wait(job, "PENDING")
    assert ended(cluster, job, output) == "COMPLETED"
    return run, job, output, stopped_at


def test_a_job_told_to_stop_or_robbed_of_a_node_s_processes_goes_on_by_itself(cluster, trained, scene_shards):
    run, job, output, stopped_at = trained
    assert cluster.job(job, "Restarts") == "2"
    starts = resumed_at(output)
    assert starts[:2] == [0, stopped_at], "no step is lost to a stop signal"
    assert stopped_at + 4 <= starts[2] < 24 and starts[2] % 4 == 0, "and less than checkpoint.every_steps to SIGKILL"
    assert status(run) == ["finished", "step 24 of 24"]
    assert_each_image_of_each_epoch_once(run, scene_shards, epochs=4)


@pytest.mark.sweep
def test_evaluating_on_two_nodes_with_two_processes_each(cluster, trained, tmp_path):
    scores, setup = tmp_path / "scores.json", tmp_path / "setup.sh"
    programs = Path(sys.executable).parent  # CAPTIONING_SETUP takes the place of .venv/bin/activate
    setup.write_text(f"echo $SLURM_JOB_ID >{tmp_path}/sourced\nexport GLOO_SOCKET_IFNAME=lo PATH={programs}:$PATH\n")
    environment = {"CAPTIONING_SETUP": str(setup), "CAPTIONING_PROCESSES_PER_NODE": "2"}
    script = ["--nodes=2", "--cpus-per-task=2", "slurm/evaluate.sbatch"]
    job, output = cluster.submit(*script, trained[0], "--json", scores, **environment)
    assert ended(cluster, job, output) == "COMPLETED"
    assert json.loads(scores.read_text())["images"] == 10
    assert (tmp_path / "sourced").read_text().strip() == job


@pytest.mark.sweep
def test_packing_by_an_array_makes_what_one_machine_makes(cluster, tmp_path):
    scenes = ["scenes", "--count", "60", "--seed", "3", "--shard-mb", "1"]
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert run_command(module("launch.pack", *scenes, "--out", alone)).returncode == 0
    job, _ = cluster.submit("--array=1-3", "slurm/pack.sbatch", *scenes, "--out", together)
    cluster.until("the array is done", lambda: not cluster.told("squeue", "-h", "-j", job), seconds=120)
    made = {path.name: path.read_bytes() for path in together.iterdir()}
    assert made == {path.name: path.read_bytes() for path in alone.iterdir()}


def test_bad_input_fails_once_and_is_not_requeued(cluster, tmp_path, empty_config, scene_shards):
    overrides = settings(scene_shards, tmp_path / "run", train__epochs=1, encoder__weights="nowhere.pth")
    job, output = cluster.submit("--nodes=1", TRAIN, empty_config, *overrides)
    mistyped, told = cluster.submit("--nodes=1", TRAIN, empty_config, "encoder.nmae=x")
    nowhere = {"CAPTIONING_SETUP": str(tmp_path / "nowhere.sh")}
    unset, why = cluster.submit("--nodes=1", TRAIN, empty_config, *overrides, **nowhere)
    for each, said in ((job, output), (mistyped, told), (unset, why)):
        assert (ended(cluster, each, said), cluster.job(each, "Restarts")) == ("FAILED", "0")
    assert "neither a file nor weights" in output.read_text()
    assert "nowhere.sh: there is no such file" in why.read_text()
    assert "did you mean encoder.name?" in told.read_text() and "srun" not in told.read_text()


@pytest.mark.sweep
def test_a_node_that_goes_down(cluster, scene_shards, tmp_path, empty_config):
    run = tmp_path / "run"
    job, output = cluster.submit("--nodes=2", TRAIN, empty_config, *settings(scene_shards, run, train__epochs=4))
    after_checkpoint(cluster, run, 8)
    cluster.kill_node("n2", with_daemon=True)
    cluster.wait(job, "PENDING")
    cluster.start_node("n2")
    assert ended(cluster, job, output) == "COMPLETED"
    assert resumed_at(output)[1:] and all(start >= 8 for start in resumed_at(output)[1:])
    assert status(run) == ["finished", "step 24 of 24"]
    assert_each_image_of_each_epoch_once(run, scene_shards, epochs=4)


@pytest.mark.sweep
@pytest.mark.parametrize("partition", ["test", "grace"])
def test_a_job_that_makes_way_for_a_more_urgent_one(cluster, scene_shards, tmp_path, empty_config, partition):
    """PreemptType=preempt/partition_prio, without GraceTime and with: back in the queue, it goes on by itself."""
    run = tmp_path / "run"
    overrides = settings(scene_shards, run, train__epochs=20, encoder__trainable="none")
    job, output = cluster.submit("--nodes=2", f"--partition={partition}", TRAIN, empty_config, *overrides)
    after_checkpoint(cluster, run, 8)
    urgent, _ = cluster.submit("--nodes=2", "--exclusive", "--partition=urgent", "--wrap=sleep 5")
    cluster.wait(urgent, "COMPLETED")
    assert ended(cluster, job, output) == "COMPLETED"
    assert int(cluster.job(job, "Restarts")) >= 1 and resumed_at(output)[1] >= 8
    assert status(run) == ["finished", "step 120 of 120"]
    assert_each_image_of_each_epoch_once(run, scene_shards, epochs=20)


@pytest.mark.sweep
def test_a_cancelled_job_saves_and_stays_cancelled(cluster, scene_shards, tmp_path, empty_config):
    run = tmp_path / "run"
    overrides = settings(scene_shards, run, train__epochs=4)
    job, _ = cluster.submit("--nodes=2", TRAIN, empty_config, *overrides)
    after_checkpoint(cluster, run, 8)
    cluster.told("scancel", job)
    cluster.wait(job, "CANCELLED")
    time.sleep(10)
    assert (cluster.job(job, "JobState"), cluster.job(job, "Restarts")) == ("CANCELLED", "0")
    assert status(run)[0] == "preempted"
    stopped_at = int(status(run)[1].split(" ")[1])
    job, output = cluster.submit("--nodes=2", TRAIN, empty_config, *overrides)
    assert ended(cluster, job, output) == "COMPLETED"
    assert resumed_at(output) == [stopped_at]
    assert_each_image_of_each_epoch_once(run, scene_shards, epochs=4)


@pytest.mark.sweep
def test_told_to_stop_while_it_starts(cluster, scene_shards, tmp_path, empty_config):
    """Before there is an srun, a launcher, a rank, or one that can note it: no signal is lost, none ends the job; but
    ten in a row do."""
    run = tmp_path / "run"
    job, output = cluster.submit("--nodes=2", TRAIN, empty_config, *settings(scene_shards, run, train__epochs=400))
    for number in range(16):
        cluster.wait(job, "RUNNING")
        time.sleep(0.5 + 0.7 * (number % 6))
        cluster.told("scancel", "--signal=USR1", "--batch", job)
        cluster.until(
            "it is requeued or has ended",
            lambda: cluster.job(job, "Restarts") == str(number + 1) or cluster.job(job, "JobState") == "FAILED",  # noqa: B023
            seconds=240,
        )
        if cluster.job(job, "JobState") == "FAILED":
            break
    assert ended(cluster, job, output) == "FAILED"
    assert output.read_text().count("stop signal at") == number + 1 >= 10
    assert "10 starts in a row ended before their first step" in output.read_text()


def limit_to(cluster: Cluster, job: str, seconds: int) -> None:
    """Leave a running job at least so many seconds, and a minute more at most: Slurm counts in minutes."""
    hours, minutes, passed = map(int, cluster.job(job, "RunTime").split(":"))
    limit = -(-(3600 * hours + 60 * minutes + passed + seconds) // 60)
    cluster.told("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")


@pytest.mark.sweep
def test_time_limits(cluster, scene_shards, tmp_path, empty_config):
    """Slurm's own signal before the time is up. However slow the machine, the job is stopped once: its limit is lowered
    when it has begun to train, and raised when it is back in the queue. Slurm looks at limits twice a minute."""
    run = tmp_path / "run"
    overrides = settings(scene_shards, run, train__epochs=200)
    job, output = cluster.submit("--nodes=2", "--time=30", "--signal=B:USR1@30", TRAIN, empty_config, *overrides)
    after_checkpoint(cluster, run, 4)
    limit_to(cluster, job, 45)
    cluster.until("it is requeued", lambda: cluster.job(job, "Restarts") == "1", seconds=150)
    cluster.told("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    stopped_at = int(status(run)[1].split(" ")[1])
    assert ended(cluster, job, output) == "COMPLETED"
    assert resumed_at(output) == [0, stopped_at] and stopped_at >= 4
    assert status(run) == ["finished", "step 1200 of 1200"]
    assert_each_image_of_each_epoch_once(run, scene_shards, epochs=200)
