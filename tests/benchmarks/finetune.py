"""Does the LoRA fine-tune beat the baseline and random weights? Mean over synthetic Suns, the same data for all."""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace

import pandas as pd
from torch.utils.data import DataLoader

from helpers.config import SPLITS, Config, load_config
from helpers.data import frames
from helpers.data.dataset import make_loaders
from helpers.data.synthetic import ensure_synthetic
from helpers.experiment import build_model
from helpers.training.loop import fit, predict_splits, seed_everything, standardise_features
from helpers.training.references import reference_predictions

MODELS = {  # name: experiment, and what differs from the config
    "linear baseline": ("baseline", {}),
    "random weights, LoRA": ("finetune", {"model.weights": None}),
    "random weights, all trained": ("finetune", {"training.regime": "scratch"}),
    "Surya, head only": ("finetune", {"training.regime": "probe"}),
    "Surya, all trained": ("finetune", {"training.regime": "full"}),
    "Surya, LoRA": ("finetune", {}),
}


def held_out(cfg: Config, task: str, overrides: dict) -> DataLoader:
    """The test split of another Sun, of which training and pretraining saw nothing."""
    days = cfg.synthetic.visits * cfg.synthetic.hours_between_visits // 24 // 3
    start = pd.Timestamp(cfg.synthetic.start)
    edges = [str((start + pd.Timedelta(days=day)).date()) for day in (0, 10, 14, 24, 28, days)]
    split = {f"split.{name}": edges[2 * i : 2 * i + 2] for i, name in enumerate(SPLITS) if cfg.split.periods(name)}
    seed = {"synthetic.seed": 100 + cfg.synthetic.seed, "synthetic.visits": cfg.synthetic.visits // 3}
    other = load_config(profile="tiny", task=task, overrides=overrides | split | seed)
    ensure_synthetic(other)
    frames.prepare_store(other, progress=False)
    return make_loaders(other).test


def one_sun(sun: int, seed: int, task: str, overrides: dict, names: list[str]) -> list[dict]:
    """Train each model on the Sun `sun` and judge it on another; the seed draws layers and sample order."""
    overrides = overrides | {"synthetic.seed": sun, "seed": seed}
    cfg = load_config(profile="tiny", task=task, experiment="finetune", overrides=overrides)
    ensure_synthetic(cfg)
    frames.prepare_store(cfg, progress=False)
    unseen = held_out(cfg, task, overrides)
    floors = reference_predictions(replace(make_loaders(cfg), test=unseen), "test", cfg)
    rows = [{"model": name, **floor.metrics(cfg)} for name, floor in floors.items()]
    for name in names:
        experiment, differs = MODELS[name]
        cfg = load_config(profile="tiny", task=task, experiment=experiment, overrides=overrides | differs)
        seed_everything(cfg)
        loaders, started = make_loaders(cfg), time.perf_counter()
        model = build_model(cfg)
        standardise_features(model, loaders, cfg)
        history = fit(model, loaders, cfg)
        key = "r2" if "r2" in cfg.target.metrics else cfg.target.metrics[0]
        rows.append({"model": name, **predict_splits(model, replace(loaders, test=unseen), cfg)["test"].metrics(cfg)})
        rows[-1][f"later on the same Sun: {key}"] = predict_splits(model, loaders, cfg)["test"].metrics(cfg)[key]
        rows[-1] |= {"kept epoch": history.best_epoch, "seconds": time.perf_counter() - started}
        print(f"{task}, sun {sun}, seed {seed}: {rows[-1]}", flush=True)
    return rows


def main() -> None:
    """Print the tables of the README."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=["flare", "active_region", "translation"])
    parser.add_argument("--suns", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seeds", type=int, nargs="+", help="of each Sun; one, its number, if not given")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--folder", help="where to keep the Suns; a temporary folder if not given")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        overrides = {"synthetic.folder": f"{asked.folder or temporary}/sun-{{seed}}", "tracking.wandb": "disabled"}
        overrides |= {f"training.max_{name}_samples": None for name in SPLITS}
        for task in asked.tasks:
            rows = []
            for sun in asked.suns:
                for seed in asked.seeds or [sun]:
                    rows += one_sun(sun, seed, task, overrides, asked.models)
            groups = pd.DataFrame(rows).groupby("model", sort=False)
            mean, std = groups.mean(), groups.std()
            table = {key: [f"{m:.2f} ± {s:.2f}" for m, s in zip(mean[key], std[key], strict=True)] for key in mean}
            print(f"\n{task}, {len(asked.suns)} Suns\n{pd.DataFrame(table, mean.index).to_string()}\n", flush=True)


if __name__ == "__main__":
    main()
