"""A training without a notebook: in two processes, of two people at once, and what it refuses."""

import os
import re
import subprocess
import sys

import pandas as pd
import pytest
import yaml
from small_training import ROOT

from helpers.config import ConfigError
from helpers.tools import train

SMALL_SUN = [
    *["synthetic.visits=16", "data.native_size=128", "paths.reserve_gb=0", "tracking.wandb=disabled"],
    *["split.train=[2014-01-01, 2014-01-15]", "split.val=[2014-01-17, 2014-01-23]"],
    *["split.test=[2014-01-25, 2014-02-02]", "training.epochs=2", "target.event_threshold=null"],
    *["training.precision=fp32", "training.batch_size=4", "training.max_train_samples=12"],  # three whole batches
]


def headless(folder, *launcher: str) -> subprocess.Popen:
    """`python -m helpers.tools.train baseline` on a small Sun, in one shared folder."""
    words = ["-m", "helpers.tools.train", "baseline", "--parameters", *SMALL_SUN, f"paths.runs={folder}/runs"]
    environment = os.environ | {"SURYA_SHARED": f"{folder}/shared", "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([sys.executable, *launcher, *words], cwd=ROOT, env=environment, **pipes)


def assert_whole(run) -> None:
    assert list(pd.read_csv(run / "history.csv")["epoch"]) == [0, 1, 2]
    assert yaml.safe_load((run / "config.yaml").read_text())["training"]["epochs"] == 2
    times = pd.read_csv(run / "predictions_val.csv")["timestamp"]
    assert len(times) > 4 and times.is_monotonic_increasing and times.is_unique


# says in each process how many there are
COUNTED = """
import runpy
import torch.distributed
from helpers.training import loop
finish = loop.Trainer.finish
def counted(self):
    finish(self)
    print("process", self.accelerator.process_index, "of", torch.distributed.get_world_size(), flush=True)
if __name__ == "__main__":  # not in the workers that draw the Sun
    loop.Trainer.finish = counted
    runpy.run_module("helpers.tools.train", run_name="__main__")
"""


@pytest.mark.notebook
def test_torchrun_trains_one_run_in_two_processes_with_the_curve_of_one(tmp_path):
    (tmp_path / "counted.py").write_text(COUNTED)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "counted.py")]
    words = ["baseline", "--parameters", *SMALL_SUN, f"paths.runs={tmp_path}/runs"]
    environment = os.environ | {
        "SURYA_SHARED": f"{tmp_path}/shared",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    two = subprocess.run(
        [sys.executable, *launcher, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert two.returncode == 0, two.stdout + two.stderr
    assert sorted(re.findall(r"process (\d) of (\d)", two.stdout)) == [("0", "2"), ("1", "2")]
    (run,) = (tmp_path / "runs").iterdir()  # one run, not one a process
    assert re.search(rf"finished: .*{run.name}", two.stdout)
    one = headless(tmp_path)
    said, _ = one.communicate(timeout=300)
    assert one.returncode == 0, said
    runs = sorted((tmp_path / "runs").iterdir())
    curves = [pd.read_csv(run / "history.csv").drop(columns="seconds") for run in runs]
    pd.testing.assert_frame_equal(*curves, rtol=1e-4)
    for run in runs:
        assert_whole(run)


@pytest.mark.notebook
def test_two_people_training_at_once_in_one_folder_get_a_run_each(tmp_path):
    """Nothing is there yet: both also want to draw the same Sun and to build the same store."""
    both = [headless(tmp_path) for _ in range(2)]
    said = [one.communicate(timeout=300)[0] for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    runs = sorted((tmp_path / "runs").iterdir())
    assert [run.name for run in runs] == ["baseline-flare-tiny-001", "baseline-flare-tiny-002"]
    for run in runs:
        assert_whole(run)
    first, second = (pd.read_csv(run / "predictions_test.csv") for run in runs)
    pd.testing.assert_frame_equal(first, second)  # the same seed: two equal runs, neither disturbed the other


def test_the_command_refuses_as_the_notebooks_do():
    with pytest.raises(ConfigError, match="training.lrr"):
        train.main(["finetune", "--parameters", "training.lrr=1"])
