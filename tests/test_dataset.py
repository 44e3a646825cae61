"""Labels, the plan of samples, and the batches that come out."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from frame_files import physical_frame, write_index, write_netcdf

from helpers.analysis import comparison
from helpers.channels import CHANNELS, denormalise, load_scalers, normalise, stack_scalers
from helpers.config import load_config
from helpers.data import archive, dataset
from helpers.data.archive import Archive, FrameError
from helpers.data.dataset import SolarDataset, make_loaders, read_mask
from helpers.data.frames import build_store, open_store, prepare_store
from helpers.data.labels import FrameTarget, Labels, check_splits, load_labels, match, plan_samples, sample_window
from helpers.model.checkpoint import CheckpointError
from helpers.training.loop import fit, predict
from helpers.training.tracking import start_run

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"
SCALERS = load_scalers()
HOURS = pd.date_range("2014-01-07", periods=24, freq="1h")


@pytest.fixture(scope="module")
def sun(tmp_path_factory):
    """A folder with 24 hourly frames of 32 pixels (one missing), their store pooled by 2, and hourly labels."""
    folder = tmp_path_factory.mktemp("sun")
    write_index(folder, HOURS, present=[int(hour != 5) for hour in range(24)])
    build_store(HOURS, folder / "store.zarr", reduce=2, archive=Archive(str(folder)), native_size=32, progress=False)
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


@pytest.mark.parametrize("cell", ["Z1.0", "M", "M2_5", "M2.5.1", "M-1", "X1e2", "C0"])
def test_what_is_no_goes_class_is_refused_with_its_row(tmp_path, cell):
    with pytest.raises(ValueError, match=rf'Row 3 of .*labels.csv has "{cell}" in its column value'):
        read(tmp_path, f"time,value\n2014-01-07,M1.0\n2014-01-08,{cell}\n", transform="goes")


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
    for cell in ("M1.0", "1_000", "1e39", "inf", "0x10"):
        with pytest.raises(ValueError, match=rf'Row 3 of .* has "{cell}" '):
            read(tmp_path, f"time,value\n2014-01-07,1\n2014-01-08,{cell}\n")


def test_time_zones_become_utc(tmp_path):
    labels = read(tmp_path, "time,value\n2014-01-07T18:00:00+09:00,1\n2014-01-07T12:00:00Z,2\n")
    assert labels.times.tolist() == pd.to_datetime(["2014-01-07 09:00", "2014-01-07 12:00"]).to_pydatetime().tolist()


def test_times_are_taken_to_the_nearest_second(tmp_path):
    labels = read(tmp_path, "time,value\n2014-01-07T17:59:59.7,1\n2014-01-07 18:00:01.2,2\n20140108,3\n")
    assert labels.times.astype(str).tolist() == ["2014-01-07T18:00:00", "2014-01-07T18:00:01", "2014-01-08T00:00:00"]


@pytest.mark.parametrize(
    "cell", ["07/01/2014 18:00", "1389052800", "now", "2014.5", "1800", "2014-01", "2014-13-01", ""]
)
def test_what_is_no_whole_date_is_refused_with_its_row(tmp_path, cell):
    with pytest.raises(ValueError, match=rf'Row 3 of .*labels.csv has "{cell}" in its column time'):
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
    samples, unmatched = match(labels, 0, "nearest", 30, 12)
    assert len(samples) == 56 and not unmatched and (samples["time"] == samples["label_time"]).all()


# ---------------------------------------------------------------------------------------------------- matching
def test_direction_lead_and_tolerance():
    labels = labels_at(HOURS[:8] + pd.Timedelta("20min"))

    def found(direction, lead, tolerance, cadence=60):
        samples, unmatched = match(labels, lead, direction, tolerance, cadence)
        assert len(samples) + sum(unmatched.values()) == 8
        off = samples["label_time"] - samples["time"] - pd.Timedelta(lead, "min")
        assert (off.abs() <= pd.Timedelta(tolerance, "min")).all()
        assert direction != "forward" or (off >= pd.Timedelta(0)).all()  # causal
        assert direction != "backward" or (off <= pd.Timedelta(0)).all()
        return ((samples["time"] - HOURS[0]) / pd.Timedelta("1h")).tolist(), samples["label"].tolist()

    now = list(map(float, range(8)))
    assert found("forward", 0, 30) == (now, list(range(8)))
    assert found("nearest", 0, 30) == (now, list(range(8)))
    assert found("backward", 0, 50) == ([hour + 1 for hour in now], list(range(8)))
    assert found("forward", 120, 30)[0] == [hour - 2 for hour in now]
    assert found("forward", 30, 30) == ([], [])  # 50 minutes after the hour
    assert found("forward", 0, 30, 12)[0] == [hour + 0.2 for hour in now]  # 12 minutes past
    assert found("nearest", 0, 30, 12)[0] == [hour + 0.4 for hour in now]


def test_a_frame_takes_the_nearest_of_several_labels():
    minutes = [-10, 1, 4, 61, 200]
    samples, unmatched = match(labels_at(HOURS[2] + pd.to_timedelta(minutes, "min")), 0, "nearest", 15, 60)
    assert samples["label"].tolist() == [1, 3] and sorted(unmatched.values()) == [1, 2]


# ---------------------------------------------------------------------------------------------------- items
def samples_of(store, labels, lead=0, offsets=(-60, 0)):
    """A dataset of all the labels whose frames are in the store."""
    if isinstance(labels, FrameTarget):
        table = pd.DataFrame({"time": HOURS})
        offsets_needed = (*offsets, labels.offset_minutes)
    else:
        table, offsets_needed = match(labels, lead, "nearest", 10, 60)[0], offsets
    whole = [all(time + pd.Timedelta(o, "min") in store for o in offsets_needed) for time in table["time"]]
    return SolarDataset(store, labels, table[whole], offsets)


def test_items_are_normalised_frames_oldest_first(store):
    item = samples_of(store, labels_at(HOURS), lead=60)[0]
    assert item["timestamp"] == "2014-01-07T01:00:00" and item["target"].tolist() == [2.0]
    assert item["time_delta_input"].tolist() == [-1.0, 0.0] and item["target"].dtype == torch.float32
    assert item["ts"].shape == (13, 2, 16, 16) and item["ts"].dtype == torch.float32
    for t, seed in enumerate((0, 1)):
        physical = np.stack([physical_frame(32, seed)[name] for name in CHANNELS])
        pooled = physical.reshape(13, 16, 2, 16, 2).mean((2, 4))
        np.testing.assert_allclose(
            item["ts"][:, t].numpy(), normalise(pooled, stack_scalers(SCALERS, CHANNELS)), atol=5e-3
        )


def test_scalers_may_change_without_building_again(sun):
    other = {name: type(s)(s.mean + 1, s.std * 2, s.scale, s.epsilon) for name, s in SCALERS.items()}
    ours, theirs = (open_store(sun / "store.zarr", scalers=s).read(HOURS[:1]) for s in (SCALERS, other))
    stacked, changed = stack_scalers(SCALERS, CHANNELS, 3), stack_scalers(other, CHANNELS, 3)
    expected = (ours.numpy() * stacked.std + stacked.mean - changed.mean) / changed.std
    np.testing.assert_allclose(theirs.numpy(), expected, rtol=1e-4, atol=1e-4)


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
    dataset = samples_of(store, labels, offsets=(0,))
    assert len(dataset) == 3 and dataset.targets is None
    full, same = (dataset[i]["target"] for i in range(2))
    half = samples_of(store, half_labels, offsets=(0,))[2]["target"]
    assert full.shape == (1, 16, 16) and full.sum() == 2 * 4 and full[0, :2, :4].all()
    torch.testing.assert_close(same[0], torch.from_numpy(mask[:16, :16]))
    assert half.shape == (1, 8, 8) and half.unique().tolist() == [0.5]
    with pytest.raises(FrameError, match=r"c.nc cannot be used: .* 16 x 16 pixels; labels.reduce 2 times as large"):
        dataset[2]
    for path, variable, side in (("masks/b.nc", "region", 24), ("masks/a.nc", "spot", 16), ("masks/z.nc", "m", 16)):
        with pytest.raises(FrameError, match=f"{path} cannot be used: "):
            read_mask(str(tmp_path / path), variable, side)


def test_channels_of_the_frames_as_targets(sun):
    store, eyes = open_store(sun / "store.zarr"), open_store(sun / "store.zarr", ["aia171", "aia94"])
    whole = samples_of(store, labels_at(HOURS), offsets=(0,))
    item = samples_of(eyes, FrameTarget(("hmi_m",)), offsets=(0,))[0]
    assert item["ts"].shape == (2, 1, 16, 16) and item["target"].shape == (1, 16, 16)
    torch.testing.assert_close(item["target"][0], whole[0]["ts"][8, 0])
    torch.testing.assert_close(item["ts"][:, 0], whole[0]["ts"][[2, 0], 0])
    forecast = samples_of(store, FrameTarget(CHANNELS, 60))
    torch.testing.assert_close(forecast[0]["target"], whole[2]["ts"][:, 0])
    assert forecast[0]["timestamp"] == "2014-01-07T01:00:00" and forecast[0]["target"].shape == (13, 16, 16)
    now = samples_of(store, FrameTarget(CHANNELS, 0))
    torch.testing.assert_close(now.target(0), whole[1]["ts"][:, 0])


def test_target_channels_are_averaged_in_physical_values(store):
    fine, coarse = (samples_of(store, FrameTarget(("hmi_m",), 0, reduce), offsets=(0,)) for reduce in (1, 4))
    physical = denormalise(fine.target(0), SCALERS["hmi_m"]).reshape(1, 4, 4, 4, 4).mean((2, 4))
    torch.testing.assert_close(coarse.target(0), normalise(physical, SCALERS["hmi_m"]), atol=1e-4, rtol=1e-4)


def test_target_channels_that_the_store_lacks_are_named(sun):
    eyes = open_store(sun / "store.zarr")
    with pytest.raises(ValueError, match="has no channel aia9; it has aia94"):
        samples_of(eyes, FrameTarget(("aia9",)))


# ---------------------------------------------------------------------------------------------------- plan and loaders
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
            "paths.reserve_gb": 0.0,
        }
        return load_config(ROOT / "config.yaml", values | overrides)

    return make


def without(*hours: int):
    """No frame at these hours."""
    lost = np.array([HOURS[0] + pd.Timedelta(hour, "h") for hour in hours], "datetime64[s]")
    return lambda times: ~np.isin(times, lost)


def test_a_plan_needs_no_frame(config):
    plan = plan_samples(config(**{"data.store": "{shared}/nowhere", "data.index": "{shared}/nowhere.csv"}))
    assert {name: len(table) for name, table in plan.samples.items()} == {"train": 12, "val": 4, "test": 4}
    assert plan.frames.tolist() == sorted({t + np.timedelta64(o, "h") for t in plan_times(plan) for o in (-1, 0)})


def plan_times(plan):
    return np.concatenate([table["time"].to_numpy("datetime64[s]") for table in plan.samples.values()])


def test_what_lacks_a_frame_is_dropped_and_counted(config):
    plan = plan_samples(config(), without(-1, 5))
    assert [time.hour for time in plan.samples["train"]["time"]] == [1, 2, 3, 4, 7, 8, 9, 10, 11]
    assert sum(plan.dropped["train"].values()) == 2 + 1 and not plan.dropped["val"]
    assert "train: 9 samples; dropped 3 without a frame at -60 or 0 min" in str(plan)
    assert "17 of 24 belong to a sample" in str(plan)


def test_subsets_are_nested_and_seeded_and_replace_what_lacks_a_frame(config):
    def hours(count, usable=None, seed=0):
        plan = plan_samples(config(**{"training.max_train_samples": count, "seed": seed}), usable)
        times = plan.samples["train"]["time"]
        assert len(times) == min(count, 12) and times.is_monotonic_increasing
        assert len(plan.samples["val"]) == 4
        return {time.hour for time in times}

    assert hours(3) < hours(7) < hours(11) < hours(99) and hours(7) == hours(7) and hours(7) != hours(7, seed=1)
    lost = min(hours(4))
    found = hours(4, without(lost))
    assert {lost, lost + 1}.isdisjoint(found) and hours(4) - {lost, lost + 1} <= found


def test_tasks_without_label_files_take_their_times_from_the_splits(config):
    own = {"labels.kind": "image", "labels.target_channels": ["hmi_m"], "labels.target_offset_minutes": 60}
    own |= {"target.loss": "mse", "target.metrics": ["rmse"], "data.every_minutes": 120, "labels.lead_minutes": 600}
    own |= {"split.val": ["2014-01-07 14:30", "2014-01-07 18:00"], "split.guard_hours": 0}
    cfg = config(**own)
    assert sample_window(cfg) == (pd.Timedelta("-1h"), pd.Timedelta("1h"))
    plan = plan_samples(cfg)
    assert [time.hour for time in plan.samples["train"]["time"]] == [0, 2, 4, 6, 8, 10]
    assert [time.hour for time in plan.samples["val"]["time"]] == [16]
    assert plan.offsets_minutes == (-60, 0, 60)


@pytest.fixture
def opened(monkeypatch):
    """Names of the frame files that were opened."""
    names, open_netcdf = [], archive.open_netcdf

    def counting(path):
        names.append(Path(path).name)
        return open_netcdf(path)

    monkeypatch.setattr(archive, "open_netcdf", counting)
    return names


def one_channel(folder, times) -> dict:
    """Frames of one channel in `folder`/sun, and the settings that build a store of them."""
    write_index(folder / "sun", times, channels=("aia171",))
    own = {"data.store": str(folder / "frames"), "data.archive": str(folder / "sun"), "data.index": None}
    return own | {"data.channels": ["aia171"]}


def test_only_the_frames_that_samples_need_are_opened(config, tmp_path, opened):
    """12 labelled samples: 24 frames. A second task on the same store adds only its own."""
    hours = pd.date_range("2014-01-07", periods=26, freq="1h")
    own = one_channel(tmp_path, hours)
    own |= {
        "split.val": ["2014-01-07 13:00", "2014-01-07 18:30"],
        "split.test": ["2014-01-07 20:00", "2014-01-08 02:00"],
    }
    own |= {"split.guard_hours": 0, "labels.tolerance_minutes": 0, "data.build_workers": 1}

    def build(name, *labelled):
        pd.DataFrame({"timestamp": hours[[*labelled]], "value": 1.0}).to_csv(tmp_path / name, index=False)
        cfg = config(**own, **{"labels.path": str(tmp_path / name)})
        opened.clear()
        assert prepare_store(cfg, progress=False).built == len(opened)
        assert sum(make_loaders(cfg).sizes.values()) == len(labelled)
        return len(opened)

    twelve = (1, 3, 5, 7, 9, 11, 14, 16, 18, 20, 22, 24)
    assert [build("a.csv", *twelve), build("a.csv", *twelve), build("b.csv", 1, 13, 25)] == [24, 0, 2]


def test_others_take_the_place_of_samples_whose_frames_are_missing_or_damaged(config, tmp_path):
    own = one_channel(tmp_path, HOURS)
    for hour in (2, 6):
        (tmp_path / f"sun/2014/01/20140107_{hour:02d}00.nc").unlink()
    (tmp_path / "sun/2014/01/20140107_1000.nc").write_bytes(b"cut short")
    own |= {"data.offsets_minutes": [0], "model.time_dim": 1, "training.max_train_samples": 8}
    report = prepare_store(config(**own), progress=False)
    assert len(report.unreadable) <= 1 and report.built == 8 + 4 + 4
    loaders = make_loaders(config(**own))
    assert loaders.sizes == {"train": 8, "val": 4, "test": 4}
    times = {time.hour for time in loaders.train.dataset.samples["time"]}
    assert times.isdisjoint({2, 6, 10})
    fewer = make_loaders(config(**(own | {"training.max_train_samples": 5})))
    assert {time.hour for time in fewer.train.dataset.samples["time"]} < times


def test_more_than_the_limit_is_not_read_without_being_asked(config, tmp_path):
    own = {"data.store": str(tmp_path / "frames"), "data.ask_above_gb": 0.0}
    with pytest.raises(ValueError, match=r"(?s)train: 9 samples.*frames: 21 needed.*data.ask_above_gb \(0 GB\)"):
        prepare_store(config(**own), progress=False)
    assert not (tmp_path / "frames").exists()


def test_splits_keep_their_distance():
    splits = {"train": ["2014-01-01", "2014-02-01"], "val": ["2014-02-02", "2014-03-01"]}
    splits["test"] = ["2014-03-03", "2014-04-01"]
    window = pd.Timedelta("-1h"), pd.Timedelta("3h")  # 20 h are left of a day
    check_splits(splits, window, 20)
    with pytest.raises(
        ValueError, match="split.train and split.val are 20.0 h apart, but split.guard_hours asks for 21 h"
    ):
        check_splits(splits, window, 21)
    with pytest.raises(ValueError, match="split.train and split.val overlap by 4.0 h"):
        check_splits(splits | {"val": ["2014-02-01", "2014-03-01"]}, window, 0)
    with pytest.raises(ValueError, match="split.test and split.train overlap"):
        check_splits(splits | {"test": ["2013-12-01", "2014-01-05"]}, window, 0)


def test_the_window_reaches_to_the_latest_possible_label(config):
    causal = {"labels.lead_minutes": 120, "labels.tolerance_minutes": 60, "labels.direction": "forward"}
    assert sample_window(config(**causal)) == (pd.Timedelta("-1h"), pd.Timedelta("3h"))
    before = {"labels.direction": "backward", "labels.tolerance_minutes": 60}
    assert sample_window(config(**before)) == (pd.Timedelta("-1h"), pd.Timedelta(0))


def test_a_hundred_thousand_labels_are_planned_quickly(config, tmp_path):
    """Without a frame, and in little memory: 128,000 hourly flare labels, their frames every 12 minutes."""
    times = pd.date_range("2010-05-13", periods=128_000, freq="1h")
    pd.DataFrame({"timestamp": times, "value": "M1.0"}).to_csv(tmp_path / "labels.csv", index=False)
    own = {"labels.path": str(tmp_path / "labels.csv"), "labels.transform": "goes", "data.cadence_minutes": 12}
    own |= {"split.train": ["2010-05-13", "2019-01-01"], "split.val": ["2019-02-01", "2020-01-01"]}
    own |= {"split.test": ["2020-02-01", "2025-01-01"], "training.max_val_samples": 50}
    plan = plan_samples(config(**own), lambda times: times.astype(int) % 7 != 0)
    assert len(plan.samples["val"]) == 50 and len(plan.samples["train"]) + len(plan.samples["test"]) > 80_000


def test_loaders_report_order_and_target_statistics(config):
    loaders = make_loaders(config())
    assert loaders.sizes == {"train": 9, "val": 4, "test": 4}
    hours = [*range(1, 5), *range(7, 12)]
    assert loaders.target_mean.tolist() == pytest.approx([np.mean(hours)])
    assert loaders.target_std.tolist() == pytest.approx([np.std(hours)])
    assert "train: 9 samples" in loaders.report and "kept in memory" in loaders.report
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


class Line(torch.nn.Module):
    """Of each channel's mean, or of each pixel's channels."""

    def __init__(self, images: bool) -> None:
        super().__init__()
        self.images, self.head = images, torch.nn.Linear(13, 1)

    def forward(self, batch):
        seen = batch["ts"].mean(2)  # (B, C, H, W)
        return self.head(seen.movedim(1, -1)).movedim(-1, 1) if self.images else self.head(seen.mean((2, 3)))


def masks(folder, change=None, where=(slice(4, 12), slice(6, 8))):
    """A mask of 32 pixels for each hour, with `where` inside unless `change` of the hour says otherwise."""
    for hour in range(24):
        mask = np.zeros((32, 32), np.uint8)
        mask[where] = 255
        mask = mask if change is None else change(hour, mask)
        write_netcdf(folder / f"masks/{hour}.nc", {"region": mask.astype(np.float32)})
    rows = pd.DataFrame({"timestamp": HOURS, "path": [f"masks/{hour}.nc" for hour in range(24)]})
    rows.to_csv(folder / "masks.csv", index=False)
    own = {"labels.kind": "mask", "labels.path": str(folder / "masks.csv"), "labels.variable": "region"}
    return own | {"target.loss": "bce_dice", "target.metrics": ["iou"], "target.event_threshold": None}


QUICK = {"training.epochs": 1, "training.precision": "fp32", "tracking.wandb": "disabled"}


def test_thin_masks_that_a_majority_loses_are_reported_with_both_numbers(config, tmp_path):
    own = masks(tmp_path, where=(slice(0, 32, 2), slice(6, 7)))
    lost = "WARNING: of 36 pixels inside, 0 are left when the masks are reduced by majority. Set labels.mask_reduce"
    assert lost in make_loaders(config(**own)).report  # 9 samples x 16 pixels x 1/4
    for how, inside in (("any", 16), ("mean", 4)):
        loaders = make_loaders(config(**own | {"labels.mask_reduce": how}))
        assert "WARNING" not in loaders.report and loaders.val.dataset.target(0).sum() == inside
    assert "WARNING" not in make_loaders(config(**masks(tmp_path / "wide"))).report


def test_a_validation_split_of_empty_masks_cannot_choose_an_epoch(config, tmp_path):
    cfg = config(**masks(tmp_path, lambda hour, mask: mask * (hour < 14)), **QUICK)
    loaders = make_loaders(cfg)
    with pytest.raises(ValueError, match="The validation iou is not a number, so it cannot choose .* split.val"):
        fit(Line(images=True), loaders, cfg)
    found = predict(Line(images=True), loaders, "val", cfg)
    assert np.isnan(found.values["iou"])


def test_a_mask_that_is_none_is_refused_wherever_it_lies(config, tmp_path):
    cfg = config(**masks(tmp_path, lambda hour, mask: mask * (0.7 if hour == 16 else 1)))
    with pytest.raises(FrameError, match="16.nc cannot be used: it holds values from 0 to 178.5, but a mask is 0"):
        list(make_loaders(cfg).val)


@pytest.mark.parametrize(("kind", "hour"), [("scalar", 3), ("scalar", 22), ("mask", 15), ("mask", 22)])
def test_a_corrected_label_is_another_fingerprint_and_ends_resume_and_comparison(config, tmp_path, kind, hour, capsys):
    """In any split: a number in the table, or a mask file under its old name."""

    def leave(changed):
        values = np.arange(24.0)
        values[hour] += 0.5 * changed
        pd.DataFrame({"timestamp": HOURS, "value": values}).to_csv(tmp_path / "labels.csv", index=False)
        shift = masks(tmp_path, lambda h, mask: np.roll(mask, 2 * (changed and h == hour)))
        numbers = {"labels.path": str(tmp_path / "labels.csv"), "target.metrics": ["rmse"]}
        return shift if kind == "mask" else numbers

    def settings(**more):
        return config(**leave(False), **QUICK, **{"paths.runs": str(tmp_path / "runs")} | more)

    cfg = settings()
    with start_run(cfg) as run:
        fit(Line(kind == "mask"), loaders := make_loaders(cfg), cfg, run)
        predict(Line(kind == "mask"), loaders, "test", cfg).table().to_csv(
            run.folder / "predictions_test.csv", index=False
        )
        run.summary({"test_rmse": 1.0, comparison.SAMPLES: 9, "seconds": 1.0})
    again = settings(**{"training.resume": run.name})
    fit(Line(kind == "mask"), make_loaders(again), again)  # nothing is left to do
    assert comparison.find_run(cfg) == run.name and len(comparison.compare_runs(cfg)[0].columns) == 1
    leave(True)
    with pytest.raises(
        CheckpointError,
        match=f"The run {run.name} .* cannot be continued, because it had other frames or labels.*Take back",
    ):
        fit(Line(kind == "mask"), make_loaders(again), again)
    capsys.readouterr()
    assert comparison.find_run(cfg) is None
    assert capsys.readouterr().out.startswith(f"Not compared: {run.name}, whose labels or frames were others than now")
    assert comparison.compare_runs(cfg)[0].empty and f"Not compared: {run.name}" in capsys.readouterr().out
    leave(False)
    assert comparison.find_run(cfg) == run.name


def test_limits_count_apart(config):
    most = {"training.max_train_samples": 3, "training.max_val_samples": 2, "training.max_test_samples": 1}
    assert make_loaders(config(**most)).sizes == {"train": 3, "val": 2, "test": 1}


def test_loaders_refuse_what_would_spoil_the_comparison(config):
    with pytest.raises(ValueError, match="split.guard_hours asks for 5 h"):
        make_loaders(config(**{"split.guard_hours": 5.0}))
    with pytest.raises(ValueError, match="Not one sample is left of split.test, 2015-01-01 to 2015-02-01"):
        make_loaders(config(**{"split.test": ["2015-01-01", "2015-02-01"]}))
    with pytest.raises(ValueError, match="was built with reduce 2, but the config asks for 4"):
        make_loaders(config(**{"data.reduce": 4}))
    with pytest.raises(FileNotFoundError, match="make cache"):
        make_loaders(config(**{"data.store": "{shared}/nowhere"}))


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
    item = samples_of(store, labels_at(HOURS))[0]["ts"]  # (2, T, H, W)
    filled = torch.zeros(13, *item.shape[1:])  # zeros add nothing in the patch embedding
    for plane, name in zip(item, names, strict=True):
        filled[CHANNELS.index(name)] = plane
    part.eval(), whole.eval()
    with torch.no_grad():
        torch.testing.assert_close(part.encoder(item[None]), whole(filled[None]), rtol=1e-4, atol=1e-4)


def test_what_is_read_ahead_stays_within_a_container(config, monkeypatch):
    """Frames in memory and loader workers take at most half of what is free, and their batches fit into /dev/shm."""
    monkeypatch.setattr(dataset, "memory", lambda: (3_000_000_000, 4_000_000_000))
    asked = {"data.memory_cache_gb": 0.0, "training.loader_workers": 8}
    assert ", 2 loader workers" in make_loaders(config(**asked)).report  # half a GB each, and small batches
    free = dataset.free_space
    monkeypatch.setattr(dataset, "free_space", lambda disk: 1000 if str(disk) == "/dev/shm" else free(disk))
    assert ", 0 loader workers" in make_loaders(config(**asked)).report
    monkeypatch.setattr(dataset, "memory", lambda: (1000, 4_000_000_000))
    assert ", 0 loader workers" in make_loaders(config()).report
