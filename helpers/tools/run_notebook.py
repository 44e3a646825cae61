"""Run a notebook from top to bottom, as "Restart and run all" would: `make run-notebook NB=finetune`.

The executed notebook and its HTML go to `runs/<name>/`, also when a cell fails; then the cell's own message comes last.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import papermill
from ipykernel.kernelspec import write_kernel_spec
from nbclient.exceptions import DeadKernelError
from nbconvert import HTMLExporter
from papermill.engines import NBClientEngine, NotebookExecutionManager, papermill_engines
from papermill.exceptions import PapermillExecutionError

from helpers.config import ConfigError, UsageError, add_choices, load_config, parse_parameters
from helpers.training.loop import STATE, how_to_go_on
from helpers.training.tracking import claim_run

ROOT = Path(__file__).resolve().parents[2]


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Run one notebook of `root/notebooks`.

    Args:
        argv: the command line; None takes the process's own.
        root: the folder of config.yaml and notebooks/.

    Returns:
        The exit code: 0, 1 if a cell failed, 2 if the request makes no sense, 130 after an interrupt.
    """
    arguments = _parser().parse_args(argv)
    try:
        notebook = find_notebook(arguments.notebook, root / "notebooks")
        given = {
            "profile": arguments.profile,
            "task": arguments.task,
            "parameters": parse_parameters(arguments.parameters),
        }
        experiment = notebook.stem if notebook.stem in ("baseline", "finetune") else None
        cfg = load_config(root / "config.yaml", experiment=experiment, **given)
        declared = papermill.inspect_notebook(str(notebook))
        unread = [name for name, value in given.items() if value and name not in declared]
        if unread:
            raise UsageError(
                f"{notebook.name} does not read {', '.join(unread)}: its `parameters` cell has no such name."
            )
    except (UsageError, ConfigError) as error:
        print(error)
        return 2
    folder = claim_run(cfg.runs_folder, f"{notebook.stem}-{cfg.task}-{cfg.profile}")
    given["run_name"] = folder.name
    code = run(notebook, folder, {name: value for name, value in given.items() if name in declared})
    if code == 130 and (folder / STATE).exists():
        print(f"Its training was saved. {how_to_go_on(folder.name, cfg)}")
    return code


def find_notebook(name: str | None, folder: Path) -> Path:
    """The notebook called `name`, with or without folder and ending; UsageError lists what there is."""
    notebooks = {path.stem: path for path in sorted(folder.glob("*.ipynb"))}
    stem = Path(name or "").name.removesuffix(".ipynb")
    if stem in notebooks:
        return notebooks[stem]
    problem = (
        f"There is no notebook '{name}'." if name else "Which notebook? For example: make run-notebook NB=finetune"
    )
    raise UsageError(
        "\n".join([problem, "There is:", *(f"  {key:15} {_title(path)}" for key, path in notebooks.items())])
    )


def run(notebook: Path, folder: Path, parameters: dict[str, Any]) -> int:
    """Execute `notebook` in this very Python and write it and its HTML into `folder`; returns the exit code."""
    executed, html = folder / notebook.name, folder / f"{notebook.stem}.html"
    begin, code, message = time.monotonic(), 0, ""
    print(f"Running {notebook.name} as {folder.name}", flush=True)
    try:
        with _kernel_of_this_python():
            papermill.execute_notebook(
                notebook, executed, parameters, engine_name="progress", kernel_name="python3", cwd=notebook.parent,
                progress_bar=False, stdout_file=sys.stdout,
                coalesce_streams=True,  # a progress bar leaves its last line alone, as on a screen
            )  # fmt: skip
    except PapermillExecutionError as error:
        code, message = 1, _plain(f"{error.ename}: {error.evalue}")
    except DeadKernelError:
        code, message = (
            1,
            "The notebook's Python died, most often because memory ran out: try smaller batches or frames.",
        )
    except KeyboardInterrupt:
        code, message = 130, "Interrupted."
    _write_html(executed, html, notebook.parent)
    minutes, seconds = divmod(round(time.monotonic() - begin), 60)
    print(
        f"{notebook.name} {'stopped' if code else 'finished'} after {minutes}:{seconds:02} min: {os.path.relpath(html)}"
    )
    if message:
        print(message)
    return code


class _ProgressEngine(NBClientEngine):
    """Papermill's own engine, with a line for each section instead of a bar: it reads well in a log, too."""

    @classmethod
    def execute_managed_notebook(cls, nb_man: NotebookExecutionManager, kernel_name: str, **kwargs: Any) -> Any:
        plain_start = nb_man.cell_start

        def cell_start(cell: nbformat.NotebookNode, cell_index: int, **more: Any) -> None:
            heading = re.search(r"^#+ +(.+)", cell.source, re.MULTILINE) if cell.cell_type == "markdown" else None
            if heading:
                print(f"[{cell_index + 1:3}/{len(nb_man.nb.cells)}] {heading[1]}", flush=True)
            plain_start(cell, cell_index, **more)

        nb_man.cell_start = cell_start
        return super().execute_managed_notebook(nb_man, kernel_name, **kwargs)


papermill_engines.register("progress", _ProgressEngine)


@contextmanager
def _kernel_of_this_python() -> Iterator[None]:
    """While it lasts, the kernel `python3` is this Python, whatever kernels the person or the hub has registered."""
    figures = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}  # an inherited Agg would show none
    before = os.environ.get("JUPYTER_PATH")
    with tempfile.TemporaryDirectory(prefix="kernel-") as folder:
        quiet = ["--log-level=CRITICAL"]  # its advice to encrypt, and its last words after Ctrl-C, would worry people
        write_kernel_spec(Path(folder, "kernels", "python3"), {"env": figures}, quiet)
        os.environ["JUPYTER_PATH"] = os.pathsep.join([folder, before] if before else [folder])
        try:
            yield
        finally:
            os.environ.pop("JUPYTER_PATH")
            if before:
                os.environ["JUPYTER_PATH"] = before


def _write_html(executed: Path, html: Path, pictures: Path) -> None:
    if executed.exists():
        resources = {"metadata": {"name": executed.stem, "path": str(pictures)}}
        body, _ = HTMLExporter(embed_images=True).from_filename(str(executed), resources=resources)
        html.write_text(body, encoding="utf-8")


def _title(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    headings = (re.search(r"^# +(.+)", cell.source, re.MULTILINE) for cell in cells if cell.cell_type == "markdown")
    return next((heading[1] for heading in headings if heading), "")


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m helpers.tools.run_notebook", description=__doc__.split("\n")[0])
    parser.add_argument("notebook", nargs="?", help="name of a notebook in notebooks/")
    return add_choices(parser)


if __name__ == "__main__":
    sys.exit(main())
