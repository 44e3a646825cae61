"""A training that was killed, interrupted, or ran out of disk goes on as if nothing had happened."""

import multiprocessing
import os
import signal
import sys
from functools import partial

import pandas as pd
import pytest
import torch
from small_training import numbers, small_config
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from helpers import shared
from helpers.model.checkpoint import CheckpointError, load_adapter, load_filtered
from helpers.model.encoder import SuryaEncoder
from helpers.model.heads import Specformer1D
from helpers.model.lora import apply_lora
from helpers.shared import DiskFullError
from helpers.training.loop import Interrupted, fit, predict, seed_everything
from helpers.training.tracking import BEST, STATE, start_run

EPOCHS, BATCHES = 3, 4
OVERRIDES = {
    "training.epochs": EPOCHS,
    "training.lr": 0.01,
    "training.schedule": "cosine",
    "training.save_every_steps": 1,
    "training.patience": 2,
    "lora.dropout": 0.3,
}

pytestmark = pytest.mark.usefixtures("one_thread")


def build() -> nn.Module:
    encoder = SuryaEncoder(
        img_size=8, patch_size=2, in_chans=2, time_dim=1, embed_dim=16, depth=3, n_spectral_blocks=1, num_heads=2
    )
    model = Specformer1D(encoder, dropout=0.2)
    load_filtered(model, None)
    return apply_lora(model, rank=2, dropout=0.3)


def train(folder, name, resume=None, before=lambda: None, **overrides):
    """One training from the start of a process, as a notebook does it; returns the model and the history."""
    cfg = small_config(folder, **OVERRIDES | {"training.resume": resume} | overrides)
    seed_everything(cfg)
    model, loaders = build(), numbers(train_samples=8 * BATCHES)
    before()
    with start_run(cfg, name=name) as run:
        history = fit(model, loaders, cfg, run=run)
    return model, history


def in_process(function, *args, **settings) -> int:
    """The exit code of a process of its own that calls the function; minus the signal that ended it."""

    def call() -> None:
        torch.set_num_threads(1)
        function(*args, **settings)

    process = multiprocessing.get_context("fork").Process(target=call)
    process.start()
    process.join(120)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after_steps(count: int, action) -> RemovableHandle:
    """Do it right after the optimiser's step of this number."""
    steps = iter(range(1, 10**6))
    return register_optimizer_step_post_hook(lambda *_: action() if next(steps) == count else None)


def at_rename(count: int, name: str, action) -> None:
    """Do it when the file of this name is about to appear for the time of this number."""
    times = iter(range(1, 10**6))

    def hook(event: str, args: tuple) -> None:
        if event == "os.rename" and str(args[1]).endswith(name) and next(times) == count:
            action()

    sys.addaudithook(hook)


@pytest.fixture
def whole(tmp_path):
    """The training that nobody disturbed."""
    return train(tmp_path, "whole")


def assert_same(found, expected):
    (model, history), (other, other_history) = found, expected
    pd.testing.assert_frame_equal(
        history.table.drop(columns="seconds"), other_history.table.drop(columns="seconds"), check_exact=True
    )
    assert history.best_epoch == other_history.best_epoch > 0 and history.stopped == other_history.stopped
    for key, value in other.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


KILLS = {
    "after the first step": partial(after_steps, 1, kill),
    "in the middle of an epoch": partial(after_steps, BATCHES + 2, kill),
    "after the last step of an epoch": partial(after_steps, 2 * BATCHES, kill),
    "after the last step": partial(after_steps, EPOCHS * BATCHES, kill),
    "before the state is in place": partial(at_rename, 7, STATE, kill),
    "while the best weights are written": partial(at_rename, 2, BEST, kill),
}


@pytest.mark.parametrize("moment", KILLS)
def test_a_killed_training_ends_with_the_same_bits(tmp_path, whole, moment):
    assert in_process(train, tmp_path, "killed", before=KILLS[moment]) == -signal.SIGKILL
    left = list((tmp_path / "runs/killed").glob(".last.*"))
    assert bool(left) == (moment == "before the state is in place")
    for path in left:
        os.utime(path, (0, 0))  # the next run that finds such a file old removes it
    assert_same(train(tmp_path, "resumed", resume="killed"), whole)
    rows = pd.read_csv(tmp_path / "runs/resumed/history.csv")
    assert list(rows["epoch"]) == list(range(EPOCHS + 1))  # the new run has the whole history
    assert not any(path.exists() for path in left)


def test_killed_twice_and_with_accumulation(tmp_path):
    """The second time before the resumed run has saved anything of its own, in the middle of an epoch."""
    settings = {"training.accumulation": 3}
    whole = train(tmp_path, "whole", **settings)
    for name, resume, step in (("first", None, 4), ("second", "first", 1)):
        code = in_process(train, tmp_path, name, resume, before=partial(after_steps, step, kill), **settings)
        assert code == -signal.SIGKILL
    assert_same(train(tmp_path, "third", resume="second", **settings), whole)


def test_patience_is_counted_across_the_kill(tmp_path):
    """With a rate that ruins the model at once, every epoch is worse than the one before training."""
    settings = {"training.lr": 30.0, "training.epochs": 9, "training.patience": 3}
    _, whole = train(tmp_path, "whole", **settings)
    assert whole.stopped and len(whole.rows) < 9
    assert in_process(train, tmp_path, "killed", before=partial(at_rename, 11, STATE, kill), **settings) != 0
    _, resumed = train(tmp_path, "resumed", resume="killed", **settings)
    assert resumed.stopped == whole.stopped and len(resumed.rows) == len(whole.rows)
    best = [torch.load(tmp_path / "runs" / name / BEST)["state"] for name in ("whole", "resumed")]
    assert all(torch.equal(value, best[1][key]) for key, value in best[0].items())  # from before the kill


def test_a_run_that_is_done_is_not_trained_on(tmp_path, whole):
    assert_same(train(tmp_path, "again", resume="whole"), whole)


# ---------------------------------------------------------------------------------------------------- Ctrl-C
def test_ctrl_c_says_how_to_go_on(tmp_path, whole):
    cfg = small_config(tmp_path, **OVERRIDES)
    seed_everything(cfg)
    model, loaders = build(), numbers(train_samples=8 * BATCHES)
    hook = after_steps(2 * BATCHES + 2, lambda: signal.raise_signal(signal.SIGINT))
    try:
        with start_run(cfg, name="stopped") as run, pytest.raises(Interrupted) as raised:
            fit(model, loaders, cfg, run=run)
    finally:
        hook.remove()
    message, history = str(raised.value), pd.read_csv(tmp_path / "runs/stopped/history.csv")
    assert list(history["epoch"]) == [0, 1, 2] and "after batch 1 of epoch 3" in message
    assert 'P="training.resume=stopped"' in message and "NB=finetune TASK=flare PROFILE=tiny" in message
    best = history["val_rmse"].min()
    assert predict(model, loaders, "val", cfg).metrics(cfg)["rmse"] == pytest.approx(best, rel=1e-6)
    assert_same(train(tmp_path, "resumed", resume="stopped"), whole)


# ---------------------------------------------------------------------------------------------------- a full disk
def test_a_full_disk_keeps_the_last_good_state(tmp_path, whole, monkeypatch):
    saved, written = shared.os.replace, []

    def full(source, target, **options):
        if str(target).endswith(STATE):
            written.append(target)
            if len(written) == 7:
                raise OSError(28, "No space left on device")
        return saved(source, target, **options)

    monkeypatch.setattr(shared.os, "replace", full)
    with pytest.raises(DiskFullError, match=r"became full .* the last good state is .*after epoch 1.*training.resume"):
        train(tmp_path, "full")
    assert not list((tmp_path / "runs/full").glob("*.tmp*"))
    monkeypatch.undo()
    assert_same(train(tmp_path, "resumed", resume="full"), whole)


# ---------------------------------------------------------------------------------------------------- what is refused
def test_a_state_of_something_else_is_refused_by_name(tmp_path, whole):
    with pytest.raises(CheckpointError, match=r"no .*none.*last.pt to go on from .*Runs with a state: .*whole"):
        train(tmp_path, "new", resume="none")
    with pytest.raises(CheckpointError, match=r"whole .*other settings: training.lr \(0.01 then, 0.02 now\)"):
        train(tmp_path, "new2", resume="whole", **{"training.lr": 0.02})
    cfg = small_config(tmp_path, **OVERRIDES | {"training.resume": "whole"})
    with pytest.raises(CheckpointError, match="other frames or labels"):
        fit(build(), numbers(train_samples=16), cfg)
    swapped = numbers(train_samples=8 * BATCHES)
    swapped.val.dataset.targets[[0, 1]] = swapped.val.dataset.targets[[1, 0]]
    with pytest.raises(CheckpointError, match="other frames or labels"):
        fit(build(), swapped, cfg)
    with pytest.raises(CheckpointError, match="another model"):
        fit(nn.Linear(2, 1), numbers(train_samples=8 * BATCHES), cfg)
    (tmp_path / "runs/whole" / STATE).write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="last.pt"):
        train(tmp_path, "new3", resume="whole")


def test_the_best_weights_on_disk_are_an_adapter_file(tmp_path, whole):
    model = build()
    said = load_adapter(tmp_path / "runs/whole" / BEST, model)
    assert said["extra"]["epoch"] == whole[1].best_epoch
    assert all(
        torch.equal(value, model.state_dict()[key])
        for key, value in whole[0].state_dict().items()
        if "lora" in key or not key.startswith("encoder.")
    )
