"""The same training in several processes: the same curve, the same weights, every sample once."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import pandas as pd
import pytest
import torch
import yaml
from small_training import ROOT, Linear, numbers, small_config

from helpers.config import ConfigError
from helpers.model.checkpoint import CheckpointError
from helpers.training import loop as training
from helpers.training import processes
from helpers.training.loop import Diverged, Interrupted, fit, predict
from helpers.training.tracking import start_run

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {"training.precision": "fp32", "training.epochs": 4}


def rows(history) -> pd.DataFrame:
    return history.table.drop(columns="seconds")


@pytest.mark.parametrize("train_samples", [32, 29])  # the last batch has 5 samples: 4 and 1 (and 3 that do not count)
def test_two_processes_give_the_curve_of_one(tmp_path, train_samples):
    models, found = [Linear(), Linear()], []
    for count, model in enumerate(models, 1):
        cfg = small_config(tmp_path, **SETTINGS | {"training.processes": count})
        found.append(fit(model, numbers(train_samples=train_samples), cfg))
    pd.testing.assert_frame_equal(*map(rows, found), rtol=1e-4)
    assert found[0].best_epoch == found[1].best_epoch > 0
    torch.testing.assert_close(*(model.head.weight for model in models), rtol=1e-4, atol=1e-6)
    one = predict(models[1], numbers(), "test", small_config(tmp_path, **SETTINGS))
    assert one.metrics(cfg)["rmse"] == pytest.approx(
        predict(models[0], numbers(), "test", cfg).metrics(cfg)["rmse"], rel=1e-4
    )


def test_accumulation_in_two_processes(tmp_path):
    found = []
    for count in (1, 2):
        changes = {"training.processes": count, "training.accumulation": 2}
        found.append(fit(Linear(), numbers(train_samples=24), small_config(tmp_path, **SETTINGS | changes)))
    pd.testing.assert_frame_equal(*map(rows, found), rtol=1e-4)


def test_loader_workers_of_the_copies(tmp_path):
    """The notebook has used its own workers before, so there is a fork server, which the copies cannot use."""
    cfg, loaders = small_config(tmp_path, **SETTINGS | {"training.epochs": 1}), numbers(workers=1)
    one = fit(Linear(), loaders, cfg)
    both = small_config(tmp_path, **SETTINGS | {"training.epochs": 1, "training.processes": 2})
    pd.testing.assert_frame_equal(rows(one), rows(fit(Linear(), numbers(workers=1), both)), rtol=1e-4)


def test_the_record_is_kept_here_and_a_resumed_run_goes_on(tmp_path, monkeypatch):
    """The rows arrive in the process of the notebook; the state is that of both processes."""
    settings = SETTINGS | {"training.processes": 2}
    whole = Linear()
    fit(whole, numbers(), small_config(tmp_path, **settings))
    cfg, model = small_config(tmp_path, **settings), Linear()
    healthy = training._Training.end_epoch

    def die(self, *arguments):
        healthy(self, *arguments)
        if self.at.epoch == 3 and self.accelerator.is_main_process:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(training._Training, "end_epoch", die)
    with start_run(cfg, name="killed") as run, pytest.raises(RuntimeError, match="One of the 2 processes .* died"):
        fit(model, numbers(), cfg, run=run)
    monkeypatch.undo()
    assert list(pd.read_csv(run.folder / "history.csv")["epoch"]) == [0, 1, 2]
    cfg = small_config(tmp_path, **settings | {"training.resume": "killed"})
    with start_run(cfg, name="resumed") as run:
        fit(model, numbers(), cfg, run=run)
    assert list(pd.read_csv(run.folder / "history.csv")["epoch"]) == [0, 1, 2, 3, 4]
    assert torch.equal(model.head.weight, whole.head.weight)
    alone = small_config(tmp_path, **SETTINGS | {"training.resume": "killed"})
    with pytest.raises(CheckpointError, match=r"training.processes \(2 then, 1 now\)"):
        fit(model, numbers(), alone)


def test_what_a_process_raises_is_raised_here(tmp_path):
    cfg, loaders = small_config(tmp_path, **SETTINGS | {"training.processes": 2}), numbers()
    loaders.train.dataset.ts[3] = torch.nan
    with pytest.raises(Diverged, match="training loss became nan at batch [1-4] of epoch 1") as raised:
        fit(Linear(), loaders, cfg)
    assert list(raised.value.history.table.index) == [0]


def test_ctrl_c_reaches_the_processes(tmp_path):
    cfg = small_config(
        tmp_path, **SETTINGS | {"training.processes": 2, "training.epochs": 100_000, "training.patience": 100_000}
    )
    timer = threading.Timer(8, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    started = time.monotonic()
    with start_run(cfg, name="stopped") as run, pytest.raises(Interrupted, match="training.resume=stopped"):
        fit(Linear(), numbers(), cfg, run=run)
    timer.cancel()
    assert time.monotonic() - started < 60 and (run.folder / "last.pt").exists()


def test_batches_that_cannot_be_shared_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="training.processes.*3 processes cannot share batches of 8 samples equally"):
        small_config(tmp_path, **{"training.processes": 3})


SMALL_SUN = [
    *["synthetic.visits=16", "data.native_size=128", "paths.reserve_gb=0", "tracking.wandb=disabled"],
    *["split.train=[2014-01-01, 2014-01-15]", "split.val=[2014-01-17, 2014-01-23]"],
    *["split.test=[2014-01-25, 2014-02-02]", "training.epochs=2", "target.event_threshold=null"],
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


def test_accelerate_launch_trains_one_run_on_two_processes(tmp_path):
    """The line of the README, with a training short enough for a test."""
    port = ["--main_process_port", processes._free_port()]
    launched = headless(tmp_path, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", *port)
    said, _ = launched.communicate(timeout=300)
    assert launched.returncode == 0, said
    (run,) = (tmp_path / "runs").iterdir()  # one run, not one a process
    assert re.search(rf"finished: .*{run.name}", said)
    assert_whole(run)


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


def test_the_headless_entry_refuses_as_the_notebooks_do(capsys):
    from helpers.tools import train

    assert train.main(["finetune", "--parameters", "training.lrr=1"]) == 2
    assert "training.lrr" in capsys.readouterr().out
