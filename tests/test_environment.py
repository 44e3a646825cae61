"""`make env` in an environment that is there already, with wheels made on the spot; and the kernel of a hub."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from jupyter_client.manager import run_kernel

from helpers.tools import environment

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
WHEELS = {  # and what each needs
    **dict.fromkeys(["torch-2.9.1+cu128", "torch-2.13.0", "there-1.0", "there-1.9", "testing-1.0", "testing-1.5"], ""),
    **dict.fromkeys(["deep-1.0", "deep-3.1", "deep-3.9"], ""),
    **{"lacking-2.0": "deep>=1", "lacking-2.5": "deep>=3", "lacking-2.9": "deep>=3"},
}
LOCK = "torch==2.13.0\nthere==1.9\nlacking==2.5\ndeep==3.1\ntesting==1.0\n"
COURSE = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "surya-course"
version = "0.1.0"
dependencies = ["torch>=2", "there>=1", "lacking>=2"]
optional-dependencies = {dev = ["testing>=1"]}
"""
NEEDS = "torch>=2 there>=1 lacking>=2 testing>=1;extra=='dev'"
BACKEND = """
import shutil
def build_editable(folder, *_):
    return shutil.copy("surya_course-0.1.0-py3-none-any.whl", folder).rpartition("/")[2]
"""


def write_wheel(folder: Path, name: str, needs: str) -> None:
    package, version = name.split("-")
    lines = ["Metadata-Version: 2.1", f"Name: {package}", f"Version: {version}", "Provides-Extra: dev"]
    files = {"METADATA": [*lines, *(f"Requires-Dist: {need}" for need in needs.split())], "RECORD": []}
    files["WHEEL"] = ["Wheel-Version: 1.0", "Generator: tests", "Root-Is-Purelib: true", "Tag: py3-none-any"]
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as wheel:
        for file, text in files.items():
            wheel.writestr(f"{name}.dist-info/{file}", "\n".join([*text, ""]))


@pytest.fixture
def hub(tmp_path):
    """An environment that pip fills from WHEELS, and a course whose installer may be called in it."""
    for name, needs in WHEELS.items():
        write_wheel(tmp_path, name, needs)
    tools = tmp_path / "course" / "helpers" / "tools"
    tools.mkdir(parents=True)
    shutil.copy(environment.__file__, tools)
    for name, text in {"pyproject.toml": COURSE, "backend.py": BACKEND, "requirements.lock": LOCK}.items():
        (tmp_path / "course" / name).write_text(text)
    write_wheel(tmp_path / "course", "surya_course-0.1.0", NEEDS)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "hub"], check=True)
    return Hub(tmp_path)


class Hub:
    def __init__(self, folder: Path) -> None:
        self.folder, self.course, self.python = folder, folder / "course", folder / "hub" / "bin" / "python"

    def start(self, *words: str, wheels: str = "") -> subprocess.Popen[str]:
        own = {"PYTHONPATH": "", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": wheels or str(self.folder)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen([self.python, *words], cwd=self.course, env=os.environ | own, **pipes)

    def pip(self, *words: str) -> str:
        return self.start("-m", "pip", "--disable-pip-version-check", *words).communicate()[0]

    def make_env(self, *extras: str, together: int = 1, wheels: str = "") -> str:
        """What `make env` says, or several at once."""
        words = ["-P", "helpers/tools/environment.py", "", *extras]
        calls = [self.start(*words, wheels=wheels) for _ in range(together)]
        said = "".join(call.communicate()[0] for call in calls)
        assert not any(call.returncode for call in calls), said
        return said

    def versions(self) -> str:
        found = self.pip("list", "--format=freeze").split()
        ours = {name.partition("-")[0] for name in WHEELS}
        return " ".join(sorted(pin for pin in found if pin.partition("==")[0] in ours))


def test_what_suits_stays_and_nothing_is_installed_twice(hub):
    hub.pip("install", "torch==2.9.1+cu128", "there==1.0")
    said = hub.make_env(together=2)  # the second waits, and finds everything
    assert said.count("hub lacking>=2 ...") == said.count("Installing") == 1, said
    assert hub.versions() == "deep==3.1 lacking==2.5 there==1.0 torch==2.9.1+cu128"  # nothing for developers
    assert hub.make_env(wheels="/nowhere") == ""
    hub.make_env("dev")
    assert "testing==1.0" in hub.versions()


def test_where_the_lock_contradicts_what_is_there_pip_chooses(hub):
    hub.pip("install", "torch==2.9.1+cu128", "there==1.0", "deep==1.0")
    hub.make_env()
    assert hub.versions() == "deep==1.0 lacking==2.0 there==1.0 torch==2.9.1+cu128"


def test_the_kernel_of_the_course_has_its_helpers(tmp_path, monkeypatch):
    """Registered once, it runs cells of any folder beside the helpers, without an installation of these."""
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path))
    environment.register_kernel()
    monkeypatch.setattr(environment.subprocess, "run", None)
    environment.register_kernel()  # all is well: nothing is called
    clone = tmp_path / "clone"
    for folder in (clone / "helpers", clone / "notebooks"):
        folder.mkdir(parents=True)
    (clone / "helpers" / "__init__.py").write_text("")
    for folder, course in {ROOT / "notebooks": ROOT, tmp_path: ROOT, clone / "notebooks": clone}.items():
        shown = []
        with run_kernel(kernel_name="surya-course", cwd=str(folder)) as client:
            client.execute_interactive("import helpers; print(helpers.__file__)", output_hook=shown.append, timeout=60)
        said = "".join(message["content"].get("text", "") for message in shown)
        assert said.strip() == str(course / "helpers" / "__init__.py")
