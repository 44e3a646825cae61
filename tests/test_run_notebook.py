"""The runner: what `make run-notebook` writes, prints and returns, on notebooks made on the spot."""

import json
import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from helpers.config import UsageError, parse_parameters
from helpers.tools.run_notebook import find_notebook, main

ROOT = Path(__file__).resolve().parents[1]
PARAMETERS = "profile = None\ntask = None\nrun_name = None\nparameters = {}"


@pytest.fixture
def course(tmp_path):
    """A folder with the course's config.yaml; call it to add a notebook of code cells."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "config.yaml").write_text((ROOT / "config.yaml").read_text())

    def add(name, *sources):
        cells = [new_markdown_cell(f"# The {name} notebook\nand more")]
        for source in sources:
            tags = {"tags": ["parameters"]} if source == PARAMETERS else {}
            cells.append(new_code_cell(source, metadata=tags))
        kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
        nbformat.write(
            new_notebook(cells=cells, metadata={"kernelspec": kernel}), tmp_path / "notebooks" / f"{name}.ipynb"
        )

    add.root = tmp_path
    return add


def test_a_good_notebook_leaves_itself_and_its_html(course, capfd, monkeypatch):
    foreign = course.root / "kernels" / "python3"  # a kernel of the same name that must not be taken
    foreign.mkdir(parents=True)
    spec = {"argv": ["no-such-python"], "display_name": "foreign", "language": "python"}
    (foreign / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(course.root))
    show = "import sys, os\nprint([profile, task, run_name, parameters, sys.executable, os.path.basename(os.getcwd())])"
    course("good", PARAMETERS, show, "import matplotlib.pyplot as plt\nplt.plot([1, 2]);")

    words = [
        "notebooks/good.ipynb",
        "--profile",
        "tiny",
        "--parameters",
        "training.lr=1e-3 data.channels=[aia171, hmi_m]",
    ]
    assert main(words, course.root) == 0
    folder = course.root / "runs" / "good-flare-tiny-001"
    told = ["tiny", None, folder.name, {"training.lr": 1e-3, "data.channels": ["aia171", "hmi_m"]}]
    printed = capfd.readouterr().out
    assert repr([*told, sys.executable, "notebooks"]) in printed  # streamed while it runs
    assert "[  1/5] The good notebook" in printed and "good.html" in printed.splitlines()[-1]
    assert "image/png" in (folder / "good.ipynb").read_text() and "image/png" in (folder / "good.html").read_text()
    assert os.environ["JUPYTER_PATH"] == str(course.root)


def test_a_failing_cell_has_the_last_word_and_leaves_its_html(course, capfd):
    course("bad", "print('before')", "raise ValueError('the Sun is too bright')", "print('never')")
    assert main(["bad"], course.root) == 1
    assert capfd.readouterr().out.splitlines()[-1] == "ValueError: the Sun is too bright"
    folder = course.root / "runs" / "bad-flare-tiny-001"
    html = (folder / "bad.html").read_text()
    assert "the Sun is too bright" in html and "before" in html
    assert main(["bad"], course.root) == 1  # the next run takes the next number
    assert sorted(path.name for path in folder.parent.iterdir()) == ["bad-flare-tiny-001", "bad-flare-tiny-002"]


def test_a_dead_kernel_is_told_in_a_sentence(course, capfd):
    course("dead", "import os; os._exit(9)")
    assert main(["dead"], course.root) == 1
    assert "memory ran out" in capfd.readouterr().out.splitlines()[-1]
    assert (course.root / "runs" / "dead-flare-tiny-001" / "dead.html").exists()


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["nope"], "There is no notebook 'nope'.\nThere is:\n  plain           The plain notebook"),
        ([], "Which notebook? For example: make run-notebook NB=finetune\nThere is:\n  plain"),
        (["plain", "--profile", "big"], "profile: there is no 'big' under `profiles`; there is surya, tiny"),
        (["plain", "--task", "rain"], "task: there is no 'rain' under `tasks`"),
        (["plain", "--parameters", "training.lrr=1"], "did you mean training.lr?"),
        (["plain", "--parameters", "fast"], "Parameters are written key=value"),
        (["plain", "--parameters", "lora.targets=[qkv"], "The value of 'lora.targets=[qkv' is not complete YAML"),
        (["plain", "--task", "flare"], "plain.ipynb does not read task"),
    ],
)
def test_a_request_that_makes_no_sense_ends_before_the_run(course, capsys, words, sentence):
    course("plain", "1 + 1")
    assert main(words, course.root) == 2
    printed = capsys.readouterr().out
    assert sentence in printed and "Traceback" not in printed
    assert not (course.root / "runs").exists()


@pytest.mark.parametrize("name", ["baseline", "baseline.ipynb", "notebooks/baseline.ipynb"])
def test_a_notebook_may_be_named_with_folder_and_ending(course, name):
    course("baseline", "1")
    assert find_notebook(name, course.root / "notebooks").name == "baseline.ipynb"


def test_parameters_are_read_as_the_config_file_would():
    text = "training.lr=1e-3 model.rpe=true head.penultimate=null\n labels.path='my labels.csv' lora.qkv=[q, v]"
    assert parse_parameters([text]) == {
        "training.lr": 1e-3,
        "model.rpe": True,
        "head.penultimate": None,
        "labels.path": "my labels.csv",
        "lora.qkv": ["q", "v"],
    }
    assert parse_parameters(["seed=1", "task=flare"]) == {"seed": 1, "task": "flare"}
    assert parse_parameters([""]) == parse_parameters([]) == {}
    with pytest.raises(UsageError, match="got '3'"):
        parse_parameters(["3"])


def test_make_lists_the_notebooks_and_fails(make):
    done = make("run-notebook", "NB=nope", "P=training.lr=1e-3 data.channels=[aia171, hmi_m]")
    assert done.returncode != 0 and done.stdout.startswith("There is no notebook 'nope'.\nThere is:")
