"""The house: requirements, lock, Makefile, notebooks and layout agree with each other."""

import ast
import difflib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from graphlib import TopologicalSorter
from importlib.metadata import version
from pathlib import Path

import nbformat
import pytest
import yaml
from nbstripout import strip_output
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from helpers.tools import environment

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOTEBOOKS = sorted(path for path in (ROOT / "notebooks").glob("*.ipynb") if not path.name.startswith("my_"))
TOP_LEVEL = {
    "README.md", "Makefile", "config.yaml", "environment.yml", "pyproject.toml", "notebooks", "helpers", "tests",
    "LICENSE", "CITATION.cff", "CONTRIBUTING.md", "NEWS.md", "requirements.lock", ".gitattributes", ".gitignore",
    ".ci", ".github",
}  # fmt: skip


def lock_pins() -> dict[str, Requirement]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in pins}


def requirements() -> list[Requirement]:
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
    return [Requirement(text) for text in wanted]


def test_every_requirement_has_a_lower_bound_and_a_pin_that_meets_it():
    pins = lock_pins()
    for requirement in requirements():
        assert any(part.operator == ">=" for part in requirement.specifier), requirement
        pin = next(iter(pins[canonicalize_name(requirement.name)].specifier))
        assert requirement.specifier.contains(pin.version), (str(requirement), str(pin))


def test_the_lock_holds_exact_plain_versions_and_names_no_host():
    for pin in lock_pins().values():
        (part,) = pin.specifier
        assert part.operator == "==" and "+" not in part.version and pin.url is None, str(pin)
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text and "--" not in text and "@" not in text
    assert str(lock_pins()["torch"]) == "torch==2.13.0"
    assert not {"timm", "torchvision", "torchaudio"} & set(lock_pins()), "they would pull another torch build"
    assert not [name for name in lock_pins() if "nvidia" in name or "cuda" in name]


def test_conda_environment_installs_the_project_and_its_python():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    plain = [entry for entry in conda["dependencies"] if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict)]
    assert conda["channels"] == ["conda-forge"]
    assert f"python{PROJECT['requires-python']},<3.14" in plain and {"pip", "git", "make"} <= set(plain)
    assert "Python 3.11 to 3.13" in (ROOT / "README.md").read_text()
    assert pip == ["-e ."]  # developers' packages come with the first `make test`


def test_help_is_the_default_and_explains_every_target(make):
    listed = make().stdout
    phony = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    for target in phony:
        assert re.search(rf"^  {target} +\w", listed, re.MULTILINE), target
    expected = {"env", "run-notebook", "lab", "test", "bench", "config", "cache", "update", "new-notebook", "clean"}
    assert expected <= set(phony)


def test_the_installation_is_done_once_and_again_when_requirements_change(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("pyproject.toml", "requirements.lock"):
        (tmp_path / name).touch()
    assert not environment.is_current()
    record = tmp_path / "surya_course-0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Name: surya-course\nVersion: 0\n")
    (record / "RECORD").write_text(f"{record.name}/direct_url.json,,\n")
    (record / "direct_url.json").write_text(json.dumps({"url": (tmp_path / "another clone").as_uri()}))
    assert not environment.is_current()
    (record / "direct_url.json").write_text(json.dumps({"url": tmp_path.as_uri()}))
    assert environment.is_current()
    for name in ("pyproject.toml", "requirements.lock"):
        later = time.time() + 60
        os.utime(tmp_path / name, (later, later))
        assert not environment.is_current()
        os.utime(tmp_path / name, (0, 0))


def test_what_an_environment_lacks_is_found():
    met = ["numpy>=1", "sunpy[visualization]>=1", "no-such-thing; python_version < '3'"]
    assert environment.unmet(met) == []
    assert environment.unmet(["numpy>=99", "no-such-thing", *met]) == ["numpy>=99", "no-such-thing"]
    assert environment.unmet(PROJECT["dependencies"]) == []


def test_a_wrong_python_is_named(make, tmp_path):
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    done = make("env", "PYTHON=no-such", cwd=tmp_path, VIRTUAL_ENV="", CONDA_PREFIX="")
    assert done.returncode and "needs Python 3.11 or newer" in done.stdout and "'no-such'" in done.stdout


def test_a_laptops_bare_conda_base_is_left_alone(make, tmp_path):
    base = tmp_path / "base" / "bin"
    base.mkdir(parents=True)
    (base / "python").write_text("#!/bin/sh\nexit 1\n")
    (base / "python").chmod(0o755)
    conda = {"VIRTUAL_ENV": "", "CONDA_PREFIX": str(base.parent)}
    dry = make("-n", "lab", CONDA_DEFAULT_ENV="base", **conda).stdout
    assert '".venv/bin/python" -m jupyterlab' in dry
    dry = make("-n", "lab", CONDA_DEFAULT_ENV="hub", **conda).stdout
    assert f'"{base}/python" -m jupyterlab' in dry


def test_a_python_without_pip_can_make_the_environment(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    shutil.copy(environment.__file__, tmp_path)
    words = [tmp_path / "bare" / "bin" / "python", "-P", "-c", "import sys; sys.path.append('.'); import environment"]
    subprocess.run(words, cwd=tmp_path, check=True)


@pytest.mark.slow
@pytest.mark.notebook  # with the other long ones
def test_of_two_at_once_the_second_waits(tmp_path):
    """Two calls of `make env` in one folder: one makes .venv, the other finds it whole."""
    (tmp_path / "helpers" / "tools").mkdir(parents=True)
    script = Path(shutil.copy(environment.__file__, tmp_path / "helpers" / "tools"))
    (tmp_path / "pyproject.toml").touch()
    words = [sys.executable, "-P", script, ".venv"]
    calls = [subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = "".join(call.communicate()[0] for call in calls)
    assert [call.returncode for call in calls] == [0, 0, 0] and said.count("Making .venv") == 1
    subprocess.run([tmp_path / ".venv" / "bin" / "python", "-m", "pip", "--version"], check=True, capture_output=True)


def test_only_what_the_layout_names_stands_at_the_top_level():
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    assert {path.split("/")[0] for path in tracked} <= TOP_LEVEL
    assert not [path for path in tracked if path.endswith(("config.local.yaml", ".pyc"))]


def test_the_bench_target_lists_every_script_with_its_purpose(make):
    listed = make("bench", "B=list").stdout
    for script in (ROOT / "tests" / "benchmarks").glob("*.py"):
        assert re.search(rf"^  {script.stem} +\S", listed, re.MULTILINE), f"{script} needs a one-line docstring on top"


def test_the_versions_in_use_are_those_of_the_lock():
    if Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("only .venv is pinned; an active environment keeps its own versions")
    for name, pin in lock_pins().items():
        if pin.marker is None or pin.marker.evaluate():
            assert pin.specifier.contains(version(name), prereleases=True), str(pin)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    """Every notebook in git: clean, short cells, the plain kernel, one cell of parameters."""

    def test_is_clean_and_valid(self, path):
        text = in_git(path)  # the file itself may have been executed
        notebook = nbformat.reads(text, as_version=4)
        nbformat.validate(notebook)
        assert not results(text)
        stripped = strip_output(nbformat.reads(text, as_version=4), keep_output=False, keep_count=False, keep_id=True)
        assert stripped == notebook, "save it once through `git add`, whose filter strips it"

    def test_opens_anywhere(self, path):
        text = in_git(path)
        assert nbformat.reads(text, as_version=4).metadata.kernelspec.name == "python3"
        assert not re.search(r"/(home|work|tmp|Users)/", text), "a path of one machine"

    def test_takes_the_runners_parameters(self, path):
        cells = nbformat.read(path, as_version=4).cells
        (cell,) = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
        names = re.findall(r"^(\w+)\s*=", cell.source, re.MULTILINE)
        assert names == ["profile", "task", "run_name", "parameters"]

    def test_cells_are_short_and_imports_stand_in_one(self, path):
        code = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        importing = [source for source in code if re.search(r"^(import|from) ", source, re.MULTILINE)]
        assert len(importing) == 1 and len(importing[0].splitlines()) <= 25
        long = [source for source in code if len(source.splitlines()) > 15 and source not in importing]
        assert not long, f"more than 15 lines:\n{long[0] if long else ''}"

    def test_says_which_kernel_to_choose_in_another_python(self, path):
        code = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        done = subprocess.run([sys.executable, "-ISc", code[0]], capture_output=True, text=True)  # without packages
        assert done.returncode == 1 and "ModuleNotFoundError" not in done.stderr
        assert re.search(
            r"^AssertionError: .*Kernel, Change Kernel, Surya course.*make kernel", done.stderr, re.MULTILINE
        )


def in_git(path: Path) -> str:
    """A file as git would commit it, or as it is where git does not know it."""
    words = ["git", "cat-file", "blob", f":{path.relative_to(ROOT).as_posix()}"]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    return path.read_text() if found.returncode else found.stdout


# --- the wings ---

FLOORS = ("channels", "shared", "config", "data", "model", "training", "analysis", "experiment", "use", "tools")
CEILING = 7_818


def imported(path: Path) -> set[str]:
    """The modules of helpers that a file imports anywhere, also inside its functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("helpers.")}


def test_imports_point_one_way_and_helpers_stay_thin():
    files = [path for path in (ROOT / "helpers").rglob("*.py") if not path.name.startswith("my_")]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}
    graph = {module: imported(path) & set(modules) for module, path in modules.items() if "__init__" not in module}

    def floor(module: str) -> int:
        return FLOORS.index(module.split(".")[1])

    upwards = [f"{module} -> {to}" for module, others in graph.items() for to in others if floor(to) > floor(module)]
    assert upwards == []
    TopologicalSorter(graph).prepare()  # raises CycleError, and names the circle
    for path in files:
        if path.name == "__init__.py":
            assert not imported(path), f"{path} hands names on"
    lines = sum(len(path.read_text().splitlines()) for path in files)
    assert lines <= CEILING, f"helpers/ has {lines} lines"


# --- git holds no results ---


def results(text: str) -> int:
    """How many cells of a notebook carry an output or an execution count."""
    cells = json.loads(text).get("cells", [])
    return sum(bool(cell.get("outputs")) or cell.get("execution_count") is not None for cell in cells)


def notebooks_with_results(folder: Path) -> list[str]:
    """Every notebook with results in any commit up to HEAD, or in what waits for the next one."""

    def git(*words: str) -> str:
        return subprocess.check_output(["git", *words], cwd=folder, text=True)

    history = [line.partition(" ")[::2] for line in git("rev-list", "--objects", "HEAD").splitlines()]
    staged = [(line.split()[1], line.split("\t")[1]) for line in git("ls-files", "--stage", "*.ipynb").splitlines()]
    blobs = {name: path for name, path in history + staged if path.endswith(".ipynb")}
    return [f"{path} ({name[:9]})" for name, path in blobs.items() if results(git("cat-file", "blob", name))]


def test_no_notebook_in_the_history_carries_outputs():
    found = notebooks_with_results(ROOT)
    assert not found, "find the commit with `git log --all --find-object=<the number>`"


def test_a_notebook_with_outputs_is_found_in_the_history_and_in_the_next_commit(tmp_path):
    def git(*words):
        subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True)

    def write(name, **cell):
        cells = [{"cell_type": "code", "source": name, "metadata": {}, "outputs": [], "execution_count": None, **cell}]
        (tmp_path / name).write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
        git("add", name)

    git("init", "-q")
    for name, cell in {"a.ipynb": {"outputs": [{}]}, "b.ipynb": {}, "c d.ipynb": {"execution_count": 1}}.items():
        write(name, **cell)
    git("-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "-qm", "with outputs")
    write("a.ipynb")
    git("rm", "-qf", "c d.ipynb")
    git("-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "-qm", "removed, but not from the history")
    write("staged.ipynb", outputs=[{}])
    found = [text.split(" (")[0] for text in notebooks_with_results(tmp_path)]
    assert found == ["a.ipynb", "c d.ipynb", "staged.ipynb"]


def test_the_template_has_no_personal_files():
    """Names that begin with my_ belong to the researchers: in the template's own branch there are none."""
    known = subprocess.check_output(["git", "for-each-ref", "--format=%(refname)"], cwd=ROOT, text=True).split()
    branches = {"refs/heads/main", "refs/remotes/origin/main"} & set(known) or {"HEAD"}
    for branch in branches:
        listed = subprocess.check_output(["git", "ls-tree", "-r", "--name-only", branch], cwd=ROOT, text=True)
        paths = map(Path, listed.splitlines())
        assert not [path for path in paths if path.name.startswith("my_") or path.parts[0] == "runs"], branch


def test_personal_files_can_be_committed_and_the_rest_is_ignored():
    ignored = ["config.local.yaml", "runs/a/history.csv", "data/frames"]
    kept = ["notebooks/my_ribbons.ipynb", "helpers/my_ribbons.py"]
    done = subprocess.run(["git", "check-ignore", *ignored, *kept], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ignored


# --- baseline and finetune mirror each other ---

# In these sections the code may differ, in lines that match; everywhere else the code of both is the same.
MODEL = {
    "Set-up": r"import |from |cfg = load_config\(.*experiment=\"(baseline|finetune)\"|$",
    "The model": "",
    "Where the weights start": "",
    "What trains?": "",
    "The numbers": r"save_adapter\(",
}
# These belong to one of the two, and each has exercises of its own.
OWN = {"By hand first", "One number or one image?", "A mistake on purpose", "Two mistakes on purpose"}


def shared_cells(notebook: nbformat.NotebookNode) -> list[tuple[str, nbformat.NotebookNode]]:
    """The cells that both have, with their section: without those of `OWN`, and without exercises."""
    kept, section = [], ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            section = ([section] + re.findall(r"^##+ (.*)", cell.source, re.MULTILINE))[-1]
        exercise = cell.source.startswith(("**Exercise.**", "<details><summary>Answer</summary>"))
        if section not in OWN and not exercise and "exercise" not in cell.metadata.get("tags", []):
            kept.append((section, cell))
    return kept


def mirror_faults(first: nbformat.NotebookNode, second: nbformat.NotebookNode) -> list[str]:
    """Where two notebooks differ, although the model is not what differs: cells, headings, tags, code."""
    ours, theirs = shared_cells(first), shared_cells(second)
    if [(cell.id, cell.cell_type) for _, cell in ours] != [(cell.id, cell.cell_type) for _, cell in theirs]:
        return ["the cells: their number, order, ids or types"]
    faults = []
    for (section, one), (_, other) in zip(ours, theirs, strict=True):
        if one.cell_type == "markdown":
            headings = [re.findall(r"^##+ .*", cell.source, re.MULTILINE) for cell in (one, other)]
            faults += [f"{one.id}: headings {headings}"] * (headings[0] != headings[1])
            continue
        lines = [cell.source.splitlines() for cell in (one, other)]
        differing = [line for line in difflib.ndiff(*lines) if line[0] in "+-"]
        wrong = [line for line in differing if section not in MODEL or not re.match(MODEL[section], line[2:].strip())]
        faults += [f"{one.id} ({section}): {line}" for line in wrong]
        faults += [f"{one.id}: tags"] * (one.metadata.get("tags") != other.metadata.get("tags"))
    return faults


@pytest.fixture
def pair():
    return [nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4) for name in ("baseline", "finetune")]


def test_the_paired_notebooks_mirror_each_other(pair):
    assert mirror_faults(*pair) == []


def cell_with(notebook, text, kind="code"):
    return next(cell for cell in notebook.cells if text in cell.source and cell.cell_type == kind)


def replace(old, new, kind="code"):
    def change(notebook):
        cell = cell_with(notebook, old, kind)
        cell.source = cell.source.replace(old, new)

    return change


@pytest.mark.parametrize(
    "change, told",
    [
        (replace("## Train", "## Training", "markdown"), "headings"),
        (replace("## One batch", "### One batch", "markdown"), "headings"),
        (replace("fit(model,", "fit_better(model,"), "(Train): "),
        (replace("plots.plot_history(history, cfg)", "plots.plot_history(history)"), "(Training curves): "),
        (replace("run.finish()", "run.finish(0)"), "(The numbers): "),
        (replace("seed_everything(cfg)", "seed_everything(1)"), "(Set-up): "),
        (lambda notebook: notebook.cells.remove(cell_with(notebook, "## Train", "markdown")), "the cells"),
        (lambda notebook: notebook.cells.insert(9, nbformat.v4.new_code_cell("more()")), "the cells"),
        (lambda notebook: notebook.cells.insert(5, notebook.cells.pop(9)), "the cells"),
        (lambda notebook: notebook.cells[6].update(id="another"), "the cells"),
        (lambda notebook: cell_with(notebook, "fit(model,").metadata.update(tags=["raises-exception"]), "tags"),
    ],
)
def test_a_pair_that_stops_mirroring_is_found(pair, change, told):
    first, second = pair
    change(second)
    faults = mirror_faults(first, second)
    assert faults and all(told in fault for fault in faults), faults


def test_prose_and_model_may_differ_in_a_pair(pair):
    first, second = pair
    cell_with(second, "# Fine-tune", "markdown").source += "\n\nMore words."
    cell_with(second, "adapt(model, cfg)", "code").source += "\nmodel.encoder.train()"
    cell_with(second, "class LoRA(", "code").source += "\n"
    cell_with(second, "**Exercise.**", "markdown").source += " And why?"
    assert mirror_faults(first, second) == []
