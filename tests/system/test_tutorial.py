"""launch/tutorial.ipynb: its cells run one after another, and its stored outputs are those of every cell."""

import json
import re
import sys

from tests.conftest import ROOT, run_command

NOTEBOOK = ROOT / "launch" / "tutorial.ipynb"
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_the_cells_run(tmp_path):
    """As Python without a notebook runs them; the run ends as finished, and the last cell has its picture."""
    cells = ["".join(cell["source"]) for cell in CELLS]
    checks = (
        'print((folder / "run" / "status").read_text().split()[0], (folder / "attention.png").stat().st_size > 9000)'
    )
    done = run_command([sys.executable, "-c", "\n".join([*cells, checks])], PYTHONPATH=str(ROOT), TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["finished", "True"]
    assert re.search(r"step 20/20  eta 0:00:00  loss \d", done.stderr)


def test_every_cell_has_been_run_and_the_file_is_small():
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    assert all(cell["outputs"] for cell in CELLS[1:]), "run all cells, and save"
    assert any("image/png" in output.get("data", {}) for cell in CELLS for output in cell["outputs"])
    assert NOTEBOOK.stat().st_size < 300_000
    assert not re.search(r"/home/|/root/|" + re.escape(str(ROOT)), NOTEBOOK.read_text())
