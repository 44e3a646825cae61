"""The store of reduced frames: NetCDF files -> one Zarr array on a fixed calendar that everyone reads.

The time axis has a row for every 12 minutes from 2010-05-01 to 2040-01-01, so that the row of a time is known without
looking. A frame is one shard, hence one file `frames/c.ROW.0.0.0`, which Zarr writes aside and moves into place: it is
there and whole, or it is not there. Nothing else says which frames exist, so any number of people may build and read at
once. Inside a shard there is one chunk a channel (at 4096 pixels, of 1024 x 1024), compressed, with a CRC32C that is
compared at reading. Values are 16-bit fixed-point codes of signed-log values (`Coding` in channels.py).
"""

from __future__ import annotations

import copy
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import stat
import tempfile
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import zarr
from torch import Tensor
from torch.nn.functional import avg_pool2d
from tqdm import tqdm
from zarr.codecs import BloscCodec, Crc32cCodec

from helpers.channels import (
    CHANNELS,
    ERROR_BOUND,
    FILL_CODE,
    UNITS,
    Coding,
    Scaler,
    check_channels,
    coding_of,
    from_signed_log,
    load_scalers,
    to_signed_log,
)
from helpers.config import Config
from helpers.data.archive import (
    SCRATCH_PREFIX,
    Archive,
    FrameError,
    MissingFrameError,
    open_netcdf,
    read_index,
    read_variable,
)
from helpers.data.labels import labels_of, plan_samples
from helpers.shared import GB, disk_errors, ensure_space, is_writable, make_folder, share

FORMAT = "int16 fixed point, 12-minute calendar, 2"  # the attribute by which a store is recognised
START, CADENCE, SLOTS = np.datetime64("2010-05-01", "s"), np.timedelta64(12, "m"), 1_300_440
CODECS = {
    "sharding_indexed",
    "bytes",
    "blosc",
    "zstd",
    "crc32c",
    "vlen-utf8",
}  # the only ones that a store of ours uses
COMPRESSED = 0.6  # size of a compressed frame over that of its codes; measured: synthetic Sun 0.4, noisy frame 0.52
FILE_BYTES = 2.6  # of a NetCDF file of the archive, a pixel and channel
WORTH_A_PROCESS = 2e9  # bytes of pixels to read, from which on the seconds that a process takes to start pay


def reduce_frame(
    path: str | Path, codings: dict[str, Coding], reduce: int, scalers: dict[str, Scaler], native_size: int
) -> np.ndarray:
    """Read one NetCDF file and reduce it, one channel in memory at a time.

    Args:
        codings: of the channels that are wanted, in order.
        reduce: side of the squares of pixels whose physical values are averaged.
        native_size: the side that the images must have, in pixels.

    Returns:
        (C, H / reduce, W / reduce) int16 codes of the signed-log values.

    Raises:
        FrameError: not NetCDF4, cut short, a channel missing, of a wrong shape or in an unknown unit, pixels that are
            not numbers or have no code, or an image that is the same everywhere.
    """
    side = native_size // reduce
    frame = np.empty((len(codings), side, side), np.int16)
    with open_netcdf(path) as file:
        for i, (name, coding) in enumerate(codings.items()):
            image = torch.from_numpy(read_variable(file, name, UNITS[name], native_size))  # (H, W) physical
            pooled = avg_pool2d(image[None, None], reduce)[0, 0].numpy()  # (H / reduce, W / reduce) physical
            low, high = pooled.min(), pooled.max()  # NaN when any pixel is
            if not np.isfinite(high - low):
                wrong = 1 - np.isfinite(pooled).mean()
                raise FrameError(f"{name} has pixels that are not numbers (NaN), in {wrong:.1%} of the image")
            if low == high:
                raise FrameError(f"{name} is {low:g} {UNITS[name]} in every pixel")
            try:
                frame[i] = coding.encode(to_signed_log(pooled, scalers[name]))
            except ValueError:
                least, most = from_signed_log(np.array(coding.limits), scalers[name])
                raise FrameError(
                    f"{name} has a pixel of {high if high > most else low:.6g} {UNITS[name]} (averaged), but the store "
                    f"can keep only {least:.4g} to {most:.4g} {UNITS[name]} of this channel"
                ) from None
    return frame


# --------------------------------------------------------------------------------------------------------------------
# The store
# --------------------------------------------------------------------------------------------------------------------
def _row(when: Any) -> int:
    """The row of a time; ValueError for one that is not in the calendar."""
    row, rest = divmod(np.datetime64(when, "s") - START, CADENCE)
    if rest or not 0 <= row < SLOTS:
        raise ValueError(f"{pd.Timestamp(when)} is not in the calendar of frames: every 12 minutes, 2010-05 to 2039.")
    return int(row)


class FrameStore:
    """A store opened for reading, some channels of it (`open_store`).

    Attributes:
        path: its folder.
        attributes: what it says of itself.
        stored_channels: names of the channels in it.
        channels: names of the channels of what `read` returns, in order.
        scalers: constants of the channels, by name.
        codings: how the codes of each stored channel are read.
        side: side of the reduced images in pixels.
    """

    def __init__(
        self, path: Path, attributes: dict, channels: Sequence[str] | None, scalers: dict[str, Scaler]
    ) -> None:
        self.path, self.attributes, self.scalers = path, attributes, scalers
        self.stored_channels = tuple(attributes["channels"])
        self.channels = tuple(channels or self.stored_channels)
        self.side = attributes["native_size"] // attributes["reduce"]
        numbers = zip(self.stored_channels, attributes["steps"], attributes["offsets"], strict=True)
        self.codings = {name: Coding(np.float32(step), np.float32(offset)) for name, step, offset in numbers}
        self._array: zarr.Array | None = None
        self._memory: dict[int, np.ndarray] = {}

    @property
    def times(self) -> np.ndarray:
        """datetime64[s] (UTC) of the frames that are there now, sorted."""
        with os.scandir(self.path / "frames") as entries:
            names = [entry.name.split(".") for entry in entries if entry.is_file(follow_symlinks=False)]
        rows = sorted(int(name[1]) for name in names if name[0] == "c" and name[2:] == ["0", "0", "0"])
        return START + np.array(rows, int) * CADENCE.astype("timedelta64[s]")

    def __len__(self) -> int:
        return len(self.times)

    def __contains__(self, when: Any) -> bool:
        with suppress(OSError, ValueError):
            return stat.S_ISREG(os.lstat(self.file(when)).st_mode)
        return False

    def file(self, when: Any) -> Path:
        """Where the frame of this time is, or would be."""
        return self.path / "frames" / f"c.{_row(when)}.0.0.0"

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame in memory, all channels of the store in int16."""
        return len(self.stored_channels) * self.side**2 * 2

    def read(self, times: Iterable) -> Tensor:
        """The frames at these times in the chosen channels, (C, T, H, W) float32 normalised.

        Raises:
            KeyError: there is no frame at one of the times.
            OSError: a frame is damaged.
        """
        frames = [self._codes(when) for when in times]  # of each time, C planes of (H, W) int16
        # numpy asks for huge pages, torch does not: 3 times faster
        out = torch.from_numpy(np.empty((len(self.channels), len(frames), self.side, self.side), np.float32))
        for c, name in enumerate(self.channels):
            coding, scaler = self.codings[name], self.scalers[name]
            spread = scaler.std + scaler.epsilon
            # z = (code * step + offset - mean) / spread in one multiply-add
            level = torch.tensor((float(coding.offset) - scaler.mean) / spread, dtype=torch.float32)
            for t, planes in enumerate(frames):
                torch.add(level, torch.from_numpy(planes[c]), alpha=float(coding.step) / spread, out=out[c, t])
        return out

    def _codes(self, when: Any) -> list[np.ndarray]:
        """Codes (H, W) int16 of the chosen channels; the others are not read from the disk."""
        row, chosen = _row(when), [self.stored_channels.index(name) for name in self.channels]
        if row in self._memory:
            return [self._memory[row][i] for i in chosen]
        if when not in self:
            raise KeyError(f"{self.path} has no frame at {pd.Timestamp(when)}; build it with `make cache`.")
        try:
            if self._array is None:
                self._array = zarr.open_group(self.path, mode="r")["frames"]
            if len(chosen) == len(self.stored_channels):
                frame = self._array[row]
                planes = [frame[i] for i in chosen]
            else:
                planes = [self._array[row, i] for i in chosen]
            # zarr takes an empty file for one without values
            if any(plane[0, 0] == FILL_CODE for plane in planes):
                raise ValueError("a channel is empty")
        except (OSError, RuntimeError, ValueError) as error:
            raise OSError(
                f"The frame at {pd.Timestamp(when)} is damaged: {self.file(when)} ({error}). "
                f"`make cache ARGS=--verify` removes damaged frames and makes them again."
            ) from error
        return planes

    def write(self, when: Any, codes: np.ndarray) -> None:
        """Add the frame of this time, (all C, H, W) int16; it appears whole."""
        with disk_errors(self.path):
            zarr.open_group(self.path, mode="r+")["frames"][_row(when)] = codes
        share(self.file(when))

    def load(self, times: Iterable) -> None:
        """Keep the frames at `times` in memory from now on, the codes of all channels."""
        whole = self.select(self.stored_channels)
        self._memory |= {_row(when): np.stack(whole._codes(when)) for when in times}

    def select(self, channels: Sequence[str]) -> FrameStore:
        """The same store, frames in memory included, with other channels."""
        if absent := [name for name in channels if name not in self.stored_channels]:
            raise ValueError(
                f"{self.path} has no channel {', '.join(absent)}; it has {', '.join(self.stored_channels)}. Choose "
                f"another data.store and run `make cache`: a new store gets the channels of data.channels and "
                f"labels.target_channels."
            )
        other = copy.copy(self)
        other.channels = tuple(channels)
        return other

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_array": None}  # each process opens it for itself

    def __repr__(self) -> str:
        times, shape = self.times, f"{len(self.channels)} channels of {self.side} x {self.side} pixels"
        span = f", {times[0]} to {times[-1]}" if len(times) else ""
        return f"FrameStore({self.path}: {len(times)} frames, {shape} (reduced by {self.attributes['reduce']}){span})"


def open_store(
    path: str | Path,
    channels: Sequence[str] | None = None,
    reduce: int | None = None,
    native_size: int | None = None,
    scalers: dict[str, Scaler] | None = None,
) -> FrameStore:
    """Open a store for reading the given channels, by name and in any order, once it is sure to be the right one.

    Raises:
        FileNotFoundError: there is no store.
        ValueError: it is damaged or of another version, lacks a channel, or was built with another factor, side or
            scale factor.
    """
    path, scalers = Path(path), scalers or load_scalers()
    attributes = _checked_attributes(path)
    problems = []
    if channels and (absent := [name for name in check_channels(channels) if name not in attributes["channels"]]):
        problems.append(f"has no channel {', '.join(absent)} (it has {', '.join(attributes['channels'])})")
    for key, value in (("reduce", reduce), ("native_size", native_size)):
        if value is not None and attributes[key] != value:
            problems.append(f"was built with {key} {attributes[key]}, but the config asks for {value}")
    for name, scale in zip(attributes["channels"], attributes["scale_factors"], strict=True):
        if name in scalers and scalers[name].scale != scale:
            problems.append(
                f"was built with the scale factor {scale} of {name}, but data.scalers has {scalers[name].scale}"
            )
    if problems:
        raise ValueError(
            f"The store {path} {', and '.join(problems)}. Choose another data.store (a new one will be built), or set "
            f"the config to what the store holds."
        )
    return FrameStore(path, attributes, channels, scalers)


def _checked_attributes(path: Path) -> dict:
    """The attributes of a store of this version, after a look at all that is not a frame."""
    if not (path / "zarr.json").is_file():
        raise FileNotFoundError(
            f"There is no frame store at {path}. Build it with `make cache`, or correct data.store."
        )
    renew = f"Move it away and build a new one: mv {path} {path}.old && make cache"
    try:
        described = json.loads((path / "zarr.json").read_text())
        attributes = described["attributes"]
        if attributes.get("format") != FORMAT:
            found = attributes.get("format", "none, so an old version or not ours")
            raise ValueError(f"its format is {found}; this version of the course reads {FORMAT}")
        if links := [entry.name for entry in os.scandir(path) if entry.is_symlink()]:
            raise ValueError(f"{', '.join(links)} is a link to elsewhere")
        arrays = described["consolidated_metadata"]["metadata"]
        if strange := sorted({name for array in arrays.values() for name in _codec_names(array)} - CODECS):
            raise ValueError(f"it uses the codecs {', '.join(strange)}, which are not ours")
        shape = (SLOTS, len(attributes["channels"]), *[attributes["native_size"] // attributes["reduce"]] * 2)
        if tuple(arrays["frames"]["shape"]) != shape:
            raise ValueError("the shape of its frames does not agree with its attributes")
        group = zarr.open_group(path, mode="r", zarr_format=3)
        for name, expected in _axes(attributes).items():
            if not np.array_equal(group[name][:], expected):
                raise ValueError(f"its array {name} does not agree with its attributes")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"The store {path} cannot be used: {error}. {renew}") from error
    return attributes


def _codec_names(metadata: Any) -> Iterator[str]:
    """Names of all codecs in the metadata of an array, at any depth."""
    if isinstance(metadata, dict):
        for key, value in metadata.items():
            if key in ("codecs", "index_codecs"):
                yield from (codec["name"] for codec in value)
            yield from _codec_names(value)
    elif isinstance(metadata, list):
        for item in metadata:
            yield from _codec_names(item)


def _axes(attributes: dict) -> dict[str, np.ndarray]:
    """The arrays beside `frames`, which strangers to this project need."""
    return {
        "time": np.arange(SLOTS, dtype=np.int32) * 12,
        "channel": np.array(attributes["channels"], object),
        "step": np.array(attributes["steps"], np.float32),
        "offset": np.array(attributes["offsets"], np.float32),
    }


def create_store(
    path: Path, channels: Sequence[str], reduce: int, native_size: int, scalers: dict[str, Scaler]
) -> None:
    """Make an empty store under another name and move it into place; when someone else was faster, theirs stays."""
    taken = path.is_file() or path.is_dir() and any(path.iterdir())
    if taken and not (path / "zarr.json").is_file():
        raise FileExistsError(f"{path} is there, but is no frame store. Move it away, or choose another data.store.")
    if reduce < 1 or native_size % reduce:
        raise ValueError(
            f"Images of {native_size} pixels cannot be reduced by {reduce} (data.reduce): choose a divisor."
        )
    codings = [coding_of(name, scalers[name]) for name in check_channels(channels)]
    attributes = {
        "title": "Solar Dynamics Observatory frames, reduced",
        "format": FORMAT,
        "space": "signed-log: y = sign(x s) log(1 + |x s|) of the physical value x, s in scale_factors",
        "codes": "frames holds whole numbers: y = frames * step + offset, with step and offset of the channel",
        "rounding": f"at most half a step, and {ERROR_BOUND} of the standard deviation of the channel",
        "completeness": "a frame is there when its file frames/c.ROW.0.0.0 is; else its codes are all _FillValue",
        "channels": list(channels),
        "units": [UNITS[name] for name in channels],
        "scale_factors": [scalers[name].scale for name in channels],
        "steps": [float(coding.step) for coding in codings],
        "offsets": [float(coding.offset) for coding in codings],
        "reduce": reduce,
        "native_size": native_size,
    }
    side, count = native_size // reduce, len(codings)
    tile = min(side, 1024) if side % 1024 == 0 else side
    make_folder(path.parent)
    with (
        disk_errors(path.parent),
        tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder,
    ):
        aside = Path(folder, path.name)
        group = zarr.create_group(aside, attributes=attributes)
        group.create_array(
            "frames",
            shape=(SLOTS, count, side, side),
            shards=(1, count, side, side),
            chunks=(1, 1, tile, tile),
            dtype="i2",
            fill_value=FILL_CODE,
            # bitshuffle makes 2 to 4 % less of it, but takes 8 % longer to read
            compressors=[BloscCodec(cname="lz4", clevel=5, shuffle="shuffle", typesize=2), Crc32cCodec()],
            chunk_key_encoding={"name": "default", "separator": "."},
            dimension_names=("time", "channel", "y", "x"),
            # the names under which xarray knows what is no pixel, and that step and offset belong to frames
            attributes={"units": "1", "_FillValue": FILL_CODE, "coordinates": "step offset"},
        )
        for name, values in _axes(attributes).items():
            calendar = {"units": "minutes since 2010-05-01", "calendar": "proleptic_gregorian"}
            group.create_array(
                name,
                shape=values.shape,
                chunks=values.shape,
                dtype=str if name == "channel" else values.dtype,
                compressors="auto" if name == "channel" else BloscCodec(cname="zstd", shuffle="bitshuffle", typesize=4),
                dimension_names=("time" if name == "time" else "channel",),
                attributes=calendar if name == "time" else {},
            )[:] = values
        (aside / "frames").mkdir(exist_ok=True)
        with warnings.catch_warnings():  # zarr warns that the format does not demand it
            warnings.simplefilter("ignore")
            zarr.consolidate_metadata(aside)
        try:
            aside.rename(path)
            share(path)
        except OSError:
            if not (path / "zarr.json").is_file():
                raise


def verify_store(path: str | Path) -> list[str]:
    """Read every frame and remove those that are damaged, so that the next build makes them again.

    Returns:
        The times of the frames that were removed.
    """
    store, damaged = open_store(path), []
    for when in tqdm(store.times, "verifying", unit="frame"):
        try:
            store.read([when])
        except OSError:
            damaged.append(str(when))
            store.file(when).unlink(missing_ok=True)
    return damaged


# --------------------------------------------------------------------------------------------------------------------
# Building
# --------------------------------------------------------------------------------------------------------------------
@dataclass
class BuildReport:
    """What a build did; prints as a few lines.

    Attributes:
        built, already, missing: numbers of frames that were made, were there, and are not in the archive.
        unreadable: address of a file that could not be used -> why.
        lost: times of the frames that are missing or unreadable.
    """

    store: Path
    built: int = 0
    already: int = 0
    missing: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)
    lost: set[np.datetime64] = field(default_factory=set)
    seconds: float = 0.0
    bytes_read: int = 0

    def plus(self, other: BuildReport) -> BuildReport:
        """What both did together, `other` after this one."""
        counted = {
            name: getattr(self, name) + getattr(other, name) for name in ("built", "missing", "seconds", "bytes_read")
        }
        found = {"unreadable": self.unreadable | other.unreadable, "lost": self.lost | other.lost}
        return replace(self, **counted, **found)

    def __str__(self) -> str:
        rate = self.bytes_read / 1e6 / max(self.seconds, 1e-9)
        speed = f" in {self.seconds:.0f} s, {rate:.0f} MB/s" if self.built else ""
        counts = f"{self.built} built{speed}, {self.already} there already, {self.missing} not in the archive"
        lines = [f"Frame store {self.store}: {counts}, {len(self.unreadable)} unreadable"]
        lines += [f"  unreadable: {url}: {reason}" for url, reason in list(self.unreadable.items())[:10]]
        if len(self.unreadable) > 10:
            lines.append(f"  ... and {len(self.unreadable) - 10} more")
        return "\n".join(lines)


def build_store(
    times: Iterable,
    path: str | Path,
    channels: Sequence[str] = CHANNELS,
    reduce: int = 4,
    *,
    archive: Archive | None = None,
    native_size: int = 4096,
    scalers: dict[str, Scaler] | None = None,
    workers: int = 1,
    executor: Executor | None = None,
    reserve_gb: float = 2.0,
    progress: bool = True,
) -> BuildReport:
    """Build the frames of these times that the store does not have yet; call it again after anything went wrong.

    Any number of processes and people may build one store at once: each makes what is missing in an order of its own,
    and looks again before each frame.

    Args:
        times: of the frames, in UTC.
        channels: what to keep, by name. A store that is there already keeps the channels it has.
        reduce: side of the squares of physical pixels that are averaged.
        archive: where the frames come from; None for NASA's bucket.
        native_size: side of the images in the files.
        workers: how many processes may make frames on this machine.
        executor: makes the frames instead, for example `Client(...).get_executor()` of a Dask cluster whose workers see
            the same disks.
        reserve_gb: free space that must remain on the disk.

    Raises:
        ValueError: a time is not in the calendar, or the store was built with other settings.
        DiskFullError: too little space, before starting or on the way. Frames that are there stay.
        ArchiveError: no frame can be fetched.
    """
    started, path, archive = time.perf_counter(), Path(path), archive or Archive()
    if not (path / "zarr.json").is_file():
        create_store(path, channels, reduce, native_size, scalers or load_scalers())
    store = open_store(path, channels, reduce, native_size, scalers).select(open_store(path).stored_channels)
    _remove_leftovers(store, archive)
    wanted = np.unique(np.array(list(times), "datetime64[s]"))
    there = {_row(when) for when in store.times}
    todo = [when for when in wanted if _row(when) not in there]
    report = BuildReport(path, already=len(wanted) - len(todo))
    if todo:
        ensure_space(path, len(todo) * store.frame_bytes * COMPRESSED, reserve_gb, what=f"{len(todo)} frames")
    random.shuffle(todo)
    jobs = {when: archive.url(when) for when in todo}
    pixels = len(todo) * len(store.channels) * native_size**2 * 4
    workers = min(workers, 1 + int(pixels / WORTH_A_PROCESS))
    with tqdm(total=len(todo), desc="frames", unit="frame", disable=not progress or not todo) as bar:
        for when, outcome, size in _results(store, replace(archive, index=None), jobs, workers, executor):
            if isinstance(outcome, FrameError):
                report.lost.add(when)
                if isinstance(outcome, MissingFrameError):
                    report.missing += 1
                else:
                    report.unreadable[jobs[when]] = str(outcome)
            else:
                report.built += outcome == "built"
                report.already += outcome == "already"
            report.bytes_read += size
            bar.update()
            bar.set_postfix_str(f"{report.bytes_read / 1e6 / (time.perf_counter() - started):.0f} MB/s", refresh=False)
    report.seconds = time.perf_counter() - started
    return report


def _results(
    store: FrameStore, archive: Archive, jobs: dict, workers: int, executor: Executor | None
) -> Iterator[tuple[np.datetime64, str | FrameError, int]]:
    if executor is None and workers == 1:
        yield from (build_frame(store, archive, when, url) for when, url in jobs.items())
        return
    with nullcontext(executor) if executor else worker_pool(workers) as pool:
        futures = [pool.submit(build_frame, store, archive, when, url) for when, url in jobs.items()]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()


def build_frame(
    store: FrameStore, archive: Archive, when: np.datetime64, url: str | None
) -> tuple[np.datetime64, str | FrameError, int]:
    """Make one frame unless it is there; return its time, "built", "already" or why not, and the bytes read."""
    if when in store:
        return when, "already", 0
    try:
        if url is None:
            raise MissingFrameError("the index has no frame for this time")
        with archive.local_copy(url) as path:
            size, native_size = path.stat().st_size, store.attributes["native_size"]
            codes = reduce_frame(path, store.codings, store.attributes["reduce"], store.scalers, native_size)
        store.write(when, codes)
        return when, "built", size
    except FrameError as error:
        return when, error, 0


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """Processes with one torch thread each, which end when this one does, however it ends.

    Processes, because HDF5 decompresses for one thread of a process at a time; not forked ones, because those would
    inherit the threads of torch, zarr and Jupyter in a state that they cannot use.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers.data.frames"])  # imported once for all
    return ProcessPoolExecutor(workers, context, initializer=_start_worker)


def _start_worker() -> None:
    torch.set_num_threads(1)

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _remove_leftovers(store: FrameStore, archive: Archive) -> None:
    """Remove what builders that were killed more than a day ago have left behind."""
    places = (
        (store.path / "frames", "*.partial"),
        (store.path.parent, f".{store.path.name}.*"),
        (Path(archive.scratch or tempfile.gettempdir()), f"{SCRATCH_PREFIX}*"),
    )
    for leftover in (path for folder, pattern in places for path in folder.glob(pattern)):
        with suppress(OSError):  # gone by now, or somebody else's
            if leftover.lstat().st_mtime < time.time() - 86400:
                shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()


# --------------------------------------------------------------------------------------------------------------------
# By configuration
# --------------------------------------------------------------------------------------------------------------------
def channels_needed(cfg: Config) -> tuple[str, ...]:
    """The input channels and the channels that are predicted as images, each once, in the canonical order."""
    targets = cfg.labels.target_channels if cfg.labels.kind == "image" else []
    return tuple(name for name in CHANNELS if name in {*cfg.data.channels, *targets})


def store_name(channels: Sequence[str], reduce: int, native_size: int) -> str:
    """A folder name that differs for every channel set and size, so that two configs never share a store by mistake."""
    ordered = [name for name in CHANNELS if name in channels]
    digest = hashlib.sha1("+".join(ordered).encode()).hexdigest()[:6]
    tag = f"{len(CHANNELS)}ch" if len(ordered) == len(CHANNELS) else f"{len(ordered)}ch-{digest}"
    return f"{native_size}px-reduce{reduce}-{tag}.zarr"


def store_path(cfg: Config) -> Path:
    """Where the frames of this configuration are read: `data.store` itself if it ends in .zarr, else a folder in it.

    That is the store of exactly the channels that are needed, else one that holds all 13, else any other that has them.
    Your private folder comes first where the shared one is read-only for you and `data.private_cache` is set.
    """
    folder = Path(cfg.data.store)
    places = [cfg.shared.to_write(folder)] if cfg.data.private_cache else []
    places = list(dict.fromkeys([*places, folder]))
    if folder.suffix == ".zarr":
        return next((place for place in places if place.exists()), places[0])
    needed, reduce, native_size = channels_needed(cfg), cfg.data.reduce, cfg.data.native_size
    exact = store_name(needed, reduce, native_size)
    others = {path.name for place in places for path in place.glob(f"{native_size}px-reduce{reduce}-*.zarr")}
    names = dict.fromkeys([exact, store_name(CHANNELS, reduce, native_size), *sorted(others)])
    for path in (place / name for name in names for place in places):
        with suppress(FileNotFoundError, ValueError):
            open_store(path, needed, reduce, native_size, cfg.scalers)
            return path
    return places[0] / exact


def make_archive(cfg: Config) -> Archive:
    """Where this configuration takes its frames from."""
    data = cfg.data
    folder, index = (
        str(cfg.shared.to_read(place)) if place and "://" not in place else place
        for place in (data.archive, data.index)
    )
    archive = Archive(
        folder=folder,
        anonymous=data.anonymous,
        endpoint_url=data.endpoint_url,
        retries=data.retries,
        scratch=cfg.paths.scratch,
    )
    if index is None:
        return archive
    return replace(archive, index=read_index(index, archive)[0], index_folder=index.rpartition("/")[0])


def prepare_store(
    cfg: Config, times: Iterable | None = None, executor: Executor | None = None, progress: bool = True
) -> BuildReport:
    """Build the frames that samples need and the store lacks; quick when everything is there.

    A sample whose frame turns out to be missing or unreadable is given up; with a maximum, the next one of the seeded
    order takes its place.

    Args:
        times: of the frames to build; None for those of the samples of the three splits.
        executor: as in `build_store`.

    Raises:
        PermissionError: frames lack in a shared folder that is read-only for you, and data.private_cache is not set.
        ValueError: more would be read than data.ask_above_gb.
    """
    archive = make_archive(cfg)
    if times is not None:
        return _build_for(cfg, archive, times, executor, progress)
    labels, total = labels_of(cfg), None
    while True:
        lost = total.lost if total else set()
        plan = plan_samples(cfg, lambda wanted: ~np.isin(wanted, list(lost)), labels)  # noqa: B023
        report = _build_for(cfg, archive, plan.frames, executor, progress)
        total = total.plus(report) if total else report
        if not report.lost:
            return total


def _build_for(
    cfg: Config, archive: Archive, times: Iterable, executor: Executor | None, progress: bool
) -> BuildReport:
    """Build these frames in the store of the configuration, or in your own where that one is read-only."""
    times = np.unique(np.array(list(times), "datetime64[s]"))
    path, channels = store_path(cfg), channels_needed(cfg)
    shared = open_store(path) if (path / "zarr.json").is_file() else None
    lacking = [when for when in times if shared is None or when not in shared]
    if shared and not lacking:
        return BuildReport(path, already=len(times))
    size_gb = len(lacking) * len(CHANNELS) * cfg.data.native_size**2 * FILE_BYTES / GB
    if not is_writable(path):
        if not cfg.data.private_cache:
            raise PermissionError(
                f"{path} lacks {len(lacking)} of the {len(times)} frames that are needed (about {size_gb:.1f} GB to "
                f"read), and you may only read that folder. Whoever may write there, on a course the instructor, adds "
                f"them with `make cache TASK={cfg.task} PROFILE={cfg.profile}`; data.private_cache: true builds them "
                f"in your own cache instead."
            )
        path = cfg.shared.to_write(path)
    if size_gb > cfg.data.ask_above_gb:
        raise ValueError(
            f"{len(lacking)} frames would be built, for which about {size_gb:.0f} GB are read: more than "
            f"data.ask_above_gb ({cfg.data.ask_above_gb:g}). Set training.max_train_samples, shorten the splits, or "
            f"raise that key."
        )
    if shared and shared.path != path:
        _copy_frames(shared, path, times)
    return build_store(
        times,
        path,
        shared.stored_channels if shared else channels,
        cfg.data.reduce,
        archive=archive,
        native_size=cfg.data.native_size,
        scalers=cfg.scalers,
        workers=cfg.data.build_workers,
        executor=executor,
        reserve_gb=cfg.paths.reserve_gb,
        progress=progress,
    )


def _copy_frames(source: FrameStore, path: Path, times: Iterable) -> None:
    """Take over the frames of a store that may only be read into one of your own."""
    if not (path / "zarr.json").is_file():
        make_folder(path.parent)
        shutil.copytree(source.path, path, ignore=lambda folder, names: [name for name in names if name[:2] == "c."])
    target = open_store(path)
    for when in times:
        if when in source and when not in target and target.attributes == source.attributes:
            aside = target.file(when).with_suffix(f".{os.getpid()}.partial")
            with disk_errors(path):
                shutil.copyfile(source.file(when), aside, follow_symlinks=False)
                aside.replace(target.file(when))
