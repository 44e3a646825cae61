"""Baseline and fine-tune run headless on a small Sun with the shipped tiny checkpoint.

`make test` runs the fine-tune of flares; `make test-notebooks` the baseline beside it, and the other tasks.
"""

import json

import nbformat
import pandas as pd
import pytest
import torch
from exercises import check_exercises, folder_with_answers

from helpers.tools.run_notebook import main

pytestmark = pytest.mark.xdist_group("paired_notebooks")

SMALL = [
    "synthetic.visits=24 paths.reserve_gb=0 training.epochs=2",
    "split.train=[2014-01-01, 2014-01-29] split.val=[2014-01-31, 2014-02-08] split.test=[2014-02-10, 2014-02-20]",
]
RELEASED = ["synthetic.visits=60 paths.reserve_gb=0 training.epochs=2 synthetic.seed=3"]  # with splits of their own
PUBLISHED = {"flare_24h": "test_tss", "solar_wind": "test_rmse", "euv_spectra": "test_mape"}
KEYS = PUBLISHED | {
    "flare": "test_tss",
    "active_region": "test_iou",
    "translation": "test_correlation",
    "forecast": "test_rmse",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of the run of a notebook, which is executed when it is asked for first."""
    folder = tmp_path_factory.mktemp("paired")
    root = folder_with_answers(folder / "project")

    def of(name: str, task: str = "flare"):
        run = folder / "runs" / f"{name}-{task}-tiny-001"
        if not run.exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("SURYA_SHARED", str(folder / "shared"))
                settings = RELEASED if task in PUBLISHED else SMALL
                words = [name, "--profile", "tiny", "--task", task, "--parameters", *settings]
                assert main([*words, f"paths.runs={folder / 'runs'}"], root=root) == 0
        return run

    return of


def outputs(run, name):
    """Everything that the notebook printed or returned, as one text, and how many figures it shows."""
    cells = nbformat.read(run / f"{name}.ipynb", as_version=4).cells
    shown = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    text = "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in shown)
    return text, sum("image/png" in output.get("data", {}) for output in shown)


MISTAKES = {
    "baseline": (" takes ts ", "The model returns"),
    "finetune": ("an even number of patches of patch_size 12", "pooling 'class_token' needs nglo=1"),
}


def check_record(run, name, task):
    """The run is complete; the page has its figures, its mistakes made on purpose, and exercises that can be solved."""
    text, figures = outputs(run, name)
    assert figures == {"baseline": 7, "finetune": 8}[name] and "Traceback" not in text and "Warning" not in text
    check_exercises(nbformat.read(run / f"{name}.ipynb", as_version=4).cells, at_least=4)
    assert (run / f"{name}.html").read_text().count("data:image/png;base64") >= figures
    assert len(pd.read_csv(run / "history.csv")) == 3  # before training, and two epochs
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished" and KEYS[task] in summary["metrics"]
    assert all(mistake in text for mistake in MISTAKES[name])
    assert f"{name} ({run.name})" in text


def test_the_fine_tune_loads_adapts_and_leaves_its_record(run):
    check_record(run("finetune"), "finetune", "flare")
    text, _ = outputs(run("finetune"), "finetune")
    assert "loaded     73 tensors" in text and "missing     0 tensors" in text
    assert "encoder                0       336,752" in text
    assert "the output changes by 0.0\n" in text and "1D: (8, 64, 64) -> (8, 1), shuffling changes it by 0.000" in text


def test_the_saved_model_is_small_and_has_no_frozen_weight(run):
    saved = torch.load(run("finetune") / "model.pt", weights_only=True)
    names = [name for part in saved.values() if isinstance(part, dict) for name in part if "encoder." in str(name)]
    assert names and all("lora_" in name for name in names)


@pytest.mark.notebook
def test_the_second_of_a_pair_shows_both(run):
    finetune, baseline = run("finetune"), run("baseline")
    check_record(baseline, "baseline", "flare")
    assert f"finetune ({finetune.name})" in outputs(baseline, "baseline")[0]


@pytest.mark.notebook
@pytest.mark.parametrize("task", PUBLISHED)
def test_the_fine_tune_of_the_released_labels(run, task):
    check_record(run("finetune", task), "finetune", task)
    text, _ = outputs(run("finetune", task), "finetune")
    assert "best reference" in text and (task != "solar_wind" or "reaches into that of a later split" in text)


@pytest.mark.notebook
@pytest.mark.parametrize("task", ["active_region", "translation", "forecast"])
def test_the_fine_tune_of_images(run, task):
    check_record(run("finetune", task), "finetune", task)
    text, _ = outputs(run("finetune", task), "finetune")
    if task == "translation":
        assert "8 of 13 channels, by name" in text and "the rows of hmi_m" in text and "fresh" in text
