"""`make new-notebook`: a personal copy that is never overwritten, and lies where no update reaches."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from helpers.tools import new_notebook as module
from helpers.tools.command import Refusal
from helpers.tools.run_notebook import main as run_notebook

ROOT = Path(__file__).resolve().parents[1]
PARAMETERS = "profile = None\ntask = None\nrun_name = None\nparameters = {}"


@pytest.fixture
def course(tmp_path):
    """A folder with the course's config and one executed notebook, `lesson`."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "config.yaml").write_text((ROOT / "config.yaml").read_text())
    cells = [
        new_markdown_cell("# The lesson", id="head"),
        new_code_cell(PARAMETERS, id="parameters", metadata={"tags": ["parameters"]}),
        new_code_cell(
            "print('run', run_name)", id="show", outputs=[new_output("stream", text="old")], execution_count=7
        ),
    ]
    kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), tmp_path / "notebooks" / "lesson.ipynb")
    return tmp_path


@pytest.mark.parametrize("name", ["my_ribbons", "notebooks/my_ribbons.ipynb"])
def test_the_copy_is_clean(course, capsys, name):
    module.main("lesson", name, course)
    assert "make run-notebook NB=my_ribbons" in capsys.readouterr().out
    copy = nbformat.read(course / "notebooks" / "my_ribbons.ipynb", as_version=4)
    assert [cell.id for cell in copy.cells] == ["head", "parameters", "show"]
    assert not copy.cells[2].outputs and copy.cells[2].execution_count is None


@pytest.mark.parametrize(
    "origin, name, sentence",
    [
        ("lesson", "ribbons", "got 'ribbons'"),
        ("lesson", "", "got ''"),
        ("lesson", "my_ribbons; rm", "got 'my_ribbons; rm'"),
        ("lesson", "my_other", "notebooks/my_other.ipynb exists already"),
        ("nope", "my_ribbons", "There is no notebook 'nope'. There is: lesson"),
    ],
)
def test_what_cannot_be_copied_is_said_and_nothing_is_written(course, origin, name, sentence):
    (course / "notebooks" / "my_other.ipynb").write_text((course / "notebooks" / "lesson.ipynb").read_text())
    before = {path: path.read_bytes() for path in course.rglob("*") if path.is_file()}
    with pytest.raises(Refusal, match=re.escape(sentence)):
        module.main(origin, name, course)
    assert {path: path.read_bytes() for path in course.rglob("*") if path.is_file()} == before


def test_the_copy_runs_as_the_lesson_does(course, capfd):
    module.main("lesson", "my_ribbons", course)
    assert run_notebook(["my_ribbons"], course) == 0
    assert "run my_ribbons-flare-tiny-001" in capfd.readouterr().out


def test_copying_a_file_does_not_load_torch():
    code = "import sys, helpers.tools.new_notebook; sys.exit('torch' in sys.modules or 'papermill' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_make_hands_the_names_over(make):
    done = make("new-notebook", "FROM=origin", "NAME=my_x")
    assert done.returncode and done.stdout.startswith("There is no notebook 'origin'.")
    assert "got ''" in make("new-notebook", "NAME=").stdout
