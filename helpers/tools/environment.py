"""Install the course into the Python that runs this file, once, and teach git to read notebooks.

`make` calls it before every target. It uses the standard library only: nothing else is there before it has run.
"""

import contextlib
import fcntl
import json
import os
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main(folder: str = "") -> int:
    """Make the environment ready; returns the exit code of what failed, else 0.

    Args:
        folder: make only this virtual environment, if it does not work; empty: install into the present one.
    """
    with contextlib.suppress(OSError):  # a folder that one may only read, or a disk without locks
        lock = open(ROOT / "pyproject.toml", "a")  # noqa: SIM115 - a second `make` waits until this process ends
        fcntl.flock(lock, fcntl.LOCK_EX)
    if folder:
        return make_virtual_environment(ROOT / folder)
    if not is_current() and (failed := install()):
        print("The installation failed; pip says above why. Mend that, then call the same command again.")
        return failed
    configure_git()
    return 0


def make_virtual_environment(folder: Path) -> int:
    """Make `folder` a virtual environment of this Python, unless it works already."""
    with contextlib.suppress(OSError):
        if subprocess.run([folder / "bin" / "python", "-m", "pip", "--version"], capture_output=True).returncode == 0:
            return 0
    print(f"Making {folder.name} with Python {sys.version.split()[0]} ...", flush=True)
    return subprocess.run([sys.executable, "-m", "venv", "--clear", folder]).returncode


def is_current() -> bool:
    """True if this environment holds this very folder, installed after the last change of its requirements."""
    changed = max((ROOT / name).stat().st_mtime for name in ("pyproject.toml", "requirements.lock"))
    found = (file for project in distributions(name="surya-course") for file in project.files or ())
    records = [Path(file.locate()) for file in found if file.name == "direct_url.json"]
    here = [record for record in records if json.loads(record.read_text())["url"] == ROOT.as_uri()]
    return any(record.stat().st_mtime >= changed for record in here)


def install() -> int:
    """One pip call for everything, so that nothing can pull another torch than the pinned or the present one."""
    pins, what = ["-r", "requirements.lock"], "the exact versions of requirements.lock: two minutes, 2 GB (CUDA: more)"
    if Path(sys.prefix) != ROOT / ".venv":
        with contextlib.suppress(PackageNotFoundError):
            pins = [f"torch=={version('torch')}"]
            what = f"this course, with the {pins[0]} that is there"
    print(f"Installing into {sys.prefix} {what} ...", flush=True)
    command = [sys.executable, "-m", "pip", "install", "-qq", "--no-compile", *pins, "-e", ".[dev]"]
    failed = subprocess.run(command, cwd=ROOT).returncode
    if not failed:  # what the course imports, a tenth of the files, is compiled here, even where Python may not keep it
        words = [sys.executable, "-c", "import helpers.experiment, helpers.tools.run_notebook, wandb"]
        subprocess.run(words, cwd=ROOT, env=os.environ | {"PYTHONDONTWRITEBYTECODE": ""})
    return failed


def configure_git() -> None:
    """Point the names in .gitattributes at this environment's nbstripout and nbdime, in this clone only."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return
    # what every kernel writes about itself; the name of the language stays
    about = ("codemirror_mode", "file_extension", "mimetype", "nbconvert_exporter", "pygments_lexer", "version")
    keys = " ".join(f"metadata.language_info.{key}" for key in about)
    # cells that ask to keep their output (`init_cell`, `keep_output`) get no exception
    outputs = "--strip-init-cells --drop-output-type stream display_data execute_result error"
    python = shlex.quote(sys.executable)
    percent = python.replace("%", "%%")  # git takes %O and the like for something to fill in, but not in a diff command
    settings = {
        "filter.nbstripout.clean": f"{percent} -m nbstripout --keep-id --extra-keys '{keys}' {outputs}",
        "filter.nbstripout.smudge": "cat",
        "filter.nbstripout.required": "false",
        "diff.jupyternotebook.command": f"{python} -m nbdime.vcs.git.diffdriver diff -O -D",  # no outputs, no counts
        "merge.jupyternotebook.name": "cell by cell, with nbdime",
        "merge.jupyternotebook.driver": f"{percent} -m helpers.tools.merge_notebook %O %A %B %P",
    }
    for name, value in settings.items():
        words, rest = ["git", "config", "--local", name], value.partition(" -m ")[2]
        present = subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout.rstrip("\n")
        if rest and present.endswith(f" -m {rest}") and Path(shlex.split(present)[0].replace("%%", "%")).exists():
            continue  # of another environment, for a worktree of this clone: it stays as long as its Python exists
        if present != value:
            subprocess.run([*words, value], cwd=ROOT, check=True)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
