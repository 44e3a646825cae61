"""Frames and labels joined into samples, split by time, and served in batches.

A sample at time t reads the frames at t + offsets and the label of the time t + lead. What finds no partner is dropped
and counted, and the counts are in the report.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torch.utils.data import DataLoader, Dataset

from helpers.channels import AUGMENTATION_SIGNS, Scaler, denormalise, load_scalers, normalise, stack_scalers
from helpers.config import Config
from helpers.frames import FrameStore, open_store, store_path
from helpers.netcdf import FrameError, open_netcdf, parse_times
from helpers.shared import GB, resolve

GOES_CLASSES = {"A": 1e-8, "B": 1e-7, "C": 1e-6, "M": 1e-5, "X": 1e-4}  # W/m^2 (1 to 8 Angstrom)
QUIET = ("", "FQ", "A0", "A0.0", "NONE", "NAN")  # no flare, hence no flux to take a logarithm of
FLIPS = {"flip_lr": (-1,), "flip_ud": (-2,), "rot180": (-2, -1)}  # axes that are reversed
IMAGE_STATISTICS = 64  # evenly spaced samples from which the mean and span of image targets are taken


# --------------------------------------------------------------------------------------------------------------------
# Labels
# --------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Labels:
    """Labels at times: numbers, or the paths of mask files, and what was left out of the file.

    Attributes:
        times: (N,) datetime64[s] in UTC, sorted, each once.
        values: (N, K) float64 in label units after the transform; (N, 0) for masks.
        paths: (N,) mask files, or None for numbers.
        variable: the variable to read from the mask files.
        pooling: whole factor by which the masks are smaller than the input.
        dropped: why and how many rows of the file were left out.
        notes: what was converted on the way.
    """

    times: np.ndarray
    values: np.ndarray
    paths: np.ndarray | None = None
    variable: str | None = None
    pooling: int = 1
    dropped: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.times)


@dataclass(frozen=True)
class FrameTarget:
    """Targets taken from the frames themselves: these channels at sample time + offset, normalised.

    With a `pooling` above 1 they are averaged over squares of so many pixels, in physical values.
    """

    channels: tuple[str, ...]
    offset_minutes: int = 0
    pooling: int = 1


def load_labels(
    path: str | Path,
    time_column: str,
    value_columns: Sequence[str],
    transform: str = "none",
    variable: str | None = None,
    pooling: int = 1,
) -> Labels:
    """Read labels from a CSV with one row a time.

    Args:
        value_columns: the columns to predict; with `variable` the files named in the column `path` are read instead.
        transform: none, log10, or goes (class strings such as M2.5 to log10 of the flux in W/m^2).
        variable: the variable of the mask files (relative paths start at the folder of the CSV).
        pooling: whole factor by which the masks are smaller than the input.

    Returns:
        The labels; rows without a usable value are counted in `dropped`, conversions are told in `notes`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing, a cell is neither a time nor a value, or one time has two different values.
    """
    path, where = Path(path), f"the label file {path}"
    if not path.is_file():
        raise FileNotFoundError(f"There is no label file {path}. Correct labels.path in the config.")
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    columns = ["path"] if variable else list(value_columns)
    if absent := [name for name in (time_column, *columns) if name not in table]:
        raise ValueError(
            f"{where[0].upper() + where[1:]} has no column {', '.join(absent)}; it has {', '.join(table)}. Correct "
            f"labels.time_column or labels.value_columns in the config."
        )
    times = parse_times(table[time_column], where).to_numpy()
    if variable:
        paths, values = np.array([str(path.parent / name) for name in table["path"]]), np.empty((len(table), 0))
        usable = (table["path"].str.strip() != "").to_numpy()
    else:
        paths, values = None, np.column_stack([_TRANSFORMS[transform](table[name], where) for name in columns])
        usable = np.isfinite(values).all(axis=1)
    reason = "empty" if variable or transform == "none" else "empty, quiet or not positive, so without a logarithm"
    dropped = {f"label {reason}": int((~usable).sum())} if not usable.all() else {}
    labels = Labels(times, values, paths, variable, pooling, dropped)
    if _have_zone(table[time_column]):
        labels.notes.append("label times carry a time zone and were converted to UTC")
    return _in_order(labels, np.flatnonzero(usable), where)


def _in_order(labels: Labels, rows: np.ndarray, where: str) -> Labels:
    """These rows of the labels, sorted by time; repeated ones are dropped, two labels for one time refused."""
    rows = rows[np.argsort(labels.times[rows], kind="stable")]
    same = np.flatnonzero(labels.times[rows][1:] == labels.times[rows][:-1])
    for i, j in zip(rows[same], rows[same + 1], strict=True):
        other_path = labels.paths is not None and labels.paths[i] != labels.paths[j]
        if other_path or not np.array_equal(labels.values[i], labels.values[j]):
            raise ValueError(
                f"{where[0].upper() + where[1:]} has two different labels for {pd.Timestamp(labels.times[i])}. Keep "
                f"one row a time (for example the largest flare)."
            )
    dropped = labels.dropped | ({"label row repeated": len(same)} if len(same) else {})
    rows = np.delete(rows, same + 1)
    paths = None if labels.paths is None else labels.paths[rows]
    return replace(labels, times=labels.times[rows], values=labels.values[rows], paths=paths, dropped=dropped)


def _have_zone(column: pd.Series) -> bool:
    return bool(column.str.contains(r"\d[T ]\d.*(?:Z|[+-]\d{2}:?\d{2})$").any())


def _numbers(column: pd.Series, where: str) -> np.ndarray:
    """Cells as float64; empty ones are NaN."""
    numbers = pd.to_numeric(column.str.strip().replace("", "nan"), errors="coerce").to_numpy(float)
    wrong = np.isnan(numbers) & ~column.str.strip().str.lower().isin(["", "nan", "na"]).to_numpy()
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f'Row {row + 2} of {where} has "{column.iloc[row]}" in its column {column.name}, which is not a number. '
            f"Correct the row; for flare classes such as M2.5 set labels.transform: goes."
        )
    return numbers


def _log10(column: pd.Series, where: str) -> np.ndarray:
    numbers = _numbers(column, where)
    return np.log10(numbers, where=numbers > 0, out=np.full(len(numbers), np.nan))


def _goes(column: pd.Series, where: str) -> np.ndarray:
    """log10 of the flux in W/m^2; NaN for the entries of QUIET, which give no flux."""
    return np.array([_goes_flux(text, row, column.name, where) for row, text in enumerate(column)])


def _goes_flux(text: str, row: int, name: str, where: str) -> float:
    text = text.strip().upper()
    if text in QUIET:
        return np.nan
    try:
        return float(np.log10(GOES_CLASSES[text[0]] * float(text[1:] or 1)))
    except (KeyError, ValueError):
        raise ValueError(
            f'Row {row + 2} of {where} has "{text}" in its column {name}, which is not a GOES class. Write a letter of '
            f"A B C M X and a number, for example M2.5, or leave it empty where there is no flux."
        ) from None


_TRANSFORMS = {"none": _numbers, "log10": _log10, "goes": _goes}


# --------------------------------------------------------------------------------------------------------------------
# Joining
# --------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Matching:
    """Which frames and which label belong to a sample at time t, in minutes."""

    offsets_minutes: tuple[int, ...] = (-60, 0)
    lead_minutes: int = 0
    direction: str = "nearest"  # forward: the label at or after t + lead (causal); backward: at or before it
    tolerance_minutes: int = 30

    def window(self) -> tuple[pd.Timedelta, pd.Timedelta]:
        """First and last moment, relative to t, that a sample may know of."""
        late = self.lead_minutes + (self.tolerance_minutes if self.direction != "backward" else 0)
        return pd.Timedelta(min(self.offsets_minutes), "min"), pd.Timedelta(max(late, *self.offsets_minutes), "min")


def join(
    frame_times: np.ndarray, labels: Labels | FrameTarget, matching: Matching, between: Sequence[str] | None = None
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Join frames and labels.

    Args:
        frame_times: (N,) datetime64[s] of the complete frames.
        between: [start, end) of the sample times; None for all.

    Returns:
        One row a sample (`time`, and for labels `label`, its row there, and `label_time`), and why and how many frames
        were left out.
    """
    times = pd.Series(np.sort(frame_times).astype("datetime64[s]"))
    if between is not None:
        times = times[(times >= pd.Timestamp(between[0])) & (times < pd.Timestamp(between[1]))]
    offsets = list(matching.offsets_minutes)
    offsets += [labels.offset_minutes] if isinstance(labels, FrameTarget) else []
    complete = np.logical_and.reduce([(times + pd.Timedelta(o, "min")).isin(frame_times) for o in offsets])
    samples = pd.DataFrame({"time": times[complete]})
    dropped = {f"frame at {' or '.join(f'{o:+d}' for o in offsets if o)} min missing": int((~complete).sum())}
    if isinstance(labels, Labels):
        wanted = (samples["time"] + pd.Timedelta(matching.lead_minutes, "min")).astype("datetime64[s]")
        samples = pd.merge_asof(
            samples.assign(wanted=wanted),
            pd.DataFrame({"label_time": labels.times.astype("datetime64[s]"), "label": np.arange(len(labels))}),
            left_on="wanted",
            right_on="label_time",
            direction=matching.direction,
            tolerance=pd.Timedelta(matching.tolerance_minutes, "min"),
        )
        unmatched = samples["label"].isna()
        dropped[f"no label ({matching.direction}) within {matching.tolerance_minutes} min"] = int(unmatched.sum())
        samples = samples[~unmatched].astype({"label": int})[["time", "label", "label_time"]]
    return samples.reset_index(drop=True), {reason: count for reason, count in dropped.items() if count}


def check_splits(splits: dict[str, Sequence[str]], matching: Matching, guard_hours: float) -> None:
    """Raise ValueError when windows of two splits overlap or come closer than the guard: that leaks the answers."""
    before, after = matching.window()
    spans = sorted((pd.Timestamp(a) + before, pd.Timestamp(b) + after, name) for name, (a, b) in splits.items())
    for (_, end, first), (start, _, second) in zip(spans, spans[1:], strict=False):
        gap = (start - end).total_seconds() / 3600
        if gap < max(guard_hours, 0):
            how = f"overlap by {-gap:.1f} h" if gap < 0 else f"are {gap:.1f} h apart"
            raise ValueError(
                f"The windows of split.{first} and split.{second} {how}, but split.guard_hours asks for "
                f"{guard_hours:g} h between them. A window reaches from the first input frame "
                f"({before.total_seconds() / 3600:+.1f} h) to the latest possible label "
                f"({after.total_seconds() / 3600:+.1f} h). End split.{first} earlier, or begin split.{second} later."
            )


# --------------------------------------------------------------------------------------------------------------------
# The dataset
# --------------------------------------------------------------------------------------------------------------------
class SolarDataset(Dataset):
    """Samples of a frame store with their labels.

    An item is a dict: `ts` (C, T, H, W) float32 normalised, channels as in `store.channels`, oldest frame first;
    `time_delta_input` (T,) hours relative to the sample; `target` (K,) in label units after the transform, or (C, H, W)
    (masks: 0 to 1; frames: normalised); `timestamp` ISO text.

    Args:
        store: an opened store; its channels are the input.
        labels: what to predict.
        scalers: constants of the channels (None: the released ones).
        matching: which frames and label make a sample.
        between: [start, end) of the sample times.
        max_samples: take the first so many of one seeded permutation, so that smaller subsets lie within larger ones.
        seed: of the permutation and of the augmentation, which also depends on the epoch (`set_epoch`) and the sample
            alone, so that it is the same with any number of workers, and in a training that was interrupted.
        augment: names of `AUGMENTATIONS`, each applied to every second sample at random.

    Raises:
        ValueError: no sample is left, or an augmentation is not allowed for a channel or for several frames.
    """

    def __init__(
        self,
        store: FrameStore,
        labels: Labels | FrameTarget,
        scalers: dict[str, Scaler] | None = None,
        matching: Matching | None = None,
        between: Sequence[str] | None = None,
        max_samples: int | None = None,
        seed: int = 0,
        augment: Sequence[str] = (),
    ) -> None:
        self.store, self.labels, self.matching = store, labels, matching or Matching()
        self.samples, self.dropped = join(store.times, labels, self.matching, between)
        self.found = len(self.samples)
        if not self.found:
            raise ValueError(self._why_empty(between))
        if max_samples is not None:
            chosen = np.random.default_rng(seed).permutation(self.found)[:max_samples]
            self.samples = self.samples.iloc[np.sort(chosen)].reset_index(drop=True)
        self.augment, self._seed, self._epoch = tuple(augment), seed, 0
        self._masks: dict[str, Tensor] | None = None
        scalers = scalers or load_scalers()
        self._inputs = _Planes(store, store.channels, scalers)
        self._outputs = _Planes(store, labels.channels, scalers) if isinstance(labels, FrameTarget) else None
        self._target_scaler = stack_scalers(scalers, labels.channels) if isinstance(labels, FrameTarget) else None
        check_augmentation(self.augment, store.channels, self.matching.offsets_minutes, labels)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        time = self.samples["time"].iloc[index]
        offsets = self.matching.offsets_minutes
        ts = self._inputs.read([time + pd.Timedelta(o, "min") for o in offsets])  # codes
        target = self._read_target(index)
        for name in self._draw(index):
            ts = self._inputs.turn(ts, name)
            if self._outputs is not None:
                target = self._outputs.turn(target, name)
            elif target.ndim == 3:
                target = target.flip(FLIPS[name])
        return {
            "ts": self._inputs.normalise(ts),
            "time_delta_input": torch.tensor([o / 60 for o in offsets], dtype=torch.float32),
            "target": self._finished(target),
            "timestamp": time.isoformat(),
        }

    def target(self, index: int) -> Tensor:
        """The target of one sample without its input and never augmented: (K,) or (C, H, W)."""
        return self._finished(self._read_target(index))

    def _read_target(self, index: int) -> Tensor | list[list[Tensor]]:
        """Numbers (K,), a mask (1, H, W), or channels as the codes of the store."""
        if self._outputs is not None:
            time = self.samples["time"].iloc[index]
            return self._outputs.read([time + pd.Timedelta(self.labels.offset_minutes, "min")])
        row = self.samples["label"].iloc[index]
        if self.labels.paths is None:
            return torch.as_tensor(self.labels.values[row], dtype=torch.float32)
        path = self.labels.paths[row]
        if self._masks is not None and path in self._masks:
            return self._masks[path]
        mask = read_mask(path, self.labels.variable, self.store.side // self.labels.pooling)
        if self._masks is not None:
            self._masks[path] = mask
        return mask

    def _finished(self, target: Tensor | list[list[Tensor]]) -> Tensor:
        """Channels of frames normalised and pooled; everything else as it is."""
        if self._outputs is None:
            return target
        target = self._outputs.normalise(target)[:, 0]  # (C, 1, H, W) -> (C, H, W)
        if self.labels.pooling == 1:
            return target
        pooled = avg_pool2d(denormalise(target, self._target_scaler), self.labels.pooling)
        return normalise(pooled, self._target_scaler)  # (C, H / pooling, W / pooling)

    def set_epoch(self, epoch: int) -> None:
        """Draw the augmentations of this epoch from now on; Accelerate's loaders call it."""
        self._epoch = epoch

    def _draw(self, index: int) -> list[str]:
        if not self.augment:
            return []
        drawn = np.random.default_rng((self._seed, self._epoch, index)).random(len(self.augment)) < 0.5
        return [name for name, yes in zip(self.augment, drawn, strict=True) if yes]

    @property
    def times_needed(self) -> np.ndarray:
        """Times of all frames that the samples read, (N,) datetime64[s]."""
        offsets = [*self.matching.offsets_minutes]
        offsets += [self.labels.offset_minutes] if isinstance(self.labels, FrameTarget) else []
        return np.unique([self.samples["time"].to_numpy() + np.timedelta64(o, "m") for o in offsets])

    @property
    def targets(self) -> Tensor | None:
        """All targets as (N, K) float32 in label units, or None for images."""
        if isinstance(self.labels, FrameTarget) or self.labels.paths is not None:
            return None
        return torch.as_tensor(self.labels.values[self.samples["label"]], dtype=torch.float32)

    def keep_masks(self) -> None:
        """Keep the mask files in memory once they are read."""
        self._masks = {}

    @property
    def report(self) -> str:
        """How many samples there are, and what was dropped and why."""
        subset = f" (a seeded subset of {self.found})" if len(self) < self.found else ""
        reasons = "; ".join(f"{count} without: {reason}" for reason, count in self.dropped.items())
        return f"{len(self)} samples{subset}" + (f"; dropped {reasons}" if reasons else "; nothing dropped")

    def _why_empty(self, between: Sequence[str] | None) -> str:
        span = f" from {between[0]} to {between[1]}" if between is not None else ""
        have = f"{self.store}"
        if isinstance(self.labels, Labels) and len(self.labels):
            have += f"; {len(self.labels)} labels from {self.labels.times[0]} to {self.labels.times[-1]}"
        why = "; ".join(f"{count} x {reason}" for reason, count in self.dropped.items()) or "no frame in this span"
        return (
            f"Not one sample is left{span} ({why}). There is: {have}. Build more frames (`make cache`), or correct "
            f"split, labels.lead_minutes, labels.tolerance_minutes or data.offsets_minutes in the config."
        )


class _Planes:
    """Some channels of a store: reading and turning their codes, which stay int16, and then normalising them."""

    def __init__(self, store: FrameStore, channels: Sequence[str], scalers: dict[str, Scaler]) -> None:
        self.store, self.channels = store, tuple(channels)
        if absent := [name for name in self.channels if name not in store.stored_channels]:
            raise ValueError(
                f"The target channels {', '.join(absent)} are not in {store.path}, which has "
                f"{', '.join(store.stored_channels)}. Choose another data.store and run `make cache`: a new store gets "
                f"the channels of data.channels and labels.target_channels."
            )
        self.select = [store.stored_channels.index(name) for name in self.channels]
        scaler = stack_scalers(scalers, self.channels, trailing=0)
        codings = [store.codings[name] for name in self.channels]
        steps, offsets = (np.array([getattr(c, field) for c in codings], np.float64) for field in ("step", "offset"))
        # z = (code * step + offset - mean) / spread in one multiply-add
        self.slope = (steps / (scaler.std + scaler.epsilon)).tolist()
        level = (offsets - scaler.mean) / (scaler.std + scaler.epsilon)
        self.level = torch.tensor(level, dtype=torch.float32)  # (C,); as float64 the addition below would be in float64

    def read(self, times: Sequence[pd.Timestamp]) -> list[list[Tensor]]:
        """Codes (H, W) int16 of every channel (outer list) at every time (inner list), not copied."""
        frames = [self.store.read_all(when) for when in times]  # each (all C, H, W)
        return [[frame[i] for frame in frames] for i in self.select]

    def turn(self, codes: list[list[Tensor]], name: str) -> list[list[Tensor]]:
        """Flip or rotate; where the physical value changes its sign, so does the code (there the offset is 0)."""
        signs = [AUGMENTATION_SIGNS[channel][name] for channel in self.channels]
        return [[sign * plane.flip(FLIPS[name]) for plane in row] for sign, row in zip(signs, codes, strict=True)]

    def normalise(self, codes: list[list[Tensor]]) -> Tensor:
        """(C, T, H, W) float32 normalised."""
        shape = (len(codes), len(codes[0]), *codes[0][0].shape)
        out = torch.from_numpy(np.empty(shape, np.float32))  # numpy asks for huge pages, torch does not: 3 x faster
        for c, t in np.ndindex(shape[:2]):
            torch.add(self.level[c], codes[c][t], alpha=self.slope[c], out=out[c, t])
        return out


def check_augmentation(
    augment: Sequence[str], channels: Sequence[str], offsets: Sequence[int], labels: Labels | FrameTarget
) -> None:
    """Raise ValueError for an augmentation that would make an impossible Sun."""
    used, moments = list(channels), set(offsets)
    if isinstance(labels, FrameTarget):
        used, moments = [*used, *labels.channels], moments | {labels.offset_minutes}
    for name in augment:
        if forbidden := [channel for channel in dict.fromkeys(used) if AUGMENTATION_SIGNS[channel][name] is None]:
            raise ValueError(
                f"training.augment: {name} is not allowed with {', '.join(forbidden)}, as it would make the Sun rotate "
                f"backwards in the Doppler image. Leave it out of data.channels, or use flip_ud alone."
            )
        if len(moments) > 1 and name != "flip_ud":
            raise ValueError(
                f"training.augment: {name} is not allowed with frames at several times ({sorted(moments)} min), as the "
                f"Sun would rotate backwards from one to the next. Use one frame, or flip_ud alone."
            )


def read_mask(path: str, variable: str, side: int) -> Tensor:
    """Read an image target, (1, side, side) float32.

    A larger one is averaged down to `side`; if it holds only 0 and 1, so does the result (1 from one half up).

    Raises:
        FrameError: the file or variable cannot be used; the message names the file.
    """
    try:
        with open_netcdf(path) as file:
            if variable not in file:
                raise FrameError(f"it has no variable {variable} (it has {', '.join(file) or 'none'})")
            mask = torch.from_numpy(file[variable][()].astype(np.float32))
        size = mask.shape[-1]
        if mask.ndim != 2 or mask.shape[0] != size or size % side:
            hint = f"; labels.pooling {side // size} times as large would suit it" if side % size == 0 else ""
            raise FrameError(
                f"{variable} has the shape {tuple(mask.shape)}, which does not fit {side} x {side} pixels{hint}"
            )
        if not mask.isfinite().all():
            raise FrameError(f"{variable} has pixels that are not numbers (NaN)")
    except FrameError as error:
        raise FrameError(
            f"The image label {path} cannot be used: {error}. See labels.path and labels.variable."
        ) from None
    if size > side:
        binary = bool(((mask == 0) | (mask == 1)).all())
        mask = avg_pool2d(mask[None, None], size // side)[0, 0]
        mask = (mask >= 0.5).float() if binary else mask
    return mask[None]


# --------------------------------------------------------------------------------------------------------------------
# Loaders
# --------------------------------------------------------------------------------------------------------------------
@dataclass
class Loaders:
    """Batches of the three splits, and what is known of the targets from the training split alone.

    Attributes:
        train, val, test: DataLoaders; training in a seeded random order, the others in the order of time.
        target_mean: (K,) float32 mean of the training targets in label units; of images their mean image (C, H, W).
        target_std: (K,) float32 deviation in label units; 1 for image targets.
        target_span: largest minus smallest value of the training targets.
        report: what was used and what was dropped, to print.
    """

    train: DataLoader
    val: DataLoader
    test: DataLoader
    target_mean: Tensor
    target_std: Tensor
    report: str
    target_span: float = 1.0

    @property
    def sizes(self) -> dict[str, int]:
        """Number of samples of each split."""
        return {name: len(getattr(self, name).dataset) for name in ("train", "val", "test")}

    @property
    def scale(self) -> dict[str, list[float]]:
        """What turns the outputs of a trained model into label units, as plain numbers to save with it."""
        if self.target_mean.ndim == 1:
            return {"target_mean": self.target_mean.tolist(), "target_std": self.target_std.tolist()}
        return {"target_mean": [self.target_mean.mean().item()]}

    def targets(self) -> dict[str, pd.DataFrame]:
        """The targets of each split in label units, one row a sample (indexed by its time), one column an output.

        Of image targets, the mean over the pixels of each channel, of at most `IMAGE_STATISTICS` samples a split.
        """
        tables = {}
        for name in self.sizes:
            data = getattr(self, name).dataset
            values, rows = data.targets, np.arange(len(data))
            if values is None:
                rows = _evenly_spaced(data)
                values = torch.stack([data.target(row).mean((1, 2)) for row in rows])
            tables[name] = pd.DataFrame(values.numpy(), data.samples["time"].iloc[rows])
        return tables


def _evenly_spaced(data: SolarDataset) -> np.ndarray:
    return np.unique(np.linspace(0, len(data) - 1, IMAGE_STATISTICS).round().astype(int))


def _target_statistics(data: SolarDataset, kind: str) -> dict[str, Tensor | float]:
    """Mean, deviation and span of the training targets, as `Loaders` has them."""
    targets = data.targets
    if targets is None:
        images = torch.stack([data.target(row) for row in _evenly_spaced(data)])  # (N, C, H, W)
        if kind == "mask" and not 0 <= images.min() <= images.max() <= 1:
            raise ValueError(
                f"The masks of the training split hold values from {images.min():g} to {images.max():g}, but a mask is "
                "0 outside and 1 inside. Set labels.kind: image to learn the values themselves."
            )
        return {
            "target_mean": images.mean(0),
            "target_std": torch.ones(1),
            "target_span": (images.max() - images.min()).item(),
        }
    std = targets.std(0, correction=0)
    span = (targets.max() - targets.min()).item()
    return {"target_mean": targets.mean(0), "target_std": torch.where(std > 0, std, 1.0), "target_span": span}


def make_loaders(cfg: Config) -> Loaders:
    """Join the store and the labels of the configuration and make loaders for train, validation and test.

    Raises:
        FileNotFoundError: no store yet (`make cache`), or no label file.
        ValueError: splits too close, a store of another kind, unusable labels, or an empty split.
    """
    matching, splits = matching_of(cfg), {name: getattr(cfg.split, name) for name in ("train", "val", "test")}
    labels = labels_of(cfg)
    check_splits(splits, _reach(matching, labels), cfg.split.guard_hours)
    scalers = load_scalers(resolve(cfg, cfg.data.scalers))
    store = open_store(store_path(cfg), cfg.data.channels, cfg.data.pooling, cfg.data.native_size, scalers)
    limits = {"train": cfg.training.max_train_samples, "val": cfg.training.max_val_samples, "test": None}
    sets = {
        name: SolarDataset(
            store,
            labels,
            scalers,
            matching,
            between,
            limits[name],
            cfg.seed,
            augment=cfg.training.augment if name == "train" else (),
        )
        for name, between in splits.items()
    }
    in_memory = _keep_in_memory(store, sets, cfg.data.memory_cache_gb)
    workers = 0 if in_memory else cfg.training.loader_workers
    loaders = {name: _loader(data, cfg, workers, shuffle=name == "train") for name, data in sets.items()}
    lines = [f"{name}: {data.report}" for name, data in sets.items()]
    if isinstance(labels, Labels):
        used = np.unique(np.concatenate([data.samples["label"] for data in sets.values()]))
        lines.append(f"labels: {len(used)} of {len(labels)} belong to a sample")
        lines += [f"labels: {count} x {reason}" for reason, count in labels.dropped.items()] + labels.notes
    lines.append(f"frames {'kept in memory' if in_memory else f'read from {store.path}, {workers} loader workers'}")
    return Loaders(**loaders, **_target_statistics(sets["train"], cfg.labels.kind), report="\n".join(lines))


def matching_of(cfg: Config) -> Matching:
    """The matching that the configuration asks for."""
    offsets, labels = tuple(cfg.data.offsets_minutes), cfg.labels
    return Matching(offsets, labels.lead_minutes, labels.direction, labels.tolerance_minutes)


def labels_of(cfg: Config) -> Labels | FrameTarget:
    """The labels that the configuration asks for: numbers, masks, or channels of the frames."""
    labels = cfg.labels
    if labels.kind == "image" and labels.target_channels:
        return FrameTarget(tuple(labels.target_channels), labels.target_offset_minutes, labels.pooling)
    variable = labels.variable if labels.kind != "scalar" else None
    path = resolve(cfg, labels.path)
    return load_labels(path, labels.time_column, labels.value_columns, labels.transform, variable, labels.pooling)


def _reach(matching: Matching, labels: Labels | FrameTarget) -> Matching:
    """For frames as targets the window ends at their offset, not at a label."""
    if isinstance(labels, Labels):
        return matching
    return Matching(matching.offsets_minutes, max(labels.offset_minutes, 0), "backward", 0)


def _keep_in_memory(store: FrameStore, sets: dict[str, SolarDataset], limit_gb: float) -> bool:
    """Load all frames that the samples read if they fit; say whether."""
    times = np.unique(np.concatenate([data.times_needed for data in sets.values()]))
    masks = sum(len(data) for data in sets.values() if data.targets is None) * store.side**2 * 4
    if len(times) * store.frame_bytes + masks > limit_gb * GB:
        return False
    store.load(times)
    for data in sets.values():
        data.keep_masks()
    return True


def _loader(data: SolarDataset, cfg: Config, workers: int, shuffle: bool) -> DataLoader:
    return DataLoader(
        data,
        batch_size=cfg.training.batch_size,
        shuffle=shuffle,
        generator=torch.Generator().manual_seed(cfg.seed),
        num_workers=workers,
        # not fork: a forked process inherits CUDA and the threads of zarr in a state that it cannot use
        multiprocessing_context=multiprocessing.get_context("forkserver") if workers else None,
        persistent_workers=False,  # Accelerate wraps the loaders anew at each pass: workers that stay would pile up
        pin_memory=torch.cuda.is_available(),
    )
