"""Imports run one way: launch -> captioning -> shards, and down the floors of captioning."""

import ast
from pathlib import Path

from tests.conftest import ROOT

# The higher floor may import the lower. A module is on the floor of the longest name that begins its own.
FLOORS = {
    "launch": 6,
    "captioning.training": 5,
    "captioning.report": 5,
    "captioning.diagnosis": 5,
    "captioning.predict": 4,
    "captioning.profile": 5,
    "captioning.tutorial": 4,
    "captioning.interchange": 3,
    "captioning.scoring": 4,
    "captioning.model": 3,
    "captioning.data": 2,
    "captioning.config": 1,
    "captioning.checkpoint": 1,
    "captioning.progress": 1,
    "captioning.ranks": 1,
    "captioning.run_folder": 1,
    "shards": 0,
}


def floor(module: str) -> int:
    matching = [name for name in FLOORS if module == name or module.startswith(name + ".")]
    assert matching, f"{module} is on no floor: say in tests/test_imports.py where it lives"
    return FLOORS[max(matching, key=len)]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("launch", "captioning", "shards")}


def test_no_arrow_points_up():
    for package in ("launch", "captioning", "shards"):
        for path in (ROOT / package).rglob("*.py"):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            if module == "captioning":
                continue
            for imported in imports(path):
                assert floor(imported) <= floor(module), f"{module} imports {imported}"
