"""What a kind of target changes: units of learning, losses, what is kept; and 2D models trained in the common loop."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from frame_files import write_index, write_netcdf
from small_training import collected
from torch.nn import functional as F

from helpers.config import ConfigError, load_config
from helpers.data.dataset import make_loaders
from helpers.data.frames import prepare_store
from helpers.model.checkpoint import load_filtered
from helpers.model.encoder import SuryaEncoder
from helpers.model.heads import (
    LinearBaseline1D,
    LinearBaseline2D,
    Specformer1D,
    Specformer2D,
    linear_baseline,
    specformer,
)
from helpers.model.lora import apply_lora
from helpers.training.loop import fit, predict, standardise_features
from helpers.training.references import reference_predictions
from helpers.training.tasks import LOSSES, ImagePredictions, bce_dice, make_task, metrics_table

ROOT = Path(__file__).parents[1]
HOURS = pd.date_range("2014-01-07", periods=30, freq="1h")
SMALL = {
    "data.native_size": 64,
    "data.reduce": 2,
    "data.build_workers": 1,
    "model.patch_size": 8,
    "model.embed_dim": 16,
    "model.depth": 2,
    "model.n_spectral_blocks": 1,
    "model.num_heads": 2,
    "model.weights": None,
    "split.train": ["2014-01-07 00:00", "2014-01-07 14:00"],
    "split.val": ["2014-01-07 18:00", "2014-01-07 22:00"],
    "split.test": ["2014-01-08 02:00", "2014-01-08 06:00"],
    "split.guard_hours": 0,
    "training.batch_size": 4,
    "training.epochs": 2,
    "tracking.wandb": "disabled",
    "paths.reserve_gb": 0,
}


@pytest.fixture(scope="module")
def sun(tmp_path_factory):
    """Thirty hourly frames of 64 pixels and a mask for each: the brighter quarter, wandering with the hour."""
    folder = tmp_path_factory.mktemp("sun")
    write_index(folder, HOURS, side=64)
    rows = []
    for k, time in enumerate(HOURS):
        mask = np.zeros((64, 64), np.float32)
        mask[k // 2 * 2 : k // 2 * 2 + 16, 8:40] = 1
        write_netcdf(folder / f"masks/{k}.nc", {"active_region": mask})
        rows.append({"timestamp": time, "path": f"masks/{k}.nc"})
    pd.DataFrame(rows).to_csv(folder / "masks.csv", index=False)
    pd.DataFrame({"timestamp": HOURS, "goes_class": [f"C{1 + k % 9}" for k in range(30)]}).to_csv(
        folder / "flares.csv", index=False
    )
    return folder


@pytest.fixture
def config(sun, tmp_path):
    (tmp_path / "config.yaml").write_text((ROOT / "config.yaml").read_text())
    places = {"data.archive": str(sun), "data.store": f"{sun}/frames", "paths.labels": str(sun)}
    places |= {"synthetic.folder": None, "paths.runs": str(tmp_path / "runs")}

    def make(task: str, **overrides):
        cfg = load_config(tmp_path / "config.yaml", SMALL | places | overrides, task=task)
        prepare_store(cfg, progress=False)
        return cfg

    return make


def build(cfg, kind):
    torch.manual_seed(0)
    return linear_baseline(cfg) if kind == "baseline" else specformer(SuryaEncoder(**cfg.encoder_arguments()), cfg)


# ---------------------------------------------------------------------------------------------------- losses
def test_bce_dice_is_its_formula_and_prefers_the_truth():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 1, 8, 8, generator=generator)
    target = (torch.rand(3, 1, 8, 8, generator=generator) < 0.1).float()
    weight = math.sqrt(0.9 / 0.1)
    p = logits.sigmoid()
    cross = -(weight * target * p.log() + (1 - target) * (1 - p).log()).mean()
    dice = [(2 * (q * t).sum() + 1) / (q.sum() + t.sum() + 1) for q, t in zip(p, target, strict=True)]
    expected = cross + 1 - sum(dice) / 3
    assert bce_dice(logits, target, 0.1).item() == pytest.approx(expected.item(), rel=1e-5)
    right, wrong = (bce_dice(20 * s * (target - 0.5), target, 0.1).item() for s in (1, -1))
    assert right < 0.01 < 1.5 < wrong


def test_rare_pixels_weigh_more_the_rarer_they_are():
    """The gradient of a missed pixel inside, against that of a false one outside, grows with the imbalance."""

    def ratio(share):
        logits = torch.zeros(1, 1, 2, 2, requires_grad=True)
        bce_dice(logits, torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]]), share).backward()
        return (logits.grad[0, 0, 0, 0] / logits.grad[0, 0, 1, 1]).abs().item()

    assert ratio(0.01) > 2 * ratio(0.1) > 2 * ratio(0.5)


# ---------------------------------------------------------------------------------------------------- units
def test_an_output_of_zero_means_the_mean_of_the_training_targets(config):
    for task in ("flare", "active_region"):
        cfg = config(task)
        loaders = make_loaders(cfg)
        target = next(iter(loaders.val))["target"]
        said = make_task(cfg, loaders).to_units(torch.zeros_like(target))
        torch.testing.assert_close(said, loaders.target_mean.mean().expand_as(said))
    share = 16 * 32 / 64**2
    assert loaders.target_mean.mean().item() == pytest.approx(share, abs=1e-3) and loaders.target_span == 1


def test_images_are_learned_and_judged_in_normalised_values(config):
    cfg = config("translation")
    loaders = make_loaders(cfg)
    batch = next(iter(loaders.val))
    output = torch.randn(batch["target"].shape, generator=torch.Generator().manual_seed(0))
    task = make_task(cfg, loaders)
    assert torch.equal(task.to_units(output), output)
    expected = F.smooth_l1_loss(output, batch["target"])
    assert task.loss(output, batch["target"]).item() == pytest.approx(expected.item(), rel=1e-6)


def test_masks_that_are_all_outside_are_refused(config, tmp_path):
    rows = []
    for k, time in enumerate(HOURS):
        write_netcdf(tmp_path / f"masks/{k}.nc", {"active_region": np.zeros((64, 64), np.float32)})
        rows.append({"timestamp": time, "path": f"masks/{k}.nc"})
    pd.DataFrame(rows).to_csv(tmp_path / "masks.csv", index=False)
    cfg = config("active_region", **{"labels.path": str(tmp_path / "masks.csv")})
    with pytest.raises(ValueError, match="Every pixel of the training masks is outside"):
        fit(build(cfg, "baseline"), make_loaders(cfg), cfg)


def test_masks_must_be_masks(config, tmp_path):
    write_netcdf(tmp_path / "field.nc", {"active_region": np.full((64, 64), 300, np.float32)})
    pd.DataFrame({"timestamp": HOURS, "path": "field.nc"}).to_csv(tmp_path / "masks.csv", index=False)
    with pytest.raises(ValueError, match="holds values from 300 to 300, but a mask is 0 outside and 1 inside"):
        make_loaders(config("active_region", **{"labels.path": str(tmp_path / "masks.csv")}))


# ---------------------------------------------------------------------------------------------------- models
@pytest.mark.parametrize(
    ("task", "baseline", "deep"),
    [
        ("flare", LinearBaseline1D, Specformer1D),
        ("active_region", LinearBaseline2D, Specformer2D),
        ("translation", LinearBaseline2D, Specformer2D),
        ("forecast", LinearBaseline2D, Specformer2D),
    ],
)
def test_the_kind_of_target_chooses_the_variant_and_both_train(config, task, baseline, deep):
    cfg = config(task, **{"training.lr": 0.01})
    loaders = make_loaders(cfg)
    for kind, expected in (("baseline", baseline), ("finetune", deep)):
        model = build(cfg, kind)
        assert type(model) is expected
        if kind == "finetune":
            apply_lora(model, rank=2, alpha=4)
        standardise_features(model, loaders, cfg)
        history = fit(model, loaders, cfg)
        assert history.table["train_loss"].iloc[-1] < history.table["train_loss"].iloc[1]
        found = predict(model, loaders, "test", cfg)
        assert set(cfg.target.metrics) <= set(found.metrics(cfg))
        assert found.timestamps == [time.isoformat() for time in loaders.test.dataset.samples["time"]]


@pytest.mark.parametrize("pooling", [1, 2, 4])
@pytest.mark.parametrize("task", ["active_region", "translation", "forecast"])
def test_targets_of_lower_resolution_and_batches_of_one(config, task, pooling):
    cfg = config(task, **{"labels.reduce": pooling, "training.batch_size": 1, "training.epochs": 1})
    loaders = make_loaders(cfg)
    outputs = {"forecast": 13}.get(task, 1)
    side = 32 // pooling
    assert next(iter(loaders.val))["target"].shape == (1, outputs, side, side)
    for kind in ("baseline", "finetune"):
        model = build(cfg, kind)
        assert model(next(iter(loaders.val))).shape == (1, outputs, side, side)
        fit(model, loaders, cfg)


def test_a_lower_resolution_averages_physical_values(config):
    from helpers.channels import denormalise, load_scalers

    scaler = load_scalers()["hmi_m"]
    fine, coarse = (make_loaders(config("translation", **{"labels.reduce": n})).val.dataset for n in (1, 4))
    averaged = F.avg_pool2d(denormalise(fine.target(0), scaler), 4)
    torch.testing.assert_close(denormalise(coarse.target(0), scaler), averaged, rtol=1e-3, atol=0.05)


# ---------------------------------------------------------------------------------------------------- what is kept
def test_metrics_of_images_pool_all_pixels_and_scores_are_of_each(config):
    cfg = config("active_region")
    loaders = make_loaders(cfg)
    truth = torch.stack([loaders.test.dataset.target(k) for k in range(3)])
    said = truth.clone()
    said[2] = 0  # misses all of the last
    ts = torch.zeros(3, 13, 2, 32, 32)
    batches = [(said[:2], truth[:2], {"timestamp": ["a", "b"], "ts": ts[:2]})]
    batches += [(said[2:], truth[2:], {"timestamp": ["c"], "ts": ts[2:]})]
    found = collected(make_task(cfg, loaders), batches, 3)
    inside = truth.sum((1, 2, 3))
    assert found.values["iou"] == pytest.approx((inside[:2].sum() / inside.sum()).item())
    assert found.timestamps == ["a", "b", "c"] and found.scores["iou"].tolist() == [1, 1, 0]
    assert [example["timestamp"] for example in found.examples] == ["a", "b", "c"]
    assert torch.equal(found.examples[2]["target"], truth[2])
    again = ImagePredictions.from_table(found.table())
    assert again.same_samples(found) and not again.same_samples(ImagePredictions({}, found.scores.iloc[1:]))
    quick = collected(make_task(cfg, loaders), [(said, truth, {"timestamp": ["a", "b", "c"]})])
    assert quick.values == pytest.approx(found.values)


def test_outputs_that_mean_something_else_are_given_to_no_loss(config, monkeypatch):
    class Three(torch.nn.Module):
        def forward(self, batch):
            return torch.full_like(batch["target"], 3)

    cfg = config("forecast")
    monkeypatch.setitem(LOSSES, cfg.target.loss, None)
    found = predict(Three(), loaders := make_loaders(cfg), "test", cfg, to_units=lambda output: output - 1)
    assert len(found.timestamps) == loaders.sizes["test"] and (found.examples[0]["prediction"] == 2).all()


def test_what_is_to_beat_without_a_model(config):
    cfg = config("forecast")
    loaders = make_loaders(cfg)
    found = reference_predictions(loaders, "test", cfg)
    assert list(found) == ["mean of training", "persistence"]
    data = loaders.test.dataset
    truth = torch.stack([data[k]["target"] for k in range(len(data))])
    now = torch.stack([data[k]["ts"][:, -1] for k in range(len(data))])
    table = metrics_table(found, cfg)
    assert table.loc["persistence", "rmse"] == pytest.approx(F.mse_loss(now, truth).sqrt().item(), rel=1e-5)
    mean = F.mse_loss(loaders.target_mean.expand_as(truth), truth).sqrt().item()
    assert table.loc["mean of training", "rmse"] == pytest.approx(mean, rel=1e-5)
    same_time = reference_predictions(make_loaders(config("translation")), "test", config("translation"))
    assert list(same_time) == ["mean of training"]  # the channel itself at the same time would be the answer


# ---------------------------------------------------------------------------------------------------- Surya's decoder
def test_zero_shot_forecast_of_the_tiny_checkpoint_on_a_sun_it_has_never_seen(tmp_path):
    """As the task `forecast` sets it up, without a step of training: better than persistence and the mean frame."""
    from helpers.data.synthetic import ensure_synthetic

    (tmp_path / "config.yaml").write_text((ROOT / "config.yaml").read_text())
    overrides = {
        "synthetic.folder": str(tmp_path / "sun"),
        "synthetic.seed": 77,
        "synthetic.visits": 12,
        "synthetic.workers": 1,
        "data.build_workers": 1,
        "paths.reserve_gb": 0,
        "split.train": ["2014-01-01", "2014-01-10"],
        "split.val": ["2014-01-12", "2014-01-14"],
        "split.test": ["2014-01-16", "2014-01-24"],
    }
    cfg = load_config(tmp_path / "config.yaml", overrides, task="forecast")
    ensure_synthetic(cfg)
    prepare_store(cfg, progress=False)
    loaders = make_loaders(cfg)
    model = specformer(SuryaEncoder(**cfg.encoder_arguments()), cfg)
    report = load_filtered(model, ROOT / "helpers/data/surya.tiny.pt", cfg.data.channels)
    assert report.parameters_loaded == report.parameters_total
    table = metrics_table(
        reference_predictions(loaders, "test", cfg) | {"Surya": predict(model, loaders, "test", cfg)}, cfg
    )
    assert table.loc["Surya", "rmse"] < table.loc["persistence", "rmse"] < table.loc["mean of training", "rmse"], table


# ---------------------------------------------------------------------------------------------------- one's own
def test_a_loss_metric_and_figure_of_ones_own_are_found_by_name(config, tmp_path, monkeypatch):
    (tmp_path / "my_task_for_a_test.py").write_text(
        "from torchmetrics import MeanAbsoluteError\n"
        "from helpers.training.metrics import ImageMetric\n"
        "def absolute(output, target):\n    return (output - target).abs().mean() * 7\n"
        "worst = ImageMetric(higher_is_better=False, make=lambda mask, span: MeanAbsoluteError())\n"
        "def draw(found, cfg):\n    return 'drawn'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    mine = "my_task_for_a_test:"
    own = {"target.loss": f"{mine}absolute", "target.metrics": [f"{mine}worst", "rmse"], "target.plot": f"{mine}draw"}
    cfg = config("translation", **own)
    loaders = make_loaders(cfg)
    batch = next(iter(loaders.val))
    zeros = torch.zeros_like(batch["target"])
    expected = 7 * (zeros - batch["target"]).abs().mean()
    assert make_task(cfg, loaders).loss(zeros, batch["target"]).item() == pytest.approx(expected.item())
    history = fit(build(cfg, "baseline"), loaders, cfg)
    assert f"val_{mine}worst" in history.table
    from helpers.analysis.plots import plot_predictions

    assert plot_predictions({}, cfg) == "drawn"
    with pytest.raises(ConfigError, match="my_task_for_a_test:absolute must be .* of metrics .* ImageMetric"):
        config("translation", **{"target.metrics": [f"{mine}absolute"]})
    with pytest.raises(ConfigError, match="my_task_for_a_test:nothing cannot be imported: .*no attribute 'nothing'"):
        config("translation", **{"target.loss": f"{mine}nothing"})
