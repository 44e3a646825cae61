"""Labels, joining, splitting, augmenting, and the batches that come out."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from frame_files import physical_frame, write_index, write_netcdf

from helpers.channels import AUGMENTATION_SIGNS, CHANNELS, load_scalers, normalise, stack_scalers
from helpers.config import load_config
from helpers.data.archive import FrameError, read_index
from helpers.data.dataset import SolarDataset, make_loaders, read_mask
from helpers.data.frames import build_store, open_store, prepare_store
from helpers.data.labels import FrameTarget, Labels, Matching, check_splits, join, load_labels

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"
SCALERS = load_scalers()
HOURS = pd.date_range("2014-01-07", periods=24, freq="1h")


@pytest.fixture(scope="module")
def sun(tmp_path_factory):
    """A folder with 24 hourly frames of 32 pixels (one missing), their store pooled by 2, and hourly labels."""
    folder = tmp_path_factory.mktemp("sun")
    write_index(folder, HOURS, present=[int(hour != 5) for hour in range(24)])
    build_store(folder / "index.csv", folder / "store.zarr", pooling=2, progress=False)
    pd.DataFrame({"timestamp": HOURS, "value": np.arange(24.0)}).to_csv(folder / "labels.csv", index=False)
    return folder


@pytest.fixture
def store(sun):
    return open_store(sun / "store.zarr")


def labels_at(times, values=None) -> Labels:
    times = pd.DatetimeIndex(times).to_numpy().astype("datetime64[s]")
    values = np.arange(len(times), dtype=float) if values is None else np.asarray(values, float)
    return Labels(times, values[:, None])


def read(tmp_path, text: str, **arguments) -> Labels:
    (tmp_path / "labels.csv").write_text(text)
    return load_labels(tmp_path / "labels.csv", **{"time_column": "time", "value_columns": ["value"], **arguments})


# ---------------------------------------------------------------------------------------------------- labels
def test_goes_classes_become_the_logarithm_of_the_flux(tmp_path):
    cells = ["M2.5", "X1", "c9.9", " B1.0", "X17.2", "A5", "A0.0", "", "FQ"]
    rows = "\n".join(f"2014-01-07 {hour:02d}:00:00,{cell}" for hour, cell in enumerate(cells))
    labels = read(tmp_path, f"time,value\n{rows}\n", transform="goes")
    np.testing.assert_allclose(10 ** labels.values[:, 0], [2.5e-5, 1e-4, 9.9e-6, 1e-7, 1.72e-3, 5e-8])
    assert list(labels.dropped.values()) == [3]
    with pytest.raises(ValueError, match=r'Row 3 of .*labels.csv has "Z1.0" in its column value.*not a GOES class'):
        read(tmp_path, "time,value\n2014-01-07,M1.0\n2014-01-08,Z1.0\n", transform="goes")


def test_log10_leaves_out_and_counts_what_has_no_logarithm(tmp_path):
    labels = read(
        tmp_path,
        "time,value\n2014-01-07,1e-6\n2014-01-08,0\n2014-01-09,\n2014-01-10,-3\n2014-01-11,100\n",
        transform="log10",
    )
    np.testing.assert_allclose(labels.values[:, 0], [-6, 2])
    assert labels.dropped == {"label empty, quiet or not positive, so without a logarithm": 3}


def test_empty_values_are_counted_and_text_is_refused_with_its_row(tmp_path):
    labels = read(tmp_path, "time,value\n2014-01-07,1\n2014-01-08,\n2014-01-09,nan\n")
    assert len(labels) == 1 and labels.dropped == {"label empty": 2}
    with pytest.raises(ValueError, match=r'Row 3 of .* has "M1.0" .* labels.transform: goes'):
        read(tmp_path, "time,value\n2014-01-07,1\n2014-01-08,M1.0\n")


def test_time_zones_become_utc_and_are_said(tmp_path):
    labels = read(tmp_path, "time,value\n2014-01-07T18:00:00+09:00,1\n2014-01-07T12:00:00Z,2\n")
    assert labels.times.tolist() == pd.to_datetime(["2014-01-07 09:00", "2014-01-07 12:00"]).to_pydatetime().tolist()
    assert "converted to UTC" in labels.notes[0]
    assert read(tmp_path, "time,value\n2014-01-07,1\n").notes == []


@pytest.mark.parametrize("cell", ["07/01/2014 18:00", "1389052800", "tomorrow"])
def test_other_time_formats_are_refused_with_their_row(tmp_path, cell):
    with pytest.raises(
        ValueError, match=r"Row 3 of .*labels.csv .* column time, which is not a time. Write times like"
    ):
        read(tmp_path, f"time,value\n2014-01-07T18:00,1\n{cell},2\n")


def test_missing_files_and_columns_and_double_labels_are_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no label file .*none.csv"):
        load_labels(tmp_path / "none.csv", "time", ["value"])
    with pytest.raises(ValueError, match="has no column V; it has time, value"):
        read(tmp_path, "time,value\n2014-01-07,1\n", value_columns=["V"])
    with pytest.raises(ValueError, match="two different labels for 2014-01-07 00:00:00"):
        read(tmp_path, "time,value\n2014-01-07,1\n2014-01-07,2\n")
    assert read(tmp_path, "time,value\n2014-01-07,1\n2014-01-07,1\n").dropped == {"label row repeated": 1}


def test_real_labels_with_another_column_and_gaps():
    labels = load_labels(DATA / "solar_wind_val_excerpt.csv", "Epoch", ["V"])
    assert len(labels) == 56 and 240 < labels.values.mean() < 800
    assert np.diff(labels.times).max() > np.timedelta64(10, "h")  # the gap of 2010-12-07
    frames = pd.date_range("2010-12-07", "2010-12-08 23:00", freq="1h").to_numpy().astype("datetime64[s]")
    samples, dropped = join(frames, labels, Matching((-60, 0), 0, "nearest", 30))
    assert sum(dropped.values()) + len(samples) == len(frames) and len(dropped) == 2


def test_real_labels_and_real_frames_that_never_meet_are_said(sun, store):
    labels = load_labels(DATA / "solar_wind_val_excerpt.csv", "Epoch", ["V"])
    assert not set(read_index(DATA / "surya_aws_s3_val_excerpt.csv").table["time"]) & set(labels.times)
    with pytest.raises(ValueError, match="Not one sample is left .*56 labels from 2010-12-06.* to 2010-12-08"):
        SolarDataset(store, labels)


# ---------------------------------------------------------------------------------------------------- joining
def test_direction_lead_and_tolerance():
    frames = HOURS[:4].to_numpy().astype("datetime64[s]")
    labels = labels_at(HOURS[:8] + pd.Timedelta("20min"))
    now = (0,)

    def found(direction, lead, tolerance):
        samples, _ = join(frames, labels, Matching(now, lead, direction, tolerance))
        return dict(zip(((samples["time"] - HOURS[0]) / pd.Timedelta("1h")).astype(int), samples["label"], strict=True))

    assert found("forward", 0, 30) == {0: 0, 1: 1, 2: 2, 3: 3}
    assert found("backward", 0, 50) == {1: 0, 2: 1, 3: 2}
    assert found("nearest", 0, 30) == {0: 0, 1: 1, 2: 2, 3: 3}
    assert found("forward", 120, 30) == {0: 2, 1: 3, 2: 4, 3: 5}
    assert found("forward", 30, 30) == {}
    samples, _ = join(frames, labels, Matching(now, 0, "forward", 30))
    assert (samples["label_time"] >= samples["time"]).all()  # causal


def test_what_is_dropped_is_counted(store):
    dataset = SolarDataset(store, labels_at(HOURS[:20]), matching=Matching((-60, 0), 0, "forward", 10))
    # hours 0 and 6 lack their earlier frame, hour 5 its own; hours 20 to 23 have no label
    assert len(dataset) == 17
    assert dataset.dropped == {"frame at -60 min missing": 2, "no label (forward) within 10 min": 4}
    assert "17 samples" in dataset.report and "2 without: frame at -60 min missing" in dataset.report


def test_items_are_normalised_frames_oldest_first(store):
    dataset = SolarDataset(store, labels_at(HOURS), matching=Matching((-60, 0), 60, "nearest", 10))
    item = dataset[0]
    assert item["timestamp"] == "2014-01-07T01:00:00" and item["target"].tolist() == [2.0]
    assert item["time_delta_input"].tolist() == [-1.0, 0.0] and item["target"].dtype == torch.float32
    assert item["ts"].shape == (13, 2, 16, 16) and item["ts"].dtype == torch.float32
    for t, seed in enumerate((0, 1)):
        physical = np.stack([physical_frame(32, seed)[name] for name in CHANNELS])
        pooled = physical.reshape(13, 16, 2, 16, 2).mean((2, 4))
        np.testing.assert_allclose(
            item["ts"][:, t].numpy(), normalise(pooled, stack_scalers(SCALERS, CHANNELS)), atol=5e-3
        )


def test_scalers_may_change_without_building_again(store):
    other = {name: type(s)(s.mean + 1, s.std * 2, s.scale, s.epsilon) for name, s in SCALERS.items()}
    ours, theirs = (SolarDataset(store, labels_at(HOURS), scalers=s)[0]["ts"] for s in (SCALERS, other))
    stacked, changed = stack_scalers(SCALERS, CHANNELS, 3), stack_scalers(other, CHANNELS, 3)
    expected = (ours.numpy() * stacked.std + stacked.mean - changed.mean) / changed.std
    np.testing.assert_allclose(theirs.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_subsets_are_nested_and_seeded(store):
    def times(count, seed=0):
        data = SolarDataset(store, labels_at(HOURS), matching=Matching((0,)), max_samples=count, seed=seed)
        assert len(data) == min(count, data.found) and data.samples["time"].is_monotonic_increasing
        return set(data.samples["time"])

    assert times(3) < times(7) < times(15) < times(99) and times(7) == times(7) and times(7) != times(7, seed=1)
    report = SolarDataset(store, labels_at(HOURS), matching=Matching((0,)), max_samples=7).report
    assert "7 samples (a seeded subset of 23)" in report


# ---------------------------------------------------------------------------------------------------- splits
SPLITS = {
    "train": ["2014-01-01", "2014-02-01"],
    "val": ["2014-02-02", "2014-03-01"],
    "test": ["2014-03-03", "2014-04-01"],
}


def test_splits_keep_their_distance():
    matching = Matching((-60, 0), 120, "forward", 60)  # from 1 h before to 3 h after: 20 h are left of a day
    check_splits(SPLITS, matching, 20)
    with pytest.raises(
        ValueError, match="split.train and split.val are 20.0 h apart, but split.guard_hours asks for 21 h"
    ):
        check_splits(SPLITS, matching, 21)
    touching = SPLITS | {"val": ["2014-02-01", "2014-03-01"]}
    with pytest.raises(ValueError, match="split.train and split.val overlap by 4.0 h"):
        check_splits(touching, matching, 0)
    with pytest.raises(ValueError, match="split.test and split.train overlap"):
        check_splits(SPLITS | {"test": ["2013-12-01", "2014-01-05"]}, matching, 0)


# ---------------------------------------------------------------------------------------------------- image targets
def test_masks_are_matched_by_time_and_reduced(store, tmp_path):
    mask = np.zeros((32, 32), np.float32)
    mask[:4, :8] = 1
    mask[4, 0] = 1  # a quarter of a reduced pixel: not enough
    write_netcdf(tmp_path / "masks/a.nc", {"region": mask})
    write_netcdf(tmp_path / "masks/b.nc", {"region": mask[:16, :16]})
    write_netcdf(tmp_path / "masks/c.nc", {"region": np.full((8, 8), 0.5, np.float32)})
    rows = "".join(f"2014-01-07 0{i + 1}:00,masks/{name}.nc\n" for i, name in enumerate("abc"))
    labels = read(tmp_path, f"time,path\n{rows}", variable="region")
    half_labels = read(tmp_path, f"time,path\n{rows}", variable="region", reduce=2)
    dataset = SolarDataset(store, labels, matching=Matching((0,)))
    assert len(dataset) == 3 and dataset.targets is None
    full, same = (dataset[i]["target"] for i in range(2))
    half = SolarDataset(store, half_labels, matching=Matching((0,)))[2]["target"]
    assert full.shape == (1, 16, 16) and full.sum() == 2 * 4 and full[0, :2, :4].all()
    torch.testing.assert_close(same[0], torch.from_numpy(mask[:16, :16]))
    assert half.shape == (1, 8, 8) and half.unique().tolist() == [0.5]
    with pytest.raises(FrameError, match=r"c.nc cannot be used: .* 16 x 16 pixels; labels.reduce 2 times as large"):
        dataset[2]
    with pytest.raises(FrameError, match=r"b.nc cannot be used: region has the shape .* does not fit 24 x 24"):
        read_mask(str(tmp_path / "masks/b.nc"), "region", 24)
    with pytest.raises(FrameError, match="has no variable spot .it has .*region.*labels.variable"):
        read_mask(str(tmp_path / "masks/a.nc"), "spot", 16)
    with pytest.raises(FrameError, match="does not exist"):
        read_mask(str(tmp_path / "masks/z.nc"), "spot", 16)


def test_channels_of_the_frames_as_targets(sun):
    eyes = open_store(sun / "store.zarr", ["aia171", "aia94"])
    whole = SolarDataset(open_store(sun / "store.zarr"), labels_at(HOURS), matching=Matching((0,)))
    translation = SolarDataset(eyes, FrameTarget(("hmi_m",)), matching=Matching((0,)))
    item = translation[0]
    assert item["ts"].shape == (2, 1, 16, 16) and item["target"].shape == (1, 16, 16)
    torch.testing.assert_close(item["target"][0], whole[0]["ts"][8, 0])
    torch.testing.assert_close(item["ts"][:, 0], whole[0]["ts"][[2, 0], 0])
    forecast = SolarDataset(open_store(sun / "store.zarr"), FrameTarget(CHANNELS, 60))
    torch.testing.assert_close(forecast[0]["target"], whole[2]["ts"][:, 0])
    assert forecast[0]["timestamp"] == "2014-01-07T01:00:00" and forecast[0]["target"].shape == (13, 16, 16)


def test_target_channels_that_the_store_lacks_are_named(sun):
    build_store(sun / "index.csv", sun / "two.zarr", ["hmi_v", "aia94"], pooling=2, progress=False)
    with pytest.raises(ValueError, match="target channels hmi_m are not in .*two.zarr, which has hmi_v, aia94"):
        SolarDataset(open_store(sun / "two.zarr"), FrameTarget(("hmi_m",)))


# ---------------------------------------------------------------------------------------------------- augmentation
@pytest.mark.parametrize(("name", "axes"), [("flip_lr", (-1,)), ("flip_ud", (-2,)), ("rot180", (-2, -1))])
def test_augmentation_turns_image_and_signs_together(sun, tmp_path, name, axes):
    channels = [c for c in CHANNELS if AUGMENTATION_SIGNS[c][name] is not None]
    store = open_store(sun / "store.zarr", channels)
    target = FrameTarget(("hmi_bx", "hmi_by"))
    plain = SolarDataset(store, target, matching=Matching((0,)))
    turned = SolarDataset(store, target, matching=Matching((0,)), augment=[name], seed=1)
    scaler, both = stack_scalers(SCALERS, channels, 3), stack_scalers(SCALERS, target.channels)
    signs = torch.tensor([float(AUGMENTATION_SIGNS[c][name]) for c in channels]).view(-1, 1, 1, 1)
    seen = []
    for i in range(len(plain)):
        before, after = plain[i], turned[i]
        signed_log = before["ts"] * torch.tensor(scaler.std) + torch.tensor(scaler.mean)
        expected = ((signed_log * signs).flip(axes) - torch.tensor(scaler.mean)) / torch.tensor(scaler.std)
        as_is = torch.allclose(after["ts"], before["ts"])
        assert as_is or torch.allclose(after["ts"], expected.float(), atol=1e-5)
        bx, by = (before["target"] * torch.tensor(both.std) + torch.tensor(both.mean)).float()
        flipped = [bx.flip(axes) * (1 if name == "flip_ud" else -1), by.flip(axes) * (1 if name == "flip_lr" else -1)]
        wanted = (torch.stack(flipped) - torch.tensor(both.mean)) / torch.tensor(both.std)
        torch.testing.assert_close(after["target"], before["target"] if as_is else wanted.float(), atol=1e-5, rtol=1e-4)
        seen.append(as_is)
    assert any(seen) and not all(seen)


def test_masks_are_turned_with_the_image(store, tmp_path):
    write_netcdf(tmp_path / "a.nc", {"m": np.triu(np.ones((16, 16), np.float32), 3)})
    labels = read(tmp_path, "time,path\n" + "".join(f"{t},a.nc\n" for t in HOURS), variable="m")
    data = SolarDataset(store, labels, matching=Matching((0,)), augment=["flip_ud"])
    plain = SolarDataset(store, labels, matching=Matching((0,)))
    for i in range(len(data)):
        item, usual = data[i], plain[i]
        same = torch.equal(item["ts"][0], usual["ts"][0])
        torch.testing.assert_close(item["target"], usual["target"] if same else usual["target"].flip(-2))


def test_impossible_suns_are_refused(sun):
    store, part = open_store(sun / "store.zarr"), open_store(sun / "store.zarr", ["aia94"])
    with pytest.raises(
        ValueError, match="flip_lr is not allowed with hmi_v, as it would make the Sun rotate backwards"
    ):
        SolarDataset(store, labels_at(HOURS), matching=Matching((0,)), augment=["flip_lr"])
    with pytest.raises(ValueError, match=r"rot180 is not allowed with frames at several times \(\[-60, 0\] min\)"):
        SolarDataset(part, labels_at(HOURS), augment=["rot180"])
    with pytest.raises(ValueError, match="several times"):
        SolarDataset(part, FrameTarget(("aia94",), 60), matching=Matching((0,)), augment=["flip_lr"])
    SolarDataset(store, labels_at(HOURS), augment=["flip_ud"])


# ---------------------------------------------------------------------------------------------------- loaders
@pytest.fixture
def config(sun):
    def make(**overrides):
        values = {
            "paths.shared": str(sun),
            "data.index": str(sun / "index.csv"),
            "data.store": str(sun / "store.zarr"),
            "data.native_size": 32,
            "data.reduce": 2,
            "data.offsets_minutes": [-60, 0],
            "labels.path": str(sun / "labels.csv"),
            "labels.value_columns": ["value"],
            "labels.transform": "none",
            "labels.lead_minutes": 0,
            "labels.tolerance_minutes": 30,
            "split.train": ["2014-01-07 00:00", "2014-01-07 12:00"],
            "split.val": ["2014-01-07 14:00", "2014-01-07 18:00"],
            "split.test": ["2014-01-07 20:00", "2014-01-08 00:00"],
            "split.guard_hours": 0.4,
            "model.patch_size": 4,
            "training.batch_size": 4,
        }
        return load_config(ROOT / "config.yaml", values | overrides)

    return make


def test_loaders_report_order_and_target_statistics(config):
    loaders = make_loaders(config())
    assert loaders.sizes == {"train": 9, "val": 4, "test": 4}
    hours = [*range(1, 5), *range(7, 12)]
    assert loaders.target_mean.tolist() == pytest.approx([np.mean(hours)])
    assert loaders.target_std.tolist() == pytest.approx([np.std(hours)])
    assert "train: 9 samples; dropped 2 without: frame at -60 min missing" in loaders.report
    assert "17 of 24 belong to a sample" in loaders.report and "kept in memory" in loaders.report
    batches = list(loaders.train)
    assert [len(batch["target"]) for batch in batches] == [4, 4, 1]
    assert batches[0]["ts"].shape == (4, 13, 2, 16, 16) and batches[0]["time_delta_input"].shape == (4, 2)
    first = torch.cat([batch["target"][:, 0] for batch in batches]).tolist()
    assert sorted(first) == hours != first
    again = [batch["target"][:, 0] for batch in make_loaders(config()).train]
    other = [batch["target"][:, 0] for batch in make_loaders(config(seed=1)).train]
    assert torch.cat(again).tolist() == first != torch.cat(other).tolist()
    assert torch.cat([b["target"] for b in loaders.val])[:, 0].tolist() == [14, 15, 16, 17]


def test_workers_read_the_same_as_memory(config):
    memory = make_loaders(config())
    workers = make_loaders(config(**{"data.memory_cache_gb": 0.0, "training.loader_workers": 1}))
    assert "1 loader workers" in workers.report and workers.train.multiprocessing_context.get_start_method() != "fork"
    for ours, theirs in zip(memory.train, workers.train, strict=True):
        assert ours["timestamp"] == theirs["timestamp"] and torch.equal(ours["ts"], theirs["ts"])


def test_limits_count_apart(config):
    loaders = make_loaders(config(**{"training.max_train_samples": 3, "training.max_val_samples": 2}))
    assert loaders.sizes == {"train": 3, "val": 2, "test": 4}
    assert "a seeded subset of 9" in loaders.report and "a seeded subset of 4" in loaders.report


def test_loaders_refuse_what_would_spoil_the_comparison(config):
    with pytest.raises(ValueError, match="split.guard_hours asks for 5 h"):
        make_loaders(config(**{"split.guard_hours": 5.0}))
    with pytest.raises(ValueError, match="Not one sample is left from 2015-01-01 to 2015-02-01 .*make cache"):
        make_loaders(config(**{"split.test": ["2015-01-01", "2015-02-01"]}))
    with pytest.raises(ValueError, match="was built with pooling 2, but the config asks for 4"):
        make_loaders(config(**{"data.reduce": 4}))
    with pytest.raises(FileNotFoundError, match="make cache"):
        make_loaders(config(**{"data.store": "{shared}/nowhere"}))


def test_a_real_image_goes_through_by_config_alone(config, tmp_path):
    """AIA 171 of 2011-02-15 from sunpy's test data: another file, column and unit, and two channels."""
    import warnings

    from astropy.io import fits
    from sunpy.data.test import get_test_filepath

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the header of the file has a harmless mistake
        image = fits.getdata(get_test_filepath("aia_171_level1.fits")).astype(np.float32)
    times = pd.date_range("2011-02-15", periods=12, freq="1h")
    for i, time in enumerate(times):
        rolled = {"aia171": np.roll(image, i, 1), "hmi_m": physical_frame(128, i, ["hmi_m"])["hmi_m"]}
        write_netcdf(tmp_path / time.strftime("%Y%m%d_%H%M.nc"), rolled)
    paths = times.strftime("%Y%m%d_%H%M.nc")
    pd.DataFrame({"path": paths, "timestep": times, "present": 1}).to_csv(tmp_path / "index.csv", index=False)
    wind = pd.read_csv(DATA / "solar_wind_val_excerpt.csv", parse_dates=["Epoch"])[:12]
    wind["Epoch"] = wind["Epoch"] - wind["Epoch"][0] + times[0]
    wind.to_csv(tmp_path / "wind.csv", index=False)
    real = {
        "data.index": str(tmp_path / "index.csv"),
        "data.store": str(tmp_path / "frames"),
        "data.native_size": 128,
        "data.channels": ["hmi_m", "aia171"],
        "data.offsets_minutes": [0],
        "model.time_dim": 1,
        "labels.path": str(tmp_path / "wind.csv"),
        "labels.time_column": "Epoch",
        "labels.value_columns": ["V"],
        "split.train": ["2011-02-15 00:00", "2011-02-15 05:00"],
        "split.val": ["2011-02-15 06:00", "2011-02-15 08:00"],
        "split.test": ["2011-02-15 09:00", "2011-02-15 12:00"],
        "paths.reserve_gb": 0.0,
    }
    cfg = config(**real)
    assert prepare_store(cfg, progress=False).built >= 10
    loaders = make_loaders(cfg)
    assert loaders.sizes == {"train": 5, "val": 2, "test": 3} and 240 < loaders.target_mean.item() < 800
    batch = next(iter(loaders.test))
    assert batch["ts"].shape == (3, 2, 1, 64, 64)
    pooled = np.roll(image, 9, 1).reshape(64, 2, 64, 2).mean((1, 3))
    np.testing.assert_allclose(batch["ts"][0, 1, 0].numpy(), normalise(pooled, SCALERS["aia171"]), atol=5e-3)


def test_two_channels_in_another_order_feed_a_checkpoint_of_thirteen_by_name(sun):
    """The patch weights of the model of two channels are the blocks of those names in the checkpoint."""
    from helpers.model.checkpoint import load_filtered
    from helpers.model.encoder import SuryaEncoder
    from helpers.model.heads import Specformer1D

    sizes = {"img_size": 16, "patch_size": 4, "time_dim": 2, "embed_dim": 16, "depth": 3, "n_spectral_blocks": 1}
    sizes |= {"num_heads": 2, "dp_rank": 2}
    torch.manual_seed(0)
    whole = SuryaEncoder(in_chans=13, **sizes)
    names = ["hmi_v", "aia171"]
    part = Specformer1D(SuryaEncoder(in_chans=2, **sizes))
    load_filtered(part, whole.state_dict(), channels=names)
    store = open_store(sun / "store.zarr", names)
    item = SolarDataset(store, labels_at(HOURS))[0]["ts"]  # (2, T, H, W)
    filled = torch.zeros(13, *item.shape[1:])  # zeros add nothing in the patch embedding
    for plane, name in zip(item, names, strict=True):
        filled[CHANNELS.index(name)] = plane
    part.eval(), whole.eval()
    with torch.no_grad():
        torch.testing.assert_close(part.encoder(item[None]), whole(filled[None]), rtol=1e-4, atol=1e-4)
