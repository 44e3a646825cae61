"""`make new-notebook`: a personal copy that runs, is never overwritten, and lies where no update reaches."""

from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from helpers.tools import new_notebook as module
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


@pytest.mark.parametrize("name", ["my_ribbons", "my_ribbons.ipynb", "notebooks/my_ribbons.ipynb"])
def test_the_copy_is_clean_says_how_to_go_on_and_runs(course, capfd, name):
    assert module.main(["lesson", name], course) == 0
    told = capfd.readouterr().out
    assert "make run-notebook NB=my_ribbons" in told and "git add notebooks/my_ribbons.ipynb" in told
    copy = nbformat.read(course / "notebooks" / "my_ribbons.ipynb", as_version=4)
    assert [cell.id for cell in copy.cells] == ["head", "parameters", "show"]
    assert not copy.cells[2].outputs and copy.cells[2].execution_count is None
    assert run_notebook(["my_ribbons"], course) == 0
    assert "run my_ribbons-flare-tiny-001" in capfd.readouterr().out


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["lesson", "ribbons"], "NAME must begin with my_ and go on with letters, digits or _"),
        (
            ["lesson", ""],
            "and there is none; the template never has such names.\nFor example: make new-notebook",
        ),
        (["lesson", "my_"], "not 'my_'"),
        (["lesson", "my_ribbons; rm"], "not 'my_ribbons; rm'"),
        (["lesson", "my_other"], "notebooks/my_other.ipynb exists already and stays as it is."),
        (["nope", "my_ribbons"], "There is no notebook 'nope'.\nThere is:\n  lesson"),
    ],
)
def test_what_cannot_be_copied_is_said_and_nothing_is_written(course, capsys, words, sentence):
    (course / "notebooks" / "my_other.ipynb").write_text((course / "notebooks" / "lesson.ipynb").read_text())
    before = {path: path.read_bytes() for path in course.rglob("*") if path.is_file()}
    assert module.main(words, course) == 2
    assert sentence in capsys.readouterr().out
    assert {path: path.read_bytes() for path in course.rglob("*") if path.is_file()} == before


def test_make_knows_two_meanings_of_FROM(make):  # noqa: N802
    assert '-m helpers.tools.update "upstream"' in make("-n", "update", "FROM=upstream").stdout
    assert make("-n", "update").stdout.rstrip().endswith("-m helpers.tools.update")
    assert (
        '-m helpers.tools.new_notebook "baseline" "my_x"'
        in make("-n", "new-notebook", "FROM=baseline", "NAME=my_x").stdout
    )
    assert '-m helpers.tools.new_notebook "finetune" "my_x"' in make("-n", "new-notebook", "NAME=my_x").stdout
    done = make("new-notebook", "FROM=origin", "NAME=my_x")
    assert done.returncode and "There is no notebook 'origin'." in done.stdout
