"""Run a notebook from top to bottom, as "Restart and run all" would: `make run-notebook NB=finetune`.

The executed notebook and its HTML go to `runs/<name>/`, also when a cell fails; then the cell and its error come last.
"""

import argparse
import os
import re
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
import papermill
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from nbconvert import HTMLExporter
from papermill.exceptions import PapermillExecutionError

from helpers.config import load_config
from helpers.data.labels import labels_of
from helpers.shared import atomic_write
from helpers.tools.command import ROOT, Refusal, find_notebook, read_choices
from helpers.tools.command import run as run_command
from helpers.training.tracking import STATE, claim_run, how_to_go_on


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Run one notebook of `root/notebooks`, with `root/config.yaml`, and return the exit code of `run`.

    Raises Refusal or ConfigError where the request makes no sense, and nothing was run.
    """
    parser = argparse.ArgumentParser(prog="python -m helpers.tools.run_notebook", description=__doc__.split("\n")[0])
    parser.add_argument("notebook", nargs="?", default="", help="name of a notebook in notebooks/")
    asked = read_choices(parser, argv)
    notebook, given = find_notebook(asked.notebook, root / "notebooks"), asked.choices
    experiment = notebook.stem if notebook.stem in ("baseline", "finetune") else None
    cfg = load_config(root / "config.yaml", experiment=experiment, **given)
    cells = nbformat.read(notebook, as_version=4).cells
    tagged = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    declared = re.findall(r"^(\w+)\s*=", "\n".join(tagged), re.MULTILINE)
    if unread := [name for name, value in given.items() if value and name not in declared]:
        raise Refusal(f"{notebook.name} does not read {', '.join(unread)}: its `parameters` cell has no such name.")
    if experiment and (cfg.synthetic.folder is None or Path(cfg.synthetic.folder).exists()):
        labels_of(cfg)  # what is wrong with them is said now
    folder = claim_run(cfg.runs_folder, f"{notebook.stem}-{cfg.task}-{cfg.profile}")
    given["run_name"] = folder.name
    code = run(notebook, folder, {name: value for name, value in given.items() if name in declared})
    if code == 130 and (folder / STATE).exists():
        print(f"Its training was saved. {how_to_go_on(folder.name, cfg)}")
    return code


class ThisPython(AsyncKernelManager):
    """A kernel in this very Python, whatever kernels the person or the hub has registered."""

    @property
    def kernel_spec(self) -> KernelSpec:
        """Figures go into the notebook, also where MPLBACKEND is Agg; its warnings on Ctrl-C would worry people."""
        surroundings = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
        surroundings["SPYDER_TEXT"] = "1"  # tqdm takes it for a console: its bars are text, as no browser is here
        return KernelSpec(**get_kernel_dict(["--log-level=CRITICAL"]), env=surroundings)


def run(notebook: Path, folder: Path, parameters: dict[str, Any]) -> int:
    """Execute `notebook` in this very Python and write it and its HTML into `folder`.

    Returns 0, 1 if a cell failed, or 130 after an interrupt.
    """
    executed, html = folder / notebook.name, folder / f"{notebook.stem}.html"
    begin, code, message = time.monotonic(), 0, ""

    def minutes() -> str:
        return "{}:{:02}".format(*divmod(round(time.monotonic() - begin), 60))

    def say_heading(cell: nbformat.NotebookNode, cell_index: int) -> None:
        if cell.cell_type == "markdown" and (heading := re.search(r"^#+ +(.+)", cell.source, re.MULTILINE)):
            print(f"{minutes():>6}  {heading[1]}", flush=True)

    print(f"Running {notebook.name} as {folder.name}", flush=True)
    source, target = (str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, executed))
    try:
        papermill.execute_notebook(
            source, target, parameters, kernel_name="python3", language="python", cwd=notebook.parent,
            kernel_manager_class=ThisPython, on_cell_start=say_heading, progress_bar=False, stdout_file=sys.stdout,
            stderr_file=sys.stderr if sys.stderr.isatty() else None,  # a progress bar moves on a screen only
            coalesce_streams=True,  # and leaves its last line in the notebook
        )  # fmt: skip
    except PapermillExecutionError as error:
        last = re.sub(r"\x1b\[[0-9;]*m", "", f"{error.ename}: {error.evalue}")
        code, message = 1, f"This cell failed:\n{textwrap.indent(error.source, '    ')}\n{last}"
    except DeadKernelError:
        code, message = 1, "The notebook's Python died, most often for want of memory: smaller batches or frames help."
    except KeyboardInterrupt:
        code, message = 130, "Interrupted."
    except OSError as error:
        executed.unlink(missing_ok=True)  # half a notebook
        code, message = 1, f"{executed} cannot be written ({error.strerror}). Make room there, then run it again."
    if executed.exists():
        resources = {"metadata": {"name": notebook.stem, "path": str(notebook.parent)}}  # where its pictures are
        page, _ = HTMLExporter(embed_images=True).from_filename(str(executed), resources=resources)
        with atomic_write(html) as temporary:
            temporary.write_text(page, encoding="utf-8")
    print(f"{notebook.name} {'stopped' if code else 'finished'} after {minutes()} min: {os.path.relpath(html)}")
    if message:
        print(message)
    return code


if __name__ == "__main__":
    run_command(main)
