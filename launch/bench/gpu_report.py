"""The page of `captioning doctor --gpu`, made from what it wrote as JSON."""

import re
from collections.abc import Iterable
from typing import Any

from captioning.report.markup import escape, page, table
from launch.bench.table import cell_text

_OF_CELL = re.compile(r"(?P<test>\w+)\[(?P<decoder>[a-z]+)-(?P<precision>no|bf16|fp16)\]")


def html(document: dict[str, Any]) -> str:
    """The whole page; everything in ``document`` may come from another machine."""
    sections = "\n".join(
        f"<section><h2>{escape(part['name'])}</h2>\n{_part(part)}</section>" for part in document["parts"]
    )
    return page("GPU report", f"{_head(document)}\n{_machine(document['machine'])}\n{sections}")


def _head(document: dict[str, Any]) -> str:
    parts = document["parts"]
    tests = [test for part in parts for test in part.get("tests", [])]
    counted = {
        "tests passed": _count(tests, "passed"),
        "tests failed": _count(tests, "failed"),
        "tests skipped": _count(tests, "skipped"),
        "parts without failure": f"{_count(parts, 'passed')} of {len(parts)}",
        "in all": f"{document['seconds']} s",
    }
    tiles = "".join(f'<div class="tile"><b>{value}</b><span>{what}</span></div>' for what, value in counted.items())
    rehearsal = (
        '<p class="note">A rehearsal on a CPU, in small: it shows that every part runs, and nothing about GPUs.</p>'
        if document["device"] == "cpu"
        else ""
    )
    devices = "; ".join(map(str, document["machine"]["devices"])) or str(document["machine"]["processor"])
    return (
        f'<h1>GPU report</h1>\n<p class="soft">{escape(devices)} · {escape(document["began"])}</p>\n{rehearsal}'
        f'<div class="tiles">{tiles}</div>'
    )


def _count(entries: Iterable[dict[str, Any]], state: str) -> int:
    return sum(entry["state"] == state for entry in entries)


def _machine(facts: dict[str, Any]) -> str:
    rows = [[escape(name), escape(cell_text(value))] for name, value in facts.items()]
    return f"<section><h2>machine</h2>\n{table(('', ''), rows)}</section>"


def _part(part: dict[str, Any]) -> str:
    state = f"{part['state']} in {part['seconds']:.0f} s, of {part['limit_s']} s that it may take"
    shown = [
        f"<p>{escape(part['what'])}: {escape(state)}.<br><code>{escape(part['command'])}</code></p>",
        _tests(part.get("tests", [])),
        *map(_table, part.get("tables", [])),
        _said("What it printed last", part.get("said", "")),
    ]
    return "\n".join(filter(None, shown))


def _tests(tests: list[dict[str, Any]]) -> str:
    """Decoders by precisions, where a test has both; then all of the tests, and why they failed or were skipped."""
    if not tests:
        return ""
    rows = [
        [escape(_readable(test["name"])), test["state"], f"{test['seconds']:.1f}", escape(_first_line(test))]
        for test in tests
    ]
    failures = [_said(_readable(test["name"]), test["why"]) for test in tests if test["state"] == "failed"]
    return "\n".join([_grid(tests), table(("test", "", "s", ""), rows, numbers=(2,)), *failures])


def _grid(tests: list[dict[str, Any]]) -> str:
    cells = {(m["decoder"], m["precision"]): test for test in tests if (m := _OF_CELL.fullmatch(test["name"]))}
    decoders, precisions = (list(dict.fromkeys(key[at] for key in cells)) for at in (0, 1))
    if not cells:
        return ""
    rows = [
        [decoder, *(cells.get((decoder, precision), {"state": "–"})["state"] for precision in precisions)]
        for decoder in decoders
    ]
    return table(("decoder", *precisions), rows)


def _readable(name: str) -> str:
    return name.removeprefix("test_").replace("_", " ").replace("[", " [")


def _first_line(test: dict[str, Any]) -> str:
    return test.get("why", "").strip().split("\n")[0] if test["state"] == "skipped" else ""


def _table(shown: dict[str, Any]) -> str:
    rows = [[escape(cell_text(cell)) for cell in row] for row in shown["rows"]]
    notes = "".join(f"{escape(note[:1].upper() + note[1:])}. " for note in shown["notes"])
    head = [escape(column) for column in shown["columns"]]
    return (
        f"<h3>{escape(shown['title'])}</h3>\n{table(head, rows, numbers=range(1, len(head)))}"
        f'<p class="small soft">{notes}</p>'
    )


def _said(title: str, text: str) -> str:
    if not text:
        return ""
    return f'<details><summary>{escape(title)}</summary><pre class="scroll small">{escape(text)}</pre></details>'
