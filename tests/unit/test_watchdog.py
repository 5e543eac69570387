"""Who keeps the others waiting, by what each rank wrote; whole hanging runs are in test_stopping.py."""

import time

import pytest

from captioning.distributed.ranks import Ranks
from captioning.distributed.watchdog import Watchdog
from shards.storage import outages


def test_the_rank_behind_the_others_is_named_by_the_lowest(tmp_path, caplog):
    (tmp_path / "hang-rank-7.txt").write_text("of an earlier start")
    dogs = [Watchdog(tmp_path, Ranks(rank, 3), 1, lambda step: f"those of {step}") for rank in range(3)]
    for dog in dogs:
        dog.start()
        dog.at(3, "reading its samples")
    for dog in (dogs[0], dogs[2]):
        dog.at(3, "waiting for the other ranks")
    deadline = time.monotonic() + 60
    while "where each is" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1.0)  # for others to say it too, if they did
    said = caplog.text
    for dog in dogs:
        dog.close()
    assert "  rank 1 is behind the others: step 3, reading its samples\n" in said
    assert said.count("is behind the others") == said.count("where each is") == 1
    reports = sorted(path.name for path in tmp_path.iterdir())
    assert reports == ["hang-rank-0.txt", "hang-rank-1.txt", "hang-rank-2.txt"]
    assert "its samples of that step: those of 2" in (tmp_path / "hang-rank-1.txt").read_text()


@pytest.mark.slow
def test_a_rank_that_moves_is_left_alone(tmp_path, caplog):
    dog = Watchdog(tmp_path, Ranks(0, 1), 2, lambda step: "")
    dog.start()
    for _ in range(12):
        dog.at(1, "computing")
        time.sleep(0.25)
    dog.close()
    assert not list(tmp_path.iterdir()) and not caplog.records


@pytest.mark.slow
def test_a_rank_that_waits_for_storage_is_left_alone(tmp_path, caplog):
    dog = Watchdog(tmp_path, Ranks(0, 1), 2, lambda step: "")
    dog.start()
    dog.at(1, "reading its samples")
    outages._sleep(3.0)
    dog.close()
    assert not list(tmp_path.iterdir()) and not caplog.records
