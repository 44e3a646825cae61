"""Where frames come from: NASA's archive on S3 or a folder, one NetCDF file a time, and reading images out of them.

Two kinds of trouble are kept apart. A FrameError is about one file, which a build lists and then goes on without. An
ArchiveError is about none of them in particular (no network, no such profile): the build stops at the first frame.
"""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py
import hdf5plugin  # noqa: F401  (importing it teaches HDF5 the filters LZ4, Zstd and others)
import numpy as np
import pandas as pd

from helpers.shared import causes, disk_errors

SCRATCH_PREFIX = "surya-course-frame-"
PATIENCE = {"retries": {"total_max_attempts": 3, "mode": "standard"}, "connect_timeout": 5, "read_timeout": 20}
# names of errors of botocore, aiohttp and Python that are about the way to the server, not about one file
NO_SERVER = re.compile("ConnectionRefused|ClientConnector|EndpointConnection|ConnectTimeout|Prox|Profile|Credential")

# How many of the unit that a channel is kept in make one of the unit in the file. Intensities may be given a second:
# exposure times are divided out in either case.
UNIT_FACTORS = {
    "DN": dict.fromkeys(("DN", "DN/s", "DN s-1", "DN / s", "DN/pixel", "ct", "count", "counts", "adu"), 1),
    "G": {"G": 1, "Gauss": 1, "gauss": 1, "Mx/cm^2": 1, "Mx cm-2": 1, "kG": 1e3, "mT": 10, "T": 1e4},
    "m/s": {"m/s": 1, "m s-1": 1, "m s^-1": 1, "km/s": 1e3, "km s-1": 1e3, "cm/s": 1e-2, "cm s-1": 1e-2},
}

_DATE = r"\d{4}([-/]?)\d\d\1\d\d"  # without this check pandas also takes words and parts of dates


class FrameError(ValueError):
    """One file cannot be used; the message says why."""


class MissingFrameError(FrameError):
    """There is no file for this time."""


class FetchError(FrameError):
    """There may be a file, but it could not be fetched today."""


class ArchiveError(ConnectionError):
    """No file can be fetched, for a reason that has nothing to do with any one of them."""


@dataclass(frozen=True)
class Archive:
    """Files by time, in `folder/YYYY/MM/YYYYMMDD_HHMM.nc`, or where an index says."""

    folder: str = "s3://nasa-surya-bench"  # s3://bucket or a folder of this machine
    index: pd.Series | None = None  # path of every present frame by its time (`read_index`); None: as above
    anonymous: bool = True  # on the S3 server
    endpoint_url: str | None = None  # of the S3 server
    scratch: str | None = None  # where downloads lie until they are reduced; None: the disk of the temporary files

    def url(self, time: np.datetime64) -> str | None:
        """The address of the frame of this time, even if it is not there; None where an index has none."""
        time = pd.Timestamp(time)
        if self.index is None:
            flat = f"{self.folder}/{time:%Y%m%d_%H%M}.nc"  # without years and months, as in NASA's validation data
            return flat if os.path.isfile(flat) else f"{self.folder}/{time:%Y/%m/%Y%m%d_%H%M}.nc"
        given = self.index.get(time)
        if given is None or "://" in given:
            return given
        name = given.rpartition("/")[2]  # all that counts of a path of another machine
        here = [path for path in (Path(self.folder, given), Path(self.folder, name)) if path.is_file()]
        return str(here[0]) if here else f"{self.folder}/{time:%Y/%m}/{name}"

    def may_have(self, times: np.ndarray) -> np.ndarray:
        """Which frames of these times, (N,) datetime64[s], there may be, (N,) bool; no server is asked."""
        if self.index is not None:
            return np.isin(times, self.index.index.to_numpy("datetime64[s]"))
        return np.array(["://" in self.folder or os.path.isfile(self.url(time)) for time in times], bool)

    @contextmanager
    def local_copy(self, url: str) -> Iterator[Path]:
        """The file at `url` on this disk: itself, or a whole download that is deleted afterwards.

        FrameError: it is not there, may not be read, or could not be fetched in several tries. ArchiveError: no
        file can be had, as there is no folder, no way to the server, or no credentials. DiskFullError: no room for it.
        """
        if url.startswith("s3://"):
            with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=self.scratch) as folder, disk_errors(folder):
                self._download(url, Path(folder, "frame.nc"))
                yield Path(folder, "frame.nc")
            return
        if "://" in url:
            raise ArchiveError(f"Files come from s3:// or from a folder, not from {url} (data.archive, data.index).")
        if not Path(url).is_file():
            if not ("://" in self.folder or Path(self.folder).is_dir()):
                raise ArchiveError(f"There is no folder {self.folder}. Correct data.archive in the config.")
            raise MissingFrameError("the file does not exist")
        yield Path(url)

    def _download(self, url: str, path: Path) -> None:
        from s3fs import S3FileSystem  # here, as files of this machine do without

        where = {"anon": self.anonymous, "endpoint_url": self.endpoint_url}
        # in one part: only then s3fs goes on where a connection was cut (five times)
        server = S3FileSystem(**where, config_kwargs=PATIENCE, max_concurrency=1)
        try:
            server.get_file(url, str(path))
        except Exception as error:
            reason = _first_line(error)
            for cause in causes(error):
                if NO_SERVER.search(type(cause).__name__) or "bucket does not exist" in str(cause):
                    keys = "data.archive, data.endpoint_url and data.anonymous in the config"
                    folder = url.rpartition("/")[0]
                    raise ArchiveError(f"Frames cannot be fetched from {folder} ({reason}). Check {keys}.") from error
            if isinstance(error, FileNotFoundError):
                raise MissingFrameError(f"there is no such file ({reason})") from error
            raise FetchError(f"it could not be fetched ({reason})") from error


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error) or 'no reason given').splitlines()[0]}"


def read_index(path: str, archive: Archive) -> pd.Series:
    """The path of every present frame by its time (UTC), sorted, from a CSV that a folder or an S3 server has.

    ValueError: it cannot be had, has no columns path, timestep, present, or a cell cannot be used.
    """
    try:
        with archive.local_copy(path) as file:
            table = pd.read_csv(file, dtype=str, keep_default_na=False, usecols=["path", "timestep", "present"])
        table = table[table["present"].replace({"True": "1", "False": "0"}).astype(float) != 0]
    except ValueError as error:
        form = "It is a CSV with the columns path, timestep, present, the last of which is 0 or 1 (data.index)."
        raise ValueError(f"The index {path} cannot be read ({_first_line(error)}). {form}") from None
    table["time"] = parse_times(table["timestep"], f"the index {path}")
    paths = table.drop_duplicates(["time", "path"]).set_index("time")["path"].sort_index()
    if paths.index.has_duplicates:
        twice = paths[paths.index.duplicated(keep=False)]
        raise ValueError(f"The index {path} has for {twice.index[0]} both {twice.iloc[0]!r} and {twice.iloc[1]!r}.")
    return paths


def parse_times(column: pd.Series, where: str) -> pd.Series:
    """Whole dates in ISO format, with or without a time of day and a zone, as datetime64[s] in UTC (nearest second).

    ValueError: a cell is empty or no such time ("now", "2014.5", "2014-01"); names the row, and `where` that is.
    """
    text = column.astype("string").str.strip()
    times = pd.to_datetime(text.where(text.str.match(_DATE)), utc=True, format="ISO8601", errors="coerce")
    form = "which is not a time. Write times like 2014-01-07 18:00:00 (UTC)."
    refuse(times.isna().to_numpy(), column.fillna(""), where, form)
    return times.dt.tz_localize(None).dt.round("s").astype("datetime64[s]")


def refuse(wrong: np.ndarray, column: pd.Series, where: str, what: str) -> None:
    """ValueError with the first row and cell of a column that is wrong, if there is one."""
    for row in np.flatnonzero(wrong)[:1]:
        found = f'"{column.iloc[row]}" in its column {column.name}'
        raise ValueError(f"Row {column.index[row] + 2} of {where} has {found}, {what}")


@contextmanager
def open_netcdf(path: str | Path) -> Iterator[h5py.File]:
    """Open a NetCDF4 file of this disk for reading; whatever goes wrong while it is open is a FrameError."""
    try:
        with h5py.File(path, "r") as file:
            yield file
    except FrameError:
        raise
    except Exception as error:  # a file may be odd in any way, and it is only this file
        raise FrameError(f"it cannot be read as NetCDF4 (HDF5): {_first_line(error)}") from None


def find_variable(file: h5py.File, name: str, kinds: str = "iufb") -> h5py.Dataset:
    """A variable whose values lie in this very file, and are of one of numpy's `kinds`, else a FrameError."""
    variable: h5py.Group | h5py.Dataset = file
    for part in name.split("/"):
        # links, external and virtual datasets could make us read files of somebody else
        if not isinstance(variable, h5py.Group) or not isinstance(variable.get(part, getlink=True), h5py.HardLink):
            raise FrameError(f"it has no variable {name} of its own (it has {', '.join(file) or 'none'})")
        variable = variable[part]
    if not isinstance(variable, h5py.Dataset) or variable.external or variable.is_virtual:
        raise FrameError(f"{name} is no variable with values in this file")
    if variable.dtype.kind not in kinds:
        raise FrameError(f"{name} holds {variable.dtype}, not numbers")
    return variable


def read_variable(file: h5py.File, name: str, unit: str | None = None, side: int | None = None) -> np.ndarray:
    """One square image of a NetCDF4 file, (H, W) or (1, H, W): (H, W) float32, row = y, as `read_values` gives it.

    FrameError: there is none in this very file, it cannot be understood, or is not `side` pixels high and wide.
    """
    values = read_values(file, name, unit)
    values = values[0] if values.ndim == 3 and len(values) == 1 else values  # (1, H, W) -> (H, W)
    if values.shape != (side or max(values.shape, default=1),) * 2:
        raise FrameError(f"{name} has the shape {values.shape}, expected {(side, side) if side else 'a square'}")
    dimensions = list(file[name].dims)[-2:]
    axes = [dimension[0].name.rpartition("/")[2] if len(dimension) else dimension.label for dimension in dimensions]
    return values.T if axes == ["x", "y"] else values


def read_values(file: h5py.File, name: str, unit: str | None = None) -> np.ndarray:
    """The numbers of one variable, float32, unpacked; those that the file marks as missing are NaN.

    They are converted to `unit` (G, m/s, DN), or must be in it; None takes them in the unit that they have.
    """
    variable = find_variable(file, name)
    attributes = variable.attrs
    with np.errstate(over="ignore"):  # beyond float32 is infinite
        values = variable[()].astype(np.float32, copy=False)
    for key in ("_FillValue", "missing_value"):
        for fill in np.ravel(attributes.get(key, [])):
            values[values == np.float32(fill)] = np.nan
    if {"scale_factor", "add_offset"} & set(attributes):
        scale, offset = np.ravel(attributes.get("scale_factor", 1)), np.ravel(attributes.get("add_offset", 0))
        values = values * np.float32(scale[0]) + np.float32(offset[0])
    found = attributes.get("units", b"")
    found = (found.decode() if isinstance(found, bytes) else str(found)).strip()
    if unit and found and found != unit:
        if found not in UNIT_FACTORS.get(unit, {}):
            raise FrameError(f"{name} is given in {found}, which cannot be converted to {unit}")
        values = values * np.float32(UNIT_FACTORS[unit][found])
    return values


def read_times(file: h5py.File, name: str) -> np.ndarray:
    """The times of one variable, (N,) datetime64[s] in UTC: texts, or numbers with CF units (`hours since ...`)."""
    variable = find_variable(file, name, "iufOSU")
    if variable.dtype.kind in "OSU":
        texts = variable.asstr()[()]
        try:  # the first row is 1: there is no header
            return parse_times(pd.Series(texts, np.arange(len(texts)) - 1, name=name), "the file").to_numpy()
        except ValueError as error:
            raise FrameError(str(error)) from None
    keys = {"units", "calendar", "_FillValue"} & set(variable.attrs)
    attributes = {key: np.ravel(variable.attrs[key])[0] for key in keys}
    import xarray as xr  # here, as only label files of this kind need it and it takes a quarter of a second

    times = xr.decode_cf(xr.Dataset({"time": ("n", variable[()], attributes)}))["time"].to_index()
    if not isinstance(times, pd.DatetimeIndex):
        raise FrameError(
            f"{name} holds no times: neither texts nor numbers with units such as `hours since 2010-01-01`"
        )
    if times.hasnans:
        raise FrameError(f"{name} lacks its time {int(np.flatnonzero(times.isna())[0]) + 1}")
    return times.round("s").to_numpy("datetime64[s]")
