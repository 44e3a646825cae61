"""Train without a notebook, for long runs and for several machines: `python -m helpers.tools.train finetune`.

Under `accelerate launch` each process computes its share of every batch; the first one keeps the record of the run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from helpers.config import ConfigError, load_config, parse_parameters
from helpers.data import frames
from helpers.data.synthetic import ensure_synthetic
from helpers.experiment import train_run
from helpers.tools.command import add_choices
from helpers.training.devices import make_accelerator
from helpers.training.loop import (
    Diverged,
    Interrupted,
)

ROOT = Path(__file__).resolve().parents[2]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 1 if the training failed, 2 for a bad request, 130 after Ctrl-C."""
    asked = _parser().parse_args(argv)
    try:
        given = {"profile": asked.profile, "task": asked.task, "parameters": parse_parameters(asked.parameters)}
        cfg = load_config(ROOT / "config.yaml", experiment=asked.experiment, **given)
    except ConfigError as error:
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
    parser = argparse.ArgumentParser(prog="python -m helpers.tools.train", description=__doc__.split("\n")[0])
    parser.add_argument("experiment", choices=("baseline", "finetune"))
    return add_choices(parser)


if __name__ == "__main__":
    sys.exit(main())
