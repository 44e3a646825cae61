"""Does the LoRA fine-tune beat the baseline and random weights? Mean over synthetic Suns, the same data for all."""

from __future__ import annotations

import argparse
import tempfile
import time

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
from helpers.training import fit, mean_prediction, predict, seed_everything


def baseline(cfg: Config, loaders: Loaders) -> nn.Module:
    """The linear map of the channel means, as in baseline.ipynb."""
    per_channel = [load_scalers(cfg.root / cfg.data.scalers)[name] for name in cfg.data.channels]
    mean, std = [s.mean for s in per_channel], [s.std + s.epsilon for s in per_channel]
    return LinearBaseline1D(len(cfg.data.channels), 1, cfg.model.time_dim, mean, std).fit_features(loaders.train)


def specformer(cfg: Config, loaders: Loaders, pretrained: bool, lora: bool) -> nn.Module:
    """Surya with a pooling head, as in finetune.ipynb; without `lora` all weights train."""
    model = Specformer1D(SuryaEncoder(**cfg.encoder_arguments()), 1, cfg.head.pooling)
    if pretrained:
        load_filtered(model, find_checkpoint(cfg), cfg.data.channels, cfg.model.checkpoint_channels)
    if lora:
        arguments = cfg.lora.model_dump()
        apply_lora(model, **arguments)
    return model.fit_features(loaders.train)


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


def one_sun(seed: int, overrides: dict, names: list[str]) -> list[dict]:
    """Train and judge each model on the Sun of this seed; the seed also draws new layers and the order of samples."""
    overrides = overrides | {"synthetic.seed": seed, "seed": seed}
    cfg = load_config(profile="tiny", experiment="finetune", overrides=overrides)
    ensure_synthetic(cfg)
    frames.prepare_store(cfg)
    rows = [{"model": "mean of training", **mean_prediction(make_loaders(cfg), "test").metrics(cfg)}]
    for name in names:
        experiment, build = MODELS[name]
        cfg = load_config(profile="tiny", experiment=experiment, overrides=overrides)
        seed_everything(cfg)
        loaders, started = make_loaders(cfg), time.perf_counter()
        model = build(cfg, loaders)
        history = fit(model, loaders, cfg)
        rows.append({"model": name, **predict(model, loaders, "test", cfg).metrics(cfg)})
        rows[-1] |= {"kept epoch": history.best_epoch, "seconds": time.perf_counter() - started}
        print(f"sun {seed}: {rows[-1]}", flush=True)
    return [{"sun": seed, **row} for row in rows]


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
    table = pd.DataFrame(rows).drop(columns="sun").groupby("model", sort=False).agg(["mean", "std"])
    print(table.round(3).to_string())


if __name__ == "__main__":
    main()
