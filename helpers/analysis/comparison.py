"""Baseline against fine-tune, from the runs on disk: spread over seeds, paired differences, samples, cost.

Only runs that differ in nothing but experiment, seed and number of training samples are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from helpers.config import Config, settings_that_matter
from helpers.training.tasks import TASKS, ImagePredictions, Predictions, metrics_of
from helpers.training.tracking import list_runs

SAMPLES = "training samples"


def plan(cfg: Config) -> list[tuple[str, dict[str, Any]]]:
    """The runs that the section `compare` asks for: experiment and what to override in its configuration."""
    runs = []
    for experiment, samples, seed in product(("baseline", "finetune"), cfg.compare.train_samples, cfg.compare.seeds):
        changes = {"seed": seed, "training.max_train_samples": samples}
        if epochs := getattr(cfg.compare.epochs, experiment):
            changes["training.epochs"] = epochs
        runs.append((experiment, changes))
    return runs


def comparable_runs(configs: Mapping[str, Config]) -> pd.DataFrame:
    """The finished runs with the settings of `configs` (one for each experiment), oldest first; the newest of a seed.

    Returns:
        `list_runs` with the columns `seed` and `max_train_samples`.
    """
    cfg, rows = next(iter(configs.values())), []
    wanted = {name: settings_that_matter(c, "compare") for name, c in configs.items()}
    table = list_runs(cfg.runs_folder, task=cfg.task, profile=cfg.profile)
    trained = table[table[SAMPLES].notna()] if SAMPLES in table else table[:0]  # runs of the notebooks lack the costs
    for row in trained.to_dict("records"):
        there = yaml.safe_load((Path(row["folder"]) / "config.yaml").read_text(encoding="utf-8"))
        if settings_that_matter(there, "compare") == wanted.get(row["experiment"]):
            rows.append({**row, "seed": there["seed"], "max_train_samples": there["training"]["max_train_samples"]})
    columns = [*table.columns, "seed", "max_train_samples"]
    return pd.DataFrame(rows, columns=columns).drop_duplicates(["experiment", "seed", "max_train_samples"], keep="last")


def contains(runs: pd.DataFrame, cfg: Config) -> bool:
    """Whether a run with the seed and number of training samples of `cfg` is among them."""
    wanted = (cfg.seed, cfg.training.max_train_samples)
    there = zip(runs["seed"], runs["max_train_samples"], strict=True)
    return wanted in {(seed, None if pd.isna(samples) else int(samples)) for seed, samples in there}


def summary_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean ± standard deviation over seeds of test metrics and cost; a row an experiment and number of samples."""
    columns = [c for c in runs if c.startswith("test_")] + ["seconds", "trained parameters", "step MB"]
    groups = runs.groupby(["experiment", SAMPLES])
    mean, std = groups[columns].mean(), groups[columns].std()
    shown = {c: [f"{m:,.3g} ± {s:.2g}" for m, s in zip(mean[c], std[c], strict=True)] for c in columns}
    shown["trained parameters"] = [f"{m:,.0f}" for m in mean["trained parameters"]]
    return pd.DataFrame({"seeds": groups.size(), **shown}, index=mean.index)


@dataclass(frozen=True)
class Difference:
    """By how much the fine-tune is better (positive) or worse than the baseline, on the same test samples.

    Attributes:
        metric: the first of `target.metrics`.
        value: mean over seeds.
        low, high: 95% bootstrap interval over blocks of test days.
        blocks: number of days.
        spread: standard deviation of the difference over seeds.
    """

    metric: str
    value: float
    low: float
    high: float
    blocks: int
    spread: float

    @property
    def within_noise(self) -> bool:
        return self.low <= 0 <= self.high or abs(self.value) <= self.spread

    def __str__(self) -> str:
        measured = (
            f"{self.metric}: {abs(self.value):.3f} (95% interval of the gain {self.low:+.3f} to {self.high:+.3f} over "
            f"{self.blocks} test days; {self.spread:.3f} between seeds)"
        )
        if self.within_noise:
            return f"The difference is WITHIN NOISE. {measured}."
        return f"The fine-tune is {'better' if self.value > 0 else 'WORSE'} than the baseline. {measured}."


def paired_difference(runs: pd.DataFrame, cfg: Config) -> Difference:
    """Fine-tune against baseline on the same test samples, seed by seed, with a bootstrap interval.

    Frames of one day are alike, so whole days are drawn with replacement (block bootstrap, Kuensch 1989), the same days
    for both models.

    Args:
        runs: of `comparable_runs`, with one number of training samples.
        cfg: `target.metrics[0]` is compared; `compare.draws` is the number of draws.

    Raises:
        ValueError: no seed has been run in both experiments, or the test samples differ.
    """
    key = cfg.target.metrics[0]
    sign = 1 if metrics_of(cfg)[key].higher_is_better else -1
    pairs = []
    for _, group in runs.groupby("seed"):
        found = {row["experiment"]: _test_predictions(row["folder"], cfg) for row in group.to_dict("records")}
        if {"baseline", "finetune"} <= set(found):
            pairs.append((found["baseline"], found["finetune"]))
    if not pairs:
        raise ValueError("No seed has a finished run of both baseline and finetune with these settings.")
    if not all(p.same_samples(pairs[0][0]) for pair in pairs for p in pair):
        raise ValueError("The runs were tested on different samples; delete the old ones, or train them again.")
    days = pd.Series(pairs[0][0].timestamps).str[:10].to_numpy()
    rows = [np.flatnonzero(days == day) for day in dict.fromkeys(days)]

    def gains(chosen: np.ndarray) -> list[float]:
        return [sign * (b.score(key, chosen, cfg) - a.score(key, chosen, cfg)) for a, b in pairs]

    rng = np.random.default_rng(cfg.seed)
    draws = []
    for _ in range(cfg.compare.draws):
        chosen = np.concatenate([rows[i] for i in rng.integers(len(rows), size=len(rows))])
        draws.append(np.mean(gains(chosen)))
    each = gains(np.arange(len(days)))
    low, high = np.nanquantile(draws, [0.025, 0.975])
    spread = float(np.std(each, ddof=1)) if len(each) > 1 else float("nan")
    return Difference(key, float(np.mean(each)), float(low), float(high), len(rows), spread)


def _test_predictions(folder: str | Path, cfg: Config) -> Predictions | ImagePredictions:
    return TASKS[cfg.labels.kind].predictions.from_table(pd.read_csv(Path(folder) / "predictions_test.csv"))
