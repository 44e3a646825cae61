"""What a configuration would use, download and store, before anything is built: `make plan`."""

from __future__ import annotations

import argparse

from helpers.config import load_config
from helpers.data.frames import make_archive, needs_of, plan_frames
from helpers.data.synthetic import ensure_synthetic
from helpers.tools.command import ROOT, read_choices, run


def main() -> None:
    """Print the samples of every split, what is dropped and why, and what the frames take."""
    asked = read_choices(argparse.ArgumentParser(prog="make plan", description=main.__doc__))
    cfg = load_config(ROOT / "config.yaml", **asked.choices)
    ensure_synthetic(cfg)
    plan = plan_frames(cfg, make_archive(cfg))
    print(plan)
    print(needs_of(cfg, plan.frames))


if __name__ == "__main__":
    run(main)
