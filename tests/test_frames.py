"""Building and reading the frame store, including what goes wrong on real disks and networks."""

import errno
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
from helpers.data.archive import Archive, ArchiveError, open_netcdf, read_index, read_variable
from helpers.data.frames import build_store, open_store, prepare_store, reduce_frame
from helpers.shared import DiskFullError
from helpers.tools import cache

ROOT = Path(__file__).parents[1]
SCALERS = load_scalers()
CODINGS = {name: coding_of(name, SCALERS[name]) for name in CHANNELS}
HOURS = pd.date_range("2014-01-07", periods=6, freq="1h")
THREE = ("aia171", "hmi_m", "hmi_v")


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


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Five frames an hour apart (the one at 02:00 is missing), their index.csv and store.zarr; only to be read."""
    folder = tmp_path_factory.mktemp("made")
    write_index(folder, HOURS, present=[1, 1, 0, 1, 1, 1])
    build(folder)
    return folder


@pytest.fixture
def built(made, tmp_path):
    """A copy of `made`."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


@pytest.fixture
def folder(built):
    """A copy of `made` without its store."""
    shutil.rmtree(built / "store.zarr")
    return built


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


def test_the_bound_holds_for_every_pixel_of_every_channel(tmp_path):
    extremes, images = {"DN": (0, 60_000), "G": (-4000, 4000), "m/s": (-7000, 7000)}, {}
    for name in CHANNELS:  # all values that an instrument has given, dense near 0
        low, high = extremes[UNITS[name]]
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


def test_channels_are_read_by_name_and_the_others_are_not_read(built):
    whole, part = open_store(built / "store.zarr"), open_store(built / "store.zarr", ["hmi_v", "aia94"])
    both = whole.read([HOURS[3]])[[12, 0]]
    assert torch.equal(part.read([HOURS[3]]), both) and torch.equal(whole.select(part.channels).read([HOURS[3]]), both)
    whole.load([HOURS[3]])
    damaged = bytearray(part.file(HOURS[3]).read_bytes())
    damaged[len(damaged) // 2] ^= 1  # in the chunk of a channel that is not asked for
    part.file(HOURS[3]).write_bytes(damaged)
    assert torch.equal(part.read([HOURS[3]]), both)
    part.file(HOURS[3]).unlink()
    assert torch.equal(whole.select(part.channels).read([HOURS[3]]), both)  # from memory
    for gone in HOURS[2:4]:
        with pytest.raises(KeyError, match=f"no frame at {gone}"):
            part.read([gone])
    with pytest.raises(ValueError, match="has no channel aia1"):
        part.select(["aia1"])


def test_a_frame_that_goes_away_while_it_is_read_is_not_there(built, monkeypatch):
    store = open_store(built / "store.zarr")
    monkeypatch.setattr(type(store), "__contains__", lambda store, when: True)
    with pytest.raises(KeyError, match="no frame at 2014-01-07 02:00:00"):
        store.read([HOURS[2]])


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


def test_the_workers_of_a_dask_cluster_give_the_same_bytes(built):
    from distributed import Client

    with Client(processes=False, n_workers=1, dashboard_address=None) as client:
        assert build(built, "dask.zarr", executor=client.get_executor()).built == 5
    assert files(built / "store.zarr") == files(built / "dask.zarr")


KILLED = """
import os, signal, sys
from pathlib import Path
from helpers.data.archive import Archive
from helpers.data.frames import build_store
from helpers.data.workers import worker_pool
folder = sys.argv[1]
usual = {"archive": Archive(folder), "native_size": 32, "reduce": 2, "reserve_gb": 0.0, "progress": False}
assert build_store(sys.argv[2:], Path(folder, "processes.zarr"), workers=2, **usual).built == 5
pool = worker_pool(1)
print(pool.submit(os.getpid).result(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_processes_give_the_same_bytes_and_end_with_a_builder_that_is_killed(built):
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(built), *map(str, HOURS)]
    killed = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert killed.returncode == -signal.SIGKILL
    assert files(built / "store.zarr") == files(built / "processes.zarr")
    worker, end = Path(f"/proc/{int(killed.stdout)}"), time.monotonic() + 60
    while time.monotonic() < end and worker.exists():
        time.sleep(0.05)
    assert not worker.exists()


def test_a_shared_folder_stays_open_to_the_group_whatever_the_umask(folder):
    shared = folder / "shared"
    shared.mkdir()
    shared.chmod(0o2775)
    before = os.umask(0o022)
    try:
        build(folder, "shared/deep/store.zarr", times=HOURS[:1])
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode for path in shared.rglob("*")}
    assert modes and all(mode & 0o020 for mode in modes.values()), modes


# ---------------------------------------------------------------------------------------------------- odd files
def _image(change, name="aia94"):
    """A function that writes a frame after `change` to one of its images."""
    images = physical_frame(32, 0)
    change(images[name])
    return lambda path: write_netcdf(path, images)


def _spoiled(change, name=None):
    """A function that writes a frame and then does `change` to the open file, from which `name` is removed before."""

    def write(path):
        write_netcdf(path, physical_frame(32, 0))
        with h5py.File(path, "a") as file:
            if name:
                del file[name]
            change(file)

    return write


def _put(**arguments):
    return _spoiled(lambda file: file.create_dataset("aia94", **arguments), "aia94")


def _virtual(file):
    layout = h5py.VirtualLayout((32, 32), "f4")
    layout[:] = h5py.VirtualSource("/etc/hostname.h5", "x", (32, 32))
    file.create_virtual_dataset("aia94", layout)


ODD = {
    r"no variable aia94": lambda path: write_netcdf(path, physical_frame(32, 0, CHANNELS[1:])),
    r"aia304 has pixels .* not numbers \(NaN\)": _image(lambda image: image[:8, :8].fill(np.nan), "aia304"),
    r"hmi_m is 0 G in every pixel": _image(lambda image: image.fill(0), "hmi_m"),
    r"aia94 goes from .* to 200000 DN.* -64.* to 1.049e\+05": _image(lambda image: image[4:6, 6:8].fill(2e5)),
    r"aia94 goes from -100 to": _image(lambda image: image[4:6, 6:8].fill(-100)),
    r"aia94 has the shape \(48, 48\), expected \(32, 32\)": lambda path: write_netcdf(path, physical_frame(48, 0)),
    r"NetCDF4.*truncated": lambda path: path.write_bytes(_spoiled(bool)(path) or path.read_bytes()[:9000]),
    r"NetCDF4.*signature": lambda path: path.write_text("<html>sorry</html>" * 100),
    r"aia94 is a group": _spoiled(lambda file: file.create_group("aia94"), "aia94"),
    r"aia94 has the shape \(\)": _put(data=1.0),
    r"aia94 holds object, not numbers": _put(data="quiet"),
    r"aia94 is a link.*": _spoiled(lambda file: file.update(aia94=h5py.SoftLink("/nowhere")), "aia94"),
    r"aia94 is a link": _spoiled(lambda file: file.update(aia94=h5py.ExternalLink("own.nc", "aia94")), "aia94"),
    r"values of aia94 lie in other files": _put(shape=(32, 32), dtype="f4", external=[("own.raw", 0, 4096)]),
    r"values of aia94 lie in other files.*": _spoiled(_virtual, "aia94"),
    r"hmi_v is given in furlong/h": _spoiled(lambda file: file["hmi_v"].attrs.update(units="furlong/h")),
    r"NetCDF4.*none": _spoiled(lambda file: file["hmi_v"].attrs.update(_FillValue="none")),
}


def test_odd_files_are_listed_with_their_reason_and_built_once_they_are_mended(tmp_path):
    times = pd.date_range("2014-01-07", periods=len(ODD) + 1, freq="12min")
    paths = [tmp_path / f"{time:%Y/%m/%Y%m%d_%H%M}.nc" for time in times]
    for path, spoil in zip(paths, [_spoiled(bool), *ODD.values()], strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        spoil(path)
    (paths[0].parent / "own.raw").write_bytes(b"secret.." * 512)
    shutil.copy(paths[0], paths[0].parent / "own.nc")
    report = build(tmp_path, times=times)
    assert report.built == 1 and report.lost == set(times[1:]) and report.missing == 0
    for path, reason in zip(paths[1:], ODD, strict=True):
        assert pd.Series(report.unreadable[str(path)]).str.contains(reason).all(), (
            reason,
            report.unreadable[str(path)],
        )
    assert len(str(report).splitlines()) == 12 and f"and {len(ODD) - 10} more" in str(report)
    shutil.copy(paths[0], paths[1])
    assert build(tmp_path, times=times[:2]).built == 1


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


def test_frames_of_other_compressors_are_read_and_an_unknown_one_is_named(tmp_path):
    image = physical_frame(64, 0)["aia94"]
    with h5py.File(tmp_path / "a.nc", "w") as file:
        for name, method in {"a": hdf5plugin.LZ4(), "b": hdf5plugin.Zstd(), "c": hdf5plugin.Blosc()}.items():
            file.create_dataset(name, data=image, chunks=(32, 64), **method)
        unknown = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        unknown.set_chunk((32, 64))
        unknown.set_filter(307, h5py.h5z.FLAG_OPTIONAL)
        h5py.h5d.create(file.id, b"d", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((64, 64)), unknown)
    with open_netcdf(tmp_path / "a.nc") as file:
        for name in "abc":
            np.testing.assert_array_equal(read_variable(file, name), image)


# ---------------------------------------------------------------------------------------------------- damaged stores
def test_a_flipped_bit_anywhere_in_a_frame_is_found_named_and_mended(built):
    store, before = open_store(built / "store.zarr"), files(built / "store.zarr")
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
    assert cache.verify_store(store.path) == ["2014-01-07T03:00:00"] and HOURS[3] not in store
    assert build(built).built == 1 and files(store.path) == before


def test_links_inside_a_store_are_not_followed(built):
    store, outside = open_store(built / "store.zarr"), built / "outside"
    outside.write_bytes(store.file(HOURS[3]).read_bytes())
    mine = outside.read_bytes()
    store.file(HOURS[3]).unlink()
    store.file(HOURS[3]).symlink_to(outside)
    assert HOURS[3] not in store and len(store.times) == 4 and cache.verify_store(store.path) == []
    assert build(built).built == 1
    assert not store.file(HOURS[3]).is_symlink() and outside.read_bytes() == mine
    (store.path / "frames").rename(built / "elsewhere")
    (store.path / "frames").symlink_to(built / "elsewhere")
    for use in (open_store, lambda path: build(built)):
        with pytest.raises(ValueError, match="frames is a link to elsewhere"):
            use(store.path)


GZIP = {"name": "gzip", "configuration": {"level": 1}}


def _inner(metadata):
    return metadata["frames"]["codecs"][0]["configuration"]["codecs"]


def _metadata(change):
    def spoil(path):
        described = json.loads((path / "zarr.json").read_text())
        change(described["attributes"], described["consolidated_metadata"]["metadata"])
        (path / "zarr.json").write_text(json.dumps(described))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: shutil.rmtree(path / "step" / "c"), "its array step does not agree"),
        (_metadata(lambda a, m: m.pop("offset")), "cannot be used: .*offset"),
        (_metadata(lambda a, m: a.update(format="int16 fixed point, 1")), "its format is int16 fixed point, 1"),
        (_metadata(lambda a, m: a.pop("format")), "its format is none"),
        (_metadata(lambda a, m: a.update(reduce=4)), "shape of its frames does not agree"),
        (_metadata(lambda a, m: a["channels"].pop()), "shape of its frames does not agree"),
        (_metadata(lambda a, m: _inner(m).append(GZIP)), "its array frames uses the codec GzipCodec"),
        (_metadata(lambda a, m: m["frames"]["codecs"].append({"name": "numcodecs.pickle"})), "cannot be used"),
        (lambda path: (path / "zarr.json").write_text(""), "cannot be used"),
    ],
)
def test_a_store_that_is_not_ours_or_of_another_version_is_refused_with_a_command(built, spoil, said):
    spoil(built / "store.zarr")
    for use in (open_store, lambda path: build(built)):
        with pytest.raises(ValueError, match=f"{said}.* mv .*store.zarr .*store.zarr.old && make cache"):
            use(built / "store.zarr")


def test_a_store_of_another_kind_is_refused(folder):
    build(folder, channels=THREE, times=HOURS[:1])
    with pytest.raises(ValueError, match="was built with reduce 2, but the config asks for 4"):
        build(folder, channels=THREE, reduce=4)
    with pytest.raises(ValueError, match="has no channel aia94; it has aia171, hmi_m, hmi_v"):
        build(folder, channels=["aia94", "aia171"])
    other = SCALERS | {"hmi_m": type(SCALERS["hmi_m"])(0.0, 1.0, 0.5, 1e-8)}
    with pytest.raises(ValueError, match="scale_factors .0.01, 0.01, .*, but the config asks for .0.01, 0.5"):
        open_store(folder / "store.zarr", scalers=other)
    # fewer channels, another order: the same store
    assert build(folder, channels=["hmi_v", "aia171"], times=HOURS[:1]).already == 1
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").touch()
    for taken in ("notes", "index.csv"):
        with pytest.raises(FileExistsError, match=f"{taken} is there, but is no frame store"):
            build(folder, taken)
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
    two = HOURS[:2]
    build(folder, "undisturbed.zarr", times=two)
    expected = files(folder / "undisturbed.zarr")
    for number in range(100):
        name = f"{number}.zarr"
        with monkeypatch.context() as patch:
            patch.setattr(local, "_put", _at_write(number, fault))
            if fault is _full:
                try:
                    build(folder, name, times=two)
                    break
                except DiskFullError as error:
                    assert "became full" in str(error)
            elif _ends(_in_a_fork(lambda name=name: build(folder, name, times=two))) == 0:
                break
        if (folder / name).exists():
            store = open_store(folder / name)
            assert all(torch.isfinite(store.read([when])).all() for when in store.times)
        report = build(folder, name, times=two)
        assert report.built + report.already == 2 and files(folder / name) == expected
    assert len(expected) <= number < 60  # every write of creating and of the frames was tried


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


def test_builders_at_once_give_the_same_bytes(built):
    for attempt in range(4):
        name = f"{attempt}.zarr"
        builders = [_in_a_fork(lambda name=name: build(built, name)) for _ in range(3)]
        assert [_ends(pid) for pid in builders] == [0, 0, 0]
        assert files(built / name) == files(built / "store.zarr")
    assert not [path for path in built.rglob("*") if path.suffix == ".partial" or path.name.startswith(".")]


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
        ("", r"cannot be read \(.*No columns"),
        ("path;timestep;present\na.nc;2014-01-07;1\n", "cannot be read .*columns path, timestep, present"),
        ("path,timestep,present\na.nc,2014-01-07,yes\n", r"Row 2 .* has \['a.nc', 'yes'\]"),
        ("path,timestep,present\n,2014-01-07,0\n,2014-01-08,1\n", r"Row 3 .* has \['', '1'\]"),
        ("path,timestep,present\nfile:///a,2014-01-07,1\n", r"Row 2 .* has \['file:///a', '1'\]"),
        ("path,timestep,present\na,b.nc,2014-01-07,1\n", 'Row 2 of the index .*has "b.nc"'),
        ("path,timestep,present\na,2014-01-07,1\nb,2014-01-07,1\n", "different files for .*: a and b .*rows 2 and 3"),
        ("path,timestep,present\na.nc,yesterday,1\n", 'Row 2 of the index .*has "yesterday"'),
        ("path,timestep,present\na.nc,,1\n", "Row 2 of the index .*timestep"),
    ],
)
def test_an_odd_index_is_described(tmp_path, text, said):
    (tmp_path / "index.csv").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_index(str(tmp_path / "index.csv"), Archive())


def test_an_index_says_what_there_is_and_its_paths_may_be_of_another_machine(built):
    table = pd.read_csv(built / "index.csv")
    table["timestep"] = pd.to_datetime(table["timestep"]).dt.tz_localize("UTC").dt.tz_convert("Asia/Tokyo")
    table["path"] = "/nobackup/someone/" + table["path"].str.split("/").str[-1]
    table["dayofyear"] = 7
    pd.concat([table[::-1], table[:1]]).to_csv(built / "released.csv")  # unsorted, a row twice, an unnamed column
    index = read_index(str(built / "released.csv"), Archive())
    assert index.index.tolist() == HOURS.delete(2).tolist()
    for name in ("month.zarr", "flat.zarr"):  # files in folders by month, and all in one folder
        report = build(built, name, archive=Archive(str(built), index))
        assert (report.built, report.missing) == (5, 1) and files(built / name) == files(built / "store.zarr")
        for path in built.glob("2014/01/*.nc"):
            path.rename(built / path.name)


def test_the_real_index_is_understood():
    index = read_index(str(ROOT / "tests/data/surya_aws_s3_val_excerpt.csv"), Archive())
    assert len(index) == 14 and all(Archive(index=index).url(time) == Archive().url(time) for time in index.index)


# ---------------------------------------------------------------------------------------------------- S3
class Bucket(BaseHTTPRequestHandler):
    """As much of S3 as reading asks for: the bucket `sun` with the files of a folder, and faults that a test orders."""

    protocol_version = "HTTP/1.1"
    folder: Path
    faults: dict  # path -> list of SlowDown, AccessDenied or cut, used up one by one
    seen: list

    def log_message(self, *_):
        pass

    def do_GET(self):
        path, _, query = self.path.partition("?")
        self.seen.append((path, "Authorization" in self.headers))
        file, orders = self.folder / path.removeprefix("/sun/"), self.faults[path]
        order = orders.pop(0) if orders and (self.command == "GET" or orders[0] != "cut") else None
        if order in ("SlowDown", "AccessDenied"):
            self._answer(503 if order == "SlowDown" else 403, f"<Error><Code>{order}</Code></Error>".encode())
        elif not path.startswith("/sun"):
            message = "The specified bucket does not exist"
            self._answer(404, f"<Error><Code>NoSuchBucket</Code><Message>{message}</Message></Error>".encode())
        elif "list-type" in query:
            self._answer(200, b"<ListBucketResult><KeyCount>0</KeyCount></ListBucketResult>")
        elif not file.is_file():
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            self._answer(200, file.read_bytes(), cut=order == "cut")

    do_HEAD = do_GET

    def _answer(self, status, body, cut=False):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Last-Modified", "Tue, 07 Jan 2014 00:00:00 GMT")
        self.send_header("ETag", '"1"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = cut


@pytest.fixture
def s3(built, monkeypatch):
    """The five frames in a bucket; returns (archive, the class that answers)."""
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    answers = type("Answers", (Bucket,), {"folder": built, "faults": defaultdict(list), "seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), answers)
    Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    s3fs.S3FileSystem.clear_instance_cache()
    yield Archive("s3://sun", endpoint_url=f"http://127.0.0.1:{server.server_port}", pause_s=0.01), answers
    server.shutdown()
    server.server_close()


def _key(hour: int) -> str:
    return f"/sun/2014/01/20140107_{hour:02d}00.nc"


def test_frames_from_s3_without_an_index_and_with_one(s3, built):
    archive, server = s3
    report = build(built, "s3.zarr", archive=archive)
    assert (report.built, report.missing, report.unreadable) == (5, 1, {}) and report.bytes_read > 0
    assert {signed for _, signed in server.seen} == {False}
    server.seen.clear()
    archive = replace(archive, anonymous=False)
    index = read_index("s3://sun/index.csv", archive)
    assert build(built, "index.zarr", archive=replace(archive, index=index)).built == 5
    assert {signed for _, signed in server.seen} == {True}
    assert files(built / "s3.zarr") == files(built / "index.zarr") == files(built / "store.zarr")
    with pytest.raises(FileNotFoundError, match="The index s3://.*none.csv: there is no such file"):
        read_index("s3://sun/none.csv", archive)


def test_a_busy_server_and_a_broken_connection_are_tried_again(s3, built):
    archive, server = s3
    server.faults |= {_key(1): ["SlowDown"] * 3, _key(3): ["cut"]}
    assert build(built, "s3.zarr", archive=archive).built == 5
    assert [path for path, _ in server.seen].count(_key(1)) >= 5  # 3 refused, then HEAD and GET
    assert files(built / "s3.zarr") == files(built / "store.zarr")


def test_what_cannot_be_fetched_is_reported_by_name_and_the_rest_is_built(s3, built):
    archive, server = s3
    server.faults |= {_key(1): ["SlowDown"] * 50, _key(3): ["cut"] * 50, _key(4): ["AccessDenied"] * 50}
    report = build(built, "s3.zarr", archive=replace(archive, retries=2))
    assert (report.built, report.missing) == (2, 1)
    reasons = {url[-7:-3]: reason for url, reason in report.unreadable.items()}
    assert reasons.keys() == {"0100", "0300", "0400"} and "access denied" in reasons["0400"]
    assert "in 3 tries" in reasons["0100"] and "in 3 tries" in reasons["0300"]
    server.faults.clear()
    assert build(built, "s3.zarr", archive=archive).built == 3


@pytest.mark.parametrize(
    ("change", "environment", "said"),
    [
        ({"endpoint_url": "http://127.0.0.1:9"}, {}, "Could not connect to the endpoint"),
        ({}, {"HTTP_PROXY": "http://127.0.0.1:9"}, "prox"),
        ({"anonymous": False}, {"AWS_PROFILE": "nobody"}, "profile .*nobody"),
        ({"folder": "s3://no-such-bucket-here"}, {}, "bucket does not exist"),
    ],
)
def test_what_is_not_the_fault_of_a_frame_stops_at_the_first_ones(s3, built, monkeypatch, change, environment, said):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    many, tried, download = pd.date_range("2014-01-07", periods=200, freq="12min"), [], Archive._download
    monkeypatch.setattr(Archive, "_download", lambda *a: tried.append(a) or download(*a))
    with pytest.raises(ArchiveError, match=f"(?s)cannot be fetched from s3://.*{said}.*data.endpoint_url"):
        build(built, "s3.zarr", times=many, archive=replace(s3[0], **change))
    assert len(tried) < 100  # the first one, and those that were begun before that was noticed


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
    def path(**changes):
        return frames.store_path(config(**{f"data.{key}": value for key, value in changes.items()}))

    choices = [(c, n, p) for c in (CHANNELS, THREE, THREE[:2]) for n in (32, 64) for p in (1, 2)]
    assert len({path(channels=list(c), native_size=n, reduce=p) for c, n, p in choices}) == len(choices)
    assert path(channels=list(THREE)) == path(channels=list(THREE[::-1])) == frames.store_path(config())
    few, own = config(**{"data.channels": ["hmi_v", "aia171"]}), path(channels=["aia171", "hmi_v"])
    whole = prepare_store(config(**{"data.channels": list(CHANNELS)}), HOURS, progress=False).store
    assert own != whole == frames.store_path(few) == path(channels=list(CHANNELS))
    report = prepare_store(few, HOURS[3:], progress=False)
    assert (report.built, report.already, report.store) == (0, 3, whole)
    build(folder, str(own), channels=["aia171", "hmi_v"])
    assert frames.store_path(few) == own  # the exact one before all


def test_what_a_read_only_shared_folder_lacks_is_said_before_anything_is_built(folder, config, monkeypatch, tmp_path):
    from helpers import shared

    prepare_store(config(), HOURS[:2], progress=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    for module in (shared, frames):
        monkeypatch.setattr(module, "is_writable", lambda path: folder / "surya-course" not in (path, *path.parents))
    assert prepare_store(config(), HOURS[:2], progress=False).already == 2
    lacking = r"(?s)frames: 6 needed, 2 there.*to build: 4 frames.*instructor.*make cache TASK=flare.*all 6 frames"
    with pytest.raises(PermissionError, match=lacking):
        prepare_store(config(), HOURS, progress=False)
    private = config(**{"data.private_cache": True})
    report = prepare_store(private, HOURS, progress=False)
    assert (report.built, report.already, report.missing) == (5, 0, 1)
    assert report.store.is_relative_to(tmp_path / "home") and frames.store_path(private) == report.store


def test_the_plan_says_what_a_build_takes_and_builds_nothing(config):
    report = prepare_store(config(), HOURS, plan_only=True)
    assert "frames: 6 needed, 0 there already" in report.needs and "hours" not in report.needs
    assert report.built == 0 and not report.store.exists()
    prepare_store(config(), HOURS[:2], progress=False)
    needs = prepare_store(config(), HOURS, plan_only=True).needs
    assert "2 there already" in needs and "to build: 4 frames; 0.0 GB to read" in needs and "0.0 hours" in needs
    with pytest.raises(ValueError, match=r"(?s)to build: 4 frames.*more to read than data.ask_above_gb \(0 GB\)"):
        prepare_store(config(**{"data.ask_above_gb": 0}), HOURS, progress=False)


def test_whoever_may_only_read_knows_which_frames_the_owner_did_not_find(folder, config, monkeypatch):
    """A sample without a frame is replaced for the owner of the store, and for readers in the same way."""
    pd.DataFrame({"timestamp": HOURS, "value": 1.0}).to_csv(folder / "labels.csv", index=False)
    spans = {"train": HOURS[[0, 4]], "val": HOURS[[4, 5]], "test": [HOURS[5], HOURS[5] + pd.Timedelta("1h")]}
    cfg = config(
        **{f"split.{name}": [str(time) for time in span] for name, span in spans.items()},
        **{"labels.path": str(folder / "labels.csv"), "labels.value_columns": ["value"], "labels.transform": "none"},
        **{"labels.time_column": "timestamp", "labels.lead_minutes": 0, "labels.tolerance_minutes": 0},
        **{"data.offsets_minutes": [0], "model.time_dim": 1, "split.guard_hours": 0, "training.max_train_samples": 2},
    )
    for path in folder.glob("2014/01/*_0[123]00.nc"):
        path.unlink(missing_ok=True)
    (folder / "2014/01/20140107_0300.nc").write_bytes(b"cut short")
    pd.read_csv(folder / "index.csv").assign(present=1).to_csv(folder / "index.csv", index=False)
    report = prepare_store(cfg, progress=False)
    assert report.built == 3 and report.lost == set(HOURS[1:4]) and len(report.samples.samples["train"]) == 1
    monkeypatch.setattr(frames, "is_writable", lambda path: False)
    again = prepare_store(cfg, progress=False)
    assert (again.built, again.already, again.lost) == (0, 3, set())
    assert again.samples.samples["train"].equals(report.samples.samples["train"])


def test_the_command_verifies_and_builds_the_span_it_is_given(folder, config, monkeypatch, capsys):
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
