"""Give the Python that runs this file what the course needs and it lacks, and teach git to read notebooks.

`make` calls it before every target. It uses the standard library and pip only: nothing else is there before it has run.
"""

import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, distribution, distributions
from pathlib import Path

try:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
except ModuleNotFoundError:  # in a new environment; a Python that only makes one may have no pip either
    with contextlib.suppress(ModuleNotFoundError):
        from pip._vendor.packaging.requirements import Requirement
        from pip._vendor.packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]


def main(folder: str = "", *words: str) -> int:
    """Make the environment ready; returns the exit code of what failed, else 0.

    Args:
        folder: make only this virtual environment, if it does not work; empty: install into the present one.
        words: extras of pyproject.toml, such as dev; and kernel, which registers this Python as "Surya course".
    """
    with contextlib.suppress(OSError):  # a folder that one may only read, or a disk without locks
        lock = open(ROOT / "pyproject.toml", "a")  # noqa: SIM115 - a second `make` waits until this process ends
        fcntl.flock(lock, fcntl.LOCK_EX)
    if folder:
        return make_virtual_environment(ROOT / folder)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [word for word in words if word != "kernel"]
    wanted = project["dependencies"] + [text for name in extras for text in project["optional-dependencies"][name]]
    lacking, own = unmet(wanted), Path(sys.prefix) == ROOT / ".venv"
    # an active environment that has everything is left alone, with the course's folder too: `make` puts it on the path
    if (lacking or own and not is_current()) and (failed := install(lacking, own, extras)):
        print("The installation failed; pip says above why. Mend that, then call the same command again.")
        return failed
    configure_git()
    if "kernel" in words or "JUPYTERHUB_USER" in os.environ:
        register_kernel()
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


def unmet(requirements: Iterable[str], extra: str = "") -> list[str]:
    """Those requirements that this environment does not meet, also the ones that an [extra] in them brings."""
    found = []
    for wanted in map(Requirement, requirements):
        if wanted.marker and not wanted.marker.evaluate({"extra": extra}):
            continue
        try:
            present = distribution(wanted.name)
        except PackageNotFoundError:
            found.append(str(wanted))
            continue
        found += [] if wanted.specifier.contains(present.version, prereleases=True) else [str(wanted)]
        for name in wanted.extras:
            found += unmet(present.requires or (), name)
    return found


def install(lacking: Sequence[str], own: bool, extras: Sequence[str]) -> int:
    """One pip call for everything. Our .venv (`own`) gets the versions of requirements.lock. In an environment of yours
    what meets the requirements stays as it is, torch's build above all, and the lock counts for the rest, if it can.
    """
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = {canonicalize_name(pin.partition("==")[0]): pin for pin in lines if pin and not pin.startswith("#")}
    there = {canonicalize_name(d.name): f"{d.name}=={d.version}" for d in distributions() if d.name}
    for name in ("surya-course", *(Requirement(text).name for text in lacking)):
        there.pop(canonicalize_name(name), None)
    again = [pin for name, pin in pins.items() if own and name in there]
    what = "the exact versions of requirements.lock: two minutes, 2 GB (CUDA: more)" if own else ", ".join(lacking)
    print(f"Installing into {sys.prefix} {what} ...", flush=True)
    target = f".[{','.join(extras)}]" if extras else "."
    for constraints in [pins] if own else [pins | there, there]:
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            print(*constraints.values(), sep="\n", file=file, flush=True)
            words = ["-qq", "--no-compile", "--constraint", file.name, *again, "--editable", target]
            failed = subprocess.run([sys.executable, "-m", "pip", "install", *words], cwd=ROOT).returncode
        if not failed:
            break
    if not failed:  # what the course imports, a tenth of the files, is compiled here, even where Python may not keep it
        words = [sys.executable, "-c", "import helpers.experiment, helpers.tools.run_notebook, wandb"]
        subprocess.run(words, cwd=ROOT, env=os.environ | {"PYTHONDONTWRITEBYTECODE": ""})
    return failed


def register_kernel() -> None:
    """Let the notebooks of a hub choose this Python: as the kernel "Surya course", with the helpers beside them."""
    from jupyter_core.paths import jupyter_data_dir  # here, as it is one of the packages above

    file = Path(jupyter_data_dir(), "kernels", "surya-course", "kernel.json")
    path = os.pathsep.join(["..", str(ROOT)])  # of the notebook's own clone, else of this one
    if not (file.exists() and {sys.executable, path} <= set(re.findall(r'"(.*?)"', file.read_text()))):
        words = ["--user", "--name", "surya-course", "--display-name", "Surya course", "--env", "PYTHONPATH", path]
        subprocess.run([sys.executable, "-m", "ipykernel", "install", *words])


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
    # whichever kernel of Python a person has chosen, git sees the plain one
    chosen = r'"display_name": "[^"]*"\(,\n *"language": "python",\n *"name": \)"[^"]*"'
    plain = r'"display_name": "Python 3 (ipykernel)"\1"python3"'
    kernel = f"""sed '/^ *"kernelspec": {{$/{{n;N;N;s/{chosen}/{plain}/;}}'"""
    settings = {
        # what is last decides whether it worked: without its Python git takes the notebook as it is
        "filter.nbstripout.clean": f"{kernel} | {percent} -m nbstripout --keep-id --extra-keys '{keys}' {outputs}",
        "filter.nbstripout.smudge": "cat",
        "filter.nbstripout.required": "false",
        "diff.jupyternotebook.command": f"{python} -m nbdime.vcs.git.diffdriver diff -O -D",  # no outputs, no counts
        "merge.jupyternotebook.name": "cell by cell, with nbdime",
        "merge.jupyternotebook.driver": f"{percent} -m helpers.tools.merge_notebook %O %A %B %P",
    }
    for name, value in settings.items():
        words = ["git", "config", "--local", name]
        present = subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout.rstrip("\n")
        (before, _, rest), (given, _, same) = value.partition(" -m "), present.partition(" -m ")
        if rest and rest == same:
            *begins, other = shlex.split(given)
            if begins == shlex.split(before)[:-1] and Path(other.replace("%%", "%")).exists():
                continue  # of another environment, for a worktree of this clone: it stays as long as its Python exists
        if present != value:
            subprocess.run([*words, value], cwd=ROOT)  # where this clone is not yours, git says so


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
