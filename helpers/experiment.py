"""What the two main notebooks do, as functions: build a model, train it, judge it, leave a finished run."""

from contextlib import nullcontext

from torch import nn

from helpers.analysis.comparison import SAMPLES
from helpers.config import Config
from helpers.data.dataset import make_loaders
from helpers.model.checkpoint import load_filtered
from helpers.model.encoder import SuryaEncoder
from helpers.model.heads import linear_baseline, specformer
from helpers.model.lora import adapt, trainable_summary
from helpers.shared import find_weights
from helpers.training.devices import make_accelerator
from helpers.training.loop import fit, predict_splits, seed_everything, standardise_features
from helpers.training.memory import estimate_memory, recompute_if_needed
from helpers.training.tracking import start_run


def build_model(cfg: Config, outputs: int | None = None) -> nn.Module:
    """The model of `cfg.experiment`, before training: that of baseline.ipynb or that of finetune.ipynb.

    `outputs` is how many numbers it predicts; None counts them in the configuration, or in the label file.
    """
    if cfg.experiment == "baseline":
        return linear_baseline(cfg, outputs)
    model = specformer(SuryaEncoder(**cfg.encoder_arguments()), cfg, outputs)
    weights = find_weights(cfg.initial_weights, cfg.shared, cfg.paths.reserve_gb)
    channels, released = (cfg.data.channels, cfg.model.weights_channels), cfg.training.initial_run == "released"
    load_filtered(model, weights, *channels, decoder_channels=cfg.head.decoder_channels, released=released)
    return adapt(model, cfg)


def train_run(cfg: Config) -> str:
    """What the two notebooks do, without figures: train, judge, and leave a finished run; returns its name.

    In one of several processes the name is empty but in the first of them.
    """
    seed_everything(cfg)
    loaders, model = make_loaders(cfg), build_model(cfg)
    make_accelerator(cfg).print(loaders.report)
    standardise_features(model, loaders, cfg)
    recompute_if_needed(model, next(iter(loaders.val)), cfg)
    with start_run(cfg) if make_accelerator(cfg).is_main_process else nullcontext() as run:
        history = fit(model, loaders, cfg, run=run)
        found = predict_splits(model, loaders, cfg)
        if run is None:
            return ""
        for split, p in found.items():
            p.table().to_csv(run.folder / f"predictions_{split}.csv", index=False)
            run.summary({f"{split}_{name}": value for name, value in p.metrics(cfg).items()})
        run.summary({"threshold": found["val"].threshold})
        memory = estimate_memory(model, next(iter(loaders.val)), cfg)
        trained = trainable_summary(model).trainable
        cost = {"seconds": history.table["seconds"].sum(), "trained parameters": trained, "step MB": memory.total / 1e6}
        run.summary({**cost, SAMPLES: len(loaders.train.dataset)})
        return run.name
