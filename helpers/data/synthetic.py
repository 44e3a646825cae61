"""The synthetic Sun: frames, flare labels and masks of a Sun whose rules are known.

As observed on the real Sun:

1. Bipolar regions emerge within two days, all over the sphere, and decay within days. Leading and following polarity
   obey Hale's law (Hale et al. 1919; signs of cycle 24, the one of 2014) and Joy's: the axis is tilted by half of the
   latitude, the leading polarity nearer to the equator (Wang & Sheeley 1989), with a scatter of 10 degrees.
2. Flares come from sheared fields (Hagyard et al. 1984). The sense of the shear is that of the hemisphere: left-handed
   in the north, right-handed in the south (Pevtsov et al. 1995; there about seven in ten, here all).
3. Coronal holes, dark and unipolar, live for rotations; four days after one crossed the central meridian, a fast stream
   of solar wind arrives.

Invented, so that there is something to find out:

4. Each region has a stress s. At that hour nothing but its horizontal field shows it, which points across the inversion
   line where s is low (9 degrees) and almost along it where s is high (81 degrees). s is nearly new every hour: its
   correlation with that of an hour before is 0.2, where real shear builds up over a day or more.
5. Exactly an hour later, which is the step that Surya forecasts, the corona of the region is heated by
   (B / 700 G)^1.5 x compactness (how close the polarities lie) x exp(1.5 s) / 3.1. AIA sees the heating, its cool
   channels the root of it; an exposure catches it typically a third brighter or fainter than it is in that hour.
6. Soft X-rays are the sum of heating^1.5 over the regions of the visible side, at the full hour, with a noise that no
   image explains.

Left out: a steady corona of active regions, a horizontal field that differs within a region, polar holes, the solar
cycle, the tilt of the Sun's axis, eruptions. Regions are two or three times too large, so that they show on 64 pixels,
and do not interact.
"""

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
from tqdm.auto import tqdm

from helpers.channels import CHANNELS, GOES_CLASSES, UNITS
from helpers.config import Config
from helpers.data.workers import worker_pool
from helpers.shared import atomic_write, disk_errors, ensure_space, lease, share

DISK_RADIUS = 0.4  # of the image side, as in SDO images
_NETCDF_DIMENSION = "This is a netCDF dimension but not a netCDF variable."  # how NetCDF-4 marks one in HDF5
FLARE_DELAY_HOURS = 1  # the corona follows the field this much later
FLARE_NOISE_DEX = 0.06  # scatter of log10 flux that no image can explain
QUIET_FLUX = 5e-7  # W/m^2, the background between flares (class B5)
FLARE_FLUX = 2e-6  # W/m^2, of one region with heating 1
MASK_FIELD = 200.0  # gauss; weaker regions are no active regions for the masks
MASK_EDGE = 0.2  # of the loops' profile across a region: its outline, as generous as the patches of HMI SHARP
WIND_DELAY_HOURS = 96  # from a hole at the central meridian to its fast stream at the Earth
VERSION = 8  # of the Sun drawn here; raise it when frames, labels or masks change, else old files are taken for new
REGIONS = "released/surya-bench-ar-segmentation"  # in the folder
STAMP = "synthetic.json"  # in the folder: which Sun it is
BYTES_A_PIXEL = 16  # of a frame and its masks on the disk, measured


@dataclass(frozen=True)
class _Response:
    """How one EUV/UV channel answers, in DN: quiet disk, active region, corona beyond the limb."""

    quiet: float
    active: float
    noise: float  # standard deviation in a dark pixel; the faint hot channels are the noisy ones, as in AIA
    power: float  # of the heating, or of the field for the chromosphere
    heated: bool
    limb: float  # > 0 brightens towards the limb (corona), < 0 darkens (photosphere)
    hole: float  # this share of the quiet disk's brightness is missing in a coronal hole
    lines: tuple[float, ...] = ()  # nm, in the EUV spectrum, of plasma that this channel shows


_RESPONSES = {
    "aia94": _Response(0.6, 18, 1, 1.0, True, 0.5, 0.2, (9.39, 10.39)),
    "aia131": _Response(3.0, 70, 4.5, 1.0, True, 0.5, 0.3, (13.12, 13.29)),
    "aia171": _Response(90, 900, 15, 0.5, True, 0.6, 0.3, (14.81, 17.11, 17.45)),
    "aia193": _Response(100, 1500, 23, 0.5, True, 0.7, 0.6, (18.04, 19.51)),
    "aia211": _Response(32, 600, 12, 0.5, True, 0.7, 0.6, (20.20, 21.13)),
    "aia304": _Response(26, 260, 7.5, 0.8, False, 0.3, 0.1, (25.63, 30.38)),
    "aia335": _Response(2.4, 40, 3.5, 1.0, True, 0.6, 0.5, (26.30, 28.42)),
    "aia1600": _Response(55, 160, 4.5, 0.6, False, -0.6, 0.0),
}
_SHOT_NOISE = 0.03  # of the brightness of a pixel
_FLICKER = 0.4  # of the heating from one exposure to the next, in its logarithm
_HMI_NOISE = {"hmi_m": 4, "hmi_bx": 10, "hmi_by": 10, "hmi_bz": 5, "hmi_v": 90}  # gauss, m/s

# Smallest step of each channel, in its unit: powers of two below the noise.
_STEPS = np.array([1 / 4, 1, 2, 4, 2, 2, 1 / 2, 1, 1, 2, 2, 1, 16], np.float32)[:, None, None]


class SyntheticSun:
    """A Sun whose frames and X-ray flux can be asked for at any hour up to `hours`, the same for the same two numbers.

    Regions are born from 12 days before the start.
    """

    def __init__(self, seed: int, hours: float) -> None:
        rng = np.random.default_rng([seed, 0])
        span = hours + 12 * 24
        count = rng.poisson(span / 24 * 0.8)  # births a day over the whole sphere
        self.seed = seed
        self.birth = rng.uniform(-12 * 24, hours, count)  # hours
        self.life = rng.uniform(2.5, 7.0, count) * 24  # e-folding time of the decay, hours
        self.latitude = np.deg2rad(rng.uniform(8, 32, count) * rng.choice([-1, 1], count))
        self.longitude = rng.uniform(-np.pi, np.pi, count)  # at birth; 0 is the central meridian, west positive
        self.field = 700 * np.exp(rng.normal(0, 0.35, count))  # gauss, if it did not decay while it emerges
        self.compactness = np.exp(rng.normal(0, 0.4, count))  # close polarities store more energy
        self.tilt = np.deg2rad(rng.normal(0, 10, count)) - 0.5 * self.latitude  # the leading polarity near the equator
        self.size = rng.uniform(0.063, 0.108, count)  # of the solar radius
        self.separation = self.size * 2.6 / np.sqrt(self.compactness)
        self.quiet_period = rng.uniform(20, 80, len(_RESPONSES)) * 24  # hours; of the quiet corona's brightness
        self.quiet_phase = rng.uniform(0, 2 * np.pi, len(_RESPONSES))
        texture = rng.normal(size=(180, 360))
        shifts = range(-2, 3)  # network cells of 5 degrees
        self.texture = sum(np.roll(texture, (i, j), (0, 1)) for i in shifts for j in shifts) / len(shifts)
        # (regions, whole hours since birth), mean 0 and variance 1
        self.stress = np.random.default_rng([seed, 8]).standard_normal((count, 4 * 7 * 24 + 2), np.float32)
        for age in range(1, self.stress.shape[1]):
            self.stress[:, age] = 0.2 * self.stress[:, age - 1] + np.sqrt(1 - 0.2**2) * self.stress[:, age]
        self.stress = self.stress.clip(-2.5, 2.5)
        # a coronal hole is born every 40 days; random numbers of their own leave the regions as they are
        self.hole_birth = np.arange(-216, hours / 24, 40) * 24  # hours
        rng = np.random.default_rng([seed, 4])
        share = rng.random((len(self.hole_birth), 5)).T  # (5, holes)
        self.hole_life = (80 + 136 * share[0]) * 24  # hours, three to eight rotations
        self.hole_latitude = np.deg2rad(70 * share[1] - 35)
        self.hole_longitude = 2 * np.pi * share[2]  # at hour 0
        self.hole_size = 0.17 + 0.13 * share[3]  # of the solar radius, when it is largest
        self.hole_field = np.where(share[4] < 0.5, -8, 8)  # gauss

    @staticmethod
    def rotation(latitude: np.ndarray) -> np.ndarray:
        """Synodic differential rotation in radians an hour (Snodgrass 1983, minus the Earth's motion)."""
        s2 = np.sin(latitude) ** 2
        return np.deg2rad(14.37 - 2.30 * s2 - 1.62 * s2**2 - 0.986) / 24

    def regions(self, hour: float) -> dict[str, np.ndarray]:
        """Of the regions alive at `hour`: longitude, latitude (rad), field (gauss), shear of the field (rad), heating.

        The shear is that of the present stress, the heating (on average 1 for a field of 700 G) that of an hour before.
        """
        age = hour - self.birth
        index = np.flatnonzero((age > 0) & (age < 4 * self.life))
        age = age[index]
        field = self.field[index] * (1 - np.exp(-((age / 30) ** 2))) * np.exp(-age / self.life[index])  # gauss
        longitude = self.longitude[index] + self.rotation(self.latitude[index]) * age
        born = np.floor(self.birth[index])
        ages = [np.clip(when - born, 0, None).astype(int) for when in (hour, hour - FLARE_DELAY_HOURS)]
        now, before = (self.stress[index, age] for age in ages)
        return {
            "index": index,
            "longitude": (longitude + np.pi) % (2 * np.pi) - np.pi,
            "latitude": self.latitude[index],
            "field": field,
            "shear": np.deg2rad(45 * (1 + 0.8 * np.tanh(now))),
            "heating": (field / 700) ** 1.5 * self.compactness[index] * np.exp(1.5 * before - 1.5**2 / 2),
        }

    def holes(self, hour: float) -> np.ndarray:
        """Of the coronal holes at `hour`: longitude, latitude (rad), radius (solar radii), field (gauss); (4, N)."""
        share = np.clip((hour - self.hole_birth) / self.hole_life, 0, 1)
        size = self.hole_size * np.sqrt(np.sin(np.pi * share))
        longitude = self.hole_longitude + self.rotation(np.float64(0)) * hour  # as a solid body, as real ones do
        longitude = (longitude + np.pi) % (2 * np.pi) - np.pi
        return np.stack([longitude, self.hole_latitude, size, self.hole_field])[:, size > 0.05]

    def wind(self, hour: float) -> float:
        """Speed of the solar wind at the Earth in km/s, without noise; streams rise fast and decay slowly."""
        longitude, latitude, size, _ = self.holes(hour - WIND_DELAY_HOURS)
        width = np.where(longitude > 0, 0.45, 0.2)
        streams = (size / 0.25) ** 2 * np.cos(latitude) ** 2 * np.exp(-((longitude / width) ** 2))
        return 350 + 350 * np.tanh(streams.sum())

    def flux(self, hour: float, rng: np.random.Generator) -> float:
        """Soft X-ray flux in W/m^2 at `hour`, from the regions on the visible side."""
        now = self.regions(hour)
        visible = np.cos(now["latitude"]) * np.cos(now["longitude"]) > 0
        flares = FLARE_FLUX * (now["heating"][visible] ** 1.5).sum()
        return float((QUIET_FLUX + flares) * 10 ** rng.normal(0, FLARE_NOISE_DEX))

    def frame(self, hour: float, side: int, noise_scale: float = 1.0) -> np.ndarray:
        """All channels at `hour` as (13, side, side) float32 in physical units (DN, gauss, m/s); row 0 is the south."""
        rng = np.random.default_rng([self.seed, 1, round(hour * 60) + 10**6])
        disk = _Disk(side)
        field, bright = self._active(hour, disk, noise_scale * _FLICKER, rng)
        dark = np.zeros((side, side), np.float32)  # 1 inside coronal holes
        for longitude, latitude, size, gauss in self.holes(hour).T:
            if np.cos(latitude) * np.cos(longitude) > -0.05:
                box, u, v = disk.tangent(longitude, latitude, 0.0, 2 * size)
                hole = np.exp(-(((u / size) ** 2 + (v / (1.3 * size)) ** 2) ** 2))
                dark[box] = np.maximum(dark[box], hole)
                field["hmi_bz"][box] += gauss * hole
                field["hmi_m"][box] += gauss * hole * disk.z[box]
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
                image = _euv(_RESPONSES[name], disk, quiet * level[c] * (1 - _RESPONSES[name].hole * dark), bright)
                image += np.hypot(_RESPONSES[name].noise, _SHOT_NOISE * image) * noise
                out[c] = np.maximum(image, 0)
            else:
                out[c] = np.where(disk.on, field[name] + _HMI_NOISE[name] * noise, 0)
        # rounded to about the noise, as an instrument would: what is finer only swells the files
        return np.round(out / _STEPS) * _STEPS if noise_scale else out

    def _active(
        self, hour: float, disk: "_Disk", flicker: float, rng: np.random.Generator
    ) -> tuple[dict[str, np.ndarray], dict[tuple[bool, float], np.ndarray]]:
        """What HMI would see without noise (gauss, m/s), and the brightness of the visible regions.

        The brightness is given for the corona and the chromosphere and each power that a channel responds with.
        """
        bx, by, bz = np.zeros((3, *disk.x.shape), np.float32)
        bright = {(r.heated, r.power): np.zeros(disk.x.shape, np.float32) for r in _RESPONSES.values()}
        now = self.regions(hour)
        for i, longitude, latitude, gauss, shear, heating in zip(*now.values(), strict=True):
            heating *= np.exp(flicker * rng.standard_normal())
            if np.cos(latitude) * np.cos(longitude) < -0.05:
                continue
            box, loops, lead, follow = self._bipole(i, longitude, latitude, disk)
            leading = -1.0 if latitude > 0 else 1.0  # Hale's law in cycle 24
            # from the positive polarity to the negative one, and along the inversion line: to the south in both
            # hemispheres, which seen from the positive side is to the right in the north and to the left in the south
            along, across = -leading * np.cos(shear), -np.sin(shear)
            cos, sin = np.cos(self.tilt[i]), np.sin(self.tilt[i])
            bx[box] += 0.7 * gauss * loops * (along * cos - across * sin)
            by[box] += 0.7 * gauss * loops * (along * sin + across * cos)
            bz[box] += leading * gauss * (lead / 0.8**2 - follow)  # as much flux in either
            for (heated, power), image in bright.items():
                image[box] += heating**power * loops**2 if heated else (gauss / 700) ** power * loops
        return {"hmi_m": bz * disk.z, "hmi_bx": bx, "hmi_by": by, "hmi_bz": bz, "hmi_v": 1900 * disk.x}, bright

    def mask(self, hour: float, side: int) -> np.ndarray:
        """The active regions as an observer would outline them, (side, side) bool.

        Inside are the closed loops over the polarity inversion line of every region whose field exceeds MASK_FIELD. How
        bright or strong a pixel is does not decide: a weak region is left out whole, a strong one has no wider outline.
        """
        disk, now = _Disk(side), self.regions(hour)
        inside = np.zeros((side, side), bool)
        for i, longitude, latitude, gauss, *_ in zip(*now.values(), strict=True):
            if gauss > MASK_FIELD and np.cos(latitude) * np.cos(longitude) > 0:
                box, loops, _, _ = self._bipole(i, longitude, latitude, disk)
                inside[box] |= loops > MASK_EDGE
        return inside & disk.on

    def _bipole(self, i: int, longitude: float, latitude: float, disk: "_Disk") -> tuple[tuple, np.ndarray, ...]:
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
    return surface + response.active * bright[response.heated, response.power] * corona


# ---- Files in the layout of the public bucket
def ensure_synthetic(cfg: Config) -> Path | None:
    """Write the frames and labels of the section `synthetic`, unless they are there; of real data (null) nothing.

    The folder that is returned holds flares.csv, masks.csv, YYYY/MM/YYYYMMDD_HHMM.nc and, under masks/, a file of the
    same name with the active regions of that frame; one frame in a hundred lacks, as in the real archive. The labels of
    Surya's released tasks are in released/, as on the hub. Everything is drawn in a folder aside, which a killed
    drawing goes on with, and moved into place at the end.

    ValueError: the folder holds another Sun. DiskFullError: too little space, before starting or on the way.
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
    what = f"a synthetic Sun of {len(jobs)} frames"
    ensure_space(folder, len(jobs) * side**2 * BYTES_A_PIXEL, cfg.paths.reserve_gb, what)
    with worker_pool(cfg.synthetic.workers) as pool:
        for _ in tqdm(pool.map(_write_frame, jobs, chunksize=4), "synthetic frames", len(jobs), unit="frame"):
            pass
    masks = pd.DataFrame({"timestamp": times, "path": "masks/" + names})
    tables = {"masks.csv": masks} | _flare_tables(sun, start, int(hours[-1])) | _wind_tables(sun, start, int(hours[-1]))
    visits = start + pd.to_timedelta(hours, "h")
    paths = np.where(lacking, "", visits.strftime("%Y%m%d_%H%M.h5"))
    regions = pd.DataFrame({"timestep": visits, "file_path": paths, "present": (~lacking).astype(int)})
    tables |= {f"{REGIONS}/ar_{year}.csv": rows for year, rows in regions.groupby(visits.year)}
    for name, table in tables.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(folder / name, index=False)
    _write_spectra(sun, times, hours[~lacking], folder / "released/euv-spectra/AIA_EVE_temporally_stratified.nc")


def _write_frame(job: tuple[SyntheticSun, int, Path, str, int]) -> None:
    sun, hour, folder, name, side = job
    mask = sun.mask(hour, side).astype(np.uint8)
    _write_netcdf(folder / "masks" / name, {"active_region": mask})
    _write_netcdf(folder / REGIONS / f"{Path(name).stem}.h5", {"union_with_intersect": 255 * mask})
    _write_netcdf(folder / name, dict(zip(CHANNELS, sun.frame(hour, side), strict=True)))


# ---- Labels of the released tasks
_SPLIT = np.array([0, 0, 0, 1, 2])  # train, validation or test, of one block of ten days after the other


def _flare_tables(sun: SyntheticSun, start: pd.Timestamp, last: int) -> dict[str, pd.DataFrame]:
    """The hourly flux (W/m^2) to a day after hour `last`, its flares, and for every hour those of the next 24 hours.

    A flare is a local maximum of the flux from C1.0 on and starts 10 to 60 minutes before. The cumulative index is the
    sum over the flares of a window: 1 for a C1.0, 10 for an M1.0, 100 for an X1.0. Splits: 60, 20 and 20% of the time.
    """
    rng = np.random.default_rng([sun.seed, 3])
    flux = np.array([sun.flux(hour, rng) for hour in range(last + 24)])
    hourly, classes = pd.date_range(start, periods=len(flux), freq="1h"), np.array([goes_class(f) for f in flux])
    size = np.array([GOES_CLASSES[c[0]] / GOES_CLASSES["C"] * float(c[1:]) for c in classes])
    peak = np.flatnonzero((flux[1:-1] > flux[:-2]) & (flux[1:-1] >= flux[2:]) & (size[1:-1] >= 1)) + 1
    begin = 60 * peak - 10 * np.random.default_rng([sun.seed, 5]).integers(1, 7, len(peak))  # minutes
    events = pd.DataFrame({"start_time": hourly[0] + pd.to_timedelta(begin, "min"), "peak_time": hourly[peak]})
    flares = {"timestamp": hourly, "goes_class": classes, "flux": [f"{f:.4e}" for f in flux]}
    tables = {"flares.csv": pd.DataFrame(flares), "flare_events.csv": events.assign(goes_class=classes[peak])}
    hours = np.arange(len(flux) - 26)  # the maxima of the last two hours are not known
    first, last = (np.searchsorted(begin, 60 * (hours + ahead), "right") for ahead in (0, 24))
    rows = []
    for hour, a, b in zip(hours, first, last, strict=True):
        strongest = classes[max(peak[a:b], key=lambda h: flux[h])] if a < b else "FQ"
        index = round(size[peak[a:b]].sum(), 1)
        rows.append((hourly[hour], strongest, index, int(strongest[0] in "MX"), int(index >= 10)))
    table = pd.DataFrame(rows, columns=["timestamp", "max_goes_class", "cumulative_index", "label_max", "label_cum"])
    part = np.digitize(hours, np.array([0.6, 0.8]) * len(hours))
    for i, name in enumerate(("train", "validation", "test")):
        tables[f"released/surya-bench-flare-forecasting/{name}.csv"] = table[part == i]
    return tables


def _wind_tables(sun: SyntheticSun, start: pd.Timestamp, last: int) -> dict[str, pd.DataFrame]:
    """Hourly solar wind to five days after hour `last`: V (km/s), magnetic field (nT) and density N (1/cm^3)."""
    hours, rng = np.arange(last + WIND_DELAY_HOURS + 24), np.random.default_rng([sun.seed, 6])
    speed = np.array([sun.wind(hour) for hour in range(len(hours) + 12)])
    speed, rise = speed[:-12], np.clip(speed[12:] - speed[:-12], 0, None)
    noise = np.convolve(rng.standard_normal(len(hours)), np.ones(12) / np.sqrt(12), "same")  # holds for half a day
    table = pd.DataFrame({"V": speed + 25 * noise})
    table[["BX_GSE", "BY_GSM", "BZ_GSM"]] = rng.normal(0, 3, (len(hours), 3))
    # thin where it is fast, compressed where a stream follows
    table["N"] = (5 * (400 / speed) ** 2 + 0.05 * rise) * np.exp(rng.normal(0, 0.2, len(hours)))
    table = table.round(1)
    table.insert(0, "timestamp", start + pd.to_timedelta(hours, "h"))
    names = enumerate(f"released/Surya-bench-solarwind/solarwind_{n}.csv" for n in ("train", "valid", "test"))
    return {name: table[_SPLIT[hours // 240 % 5] == i] for i, name in names}


def _write_spectra(sun: SyntheticSun, times: pd.DatetimeIndex, hours: np.ndarray, path: Path) -> None:
    """EUV spectra of the whole Sun, (N, 1343) from 6.5 to 33.3 nm: continuum and lines, 2% noise, 1% zeros."""
    import xarray as xr  # here, as in archive.py

    rng, nm = np.random.default_rng([sun.seed, 7]), 6.5 + 0.02 * np.arange(1343)
    emission = np.array([sun.frame(hour, 32, noise_scale=0)[: len(_RESPONSES)].mean((1, 2)) for hour in hours])  # DN
    spectra = np.outer(emission.mean(1), 10 ** (-9 + 1.5 * np.sin(np.pi * (nm - nm[0]) / 27)))  # W/m^2/nm
    for channel, response in enumerate(_RESPONSES.values()):
        for line in response.lines:
            spectra += np.outer(2e-5 * emission[:, channel], np.exp(-(((nm - line) / 0.05) ** 2)))
    spectra *= (1 + 0.02 * rng.standard_normal(spectra.shape)) * (rng.random(spectra.shape) >= 0.01)
    data = xr.Dataset()
    for i, name in enumerate(("train", "val", "test")):
        part = _SPLIT[hours // 240 % 5] == i
        data[f"{name}_time"] = (f"{name}_sample", times[part])
        values = spectra[part].astype(np.float32)
        data[f"{name}_spectra"] = ((f"{name}_sample", "wavelength"), values, {"units": "W/m^2/nm"})
    with atomic_write(path) as temporary:
        temporary.write_bytes(data.to_netcdf(engine="h5netcdf"))  # in memory, as HDF5 prints a trace on a full disk


# ---- Files and names
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
