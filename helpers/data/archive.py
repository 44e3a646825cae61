"""The source of frames: an index CSV, and NetCDF files on this disk or on S3, read and reduced one at a time.

A frame is read channel by channel, averaged over `pooling` x `pooling` pixels of physical values, transformed to
signed-log values, and rounded to the codes of the store (`Coding` in helpers/channels.py). What is wrong with a file is
said in a FrameError, so that a build can list it and go on.
"""

from __future__ import annotations

import math
import random
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import fsspec
import h5py
import numpy as np
import pandas as pd
import torch
from numcodecs import Shuffle
from torch.nn.functional import avg_pool2d

from helpers.channels import UNITS, Coding, Scaler, coding_of, from_signed_log, standardise, to_signed_log
from helpers.shared import raise_if_full

# A whole date, and perhaps a time of day with its zone. Without this check pandas also takes words and parts of dates.
_TIME = r"\d{4}([-/]?)\d\d\1\d\d([T ]\d\d(:?\d\d(:?\d\d([.]\d+)?)?)? ?(Z|[+-]\d\d:?\d\d)?)?"


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
    """A checked index: `table` with the columns path (full) and time (UTC), sorted, and what is said of the rest."""

    table: pd.DataFrame
    absent: pd.Series  # times of the rows with present = 0
    notes: list[str]

    @property
    def missing(self) -> int:
        """Number of rows with present = 0."""
        return len(self.absent)

    def within(self, between: Sequence[tuple[str, str]] | None) -> Index:
        """The part in any of the [start, end) spans; None for all."""
        table = self.table[in_spans(self.table["time"], between)]
        where = "" if between is None else " from " + " or ".join(f"{start} to {end}" for start, end in between)
        notes = [*self.notes] if len(table) else [*self.notes, f"the index has not one present frame{where}"]
        return replace(self, table=table, absent=self.absent[in_spans(self.absent, between)], notes=notes)


def in_spans(times: pd.Series, between: Sequence[tuple[str, str]] | None) -> np.ndarray:
    """Which times lie in any of the [start, end) spans, (N,) bool; None for all."""
    if between is None:
        return np.ones(len(times), bool)
    spans = [(times >= pd.Timestamp(start)) & (times < pd.Timestamp(end)) for start, end in between]
    return np.logical_or.reduce(spans, dtype=bool)


def read_index(index_csv: str | Path, source: Source | None = None) -> Index:
    """Read an index CSV (columns path, timestep, present), local or s3://. Relative paths start at its folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such CSV, a cell cannot be used, or two rows name different files for one time.
        ConnectionError: its server cannot be reached.
    """
    text = str(index_csv)
    table = _read_rows(text, source or Source())
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
    table = present[["time"]].assign(path=full).reset_index(drop=True)
    return Index(table, unique.loc[unique["present"] != 1, "time"], notes)


def _read_rows(text: str, source: Source) -> pd.DataFrame:
    """The rows as they stand in the file; `present` holds 0 and 1, and where it is 1 there is a path."""
    form = "An index is a CSV with the columns path, timestep, present."
    try:
        with local_copy(text, source) as file:
            table = pd.read_csv(file, dtype={"path": str, "present": str})
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no index {text}. Check data.index in the config.") from None
    except FrameError as error:
        raise FileNotFoundError(f"The index {text}: {error}. Check data.index in the config.") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ValueError(f"The index {text} cannot be read as a table ({error}). {form}") from None
    if absent := {"path", "timestep", "present"} - set(table):
        has = ", ".join(map(str, table))
        raise ValueError(f"The index {text} has no column {', '.join(sorted(absent))}; it has {has}. {form}")
    known = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
    flags = table["present"].str.strip().str.lower().map(known)
    for column, wrong, wanted in (
        ("present", flags.isna(), "0 or 1"),
        ("path", table["path"].isna() & (flags == 1), "the path of the frame"),
    ):
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            cell = table[column].fillna("").iloc[row]
            raise ValueError(f'Row {row + 2} of the index {text} has "{cell}" in its column {column}, not {wanted}.')
    return table.assign(present=flags)


def parse_times(column: pd.Series, where: str) -> pd.Series:
    """Times in ISO format as datetime64[s] in UTC without a zone, to the nearest second.

    Args:
        column: whole dates, with or without a time of day; any zone is converted.
        where: what the column belongs to, for the message.

    Raises:
        ValueError: a cell is empty or no such time, for example "now", "2014.5" or "2014-01"; the row is named.
    """
    text = column.astype("string").str.strip()
    times = pd.to_datetime(text.where(text.str.fullmatch(_TIME)), utc=True, format="ISO8601", errors="coerce")
    if times.isna().any():
        row = int(np.flatnonzero(times.isna())[0])
        raise ValueError(
            f'Row {row + 2} of {where} has "{column.fillna("").iloc[row]}" in its column {column.name}, which is not a '
            f"time. Write times like 2014-01-07 18:00:00 (UTC)."
        )
    return times.dt.tz_localize(None).dt.round("s").astype("datetime64[s]")


# --------------------------------------------------------------------------------------------------------------------
# One frame
# --------------------------------------------------------------------------------------------------------------------
def reduce_frame(
    path: str | Path,
    channels: Sequence[str],
    pooling: int,
    scalers: dict[str, Scaler],
    native_size: int | None = None,
    codings: dict[str, Coding] | None = None,
) -> tuple[np.ndarray, float]:
    """Read one NetCDF file and reduce it, one channel in memory at a time.

    Args:
        path: a local file with one (y, x) float variable a channel, in physical units.
        native_size: the side that the images must have, in pixels; None accepts any that `pooling` divides.
        codings: those of the store that the frame is for; None for those of a new store with these scalers.

    Returns:
        (C, H / pooling, W / pooling) int16 codes of the signed-log values, and the largest rounding error in normalised
        units.

    Raises:
        FrameError: not NetCDF4, cut short, a channel missing, a wrong shape, or pixels that are not numbers or have no
            code.
    """
    frame, error = None, 0.0
    codings = codings or {name: coding_of(name, scalers[name]) for name in channels}
    with open_netcdf(path) as file:
        if absent := [name for name in channels if name not in file]:
            raise FrameError(f"it has no variable {', '.join(absent)} (it has {', '.join(file) or 'none'})")
        for i, name in enumerate(channels):
            exact = to_signed_log(_pooled(file[name], pooling, native_size), scalers[name])
            if frame is None:
                frame = np.empty((len(channels), *exact.shape), np.int16)
            frame[i] = _encoded(exact, name, scalers[name], codings[name])
            decoded = codings[name].decode(frame[i])
            error = max(
                error, float(np.abs(standardise(decoded, scalers[name]) - standardise(exact, scalers[name])).max())
            )
    return frame, error


def _encoded(signed_log: np.ndarray, name: str, scaler: Scaler, coding: Coding) -> np.ndarray:
    try:
        return coding.encode(signed_log)
    except ValueError:
        low, high = from_signed_log(np.array(coding.limits), scaler)
        least, most = from_signed_log(np.array([signed_log.min(), signed_log.max()]), scaler)
        raise FrameError(
            f"{name} has a pixel of {most if most > high else least:.6g} {UNITS[name]} (averaged), but the store can "
            f"keep only {low:.4g} to {high:.4g} {UNITS[name]} of this channel"
        ) from None


@contextmanager
def open_netcdf(path: str | Path) -> Iterator[h5py.File]:
    """Open a NetCDF4 file of this disk for reading; whatever goes wrong while it is open is a FrameError.

    Raises:
        FrameError: it does not exist, is cut short or damaged, is not NetCDF4, or may not be read.
    """
    try:
        with h5py.File(path, "r") as file:
            yield file
    except FileNotFoundError:
        raise FrameError("the file does not exist") from None
    except IsADirectoryError:
        raise FrameError("it is a folder, not a file") from None
    except OSError as error:
        text = str(error).splitlines()[0]
        if "truncated file" in text or "filter returned failure" in text or "Can't synchronously read" in text:
            raise FrameError(f"the file is cut short or damaged ({text})") from None
        if "signature not found" in text:
            raise FrameError("the file is not NetCDF4 (HDF5)") from None
        raise FrameError(f"the file cannot be read ({text})") from None


def _pooled(variable: h5py.Dataset, pooling: int, native_size: int | None) -> np.ndarray:
    """Average of the physical values over pooling x pixels, (H / pooling, W / pooling) float32."""
    name, shape = variable.name.lstrip("/"), variable.shape
    fits = len(shape) == 2 and shape[0] == shape[1] and (native_size or shape[0]) == shape[0] and not shape[0] % pooling
    if not fits:
        wanted = f"{native_size} x {native_size}" if native_size else "a square"
        wanted += f" with a side divisible by {pooling}" if shape[0] % pooling else ""
        raise FrameError(f"{name} has the shape {' x '.join(map(str, shape))}, expected {wanted}")
    if packed := {"scale_factor", "add_offset"} & set(variable.attrs):
        raise FrameError(f"{name} is packed ({', '.join(packed)}), expected plain physical values")
    image = torch.from_numpy(_values(variable))  # (H, W) physical
    pooled = avg_pool2d(image[None, None], pooling)[0, 0].numpy()  # (H / pooling, W / pooling)
    if not np.isfinite(pooled.sum(dtype=np.float64)):
        wrong = 1 - np.isfinite(pooled).mean()
        raise FrameError(f"{name} has pixels that are not numbers (NaN), in {wrong:.1%} of the image")
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
