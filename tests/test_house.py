"""The house: requirements, lock, Makefile, notebooks and layout agree with each other."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from subprocess import CompletedProcess

import nbformat
import pytest
import yaml
from nbstripout import strip_output
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from helpers import environment

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TOP_LEVEL = {
    "README.md", "Makefile", "config.yaml", "environment.yml", "pyproject.toml", "notebooks", "helpers", "tests",
    "LICENSE", "requirements.lock", ".gitattributes", ".gitignore", ".ci",
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
    assert f"python{PROJECT['requires-python']}" in plain and {"pip", "git", "make"} <= set(plain)
    assert pip == ["-e .[dev]"]


def test_help_is_the_default_and_explains_every_target(make):
    listed = make().stdout
    phony = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    for target in phony:
        assert re.search(rf"^  {target} +\w", listed, re.MULTILINE), target
    expected = {"env", "run-notebook", "lab", "test", "bench", "cache", "update", "clean"}
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


@pytest.mark.parametrize(
    "own, torch, pins, told",
    [
        (True, "2.13.0+cpu", ["-r", "requirements.lock"], "exact versions of requirements.lock"),
        (False, None, ["-r", "requirements.lock"], "exact versions of requirements.lock"),
        (False, "2.9.1+cu128", ["torch==2.9.1+cu128"], "its torch 2.9.1+cu128 stays"),
    ],
)
def test_one_pip_call_never_brings_another_torch(monkeypatch, capsys, own, torch, pins, told):
    def installed(name):
        if torch is None:
            raise PackageNotFoundError(name)
        return torch

    calls = []
    monkeypatch.setattr(environment, "version", installed)
    monkeypatch.setattr(
        environment.subprocess, "run", lambda words, **_: calls.append(words) or CompletedProcess([], 0)
    )
    monkeypatch.setattr(environment.sys, "prefix", str(ROOT / ".venv" if own else ROOT / "elsewhere"))
    assert environment.install() == 0
    (words,) = calls
    assert words[-len(pins) - 2 :] == [*pins, "-e", ".[dev]"]
    assert told in capsys.readouterr().out


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


def test_git_reads_notebooks_with_this_environment(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    environment.configure_git()
    value = subprocess.check_output(["git", "config", "--local", "filter.nbstripout.clean"], cwd=tmp_path, text=True)
    assert value.startswith(shlex.quote(sys.executable)) and "nbstripout" in value


def test_only_what_the_layout_names_stands_at_the_top_level():
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    assert {path.split("/")[0] for path in tracked} <= TOP_LEVEL
    assert not [path for path in tracked if path.endswith(("config.local.yaml", ".pyc"))]


def test_the_bench_target_lists_every_script_with_its_purpose(make):
    listed = make("bench").stdout
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
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        assert not [cell for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")]
        stripped = strip_output(nbformat.read(path, as_version=4), keep_output=False, keep_count=False, keep_id=True)
        assert stripped == notebook, "save it once through `git add`, whose filter strips it"

    def test_opens_anywhere(self, path):
        notebook = nbformat.read(path, as_version=4)
        assert notebook.metadata.kernelspec.name == "python3"
        assert not re.search(r"/(home|work|tmp|Users)/", path.read_text()), "a path of one machine"

    def test_takes_the_runners_parameters(self, path):
        cells = nbformat.read(path, as_version=4).cells
        (cell,) = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
        names = re.findall(r"^(\w+)\s*=", cell.source, re.MULTILINE)
        assert names == ["profile", "task", "run_name", "parameters"]

    def test_cells_are_short_and_imports_stand_in_one(self, path):
        code = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        long = [source for source in code if len(source.splitlines()) > 15]
        assert not long, f"more than 15 lines:\n{long[0] if long else ''}"
        importing = [source for source in code if re.search(r"^(import|from) ", source, re.MULTILINE)]
        assert len(importing) == 1


def test_the_paired_notebooks_have_the_same_headings():
    pair = [ROOT / "notebooks" / f"{name}.ipynb" for name in ("baseline", "finetune")]
    first, second = (
        [re.findall(r"^##+ .*", cell.source, re.MULTILINE) for cell in nbformat.read(path, as_version=4).cells]
        for path in pair
    )
    assert sum(first, []) == sum(second, [])
