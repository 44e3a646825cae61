"""Copy a notebook to a place that no update touches: `make new-notebook FROM=finetune NAME=my_ribbons`."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbstripout import strip_output

from helpers.config import UsageError
from helpers.tools.run_notebook import find_notebook

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = "make new-notebook FROM=finetune NAME=my_ribbons"


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Copy the notebook FROM to NAME, the two words of the command line; returns the exit code."""
    origin, name = sys.argv[1:] if argv is None else argv
    try:
        source = find_notebook(origin, root / "notebooks")
        target = source.with_name(f"{checked(name)}.ipynb")
        if target.exists():
            raise UsageError(f"notebooks/{target.name} exists already and stays as it is. Choose another NAME.")
    except UsageError as error:
        print(error)
        return 2
    notebook = nbformat.read(source, as_version=4)
    nbformat.write(strip_output(notebook, keep_output=False, keep_count=False, keep_id=True), target)
    print(f"notebooks/{target.name} is yours: a copy of {source.name} that no update of the template touches.")
    print(f"Run it:   make run-notebook NB={target.stem}     (or open it: make lab)")
    print(f"Keep it:  git add notebooks/{target.name} && git commit -m 'My notebook'")
    print(f"Functions of your own fit into helpers/{target.stem}.py, your settings into config.local.yaml.")
    return 0


def checked(name: str) -> str:
    """The bare name of a personal notebook; UsageError for all others."""
    stem = Path(name).name.removesuffix(".ipynb")
    if not re.fullmatch(r"my_\w+", stem):
        got = f"not '{name}'" if name else "and there is none"
        raise UsageError(
            f"NAME must begin with my_ and go on with letters, digits or _, {got}; the template never has such names.\n"
            f"For example: {EXAMPLE}"
        )
    return stem


if __name__ == "__main__":
    sys.exit(main())
