"""Building and reading the frame store, including what goes wrong on real disks and networks."""

import errno
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import xarray
import yaml
import zarr
from frame_files import physical_frame, write_index, write_netcdf

from helpers.channels import CHANNELS, ERROR_BOUND, UNITS, coding_of, load_scalers
from helpers.config import load_config
from helpers.data import archive as netcdf
from helpers.data import frames
from helpers.data.archive import FrameError, Source, read_index, reduce_frame
from helpers.data.frames import build_store, open_store, prepare_store, verify_store
from helpers.shared import DiskFullError

ROOT = Path(__file__).parents[1]
SCALERS = load_scalers()
HOURS = pd.date_range("2014-01-07", periods=6, freq="1h")
THREE = ("aia171", "hmi_m", "hmi_v")


def signed_log(images: dict, name: str, pooling: int) -> np.ndarray:
    """Average pooling and the signed logarithm in plain numpy, in float64."""
    side = images[name].shape[0] // pooling
    pooled = images[name].astype(np.float64).reshape(side, pooling, side, pooling).mean((1, 3))
    scaled = pooled * SCALERS[name].scale
    return np.sign(scaled) * np.log(1 + np.abs(scaled))


def build(folder: Path, name: str = "store.zarr", **arguments):
    return build_store(folder / "index.csv", folder / name, **{"progress": False, "pooling": 2, **arguments})


def contents(path: Path) -> np.ndarray:
    store = open_store(path)
    frames = [store.read_all(when) for when in store.times]  # each (C, H, W) codes
    decode = [store.codings[name].decode for name in store.channels]
    planes = [torch.stack([read(plane) for read, plane in zip(decode, frame, strict=True)]) for frame in frames]
    return torch.stack(planes).numpy() if frames else np.empty(0)  # (T, C, H, W) signed-log


@pytest.fixture
def folder(tmp_path):
    write_index(tmp_path, HOURS, present=[1, 1, 0, 1, 1, 1])
    return tmp_path


# ---------------------------------------------------------------------------------------------------- what is built
def test_store_holds_the_pooled_signed_logarithm_and_says_what_it_is(folder):
    report = build(folder)
    assert (report.built, report.missing, report.unreadable) == (5, 1, {})
    with xarray.open_zarr(folder / "store.zarr") as stranger:
        assert stranger.frames.dims == ("time", "channel", "y", "x")
        assert list(stranger.channel.values) == list(CHANNELS) == stranger.attrs["channels"]
        np.testing.assert_array_equal(stranger.time.values, HOURS.delete(2).values)
        assert stranger.attrs["units"][0] == "DN" and stranger.attrs["units"][-1] == "m/s"
        assert stranger.attrs["pooling"] == 2 and "surya-course" in stranger.attrs["software"]
        assert stranger.attrs["source"].endswith("index.csv") and "half a step" in stranger.attrs["rounding"]
        assert stranger.attrs["format"] == frames.FORMAT
        assert 0 < stranger.attrs["largest_rounding_error_normalised"] == report.rounding
        assert report.rounding <= stranger.attrs["largest_possible_error_normalised"] == ERROR_BOUND < 5e-3
        assert set(stranger.coords) == {"time", "channel", "step", "offset"} and "formula" in stranger.step.attrs
        values = stranger.frames * stranger.step + stranger.offset  # what the attributes say, without this project
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, contents(folder / "store.zarr"))
        for row, seed in enumerate((0, 1, 3, 4, 5)):
            images = physical_frame(32, seed)
            for name in CHANNELS:
                expected, most = signed_log(images, name, 2), ERROR_BOUND * SCALERS[name].std
                np.testing.assert_allclose(values[row].sel(channel=name), expected, rtol=0, atol=most)


def test_strangers_see_no_number_where_there_is_no_frame(folder):
    build(folder, between=[("2014-01-07 03:00", "2014-01-07 05:00")])
    frames._grow(folder / "store.zarr", HOURS[:1].to_numpy())  # a row whose frame was not made yet
    with xarray.open_zarr(folder / "store.zarr") as stranger:
        assert stranger.done.values.tolist() == [1, 1, 0]
        seen = stranger.frames.isnull().all(("channel", "y", "x")).values
        assert seen.tolist() == [False, False, True]


EXTREMES = {"DN": (0, 60_000), "G": (-4000, 4000), "m/s": (-7000, 7000)}


def _extreme_frame() -> dict[str, np.ndarray]:
    """Every channel over all values that an instrument has given, (64, 64) each, dense near 0."""
    images = {}
    for name in CHANNELS:
        low, high = EXTREMES[UNITS[name]]
        ends = np.geomspace(1e-3, high, 2048)
        images[name] = np.concatenate([-ends if low else np.linspace(0, high, 2048), ends]).reshape(64, 64)
        images[name] = images[name].astype(np.float32)
        assert images[name].min() <= low and images[name].max() >= 0.999 * high
    return images


def test_the_bound_holds_for_every_pixel_of_every_channel(tmp_path):
    images = _extreme_frame()
    write_netcdf(tmp_path / "a.nc", images)
    codes, error = reduce_frame(tmp_path / "a.nc", CHANNELS, 1, SCALERS)
    assert codes.dtype == np.int16 and 3.9e-3 < error <= ERROR_BOUND < 5e-3
    for i, name in enumerate(CHANNELS):
        coding, scaler = coding_of(name, SCALERS[name]), SCALERS[name]
        exact, stored = signed_log(images, name, 1), coding.decode(codes[i])
        assert np.abs(stored - exact).max() / (scaler.std + scaler.epsilon) <= ERROR_BOUND, name
        assert np.abs(stored - exact).max() <= 2**-11 * 1.01, name
        assert (stored[images[name] == 0] == 0).all() and coding.decode(np.int16(0)) == coding.offset


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (
            "aia94",
            2e5,
            r"aia94 has a pixel of 200000 DN \(averaged\), but the store can keep only -64.* to 1.049e\+05 DN",
        ),
        ("aia94", -100, r"aia94 has a pixel of -100 DN .* of this channel"),
        ("aia131", -900, r"aia131 has a pixel of -900 DN"),
    ],
)
def test_a_pixel_outside_the_range_makes_the_frame_unreadable_and_is_named(folder, name, value, said):
    images = physical_frame(32, 3)
    images[name][4:6, 6:8] = value
    bad = write_netcdf(folder / "2014/01/20140107_0300.nc", images)
    report = build(folder)
    assert report.built == 4 and list(report.unreadable) == [str(bad)]
    assert pd.Series(report.unreadable.values()).str.contains(said).all(), report.unreadable
    assert HOURS[3] not in open_store(folder / "store.zarr")


def test_a_store_keeps_its_steps_when_the_scalers_change(folder):
    build(folder, between=[("2014-01-07", "2014-01-07 02:00")])
    other = {name: replace(s, std=s.std / 3) for name, s in SCALERS.items()}
    assert build(folder, scalers=other).built == 3
    build(folder, "at_once.zarr")
    np.testing.assert_array_equal(contents(folder / "store.zarr"), contents(folder / "at_once.zarr"))


@pytest.mark.parametrize("other", [None, "int16 fixed point, 2"])
def test_a_store_of_another_format_is_refused(folder, other):
    build(folder)
    group = zarr.open_group(folder / "store.zarr", mode="r+", use_consolidated=False)
    if other:
        group.attrs["format"] = other
    else:
        del group.attrs["format"]
    frames._consolidate(folder / "store.zarr")
    for use in (open_store, verify_store, lambda path: build(folder)):
        with pytest.raises(
            ValueError, match=f'the format "{other or "float16.*"}", but this version .* reads "int16 .*1"'
        ):
            use(folder / "store.zarr")


def test_channels_are_read_by_name_in_any_order(folder):
    build(folder)
    whole, part = open_store(folder / "store.zarr"), open_store(folder / "store.zarr", ["hmi_v", "aia94"])
    both = whole.read([HOURS[3]])
    assert torch.equal(part.read([HOURS[3]]), both[[12, 0]]) and HOURS[2] not in part and HOURS[3] in part
    assert list(part.dataset().channel.values) == ["hmi_v", "aia94"]
    with pytest.raises(KeyError, match="no complete frame at 2014-01-07 02:00:00"):
        part.read([HOURS[2]])


def test_building_again_does_nothing_and_several_workers_give_the_same(folder):
    build(folder)
    files = {path: path.stat().st_mtime_ns for path in (folder / "store.zarr").rglob("*") if path.is_file()}
    assert (build(folder).built, build(folder).already) == (0, 5)
    assert files == {path: path.stat().st_mtime_ns for path in (folder / "store.zarr").rglob("*") if path.is_file()}
    threads = torch.get_num_threads()
    assert build(folder, "two.zarr", workers=2).built == 5
    assert torch.get_num_threads() == threads
    np.testing.assert_array_equal(contents(folder / "two.zarr"), contents(folder / "store.zarr"))


def test_a_dask_scheduler_elsewhere_can_do_the_work(folder):
    from distributed import LocalCluster

    local = {"processes": False, "n_workers": 1, "protocol": "tcp", "dashboard_address": None}
    with LocalCluster(**local, scheduler_port=0) as cluster:
        assert build(folder, dask_address=cluster.scheduler_address).built == 5
    with pytest.raises(ConnectionError, match="No Dask scheduler answers at nowhere .*data.dask_address"):
        build(folder, "two.zarr", dask_address="nowhere")


def test_an_index_that_grew_keeps_its_rows(folder):
    index = pd.read_csv(folder / "index.csv")
    index.iloc[[1, 3]].to_csv(folder / "index.csv", index=False)
    assert build(folder).built == 2
    before = contents(folder / "store.zarr")
    index.to_csv(folder / "index.csv", index=False)
    report = build(folder)
    assert (report.built, report.already) == (3, 2)
    np.testing.assert_array_equal(contents(folder / "store.zarr")[[1, 2]], before)
    build(folder, "at_once.zarr")
    np.testing.assert_array_equal(contents(folder / "store.zarr"), contents(folder / "at_once.zarr"))
    with xarray.open_zarr(folder / "store.zarr") as stranger:
        ordered = stranger.sortby("time")
        values = ordered.frames * ordered.step + ordered.offset
        np.testing.assert_array_equal(values, contents(folder / "store.zarr"))


def test_only_the_asked_span_is_built(folder):
    report = build(folder, between=[("2014-01-07 03:00", "2014-01-07 05:00")])
    assert (report.built, report.missing) == (2, 0)  # the hour that is not present lies outside
    assert open_store(folder / "store.zarr").times.tolist() == HOURS[3:5].to_pydatetime().tolist()


def test_large_chunks_are_read_as_hdf5_reads_them(tmp_path):
    image = physical_frame(300, 0, ["hmi_v"])["hmi_v"]
    with h5py.File(tmp_path / "chunks.nc", "w") as file:
        for i, (chunks, shuffle) in enumerate([((300, 300), True), ((128, 200), False), ((130, 130), True)]):
            variable = file.create_dataset(f"v{i}", data=image, chunks=chunks, compression="gzip", shuffle=shuffle)
            np.testing.assert_array_equal(netcdf._values(variable), image)
        big_endian = file.create_dataset("be", data=image.astype(">f4"), chunks=(300, 300), compression="gzip")
        np.testing.assert_array_equal(netcdf._values(big_endian), image)


def test_folders_that_a_group_may_write_stay_so(folder):
    shared = folder / "shared"
    shared.mkdir()
    shared.chmod(0o2775)
    build_store(folder / "index.csv", shared / "deep" / "store.zarr", pooling=2, workers=2, progress=False)
    modes = {path: path.stat().st_mode for path in shared.rglob("*")}
    assert modes and all(mode & 0o020 for mode in modes.values()), modes
    (folder / "check").touch()
    assert not (folder / "check").stat().st_mode & 0o020  # the process's own mask is back


# ---------------------------------------------------------------------------------------------------- bad files
def _without_a_channel(path):
    write_netcdf(path, physical_frame(32, 0, [name for name in CHANNELS if name != "aia193"]))


def _with_nan_patches(path):
    images = physical_frame(32, 0)
    images["aia304"][:8, :8] = np.nan
    write_netcdf(path, images)


def _of_another_shape(path):
    write_netcdf(path, physical_frame(48, 0))


def _cut_short(path):
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def _not_netcdf(path):
    path.write_text("<html>sorry, the server is down</html>" * 100)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_without_a_channel, "no variable aia193"),
        (_with_nan_patches, r"aia304 has pixels that are not numbers \(NaN\), in 6.2% of the image"),
        (_of_another_shape, "aia94 has the shape 48 x 48, expected 32 x 32"),
        (_cut_short, "cut short or damaged"),
        (_not_netcdf, r"not NetCDF4 \(HDF5\)"),
        (Path.unlink, "does not exist"),
    ],
)
def test_a_bad_file_is_listed_with_its_reason_and_built_once_it_is_mended(folder, spoil, reason):
    bad = folder / "2014/01/20140107_0300.nc"
    good = bad.read_bytes()
    spoil(bad)
    report = build(folder)
    assert report.built == 4 and list(report.unreadable) == [str(bad)]
    assert pd.Series(report.unreadable.values()).str.contains(reason).all(), report.unreadable
    assert "1 unreadable" in str(report) and "20140107_0300.nc" in str(report)
    listed = pd.read_csv(folder / "store.zarr.build" / "unreadable.csv")
    assert listed["path"].tolist() == [str(bad)] and listed["reason"].str.contains(reason).all()
    assert HOURS[3] not in open_store(folder / "store.zarr")
    bad.write_bytes(good)
    assert build(folder).built == 1 and HOURS[3] in open_store(folder / "store.zarr")
    assert pd.read_csv(folder / "store.zarr.build" / "unreadable.csv").empty


def test_packed_values_are_refused(tmp_path):
    write_netcdf(tmp_path / "packed.nc", physical_frame(32, 0))
    with h5py.File(tmp_path / "packed.nc", "a") as file:
        file["aia94"].attrs["scale_factor"] = 0.1
    with pytest.raises(FrameError, match="aia94 is packed"):
        reduce_frame(tmp_path / "packed.nc", CHANNELS, 2, SCALERS)


def test_a_damaged_chunk_is_found_and_built_again(folder):
    build(folder)
    before = contents(folder / "store.zarr")
    (folder / "store.zarr/frames/c/2/0/0/0").write_bytes(b"\x00" * 100)
    with pytest.raises(
        OSError, match=r"2014-01-07 03:00:00 in .*store.zarr cannot be read .*make cache ARGS=.--verify"
    ):
        contents(folder / "store.zarr")
    (folder / "store.zarr/frames/c/0/0/0/0").unlink()  # as after a power cut
    with pytest.raises(OSError, match=r"2014-01-07 00:00:00 .* cannot be read \(its file is missing\)"):
        contents(folder / "store.zarr")
    assert verify_store(folder / "store.zarr", [("2014-01-07 02:00", "2014-01-08")]) == ["2014-01-07T03:00:00"]
    assert verify_store(folder / "store.zarr") == ["2014-01-07T00:00:00"]
    assert build(folder).built == 2
    np.testing.assert_array_equal(contents(folder / "store.zarr"), before)


def test_a_frame_is_on_the_disk_before_its_mark(folder, monkeypatch):
    seen, flush = [], frames.flush_to_disk

    def watch(file, below):
        flush(file, below)
        seen.append((Path(file).relative_to(folder / "store.zarr"), frames._done_rows(folder / "store.zarr")))

    monkeypatch.setattr(frames, "flush_to_disk", watch)
    build(folder)
    chunks = [(int(file.parts[2]), done) for file, done in seen if file.parts[0] == "frames"]
    assert chunks == [(row, set(range(row))) for row in range(5)]


# ---------------------------------------------------------------------------------------------------- bad indices
def test_index_without_a_column_is_refused(folder):
    pd.read_csv(folder / "index.csv").drop(columns="present").to_csv(folder / "index.csv", index=False)
    with pytest.raises(ValueError, match="has no column present; it has path, timestep"):
        read_index(folder / "index.csv")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"cannot be read as a table \(No columns.*\). An index is a CSV with the columns"),
        ('\x89HDF\n"', "cannot be read as a table"),
        ("path;timestep;present\na.nc;2014-01-07;1\n", "has no column path, present, timestep"),
        (
            "path,timestep,present\na.nc,2014-01-07,yes\n",
            'Row 2 of the index .* has "yes" in its column present, not 0 or 1',
        ),
        ("path,timestep,present\na.nc,2014-01-07,\n", 'Row 2 of the index .* has "" in its column present, not 0 or 1'),
        ("path,timestep,present\n,2014-01-07,0\n,2014-01-08,1\n", 'Row 3 .* "" in its column path, not the path'),
        ("path,timestep,present\n", "nothing to build: the index has not one present frame"),
    ],
)
def test_an_odd_index_is_described(tmp_path, text, said):
    (tmp_path / "index.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=said):
        build(tmp_path)


def test_times_of_an_index_may_have_zones_and_flags_be_words(folder):
    index = pd.read_csv(folder / "index.csv")
    index["timestep"] = pd.to_datetime(index["timestep"]).dt.tz_localize("UTC").dt.tz_convert("Asia/Tokyo")
    index["present"] = index["present"] == 1
    index.to_csv(folder / "index.csv", index=False)
    read = read_index(folder / "index.csv")
    assert read.table["time"].tolist() == HOURS.delete(2).tolist() and read.missing == 1


def test_a_span_without_frames_is_said(folder):
    report = build(folder, native_size=32, between=[("2015-01-01", "2015-02-01")])
    assert (report.built, report.missing) == (0, 0)
    assert "the index has not one present frame from 2015-01-01 to 2015-02-01" in str(report)


def test_unsorted_and_repeated_rows_are_put_in_order_and_said(folder):
    index = pd.read_csv(folder / "index.csv")
    pd.concat([index[::-1], index[:1]]).to_csv(folder / "index.csv", index=False)
    read = read_index(folder / "index.csv")
    assert read.table["time"].is_monotonic_increasing and len(read.table) == 5 and read.missing == 1
    assert ["sorted" in note for note in read.notes] == [True, False] and "twice" in read.notes[1]
    assert "sorted" in str(build(folder))


def test_two_files_for_one_time_are_refused(folder):
    index = pd.read_csv(folder / "index.csv")
    index.loc[1, "timestep"] = index.loc[0, "timestep"]
    index.to_csv(folder / "index.csv", index=False)
    with pytest.raises(
        ValueError, match=r"different files for 2014-01-07 00:00:00: .*0000.nc and .*0100.nc \(rows 2 and"
    ):
        read_index(folder / "index.csv")


@pytest.mark.parametrize(("cell", "said"), [("yesterday", 'has "yesterday"'), ("", "has an empty timestep")])
def test_a_time_that_is_none_is_named_with_its_row(folder, cell, said):
    index = pd.read_csv(folder / "index.csv", dtype=str)
    index.loc[3, "timestep"] = cell
    index.to_csv(folder / "index.csv", index=False)
    with pytest.raises(ValueError, match=f"Row 5 of the index .*{said}"):
        read_index(folder / "index.csv")


def test_no_index_and_no_store_say_where_to_look(tmp_path):
    with pytest.raises(FileNotFoundError, match="no index .*none.csv. Check data.index"):
        read_index(tmp_path / "none.csv")
    with pytest.raises(FileNotFoundError, match="no frame store at .* Build it with `make cache`"):
        open_store(tmp_path / "none.zarr")


def test_the_real_index_is_understood():
    read = read_index(ROOT / "tests/data/surya_aws_s3_val_excerpt.csv")
    assert read.missing == 46 and len(read.table) + read.missing == 60
    assert read.table["path"].str.startswith("s3://nasa-surya-bench/2011/").all()


# ---------------------------------------------------------------------------------------------------- another store
def test_a_store_of_another_kind_is_refused(folder):
    build(folder, channels=THREE)
    path = folder / "store.zarr"
    with pytest.raises(ValueError, match="was built with pooling 2, but the config asks for 4"):
        build(folder, channels=THREE, pooling=4)
    with pytest.raises(ValueError, match="has no channel aia94 .it has aia171, hmi_m, hmi_v"):
        build(folder, channels=["aia94", "aia171"])
    with pytest.raises(ValueError, match="native_size 32, but the config asks for 64"):
        open_store(path, native_size=64)
    other = SCALERS | {"hmi_m": type(SCALERS["hmi_m"])(0.0, 1.0, 0.5, 1e-8)}
    with pytest.raises(ValueError, match="scale factor 0.01 of hmi_m, but data.scalers has 0.5"):
        open_store(path, scalers=other)
    assert build(folder, channels=["hmi_v", "aia171"]).already == 5  # fewer channels, another order: the same store


def test_what_is_no_store_is_neither_read_nor_overwritten(folder):
    path = folder / "store.zarr"
    path.write_text("my notes")
    with pytest.raises(FileExistsError, match="store.zarr is there, but is not a frame store"):
        build(folder)
    path.unlink()
    path.mkdir()
    (path / "notes.txt").touch()
    with pytest.raises(FileExistsError, match="Move it away"):
        build(folder)
    (path / "zarr.json").write_text("")  # a power cut on some disks
    for use in (open_store, lambda path: build(folder)):
        with pytest.raises(ValueError, match="store.zarr cannot be opened: its zarr.json is damaged"):
            use(path)
    with pytest.raises(ValueError, match="Images of 32 pixels cannot be pooled by 3"):
        build(folder, "three.zarr", pooling=3)


def test_store_names_differ_by_channels_and_size():
    names = {frames.store_name(c, p, n) for c in (CHANNELS, THREE, THREE[:2]) for p in (2, 4) for n in (256, 4096)}
    assert len(names) == 12 and "4096px-pool4-13ch.zarr" in names
    assert frames.store_name(THREE, 2, 256) == frames.store_name(THREE[::-1], 2, 256)


# ---------------------------------------------------------------------------------------------------- several at once
def _start(folder: Path, *between: str) -> subprocess.Popen:
    code = (
        "import sys; from helpers.data.frames import build_store\n"
        "build_store(sys.argv[1] + '/index.csv', sys.argv[1] + '/store.zarr', pooling=2, between=[sys.argv[2:]])"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(folder), *between]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)


def test_two_builders_at_once_and_one_is_killed(tmp_path):
    times = pd.date_range("2014-01-07", periods=60, freq="12min")
    write_index(tmp_path, times, side=64)
    first = _start(tmp_path, "2014-01-07 00:00", "2014-01-07 08:00")
    second = _start(tmp_path, "2014-01-07 04:00", "2014-01-07 12:00")
    marks = tmp_path / "store.zarr" / "done" / "c"
    end = time.monotonic() + 60
    while time.monotonic() < end and (not marks.exists() or len(list(marks.iterdir())) < 6):
        time.sleep(0.002)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    halfway = open_store(tmp_path / "store.zarr")
    assert 6 <= len(halfway) < 60
    for when in halfway.times:  # what counts as complete can be read, while the other one goes on
        assert halfway.read([when]).isfinite().all()
    assert second.wait(60) == 0
    third = build(tmp_path)
    assert third.built + third.already == 60 and third.already >= 40 and not third.unreadable
    build(tmp_path, "alone.zarr")
    np.testing.assert_array_equal(contents(tmp_path / "store.zarr"), contents(tmp_path / "alone.zarr"))
    assert not list((tmp_path / "store.zarr").rglob("*.partial"))


# ---------------------------------------------------------------------------------------------------- a full disk
FULL_DISK = """
import subprocess, sys, torch
from helpers.data import frames, archive as netcdf
from helpers.data.frames import build_store, open_store
from helpers.shared import DiskFullError
frames.COMPRESSED = 0.0  # as if the estimate had been too low
index, disk = sys.argv[1:]
try:
    build_store(index, disk + "/store.zarr", pooling=1, reserve_gb=0, workers=2, progress=False)
except DiskFullError as error:
    print(error)
else:
    sys.exit("no error")
store = open_store(disk + "/store.zarr")
print("readable", len(store), all(store.read([when]).isfinite().all() for when in store.times))
subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
report = build_store(index, disk + "/store.zarr", pooling=1, reserve_gb=0, progress=False)
print("resumed", report.already == len(store), report.built + report.already)
store = open_store(disk + "/store.zarr")
print("sum", sum(store.read_all(when).double().sum().item() for when in store.times))
"""


def _may_mount() -> bool:
    try:
        return subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not _may_mount(), reason="this machine does not let us mount a small disk; see the next test")
def test_a_disk_that_fills_up_stops_the_build_and_loses_nothing(tmp_path):
    times = pd.date_range("2014-01-07", periods=10, freq="1h")
    index = write_index(tmp_path, times, side=128)  # about 0.4 MB a frame
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = 'mount -t tmpfs -o size=2m tmpfs "$2" && exec "$0" -c "$3" "$1" "$2"'
    command = ["unshare", "-rm", "sh", "-c", mounted, sys.executable, str(index), str(disk), FULL_DISK]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "became full" in done.stdout and "it goes on" in done.stdout
    readable = next(line.split() for line in done.stdout.splitlines() if line.startswith("readable"))
    assert 1 <= int(readable[1]) < 10 and readable[2] == "True"
    assert "resumed True 10" in done.stdout
    build(tmp_path, "alone.zarr", pooling=1)
    total = float(next(line for line in done.stdout.splitlines() if line.startswith("sum")).split()[1])
    alone = open_store(tmp_path / "alone.zarr")
    assert total == sum(alone.read_all(when).double().sum().item() for when in alone.times)


@pytest.mark.parametrize(
    ("part", "writes"),
    [("/step/c/", 0), ("/time/c/", 0), ("/frames/c/", 2), ("/done/c/", 2)],  # creating, growing, frame, mark
)
def test_no_space_while_writing_leaves_a_store_that_resumes(folder, monkeypatch, part, writes):
    import zarr.storage._local as local

    put, calls = local._put, []

    def full(path, *arguments, **keywords):
        calls.extend([path] if part in str(path) else [])
        if len(calls) > writes:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return put(path, *arguments, **keywords)

    monkeypatch.setattr(local, "_put", full)
    with pytest.raises(DiskFullError, match="became full .* it goes on"):
        build(folder)
    monkeypatch.undo()
    assert (folder / "store.zarr").exists() == (part != "/step/c/")
    if part != "/step/c/":
        assert len(open_store(folder / "store.zarr")) == writes and len(contents(folder / "store.zarr")) == writes
    assert build(folder).built == 5 - writes
    build(folder, "alone.zarr")
    np.testing.assert_array_equal(contents(folder / "store.zarr"), contents(folder / "alone.zarr"))


def test_too_little_space_is_refused_before_writing(folder):
    with pytest.raises(DiskFullError, match=r"Writing 5 frames takes .* GB free, of which 1000000.00 GB are to remain"):
        build(folder, reserve_gb=1e6)
    assert len(open_store(folder / "store.zarr")) == 0


# ---------------------------------------------------------------------------------------------------- S3
class Relay(BaseHTTPRequestHandler):
    """Passes requests on to moto, except for the faults that a test has ordered."""

    protocol_version = "HTTP/1.1"
    moto: tuple
    faults: dict  # key -> list of "503" or "truncate", used up one by one
    seen: list

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.seen.append((self.command, self.path, "Authorization" in self.headers))
        key = self.path.split("?")[0]
        orders = self.faults[key]
        if orders and orders[0] == "503" or (orders and self.command == "GET"):
            order = orders.pop(0) if orders[0] != "truncate always" else orders[0]
        else:
            order = None
        if order == "503":
            return self._answer(503, {}, b"<Error><Code>SlowDown</Code></Error>")
        upstream = http.client.HTTPConnection(*self.moto)
        upstream.request(self.command, self.path, headers=dict(self.headers))
        reply = upstream.getresponse()
        body = reply.read()
        headers = {k: v for k, v in reply.getheaders() if k.lower() not in ("transfer-encoding", "connection", "date")}
        self._answer(reply.status, headers, body, cut=bool(order and "truncate" in order))

    do_HEAD = do_GET

    def _answer(self, status, headers, body, cut=False):
        self.send_response(status)
        for key, value in headers.items():
            if key.lower() != "content-length":
                self.send_header(key, value)
        length = headers.get("Content-Length") or headers.get("content-length") or len(body)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True


@pytest.fixture(scope="module")
def moto():
    pytest.importorskip("moto.server")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()
    server.stop()


@pytest.fixture
def s3(moto, folder, monkeypatch):
    """The six frames in a bucket behind a relay; returns (index, endpoint, Relay)."""
    import boto3
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    bucket = f"bucket-{os.urandom(4).hex()}"
    client = boto3.client("s3", endpoint_url="http://{}:{}".format(*moto))
    client.create_bucket(Bucket=bucket)
    for path in sorted(folder.rglob("*.nc")):
        client.upload_file(str(path), bucket, str(path.relative_to(folder)), {"ACL": "public-read"})
    index = pd.read_csv(folder / "index.csv")
    index["path"] = f"s3://{bucket}/" + index["path"]
    index.to_csv(folder / "s3.csv", index=False)
    client.upload_file(str(folder / "s3.csv"), bucket, "index.csv", {"ACL": "public-read"})
    relay = type("R", (Relay,), {"moto": moto, "faults": defaultdict(list), "seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), relay)
    Thread(target=server.serve_forever, daemon=True).start()
    s3fs.S3FileSystem.clear_instance_cache()
    yield f"s3://{bucket}/index.csv", f"http://127.0.0.1:{server.server_port}", relay
    server.shutdown()
    server.server_close()


def _key(index: str, hour: int) -> str:
    return f"/{index.split('/')[2]}/2014/01/20140107_{hour:02d}00.nc"


@pytest.mark.parametrize("anonymous", [True, False])
def test_frames_and_index_from_s3(s3, folder, anonymous):
    index, endpoint, relay = s3
    source = Source(anonymous, endpoint, retries=1, pause_s=0.01)
    report = build_store(index, folder / "s3.zarr", pooling=2, workers=2, source=source, progress=False)
    assert report.built == 5 and report.bytes_read > 0
    assert {signed for _, _, signed in relay.seen} == {not anonymous}
    build(folder)
    np.testing.assert_array_equal(contents(folder / "s3.zarr"), contents(folder / "store.zarr"))


def test_a_busy_server_and_a_broken_connection_are_tried_again(s3, folder):
    index, endpoint, relay = s3
    relay.faults[_key(index, 1)] = ["503"] * 3
    relay.faults[_key(index, 3)] = ["truncate"]
    relay.faults[index.removeprefix("s3:/")] = ["503"] * 3
    source = Source(True, endpoint, retries=4, pause_s=0.01)
    report = build_store(index, folder / "s3.zarr", pooling=2, source=source, progress=False)
    assert report.built == 5 and not report.unreadable
    assert [path for _, path, _ in relay.seen].count(_key(index, 1)) >= 5  # 3 refused, then HEAD and GET
    build(folder)
    np.testing.assert_array_equal(contents(folder / "s3.zarr"), contents(folder / "store.zarr"))


def test_what_cannot_be_fetched_is_reported_by_name_and_the_rest_is_built(s3, folder):
    import boto3

    index, endpoint, relay = s3
    bucket = index.split("/")[2]
    client = boto3.client("s3", endpoint_url="http://{}:{}".format(*relay.moto))
    client.delete_object(Bucket=bucket, Key="2014/01/20140107_0000.nc")
    client.put_object_acl(Bucket=bucket, Key="2014/01/20140107_0400.nc", ACL="private")
    with pytest.raises(FileNotFoundError, match="The index s3://.*none.csv: there is no such file .* Check data.index"):
        read_index(f"s3://{bucket}/none.csv", Source(True, endpoint))
    relay.faults[_key(index, 1)] = ["503"] * 50
    relay.faults[_key(index, 3)] = ["truncate always"]
    source = Source(True, endpoint, retries=2, pause_s=0.01)
    report = build_store(index, folder / "s3.zarr", pooling=2, native_size=32, source=source, progress=False)
    assert report.built == 1
    reasons = {path[-7:-3]: reason for path, reason in report.unreadable.items()}
    assert "no such file" in reasons["0000"] and "access denied" in reasons["0400"]
    assert "in 3 tries" in reasons["0100"] and "in 3 tries" in reasons["0300"]
    store = open_store(folder / "s3.zarr")
    assert len(store) == 1 and len(list((folder / "s3.zarr/frames/c").glob("*/0/0/*"))) == 1
    relay.faults.clear()
    assert build_store(index, folder / "s3.zarr", pooling=2, source=source, progress=False).built == 2


def test_a_server_that_cannot_be_reached_stops_the_build(folder):
    index = pd.read_csv(folder / "index.csv")
    index["path"] = "s3://bucket/" + index["path"]
    index.to_csv(folder / "s3.csv", index=False)
    source = Source(True, "http://127.0.0.1:9", retries=0, pause_s=0.01)
    with pytest.raises(ConnectionError, match="Check the network, and data.endpoint_url"):
        read_index("s3://bucket/index.csv", source)
    with pytest.raises(ConnectionError, match="Check the network, and data.endpoint_url"):
        build_store(folder / "s3.csv", folder / "s3.zarr", pooling=2, native_size=32, source=source, progress=False)


# ---------------------------------------------------------------------------------------------------- by configuration
@pytest.fixture
def config(folder, monkeypatch):
    """A configuration with the six frames and a shared folder of its own; call it with further values."""
    monkeypatch.chdir(folder)
    values = {
        "paths.shared": str(folder),
        "data.index": str(folder / "index.csv"),
        "data.store": "{shared}/frames",
        "data.native_size": 32,
        "data.reduce": 2,
        "data.channels": list(THREE),
        "data.offsets_minutes": [-60, 0],
        "paths.reserve_gb": 0.0,
        "split.train": ["2014-01-07 01:00", "2014-01-07 02:00"],
        "split.val": ["2014-01-07 05:00", "2014-01-07 06:00"],
        "split.test": ["2014-01-08 00:00", "2014-01-09 00:00"],
        "model.patch_size": 4,
    }
    return lambda **changes: load_config(ROOT / "config.yaml", values | changes)


def test_prepare_store_follows_the_config(folder, config):
    cfg = config()
    report = prepare_store(cfg, progress=False)
    assert (report.built, report.missing) == (4, 0)  # 00:00 and 04:00 are the earlier frames of the samples
    assert report.store == folder / "surya-course/frames" / frames.store_name(THREE, 2, 32) == frames.store_path(cfg)
    whole = prepare_store(cfg, between=[("2014-01-07", "2014-01-08")], progress=False)
    assert (whole.built, whole.already, whole.missing) == (1, 4, 1)
    description = json.loads((report.store / "zarr.json").read_text())["attributes"]
    assert description["channels"] == list(THREE)


def test_a_store_that_has_more_channels_is_shared(folder, config):
    stores, few = folder / "surya-course/frames", config(**{"data.channels": ["hmi_v", "aia171"]})
    name = frames.store_name
    assert frames.store_path(few) == stores / name(["aia171", "hmi_v"], 2, 32)  # nothing is there: one of its own
    three = prepare_store(config(), progress=False)
    assert frames.store_path(few) == three.store and not three.notes
    assert frames.store_path(config(**{"data.channels": ["aia94", "hmi_v"]})).name == name(["aia94", "hmi_v"], 2, 32)
    assert frames.store_path(config(**{"data.reduce": 1})) == stores / name(THREE, 1, 32)
    whole = prepare_store(config(**{"data.channels": list(CHANNELS)}), progress=False)
    assert frames.store_path(few) == whole.store == stores / name(CHANNELS, 2, 32)  # 13 before any other
    assert frames.store_path(config()) == three.store  # and the exact one before all
    report = prepare_store(few, progress=False)
    assert (report.built, report.already, report.store) == (0, 4, whole.store)
    assert "for more channels than are needed here: it holds aia94" in str(report)
    own = stores / name(["aia171", "hmi_v"], 2, 32)
    build_store(folder / "index.csv", own, ["aia171", "hmi_v"], pooling=2, progress=False)
    assert frames.store_path(few) == own


def test_a_read_only_store_with_more_channels_is_read_and_what_it_lacks_is_built_privately(
    folder, config, monkeypatch, tmp_path
):
    from helpers import shared

    whole = prepare_store(config(**{"data.channels": list(CHANNELS)}), progress=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    for module in (shared, frames):
        monkeypatch.setattr(module, "is_writable", lambda path: folder / "surya-course" not in (path, *path.parents))
    few = config(**{"data.channels": ["hmi_v", "aia171"]})
    report = prepare_store(few, progress=False)
    assert (report.built, report.already, report.store) == (0, 4, whole.store) and frames.store_path(few) == whole.store
    day = prepare_store(few, between=[("2014-01-07", "2014-01-08")], progress=False)
    private = tmp_path / "home/surya-course/frames" / frames.store_name(["hmi_v", "aia171"], 2, 32)
    assert (day.built, day.store) == (5, private) and frames.store_path(few) == private
    assert len(open_store(whole.store)) == 4 and not day.notes


def test_a_store_that_cannot_be_read_is_not_shared(folder, config, tmp_path):
    whole = prepare_store(config(**{"data.channels": list(CHANNELS)}), progress=False).store
    table = yaml.safe_load((ROOT / "helpers/data/scalers.yaml").read_text())
    table["hmi_v"]["sl_scale_factor"] = 0.5
    (tmp_path / "scalers.yaml").write_text(yaml.safe_dump(table))
    other = config(**{"data.scalers": str(tmp_path / "scalers.yaml")})
    assert frames.store_path(config()) == whole != frames.store_path(other)
    group = zarr.open_group(whole, mode="r+", use_consolidated=False)
    del group.attrs["format"]
    frames._consolidate(whole)
    assert frames.store_path(config()) != whole
    assert prepare_store(config(), progress=False).built == 4


def test_channels_that_are_predicted_are_built_too(folder, config):
    from helpers.data.dataset import make_loaders

    cfg = config(
        **{
            "data.channels": ["hmi_bz", "aia171"],
            "labels.kind": "image",
            "labels.path": None,
            "labels.target_channels": ["aia94"],
            "target.metrics": ["rmse"],
            "data.offsets_minutes": [0],
            "model.time_dim": 1,
            "split.train": ["2014-01-07 00:00", "2014-01-07 02:00"],
            "split.val": ["2014-01-07 03:00", "2014-01-07 04:00"],
            "split.test": ["2014-01-07 05:00", "2014-01-07 06:00"],
            "split.guard_hours": 0.5,
        }
    )
    assert frames.channels_needed(cfg) == ("aia94", "aia171", "hmi_bz")
    report = prepare_store(cfg, progress=False)
    assert (
        report.built == 4
        and report.missing == 0
        and report.store.name == frames.store_name(("aia94", "aia171", "hmi_bz"), 2, 32)
    )
    assert open_store(report.store).stored_channels == ("aia94", "aia171", "hmi_bz")
    item = make_loaders(cfg).train.dataset[0]
    images = physical_frame(32, 0)
    assert item["ts"].shape == (2, 1, 16, 16) and item["target"].shape == (1, 16, 16)
    for plane, name in ((item["ts"][0, 0], "hmi_bz"), (item["ts"][1, 0], "aia171"), (item["target"][0], "aia94")):
        expected = (signed_log(images, name, 2) - SCALERS[name].mean) / SCALERS[name].std
        np.testing.assert_allclose(plane, expected, rtol=0, atol=ERROR_BOUND)


def test_the_command_verifies_and_builds_the_span_it_is_given(folder, config, monkeypatch, capsys):
    image = {
        "labels.path": None,
        "labels.kind": "image",
        "labels.target_channels": ["hmi_m"],
        "target.metrics": ["mae"],
    }
    cfg = config(**{"synthetic.folder": None, "labels.target_offset_minutes": 60} | image)
    store = prepare_store(cfg, [("2014-01-07", "2014-01-08")], progress=False).store
    for row in (0, 4):
        (store / f"frames/c/{row}/0/0/0").write_bytes(b"\x00" * 100)
    monkeypatch.setattr(frames, "load_config", lambda *_, **__: cfg)
    monkeypatch.setattr(sys, "argv", ["frames", "--verify", "--start", "2014-01-07T14:00+09:00"])  # 05:00 in UTC
    frames.main()
    said = capsys.readouterr().out
    assert "damaged: 2014-01-07T05:00:00\n" in said and "1 built" in said and "0 there already" in said
    monkeypatch.setattr(sys, "argv", ["frames", "--start", "yesterday"])
    with pytest.raises(SystemExit):
        frames.main()
    assert 'argument --start: "yesterday" is not a time' in capsys.readouterr().err
