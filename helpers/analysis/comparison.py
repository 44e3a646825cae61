"""Baseline against fine-tune, from the runs on disk: spread over seeds, paired differences, samples, cost."""

import json
import math
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from helpers.config import Config, settings_that_matter
from helpers.data.dataset import fingerprint, make_datasets
from helpers.data.frames import open_store, store_path
from helpers.data.labels import labels_of, plan_samples, sample_window
from helpers.training.tasks import TASKS, ImagePredictions, Predictions, metrics_of
from helpers.training.tracking import list_runs

SAMPLES = "training samples"
DATA = ("data.", "labels.", "target.", "split.", "synthetic.")
BUDGET = ("seed", "epochs", "lr", "max_train_samples")  # what a run was given


def plan(cfg: Config) -> list[tuple[str, dict[str, Any]]]:
    """The runs that the section `compare` asks for: experiment and what to override in its configuration."""
    each = product(("baseline", "finetune"), cfg.compare.train_samples, cfg.compare.seeds)
    return [(experiment, {"seed": seed, "training.max_train_samples": samples}) for experiment, samples, seed in each]


def find_run(cfg: Config) -> str | None:
    """The newest finished run of exactly these settings that says what it cost (those of `train_run` do), or None."""
    runs = list_runs(cfg.runs_folder, experiment=cfg.experiment, task=cfg.task, profile=cfg.profile)
    wanted = settings_that_matter(cfg, "resume")
    for run in reversed(on_the_same_data(runs, cfg).to_dict("records")):
        if settings_that_matter(run["settings"], "resume") == wanted and run.get(SAMPLES, 0) > 0:
            return run["name"]
    return None


def compare_runs(cfg: Config) -> tuple[pd.DataFrame, dict[str, Predictions | ImagePredictions]]:
    """Budget and test metrics (a column each) and predictions of the latest finished run of each experiment on the data
    of `cfg`; says in what the budgets differ. Runs that were tested on other samples than the latest one, although
    their settings are equal, are named and left out.
    """
    runs = on_the_same_data(list_runs(cfg.runs_folder, task=cfg.task, profile=cfg.profile), cfg)
    columns, found = {}, {}
    for run in reversed(runs.groupby("experiment").tail(1).to_dict("records")):
        if not (run["folder"] / "predictions_test.csv").exists():
            continue
        predictions = saved_predictions(run["folder"], cfg)
        if all(predictions.same_samples(newest) for newest in found.values()):
            found[run["experiment"]] = predictions
            given = {"seed": run["seed"], **run["settings"]["training"]}
            scores = {key: round(value, 3) for key, value in run.items() if key.startswith("test_")}
            budget = {key: math.inf if given[key] is None else given[key] for key in BUDGET}
            columns[f"{run['experiment']} ({run['name']})"] = budget | scores
        else:
            print(f"Not compared: {run['name']}, tested on other frames or labels than the latest run. Run it again.")
    table = pd.DataFrame(columns).sort_index(axis="columns").astype(float)
    if differ := [key for key in table.index if key in BUDGET and table.loc[key].nunique() > 1]:
        print(f"These runs differ in {', '.join(differ)}, see the first rows. Of these, only epochs and lr may differ.")
    return table, dict(sorted(found.items()))


def who_is_better(scores: pd.DataFrame, cfg: Config) -> str:
    """A sentence on a table of test metrics (of `compare_runs`): which run is better, by all or by some metrics."""
    best: dict[str, list[str]] = {}
    for name, metric in metrics_of(cfg).items():
        row = scores.reindex([f"test_{name}"]).iloc[0].dropna()
        if row.nunique() > 1:
            best.setdefault((row if metric.higher_is_better else -row).idxmax(), []).append(name)
    if len(scores.columns) < 2:
        return "There is nothing to compare with yet."
    if not best:
        return "No metric tells these runs apart."
    if len(best) == 1:
        run, names = best.popitem()
        return f"{run} is better, by every metric that tells them apart: {', '.join(names)}."
    split = "; ".join(f"by {', '.join(names)} it is {run}" for run, names in best.items())
    return f"The metrics DISAGREE on which run is better: {split}. Decide beforehand which of them counts for you."


def on_the_same_data(runs: pd.DataFrame, cfg: Config) -> pd.DataFrame:
    """The runs (of `list_runs`) whose data, labels, target and splits are those of `cfg`.

    A run whose labels or frames have changed since is left out and named.
    """

    @cache
    def now(seed: int, samples: int | None) -> str:
        training = cfg.training.model_copy(update={"max_train_samples": samples})
        changed = cfg.model_copy(update={"seed": seed, "training": training})
        plan = plan_samples(changed, lambda times: np.isin(times, store.times), labels)
        return fingerprint(make_datasets(plan, store, cfg).values())

    def data(settings: Config | dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in settings_that_matter(settings, "compare").items() if key.startswith(DATA)}

    kept, wanted = [], data(cfg)
    store = labels = None
    for row, run in runs.iterrows():
        if data(run["settings"]) != wanted:
            continue
        if run["data_fingerprint"] is not None:
            if labels is None:
                store, labels = open_store(store_path(cfg)), labels_of(cfg)
            if now(run["seed"], run["settings"]["training"]["max_train_samples"]) != run["data_fingerprint"]:
                print(f"Not compared: {run['name']}, whose labels or frames were others than now. Train it again.")
                continue
        kept.append(row)
    return runs.loc[kept]


def saved_predictions(folder: str | Path, cfg: Config, split: str = "test") -> Predictions | ImagePredictions:
    """What a run said of a split."""
    found = TASKS[cfg.labels.kind].predictions.from_table(pd.read_csv(Path(folder) / f"predictions_{split}.csv"))
    found.threshold = json.loads((Path(folder) / "summary.json").read_text())["metrics"].get("threshold")
    return found


@dataclass(frozen=True)
class Difference:
    """By how much a model is better (positive) or worse than its rival, on the same test samples."""

    sides: tuple[str, str]  # the rival, the model
    metric: str
    value: float  # mean over seeds
    low: float  # 95% bootstrap interval over blocks of time
    high: float
    blocks: int  # how many there are
    spread: float  # standard deviation of the difference over seeds
    lost: float = 0.0  # share of the draws in which the metric is not a number, because they hold no event, say
    days: float = 1.0  # length of a block

    def __str__(self) -> str:
        blocks = f"{self.blocks} test days" if self.days == 1 else f"{self.blocks} blocks of {self.days:.2g} test days"
        lost = f"; {self.lost:.0%} of the draws held no event, and were left out" if self.lost else ""
        seeds = "one seed each" if math.isnan(self.spread) else f"{self.spread:.3f} between seeds"
        measured = (
            f"{self.metric}: {abs(self.value):.3f} (95% interval of the gain {self.low:+.3f} to {self.high:+.3f} over "
            f"{blocks}; {seeds}{lost})"
        )
        if math.isnan(self.value):
            return f"{self.metric} cannot be measured on this test split: it is not a number for one of the models."
        if self.blocks < 2 or self.lost > 0.5:
            why = f"{self.metric} is not a number in {self.lost:.0%} of the draws from {blocks}"
            return f"The difference CANNOT BE TOLD FROM NOISE: {why}. Test on a longer split.test, with more events."
        if self.low <= 0 <= self.high or abs(self.value) <= self.spread:
            return f"The difference is WITHIN NOISE. {measured}."
        return f"{self.sides[1]} is {'better' if self.value > 0 else 'WORSE'} than {self.sides[0]}. {measured}."


def paired_difference(
    runs: pd.DataFrame, cfg: Config, key: str | None = None, sides: tuple[str, str] = ("baseline", "finetune")
) -> Difference:
    """The second of `sides` against the first on the same test samples, seed by seed, with a bootstrap interval.

    Frames of one day are alike, and so are labels that look ahead over the same hours: blocks of `compare.block_days`
    are drawn with replacement (block bootstrap, Kuensch 1989), the same ones for both models. `runs` differ in seed and
    `experiment`, which names the side, alone (else a ValueError); of `key`, None is `target.metrics[0]`.
    """
    key = key or cfg.target.metrics[0]
    sign = 1 if metrics_of(cfg)[key].higher_is_better else -1
    pairs = []
    for _, group in runs.groupby("seed"):
        folders = dict(zip(group["experiment"], group["folder"], strict=True))
        if set(sides) <= set(folders):
            pairs.append([saved_predictions(folders[side], cfg) for side in sides])
    if not pairs:
        raise ValueError(f"No seed has a finished run of both {' and '.join(sides)} with these settings.")
    if not all(p.same_samples(pairs[0][0]) for pair in pairs for p in pair):
        raise ValueError("The runs were tested on different samples; delete the old ones, or train them again.")
    times = pd.to_datetime(pd.Series(pairs[0][0].timestamps))
    ahead = sample_window(cfg)[1]  # a label of 24 hours looks ahead so far
    length = pd.Timedelta(cfg.compare.block_days, "D") if cfg.compare.block_days else max(pd.Timedelta("1D"), ahead)
    blocks = (times - times.min().normalize()) // length
    rows = list(blocks.groupby(blocks).indices.values())

    def gains(chosen: np.ndarray) -> list[float]:
        scores = ([p.score(key, chosen, cfg) for p in pair] for pair in pairs)
        return [sign * (model - rival) for rival, model in scores]

    rng = np.random.default_rng(cfg.seed)
    drawn = (rng.integers(len(rows), size=len(rows)) for _ in range(cfg.compare.draws))
    draws = [np.mean(gains(np.concatenate([rows[block] for block in chosen]))) for chosen in drawn]
    lost = float(np.isnan(draws).mean())
    low, high = np.nanquantile(draws, [0.025, 0.975]) if lost < 1 else (math.nan, math.nan)
    each = gains(np.arange(len(times)))
    spread = float(np.std(each, ddof=1)) if len(each) > 1 else float("nan")
    days = length / pd.Timedelta("1D")
    return Difference(sides, key, float(np.mean(each)), float(low), float(high), len(rows), spread, lost, days)
