"""The long commands of the course on a small Sun, and what each leaves: the same, whatever happened on the way."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pandas as pd
import torch
from children import at_once
from frame_files import files
from nbformat.v4 import new_code_cell, new_notebook

from helpers import use
from helpers.config import Config, load_config
from helpers.data import frames, synthetic
from helpers.tools import run_notebook, train
from helpers.training.tracking import BEST, STATE, list_runs

ROOT = Path(__file__).parents[2]
SMALL = {
    "synthetic.visits": 14, "synthetic.workers": 1, "data.build_workers": 1, "data.native_size": 64,
    "paths.reserve_gb": 0.0, "tracking.wandb": "disabled", "target.event_threshold": None,
    "target.metrics": ["rmse"], "lora.rank": 2,
    "training.epochs": 2, "training.batch_size": 4, "training.max_train_samples": 8, "training.save_every_steps": 1,
    "split.train": ["2014-01-01", "2014-01-15"], "split.val": ["2014-01-17", "2014-01-22"],
    "split.test": ["2014-01-24", "2014-01-29"], "model.weights": str(ROOT / "helpers/data/surya.tiny.pt"),
}  # fmt: skip
LESSON = 'import matplotlib.pyplot as plt\nplt.plot([1, 2, 3])\nprint("a long story\\n" * 20_000)'


@dataclass(frozen=True)
class Job:
    """A long command that writes into the folder it is given, and what is there once it is done."""

    work: Callable[[Path], object]
    left: Callable[[Path], object]


def small(sun: Path, runs: Path, **more: object) -> Config:
    """The configuration of a small fine-tune on the Sun in the folder `sun`, with runs in the folder `runs`."""
    own = SMALL | {"synthetic.folder": str(sun), "paths.runs": str(runs)} | more
    return load_config(ROOT / "config.yaml", own, task="flare", experiment="finetune")


def train_in(sun: Path, runs: Path) -> None:
    """`python -m helpers.tools.train`; it goes on with the newest run that has saved a state, if there is one."""
    saved = sorted(runs.glob(f"*/{STATE}"))
    own = {"synthetic.folder": str(sun), "paths.runs": str(runs)}
    own["training.resume"] = saved[-1].parent.name if saved else None
    words = [f"{key}={json.dumps(value)}" for key, value in (SMALL | own).items()]
    train.main(["finetune", "--task", "flare", "--parameters", *words])


def trained(runs: Path) -> list[dict]:
    """What the finished runs in a folder have left, without names and durations; each result once."""
    found = []
    for folder in list_runs(runs)["folder"]:
        left = {path.name: path.read_bytes() for path in folder.glob("predictions_*.csv")}
        left["history"] = pd.read_csv(folder / "history.csv").drop(columns="seconds").to_csv()
        state = torch.load(folder / BEST, weights_only=True)["state"] if (folder / BEST).exists() else {}
        left |= {key: tensor.numpy().tobytes() for key, tensor in state.items()}
        found += [left] * (left not in found)
    return found


def make_ground(folder: Path) -> Path:
    """A Sun, its store and a finished run, which the jobs begin with; only to be read."""
    (ended,) = at_once(lambda: train_in(folder / "sun", folder / "runs"))
    assert ended.code == 0, ended.said
    (folder / "notebooks").mkdir()
    parameters = new_code_cell("run_name = None\nparameters = {}", metadata={"tags": ["parameters"]})
    cells = [parameters, new_code_cell(LESSON)]
    nbformat.write(new_notebook(cells=cells), folder / "notebooks" / "lesson.ipynb")
    (folder / "config.yaml").write_text((ROOT / "config.yaml").read_text())
    own = {"synthetic": {"folder": "sun"}, "paths": {"runs": "runs", "reserve_gb": 0.0}}  # of this machine
    (folder / "config.local.yaml").write_text(json.dumps(own))
    return folder


def jobs(ground: Path) -> dict[str, Job]:
    """The long commands, by name."""
    sun = ground / "sun"

    def draw(disk: Path) -> None:
        synthetic.BYTES_A_PIXEL = 0  # as if the estimate had been too low
        synthetic.ensure_synthetic(small(disk / "sun", disk, **{"synthetic.visits": 4}))

    def build(disk: Path) -> None:
        frames.COMPRESSED = 0.0
        frames.prepare_store(small(sun, disk, **{"data.store": str(disk / "store.zarr")}))

    def predict(disk: Path) -> None:
        model = use.load_run(next((ground / "runs").iterdir()), ground / "config.yaml")
        use.predict_times(model, pd.date_range("2014-01-01T01:00", periods=14, freq="48h"), disk / "out.csv")

    def run_lesson(disk: Path) -> int:
        return run_notebook.main(["lesson", "--parameters", f"paths.runs={disk}"], ground)

    def told(disk: Path) -> bool:
        page = max(disk.glob("lesson-*")) / "lesson.html"
        return page.exists() and "a long story" in page.read_text()

    return {
        "drawing": Job(
            draw, lambda disk: {name: content for name, content in files(disk).items() if "json" not in name}
        ),
        "store build": Job(build, lambda disk: files(disk / "store.zarr")),
        "training": Job(lambda disk: train_in(sun, disk), trained),
        "prediction": Job(predict, lambda disk: (disk / "out.csv").read_bytes()),
        "run-notebook": Job(run_lesson, told),
    }
