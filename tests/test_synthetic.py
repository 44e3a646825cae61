"""The synthetic Sun: repeatable, shaped like the real data, with flares that an image can foretell."""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from benchmarks.pretrain_tiny import pretrain
from torch.nn import functional as F

from helpers.channels import CHANNELS, UNITS, load_scalers, normalise, stack_scalers
from helpers.config import load_config
from helpers.data import synthetic
from helpers.data.dataset import make_loaders
from helpers.data.frames import prepare_store
from helpers.data.labels import load_labels
from helpers.data.synthetic import DISK_RADIUS, MASK_FIELD, SyntheticSun, ensure_synthetic, goes_class
from helpers.model.checkpoint import load_filtered
from helpers.model.encoder import SuryaEncoder
from helpers.model.heads import Specformer2D
from helpers.shared import DiskFullError

ROOT = Path(__file__).parents[1]
CHANNEL = {name: c for c, name in enumerate(CHANNELS)}


def small_sun(folder: Path):
    """Makes configurations of a small Sun in this folder: 60 visits, 32 pixels."""
    (folder / "config.yaml").write_text((ROOT / "config.yaml").read_text())
    (folder / "helpers").symlink_to(ROOT / "helpers")
    small = {
        "synthetic.folder": str(folder / "sun"),
        "synthetic.visits": 60,
        "synthetic.workers": 1,
        "data.native_size": 32,
        "data.reduce": 1,
        "data.build_workers": 1,
        "paths.reserve_gb": 0.0,
        "training.batch_size": 4,
    }
    return lambda **overrides: load_config(folder / "config.yaml", small | overrides)


@pytest.fixture
def config(tmp_path):
    return small_sun(tmp_path)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The same, drawn once."""
    config = small_sun(tmp_path_factory.mktemp("drawn"))
    ensure_synthetic(config())
    return config


def radius(side: int) -> np.ndarray:
    """Distance of every pixel's centre from the middle, in solar radii."""
    axis = ((np.arange(side) + 0.5) / side - 0.5) / DISK_RADIUS
    return np.hypot(*np.meshgrid(axis, axis))


# ---------------------------------------------------------------------------------------------------- the Sun
def test_a_seed_is_one_sun_whatever_is_asked_in_whatever_order():
    first, second, other = SyntheticSun(7, 500), SyntheticSun(7, 500), SyntheticSun(8, 500)
    hours = [3, 250, 40]
    forwards = {hour: first.frame(hour, 32) for hour in hours}
    first.mask(100, 64)
    backwards = {hour: second.frame(hour, 32) for hour in reversed(hours)}
    assert all(np.array_equal(forwards[hour], backwards[hour]) for hour in hours)
    assert not np.array_equal(forwards[3], other.frame(3, 32)) and not np.array_equal(forwards[3], forwards[40])
    flux = [sun.flux(100, np.random.default_rng(0)) for sun in (first, second, other)]
    assert flux[0] == flux[1] != flux[2]


def test_frames_have_the_channels_units_and_darkness_of_sdo():
    frame = SyntheticSun(1, 500).frame(200, 64)
    assert frame.shape == (13, 64, 64) and frame.dtype == np.float32 and np.isfinite(frame).all()
    image = dict(zip(CHANNELS, frame, strict=True))
    clear = dict(zip(CHANNELS, SyntheticSun(1, 500).frame(200, 64, noise_scale=0), strict=True))
    r = radius(64)
    for name in (name for name in CHANNELS if name.startswith("hmi")):
        assert not image[name][r > 1].any() and image[name][r < 0.9].std() > 3, name  # no field beyond the limb
        assert image[name].min() < 0 < image[name].max()
    for name in (name for name in CHANNELS if name.startswith("aia")):
        assert image[name].min() >= 0 and clear[name][r < 0.9].mean() > 3 * clear[name][r > 1.18].mean(), name
    assert image["aia171"][(r > 1) & (r < 1.05)].mean() > 10  # but a corona
    assert image["hmi_v"][:, :32][r[:, :32] < 1].mean() < -300  # the east limb comes towards us


def test_the_same_sun_at_two_sizes_is_the_same_sun():
    sun = SyntheticSun(2, 500)
    fine, coarse = (sun.frame(200, side, noise_scale=0)[CHANNEL["hmi_bz"]] for side in (128, 32))
    pooled = fine.reshape(32, 4, 32, 4).mean((1, 3))
    assert np.corrcoef(pooled.ravel(), coarse.ravel())[0, 1] > 0.8


def test_values_suit_the_scalers_of_the_release():
    """The real normalisation must make numbers of order one of them, as it does of real frames."""
    frames = np.stack([SyntheticSun(seed, 500).frame(200, 64) for seed in range(4)])  # (4, 13, 64, 64)
    z = normalise(frames, stack_scalers(load_scalers(), CHANNELS))
    assert np.abs(z.mean((0, 2, 3))).max() < 2 and z.std((0, 2, 3)).max() < 3 and z.std((0, 2, 3)).min() > 0.05


def alone(sun: SyntheticSun, hour: float) -> list[pd.Series]:
    """Strong regions near the middle of the disk that have no neighbour at this hour."""
    now = pd.DataFrame(sun.regions(hour))
    x, y = np.cos(now.latitude) * np.sin(now.longitude), np.sin(now.latitude)
    near, found = now[(now.longitude.abs() < 0.4) & (now.field > 400)], []
    for i, region in near.iterrows():
        others = now[(np.cos(now.longitude) > -0.1) & (now.field > 20)].index.drop(i, errors="ignore")
        if (np.hypot(x[others] - x[i], y[others] - y[i]) > 0.5).all():
            found.append(region)
    return found


def test_regions_turn_from_east_to_west_as_fast_as_the_sun():
    sun = SyntheticSun(3, 3000)
    hour, region = next((hour, region) for hour in range(60, 2900, 6) for region in alone(sun, hour))
    side, longitudes = 256, []
    axis = ((np.arange(side) + 0.5) / side - 0.5) / DISK_RADIUS
    x, y = np.meshgrid(axis, axis)
    start = np.cos(region["latitude"]) * np.sin(region["longitude"])
    box = np.hypot(x - start - 0.03, y - np.sin(region["latitude"])) < 0.35
    for step in (0, 3, 6):
        strength = np.abs(sun.frame(hour + step, side)[CHANNEL["hmi_m"]]) * box
        strength = np.where(strength > 40, strength, 0)
        centre = (strength * x).sum() / strength.sum()
        longitudes.append(np.rad2deg(np.arcsin(centre / np.cos(region["latitude"]))))
    assert longitudes == sorted(longitudes)
    assert (longitudes[2] - longitudes[0]) * 4 == pytest.approx(13, abs=1.5)  # degrees a day, as seen from the Earth


def test_what_lies_behind_the_limb_is_not_seen():
    sun = SyntheticSun(1, 1000)
    now = sun.regions(800)
    expected = np.cos(now["latitude"]) * np.cos(now["longitude"]) > 0
    assert 0 < expected.sum() < len(expected)
    mask = sun.mask(800, 128)
    rows = ((np.sin(now["latitude"]) * DISK_RADIUS + 0.5) * 128).astype(int)
    for row, seen, longitude, field in zip(rows, expected, now["longitude"], now["field"], strict=True):
        if seen and field > 300 and abs(longitude) < 1:
            assert mask[row - 4 : row + 5].any()
    assert mask.dtype == bool and not mask[radius(128) > 1].any() and 0 < mask.mean() < 0.12


def test_masks_outline_strong_regions_whole_and_leave_weak_ones_out():
    sun, side = SyntheticSun(1, 1000), 128
    now = sun.regions(800)
    mask = sun.mask(800, side)
    alone = [i for i, lon in enumerate(now["longitude"]) if abs(lon) < 0.9]
    strong = [i for i in alone if now["field"][i] > MASK_FIELD]
    places = {}
    for i in alone:
        x, y = np.cos(now["latitude"][i]) * np.sin(now["longitude"][i]), np.sin(now["latitude"][i])
        places[i] = tuple(int((value * DISK_RADIUS + 0.5) * side) for value in (y, x))
    assert 0 < len(strong) < len(alone)
    assert all(mask[places[i]] for i in strong)  # the inversion line itself, where the radial field is zero
    apart = [
        i for i in set(alone) - set(strong) if all(np.hypot(*np.subtract(places[i], places[k])) > 20 for k in strong)
    ]
    assert not any(mask[places[i]] for i in apart)


def seen(sun: SyntheticSun, hour: float) -> pd.DataFrame:
    """The regions of the visible side."""
    now = pd.DataFrame(sun.regions(hour))
    return now[np.cos(now.longitude) * np.cos(now.latitude) > 0]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_flux_is_that_of_the_heating_but_for_a_little_noise(seed):
    sun, rng, hours = SyntheticSun(seed, 1500), np.random.default_rng(0), np.arange(1440)
    flux = np.log10([sun.flux(hour, rng) for hour in hours])
    heating = np.log10([synthetic.QUIET_FLUX + 2e-6 * (seen(sun, hour).heating ** 1.5).sum() for hour in hours])
    assert 0.05 < (flux - heating).std() < 0.07 and abs((flux - heating).mean()) < 0.01  # dex
    assert np.ptp(flux) > 1.5  # from quiet to active


def test_the_shear_tells_the_heating_an_hour_later_and_the_brightness_of_now_does_not():
    sun, change, shear, before = SyntheticSun(0, 3000), [], [], []
    for hour in range(0, 2900, 7):
        now, later = (seen(sun, h).set_index("index") for h in (hour, hour + 1))
        both = now.index.intersection(later.index)
        both = both[now.field[both] > 300]
        strength = (now.field[both] / 700) ** 1.5 * sun.compactness[both]
        shear += list(now.shear[both])
        change += list(np.log(later.heating[both] / strength))
        before += list(np.log(now.heating[both] / strength))
    assert len(shear) > 400 and np.rad2deg(min(shear)) > 8 and np.rad2deg(max(shear)) < 82
    assert np.corrcoef(shear, change)[0, 1] > 0.9
    assert abs(np.corrcoef(before, change)[0, 1]) < 0.35  # of which 0.2 is the memory of the stress


def test_the_field_obeys_hale_and_joy_and_shows_the_shear():
    """Of regions that stand alone, in an image without noise: who leads, how the axis lies, where the field turns."""
    sun, side, tilts = SyntheticSun(3, 4000), 256, []
    hours = [(hour, region) for hour in range(60, 3900, 6) for region in alone(sun, hour)]
    assert len(hours) > 10
    axis = ((np.arange(side) + 0.5) / side - 0.5) / DISK_RADIUS
    x, y = np.meshgrid(axis, axis)
    for hour, region in hours[:12]:
        image = dict(zip(CHANNELS, sun.frame(hour, side, noise_scale=0), strict=True))
        px, py = np.cos(region.latitude) * np.sin(region.longitude), np.sin(region.latitude)
        near = np.hypot(x - px, y - py) < 0.3
        bz = image["hmi_bz"] * near
        leads = -np.sign(region.latitude)  # cycle 24
        west, east = (np.clip(sign * leads * bz, 0, None) for sign in (1, -1))
        (lead_x, lead_y), (follow_x, follow_y) = (
            ((b * x).sum() / b.sum(), (b * y).sum() / b.sum()) for b in (west, east)
        )
        assert lead_x > follow_x  # Hale
        tilts.append((lead_y - follow_y) * np.sign(region.latitude))
        middle = np.unravel_index((np.hypot(image["hmi_bx"], image["hmi_by"]) * near).argmax(), x.shape)
        tilt = sun.tilt[int(region["index"])]
        bx, by = image["hmi_bx"][middle], image["hmi_by"][middle]
        along, across = bx * np.cos(tilt) + by * np.sin(tilt), by * np.cos(tilt) - bx * np.sin(tilt)
        assert np.arctan2(-across, -leads * along) == pytest.approx(region.shear, abs=0.02)
    assert np.mean(tilts) < 0  # Joy: the leading polarity lies nearer to the equator


def test_no_image_knows_the_noise_of_the_labels(monkeypatch):
    """Frames drawn with other label noise, and before or after the labels, are equal bit for bit."""
    sun, rng = SyntheticSun(9, 500), np.random.default_rng(0)
    frame = sun.frame(100, 32)
    flux = [sun.flux(hour, rng) for hour in range(99, 103)]
    monkeypatch.setattr(synthetic, "FLARE_NOISE_DEX", 1.0)
    noisy = [sun.flux(hour, np.random.default_rng(1)) for hour in range(99, 103)]
    assert flux != noisy and np.array_equal(frame, sun.frame(100, 32))
    assert np.array_equal(frame, SyntheticSun(9, 500).frame(100, 32))


def test_hot_channels_tell_more_of_the_flux_than_cool_ones():
    sun, rng = SyntheticSun(4, 3000), np.random.default_rng(0)
    hours = range(0, 2900, 29)
    flux = np.log10([sun.flux(hour + 2, rng) for hour in hours])
    means = np.log(np.stack([sun.frame(hour, 32) for hour in hours]).mean((2, 3))[:, :8])
    agreement = {name: np.corrcoef(means[:, CHANNEL[name]], flux)[0, 1] for name in ("aia94", "aia131", "aia171")}
    assert min(agreement["aia94"], agreement["aia131"]) > agreement["aia171"], agreement


def test_goes_classes_are_read_back_as_the_flux(tmp_path):
    flux = np.logspace(-7.9, -2.6, 60)
    classes = [goes_class(f) for f in flux]
    assert classes[0].startswith("A") and {c[0] for c in classes} == set("ABCMX")
    times = pd.date_range("2014-01-01", periods=60, freq="1h")
    pd.DataFrame({"time": times, "goes_class": classes}).to_csv(tmp_path / "flares.csv", index=False)
    read = load_labels(tmp_path / "flares.csv", "time", ["goes_class"], "goes")
    np.testing.assert_allclose(10 ** read.values[:, 0], flux, rtol=0.06)  # classes have two digits
    assert (goes_class(2.5e-5), goes_class(1e-4), goes_class(1e-6)) == ("M2.5", "X1.0", "C1.0")
    assert (goes_class(9.99e-7), goes_class(9.94e-6), goes_class(1.23e-3)) == ("C1.0", "C9.9", "X12.0")


def test_coronal_holes_are_dark_in_the_corona_and_have_one_polarity():
    sun, closed, side = SyntheticSun(1, 3000), SyntheticSun(1, 3000), 128
    closed.hole_size[:] = 0
    longitude, latitude, size, gauss = sun.holes(1000)
    hour = 1000 - longitude[size.argmax()] / sun.rotation(np.float64(0))  # the largest one crosses the meridian
    longitude, latitude, size, gauss = sun.holes(hour)[:, size.argmax()]
    assert abs(longitude) < 0.01 and size > 0.15
    with_it, without = (dict(zip(CHANNELS, s.frame(hour, side, noise_scale=0), strict=True)) for s in (sun, closed))
    place = tuple(int((x * DISK_RADIUS + 0.5) * side) for x in (np.sin(latitude), 0))
    for name, ratio in {"aia193": 0.4, "aia211": 0.4, "aia171": 0.7, "aia335": 0.5, "aia1600": 1}.items():
        darkened = without[name][place] - with_it[name][place]  # a region may lie there too, and stays as bright
        assert darkened == pytest.approx((1 - ratio) * _quiet(sun, hour, name, place, side), rel=0.1, abs=1e-3), name
    assert with_it["hmi_bz"][place] - without["hmi_bz"][place] == pytest.approx(gauss, rel=0.05)
    np.testing.assert_array_equal(sun.regions(hour)["field"], closed.regions(hour)["field"])
    np.testing.assert_array_equal(sun.holes(100), SyntheticSun(1, 9000).holes(100))  # however long the Sun lives


def _quiet(sun: SyntheticSun, hour: float, name: str, place: tuple[int, int], side: int) -> float:
    """Brightness of the quiet Sun alone at this place."""
    quiet = SyntheticSun(sun.seed, 3000)
    quiet.hole_size[:], quiet.field[:] = 0, 0
    return quiet.frame(hour, side, noise_scale=0)[(CHANNEL[name], *place)]


# ---------------------------------------------------------------------------------------------------- files
def frames_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("20??/??/*.nc"))


@pytest.mark.xdist_group("drawn_sun")
def test_files_have_the_layout_of_the_bucket(drawn):
    folder = ensure_synthetic(drawn())
    assert str(folder) == drawn().synthetic.folder
    frames = frames_of(folder)
    assert 168 < len(frames) < 180  # of 60 visits with three frames; some lack
    assert frames[0] == folder / "2014/01/20140101_0000.nc"
    masks = pd.read_csv(folder / "masks.csv")
    assert list(masks.columns) == ["timestamp", "path"]
    assert [folder / path.removeprefix("masks/") for path in masks["path"]] == frames
    assert all((folder / path).is_file() for path in masks["path"])
    with xr.open_dataset(frames[3], engine="h5netcdf") as file:
        assert list(file.data_vars) and set(file.variables) == set(CHANNELS)
        for name in CHANNELS:
            assert file[name].dims == ("y", "x") and file[name].shape == (32, 32) and file[name].dtype == np.float32
            assert file[name].attrs["units"] == UNITS[name]
        hour = (pd.Timestamp(masks["timestamp"][3]) - pd.Timestamp("2014-01-01")).total_seconds() / 3600
        expected = SyntheticSun(0, 59 * 48 + 2 + 48).frame(hour, 32)
        np.testing.assert_array_equal(file["aia193"].values, expected[CHANNEL["aia193"]])
    labels = pd.read_csv(folder / "flares.csv")
    assert {"timestamp", "goes_class"} <= set(labels.columns)
    assert (pd.to_datetime(labels.timestamp).diff()[1:] == pd.Timedelta("1h")).all()
    assert labels.timestamp.iloc[-1] > masks["timestamp"].iloc[-1]


def released(folder: Path, pattern: str, time: str = "timestamp") -> list[pd.DataFrame]:
    return [pd.read_csv(path, parse_dates=[time]) for path in sorted(folder.glob(f"released/{pattern}"))]


@pytest.mark.xdist_group("drawn_sun")
def test_flare_labels_agree_with_the_list_of_flares(drawn):
    folder = ensure_synthetic(drawn())
    events = pd.read_csv(folder / "flare_events.csv", parse_dates=["start_time", "peak_time"])
    assert list(events.columns) == ["start_time", "peak_time", "goes_class"] and len(events) > 300
    before = (events.peak_time - events.start_time).unique()
    assert before.min() == pd.Timedelta("10min") and before.max() == pd.Timedelta("60min")
    hourly = pd.read_csv(folder / "flares.csv", parse_dates=["timestamp"]).set_index("timestamp")
    hour = pd.Timedelta("1h")
    for event in events[::20].itertuples():
        flux = [hourly.flux[event.peak_time + step * hour] for step in (-1, 0, 1)]
        assert flux[1] == max(flux) and event.goes_class == hourly.goes_class[event.peak_time]
    parts = [
        released(folder, f"surya-bench-flare-forecasting/{name}.csv")[0] for name in ("train", "validation", "test")
    ]
    columns = ["timestamp", "max_goes_class", "cumulative_index", "label_max", "label_cum"]
    assert all(list(part.columns) == columns for part in parts)
    rows = pd.concat(parts)
    assert (rows.timestamp.diff()[1:] == hour).all()  # no gap between the files
    assert rows.timestamp.iloc[0] == hourly.index[0]
    assert rows.timestamp.iloc[-1] == hourly.index[-1] - 26 * hour  # later ones reach beyond what is known
    np.testing.assert_allclose([len(part) / len(rows) for part in parts], [0.6, 0.2, 0.2], atol=0.002)
    assert 0.05 < rows.label_max.mean() < 0.95 and 0.5 < rows.label_cum.mean() < 1
    times = list(zip(events.start_time, events.goes_class, strict=True))
    unit, edges = {"C": 1, "M": 10, "X": 100}, 0
    for row in rows[::3].itertuples():
        end = row.timestamp + 24 * hour
        sizes = [unit[c[0]] * float(c[1:]) for start, c in times if row.timestamp < start <= end]
        edges += any(start in (row.timestamp, end) for start, _ in times)
        if sizes:
            assert unit[row.max_goes_class[0]] * float(row.max_goes_class[1:]) == max(sizes)
        else:
            assert row.max_goes_class == "FQ"
        assert row.cumulative_index == pytest.approx(sum(sizes), abs=0.051)
        assert (row.label_max, row.label_cum) == (max(sizes, default=0) >= 10, row.cumulative_index >= 10)
    assert edges > 10


@pytest.mark.xdist_group("drawn_sun")
def test_released_masks_are_those_of_the_frames(drawn):
    folder = ensure_synthetic(drawn())
    (path,) = folder.glob("released/surya-bench-ar-segmentation/*.csv")
    rows = pd.read_csv(path, parse_dates=["timestep"], keep_default_na=False)
    assert path.name == "ar_2014.csv" and list(rows.columns) == ["timestep", "file_path", "present"]
    assert len(rows) == 180 and 0 < (rows.present == 0).sum() < 12
    assert (rows.file_path[rows.present == 0] == "").all()
    there = rows[rows.present == 1]
    assert list(there.file_path) == [f"{frame.stem}.h5" for frame in frames_of(folder)]
    assert {file.name for file in path.parent.glob("*.h5")} == set(there.file_path)
    values = set()
    for time, name in zip(there.timestep[::20], there.file_path[::20], strict=True):
        assert name == f"{time:%Y%m%d_%H%M}.h5"
        with h5py.File(path.parent / name) as file, h5py.File(folder / f"masks/{time:%Y/%m/%Y%m%d_%H%M}.nc") as ours:
            mask = file["union_with_intersect"][:]
            assert mask.dtype == np.uint8
            np.testing.assert_array_equal(mask, 255 * ours["active_region"][:])
        values |= set(np.unique(mask))
    assert values == {0, 255}


@pytest.mark.xdist_group("drawn_sun")
def test_the_wind_follows_dark_holes_at_the_meridian_by_four_days_and_recurs(drawn):
    folder = ensure_synthetic(drawn())
    parts = [released(folder, f"Surya-bench-solarwind/solarwind_{name}.csv")[0] for name in ("train", "valid", "test")]
    assert all(list(part.columns) == ["timestamp", "V", "BX_GSE", "BY_GSM", "BZ_GSM", "N"] for part in parts)
    runs = [(part.timestamp.diff() != pd.Timedelta("1h")).sum() for part in parts]
    assert min(runs) >= 2  # several runs of time each, and together every hour once
    wind = pd.concat(parts).set_index("timestamp").sort_index()
    assert (wind.index.to_series().diff()[1:] == pd.Timedelta("1h")).all() and wind.notna().all(axis=None)
    assert 250 < wind.V.quantile(0.02) < 350 < wind.V.mean() < 500 < wind.V.max() < 850
    assert wind.V.corr(wind.N) < -0.3 and wind[["BX_GSE", "BY_GSM", "BZ_GSM"]].std().between(2, 4).all()
    month, fortnight = (wind.V.corr(wind.V.shift(24 * days)) for days in (27, 14))
    assert month > 0.5 and month > fortnight + 0.3
    start, sun, side = wind.index[0], SyntheticSun(0, 59 * 48 + 2 + 48), 32  # smoothed to 32 pixels, against the noise
    axis = ((np.arange(side) + 0.5) / side - 0.5) / DISK_RADIUS
    disk, central = radius(side) < 0.85, np.broadcast_to(np.abs(axis) < 0.25, (side, side))
    hours, dark = np.arange(0, 60 * 48, 48), []
    for hour in hours:
        image = sun.frame(hour, 128)[CHANNEL["aia193"]].reshape(side, 4, side, 4).mean((1, 3))
        dark.append((image < 0.65 * np.median(image[disk]))[disk & central].mean())
    speed = {days: wind.V.reindex(start + pd.to_timedelta(hours + 24 * days, "h")) for days in (0, 4, 8)}
    agreement = {days: np.corrcoef(dark, values)[0, 1] for days, values in speed.items()}
    assert 0.4 < agreement[4] < 0.98 and agreement[4] > max(agreement[0], agreement[8]) + 0.2, agreement
    quiet = np.array([sun.wind(hour) for hour in range(len(wind))])
    assert 20 < np.std(wind.V - quiet) < 30  # what no image explains


@pytest.mark.xdist_group("drawn_sun")
def test_spectra_follow_what_the_frames_show(drawn):
    folder = ensure_synthetic(drawn())
    with xr.open_dataset(folder / "released/euv-spectra/AIA_EVE_temporally_stratified.nc", engine="h5netcdf") as file:
        parts = ("train", "val", "test")
        assert set(file.variables) == {f"{part}_{what}" for part in parts for what in ("time", "spectra")}
        times = {part: pd.DatetimeIndex(file[f"{part}_time"]) for part in parts}
        assert all(file[f"{part}_spectra"].attrs["units"] == "W/m^2/nm" for part in parts)
        spectra = np.concatenate([file[f"{part}_spectra"].values for part in parts])
    frames = {pd.to_datetime(path.stem, format="%Y%m%d_%H%M"): path for path in frames_of(folder)}
    both = times["train"].append([times["val"], times["test"]])
    assert both.is_unique and set(both) == set(frames)
    assert times["test"].min() < times["train"].max() and min(map(len, times.values())) > 20  # stratified in time
    assert spectra.shape == (len(frames), 1343) and spectra.dtype == np.float32
    zero = spectra == 0
    assert 0.008 < zero.mean() < 0.012 and spectra[~zero].min() > 1e-9 and spectra.max() < 1.1e-2
    sun, hours = SyntheticSun(0, 59 * 48 + 2 + 48), (both[::3] - pd.Timestamp("2014-01-01")) / pd.Timedelta("1h")
    means = np.array([sun.frame(hour, 128, noise_scale=0).mean((1, 2)) for hour in hours])
    for name, line in {"aia131": 13.12, "aia193": 19.51}.items():
        strength, seen = spectra[::3, round((line - 6.5) / 0.02)], means[:, CHANNEL[name]]
        assert np.corrcoef(strength[strength > 0], seen[strength > 0])[0, 1] > 0.95, name


def test_labels_reach_no_frame(config, monkeypatch, tmp_path):
    """Frames hold images alone, and are the same to the bit whatever the labels are."""
    cfg = config(**{"synthetic.visits": 2})
    frames = {path.name: path.read_bytes() for path in frames_of(ensure_synthetic(cfg))}
    with h5py.File(frames_of(tmp_path / "sun")[0]) as file:
        assert set(file) == {*CHANNELS, "y", "x"} and not file.attrs
        assert all(set(file[name].attrs) == {"units", "DIMENSION_LIST"} for name in CHANNELS)
    for name in ("_flare_tables", "_wind_tables"):
        monkeypatch.setattr(synthetic, name, lambda *arguments: {})
    monkeypatch.setattr(synthetic, "_write_spectra", lambda *arguments: None)
    monkeypatch.setattr(SyntheticSun, "flux", lambda self, hour, rng: 1e-6)
    other = cfg.model_copy(update={"synthetic": cfg.synthetic.model_copy(update={"folder": str(tmp_path / "other")})})
    assert {path.name: path.read_bytes() for path in frames_of(ensure_synthetic(other))} == frames
    assert not (tmp_path / "other/flare_events.csv").exists()


def test_a_second_call_writes_nothing(config):
    cfg = config(**{"synthetic.visits": 6})
    folder = ensure_synthetic(cfg)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert ensure_synthetic(cfg) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_a_drawing_that_was_killed_appears_not_and_is_gone_on_with(config, tmp_path, monkeypatch):
    cfg, write = config(**{"synthetic.visits": 6}), synthetic._write_frame

    def interrupted(job):
        if job[1] > 100:
            raise KeyboardInterrupt
        return write(job)

    monkeypatch.setattr(synthetic, "worker_pool", lambda workers: ThreadPoolExecutor(1))
    monkeypatch.setattr(synthetic, "_write_frame", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensure_synthetic(cfg)
    (aside,) = tmp_path.glob(".sun.*[!k]")
    there = {path.name: path.stat().st_mtime_ns for path in frames_of(aside)}
    assert not (tmp_path / "sun").exists() and 6 <= len(there) <= 9
    monkeypatch.setattr(synthetic, "_write_frame", write)
    frames = {path.name: path.stat().st_mtime_ns for path in frames_of(ensure_synthetic(cfg))}
    assert len(frames) == 18 and there.items() < frames.items() and not aside.exists()


def test_two_suns_at_once_in_one_folder_do_not_mix(config, tmp_path):
    """The first one is whole; the other is refused. And two that are the same share one drawing."""
    configs = [config(**{"synthetic.visits": 6, "synthetic.seed": seed}) for seed in (0, 1, 0, 1)]
    with ThreadPoolExecutor(4) as pool:
        outcomes = [pool.submit(ensure_synthetic, cfg) for cfg in configs]
    refused = [isinstance(outcome.exception(), ValueError) for outcome in outcomes]
    assert refused in ([False, True] * 2, [True, False] * 2)
    winner = int(refused[0])
    alone = ensure_synthetic(configs[winner].model_copy(update={"synthetic": configs[winner].synthetic.model_copy(
        update={"folder": str(tmp_path / "alone")})}))  # fmt: skip
    for path in (path for path in alone.rglob("*") if path.is_file()):
        assert path.read_bytes() == (tmp_path / "sun" / path.relative_to(alone)).read_bytes()


@pytest.mark.parametrize("change", [{"synthetic.seed": 1}, {"synthetic.visits": 7}, {"data.native_size": 64}])
def test_a_folder_with_another_sun_is_refused(config, change):
    folder = ensure_synthetic(config(**{"synthetic.visits": 6}))
    stamp = (folder / "synthetic.json").read_bytes()
    with pytest.raises(ValueError, match=r"holds another synthetic Sun .* Choose another synthetic.folder"):
        ensure_synthetic(config(**({"synthetic.visits": 6} | change)))
    assert (folder / "synthetic.json").read_bytes() == stamp
    ensure_synthetic(config(**{"synthetic.visits": 6, "synthetic.workers": 2}))  # how it is made does not matter


def test_a_folder_with_something_else_is_refused(config, tmp_path):
    (tmp_path / "sun").mkdir()
    (tmp_path / "sun" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="none that is complete"):
        ensure_synthetic(config())
    assert [path.name for path in (tmp_path / "sun").iterdir()] == ["thesis.txt"]


def test_too_little_space_is_said_before_and_a_full_disk_ends_the_drawing(config, tmp_path):
    with pytest.raises(DiskFullError, match="a synthetic Sun of 1.. frames"):
        ensure_synthetic(config(**{"paths.reserve_gb": 1e6}))
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]).returncode:
        pytest.skip("no right to mount a small disk")
    code = (
        "import sys; from helpers.config import load_config; from helpers.data import synthetic; "
        "synthetic.BYTES_A_PIXEL = 0; "  # as if the estimate had been too low
        "small = {'synthetic.folder': sys.argv[1], 'paths.reserve_gb': 0, 'data.native_size': 64, 'data.reduce': 1}; "
        "synthetic.ensure_synthetic(load_config('config.yaml', small))"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, f"{disk}/sun"], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert done.returncode == 1 and "DiskFullError" in done.stderr.splitlines()[-1] and "HDF5" not in done.stderr


def test_real_data_is_left_alone(config, tmp_path):
    own = {"data.archive": ".", "data.index": "index.csv", "data.store": "frames", "labels.path": "labels.csv"}
    assert ensure_synthetic(config(**{"synthetic.folder": None}, **own)) is None
    assert not list(tmp_path.rglob("*.nc"))


@pytest.mark.xdist_group("drawn_sun")
def test_the_whole_way_to_batches(drawn):
    cfg = drawn(
        **{
            "split.train": ["2014-01-01", "2014-02-20"],
            "split.val": ["2014-02-22", "2014-03-20"],
            "split.test": ["2014-03-22", "2014-05-01"],
        }
    )
    report = prepare_store(cfg, progress=False)
    assert report.built > 150 and not report.unreadable
    loaders = make_loaders(cfg)
    assert min(loaders.sizes.values()) > 20 and -8 < loaders.target_mean.item() < -3
    assert "without a frame at -60 or 0 min" in loaders.report
    batch = next(iter(loaders.train))
    assert batch["ts"].shape == (4, 13, 2, 32, 32) and batch["ts"].std() > 0.3 and batch["ts"].isfinite().all()


# ---------------------------------------------------------------------------------------------------- the checkpoint
def forecast_samples(seeds, side: int, pooling: int) -> torch.Tensor:
    """Three hourly frames of each Sun, (N, 13, 3, H, W) normalised."""
    samples = []
    for seed in seeds:
        sun, hour = SyntheticSun(seed, 500), 20 + seed % 400
        frames = np.stack([sun.frame(hour + step, side) for step in (-1, 0, 1)], axis=1)
        samples.append(F.avg_pool2d(torch.from_numpy(frames), pooling))
    return normalise(torch.stack(samples), stack_scalers(load_scalers(), CHANNELS, trailing=3)).float()


def forecast_error(model: Specformer2D, samples: torch.Tensor) -> float:
    with torch.no_grad():
        return F.mse_loss(model.eval()({"ts": samples[:, :, :2]}), samples[:, :, 2]).item()


@pytest.fixture
def tiny(tmp_path):
    (tmp_path / "config.yaml").write_text((ROOT / "config.yaml").read_text())
    return load_config(tmp_path / "config.yaml", profile="tiny")


def test_the_tiny_checkpoint_looks_like_the_released_one(tiny):
    path = ROOT / "helpers/data/surya.tiny.pt"
    assert path.stat().st_size <= 2_000_000
    state = torch.load(path, weights_only=True)
    released = json.loads((ROOT / "tests/data/surya_366m_state_dict.json").read_text())["state_dict"]
    attention = tiny.model.depth - tiny.model.n_spectral_blocks

    def is_there(key: str) -> bool:
        block = re.match(r"backbone\.blocks_attention\.(\d+)\.", key)
        return block is None or int(block[1]) < attention

    assert attention < 8 and set(state) == {key for key in released if is_there(key)}
    for key, value in state.items():
        assert str(value.dtype) == f"torch.{released[key][1]}" and value.ndim == len(released[key][0]), key
        assert value.isfinite().all(), key


def test_the_tiny_checkpoint_forecasts_suns_it_has_never_seen(tiny):
    """The pretext of Surya, an hour ahead: far better than the mean frame, and than itself before training."""
    torch.manual_seed(0)
    model = Specformer2D(SuryaEncoder(**tiny.encoder_arguments()), out_chans=len(CHANNELS))
    samples = forecast_samples(range(500_000, 500_008), tiny.data.native_size, tiny.data.reduce)
    others = forecast_samples(range(600_000, 600_008), tiny.data.native_size, tiny.data.reduce)
    mean_frame = others[:, :, 2].mean(0).expand(len(samples), -1, -1, -1)
    from_mean = F.mse_loss(mean_frame, samples[:, :, 2]).item()
    before = forecast_error(model, samples)
    report = load_filtered(model, ROOT / "helpers/data/surya.tiny.pt")
    after = forecast_error(model, samples)
    assert report.parameters_loaded == report.parameters_total and not report.missing
    assert after < from_mean / 3 and after < before / 3, (after, from_mean, before)


def test_pretraining_lowers_the_error_and_writes_a_checkpoint(config, tmp_path):
    small = {"patch_size": 8, "embed_dim": 32, "depth": 3, "n_spectral_blocks": 1, "num_heads": 2}
    settings = dict(suns=8, samples=64, held_out=16, epochs=6, batch_size=8, lr=5e-3)
    overrides = {f"model.{key}": value for key, value in small.items()}
    cfg = config(**overrides)
    report = pretrain(cfg, tmp_path / "small.pt", **settings)
    assert report["after"] < 0.7 * report["before"] and report["seconds"] > 0
    assert report["persistence"] > 0 and report["mean_frame"] > 0
    model = Specformer2D(SuryaEncoder(**cfg.encoder_arguments()), out_chans=len(CHANNELS))
    loaded = load_filtered(model, tmp_path / "small.pt")
    assert loaded.parameters_loaded == loaded.parameters_total and not loaded.missing
    samples = forecast_samples(range(700_000, 700_008), 32, 1)
    assert forecast_error(model, samples) < 0.9 * report["before"]
