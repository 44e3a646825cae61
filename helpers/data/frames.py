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
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pandas as pd
import torch
import zarr
from numcodecs import blosc
from torch import Tensor
from torch.nn.functional import avg_pool2d
from tqdm import tqdm
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec, VLenUTF8Codec, ZstdCodec

from helpers import channels as physics
from helpers.channels import CHANNELS, FILL_CODE, UNITS, Coding, Scaler
from helpers.config import Config
from helpers.data import archive as archives
from helpers.data.archive import Archive, FrameError, MissingFrameError
from helpers.data.labels import FrameTarget, Labels, Plan, labels_of, plan_samples
from helpers.shared import (
    GB,
    atomic_write,
    disk_errors,
    ensure_space,
    free_space,
    is_writable,
    make_folder,
    share,
)

FORMAT = "int16 fixed point, 12-minute calendar, 2"  # the attribute by which a store is recognised
START, CADENCE, SLOTS = np.datetime64("2010-05-01", "s"), np.timedelta64(12, "m"), 1_300_440
CODECS = (ShardingCodec, BytesCodec, BloscCodec, Crc32cCodec, ZstdCodec, VLenUTF8Codec)  # all that a store of ours uses
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
        FrameError: the file or one of its images cannot be used, or pixels are not numbers, have no code, or are all
            the same.
    """
    frame = np.empty((len(codings), native_size // reduce, native_size // reduce), np.int16)
    with archives.open_netcdf(path) as file:
        for i, (name, coding) in enumerate(codings.items()):
            image = torch.from_numpy(archives.read_variable(file, name, UNITS[name], native_size))  # (H, W) physical
            pooled = avg_pool2d(image[None, None], reduce)[0, 0].numpy()  # (H / reduce, W / reduce) physical
            low, high = pooled.min(), pooled.max()  # NaN when any pixel is
            if not np.isfinite(high - low):
                wrong = 1 - np.isfinite(pooled).mean()
                raise FrameError(f"{name} has pixels that are not numbers (NaN), in {wrong:.1%} of the image")
            if low == high:
                raise FrameError(f"{name} is {low:g} {UNITS[name]} in every pixel")
            try:
                frame[i] = coding.encode(physics.to_signed_log(pooled, scalers[name]))
            except ValueError:
                least, most = physics.from_signed_log(np.array(coding.limits), scalers[name])
                raise FrameError(
                    f"{name} goes from {low:.6g} to {high:.6g} {UNITS[name]} (averaged), but the store can keep only "
                    f"{least:.4g} to {most:.4g} {UNITS[name]} of this channel"
                ) from None
    return frame


def _row(when: Any) -> int:
    """The row of a time; ValueError for one that is not in the calendar."""
    row, rest = divmod(np.datetime64(when, "s") - START, CADENCE)
    if rest or not 0 <= row < SLOTS:
        raise ValueError(f"{pd.Timestamp(when)} is not in the calendar of frames: every 12 minutes, 2010-05 to 2039.")
    return int(row)


class FrameStore:
    """A store opened for reading, some channels of it (`open_store`).

    Attributes:
        path, attributes: its folder, and what it says of itself.
        stored_channels, channels: names of the channels in it, and of what `read` returns, in order.
        scalers, codings: constants of the channels, and how the codes of each stored one are read, by name.
        side: side of the reduced images in pixels.
    """

    def __init__(self, path: Path, attributes: dict, scalers: dict[str, Scaler]) -> None:
        self.path, self.attributes, self.scalers = path, attributes, scalers
        self.stored_channels = self.channels = tuple(attributes["channels"])
        self.side = attributes["native_size"] // attributes["reduce"]
        numbers = zip(self.stored_channels, attributes["steps"], attributes["offsets"], strict=True)
        self.codings = {name: Coding(np.float32(step), np.float32(offset)) for name, step, offset in numbers}
        self._memory: dict[int, np.ndarray] = {}

    def file(self, when: Any) -> Path:
        """Where the frame of this time is, or would be."""
        return self.path / "frames" / f"c.{_row(when)}.0.0.0"

    def __contains__(self, when: Any) -> bool:
        with suppress(OSError, ValueError):
            return stat.S_ISREG(os.lstat(self.file(when)).st_mode)
        return False

    @property
    def times(self) -> np.ndarray:
        """datetime64[s] (UTC) of the frames that are there now, sorted."""
        with os.scandir(self.path / "frames") as entries:
            names = [entry.name.split(".") for entry in entries if entry.is_file(follow_symlinks=False)]
        rows = sorted(int(name[1]) for name in names if name[0] == "c" and name[2:] == ["0", "0", "0"])
        return START + np.array(rows, int) * CADENCE.astype("timedelta64[s]")

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame in memory, all channels of the store in int16."""
        return len(self.stored_channels) * self.side**2 * 2

    def select(self, channels: Sequence[str]) -> FrameStore:
        """The same store, frames in memory included, with other channels; ValueError when it lacks one."""
        if absent := [name for name in channels if name not in self.stored_channels]:
            raise ValueError(
                f"{self.path} has no channel {', '.join(absent)}; it has {', '.join(self.stored_channels)}. Choose "
                f"another data.store and run `make cache`: a new store gets the channels of data.channels and "
                f"labels.target_channels."
            )
        other = copy.copy(self)
        other.channels = tuple(channels)
        return other

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
            return _read_shard(self.file(when), len(self.stored_channels), self.side, chosen)
        except (OSError, RuntimeError, ValueError, OverflowError) as error:
            raise OSError(
                f"The frame at {pd.Timestamp(when)} is damaged: {self.file(when)} ({error}). "
                f"`make cache ARGS=--verify` removes damaged frames and makes them again."
            ) from error

    def load(self, times: Iterable) -> None:
        """Keep the frames at `times` in memory from now on, the codes of all channels."""
        whole = self.select(self.stored_channels)
        self._memory |= {_row(when): np.stack(whole._codes(when)) for when in times}

    def write(self, when: Any, codes: np.ndarray) -> None:
        """Add the frame of this time, (all C, H, W) int16; it appears whole."""
        with disk_errors(self.path):
            zarr.open_group(self.path, mode="r+")["frames"][_row(when)] = codes
        share(self.file(when))

    def __repr__(self) -> str:
        times, shape = self.times, f"{len(self.channels)} channels of {self.side} x {self.side} pixels"
        span = f", {times[0]} to {times[-1]}" if len(times) else ""
        return f"FrameStore({self.path}: {len(times)} frames, {shape} (reduced by {self.attributes['reduce']}){span})"


def _tile(side: int) -> int:
    """Side of the chunks into which images of `side` pixels are cut."""
    return side if side % 1024 else 1024


def _read_shard(path: Path, channels: int, side: int, chosen: Sequence[int]) -> list[np.ndarray]:
    """Codes (side, side) int16 of the chosen channels of one frame.

    A shard of Zarr is its chunks, then (offset, bytes) of each of them, then the CRC32C of that index; a chunk is what
    Blosc made of it and its CRC32C. Zarr would read the same, in three times the time.

    Raises:
        ValueError: a checksum differs.
    """

    def checked(block: bytes) -> bytes:
        if google_crc32c.value(block[:-4]) != int.from_bytes(block[-4:], "little"):
            raise ValueError("its checksum differs")
        return block[:-4]

    tile, planes = _tile(side), []
    across = side // tile
    with open(path, "rb") as file:
        file.seek(-(channels * across**2 * 16 + 4), os.SEEK_END)
        index = np.frombuffer(checked(file.read()), "<u8").reshape(channels, across, across, 2)
        for channel in chosen:
            tiles = np.empty((across, across, tile, tile), "<i2")
            for place in np.ndindex(across, across):
                offset, size = map(int, index[channel][place])
                file.seek(offset)
                blosc.decompress(checked(file.read(size)), tiles[place])
            planes.append(tiles.transpose(0, 2, 1, 3).reshape(side, side))
    return planes


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
    path, scalers = Path(path), scalers or physics.load_scalers()
    if not (path / "zarr.json").is_file():
        raise FileNotFoundError(
            f"There is no frame store at {path}. Build it with `make cache`, or correct data.store."
        )
    try:
        attributes = _checked_attributes(path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"The store {path} cannot be used: {error}. Move it away and build a new one: mv {path} {path}.old && make "
            f"cache"
        ) from error
    scale_factors = [scalers[name].scale if name in scalers else None for name in attributes["channels"]]
    for key, wanted in {"reduce": reduce, "native_size": native_size, "scale_factors": scale_factors}.items():
        if wanted is not None and attributes[key] != wanted:
            raise ValueError(
                f"The store {path} was built with {key} {attributes[key]}, but the config asks for {wanted}. Choose "
                f"another data.store (a new one will be built), or set the config to what the store holds."
            )
    store = FrameStore(path, attributes, scalers)
    return store.select(physics.check_channels(channels)) if channels else store


def _checked_attributes(path: Path) -> dict:
    """The attributes of a store of this version, after a look at all that is not a frame."""
    attributes = json.loads((path / "zarr.json").read_text())["attributes"]
    if attributes.get("format") != FORMAT:
        found = attributes.get("format", "none, so an old version or not ours")
        raise ValueError(f"its format is {found}; this version of the course reads {FORMAT}")
    if links := [entry.name for entry in os.scandir(path) if entry.is_symlink()]:
        raise ValueError(f"{', '.join(links)} is a link to elsewhere")
    group = zarr.open_group(path, mode="r", zarr_format=3)
    for name, array in group.arrays():
        codecs = list(array.metadata.codecs)
        codecs += [inner for codec in codecs if isinstance(codec, ShardingCodec) for inner in codec.codecs]
        if strange := [type(codec).__name__ for codec in codecs if not isinstance(codec, CODECS)]:
            raise ValueError(f"its array {name} uses the codec {strange[0]}, which is not ours")
    side = attributes["native_size"] // attributes["reduce"]
    shapes = (SLOTS, len(attributes["channels"]), side, side), (1, 1, _tile(side), _tile(side))
    if (group["frames"].shape, group["frames"].chunks) != shapes:
        raise ValueError("the shape of its frames does not agree with its attributes")
    for name, expected in _axes(attributes).items():
        if not np.array_equal(group[name][:], expected):
            raise ValueError(f"its array {name} does not agree with its attributes")
    return attributes


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
    codings = [physics.coding_of(name, scalers[name]) for name in physics.check_channels(channels)]
    attributes = {
        "format": FORMAT,
        "space": "signed-log: y = sign(x s) log(1 + |x s|) of the physical value x, s in scale_factors",
        "codes": "y = frames * step + offset, rounded by at most half a step; no frame: all codes are _FillValue",
        "channels": list(channels),
        "units": [UNITS[name] for name in channels],
        "scale_factors": [scalers[name].scale for name in channels],
        "steps": [float(coding.step) for coding in codings],
        "offsets": [float(coding.offset) for coding in codings],
        "reduce": reduce,
        "native_size": native_size,
    }
    side, count = native_size // reduce, len(codings)
    make_folder(path.parent)
    aside = tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent)
    with disk_errors(path.parent), aside as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr warns that the format does not demand consolidated metadata
        group = zarr.create_group(Path(folder, "store"), attributes=attributes)
        group.create_array(
            "frames",
            shape=(SLOTS, count, side, side),
            shards=(1, count, side, side),
            chunks=(1, 1, _tile(side), _tile(side)),
            dtype="i2",
            fill_value=FILL_CODE,
            # bitshuffle makes 2 to 4 % less of it, but takes 8 % longer to read
            compressors=[BloscCodec(cname="lz4", clevel=5, shuffle="shuffle", typesize=2), Crc32cCodec()],
            chunk_key_encoding={"name": "default", "separator": "."},
            dimension_names=("time", "channel", "y", "x"),
            # the names under which xarray knows what is no pixel, and that step and offset belong to frames
            attributes={"units": "1", "_FillValue": FILL_CODE, "coordinates": "step offset"},
        )
        numbers = BloscCodec(cname="zstd", shuffle="bitshuffle", typesize=4)
        for name, values in _axes(attributes).items():
            group.create_array(
                name,
                shape=values.shape,
                chunks=values.shape,
                dtype=str if name == "channel" else values.dtype,
                compressors="auto" if name == "channel" else numbers,
                dimension_names=("time" if name == "time" else "channel",),
                attributes={"units": "minutes since 2010-05-01"} if name == "time" else {},
            )[:] = values
        zarr.consolidate_metadata(Path(folder, "store"))
        try:
            Path(folder, "store").rename(path)
            share(path)
        except OSError:
            if not (path / "zarr.json").is_file():
                raise


def verify_store(path: str | Path) -> list[str]:
    """Read every frame and remove the damaged ones, so that the next build makes them again; return their times."""
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

    def __str__(self) -> str:
        speed = f" in {self.seconds:.0f} s, {self.bytes_read / 1e6 / self.seconds:.0f} MB/s" if self.built else ""
        counts = f"{self.built} built{speed}, {self.already} there already, {self.missing} not in the archive"
        lines = [f"Frame store {self.store}: {counts}, {len(self.unreadable)} unreadable"]
        lines += [f"  unreadable: {url}: {reason}" for url, reason in list(self.unreadable.items())[:10]]
        return "\n".join(lines + [f"  ... and {len(self.unreadable) - 10} more"] * (len(self.unreadable) > 10))


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
        create_store(path, channels, reduce, native_size, scalers or physics.load_scalers())
    store = open_store(path, channels, reduce, native_size, scalers)
    _remove_leftovers(store, archive)
    wanted = {np.datetime64(when, "s"): _row(when) for when in times}
    there = {_row(when) for when in store.times}
    jobs = [(when, archive.url(when)) for when, row in wanted.items() if row not in there]
    random.shuffle(jobs)
    report = BuildReport(path, already=len(wanted) - len(jobs))
    if jobs:
        ensure_space(path, len(jobs) * store.frame_bytes * COMPRESSED, reserve_gb, what=f"{len(jobs)} frames")
    worth = 1 + int(len(jobs) * len(store.stored_channels) * native_size**2 * 4 / WORTH_A_PROCESS)
    mine = ThreadPoolExecutor(1) if min(workers, worth) == 1 else worker_pool(min(workers, worth))
    with (
        nullcontext(executor) if executor else mine as pool,
        tqdm(total=len(jobs), desc="frames", unit="frame", disable=not progress) as bar,
    ):
        futures = [pool.submit(build_frame, store, replace(archive, index=None), *job) for job in jobs]
        try:
            for future in as_completed(futures):
                when, url, outcome, size = future.result()
                report.bytes_read += size
                report.seconds = time.perf_counter() - started
                bar.update()
                bar.set_postfix_str(f"{report.bytes_read / 1e6 / report.seconds:.0f} MB/s", refresh=False)
                report.built += outcome == "built"
                report.already += outcome == "already"
                report.missing += outcome == "missing"
                if outcome not in ("built", "already"):
                    report.lost.add(when)
                    report.unreadable |= {url: outcome} if outcome != "missing" else {}
        finally:  # after an error, or when somebody interrupts, nothing new is begun
            for future in futures:
                future.cancel()
    return report


def build_frame(
    store: FrameStore, archive: Archive, when: np.datetime64, url: str | None
) -> tuple[np.datetime64, str | None, str, int]:
    """Make one frame: its time and address; "built", "already", "missing", or why it is unreadable; bytes read."""
    if when in store:
        return when, url, "already", 0
    if url is None:
        return when, url, "missing", 0
    try:
        with archive.local_copy(url) as path:
            size, reduce, native_size = path.stat().st_size, store.attributes["reduce"], store.attributes["native_size"]
            codes = reduce_frame(path, store.codings, reduce, store.scalers, native_size)
        store.write(when, codes)
        return when, url, "built", size
    except MissingFrameError:
        return when, url, "missing", 0
    except FrameError as error:
        return when, url, str(error), 0


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
    scratch = Path(archive.scratch or tempfile.gettempdir())
    leftovers = [*(store.path / "frames").glob("*.partial"), *store.path.parent.glob(f".{store.path.name}.*")]
    for leftover in [*leftovers, *scratch.glob(f"{archives.SCRATCH_PREFIX}*")]:
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
    digest = "" if len(ordered) == len(CHANNELS) else "-" + hashlib.sha1("+".join(ordered).encode()).hexdigest()[:6]
    return f"{native_size}px-reduce{reduce}-{len(ordered)}ch{digest}.zarr"


def store_path(cfg: Config) -> Path:
    """Where the frames of this configuration are read: `data.store` itself if it ends in .zarr, else a folder in it.

    That is the store of exactly the channels that are needed, or one that holds all 13. With `data.private_cache` your
    own folder comes first where the shared one is read-only for you.
    """
    folder, data = Path(cfg.data.store), cfg.data
    places = dict.fromkeys([cfg.shared.to_write(folder), folder] if data.private_cache else [folder])
    names = [store_name(channels, data.reduce, data.native_size) for channels in (channels_needed(cfg), CHANNELS)]
    paths = list(places) if folder.suffix == ".zarr" else [place / name for name in names for place in places]
    for path in paths:
        with suppress(FileNotFoundError, ValueError):
            return open_store(path, channels_needed(cfg), data.reduce, data.native_size, cfg.scalers).path
    return paths[0]


def make_archive(cfg: Config) -> Archive:
    """Where this configuration takes its frames from."""
    data = cfg.data
    folder, index = (
        text if text is None or "://" in text else str(cfg.shared.to_read(text)) for text in (data.archive, data.index)
    )
    archive = Archive(folder, None, "", data.anonymous, data.endpoint_url, data.retries, scratch=cfg.paths.scratch)
    if index is None:
        return archive
    return replace(archive, index=archives.read_index(index, archive)[0], index_folder=index.rpartition("/")[0])


@dataclass(frozen=True)
class Needs:
    """What a build would take.

    Attributes:
        store: where the frames are read.
        times: of all frames that are needed, (N,) datetime64[s].
        lacking: those that the store lacks.
        read_gb, store_gb: to read from the archive, and to write.
        hours: at the speed that was last measured here; None before the first build.
    """

    store: Path
    times: np.ndarray
    lacking: np.ndarray
    read_gb: float
    store_gb: float
    hours: float | None

    def __str__(self) -> str:
        time = f", about {self.hours:.1f} hours at the speed last measured here" if self.hours is not None else ""
        return (
            f"frames: {len(self.times)} needed, {len(self.times) - len(self.lacking)} there already in {self.store}\n"
            f"to build: {len(self.lacking)} frames; {self.read_gb:.1f} GB to read, {self.store_gb:.2f} GB to store "
            f"({free_space(self.store) / GB:.1f} GB free){time}"
        )


def needs_of(cfg: Config, times: Iterable) -> Needs:
    """What the frames of these times take that the store of the configuration lacks."""
    path, times = store_path(cfg), np.unique(np.array(list(times), "datetime64[s]"))
    lacking = np.setdiff1d(times, open_store(path).times) if (path / "zarr.json").is_file() else times
    read_gb = len(lacking) * len(CHANNELS) * cfg.data.native_size**2 * FILE_BYTES / GB
    store_gb = len(lacking) * len(channels_needed(cfg)) * cfg.data.image_size**2 * 2 * COMPRESSED / GB
    speed = _history(path).get("seconds_a_frame")
    return Needs(path, times, lacking, read_gb, store_gb, None if speed is None else len(lacking) * speed / 3600)


def plan_frames(cfg: Config, archive: Archive, labels: Labels | FrameTarget | None = None, lost: Iterable = ()) -> Plan:
    """The samples whose frames are in the store or may be in the archive, those of the `lost` times left out."""
    path, lost = store_path(cfg), np.array(list(lost), "datetime64[s]")
    there = open_store(path).times if (path / "zarr.json").is_file() else lost[:0]
    return plan_samples(cfg, lambda t: np.isin(t, there) | archive.may_have(t) & ~np.isin(t, lost), labels)


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
        ValueError: there is no sample, or more would be read than data.ask_above_gb.
    """
    archive = make_archive(cfg)
    if times is not None:
        return _build_lacking(cfg, archive, needs_of(cfg, times), "", executor, progress)
    labels, total, path = labels_of(cfg), None, store_path(cfg)
    # whoever may only read the store cannot look again for what its owner did not find
    lost = set() if is_writable(path) else {np.datetime64(when) for when in _history(path).get("lost", [])}
    while True:
        plan = plan_frames(cfg, archive, labels, lost)
        if not len(plan.frames):
            raise ValueError(
                f"There is no frame for any sample.\n{plan}\nFrames come from {archive.folder}. Correct data.archive, "
                f"the splits or section labels of the config."
            )
        report = _build_lacking(cfg, archive, needs_of(cfg, plan.frames), f"{plan}\n", executor, progress)
        if total is None:
            total = report
        else:
            total.built += report.built
            total.missing += report.missing
            total.unreadable |= report.unreadable
            total.lost |= report.lost
        if not report.lost:
            return total
        lost |= report.lost


def _build_lacking(
    cfg: Config, archive: Archive, needs: Needs, plan: str, executor: Executor | None, progress: bool
) -> BuildReport:
    """Build what is needed in the store of the configuration, or in your own where that one is read-only."""
    data, path, channels = cfg.data, needs.store, channels_needed(cfg)
    store = open_store(path) if (path / "zarr.json").is_file() else None
    if store and not len(needs.lacking):
        return BuildReport(path, already=len(needs.times))
    if not is_writable(path) and not data.private_cache:
        raise PermissionError(
            f"{plan}{needs}\nYou may only read that folder. Whoever may write there, on a course the instructor, adds "
            f"the frames with `make cache TASK={cfg.task} PROFILE={cfg.profile}`; data.private_cache: true builds them "
            f"in your own cache instead."
        )
    if needs.read_gb > data.ask_above_gb:
        raise ValueError(
            f"{plan}{needs}\nThat is more to read than data.ask_above_gb ({data.ask_above_gb:g} GB). Raise that key, "
            f"set training.max_train_samples (max_val_samples, max_test_samples), or shorten the splits."
        )
    if not is_writable(path):
        path = cfg.shared.to_write(path)
        if store and not path.exists():  # what is there need not be read from the archive again
            wanted = {store.file(when).name for when in needs.times}
            make_folder(path.parent)
            with disk_errors(path.parent):
                unwanted = shutil.ignore_patterns(*{store.file(when).name for when in store.times} - wanted)
                shutil.copytree(store.path, path, symlinks=True, ignore=unwanted)
    settings = {"archive": archive, "native_size": data.native_size, "scalers": cfg.scalers, "executor": executor}
    settings |= {"workers": data.build_workers, "reserve_gb": cfg.paths.reserve_gb, "progress": progress}
    report = build_store(needs.times, path, store.stored_channels if store else channels, data.reduce, **settings)
    history = _history(path)
    history["lost"] = sorted({*history.get("lost", []), *map(str, report.lost)})
    if report.built:
        history["seconds_a_frame"] = report.seconds / report.built
    with atomic_write(_history_file(path)) as temporary:
        temporary.write_text(json.dumps(history))
    return report


def _history_file(store: Path) -> Path:
    """Beside the store: the times that could not be had (`lost`), and the speed of the last build."""
    return store.with_name(f"{store.name}.builds.json")


def _history(store: Path) -> dict:
    with suppress(OSError, ValueError):
        return json.loads(_history_file(store).read_text())
    return {}
