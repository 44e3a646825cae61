"""A researcher works on a branch while the template moves on: real repositories, an upstream, a clone, a branch."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_server.services.contents.filemanager import FileContentsManager
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from helpers.tools.merge_notebook import merge

ROOT = Path(__file__).resolve().parents[1]
PERSON = {f"GIT_{who}_{what}": "someone@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
PLAIN = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
HOUSE = (
    "Makefile", "pyproject.toml", "requirements.lock", ".gitattributes", ".gitignore", "helpers/__init__.py",
    "helpers/tools/environment.py", "helpers/tools/update.py", "helpers/tools/merge_notebook.py",
)  # fmt: skip
CONFIG = "seed: 0\ntraining:\n  lr: 1e-3\n  warm: {up: 3}\n"
LESSON = "notebooks/lesson.ipynb"


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


def configure(folder: Path) -> None:
    """What `make env` tells git, without the installation."""
    code = "import pathlib, helpers.tools.environment as e; e.ROOT = pathlib.Path.cwd(); e.configure_git()"
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


@pytest.fixture
def template(tmp_path):
    """The published template: the house, one notebook, a config."""
    folder = tmp_path / "the template"
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
def person(monkeypatch):
    """Whoever commits through `make` or the shell has a name, and no settings of this machine."""
    for key, value in (PERSON | PLAIN).items():
        monkeypatch.setenv(key, value)


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
    """Call `make update` in the clone."""
    return lambda *words: make("update", *words, cwd=clone)


def follow(done: subprocess.CompletedProcess, folder: Path) -> str:
    """Type the commands that a message offers, the indented lines, as they stand there."""
    lines = [line.strip() for line in done.stdout.splitlines() if re.match(r"  (git|make|mv) ", line)]
    script = "\n".join(["set -e", *lines]).replace("make update", "make -o env update")
    environment = os.environ | {"VIRTUAL_ENV": sys.prefix}
    ran = subprocess.run(["sh", "-c", script], cwd=folder, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, script + ran.stdout + ran.stderr
    return ran.stdout


# --- what reaches a commit ---


def test_outputs_stay_out_of_git_but_in_the_folder(clone):
    write_notebook(clone / LESSON, "lr = 1", "train()", "plot()", outputs=True)
    assert git(clone, "diff", "--no-ext-diff", "--name-only", "HEAD") == ""  # the same notebook, only executed
    write_notebook(clone / LESSON, "lr = 2", "train()", "plot()", outputs=True)
    git(clone / "notebooks", "commit", "-qam", "My learning rate")
    stored = git(clone, "cat-file", "blob", f"HEAD:{LESSON}")
    assert "lr = 2" in stored
    assert not any(word in stored for word in ("secret", "3.99", "codemirror", '"execution_count": 1'))
    assert "secret" in (clone / LESSON).read_text()


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
    assert git(clone, "config", "filter.nbstripout.clean").startswith(sys.executable)
    assert git(clone, "config", "filter.nbstripout.smudge") == "cat\n"


def test_a_clone_without_the_settings_still_works_with_plain_git(template, person):
    folder = template.with_name("plain clone")
    git(template.parent, "clone", "-q", str(template), folder.name)
    git(folder, "switch", "-qc", "my-task")
    write_notebook(folder / LESSON, "lr = 1", "train()", "plot(mine)")
    git(folder, "commit", "-qam", "My figure")
    publish(template, "lr = 9", "train()", "plot()")
    git(folder, "fetch", "-q")
    git(folder, "merge", "-q", "origin", "main")
    assert sources(folder / LESSON) == ["lr = 9", "train()", "plot(mine)"]


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


# --- the course as it is: a researcher changes the fine-tune, the template too ---


@pytest.fixture
def course(tmp_path, person):
    """All tracked files of this very project as a template, and a clone on `my-task` with the researcher's work."""
    upstream, folder = tmp_path / "upstream", tmp_path / "course"
    for name in git(ROOT, "ls-files", "-z").split("\0"):
        if name and (ROOT / name).exists() and not Path(name).name.startswith("my_"):
            (upstream / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, upstream / name)
    git(upstream, "init", "-q", "-b", "main")
    configure(upstream)
    publish(upstream, message="First edition")
    git(tmp_path, "clone", "-q", str(upstream), folder.name)
    configure(folder)
    git(folder, "switch", "-qc", "my-task")
    return upstream, folder


def edit(path: Path, changes: dict[str, str], new: dict[int, list[str]]) -> None:
    """Append a line to the first code cell that holds a text, and put new code cells before a position."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for text, line in changes.items():
        next(cell for cell in code if text in cell.source).source += f"\n{line}"
    for position, added in new.items():
        notebook.cells[position:position] = [new_code_cell(source) for source in added]
    nbformat.write(notebook, path)


def both_move(upstream: Path, folder: Path) -> None:
    """The researcher runs with another kernel, edits and adds cells; the template edits others, and more files."""
    finetune = folder / "notebooks" / "finetune.ipynb"
    edit(finetune, {"plots.plot_labels(": "mine_1 = 1", "plots.plot_predictions(": "mine_2 = 2"},
         {-1: ["mine_3 = 3", "mine_4 = 4", "mine_5 = 5"]})  # fmt: skip
    notebook = nbformat.read(finetune, as_version=4)
    notebook.metadata.kernelspec.update(name="surya-course", display_name="Surya course")
    nbformat.write(notebook, finetune)
    execute(finetune)
    (folder / "config.local.yaml").write_text("seed: 7\n")
    git(folder, "commit", "-qam", "My cells")
    execute(finetune)

    theirs = upstream / "notebooks" / "finetune.ipynb"
    edit(
        theirs,
        {"trainable_summary(model)": "theirs_1 = 1", "plots.plot_history(": "theirs_2 = 2"},
        {7: ["theirs_3 = 3"]},
    )
    notebook = nbformat.read(theirs, as_version=4)
    notebook.cells[-1].source += "\n\nA word of the template beside the researcher's new cells."
    nbformat.write(notebook, theirs)
    config = (upstream / "config.yaml").read_text()
    (upstream / "config.yaml").write_text(re.sub(r"(\n  weight_decay:) \S+", r"\1 0.0125", config))
    with (upstream / "helpers" / "metrics.py").open("a") as file:
        file.write('\nPUBLISHED = "later"\n')
    publish(upstream, message="A better fine-tune")


def assert_both_are_there(folder: Path) -> None:
    path = folder / "notebooks" / "finetune.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    text = "\n".join(cell.source for cell in notebook.cells)
    mine, theirs = ([f"{who}_{n} = {n}" for n in range(1, last)] for who, last in (("mine", 6), ("theirs", 4)))
    assert all(text.count(line) == 1 for line in mine + theirs) and "A word of the template" in text
    assert notebook.metadata.kernelspec.name == "surya-course"
    assert not any(mark in path.read_text() for mark in ("<<<<<<<", ">>>>>>>", "secret"))
    assert opens_in_jupyterlab(path)
    assert "weight_decay: 0.0125" in (folder / "config.yaml").read_text()
    assert "PUBLISHED" in (folder / "helpers" / "metrics.py").read_text()
    assert (folder / "config.local.yaml").read_text() == "seed: 7\n"
    assert git(folder, "status", "--porcelain") == "" and git(folder, "diff", "--name-only", "HEAD") == ""


def test_git_merge_origin_main_just_works_and_the_notebook_runs(course, tmp_path):
    upstream, folder = course
    both_move(upstream, folder)
    assert "Already up to date" in git(folder, "merge", "origin", "main")  # the trap: nothing was fetched
    git(folder, "commit", "-qa", "-m", "only executed again: git has nothing to commit, and looks", check=False)
    git(folder, "fetch", "-q")
    git(folder, "merge", "origin", "main")
    assert_both_are_there(folder)
    small = ("synthetic.visits=14 data.native_size=128 paths.reserve_gb=0 training.epochs=1 split.train=[2014-01-01, "
             "2014-01-15] split.val=[2014-01-17, 2014-01-22] split.test=[2014-01-24, 2014-01-29]")  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(folder), "SURYA_SHARED": str(tmp_path / "shared")}
    words = [sys.executable, "-m", "helpers.tools.run_notebook", "finetune", "--parameters", small]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    ran = (folder / "runs" / "finetune-flare-tiny-001" / "finetune.ipynb").read_text()
    assert "mine_5 = 5" in ran and "theirs_3 = 3" in ran and '"seed": 7' not in ran
    assert "seed: 7" in (folder / "runs" / "finetune-flare-tiny-001" / "config.yaml").read_text()


def test_make_update_does_the_same_without_the_fetch(course, make):
    upstream, folder = course
    both_move(upstream, folder)
    done = make("update", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "New in origin/main:\n  A better fine-tune (someone@example.org, 20" in done.stdout
    assert "old → new default:\n  training.weight_decay: " in done.stdout and " → 0.0125\n" in done.stdout
    assert "Reload Notebook from Disk" in done.stdout
    assert_both_are_there(folder)
    (kept,) = (folder / "runs").glob("before-update-*/finetune.ipynb")
    assert "secret path" in kept.read_text() and f"kept as {kept.relative_to(folder)}" in done.stdout


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
    done = update()
    assert done.returncode != 0
    assert f"changed the same lines of:\n  {LESSON}\n" in done.stdout and "git merge --abort" in done.stdout
    again = update()
    assert again.returncode != 0 and "A merge was begun here, and waits for you." in again.stdout
    assert f"git add {LESSON} && git commit --no-edit" in again.stdout
    write_notebook(clone / LESSON, "lr = 2", "train()", "plot(more)", outputs=True)  # the person decides, and runs it
    git(clone, "add", LESSON)
    assert "No conflict is left. Finish the merge:\n  git commit --no-edit" in update().stdout
    git(clone, "commit", "--no-edit")
    assert update().stdout.startswith("Nothing new: my-task already holds")
    assert "secret" not in git(clone, "show", f"HEAD:{LESSON}")
    assert "not in the way" in (clone / "helpers" / "heads.py").read_text()


def test_a_file_that_the_template_deleted_is_named(template, clone, update):
    (clone / "helpers" / "heads.py").write_text("HEADS = 2\n")
    git(clone, "commit", "-qam", "My heads")
    git(template, "rm", "-q", "helpers/model/heads.py")
    publish(template, message="No more heads")
    assert (
        "  helpers/model/heads.py  (you changed it, the template deleted it; to agree: git rm helpers"
        in update().stdout
    )


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


def test_update_tells_every_change_of_the_config(template, clone, update):
    (clone / "config.local.yaml").write_text("training: {lr: 5e-4, warm: {up: 1}}\n")
    (template / "config.yaml").write_text("seed: 0\ntraining: {lr: 2e-3, steps: [1, 2]}\n")
    publish(template, message="Other defaults")
    told = update().stdout
    assert "  training.lr: 1e-3 → 2e-3  (your config.local.yaml goes on to say 5e-4)\n" in told
    assert "  training.warm.up: 3 → removed  (take it out of your config.local.yaml)\n" in told
    assert "  training.steps: not there → [1, 2]\n" in told and "seed" not in told


def test_update_can_be_undone_with_the_command_that_it_prints(template, clone, update):
    (clone / "config.local.yaml").write_text("seed: 7\n")
    before = state(clone)
    publish(template, "lr = 9", "train()", "plot()")
    assert "Merged into my-task." in (done := update()).stdout
    subprocess.run(done.stdout.split("go back to before: ")[1].splitlines()[0].split(), cwd=clone, check=True)
    assert state(clone) == before


def test_changes_that_are_not_in_the_way_stay_as_they_are(template, clone, update):
    (clone / "helpers" / "heads.py").write_text("HEADS = 'mine'\n")
    (clone / "notebooks" / "my_notes.txt").write_text("not known to git\n")
    publish(template, "lr = 9", "train()", "plot()")
    done = update()
    assert done.returncode == 0, done.stdout
    assert git(clone, "status", "--porcelain") == " M helpers/model/heads.py\n?? notebooks/my_notes.txt\n"


@pytest.mark.parametrize("way", ["commit", "stash"])
def test_a_change_in_the_way_is_refused_and_both_ways_out_work(template, clone, update, way):
    write_notebook(clone / LESSON, "lr = 1", "train()", "plot(mine)")
    (clone / "helpers" / "heads.py").write_text("HEADS = 'mine'\n")
    publish(template, "lr = 9", "train()", "plot()")
    before = state(clone)
    done = update()
    assert done.returncode != 0 and "New in origin/main:\n  News (" in done.stdout
    assert f"not committed yet, and in the way of the merge:\n  {LESSON}\nNothing was merged." in done.stdout
    assert state(clone) == before
    commit, _, stash = done.stdout.partition("or put these changes aside")
    done.stdout = {"commit": commit, "stash": stash}[way]
    follow(done, clone)
    assert sources(clone / LESSON) == ["lr = 9", "train()", "plot(mine)"]
    assert (clone / "helpers" / "heads.py").read_text() == "HEADS = 'mine'\n"


def test_what_waits_in_gits_staging_area_is_in_the_way_too(template, clone, update):
    (clone / "helpers" / "my_head.py").write_text("HEADS = 'mine'\n")
    git(clone, "add", "helpers/my_head.py")
    publish(template, "lr = 9", "train()", "plot()")
    done = update()
    assert done.returncode != 0 and "in the way of the merge:\n  helpers/my_head.py\n" in done.stdout


def test_a_file_of_yours_with_the_name_of_a_new_one_is_refused(template, clone, update):
    (clone / "helpers" / "new.py").write_text("mine\n")
    (template / "helpers" / "new.py").write_text("theirs\n")
    publish(template)
    done = update()
    assert done.returncode != 0 and "which git does not know yet:\n  helpers/new.py\n" in done.stdout
    assert "Merged into my-task." in follow(done, clone)
    assert (clone / "helpers" / "my_new.py").read_text() == "mine\n"
    assert (clone / "helpers" / "new.py").read_text() == "theirs\n"


@pytest.mark.parametrize(
    "prepare, words, sentence",
    [
        (["switch", "-q", "main"], [], "You are on main. Keep your work on a branch of its own"),
        (["switch", "-q", "--detach"], [], "You are on no branch (git calls this a detached HEAD)"),
        (["remote", "rename", "origin", "elsewhere"], [], "This clone has no remote called origin,"),
        (["remote", "remove", "origin"], [], "It has: none."),
        (["status", "-s"], ["FROM=upstream"], "This clone has no remote called upstream, "),
        (["remote", "set-url", "origin", "nowhere"], [], "Could not reach the template (origin, nowhere); nothing was"),
        (["remote", "set-url", "origin", "http://token@127.0.0.1:9/t"], [], "(origin, http://127.0.0.1:9/t);"),
        (["config", "remote.origin.fetch", "+refs/heads/x*:refs/remotes/origin/x*"], [], "has no branch `main` that"),
    ],
)  # fmt: skip
def test_update_refuses_in_a_sentence(template, clone, update, prepare, words, sentence):
    publish(template, "lr = 9")
    git(clone, *prepare)
    if prepare[0] == "config":
        git(clone, "update-ref", "-d", "refs/remotes/origin/main")
    before = state(clone)
    done = update(*words)
    assert done.returncode != 0 and sentence in done.stdout and "Traceback" not in done.stderr, (
        done.stdout + done.stderr
    )
    assert state(clone) == before


@pytest.mark.parametrize("prepare", [["switch", "-q", "main"], ["switch", "-q", "--detach"]])
def test_the_way_to_a_branch_of_your_own_works(template, clone, update, prepare):
    git(clone, *prepare)
    git(clone, "branch", "-D", "my-task")
    (clone / "config.local.yaml").write_text("seed: 7\n")
    publish(template, "lr = 9")
    assert "Merged into my-task." in follow(update(), clone)
    assert sources(clone / LESSON) == ["lr = 9"]


def test_a_folder_that_is_no_clone_or_shares_no_history_is_told_so(template, clone, update):
    git(template, "commit", "-q", "--amend", "-m", "First edition, as another history")
    publish(template, "lr = 9")
    done = update()
    assert done.returncode != 0 and "my-task and origin/main share no history" in done.stdout
    words = [sys.executable, "-m", "helpers.tools.update"]
    done = subprocess.run(words, cwd=clone, capture_output=True, text=True, env=os.environ | {"PATH": ""})
    assert done.returncode != 0 and "There is no git on this machine" in done.stdout
    (clone / ".git").rename(clone / "was git")
    done = update()
    assert done.returncode != 0 and "This folder is no git clone" in done.stdout


# --- the local main ---


@pytest.fixture
def main_with_commit(template, clone):
    """Somebody committed on main, which the branch `my-task` does not hold; both changed one line of the config."""
    git(clone, "switch", "-q", "main")
    (clone / "config.yaml").write_text(CONFIG.replace("seed: 0", "seed: 1"))
    git(clone, "commit", "-qam", "My seed, on main by mistake")
    (template / "config.yaml").write_text(CONFIG.replace("seed: 0", "seed: 2"))
    publish(template, message="Another seed")


def test_a_main_with_own_commits_is_told_and_put_right(clone, main_with_commit, update):
    git(clone, "switch", "-q", "my-task")
    (clone / "notebooks" / "mine.txt").write_text("mine\n")
    git(clone, "add", ".")
    git(clone, "commit", "-qm", "My work")
    git(clone, "fetch", "-q")
    stopped = subprocess.run(["git", "merge", "origin", "main"], cwd=clone, capture_output=True, text=True)
    assert stopped.returncode and "Trying simple merge with main" in stopped.stdout  # the trap: an octopus
    halfway = update()
    assert halfway.returncode != 0 and "A merge of several branches at once was begun here" in halfway.stdout
    git(clone, "merge", "--abort")
    done = update()
    assert done.returncode == 0, "the target merges the template's main alone"
    assert "Note: your own main has commits that the template does not have:\n  " in done.stdout
    assert "My seed, on main by mistake" in done.stdout and "a new branch my-main keeps these" in done.stdout
    done.stdout = done.stdout.split("To go back")[0]
    follow(done, clone)
    assert "Already up to date" in git(clone, "merge", "origin", "main")
    assert "My seed" in git(clone, "log", "-1", "my-main") and "Another seed" in git(clone, "log", "-1", "main")
    assert "Note" not in update().stdout


def test_work_that_began_on_main_moves_to_a_branch(clone, main_with_commit, update):
    git(clone, "branch", "-D", "my-task")
    done = update()
    assert "You are on main, and it has commits of your own." in done.stdout
    commands = done.stdout.replace(" && make update", "")
    done.stdout = commands
    follow(done, clone)
    assert git(clone, "branch", "--show-current") == "my-task\n" and "My seed" in git(clone, "log", "-1")
    assert git(clone, "rev-parse", "main") == git(clone, "rev-parse", "origin/main")
    assert "changed the same lines of:\n  config.yaml" in update().stdout


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
    assert done.returncode == 0 and "This clone is shallow: it lacks the older history" in done.stdout, done.stdout
    assert sources(folder / LESSON)[0] == "lr = 3"
    assert git(folder, "rev-parse", "--is-shallow-repository") == "false\n"


def test_another_remote_and_a_remote_without_a_head_work(template, clone, update):
    git(clone, "remote", "rename", "origin", "upstream")
    git(clone, "remote", "set-head", "upstream", "--delete")
    publish(template, "lr = 9")
    done = update("FROM=upstream")
    assert done.returncode == 0 and "New in upstream/main:" in done.stdout, done.stdout + done.stderr
    assert "Already up to date" in git(clone, "merge", "upstream", "main")


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
