"""Texts, names and runs from elsewhere: they are shown, and do nothing."""

import io
import json
import logging

import pytest
from rich.console import Console

from captioning.data.splits import saved_split
from captioning.inference.evaluate_run import evaluate
from captioning.report.markup import escape
from captioning.runs import checkpoint
from captioning.training.ledger import Ledger
from captioning.training.monitor import Monitor
from launch.cli import command
from shards import index as shard_index
from shards.errors import InputError, listed, printable
from shards.storage import outages
from tests.conftest import untrained_run

CLEARS_THE_SCREEN = "a cat\x1b[2J\x1b]0;title\x07 \u202egnp.exe\u2028\ud800 \x9b31m"
SHOWN = r"a cat\x1b[2J\x1b]0;title\x07 \u202egnp.exe\u2028\ud800 \x9b31m"


def test_what_acts_on_a_terminal_is_shown_instead():
    assert printable(CLEARS_THE_SCREEN) == SHOWN
    assert printable("two\nlines\tand ｃａｐｓ, नमस्ते, 猫 👩‍🚀") == "two\nlines\tand ｃａｐｓ, नमस्ते, 猫 👩‍🚀"
    assert escape(CLEARS_THE_SCREEN + "<b>") == SHOWN + "&lt;b&gt;"
    assert listed([CLEARS_THE_SCREEN]) == f"  {SHOWN}"


def test_errors_and_logs_are_escaped(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger("shards"), "propagate", False)  # not into the report: it is no UTF-8
    with pytest.raises(SystemExit) as ended:
        command.run(lambda: (_ for _ in ()).throw(InputError(CLEARS_THE_SCREEN)))
    logging.getLogger("shards.of_a_test").warning("%s", CLEARS_THE_SCREEN)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said == f"error: {SHOWN}\nwarning: {SHOWN}\n"


def test_a_key_in_brackets_is_no_markup():
    """Rich would take [/] for markup that ends nothing, and raise."""
    monitor = object.__new__(Monitor)
    out = io.StringIO()
    monitor.console = Console(file=out, markup=False, highlight=False, width=200)
    monitor.say(f"unreadable: [/red] [bold] {CLEARS_THE_SCREEN}")
    monitor.table("run", {"data": "[/] \x1b[1m"})
    assert f"unreadable: [/red] [bold] {SHOWN}" in out.getvalue() and r"[/] \x1b[1m" in out.getvalue()


def test_the_ledger_has_a_line_a_sample_whatever_its_key(tmp_path):
    from types import SimpleNamespace

    ledger = Ledger(tmp_path, 0)
    ledger.write([SimpleNamespace(step=0, epoch=0, keys=("a\nb", "c\td", "e"), unreadable=[])])
    assert ledger.sync() is None
    lines = (tmp_path / "ledger" / "rank-0.txt").read_text().splitlines()
    assert lines == ["1\t0\ta\\nb\t1", "1\t0\tc\\td\t1", "1\t0\te\t1"]


def test_a_run_from_elsewhere_runs_no_command(tmp_path):
    canary = tmp_path / "canary"
    run = untrained_run(tmp_path / "run", data__val=f"pipe:touch {canary} train.json")
    with pytest.raises(InputError, match="names a command"):
        evaluate(run)
    with pytest.raises(InputError, match="names a command"):
        saved_split("pipe:cat train.json")
    assert saved_split("/data/train.json") == "/data/train.json" and not canary.exists()


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "a/b", "", "..", "a\0b"])
def test_a_manifest_names_files_of_its_folder_alone(tmp_path, name):
    run = untrained_run(tmp_path / "run")
    folder = run / "checkpoints" / "step-00000001"
    assert checkpoint.damage(folder) is None
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, name: {"size": 1, "sha256": "0"}}))
    assert "it names" in checkpoint.damage(folder)


@pytest.mark.parametrize(
    "url",
    ["zip://a.json", "zip://a.json::/nowhere.zip", "reference://a.json", "reference://", "dir://a.json", "pipe:",
     "generic://x/a.json", "http://[::1/a.json", "http://\0/a.json", "data://a.json", "memory://nowhere/a.json",
     "simplecache::http://127.0.0.1:1/a.json", "local://nowhere/a.json"],
)  # fmt: skip
def test_an_odd_url_is_told(url, monkeypatch):
    monkeypatch.setattr(outages, "_patience", 0.0)
    monkeypatch.setattr(outages, "FIRST_WAIT", 0.01)
    with pytest.raises(InputError):
        shard_index.load(url)
