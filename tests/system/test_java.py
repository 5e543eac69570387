"""METEOR and SPICE in a process of their own: their values, and what is said where they cannot run."""

import os
import random
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from captioning.metrics import java
from tests.unit.test_metrics import WORDS, as_theirs

CANDIDATES = [c.split() for c in ("a cat sits", "zebra", "", "two dogs running", "a cat", "caf\u00e9")]
REFERENCES = [
    [reference.split() for reference in of_image]
    for of_image in (["a cat sat", "the cat"], ["a dog"], ["a"], ["two dogs run"], ["a cat"], ["caf\u00f2"])
]


def needs_java() -> None:
    if shutil.which("java") is None:
        pytest.skip("METEOR runs in Java, which is not installed here")


def test_meteor_has_the_values_of_pycocoevalcap(monkeypatch):
    needs_java()
    from pycocoevalcap.meteor.meteor import Meteor

    rng = random.Random(0)
    candidates = [*CANDIDATES[:5], *([rng.choice(WORDS) for _ in range(rng.randint(1, 9))] for _ in range(30))]
    references = [*REFERENCES[:5], *([[rng.choice(WORDS) for _ in range(8)] for _ in range(3)] for _ in range(30))]
    total, each = Meteor().compute_score(*as_theirs(candidates, references))
    monkeypatch.setenv("LC_ALL", "C")
    ours = java.meteor([*candidates, CANDIDATES[5]], [*references, REFERENCES[5]], seconds=300)
    assert ours.total(ours.sums[:-1].sum(axis=0)) == pytest.approx(total, abs=1e-9)
    np.testing.assert_allclose(ours.each[:-1], each, rtol=0, atol=1e-9)
    assert ours.each[-1] == 0, "accents reach Java as they are, whatever the locale"


def java_that(folder: Path, does: str, monkeypatch) -> None:
    """Put a program called java first in the PATH."""
    program = folder / "java"
    program.write_text(f"#!{sys.executable}\nimport os, sys, time\n{does}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_a_java_that_hangs_is_stopped_with_all_its_processes(tmp_path, monkeypatch):
    java_that(tmp_path, f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(300)", monkeypatch)
    started = time.monotonic()
    with pytest.raises(java.UnavailableError, match="no result within 5 seconds"):
        java.meteor(CANDIDATES, REFERENCES, seconds=5)
    assert time.monotonic() - started < 60
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 30
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the java process outlived its time"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("does", "reason"),
    [
        ("print('Error: Could not reserve enough space', file=sys.stderr); sys.exit(1)", "Could not reserve enough"),
        ("sys.exit(0)", "Java ended without a word"),
        ("sys.stdin.readline(); print('Error: half-way', file=sys.stderr); sys.exit(3)", "half-way"),
        ("[print('nonsense', flush=True) for line in sys.stdin]", "Java ended without a word"),
    ],
)
def test_a_java_that_fails_is_a_reason_not_a_broken_pipe(tmp_path, monkeypatch, does, reason):
    java_that(tmp_path, does, monkeypatch)
    with pytest.raises(java.UnavailableError, match=reason):
        java.meteor(CANDIDATES, REFERENCES, seconds=60)


def test_what_cannot_run_is_skipped_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    found, skipped = java.measure_in_java(CANDIDATES, REFERENCES, seconds=60)
    assert found == [] and skipped == {"METEOR": "there is no Java here", "SPICE": "there is no Java here"}


def test_spice_without_its_models_says_how_to_get_them(tmp_path, monkeypatch):
    java_that(tmp_path, "sys.exit(1)", monkeypatch)
    monkeypatch.setattr(java, "_SPICE_MODELS", ("no-such-model.jar",))
    with pytest.raises(java.UnavailableError, match="get_stanford_models"):
        java.spice(CANDIDATES, REFERENCES, seconds=60)
