"""Every test session has caches of its own, and never touches the person's."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_FOLDER = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Point every cache at a temporary folder; workers and the kernels of notebooks inherit it."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    config.stash[_FOLDER] = folder = tempfile.mkdtemp(prefix="surya-course-tests-")
    os.environ.update(SURYA_SHARED=f"{folder}/shared", XDG_CACHE_HOME=f"{folder}/cache", NETRC=f"{folder}/netrc")
    os.environ.update(HF_HUB_OFFLINE="1", MPLBACKEND="Agg")
    for name in ("HF_HOME", "WANDB_API_KEY", "WANDB_MODE"):
        os.environ.pop(name, None)
    if config.getoption("numprocesses", None):
        os.environ["OMP_NUM_THREADS"] = "1"  # the workers share the cores already


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove what this session made."""
    if _FOLDER in config.stash:
        shutil.rmtree(config.stash[_FOLDER], ignore_errors=True)


@pytest.fixture
def make() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Call make as a person would who has activated the environment of the tests; nothing is installed into it."""
    outer = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS", "ARGS"))}

    def call(*words: str, cwd: Path = ROOT, **changes: str) -> subprocess.CompletedProcess[str]:
        environment = outer | {"VIRTUAL_ENV": sys.prefix} | changes
        return subprocess.run(
            ["make", *(() if "env" in words else ("-o", "env")), *words],
            cwd=cwd,
            capture_output=True,
            text=True,
            env=environment,
        )

    return call


@pytest.fixture(autouse=True, scope="module")
def seed_module():
    """The same random weights for a module's fixtures, whichever worker runs it."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def seed_test(seed_module: None):
    """The same random numbers at every run: a tolerance that holds today holds tomorrow."""
    import torch

    torch.manual_seed(1)


@pytest.fixture
def one_thread():
    """Sums of the same numbers in the same order, whatever else runs here; and processes that may be copied."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Five frames an hour apart (the one at 02:00 is missing), their index.csv and store.zarr; only to be read."""
    from frame_files import HOURS, build, write_index

    folder = tmp_path_factory.mktemp("made")
    write_index(folder, HOURS, present=[1, 1, 0, 1, 1, 1])
    build(folder)
    return folder


@pytest.fixture
def built(made, tmp_path):
    """A copy of `made`."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


@pytest.fixture
def folder(built):
    """A copy of `made` without its store."""
    shutil.rmtree(built / "store.zarr")
    return built
