"""Ctrl-C, as a terminal sends it: nothing goes on, no half file is taken as whole, and the last word is a sentence."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook
from test_torchrun import SMALL_SUN

from helpers.data.frames import open_store
from helpers.training.tracking import list_runs

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.notebook
SETTINGS = [*SMALL_SUN, "synthetic.visits=80", "training.epochs=500", "training.patience=500", "data.build_workers=2"]
SETTINGS += ["split.train=[2014-01-01, 2014-05-01]", "training.max_train_samples=120"]
SETTINGS += ["split.val=[2014-05-03, 2014-05-15]", "split.test=[2014-05-17, 2014-05-28]"]
LESSON = "import pathlib, subprocess\npathlib.Path('working').touch()\nsubprocess.run(['sleep', '300'])"
SUN = "shared/surya-course/synthetic"


def processes_of(folder: Path) -> list[str]:
    """All that live with the environment of the command, whatever process started them."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SURYA_SHARED") == f"{folder}/shared" and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:  # gone meanwhile, or of somebody else
            pass
    return found


def interrupted(folder: Path, words: list[str], at_work: str) -> str:
    """Call Python, press Ctrl-C once there is a file `at_work`, and return what was printed."""
    environment = os.environ | {"SURYA_SHARED": f"{folder}/shared", "OMP_NUM_THREADS": "1"}
    with open(folder / "said", "w+") as said:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env=environment, stdout=said, stderr=said, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # also where these tests ignore it
        )  # fmt: skip
        while not any(folder.glob(at_work)):
            assert process.poll() is None, (folder / "said").read_text()
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        code = process.wait(60)
    told, end = (folder / "said").read_text(), time.monotonic() + 20
    while (left := processes_of(folder)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left and code == 130 and "Traceback" not in told, (left, code, told[-3000:])
    return told


def test_of_a_drawing_a_build_and_a_training(tmp_path):
    settings = ["--parameters", *SETTINGS, f"paths.runs={tmp_path}/runs"]
    command = ["-m", "helpers.tools.train", "finetune", *settings]
    said = interrupted(tmp_path, command, f"{SUN}/.sun-0.*")  # while its workers begin
    assert said.splitlines()[-1] == "Interrupted."
    said = interrupted(tmp_path, command, f"{SUN}/.sun-0.*/2014/01/*.nc")
    assert said.splitlines()[-1] == "Interrupted." and not (tmp_path / SUN / "sun-0").exists()
    interrupted(tmp_path, command, f"{SUN}/sun-0/frames/*.zarr/frames/c.*.0.0.0")
    (path,) = (tmp_path / SUN / "sun-0/frames").glob("*.zarr")
    store = open_store(path)
    assert all(store.read([when]).isfinite().all() for when in store.times) and not (tmp_path / "runs").exists()
    said = interrupted(tmp_path, command, "runs/*/last.pt")
    assert "training.resume=finetune-flare-tiny-001" in said.splitlines()[-1] and "s/batch" in said or "batch/s" in said
    assert torch.load(tmp_path / "runs/finetune-flare-tiny-001/last.pt")["history"]
    assert list_runs(tmp_path / "runs").empty


def test_of_a_notebook(tmp_path):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "config.yaml").write_text((ROOT / "config.yaml").read_text())
    nbformat.write(new_notebook(cells=[new_code_cell(LESSON)]), tmp_path / "notebooks" / "lesson.ipynb")
    code = (
        "import pathlib, sys; from helpers.tools import command, run_notebook; "
        "command.run(lambda: run_notebook.main(['lesson'], pathlib.Path(sys.argv[1])))"
    )
    said = interrupted(tmp_path, ["-c", code, str(tmp_path)], "notebooks/working")
    assert said.splitlines()[-1] == "Interrupted." and (tmp_path / "runs/lesson-flare-tiny-001/lesson.html").exists()
