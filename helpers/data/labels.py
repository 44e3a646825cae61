"""Labels: reading them, and planning which samples there are, in which split, from which frames.

Labels decide. A label at time L makes a sample at the frame time t nearest to L - lead; the sample reads the frames at
t + offsets. What finds no partner is dropped and counted. A plan needs no frame: it can be made before any is there.
"""

import csv
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

from helpers.channels import GOES_CLASSES
from helpers.config import NETCDF, SPLITS, Config, periods_of
from helpers.data.archive import Archive, FrameError, open_netcdf, parse_times, read_times, read_values, refuse
from helpers.shared import download

QUIET = ("FQ", "A0", "A0.0", "NONE")  # no flare, hence no flux to take a logarithm of
EMPTY = ("", "NAN", "NA")
LARGEST_NUMBER = float(np.finfo(np.float32).max)
# What stands for no value in the files of OMNI (runs of nines), CDAWeb and NetCDF.
KNOWN_FILLS = [float(f"{'9' * n}.{'9' * m}") for n in range(1, 9) for m in range(4) if 3 < n + m < 8]
KNOWN_FILLS += [-999, -999.9, -9999, -9999.9, -99999, -99999.9, -32768, -(2.0**31), -(2.0**63), 9.969209968386869e36]
KNOWN_FILLS += [sign * 10.0**power for sign in (-1, 1) for power in (20, 30, 31, 32, 38)] + [np.inf, -np.inf]
SPLIT_NAMES = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLIT_NAMES |= dict.fromkeys(("val", "valid", "validation"), "val")
ANY_TIME = ("1900-01-01", "2100-01-01")
GOLDEN = 0.6180339887498949  # its multiples, modulo 1, lie evenly in [0, 1) however many are taken


# ---- Reading
@dataclass(frozen=True)
class Labels:
    """Labels at times: numbers, or the paths of mask files."""

    times: np.ndarray  # (N,) datetime64[s] in UTC, sorted, each once
    values: np.ndarray  # (N, K) float64 in label units after the transform; (N, 0) for masks
    paths: np.ndarray | None = None  # (N,) mask files; None for numbers
    rules: Any = None  # the section `labels` of the configuration
    dropped: dict[str, int] = field(default_factory=dict)  # why, and how many rows of the file were left out
    splits: np.ndarray | None = None  # (N,) train, val or test where the labels bring their own splits

    def __len__(self) -> int:
        return len(self.times)


@dataclass(frozen=True)
class FrameTarget:
    """Targets taken from the frames themselves: these channels at sample time + offset, normalised."""

    channels: tuple[str, ...]
    offset_minutes: int = 0
    reduce: int = 1  # side of the squares of pixels that are averaged, in physical values


def labels_of(cfg: Config) -> Labels | FrameTarget:
    """The labels that the configuration asks for: numbers, masks, or channels of the frames."""
    own = cfg.labels
    if own.kind == "image" and own.target_channels:
        return FrameTarget(tuple(own.target_channels), own.target_offset_minutes, own.reduce)
    tables, dropped = [], Counter()
    for split, given in own.path.items() if isinstance(own.path, dict) else [("", own.path)]:
        for address in [given] if isinstance(given, str) else given:
            with _local_file(address, cfg) as path:
                table = read_table(path, own, dropped, address, cfg.split.column)
            tables.append(table.assign(split=split) if split else table)
    table, grid = pd.concat(tables, ignore_index=True), sample_grid(cfg) if own.window_hours else None
    return _labels(table, own, dropped, f"The label file {own.path}", grid)


def load_labels(
    path: str | Path,
    time_column: str | Sequence[str],
    value_columns: Sequence[str],
    transform: str = "none",
    variable: str | None = None,
    reduce: int = 1,
    **others: Any,
) -> Labels:
    """Read labels from one file: a CSV with one row a time, or a NetCDF or HDF5 file with times and vectors.

    The arguments are keys of the section `labels` in config.yaml, where each is explained; `others` are more of them,
    such as fill_values. In a NetCDF file the columns are variables, of values (N,) or (N, K). Rows without a usable
    value are counted in `dropped`. A ValueError names the column, or the row, that cannot be used.
    """
    more = dict(kind="mask" if variable else "scalar", fill_values=(), zero="drop", unit=None, reader=None)
    more |= dict(mask_reduce="majority", event_at=None, when_none=None)
    if unknown := set(others) - set(more):
        raise TypeError(f"load_labels knows no {', '.join(unknown)}; it knows {', '.join(more)}.")
    own = dict(time_column=time_column, value_columns=value_columns, transform=transform, variable=variable)
    rules = SimpleNamespace(reduce=reduce, window_hours=None, aggregate="max", **own, **more | others)
    dropped = Counter()
    return _labels(read_table(Path(path), rules, dropped), rules, dropped, f"The label file {path}")


@contextmanager
def _local_file(address: str, cfg: Config) -> Iterator[Path]:
    """A label file on this disk: from the Hugging Face hub (kept in the shared cache), s3://, or a path."""
    if address.startswith("hf://"):
        yield download(address, cfg.shared, cfg.paths.reserve_gb, "labels.path")
    elif "://" in address:
        try:
            with Archive("s3://", None, cfg.data.anonymous, cfg.data.endpoint_url).local_copy(address) as path:
                yield path
        except FrameError as error:
            raise FileNotFoundError(f"The label file {address}: {error}. Correct labels.path in the config.") from None
    else:
        yield cfg.shared.to_read(address)


def read_table(
    path: Path, rules: Any, dropped: Counter[str], address: str | None = None, split_column: str | None = None
) -> pd.DataFrame:
    """One label file, a row a label: `time`, `split`, `path` of masks; numbers, `column NAME`, in the unit of the file.

    `rules` are the section `labels` of the configuration; what is left out is counted in `dropped`. Paths of masks are
    relative to the `address` from which the file came.
    """
    address = str(address or path)
    where = f"the label file {address}"
    if Path(address).suffix.lower() in NETCDF:
        return _without_fills(_read_netcdf(path, rules, where), rules, where, dropped)
    cells = _read_csv(path, address)
    if "present" in cells:
        absent = cells["present"].str.lower().isin(["0", "0.0", "false"])
        dropped["label not present"] += int(absent.sum())
        cells = cells[~absent]
    times = [rules.time_column] if isinstance(rules.time_column, str) else list(rules.time_column)
    columns = []
    if rules.kind in ("scalar", "event"):
        for name in rules.value_columns:
            columns += [found for found in cells if fnmatchcase(found, name) and found not in columns] or [name]
    else:
        columns = [name for name in ("path", "file_path") if name in cells][:1] or ([] if rules.reader else ["path"])
    for name in (*times, *columns, *filter(None, [split_column])):
        if (found := list(cells).count(name)) != 1:
            raise ValueError(
                f"The label file {address} has {found or 'no'} column {name}; it has {', '.join(cells)}. Correct "
                f"labels.time_column, labels.value_columns or split.column in the config."
            )
    when = cells[times[0]].str.cat([cells[name] for name in times[1:]], sep=" ").rename(" and ".join(times))
    when = when.mask((cells[times] == "").any(axis=1), "")  # a date alone is no midnight where the time of day lacks
    table = pd.DataFrame({"time": parse_times(when, where), "split": ""})
    if split_column:
        table["split"] = (split := cells[split_column].str.lower()).map(SPLIT_NAMES)
        wrong = (table["split"].isna() & (split != "")).to_numpy()
        refuse(wrong, cells[split_column], where, "which is no split. Write train, val or test, or leave it empty.")
    if rules.kind not in ("scalar", "event"):
        folder = address.rpartition("/")[0] if "://" in address else path.parent
        names = cells[columns[0]] if columns else table["time"].astype(str)
        return table.assign(path=[os.path.join(folder, name) if name and columns else name for name in names])
    # FQ says "no event"; as a number it has no logarithm, unless labels.when_none gives it a value
    as_event = rules.kind == "event" and not rules.window_hours
    quiet = 0.0 if as_event else _setting("when_none", rules)
    values = np.column_stack([_numbers(cells[name], where, rules.transform, quiet) for name in columns])
    table = pd.concat([table, pd.DataFrame(values, cells.index, [f"column {name}" for name in columns])], axis=1)
    return _without_fills(table, rules, where, dropped)


def _read_csv(path: Path, address: str) -> pd.DataFrame:
    """All cells as text, stripped; commas at the end of rows are no further columns, empty lines no rows."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            names, *rows = ([cell.strip() for cell in row] for row in csv.reader(file))
        for number, row in enumerate(rows, 2):
            if row and (len(row) < len(names) or any(row[len(names) :])):
                raise ValueError(f"row {number} has {len(row)} cells, and the header {len(names)}")
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no label file {address}. Correct labels.path in the config.") from None
    except (ValueError, csv.Error) as error:
        raise ValueError(
            f"The label file {address} cannot be read as a table ({error}). Write a CSV in UTF-8 with a header and one "
            f"row a time; other kinds of file end in {', '.join(NETCDF)}."
        ) from None
    kept = {number: row[: len(names)] for number, row in enumerate(rows) if row}
    return pd.DataFrame(list(kept.values()), list(kept), names, dtype=str)


def _read_netcdf(path: Path, rules: Any, where: str) -> pd.DataFrame:
    """Times and vectors of a NetCDF or HDF5 file, of all splits if it has train_time and the like."""
    tables = []
    try:
        with open_netcdf(path) as file:
            splits = [split for split in SPLITS if f"{split}_{rules.time_column}" in file]
            for split in splits or [""]:
                prefix = f"{split}_" if splits else ""
                times = read_times(file, f"{prefix}{rules.time_column}")
                table = {"time": times, "split": split}
                for name in rules.value_columns:
                    values = read_values(file, f"{prefix}{name}", rules.unit).astype(float)  # (N,) or (N, K)
                    if values.ndim not in (1, 2) or len(values) != len(times):
                        shape = " x ".join(map(str, values.shape))
                        raise FrameError(f"{prefix}{name} has {shape} values for {len(times)} times")
                    for k, column in enumerate(values.reshape(len(times), -1).T):
                        table[f"column {name}[{k}]" if values.ndim == 2 else f"column {name}"] = column
                tables.append(pd.DataFrame(table, np.arange(len(times)) - 1))  # the first row is 1: there is no header
    except FrameError as error:
        keys = "labels.path, labels.time_column, labels.value_columns and labels.unit"
        raise ValueError(f"T{where[1:]} cannot be used: {error}. See {keys} in the config.") from None
    return pd.concat(tables)


def _without_fills(table: pd.DataFrame, rules: Any, where: str, dropped: Counter[str]) -> pd.DataFrame:
    """The rows without a fill value that the configuration names; any other well-known one is a ValueError."""
    numbers = table.drop(columns=["time", "split"])
    values = numbers.to_numpy(np.float32)
    filled = np.isin(values, np.float32(rules.fill_values)).any(axis=1)
    dropped["label is a fill value"] += int(filled.sum())
    for row, column in np.argwhere(np.isin(values, np.float32(KNOWN_FILLS)) & ~filled[:, None])[:1]:
        raise ValueError(
            f"Row {table.index[row] + 2} of {where} has {values[row, column]:.7g} in its {numbers.columns[column]}, "
            f"which usually stands for no value. Name it in labels.fill_values to leave such rows out."
        )
    return table[~filled]


def _labels(
    table: pd.DataFrame, rules: Any, dropped: Counter[str], where: str, grid: np.ndarray | None = None
) -> Labels:
    """Labels of a table (`read_table`), transformed, sorted, each time once; those of a list of events at `grid`."""
    yes_or_no, reason = rules.kind == "event" or rules.aggregate == "any", "empty"
    columns = [name for name in table if name.startswith("column ")]
    values = table[columns].to_numpy(float)  # (N, K)
    if yes_or_no and (rules.window_hours or rules.event_at is not None):
        least = np.nan_to_num(_setting("event_at", rules), nan=-np.inf)
        values = np.where(np.isnan(values), np.nan, values >= least)
    elif yes_or_no and not np.isin(values[np.isfinite(values)], (0, 1)).all():
        raise ValueError(
            f"{where} holds other numbers than 0 and 1 in {', '.join(rules.value_columns)}. Set labels.event_at to "
            f"the least that is an event, or labels.kind: scalar."
        )
    elif rules.kind == "scalar" and rules.transform != "none":
        if rules.zero == "floor":
            smallest = np.where(values > 0, values, np.inf).min(axis=0, initial=np.inf)
            values = np.where(values == 0, smallest, values)
        values = np.log10(values, where=values > 0, out=np.full(values.shape, np.nan))
        reason = "empty, quiet or not positive, so without a logarithm"
    table[columns] = values
    if rules.window_hours:
        none = 0.0
        if not yes_or_no:
            quiet = _setting("when_none", rules)
            none = np.nan_to_num(np.log10(quiet) if rules.transform != "none" else quiet, nan=-np.inf)
        table = strongest_events(table, grid, rules.window_hours, none, dropped)
    usable = np.isfinite(table[columns]).all(axis=1) if columns else table["path"] != ""
    of_none = table["split"].isna()
    once = table[usable & ~of_none].drop_duplicates().sort_values("time", kind="stable")
    if (twice := once["time"].duplicated()).any():
        raise ValueError(
            f"{where} has two different labels for {once['time'][twice].iloc[0]}, or has it in two splits. Keep one "
            f"row a time, for example the largest flare; for a list of events set labels.window_hours."
        )
    dropped |= {f"label {reason}": int((~usable).sum()), "label of no split": int((usable & of_none).sum())}
    dropped["label row repeated"] += int((usable & ~of_none).sum()) - len(once)
    return Labels(
        once["time"].to_numpy("datetime64[s]"),
        once[columns].to_numpy(float),
        None if columns else once["path"].to_numpy(str),
        rules,
        +dropped,  # without zeros
        once["split"].to_numpy(str) if (once["split"] != "").any() else None,
    )


def _setting(key: str, rules: Any) -> float:
    """A value of the section `labels`, in the unit of the file; NaN of null."""
    given = getattr(rules, key)
    return _numbers(pd.Series(["" if given is None else str(given)], name=key), "the config", rules.transform)[0]


def _numbers(column: pd.Series, where: str, transform: str, quiet: float = np.nan) -> np.ndarray:
    """Cells as float64, NaN where empty; of GOES classes the flux in W/m^2, and of QUIET ones `quiet`."""
    cells = column.str.upper()
    without = cells.isin(EMPTY).to_numpy()
    if transform == "goes":
        parts = cells.str.extract(r"^([ABCMX])(\d+(?:\.\d*)?)$")
        numbers = parts[0].map(GOES_CLASSES).to_numpy(float) * parts[1].to_numpy(float)
        none = cells.isin(QUIET).to_numpy()
        numbers, usable = np.where(none, quiet, numbers), (numbers > 0) | none
        form = "no GOES class. Write a letter of A B C M X and a number, or leave it empty where there is no flux."
    else:
        numbers = pd.to_numeric(column, errors="coerce").to_numpy(float)
        usable = np.abs(numbers) <= LARGEST_NUMBER
        form = f"not a number below {LARGEST_NUMBER:.1e}; for flare classes such as M2.5 set labels.transform: goes."
    refuse(~usable & ~without, column, where, f"which is {form}")
    return np.where(without, np.nan, numbers)


def strongest_events(
    events: pd.DataFrame, times: np.ndarray, window_hours: Sequence[float], none: float, dropped: Counter[str]
) -> pd.DataFrame:
    """A row for each of the `times`: the largest value that starts in (t + first, t + last] hours, or `none`.

    A window that reaches beyond the first or the last event of the list is left out and counted, because nobody knows
    what happened there.
    """
    columns = list(events.columns.drop(["time", "split"]))
    dropped["event without a value"] += int(events[columns].isna().any(axis=1).sum())
    events = events.dropna(subset=columns).sort_values("time")
    starts, values = events["time"].to_numpy("datetime64[s]"), events[columns].to_numpy()
    begin, end = (times + np.timedelta64(round(3600 * hours), "s") for hours in window_hours)
    earliest, latest = starts[[0, -1]] if len(starts) else np.array(ANY_TIME[::-1], "datetime64[s]")
    known = (begin >= earliest) & (end <= latest)
    dropped["window beyond the list of events"] += int((~known).sum())
    first, last = (np.searchsorted(starts, edge, side="right") for edge in (begin, end))
    quiet = np.full(len(columns), none)
    found = np.array([values[a:b].max(axis=0) if b > a else quiet for a, b in zip(first, last, strict=True)])
    table = pd.DataFrame(found.reshape(-1, len(columns))[known], columns=columns)
    return table.assign(time=times[known], split="")


def num_outputs(cfg: Config) -> int:
    """Numbers, or channels of the image, to predict; a pattern or a variable with vectors is counted in the file."""
    own = cfg.labels
    if not own.numbers:
        return len(own.target_channels) or 1
    vectors = own.netcdf or any(set(name) & set("*?[") for name in own.value_columns)
    return labels_of(cfg).values.shape[1] if vectors else len(own.value_columns)


# ---- Planning
@dataclass(frozen=True)
class Plan:
    """The samples of a configuration; dictionaries of them are by split."""

    labels: Labels | FrameTarget
    offsets_minutes: tuple[int, ...]  # of the frames that a sample reads, relative to its time; the target's included
    # one row a sample in the order of time: `time`, and for labels `label`, its row there, and `label_time`
    samples: dict[str, pd.DataFrame]
    candidates: dict[str, int]  # samples that there would be if no frame lacked and there were no maximum
    dropped: dict[str, dict[str, int]]  # why, and how many candidates were left out
    unmatched: dict[str, int]  # why, and how many labels belong to no frame time

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
            line += f" (the first that are complete, of {self.candidates[name]} in a seeded order)" if subset else ""
            lines.append("; ".join([line, *(f"dropped {count} {why}" for why, count in dropped.items())]))
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
    a smaller subset lies within a larger one, and which frames are built already changes nothing. `usable` says which
    frames of these times, (N,) datetime64[s], can be had, (N,) bool; None: all.

    ValueError: unusable labels, or windows of two splits that are too close.
    """
    labels = labels_of(cfg) if labels is None else labels
    offsets, window, guard = set(cfg.data.offsets_minutes), sample_window(cfg), cfg.split.guard_hours
    if isinstance(labels, FrameTarget):
        offsets.add(labels.offset_minutes)
        table, unmatched, published = pd.DataFrame({"time": sample_grid(cfg)}), {}, None
    else:
        rules = cfg.labels.lead_minutes, cfg.labels.direction, cfg.labels.tolerance_minutes
        table, unmatched = match(labels, *rules, cfg.data.cadence_minutes)
        published = None if labels.splits is None else labels.splits[table["label"]]
    if published is None:
        for name in (name for name in SPLITS if not cfg.split.periods(name)):
            source = cfg.labels.path or f"Task {cfg.task}"
            raise ValueError(f"{source} brings no splits of its own: split.{name} in the config needs its period.")
        check_splits({name: getattr(cfg.split, name) for name in SPLITS}, window, guard)
    times, split = table["time"].to_numpy(), np.full(len(table), "", object)
    for name in SPLITS:
        for start, end in cfg.split.periods(name) or [ANY_TIME]:
            inside = (times >= np.datetime64(start, "s")) & (times < np.datetime64(end, "s"))
            split[inside if published is None else inside & (published == name)] = name
    table, times, split = table[split != ""], times[split != ""], split[split != ""]
    offsets = tuple(sorted(offsets))
    needed = times[:, None] + np.array(offsets, "timedelta64[m]")  # (N, T)
    complete = np.ones(len(times), bool)
    if usable:
        frames = np.unique(needed)
        complete = np.isin(needed, frames[usable(frames)]).all(axis=1)
    reach = (window[1] - window[0] + pd.Timedelta(guard, "h")).to_timedelta64()
    samples, candidates, dropped = {}, {}, {}
    for name in SPLITS:
        mine, others = split == name, np.append(times[split != name], np.datetime64(ANY_TIME[1], "s"))
        # only of published splits: `check_splits` refuses other ones
        near = others[np.searchsorted(others, times)] - times < reach
        rows, whole = table[mine & ~near], complete[mine & ~near]
        # only training may look at its labels, and runs of other seeds are judged on the same samples
        by_label = name == "train" and isinstance(labels, Labels)
        values = labels.values[rows["label"]] if by_label else np.zeros((len(rows), 0))
        order = spread_out(values, cfg.seed if name == "train" else 0)
        most = getattr(cfg.training, f"max_{name}_samples") or len(rows)
        last = np.searchsorted(whole[order].cumsum(), most)  # where in this order the maximum is reached
        looked_at = order[: last + 1]
        samples[name] = rows.iloc[np.sort(looked_at[whole[looked_at]])].reset_index(drop=True)
        candidates[name], reasons = int(mine.sum()), Counter()
        reasons[f"without a frame at {' or '.join(map(str, offsets))} min"] = int((~whole[looked_at]).sum())
        reach_into = f"whose window, with {guard:g} h of guard, reaches into that of a later split"
        reasons[reach_into] = int((mine & near).sum())
        dropped[name] = +reasons  # without zeros
    return Plan(labels, offsets, samples, candidates, dropped, unmatched)


def spread_out(values: np.ndarray, seed: int) -> np.ndarray:
    """A seeded order of candidates (N, K), sorted by time, of which each first part is spread over the whole time.

    Where the values are one column of 0 and 1, each first part holds both in the shares that they have altogether.
    """
    kinds = values[:, 0] if values.shape[1] == 1 and np.isin(values, (0, 1)).all() else np.zeros(len(values))
    number = pd.Series(kinds).groupby(kinds).cumcount().to_numpy()  # of each candidate among those of its kind
    return np.argsort((number * GOLDEN + np.random.default_rng(seed).random()) % 1, kind="stable")


def sample_grid(cfg: Config) -> np.ndarray:
    """Times in the splits at every multiple of data.every_minutes from midnight, (N,) datetime64[s], sorted."""
    every, periods = f"{cfg.data.every_minutes}min", [period for name in SPLITS for period in cfg.split.periods(name)]
    within = [pd.date_range(pd.Timestamp(a).ceil(every), b, freq=every, inclusive="left") for a, b in periods]
    return np.unique(np.concatenate(within or [[]]).astype("datetime64[s]"))


def match(
    labels: Labels, lead_minutes: int, direction: str, tolerance_minutes: int, cadence_minutes: int
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Give each label the frame time t, a multiple of the cadence, that is nearest to its own time minus the lead.

    The label may be `tolerance_minutes` from t + lead: `forward` after it (causal), `backward` before it, or `nearest`.

    Returns:
        One row a sample, in the order of time: `time`, `label` (its row in the labels), `label_time`; and why and how
        many labels have none.
    """
    wanted = labels.times.astype("datetime64[s]").astype(int) - 60 * lead_minutes
    step = 60 * cadence_minutes
    ahead = {"forward": 0, "nearest": step // 2, "backward": step - 1}[direction]
    frame = (wanted + ahead) // step * step
    table = pd.DataFrame({"time": frame.astype("datetime64[s]"), "label": range(len(labels))})
    table = table.assign(label_time=labels.times, off=np.abs(wanted - frame))
    near = table["off"] <= 60 * tolerance_minutes
    table = table[near].sort_values(["time", "off"], kind="stable")
    twice = table["time"].duplicated()
    none = f"no frame time ({direction}) within {tolerance_minutes} min"
    unmatched = Counter({none: int((~near).sum()), "another label is nearer to the same frame": int(twice.sum())})
    return table[~twice].drop(columns="off").reset_index(drop=True), +unmatched  # without zeros


def sample_window(cfg: Config) -> tuple[pd.Timedelta, pd.Timedelta]:
    """First and last moment, relative to the time of a sample, that it may know of."""
    own, minutes = cfg.labels, [0, *cfg.data.offsets_minutes]
    if own.kind == "image" and own.target_channels:
        minutes.append(own.target_offset_minutes)
    elif own.window_hours:
        minutes += [60 * hours for hours in own.window_hours]
    else:
        tolerance = own.tolerance_minutes if own.direction != "backward" else 0
        minutes.append(own.lead_minutes + tolerance + 60 * own.spans_hours)
    return pd.Timedelta(min(minutes), "min"), pd.Timedelta(max(minutes), "min")


def check_splits(
    splits: dict[str, Sequence[str] | Sequence[Sequence[str]]],
    window: tuple[pd.Timedelta, pd.Timedelta],
    guard_hours: float,
) -> None:
    """Raise ValueError when windows of two splits overlap or come closer than the guard: that leaks the answers."""
    periods = [(name, period) for name, given in splits.items() for period in periods_of(given)]
    spans = sorted((pd.Timestamp(a) + window[0], pd.Timestamp(b) + window[1], name) for name, (a, b) in periods)
    for (_, end, first), (start, _, second) in combinations(spans, 2):
        gap = (start - end).total_seconds() / 3600
        if first != second and gap < guard_hours:
            how = f"overlap by {-gap:.1f} h" if gap < 0 else f"are {gap:.1f} h apart"
            reach = [f"{moment.total_seconds() / 3600:+.1f} h" for moment in window]
            raise ValueError(
                f"The windows of split.{first} and split.{second} {how}, but split.guard_hours asks for "
                f"{guard_hours:g} h between them. A window reaches from the first input frame ({reach[0]}) to the "
                f"latest possible label ({reach[1]}). End split.{first} earlier, or begin split.{second} later."
            )
