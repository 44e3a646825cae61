"""Building and reading the frame store, including what goes wrong on real disks and networks."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray
import zarr
import zarr.storage._local as local
from frame_files import HOURS, build, files, physical_frame, write_index, write_netcdf

from helpers.channels import CHANNELS, ERROR_BOUND, UNITS, load_scalers
from helpers.config import load_config
from helpers.data import archive as archives
from helpers.data import frames
from helpers.data.archive import Archive, open_netcdf
from helpers.data.frames import open_store, prepare_store, reduce_frame
from helpers.data.workers import worker_pool
from helpers.shared import DiskFullError
from helpers.tools import cache

ROOT = Path(__file__).parents[1]
SCALERS = load_scalers()
THREE = ("aia171", "hmi_m", "hmi_v")


def signed_log(images: dict, name: str, reduce: int) -> np.ndarray:
    """Average pooling and the signed logarithm in plain numpy, in float64."""
    side = images[name].shape[0] // reduce
    pooled = images[name].astype(np.float64).reshape(side, reduce, side, reduce).mean((1, 3))
    scaled = pooled * SCALERS[name].scale
    return np.sign(scaled) * np.log(1 + np.abs(scaled))


# ---------------------------------------------------------------------------------------------------- what is built
def test_store_holds_the_reduced_signed_logarithm_and_strangers_can_read_it(folder):
    report = build(folder)
    assert (report.built, report.missing, report.unreadable) == (5, 1, {}) and report.lost == {HOURS[2]}
    store = open_store(folder / "store.zarr")
    assert store.times.tolist() == HOURS.delete(2).to_pydatetime().tolist()
    assert HOURS[3] in store and HOURS[2] not in store
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
    frames.create_store(tmp_path / "store.zarr", CHANNELS, 1, 64)
    store = open_store(tmp_path / "store.zarr")
    codes = reduce_frame(write_netcdf(tmp_path / "a.nc", images), store)
    assert codes.dtype == np.int16
    for i, name in enumerate(CHANNELS):
        exact, coding, scaler = signed_log(images, name, 1), store.codings[name], SCALERS[name]
        stored = codes[i] * coding.step + coding.offset
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
own = worker_pool(2)
pool = own.__enter__()
print(pool.submit(os.getpid).result(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_after_an_interrupt_no_job_that_waits_is_begun():
    begun = []
    with pytest.raises(KeyboardInterrupt), worker_pool(1) as pool:
        for _ in pool.map(lambda number: [begun.append(number), time.sleep(0.02)], range(40)):
            raise KeyboardInterrupt
    assert 1 <= len(begun) < 10


@pytest.mark.notebook  # with the other long ones
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
        (lambda path: shutil.rmtree(path / "step" / "c"), "its array step is not as it was written"),
        (_metadata(lambda a, m: m.pop("offset")), "its zarr.json is not that of the format"),
        (_metadata(lambda a, m: a.update(format="int16 fixed point, 1")), "its format is 'int16 fixed point, 1', not"),
        (_metadata(lambda a, m: a.pop("format")), "its format is None, not"),
        (_metadata(lambda a, m: a.update(reduce=4)), "its zarr.json is not that of the format"),
        (_metadata(lambda a, m: a["channels"].pop()), "cannot be used"),
        (_metadata(lambda a, m: _inner(m).append(GZIP)), "its zarr.json is not that of the format"),
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
    with pytest.raises(ValueError, match="Not a list of channels, each once"):
        open_store(folder / "store.zarr", ["hmi_v", "hmi_v"])
    # fewer channels, another order: the same store
    assert build(folder, channels=["hmi_v", "aia171"], times=HOURS[:1]).already == 1
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").touch()
    for taken in ("notes", "index.csv"):
        before = files(folder)
        with pytest.raises(OSError, match=f"no frame store at .*{taken}"):
            build(folder, taken)
        assert files(folder) == before
    with pytest.raises(ValueError, match="cannot be reduced by 3"):
        build(folder, "three.zarr", reduce=3)
    with pytest.raises(FileNotFoundError, match="no frame store at .* Run `make cache`"):
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


def test_old_leftovers_go_and_young_ones_stay(built):
    for age in ("old", "young"):
        (built / f"store.zarr/frames/c.1.0.0.0.{age}.partial").write_bytes(b"half")
        for name in (f".store.zarr.{age}", f"{archives.SCRATCH_PREFIX}{age}"):
            (built / name / "deep").mkdir(parents=True)
    for path in built.rglob("*old*"):
        os.utime(path, (0, 0))
    build(built, archive=Archive(str(built), scratch=str(built)))
    left = {path.name for path in built.rglob("*") if "old" in path.name or "young" in path.name}
    assert left == {"c.1.0.0.0.young.partial", ".store.zarr.young", f"{archives.SCRATCH_PREFIX}young"}


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


def test_downloads_lie_where_the_configuration_says(folder, config):
    assert frames.make_archive(config()).scratch is None
    (folder / "fast").mkdir()
    assert frames.make_archive(config(**{"paths.scratch": str(folder / "fast")})).scratch == str(folder / "fast")
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*/slow for downloads \(paths.scratch"):
        frames.make_archive(config(**{"paths.scratch": str(folder / "slow")}))


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
    assert prepare_store(private, HOURS[:2], progress=False).already == 2 and not (tmp_path / "home").exists()
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
    assert prepare_store(cfg, again=True, progress=False).lost == set(HOURS[1:4])
    known = prepare_store(cfg, progress=False)  # no file that cannot be used is downloaded every time
    assert known.lost == set() and "3 that could not be made before: `make cache` looks again" in str(known)
    monkeypatch.setattr(frames, "is_writable", lambda path: False)
    again = prepare_store(cfg, again=True, progress=False)
    assert (again.built, again.already, again.lost) == (0, 3, set())
    assert again.samples.samples["train"].equals(report.samples.samples["train"])
    monkeypatch.undo()
    shutil.copy(folder / "2014/01/20140107_0400.nc", folder / "2014/01/20140107_0300.nc")
    assert prepare_store(cfg, again=True, progress=False).built == 1
    assert prepare_store(cfg, progress=False).given_up == 2  # what was made meanwhile is not given up


def test_damaged_notes_and_an_empty_folder_are_in_nobodys_way(config):
    cfg = config()
    store = frames.store_path(cfg)
    store.mkdir(parents=True)
    store.with_name(f"{store.name}.builds.json").write_text("{ cut short")
    assert prepare_store(cfg, HOURS[:2], progress=False).built == 2


def test_a_time_that_the_index_lacks_is_missing(config):
    report = prepare_store(config(), [*HOURS[:2], HOURS[0] + pd.Timedelta("12min")], progress=False)
    assert (report.built, report.missing, report.unreadable) == (2, 1, {})


def test_the_command_verifies_and_builds_the_span_it_is_given(folder, config, monkeypatch, capsys):
    cfg = config(**{"synthetic.folder": None, "labels.path": str(folder / "labels.csv")})
    store = open_store(prepare_store(cfg, HOURS, progress=False).store)
    store.file(HOURS[0]).write_bytes(b"\x00" * 100)
    monkeypatch.setattr(cache, "load_config", lambda *_, **__: cfg)
    monkeypatch.setattr(sys, "argv", ["cache", "--verify", "--span", "2014-01-07", "2014-01-07 03:00"])
    cache.main()
    said = capsys.readouterr().out
    assert "damaged: 2014-01-07T00:00:00\n" in said and "1 built" in said and HOURS[0] in store
    monkeypatch.setattr(sys, "argv", ["cache", "--span", "2014-01-07", "now"])
    with pytest.raises(SystemExit):
        cache.main()
    assert "--span takes two times" in capsys.readouterr().err
