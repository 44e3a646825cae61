"""Baseline and fine-tune run headless, one after the other, on a small Sun with the shipped tiny checkpoint."""

import json

import nbformat
import pandas as pd
import pytest
import torch

from helpers.tools.run_notebook import main

SMALL = [
    "synthetic.visits=24 paths.reserve_gb=0 training.epochs=2",
    "split.train=[2014-01-01, 2014-01-29] split.val=[2014-01-31, 2014-02-08] split.test=[2014-02-10, 2014-02-20]",
]


KEYS = {"flare": "test_tss", "active_region": "test_iou", "translation": "test_correlation", "forecast": "test_rmse"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The runs folder after both notebooks, for each task that is asked for once."""
    folder = tmp_path_factory.mktemp("paired")
    done = set()

    def of(task: str):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SURYA_SHARED", str(folder / "shared"))
            for name in ("baseline", "finetune") if task not in done else ():
                words = [name, "--profile", "tiny", "--task", task, "--parameters", *SMALL]
                assert main([*words, f"paths.runs={folder / 'runs'}"]) == 0
        done.add(task)
        return folder / "runs"

    return of


def outputs(run, name):
    """Everything that the notebook printed or returned, as one text, and how many figures it shows."""
    cells = nbformat.read(run / f"{name}.ipynb", as_version=4).cells
    shown = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    text = "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in shown)
    return text, sum("image/png" in output.get("data", {}) for output in shown)


@pytest.mark.parametrize("task", KEYS)
def test_runs_leave_their_record_and_a_page_with_figures(runs, task):
    for name in ("baseline", "finetune"):
        run = runs(task) / f"{name}-{task}-tiny-001"
        text, figures = outputs(run, name)
        assert figures == 8 and "Traceback" not in text and "Warning" not in text
        assert (run / f"{name}.html").read_text().count("data:image/png;base64") >= figures
        assert len(pd.read_csv(run / "history.csv")) == 3  # before training, and two epochs
        summary = json.loads((run / "summary.json").read_text())
        assert summary["status"] == "finished" and KEYS[task] in summary["metrics"]
        for mistake in ("not a multiple of the 12-pixel patch", "class-token pooling reads", "The model returns"):
            assert mistake in text
    assert f"baseline (baseline-{task}-tiny-001)" in text and f"finetune (finetune-{task}-tiny-001)" in text


def test_the_fine_tune_loads_and_adapts(runs):
    text, _ = outputs(runs("flare") / "finetune-flare-tiny-001", "finetune")
    assert "loaded     71 tensors" in text and "missing     0 tensors" in text
    assert "encoder                0       363,376" in text
    assert 'rearrange(ts, "b t c h w -> b c t h w")' in text


def test_an_image_starts_from_the_decoder_rows_of_its_channel(runs):
    text, _ = outputs(runs("translation") / "finetune-translation-tiny-001", "finetune")
    assert "8 of 13 channels, by name" in text and "the rows of hmi_m" in text and "fresh" in text


def test_the_saved_model_is_small_and_has_no_frozen_weight(runs):
    saved = torch.load(runs("flare") / "finetune-flare-tiny-001" / "model.pt", weights_only=True)
    names = [name for part in saved.values() if isinstance(part, dict) for name in part if "encoder." in str(name)]
    assert names and all("lora_" in name for name in names)
