"""Train without a notebook, for long runs and for several machines: `python -m helpers.train finetune`.

Under `accelerate launch` each process computes its share of every batch; the first one keeps the record of the run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from torch import nn

from helpers import frames
from helpers.checkpoint import load_filtered
from helpers.comparison import SAMPLES
from helpers.config import Config, ConfigError, load_config
from helpers.dataset import make_loaders
from helpers.devices import make_accelerator
from helpers.encoder import SuryaEncoder
from helpers.heads import linear_baseline, specformer
from helpers.lora import adapt, trainable_summary
from helpers.memory import estimate_memory
from helpers.run_notebook import UsageError, add_choices, parse_parameters
from helpers.shared import find_checkpoint
from helpers.synthetic import ensure_synthetic
from helpers.tracking import start_run
from helpers.training import (
    Diverged,
    Interrupted,
    fit,
    predict,
    seed_everything,
    standardise_features,
)

ROOT = Path(__file__).resolve().parents[1]


def build_model(cfg: Config) -> nn.Module:
    """The model of `cfg.experiment`, before training: that of baseline.ipynb or that of finetune.ipynb."""
    if cfg.experiment == "baseline":
        return linear_baseline(cfg)
    model = specformer(SuryaEncoder(**cfg.encoder_arguments()), cfg)
    channels = cfg.data.channels, cfg.model.checkpoint_channels
    load_filtered(model, find_checkpoint(cfg), *channels, decoder_channels=cfg.head.decoder_channels)
    return adapt(model, cfg)


def train_run(cfg: Config) -> str:
    """What the two notebooks do, without figures: train, judge, and leave a finished run; returns its name.

    In one of several processes the name is empty but in the first of them.
    """
    seed_everything(cfg)
    loaders = make_loaders(cfg)
    model = build_model(cfg)
    standardise_features(model, loaders, cfg)
    with start_run(cfg) if make_accelerator(cfg).is_main_process else nullcontext() as run:
        history = fit(model, loaders, cfg, run=run)
        for split in ("val", "test"):
            found = predict(model, loaders, split, cfg)
            if run is not None:
                found.table().to_csv(run.folder / f"predictions_{split}.csv", index=False)
                run.summary({f"{split}_{name}": value for name, value in found.metrics(cfg).items()})
        if run is None:
            return ""
        memory = estimate_memory(model, next(iter(loaders.val)), cfg)
        trained = trainable_summary(model).trainable
        cost = {"seconds": history.table["seconds"].sum(), "trained parameters": trained, "step MB": memory.total / 1e6}
        run.summary({**cost, SAMPLES: len(loaders.train.dataset)})
        return run.name


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 1 if the training failed, 2 for a bad request, 130 after Ctrl-C."""
    asked = _parser().parse_args(argv)
    try:
        given = {"profile": asked.profile, "task": asked.task, "parameters": parse_parameters(asked.parameters)}
        cfg = load_config(ROOT / "config.yaml", experiment=asked.experiment, **given)
    except (UsageError, ConfigError) as error:
        print(error)
        return 2
    try:
        with make_accelerator(cfg).local_main_process_first():
            ensure_synthetic(cfg)
            frames.prepare_store(cfg)
        name = train_run(cfg)
    except (Diverged, Interrupted, OSError, ValueError) as error:
        print(error)
        return 130 if isinstance(error, Interrupted) else 1
    if name:
        print(f"finished: {cfg.paths.runs}/{name}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m helpers.train", description=__doc__.split("\n")[0])
    parser.add_argument("experiment", choices=("baseline", "finetune"))
    return add_choices(parser)


if __name__ == "__main__":
    sys.exit(main())
