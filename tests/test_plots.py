"""Figures with what a reader needs on them."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from small_training import collected

from helpers.analysis import plots
from helpers.analysis.diagnostics import trace_shapes
from helpers.channels import CHANNELS, denormalise
from helpers.config import load_config
from helpers.data.labels import num_outputs
from helpers.model.encoder import SuryaEncoder
from helpers.model.heads import LinearBaseline1D, LinearBaseline2D, Specformer1D, Specformer2D
from helpers.training.loop import History
from helpers.training.tasks import ImagePredictions, Predictions, make_task

ROOT = Path(__file__).parents[1]
TIMES = pd.date_range("2014-01-01", periods=20, freq="6h")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def cfg(tmp_path):
    (tmp_path / "config.yaml").write_text((ROOT / "config.yaml").read_text())
    wind = {"target.name": "solar-wind speed", "target.unit": "km/s", "target.event_threshold": 500.0}
    return load_config(tmp_path / "config.yaml", wind | {"target.metrics": ["mae", "rmse"]})


@pytest.fixture
def found():
    """Predictions of two models of the same 20 times, in km/s."""
    generator = torch.Generator().manual_seed(0)
    truth = 400 + 90 * torch.randn(20, 2, generator=generator)
    times = [time.isoformat() for time in TIMES]
    return {
        name: Predictions(truth + error * torch.randn(20, 2, generator=generator), truth, times)
        for name, error in (("baseline", 60), ("finetune", 20))
    }


def drawn(figure) -> None:
    """Draw it: warnings are errors, so labels that do not fit or glyphs that are missing fail here."""
    figure.canvas.draw()


@pytest.mark.parametrize("channels", [["aia171"], ["hmi_v", "aia94", "hmi_m"], CHANNELS])
def test_channels_are_labelled_with_their_unit_and_drawn_with_the_north_up(channels):
    image = np.random.default_rng(0).normal(100, 30, (len(channels), 8, 8)).astype(np.float32)
    image[0, :4] += 1000  # the south, row 0, is bright
    figure = plots.plot_channels(torch.from_numpy(image), channels, "one frame")
    drawn(figure)
    panels = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title().split(" [")[0] for axis in panels] == list(channels)
    units = {"aia171": "DN", "hmi_v": "m/s", "aia94": "DN"}
    assert panels[0].get_title().endswith(f"[{units[channels[0]]}]") and figure.get_suptitle() == "one frame"
    shown = panels[0].images[0]
    assert shown.origin == "lower" and shown.get_array()[0].mean() > shown.get_array()[-1].mean()


def test_signed_channels_are_symmetric_and_intensities_are_stretched():
    figure, (signed, bright, empty) = plt.subplots(1, 3)
    values = np.linspace(-50, 400, 64).reshape(8, 8)
    plots.show_channel(signed, values, "hmi_m")
    low, high = signed.images[0].get_clim()
    assert low == -high and high > 300
    plots.show_channel(bright, values, "aia171")
    assert bright.images[0].get_clim()[0] == 0 and bright.images[0].get_array().max() == pytest.approx(20, rel=0.02)
    plots.show_channel(empty, np.zeros((8, 8)), "hmi_bx")  # a dark frame has no range
    drawn(figure)


def test_labels_are_shown_by_split_with_the_threshold(cfg, found):
    values = found["baseline"].target
    targets = {
        name: pd.DataFrame(values[part].numpy(), TIMES[part])
        for name, part in {"train": slice(0, 12), "val": slice(12, 16), "test": slice(16, 20)}.items()
    }
    figure = plots.plot_labels(targets, cfg)
    drawn(figure)
    line, histogram = figure.axes
    assert line.get_ylabel() == "solar-wind speed [km/s]" and histogram.get_xlabel() == "density"
    legend = [text.get_text() for text in line.get_legend().get_texts()]
    assert legend == ["train (12)", "val (4)", "test (4)", "event threshold"]
    assert [len(points.get_xdata()) for points in line.lines] == [12, 4, 4, 2]
    np.testing.assert_allclose(line.lines[1].get_ydata(), values[12:16, 0])
    assert list(line.lines[3].get_ydata()) == [500, 500]


def test_history_shows_losses_and_the_choosing_metric(cfg):
    rows = [
        {"epoch": i, "lr": 0.1 / (i + 1), "train_loss": 1 / (i + 0.5), "val_loss": 1 / (i + 1)}
        | {"val_mae": 50.0 - i, "val_rmse": 60.0 - i, "seconds": 1.0}
        for i in range(6)
    ]
    figure = plots.plot_history(History(rows, best_epoch=4), cfg)
    drawn(figure)
    loss, metric = figure.axes
    assert loss.get_yscale() == "log" and "mse, standardised" in loss.get_ylabel()
    assert metric.get_ylabel() == "validation mae"
    assert [axis.get_xlabel() for axis in figure.axes] == ["epoch"] * 2
    np.testing.assert_allclose(metric.lines[0].get_ydata(), [50, 49, 48, 47, 46, 45])
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["train", "validation", "kept: epoch 4"]
    assert list(metric.lines[1].get_xdata()) == [4, 4]


def test_predicted_against_true_has_one_panel_each_and_the_perfect_line(cfg, found):
    figure = plots.plot_predictions(found, cfg)
    drawn(figure)
    assert len(figure.axes) == 2
    for axis, (name, p) in zip(figure.axes, found.items(), strict=True):
        points = axis.collections[0].get_offsets()
        np.testing.assert_allclose(points, torch.stack([p.target[:, 0], p.prediction[:, 0]], 1))
        np.testing.assert_allclose(axis.lines[0].get_xdata(), axis.lines[0].get_ydata())
        assert axis.get_xlabel() == "true solar-wind speed [km/s]" and axis.get_aspect() == 1
        assert axis.get_title().startswith(f"{name}: mae {p.metrics(cfg)['mae']:.2f}, rmse ")
    assert figure.axes[0].get_ylabel() == "predicted solar-wind speed [km/s]"


@pytest.mark.parametrize("transform", ["log10", "none"])
def test_a_spectrum_is_drawn_in_physical_values_with_its_error_over_all_samples(cfg, found, transform, tmp_path):
    names = {"target.name": "log10 irradiance", "target.unit": "log10 W/m^2/nm", "target.event_threshold": None}
    many = {"labels.value_columns": [f"b{k}" for k in range(30)], "labels.transform": transform}
    plot = {"target.plot": "spectrum", "target.metrics": ["mape", "rmse"]}
    cfg = load_config(tmp_path / "config.yaml", names | many | plot)
    generator = torch.Generator().manual_seed(0)
    truth = -4 + torch.randn(21, 30, generator=generator)
    for p, error in zip(found.values(), (0.3, 0.1), strict=True):
        p.target, p.prediction = truth, truth + error * torch.randn(21, 30, generator=generator)
        p.timestamps = [time.isoformat() for time in pd.date_range("2014-01-01", periods=21, freq="6h")]
    figure = plots.plot_predictions(found, cfg)
    drawn(figure)
    samples, errors = figure.axes[:2], figure.axes[2:]
    for sample, wrong, (name, p) in zip(samples, errors, found.items(), strict=True):
        said, true = (v.double().numpy() for v in (p.prediction, p.target))
        if transform == "log10":
            said, true = 10**said, 10**true
        for line, values in zip(sample.lines, (true, said), strict=True):
            np.testing.assert_allclose(line.get_ydata(), values[10])
            np.testing.assert_array_equal(line.get_xdata(), np.arange(30))
        low, middle, high = np.percentile((said - true) / true.mean(axis=0) * 100, (16, 50, 84), axis=0)
        np.testing.assert_allclose(wrong.lines[0].get_ydata(), middle)
        edges = wrong.collections[0].get_paths()[0].vertices
        for k in range(30):
            here = edges[edges[:, 0] == k, 1]
            assert (here.min(), here.max()) == pytest.approx((low[k], high[k]))
        assert sample.get_title() == f"{name}: " + ", ".join(f"{k} {v:.2f}" for k, v in p.metrics(cfg).items())
        assert sample.get_yscale() == ("log" if transform == "log10" else "linear") and wrong.get_xlabel() == "bin"
        assert [text.get_text() for text in sample.get_legend().get_texts()] == [
            "truth, 2014-01-03T12:00",
            "prediction",
        ]
    label = "irradiance [W/m^2/nm]" if transform == "log10" else "log10 irradiance [log10 W/m^2/nm]"
    assert samples[0].get_ylabel() == label and errors[0].get_ylabel() == "error [% of the mean truth]"


def test_a_sample_of_many_numbers_shows_the_first_of_them(cfg):
    sample = {"target": torch.arange(1343.0), "timestamp": TIMES[0].isoformat()}
    figure = plots.plot_sample(torch.rand(len(cfg.data.channels), 16, 16), sample, cfg)
    assert "to predict: 0, 1, 2, 3, ... (solar-wind speed" in figure.get_suptitle()


def test_series_have_the_truth_and_one_line_a_model(cfg, found):
    figure = plots.plot_prediction_series(found, cfg)
    drawn(figure)
    (axis,) = figure.axes
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["truth", "baseline", "finetune"]
    np.testing.assert_allclose(axis.lines[0].get_ydata(), found["baseline"].target[:, 0])
    np.testing.assert_allclose(axis.lines[2].get_ydata(), found["finetune"].prediction[:, 0])
    assert axis.get_ylabel() == "solar-wind speed [km/s]"


# ---------------------------------------------------------------------------------------------------- diagnostics
def batch(samples: int = 3) -> dict:
    generator = torch.Generator().manual_seed(0)
    return {"ts": torch.randn(samples, 2, 2, 16, 16, generator=generator), "timestamp": ["t"] * samples}


def test_the_way_through_a_model_is_measured_not_assumed():
    settings = dict(patch_size=4, in_chans=2, time_dim=2, embed_dim=16, depth=3, n_spectral_blocks=1, num_heads=2)
    table = trace_shapes(Specformer2D(SuryaEncoder(img_size=16, **settings), 3, upscale=2), batch())
    assert table.loc["pixels", "shape"] == (3, 2, 2, 16, 16) and table.loc["tokens", "shape"] == (3, 16, 16)
    assert table.loc["decoder", "shape"] == table.loc["output", "shape"] == (3, 3, 8, 8)
    assert "(gy 4) (gx 4) -> b (gy gx) (c t 4 4)" in table.loc["patches", "how"] and "2 blocks" in table["how"].iloc[4]
    assert "(c 2 2) -> b c (gy 2) (gx 2)" in table.loc["decoder", "how"]
    whole = SuryaEncoder(img_size=16, nglo=1, **settings)
    table = trace_shapes(Specformer1D(whole, 4, pooling="class_token").train(), batch())
    assert table.loc["attention blocks", "shape"] == (3, 17, 16)  # the class token came in
    assert table.loc["class_token pooling", "shape"] == (3, 16) and table.loc["output", "shape"] == (3, 4)
    assert trace_shapes(LinearBaseline1D(2, 1, 2), batch()).loc["features", "shape"] == (3, 4)
    assert trace_shapes(LinearBaseline2D(2, 1, 2), batch()).loc["features", "shape"] == (3, 16, 16, 4)
    assert not any(module._forward_hooks for module in whole.modules())


# ---------------------------------------------------------------------------------------------------- masks and images
def image_task(tmp_path, task: str):
    (tmp_path / "config.yaml").write_text((ROOT / "config.yaml").read_text())
    return load_config(tmp_path / "config.yaml", task=task)


def image_predictions(cfg, size: int = 32) -> ImagePredictions:
    """Three examples whose truth is a square and whose prediction lies two pixels beside it."""
    truth, said = (torch.zeros(num_outputs(cfg), size, size) for _ in range(2))
    truth[:, 8:16, 8:20], said[:, 10:18, 8:20] = 1, 0.9
    times = [str(k) for k in range(3)]
    ts = torch.randn(1, len(cfg.data.channels), 2, size, size, generator=torch.Generator().manual_seed(0))
    batches = [(said[None], truth[None], {"timestamp": [time], "ts": ts}) for time in times]
    return collected(make_task(cfg, SimpleNamespace(target_span=1.0)), batches, 3)


def test_masks_are_drawn_with_both_outlines_and_what_is_wrong(tmp_path):
    cfg = image_task(tmp_path, "active_region")
    p = image_predictions(cfg)
    figure = plots.plot_predictions({"train": p, "test": p}, cfg)
    drawn(figure)
    panels = [axis for axis in figure.axes if axis.images and axis.get_title()]
    assert len(panels) == len(p.examples) * 4 and figure.get_suptitle().startswith("test: iou 0.60")
    assert len(panels[0].collections) == 2 and "truth cyan, prediction red" in panels[0].get_title()
    error = np.asarray(panels[3].images[0].get_array())
    assert (error == -1).sum() == (error == 1).sum() == 2 * 12  # missed two rows, two too many


def test_images_are_drawn_in_physical_units_with_their_own_colours(tmp_path):
    cfg = image_task(tmp_path, "translation")
    p = image_predictions(cfg)
    figure = plots.plot_predictions({"test": p}, cfg)
    drawn(figure)
    panels = [axis for axis in figure.axes if axis.images and axis.get_title()]
    assert [axis.get_title().split(":")[0] for axis in panels[:3]] == ["input", "truth", "prediction"]
    truth, said = panels[1].images[0], panels[2].images[0]
    assert truth.get_clim() == said.get_clim() and truth.get_cmap().name == "hmimag"
    gauss = float(denormalise(torch.ones(1), cfg.scalers["hmi_m"]))
    assert np.asarray(truth.get_array()).max() == pytest.approx(gauss, rel=1e-5)
    assert panels[3].get_title().endswith(" G")


def test_a_forecast_shows_a_few_channels_of_one_example(tmp_path):
    cfg = image_task(tmp_path, "forecast")
    figure = plots.plot_predictions({"test": image_predictions(cfg)}, cfg)
    drawn(figure)
    titles = [axis.get_title() for axis in figure.axes if axis.get_title().startswith("input")]
    assert titles == ["input: aia94", "input: aia171", "input: hmi_m", "input: hmi_v"]
    assert plots._few(["aia131", "aia193", "aia211", "aia304", "hmi_bx"]) == ["aia131", "aia193", "aia211", "aia304"]


def test_trust_in_numbers_and_masks_is_what_was_true_where_so_much_was_said(cfg, found, tmp_path):
    figure = plots.plot_trust(found, cfg)
    drawn(figure)
    (axis,) = figure.axes
    said, true = axis.lines[0].get_data()
    prediction, target = found["baseline"].prediction[:, 0], found["baseline"].target[:, 0]
    lowest = prediction < prediction.min() + (prediction.max() - prediction.min()) / 6
    assert (said[0], true[0]) == pytest.approx((prediction[lowest].mean().item(), target[lowest].mean().item()))
    mask = image_task(tmp_path, "active_region")
    (axis,) = plots.plot_trust({"val": image_predictions(mask)}, mask).axes
    # of the 96 pixels said at 0.9, 72 are inside
    said, true = axis.lines[0].get_data()
    assert len(said) == 2 and (said[-1], true[-1]) == pytest.approx((0.9, 72 / 96))


def test_the_series_of_images_is_the_first_metric_of_each(tmp_path):
    cfg = image_task(tmp_path, "active_region")
    p = image_predictions(cfg)
    p.scores["timestamp"] = [time.isoformat() for time in TIMES[:3]]
    (axis,) = plots.plot_prediction_series({"baseline": p, "finetune": p}, cfg).axes
    assert axis.get_ylabel() == "iou of each image" and len(axis.lines) == 2
    np.testing.assert_allclose(axis.lines[0].get_ydata(), p.scores["iou"])


@pytest.mark.parametrize(("task", "panels"), [("flare", 13), ("active_region", 14), ("translation", 9)])
def test_a_sample_is_shown_with_what_is_to_be_predicted(tmp_path, task, panels):
    cfg = image_task(tmp_path, task)
    target = torch.tensor([-5.25]) if task == "flare" else torch.rand(1, 16, 16)
    physical = torch.rand(len(cfg.data.channels), 16, 16)
    figure = plots.plot_sample(physical, {"target": target, "timestamp": TIMES[0].isoformat()}, cfg)
    drawn(figure)
    assert len([axis for axis in figure.axes if axis.images]) == panels
    assert ("to predict: -5.25 (log10 X-ray flux" in figure.get_suptitle()) is (task == "flare")
