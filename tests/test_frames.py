"""Building and reading the frame store, including what goes wrong on real disks and networks."""

import errno
import http.client
import json
import os
import shutil
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
import hdf5plugin
import numpy as np
import pandas as pd
import pytest
import torch
import xarray
import zarr
import zarr.storage._local as local
from frame_files import physical_frame, write_index, write_netcdf

from helpers.channels import CHANNELS, ERROR_BOUND, UNITS, coding_of, load_scalers
from helpers.config import load_config
from helpers.data import archive as archives
from helpers.data import frames
from helpers.data.archive import Archive, ArchiveError, FrameError, open_netcdf, read_index, read_variable
from helpers.data.frames import build_store, open_store, prepare_store, reduce_frame, verify_store, worker_pool
from helpers.data.labels import plan_samples
from helpers.shared import DiskFullError

ROOT = Path(__file__).parents[1]
SCALERS = load_scalers()
CODINGS = {name: coding_of(name, SCALERS[name]) for name in CHANNELS}
HOURS = pd.date_range("2014-01-07", periods=6, freq="1h")
THREE = ("aia171", "hmi_m", "hmi_v")
BAD = "2014/01/20140107_0300.nc"


def signed_log(images: dict, name: str, reduce: int) -> np.ndarray:
    """Average pooling and the signed logarithm in plain numpy, in float64."""
    side = images[name].shape[0] // reduce
    pooled = images[name].astype(np.float64).reshape(side, reduce, side, reduce).mean((1, 3))
    scaled = pooled * SCALERS[name].scale
    return np.sign(scaled) * np.log(1 + np.abs(scaled))


def build(folder: Path, name: str = "store.zarr", times=HOURS, **arguments):
    usual = {"archive": Archive(str(folder)), "native_size": 32, "reduce": 2, "reserve_gb": 0.0, "progress": False}
    return build_store(times, folder / name, **usual | arguments)


def files(store: Path) -> dict[str, bytes]:
    """Every file of a store that counts."""
    inside = (path for path in store.rglob("*") if path.is_file() and path.suffix != ".partial")
    return {str(path.relative_to(store)): path.read_bytes() for path in inside}


@pytest.fixture
def folder(tmp_path):
    """Five frames an hour apart; the one at 02:00 is missing."""
    write_index(tmp_path, HOURS, present=[1, 1, 0, 1, 1, 1])
    return tmp_path


# ---------------------------------------------------------------------------------------------------- what is built
def test_store_holds_the_reduced_signed_logarithm_and_strangers_can_read_it(folder):
    report = build(folder)
    assert (report.built, report.missing, report.unreadable) == (5, 1, {}) and report.lost == {HOURS[2]}
    store = open_store(folder / "store.zarr")
    assert store.times.tolist() == HOURS.delete(2).to_pydatetime().tolist()
    assert HOURS[3] in store and HOURS[2] not in store and pd.Timestamp("2014-01-07 03:05") not in store
    read = store.read(HOURS.delete(2))  # (C, T, H, W) normalised
    assert read.shape == (13, 5, 16, 16) and read.dtype == torch.float32
    with xarray.open_zarr(folder / "store.zarr", chunks=None) as stranger:
        assert list(stranger.channel.values) == list(CHANNELS) and stranger.attrs["units"][-1] == "m/s"
        for t, seed in enumerate((0, 1, 3, 4, 5)):
            frame = stranger.sel(time=HOURS[seed])
            values, images = frame.frames * frame.step + frame.offset, physical_frame(32, seed)
            for c, name in enumerate(CHANNELS):
                expected, scaler = signed_log(images, name, 2), SCALERS[name]
                np.testing.assert_allclose(values[c], expected, rtol=0, atol=ERROR_BOUND * scaler.std)
                normalised = (expected - scaler.mean) / (scaler.std + scaler.epsilon)
                np.testing.assert_allclose(read[c, t], normalised, rtol=0, atol=ERROR_BOUND)
        assert stranger.sel(time=HOURS[2]).frames.isnull().all()  # no number where there is no frame


EXTREMES = {"DN": (0, 60_000), "G": (-4000, 4000), "m/s": (-7000, 7000)}


def test_the_bound_holds_for_every_pixel_of_every_channel(tmp_path):
    images = {}
    for name in CHANNELS:  # all values that an instrument has given, dense near 0
        low, high = EXTREMES[UNITS[name]]
        ends = np.geomspace(1e-3, high, 2048)
        values = np.concatenate([-ends if low else np.linspace(0, high, 2048), ends])
        images[name] = values.reshape(64, 64).astype(np.float32)
    codes = reduce_frame(write_netcdf(tmp_path / "a.nc", images), CODINGS, 1, SCALERS, 64)
    assert codes.dtype == np.int16
    for i, name in enumerate(CHANNELS):
        exact, stored, scaler = signed_log(images, name, 1), CODINGS[name].decode(codes[i]), SCALERS[name]
        assert np.abs(stored - exact).max() / (scaler.std + scaler.epsilon) <= ERROR_BOUND, name
        assert np.abs(stored - exact).max() <= 2**-11 * 1.01, name
        assert (stored[images[name] == 0] == 0).all()


def test_channels_are_read_by_name_and_the_others_are_not_read(folder):
    build(folder)
    whole, part = open_store(folder / "store.zarr"), open_store(folder / "store.zarr", ["hmi_v", "aia94"])
    both = whole.read([HOURS[3]])[[12, 0]]
    assert torch.equal(part.read([HOURS[3]]), both) and torch.equal(whole.select(part.channels).read([HOURS[3]]), both)
    whole.load([HOURS[3]])
    assert torch.equal(whole.select(part.channels).read([HOURS[3]]), both)
    damaged = bytearray(part.file(HOURS[3]).read_bytes())
    damaged[len(damaged) // 2] ^= 1  # in the chunk of a channel that is not asked for
    part.file(HOURS[3]).write_bytes(damaged)
    assert torch.equal(part.read([HOURS[3]]), both)
    with pytest.raises(KeyError, match="no frame at 2014-01-07 02:00:00"):
        part.read([HOURS[2]])
    with pytest.raises(ValueError, match="has no channel aia1"):
        part.select(["aia1"])


def test_large_images_have_tiles_of_their_own(tmp_path):
    write_index(tmp_path, HOURS[:1], side=2048, channels=("aia94",))
    build(tmp_path, times=HOURS[:1], channels=("aia94",), native_size=2048, reduce=1)
    array = zarr.open_group(tmp_path / "store.zarr", mode="r")["frames"]
    assert (array.chunks, array.shards) == ((1, 1, 1024, 1024), (1, 1, 2048, 2048))
    expected = signed_log(physical_frame(2048, 0, ["aia94"]), "aia94", 1)
    found = open_store(tmp_path / "store.zarr").read(HOURS[:1])[0, 0] * SCALERS["aia94"].std + SCALERS["aia94"].mean
    np.testing.assert_allclose(found, expected, rtol=0, atol=ERROR_BOUND * SCALERS["aia94"].std)


def test_building_again_opens_no_file_and_only_what_is_asked_for_is_built(folder, monkeypatch):
    opened = []
    monkeypatch.setattr(archives, "open_netcdf", lambda path: opened.append(Path(path).name) or open_netcdf(path))
    assert build(folder, times=HOURS[3:5]).built == 2
    assert sorted(opened) == ["20140107_0300.nc", "20140107_0400.nc"]
    report = build(folder)
    assert (report.built, report.already, len(opened)) == (3, 2, 5)
    before = files(folder / "store.zarr")
    report = build(folder)
    assert (report.built, report.already, report.missing, len(opened)) == (0, 5, 1, 5)
    assert files(folder / "store.zarr") == before
    with pytest.raises(ValueError, match="2014-01-07 00:05:00 is not in the calendar"):
        build(folder, times=["2014-01-07 00:05"])


def test_processes_and_the_workers_of_a_dask_cluster_give_the_same_bytes(folder):
    from distributed import Client

    build(folder)
    with worker_pool(2) as pool:
        assert build(folder, "processes.zarr", executor=pool).built == 5
    with Client(processes=False, n_workers=1, dashboard_address=None) as client:
        assert build(folder, "dask.zarr", executor=client.get_executor()).built == 5
    assert files(folder / "store.zarr") == files(folder / "processes.zarr") == files(folder / "dask.zarr")


def test_a_shared_folder_stays_open_to_the_group_whatever_the_umask(folder):
    shared = folder / "shared"
    shared.mkdir()
    shared.chmod(0o2775)
    before = os.umask(0o022)
    try:
        build(folder, "shared/deep/store.zarr")
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode for path in shared.rglob("*")}
    assert modes and all(mode & 0o020 for mode in modes.values()), modes


# ---------------------------------------------------------------------------------------------------- odd files
def _write_other(images, spoil=lambda file: None, **options):
    def write(path):
        with h5py.File(path, "w") as file:
            for name, image in images.items():
                file.create_dataset(name, data=image, **options)
            spoil(file)

    return write


def _spoiled(change):
    """A function that writes a frame and then does `change` to the open file."""

    def write(path):
        write_netcdf(path, physical_frame(32, 0))
        with h5py.File(path, "a") as file:
            change(file)

    return write


def _replace(name, make):
    def change(file):
        del file[name]
        make(file)

    return _spoiled(change)


def _virtual(file):
    layout = h5py.VirtualLayout((32, 32), "f4")
    layout[:] = h5py.VirtualSource("/etc/hostname.h5", "x", (32, 32))
    file.create_virtual_dataset("aia94", layout)


def _image(name, change):
    images = physical_frame(32, 0)
    change(images[name])
    return lambda path: write_netcdf(path, images)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda p: write_netcdf(p, physical_frame(32, 0, CHANNELS[1:])), "no variable aia94"),
        (_image("aia304", lambda i: i[:8, :8].fill(np.nan)), r"aia304 has pixels .* not numbers \(NaN\), in 6.2%"),
        (_image("hmi_m", lambda i: i.fill(0)), "hmi_m is 0 G in every pixel"),
        (
            _image("aia94", lambda i: i[4:6, 6:8].fill(2e5)),
            r"aia94 goes from .* to 200000 DN .* -64.* to 1.049e\+05 DN",
        ),
        (_image("aia94", lambda i: i[4:6, 6:8].fill(-100)), "aia94 goes from -100 to"),
        (lambda p: write_netcdf(p, physical_frame(48, 0)), "aia94 has the shape 48 x 48, expected 32 x 32"),
        (lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), "cut short or damaged"),
        (lambda p: p.write_text("<html>sorry</html>" * 100), r"not NetCDF4 \(HDF5\)"),
        (_replace("aia94", lambda f: f.create_group("aia94")), "aia94 is a group"),
        (_replace("aia94", lambda f: f.create_dataset("aia94", data=1.0)), "aia94 has the shape of a single number"),
        (_replace("aia94", lambda f: f.create_dataset("aia94", data="quiet")), "aia94 holds object, not numbers"),
        (_replace("aia94", lambda f: f.update(aia94=h5py.SoftLink("/nowhere"))), "aia94 is a link"),
        (_replace("aia94", lambda f: f.update(aia94=h5py.ExternalLink("own.nc", "aia94"))), "aia94 is a link"),
        (
            _replace("aia94", lambda f: f.create_dataset("aia94", (32, 32), "f4", external=[("own.raw", 0, 4096)])),
            "the values of aia94 lie in other files",
        ),
        (_replace("aia94", _virtual), "the values of aia94 lie in other files"),
        (_spoiled(lambda f: f["hmi_v"].attrs.update(units="furlong/h")), "hmi_v is given in furlong/h"),
        (_spoiled(lambda f: f["hmi_v"].attrs.update(_FillValue="none")), "cannot be read"),
    ],
)
def test_an_odd_file_is_listed_with_its_reason_and_built_once_it_is_mended(folder, spoil, reason):
    bad = folder / BAD
    good = bad.read_bytes()
    (folder / "own.raw").write_bytes(b"secret.." * 512)
    shutil.copy(bad, folder / "own.nc")
    spoil(bad)
    report = build(folder)
    assert report.built == 4 and list(report.unreadable) == [str(bad)] and report.lost == {HOURS[2], HOURS[3]}
    assert pd.Series(report.unreadable.values()).str.contains(reason).all(), report.unreadable
    assert BAD in str(report) and HOURS[3] not in open_store(folder / "store.zarr")
    bad.write_bytes(good)
    assert build(folder).built == 1


def test_what_the_attributes_of_a_variable_say_is_honoured(tmp_path):
    field = np.linspace(-100, 100, 1024, dtype=np.float32).reshape(32, 32)
    gap = np.where(np.arange(32) < 8, np.nan, field)
    encodings = {
        "packed": {"dtype": "int16", "scale_factor": 0.1, "_FillValue": -32768},
        "gap": {"_FillValue": -9999.0},
    }
    images = {"packed": field, "gap": gap, "kilogauss": field / 1000}
    dataset = xarray.Dataset({name: (("y", "x"), image) for name, image in images.items()})
    dataset["turned"] = (("x", "y"), field.T)
    dataset["missing"] = (("y", "x"), np.where(field > 0, 9999, field).astype("i4"), {"missing_value": np.int32(9999)})
    dataset["kilogauss"].attrs["units"] = "kG"
    dataset.to_netcdf(tmp_path / "a.nc", engine="h5netcdf", encoding=encodings)
    with open_netcdf(tmp_path / "a.nc") as file:
        np.testing.assert_allclose(read_variable(file, "packed"), field, atol=0.051)
        np.testing.assert_array_equal(read_variable(file, "gap"), gap)
        np.testing.assert_array_equal(read_variable(file, "turned"), field)
        np.testing.assert_allclose(read_variable(file, "kilogauss", "G"), field, rtol=1e-5)
        assert np.isnan(read_variable(file, "missing")[field > 0]).all()


@pytest.mark.parametrize("method", [hdf5plugin.LZ4(), hdf5plugin.Zstd(), hdf5plugin.Blosc()])
def test_frames_of_other_compressors_are_read(tmp_path, method):
    images = physical_frame(64, 0)
    _write_other(images, chunks=(32, 64), **method)(tmp_path / "a.nc")
    write_netcdf(tmp_path / "b.nc", images)
    read = [reduce_frame(tmp_path / name, CODINGS, 2, SCALERS, 64) for name in ("a.nc", "b.nc")]
    np.testing.assert_array_equal(*read)


def test_an_unknown_compressor_is_named(tmp_path, monkeypatch):
    _write_other(physical_frame(32, 0), chunks=(32, 32), **hdf5plugin.LZ4())(tmp_path / "a.nc")
    monkeypatch.setattr(h5py.h5z, "filter_avail", lambda code: code != 32004)
    with open_netcdf(tmp_path / "a.nc") as file, pytest.raises(FrameError, match="HDF5 filter 32004 .*hdf5plugin"):
        read_variable(file, "aia94")


# ---------------------------------------------------------------------------------------------------- damaged stores
def test_a_flipped_bit_anywhere_in_a_frame_is_found_named_and_mended(folder):
    build(folder)
    store, before = open_store(folder / "store.zarr"), files(folder / "store.zarr")
    file = store.file(HOURS[3])
    whole = file.read_bytes()
    spoiled = [whole[:n] for n in (0, 100, len(whole) - 1)]
    for place in [*range(0, len(whole), 97), len(whole) - 1]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        spoiled.append(bytes(flipped))
    for content in spoiled:
        file.write_bytes(content)
        with pytest.raises(OSError, match=r"c.161655.0.0.0 \(.*`make cache ARGS=--verify`"):
            store.read([HOURS[3]])
    assert verify_store(store.path) == ["2014-01-07T03:00:00"] and HOURS[3] not in store
    assert build(folder).built == 1 and files(store.path) == before


def test_links_inside_a_store_are_not_followed(folder):
    build(folder)
    store, outside = open_store(folder / "store.zarr"), folder / "outside"
    outside.write_bytes(store.file(HOURS[3]).read_bytes())
    mine = outside.read_bytes()
    store.file(HOURS[3]).unlink()
    store.file(HOURS[3]).symlink_to(outside)
    assert HOURS[3] not in store and len(store.times) == 4 and verify_store(store.path) == []
    assert build(folder).built == 1
    assert not store.file(HOURS[3]).is_symlink() and outside.read_bytes() == mine
    (store.path / "frames").rename(folder / "elsewhere")
    (store.path / "frames").symlink_to(folder / "elsewhere")
    for use in (open_store, verify_store, lambda path: build(folder)):
        with pytest.raises(ValueError, match="frames is a link to elsewhere"):
            use(store.path)


def _metadata(change):
    def spoil(path):
        described = json.loads((path / "zarr.json").read_text())
        change(described["attributes"], described["consolidated_metadata"]["metadata"]["frames"])
        (path / "zarr.json").write_text(json.dumps(described))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: shutil.rmtree(path / "step" / "c"), "its array step does not agree"),
        (_metadata(lambda a, f: a.update(format="int16 fixed point, 1")), "its format is int16 fixed point, 1"),
        (_metadata(lambda a, f: a.pop("format")), "its format is none"),
        (_metadata(lambda a, f: a.update(reduce=4)), "shape of its frames does not agree"),
        (_metadata(lambda a, f: f["codecs"].append({"name": "numcodecs.pickle"})), "cannot be used"),
        (lambda path: (path / "zarr.json").write_text(""), "cannot be used"),
    ],
)
def test_a_store_that_is_not_ours_or_of_another_version_is_refused_with_a_command(folder, spoil, said):
    build(folder)
    spoil(folder / "store.zarr")
    for use in (open_store, verify_store, lambda path: build(folder)):
        with pytest.raises(ValueError, match=f"{said}.* mv .*store.zarr .*store.zarr.old && make cache"):
            use(folder / "store.zarr")


def test_a_store_of_another_kind_is_refused(folder):
    build(folder, channels=THREE)
    path = folder / "store.zarr"
    with pytest.raises(ValueError, match="was built with reduce 2, but the config asks for 4"):
        build(folder, channels=THREE, reduce=4)
    with pytest.raises(ValueError, match="has no channel aia94; it has aia171, hmi_m, hmi_v"):
        build(folder, channels=["aia94", "aia171"])
    other = SCALERS | {"hmi_m": type(SCALERS["hmi_m"])(0.0, 1.0, 0.5, 1e-8)}
    with pytest.raises(ValueError, match="scale_factors .0.01, 0.01, .*, but the config asks for .0.01, 0.5"):
        open_store(path, scalers=other)
    assert build(folder, channels=["hmi_v", "aia171"]).already == 5  # fewer channels, another order: the same store
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").touch()
    with pytest.raises(FileExistsError, match="notes is there, but is no frame store"):
        build(folder, "notes")
    with pytest.raises(ValueError, match="cannot be reduced by 3"):
        build(folder, "three.zarr", reduce=3)
    with pytest.raises(FileNotFoundError, match="no frame store at .* Build it with `make cache`"):
        open_store(folder / "none.zarr")


# ---------------------------------------------------------------------------------------------------- kills, full disks
def _in_a_fork(work) -> int:
    """Start `work()` in a process of its own that shares what is imported."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def _ends(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _at_write(number: int, then):
    """Zarr's way to the disk, with `then(path, bytes)` in place of write `number`."""
    put, left = local._put, [number]

    def patched(path, value, **options):
        left[0] -= 1
        return then(path, value.to_bytes()) if left[0] < 0 else put(path, value, **options)

    return patched


def _die_halfway(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".0.partial").write_bytes(content[: len(content) // 2])
    os.kill(os.getpid(), signal.SIGKILL)


def _full(path, content):
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


@pytest.mark.parametrize("fault", [_die_halfway, _full])
def test_a_build_that_ends_at_any_write_is_completed_by_the_next_one(folder, monkeypatch, fault):
    build(folder, "undisturbed.zarr")
    expected = files(folder / "undisturbed.zarr")
    for number in range(100):
        name = f"{number}.zarr"
        with monkeypatch.context() as patch:
            patch.setattr(local, "_put", _at_write(number, fault))
            if fault is _full:
                try:
                    build(folder, name)
                    break
                except DiskFullError as error:
                    assert "became full" in str(error)
            elif _ends(_in_a_fork(lambda name=name: build(folder, name))) == 0:
                break
        if (folder / name).exists():
            store = open_store(folder / name)
            assert all(torch.isfinite(store.read([when])).all() for when in store.times)
        report = build(folder, name)
        assert report.built + report.already == 5 and files(folder / name) == expected
    assert 10 < number < 60  # every write of creating and of five frames was tried


def _may_mount() -> bool:
    try:
        return subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


FULL_DISK = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_frames import *
frames.COMPRESSED = 0.0  # as if the estimate had been too low
disk, built = Path(sys.argv[2]) / "disk", 0
for size in range(60, 300, 12):  # KB
    subprocess.run(["mount", "-o", f"remount,size={size}k", str(disk)], check=True)
    try:
        build(disk.parent, "disk/store.zarr")
        break
    except DiskFullError:
        if not (disk / "store.zarr").exists():
            continue
        store = open_store(disk / "store.zarr")
        assert len(store.times) >= built and all(store.read([when]).isfinite().all() for when in store.times)
        built = len(store.times)
build(disk.parent, "undisturbed.zarr")
assert files(disk / "store.zarr") == files(disk.parent / "undisturbed.zarr")
assert built
"""


@pytest.mark.skipif(not _may_mount(), reason="this machine does not let us mount a small disk; see the test above")
def test_a_real_disk_that_fills_up_loses_nothing(tmp_path):
    write_index(tmp_path, HOURS, side=32)
    (tmp_path / "disk").mkdir()
    mounted = 'mount -t tmpfs -o size=60k tmpfs "$3/disk" && exec "$0" -c "$1" "$2" "$3"'
    command = ["unshare", "-rm", "sh", "-c", mounted, sys.executable, FULL_DISK, str(ROOT / "tests"), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_too_little_space_is_refused_before_writing(folder):
    with pytest.raises(DiskFullError, match=r"Writing 6 frames takes .* of which 1000000.00 GB are to remain"):
        build(folder, reserve_gb=1e6)
    assert len(open_store(folder / "store.zarr").times) == 0


def test_builders_at_once_give_the_same_bytes(folder):
    build(folder, "alone.zarr")
    for attempt in range(8):
        name = f"{attempt}.zarr"
        builders = [_in_a_fork(lambda name=name: build(folder, name)) for _ in range(3)]
        assert [_ends(pid) for pid in builders] == [0, 0, 0]
        assert files(folder / name) == files(folder / "alone.zarr")
    assert not [path for path in folder.rglob("*") if path.suffix == ".partial" or path.name.startswith(".")]


def test_workers_end_with_a_builder_that_is_killed():
    code = "import os, signal; from helpers.data.frames import worker_pool; pool = worker_pool(1)\n"
    code += "print(pool.submit(os.getpid).result(), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    killed = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert killed.returncode == -signal.SIGKILL
    worker = int(killed.stdout)
    end = time.monotonic() + 60
    while time.monotonic() < end and Path(f"/proc/{worker}").exists():
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()


def test_old_leftovers_go_and_young_ones_stay(folder):
    build(folder, times=HOURS[:1])
    scratch = folder / "scratch"
    for old, partial in (
        (True, folder / "store.zarr/frames/c.1.0.0.0.abc.partial"),
        (False, folder / "store.zarr/frames/c.2.0.0.0.abc.partial"),
        (True, folder / ".store.zarr.abc/store.zarr/zarr.json"),
        (True, scratch / f"{archives.SCRATCH_PREFIX}abc/frame.nc"),
        (False, scratch / f"{archives.SCRATCH_PREFIX}def/frame.nc"),
    ):
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(b"half")
        for path in (partial, partial.parent) if old and partial.suffix != ".partial" else (partial,) if old else ():
            os.utime(path, (0, 0))
    os.utime(folder / ".store.zarr.abc", (0, 0))
    build(folder, archive=Archive(str(folder), scratch=str(scratch)))
    left = sorted(path.name for path in folder.rglob("*") if "abc" in path.name or "def" in path.name)
    assert left == ["c.2.0.0.0.abc.partial", f"{archives.SCRATCH_PREFIX}def"]


# ---------------------------------------------------------------------------------------------------- an index
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"cannot be read as a table \(.*No columns"),
        ("path;timestep;present\na.nc;2014-01-07;1\n", "has no column path, present, timestep"),
        ("path,timestep,present\na.nc,2014-01-07,yes\n", r"Row 2 .* has \['a.nc', 'yes'\]"),
        ("path,timestep,present\n,2014-01-07,0\n,2014-01-08,1\n", r"Row 3 .* has \['', '1'\]"),
        ("path,timestep,present\nfile:///a,2014-01-07,1\n", r"Row 2 .* has \['file:///a', '1'\]"),
        ("path,timestep,present\na.nc,2014-01-07,1,\nb.nc,2014-01-08,1,\n", "cannot be read as a table"),
        ("path,timestep,present\na.nc,2014-01-07,1\na.nc,2014-01-07,1,,\n", "cannot be read as a table"),
        (
            "path,timestep,present\na,2014-01-07,1\nb,2014-01-07,1\n",
            r"different files for .*: a and b \(rows 2 and 3\)",
        ),
        ("path,timestep,present\na.nc,yesterday,1\n", 'Row 2 of the index .*has "yesterday"'),
        ("path,timestep,present\na.nc,,1\n", "Row 2 of the index .*timestep"),
    ],
)
def test_an_odd_index_is_described(tmp_path, text, said):
    (tmp_path / "index.csv").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_index(str(tmp_path / "index.csv"))


def test_an_index_says_what_there_is_and_its_paths_may_be_of_another_machine(folder):
    table = pd.read_csv(folder / "index.csv")
    table["timestep"] = pd.to_datetime(table["timestep"]).dt.tz_localize("UTC").dt.tz_convert("Asia/Tokyo")
    table["path"] = "/nobackup/someone/" + table["path"].str.split("/").str[-1]
    table["dayofyear"] = 7
    pd.concat([table[::-1], table[:1]]).to_csv(folder / "released.csv")  # unsorted, a row twice, an unnamed column
    index, absent = read_index(str(folder / "released.csv"))
    assert index.index.tolist() == HOURS.delete(2).tolist() and absent == 1
    assert build(folder, archive=Archive(str(folder), index)).built == 5  # in folders by month
    for path in folder.glob("2014/01/*.nc"):
        path.rename(folder / path.name)
    report = build(folder, "flat.zarr", archive=Archive(str(folder), index))
    assert (report.built, report.missing) == (5, 1)
    assert files(folder / "flat.zarr") == files(folder / "store.zarr")


def test_the_real_index_is_understood():
    index, absent = read_index(str(ROOT / "tests/data/surya_aws_s3_val_excerpt.csv"))
    assert absent == 46 and len(index) + absent == 60
    archive = Archive(index=index)
    assert all(archive.url(time) == path == Archive().url(time) for time, path in index.items())


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
        orders = self.faults[self.path.split("?")[0]]
        order = orders.pop(0) if orders and (self.command == "GET" or orders[0] == "503") else None
        if order == "503":
            return self._answer(503, {}, b"<Error><Code>SlowDown</Code></Error>")
        upstream = http.client.HTTPConnection(*self.moto)
        upstream.request(self.command, self.path, headers=dict(self.headers))
        reply = upstream.getresponse()
        body = reply.read()
        headers = {k: v for k, v in reply.getheaders() if k.lower() not in ("transfer-encoding", "connection", "date")}
        self._answer(reply.status, headers, body, cut=order == "truncate")

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
    """The five frames in a bucket behind a relay; returns (archive, client, relay)."""
    import boto3
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    bucket = f"bucket-{os.urandom(4).hex()}"
    client = boto3.client("s3", endpoint_url="http://{}:{}".format(*moto))
    client.create_bucket(Bucket=bucket, ACL="public-read")
    for path in [*folder.rglob("*.nc"), folder / "index.csv"]:
        client.upload_file(str(path), bucket, str(path.relative_to(folder)), {"ACL": "public-read"})
    relay = type("R", (Relay,), {"moto": moto, "faults": defaultdict(list), "seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), relay)
    Thread(target=server.serve_forever, daemon=True).start()
    s3fs.S3FileSystem.clear_instance_cache()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    yield Archive(f"s3://{bucket}", endpoint_url=endpoint, retries=4, pause_s=0.01), client, relay
    server.shutdown()
    server.server_close()


def _key(archive: Archive, hour: int) -> str:
    return archive.url(HOURS[hour]).removeprefix("s3:/")


@pytest.mark.parametrize("anonymous", [True, False])
def test_frames_from_s3_without_an_index_and_with_one(s3, folder, anonymous):
    archive, _, relay = s3
    archive = replace(archive, anonymous=anonymous)
    report = build(folder, "s3.zarr", archive=archive)
    assert (report.built, report.missing, report.unreadable) == (5, 1, {}) and report.bytes_read > 0
    assert {signed for _, _, signed in relay.seen} == {not anonymous}
    index, _ = read_index(f"{archive.folder}/index.csv", archive)
    relative = replace(archive, index=index, index_folder=archive.folder)
    assert build(folder, "index.zarr", archive=relative).built == 5
    build(folder)
    assert files(folder / "s3.zarr") == files(folder / "index.zarr") == files(folder / "store.zarr")
    with pytest.raises(FileNotFoundError, match="The index s3://.*none.csv: there is no such file"):
        read_index(f"{archive.folder}/none.csv", archive)


def test_a_busy_server_and_a_broken_connection_are_tried_again(s3, folder):
    archive, _, relay = s3
    relay.faults[_key(archive, 1)] = ["503"] * 3
    relay.faults[_key(archive, 3)] = ["truncate"]
    assert build(folder, "s3.zarr", archive=archive).built == 5
    assert [path for _, path, _ in relay.seen].count(_key(archive, 1)) >= 5  # 3 refused, then HEAD and GET
    build(folder)
    assert files(folder / "s3.zarr") == files(folder / "store.zarr")


def test_what_cannot_be_fetched_is_reported_by_name_and_the_rest_is_built(s3, folder):
    archive, client, relay = s3
    bucket = archive.folder.removeprefix("s3://")
    client.put_object_acl(Bucket=bucket, Key="2014/01/20140107_0400.nc", ACL="private")
    relay.faults[_key(archive, 1)] = ["503"] * 50
    relay.faults[_key(archive, 3)] = ["truncate"] * 50
    report = build(folder, "s3.zarr", archive=replace(archive, retries=2))
    assert (report.built, report.missing) == (2, 1)
    reasons = {url[-7:-3]: reason for url, reason in report.unreadable.items()}
    assert reasons.keys() == {"0100", "0300", "0400"} and "access denied" in reasons["0400"]
    assert "in 3 tries" in reasons["0100"] and "in 3 tries" in reasons["0300"]
    relay.faults.clear()
    assert build(folder, "s3.zarr", archive=archive).built == 2


@pytest.mark.parametrize(
    ("change", "environment", "said"),
    [
        ({"endpoint_url": "http://127.0.0.1:9"}, {}, "Could not connect to the endpoint"),
        ({}, {"HTTP_PROXY": "http://127.0.0.1:9"}, "prox"),
        ({"anonymous": False}, {"AWS_PROFILE": "nobody"}, "profile .*nobody"),
        ({"folder": "s3://no-such-bucket-here"}, {}, "bucket does not exist"),
    ],
)
def test_what_is_not_the_fault_of_a_frame_stops_at_the_first_one(s3, folder, monkeypatch, change, environment, said):
    archive, _, _ = s3
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    tried, download = [], Archive._download
    monkeypatch.setattr(Archive, "_download", lambda *a: tried.append(a) or download(*a))
    with pytest.raises(ArchiveError, match=f"(?s)cannot be fetched from s3://.*{said}.*data.endpoint_url"):
        build(folder, "s3.zarr", archive=replace(archive, **change))
    assert len(tried) <= 2  # the one that failed, and the one that had been begun by then


def test_only_s3_and_folders(tmp_path):
    with pytest.raises(ArchiveError, match="not from foo://bar"):
        Archive("foo://bar")
    with pytest.raises(ArchiveError, match="no folder .*nowhere. Correct data.archive"):
        build(tmp_path, archive=Archive(str(tmp_path / "nowhere")))


# ---------------------------------------------------------------------------------------------------- by configuration
@pytest.fixture
def config(folder, monkeypatch):
    """A configuration with the five frames and a shared folder of its own; call it with further values."""
    monkeypatch.chdir(folder)
    values = {
        "paths.shared": str(folder),
        "data.archive": str(folder),
        "data.index": str(folder / "index.csv"),
        "data.store": "{shared}/frames",
        "data.native_size": 32,
        "data.reduce": 2,
        "data.channels": list(THREE),
        "paths.reserve_gb": 0.0,
        "model.patch_size": 4,
    }
    return lambda **changes: load_config(ROOT / "config.yaml", values | changes)


def test_a_store_that_has_all_channels_is_shared(folder, config):
    stores, few = folder / "surya-course/frames", config(**{"data.channels": ["hmi_v", "aia171"]})
    name = frames.store_name
    own = stores / name(["aia171", "hmi_v"], 2, 32)
    assert frames.store_path(few) == own  # nothing is there: one of its own
    whole = prepare_store(config(**{"data.channels": list(CHANNELS)}), HOURS, progress=False)
    assert frames.store_path(few) == whole.store == stores / name(CHANNELS, 2, 32)
    assert frames.store_path(config(**{"data.reduce": 1})) == stores / name(THREE, 1, 32)
    report = prepare_store(few, HOURS[3:], progress=False)
    assert (report.built, report.already, report.store) == (0, 3, whole.store)
    build(folder, str(own), channels=["aia171", "hmi_v"])
    assert frames.store_path(few) == own  # the exact one before all
    names = {name(c, p, n) for c in (CHANNELS, THREE, THREE[:2]) for p in (2, 4) for n in (256, 4096)}
    assert len(names) == 12 and name(THREE, 2, 256) == name(THREE[::-1], 2, 256)


def test_what_a_read_only_shared_folder_lacks_is_said_before_anything_is_built(folder, config, monkeypatch, tmp_path):
    from helpers import shared

    prepare_store(config(), HOURS[:2], progress=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    for module in (shared, frames):
        monkeypatch.setattr(module, "is_writable", lambda path: folder / "surya-course" not in (path, *path.parents))
    assert prepare_store(config(), HOURS[:2], progress=False).already == 2
    lacking = r"(?s)frames: 6 needed, 2 there.*to build: 4 frames.*instructor.*make cache TASK=flare"
    with pytest.raises(PermissionError, match=lacking):
        prepare_store(config(), HOURS, progress=False)
    private = config(**{"data.private_cache": True})
    report = prepare_store(private, HOURS, progress=False)
    assert (report.built, report.already, report.missing) == (3, 2, 1)  # the two that are there are copied
    assert report.store.is_relative_to(tmp_path / "home") and frames.store_path(private) == report.store
    build(folder, "alone.zarr", channels=THREE)
    assert files(report.store) == files(folder / "alone.zarr")


def test_a_build_that_would_read_very_much_asks_first(config):
    with pytest.raises(ValueError, match=r"(?s)to build: 6 frames.*more to read than data.ask_above_gb \(0 GB\)"):
        prepare_store(config(**{"data.ask_above_gb": 0}), HOURS, progress=False)


def test_the_command_verifies_and_builds_the_span_it_is_given(folder, config, monkeypatch, capsys):
    from helpers.tools import cache

    cfg = config(**{"synthetic.folder": None, "labels.path": str(folder / "labels.csv")})
    store = open_store(prepare_store(cfg, HOURS, progress=False).store)
    store.file(HOURS[0]).write_bytes(b"\x00" * 100)
    monkeypatch.setattr(cache, "load_config", lambda *_, **__: cfg)
    monkeypatch.setattr(sys, "argv", ["cache", "--verify", "--span", "2014-01-07", "2014-01-07 03:00"])
    cache.main()
    said = capsys.readouterr().out
    assert "damaged: 2014-01-07T00:00:00\n" in said and "1 built" in said and HOURS[0] in store
    monkeypatch.setattr(sys, "argv", ["cache", "--span", "yesterday", "today"])
    with pytest.raises(SystemExit):
        cache.main()
    assert "--span takes two times" in capsys.readouterr().err


def test_labels_decide_which_files_are_opened(tmp_path, monkeypatch):
    """Twelve labelled samples build 24 frames; where frames are missing the next samples take their place."""
    hours = pd.date_range("2014-01-07", periods=80, freq="2h")  # a label every other hour, so that no frame is shared
    needed = hours.union(hours - pd.Timedelta(hours=1))
    write_index(tmp_path, needed, channels=THREE)
    pd.DataFrame({"timestamp": hours, "goes_class": "M1.0"}).to_csv(tmp_path / "labels.csv", index=False)
    opened = []
    monkeypatch.setattr(archives, "open_netcdf", lambda path: opened.append(Path(path).name) or open_netcdf(path))

    def prepare(**changes):
        spans = {"train": [hours[0], hours[49]], "val": [hours[52], hours[62]], "test": [hours[66], hours[79]]}
        usual = {
            "paths.shared": str(tmp_path),
            "data.archive": str(tmp_path),
            "data.index": None,
            "data.store": "{shared}/frames",
            "data.native_size": 32,
            "data.channels": list(THREE),
            "data.offsets_minutes": [-60, 0],
            "paths.reserve_gb": 0.0,
            "model.patch_size": 4,
            "labels.path": str(tmp_path / "labels.csv"),
            "labels.lead_minutes": 0,
            "labels.tolerance_minutes": 0,
            "split.guard_hours": 1.0,
            "training.max_train_samples": 8,
            "training.max_val_samples": 2,
            "training.max_test_samples": 2,
        } | {f"split.{name}": [str(time) for time in span] for name, span in spans.items()}
        cfg = load_config(ROOT / "config.yaml", usual | changes)
        return cfg, prepare_store(cfg, progress=False)

    cfg, report = prepare()
    assert report.built == len(opened) == len(set(opened)) == 24
    first = plan_samples(cfg).samples["train"]["time"].tolist()
    _, report = prepare(**{"training.max_train_samples": 10})
    assert (report.built, report.already, len(opened)) == (4, 24, 28)
    for lost in first[:3]:
        (tmp_path / f"{lost:%Y/%m/%Y%m%d_%H%M}.nc").unlink()
    _, report = prepare(**{"data.store": "{shared}/other"})
    # a folder says itself what it lacks, so the lost frames are planned around, not asked for
    assert report.built == 24 and not report.lost
    store = open_store(report.store)
    whole = [hour in store and hour - pd.Timedelta(hours=1) in store for hour in hours]
    assert np.flatnonzero(whole).size == 12
