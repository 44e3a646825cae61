"""Does pretraining pay where labels are few? Every way to learn a task of numbers from N labelled images of a Sun.

All have the 82 labels of validation besides, by which the best epoch (of ridge, the penalty) is chosen. Scores are
those of later times of the same Sun. Settings were tuned on Suns 0 to 2; Suns 200 to 202 are for the report alone, and
no other command opens them.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from helpers.channels import CHANNELS, denormalise, load_scalers, stack_scalers
from helpers.config import SPLITS, Config, load_config, parse_parameters
from helpers.data.dataset import Loaders, make_loaders
from helpers.data.frames import prepare_store
from helpers.data.synthetic import ensure_synthetic
from helpers.data.workers import worker_pool
from helpers.experiment import build_model
from helpers.training.loop import fit, predict_splits, seed_everything, standardise_features
from helpers.training.references import reference_predictions
from helpers.training.tasks import Predictions

EPOCHS = {32: 30, 64: 20, 250: 8}
# What differs from the fine-tune of config.yaml, read off a forecast. Of each model four rates a factor of three apart
# were tried with 64 labels of Suns 0 to 2, one seed, and the best on validation was taken; heads learn at 3e-3.
MODELS = {
    "linear baseline": {"experiment": "baseline"},
    "scratch": {"head.pooling": "max", "training.regime": "scratch", "training.lr": 3e-3},
    "scratch, read off a forecast": {"training.regime": "scratch", "training.lr": 1e-3},
    "LoRA on random weights": {"head.pooling": "max", "model.weights": None, "training.lr": 1e-2},
    "LoRA on random weights, read off a forecast": {"model.weights": None, "training.lr": 1e-2},
    "Surya, LoRA, max pooling": {"head.pooling": "max", "training.lr": 1e-2},
    "Surya, head alone": {"training.regime": "probe", "training.lr": 3e-3},
    "Surya, all trained": {"training.regime": "full", "training.lr": 3e-4},
    "Surya, LoRA": {"training.lr": 3e-3},
}
PRETRAINED = [name for name in MODELS if name.startswith("Surya")]


def simple_features(ts: torch.Tensor) -> np.ndarray:
    """156 numbers a sample (B, C, T, H, W): of each channel and frame mean, deviation, largest patch mean and largest
    pixel, and how these have changed from one frame to the next."""
    patches = torch.nn.functional.avg_pool2d(ts.flatten(0, 2)[:, None], 8).reshape(*ts.shape[:3], -1)
    pixels = ts.flatten(3)
    found = torch.stack([pixels.mean(3), pixels.std(3), patches.amax(3), pixels.amax(3)], dim=3)  # (B, C, T, 4)
    return torch.cat([found, found[:, :, 1:] - found[:, :, :1]], dim=2).flatten(1).numpy()


def expert_features(ts: torch.Tensor) -> np.ndarray:
    """What a flare forecaster would measure in the newest magnetogram, as the keywords of SHARP do: 8 numbers a sample.

    Of the horizontal field: the shear where it is strongest (and the stress that this stands for), and the logarithms
    of its strength there, of its sum, of the same two of the part along the inversion line, and of the brightest
    places at 94 and 193 Angstrom.
    """
    scaler = stack_scalers(load_scalers(), CHANNELS)
    images = denormalise(ts[:, :, -1].double(), scaler)  # (B, C, H, W) physical
    image = dict(zip(CHANNELS, images.unbind(1), strict=True))
    smooth = {name: torch.nn.functional.avg_pool2d(image[name][:, None], 3, 1, 1)[:, 0].flatten(1) for name in image}
    bx, by = smooth["hmi_bx"], -smooth["hmi_by"]  # the shear is to the south
    horizontal, along = bx.hypot(by), by.clamp_min(0)  # the inversion lines run from south to north
    there = horizontal.argmax(1, keepdim=True)
    shear = torch.atan2(by.gather(1, there), bx.gather(1, there).abs()) / (torch.pi / 4)  # 1 at 45 degrees
    stress = torch.atanh(((shear - 1) / 0.8).clamp(-0.95, 0.95))
    strong = [part.clamp_min(20) for part in (horizontal, along)]  # G
    sizes = [part.amax(1, keepdim=True).log() for part in (*strong, smooth["aia94"], smooth["aia193"])]
    sums = [(part**2).mean(1, keepdim=True).log() for part in strong]
    return torch.cat([shear, stress, *sizes, *sums], dim=1).numpy()


def ridge(loaders: Loaders, features: Callable[[torch.Tensor], np.ndarray]) -> Predictions:
    """Predictions of the test split, of the penalty that is best on validation."""
    rows = {}
    for name in SPLITS:
        parts = [(features(batch["ts"]), batch["target"][:, 0].numpy()) for batch in getattr(loaders, name)]
        rows[name] = [np.concatenate(column) for column in zip(*parts, strict=True)]
    models = [make_pipeline(StandardScaler(), Ridge(alpha)).fit(*rows["train"]) for alpha in 10.0 ** np.arange(-2, 6)]
    errors = [np.square(model.predict(rows["val"][0]) - rows["val"][1]).mean() for model in models]
    found = models[int(np.argmin(errors))].predict(rows["test"][0]), rows["test"][1]
    return Predictions(*(torch.from_numpy(column).float()[:, None] for column in found), timestamps=[])


def one_run(job: tuple[str, int, int, int, list[str], dict]) -> list[dict]:
    """All models on N samples of one Sun; the seed draws them, layers and their order."""
    task, sun, n, seed, names, overrides = job
    torch.set_num_threads(1)
    rows = []

    def settings(experiment: str = "finetune", **more) -> Config:
        plain = overrides | {"synthetic.seed": sun, "seed": seed, "training.max_train_samples": n}
        return load_config(profile="tiny", task=task, experiment=experiment, overrides=plain | more)

    def note(name: str, **found: float) -> None:
        rows.append({"model": name, "N": n, "sun": sun, "seed": seed, **found})
        print(rows[-1], flush=True)

    cfg = settings()
    loaders = make_loaders(cfg)
    for name, found in reference_predictions(loaders, "test", cfg).items():
        note(name, **found.metrics(cfg))
    if cfg.labels.kind == "scalar":
        note("ridge on simple features", **ridge(loaders, simple_features).metrics(cfg))
        note("ridge on the shear", **ridge(loaders, expert_features).metrics(cfg))
    budget = {"training.epochs": EPOCHS[n], "training.patience": EPOCHS[n], "training.head_lr": 3e-3}
    # where the encoder has a class token, all models pool by it
    own = {"head.pooling": "class_token"} if cfg.model.nglo else {}
    for name in names:
        started, differs = time.perf_counter(), {"head.pooling": "forecast"} | MODELS[name] | own
        cfg = settings(**(differs if "experiment" in differs else budget | differs))
        seed_everything(cfg)
        loaders, model = make_loaders(cfg), build_model(cfg)
        standardise_features(model, loaders, cfg)
        history = fit(model, loaders, cfg)
        found = predict_splits(model, loaders, cfg)["test"].metrics(cfg)
        note(name, **found, **{"kept epoch": history.best_epoch, "seconds": time.perf_counter() - started})
    return rows


def prepare(task: str, suns: list[int], overrides: dict) -> None:
    for sun in suns:
        cfg = load_config(profile="tiny", task=task, overrides=overrides | {"synthetic.seed": sun})
        ensure_synthetic(cfg)
        prepare_store(cfg, progress=False)


def tables(rows: pd.DataFrame) -> Iterator[str]:
    """For each N: mean and deviation over Suns and seeds; of numbers also the ratio to the best without pretraining."""
    for n, found in rows.drop(columns=["sun", "seed"]).groupby("N"):
        groups = found.drop(columns="N").groupby("model", sort=False)
        mean, std = groups.mean(), groups.std()
        text = {key: [f"{m:.3f} ± {s:.3f}" for m, s in zip(mean[key], std[key], strict=True)] for key in mean}
        if "rmse" in mean:
            learned = ("ridge on simple features", *MODELS)
            rivals = [name for name in learned if name in mean.index and name not in PRETRAINED]
            ratios = mean["rmse"] / mean["rmse"][rivals].min()
            text["rmse / best without pretraining"] = [f"{ratio:.2f}" for ratio in ratios]
        yield f"N = {n}, {groups.size().max()} runs\n{pd.DataFrame(text, mean.index).to_string()}"


def draw(rows: pd.DataFrame, path: Path) -> None:
    """Error against number of labels, mean and deviation over Suns and seeds; in colour what was pretrained."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    table = rows.groupby(["model", "N"], sort=False)["rmse"].agg(["mean", "std"])
    names, colours = list(dict.fromkeys(rows["model"])), iter(plt.cm.viridis(np.linspace(0, 0.85, len(PRETRAINED))))
    for number, name in enumerate(names):
        style = {"color": "0.45", "lw": 1, "ls": "--" if name in MODELS else ":", "marker": "sv^<>DPX*"[number % 9]}
        if name in PRETRAINED:
            style = {"color": next(colours), "lw": 2, "marker": "o"}
        mean, std = table.loc[name, "mean"], table.loc[name, "std"]
        axes.errorbar(mean.index * 1.02 ** (number - len(names) / 2), mean, std, capsize=2, label=name, **style)
    axes.set(xscale="log", xlabel="labelled images", ylabel="RMSE")
    axes.set(title="Mean and deviation over synthetic Suns and seeds")
    axes.set_xticks(sorted(set(rows["N"])), sorted(set(rows["N"])))
    axes.minorticks_off()
    figure.legend(loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Print the tables of the README, and draw its picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="flare", help="of numbers or events")
    parser.add_argument("--suns", type=int, nargs="+", default=[200, 201, 202])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, nargs="+", default=list(EPOCHS), choices=list(EPOCHS))
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    parser.add_argument("--set", nargs="*", default=[], help="key=value of the configuration, for all models")
    parser.add_argument("--folder", help="where to keep the Suns; a temporary folder if not given")
    parser.add_argument("--csv", type=Path, help="write all runs there, too")
    parser.add_argument("--picture", type=Path, help="draw the errors against the number of labels there")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        overrides = {"synthetic.folder": f"{asked.folder or temporary}/sun-{{seed}}", "tracking.wandb": "disabled"}
        overrides |= parse_parameters(asked.set)
        prepare(asked.task, asked.suns, overrides)
        each = product(asked.samples, asked.suns, asked.seeds)
        jobs = [(asked.task, sun, n, seed, asked.models, overrides) for n, sun, seed in each]
        with worker_pool(2) as pool:
            rows = pd.DataFrame([row for part in pool.map(one_run, jobs) for row in part])
    if asked.csv:
        rows.to_csv(asked.csv, index=False)
    if asked.picture:
        draw(rows, asked.picture)
    print(*tables(rows), sep="\n\n")


if __name__ == "__main__":
    main()
