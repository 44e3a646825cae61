"""From NASA's files to the pooled store: index CSV -> NetCDF (local or S3) -> one Zarr store that everyone reads.

Each frame is read channel by channel, averaged over `pooling` x `pooling` pixels of physical values, transformed to
signed-log values and kept as float16, one chunk a frame. A frame counts only when its own element of `done` is set,
which happens after it was written and read back equal. Rows are never moved: times that join the index later are
appended, so the time axis is in the order of arrival (`.sortby("time")`). `python -m helpers.frames` builds it.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import random
import tempfile
import time
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import fsspec
import h5py
import numpy as np
import pandas as pd
import torch
import zarr
from numcodecs import Shuffle
from torch import Tensor
from torch.nn.functional import avg_pool2d
from tqdm.auto import tqdm
from zarr.codecs import BloscCodec

from helpers.channels import CHANNELS, UNITS, Scaler, check_channels, load_scalers, standardise, to_signed_log
from helpers.config import Config, load_config
from helpers.shared import (
    LockedError,
    atomic_write,
    disk_errors,
    ensure_space,
    group_umask,
    is_writable,
    item_lock,
    make_folder,
    raise_if_full,
    resolve,
)

COMPRESSED = 0.75  # size of a compressed frame over that of its float16 values, measured
ROUNDING = "values are float16: relative error at most 2^-11 of the signed-log value"


class FrameError(ValueError):
    """One frame cannot be used; the message says why."""


# --------------------------------------------------------------------------------------------------------------------
# The index
# --------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Source:
    """How files are fetched: `retries` times again after a failure, waiting pause_s, then twice as long, and so on."""

    anonymous: bool = True
    endpoint_url: str | None = None
    retries: int = 4
    pause_s: float = 0.5

    def options(self, url: str) -> dict:
        """What fsspec needs to know for this address. Retrying is left to us, so that it happens once."""
        if not url.startswith("s3://"):
            return {}
        once = {"retries": {"total_max_attempts": 1}, "connect_timeout": 10, "read_timeout": 60}
        return {"anon": self.anonymous, "endpoint_url": self.endpoint_url, "config_kwargs": once}


@dataclass(frozen=True)
class Index:
    """A checked index: `table` with the columns path (full) and time (UTC), sorted; counts and notes on the rest."""

    table: pd.DataFrame
    missing: int  # rows with present = 0
    notes: list[str]


def read_index(index_csv: str | Path, source: Source | None = None) -> Index:
    """Read an index CSV (columns path, timestep, present), local or s3://. Relative paths start at its folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing, a time cannot be read, or two rows name different files for one time.
    """
    text = str(index_csv)
    with _described(f"the index {text}"), fsspec.open(text, **(source or Source()).options(text)) as file:
        table = pd.read_csv(file)
    if absent := {"path", "timestep", "present"} - set(table):
        raise ValueError(
            f"The index {text} has no column {', '.join(sorted(absent))}; it has {', '.join(map(str, table))}. "
            f"An index is a CSV with the columns path, timestep, present."
        )
    table["time"] = parse_times(table["timestep"], f"the index {text}")
    notes = []
    if not table["time"].is_monotonic_increasing:
        notes.append("the rows of the index were not in the order of time and have been sorted")
    unique = table.drop_duplicates(["path", "time", "present"])
    if len(unique) < len(table):
        notes.append(f"{len(table) - len(unique)} row(s) of the index stand there twice and were dropped")
    present = unique[unique["present"] == 1].sort_values("time")
    if (twice := present["time"].duplicated(keep=False)).any():
        first = present[twice].iloc[:2]
        raise ValueError(
            f"The index {text} names different files for {first['time'].iloc[0]}: {' and '.join(first['path'])} (rows "
            f"{' and '.join(str(row + 2) for row in first.index)}). Keep one row a time."
        )
    folder = text.rsplit("/", 1)[0] if "/" in text else "."
    full = [path if "://" in path or path.startswith("/") else f"{folder}/{path}" for path in present["path"]]
    return Index(present[["time"]].assign(path=full).reset_index(drop=True), len(unique) - len(present), notes)


def parse_times(column: pd.Series, where: str) -> pd.Series:
    """Times in any ISO format as datetime64[s] in UTC without a zone; an error names the row of the file."""
    text = column.astype("string")  # a column of numbers would be taken for nanoseconds since 1970
    try:
        times = pd.to_datetime(text, utc=True, format="ISO8601")
    except (ValueError, TypeError):
        parsed = pd.to_datetime(text, utc=True, format="ISO8601", errors="coerce")
        row = int(np.flatnonzero(parsed.isna() & text.notna())[0])
        raise ValueError(
            f'Row {row + 2} of {where} has "{column.iloc[row]}" in its column {column.name}, which is not a time. '
            f"Write times like 2014-01-07 18:00:00 (UTC)."
        ) from None
    if times.isna().any():
        row = int(np.flatnonzero(times.isna())[0])
        raise ValueError(f"Row {row + 2} of {where} has an empty {column.name}. Fill it, or remove the row.")
    return times.dt.tz_localize(None).astype("datetime64[s]")


@contextmanager
def _described(what: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no {what.removeprefix('the ')}. Check data.index in the config.") from error


# --------------------------------------------------------------------------------------------------------------------
# One frame
# --------------------------------------------------------------------------------------------------------------------
def reduce_frame(
    path: str | Path, channels: Sequence[str], pooling: int, scalers: dict[str, Scaler], native_size: int | None = None
) -> tuple[np.ndarray, float]:
    """Read one NetCDF file and reduce it, one channel in memory at a time.

    Args:
        path: a local file with one (y, x) float variable a channel, in physical units.
        native_size: the side that the images must have, in pixels; None accepts any that `pooling` divides.

    Returns:
        (C, H / pooling, W / pooling) float16 signed-log values, and the largest rounding error in normalised units.

    Raises:
        FrameError: not NetCDF4, cut short, a channel missing, a wrong shape, or pixels that are not numbers.
    """
    planes, error = [], 0.0
    with open_netcdf(path) as file:
        if absent := [name for name in channels if name not in file]:
            raise FrameError(f"it has no variable {', '.join(absent)} (it has {', '.join(file) or 'none'})")
        for name in channels:
            pooled = _pooled(file[name], pooling, native_size)
            exact = to_signed_log(pooled, scalers[name])
            planes.append(exact.half())
            difference = standardise(planes[-1].float(), scalers[name]) - standardise(exact, scalers[name])
            error = max(error, difference.abs().max().item())
    return torch.stack(planes).numpy(), error


@contextmanager
def open_netcdf(path: str | Path) -> Iterator[h5py.File]:
    try:
        with h5py.File(path, "r") as file:
            yield file
    except FileNotFoundError:
        raise FrameError("the file does not exist") from None
    except OSError as error:
        text = str(error)
        if "truncated file" in text or "filter returned failure" in text or "Can't synchronously read" in text:
            raise FrameError(f"the file is cut short or damaged ({text})") from None
        if "signature not found" in text:
            raise FrameError("the file is not NetCDF4 (HDF5)") from None
        raise FrameError(f"the file cannot be read ({text})") from None


def _pooled(variable: h5py.Dataset, pooling: int, native_size: int | None) -> Tensor:
    """Average of the physical values over pooling x pixels, (H / pooling, W / pooling) float32."""
    name, shape = variable.name.lstrip("/"), variable.shape
    fits = len(shape) == 2 and shape[0] == shape[1] and (native_size or shape[0]) == shape[0] and not shape[0] % pooling
    if not fits:
        wanted = f"{native_size} x {native_size}" if native_size else f"a square with a side divisible by {pooling}"
        raise FrameError(f"{name} has the shape {' x '.join(map(str, shape))}, expected {wanted}")
    if packed := {"scale_factor", "add_offset"} & set(variable.attrs):
        raise FrameError(f"{name} is packed ({', '.join(packed)}), expected plain physical values")
    image = torch.from_numpy(_values(variable))  # (H, W) physical
    pooled = avg_pool2d(image[None, None], pooling)[0, 0]  # (H / pooling, W / pooling)
    if wrong := int((~pooled.isfinite()).sum()):
        raise FrameError(f"{name} has pixels that are not numbers (NaN), in {wrong / pooled.numel():.1%} of the image")
    return pooled


def _values(variable: h5py.Dataset) -> np.ndarray:
    """All values as float32. Large zlib chunks are decompressed here: HDF5 would do it for one thread at a time."""
    chunks, shape = variable.chunks, variable.shape
    usual = chunks and variable.compression == "gzip" and not variable.fletcher32 and variable.scaleoffset is None
    size = math.prod(chunks or ()) * variable.dtype.itemsize
    if (
        not usual
        or size < 2**16
        or variable.id.get_num_chunks() < math.prod(-(-n // m) for n, m in zip(shape, chunks, strict=True))
    ):
        return variable[()].astype(np.float32, copy=False)
    values = np.empty(shape, np.float32)
    for place in variable.iter_chunks():
        skipped_filters, packed = variable.id.read_direct_chunk([axis.start for axis in place])
        if skipped_filters:
            return variable[()].astype(np.float32, copy=False)
        try:
            block = zlib.decompress(packed, bufsize=size)
        except zlib.error as error:
            raise FrameError(f"the file is cut short or damaged ({variable.name}: {error})") from None
        block = Shuffle(variable.dtype.itemsize).decode(block) if variable.shuffle else block
        block = np.frombuffer(block, variable.dtype).reshape(chunks)
        values[place] = block[tuple(slice(axis.stop - axis.start) for axis in place)]
    return values


@contextmanager
def local_copy(url: str, source: Source) -> Iterator[Path]:
    """The file at `url` on this disk: itself, or for a remote address a whole download that is deleted afterwards.

    Raises:
        FrameError: the file does not exist, may not be read, or could not be fetched in `source.retries` + 1 tries.
        ConnectionError: the server cannot be reached at all, or there are no credentials: no frame can be read.
    """
    if "://" not in url:
        yield Path(url)
        return
    with tempfile.TemporaryDirectory(prefix="surya-course-") as folder:
        path = Path(folder) / "frame.nc"
        for attempt in range(source.retries + 1):
            try:
                _download(url, path, source)
                break
            except (FileNotFoundError, PermissionError) as error:
                missing = isinstance(error, FileNotFoundError)
                raise FrameError(f"{'there is no such file' if missing else 'access denied'} ({error})") from None
            except Exception as error:  # each protocol has its own kinds
                raise_if_full(error, path)
                if attempt == source.retries:
                    _give_up(error, attempt + 1, url)
                time.sleep(source.pause_s * 2**attempt * random.uniform(0.75, 1.25))
        yield path


def _download(url: str, path: Path, source: Source) -> None:
    filesystem, key = fsspec.core.url_to_fs(url, **source.options(url))
    filesystem.retries = 1
    size = filesystem.info(key, refresh=True)["size"]
    filesystem.get_file(key, str(path))
    if path.stat().st_size != size:
        raise OSError(f"{path.stat().st_size} of {size} bytes arrived")


def _give_up(error: Exception, tries: int, url: str) -> None:
    text = f"{type(error).__name__}: {(str(error) or 'no reason given').splitlines()[0]}"
    if type(error).__name__ in ("EndpointConnectionError", "NoCredentialsError", "ClientConnectorError"):
        raise ConnectionError(
            f"Frames cannot be fetched from {url.split('://')[0]}:// here ({text}). Check the network, and "
            f"data.endpoint_url and data.anonymous in the config; frames that are built can be read without it."
        ) from error
    raise FrameError(f"could not be fetched in {tries} tries, the last one with {text}") from None


# --------------------------------------------------------------------------------------------------------------------
# The store
# --------------------------------------------------------------------------------------------------------------------
class FrameStore:
    """A store opened for reading: which frames are complete, and their signed-log values.

    Attributes:
        channels: names of the channels of what `read` returns, in order.
        times: datetime64[s] (UTC) of the complete frames, sorted.
        side: side of the reduced images in pixels.
        pooling, native_size: how they were reduced, and from which side.
    """

    def __init__(self, path: str | Path, channels: Sequence[str] | None = None) -> None:
        self.path = Path(path)
        group = zarr.open_group(self.path, mode="r")
        self.attributes = dict(group.attrs)
        self.stored_channels = tuple(group["channel"][:].tolist())
        self.channels = tuple(channels or self.stored_channels)
        self.pooling, self.native_size = self.attributes["pooling"], self.attributes["native_size"]
        self.side = group["frames"].shape[-1]
        self._select = [self.stored_channels.index(name) for name in self.channels]
        times = group["time"][:].astype("datetime64[s]")
        rows = sorted((row for row in _done_rows(self.path) if row < len(times)), key=lambda row: times[row])
        self.times = times[rows]
        self._row = dict(zip(self.times.tolist(), rows, strict=True))
        self._opened: tuple[int, zarr.Array] | None = None
        self._memory: dict[datetime, Tensor] = {}

    def __len__(self) -> int:
        return len(self.times)

    def __contains__(self, when) -> bool:
        return _second(when) in self._row

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame in memory, all channels of the store in float16."""
        return len(self.stored_channels) * self.side**2 * 2

    def read(self, when) -> Tensor:
        """The frame at the time `when` in the chosen channels, (C, H, W) float16 signed-log values.

        Raises:
            KeyError: there is no complete frame at that time.
        """
        frame = self.read_all(when)
        return frame if self.channels == self.stored_channels else frame[self._select]

    def read_all(self, when) -> Tensor:
        """The same with all channels of the store, in its own order (`stored_channels`)."""
        second = _second(when)
        if second in self._memory:
            return self._memory[second]
        row = self._row.get(second)
        if row is None:
            raise KeyError(f"{self.path} has no complete frame at {pd.Timestamp(when)}; build it with `make cache`.")
        if self._opened is None or self._opened[0] != os.getpid():  # each worker process opens it for itself
            self._opened = os.getpid(), zarr.open_group(self.path, mode="r")["frames"]
        return torch.from_numpy(self._opened[1][row])

    def load(self, times: Iterable) -> None:
        """Keep the frames at `times` in memory from now on, all channels in float16."""
        for when in times:
            self._memory[_second(when)] = self.read_all(when)

    def dataset(self):
        """The complete frames as an xarray Dataset (time, channel, y, x), lazily, in the order of time."""
        import xarray

        rows = [self._row[when] for when in self.times.tolist()]
        return xarray.open_zarr(self.path).isel(time=rows, channel=self._select)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_opened": None}

    def __repr__(self) -> str:
        span = f", {self.times[0]} to {self.times[-1]}" if len(self) else ""
        shape = f"{len(self.channels)} channels of {self.side} x {self.side} pixels (pooled by {self.pooling})"
        return f"FrameStore({self.path}: {len(self)} complete frames, {shape}{span})"


def open_store(
    store_path: str | Path,
    channels: Sequence[str] | None = None,
    pooling: int | None = None,
    native_size: int | None = None,
    scalers: dict[str, Scaler] | None = None,
) -> FrameStore:
    """Open a store for reading the given channels, by name and in any order, once it is sure to be the right one.

    Raises:
        FileNotFoundError: there is no store.
        ValueError: it lacks a channel, or was built with another pooling, image side or scale factor.
    """
    path = Path(store_path)
    if not (path / "zarr.json").is_file():
        raise FileNotFoundError(
            f"There is no frame store at {path}. Build it with `make cache`, or correct data.store."
        )
    attributes = zarr.open_group(path, mode="r").attrs
    problems = []
    if channels and (absent := [name for name in check_channels(channels) if name not in attributes["channels"]]):
        problems.append(f"has no channel {', '.join(absent)} (it has {', '.join(attributes['channels'])})")
    for name, value in (("pooling", pooling), ("native_size", native_size)):
        if value is not None and attributes[name] != value:
            problems.append(f"was built with {name} {attributes[name]}, but the config asks for {value}")
    for name, scale in zip(attributes["channels"], attributes["scale_factors"], strict=True):
        if scalers and name in scalers and scalers[name].scale != scale:
            problems.append(
                f"was built with the scale factor {scale} of {name}, but data.scalers has {scalers[name].scale}"
            )
    if problems:
        raise ValueError(
            f"The store {path} {', and '.join(problems)}. Choose another data.store (a new one will be built), or set "
            f"the config to what the store holds."
        )
    return FrameStore(path, channels)


def store_name(channels: Sequence[str], pooling: int, native_size: int) -> str:
    """A folder name that differs for every channel set and size, so that two configs never share a store by mistake."""
    ordered = [name for name in CHANNELS if name in channels]
    digest = hashlib.sha1("+".join(ordered).encode()).hexdigest()[:6]
    tag = f"{len(CHANNELS)}ch" if len(ordered) == len(CHANNELS) else f"{len(ordered)}ch-{digest}"
    return f"{native_size}px-pool{pooling}-{tag}.zarr"


def _second(when) -> datetime:
    return np.datetime64(when, "s").item()


def _seconds(times: Iterable) -> list[datetime]:
    return np.asarray(times, "datetime64[s]").tolist()


def _done_rows(path: Path) -> set[int]:
    """Rows that are complete. `done` has one element a chunk and 0 as fill: the files that are there are the marks."""
    with suppress(FileNotFoundError), os.scandir(path / "done" / "c") as entries:
        return {int(entry.name) for entry in entries if entry.name.isdigit()}
    return set()


def _mark(path: Path, row: int) -> Path:
    return path / "done" / "c" / str(row)


def _create(path: Path, channels: Sequence[str], pooling: int, native_size: int, scalers: dict, source: str) -> None:
    """Make an empty store under another name and move it into place."""
    make_folder(path.parent)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        _fill_metadata(zarr.create_group(temporary), channels, pooling, native_size, scalers, source)
        _consolidate(temporary)
        os.rename(temporary, path)


def _fill_metadata(
    group: zarr.Group, channels: Sequence[str], pooling: int, native_size: int, scalers: dict, source: str
) -> None:
    """The attributes and the empty arrays of a store."""
    side = native_size // pooling
    group.attrs.update(
        title="Solar Dynamics Observatory frames, reduced",
        space="signed-log: y = sign(x s) log(1 + |x s|) of the physical value x, s in scale_factors",
        channels=list(channels),
        units=[UNITS[name] for name in channels],
        scale_factors=[scalers[name].scale for name in channels],
        pooling=pooling,
        native_size=native_size,
        source=source,
        software=f"surya-course {_version()}",
        rounding=ROUNDING,
        largest_rounding_error_normalised=0.0,
        completeness="only frames with done = 1 are complete; times are in the order of arrival",
    )
    axes = {"dimension_names": ("time", "channel", "y", "x"), "attributes": {"units": "1", "long_name": "signed-log"}}
    compressor = BloscCodec(cname="lz4", clevel=5, shuffle="shuffle", typesize=2)
    shape, nan = (len(channels), side, side), np.float16("nan")
    group.create_array(
        "frames", shape=(0, *shape), chunks=(1, *shape), dtype="f2", fill_value=nan, compressors=compressor, **axes
    )
    calendar = {"units": "seconds since 1970-01-01", "calendar": "proleptic_gregorian"}
    time_axis = {"shape": (0,), "dimension_names": ("time",), "fill_value": 0}
    group.create_array("time", chunks=(16384,), dtype="i8", attributes=calendar, **time_axis)
    group.create_array("done", chunks=(1,), dtype="u1", compressors=None, **time_axis)
    names = group.create_array("channel", shape=(len(channels),), dtype=str, dimension_names=("channel",))
    names[:] = np.array(channels, dtype=object)


def _grow(path: Path, times: np.ndarray) -> dict[datetime, int]:
    """Append rows for the `times` that the store does not have; return the row of every time of the store.

    The consolidated metadata is written last, in one move: until then readers see the store as it was.
    """
    group = zarr.open_group(path, mode="r+", use_consolidated=False)
    known = zarr.open_group(path, mode="r")["time"][:].astype("datetime64[s]")
    fresh = np.setdiff1d(times.astype("datetime64[s]"), known)
    after = np.concatenate([known, fresh])
    if len(fresh):
        for name in ("frames", "done", "time"):
            group[name].resize((len(after), *group[name].shape[1:]))
        group["time"][:] = after.astype("i8")
        _consolidate(path)
    return {when: row for row, when in enumerate(after.tolist())}


def _consolidate(path: Path) -> None:
    with warnings.catch_warnings():  # zarr warns that the format does not demand it
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(path)


def _version() -> str:
    try:
        return version("surya-course")
    except PackageNotFoundError:
        return "(not installed)"


# --------------------------------------------------------------------------------------------------------------------
# Building
# --------------------------------------------------------------------------------------------------------------------
@dataclass
class BuildReport:
    """What a build did; prints as a few lines."""

    store: Path
    built: int = 0
    already: int = 0
    missing: int = 0  # rows of the index with present = 0
    unreadable: dict[str, str] = field(default_factory=dict)  # path -> reason
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    bytes_read: int = 0
    rounding: float = 0.0  # largest error of float16 in normalised units

    def __str__(self) -> str:
        speed = (
            f" in {self.seconds:.0f} s, {self.bytes_read / 1e6 / max(self.seconds, 1e-9):.0f} MB/s"
            if self.built
            else ""
        )
        counts = f"{self.built} built{speed}, {self.already} there already, {self.missing} not present by the index"
        lines = [f"Frame store {self.store}: {counts}, {len(self.unreadable)} unreadable", *self.notes]
        lines += [f"  unreadable: {path}: {reason}" for path, reason in list(self.unreadable.items())[:10]]
        if len(self.unreadable) > 10:
            lines.append(
                f"  ... and {len(self.unreadable) - 10} more in {_build_folder(self.store) / 'unreadable.csv'}"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class _Task:
    """All that a worker process needs to build one frame."""

    store: Path
    row: int
    time: str
    url: str
    channels: tuple[str, ...]
    pooling: int
    native_size: int
    scalers: dict[str, Scaler]
    source: Source


@dataclass(frozen=True)
class _Result:
    task: _Task
    outcome: str  # built, already, busy, or why it is unreadable
    bytes_read: int = 0
    rounding: float = 0.0


def build_store(
    index_csv: str | Path,
    store_path: str | Path,
    channels: Sequence[str] = CHANNELS,
    pooling: int = 4,
    workers: int = 1,
    *,
    native_size: int | None = None,
    scalers: dict[str, Scaler] | None = None,
    source: Source | None = None,
    between: Sequence[tuple[str, str]] | None = None,
    reserve_gb: float = 2.0,
    dask_address: str | None = None,
    progress: bool = True,
) -> BuildReport:
    """Build the frames of an index that the store does not have yet; call it again after anything went wrong.

    Several processes and people may build one store at once: each frame is locked while it is made.

    Args:
        index_csv: CSV with the columns path, timestep, present; local or s3://.
        channels: what to keep, by name. A store that is there already keeps the channels it has.
        pooling: side of the squares of physical pixels that are averaged.
        workers: how many frames are made at once on this machine.
        native_size: side of the images in the files (None: that of the first one that can be read).
        between: [start, end) spans of time to build; None for the whole index.
        reserve_gb: free space that must remain on the disk.
        dask_address: a Dask scheduler whose workers see the same disks, to use instead.

    Returns:
        A report that lists the frames that could not be used, which is also written to `<store>.build/unreadable.csv`.

    Raises:
        ValueError: the index is wrong, or the store was built with other settings.
        DiskFullError: too little space, before starting or on the way. What is complete stays.
        ConnectionError: the server of the frames cannot be reached.
    """
    started, path, source = time.perf_counter(), Path(store_path), source or Source()
    scalers = scalers or load_scalers()
    index = read_index(index_csv, source)
    table = _within(index.table, between)
    report = BuildReport(path, missing=index.missing, notes=index.notes)
    with disk_errors(path), group_umask(path.parent), item_lock(_build_folder(path) / "store"):
        if not (path / "zarr.json").is_file():
            side = native_size or _side_of_first(table["path"], check_channels(channels), source)
            _create(path, check_channels(channels), pooling, side, scalers, str(index_csv))
        store = open_store(path, channels, pooling, native_size, scalers)
        rows = _grow(path, table["time"].to_numpy())
    done = _done_rows(path)
    common = (store.stored_channels, pooling, store.native_size, scalers, source)
    tasks = [
        _Task(path, rows[_second(when)], str(when), url, *common)
        for when, url in zip(table["time"], table["path"], strict=True)
        if rows[_second(when)] not in done
    ]
    report.already = len(table) - len(tasks)
    if tasks:
        size = len(tasks) * len(store.stored_channels) * store.side**2 * 2 * COMPRESSED
        ensure_space(path, size, reserve_gb, what=f"{len(tasks)} frames")
        # umask and torch threads belong to the process: set once here, around all threads of the build
        with disk_errors(path), group_umask(path.parent), _one_torch_thread():
            _collect(_results(tasks, workers, dask_address), report, len(tasks), progress)
            _record(report)
    report.seconds = time.perf_counter() - started
    return report


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Frames are made side by side; several threads for each one would only get in each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _within(table: pd.DataFrame, between: Sequence[tuple[str, str]] | None) -> pd.DataFrame:
    if between is None:
        return table
    spans = [(table["time"] >= pd.Timestamp(start)) & (table["time"] < pd.Timestamp(end)) for start, end in between]
    return table[np.logical_or.reduce(spans)]


def _side_of_first(paths: Iterable[str], channels: Sequence[str], source: Source) -> int:
    """Side of the images in the first file that can be read."""
    reasons = []
    for url in paths:
        try:
            with local_copy(url, source) as path, open_netcdf(path) as file:
                return file[channels[0]].shape[-1]
        except (FrameError, KeyError) as error:
            reasons.append(f"{url}: {error}")
    raise FrameError("None of the frames of the index can be read. " + "; ".join(reasons[:3]))


def _build_folder(store: Path) -> Path:
    """Beside the store: locks and the list of unreadable frames."""
    return store.with_name(f"{store.name}.build")


def _build_frame(task: _Task, wait: bool = False) -> _Result:
    """Make one frame of the store unless it is complete, or being made by someone else and we are not to wait."""
    if _mark(task.store, task.row).exists():
        return _Result(task, "already")
    try:
        with item_lock(_build_folder(task.store) / f"frame-{task.row}", timeout_s=None if wait else 0):
            if _mark(task.store, task.row).exists():
                return _Result(task, "already")
            with local_copy(task.url, task.source) as path:
                size = path.stat().st_size if path.exists() else 0
                frame, error = reduce_frame(path, task.channels, task.pooling, task.scalers, task.native_size)
            with disk_errors(task.store):
                _write(task, frame)
            return _Result(task, "built", size, error)
    except LockedError:
        return _Result(task, "busy")
    except FrameError as error:
        return _Result(task, str(error))


def _write(task: _Task, frame: np.ndarray) -> None:
    for leftover in (task.store / "frames" / "c" / str(task.row)).rglob("*.partial"):
        leftover.unlink()  # of someone who was killed; nobody else writes here while we hold the lock
    with group_umask(task.store):
        frames, done = _arrays(task.store, task.row)
        frames[task.row] = frame
        if not np.array_equal(frames[task.row], frame):
            raise OSError(
                f"The frame {task.time} was written to {task.store}, but reads back differently. Check the disk."
            )
        done[task.row] = 1


def _arrays(store: Path, row: int) -> tuple[zarr.Array, zarr.Array]:
    frames, done = _writable_arrays(store)
    if row >= done.shape[0]:  # the store has grown since this process opened it
        _writable_arrays.cache_clear()
        frames, done = _writable_arrays(store)
    return frames, done


@lru_cache(maxsize=4)
def _writable_arrays(store: Path) -> tuple[zarr.Array, zarr.Array]:
    group = zarr.open_group(store, mode="r+")
    return group["frames"], group["done"]


def _results(tasks: list[_Task], workers: int, dask_address: str | None) -> Iterator[_Result]:
    """Build all tasks, here or on Dask workers, and then wait for those that someone else was making."""
    here = not dask_address and (workers == 1 or len(tasks) == 1)
    results = map(_build_frame, tasks) if here else _on_cluster(tasks, workers, dask_address)
    busy = []
    for result in results:
        if result.outcome == "busy":
            busy.append(result.task)
        else:
            yield result
    for task in busy:
        yield _build_frame(task, wait=True)


def _on_cluster(tasks: list[_Task], workers: int, address: str | None) -> Iterator[_Result]:
    from distributed import Client, LocalCluster, as_completed

    step = min(8, 1 + len(tasks) // 500)
    batches = [tasks[i : i + step] for i in range(0, len(tasks), step)]
    # threads: decompressing, averaging and writing leave Python's lock alone, and processes take longer to start
    local = {"processes": False, "n_workers": 1, "threads_per_worker": workers}
    local |= {"dashboard_address": "127.0.0.1:0", "worker_dashboard_address": "127.0.0.1:0"}  # for nobody else
    with LocalCluster(**local) if not address else nullcontext(address) as cluster, Client(cluster) as client:
        for _, results in as_completed(client.map(_build_batch, batches, pure=False), with_results=True):
            yield from results


def _build_batch(tasks: list[_Task]) -> list[_Result]:
    return [_build_frame(task) for task in tasks]


def _collect(results: Iterator[_Result], report: BuildReport, total: int, progress: bool) -> None:
    started = time.perf_counter()
    with tqdm(total=total, desc="frames", unit="frame", disable=not progress) as bar:
        for result in results:
            if result.outcome == "built":
                report.built += 1
            elif result.outcome == "already":
                report.already += 1
            else:
                report.unreadable[result.task.url] = result.outcome
            report.bytes_read += result.bytes_read
            report.rounding = max(report.rounding, result.rounding)
            bar.update()
            bar.set_postfix_str(f"{report.bytes_read / 1e6 / (time.perf_counter() - started):.0f} MB/s", refresh=False)


def _record(report: BuildReport) -> None:
    """Write the list of unreadable frames, and the largest rounding error into the store's attributes."""
    listed = _build_folder(report.store) / "unreadable.csv"
    with item_lock(_build_folder(report.store) / "store"), group_umask(report.store):
        with atomic_write(listed) as temporary:
            pd.DataFrame(report.unreadable.items(), columns=["path", "reason"]).to_csv(temporary, index=False)
        group = zarr.open_group(report.store, mode="r+", use_consolidated=False)
        if report.rounding > group.attrs["largest_rounding_error_normalised"]:
            group.attrs["largest_rounding_error_normalised"] = report.rounding
            _consolidate(report.store)


def verify_store(store_path: str | Path) -> list[str]:
    """Read every frame that counts as complete; forget those that are damaged, so that the next build makes them again.

    Returns:
        The times of the damaged frames.
    """
    path, damaged = Path(store_path), []
    store = FrameStore(path)
    for when in tqdm(store.times, "verifying", unit="frame"):
        try:
            sound = bool(store.read(when).isfinite().all())
        except (OSError, RuntimeError, ValueError):
            sound = False
        if not sound:
            damaged.append(str(when))
            _mark(path, store._row[_second(when)]).unlink(missing_ok=True)
    return damaged


# --------------------------------------------------------------------------------------------------------------------
# By configuration
# --------------------------------------------------------------------------------------------------------------------
def store_path(cfg: Config) -> Path:
    """Where the frames of this configuration are read: `data.store` itself if it ends in .zarr, else a folder in it.

    When the shared folder is read-only and you have built a store of your own, it is yours.
    """
    shared, own = (Path(resolve(cfg, _store_text(cfg), write)) for write in (False, True))
    return own if own.exists() else shared


def _store_text(cfg: Config) -> str:
    if cfg.data.store.endswith(".zarr"):
        return cfg.data.store
    name = store_name(cfg.data.channels, cfg.data.pooling, cfg.data.native_size)
    return f"{cfg.data.store.rstrip('/')}/{name}"


def prepare_store(cfg: Config, between: Sequence[tuple[str, str]] | None = None, progress: bool = True) -> BuildReport:
    """Build what the configuration needs and the store lacks; quick when everything is there.

    Args:
        between: [start, end) spans to build; None for the spans of train, validation and test with their offsets.
    """
    index, between = resolve(cfg, cfg.data.index), between or _spans(cfg)
    source = Source(cfg.data.anonymous, cfg.data.endpoint_url, cfg.data.retries)
    path = store_path(cfg)
    if path.exists() and not is_writable(path):
        table = _within(read_index(index, source).table, between)
        if set(_seconds(table["time"])) <= set(_seconds(FrameStore(path).times)):
            return BuildReport(path, already=len(table))
    return build_store(
        index,
        path if is_writable(path) else resolve(cfg, _store_text(cfg), write=True),
        cfg.data.channels,
        cfg.data.pooling,
        cfg.data.build_workers,
        native_size=cfg.data.native_size,
        scalers=load_scalers(resolve(cfg, cfg.data.scalers)),
        source=source,
        between=between,
        reserve_gb=cfg.paths.reserve_gb,
        dask_address=cfg.data.dask_address,
        progress=progress,
    )


def _spans(cfg: Config) -> list[tuple[str, str]]:
    """The times that samples of the three splits can ask for."""
    offsets = [*cfg.data.offsets_minutes, cfg.labels.target_offset_minutes, 0]
    before, after = pd.Timedelta(min(offsets), "min"), pd.Timedelta(max(offsets) + 1, "min")
    splits = (cfg.split.train, cfg.split.val, cfg.split.test)
    return [(str(pd.Timestamp(start) + before), str(pd.Timestamp(end) + after)) for start, end in splits]


def main() -> None:
    """Reduce the frames of the configuration into its store; run it again to go on."""
    parser = argparse.ArgumentParser(prog="python -m helpers.frames", description=main.__doc__)
    parser.add_argument("--config", default="config.yaml")
    parser.add_argument("--profile")
    parser.add_argument("--task")
    parser.add_argument("--start", help="only frames from this time on, for example 2014-01-07")
    parser.add_argument("--end", help="only frames before this time")
    parser.add_argument(
        "--verify", action="store_true", help="read every frame first and rebuild those that are damaged"
    )
    asked = parser.parse_args()
    cfg = load_config(asked.config, profile=asked.profile, task=asked.task)
    if asked.verify and store_path(cfg).exists():
        print("damaged:", ", ".join(verify_store(store_path(cfg))) or "none")
    given = asked.start or asked.end
    print(prepare_store(cfg, [(asked.start or "1900-01-01", asked.end or "2200-01-01")] if given else None))
    print(open_store(store_path(cfg)))


if __name__ == "__main__":
    main()
