"""Fill the store with the frames that a configuration needs, or say what that takes: `make cache`, `make plan`."""

import argparse
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from helpers.config import load_config
from helpers.data.archive import parse_times
from helpers.data.dataset import make_datasets
from helpers.data.frames import open_store, prepare_store, store_path
from helpers.data.synthetic import ensure_synthetic
from helpers.shared import find_weights
from helpers.tools.command import ROOT, read_choices, run


def main() -> None:
    """Bring the frames and weights that the configuration needs to the shared folder; run it again to go on."""
    parser = argparse.ArgumentParser(prog="python -m helpers.tools.cache", description=main.__doc__)
    every = "every frame from START to before END instead, such as 2014-01-07"
    parser.add_argument("--span", nargs=2, metavar=("START", "END"), help=every)
    parser.add_argument("--verify", action="store_true", help="read every frame first and make damaged ones again")
    parser.add_argument("--plan", action="store_true", help="build nothing; say what a build would take")
    asked = read_choices(parser)
    cfg = load_config(ROOT / "config.yaml", **asked.choices)
    ensure_synthetic(cfg)
    times, damaged = None, []
    if asked.span:
        try:
            span = parse_times(pd.Series(asked.span, [-1, 0], name="--span"), "what was typed")
            times = pd.date_range(*span, freq=f"{cfg.data.cadence_minutes}min", inclusive="left")
        except ValueError as error:
            parser.error(f"--span takes two times such as 2014-01-07 and '2014-01-07 18:00' (UTC): {error}")
    if asked.plan:
        report = prepare_store(cfg, times, plan_only=True)
        return print(*filter(None, (report.samples, report.needs)), sep="\n")
    if asked.verify and store_path(cfg).exists():
        damaged = verify_store(store_path(cfg))
        print("damaged:", ", ".join(damaged) or "none")
    print(report := prepare_store(cfg, times, again=True))
    if report.samples:
        make_datasets(report.samples, open_store(store_path(cfg)), cfg)  # downloads mask files
    if damaged:
        print(prepare_store(cfg, damaged))
    print(open_store(store_path(cfg)))
    print(f"weights: {find_weights(cfg.model.weights, cfg.shared, cfg.paths.reserve_gb) or 'random'}")


def verify_store(path: Path) -> list[str]:
    """Read every frame and remove the damaged ones, so that the next build makes them again; return their times."""
    store, damaged = open_store(path), []
    for when in tqdm(store.times, "verifying", unit="frame"):
        try:
            store.read([when])
        except OSError:
            damaged.append(str(when))
            store.file(when).unlink(missing_ok=True)
    return damaged


if __name__ == "__main__":
    run(main)
