"""Imports run one way: launch -> captioning -> shards, and down the floors of captioning."""

import ast
from pathlib import Path

from tests.conftest import ROOT

# The higher floor may import the lower. A module is on the floor of the longest name that begins its own.
FLOORS = {
    "launch": 14,
    "launch.cli": 13,
    "captioning.training": 12,
    "captioning.doctor": 12,
    "captioning.report": 11,
    "captioning.inference": 10,
    "captioning.evaluation": 10,
    "captioning.model": 9,
    "captioning.data": 8,
    "captioning.runs": 7,
    "captioning.distributed": 7,
    "captioning.metrics": 6,
    "captioning.config": 6,
    "shards.packing": 5,
    "shards.sources": 4,
    "shards": 3,
    "shards.storage": 2,
    "captioning.version": 1,
    "shards.errors": 1,
    "shards.files": 1,
    "shards.hashing": 1,
}


def floor(module: str) -> int:
    matching = [name for name in FLOORS if module == name or module.startswith(name + ".")]
    assert matching, f"{module} is on no floor: say in tests/unit/test_imports.py where it lives"
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
            if module in ("captioning", "shards"):
                continue
            for imported in imports(path):
                assert floor(imported) <= floor(module), f"{module} imports {imported}"
