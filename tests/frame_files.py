"""For the tests: NetCDF files in the layout of the public bucket, odd ones, a server like it, and stores of them."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import h5netcdf
import h5py
import numpy as np
import pandas as pd
import s3fs

from helpers.channels import CHANNELS
from helpers.data.archive import Archive
from helpers.data.frames import build_store

HOURS = pd.date_range("2014-01-07", periods=6, freq="1h")

# typical bright and quiet values (physical units) of each channel
SCALE = dict(zip(CHANNELS, (1, 5, 150, 200, 60, 40, 4, 60, 60, 120, 120, 60, 900), strict=True))


def physical_frame(side: int, seed: int, channels=CHANNELS) -> dict[str, np.ndarray]:
    """Random images (side, side) float32 in physical units: positive for AIA, signed for HMI."""
    rng = np.random.default_rng(seed)
    images = {}
    for name in channels:
        image = rng.normal(size=(side, side)) * SCALE[name]
        images[name] = (np.abs(image) if name.startswith("aia") else image).astype(np.float32)
    return images


def write_netcdf(path: Path, images: dict[str, np.ndarray]) -> Path:
    """One file as in the bucket: dimensions y and x, float32 variables, zlib."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5netcdf.File(path, "w") as file:
        height, width = next(iter(images.values())).shape
        file.dimensions = {"y": height, "x": width}
        for name, image in images.items():
            variable = file.create_variable(name, ("y", "x"), "f4", compression="gzip", compression_opts=1)
            variable[:] = image
    return path


def write_index(folder: Path, times, side: int = 32, present=None, channels=CHANNELS) -> Path:
    """Write a frame for every present time and their index.csv with relative paths; return the index."""
    times = pd.DatetimeIndex(times)
    present = [1] * len(times) if present is None else present
    paths = [time.strftime("%Y/%m/%Y%m%d_%H%M.nc") for time in times]
    for seed, (path, there) in enumerate(zip(paths, present, strict=True)):
        if there:
            write_netcdf(folder / path, physical_frame(side, seed, channels))
    index = folder / "index.csv"
    pd.DataFrame({"path": paths, "timestep": times, "present": present}).to_csv(index, index=False)
    return index


def _with(change, name="aia94"):
    """A function that writes a frame after `change` to one of its images."""
    images = physical_frame(32, 0)
    change(images[name])
    return lambda path: write_netcdf(path, images)


def spoiled(change, name=None):
    """A function that writes a frame and then does `change` to the open file, from which `name` is removed before."""

    def write(path):
        write_netcdf(path, physical_frame(32, 0))
        with h5py.File(path, "a") as file:
            if name:
                del file[name]
            change(file)

    return write


def _put(**arguments):
    return spoiled(lambda file: file.create_dataset("aia94", **arguments), "aia94")


def _virtual(file):
    layout = h5py.VirtualLayout((32, 32), "f4")
    layout[:] = h5py.VirtualSource("/etc/hostname.h5", "x", (32, 32))
    file.create_virtual_dataset("aia94", layout)


# what the reason must say -> a function that writes such a file
ODD = {
    r"no variable aia94": lambda path: write_netcdf(path, physical_frame(32, 0, CHANNELS[1:])),
    r"aia304 has pixels .* not numbers \(NaN\)": _with(lambda image: image[:8, :8].fill(np.nan), "aia304"),
    r"hmi_m is 0 G in every pixel": _with(lambda image: image.fill(0), "hmi_m"),
    r"aia94 goes from .* to 200000 DN, which is beyond": _with(lambda image: image[4:6, 6:8].fill(2e5)),
    r"aia94 goes from -100 to": _with(lambda image: image[4:6, 6:8].fill(-100)),
    r"aia94 has the shape \(48, 48\), expected \(32, 32\)": lambda path: write_netcdf(path, physical_frame(48, 0)),
    r"NetCDF4.*truncated": lambda path: path.write_bytes(spoiled(bool)(path) or path.read_bytes()[:9000]),
    r"NetCDF4.*signature": lambda path: path.write_text("<html>sorry</html>" * 100),
    r"aia94 is no variable with values": spoiled(lambda file: file.create_group("aia94"), "aia94"),
    r"aia94 has the shape \(\)": _put(data=1.0),
    r"aia94 holds object, not numbers": _put(data="quiet"),
    r"no variable aia94 .*": spoiled(lambda file: file.update(aia94=h5py.SoftLink("/nowhere")), "aia94"),
    r"no variable aia94 of": spoiled(lambda file: file.update(aia94=h5py.ExternalLink("own.nc", "aia94")), "aia94"),
    r"aia94 is no variable with .*": _put(shape=(32, 32), dtype="f4", external=[("own.raw", 0, 4096)]),
    r"aia94 is no variable with": spoiled(_virtual, "aia94"),
    r"hmi_v is given in furlong/h": spoiled(lambda file: file["hmi_v"].attrs.update(units="furlong/h")),
    r"NetCDF4.*none": spoiled(lambda file: file["hmi_v"].attrs.update(_FillValue="none")),
}


class Bucket(BaseHTTPRequestHandler):
    """As much of S3 as reading asks for: the bucket `sun` with the files of a folder, and faults that a test orders."""

    protocol_version = "HTTP/1.1"
    folder: Path
    faults: dict  # path -> list of SlowDown, InternalError, AccessDenied or cut, used up one by one
    seen: list

    def log_message(self, *_):
        pass

    def do_GET(self):
        path, _, query = self.path.partition("?")
        self.seen.append((path, "Authorization" in self.headers))
        file, orders = self.folder / path.removeprefix("/sun/"), self.faults[path]
        order = orders.pop(0) if orders and (self.command == "GET" or orders[0] != "cut") else None
        if status := {"SlowDown": 503, "InternalError": 500, "AccessDenied": 403}.get(order):
            self._answer(status, f"<Error><Code>{order}</Code></Error>".encode())
        elif not path.startswith("/sun"):
            message = "The specified bucket does not exist"
            self._answer(404, f"<Error><Code>NoSuchBucket</Code><Message>{message}</Message></Error>".encode())
        elif "list-type" in query:
            self._answer(200, b"<ListBucketResult><KeyCount>0</KeyCount></ListBucketResult>")
        elif not file.is_file():
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        elif "Range" in self.headers:  # bytes=FIRST-
            self._answer(206, file.read_bytes()[int(self.headers["Range"][6:-1]) :], cut=order == "cut")
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


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, type[Bucket]]]:
    """The files of a folder as the bucket `sun`: the address of the server, and the class that answers."""
    answers = type("Answers", (Bucket,), {"folder": folder, "faults": defaultdict(list), "seen": []})
    s3fs.S3FileSystem.clear_instance_cache()
    with ThreadingHTTPServer(("127.0.0.1", 0), answers) as server:
        Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", answers
        server.shutdown()


def build(folder: Path, name: str = "store.zarr", times=HOURS, **arguments):
    usual = {"archive": Archive(str(folder)), "native_size": 32, "reduce": 2, "reserve_gb": 0.0, "progress": False}
    return build_store(times, folder / name, **usual | arguments)


def files(store: Path) -> dict[str, bytes]:
    """Every file of a store that counts."""
    inside = (path for path in store.rglob("*") if path.is_file() and path.suffix != ".partial")
    return {str(path.relative_to(store)): path.read_bytes() for path in inside}
