"""A researcher works on a branch while the template moves on: real repositories, an upstream, a clone, a branch."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
from jupyter_server.services.contents.filemanager import FileContentsManager
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from helpers.tools.merge_notebook import merge

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
PERSON = {f"GIT_{who}_{what}": "someone@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
PLAIN = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
HOUSE = (
    "Makefile", "pyproject.toml", "requirements.lock", ".gitattributes", ".gitignore", "helpers/__init__.py",
    "helpers/tools/__init__.py", "helpers/tools/command.py", "helpers/tools/environment.py", "helpers/tools/update.py",
    "helpers/tools/merge_notebook.py",
)  # fmt: skip
CONFIG = "seed: 0\ntraining:\n  lr: 1e-3\n  warm: {up: 3}\n"
LESSON = "notebooks/lesson.ipynb"
BEFORE = "732cee3"  # the last commit of this repository before helpers/ moved into wings


def git(folder: Path, *words: str, check: bool = True) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, env=os.environ | PERSON | PLAIN)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def write_notebook(path: Path, *sources: str, outputs: bool = False) -> None:
    """A notebook of one heading and code cells, with stable cell ids, executed or not."""
    cells = [new_markdown_cell("# Lesson", id="head")]
    for number, source in enumerate(sources):
        cells.append(new_code_cell(source, id=f"cell{number}"))
    path.parent.mkdir(exist_ok=True)
    nbformat.write(new_notebook(cells=cells, metadata={"language_info": {"name": "python"}}), path)
    if outputs:
        execute(path)


def execute(path: Path) -> None:
    """What JupyterLab's kernel leaves in a file: outputs, counts, and what the kernel says about itself."""
    notebook = nbformat.read(path, as_version=4)
    for count, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), 1):
        cell.update(outputs=[new_output("stream", text="secret path")], execution_count=count)
    mode = {"name": "ipython", "version": 3}
    notebook.metadata.language_info.update(version="3.99", codemirror_mode=mode, nbconvert_exporter="python")
    nbformat.write(notebook, path)


def sources(path: Path) -> list[str]:
    return [cell.source for cell in nbformat.read(path, as_version=4).cells[1:]]


def publish(template: Path, *notebook_sources: str, message: str = "News") -> None:
    if notebook_sources:
        write_notebook(template / LESSON, *notebook_sources)
    git(template, "add", "--all")
    git(template, "commit", "-qm", message)


def configure(folder: Path, module: str = "helpers.tools.environment") -> None:
    """What `make env` tells git, without the installation."""
    code = f"import pathlib, {module} as e; e.ROOT = pathlib.Path.cwd(); e.configure_git()"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, env=os.environ | {"PYTHONPATH": ""})


def state(folder: Path) -> dict[str, bytes]:
    """Every file of a clone but git's own, and what git thinks of them."""
    files = [path for path in folder.rglob("*") if path.is_file() and ".git/" not in path.as_posix()]
    found = {str(path): path.read_bytes() for path in files if "__pycache__" not in path.parts}
    return found | {"status": git(folder, "status", "--porcelain").encode(), "head": git(folder, "rev-parse", "HEAD")}


def opens_in_jupyterlab(path: Path) -> bool:
    """JupyterLab's own way of opening a notebook, which reports an invalid one in `message`."""
    model = FileContentsManager(root_dir=str(path.parent)).get(path.name)
    return model["type"] == "notebook" and model["format"] == "json" and model.get("message") is None


def make_template(folder: Path) -> Path:
    """The published template: the house, one notebook, a config."""
    for name in HOUSE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    write_notebook(folder / LESSON, "lr = 1", "train()", "plot()")
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "helpers" / "heads.py").write_text("HEADS = 1\n")
    git(folder, "init", "-q", "-b", "main")
    publish(folder, message="First edition")
    return folder


@pytest.fixture
def template(tmp_path):
    return make_template(tmp_path / "the 50%Off {x} template")


@pytest.fixture
def person(monkeypatch):
    """Whoever commits through `make` or the shell has a name, and no settings of this machine."""
    for key, value in (PERSON | PLAIN).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("PYTHONPATH", "")  # git's commands run the clone's own helpers


@pytest.fixture
def clone(template, person):
    """A researcher's clone on a branch of its own, whose git knows nbstripout and nbdime as after `make env`."""
    folder = template.with_name("my clone")
    git(template.parent, "clone", "-q", str(template), folder.name)
    configure(folder)
    git(folder, "switch", "-qc", "my-task")
    return folder


@pytest.fixture
def update(make, clone):
    """Call `make update` in the clone, with the clone's own helpers."""
    return lambda *words: make("update", *words, cwd=clone, PYTHONPATH="")


# --- what reaches a commit ---


def test_outputs_stay_out_of_git_but_in_the_folder(clone):
    """Also those of cells that nbstripout would make an exception of."""
    write_notebook(clone / LESSON, "lr = 1", "train()", "plot()", outputs=True)
    assert git(clone, "diff", "--no-ext-diff", "--name-only", "HEAD") == ""  # the same notebook, only executed
    write_notebook(clone / LESSON, "lr = 2", "train()", "plot()", outputs=True)
    notebook = nbformat.read(clone / LESSON, as_version=4)
    notebook.cells[1].metadata.tags = ["keep_output"]
    notebook.cells[2].metadata.update(keep_output=True)
    notebook.cells[3].metadata.update(init_cell=True)
    nbformat.write(notebook, clone / LESSON)
    git(clone / "notebooks", "commit", "-qam", "My learning rate")
    stored = git(clone, "cat-file", "blob", f"HEAD:{LESSON}")
    assert "lr = 2" in stored
    assert not any(word in stored for word in ("secret", "3.99", "codemirror", '"execution_count": 1'))
    assert "secret" in (clone / LESSON).read_text()


@pytest.mark.parametrize("name, shown", [("surya-course", "Surya course"), ("python3", ".venv (Python 3.12)")])
def test_the_choice_of_a_kernel_is_no_change(template, clone, name, shown):
    notebook = nbformat.read(clone / LESSON, as_version=4)
    notebook.metadata["kernelspec"] = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    nbformat.write(notebook, clone / LESSON)
    git(clone, "commit", "-qam", "As in the template")
    notebook.metadata["kernelspec"].update(name=name, display_name=shown)
    nbformat.write(notebook, clone / LESSON)
    execute(clone / LESSON)
    assert git(clone, "diff", "--no-ext-diff", "--name-only", "HEAD") == ""
    assert nbformat.read(clone / LESSON, as_version=4).metadata.kernelspec.name == name
    notebook.metadata["kernelspec"].update(name="ir", display_name="R", language="R")  # of another language it stays
    nbformat.write(notebook, clone / LESSON)
    git(clone, "commit", "-qam", "R")
    assert '"name": "ir"' in git(clone, "show", f"HEAD:{LESSON}")


def test_a_worktree_uses_the_settings_of_its_clone(template, clone):
    folder = clone.with_name("my worktree")
    git(clone, "worktree", "add", "-q", "-b", "other-task", str(folder))
    write_notebook(folder / LESSON, "lr = 1", "train()", "plot()", "mine()", outputs=True)
    git(folder, "commit", "-qam", "My cell")
    publish(template, "lr = 9", "train()", "plot()")
    git(folder, "fetch", "-q")
    git(folder, "merge", "-q", "origin", "main")
    assert sources(folder / LESSON) == ["lr = 9", "train()", "plot()", "mine()"]
    assert "secret" not in git(folder, "log", "-p", "--no-ext-diff")
    before = (clone / ".git" / "config").read_text()
    configure(folder)
    assert (clone / ".git" / "config").read_text() == before


def test_other_filters_of_the_clone_stay(clone):
    git(clone, "config", "filter.shout.clean", "tr a-z A-Z")
    git(clone, "config", "filter.lfs.required", "true")
    (clone / ".git" / "info" / "attributes").write_text("*.txt filter=shout\n")
    before = (clone / ".git" / "config").read_text()
    configure(clone)
    configure(clone)
    assert (clone / ".git" / "config").read_text() == before
    (clone / "note.txt").write_text("hello\n")
    write_notebook(clone / LESSON, "lr = 2", "train()", "plot()", outputs=True)
    git(clone, "add", "--all")
    assert git(clone, "show", ":note.txt") == "HELLO\n" and "secret" not in git(clone, "show", f":{LESSON}")


def test_settings_are_mended_where_their_python_is_gone(clone):
    git(clone, "config", "filter.nbstripout.clean", "/no/such/python -m nbstripout")  # a removed environment
    git(clone, "config", "filter.nbstripout.smudge", "no-such-command")
    configure(clone)
    assert f"| {sys.executable} -m" in git(clone, "config", "filter.nbstripout.clean")
    assert git(clone, "config", "filter.nbstripout.smudge") == "cat\n"


def test_a_clone_whose_environment_is_gone_still_commits(template, person):
    folder = template.with_name("bare clone")
    git(template.parent, "clone", "-q", str(template), folder.name)
    git(folder, "config", "filter.nbstripout.clean", "no-such-python -m nbstripout")
    git(folder, "config", "filter.nbstripout.required", "false")
    write_notebook(folder / LESSON, "lr = 3")
    git(folder, "commit", "-qam", "By hand")
    assert git(folder, "status", "--porcelain") == ""


def test_differences_of_notebooks_are_shown_by_cell(clone):
    write_notebook(clone / LESSON, "lr = 2", "train()", "plot()", outputs=True)
    shown = git(clone, "diff")
    assert "lr = 2" in shown and "secret" not in shown and "cells/1/source" in shown


# --- a researcher and the template move on ---


@pytest.fixture
def both_moved(template, clone):
    """Both changed the lesson in different cells and added some; the researcher runs it with another kernel."""
    write_notebook(clone / LESSON, "lr = 1", "train()", "plot(mine)", "mine()", outputs=True)
    notebook = nbformat.read(clone / LESSON, as_version=4)
    notebook.metadata["kernelspec"] = {"name": "ir", "display_name": "R", "language": "R"}
    nbformat.write(notebook, clone / LESSON)
    (clone / "config.local.yaml").write_text("seed: 7\n")
    git(clone, "commit", "-qam", "My cells")
    execute(clone / LESSON)
    (clone / "helpers" / "heads.py").write_text("HEADS = 'not committed, and not in the way'\n")
    write_notebook(template / LESSON, "lr = 9", "train()", "plot()")
    notebook = nbformat.read(template / LESSON, as_version=4)
    notebook.cells.append(new_code_cell("theirs()", id="theirs"))
    nbformat.write(notebook, template / LESSON)
    (template / "NEWS.md").write_text("# News\n\n- The lesson plots more.\n")
    publish(template, message="A better lesson")


def assert_both_are_there(clone: Path) -> None:
    notebook = nbformat.read(clone / LESSON, as_version=4)
    nbformat.validate(notebook)
    assert sources(clone / LESSON) == ["lr = 9", "train()", "plot(mine)", "mine()", "theirs()"]
    assert notebook.metadata.kernelspec.name == "ir" and opens_in_jupyterlab(clone / LESSON)
    assert "secret" not in (clone / LESSON).read_text()
    assert (clone / "config.local.yaml").read_text() == "seed: 7\n"
    assert git(clone, "status", "--porcelain") == " M helpers/heads.py\n"


def test_git_merge_origin_main_just_works(clone, both_moved):
    assert "Already up to date" in git(clone, "merge", "origin", "main")  # the trap: nothing was fetched
    git(clone, "add", LESSON)  # git looks at the executed notebook, and finds no change
    git(clone, "fetch", "-q")
    git(clone, "merge", "-q", "origin", "main")
    assert_both_are_there(clone)


def test_make_update_does_the_same_keeps_the_outputs_and_can_be_undone(clone, both_moved, update):
    before = git(clone, "rev-parse", "HEAD")
    done = update()
    assert done.returncode == 0 and "New in origin/main:\n# News\n- The lesson plots more.\n" in done.stdout, (
        done.stdout
    )
    assert_both_are_there(clone)
    (kept,) = (clone / "runs").glob("before-update-*/lesson.ipynb")
    assert "secret path" in kept.read_text()
    assert update().stdout.startswith("Nothing new")
    undo = done.stdout.split("go back to before: ")[1].splitlines()[0]
    subprocess.run(undo.split(), cwd=clone, check=True)
    assert git(clone, "rev-parse", "HEAD") == before and "plot(mine)" in sources(clone / LESSON)
    assert "not committed" in (clone / "helpers" / "heads.py").read_text()


@pytest.mark.parametrize("strategy", ["ort", "recursive"])
def test_a_clone_made_before_the_move_merges_it(tmp_path, person, strategy):
    """Its settings name the old address of the merge driver, `helpers.merge_notebook`."""
    if subprocess.run(["git", "cat-file", "-e", f"{BEFORE}^{{commit}}"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip(f"this clone's history does not reach back to {BEFORE} (shallow, or a copy)")
    upstream, old = tmp_path / "upstream", tmp_path / "old"
    git(tmp_path, "clone", "-q", "--shared", str(ROOT), "upstream")
    git(upstream, "switch", "-qC", "main", BEFORE)
    git(tmp_path, "clone", "-q", "--shared", str(upstream), "old")
    configure(old, "helpers.environment")
    assert "helpers.merge_notebook" in git(old, "config", "merge.jupyternotebook.driver")
    git(old, "switch", "-qc", "my-task")
    path = old / "notebooks" / "finetune.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(-1, new_code_cell("mine = 1", id="mine"))
    nbformat.write(notebook, path)
    git(old, "commit", "-qam", "My cell")
    git(upstream, "merge", "-q", "--ff-only", git(ROOT, "rev-parse", "HEAD").strip())
    git(old, "fetch", "-q")
    said = git(old, "merge", "-s", strategy, "origin/main", check=strategy == "ort")
    if strategy == "recursive":  # git before 2.34 removes the old driver before it calls it: yours stays, marked
        assert "CONFLICT (content): Merge conflict in notebooks/finetune.ipynb" in said
        git(old, "merge", "--abort")
        assert "mine = 1" in path.read_text() and (old / "helpers" / "lora.py").exists()
        return
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells]
    published = [cell.source for cell in nbformat.read(upstream / "notebooks" / path.name, as_version=4).cells]
    assert [source for source in cells if source != "mine = 1"] == published and len(cells) == len(published) + 1
    assert not (old / "helpers" / "merge_notebook.py").exists()
    configure(old)  # as the next `make` of any target does
    assert "helpers.tools.merge_notebook" in git(old, "config", "merge.jupyternotebook.driver")


# --- the same cell ---


@pytest.fixture
def same_cell(template, clone):
    """Both changed the first cell; the template also the last one. The researcher has more, committed and not."""
    write_notebook(clone / LESSON, "lr = 5", "train()", "plot()", outputs=True)
    git(clone, "commit", "-qam", "My learning rate")
    (clone / "config.local.yaml").write_text("seed: 7\n")
    (clone / "helpers" / "heads.py").write_text("HEADS = 'not committed, and not in the way'\n")
    (clone / "notebooks" / "my_notes.txt").write_text("not known to git\n")
    publish(template, "lr = 1e-3", "train()", "plot(more)", message="A better learning rate")


def test_the_same_cell_stops_the_merge_and_abort_restores_everything(clone, same_cell):
    git(clone, "fetch", "-q")
    write_notebook(clone / LESSON, "lr = 5", "train()", "plot()")
    git(clone, "add", LESSON)
    before = state(clone)
    said = git(clone, "merge", "origin", "main", check=False)
    assert f"CONFLICT (content): Merge conflict in {LESSON}" in said
    assert opens_in_jupyterlab(clone / LESSON)
    first, *_, last = sources(clone / LESSON)
    assert first == "<<<<<<< local\nlr = 5\n=======\nlr = 1e-3\n>>>>>>> remote" and last == "plot(more)"
    execute(clone / LESSON)  # someone tries to run it
    git(clone, "merge", "--abort")
    assert state(clone) == before


def test_update_explains_a_conflict_until_it_is_finished(clone, same_cell, update):
    for _ in range(2):
        done = update()
        assert done.returncode != 0
        assert f"changed the same lines of:\n  {LESSON}\n" in done.stdout and "git merge --abort" in done.stdout
    assert f"git add {LESSON} && git commit --no-edit" in done.stdout
    write_notebook(clone / LESSON, "lr = 2", "train()", "plot(more)", outputs=True)  # the person decides, and runs it
    git(clone, "add", LESSON)
    assert "git commit --no-edit" in update().stdout
    git(clone, "commit", "--no-edit")
    assert update().stdout.startswith("Nothing new")
    assert "secret" not in git(clone, "show", f"HEAD:{LESSON}")
    assert "not in the way" in (clone / "helpers" / "heads.py").read_text()


def test_a_file_that_the_template_deleted_and_you_changed_has_its_way_out(template, clone, update):
    (template / "helpers" / "têtes.py").write_text("HEADS = 1\n")
    publish(template, message="Heads")
    assert update().returncode == 0
    (clone / "helpers" / "têtes.py").write_text("HEADS = 2\n")
    git(clone, "commit", "-qam", "My heads")
    git(template, "rm", "-q", "helpers/têtes.py")
    publish(template, message="No heads")
    done = update()
    assert done.returncode != 0 and "  helpers/têtes.py\n" in done.stdout and "git rm FILE" in done.stdout
    assert (clone / "helpers" / "têtes.py").read_text() == "HEADS = 2\n"
    git(clone, "rm", "-q", "helpers/têtes.py")
    git(clone, "commit", "-q", "--no-edit")
    assert update().stdout.startswith("Nothing new")


def lesson(*cells: tuple[str, str]):
    return new_notebook(cells=[new_code_cell(source, id=name) for name, source in cells])


def test_new_cells_of_both_sides_are_kept_and_only_the_same_cell_is_a_conflict():
    base = [("a", "load()"), ("b", "fit()"), ("c", "plot()")]
    mine = [("m1", "x = 1"), ("m2", "x + 1")]
    theirs = [("t1", "x = 2"), ("t2", "x + 2")]

    def merged(ours, other):
        notebook, conflict = merge(*(lesson(*cells) for cells in (base, ours, other)))
        nbformat.validate(notebook)
        assert conflict == ("<<<<<<<" in str(notebook)), "a conflict is marked, and only a conflict"
        return [(cell.id, cell.source) for cell in notebook.cells], conflict

    assert merged(base + mine, base + theirs) == (base + mine + theirs, False)  # alike, in the same place
    rewritten = [*base[:2], ("c", "plot(new)")]
    assert merged([*base[:2], *mine, base[2]], rewritten) == ([*base[:2], *mine, rewritten[2]], False)
    assert merged(rewritten, [*base[:2], *theirs, base[2]]) == ([*base[:2], *theirs, rewritten[2]], False)
    assert merged([*base[:2], *mine, base[2]], base[:2]) == ([*base[:2], *mine], False)  # beside a deleted cell
    cells, conflict = merged([*base, ("same", "y = 1")], [*base, ("same", "y = 2")])
    assert conflict and "y = 1" in cells[-1][1] and "y = 2" in cells[-1][1]
    cells, conflict = merged([base[0], base[2]], [base[0], ("b", "fit(longer)"), base[2]])
    assert conflict and "fit(longer)" in dict(cells)["b"]


# --- what make update says ---


def mine_in_the_way(clone: Path) -> None:
    write_notebook(clone / LESSON, "lr = 1", "train()", "plot(mine)")


def mine_in_the_index(clone: Path) -> None:
    (clone / "helpers" / "heads.py").write_text("HEADS = 'a commit of mine, so that this is no fast-forward'\n")
    git(clone, "commit", "-qam", "My heads")
    (clone / "helpers" / "my_head.py").write_text("HEADS = 'mine'\n")
    git(clone, "add", "helpers/my_head.py")


def mine_of_the_same_name(clone: Path) -> None:
    (clone / "helpers" / "new.py").write_text("mine\n")


@pytest.mark.parametrize(
    "prepare, told",
    [
        (mine_in_the_way, [LESSON, "Commit these files first"]),
        (mine_in_the_index, ["helpers/my_head.py", "Commit these files first"]),
        (mine_of_the_same_name, ["helpers/new.py", "rename those that git does not know yet"]),
        (lambda clone: (clone / ".git" / "index.lock").touch(), ["Another git command is at work"]),
        (lambda clone: git(clone, "switch", "-q", "--detach"), ["You are on no branch", "git switch -c my-task"]),
        (lambda clone: git(clone, "remote", "remove", "origin"), ["git remote -v"]),
        (lambda clone: (clone / ".git").rename(clone / "was git"), ["This folder is no git clone"]),
    ],
)
def test_update_refuses_in_a_sentence_and_changes_nothing(template, clone, update, prepare, told):
    (template / "helpers" / "new.py").write_text("theirs\n")
    publish(template, "lr = 9", "train()", "plot()")
    prepare(clone)
    before = {path: path.read_bytes() for path in clone.rglob("*.[pi]*[yb]") if "__pycache__" not in path.parts}
    done = update()
    assert done.returncode != 0 and "Traceback" not in done.stdout + done.stderr, done.stderr
    assert all(words in done.stdout for words in told), done.stdout
    assert {path: path.read_bytes() for path in before} == before


def test_the_second_of_two_at_once_waits_for_the_first(template, clone, update):
    write_notebook(clone / "notebooks/my_own.ipynb", "mine")
    publish(clone, message="Mine, so that this is no fast-forward")
    publish(template, "lr = 9", "train()", "plot()")
    with ThreadPoolExecutor(3) as pool:
        said = sorted(done.stdout.split(":")[0] for done in pool.map(lambda _: update(), range(3)))
    assert said == ["New in origin/main", "Nothing new", "Nothing new"] and not git(clone, "status", "--porcelain")


@pytest.mark.parametrize(
    "address", ["http://someone:glpat-1@127.0.0.1:9/t", "http://glpat-1@127.0.0.1:9/t?private_token=glpat-1"]
)
def test_a_token_in_the_address_is_not_printed(clone, update, address):
    git(clone, "remote", "set-url", "origin", address)
    done = update()
    assert done.returncode != 0 and "127.0.0.1:9/t" in done.stdout and "Are you online" in done.stdout
    assert "glpat-1" not in done.stdout + done.stderr


def test_histories_without_a_common_commit_are_told_so(template, clone, update):
    git(template, "commit", "-q", "--amend", "-m", "First edition, as another history")
    publish(template, "lr = 9")
    done = update()
    assert done.returncode != 0 and "share no history" in done.stdout


def test_a_main_with_own_commits_does_not_make_a_merge_of_two_branches(template, clone, update):
    git(clone, "switch", "-q", "main")
    (clone / "config.yaml").write_text(CONFIG.replace("seed: 0", "seed: 1"))
    git(clone, "commit", "-qam", "My seed, on main by mistake")
    (template / "config.yaml").write_text(CONFIG.replace("seed: 0", "seed: 2"))
    publish(template, message="Another seed")
    git(clone, "switch", "-q", "my-task")
    (clone / "notebooks" / "mine.txt").write_text("mine\n")
    git(clone, "add", ".")
    git(clone, "commit", "-qm", "My work")
    git(clone, "fetch", "-q")
    stopped = git(clone, "merge", "origin", "main", check=False)
    assert "Trying simple merge with main" in stopped  # the trap: an octopus
    halfway = update()
    assert halfway.returncode != 0 and "git merge --abort\n  make update" in halfway.stdout
    git(clone, "merge", "--abort")
    assert update().returncode == 0 and "seed: 2" in (clone / "config.yaml").read_text()


# --- clones of another kind ---


def test_a_shallow_clone_merges_and_gets_its_history(template, person, make):
    publish(template, "lr = 1", "train()", "plot()", "second()")
    folder = template.with_name("shallow")
    git(template.parent, "clone", "-q", "--depth", "1", template.as_uri(), folder.name)
    configure(folder)
    git(folder, "switch", "-qc", "my-task")
    write_notebook(folder / LESSON, "lr = 1", "train()", "plot()", "second()", "mine()")
    git(folder, "commit", "-qam", "My cell")
    publish(template, "lr = 2", "train()", "plot()", "second()")
    git(folder, "fetch", "-q")
    git(folder, "merge", "-q", "origin", "main")  # the literal command, in a clone of one commit
    assert sources(folder / LESSON) == ["lr = 2", "train()", "plot()", "second()", "mine()"]
    publish(template, "lr = 3", "train()", "plot()", "second()")
    git(folder, "fetch", "-q", "--depth", "1")  # now nothing is shared any more
    assert not git(folder, "merge", "-q", "origin", "main", check=False)
    done = make("update", cwd=folder)
    assert done.returncode == 0, done.stdout
    assert sources(folder / LESSON)[0] == "lr = 3"
    assert git(folder, "rev-parse", "--is-shallow-repository") == "false\n"


def test_another_remote_works(template, clone, update):
    git(clone, "remote", "rename", "origin", "upstream")
    publish(template, "lr = 9")
    done = update("FROM=upstream")
    assert done.returncode == 0 and "New in upstream/main:\nChanges that its NEWS.md does not" in done.stdout, (
        done.stdout + done.stderr
    )


def test_notebooks_committed_with_outputs_before_the_settings_merge_too(template, person, make):
    folder = template.with_name("late")
    git(template.parent, "clone", "-q", str(template), folder.name)
    git(folder, "switch", "-qc", "my-task")
    write_notebook(folder / LESSON, "lr = 1", "train()", "plot(mine)", outputs=True)
    git(folder, "commit", "-qam", "Plain git keeps outputs")
    publish(template, "lr = 9", "train()", "plot()")
    configure(folder)
    git(folder, "commit", "-qam", "Now without outputs")
    done = make("update", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sources(folder / LESSON) == ["lr = 9", "train()", "plot(mine)"]
    assert "secret" not in json.dumps(nbformat.read(folder / LESSON, as_version=4))
