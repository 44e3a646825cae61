"""What a run leaves behind: a plain local history under `runs/<name>/`, and the same on Weights & Biases.

The local files are the record; Weights & Biases (https://docs.wandb.ai) gets a copy and may fail without harm.
"""

import json
import math
import os
import re
import subprocess
import uuid
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any, Self

import pandas as pd
import yaml

from helpers.config import Config
from helpers.model.checkpoint import CheckpointError
from helpers.shared import atomic_write, make_folder, share

STATE = "last.pt"  # in the run's folder: all that a later process needs to go on
BEST = "best.pt"  # the trained weights of the best epoch so far, as `load_adapter` reads them
UPLOAD_SECONDS = 15  # how long the start and the end of a run wait for Weights & Biases


class Run:
    """One run and its folder `runs/<name>/`, for `with`, or call `finish()` at the end."""

    def __init__(self, folder: Path, cfg: Config) -> None:
        self.folder, self.name, self._rows = folder, folder.name, []
        self._about = {"name": self.name, "experiment": cfg.experiment, "task": cfg.task, "profile": cfg.profile}
        self._about |= {"started": datetime.now(UTC).isoformat(), "commit": commit_of(cfg.root), "status": "running"}
        with atomic_write(folder / "config.yaml") as path:
            path.write_text(yaml.safe_dump(cfg.to_dict(), sort_keys=False), encoding="utf-8")
        self._note(metrics={}, data_fingerprint=None)
        self._wandb = _start_wandb(cfg, folder, self._about["commit"])

    def describe(self, **origin: str) -> None:
        """Note where the numbers come from, such as the fingerprints of data and checkpoint."""
        self._note(**origin)
        self._online(lambda run: run.config.update(origin))

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Add a row to history.csv, on disk at once, so that a killed kernel leaves what was measured; step: epoch."""
        self._rows.append({"step": step, **{key: _plain(value) for key, value in metrics.items()}})
        with atomic_write(self.folder / "history.csv") as path:
            pd.DataFrame(self._rows).to_csv(path, index=False)
        self._online(lambda run: run.log(self._rows[-1], step=step))

    def figure(self, name: str, figure: Any) -> Path:
        """Save a figure of Matplotlib as `<name>.png` in the run's folder; returns the file."""
        path = self.folder / f"{name}.png"
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format="png", bbox_inches="tight", dpi=120)
        if self._wandb is not None:
            from wandb import Image

            self._online(lambda run: run.log({name: Image(str(path))}))
        return path

    def summary(self, values: Mapping[str, Any]) -> None:
        """Add final numbers (test metrics, parameter counts, ...) to summary.json; later calls add to earlier ones."""
        self._note(metrics=self._about["metrics"] | {key: _plain(value) for key, value in values.items()})
        self._online(lambda run: run.summary.update(self._about["metrics"]))

    def finish(self, status: str = "finished") -> None:
        """Close the run; `list_runs` shows it from now on. A second call does nothing."""
        if self._about["status"] == "running":
            self._note(finished=datetime.now(UTC).isoformat(), status=status)
            self._online(lambda run: run.finish(exit_code=int(status != "finished")))
            self._wandb = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # what ended the run is to be read, not that the disk is full
        with suppress(OSError) if kind else nullcontext():
            self.finish("failed" if kind else "finished")

    def _note(self, **values: Any) -> None:
        self._about |= values
        with atomic_write(self.folder / "summary.json") as path:
            path.write_text(json.dumps(self._about, indent=2), encoding="utf-8")

    def _online(self, action: Callable[[Any], object]) -> None:
        if self._wandb is not None:
            try:
                action(self._wandb)
            except Exception as error:  # whatever it is, it must not cost the person their training
                self._wandb = None
                warnings.warn(f"Weights & Biases failed ({error}); {self.folder} goes on without it.", stacklevel=3)


# ---- Starting and finding runs
def start_run(cfg: Config, name: str | None = None) -> Run:
    """Begin a run in a folder of its own; nothing that another run wrote is ever overwritten (FileExistsError).

    `name` is that of the folder, which `make run-notebook` has made already; None takes the next free
    `<experiment>-<task>-<profile>-<NNN>`. A name with a folder or other signs in it raises a ValueError.
    """
    if name is None:
        return Run(claim_run(cfg.runs_folder, f"{cfg.experiment}-{cfg.task}-{cfg.profile}"), cfg)
    if not re.fullmatch(r"[A-Za-z0-9_][\w.+-]*", name):
        raise ValueError(f"A run cannot be called {name!r}: a name is letters, digits, _ . + and -, without a folder.")
    folder = make_folder(cfg.runs_folder / name)
    if (folder / "summary.json").exists():
        raise FileExistsError(
            f"{folder} holds an earlier run, and runs are not overwritten. Pass name=None to get the next free number."
        )
    return Run(folder, cfg)


def claim_run(runs: Path, prefix: str) -> Path:
    """Make and return the folder `runs/<prefix>-<NNN>` with the next free number, also while others do the same."""
    # beyond the highest, as a name must not come to mean another run once an earlier one is deleted
    taken = [re.fullmatch(rf"{re.escape(prefix)}-(\d+)", path.name) for path in make_folder(runs).iterdir()]
    for number in count(1 + max((int(match[1]) for match in taken if match), default=0)):
        folder = runs / f"{prefix}-{number:03}"
        with suppress(FileExistsError):
            folder.mkdir()
            share(folder)
            return folder


def list_runs(runs: str | Path, **wanted: str) -> pd.DataFrame:
    """The finished runs in the folder `runs`, oldest first, of the `wanted` experiment, task or profile, with folder,
    settings (a dict) and metrics. A run whose record cannot be read is left out and named.
    """
    columns, rows = ["name", "experiment", "task", "profile", "finished", "folder", "settings", "seed"], []
    for path in Path(runs).glob("*/summary.json"):
        try:
            run = {"folder": path.parent, **json.loads(path.read_text(encoding="utf-8"))}
            if run["status"] == "finished" and all(run[key] == value for key, value in wanted.items()):
                run["settings"] = yaml.safe_load((path.parent / "config.yaml").read_text(encoding="utf-8"))
                run["seed"] = run["settings"]["seed"]
                needed = {key: run[key] for key in columns}  # a KeyError names the one that lacks
                rows.append({**needed, **run, **run["metrics"]})
        except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
            print(f"Left out: {path.parent}, whose record is damaged ({type(error).__name__}: {error}).")
    return pd.DataFrame(rows, columns=None if rows else columns).sort_values("finished", ignore_index=True)


def finished_run(folder: Path) -> dict[str, Any]:
    """The row of `list_runs` of a finished run that has its weights; a CheckpointError names those that there are."""
    runs = list_runs(folder.parent)
    run = next((run for run in runs.to_dict("records") if run["folder"] == folder), None)
    if run is None or not (folder / BEST).exists():
        there = ", ".join(runs["name"]) or "none"
        raise CheckpointError(f"{folder} is no finished run with its weights ({BEST}). Finished runs there: {there}.")
    return run


def how_to_go_on(name: str, cfg: Config) -> str:
    """What to type to go on with the interrupted run `name`."""
    return (
        f"To go on: make run-notebook NB={cfg.experiment} TASK={cfg.task} PROFILE={cfg.profile} "
        f'P="training.resume={name}" with the other parameters of the run, or in the notebook '
        f'parameters = {{"training.resume": "{name}"}}, and run all cells.'
    )


def _plain(value: Any) -> Any:
    """The value of a NumPy or torch scalar as JSON can hold it: None for nan and infinities."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def commit_of(folder: Path) -> str:
    """The git commit of the code in `folder`, with "+changes" where tracked files differ from it."""
    words = ["git", "-C", str(folder), "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+changes"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not in git"


# ---- Weights & Biases
def wandb_mode(cfg: Config) -> str:
    """`online`, `offline` or `disabled`; for `auto`, what WANDB_MODE says, else online if the person is logged in."""
    if cfg.tracking.wandb != "auto":
        return cfg.tracking.wandb
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    import wandb

    with suppress(wandb.Error):  # a key that cannot be one
        wandb.setup(wandb.Settings(silent=True))
        if wandb.login(prompt=False, verify=False):
            return "online"
    return "offline"


def _start_wandb(cfg: Config, folder: Path, commit: str) -> Any:
    """A Weights & Biases run, offline where the server does not answer, or None where it is disabled or fails."""
    mode = wandb_mode(cfg)
    if mode == "disabled":
        return None
    import wandb  # slow, so only where it is wanted

    # only what a comparison of runs needs: no copy of the console or the code, no polling of the machine
    settings = wandb.Settings(
        silent=True, console="off", disable_git=True, save_code=False,
        init_timeout=UPLOAD_SECONDS, finish_timeout=UPLOAD_SECONDS, finish_timeout_raises=False,
        x_disable_stats=True, x_disable_meta=True, x_disable_machine_info=True,
    )  # fmt: skip
    for attempt in dict.fromkeys((mode, "offline")):
        try:
            # the id is given, because WANDB_RUN_ID in the environment would be that of every run
            return wandb.init(
                project=cfg.tracking.project, entity=cfg.tracking.entity, name=folder.name, dir=str(folder),
                mode=attempt, id=uuid.uuid4().hex[:8], group=f"{cfg.task}-{cfg.profile}", job_type=cfg.experiment,
                config={**cfg.to_dict(), "commit": commit}, reinit="create_new", settings=settings,
            )  # fmt: skip
        except Exception as error:  # no network, a wrong key, a full disk: the local history goes on
            warnings.warn(f"Weights & Biases did not start {attempt} ({error}); {folder} has it all.", stacklevel=4)
    return None
