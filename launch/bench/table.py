"""What a benchmark prints: the machine, the command, and a table; and the same as JSON."""

import importlib.metadata
import json
import os
import platform
import shlex
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as RichTable

from captioning.inference.cost_profile import processor
from shards.files import write_atomically

Cell = str | int | float | None


@dataclass
class Table:
    """Rows of one measurement; ``notes`` say what was done and what to mind in reading it."""

    title: str
    columns: list[str]
    rows: list[list[Cell]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory, devices, versions, and how busy the machine was at the start."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "accelerate", "webdataset")}
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "devices": devices,
        "python": platform.python_version(),
        **versions,
        "load_at_start": round(os.getloadavg()[0], 1),
    }


def command() -> str:
    """This process's command line, as it would be typed."""
    mode = " ".join(map(shlex.quote, sys.argv[1:]))
    return f"captioning bench {mode}"


def show(tables: list[Table], facts: dict[str, Any]) -> None:
    """Print machine, command and tables."""
    console = Console()
    console.width = max(console.width, 130)  # of a file or a narrow window too: columns cut short tell nothing
    console.print(command(), markup=False, highlight=False)
    console.print(
        ", ".join(f"{name} {cell_text(value)}" for name, value in facts.items()), markup=False, highlight=False
    )
    for table in tables:
        drawn = RichTable(title=table.title, title_justify="left")
        for number, column in enumerate(table.columns):
            drawn.add_column(column, justify="left" if number == 0 else "right")
        for row in table.rows:
            drawn.add_row(*map(cell_text, row))
        console.print(drawn)
        for note in table.notes:
            console.print(f"  {note}", markup=False, highlight=False)


def cell_text(value: Any) -> str:
    match value:
        case None:
            return "-"
        case float():
            return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
        case list():
            return ", ".join(map(cell_text, value)) or "none"
        case _:
            return str(value)


def write(path: Path, tables: list[Table], facts: dict[str, Any]) -> None:
    """The same as ``show`` prints, as JSON."""
    document = {"command": command(), "machine": facts, "tables": [asdict(table) for table in tables]}
    write_atomically(path, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())


def write_markdown(path: Path, tables: list[Table]) -> None:
    """Titles, tables and notes, as Markdown."""
    lines: list[str] = []
    for table in tables:
        bars = "|".join(["---", *["---:"] * (len(table.columns) - 1)])
        rows = [" | ".join(cell_text(cell) for cell in row) for row in table.rows]
        lines += [f"**{table.title}**", "", f"| {' | '.join(table.columns)} |", f"|{bars}|"]
        lines += [*(f"| {row} |" for row in rows), ""]
        lines += [f"{note[:1].upper()}{note[1:]}." for note in table.notes] + [""]
    write_atomically(path, "\n".join(lines).encode())
