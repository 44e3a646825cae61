"""Print every setting, its value and the layer that set it: `make config`."""

import argparse

from helpers.config import load_config
from helpers.tools.command import ROOT, read_choices, run


def main() -> None:
    """Print a line for each setting, as a run of this task and profile would have it."""
    parser = argparse.ArgumentParser(prog="python -m helpers.tools.show_config", description=main.__doc__)
    parser.add_argument("--key", help="a key or a section, such as training.lr or lora; without it all keys")
    asked = read_choices(parser)
    cfg = load_config(ROOT / "config.yaml", **asked.choices)
    print(cfg.explain(*[asked.key] if asked.key else cfg.set_by))


if __name__ == "__main__":
    run(main)
