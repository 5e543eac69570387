"""The benchmark's own arithmetic."""

import itertools
import json
import time

import pytest

from launch.bench import table
from launch.bench.table import Table
from launch.bench.timing import Speed, side_by_side


def test_contenders_take_turns_and_the_faster_one_is_told_so():
    turns = []

    def worker(name, seconds):
        def work():
            turns.append(name)
            time.sleep(seconds)
            return 10

        return work

    speeds = side_by_side({"slow": worker("slow", 0.2), "fast": worker("fast", 0.02)}, rounds=3)
    assert turns == ["slow", "fast", "fast", "slow", "slow", "fast", "fast", "slow"]  # the first round only warms up
    assert len(speeds["slow"].rounds) == 3
    assert 2 < speeds["fast"].over(speeds["slow"]) < 20
    assert 20 < speeds["slow"].median <= 50


def test_a_ratio_is_taken_round_by_round():
    drifting = [1.0, 10.0, 100.0]
    assert Speed(tuple(2 * x for x in drifting)).over(Speed(tuple(drifting))) == pytest.approx(2.0)


def test_tables_are_written_as_they_are_shown(tmp_path, capsys):
    counted = itertools.count()
    shown = Table("what", ["contender", "images/s"], [["ours", 1234.5], [f"row {next(counted)}", None]], ["a note"])
    table.show([shown], {"cores": 4, "devices": []})
    text = capsys.readouterr().out
    assert "1,23" in text and "a note" in text and "devices none" in text
    table.write(tmp_path / "bench.json", [shown], table.machine())
    document = json.loads((tmp_path / "bench.json").read_text())
    assert document["tables"][0]["rows"][0] == ["ours", 1234.5]
    assert document["machine"]["cores"] >= 1
