"""The README says what is there; its section "Your own task", followed to the letter in a copy of the project."""

import json
import re
import shlex
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from helpers.config import _SCHEMA, load_config
from helpers.data.labels import num_outputs

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests" / "benchmarks"))
import sizes  # noqa: E402 - the benchmark that prints the table

README = (ROOT / "README.md").read_text()
COURSE = ["hub", "data", "baseline", "finetune", "learning_rate", "compare", "use"]
SMALL = "synthetic.visits=24 paths.reserve_gb=0 training.epochs=1 split.train=[2014-01-01,2014-01-29]"
SMALL += " split.val=[2014-01-31,2014-02-08] split.test=[2014-02-10,2014-02-20]"


@pytest.fixture(scope="module")
def section() -> str:
    return README.split("## Your own task")[1].split("\n## ")[0]


@pytest.fixture
def project(tmp_path, section):
    """A copy of the project with the files that the section shows, each under the name in its first line."""
    folder = tmp_path / "course"
    for name in ("helpers", "notebooks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "my_*"))
    for name in ("config.yaml", "Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, folder / name)
    for name, text in re.findall(r"```(?:yaml|python)\n# (\S+)\n(.*?)```", section, re.DOTALL):
        (folder / name).write_text(text)
    return folder


def test_it_begins_with_two_commands_and_stays_short():
    start = README.split("## Start")[1].split("\n## ")[0]
    commands = re.search(r"```\n(.*?)```", start, re.DOTALL)[1]
    assert commands == "make run-notebook NB=finetune\nmake test\n"
    assert (
        len(README.splitlines()) <= 220
        and README.count("<!-- labels -->\n|") == README.count("|\n<!-- /labels -->") == 1
    )


def test_every_target_key_and_file_that_it_names_exists():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"(?:`|^)make ([a-z-]+)", README, re.MULTILINE)
    assert len(named) > 8 and set(named) <= set(targets)
    keys = set(re.findall(r"[`\" =]([a-z]+\.[a-z_]+)(?=[:=`])", README))
    files = {"environment.yml", "last.pt", "helpers.my_hot_corona", "helpers.my_masks"}
    assert len(keys) > 10 and keys - files <= _SCHEMA.keys()
    assert all((ROOT / path).exists() for path in re.findall(r"\]\(([^#:)]+)\)", README))
    tree = re.search(r"```\n(notebooks/ .*?)```", README, re.DOTALL)[1]
    paths = [("helpers/" if line[0] == " " else "") + line.split()[0] for line in tree.splitlines()]
    assert len(paths) > 10 and all((ROOT / path).exists() for path in paths if path != "runs/")


def test_both_links_open_a_notebook_of_the_same_copy():
    links = re.findall(r"\]\((https://[^)]*urlpath=[^)]*)\)", README)
    badge, puller = links
    assert badge.startswith("https://mybinder.org/v2/gh/") and "git-pull?repo=https://github.com/" in puller
    copies = [re.search(r"(?:gh|github.com)/([^/]+/[^/&]+)", link)[1] for link in links]
    assert copies[0] == copies[1] and f"lab/tree/{copies[0].split('/')[1]}/notebooks/" in puller
    assert all((ROOT / "notebooks" / link.rpartition("/")[2]).is_file() for link in links)


def test_the_timetable_for_teachers_names_sections_that_there_are():
    table = (ROOT / "CONTRIBUTING.md").read_text().split("| | minutes | |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| .* \| (\d+) \|(.*)\|$", table, re.MULTILINE)
    assert sum(int(minutes) for minutes, _ in rows) == 180
    named = [part for _, text in rows for part in re.findall(r"\*(\w+)\*([^*]*)", text)]
    assert [notebook for notebook, _ in named] == ["hub", "data", "baseline", "finetune", "learning_rate", "compare"]
    for notebook, text in named:
        cells = json.loads((ROOT / "notebooks" / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
        headings = re.findall(r"^##+ (.*)", "\n".join("".join(cell["source"]) for cell in cells), re.MULTILINE)
        assert set(re.findall(r'"([^"]+)"', text)) <= set(headings), notebook


@pytest.mark.notebook  # with the other long ones
def test_the_sizes_of_the_tasks_are_those_that_the_estimate_gives():
    written = (ROOT / "CONTRIBUTING.md").read_text().split("<!-- sizes -->\n")[1].split("\n<!-- /sizes -->")[0]
    rows = written.splitlines()
    assert rows[:2] == sizes.HEAD.splitlines() and len(rows) == 2 + 2 * len(sizes.TASKS)
    assert {sizes.row("ar_segmentation", profile) for profile in ("surya", "surya_4k")} <= set(rows)
    for task in sizes.TASKS:
        small, large = ([part.strip() for part in row.split("|")] for row in rows if f"`{task}`" in row)
        read, stored, memory = (cell.removesuffix(" GB") for cell in small[4:7])
        shown = f"| `{task}` | {small[3]} | {read}, {stored} | {memory} / {large[6].removesuffix(' GB')} |"
        assert f"\n{shown}" in README, shown


def test_its_table_and_the_notebooks_lead_through_the_course():
    there = [name for name in COURSE if (ROOT / "notebooks" / f"{name}.ipynb").exists()]
    assert re.findall(r"^\| \[(\w+)\]\(notebooks/\1.ipynb\) \|", README, re.MULTILINE) == there
    for name, after in pairwise(there):
        text = (ROOT / "notebooks" / f"{name}.ipynb").read_text()
        assert re.search(r"\*\*Next:\*\* \[(\w+)\]", text)[1] == after, name


def test_the_files_of_the_section_are_complete_tasks(project, monkeypatch):
    monkeypatch.syspath_prepend(project)
    for name in ("config.local.yaml", "helpers/my_hot_corona.py", "helpers/my_masks.py"):
        assert (project / name).is_file(), name
    cfg = load_config(project / "config.yaml", {"target.loss": "mse"}, task="my_hot_corona")
    assert cfg.data.channels == ["aia171", "aia193", "aia211"] and num_outputs(cfg) == 1
    flares = load_config(project / "config.yaml", task="my_flares")
    assert flares.labels.kind == "event" and flares.labels.window_hours == [0, 24]
    assert len(flares.split.periods("train")) == 2


@pytest.mark.notebook
def test_the_commands_of_the_section_run(project, section, make, tmp_path):
    said = r"`make (run-notebook NB=baseline TASK=my_hot_corona)`, and the same with `NB=finetune`"
    (first,) = re.findall(said, section)
    for command in (first, first.replace("baseline", "finetune")):
        done = make(
            *shlex.split(command), f"P={SMALL}", cwd=project, PYTHONPATH=str(project), SURYA_SHARED=str(tmp_path)
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for name in ("baseline", "finetune"):
        run = project / "runs" / f"{name}-my_hot_corona-tiny-001"
        assert json.loads((run / "summary.json").read_text())["status"] == "finished"
        assert "bright_mse" in (run / "config.yaml").read_text() and (run / f"{name}.html").exists()
