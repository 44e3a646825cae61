"""Fill the store with the frames that a configuration needs: `make cache`."""

from __future__ import annotations

import argparse

import pandas as pd

from helpers.config import load_config
from helpers.data.frames import open_store, prepare_store, store_path, verify_store
from helpers.data.synthetic import ensure_synthetic


def _moment(text: str) -> str:
    """A time of the command line in UTC without a zone."""
    try:
        return str(pd.to_datetime(text, utc=True, format="ISO8601").tz_localize(None))
    except ValueError:
        raise argparse.ArgumentTypeError(f'"{text}" is not a time; write times like "2014-01-07 18:00" (UTC)') from None


def main() -> None:
    """Reduce the frames of the configuration into its store; run it again to go on."""
    parser = argparse.ArgumentParser(prog="python -m helpers.data.frames", description=main.__doc__)
    parser.add_argument("--config", default="config.yaml")
    parser.add_argument("--profile")
    parser.add_argument("--task")
    parser.add_argument("--start", type=_moment, help="only frames from this time on, for example 2014-01-07")
    parser.add_argument("--end", type=_moment, help="only frames before this time")
    parser.add_argument(
        "--verify", action="store_true", help="read every frame (of this span) first and rebuild those that are damaged"
    )
    asked = parser.parse_args()
    cfg = load_config(asked.config, profile=asked.profile, task=asked.task)

    ensure_synthetic(cfg)
    between = [(asked.start or "1900-01-01", asked.end or "2200-01-01")] if asked.start or asked.end else None
    if asked.verify and store_path(cfg).exists():
        print("damaged:", ", ".join(verify_store(store_path(cfg), between)) or "none")
    print(prepare_store(cfg, between))
    print(open_store(store_path(cfg)))


if __name__ == "__main__":
    main()
