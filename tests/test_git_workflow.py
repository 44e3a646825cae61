"""A participant works on a branch while the template moves on: `make update` with real repositories."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parents[1]
PERSON = {f"GIT_{who}_{what}": "someone@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
HOUSE = ("Makefile", "pyproject.toml", "requirements.lock", ".gitattributes", ".gitignore", "helpers/environment.py")


def git(folder: Path, *words: str, check: bool = True) -> str:
    plain = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, env=os.environ | PERSON | plain)
    assert not check or done.returncode == 0, done.stderr
    return done.stdout


def write_notebook(path: Path, *sources: str, outputs: bool = False) -> None:
    """A notebook of one heading and code cells, with stable cell ids, executed or not."""
    cells = [new_markdown_cell("# Lesson", id="head")]
    for number, source in enumerate(sources):
        results = [new_output("stream", text="secret path")] if outputs else []
        cells.append(new_code_cell(source, id=f"cell{number}", outputs=results, execution_count=1 if outputs else None))
    path.parent.mkdir(exist_ok=True)
    nbformat.write(new_notebook(cells=cells), path)


def sources(path: Path) -> list[str]:
    return [cell.source for cell in nbformat.read(path, as_version=4).cells[1:]]


@pytest.fixture
def template(tmp_path):
    """The published template: the house, one notebook, one text file."""
    folder = tmp_path / "the template"
    for name in HOUSE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    write_notebook(folder / "notebooks" / "lesson.ipynb", "lr = 1", "train()", "plot()")
    (folder / "config.yaml").write_text("seed: 0\n")
    git(folder, "init", "-q", "-b", "main")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "First edition")
    return folder


@pytest.fixture
def clone(template, monkeypatch):
    """A participant's clone on a branch of its own, whose git knows nbstripout and nbdime as after `make env`."""
    folder = template.with_name("my clone")
    git(template.parent, "clone", "-q", str(template), folder.name)
    configure = "import pathlib, helpers.environment as e; e.ROOT = pathlib.Path.cwd(); e.configure_git()"
    subprocess.run([sys.executable, "-c", configure], cwd=folder, check=True, env=os.environ | {"PYTHONPATH": ""})
    git(folder, "switch", "-qc", "my-task")
    for key, value in {**PERSON, "GIT_CONFIG_GLOBAL": os.devnull}.items():
        monkeypatch.setenv(key, value)
    return folder


@pytest.fixture
def update(make, clone):
    """Call `make update` in the clone."""
    return lambda: make("update", cwd=clone)


def publish(template: Path, *notebook_sources: str, message: str) -> None:
    write_notebook(template / "notebooks" / "lesson.ipynb", *notebook_sources)
    git(template, "commit", "-qam", message)


def test_outputs_stay_out_of_git_but_in_the_folder(clone):
    write_notebook(clone / "notebooks" / "lesson.ipynb", "lr = 1", "train()", "plot()", outputs=True)
    assert git(clone, "diff", "--no-ext-diff", "--name-only", "HEAD") == ""  # the same notebook, only executed
    write_notebook(clone / "notebooks" / "lesson.ipynb", "lr = 2", "train()", "plot()", outputs=True)
    git(clone / "notebooks", "commit", "-qam", "My learning rate")
    stored = git(clone, "cat-file", "blob", "HEAD:notebooks/lesson.ipynb")
    assert "lr = 2" in stored and "secret" not in stored
    assert "secret" in (clone / "notebooks" / "lesson.ipynb").read_text()


def test_a_clone_without_the_environment_still_works(template):
    folder = template.with_name("bare clone")
    git(template.parent, "clone", "-q", str(template), folder.name)
    git(folder, "config", "filter.nbstripout.clean", "no-such-python -m nbstripout")
    git(folder, "config", "filter.nbstripout.required", "false")
    write_notebook(folder / "notebooks" / "lesson.ipynb", "lr = 3")
    git(folder, "commit", "-qam", "By hand")
    assert git(folder, "status", "--porcelain") == ""


def test_update_brings_the_template_and_keeps_my_work(template, clone, update):
    write_notebook(clone / "notebooks" / "lesson.ipynb", "lr = 1", "train()", "plot()", "mine()")
    (clone / "config.local.yaml").write_text("seed: 7\n")
    git(clone, "commit", "-qam", "My cell")
    write_notebook(clone / "notebooks" / "lesson.ipynb", "lr = 1", "train()", "plot()", "mine()", outputs=True)
    publish(template, "lr = 1e-3", "train()", "plot()", message="A better learning rate")

    assert "Already up to date" in git(clone, "merge", "origin/main")  # the trap: nothing was fetched
    done = update()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "New in origin/main:" in done.stdout and "A better learning rate" in done.stdout
    assert sources(clone / "notebooks" / "lesson.ipynb") == ["lr = 1e-3", "train()", "plot()", "mine()"]
    assert (clone / "config.local.yaml").read_text() == "seed: 7\n"
    assert git(clone, "status", "--porcelain") == ""
    assert update().stdout.startswith("Nothing new: my-task already holds")


def test_a_conflict_leaves_a_notebook_that_opens_and_says_what_to_do(template, clone, update):
    write_notebook(clone / "notebooks" / "lesson.ipynb", "lr = 5", "train()", "plot()")
    git(clone, "commit", "-qam", "My learning rate")
    publish(template, "lr = 1e-3", "train()", "plot(more)", message="A better learning rate")
    done = update()
    assert done.returncode != 0
    assert "changed the same lines of:\n  notebooks/lesson.ipynb" in done.stdout and "git merge --abort" in done.stdout
    merged = "\n".join(sources(clone / "notebooks" / "lesson.ipynb"))  # still a notebook
    assert all(text in merged for text in ("<<<<<<<", "lr = 5", "lr = 1e-3", ">>>>>>>", "plot(more)"))
    git(clone, "merge", "--abort")
    assert sources(clone / "notebooks" / "lesson.ipynb")[0] == "lr = 5"


@pytest.mark.parametrize(
    "prepare, sentence",
    [
        (("switch", "-q", "main"), "You are on main. Keep your work on a branch of its own"),
        (("switch", "-q", "--detach"), "You are on no branch."),
        (("rm", "-q", "config.yaml"), "You changed, and did not commit yet:\n  config.yaml\n"),
        (("remote", "set-url", "origin", "nowhere"), "Could not reach the template (origin); nothing was changed."),
    ],
)
def test_update_refuses_in_a_sentence(template, clone, update, prepare, sentence):
    publish(template, "lr = 9", message="News")
    git(clone, *prepare)
    before = git(clone, "rev-parse", "HEAD")
    done = update()
    assert done.returncode != 0 and sentence in done.stdout
    assert git(clone, "rev-parse", "HEAD") == before


def test_differences_of_notebooks_are_shown_by_cell(clone):
    write_notebook(clone / "notebooks" / "lesson.ipynb", "lr = 2", "train()", "plot()", outputs=True)
    shown = git(clone, "diff")
    assert "lr = 2" in shown and "secret" not in shown and "cells/1/source" in shown
