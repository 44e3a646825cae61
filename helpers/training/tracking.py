"""What a run leaves behind: a plain local history under `runs/<name>/`, and the same on Weights & Biases.

The local files are the record; Weights & Biases (https://docs.wandb.ai) gets a copy and may fail without harm.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import subprocess
import uuid
import warnings
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pandas as pd
import yaml

from helpers.config import Config
from helpers.shared import atomic_write, disk_errors, make_folder, remove_leftovers, share

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATE = "last.pt"  # in the run's folder: all that a later process needs to go on
BEST = "best.pt"  # the trained weights of the best epoch so far, as `load_adapter` reads them
_OWN = ("name", "experiment", "task", "profile", "status", "started", "finished")  # what runs are chosen by
UPLOAD_SECONDS = 15  # how long the start and the end of a run wait for Weights & Biases


class Run:
    """One run and its folder; use it with `with`, or call `finish()` at the end.

    Attributes:
        folder: `runs/<name>/` with config.yaml, history.csv, summary.json and figures.
        name: the folder's name, and the run's name on Weights & Biases.
    """

    def __init__(self, folder: Path, cfg: Config, experiment: str) -> None:
        self.folder, self.name = folder, folder.name
        self._columns: list[str] | None = None
        self._step = 0
        self._metrics: dict[str, Any] = {}
        self._about = {"name": self.name, "experiment": experiment, "task": cfg.task, "profile": cfg.profile}
        self._about |= {"started": _now(), "commit": commit_of(cfg.root)}
        with atomic_write(folder / "config.yaml") as path:
            path.write_text(yaml.safe_dump(cfg.to_dict(), sort_keys=False), encoding="utf-8")
        self._write_summary("running")
        self._wandb = _start_wandb(cfg, folder, experiment, self._about["commit"])

    def describe(self, **origin: str) -> None:
        """Note where the numbers come from, such as the fingerprints of data and checkpoint."""
        self._about |= origin
        self._write_summary("running")
        self._online(lambda run: run.config.update(origin))

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Append one row to history.csv, on disk at once, so that a killed kernel leaves what was measured.

        Args:
            metrics: numbers by name; the first call fixes the names.
            step: the epoch, written as the first column.

        Raises:
            ValueError: if the names are not those of the first row.
        """
        row = {"step": step, **{key: _scalar(value) for key, value in metrics.items()}}
        first, self._columns = self._columns is None, self._columns or list(row)
        if set(row) != set(self._columns):
            raise ValueError(
                f"{self.folder / 'history.csv'} has the columns {', '.join(self._columns)}, but this row has "
                f"{', '.join(row)}. Log the same names at every step; single numbers belong into run.summary(...)."
            )
        path = self.folder / "history.csv"
        with disk_errors(self.folder), open(path, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            if first:
                writer.writeheader()
            writer.writerow(row)
        self._step = step
        self._online(lambda run: run.log(row, step=step))

    def figure(self, name: str, figure: Figure) -> Path:
        """Save a figure as `<name>.png` in the run's folder; returns the file."""
        path = self.folder / f"{name}.png"
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format="png", bbox_inches="tight", dpi=120)

        def upload(run: Any) -> None:
            import wandb

            run.log({name: wandb.Image(str(path))}, step=self._step)

        self._online(upload)
        return path

    def summary(self, values: Mapping[str, Any]) -> None:
        """Add final numbers (test metrics, parameter counts, ...) to summary.json; later calls add to earlier ones."""
        self._metrics.update({key: _finite(_scalar(value)) for key, value in values.items()})
        self._write_summary("running")
        self._online(lambda run: run.summary.update(self._metrics))

    def finish(self, status: str = "finished") -> None:
        """Close the run; `list_runs` shows it from now on. A second call does nothing."""
        if "finished" in self._about:
            return
        self._about["finished"] = _now()
        self._write_summary(status)
        self._online(lambda run: run.finish(exit_code=int(status != "finished")))
        self._wandb = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.finish("failed" if kind else "finished")
        except OSError:
            if kind is None:
                raise
            # the disk is full: what ended the run is to be read, not this; and a word of the same length needs no space
            summary = self.folder / "summary.json"
            text = summary.read_text(encoding="utf-8").replace('"running"', '"failed" ')
            with open(summary, "r+", encoding="utf-8") as file:
                file.write(text)

    def _write_summary(self, status: str) -> None:
        content = {**self._about, "status": status, "metrics": self._metrics}
        with atomic_write(self.folder / "summary.json") as path:
            path.write_text(json.dumps(content, indent=2), encoding="utf-8")

    def _online(self, action: Callable[[Any], object]) -> None:
        if self._wandb is not None:
            try:
                action(self._wandb)
            except Exception as error:  # whatever it is, it must not cost the person their training
                self._wandb = None
                warnings.warn(f"Weights & Biases failed ({error}); {self.folder} goes on without it.", stacklevel=3)


# --------------------------------------------------------------------------------------------------------------------
# Starting and finding runs
# --------------------------------------------------------------------------------------------------------------------
def start_run(cfg: Config, name: str | None = None, experiment: str | None = None) -> Run:
    """Begin a run in a folder of its own; nothing that another run wrote is ever overwritten.

    Args:
        cfg: the configuration; a copy is written beside the results.
        name: of the folder, a plain name; None takes the next free `<experiment>-<task>-<profile>-<NNN>`.
            `make run-notebook` has made the folder already and passes its name.
        experiment: what the run is compared as; None takes the configuration's.

    Raises:
        ValueError: the name is not a plain name.
        FileExistsError: if a run of that name has begun before.
    """
    experiment, runs = experiment or cfg.experiment, cfg.runs_folder
    if name is None:
        return Run(claim_run(runs, f"{experiment}-{cfg.task}-{cfg.profile}"), cfg, experiment)
    if not re.fullmatch(r"[A-Za-z0-9_][\w.+-]*", name):
        raise ValueError(f"A run cannot be called {name!r}: a name is letters, digits, _ . + and -, without a folder.")
    folder = runs / name
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "summary.json").exists():
        raise FileExistsError(
            f"{folder} holds the results of an earlier run, and runs are not overwritten. "
            "Pass name=None to get the next free number, or another name."
        )
    return Run(folder, cfg, experiment)


def claim_run(runs: Path, prefix: str) -> Path:
    """Make and return the folder `runs/<prefix>-<NNN>` with the next free number, also while others do the same."""
    for earlier in make_folder(runs).iterdir():
        remove_leftovers(earlier)
    taken = [re.fullmatch(rf"{re.escape(prefix)}-(\d+)", path.name) for path in runs.iterdir()]
    number = max((int(match[1]) for match in taken if match), default=0) + 1
    while True:
        folder = runs / f"{prefix}-{number:03}"
        try:
            folder.mkdir()
            share(folder)
            return folder
        except FileExistsError:
            number += 1


def list_runs(runs: str | Path, **wanted: str | None) -> pd.DataFrame:
    """The finished runs in the folder `runs`, oldest first, one row each with its metrics.

    A run whose record cannot be read is left out and named.

    Args:
        runs: the folder of all runs (`cfg.runs_folder`).
        **wanted: experiment=, task= or profile= to choose by; None means any.

    Returns:
        The columns name, experiment, task, profile, status, started, finished, folder, and the metrics.
    """
    if unknown := set(wanted) - set(_OWN):
        raise TypeError(f"Runs are chosen by {', '.join(_OWN)}, not by {', '.join(sorted(unknown))}.")
    rows = []
    for path in Path(runs).glob("*/summary.json"):
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
            fits = all(summary[key] == value for key, value in wanted.items() if value is not None)
            if fits and summary["status"] == "finished":
                rows.append({**{key: summary[key] for key in _OWN}, "folder": path.parent, **summary["metrics"]})
        except (OSError, ValueError, TypeError, KeyError) as error:
            print(f"Left out: {path.parent}, whose summary.json is damaged ({type(error).__name__}: {error}).")
    table = pd.DataFrame(rows, columns=None if rows else [*_OWN, "folder"])
    return table.sort_values("finished", ignore_index=True)


def sync_command(runs: str | Path) -> str:
    """The command that uploads the offline runs in the folder `runs` to Weights & Biases, or that there is none."""
    found = sorted(Path(runs).glob("*/wandb/offline-run-*"))
    if not found:
        return f"No run in {runs} waits for an upload."
    return f"wandb sync {Path(runs)}/*/wandb/offline-run-*   # {len(found)} runs"


def how_to_go_on(name: str, cfg: Config) -> str:
    """What to type to go on with the interrupted run `name`."""
    words = f"NB={cfg.experiment} TASK={cfg.task} PROFILE={cfg.profile}"
    return (
        f'To go on: make run-notebook {words} P="training.resume={name}" with the other parameters of the run, or in '
        f'the notebook parameters = {{"training.resume": "{name}"}}, and run all cells.'
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _scalar(value: Any) -> Any:
    """The plain Python value of a NumPy or torch scalar."""
    return value.item() if hasattr(value, "item") else value


def _finite(value: Any) -> Any:
    """What JSON can hold: None for nan and infinities."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def commit_of(folder: Path) -> str:
    """The git commit of the code in `folder`, with "+changes" where tracked files differ from it."""
    try:
        commit, changes = (
            subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "not in git"
    return commit.strip() + ("+changes" if changes else "")


# --------------------------------------------------------------------------------------------------------------------
# Weights & Biases
# --------------------------------------------------------------------------------------------------------------------
def wandb_mode(cfg: Config) -> str:
    """`online`, `offline` or `disabled`; for `auto`, what WANDB_MODE says, else online if the person is logged in."""
    if cfg.tracking.wandb != "auto":
        return cfg.tracking.wandb
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    import wandb

    try:
        wandb.setup(wandb.Settings(silent=True))
        return "online" if wandb.login(prompt=False, verify=False) else "offline"
    except wandb.Error:  # a key that cannot be one
        return "offline"


def _start_wandb(cfg: Config, folder: Path, experiment: str, commit: str) -> Any:
    """A Weights & Biases run, or None where it is disabled or fails; the slow import waits until it is wanted.

    A server that does not answer costs seconds, never the training: the run is offline then.
    """
    mode = wandb_mode(cfg)
    if mode == "disabled":
        return None
    import wandb

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
                mode=attempt, id=uuid.uuid4().hex[:8], group=f"{cfg.task}-{cfg.profile}", job_type=experiment,
                config={**cfg.to_dict(), "commit": commit}, reinit="create_new", settings=settings,
            )  # fmt: skip
        except Exception as error:  # no network, a wrong key, a full disk: the local history goes on
            warnings.warn(f"Weights & Biases did not start {attempt} ({error}); {folder} has it all.", stacklevel=4)
    return None
