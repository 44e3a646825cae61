"""The training loop on a problem of a few numbers, where every promise can be checked exactly."""

import copy
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from small_training import Linear, numbers, small_config
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from helpers.model.encoder import SuryaEncoder
from helpers.model.heads import Specformer1D
from helpers.model.lora import adapt, apply_lora
from helpers.training import devices
from helpers.training.loop import Diverged, fit, parameter_groups, predict, seed_everything
from helpers.training.references import reference_predictions
from helpers.training.tasks import Predictions, metrics_table
from helpers.training.tracking import start_run

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]


@pytest.fixture
def config(tmp_path):
    return lambda **overrides: small_config(tmp_path, **overrides)


# ---------------------------------------------------------------------------------------------------- learning
def test_it_learns_and_judges_in_target_units(config):
    model, loaders, cfg = Linear(), numbers(), config(**{"training.epochs": 30, "target.metrics": ["rmse", "r2"]})
    history = fit(model, loaders, cfg)
    table = history.table
    assert table["train_loss"].iloc[-1] < 0.01 * table["train_loss"].iloc[1]
    assert table["val_r2"].iloc[-1] > 0.98 and table["val_rmse"].iloc[0] > 30  # km/s
    assert list(table.index) == list(range(31))
    assert table["train_loss"].iloc[1] < table["train_loss"][0] == pytest.approx(table["val_loss"][0], rel=0.7)
    found = predict(model, loaders, "val", cfg)
    assert found.metrics(cfg)["rmse"] == pytest.approx(table["val_rmse"][history.best_epoch], rel=1e-5)
    assert table["val_rmse"].min() == table["val_rmse"][history.best_epoch]


@pytest.mark.parametrize(("loss", "function"), [("mse", "mse_loss"), ("mae", "l1_loss"), ("huber", "smooth_l1_loss")])
def test_the_loss_is_the_configured_one_in_standardised_units(config, loss, function):
    loaders = numbers()
    row = fit(Linear(), loaders, config(**{"target.loss": loss, "training.epochs": 1})).rows[0]
    target = (loaders.val.dataset.targets - loaders.target_mean) / loaders.target_std
    expected = getattr(nn.functional, function)(torch.zeros_like(target), target)
    assert row["val_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_the_best_epoch_is_kept_when_later_ones_are_worse(config):
    """A learning rate that is far too high overshoots: the fourth epoch is worse than the third."""
    model, loaders = Linear(), numbers()
    cfg = config(**{"training.lr": 0.6, "training.epochs": 4, "training.patience": 9})
    history = fit(model, loaders, cfg)
    values = history.table["val_rmse"]
    assert 0 < history.best_epoch < 4 and values.iloc[-1] > 1.2 * values.min()
    assert predict(model, loaders, "val", cfg).metrics(cfg)["rmse"] == pytest.approx(values.min(), rel=1e-5)


def test_an_untrained_model_that_is_best_is_given_back(config):
    model, loaders = Linear(), numbers()
    fit(model, loaders, config(**{"training.epochs": 25}))
    before = copy.deepcopy(model.state_dict())
    history = fit(model, loaders, config(**{"training.lr": 5.0, "training.epochs": 2}))
    assert history.best_epoch == 0
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_patience_ends_the_training_and_says_why(config):
    loaders, history = numbers(), None
    model = Linear()
    fit(model, loaders, config(**{"training.epochs": 25}))
    history = fit(model, loaders, config(**{"training.lr": 5.0, "training.epochs": 20, "training.patience": 3}))
    assert len(history.rows) == 1 + history.best_epoch + 3
    assert history.stopped == "no better validation rmse for 3 epochs"
    assert fit(Linear(), loaders, config()).stopped == ""


def test_a_metric_where_larger_is_better_is_maximised(config):
    cfg = config(**{"target.metrics": ["r2"], "training.lr": 0.6, "training.patience": 9})
    history = fit(Linear(), numbers(), cfg)
    assert history.table["val_r2"].idxmax() == history.best_epoch != 0


def test_two_half_batches_make_the_step_of_one_whole(config):
    """16 samples, two steps: batches of 8, and of 4 accumulated twice, in the same order."""
    weights, rows = [], []
    for batch, accumulation in ((8, 1), (4, 2)):
        model = Linear()
        model.head.weight.data = torch.tensor([[0.3, -0.2]])
        cfg = config(**{"training.batch_size": batch, "training.accumulation": accumulation, "training.epochs": 1})
        rows.append(fit(model, numbers(batch, shuffle=False, train_samples=16), cfg).rows[1])
        weights.append(model.head.weight.detach().clone())
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)
    # AdamW hides a wrong factor of the gradient, the clipping does not: the whole second step agrees as well
    assert rows[0]["val_rmse"] == pytest.approx(rows[1]["val_rmse"], rel=1e-4)
    half = fit(Linear(), numbers(4, shuffle=False, train_samples=16), config(**{"training.epochs": 1})).rows[1]
    assert half["val_rmse"] != pytest.approx(rows[0]["val_rmse"], rel=1e-2)  # four steps are not two


def test_accumulated_gradients_are_means_not_sums(config):
    seen = []

    class Watched(Linear):
        def forward(self, batch):
            if self.head.weight.grad is not None and self.training:
                seen.append(self.head.weight.grad.norm().item())
            return super().forward(batch)

    cfg = config(**{"training.accumulation": 4, "training.batch_size": 4, "training.epochs": 1})
    loaders = numbers(4, shuffle=False, train_samples=16)
    fit(Watched(), loaders, cfg)
    data = loaders.train.dataset
    model, three_of_four = Linear(), torch.arange(12)
    target = (data.targets - loaders.target_mean) / loaders.target_std
    nn.functional.mse_loss(model({"ts": data.ts[three_of_four]}), target[three_of_four]).backward()
    assert len(seen) == 3 and seen[-1] == pytest.approx(0.75 * model.head.weight.grad.norm().item(), rel=1e-4)


# ---------------------------------------------------------------------------------------------------- schedule
def rates(config, **overrides) -> list[float]:
    """The learning rate of every optimiser step, as the optimiser saw it."""
    seen = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))
    try:
        fit(Linear(), numbers(), config(**overrides))
    finally:
        hook.remove()
    return seen


def test_warm_up_and_cosine(config):
    seen = rates(config, **{"training.warmup": 0.25, "training.schedule": "cosine"})
    assert len(seen) == 6 * 4
    assert 0 < seen[0] < 0.2 * 0.05  # a step is taken from the start, but a small one
    rising, falling = seen[:7], seen[6:]
    assert rising == sorted(set(rising)) and max(seen) == pytest.approx(0.05) == seen[6]
    assert falling == sorted(set(falling), reverse=True) and 0 < seen[-1] < 0.02 * 0.05
    assert seen[6 + 9] == pytest.approx(0.025, rel=1e-6)  # half way down


def test_the_steps_are_counted_with_accumulation(config):
    overrides = {"training.schedule": "cosine", "training.accumulation": 3, "training.epochs": 3}
    seen = rates(config, **overrides)
    assert len(seen) == 2 * 3  # four batches make a step of three and a step of one
    assert seen[0] == pytest.approx(0.05) and 0 < seen[-1] < 0.15 * 0.05


def test_constant_stays(config):
    assert set(rates(config)) == {0.05}


def test_decay_is_for_matrices_alone(config):
    model = Linear()
    model.head.weight.data.fill_(1e3), model.head.bias.data.fill_(1e3)
    loaders = numbers()
    for name in ("train", "val"):
        getattr(loaders, name).dataset.ts.zero_()  # no gradient for the weight, and no other change than its decay
    overrides = {"training.head_weight_decay": 0.5, "training.lr": 0.01, "training.epochs": 1}
    overrides["training.gradient_clip"] = 1e9
    fit(model, loaders, config(**overrides))
    assert model.head.weight.tolist() == [[pytest.approx(1e3 * (1 - 0.005) ** 4)] * 2]
    assert model.head.bias.item() == pytest.approx(1e3 - 4 * 0.01, rel=1e-6)  # four steps of Adam, each of lr


# ---------------------------------------------------------------------------------------------------- repeating
def test_the_same_seed_gives_the_same_history(config):
    def train(seed: int):
        cfg = config(seed=seed, **{"head.dropout": 0.2})
        seed_everything(cfg)
        model = nn.Sequential(Linear(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1))
        nn.init.normal_(model[0].head.weight)
        return fit(model, numbers(), cfg).table.drop(columns="seconds")

    first = train(3)
    pd.testing.assert_frame_equal(first, train(3), check_exact=True)
    assert not first["train_loss"][1:].equals(train(4)["train_loss"][1:])


# ---------------------------------------------------------------------------------------------------- precision
class Precise(Linear):
    """Remembers in which precision it was run."""

    dtypes: set

    def forward(self, batch):
        output = super().forward(batch)
        self.dtypes.add(output.dtype)
        return output


def test_what_was_drawn_before_does_not_change_a_training(config):
    """Cells of a notebook look at batches and call the model; the headless run does not."""
    cfg = config(**{"training.epochs": 2})
    tables = []
    for looks in (False, True):
        seed_everything(cfg)
        loaders, model = numbers(), nn.Sequential(Linear(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1))
        nn.init.normal_(model[0].head.weight)
        if looks:
            model(next(iter(loaders.train)))
        tables.append(fit(model, loaders, cfg).table.drop(columns="seconds"))
    pd.testing.assert_frame_equal(*tables)


def test_bf16_runs_stays_close_and_leaves_the_model_as_it_was(config):
    histories = {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = Precise()
        model.dtypes = set()
        loaders, cfg = numbers(), config(**{"training.precision": precision, "training.epochs": 20})
        histories[precision] = fit(model, loaders, cfg).table
        assert model.dtypes == {dtype}
        batch = next(iter(loaders.val))
        plain = nn.functional.linear(batch["ts"].mean((2, 3, 4)), model.head.weight, model.head.bias)
        assert torch.equal(model(batch), plain) and plain.dtype == torch.float32
        assert model.forward.__func__ is Precise.forward and model.head.weight.dtype == torch.float32
        assert predict(model, loaders, "test", cfg).prediction.dtype == torch.float32
    start = histories["fp32"]["val_rmse"][0]
    assert (histories["fp32"]["val_rmse"] - histories["bf16"]["val_rmse"]).abs().max() < 0.02 * start
    assert not histories["fp32"]["val_rmse"].equals(histories["bf16"]["val_rmse"])


def test_the_forward_comes_back_after_a_failure_too(config):
    model, loaders = Linear(), numbers()
    loaders.train.dataset.ts[3] = torch.nan
    with pytest.raises(FloatingPointError):
        fit(model, loaders, config(**{"training.precision": "bf16"}))
    assert model.forward.__func__ is Linear.forward


# ---------------------------------------------------------------------------------------------------- mistakes
def test_nan_in_the_training_inputs(config):
    loaders = numbers()
    loaders.train.dataset.ts[3] = torch.nan
    pattern = (
        r"training loss became nan at batch [1-4] of epoch 1. Lower training.lr \(now 0.05\) .* weights of epoch 0, its"
    )
    with pytest.raises(Diverged, match=pattern) as raised:
        fit(Linear(), loaders, config())
    assert list(raised.value.history.table.index) == [0]


def test_a_run_that_diverges_later_leaves_the_best_weights_and_its_history(config):
    model, loaders = Linear(), numbers()
    cfg, seen, healthy = config(**{"training.epochs": 9}), [], Linear.forward

    def forward(self, batch):
        seen.append(self.training)
        broken = self.training and sum(seen) > 3 * len(loaders.train)  # in the fourth epoch
        return healthy(self, batch) * (math.nan if broken else 1)

    model.forward = forward.__get__(model)
    with pytest.raises(Diverged, match=r"batch 1 of epoch 4.* The model has the weights of epoch 3,") as raised:
        fit(model, loaders, cfg)
    table = raised.value.history.table
    assert list(table.index) == [0, 1, 2, 3] and table["val_rmse"].idxmin() == 3
    assert predict(model, loaders, "val", cfg).metrics(cfg)["rmse"] == pytest.approx(table["val_rmse"][3])


# ---------------------------------------------------------------------------------------------------- device, regime
def test_fp16_needs_a_gpu(config):
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(ValueError, match=r"training.precision: fp16 needs a GPU, and this runs on cpu"):
        fit(Linear(), numbers(), config(**{"training.precision": "fp16"}))


def test_a_device_that_is_not_there_is_named_with_those_that_are(config):
    with pytest.raises(ValueError, match=r"training.device is 'cuda:7', and this machine has cpu"):
        fit(Linear(), numbers(), config(**{"training.device": "cuda:7"}))
    with pytest.raises(ValueError, match=r"training.device"):
        config(**{"training.device": "gpu"})


def test_the_gpu_with_the_most_free_memory_is_taken_and_named(monkeypatch, capsys):
    free = [20_000_000_000, 71_500_000_000, 3]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda name: (free[int(name[-1])], 80_000_000_000))
    devices.choose_device.cache_clear()
    assert str(devices.choose_device("auto")) == "cuda:1"
    free[0] = 10 * free[1]
    assert str(devices.choose_device("auto")) == "cuda:1"  # chosen once
    devices.choose_device.cache_clear()
    assert "cuda:1, which has the most free memory (GB free: cuda:0 20.0, cuda:1 71.5" in capsys.readouterr().out


ENCODER = {"img_size": 32, "patch_size": 8, "in_chans": 2, "time_dim": 1, "embed_dim": 16, "depth": 2}


@pytest.mark.parametrize("regime", ["lora", "probe", "full", "scratch"])
def test_one_word_chooses_what_trains(config, regime):
    cfg = config(**{"training.regime": regime, "model.weights": str(ROOT / "helpers/data/surya.tiny.pt")})
    model = adapt(Specformer1D(SuryaEncoder(**ENCODER, n_spectral_blocks=1, num_heads=2), pooling="mean"), cfg)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    head = {name for name, _ in model.named_parameters() if not name.startswith("encoder.")}
    adapters = {name for name, _ in model.named_parameters() if "lora_" in name}
    everything = {name for name, _ in model.named_parameters()}
    assert bool(adapters) == (regime == "lora")
    assert trains == {"lora": head | adapters, "probe": head}.get(regime, everything)
    assert (cfg.initial_weights is None) == (regime == "scratch")


def test_frozen_weights_held_in_bf16_train_as_well_and_do_not_change(config):
    tables = []
    for held in ("fp32", "bf16"):
        cfg = config(
            **{"training.frozen_dtype": held, "training.precision": "bf16", "training.epochs": 8, "training.lr": 0.01}
        )
        seed_everything(cfg)
        encoder = SuryaEncoder(**ENCODER | {"img_size": 8, "patch_size": 2}, n_spectral_blocks=1, num_heads=2)
        model = adapt(Specformer1D(encoder), cfg)
        before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
        tables.append(fit(model, numbers(), cfg).table)
        frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        assert all(torch.equal(frozen[name], value) for name, value in before.items())
        dtypes = {p.dtype for name, p in frozen.items() if p.ndim > 1 and "complex_weight" not in name}
        assert dtypes == {torch.float32 if held == "fp32" else torch.bfloat16}
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    start = tables[0]["val_rmse"][0]
    assert tables[0]["val_rmse"].min() < 0.8 * start
    assert (tables[0]["val_rmse"] - tables[1]["val_rmse"]).abs().max() < 0.1 * start
    with pytest.raises(ValueError, match="training.frozen_dtype.*held in bf16 are computed with in bf16"):
        config(**{"training.frozen_dtype": "bf16", "training.precision": "fp32"})


def test_adapters_and_head_have_rates_and_decays_of_their_own(config):
    cfg = config(**{"training.head_lr": 0.3, "training.weight_decay": 0.1, "training.head_weight_decay": 0.2})
    model = adapt(Specformer1D(SuryaEncoder(**ENCODER, n_spectral_blocks=1, num_heads=2), pooling="mean"), cfg)
    names = {id(p): name for name, p in model.named_parameters()}
    settings = {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in parameter_groups(model, cfg)
        for p in group["params"]
    }
    assert settings["encoder.backbone.blocks_attention.0.attn.qkv.lora_A"] == (0.05, 0.1)
    for name, found in settings.items():
        if not name.startswith("encoder."):
            assert found == (0.3, 0.2 if model.get_parameter(name).ndim > 1 else 0.0)
    assert len(settings) == sum(p.requires_grad for p in model.parameters())


def test_deterministic_is_switched_on_and_off(config):
    seed_everything(config(**{"training.deterministic": True}))
    assert torch.are_deterministic_algorithms_enabled()
    seed_everything(config())
    assert not torch.are_deterministic_algorithms_enabled()


def test_nan_in_the_validation_inputs(config):
    loaders = numbers()
    loaders.val.dataset.ts[3] = torch.nan
    with pytest.raises(
        FloatingPointError, match=r"validation loss is nan before any training. .* batch of loaders.val"
    ):
        fit(Linear(), loaders, config())


def test_a_metric_that_cannot_choose_is_refused_before_training(config):
    cfg = config(**{"target.metrics": ["tss", "rmse"], "target.event_threshold": 1e6})
    with pytest.raises(ValueError, match=r"validation tss is not a number, .* Put another metric first"):
        fit(Linear(), numbers(), cfg)


@pytest.mark.parametrize(
    ("outputs", "targets", "said"),
    [
        (2, 1, r"\(8, 2\) but the targets of the batch are \(8, 1\)"),
        (1, 2, r"\(8, 1\) but .* \(8, 2\)"),
        (3, 2, "8, 3"),
    ],
)
def test_an_output_of_another_shape_is_refused_everywhere(config, outputs, targets, said):
    loaders = numbers(outputs=targets)
    with pytest.raises(ValueError, match=rf"The model returns .*{said}.*num_outputs"):
        fit(Linear(outputs), loaders, config())
    with pytest.raises(ValueError, match=rf"The model returns .*{said}"):
        predict(Linear(outputs), loaders, "val", config())


def test_a_model_that_loses_its_last_axis_is_refused(config):
    class Squeezed(Linear):
        def forward(self, batch):
            return super().forward(batch)[:, 0]

    with pytest.raises(ValueError, match=r"returns \(8,\) but the targets of the batch are \(8, 1\)"):
        fit(Squeezed(), numbers(), config())


def test_nothing_to_train(config):
    with pytest.raises(ValueError, match="No parameter of the model requires a gradient"):
        fit(Linear().requires_grad_(False), numbers(), config())


# ---------------------------------------------------------------------------------------------------- with the rest
def test_rows_reach_the_run_as_they_happen(config):
    cfg, loaders = config(**{"training.epochs": 2}), numbers()
    with start_run(cfg) as run:
        history = fit(Linear(), loaders, cfg, run=run)
        run.summary(predict(Linear(), loaders, "test", cfg).metrics(cfg))
    written = pd.read_csv(run.folder / "history.csv", index_col="epoch").drop(columns="step")
    pd.testing.assert_frame_equal(written, history.table, check_exact=False, rtol=1e-9)
    assert yaml.safe_load((run.folder / "config.yaml").read_text())["training"]["epochs"] == 2
    loaders.train.dataset.ts[0] = torch.nan
    with pytest.raises(FloatingPointError), start_run(cfg) as broken:
        fit(Linear(), loaders, cfg, run=broken)
    assert len(pd.read_csv(broken.folder / "history.csv")) == 1  # what was measured before stays


def test_lora_leaves_the_frozen_weights_equal_to_the_bit(config):
    encoder = SuryaEncoder(
        img_size=8, patch_size=2, in_chans=2, time_dim=1, embed_dim=16, depth=3, n_spectral_blocks=1, num_heads=2
    )
    torch.manual_seed(0)
    model = apply_lora(Specformer1D(encoder), rank=2, alpha=4, dropout=0.1)
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    overrides = {"training.precision": "bf16", "training.weight_decay": 0.1, "training.epochs": 8, "training.lr": 0.01}
    history = fit(model, numbers(), config(**overrides))
    after = model.state_dict()
    assert history.best_epoch > 0
    assert all(torch.equal(before[name], after[name]) for name in before if name not in trainable)
    assert all(not torch.equal(before[name], after[name]) for name in trainable if "lora_B" in name)
    assert any("lora_B" in name for name in trainable) and "head.1.weight" in trainable
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_predictions_are_in_target_units_and_in_the_order_of_time(config, split):
    loaders, model = numbers(outputs=2), Linear(2)
    data = getattr(loaders, split).dataset
    found = predict(model, loaders, split, config())
    assert found.timestamps == [time.isoformat() for time in data.samples["time"]]
    torch.testing.assert_close(found.target, data.targets)
    torch.testing.assert_close(found.prediction, loaders.target_mean.expand(len(data), 2))  # a head of zeros
    model.head.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    expected = data.ts.mean((2, 3, 4)) * loaders.target_std + loaders.target_mean
    torch.testing.assert_close(predict(model, loaders, split, config()).prediction, expected)


def test_the_floor_and_the_table_of_metrics(config):
    loaders, cfg = numbers(), config(**{"target.event_threshold": 400.0, "target.metrics": ["rmse", "mae"]})
    floor = reference_predictions(loaders, "test", cfg)["mean of training"]
    assert floor.timestamps == [time.isoformat() for time in loaders.test.dataset.samples["time"]]
    model = Linear()
    fit(model, loaders, config(**{"training.epochs": 20}))
    table = metrics_table({"mean": floor, "line": predict(model, loaders, "test", cfg)}, cfg)
    assert list(table.index) == ["mean", "line"] and list(table.columns) == ["rmse", "mae", "tss", "hss"]
    expected = (floor.prediction - floor.target).square().mean().sqrt().item()
    assert table.loc["mean", "rmse"] == pytest.approx(expected)
    assert table.loc["line", "rmse"] < 0.2 * expected and table.loc["line", "tss"] > 0.5 > abs(table.loc["mean", "tss"])


def test_predictions_survive_a_csv(config, tmp_path):
    found = predict(Linear(2), numbers(outputs=2), "test", config())
    found.table().to_csv(tmp_path / "predictions.csv", index=False)
    again = Predictions.from_table(pd.read_csv(tmp_path / "predictions.csv"))
    (
        torch.testing.assert_close(again.target, found.target),
        torch.testing.assert_close(again.prediction, found.prediction),
    )
    assert again.timestamps == found.timestamps
