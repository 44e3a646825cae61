"""Labels: reading them, and planning which samples there are, in which split, from which frames.

Labels decide. A label at time L makes a sample at the frame time t nearest to L - lead; the sample reads the frames at
t + offsets. What finds no partner is dropped and counted. A plan needs no frame: it can be made before any is there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from helpers.channels import GOES_CLASSES
from helpers.config import Config
from helpers.data.archive import parse_times

QUIET = ("", "FQ", "A0", "A0.0", "NONE", "NAN")  # no flare, hence no flux to take a logarithm of
LARGEST_NUMBER = float(np.finfo(np.float32).max)
SPLITS = ("train", "val", "test")


# ---- Reading
@dataclass(frozen=True)
class Labels:
    """Labels at times: numbers, or the paths of mask files, and what was left out of the file.

    Attributes:
        times: (N,) datetime64[s] in UTC, sorted, each once.
        values: (N, K) float64 in label units after the transform; (N, 0) for masks.
        paths: (N,) mask files, or None for numbers.
        variable: the variable to read from the mask files.
        reduce: whole factor by which the masks are smaller than the input.
        dropped: why and how many rows of the file were left out.
    """

    times: np.ndarray
    values: np.ndarray
    paths: np.ndarray | None = None
    variable: str | None = None
    reduce: int = 1
    dropped: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.times)


@dataclass(frozen=True)
class FrameTarget:
    """Targets taken from the frames themselves: these channels at sample time + offset, normalised.

    With a `reduce` above 1 they are averaged over squares of so many pixels, in physical values.
    """

    channels: tuple[str, ...]
    offset_minutes: int = 0
    reduce: int = 1


def labels_of(cfg: Config) -> Labels | FrameTarget:
    """The labels that the configuration asks for: numbers, masks, or channels of the frames."""
    labels = cfg.labels
    if labels.kind == "image" and labels.target_channels:
        return FrameTarget(tuple(labels.target_channels), labels.target_offset_minutes, labels.reduce)
    variable = labels.variable if labels.kind != "scalar" else None
    path = cfg.shared.to_read(labels.path)
    return load_labels(path, labels.time_column, labels.value_columns, labels.transform, variable, labels.reduce)


def load_labels(
    path: str | Path,
    time_column: str,
    value_columns: Sequence[str],
    transform: str = "none",
    variable: str | None = None,
    reduce: int = 1,
) -> Labels:
    """Read labels from a CSV with one row a time.

    Args:
        value_columns: the columns to predict; with `variable` the files named in the column `path` are read instead.
        transform: none, log10, or goes (class strings such as M2.5 to log10 of the flux in W/m^2).
        variable: the variable of the mask files (relative paths start at the folder of the CSV).
        reduce: whole factor by which the masks are smaller than the input.

    Returns:
        The labels; rows without a usable value are counted in `dropped`; times are converted to UTC.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no CSV, a column is missing, a cell is neither a time nor a value, or one time has two
            different values.
    """
    path, where = Path(path), f"the label file {path}"
    table = _read_table(path)
    columns = ["path"] if variable else list(value_columns)
    if absent := [name for name in (time_column, *columns) if name not in table]:
        raise ValueError(
            f"The label file {path} has no column {', '.join(absent)}; it has {', '.join(table)}. Correct "
            f"labels.time_column or labels.value_columns in the config."
        )
    times = parse_times(table[time_column], where).to_numpy()
    if variable:
        paths, values = np.array([str(path.parent / name) for name in table["path"]]), np.empty((len(table), 0))
        usable = (table["path"].str.strip() != "").to_numpy()
    else:
        read = {"none": _numbers, "log10": _log10, "goes": _goes}[transform]
        paths, values = None, np.column_stack([read(table[name], where) for name in columns])
        usable = np.isfinite(values).all(axis=1)
    reason = "empty" if variable or transform == "none" else "empty, quiet or not positive, so without a logarithm"
    rows = pd.DataFrame(values).assign(path=paths, time=times)[usable]
    once = rows.drop_duplicates().sort_values("time", kind="stable")
    if (twice := once["time"].duplicated()).any():
        raise ValueError(
            f"The label file {path} has two different labels for {once['time'][twice].iloc[0]}. Keep one row a time, "
            f"for example the largest flare."
        )
    dropped = {f"label {reason}": int((~usable).sum()), "label row repeated": len(rows) - len(once)}
    dropped = {why: count for why, count in dropped.items() if count}
    rows = once.index.to_numpy()
    return Labels(times[rows], values[rows], paths[rows] if variable else None, variable, reduce, dropped)


def _read_table(path: Path) -> pd.DataFrame:
    """All cells as text; a comma at the end of every row is no further column."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pd.errors.ParserWarning)
            return pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no label file {path}. Correct labels.path in the config.") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(
            f"The label file {path} cannot be read as a table ({error}). Write a CSV in UTF-8 with a header and one "
            f"row a time."
        ) from None


def _numbers(column: pd.Series, where: str) -> np.ndarray:
    """Cells as float64; empty ones are NaN."""
    cells = column.str.strip()
    numbers = pd.to_numeric(cells.replace("", "nan"), errors="coerce").to_numpy(float)
    wrong = np.isnan(numbers) & ~cells.str.lower().isin(["", "nan", "na"]).to_numpy()
    wrong |= np.abs(numbers) > LARGEST_NUMBER
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f'Row {row + 2} of {where} has "{column.iloc[row]}" in its column {column.name}, which is not a number '
            f"below {LARGEST_NUMBER:.1e}. Correct the row; for flare classes such as M2.5 set labels.transform: goes."
        )
    return numbers


def _log10(column: pd.Series, where: str) -> np.ndarray:
    numbers = _numbers(column, where)
    return np.log10(numbers, where=numbers > 0, out=np.full(len(numbers), np.nan))


def _goes(column: pd.Series, where: str) -> np.ndarray:
    """log10 of the flux in W/m^2; NaN for the entries of QUIET, which give no flux."""
    cells = column.str.strip().str.upper()
    parts = cells.str.extract(r"^([ABCMX])(\d+(?:\.\d*)?)$")
    flux = parts[0].map(GOES_CLASSES).to_numpy(float) * parts[1].to_numpy(float)
    wrong = ~(flux > 0) & ~cells.isin(QUIET).to_numpy()
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f'Row {row + 2} of {where} has "{column.iloc[row]}" in its column {column.name}, which is no GOES class. '
            f"Write a letter of A B C M X and a number, for example M2.5, or leave it empty where there is no flux."
        )
    return np.log10(flux, where=flux > 0, out=np.full(len(flux), np.nan))


# ---- Planning
@dataclass(frozen=True)
class Plan:
    """The samples of a configuration, split by split.

    Attributes:
        labels: what is predicted.
        offsets_minutes: of the frames that a sample reads, relative to its time; the target frame included.
        samples: of each split, one row a sample in the order of time: `time`, and for labels `label`, its row there,
            and `label_time`.
        candidates: how many samples of each split there would be if no frame lacked and there were no maximum.
        dropped: of each split, why and how many candidates were left out.
        unmatched: why and how many labels belong to no frame time.
    """

    labels: Labels | FrameTarget
    offsets_minutes: tuple[int, ...]
    samples: dict[str, pd.DataFrame]
    candidates: dict[str, int]
    dropped: dict[str, dict[str, int]]
    unmatched: dict[str, int]

    @property
    def frames(self) -> np.ndarray:
        """Times of all frames that the samples read, (N,) datetime64[s], sorted."""
        return frame_times(pd.concat(self.samples.values())["time"], self.offsets_minutes)

    def __str__(self) -> str:
        lines = []
        for name, table in self.samples.items():
            dropped = self.dropped[name]
            subset = len(table) + sum(dropped.values()) < self.candidates[name]
            line = f"{name}: {len(table)} samples"
            line += f" (a seeded subset of at most {self.candidates[name]})" if subset else ""
            lines.append("; ".join([line, *(f"dropped {count} without {why}" for why, count in dropped.items())]))
        if isinstance(self.labels, Labels):
            used = sum(len(table) for table in self.samples.values())
            lines.append(f"labels: {used} of {len(self.labels)} belong to a sample")
            left_out = self.labels.dropped | self.unmatched
            lines += [f"labels: {count} x {reason}" for reason, count in left_out.items()]
        return "\n".join(lines)


def frame_times(times: pd.Series, offsets_minutes: Sequence[int]) -> np.ndarray:
    """Times of the frames of samples at `times`, each once and sorted, (N,) datetime64[s]."""
    times = times.to_numpy("datetime64[s]")
    return np.unique([times + np.timedelta64(minutes, "m") for minutes in offsets_minutes])


def plan_samples(
    cfg: Config, usable: Callable[[np.ndarray], np.ndarray] | None = None, labels: Labels | FrameTarget | None = None
) -> Plan:
    """Find the samples of a configuration: match labels and frame times, apply splits and the maxima of `training`.

    With a maximum, the candidates of a split are taken in one seeded order, and those that lack a frame are skipped. So
    a smaller subset lies within a larger one, and which frames are built already changes nothing.

    Args:
        usable: which frames of these times, (N,) datetime64[s], can be had, (N,) bool; None: all.
        labels: None for those of the configuration.

    Raises:
        FileNotFoundError: there is no label file.
        ValueError: unusable labels, or windows of two splits that are too close.
    """
    labels = labels_of(cfg) if labels is None else labels
    spans = {name: getattr(cfg.split, name) for name in SPLITS}
    check_splits(spans, sample_window(cfg), cfg.split.guard_hours)
    offsets, unmatched = list(cfg.data.offsets_minutes), {}
    if isinstance(labels, FrameTarget):
        offsets.append(labels.offset_minutes)
        every = f"{cfg.data.every_minutes}min"  # counted from midnight
        within = [
            pd.date_range(pd.Timestamp(a).ceil(every), b, freq=every, inclusive="left") for a, b in spans.values()
        ]
        table = pd.DataFrame({"time": np.concatenate(within).astype("datetime64[s]")})
    else:
        rules = cfg.labels.lead_minutes, cfg.labels.direction, cfg.labels.tolerance_minutes
        table, unmatched = match(labels, *rules, cfg.data.cadence_minutes)
    samples, candidates, dropped = {}, {}, {}
    offsets = tuple(sorted(set(offsets)))
    for name, (start, end) in spans.items():
        inside = table[(table["time"] >= pd.Timestamp(start)) & (table["time"] < pd.Timestamp(end))]
        complete = np.ones(len(inside), bool)
        if usable and len(inside):
            times = frame_times(inside["time"], offsets)
            there = times[usable(times)]
            for minutes in offsets:
                complete &= np.isin(inside["time"].to_numpy() + np.timedelta64(minutes, "m"), there)
        order = np.random.default_rng(cfg.seed).permutation(len(inside))
        most = getattr(cfg.training, f"max_{name}_samples") or len(inside)
        last = np.searchsorted(complete[order].cumsum(), most)  # where in this order the maximum is reached
        looked_at = order[: last + 1]
        samples[name] = inside.iloc[np.sort(looked_at[complete[looked_at]])].reset_index(drop=True)
        lacking = int((~complete[looked_at]).sum())
        dropped[name] = {f"a frame at {' or '.join(map(str, offsets))} min": lacking} if lacking else {}
        candidates[name] = len(inside)
    return Plan(labels, offsets, samples, candidates, dropped, unmatched)


def match(
    labels: Labels, lead_minutes: int, direction: str, tolerance_minutes: int, cadence_minutes: int
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Give each label the frame time t, a multiple of the cadence, that is nearest to its own time minus the lead.

    Args:
        direction: forward: the label is at or after t + lead (causal); backward: at or before it; nearest: either.
        tolerance_minutes: how far the label may be from t + lead.

    Returns:
        One row a sample, in the order of time: `time`, `label` (its row in the labels), `label_time`; and why and how
        many labels have none.
    """
    wanted = labels.times.astype("datetime64[s]").astype(int) - 60 * lead_minutes
    step = 60 * cadence_minutes
    ahead = {"forward": 0, "nearest": step // 2, "backward": step - 1}[direction]
    frame = (wanted + ahead) // step * step
    off = np.abs(wanted - frame)
    table = pd.DataFrame(
        {"time": frame.astype("datetime64[s]"), "label": np.arange(len(labels)), "label_time": labels.times}
    )
    near = off <= 60 * tolerance_minutes
    table = table.assign(off=off)[near].sort_values(["time", "off"], kind="stable")
    twice = table["time"].duplicated()
    unmatched = {
        f"no frame time ({direction}) within {tolerance_minutes} min": int((~near).sum()),
        "another label is nearer to the same frame": int(twice.sum()),
    }
    table = table[~twice].drop(columns="off").reset_index(drop=True)
    return table, {reason: count for reason, count in unmatched.items() if count}


def sample_window(cfg: Config) -> tuple[pd.Timedelta, pd.Timedelta]:
    """First and last moment, relative to the time of a sample, that it may know of."""
    offsets, labels = cfg.data.offsets_minutes, cfg.labels
    if labels.kind == "image" and labels.target_channels:
        late = labels.target_offset_minutes
    else:
        late = labels.lead_minutes + (labels.tolerance_minutes if labels.direction != "backward" else 0)
    return pd.Timedelta(min(offsets), "min"), pd.Timedelta(max(late, 0, *offsets), "min")


def check_splits(
    splits: dict[str, Sequence[str]], window: tuple[pd.Timedelta, pd.Timedelta], guard_hours: float
) -> None:
    """Raise ValueError when windows of two splits overlap or come closer than the guard: that leaks the answers."""
    before, after = window
    spans = sorted((pd.Timestamp(a) + before, pd.Timestamp(b) + after, name) for name, (a, b) in splits.items())
    for (_, end, first), (start, _, second) in zip(spans, spans[1:], strict=False):
        gap = (start - end).total_seconds() / 3600
        if gap < guard_hours:
            how = f"overlap by {-gap:.1f} h" if gap < 0 else f"are {gap:.1f} h apart"
            raise ValueError(
                f"The windows of split.{first} and split.{second} {how}, but split.guard_hours asks for "
                f"{guard_hours:g} h between them. A window reaches from the first input frame "
                f"({before.total_seconds() / 3600:+.1f} h) to the latest possible label "
                f"({after.total_seconds() / 3600:+.1f} h). End split.{first} earlier, or begin split.{second} later."
            )
