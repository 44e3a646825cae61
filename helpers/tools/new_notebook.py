"""Copy a notebook to a place that no update touches: `make new-notebook FROM=finetune NAME=my_ribbons`."""

import re
import sys
from pathlib import Path

import nbformat
from nbstripout import strip_output

from helpers.tools.command import ROOT, Refusal, find_notebook, run


def main(origin: str, name: str, root: Path = ROOT) -> None:
    """Copy the notebook `origin` to `name`, without outputs; Refusal if `name` is taken or no personal one."""
    stem = Path(name).name.removesuffix(".ipynb")
    if not re.fullmatch(r"my_\w+", stem):
        raise Refusal(
            f"NAME must be my_ and then letters, digits or _ (names that the template never has); got '{name}'.\n"
            "For example: make new-notebook FROM=finetune NAME=my_ribbons"
        )
    source = find_notebook(origin, root / "notebooks")
    target = source.with_name(f"{stem}.ipynb")
    if target.exists():
        raise Refusal(f"notebooks/{target.name} exists already and stays as it is. Choose another NAME.")
    notebook = nbformat.read(source, as_version=4)
    nbformat.write(strip_output(notebook, keep_output=False, keep_count=False, keep_id=True), target)
    print(f"notebooks/{target.name} is yours: a copy of {source.name} that no update of the template touches.")
    print(f"Run it:   make run-notebook NB={stem}     (or open it: make lab)")
    print(f"Keep it:  git add notebooks/{target.name} && git commit -m 'My notebook'")


if __name__ == "__main__":
    run(lambda: main(*sys.argv[1:]))
