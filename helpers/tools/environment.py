"""Install the course into the Python that runs this file, once, and teach git to read notebooks.

`make` calls it before every target. It uses the standard library only: nothing else is there before it has run.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Make the environment ready; returns the exit code of what failed, else 0."""
    if not is_current() and (failed := install()):
        print("The installation failed; pip's own message stands above. Mend that, then call the same command again.")
        return failed
    configure_git()
    return 0


def is_current() -> bool:
    """True if this environment holds this very folder, installed after the last change of its requirements."""
    found = (file for project in distributions(name="surya-course") for file in project.files or ())
    records = [Path(file.locate()) for file in found if file.name == "direct_url.json"]
    changed = max((ROOT / name).stat().st_mtime for name in ("pyproject.toml", "requirements.lock"))
    return any(_folder(record) == ROOT and record.stat().st_mtime >= changed for record in records)


def _folder(record: Path) -> Path:
    """The folder that an editable installation points to."""
    return Path(url2pathname(urlparse(json.loads(record.read_text())["url"]).path))


def install() -> int:
    """One pip call for everything, so that nothing can pull another torch than the pinned or the present one."""
    try:
        torch = version("torch")
        own = Path(sys.prefix) == ROOT / ".venv"
    except PackageNotFoundError:
        torch, own = "", True
    pins = ["-r", "requirements.lock"] if own else [f"torch=={torch}"]
    print(
        f"Installing the exact versions of requirements.lock into {sys.prefix}: two minutes, 2 GB (CUDA: more) ..."
        if own
        else f"Installing this course into the active environment {sys.prefix}; its torch {torch} stays ...",
        flush=True,
    )
    begin = time.monotonic()
    # without compiling: Python does that for the tenth of the files that is ever imported
    command = [sys.executable, "-m", "pip", "install", "-qq", "--no-compile", *pins, "-e", ".[dev]"]
    code = subprocess.run(command, cwd=ROOT).returncode
    if not code:
        print(f"Installed in {time.monotonic() - begin:.0f} s; later calls start at once.")
    return code


def configure_git() -> None:
    """Point the names in .gitattributes at this environment's nbstripout and nbdime, in this clone only.

    The path is absolute, because all worktrees of a clone share these settings; a command that another environment of
    this clone has set stays as long as its Python exists.
    """
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return
    # what every kernel writes about itself; the name of the language stays
    about = ("codemirror_mode", "file_extension", "mimetype", "nbconvert_exporter", "pygments_lexer", "version")
    keys = " ".join(f"metadata.language_info.{key}" for key in about)
    commands = {
        "filter.nbstripout.clean": f"-m nbstripout --keep-id --extra-keys '{keys}'",
        "diff.jupyternotebook.command": "-m nbdime.vcs.git.diffdriver diff -O -D",  # no outputs, no counts
        "merge.jupyternotebook.driver": "-m helpers.tools.merge_notebook %O %A %B %P",
    }
    plain = {
        "filter.nbstripout.smudge": "cat",
        "filter.nbstripout.required": "false",
        "merge.jupyternotebook.name": "cell by cell, with nbdime",
    }
    listing = subprocess.run(["git", "config", "--local", "--list"], cwd=ROOT, capture_output=True, text=True).stdout
    present = dict(line.partition("=")[::2] for line in listing.splitlines())
    python = shlex.quote(sys.executable)
    wanted = {name: f"{python} {rest}" for name, rest in commands.items() if not _works(present.get(name, ""), rest)}
    for name, value in (wanted | plain).items():
        if present.get(name) != value:
            subprocess.run(["git", "config", "--local", name, value], cwd=ROOT, check=True)


def _works(command: str, rest: str) -> bool:
    """True if `command` is `rest` behind a Python that exists, wherever git calls it from."""
    python = Path("".join(shlex.split(command.removesuffix(rest))))
    return command.endswith(rest) and python.is_absolute() and python.exists()


if __name__ == "__main__":
    sys.exit(main())
