"""The synthetic Sun: frames, flare labels, masks, and the tiny Surya checkpoint pretrained on them.

A rotating disk carries bipolar active regions that emerge, fluctuate and decay. The field strength of a region drives
its brightness in the EUV channels; its heating, which also depends on how compact the bipole is, drives the hot
channels (94, 131, 335) and, two hours later and with noise, the soft X-ray flux. Frames are written as NetCDF files in
the layout of s3://nasa-surya-bench, labels are hourly GOES classes: the real files, only smaller.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import h5py
import hdf5plugin
import numpy as np
import pandas as pd
from tqdm import tqdm

from helpers.channels import CHANNELS, GOES_CLASSES, UNITS
from helpers.config import Config
from helpers.data.workers import worker_pool
from helpers.shared import atomic_write, disk_errors, ensure_space, lease, share

DISK_RADIUS = 0.4  # of the image side, as in SDO images
_NETCDF_DIMENSION = "This is a netCDF dimension but not a netCDF variable."  # how NetCDF-4 marks one in HDF5
FLARE_DELAY_HOURS = 2.0  # the flux follows the field this much later
FLARE_NOISE_DEX = 0.12  # scatter of log10 flux that no image can explain
QUIET_FLUX = 5e-7  # W/m^2, the background between flares (class B5)
MASK_FIELD = 200.0  # gauss; weaker regions are no active regions for the masks
MASK_EDGE = 0.05  # of the loops' profile across a region: its outline, as generous as the patches of HMI SHARP
VERSION = 4  # of the Sun drawn here; raise it when frames, labels or masks change, else old files are taken for new
STAMP = "synthetic.json"  # in the folder: which Sun it is
BYTES_A_PIXEL = 12  # of a frame and its mask on the disk, measured


@dataclass(frozen=True)
class _Response:
    """How one EUV/UV channel answers, in DN: quiet disk, active region, corona beyond the limb."""

    quiet: float
    active: float
    noise: float  # standard deviation in a dark pixel; the faint hot channels are the noisy ones, as in AIA
    power: float  # of the field (or of the heating for hot channels)
    hot: bool
    limb: float  # > 0 brightens towards the limb (corona), < 0 darkens (photosphere)


_RESPONSES = {
    "aia94": _Response(0.6, 18, 2, 1.2, True, 0.5),
    "aia131": _Response(3.0, 70, 9, 1.0, True, 0.5),
    "aia171": _Response(90, 900, 30, 0.7, False, 0.6),
    "aia193": _Response(100, 1500, 45, 0.9, False, 0.7),
    "aia211": _Response(32, 600, 24, 1.0, False, 0.7),
    "aia304": _Response(26, 260, 15, 0.8, False, 0.3),
    "aia335": _Response(2.4, 40, 7, 1.0, True, 0.6),
    "aia1600": _Response(55, 160, 9, 0.6, False, -0.6),
}
_SHOT_NOISE = 0.06  # of the brightness of a pixel
_HMI_NOISE = {"hmi_m": 4, "hmi_bx": 20, "hmi_by": 20, "hmi_bz": 10, "hmi_v": 180}  # gauss, m/s

# Smallest step of each channel, in its unit: powers of two below the noise.
_STEPS = np.array([1 / 2, 2, 4, 8, 4, 4, 1, 2, 1, 4, 4, 2, 32], np.float32)[:, None, None]


class SyntheticSun:
    """A seeded Sun whose frames and X-ray flux can be asked for at any hour.

    Args:
        seed: two Suns with the same seed are equal, at any size.
        hours: length of the life that is asked for; regions are born from 12 days before the start.
    """

    def __init__(self, seed: int, hours: float) -> None:
        rng = np.random.default_rng([seed, 0])
        span = hours + 12 * 24
        count = rng.poisson(span / 24 * 1.4)  # 1.4 births a day over the whole sphere
        self.seed = seed
        self.birth = rng.uniform(-12 * 24, hours, count)  # hours
        self.life = rng.uniform(2.5, 7.0, count) * 24  # e-folding time of the decay, hours
        self.latitude = np.deg2rad(rng.uniform(8, 32, count) * rng.choice([-1, 1], count))
        self.longitude = rng.uniform(-np.pi, np.pi, count)  # at birth; 0 is the central meridian, west positive
        self.field = 700 * np.exp(rng.normal(0, 0.45, count))  # gauss, at the peak
        self.compactness = np.exp(rng.normal(0, 0.5, count))  # close polarities store more energy
        self.tilt = np.deg2rad(rng.normal(6, 8, count)) * np.sign(self.latitude)
        self.size = rng.uniform(0.035, 0.06, count)  # of the solar radius
        self.separation = self.size * 2.6 / np.sqrt(self.compactness)
        self.period = rng.uniform(15, 70, (count, 3))  # hours; of the fluctuations
        self.phase = rng.uniform(0, 2 * np.pi, (count, 3))
        self.quiet_period = rng.uniform(20, 80, len(_RESPONSES)) * 24  # hours; of the quiet corona's brightness
        self.quiet_phase = rng.uniform(0, 2 * np.pi, len(_RESPONSES))
        texture = rng.normal(size=(180, 360))
        shifts = range(-2, 3)  # network cells of 5 degrees
        self.texture = sum(np.roll(texture, (i, j), (0, 1)) for i in shifts for j in shifts) / len(shifts)

    @staticmethod
    def rotation(latitude: np.ndarray) -> np.ndarray:
        """Synodic differential rotation in radians an hour (Snodgrass 1983, minus the Earth's motion)."""
        s2 = np.sin(latitude) ** 2
        return np.deg2rad(14.38 - 1.95 * s2 - 2.17 * s2**2 - 0.986) / 24

    def regions(self, hour: float) -> dict[str, np.ndarray]:
        """Of the regions alive at `hour`: longitude, latitude (rad), field (gauss), heating (1 for an average one)."""
        age = hour - self.birth
        alive = (age > 0) & (age < 4 * self.life)
        age = age[alive]
        rise = 1 - np.exp(-((age / 30) ** 2))
        wave = np.sin(2 * np.pi * hour / self.period[alive] + self.phase[alive]).sum(1)
        field = self.field[alive] * rise * np.exp(-age / self.life[alive] + 0.2 * wave)  # gauss
        longitude = self.longitude[alive] + self.rotation(self.latitude[alive]) * age
        return {
            "index": np.flatnonzero(alive),
            "longitude": (longitude + np.pi) % (2 * np.pi) - np.pi,
            "latitude": self.latitude[alive],
            "field": field,
            "heating": (field / 700) ** 1.5 * self.compactness[alive],
        }

    def flux(self, hour: float, rng: np.random.Generator) -> float:
        """Soft X-ray flux in W/m^2 at `hour`: from the regions on the visible side, FLARE_DELAY_HOURS earlier."""
        now = self.regions(hour - FLARE_DELAY_HOURS)
        visible = np.cos(now["latitude"]) * np.cos(now["longitude"]) > 0
        flares = 3.5e-6 * (now["heating"][visible] ** 2).sum()
        return float((QUIET_FLUX + flares) * 10 ** rng.normal(0, FLARE_NOISE_DEX))

    def frame(self, hour: float, side: int, noise_scale: float = 1.0) -> np.ndarray:
        """All channels at `hour` as (13, side, side) float32 in physical units (DN, gauss, m/s); row 0 is the south."""
        rng = np.random.default_rng([self.seed, 1, round(hour * 60) + 10**6])
        disk = _Disk(side)
        field, bright = self._active(hour, disk)
        # as a solid body: sheared for months, the texture would become stripes
        shift = self.rotation(np.float64(0)) * hour
        rows = ((disk.latitude / np.pi + 0.5) * 179).astype(int)
        columns = ((disk.longitude - shift) / (2 * np.pi) * 360).astype(int) % 360
        quiet = 1 + 0.25 * self.texture[rows, columns]  # (side, side), network that turns with the surface
        level = 1 + 0.2 * np.sin(2 * np.pi * hour / self.quiet_period + self.quiet_phase)  # (8,), one a channel
        out = np.empty((len(CHANNELS), side, side), np.float32)
        for c, name in enumerate(CHANNELS):
            noise = noise_scale * rng.standard_normal((side, side), np.float32)
            if name in _RESPONSES:
                image = _euv(_RESPONSES[name], disk, quiet * level[c], bright)
                out[c] = np.maximum(image + np.hypot(_RESPONSES[name].noise, _SHOT_NOISE * image) * noise, 0)
            else:
                out[c] = np.where(disk.on, field[name] + _HMI_NOISE[name] * noise, 0)
        # rounded to about the noise, as an instrument would: what is finer only swells the files
        return np.round(out / _STEPS) * _STEPS

    def _active(self, hour: float, disk: _Disk) -> tuple[dict[str, np.ndarray], dict[tuple[bool, float], np.ndarray]]:
        """What HMI would see without noise (gauss, m/s), and the brightness of the visible regions.

        The brightness is given for hot and for cool plasma and each power that a channel responds with.
        """
        bx, by, bz = np.zeros((3, *disk.x.shape), np.float32)
        bright = {(r.hot, r.power): np.zeros(disk.x.shape, np.float32) for r in _RESPONSES.values()}
        now = self.regions(hour)
        for i, longitude, latitude, gauss, heating in zip(*now.values(), strict=True):
            if np.cos(latitude) * np.cos(longitude) < -0.05:
                continue
            box, loops, lead, follow = self._bipole(i, longitude, latitude, disk)
            polarity = 1.0 if latitude > 0 else -1.0  # Hale's law
            sheared = 0.5 * polarity * gauss * loops
            bx[box] -= sheared * np.cos(self.tilt[i])
            by[box] -= sheared * np.sin(self.tilt[i])
            bz[box] += polarity * gauss * (lead - follow)
            for (hot, power), image in bright.items():
                image[box] += heating**power * loops**2 if hot else (gauss / 700) ** power * loops
        return {"hmi_m": bz * disk.z, "hmi_bx": bx, "hmi_by": by, "hmi_bz": bz, "hmi_v": 1900 * disk.x}, bright

    def mask(self, hour: float, side: int) -> np.ndarray:
        """The active regions as an observer would outline them, (side, side) bool.

        Inside are the closed loops over the polarity inversion line of every region whose field exceeds MASK_FIELD. How
        bright or strong a pixel is does not decide: a weak region is left out whole, a strong one has no wider outline.
        """
        disk, now = _Disk(side), self.regions(hour)
        inside = np.zeros((side, side), bool)
        for i, longitude, latitude, gauss, _ in zip(*now.values(), strict=True):
            if gauss > MASK_FIELD and np.cos(latitude) * np.cos(longitude) > 0:
                box, loops, _, _ = self._bipole(i, longitude, latitude, disk)
                inside[box] |= loops > MASK_EDGE
        return inside & disk.on

    def _bipole(self, i: int, longitude: float, latitude: float, disk: _Disk) -> tuple[tuple, np.ndarray, ...]:
        """Box of pixels around region i, and there its loops, leading and following polarity, each at most 1."""
        width, half = self.size[i], self.separation[i] / 2
        box, u, v = disk.tangent(longitude, latitude, self.tilt[i], 5 * (width + 2 * half))
        lead, follow = (np.exp(-((u + s * half) ** 2 + v**2) / (2 * (width * k) ** 2)) for s, k in ((-1, 0.8), (1, 1)))
        loops = np.exp(-(u**2) / (2 * (half + width) ** 2) - v**2 / (2 * (1.2 * width) ** 2))
        return box, loops, lead, follow


@lru_cache(maxsize=4)
class _Disk:
    """Coordinates of every pixel on the unit sphere, seen from far away; x west, y north, z towards the observer."""

    def __init__(self, side: int) -> None:
        axis = ((np.arange(side) + 0.5) / side - 0.5) / DISK_RADIUS
        self.x, self.y = (a.astype(np.float32) for a in np.meshgrid(axis, axis))
        r2 = self.x**2 + self.y**2
        self.on = r2 < 1
        self.z = np.sqrt(np.clip(1 - r2, 0, None))
        self.beyond = np.clip(np.sqrt(r2) - 1, 0, None)  # height above the limb in solar radii
        self.latitude = np.arcsin(np.clip(self.y, -1, 1))
        self.longitude = np.arctan2(self.x, np.maximum(self.z, 1e-3))
        self.step = axis[1] - axis[0]

    def tangent(
        self, longitude: float, latitude: float, tilt: float, reach: float
    ) -> tuple[tuple, np.ndarray, np.ndarray]:
        """The box of pixels within `reach` of a point on the sphere, and coordinates along and across the axis."""
        sin_lon, cos_lon, sin_lat, cos_lat = np.sin(longitude), np.cos(longitude), np.sin(latitude), np.cos(latitude)
        side = self.x.shape[0]
        middles = np.array([sin_lat, cos_lat * sin_lon])  # y, x
        first, last = (np.clip((middles + s * reach) / self.step + side / 2, 0, side).astype(int) for s in (-1, 1))
        box = (slice(first[0], last[0]), slice(first[1], last[1]))
        x, y, z = self.x[box], self.y[box], self.z[box]
        west = x * cos_lon - z * sin_lon
        north = -x * sin_lat * sin_lon + y * cos_lat - z * sin_lat * cos_lon
        u, v = west * np.cos(tilt) + north * np.sin(tilt), north * np.cos(tilt) - west * np.sin(tilt)
        return box, u, v


def _euv(response: _Response, disk: _Disk, quiet: np.ndarray, bright: dict) -> np.ndarray:
    corona = np.exp(-disk.beyond / 0.07)  # scale height 0.07 solar radii
    if response.limb > 0:
        limb = 1 + response.limb * (1 - disk.z) ** 2
        surface = response.quiet * quiet * np.where(disk.on, limb, (1 + response.limb) * corona)
    else:
        surface = response.quiet * quiet * np.where(disk.on, 1 + response.limb * (1 - disk.z), 0)
        corona = disk.on
    return surface + response.active * bright[response.hot, response.power] * corona


# ---- Files in the layout of the public bucket
def ensure_synthetic(cfg: Config) -> Path | None:
    """Write the synthetic frames and labels of this configuration, unless they are there.

    Everything is drawn in a folder aside, which a killed drawing goes on with, and moved into place at the end.

    Args:
        cfg: `cfg.synthetic` says which Sun and where; with `folder: null` (real data) nothing happens.

    Returns:
        The folder with flares.csv, masks.csv, YYYY/MM/YYYYMMDD_HHMM.nc and, under masks/, a file of the same name with
        the active regions of that frame; one frame in a hundred lacks, as in the real archive. None for real data.

    Raises:
        ValueError: the folder holds another Sun than the configuration asks for.
        DiskFullError: too little space, before starting or on the way.
    """
    if cfg.synthetic.folder is None:
        return None
    sun = cfg.synthetic.model_dump(exclude={"folder", "workers"})
    sun |= {"side": cfg.data.native_size, "version": VERSION}
    folder = cfg.shared.to_read(cfg.synthetic.folder)
    if _is_drawn(folder, sun):
        return folder
    folder = cfg.shared.to_write(folder)
    with lease(folder, "the synthetic Sun"), disk_errors(folder):
        if not _is_drawn(folder, sun):
            aside = folder.with_name(f".{folder.name}.{hashlib.sha1(repr(sun).encode()).hexdigest()[:8]}")
            _draw(cfg, aside)
            (aside / STAMP).write_text(json.dumps(sun))
            aside.rename(folder)
            share(folder)
    return folder


def _is_drawn(folder: Path, sun: dict) -> bool:
    """Whether the folder holds this Sun; ValueError if it holds something else."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    found = (folder / STAMP).read_text() if (folder / STAMP).is_file() else "none that is complete"
    if found != json.dumps(sun):
        raise ValueError(
            f"{folder} holds another synthetic Sun ({found}) than the configuration asks for ({json.dumps(sun)}). "
            f"Choose another synthetic.folder, or delete that one."
        )
    return True


def _draw(cfg: Config, folder: Path) -> None:
    start, side = pd.Timestamp(cfg.synthetic.start), cfg.data.native_size
    hours = np.add.outer(np.arange(cfg.synthetic.visits) * cfg.synthetic.hours_between_visits, [0, 1, 2]).ravel()
    sun = SyntheticSun(cfg.synthetic.seed, float(hours[-1]) + 48)
    lacking = np.random.default_rng([sun.seed, 2]).random(len(hours)) < 0.01
    times = start + pd.to_timedelta(hours[~lacking], "h")
    names = times.strftime("%Y/%m/%Y%m%d_%H%M.nc")
    jobs = [(sun, int(hour), folder, name, side) for hour, name in zip(hours[~lacking], names, strict=True)]
    jobs = [job for job in jobs if not (folder / job[3]).exists()]  # written last of a job
    size = len(jobs) * side**2 * BYTES_A_PIXEL
    ensure_space(folder, size, cfg.paths.reserve_gb, what=f"a synthetic Sun of {len(jobs)} frames")
    with worker_pool(cfg.synthetic.workers) as pool:
        for _ in tqdm(pool.map(_write_frame, jobs, chunksize=4), "synthetic frames", len(jobs), unit="frame"):
            pass
    masks = pd.DataFrame({"timestamp": times, "path": "masks/" + names})
    rng = np.random.default_rng([sun.seed, 3])
    flux = np.array([sun.flux(hour, rng) for hour in range(int(hours[-1]) + 24)])
    hourly = pd.date_range(start, periods=len(flux), freq="1h")
    flares = pd.DataFrame({"timestamp": hourly, "goes_class": [goes_class(f) for f in flux], "flux": flux})
    for name, table in {"masks.csv": masks, "flares.csv": flares}.items():
        table.to_csv(folder / name, index=False, float_format="%.4e")


def _write_frame(job: tuple[SyntheticSun, int, Path, str, int]) -> None:
    sun, hour, folder, name, side = job
    _write_netcdf(folder / "masks" / name, {"active_region": sun.mask(hour, side).astype(np.uint8)})
    _write_netcdf(folder / name, dict(zip(CHANNELS, sun.frame(hour, side), strict=True)))


def _write_netcdf(path: Path, images: dict[str, np.ndarray]) -> None:
    """NetCDF-4 with LZ4, written in a fifth of the time of zlib; in memory, as HDF5 hangs on a full disk."""
    memory = io.BytesIO()
    with h5py.File(memory, "w") as file:
        side = next(iter(images.values())).shape[0]
        for axis in "yx":
            file.create_dataset(axis, (side,), "f4").make_scale(f"{_NETCDF_DIMENSION}{side:10d}")
        for name, image in images.items():
            data = file.create_dataset(name, data=image, chunks=(side, side), **hdf5plugin.Bitshuffle(cname="lz4"))
            data.attrs["units"] = UNITS.get(name, "1")
            for number, axis in enumerate("yx"):
                data.dims[number].attach_scale(file[axis])
    with atomic_write(path) as temporary:
        temporary.write_bytes(memory.getbuffer())


def goes_class(flux: float) -> str:
    """GOES class of a soft X-ray flux in W/m^2: 2.5e-5 -> "M2.5"."""
    flux = float(f"{flux:.1e}")  # rounded first, so that 9.99e-7 is C1.0 and not B10.0
    letter = max((letter for letter, unit in GOES_CLASSES.items() if flux >= unit), key=GOES_CLASSES.get, default="A")
    return f"{letter}{flux / GOES_CLASSES[letter]:.1f}"
