"""The runner: what `make run-notebook` writes, prints and returns, on notebooks made on the spot."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from helpers.config import ConfigError, parse_parameters
from helpers.tools import command
from helpers.tools.run_notebook import main, run

ROOT = Path(__file__).resolve().parents[1]
PARAMETERS = "profile = None\ntask = None\nrun_name = None\nparameters = {}"


@pytest.fixture
def course(tmp_path):
    """A folder with the course's config.yaml; call it to add a notebook of code cells (without a kernelspec)."""
    tmp_path = tmp_path / "100% {x} $HOME"
    (tmp_path / "notebooks").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text((ROOT / "config.yaml").read_text())

    def add(name, *sources):
        cells = [new_markdown_cell(f"# The {name} notebook\nand more")]
        for source in sources:
            tags = {"tags": ["parameters"]} if source == PARAMETERS else {}
            cells.append(new_code_cell(source, metadata=tags))
        nbformat.write(new_notebook(cells=cells), tmp_path / "notebooks" / f"{name}.ipynb")

    add.root = tmp_path
    return add


def test_a_good_notebook_leaves_itself_and_its_html(course, capfd, monkeypatch):
    foreign = course.root / "kernels" / "python3"  # a kernel of the same name that must not be taken
    foreign.mkdir(parents=True)
    spec = {"argv": ["no-such-python"], "display_name": "foreign", "language": "python"}
    (foreign / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(course.root))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    show = "import sys, os\nprint([profile, task, run_name, parameters, sys.executable, os.path.basename(os.getcwd())])"
    course("good", PARAMETERS, show, "import matplotlib.pyplot as plt\nplt.plot([1, 2]);")

    parameters = "training.lr=1e-3 data.channels=[aia171, hmi_m]"
    words = ["notebooks/good.ipynb", "--profile", "tiny", "--parameters", parameters]
    assert main(words, course.root) == 0
    folder = course.root / "runs" / "good-flare-tiny-001"
    told = ["tiny", None, folder.name, {"training.lr": 1e-3, "data.channels": ["aia171", "hmi_m"]}]
    printed = capfd.readouterr().out
    assert repr([*told, sys.executable, "notebooks"]) in printed  # streamed while it runs
    assert re.search(r"^  0:\d\d  The good notebook$", printed, re.MULTILINE)
    assert "good.html" in printed.splitlines()[-1]
    assert "image/png" in (folder / "good.ipynb").read_text() and "image/png" in (folder / "good.html").read_text()


def test_a_failing_cell_has_the_last_word_and_leaves_its_html(course, capfd):
    course("bad", "print('before')", "raise ValueError('the Sun is too bright')", "print('never')")
    assert main(["bad"], course.root) == 1
    said = capfd.readouterr().out
    assert said.splitlines()[-1] == "ValueError: the Sun is too bright" and "Traceback" not in said
    assert said.splitlines()[-3:-1] == ["This cell failed:", "    raise ValueError('the Sun is too bright')"]
    folder = course.root / "runs" / "bad-flare-tiny-001"
    html = (folder / "bad.html").read_text()
    assert "the Sun is too bright" in html and "before" in html
    assert main(["bad"], course.root) == 1  # the next run takes the next number
    assert sorted(path.name for path in folder.parent.iterdir()) == ["bad-flare-tiny-001", "bad-flare-tiny-002"]


def test_bars_are_text_in_a_run_without_a_browser_and_jupyters_own_in_one(course):
    course("bar", "from tqdm.auto import tqdm\nfor _ in tqdm(range(3), 'epoch 1'): pass")
    assert main(["bar"], course.root) == 0
    outputs = nbformat.read(course.root / "runs/bar-flare-tiny-001/bar.ipynb", 4).cells[1].outputs
    assert "epoch 1: 100%" in "".join(output.get("text", "") for output in outputs)
    in_jupyter = nbformat.read(course.root / "notebooks/bar.ipynb", 4)
    NotebookClient(in_jupyter, kernel_name="python3").execute()
    assert "application/vnd.jupyter.widget-view+json" in str(in_jupyter.cells[1].outputs)


def test_a_dead_kernel_is_told_in_a_sentence(course, capfd):
    course("dead", "import os; os._exit(9)")
    assert main(["dead"], course.root) == 1
    assert "want of memory" in capfd.readouterr().out.splitlines()[-1]
    assert (course.root / "runs" / "dead-flare-tiny-001" / "dead.html").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a file that is always full")
def test_a_full_disk_is_told_in_a_sentence_and_leaves_no_half_notebook(course, capfd):
    course("lesson", "print('hello')")
    folder = course.root / "runs"
    folder.mkdir()
    (folder / "lesson.ipynb").symlink_to("/dev/full")
    assert run(course.root / "notebooks" / "lesson.ipynb", folder, {}) == 1
    assert "cannot be written (No space left on device)" in capfd.readouterr().out.splitlines()[-1]
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["nope"], "There is no notebook 'nope'. There is: broken, plain"),
        ([], "Which notebook?"),
        (["plain", "--profile", "big"], "profile: there is no 'big'"),
        (["plain", "--task", "rain"], "task: there is no 'rain'"),
        (["plain", "--parameters", "training.lrr=1"], "training.lr"),
        (["plain", "--parameters", "fast"], "key=value"),
        (["plain", "--task", "flare"], "plain.ipynb does not read task"),
    ],
)
def test_a_request_that_makes_no_sense_ends_before_the_run(course, words, sentence):
    course("plain", "1 + 1")
    (course.root / "notebooks" / "broken.ipynb").write_text("no JSON")
    with pytest.raises(Exception, match=re.escape(sentence)) as caught:
        main(words, course.root)
    assert isinstance(caught.value, command.Refusal | ValueError)
    assert not (course.root / "runs").exists()


def test_labels_that_are_wrong_are_told_before_the_run(course):
    course("baseline", PARAMETERS)
    (course.root / "labels.csv").write_text("time,value\n2014-01-07,1\n")
    own = ["synthetic.folder=null", "data.archive=.", "data.store=store", "labels.path=labels.csv", "paths.labels=."]
    with pytest.raises(ValueError, match="labels.csv has no column timestamp"):
        main(["baseline", "--parameters", *own, "paths.released=."], course.root)
    assert not (course.root / "runs").exists()


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
    with pytest.raises(ConfigError, match="got '3'"):
        parse_parameters(["3"])


# --- what make and the top of every command do ---


@pytest.mark.parametrize("name", ["it's `date` $HOME", "$(shell date)"])
def test_make_hands_words_over_untouched(make, name):
    done = make("run-notebook", f"NB={name}", "P=labels.path=a$b")
    assert done.returncode != 0 and done.stdout.startswith(f"There is no notebook '{name}'. There is: baseline")


def test_make_prints_no_traceback_for_a_request_that_makes_no_sense(make):
    done = make("cache", "TASK=nope")
    assert done.returncode != 0 and "there is no 'nope'" in done.stdout and "Traceback" not in done.stderr


@pytest.mark.parametrize("word", ["seed=2", "training.lr=1e-3", "task=flare"])
def test_make_refuses_variables_that_no_target_knows(make, word):
    done = make("run-notebook", "NB=nope", "P=a=1", word)
    assert done.returncode != 0 and f"No target knows '{word.split('=')[0]}'" in done.stderr and not done.stdout


@pytest.mark.parametrize(("lines", "code"), [(100, 0), (10**6, 1)])  # told after the end, or in the middle of it
def test_a_reader_that_stops_early_sees_no_trace(lines, code):
    program = f"from helpers.tools.command import run; run(lambda: print('key value\\n' * {lines}))"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": os.environ | {"PYTHONUNBUFFERED": ""}}
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == code


@pytest.mark.parametrize(
    "line, code, told",
    [
        ("raise command.Refusal('Not so.')", 1, "Not so.\n"),
        ("raise helpers.config.ConfigError('lr: too large')", 1, "lr: too large\n"),
        (
            "helpers.config.find_shared('/no/where', pathlib.Path('/'))",
            1,
            r"The shared folder /no/where \(.*own cache.\n",
        ),
        ("raise KeyboardInterrupt", 130, "Interrupted.\n"),
        # Python raises nothing from the end of an object
        ("type('X', (), {'__del__': lambda x: signal.raise_signal(2)})(); time.sleep(30)", 130, "Interrupted.\n"),
        ("return 3", 3, ""),
        ("{}['x']", 1, "KeyError: 'x'\nWhere it happened stands in (.*)\n"),
        ("helpers.config.load_scalers('none.yaml')", 1, "FileNotFoundError: .*none.yaml'\nWhere .* stands in (.*)\n"),
        ("helpers.config.leaves(1).__next__()", 1, "AttributeError: 'int' .*\nWhere it happened stands in (.*)\n"),
    ],
)
def test_every_command_ends_in_a_sentence_and_a_code(line, code, told, tmp_path):
    imports = "import pathlib, signal, time, helpers.config\nfrom helpers.tools import command"
    program = f"{imports}\ndef main():\n    {line}\ncommand.run(main)"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == code and not done.stderr
    found = re.fullmatch(told, done.stdout)
    assert found, done.stdout
    if found.groups():
        assert "Traceback" in Path(found[1]).read_text()
