"""Predict at times without labels with what a run, or NASA, has trained: `make predict RUN=.. TIMES=..`."""

import argparse
import os
import re
from pathlib import Path

import pandas as pd

from helpers.config import load_config
from helpers.data.archive import parse_times
from helpers.data.synthetic import ensure_synthetic
from helpers.model.checkpoint import RELEASED
from helpers.tools.command import ROOT, Refusal, read_choices, run
from helpers.use import load_release, load_run, predict_times


def main() -> None:
    """Write the predictions of a run, or of a model that NASA released, for times that need no label."""
    parser = argparse.ArgumentParser(prog="python -m helpers.tools.predict", description=main.__doc__)
    parser.add_argument("--run", default="", help="name of a finished run, such as finetune-flare-tiny-001")
    parser.add_argument("--released", default="", help="flare_24h, solar_wind, ..., hf://owner/name/file, or a file")
    parser.add_argument("--times", required=True, help="UTC: a first and a last one, 2014-01-07/2014-01-09, or one")
    parser.add_argument("--every", type=int, default=60, help="minutes from one time to the next")
    parser.add_argument("--out", type=Path, help=".csv for numbers, .zarr for images; else in the run's folder")
    asked = read_choices(parser)
    if bool(asked.run) == bool(asked.released):
        raise Refusal("Which model? RUN=finetune-flare-tiny-001, a run of yours, or RELEASED=solar_wind, of NASA's.")
    times = read_times(asked.times, asked.every)
    choices = {key: given for key, given in asked.choices.items() if given}
    if asked.released:
        if "task" not in choices and asked.released not in RELEASED:
            raise Refusal(f"RELEASED={asked.released} needs the TASK it was made for; or name {', '.join(RELEASED)}.")
        choices = {"profile": "surya_4k", "task": asked.released} | choices
        trained = load_release(asked.released, load_config(ROOT / "config.yaml", experiment="finetune", **choices))
    elif choices:
        raise Refusal(f"A run has its own {', '.join(choices)}: leave that out.")
    else:
        trained = load_run(load_config(ROOT / "config.yaml").runs_folder / asked.run, ROOT / "config.yaml")
    ensure_synthetic(trained.cfg)
    ending = "csv" if trained.cfg.labels.numbers else "zarr"
    name = re.sub(r"\W+", "-", asked.run or asked.released)
    out = trained.cfg.runs_folder / asked.run / f"{name}-{times[0]:%Y%m%d_%H%M}-{times[-1]:%Y%m%d_%H%M}.{ending}"
    print(f"written: {os.path.relpath(predict_times(trained, times, asked.out or out))}")
    if trained.coverage is not None:
        print(f"The 90% intervals are from validation; of the run's test, they hold {trained.coverage:.0%}.")


def read_times(text: str, every_minutes: int) -> pd.DatetimeIndex:
    """The times of `first/last`, both included, every so many minutes; or the one that is given."""
    parts = text.split("/")
    times = parse_times(pd.Series(parts, range(-1, len(parts) - 1), name="TIMES"), "what was typed")
    if len(times) > 2 or times.iloc[0] > times.iloc[-1] or every_minutes < 1:
        raise Refusal(f"TIMES={text} EVERY={every_minutes} holds no times: write the first one, /, and the last one.")
    return pd.date_range(times.iloc[0], times.iloc[-1], freq=f"{every_minutes}min")


if __name__ == "__main__":
    run(main)
