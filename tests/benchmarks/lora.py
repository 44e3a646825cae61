"""Which rank and which layers does LoRA need? The fine-tune of config.yaml from 64 labels, one change at a time.

All runs, written by `--csv notebooks/images/lora.csv`, are shown by the notebook learning_rate. Every adapter has the
same scale, alpha / rank = 2, and the rate of config.yaml. Scores are those of later times of the same Sun; what counts
is the difference to the adapters of config.yaml on the same Sun and seed. Suns 0 to 2 alone: 200 to 202 are for the
report of finetune.py.
"""

import argparse
import tempfile
from itertools import product
from pathlib import Path

import pandas as pd
from finetune import prepare

from helpers.config import load_config, parse_parameters
from helpers.data.dataset import make_loaders
from helpers.data.workers import worker_pool
from helpers.experiment import build_model
from helpers.model.lora import trainable_summary
from helpers.training.loop import fit, predict_splits, seed_everything, standardise_features

CONFIGURED = "rank 8, all layers"
CHANGES = {  # of lora, but for the first
    "no adapters: head alone": {"training.regime": "probe"},
    CONFIGURED: {},
    "rank 1, all layers": {"lora.rank": 1, "lora.alpha": 2},
    "rank 2, all layers": {"lora.rank": 2, "lora.alpha": 4},
    "rank 32, all layers": {"lora.rank": 32, "lora.alpha": 64},
    "rank 8, attention (qkv, proj)": {"lora.targets": ["qkv", "proj"]},
    "rank 8, MLP (fc1, fc2)": {"lora.targets": ["fc1", "fc2"]},
    "rank 8, q and v alone": {"lora.targets": ["qkv"], "lora.qkv": ["q", "v"]},
}


def one_run(job: tuple[int, int, str, dict]) -> dict:
    """One set of adapters on one Sun; the seed draws the 64 samples, layers and their order."""
    sun, seed, name, settings = job
    cfg = load_config(
        profile="tiny",
        task="flare",
        experiment="finetune",
        overrides=settings | CHANGES[name] | {"synthetic.seed": sun, "seed": seed},
    )
    seed_everything(cfg)
    loaders, model = make_loaders(cfg), build_model(cfg)
    standardise_features(model, loaders, cfg)
    history = fit(model, loaders, cfg)
    val, test = (found.metrics(cfg)["rmse"] for found in predict_splits(model, loaders, cfg).values())
    row = {"adapters": name, "sun": sun, "seed": seed, "trained": trainable_summary(model).trainable}
    row |= {"val_rmse": round(val, 5), "rmse": round(test, 5), "kept epoch": history.best_epoch}
    print(row, flush=True)
    return row


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean RMSE, and the mean and deviation over Suns and seeds of the difference to the adapters of config.yaml."""
    scores = rows.pivot(index=["sun", "seed"], columns="adapters", values="rmse")[[*CHANGES]].dropna()
    differences = scores.sub(scores[CONFIGURED], axis="index")
    found = {"rmse": scores.mean(), "against rank 8": differences.mean(), "±": differences.std()}
    return pd.DataFrame(found).assign(trained=rows.groupby("adapters")["trained"].first(), runs=len(scores))


def main() -> None:
    """Print the table of the notebook learning_rate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suns", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--set", nargs="*", default=[], help="key=value of the configuration, for all runs")
    parser.add_argument("--folder", help="where to keep the Suns; a temporary folder if not given")
    parser.add_argument("--csv", type=Path, help="write all runs there, too")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        settings = {"synthetic.folder": f"{asked.folder or temporary}/sun-{{seed}}", "tracking.wandb": "disabled"}
        settings |= {"head.pooling": "forecast", "training.max_train_samples": 64}
        settings |= {"training.epochs": 20, "training.patience": 20} | parse_parameters(asked.set)
        prepare("flare", asked.suns, settings)
        jobs = [(sun, seed, name, settings) for seed, sun, name in product(asked.seeds, asked.suns, CHANGES)]
        with worker_pool(asked.workers) as pool:
            rows = pd.DataFrame(pool.map(one_run, jobs))
    if asked.csv:
        rows.to_csv(asked.csv, index=False)
    print(table(rows).to_string(float_format="{:.3f}".format))


if __name__ == "__main__":
    main()
