"""Labels: reading them, joining them with frames, and keeping the splits apart.

A sample at time t reads the frames at t + offsets and the label of the time t + lead. What finds no partner is dropped
and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from helpers.channels import GOES_CLASSES
from helpers.config import Config
from helpers.data.archive import parse_times

QUIET = ("", "FQ", "A0", "A0.0", "NONE", "NAN")  # no flare, hence no flux to take a logarithm of


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
        reduce: whole factor by which the masks are smaller than the input.
        dropped: why and how many rows of the file were left out.
        notes: what was converted on the way.
    """

    times: np.ndarray
    values: np.ndarray
    paths: np.ndarray | None = None
    variable: str | None = None
    reduce: int = 1
    dropped: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

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
    labels = Labels(times, values, paths, variable, reduce, dropped)
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


def matching_of(cfg: Config) -> Matching:
    """The matching that the configuration asks for."""
    offsets, labels = tuple(cfg.data.offsets_minutes), cfg.labels
    return Matching(offsets, labels.lead_minutes, labels.direction, labels.tolerance_minutes)


def labels_of(cfg: Config) -> Labels | FrameTarget:
    """The labels that the configuration asks for: numbers, masks, or channels of the frames."""
    labels = cfg.labels
    if labels.kind == "image" and labels.target_channels:
        return FrameTarget(tuple(labels.target_channels), labels.target_offset_minutes, labels.reduce)
    variable = labels.variable if labels.kind != "scalar" else None
    path = cfg.shared.to_read(labels.path)
    return load_labels(path, labels.time_column, labels.value_columns, labels.transform, variable, labels.reduce)
