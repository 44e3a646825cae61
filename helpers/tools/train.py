"""Train without a notebook, for long runs and several machines: `python -m helpers.tools.train finetune`.

Under `accelerate launch`, or `torchrun` on the CPU, each process computes its share of every batch; the first one keeps
the record of the run.
"""

import argparse
from collections.abc import Sequence

from helpers.config import load_config
from helpers.data.frames import prepare_store
from helpers.data.synthetic import ensure_synthetic
from helpers.experiment import train_run
from helpers.tools.command import ROOT, read_choices
from helpers.tools.command import run as run_command
from helpers.training.devices import make_accelerator


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; what can go wrong is raised."""
    parser = argparse.ArgumentParser(prog="python -m helpers.tools.train", description=__doc__.split("\n")[0])
    parser.add_argument("experiment", choices=("baseline", "finetune"))
    asked = read_choices(parser, argv)
    cfg = load_config(ROOT / "config.yaml", experiment=asked.experiment, **asked.choices)
    with make_accelerator(cfg).local_main_process_first():
        ensure_synthetic(cfg)
        prepare_store(cfg)
    if name := train_run(cfg):
        print(f"finished: {cfg.runs_folder / name}")


if __name__ == "__main__":
    run_command(main)
