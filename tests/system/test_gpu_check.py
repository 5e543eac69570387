"""What `captioning doctor --gpu` does around the tests and benchmarks it runs, and its page."""

import json
import signal
import time

import pytest
import torch

from launch.bench import gpu_check, gpu_report
from launch.bench.gpu_check import Part, read_tables, read_tests, run_part
from tests.conftest import ROOT, module, run_command

JUNIT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite name="pytest">
<testcase classname="tests.gpu" name="test_it_trains[lstm-no]" time="21.25"/>
<testcase classname="tests.gpu" name="test_it_trains[lstm-fp16]" time="0.0">
<skipped message="no fp16 here"/></testcase>
<testcase classname="tests.gpu" name="test_it_trains[updown-no]" time="20.0">
<failure message="assert">different in ROOT/x.py &lt;b&gt;</failure>
<system-out>warned of atomics</system-out></testcase>
</testsuite></testsuites>
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_gpus_it_tells_what_it_would_do(tmp_path):
    done = run_command(module("launch.doctor", "--gpu", "--out", tmp_path / "report"))
    assert done.returncode == 0, done.stderr
    for words in ("no GPU here", "in 10 minutes", "pytest tests/gpu", "launch.bench scale", "--on-cpu"):
        assert words in done.stdout
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("on_cpu", [False, True])
def test_its_parts_fit_into_ten_minutes(on_cpu):
    parts = gpu_check.parts(on_cpu)
    assert sum(part.limit_s + gpu_check.PATIENCE_S for part in parts) <= gpu_check.TEN_MINUTES_S
    assert [part.name.split()[-1] for part in parts] == ["tests", "step", "train", "caption", "scale", "profile"]


def part(code: str, read=read_tables) -> Part:
    return Part("bench step", "a part", 60, ["-c", f"import sys, time\n{code}"], "--json", read)


def test_a_part_that_works_fails_or_takes_too_long_is_told():
    written = json.dumps({"tables": [{"title": "t", "columns": ["a"], "rows": [["b"]], "notes": []}]})
    well = run_part(part(f"open(sys.argv[2], 'w').write({written!r})"), 60, on_cpu=True)
    assert well["state"] == "passed" and well["tables"][0]["rows"] == [["b"]] and "said" not in well
    failed = run_part(part(f"print({str(ROOT)!r} + '/x.py'); sys.exit(3)"), 60, on_cpu=True)
    assert failed["state"] == "failed, status 3" and failed["said"].startswith("./x.py"), "no folders of the sender's"
    began = time.monotonic()
    late = run_part(part("time.sleep(300)"), 1, on_cpu=True)
    assert late["state"] == "took too long"
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in a job in the background of a shell
        assert "KeyboardInterrupt" in late["said"]
    assert time.monotonic() - began < 60


@pytest.fixture
def tests_read(tmp_path):
    (tmp_path / "junit.xml").write_text(JUNIT.replace("ROOT", str(ROOT)))
    return read_tests(tmp_path / "junit.xml")["tests"]


def test_tests_are_read_with_their_reasons(tests_read):
    assert [test["state"] for test in tests_read] == ["passed", "skipped", "failed"]
    assert tests_read[1]["why"] == "no fp16 here"
    assert tests_read[2]["why"] == "different in ./x.py <b>\nwarned of atomics"


def test_the_page_shows_machine_tests_tables_and_failures(tests_read):
    table = {"title": "Training step", "columns": ["case", "images/s"], "rows": [["lstm", 1234.5]], "notes": ["noise"]}
    about = {"command": "python -m pytest", "limit_s": 300, "seconds": 200.0}
    document = {
        "device": "cuda",
        "began": "2026-01-01T00:00:00+00:00",
        "seconds": 222,
        "machine": {"processor": "a processor", "devices": ["a <GPU>"], "nccl": "2.30"},
        "parts": [
            {**about, "name": "tests", "what": "tests", "state": "failed, status 1", "tests": tests_read},
            {**about, "name": "bench step", "what": "the step", "state": "passed", "tables": [table]},
            {**about, "name": "bench scale", "what": "all", "state": "took too long", "said": "at the last"},
        ],
    }
    page = gpu_report.html(json.loads(json.dumps(document)))
    for shown in ("a &lt;GPU&gt;", "warned of atomics", "&lt;b&gt;", "1,23", "Noise.", "took too long", "at the last"):
        assert shown in page
    assert "<td>updown</td><td>failed</td><td>–</td>" in page, "decoders by precisions"
    assert "rehearsal" not in page.lower() and "http" not in page
    assert "A rehearsal on a CPU" in gpu_report.html({**document, "device": "cpu"})
