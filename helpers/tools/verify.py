"""Does Surya forecast here as well as where it was released? NASA's own acceptance test, through the course's own path,
from archive and normalisation to the model: `make verify`.
"""

import argparse
import json
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, mse_loss
from tqdm.auto import tqdm

from helpers.channels import denormalise, normalise, stack_scalers
from helpers.config import Config, load_config
from helpers.data.frames import open_store, prepare_store, store_path
from helpers.data.synthetic import ensure_synthetic
from helpers.experiment import build_model
from helpers.shared import find_weights
from helpers.tools.command import ROOT, Refusal, read_choices, run
from helpers.training.devices import make_accelerator

# of nasa-ibm-ai4science/Surya-1.0, on NASA's GPU in bfloat16; of other weights they stand beside them: NAME.losses.json
LOSSES = [0.24890852, 0.31166040, 0.32497961, 0.32198894, 0.30908717, 0.31909296, 0.36053017, 0.33693042]
# four visits of three hours, one after the other: twelve hours of a synthetic Sun without a gap
SUN = {"folder": "{shared}/synthetic/verify-{seed}", "visits": 4, "hours_between_visits": 3}
PASS, CLOSE = 0.003, 0.03  # largest relative deviation of the mean loss
LOOK_AT = "Look at model.weights, model.weights_channels, and at what was changed in helpers/ (`git status`)."


def main() -> int:
    """Forecast one and two hours ahead from eight times, and compare the errors with those of the release."""
    parser = argparse.ArgumentParser(prog="python -m helpers.tools.verify", description=main.__doc__)
    parser.add_argument("--times", type=int, default=8, help="only the first of the eight times, so many")
    parser.add_argument("--reduce", type=int, help="also: what is left of it when images are reduced by, say, 4")
    asked = read_choices(parser)
    if asked.choices["task"]:
        raise Refusal("Surya's own task is verified, the forecast of all channels: leave TASK out.")
    cfg = configure(asked.choices)
    file = find_weights(cfg.model.weights, cfg.shared, cfg.paths.reserve_gb)
    beside = file and file.with_suffix(".losses.json")
    known = json.loads(beside.read_text()) if file and beside.exists() else {"image_size": 4096, "losses": LOSSES}
    if known["image_size"] != cfg.data.image_size:
        sizes = f"The released losses are of {known['image_size']} pixels, not of {cfg.data.image_size}"
        raise Refusal(f'{sizes}: make verify PROFILE=surya_4k ARGS="--reduce 4" shows what reducing does.')
    errors = measure(cfg, asked.times, configure(asked.choices, asked.reduce) if asked.reduce else None)
    losses, released = errors["forecast"].mean(axis=1), np.array(known["losses"][: asked.times])
    print(pd.DataFrame({"loss": losses, "released": released}, times_of(cfg)[: asked.times]).round(5))
    if asked.reduce:
        means = {name: values.mean(axis=0) for name, values in errors.items()}
        print(f"\nMean squared errors:\n{pd.DataFrame(means, ['1 hour ahead', '2 hours ahead']).T.round(4)}\n")
    off = abs(losses.mean() / released.mean() - 1)
    verdict = "pass" if off < PASS else "close" if off < CLOSE else "wrong"
    print(f"{verdict}: mean loss {losses.mean():.5f}, released {released.mean():.5f}, {off:.2%} off")
    if verdict != "pass":
        print(LOOK_AT)
    return int(verdict == "wrong")


def configure(choices: dict[str, Any], reduce: int = 1) -> Config:
    """Surya's own task, the forecast of 13 channels from two frames, with images reduced once more by `reduce`."""
    settings = {"training.regime": "probe", "training.frozen_dtype": "fp32", **choices["parameters"]}
    chosen = {"profile": choices["profile"], "task": "forecast"}
    cfg = load_config(ROOT / "config.yaml", **chosen, parameters=settings)
    settings |= {f"synthetic.{key}": value for key, value in SUN.items()} if cfg.synthetic.folder else {}
    settings["data.reduce"] = cfg.data.reduce * reduce
    return load_config(ROOT / "config.yaml", **chosen, parameters=settings)


def times_of(cfg: Config) -> pd.DatetimeIndex:
    """The eight times (UTC) from which is forecast."""
    begin = pd.Timestamp(cfg.synthetic.start if cfg.synthetic.folder else "2014-01-07 15:00") + pd.Timedelta("1h")
    return pd.date_range(begin, periods=8, freq=f"{cfg.data.cadence_minutes if cfg.synthetic.folder else 12}min")


def measure(cfg: Config, count: int = 8, reduced: Config | None = None) -> dict[str, np.ndarray]:
    """Mean squared errors in normalised units one and two hours ahead, (N, 2), from the first N times: of the forecast
    and of persistence; with a `reduced` configuration also of both and of its own model's forecast at its size.
    """
    ensure_synthetic(cfg)
    hours, times = [pd.Timedelta(hour, "h") for hour in (-1, 0, 1, 2)], times_of(cfg)[:count]
    prepare_store(cfg, [when + hour for when in times for hour in hours])
    store = open_store(store_path(cfg), cfg.data.channels, cfg.data.reduce, cfg.data.native_size, cfg.scalers)
    accelerator, scaler = make_accelerator(cfg), stack_scalers(cfg.scalers, cfg.data.channels)
    models = [build_model(c).eval().to(accelerator.device) for c in (cfg, reduced) if c]

    def smaller(images: list[Tensor]) -> list[Tensor]:  # each (1, C, H, W) normalised; averaged in physical values
        factor = reduced.data.reduce // cfg.data.reduce
        return [normalise(avg_pool2d(denormalise(image, scaler), factor), scaler) for image in images]

    rows = []
    for when in tqdm(times, "verifying", unit="time"):
        images = [store.read([when + hour]).movedim(1, 0).to(accelerator.device) for hour in hours]  # (1, C, H, W)
        with torch.no_grad(), accelerator.autocast():
            pairs = {"forecast": (two_hours(models[0], *images[:2]), images[2:])}
            pairs["persistence"] = [images[1]] * 2, images[2:]
            if reduced:
                small = smaller(images)
                pairs |= {f"{name}, then reduced": (smaller(found), small[2:]) for name, (found, _) in pairs.items()}
                pairs["forecast of reduced images"] = two_hours(models[1], *small[:2]), small[2:]
        rows.append({name: [*map(mse_loss, *both)] for name, both in pairs.items()})
    return {name: np.array([[error.item() for error in row[name]] for row in rows]) for name in rows[0]}


def two_hours(model: nn.Module, before: Tensor, now: Tensor) -> list[Tensor]:
    """Forecasts (1, C, H, W) of the next hour, and of the one after it, for which the first forecast is the present."""
    first = model({"ts": torch.stack([before, now], dim=2)})
    return [first, model({"ts": torch.stack([now, first], dim=2)})]


if __name__ == "__main__":
    run(main)
