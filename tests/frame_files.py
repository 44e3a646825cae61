"""Frame files for the tests: NetCDF in the layout of the public bucket, with values that look like the real ones."""

from pathlib import Path

import h5netcdf
import numpy as np
import pandas as pd

from helpers.channels import CHANNELS

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
