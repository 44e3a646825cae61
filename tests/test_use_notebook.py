"""The notebook `use` runs from top to bottom, trains where there is no run, and its exercises can be done."""

import nbformat
import pytest
from exercises import check_exercises, folder_with_answers

from helpers.tools.run_notebook import main

pytestmark = [pytest.mark.notebook, pytest.mark.xdist_group("use_notebook")]
SMALL = [
    "synthetic.visits=16 paths.reserve_gb=0 training.epochs=1 training.batch_size=4",
    "split.train=[2014-01-01, 2014-01-15] split.val=[2014-01-17, 2014-01-23] split.test=[2014-01-25, 2014-02-02]",
    "target.event_threshold=null",
]


@pytest.mark.parametrize("task", ["flare", "active_region"])
def test_it_predicts_probes_and_shares(tmp_path, monkeypatch, task):
    monkeypatch.setenv("SURYA_SHARED", str(tmp_path / "shared"))
    root = folder_with_answers(tmp_path / "course")
    words = ["use", "--profile", "tiny", "--task", task, "--parameters", *SMALL, f"paths.runs={tmp_path / 'runs'}"]
    assert main(words, root=root) == 0
    folder = tmp_path / "runs" / f"use-{task}-tiny-001"
    cells = nbformat.read(folder / "use.ipynb", as_version=4).cells
    check_exercises(cells)
    text = str([cell.outputs for cell in cells if cell.cell_type == "code"])
    assert "so one is trained now" in text and "Traceback" not in text and "Warning" not in text
    card = (folder / "share" / "README.md").read_text()
    assert f"finetune-{task}-tiny-001" in card and "synthetic" in card
    assert (folder / "share" / "merged.pt").stat().st_size > 1e6
