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
import stat
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import google_crc32c
import numpy as np
import pandas as pd
import torch
import zarr
from numcodecs import blosc
from torch import Tensor
from torch.nn.functional import avg_pool2d
from tqdm.auto import tqdm
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, VLenUTF8Codec

from helpers import channels as physics
from helpers import shared
from helpers.channels import CHANNELS, FILL_CODE, UNITS, Coding, Scaler
from helpers.config import Config
from helpers.data import archive as archives
from helpers.data.archive import Archive, FrameError, MissingFrameError
from helpers.data.labels import Plan, labels_of, plan_samples
from helpers.data.workers import worker_pool
from helpers.shared import GB, is_writable

FORMAT = "int16 fixed point, 12-minute calendar, 2"  # the attribute by which a store is recognised
CODECS = {BytesCodec, BloscCodec, Crc32cCodec, VLenUTF8Codec}  # all that a store of ours uses
START, CADENCE, SLOTS = np.datetime64("2010-05-01", "s"), np.timedelta64(12, "m"), 1_300_440
COMPRESSED = 0.6  # size of a compressed frame over that of its codes; measured: synthetic Sun 0.4, noisy frame 0.52
FILE_GB = 2.6 * len(CHANNELS) / GB  # of a NetCDF file of the archive, a pixel of one channel; measured


def reduce_frame(
    path: str | Path, codings: dict[str, Coding], reduce: int, scalers: dict[str, Scaler], native_size: int
) -> np.ndarray:
    """Read the channels of `codings` from one NetCDF file, averaged over squares of `reduce` pixels in physical values.

    Returns (C, H / reduce, W / reduce) int16 codes of the signed-log values. What cannot be used is a FrameError, also
    an image of another side than `native_size`, or one whose pixels are not numbers, have no code or are all zero.
    """
    frame = np.empty((len(codings), native_size // reduce, native_size // reduce), np.int16)
    with archives.open_netcdf(path) as file:
        for i, (name, coding) in enumerate(codings.items()):
            image = torch.from_numpy(archives.read_variable(file, name, UNITS[name], native_size))  # (H, W) physical
            pooled = avg_pool2d(image[None, None], reduce)[0, 0].numpy()  # (H / reduce, W / reduce) physical
            low, high = pooled.min(), pooled.max()  # NaN when any pixel is
            if not np.isfinite(high - low):
                odd = 1 - np.isfinite(pooled).mean()
                raise FrameError(f"{name} has pixels that are not numbers (NaN), in {odd:.1%} of the image")
            if low == high == 0:
                raise FrameError(f"{name} is 0 {UNITS[name]} in every pixel")
            try:
                frame[i] = coding.encode(physics.to_signed_log(pooled, scalers[name]))
            except ValueError:
                found = f"{name} goes from {low:.6g} to {high:.6g} {UNITS[name]}"
                raise FrameError(f"{found}, which is beyond what the store can keep") from None
    return frame


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
        """ValueError or KeyError where it is not what its attributes say (frames are not looked at)."""
        if links := [entry.name for entry in os.scandir(path) if entry.is_symlink()]:
            raise ValueError(f"{', '.join(links)} is a link to elsewhere")
        group = zarr.open_group(path, mode="r", zarr_format=3)
        self.path, self.scalers, self.attributes = path, scalers, dict(group.attrs)
        if (found := self.attributes.get("format", "none, so an old version or not ours")) != FORMAT:
            raise ValueError(f"its format is {found}; this version of the course reads {FORMAT}")
        self.stored_channels = self.channels = tuple(self.attributes["channels"])
        self.side = self.attributes["native_size"] // self.attributes["reduce"]
        self.frame_bytes = 2 * len(self.channels) * self.side**2
        numbers = zip(self.channels, self.attributes["steps"], self.attributes["offsets"], strict=True)
        self.codings = {name: Coding(np.float32(step), np.float32(offset)) for name, step, offset in numbers}
        shape, axes = (len(self.channels), self.side, self.side), _axes(self.attributes)
        tiles = (1, 1, _tile(self.side), _tile(self.side))
        if (group["frames"].shape, group["frames"].chunks) != ((SLOTS, *shape), tiles):
            raise ValueError("the shape of its frames does not agree with its attributes")
        for name in ("frames", *axes):
            array = group[name]
            if foreign := {type(codec) for codec in (*array.filters, array.serializer, *array.compressors)} - CODECS:
                raise ValueError(f"its array {name} uses the codec {foreign.pop().__name__}, which is not ours")
            if name in axes and not np.array_equal(array[:], axes[name]):
                raise ValueError(f"its array {name} does not agree with its attributes")
        self._memory: dict[int, list[np.ndarray]] = {}

    def file(self, when: Any) -> Path:
        """Where the frame of this time is, or would be."""
        return self.path / "frames" / f"c.{_row(when)}.0.0.0"

    def __contains__(self, when: Any) -> bool:
        with suppress(OSError, ValueError):
            return stat.S_ISREG(os.lstat(self.file(when)).st_mode)
        return False

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
            raise ValueError(
                f"{self.path} has no channel {', '.join(absent)}; it has {', '.join(self.stored_channels)}. Choose "
                f"another data.store and run `make cache`: a new store gets all that the config names."
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
        """Codes (H, W) int16 of the chosen channels; the others are not read from the disk."""
        row, chosen = _row(when), [self.stored_channels.index(name) for name in self.channels]
        if row in self._memory:
            return [self._memory[row][i] for i in chosen]
        try:
            if when in self:
                return _read_shard(self.file(when), len(self.stored_channels), self.side, chosen)
        except FileNotFoundError:  # it went away just now
            pass
        except (OSError, RuntimeError, ValueError, OverflowError) as error:
            raise OSError(
                f"The frame at {pd.Timestamp(when)} is damaged: {self.file(when)} ({error}). "
                f"`make cache ARGS=--verify` removes damaged frames and makes them again."
            ) from error
        raise KeyError(f"{self.path} has no frame at {pd.Timestamp(when)}; build it with `make cache`.")

    def load(self, times: Iterable) -> None:
        """Keep the frames at `times` in memory from now on, the codes of all channels."""
        whole = self.select(self.stored_channels)
        self._memory |= {_row(when): whole._codes(when) for when in times}

    def __repr__(self) -> str:
        size = f"{len(self.channels)} channels of {self.side} x {self.side} pixels"
        return f"FrameStore({self.path}: {len(self.times)} frames, {size}, reduced by {self.attributes['reduce']})"


def _read_shard(path: Path, channels: int, side: int, chosen: Sequence[int]) -> list[np.ndarray]:
    """Codes (side, side) int16 of the chosen ones of all `channels` of a frame; ValueError where a checksum differs.

    A shard of Zarr is its chunks, then (offset, bytes) of each of them, then the CRC32C of that index; a chunk is what
    Blosc made of it and its CRC32C. Zarr itself takes 3.7 times as long, channel by channel.
    """

    def checked(block: bytes) -> bytes:
        if google_crc32c.value(block[:-4]) != int.from_bytes(block[-4:], "little"):
            raise ValueError("its checksum differs")
        return block[:-4]

    tile = _tile(side)
    across, planes = side // tile, []
    with open(path, "rb") as file:
        file.seek(-(channels * across**2 * 16 + 4), os.SEEK_END)
        index = np.frombuffer(checked(file.read()), "<u8").reshape(channels, across, across, 2)
        for channel in chosen:
            tiles = np.empty((across, across, tile, tile), "<i2")
            for place in np.ndindex(across, across):
                offset, size = map(int, index[channel][place])
                file.seek(offset)
                blosc.decompress(checked(file.read(size)), tiles[place])
            planes.append(tiles.transpose(0, 2, 1, 3).reshape(side, side))
    return planes


def _tile(side: int) -> int:
    """Side of the chunks into which images of `side` pixels are cut."""
    return side if side % 1024 else 1024


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
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        command = f"mv {path} {path}.old && make cache"
        raise ValueError(f"The store {path} cannot be used: {error}. Build a new one: {command}") from error
    factors = [scalers[name].scale if name in scalers else None for name in store.channels]
    for key, wanted in {"reduce": reduce, "native_size": native_size, "scale_factors": factors}.items():
        if wanted is not None and store.attributes[key] != wanted:
            raise ValueError(
                f"The store {path} was built with {key} {store.attributes[key]}, but the config asks for {wanted}. "
                f"Choose another data.store (a new one will be built), or set the config to what the store holds."
            )
    return store.select(physics.check_channels(channels)) if channels else store


def _axes(attributes: dict) -> dict[str, np.ndarray]:
    """The arrays beside `frames`, which strangers to this project need."""
    return {
        "time": np.arange(SLOTS, dtype=np.int32) * 12,
        "channel": np.array(attributes["channels"], np.dtypes.StringDType()),
        "step": np.array(attributes["steps"], np.float32),
        "offset": np.array(attributes["offsets"], np.float32),
    }


def create_store(
    path: Path, channels: Sequence[str], reduce: int, native_size: int, scalers: dict[str, Scaler]
) -> None:
    """Make an empty store under another name and move it into place; when someone else was faster, theirs stays."""
    if reduce < 1 or native_size % reduce:
        raise ValueError(f"Images of {native_size} pixels cannot be reduced by {reduce} (data.reduce): not a divisor.")
    codings = [physics.coding_of(name, scalers[name]) for name in physics.check_channels(channels)]
    attributes = {
        "format": FORMAT,
        "space": "signed-log: y = sign(x s) log(1 + |x s|) of the physical value x, s in scale_factors",
        "codes": "y = frames * step + offset, rounded by at most half a step; no frame: all codes are _FillValue",
        "channels": list(channels),
        "units": [UNITS[name] for name in channels],
        "scale_factors": [scalers[name].scale for name in channels],
        "steps": [float(coding.step) for coding in codings],
        "offsets": [float(coding.offset) for coding in codings],
        "reduce": reduce,
        "native_size": native_size,
    }
    side, count = native_size // reduce, len(codings)
    aside = tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=shared.make_folder(path.parent))
    with shared.disk_errors(path.parent), aside as folder:
        group = zarr.create_group(Path(folder, "store"), attributes=attributes)
        group.create_array(
            "frames",
            shape=(SLOTS, count, side, side),
            shards=(1, count, side, side),
            chunks=(1, 1, _tile(side), _tile(side)),
            dtype="i2",
            fill_value=FILL_CODE,
            # bitshuffle makes 2 to 4 % less of it, but takes 8 % longer to read
            compressors=[BloscCodec(cname="lz4", clevel=5, shuffle="shuffle", typesize=2), Crc32cCodec()],
            chunk_key_encoding={"name": "default", "separator": "."},
            dimension_names=("time", "channel", "y", "x"),
            # the names under which xarray knows what is no pixel, and that step and offset belong to frames
            attributes={"units": "1", "_FillValue": FILL_CODE, "coordinates": "step offset"},
        )
        for name, values in _axes(attributes).items():
            axis, unit = ("time", {"units": "minutes since 2010-05-01"}) if name == "time" else ("channel", {})
            form = {"chunks": values.shape, "compressors": BloscCodec(), "dimension_names": [axis], "attributes": unit}
            group.create_array(name, data=values, **form)
        with warnings.catch_warnings(action="ignore"):  # that the format does not demand it; xarray wants it
            zarr.consolidate_metadata(Path(folder, "store"))
        try:
            Path(folder, "store").rename(path)
            shared.share(path)
        except OSError:
            if not (path / "zarr.json").is_file():
                raise


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
    given_up: int = 0  # frames that were not looked for, because an earlier build could not make them
    samples: Plan | None = None  # of `prepare_store`: which there are
    needs: str = ""  # of `prepare_store`: what building their frames takes, as text

    def __str__(self) -> str:
        took = f" in {self.seconds:.0f} s" if self.built else ""
        counts = f"{self.built} built{took}, {self.already} there already, {self.missing} not in the archive"
        lines = [f"Frame store {self.store}: {counts}, {len(self.unreadable)} unreadable"]
        lines += [f"  {self.given_up} that could not be made before: `make cache` looks again"] * bool(self.given_up)
        lines += [f"  unreadable: {url}: {reason}" for url, reason in self.unreadable.items()]
        return "\n".join(lines[:11] + [f"  ... and {len(lines) - 11} more"] * (len(lines) > 11))


def build_store(
    times: Iterable,
    path: str | Path,
    channels: Sequence[str] = CHANNELS,  # what to keep, by name; a store that is there already keeps those it has
    reduce: int = 4,  # side of the squares of physical pixels that are averaged
    *,
    archive: Archive | None = None,  # where the frames come from; None for NASA's bucket
    native_size: int = 4096,  # side of the images before
    scalers: dict[str, Scaler] | None = None,
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
        create_store(path, channels, reduce, native_size, scalers or physics.load_scalers())
    store, started = open_store(path, channels, reduce, native_size, scalers), time.perf_counter()
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
    mine = worker_pool(workers) if min(workers, len(lacking)) > 1 else ThreadPoolExecutor(1)
    with nullcontext(executor) if executor else mine as pool:
        urls = [archive.url(when) for when in lacking]
        # after an error in one of them, `map` begins no other
        made = pool.map(partial(build_frame, store, replace(archive, index=None)), lacking, urls)
        each_mb = max(1, round(1000 * FILE_GB * native_size**2))
        bar = tqdm(made, f"{len(lacking)} frames", len(lacking), unit="MB", unit_scale=each_mb, disable=not progress)
        for when, url, outcome in zip(lacking, urls, bar, strict=True):
            if not isinstance(outcome, FrameError):
                report.built += outcome
                report.already += not outcome
                continue
            report.lost.add(when)
            if isinstance(outcome, MissingFrameError):
                report.missing += 1
            else:
                report.unreadable[url] = str(outcome)
    report.seconds += time.perf_counter() - started
    return report


def build_frame(store: FrameStore, archive: Archive, when: np.datetime64, url: str | None) -> bool | FrameError:
    """Make one frame; return True, or False if it is there already, or why it cannot be made."""
    if when in store:
        return False
    if url is None:
        return MissingFrameError("the index does not have it")
    try:
        with archive.local_copy(url) as path:
            reduce, native_size = store.attributes["reduce"], store.attributes["native_size"]
            codes = reduce_frame(path, store.codings, reduce, store.scalers, native_size)
    except FrameError as error:
        return error
    with shared.disk_errors(store.path):
        zarr.open_array(store.path / "frames", mode="r+")[_row(when)] = codes
    shared.share(store.file(when))
    return True


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
    if folder.suffix == ".zarr":
        paths = [folder]
    else:
        size = f"{data.native_size}px-reduce{data.reduce}"
        names = ["13ch"] if needed == CHANNELS else ["+".join(needed), "13ch"]
        paths = [folder / f"{size}-{name}.zarr" for name in names]
    own = map(cfg.shared.to_write, paths) if data.private_cache else ()
    return next((path for path in (*own, *paths) if path.exists()), paths[0])


def make_archive(cfg: Config) -> Archive:
    """Where this configuration takes its frames from."""
    data = cfg.data
    folder, index = (
        text if text is None or "://" in text else str(cfg.shared.to_read(text)) for text in (data.archive, data.index)
    )
    if cfg.paths.scratch and not Path(cfg.paths.scratch).is_dir():
        raise FileNotFoundError(f"There is no folder {cfg.paths.scratch} for downloads (paths.scratch in the config).")
    archive = Archive(folder, None, data.anonymous, data.endpoint_url, data.retries, scratch=cfg.paths.scratch)
    return replace(archive, index=archives.read_index(index, archive)) if index else archive


def prepare_store(
    cfg: Config,
    times: Iterable | None = None,
    executor: Executor | None = None,
    progress: bool = True,
    plan_only: bool = False,
    again: bool = False,
) -> BuildReport:
    """Build the frames that samples need and the store lacks; quick when everything is there.

    A sample whose frame turns out to be missing or unreadable is given up; with a maximum, the next one of the seeded
    order takes its place.

    Args:
        times: of the frames to build; None for those of the samples of the three splits.
        plan_only: build nothing; `samples` and `needs` of the report say what would be.
        again: look also for the frames that an earlier call could not make, as `make cache` does.

    PermissionError: frames lack in a shared folder that is read-only for you, and data.private_cache is not set.
    ValueError: there is no sample, or more would be read than data.ask_above_gb.
    """
    data, path, channels, archive = cfg.data, store_path(cfg), channels_needed(cfg), make_archive(cfg)
    labels, report, there = labels_of(cfg) if times is None else None, BuildReport(path), np.array([], "datetime64[s]")
    history = {"lost": [], "seconds a frame": None}  # of earlier calls: times of frames that cannot be made, and speed
    with suppress(OSError, ValueError):
        history |= json.loads(path.with_name(f"{path.name}.builds.json").read_text())
    # whoever may only read the store cannot look again for what its owner did not find
    lost = set() if again and is_writable(path) else {np.datetime64(when) for when in history["lost"]}
    report.given_up = len(lost)

    def may_be_had(frames: np.ndarray) -> np.ndarray:
        gone = np.array(list(lost), "datetime64[s]")
        return np.isin(frames, there) | archive.may_have(frames) & ~np.isin(frames, gone)

    while True:
        if exists := (path / "zarr.json").is_file():
            store = open_store(path, channels, data.reduce, data.native_size, cfg.scalers)
            channels, there = store.stored_channels, store.times
        if times is None:
            report.samples = plan_samples(cfg, may_be_had, labels)
            if not len(report.samples.frames):
                raise ValueError(
                    f"There is no frame for any sample.\n{report.samples}\nFrames come from {archive.folder}. Correct "
                    f"data.archive, the splits or section labels of the config."
                )
        wanted = np.unique(np.array(list(report.samples.frames if times is None else times), "datetime64[s]"))
        lacking = np.setdiff1d(wanted, there)
        report.already = len(wanted) - len(lacking) - report.built
        each_gb, stored = FILE_GB * data.native_size**2, 2 * COMPRESSED * len(channels) * data.image_size**2 / GB
        report.needs = (
            f"frames: {len(wanted)} needed, {len(wanted) - len(lacking)} there already in {path}\n"
            f"to build: {len(lacking)} frames; {len(lacking) * each_gb:.1f} GB to read, {len(lacking) * stored:.2f} GB "
            f"to store ({shared.free_space(path) / GB:.1f} GB free)"
        )
        if speed := history["seconds a frame"]:
            report.needs += f", about {len(lacking) * speed / 3600:.1f} hours at the speed last measured here"
        if times is None:
            count = report.samples.frames_without_maximum
            whole = f"{count} frames, {count * each_gb:.0f} GB to read"
            report.needs += f"\nall samples, without training.max_..._samples: {whole}"
        if plan_only or exists and not len(lacking):
            return report
        plan = f"{report.samples or ''}\n{report.needs}\n".lstrip()
        if not is_writable(path):
            if data.private_cache and path != cfg.shared.to_write(path):
                path, there, lost, report.given_up = cfg.shared.to_write(path), there[:0], set(), 0
                continue
            raise PermissionError(
                f"{plan}You may only read that folder. Whoever may write there, on a course the instructor, adds the "
                f"frames with `make cache TASK={cfg.task} PROFILE={cfg.profile}`; data.private_cache: true builds a "
                f"store of your own instead, of all {len(wanted)} frames."
            )
        if len(lacking) * each_gb > data.ask_above_gb:
            raise ValueError(
                f"{plan}That is more to read than data.ask_above_gb ({data.ask_above_gb:g} GB). Raise that key, set "
                f"training.max_train_samples (max_val_samples, max_test_samples), or shorten the splits."
            )
        settings = {"archive": archive, "native_size": data.native_size, "scalers": cfg.scalers, "executor": executor}
        settings |= {"workers": data.build_workers, "reserve_gb": cfg.paths.reserve_gb, "progress": progress}
        report.store = path
        build_store(lacking, path, channels, data.reduce, **settings, report=report)
        history["lost"] = sorted({*history["lost"]} - {*map(str, lacking)} | {*map(str, report.lost)})
        if report.built:
            history["seconds a frame"] = report.seconds / report.built
        with shared.atomic_write(path.with_name(f"{path.name}.builds.json")) as temporary:
            temporary.write_text(json.dumps(history))
        if times is not None or report.lost <= lost:
            return report
        lost |= report.lost
