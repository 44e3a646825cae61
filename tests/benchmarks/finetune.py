"""Does the LoRA fine-tune beat the baseline and random weights? Mean over synthetic Suns, the same data for all."""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace

import pandas as pd
from torch import nn

from helpers import frames
from helpers.channels import load_scalers
from helpers.checkpoint import load_filtered
from helpers.config import Config, load_config
from helpers.dataset import Loaders, make_loaders
from helpers.encoder import SuryaEncoder
from helpers.heads import LinearBaseline1D, Specformer1D
from helpers.lora import apply_lora
from helpers.shared import find_checkpoint
from helpers.synthetic import ensure_synthetic
from helpers.training import fit, mean_prediction, predict, seed_everything, standardise_features


def baseline(cfg: Config, loaders: Loaders) -> nn.Module:
    """The linear map of the channel means, as in baseline.ipynb."""
    per_channel = [load_scalers(cfg.root / cfg.data.scalers)[name] for name in cfg.data.channels]
    mean, std = [s.mean for s in per_channel], [s.std + s.epsilon for s in per_channel]
    return LinearBaseline1D(len(cfg.data.channels), 1, cfg.model.time_dim, mean, std)


def specformer(cfg: Config, loaders: Loaders, pretrained: bool, lora: bool) -> nn.Module:
    """Surya with a pooling head, as in finetune.ipynb; without `lora` all weights train."""
    model = Specformer1D(
        SuryaEncoder(**cfg.encoder_arguments()), 1, cfg.head.pooling, cfg.head.penultimate, cfg.head.dropout
    )
    if pretrained:
        load_filtered(model, find_checkpoint(cfg), cfg.data.channels, cfg.model.checkpoint_channels)
    if lora:
        apply_lora(model, **cfg.lora.model_dump())
    return model


MODELS = {
    "linear baseline": ("baseline", baseline),
    "random weights, LoRA": ("finetune", lambda cfg, loaders: specformer(cfg, loaders, False, True)),
    "random weights, all trained": ("finetune", lambda cfg, loaders: specformer(cfg, loaders, False, False)),
    "Surya, head only": ("finetune", lambda cfg, loaders: frozen(specformer(cfg, loaders, True, False))),
    "Surya, LoRA": ("finetune", lambda cfg, loaders: specformer(cfg, loaders, True, True)),
}


def frozen(model: Specformer1D) -> Specformer1D:
    """The same model with nothing but the head left to train."""
    model.encoder.requires_grad_(False)
    return model


def held_out(cfg: Config, overrides: dict, loaders: Loaders) -> Loaders:
    """Another Sun, of which training and pretraining saw nothing, as the test split; targets scaled as in training."""
    days = cfg.synthetic.visits * cfg.synthetic.hours_between_visits // 24 // 3
    start = pd.Timestamp(cfg.synthetic.start)
    edges = [str((start + pd.Timedelta(days=day)).date()) for day in (0, 10, 14, 24, 28, days)]
    split = {f"split.{name}": edges[2 * i : 2 * i + 2] for i, name in enumerate(("train", "val", "test"))}
    seed = {"synthetic.seed": 100 + cfg.synthetic.seed, "synthetic.visits": cfg.synthetic.visits // 3}
    other = load_config(profile="tiny", overrides=overrides | split | seed)
    ensure_synthetic(other)
    frames.prepare_store(other)
    return replace(make_loaders(other), target_mean=loaders.target_mean, target_std=loaders.target_std)


def one_sun(seed: int, overrides: dict, names: list[str]) -> list[dict]:
    """Train each model on the Sun of this seed and judge it on another; the seed also draws layers and sample order."""
    overrides = overrides | {"synthetic.seed": seed, "seed": seed}
    cfg = load_config(profile="tiny", experiment="finetune", overrides=overrides)
    ensure_synthetic(cfg)
    frames.prepare_store(cfg)
    unseen = held_out(cfg, overrides, make_loaders(cfg))
    rows = [{"model": "mean of training", **mean_prediction(unseen, "test").metrics(cfg)}]
    for name in names:
        experiment, build = MODELS[name]
        cfg = load_config(profile="tiny", experiment=experiment, overrides=overrides)
        seed_everything(cfg)
        loaders, started = make_loaders(cfg), time.perf_counter()
        model = build(cfg, loaders)
        standardise_features(model, loaders, cfg)
        history = fit(model, loaders, cfg)
        rows.append({"model": name, **predict(model, unseen, "test", cfg).metrics(cfg)})
        rows[-1]["later on the same Sun: r2"] = predict(model, loaders, "test", cfg).metrics(cfg)["r2"]
        rows[-1] |= {"kept epoch": history.best_epoch, "seconds": time.perf_counter() - started}
        print(f"sun {seed}: {rows[-1]}", flush=True)
    return rows


def main() -> None:
    """Print the table of the README."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suns", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--folder", help="where to keep the Suns; a temporary folder if not given")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        overrides = {"synthetic.folder": f"{asked.folder or temporary}/sun-{{seed}}", "tracking.wandb": "disabled"}
        rows = [row for seed in asked.suns for row in one_sun(seed, overrides, asked.models)]
    groups = pd.DataFrame(rows).groupby("model", sort=False)
    mean, std = groups.mean(), groups.std()
    table = {key: [f"{m:.2f} ± {s:.2f}" for m, s in zip(mean[key], std[key], strict=True)] for key in mean}
    print(pd.DataFrame(table, mean.index).to_string())


if __name__ == "__main__":
    main()
