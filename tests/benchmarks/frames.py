"""Reducing and reading one full-size frame (13 x 4096 x 4096), against loading and averaging the whole file."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import h5netcdf
import h5py
import numpy as np
import pandas as pd
import torch
from torch.nn.functional import interpolate

from helpers.channels import CHANNELS, load_scalers, normalise, stack_scalers
from helpers.data.archive import Archive
from helpers.data.frames import build_store, create_store, open_store, reduce_frame

POOLING, SIDE = 4, 4096
HOURS = pd.date_range("2014-01-07", periods=8, freq="1h")
THREE = ("aia171", "aia193", "hmi_m")
# brightness (DN) or strength (gauss, m/s) of each channel, such as an active day has it
LEVEL = dict(zip(CHANNELS, (1.2, 7, 250, 300, 90, 45, 5, 60, 60, 150, 150, 60, 1200), strict=True))


def write_frame(path: Path, side: int) -> None:
    """A file as in the bucket: large structures with noise, compressed by zlib to 0.64 of its size."""
    rng = np.random.default_rng(0)
    axis = (np.arange(side, dtype=np.float32) + 0.5) / side - 0.5
    disk = axis[:, None] ** 2 + axis**2 < 0.4**2  # the magnetograph sees nothing beside the Sun
    with h5netcdf.File(path, "w") as file:
        file.dimensions = {"y": side, "x": side}
        for name in CHANNELS:
            coarse = torch.from_numpy(rng.normal(size=(1, 1, side // 64, side // 64)).astype(np.float32))
            smooth = interpolate(coarse, size=(side, side), mode="bilinear")[0, 0].numpy()
            noise = rng.standard_normal((side, side), np.float32)
            if name.startswith("aia"):
                image = LEVEL[name] * np.exp(0.7 * smooth) * (1 + 0.1 * noise)
            else:
                image = LEVEL[name] * (smooth + 0.1 * noise) * disk
            image = np.round(image * 2**15 / LEVEL[name]) * (LEVEL[name] / 2**15)
            options = {"compression": "gzip", "compression_opts": 1, "chunks": (side // 8, side // 8)}
            file.create_variable(name, ("y", "x"), "f4", **options)[:] = image


def usual_way(path: Path, channels=CHANNELS) -> np.ndarray:
    """What templates do for every sample: load all, average blocks, normalise. (C, H / 4, W / 4) normalised."""
    from skimage.measure import block_reduce

    with h5py.File(path) as file:
        frame = np.stack([file[name][()] for name in channels])  # (C, H, W) physical
    frame = block_reduce(frame, (1, POOLING, POOLING), np.mean)
    return normalise(frame.astype(np.float32), stack_scalers(load_scalers(), channels))


def in_a_process_of_its_own(way: str, path: Path, channels=CHANNELS) -> tuple[float, float]:
    """Seconds, and the peak memory of the whole process in GB."""
    command = [sys.executable, __file__, "--one", way, str(path), *channels]
    return tuple(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def one(way: str, path: str, *channels: str) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        create_store(Path(folder, "empty.zarr"), channels, POOLING, SIDE)
        store = open_store(Path(folder, "empty.zarr"))
    ways = {"usual": lambda: usual_way(Path(path), channels), "ours": lambda: reduce_frame(path, store)}
    start = time.perf_counter()
    ways.get(way, lambda: None)()
    took = time.perf_counter() - start
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(json.dumps([took, int(status["VmHWM"].split()[0]) * 1024 / 1e9]))  # getrusage would count the parent's


def seconds(repeats: int, *functions) -> list[float]:
    """Median time of each function, called in turns (a busy machine is so for all), after one call that warms up."""
    times = [[] for _ in functions]
    for _ in range(repeats + 1):
        for function, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
    return [median(taken[1:]) for taken in times]


def reducing(path: Path, repeats: int) -> tuple[float, float]:
    """Print time and memory of reducing one frame; return the two that the reading is compared with."""
    runs = {"usual": [], "ours": [], "three": []}
    for _ in range(repeats):  # alternately, so that a busy machine is so for all
        runs["usual"].append(in_a_process_of_its_own("usual", path))
        runs["ours"].append(in_a_process_of_its_own("ours", path))
        runs["three"].append(in_a_process_of_its_own("ours", path, THREE))
    (usual, usual_gb), (ours, ours_gb), (three, three_gb) = (np.median(run, axis=0) for run in runs.values())
    base_gb = in_a_process_of_its_own("nothing", path)[1]
    print(f"file                      {path.stat().st_size / 1e6:8.0f} MB")
    print(f"usual way, one frame      {usual:8.2f} s   {usual_gb:5.2f} GB peak (imports alone {base_gb:.2f} GB)")
    print(f"reduced by us             {ours:8.2f} s   {ours_gb:5.2f} GB peak")
    print(f"  ratio of times          {ours / usual:8.2f}     (at most 0.65), memory at most 0.7 GB")
    print(f"  3 of 13 channels        {three:8.2f} s   {three_gb:5.2f} GB peak, {three / ours:.2f} of all 13")
    return usual, ours


def an_archive(folder: Path, path: Path, count: int) -> Archive:
    """So many times the same file, in a folder laid out like the bucket."""
    archive = Archive(str(folder / "archive"))
    for when in HOURS[:count]:
        place = Path(archive.url(when))
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(path.absolute())
    return archive


def building(folder: Path, path: Path, one_frame: float) -> None:
    """Build eight frames with one, two and four workers."""
    archive = an_archive(folder, path, 8)
    for workers in (1, 2, 4):
        where, settings = folder / f"{workers}.zarr", {"archive": archive, "native_size": SIDE, "progress": False}
        started = time.perf_counter()
        build_store(HOURS[:8], where, reduce=POOLING, workers=workers, reserve_gb=0, **settings)
        took = (time.perf_counter() - started) / 8
        print(f"built by {workers} worker(s)      {took:8.2f} s a frame, {took / one_frame:.2f} of reducing one")


def reading(folder: Path, path: Path, usual: float, repeats: int) -> None:
    """Read a frame of the store as a loader worker does, with one thread."""
    torch.set_num_threads(1)
    store = open_store(folder / "1.zarr")
    when, file = store.times[:1], store.file(store.times[0])
    three, one_channel = store.select(THREE), store.select(THREE[:1])
    whole = store.read(when)
    whole.numpy().tofile(folder / "sample.f4")
    ready, plain, some, single, compressed = seconds(
        repeats,
        lambda: store.read(when),
        lambda: np.fromfile(folder / "sample.f4", np.float32),
        lambda: three.read(when),
        lambda: one_channel.read(when),
        file.read_bytes,
    )
    print(f"on disk                   {file.stat().st_size / 1e6:8.1f} MB a frame (at most 20)")
    print(f"sample, normalised float32{ready * 1e3:8.1f} ms")
    print(f"  faster than the usual way{usual / ready:7.0f} x   (at least 50)")
    print(f"  plain read of its bytes {plain * 1e3:8.1f} ms, we take {ready / plain:.1f} x that (at most 4)")
    print(f"  3 of 13 channels        {some * 1e3:8.1f} ms, {some / ready:.2f} of all 13")
    print(f"  1 of 13 channels        {single * 1e3:8.1f} ms, {single / ready:.2f} of all 13")
    print(f"its compressed bytes alone{compressed * 1e3:8.1f} ms")
    error = np.abs(whole[:, 0].numpy() - usual_way(path)).max()
    print(f"largest error             {error:8.1e} normalised (at most 5e-3)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--keep", type=Path, help="write the frame here, or take the one that is there")
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    if asked.one:
        return one(*asked.one)
    with tempfile.TemporaryDirectory() as folder:
        path = asked.keep or Path(folder) / "frame.nc"
        if not path.exists():
            write_frame(path, SIDE)
        usual, ours = reducing(path, asked.repeats)
        building(Path(folder), path, ours)
        reading(Path(folder), path, usual, 5 * asked.repeats)


if __name__ == "__main__":
    main()
