"""The store of reduced frames: NetCDF files -> one Zarr array on a fixed calendar that everyone reads.

The time axis has a row for every 12 minutes from 2010-05-01 to 2040-01-01, so that the row of a time is known without
looking. A frame is one shard, hence one file `frames/c.ROW.0.0.0`, which Zarr writes aside and moves into place: it is
there and whole, or it is not there. Nothing else says which frames exist, so any number of people may build and read at
once. Inside a shard there is one chunk a channel (at 4096 pixels, of 1024 x 1024), compressed, with a CRC32C that is
compared at reading. Values are 16-bit fixed-point codes of signed-log values (`Coding` in channels.py).
"""

import copy
import json
import os
import random
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import pandas as pd
import torch
import zarr
from numcodecs import blosc
from numcodecs.checksum32 import CRC32C
from torch import Tensor
from torch.nn.functional import avg_pool2d
from tqdm.auto import tqdm
from zarr.codecs import BloscCodec, Crc32cCodec

from helpers import channels as physics
from helpers import shared
from helpers.channels import CHANNELS, FILL_CODE, UNITS, Coding, Scaler
from helpers.config import Config
from helpers.data import archive as archives
from helpers.data.archive import Archive, FetchError, FrameError, MissingFrameError
from helpers.data.labels import Plan, labels_of, plan_samples
from helpers.data.workers import worker_pool
from helpers.shared import GB, is_writable

FORMAT = "int16 fixed point, 12-minute calendar, 2"  # the attribute by which a store is recognised
START, CADENCE, SLOTS = np.datetime64("2010-05-01", "s"), np.timedelta64(12, "m"), 1_300_440
COMPRESSED = 0.6  # size of a compressed frame over that of its codes; measured: synthetic Sun 0.4, noisy frame 0.52
FILE_GB = 2.6 * len(CHANNELS) / GB  # of a NetCDF file of the archive, a pixel of one channel; measured


def _row(when: Any) -> int:
    """The row of a time; ValueError for one that is not in the calendar."""
    row, rest = divmod(np.datetime64(when, "s") - START, CADENCE)
    if rest or not 0 <= row < SLOTS:
        raise ValueError(f"{pd.Timestamp(when)} is not in the calendar of frames: every 12 minutes, 2010-05 to 2039.")
    return int(row)


class FrameStore:
    """A store opened for reading (`open_store`): `read` returns its `channels`, some of the `stored_channels`.

    `attributes` are what it says of itself, `codings` how the codes of each stored channel are read, `side` that of its
    images in pixels, and `frame_bytes` the size of a frame in memory, all channels in int16.
    """

    def __init__(self, path: Path, scalers: dict[str, Scaler]) -> None:
        """An error of any kind where it is not what its attributes say (frames are not looked at)."""
        if links := [entry.name for entry in path.iterdir() if entry.is_symlink()]:
            raise ValueError(f"{', '.join(links)} is a link to elsewhere")
        group = zarr.open_group(path, mode="r", zarr_format=3)
        self.path, self.scalers, self.attributes = path, scalers, dict(group.attrs)
        if (found := self.attributes.get("format")) != FORMAT:
            raise ValueError(f"its format is {found!r}, not {FORMAT!r}")
        expected, axes = _make_arrays({}, *(self.attributes[key] for key in ("channels", "reduce", "native_size")))
        if group.metadata != expected.metadata:
            raise ValueError(f"its zarr.json is not that of the format {FORMAT!r}")
        if wrong := [name for name, values in axes.items() if not np.array_equal(group[name][:], values)]:
            raise ValueError(f"its array {wrong[0]} is not as it was written")
        self.stored_channels = self.channels = tuple(self.attributes["channels"])
        self.codings = dict(zip(self.channels, map(Coding, axes["step"], axes["offset"]), strict=True))
        self.side, self.tile = group["frames"].shape[-1], group["frames"].chunks[-1]
        self.frame_bytes = 2 * len(self.channels) * self.side**2
        self._memory: dict[int, list[np.ndarray]] = {}  # codes of all channels by row

    def file(self, when: Any) -> Path:
        """Where the frame of this time is, or would be."""
        return self.path / "frames" / f"c.{_row(when)}.0.0.0"

    def __contains__(self, when: Any) -> bool:
        file = self.file(when)
        return file.is_file() and not file.is_symlink()

    @property
    def times(self) -> np.ndarray:
        """datetime64[s] (UTC) of the frames that are there now, sorted."""
        with os.scandir(self.path / "frames") as files:
            names = [file.name for file in files if file.is_file(follow_symlinks=False)]
        rows = sorted(int(name.split(".")[1]) for name in names if name.endswith(".0.0.0"))
        return START + np.array(rows, int) * CADENCE.astype("timedelta64[s]")

    def select(self, channels: Sequence[str]) -> Self:
        """The same store, frames in memory included, with other channels; ValueError when it lacks one."""
        if absent := [name for name in channels if name not in self.stored_channels]:
            there = ", ".join(self.stored_channels)
            raise ValueError(
                f"{self.path} has no channel {', '.join(absent)}; it has {there}. Choose another data.store."
            )
        other = copy.copy(self)
        other.channels = tuple(channels)
        return other

    def read(self, times: Iterable) -> Tensor:
        """The frames at these times in the chosen channels, (C, T, H, W) float32 normalised.

        KeyError: there is no frame at one of the times. OSError: one is damaged.
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
        """Codes of the chosen channels, each (H, W) int16; the others are not read from the disk."""
        chosen = [self.stored_channels.index(name) for name in self.channels]
        if _row(when) in self._memory:
            return [self._memory[_row(when)][channel] for channel in chosen]
        if when not in self:
            raise KeyError(f"{self.path} has no frame at {pd.Timestamp(when)}; build it with `make cache`.")
        try:
            with open(self.file(when), "rb") as file:
                return self._read_shard(file, chosen)
        except (OSError, RuntimeError, ValueError, OverflowError) as error:
            raise OSError(
                f"The frame at {pd.Timestamp(when)} is damaged: {self.file(when)} ({error}). "
                f"`make cache ARGS=--verify` removes damaged frames and makes them again."
            ) from error

    def _read_shard(self, file: BinaryIO, chosen: Sequence[int]) -> list[np.ndarray]:
        """Codes of the chosen channels of a frame, each (H, W) int16; RuntimeError where a checksum differs.

        A shard of Zarr is its chunks, then (offset, bytes) of each of them, then the CRC32C of that index; a chunk is
        what Blosc made of it and its CRC32C. Zarr itself takes 3.7 times as long, channel by channel.
        """
        checked, across, planes = CRC32C().decode, self.side // self.tile, []
        file.seek(-(len(self.stored_channels) * across**2 * 16 + 4), os.SEEK_END)
        index = np.frombuffer(checked(file.read()), "<i8").reshape(-1, across, across, 2)
        for channel in chosen:
            tiles = np.empty((across, across, self.tile, self.tile), "<i2")
            for place in np.ndindex(across, across):
                offset, size = index[channel][place]
                file.seek(offset)
                blosc.decompress(checked(file.read(size)), tiles[place])
            planes.append(tiles.transpose(0, 2, 1, 3).reshape(self.side, self.side))
        return planes

    def load(self, times: Iterable) -> None:
        """Keep the frames at `times` in memory from now on, the codes of all channels."""
        whole = self.select(self.stored_channels)
        self._memory |= {_row(when): whole._codes(when) for when in times}

    def __repr__(self) -> str:
        size = f"{len(self.channels)} channels of {self.side} x {self.side} pixels"
        return f"FrameStore({self.path}: {len(self.times)} frames, {size}, reduced by {self.attributes['reduce']})"


def open_store(
    path: str | Path,
    channels: Sequence[str] | None = None,
    reduce: int | None = None,
    native_size: int | None = None,
    scalers: dict[str, Scaler] | None = None,
) -> FrameStore:
    """Open a store for reading the given channels, by name and in any order, once it is sure to be the right one.

    ValueError: it is damaged or of another version, lacks a channel, or was built with another factor, side or scale.
    """
    path, scalers = Path(path), scalers or physics.load_scalers()
    if not (path / "zarr.json").is_file():
        raise FileNotFoundError(f"There is no frame store at {path}. Run `make cache`, or correct data.store.")
    try:
        store = FrameStore(path, scalers)
    except Exception as error:
        command = f"mv {path} {path}.old && make cache"
        raise ValueError(f"The store {path} cannot be used: {error}. Build a new one: {command}") from error
    factors = [scalers[name].scale if name in scalers else None for name in store.channels]
    for key, wanted in {"reduce": reduce, "native_size": native_size, "scale_factors": factors}.items():
        if wanted is not None and store.attributes[key] != wanted:
            found = f"The store {path} was built with {key} {store.attributes[key]}, but the config asks for {wanted}"
            raise ValueError(f"{found}. Choose another data.store, or set the config to what the store holds.")
    return store.select(physics.check_channels(channels)) if channels else store


def create_store(path: Path, channels: Sequence[str], reduce: int, native_size: int) -> None:
    """Make an empty store under another name and move it into place; when someone else was faster, theirs stays."""
    aside = tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=shared.make_folder(path.parent))
    with shared.disk_errors(path.parent), aside as folder:
        group, axes = _make_arrays(Path(folder, "store"), channels, reduce, native_size)
        for name, values in axes.items():
            group[name][:] = values
        try:
            Path(folder, "store").rename(path)
            shared.share(path)
        except OSError:
            if not path.exists():
                raise
            if not (path / "zarr.json").is_file():  # so it was not somebody else, who was faster
                found = f"There is no frame store at {path}, but something else"
                raise FileNotFoundError(f"{found}. Move that away, or correct data.store.") from None


def _make_arrays(
    place: Path | dict, channels: Sequence[str], reduce: int, native_size: int
) -> tuple[zarr.Group, dict[str, np.ndarray]]:
    """A store of empty arrays, and what is to be in those beside `frames`, which strangers to this project need."""
    if native_size % reduce:
        raise ValueError(f"Images of {native_size} pixels cannot be reduced by {reduce} (data.reduce): not a divisor.")
    count, side, scalers = len(channels), native_size // reduce, physics.load_scalers()
    tile = side if side % 1024 else 1024
    codings = [physics.coding_of(name, scalers[name]) for name in physics.check_channels(channels)]
    axes = {
        "time": np.arange(SLOTS, dtype=np.int32) * 12,
        "channel": np.array(channels, np.dtypes.StringDType()),
        "step": np.array([coding.step for coding in codings]),
        "offset": np.array([coding.offset for coding in codings]),
    }
    attributes = {
        "format": FORMAT,
        "space": "signed-log: y = sign(x s) log(1 + |x s|) of the physical value x, s in scale_factors",
        "codes": "y = frames * step + offset, rounded by at most half a step; no frame: all codes are _FillValue",
        "channels": list(channels),
        "units": [UNITS[name] for name in channels],
        "scale_factors": [scalers[name].scale for name in channels],
        "steps": axes["step"].tolist(),
        "offsets": axes["offset"].tolist(),
        "reduce": reduce,
        "native_size": native_size,
    }
    group = zarr.create_group(place, attributes=attributes)
    group.create_array(
        "frames",
        shape=(SLOTS, count, side, side),
        shards=(1, count, side, side),
        chunks=(1, 1, tile, tile),
        dtype="i2",
        fill_value=FILL_CODE,
        # bitshuffle makes 2 to 4 % less of it, but takes 8 % longer to read
        compressors=[BloscCodec(cname="lz4", clevel=5, shuffle="shuffle", typesize=2), Crc32cCodec()],
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=("time", "channel", "y", "x"),
        # the names under which xarray knows what is no pixel, and that step and offset belong to frames
        attributes={"units": "1", "_FillValue": FILL_CODE, "coordinates": "step offset"},
    )
    for name, values in axes.items():
        form = {"shape": values.shape, "chunks": values.shape, "dtype": values.dtype, "compressors": BloscCodec()}
        group.create_array(name, **form, dimension_names=["time" if name == "time" else "channel"])
    group["time"].attrs["units"] = "minutes since 2010-05-01"
    with warnings.catch_warnings(action="ignore"):  # that the format does not demand it; xarray wants it
        return zarr.consolidate_metadata(group.store), axes


@dataclass
class BuildReport:
    """What a build did; prints as a few lines."""

    store: Path
    built: int = 0  # frames that were made
    seconds: float = 0.0  # that it took
    already: int = 0  # that were there
    missing: int = 0  # that are not in the archive
    unreadable: dict[str, str] = field(default_factory=dict)  # address of a file that could not be used -> why
    lost: set[np.datetime64] = field(default_factory=set)  # times of the frames that are missing or unreadable
    unfetched: set[np.datetime64] = field(default_factory=set)  # those of them that another day may bring
    given_up: int = 0  # frames that were not looked for, because an earlier build could not make them
    samples: Plan | None = None  # of `prepare_store`: which there are
    needs: str = ""  # of `prepare_store`: what building their frames takes, as text, and in GB
    to_read_gb: float = 0.0
    to_store_gb: float = 0.0

    def __str__(self) -> str:
        took = f" in {self.seconds:.0f} s" if self.built else ""
        counts = f"{self.built} built{took}, {self.already} there already, {self.missing} not in the archive"
        lines = [f"Frame store {self.store}: {counts}, {len(self.unreadable)} unreadable"]
        if self.given_up:
            lines.append(f"  {self.given_up} that could not be made before: `make cache` looks again")
        lines += [f"  unreadable: {url}: {reason}" for url, reason in self.unreadable.items()]
        if len(lines) > 11:
            lines[11:] = [f"  ... and {len(lines) - 11} more"]
        return "\n".join(lines)


def build_store(
    times: Iterable,
    path: str | Path,
    channels: Sequence[str] = CHANNELS,  # what to keep, by name; a store that is there already keeps those it has
    reduce: int = 4,  # side of the squares of physical pixels that are averaged
    *,
    archive: Archive | None = None,  # where the frames come from; None for NASA's bucket
    native_size: int = 4096,  # side of the images before
    workers: int = 1,  # processes of this machine that make frames
    executor: Executor | None = None,  # makes them instead, such as Dask's `Client(...).get_executor()` on these disks
    reserve_gb: float = 2.0,  # free space that must remain on the disk
    progress: bool = True,
    report: BuildReport | None = None,  # of an earlier build, to go on counting
) -> BuildReport:
    """Build the frames of these times that the store does not have yet; call it again after anything went wrong.

    Any number of processes and people may build one store at once: each makes what is missing in an order of its own,
    and looks again before each frame.

    ValueError: a time is not in the calendar, or the store was built with other settings. DiskFullError: too little
    space, before starting or on the way; frames that are there stay. ArchiveError: no frame can be fetched.
    """
    path, archive, report = Path(path), archive or Archive(), report or BuildReport(Path(path))
    if not (path / "zarr.json").is_file():
        create_store(path, channels, reduce, native_size)
    store, started = open_store(path, channels, reduce, native_size), time.perf_counter()
    shared.remove_leftovers(path / "frames")
    shared.remove_leftovers(path.parent, f".{path.name}.*")
    shared.remove_leftovers(Path(archive.scratch or tempfile.gettempdir()), f"{archives.SCRATCH_PREFIX}*")
    wanted = {START + _row(when) * CADENCE for when in times}
    lacking = list(wanted - set(store.times))
    random.shuffle(lacking)
    report.already += len(wanted) - len(lacking)
    if lacking:
        size = len(lacking) * store.frame_bytes * COMPRESSED
        shared.ensure_space(path, size, reserve_gb, what=f"{len(lacking)} frames")
    with nullcontext(executor) if executor else worker_pool(min(workers, len(lacking))) as pool:
        urls = [archive.url(when) for when in lacking]
        # after an error in one of them, `map` begins no other
        made = pool.map(partial(build_frame, store, replace(archive, index=None)), lacking, urls)
        each_mb = max(1, round(1000 * FILE_GB * native_size**2))
        bar = tqdm(made, f"{len(lacking)} frames", len(lacking), unit="MB", unit_scale=each_mb, disable=not progress)
        for when, url, found in zip(lacking, urls, bar, strict=True):
            if not isinstance(found, FrameError):
                report.built += found
                continue
            report.lost.add(when)
            if isinstance(found, FetchError):
                report.unfetched.add(when)
            if isinstance(found, MissingFrameError):
                report.missing += 1
            else:
                report.unreadable[url] = str(found)
    report.seconds += time.perf_counter() - started
    return report


def build_frame(store: FrameStore, archive: Archive, when: np.datetime64, url: str | None) -> bool | FrameError:
    """Make one frame, unless somebody else did so by now: whether it was made, or why it cannot be."""
    if when in store:
        return False
    if url is None:
        return MissingFrameError("the index has no such frame")
    try:
        with archive.local_copy(url) as path:
            codes = reduce_frame(path, store)
    except FrameError as error:
        return error
    with shared.disk_errors(store.path):
        zarr.open_group(store.path, mode="r+")["frames"][_row(when)] = codes
    shared.share(store.file(when))
    return True


def reduce_frame(path: str | Path, store: FrameStore) -> np.ndarray:
    """Read one NetCDF file, averaged over squares of pixels in physical values: its codes, as `store` keeps them.

    Returns (C, H, W) int16 of all channels of the store. What cannot be used is a FrameError, also an image of another
    side, or one whose pixels are not numbers, have no code or are all zero.
    """
    frame = np.empty((len(store.codings), store.side, store.side), np.int16)
    with archives.open_netcdf(path) as file:
        for i, (name, coding) in enumerate(store.codings.items()):
            image = archives.read_variable(file, name, UNITS[name], store.attributes["native_size"])  # (H, W) physical
            pooled = avg_pool2d(torch.from_numpy(image)[None], store.attributes["reduce"])[0].numpy()
            if not np.isfinite(pooled).all():
                raise FrameError(f"{name} has pixels that are not numbers (NaN)")
            if not pooled.any():
                raise FrameError(f"{name} is 0 {UNITS[name]} in every pixel")
            try:
                frame[i] = coding.encode(physics.to_signed_log(pooled, store.scalers[name]))
            except ValueError:
                found = f"{name} goes from {pooled.min():.6g} to {pooled.max():.6g} {UNITS[name]}"
                raise FrameError(f"{found}, which is beyond what the store can keep") from None
    return frame


def channels_needed(cfg: Config) -> tuple[str, ...]:
    """The input channels and the channels that are predicted as images, each once, in the canonical order."""
    targets = cfg.labels.target_channels if cfg.labels.kind == "image" else []
    return tuple(name for name in CHANNELS if name in {*cfg.data.channels, *targets})


def store_path(cfg: Config) -> Path:
    """Where the frames of this configuration are: `data.store` itself if it ends in .zarr, else a store in it.

    That has exactly the channels that are needed, or all 13 if only such a one is there; with data.private_cache a
    store of your own counts first.
    """
    data, needed, folder = cfg.data, channels_needed(cfg), Path(cfg.data.store)
    paths = [folder]
    if folder.suffix != ".zarr":
        names = ["13ch" if needed == CHANNELS else "+".join(needed), "13ch"]
        paths = [folder / f"{data.native_size}px-reduce{data.reduce}-{name}.zarr" for name in names]
    own = [cfg.shared.to_write(path) for path in paths if data.private_cache]
    return next((path for path in own + paths if (path / "zarr.json").is_file()), paths[0])


def make_archive(cfg: Config) -> Archive:
    """Where this configuration takes its frames from."""
    data = cfg.data
    folder, index = (
        text if text is None or "://" in text else str(cfg.shared.to_read(text)) for text in (data.archive, data.index)
    )
    if cfg.paths.scratch and not Path(cfg.paths.scratch).is_dir():
        raise FileNotFoundError(f"There is no folder {cfg.paths.scratch} for downloads (paths.scratch in the config).")
    archive = Archive(folder, None, data.anonymous, data.endpoint_url, cfg.paths.scratch)
    return replace(archive, index=archives.read_index(index, archive)) if index else archive


def prepare_store(
    cfg: Config,
    times: Iterable | None = None,
    executor: Executor | None = None,
    progress: bool = True,
    plan_only: bool = False,
    again: bool = False,
) -> BuildReport:
    """Build the frames of `times`, or those of the samples of the three splits; quick when everything is there.

    A sample whose frame turns out to be missing or unreadable is given up; with a maximum, the next one of the seeded
    order takes its place. With `plan_only` nothing is built: `samples` and `needs` of the report say what would be.
    With `again` frames that an earlier call could not make are looked for once more, as `make cache` does.

    PermissionError: frames lack in a shared folder that is read-only for you, and data.private_cache is not set.
    ValueError: there is no sample, or more would be read than data.ask_above_gb.
    """
    data, archive, report = cfg.data, make_archive(cfg), BuildReport(store_path(cfg))
    labels = labels_of(cfg) if times is None else None
    given = None if times is None else np.unique(np.array(list(times), "datetime64[s]"))

    def can_be_had(times: np.ndarray) -> np.ndarray:
        return np.isin(times, there) | archive.may_have(times) & ~np.isin(times, given_up)

    while True:
        path, channels, there = report.store, channels_needed(cfg), np.array([], "datetime64[s]")
        notes = path.with_name(f"{path.name}.builds.json")  # frames that earlier builds could not make, and their speed
        history = {"lost": [], "seconds a frame": None}
        with suppress(OSError, ValueError, TypeError):  # no more than hints, which may be damaged
            history |= json.loads(notes.read_text())
        if (path / "zarr.json").is_file():
            store = open_store(path, channels, data.reduce, data.native_size)
            channels, there = store.stored_channels, store.times
        # whoever may only read the store cannot look again for what its owner did not find
        earlier = [] if again and is_writable(path) else np.array(history["lost"], "datetime64[s]")
        lost = report.lost.union(earlier)
        report.given_up = len(lost.difference(there, report.lost))
        if given is None:
            given_up = np.array(list(lost.difference(there)), "datetime64[s]")
            report.samples = plan_samples(cfg, can_be_had, labels)
        wanted = np.unique(report.samples.frames) if given is None else given
        if not len(wanted):
            keys = f"data.archive ({archive.folder}), the splits or section labels of the config"
            raise ValueError(f"There is no frame for any sample.\n{report.samples}\nCorrect {keys}.")
        lacking = np.setdiff1d(wanted, there)
        report.already = len(wanted) - len(lacking) - report.built
        report.to_read_gb = len(lacking) * FILE_GB * data.native_size**2
        report.to_store_gb = len(lacking) * 2 * COMPRESSED * len(channels) * data.image_size**2 / GB
        report.needs = (
            f"frames: {len(wanted)} needed, {len(wanted) - len(lacking)} there already in {path}\n"
            f"to build: {len(lacking)} frames; {report.to_read_gb:.1f} GB to read, {report.to_store_gb:.2f} GB to "
            f"store ({shared.free_space(path) / GB:.1f} GB free)"
        )
        if speed := history["seconds a frame"]:
            report.needs += f", about {len(lacking) * speed / 3600:.1f} hours at the speed last measured here"
        if plan_only or not len(lacking):
            return report
        plan, own = f"{report.samples or ''}\n{report.needs}\n".lstrip(), cfg.shared.to_write(path)
        if data.private_cache and own != path:
            report = BuildReport(own)
            continue
        if not is_writable(path):
            command = f"make cache TASK={cfg.task} PROFILE={cfg.profile}"
            if given is not None:
                command += f' ARGS="--span {wanted[0]} {wanted[-1] + np.timedelta64(data.cadence_minutes, "m")}"'
            raise PermissionError(
                f"{plan}You may only read that folder. Whoever may write there, on a course the instructor, adds them "
                f"with `{command}`; data.private_cache: true builds a store of your own instead, of all {len(wanted)} "
                f"frames."
            )
        if report.to_read_gb > data.ask_above_gb:
            raise ValueError(
                f"{plan}That is more to read than data.ask_above_gb ({data.ask_above_gb:g} GB). Raise that key, set "
                f"training.max_train_samples (max_val_samples, max_test_samples), or shorten the splits."
            )
        settings = {"archive": archive, "native_size": data.native_size, "executor": executor}
        settings |= {"workers": data.build_workers, "reserve_gb": cfg.paths.reserve_gb, "progress": progress}
        before = len(report.lost)
        build_store(lacking, path, channels, data.reduce, **settings, report=report)
        history["lost"] = sorted(set(history["lost"]) | set(map(str, report.lost - report.unfetched)))
        if report.built:
            history["seconds a frame"] = report.seconds / report.built
        with shared.atomic_write(notes) as temporary:
            temporary.write_text(json.dumps(history))
        if given is not None or len(report.lost) == before:
            return report
