"""Using what was trained: `predict` against a plain loop over the model, a probe on embeddings against an epoch."""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

import numpy as np
import torch
import xarray as xr
from sklearn.linear_model import RidgeCV

from helpers.config import load_config
from helpers.data.dataset import SolarDataset, in_batches, make_loaders
from helpers.data.frames import open_store, prepare_store, store_path
from helpers.data.synthetic import ensure_synthetic
from helpers.experiment import build_model
from helpers.training.loop import fit, seed_everything, standardise_features
from helpers.use import Trained, embed, predict_times


def seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), asked.repeats)


def measure(folder: Path, repeats: int) -> None:
    """On the tiny profile, whose model is the quickest: what surrounds it weighs most here."""
    settings = {"training.device": "cpu", "training.regime": "probe", "training.epochs": 1, "head.pooling": "mean"}
    cfg = load_config(overrides=settings, profile="tiny", task="flare_now", experiment="finetune")
    ensure_synthetic(cfg)
    prepare_store(cfg)
    seed_everything(cfg)
    loaders, model = make_loaders(cfg), build_model(cfg)
    standardise_features(model, loaders, cfg)
    trained = Trained(model.eval(), cfg, lambda output: output, {}, count=1)
    times, batches = loaders.train.dataset.samples["time"], list(loaders.train)

    @torch.no_grad()
    def loop(batches: Iterable[dict]) -> None:
        for batch in batches:
            model(batch)

    def plain_loop() -> None:
        """As one would write it: open the store, read, compute, keep nothing."""
        store = open_store(store_path(cfg), cfg.data.channels, cfg.data.reduce, cfg.data.native_size, cfg.scalers)
        samples = SolarDataset(store, None, loaders.train.dataset.samples, cfg.data.offsets_minutes)
        loop(in_batches(samples, cfg, workers=0))

    features = folder / "embeddings.zarr"
    print(f"embeddings of {sum(loaders.sizes.values())} samples, once: ", end="")
    print(f"{seconds_of(lambda: embed(model, loaders, cfg).to_zarr(features, zarr_format=2)):.2f} s")

    def probe() -> None:
        with xr.open_zarr(features, chunks=None) as table:
            parts = {name: part for name, part in table.groupby("split")}
            ridge = RidgeCV(np.logspace(-2, 5, 15)).fit(parts["train"]["features"], parts["train"]["target"][:, 0])
            ridge.score(parts["test"]["features"], parts["test"]["target"][:, 0])

    def epoch() -> float:
        """One pass over the training split with its validation, as `fit` has measured it."""
        return fit(model, loaders, cfg).table["seconds"].loc[1]

    took = {"model": [], "plain loop": [], "predict": [], "probe on embeddings": [], "epoch of probe": []}
    for number in range(repeats + 1):  # the first one warms up
        calls = [seconds_of(lambda: loop(batches)), seconds_of(plain_loop)]
        calls.append(seconds_of(lambda n=number: predict_times(trained, times, folder / f"{n}.csv", progress=False)))
        calls += [seconds_of(probe), epoch()]
        for rows, seconds in zip(took.values(), calls, strict=True):
            rows += [seconds] * (number > 0)
    alone, plain, predict, ridge, trained_epoch = (median(rows) for rows in took.values())
    frames = len(times) * len(cfg.data.offsets_minutes)
    print(f"the model alone, frames in memory   {frames / alone:8.0f} frames/s")
    print(f"plain loop, frames from the store   {frames / plain:8.0f} frames/s")
    print(f"predict, written to a file          {frames / predict:8.0f} frames/s, {predict / plain:.2f} times as long")
    print(f"epoch of regime probe               {trained_epoch:8.2f} s for {len(times)} samples")
    print(f"probe on stored embeddings          {ridge:8.3f} s, {trained_epoch / ridge:.0f} times faster (20 asked)")


if __name__ == "__main__":
    main()
