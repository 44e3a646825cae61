"""Where frames come from: NASA's archive on S3 or a folder, one NetCDF file a time, and reading images out of them.

Two kinds of trouble are kept apart. A FrameError is about one file, which a build lists and then goes on without. An
ArchiveError is about none of them in particular (no network, no such profile): the build stops at the first frame.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import fsspec
import h5py
import hdf5plugin  # noqa: F401  (importing it teaches HDF5 the filters LZ4, Zstd and others)
import numpy as np
import pandas as pd
from tenacity import Retrying, retry_if_not_exception_type, stop_after_attempt, wait_random_exponential

from helpers.shared import DiskFullError, disk_errors

SCRATCH_PREFIX = "surya-course-frame-"
ONE_TRY = {"retries": {"total_max_attempts": 1}, "connect_timeout": 10, "read_timeout": 60}  # tenacity tries again

# How many of the unit that a channel is kept in make one of the unit in the file. Intensities may be given a second:
# exposure times are divided out in either case.
UNIT_FACTORS = {
    "DN": dict.fromkeys(("DN", "DN/s", "DN s-1", "DN / s", "DN/pixel", "ct", "count", "counts", "adu"), 1),
    "G": {"G": 1, "Gauss": 1, "gauss": 1, "Mx/cm^2": 1, "Mx cm-2": 1, "kG": 1e3, "mT": 10, "T": 1e4},
    "m/s": {"m/s": 1, "m s-1": 1, "m s^-1": 1, "km/s": 1e3, "km s-1": 1e3, "cm/s": 1e-2, "cm s-1": 1e-2},
}

# A whole date, and perhaps a time of day with its zone. Without this check pandas also takes words and parts of dates.
_TIME = r"\d{4}([-/]?)\d\d\1\d\d([T ]\d\d(:?\d\d(:?\d\d([.]\d+)?)?)? ?(Z|[+-]\d\d:?\d\d)?)?"


class FrameError(ValueError):
    """One file cannot be used; the message says why."""


class MissingFrameError(FrameError):
    """There is no file for this time."""


class ArchiveError(ConnectionError):
    """No file can be fetched, for a reason that has nothing to do with any one of them."""


# --------------------------------------------------------------------------------------------------------------------
# The archive
# --------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Archive:
    """Files by time, in `folder/YYYY/MM/YYYYMMDD_HHMM.nc`, or where an index says.

    Attributes:
        folder: s3://bucket or a folder of this machine.
        index: the path of every present frame by its time (`read_index`), or None: then paths follow from the time.
        index_folder: where relative paths of the index start.
        anonymous, endpoint_url: of the S3 server.
        retries, pause_s: how often a download is tried again, and the mean pause before that; it doubles each time.
        scratch: where downloads lie until they are reduced; None for the disk of the temporary files.
    """

    folder: str = "s3://nasa-surya-bench"
    index: pd.Series | None = None
    index_folder: str = ""
    anonymous: bool = True
    endpoint_url: str | None = None
    retries: int = 4
    pause_s: float = 0.5
    scratch: str | None = None

    def __post_init__(self) -> None:
        if "://" in self.folder and not self.folder.startswith("s3://"):
            raise ArchiveError(f"Frames come from s3:// or from a folder, not from {self.folder} (data.archive).")

    def url(self, time: np.datetime64) -> str | None:
        """The address of the frame of this time; None when the index has none."""
        time = pd.Timestamp(time)
        if self.index is None:
            return f"{self.folder}/{time:%Y/%m/%Y%m%d_%H%M}.nc"
        given = self.index.get(time)
        if given is None or given.startswith("s3://"):
            return given
        if self.index_folder.startswith("s3://") and not given.startswith("/"):
            return f"{self.index_folder}/{given}"
        if (path := Path(self.index_folder, given)).exists():
            return str(path)
        name = given.rpartition("/")[2]  # the folders are those of another machine
        flat = f"{self.folder}/{name}"
        return flat if "://" not in flat and Path(flat).exists() else f"{self.folder}/{time:%Y/%m}/{name}"

    def may_have(self, times: np.ndarray) -> np.ndarray:
        """Which frames of these times, (N,) datetime64[s], there may be, (N,) bool; no server is asked."""
        if self.index is not None:
            return np.isin(times, self.index.index.to_numpy("datetime64[s]"))
        if "://" in self.folder:
            return np.ones(len(times), bool)
        months = pd.DatetimeIndex(np.unique(times.astype("datetime64[M]"))).strftime("%Y/%m")
        there = {path.name for month in months for path in Path(self.folder, month).glob("*.nc")}
        return pd.DatetimeIndex(times).strftime("%Y%m%d_%H%M.nc").isin(there)

    @contextmanager
    def local_copy(self, url: str) -> Iterator[Path]:
        """The file at `url` on this disk: itself, or a whole download that is deleted afterwards.

        Raises:
            MissingFrameError: there is no such file.
            FrameError: it may not be read, or could not be fetched in `retries` + 1 tries.
            ArchiveError: the server cannot be reached at all, there are no credentials, or the folder is not there.
            DiskFullError: no room for the download.
        """
        if "://" not in url:
            if not Path(url).is_file():
                if not Path(self.folder).is_dir() and self.index is None:
                    raise ArchiveError(f"There is no folder {self.folder}. Correct data.archive in the config.")
                raise MissingFrameError("the file does not exist")
            yield Path(url)
            return
        with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=self.scratch) as folder:
            path = Path(folder, "frame.nc")
            tries = Retrying(
                stop=stop_after_attempt(self.retries + 1),
                wait=wait_random_exponential(multiplier=2 * self.pause_s, max=60),
                retry=retry_if_not_exception_type((FrameError, ArchiveError, DiskFullError)),
                reraise=True,
            )
            try:
                tries(self._download, url, path)
            except (FrameError, ArchiveError, DiskFullError):
                raise
            except Exception as error:
                raise FrameError(
                    f"could not be fetched in {self.retries + 1} tries, the last one with {_first_line(error)}"
                ) from None
            yield path

    def _download(self, url: str, path: Path) -> None:
        """Fetch the whole file once; what need not be tried again is a FrameError or an ArchiveError."""
        try:
            options = {"anon": self.anonymous, "endpoint_url": self.endpoint_url, "config_kwargs": ONE_TRY}
            filesystem, key = fsspec.core.url_to_fs(url, **options)
            filesystem.retries = 1
            size = filesystem.info(key, refresh=True)["size"]
            with disk_errors(path.parent):
                filesystem.get_file(key, str(path))
        except DiskFullError:
            raise
        except Exception as error:
            if _is_about_all(error):
                raise ArchiveError(
                    f"Frames cannot be fetched from {url.rpartition('/')[0]} here ({_first_line(error)}). Check the "
                    f"network, and data.archive, data.endpoint_url and data.anonymous in the config; frames that are "
                    f"built can be read without it."
                ) from error
            if isinstance(error, FileNotFoundError):
                raise MissingFrameError(f"there is no such file ({_first_line(error)})") from None
            if isinstance(error, PermissionError):
                raise FrameError(f"access denied ({_first_line(error)})") from None
            raise
        if path.stat().st_size != size:
            raise OSError(f"{path.stat().st_size} of {size} bytes arrived")


def _is_about_all(error: BaseException | None) -> bool:
    """Whether the cause is the way to the server, not the file that was asked for."""
    import aiohttp
    from botocore import exceptions as aws

    general = (
        ConnectionRefusedError,
        aiohttp.ClientConnectorError,  # proxies and names that are not found included
        *(
            aws.EndpointConnectionError,
            aws.ConnectTimeoutError,
            aws.ProxyConnectionError,
            aws.InvalidProxiesConfigError,
        ),
        *(aws.ProfileNotFound, aws.NoCredentialsError, aws.PartialCredentialsError, aws.CredentialRetrievalError),
    )
    while error is not None:
        if isinstance(error, general) or "bucket does not exist" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error) or 'no reason given').splitlines()[0]}"


# --------------------------------------------------------------------------------------------------------------------
# An index
# --------------------------------------------------------------------------------------------------------------------
def read_index(path: str, archive: Archive | None = None) -> tuple[pd.Series, int]:
    """Read an index CSV with the columns path, timestep, present (others are not looked at), local or s3://.

    Returns:
        The path of every present frame by its time (UTC), sorted; and the number of rows with present = 0.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such CSV, a cell cannot be used, or two rows name different files for one time.
        ArchiveError: its server cannot be reached.
    """
    form = "An index is a CSV with the columns path, timestep, present."
    try:
        with (archive or Archive()).local_copy(path) as file, warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header
            table = pd.read_csv(file, dtype=str, keep_default_na=False, index_col=False)
    except FrameError as error:
        raise FileNotFoundError(f"The index {path}: {error}. Check data.index in the config.") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, pd.errors.ParserWarning, UnicodeDecodeError) as error:
        raise ValueError(f"The index {path} cannot be read as a table ({_first_line(error)}). {form}") from None
    if absent := {"path", "timestep", "present"} - set(table):
        raise ValueError(
            f"The index {path} has no column {', '.join(sorted(absent))}; it has {', '.join(table)}. {form}"
        )
    table["time"] = parse_times(table["timestep"], f"the index {path}")
    present = table["present"].str.strip().str.lower().map({"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1})
    usable = table["path"].str.match(r"s3://|(?!.*://)\s*\S") | (present == 0)
    if (wrong := np.flatnonzero(present.isna() | ~usable)).size:
        cells = table[["path", "present"]].iloc[wrong[0]].tolist()
        raise ValueError(
            f"Row {wrong[0] + 2} of the index {path} has {cells} as path and present. A path is s3://... or a plain "
            f"one, and present is 0 or 1."
        )
    rows = table[present == 1].drop_duplicates(["time", "path"])
    if (twice := rows["time"].duplicated(keep=False)).any():
        first, second = rows[twice].sort_values("time", kind="stable").iloc[:2].itertuples()
        raise ValueError(
            f"The index {path} names different files for {first.time}: {first.path} and {second.path} (rows "
            f"{first.Index + 2} and {second.Index + 2}). Keep one row a time."
        )
    return rows.set_index("time")["path"].sort_index(), int((present == 0).sum())


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
# One file
# --------------------------------------------------------------------------------------------------------------------
@contextmanager
def open_netcdf(path: str | Path) -> Iterator[h5py.File]:
    """Open a NetCDF4 file of this disk for reading; whatever goes wrong while it is open is a FrameError."""
    try:
        with h5py.File(path, "r") as file:
            yield file
    except FrameError:
        raise
    except FileNotFoundError:
        raise MissingFrameError("the file does not exist") from None
    except IsADirectoryError:
        raise FrameError("it is a folder, not a file") from None
    except Exception as error:  # a file may be odd in any way, and it is only this file
        text = str(error)
        if "signature not found" in text:
            raise FrameError("the file is not NetCDF4 (HDF5)") from None
        damaged = any(sign in text for sign in ("truncated file", "filter returned failure", "synchronously read"))
        what = "is cut short or damaged" if damaged else "cannot be read"
        raise FrameError(f"the file {what} ({_first_line(error)})") from None


def read_variable(file: h5py.File, name: str, unit: str | None = None, side: int | None = None) -> np.ndarray:
    """One image of a NetCDF4 file, as its attributes say it is to be understood.

    Args:
        name: the variable.
        unit: G, m/s or DN: what the values are converted to; None takes them in the unit that they have.
        side: the number of pixels that height and width must have; None for any square.

    Returns:
        (H, W) float32, row = y, unpacked; pixels that the file marks as missing are NaN.

    Raises:
        FrameError: there is no such variable in this very file, or it is not an image that can be understood.
    """
    variable = _dataset(file, name)
    if variable.dtype.kind not in "iuf":
        raise FrameError(f"{name} holds {variable.dtype}, not numbers")
    shape = variable.shape or ()
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] != (side or shape[0]):
        wanted = f"{side} x {side}" if side else "a square"
        raise FrameError(
            f"{name} has the shape {' x '.join(map(str, shape)) or 'of a single number'}, expected {wanted}"
        )
    attributes = variable.attrs
    values = variable[()].astype(np.float32, copy=False)  # (H, W)
    for key in ("_FillValue", "missing_value"):
        for fill in np.ravel(attributes.get(key, [])):
            values[values == np.float32(fill)] = np.nan
    if {"scale_factor", "add_offset"} & set(attributes):
        scale, offset = (
            np.float32(np.ravel(attributes.get(k, d))[0]) for k, d in (("scale_factor", 1), ("add_offset", 0))
        )
        values = values * scale + offset
    found = attributes.get("units", b"")
    found = (found.decode() if isinstance(found, bytes) else str(found)).strip()
    if unit and found:
        if found not in UNIT_FACTORS[unit]:
            raise FrameError(f"{name} is given in {found}, which cannot be converted to {unit}")
        values = values * np.float32(UNIT_FACTORS[unit][found])
    axes = [dimension[0].name.rpartition("/")[2] if len(dimension) else dimension.label for dimension in variable.dims]
    return values.T if axes == ["x", "y"] else values


def _dataset(file: h5py.File, name: str) -> h5py.Dataset:
    """The dataset `name` if its values lie in this file: anything else could make us read files of somebody else."""
    node: h5py.Group = file
    for part in name.split("/"):
        if not isinstance(node, h5py.Group) or part.encode() not in list(node.id):
            raise FrameError(f"it has no variable {name} (it has {', '.join(file) or 'none'})")
        if node.id.links.get_info(part.encode()).type != h5py.h5l.TYPE_HARD:
            raise FrameError(f"{name} is a link, which is not followed")
        node = node[part]
    if not isinstance(node, h5py.Dataset):
        raise FrameError(f"{name} is a group, not an image")
    if node.external or node.is_virtual:
        raise FrameError(f"the values of {name} lie in other files, which are not read")
    filters = node.id.get_create_plist()
    for code, _, _, title in (filters.get_filter(i) for i in range(filters.get_nfilters())):
        if not h5py.h5z.filter_avail(code):
            raise FrameError(
                f"{name} is compressed with the HDF5 filter {code} ({title.decode()}), unknown to hdf5plugin"
            )
    return node
