"""Verdicts on curves that were made to be each kind, the range test, and the memory of a step."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from helpers.analysis import diagnostics
from helpers.config import load_config
from helpers.model.encoder import SuryaEncoder
from helpers.model.heads import specformer
from helpers.model.lora import adapt
from helpers.training.memory import LiveTensors, estimate_memory, forward_and_backward, recompute_if_needed

EPOCHS = np.arange(1, 13)
TRAIN = {  # training and validation loss by epoch, each in units of its value before training
    "healthy": (0.2 + 0.8 * np.exp(-EPOCHS / 3), 0.3 + 0.7 * np.exp(-EPOCHS / 3)),
    "too small (flat)": (1 - 0.004 * EPOCHS, 1 - 0.004 * EPOCHS),
    "too large (erratic)": (0.8 + 0.25 * (-1.0) ** EPOCHS, 0.9 + 0.2 * (-1.0) ** EPOCHS),
    "diverged": (1.2**EPOCHS, 1.1**EPOCHS),
    "overfitting, by heart": (np.exp(-EPOCHS / 3), 0.3 + 0.7 * np.exp(-EPOCHS / 3)),
    "overfitting": (0.05 + 0.8 * np.exp(-EPOCHS / 3), 0.4 + 0.5 * np.exp(-EPOCHS) + 0.04 * EPOCHS),
}


def curve(kind: str, seed: int, scale: float) -> pd.DataFrame:
    """A history with 2% noise, whatever the size of the loss."""
    noise = np.random.default_rng(seed).normal(1, 0.02, (2, len(EPOCHS)))
    train, val = np.array(TRAIN[kind]) * noise * scale
    table = pd.DataFrame({"train_loss": [scale, *train], "val_loss": [3 * scale, *(3 * val)]})  # harder samples
    return table.rename_axis("epoch")


@pytest.mark.parametrize("scale", [0.01, 1.0, 300.0])
@pytest.mark.parametrize("kind", TRAIN)
def test_a_curve_made_to_be_of_one_kind_is_judged_so(kind, scale):
    cfg = load_config()
    assert [diagnostics.judge_curve(curve(kind, seed, scale), cfg).word for seed in range(20)] == [
        kind.partition(",")[0]
    ] * 20


def test_the_verdict_shows_its_numbers_and_limits():
    said = str(diagnostics.judge_curve(curve("overfitting", 0, 1.0), load_config()))
    assert said.startswith("overfitting: rise ") and "turn 0." in said and "(limit 0.15)" in said
    assert "weight_decay" in said


def test_a_run_that_stopped_at_nan_has_diverged_whatever_came_before():
    table = curve("healthy", 0, 1.0)
    assert diagnostics.judge_curve(table, load_config(), diverged=True).word == "diverged"
    assert diagnostics.judge_curve(table.iloc[:1], load_config(), diverged=True).word == "diverged"


def test_a_loss_that_rises_is_never_called_too_small():
    table = curve("healthy", 0, 1.0).iloc[:2].assign(train_loss=[1.0, 1.8])
    assert diagnostics.judge_curve(table, load_config()).word == "too large (erratic)"


# ---------------------------------------------------------------------------------------------------- range test
class Line(nn.Module):
    """One weight; a step of Adam is as long as the rate."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 1))

    def forward(self, batch):
        return batch["ts"].mean((1, 2, 3, 4))[:, None] * self.weight


class Found:
    """What the range test reads of Loaders: samples of the sizes x and targets y."""

    target_mean, target_std = torch.zeros(1), torch.ones(1)

    def __init__(self, x, y):
        samples = [{"ts": a * torch.ones(1, 1, 2, 2), "target": b[None]} for a, b in zip(x, y, strict=True)]
        self.train = torch.utils.data.DataLoader(samples, batch_size=4)


RANGE = {"diagnostics.range_lrs": [1e-4, 100.0], "diagnostics.range_steps": 120}


def test_the_range_test_covers_its_rates_finds_the_blow_up_and_puts_the_weights_back():
    model = Line()
    table = diagnostics.range_test(model, Found(torch.ones(16), torch.ones(16)), load_config(overrides=RANGE))
    assert table["lr"][0] == pytest.approx(1e-4) and len(table) < 120  # stopped when it blew up
    np.testing.assert_allclose(table["lr"][1:].values / table["lr"][:-1].values, 1e6 ** (1 / 119))
    assert torch.equal(model.weight, torch.zeros(1, 1))
    assert 1e-2 < table["lr"][table["smoothed"].idxmin()] < table["lr"].iloc[-1]


@pytest.mark.parametrize("seed", range(5))
def test_the_range_test_suggests_a_rate_that_works_where_batches_differ_by_factors(seed):
    """With long tails the loss of the first batches can be the lowest of all; 16 steps of 0.1 reach the weight 1.5."""
    x, noise = np.random.default_rng(seed).normal(size=(2, 120))
    x = torch.from_numpy(np.exp(1.5 * x)).float()
    y = x * torch.from_numpy(1.5 + 0.3 * noise).float()
    table = diagnostics.range_test(Line(), Found(x, y), load_config(overrides=RANGE))
    suggested = table["lr"][table["smoothed"].idxmin()] / 10
    assert 0.1 / 5 < suggested < 0.1 * 5
    assert table["loss"][0] == table["smoothed"][0] == 1  # shares of the loss before


# ---------------------------------------------------------------------------------------------------- memory
LARGE = {  # activations of some hundred MB, so that what libraries keep for themselves is small beside them
    "data.native_size": 1024,
    "data.reduce": 2,
    "model.patch_size": 16,
    "model.embed_dim": 384,
    "model.depth": 6,
    "model.num_heads": 6,
    "training.device": "cpu",
}


def model_and_batch(batch_size: int, **changes):
    cfg = load_config(overrides=LARGE | {"training.batch_size": batch_size} | changes)
    model = adapt(specformer(SuryaEncoder(**cfg.encoder_arguments()), cfg), cfg)
    return model, {"ts": torch.rand(batch_size, 13, 2, cfg.data.image_size, cfg.data.image_size)}, cfg


@pytest.mark.parametrize(
    ("regime", "recompute", "precision"),
    [("lora", False, "fp32"), ("lora", True, "fp32"), ("lora", False, "bf16"), ("full", True, "fp32")],
)
def test_the_estimate_is_what_a_real_step_allocates(regime, recompute, precision):
    layers = list(range(LARGE["model.depth"])) if recompute else []
    changes = {"training.regime": regime, "training.precision": precision, "training.recompute_blocks": layers}
    model, batch, cfg = model_and_batch(1, **changes, **{"data.native_size": 512})
    before = {name: p.clone() for name, p in model.named_parameters()}
    estimate = estimate_memory(model, batch, cfg)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert estimate.optimizer == 8 * trained and estimate.weights >= 4 * sum(p.numel() for p in model.parameters())
    with LiveTensors() as live:
        forward_and_backward(model.train(), batch, precision)
    assert live.peak == pytest.approx(estimate.step, rel=0.2)


RESIDENT = """
import resource, sys
sys.path.insert(0, {tests!r})
from test_diagnostics import model_and_batch, estimate_memory
from helpers.training.memory import forward_and_backward
small, batch, cfg = model_and_batch(1, **{{"data.native_size": 128}})
forward_and_backward(small, batch, "fp32")  # what libraries allocate once
model, batch, cfg = model_and_batch(5)
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
forward_and_backward(model.train(), batch, "fp32")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
"""


@pytest.mark.notebook  # with the other long ones
def test_the_estimate_is_what_the_process_grows_by():
    model, batch, cfg = model_and_batch(5)
    estimate = estimate_memory(model, batch, cfg).step
    code = RESIDENT.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) == pytest.approx(estimate, rel=0.2)


@pytest.mark.notebook  # with the other long ones
def test_recomputation_one_sample_and_bf16_save_what_they_promise():
    bf16 = {"training.precision": "bf16"}
    now = estimate_memory(*model_and_batch(4)).total
    assert estimate_memory(*model_and_batch(4), batch_size=1).total < 0.4 * now
    assert estimate_memory(*model_and_batch(4, **{"training.recompute_blocks": list(range(6))})).total < 0.6 * now
    products = estimate_memory(*model_and_batch(4, **bf16)).total
    assert 0.4 * now < products < 0.8 * now
    held = estimate_memory(*model_and_batch(4, **bf16, **{"training.frozen_dtype": "bf16"})).total
    assert 0.01 * now < products - held < 0.2 * now


@pytest.mark.notebook  # with the other long ones
def test_auto_recomputes_no_block_more_than_the_memory_asks_for(capsys):
    model, batch, cfg = model_and_batch(6, **{"model.depth": 4})
    backbone = model.encoder.backbone

    def needed(count) -> int:
        backbone.recompute_blocks = frozenset(range(count))
        estimate = estimate_memory(model, batch, cfg)
        return estimate.optimizer + estimate.step

    none, every = needed(0), needed(4)
    recompute_if_needed(model, batch, cfg, free=2 * none)
    assert backbone.recompute_blocks == frozenset() and not capsys.readouterr().out
    free = int((none + every) / 2 / 0.9)
    recompute_if_needed(model, batch, cfg, free=free)
    chosen = len(backbone.recompute_blocks)
    assert 0 < chosen < 4 and needed(chosen) <= 0.9 * free < needed(chosen - 1)
    assert f"{chosen} of 4 blocks recompute" in capsys.readouterr().out
    recompute_if_needed(model, batch, cfg, free=every // 2)
    assert backbone.recompute_blocks == frozenset(range(4))
    assert "Even so it may not fit: lower training.batch_size" in capsys.readouterr().out
    recompute_if_needed(nn.Linear(2, 1), batch, cfg, free=1)  # no encoder, nothing to recompute


def test_weights_held_in_bf16_are_counted_so():
    sizes = []
    for held in ("fp32", "bf16"):
        changes = {"training.frozen_dtype": held, "training.precision": "bf16"}
        model, batch, cfg = model_and_batch(1, **changes)
        sizes.append(estimate_memory(model, batch, cfg).weights)
    matrices = sum(p.numel() for p in model.encoder.parameters() if not p.requires_grad and p.ndim in (2, 4))
    filters = sum(block.filter.complex_weight.numel() for block in model.encoder.backbone.blocks_spectral_gating)
    assert sizes[0] - sizes[1] == pytest.approx(2 * (matrices - filters), rel=0.01)
