"""The main job on real input, by config values alone: another label, another unit, real gaps, a real image.

* labels: the solar-wind speed V (km/s) of tests/data/solar_wind_val_excerpt.csv, with its gap of 16 hours;
* times: the hourly rows of the public bucket's validation index, of which 9 are not present;
* frames: AIA 171 of 2011-02-15 that sunpy ships, and the magnetogram of the synthetic Sun at the same hours.

The label file covers September to December and the index January, so the labels are moved by 51 days to meet it.
"""

import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from astropy.io import fits
from frame_files import write_netcdf
from matplotlib import pyplot as plt
from sunpy.data.test import get_test_filepath

from helpers.channels import CHANNELS, load_scalers, normalise
from helpers.config import load_config
from helpers.data.dataset import make_loaders
from helpers.data.frames import prepare_store
from helpers.data.synthetic import SyntheticSun, ensure_synthetic
from helpers.model.checkpoint import load_filtered
from helpers.model.encoder import SuryaEncoder
from helpers.model.heads import Specformer1D
from helpers.model.lora import apply_lora
from helpers.shared import find_weights
from helpers.training.loop import fit, predict, seed_everything
from helpers.training.tracking import list_runs

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"

OWN = """
task: wind_speed
synthetic: {folder: null}                    # all data is real
tracking: {wandb: disabled}
paths: {reserve_gb: 0.0}
data:
  archive: real
  index: real/index.csv
  store: real/frames
  native_size: 128
  reduce: 4
  channels: [hmi_m, aia171]
split:
  train: [2011-01-26, 2011-01-27 15:00]
  val: [2011-01-28 00:00, 2011-01-28 12:00]
  test: [2011-01-28 14:00, 2011-01-29]
  guard_hours: 0.5
tasks:
  wind_speed:
    labels: {path: real/wind.csv, time_column: Epoch, value_columns: [V]}
    target: {name: solar-wind speed, unit: km/s, event_threshold: 400.0}
experiments:
  baseline: {training: {epochs: 2}}
  finetune: {training: {epochs: 2}}
training: {batch_size: 4}
"""


pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("real_input")]  # the fixtures train


@pytest.fixture(scope="module")
def image():
    """Real AIA 171, (128, 128) float32 in DN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the header of the file has a harmless mistake
        return fits.getdata(get_test_filepath("aia_171_level1.fits")).astype(np.float32)


@pytest.fixture(scope="module")
def course(tmp_path_factory, image):
    """A checkout with the real data in `real/` and what a person writes into config.local.yaml."""
    folder = tmp_path_factory.mktemp("course")
    (folder / "config.yaml").write_text((ROOT / "config.yaml").read_text())
    (folder / "config.local.yaml").write_text(OWN)
    for name in ("helpers", "notebooks"):
        (folder / name).symlink_to(ROOT / name)
    index = pd.read_csv(DATA / "surya_aws_s3_val_hourly_excerpt.csv")
    index["path"] = index["path"].str.removeprefix("s3://nasa-surya-bench/")  # beside the index
    sun, start = SyntheticSun(0, 100), pd.Timestamp(index["timestep"][0])
    for row in index[index["present"] == 1].itertuples():
        hour = (pd.Timestamp(row.timestep) - start).total_seconds() / 3600
        magnetogram = sun.frame(hour, 128)[CHANNELS.index("hmi_m")]
        write_netcdf(folder / "real" / row.path, {"aia171": image, "hmi_m": magnetogram})
    index.to_csv(folder / "real" / "index.csv", index=False)
    wind = pd.read_csv(DATA / "solar_wind_val_excerpt.csv", parse_dates=["Epoch"])
    wind["Epoch"] += pd.Timedelta(days=51)
    wind.to_csv(folder / "real" / "wind.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def finetune(course):
    """The whole job once: (cfg, build report, loaders, load report, history, predictions)."""
    cfg = load_config(course / "config.yaml", experiment="finetune")
    seed_everything(cfg)
    assert ensure_synthetic(cfg) is None
    built = prepare_store(cfg, progress=False)
    loaders = make_loaders(cfg)
    model = Specformer1D(SuryaEncoder(**cfg.encoder_arguments()), pooling=cfg.head.pooling)
    loaded = load_filtered(
        model, find_weights(cfg.initial_weights, cfg.shared), cfg.data.channels, cfg.model.weights_channels
    )
    apply_lora(model, cfg.lora.rank, cfg.lora.alpha, cfg.lora.dropout, cfg.lora.targets, cfg.lora.qkv)
    model.fit_features(loaders.train)
    history = fit(model, loaders, cfg)
    return cfg, built, loaders, loaded, history, predict(model, loaders, "test", cfg)


def test_the_store_takes_the_frames_that_are_present(finetune):
    _, built, *_ = finetune
    assert built.built == 48 and not built.unreadable


def test_real_gaps_are_counted_with_their_reason(finetune):
    _, _, loaders, *_ = finetune
    assert loaders.sizes == {"train": 24, "val": 11, "test": 10}
    train, val, _ = loaders.report.splitlines()[:3]
    assert train.startswith("train: 24 samples; dropped 1 without a frame")
    assert val.startswith("val: 11 samples; dropped 1 without a frame")
    assert "45 of 56 belong to a sample" in loaders.report


def test_inputs_are_the_real_image_and_targets_are_speeds(finetune, image):
    _, _, loaders, *_ = finetune
    item = loaders.test.dataset[0]
    assert item["ts"].shape == (2, 2, 32, 32) and item["timestamp"] == "2011-01-28T14:00:00"
    pooled = normalise(image.reshape(32, 4, 32, 4).mean((1, 3)), load_scalers()["aia171"])
    np.testing.assert_allclose(item["ts"][1, 1].numpy(), pooled, atol=5e-3)  # channels in the configured order
    assert np.abs(pooled).max() < 6  # real values suit the released scalers
    labels = pd.read_csv(DATA / "solar_wind_val_excerpt.csv", index_col="Epoch")["V"]
    assert item["target"].tolist() == [labels["2010-12-08 14:00:00"]]
    assert 270 < loaders.target_mean.item() < 350 and 10 < loaders.target_std.item() < 40  # km/s


def test_the_checkpoint_is_cut_to_channels_and_grid_by_name(finetune):
    cfg, _, _, loaded, *_ = finetune
    state = torch.load(find_weights(cfg.initial_weights, cfg.shared), weights_only=True)
    assert not loaded.missing and any("complex_weight" in key for key in loaded.adapted)
    encoder = SuryaEncoder(**cfg.encoder_arguments())
    load_filtered(encoder, state, cfg.data.channels, cfg.model.weights_channels)
    planes = [CHANNELS.index(name) * 2 + t for name in ("hmi_m", "aia171") for t in (0, 1)]
    expected = state["embedding.patch_embed.proj.weight"][:, planes]
    assert torch.equal(encoder.embedding.patch_embed.proj.weight, expected)


def test_it_trains_and_predicts_speeds(finetune):
    cfg, _, loaders, _, history, found = finetune
    table = history.table
    assert list(table.index) == [0, 1, 2] and np.isfinite(table["train_loss"][1:]).all()
    assert np.isfinite(table.drop(columns=["train_loss", "val_tss", "val_hss"]).to_numpy()).all()
    assert table["val_tss"].isna().all()  # that night had no wind of 400 km/s: said, and no harm
    assert found.timestamps == [f"2011-01-28T{hour}:00:00" for hour in range(14, 24)]
    assert ((found.prediction > 200) & (found.prediction < 600)).all()  # km/s
    assert found.prediction.std() > 0  # not one number for every frame
    scores = found.metrics(cfg)
    assert np.isfinite(list(scores.values())).all() and {"rmse", "r2", "tss", "hss"} <= set(scores)
    assert scores["rmse"] == pytest.approx((found.prediction - found.target).square().mean().sqrt().item(), rel=1e-5)


def test_a_label_file_that_does_not_meet_the_frames_is_explained(course):
    """Without moving the labels no image has one: the error says what there is and where to look."""
    (course / "real" / "unmoved.csv").write_text((DATA / "solar_wind_val_excerpt.csv").read_text())
    cfg = load_config(course / "config.yaml", {"labels.path": "real/unmoved.csv"})
    with pytest.raises(ValueError, match=r"(?s)no frame for any sample.*train: 0 samples.*0 of 56 belong to a sample"):
        prepare_store(cfg, progress=False)


@pytest.mark.notebook
def test_the_notebook_runs_on_it_as_it_is(course, monkeypatch, capsys):
    """Every code cell, unchanged, in the folder of the course."""
    monkeypatch.chdir(course)
    cells = json.loads((ROOT / "notebooks" / "finetune.ipynb").read_text(encoding="utf-8"))["cells"]
    names = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "finetune.ipynb", "exec"), names)
    plt.close("all")
    said = capsys.readouterr().out
    assert "finetune of task wind_speed on profile tiny" in said
    runs = list_runs(course / "runs", experiment="finetune")
    assert len(runs) == 1 and 0 < runs["test_rmse"][0] < 300
    predictions = pd.read_csv(runs["folder"][0] / "predictions_test.csv")
    assert len(predictions) == 10 and predictions["target_0"].between(300, 450).all()
