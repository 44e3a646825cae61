"""From NASA's files to the pooled store: index CSV -> NetCDF (local or S3) -> one Zarr store that everyone reads.

Frames are reduced by helpers/data/archive.py and kept as 16-bit fixed-point codes of signed-log values (`Coding` in
helpers/channels.py; `step` and `offset` stand in the store), one chunk a frame. A frame counts only when its own
element of `done` is set, which happens after it was written, read back equal, and is on the disk for good. Rows are
never moved: times that join the index later are appended, so the time axis is in the order of arrival
(`.sortby("time")`).
`python -m helpers.data.frames` builds it.
"""

from __future__ import annotations

import copy
import hashlib
import os
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import zarr
from torch import Tensor
from tqdm import tqdm
from zarr.codecs import BloscCodec

from helpers.channels import (
    CHANNELS,
    ERROR_BOUND,
    FILL_CODE,
    LARGEST_STEP,
    UNITS,
    Coding,
    Scaler,
    check_channels,
    coding_of,
    load_scalers,
)
from helpers.config import Config
from helpers.data.archive import FrameError, Index, Source, in_spans, local_copy, open_netcdf, read_index, reduce_frame
from helpers.shared import (
    LockedError,
    atomic_write,
    disk_errors,
    ensure_space,
    flush_to_disk,
    group_umask,
    is_writable,
    item_lock,
    make_folder,
)

FORMAT = "int16 fixed point, 1"  # the attribute by which a store is recognised
COMPRESSED = 0.6  # size of a compressed frame over that of its codes; measured: synthetic Sun 0.4, noisy frame 0.52


# --------------------------------------------------------------------------------------------------------------------
# The store
# --------------------------------------------------------------------------------------------------------------------
class FrameStore:
    """A store opened for reading: which frames are complete, and their signed-log values.

    Attributes:
        channels: names of the channels of what `read` returns, in order.
        times: datetime64[s] (UTC) of the complete frames, sorted.
        side: side of the reduced images in pixels.
        codings: how the codes of each stored channel are read.
        pooling, native_size: how they were reduced, and from which side.
    """

    def __init__(
        self, path: str | Path, channels: Sequence[str] | None = None, scalers: dict[str, Scaler] | None = None
    ) -> None:
        self.path, self.scalers = Path(path), scalers or load_scalers()
        group = zarr.open_group(self.path, mode="r")
        self.attributes = dict(group.attrs)
        self.stored_channels = tuple(group["channel"][:].tolist())
        self.channels = tuple(channels or self.stored_channels)
        self.pooling, self.native_size = self.attributes["pooling"], self.attributes["native_size"]
        self.side = group["frames"].shape[-1]
        numbers = zip(self.stored_channels, group["step"][:], group["offset"][:], strict=True)
        self.codings = {name: Coding(step, offset) for name, step, offset in numbers}
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
        """Bytes of one frame in memory, all channels of the store in int16."""
        return len(self.stored_channels) * self.side**2 * 2

    def read(self, times: Iterable) -> Tensor:
        """The frames at these times in the chosen channels, (C, T, H, W) float32 normalised.

        Raises:
            KeyError: there is no complete frame at one of the times.
            OSError: a frame cannot be read, although it counts as complete.
        """
        frames = [self.read_all(when) for when in times]  # each (all C, H, W) int16
        shape = (len(self.channels), len(frames), self.side, self.side)
        out = torch.from_numpy(np.empty(shape, np.float32))  # numpy asks for huge pages, torch does not: 3 x faster
        for c, (name, i) in enumerate(zip(self.channels, self._select, strict=True)):
            coding, scaler = self.codings[name], self.scalers[name]
            spread = scaler.std + scaler.epsilon
            # z = (code * step + offset - mean) / spread in one multiply-add
            level = torch.tensor((coding.offset - scaler.mean) / spread, dtype=torch.float32)
            for t, frame in enumerate(frames):
                torch.add(level, frame[i], alpha=float(coding.step / spread), out=out[c, t])
        return out

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
        other._select = [self.stored_channels.index(name) for name in channels]
        return other

    def read_all(self, when) -> Tensor:
        """The codes of all channels of the store in its own order (`stored_channels`), (C, H, W) int16."""
        second = _second(when)
        if second in self._memory:
            return self._memory[second]
        row = self._row.get(second)
        if row is None:
            raise KeyError(f"{self.path} has no complete frame at {pd.Timestamp(when)}; build it with `make cache`.")
        try:
            if self._opened is None or self._opened[0] != os.getpid():  # each worker process opens it for itself
                self._opened = os.getpid(), zarr.open_group(self.path, mode="r")["frames"]
            codes = self._opened[1][row]
            if codes[0, 0, 0] == FILL_CODE:  # zarr takes a chunk that is not there for one without values
                raise OSError("its file is missing")
        except (OSError, RuntimeError, ValueError) as error:
            raise OSError(
                f"The frame at {pd.Timestamp(when)} in {self.path} cannot be read ({error}). "
                f'`make cache ARGS="--verify"` finds the damaged frames and makes them again.'
            ) from error
        return torch.from_numpy(codes)

    def load(self, times: Iterable) -> None:
        """Keep the frames at `times` in memory from now on, the codes of all channels."""
        for when in times:
            self._memory[_second(when)] = self.read_all(when)

    def dataset(self):
        """The complete frames as an xarray Dataset (time, channel, y, x), lazily, in the order of time.

        As in the store, the signed-log values are `frames * step + offset`.
        """
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
        ValueError: it has another format, lacks a channel, or was built with another pooling, side or scale factor.
    """
    path = Path(store_path)
    if not _exists(path):
        raise FileNotFoundError(
            f"There is no frame store at {path}. Build it with `make cache`, or correct data.store."
        )
    attributes = _attributes(path)
    if attributes.get("format") != FORMAT:
        found = attributes.get("format", "float16, or not ours")
        raise ValueError(
            f'The store {path} has the format "{found}", but this version of the course reads "{FORMAT}". Choose '
            f"another data.store (a new one will be built); or, if nobody else reads it, delete it and build it again "
            f"with `make cache`."
        )
    if problems := _differences(attributes, channels, pooling, native_size, scalers):
        raise ValueError(
            f"The store {path} {', and '.join(problems)}. Choose another data.store (a new one will be built), or set "
            f"the config to what the store holds."
        )
    return FrameStore(path, channels, scalers)


def _differences(
    attributes: Mapping,
    channels: Sequence[str] | None,
    pooling: int | None,
    native_size: int | None,
    scalers: dict[str, Scaler] | None,
) -> list[str]:
    """What a store with these attributes cannot give of what is asked for."""
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
    return problems


def _exists(path: Path) -> bool:
    return (path / "zarr.json").is_file()


def _attributes(path: Path) -> dict:
    try:
        return dict(zarr.open_group(path, mode="r").attrs)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"The store {path} cannot be opened: its zarr.json is damaged or is that of something else ({error}). "
            f"Choose another data.store, or, if nobody else reads it, delete it and build it again with `make cache`."
        ) from error


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
    if path.is_file() or path.is_dir() and any(path.iterdir()):
        raise FileExistsError(
            f"{path} is there, but is not a frame store (it has no zarr.json). Move it away, or choose another "
            f"data.store."
        )
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
        format=FORMAT,
        space="signed-log: y = sign(x s) log(1 + |x s|) of the physical value x, s in scale_factors",
        codes="frames holds whole numbers: y = frames * step + offset, with step and offset of the channel",
        channels=list(channels),
        units=[UNITS[name] for name in channels],
        scale_factors=[scalers[name].scale for name in channels],
        pooling=pooling,
        native_size=native_size,
        source=source,
        software=f"surya-course {_version()}",
        rounding=f"y is rounded by at most half a step: never more than {LARGEST_STEP / 2:.1e}, and at most "
        f"{ERROR_BOUND} of the standard deviation of the channel (normalised units)",
        largest_possible_error_normalised=ERROR_BOUND,
        largest_rounding_error_normalised=0.0,
        completeness="only frames with done = 1 are complete; times are in the order of arrival",
    )
    axes = {"dimension_names": ("time", "channel", "y", "x")}
    # the names under which xarray knows what is no pixel, and that step and offset belong to frames
    said = {
        "units": "1",
        "long_name": "codes of signed-log values",
        "_FillValue": FILL_CODE,
        "coordinates": "step offset",
    }
    # bitshuffle makes 2 to 4 % less of it, but takes 8 % longer to read
    compressor = BloscCodec(cname="lz4", clevel=5, shuffle="shuffle", typesize=2)
    shape = (len(channels), side, side)
    stored = {"dtype": "i2", "fill_value": FILL_CODE, "compressors": compressor, "attributes": said}
    group.create_array("frames", shape=(0, *shape), chunks=(1, *shape), **stored, **axes)
    calendar = {"units": "seconds since 1970-01-01", "calendar": "proleptic_gregorian"}
    time_axis = {"shape": (0,), "dimension_names": ("time",), "fill_value": 0}
    group.create_array("time", chunks=(16384,), dtype="i8", attributes=calendar, **time_axis)
    group.create_array("done", chunks=(1,), dtype="u1", compressors=None, **time_axis)
    _fill_channel_axis(group, channels, scalers)


def _fill_channel_axis(group: zarr.Group, channels: Sequence[str], scalers: dict) -> None:
    """Names, steps and offsets of the channels."""
    along = {"shape": (len(channels),), "dimension_names": ("channel",)}
    group.create_array("channel", dtype=str, **along)[:] = np.array(channels, dtype=object)
    codings = [coding_of(name, scalers[name]) for name in channels]
    formula = {"units": "1", "formula": "signed-log value = frames * step + offset"}
    for name, meaning in (("step", "signed-log value of one code"), ("offset", "signed-log value of the code 0")):
        array = group.create_array(name, dtype="f4", attributes={"long_name": meaning, **formula}, **along)
        array[:] = np.array([getattr(coding, name) for coding in codings], np.float32)


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
        for chunk in path.glob("time/c/*"):
            flush_to_disk(chunk, below=path / "time")
        _consolidate(path)
        flush_to_disk(path / "zarr.json", below=path)
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
    missing: int = 0  # rows of the index with present = 0, in the span that was asked for
    unreadable: dict[str, str] = field(default_factory=dict)  # path -> reason
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    bytes_read: int = 0
    rounding: float = 0.0  # largest error of the codes in normalised units

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
    codings: dict[str, Coding]
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
    index = read_index(index_csv, source).within(between)
    store, rows = _with_rows(path, index, channels, pooling, native_size, scalers, source, str(index_csv))
    tasks = _tasks(index.table, rows, store, scalers, source)
    report = BuildReport(path, already=len(index.table) - len(tasks), missing=index.missing, notes=index.notes)
    if tasks:
        ensure_space(path, len(tasks) * store.frame_bytes * COMPRESSED, reserve_gb, what=f"{len(tasks)} frames")
        # umask and torch threads belong to the process: set once here, around all threads of the build
        with disk_errors(path), group_umask(path.parent), _one_torch_thread():
            _collect(_results(tasks, workers, dask_address), report, len(tasks), progress)
            _record(report)
    report.seconds = time.perf_counter() - started
    return report


def _with_rows(
    path: Path,
    index: Index,
    channels: Sequence[str],
    pooling: int,
    native_size: int | None,
    scalers: dict[str, Scaler],
    source: Source,
    origin: str,
) -> tuple[FrameStore, dict[datetime, int]]:
    """The store, made if it is not there, with a row for every time of the index; and the row of each time."""
    with disk_errors(path), group_umask(path.parent), item_lock(_build_folder(path) / "store"):
        if not _exists(path):
            side = native_size or _side_of_first(index, check_channels(channels), source)
            if pooling < 1 or side % pooling:
                raise ValueError(
                    f"Images of {side} pixels cannot be pooled by {pooling} (data.reduce): choose a divisor."
                )
            _create(path, check_channels(channels), pooling, side, scalers, origin)
        store = open_store(path, channels, pooling, native_size, scalers)
        return store, _grow(path, index.table["time"].to_numpy())


def _tasks(
    table: pd.DataFrame, rows: dict[datetime, int], store: FrameStore, scalers: dict[str, Scaler], source: Source
) -> list[_Task]:
    """One for every frame of the table that is not complete."""
    done = _done_rows(store.path)
    common = (store.stored_channels, store.pooling, store.native_size, scalers, store.codings, source)
    return [
        _Task(store.path, rows[when], str(when), url, *common)
        for when, url in zip(_seconds(table["time"]), table["path"], strict=True)
        if rows[when] not in done
    ]


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Frames are made side by side; several threads for each one would only get in each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _side_of_first(index: Index, channels: Sequence[str], source: Source) -> int:
    """Side of the images in the first file that can be read."""
    if not len(index.table):
        raise ValueError(
            f"There is nothing to build: {index.notes[-1]}. Check data.index and the splits in the config."
        )
    reasons = []
    for url in index.table["path"]:
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
                how = (task.pooling, task.scalers, task.native_size, task.codings)
                frame, error = reduce_frame(path, task.channels, *how)
            with disk_errors(task.store):
                _write(task, frame)
            return _Result(task, "built", size, error)
    except LockedError:
        return _Result(task, "busy")
    except FrameError as error:
        return _Result(task, str(error))


def _write(task: _Task, frame: np.ndarray) -> None:
    chunks = task.store / "frames" / "c"
    for leftover in (chunks / str(task.row)).rglob("*.partial"):
        leftover.unlink()  # of someone who was killed; nobody else writes here while we hold the lock
    with group_umask(task.store):
        frames, done = _arrays(task.store, task.row)
        frames[task.row] = frame
        if not np.array_equal(frames[task.row], frame):
            raise OSError(
                f"The frame {task.time} was written to {task.store}, but reads back differently. Check the disk."
            )
        flush_to_disk(chunks / str(task.row) / "0" / "0" / "0", below=chunks)  # the mark must not outlive the frame
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
    from distributed import LocalCluster, as_completed

    step = min(8, 1 + len(tasks) // 500)
    batches = [tasks[i : i + step] for i in range(0, len(tasks), step)]
    # threads: decompressing, averaging and writing leave Python's lock alone, and processes take longer to start
    local = {"processes": False, "n_workers": 1, "threads_per_worker": workers}
    local |= {"dashboard_address": "127.0.0.1:0", "worker_dashboard_address": "127.0.0.1:0"}  # for nobody else
    with LocalCluster(**local) if not address else nullcontext(address) as cluster, _client(cluster) as client:
        for _, results in as_completed(client.map(_build_batch, batches, pure=False), with_results=True):
            yield from results


def _client(cluster):
    from distributed import Client

    try:
        return Client(cluster)
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"No Dask scheduler answers at {cluster} ({error}). Start it, or correct data.dask_address in the config "
            f"(null builds on this machine)."
        ) from error


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


def verify_store(store_path: str | Path, between: Sequence[tuple[str, str]] | None = None) -> list[str]:
    """Read every frame that counts as complete; forget those that are damaged, so that the next build makes them again.

    Args:
        between: [start, end) spans of time to look at; None for all frames.

    Returns:
        The times of the damaged frames.
    """
    store, damaged = open_store(store_path), []
    for when in tqdm(store.times[in_spans(pd.Series(store.times), between)], "verifying", unit="frame"):
        try:
            sound = not (store.read_all(when) == FILL_CODE).any()
        except OSError:
            sound = False
        if not sound:
            damaged.append(str(when))
            _mark(store.path, store._row[_second(when)]).unlink(missing_ok=True)
    return damaged


# --------------------------------------------------------------------------------------------------------------------
# By configuration
# --------------------------------------------------------------------------------------------------------------------
def channels_needed(cfg: Config) -> tuple[str, ...]:
    """The input channels and the channels that are predicted as images, each once, in the canonical order."""
    targets = cfg.labels.target_channels if cfg.labels.kind == "image" else []
    return tuple(name for name in CHANNELS if name in {*cfg.data.channels, *targets})


def store_path(cfg: Config) -> Path:
    """Where the frames of this configuration are read: `data.store` itself if it ends in .zarr, else a folder in it.

    That is the store of exactly the channels that are needed, else one that holds all 13, else any other that has them.
    When the shared folder is read-only and you have built a store of your own, it is yours.
    """
    own, shared = _own_store(cfg), cfg.shared.to_read(cfg.data.store)
    if cfg.data.store.endswith(".zarr"):
        return own if own.exists() else shared
    needed, pooling, native_size = channels_needed(cfg), cfg.data.reduce, cfg.data.native_size
    folders = tuple(dict.fromkeys([own.parent, shared]))
    others = {path.name for folder in folders for path in folder.glob(f"{native_size}px-pool{pooling}-*.zarr")}
    names = dict.fromkeys([own.name, store_name(CHANNELS, pooling, native_size), *sorted(others)])
    for path in (folder / name for name in names for folder in folders):
        if _exists(path) and (path.name == own.name or _holds(path, needed, pooling, native_size, cfg.scalers)):
            return path
    return own


def _own_store(cfg: Config) -> Path:
    """Where you would build it."""
    path = cfg.shared.to_write(cfg.data.store)
    if path.suffix == ".zarr":
        return path
    return path / store_name(channels_needed(cfg), cfg.data.reduce, cfg.data.native_size)


def _holds(path: Path, *wanted) -> bool:
    """Whether there is a store of this format with the wanted channels, pooling, size and scale factors."""
    try:
        attributes = _attributes(path)
    except ValueError:
        return False
    return attributes.get("format") == FORMAT and not _differences(attributes, *wanted)


def prepare_store(cfg: Config, between: Sequence[tuple[str, str]] | None = None, progress: bool = True) -> BuildReport:
    """Build what the configuration needs and the store lacks; quick when everything is there.

    Args:
        between: [start, end) spans to build; None for the spans of train, validation and test with their offsets.
    """
    index = cfg.data.index if "://" in cfg.data.index else cfg.shared.to_read(cfg.data.index)
    between = between or _spans(cfg)
    source = Source(cfg.data.anonymous, cfg.data.endpoint_url, cfg.data.retries)
    path = store_path(cfg)
    if path.exists() and not is_writable(path):
        wanted = read_index(index, source).within(between)
        if set(_seconds(wanted.table["time"])) <= set(_seconds(open_store(path).times)):
            return BuildReport(path, already=len(wanted.table), missing=wanted.missing)
        path = _own_store(cfg)
    report = build_store(
        index,
        path,
        channels_needed(cfg),
        cfg.data.reduce,
        cfg.data.build_workers,
        native_size=cfg.data.native_size,
        scalers=cfg.scalers,
        source=source,
        between=between,
        reserve_gb=cfg.paths.reserve_gb,
        dask_address=cfg.data.dask_address,
        progress=progress,
    )
    if path.name != _own_store(cfg).name:
        held = ", ".join(open_store(path).stored_channels)
        report.notes.append(f"the store was there already, for more channels than are needed here: it holds {held}")
    return report


def _spans(cfg: Config) -> list[tuple[str, str]]:
    """The times that samples of the three splits can ask for."""
    offsets = [*cfg.data.offsets_minutes, cfg.labels.target_offset_minutes, 0]
    before, after = pd.Timedelta(min(offsets), "min"), pd.Timedelta(max(offsets), "min")
    splits = (cfg.split.train, cfg.split.val, cfg.split.test)
    return [(str(pd.Timestamp(start) + before), str(pd.Timestamp(end) + after)) for start, end in splits]
