"""`make chaos` keeps up with the code that it tries."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.notebook
def test_one_of_each_kind_holds():
    words = [sys.executable, "tests/chaos", "1"]
    done = subprocess.run(words, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("Did not hold:\nnothing\n"), done.stdout[-3000:]
    assert all(f"| {kind} | 1 | 1 |" in done.stdout for kind in ("kills in a build", "kills in a training"))
    assert all(f"| {kind} | 1 | 1 |" in done.stdout for kind in ("rounds at once", "bad inputs"))
