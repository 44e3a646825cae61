"""What a configuration would use, download and store, before anything is built: `make plan`."""

from __future__ import annotations

import argparse

from helpers.config import load_config
from helpers.data.frames import prepare_store
from helpers.data.synthetic import ensure_synthetic
from helpers.tools.command import ROOT, read_choices, run


def main() -> None:
    """Print the samples of every split, what is dropped and why, and what the frames take."""
    asked = read_choices(argparse.ArgumentParser(prog="make plan", description=main.__doc__))
    cfg = load_config(ROOT / "config.yaml", **asked.choices)
    ensure_synthetic(cfg)
    report = prepare_store(cfg, plan_only=True)
    print(f"{report.samples}\n{report.needs}")


if __name__ == "__main__":
    run(main)
