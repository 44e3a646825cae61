"""Samples of frames and labels, served in batches.

A sample at time t reads the frames at t + offsets and the label of the time t + lead; `helpers/data/labels.py` says
which samples there are.
"""

import hashlib
import math
import multiprocessing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torch.utils.data import DataLoader, Dataset

from helpers.channels import denormalise, normalise, stack_scalers
from helpers.config import SPLITS, Config, find_named
from helpers.data.archive import FrameError, open_netcdf, read_variable
from helpers.data.frames import FrameStore, open_store, store_path
from helpers.data.labels import FrameTarget, Labels, Plan, plan_samples
from helpers.shared import GB, download, free_space, memory

IMAGE_STATISTICS = 64  # evenly spaced samples from which the mean and span of image targets are taken


def read_mask(
    path: str, variable: str | None, side: int, how: str | None = "majority", reader: str | None = None
) -> Tensor:
    """Read an image target, (1, side, side) float32; a FrameError names the file that cannot be used.

    A mask, which holds 0 and 1 (or 255) alone, is reduced to `side` as `how` says: `majority` (1 from one half up),
    `any` (1 where one pixel is) or `mean` (the share of the pixels); one of shares from 0 to 1 is averaged. With None
    the image is no mask; its values are averaged, and stay what they are. `reader`, a `module:function`, returns the
    image (H, W) of `path`, row 0 the south; without one it is NetCDF or HDF5.
    """
    try:
        if reader:
            try:
                mask = torch.as_tensor(np.array(find_named(reader, {})(path), np.float32))
            except Exception as error:  # whatever a function of one's own raises
                raise FrameError(f"{reader} (labels.reader) raised {type(error).__name__}: {error}") from error
        else:
            with open_netcdf(path) as file:
                mask = torch.from_numpy(read_variable(file, variable))
        if mask.ndim != 2 or mask.shape[0] != mask.shape[1]:
            raise FrameError(f"it has the shape {tuple(mask.shape)}, expected a square")
        size = len(mask)
        if size % side:
            hint = f"; labels.reduce {side // size} times as large would suit it" if side % size == 0 else ""
            raise FrameError(f"it has the shape {tuple(mask.shape)}, which does not fit {side} x {side} pixels{hint}")
        if not mask.isfinite().all():
            raise FrameError("it has pixels that are not numbers (NaN)")
        top = 255 if mask.max() > 1 else 1
        binary = how is not None and bool(((mask == 0) | (mask == top)).all())
        mask = mask / top if binary else mask
        if how and not 0 <= mask.min() <= mask.max() <= 1:
            raise FrameError(
                f"it holds values from {mask.min():g} to {mask.max():g}, but a mask is 0 outside and 1 inside; set "
                f"labels.kind: image to learn the values themselves"
            )
    except FrameError as error:
        raise FrameError(f"The image label {path} cannot be used: {error}. See labels.path, labels.variable.") from None
    if size > side:
        mask = avg_pool2d(mask[None, None], size // side)[0, 0]
        if binary and how != "mean":
            mask = (mask >= 0.5 if how == "majority" else mask > 0).float()
    return mask[None]


class SolarDataset(Dataset):
    """Samples of a frame store with their labels.

    An item is a dict: `ts` (C, T, H, W) float32 normalised, channels as in `store.channels`, oldest frame first;
    `time_delta_input` (T,) hours relative to the sample; `target` (K,) in label units after the transform, or (C, H, W)
    (masks: 0 to 1; frames: normalised), none where `labels` is None; `timestamp` ISO text. `samples` has one row for
    each: `time`, and unless the target is a frame `label`, the row of its label.
    """

    def __init__(
        self,
        store: FrameStore,
        labels: Labels | FrameTarget | None,
        samples: pd.DataFrame,
        offsets_minutes: Sequence[int] = (-60, 0),
    ) -> None:
        self.store, self.labels, self.samples = store, labels, samples
        self.offsets_minutes = tuple(offsets_minutes)
        self.targets, self.paths = None, []  # (N, K) float32 in label units; N files of images
        if isinstance(labels, FrameTarget):
            self._target_frames = store.select(labels.channels)
        elif labels is not None and labels.paths is not None:
            self.paths = labels.paths[samples["label"]].tolist()
        elif labels is not None:
            self.targets = torch.as_tensor(labels.values[samples["label"]], dtype=torch.float32)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, row: int) -> dict[str, Tensor | str]:
        time = self.samples["time"].iloc[row]
        item = {
            "ts": self.store.read([time + pd.Timedelta(minutes, "min") for minutes in self.offsets_minutes]),
            "time_delta_input": torch.tensor(self.offsets_minutes, dtype=torch.float32) / 60,
            "timestamp": time.isoformat(),
        }
        return item if self.labels is None else {**item, "target": self.target(row)}

    def target(self, row: int) -> Tensor:
        """The target of one sample without its input: (K,) or (C, H, W)."""
        if self.targets is not None:
            return self.targets[row]
        if isinstance(self.labels, Labels):
            rules = self.labels.rules
            how = rules.mask_reduce if rules.kind == "mask" else None
            return read_mask(self.paths[row], rules.variable, self.store.side // rules.reduce, how, rules.reader)
        store, time = self._target_frames, self.samples["time"].iloc[row]
        image = store.read([time + pd.Timedelta(self.labels.offset_minutes, "min")])[:, 0]  # (C, 1, H, W) -> (C, H, W)
        if self.labels.reduce == 1:
            return image
        scaler = stack_scalers(store.scalers, store.channels)  # averaged in physical values
        return normalise(avg_pool2d(denormalise(image, scaler), self.labels.reduce), scaler)


@dataclass
class Loaders:
    """Batches of the three splits, and what is known of the targets from the training split alone."""

    train: DataLoader  # in a seeded random order
    val: DataLoader  # in the order of time
    test: DataLoader
    target_mean: Tensor  # (K,) float32 mean of the training targets in label units; of images the mean image (C, H, W)
    target_std: Tensor  # (K,) float32 deviation in label units; 1 for image targets
    report: str  # what was used and what was dropped, to print
    target_span: float = 1.0  # of images: the largest minus the smallest value of the training targets

    @property
    def sizes(self) -> dict[str, int]:
        """Number of samples of each split."""
        return {name: len(getattr(self, name).dataset) for name in SPLITS}

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


def make_datasets(plan: Plan, store: FrameStore, cfg: Config) -> dict[str, SolarDataset]:
    """The samples of each split; mask files on the Hugging Face hub are downloaded into the shared cache first."""
    sets = {}
    for name, table in plan.samples.items():
        sets[name] = data = SolarDataset(store, plan.labels, table, cfg.data.offsets_minutes)
        for row, path in enumerate(data.paths):
            if path.startswith("hf://"):
                data.paths[row] = str(download(path, cfg.shared, cfg.paths.reserve_gb, "labels.path"))
    return sets


def make_loaders(cfg: Config) -> Loaders:
    """Make loaders for the samples of train, validation and test whose frames are in the store.

    ValueError: splits too close, a store of another kind, unusable labels, or an empty split.
    """
    store = open_store(store_path(cfg), cfg.data.channels, cfg.data.reduce, cfg.data.native_size, cfg.scalers)
    plan = plan_samples(cfg, lambda times: np.isin(times, store.times))
    for name, table in plan.samples.items():
        if table.empty:
            periods = ", ".join(map(" to ".join, cfg.split.periods(name))) or "as the label file has it"
            raise ValueError(
                f"Not one sample is left of split.{name}, {periods}:\n{plan}\nThere is: {store}. Build more frames "
                f"(`make cache`), or correct the splits or section labels of the config."
            )
    sets = make_datasets(plan, store, cfg)
    masks = sum(len(data) for data in sets.values() if data.targets is None) * store.side**2 * 4
    room = memory()[0] / 2  # the rest is for the model
    in_memory = len(plan.frames) * store.frame_bytes + masks <= min(cfg.data.memory_cache_gb * GB, room)
    if in_memory:
        store.load(plan.frames)
        for data in sets.values():
            if data.paths:
                data.target = cache(data.target)  # mask files are read once
    workers = 0 if in_memory else loader_workers(cfg)
    loaders = {name: in_batches(data, cfg, workers, shuffle=name == "train") for name, data in sets.items()}
    report = f"{plan}\nframes {'kept in memory' if in_memory else f'read from {store.path}, {workers} loader workers'}"
    if cfg.labels.kind == "event":
        counts = ", ".join(f"{name} {data.targets.sum(0).int().tolist()} of {len(data)}" for name, data in sets.items())
        report += f"\nevents: {counts}"
        if not (cfg.labels.spans_hours or cfg.labels.window_hours):
            report += "; a label is taken to speak of its own time alone (labels.spans_hours is 0)"
    statistics = _target_statistics(sets["train"], cfg.labels.kind)
    if cfg.labels.kind == "mask" and cfg.labels.mask_reduce == "majority":
        report += lost_by_reducing(sets["train"], statistics["target_mean"].sum().item())
    return Loaders(**loaders, **statistics, report=report)


def loader_workers(cfg: Config) -> int:
    """How many of `training.loader_workers` have room in half of the free memory and in /dev/shm, where batches lie."""
    # each takes half a GB, and holds up to three batches of float32: two that wait and one in the making
    batches = 12 * cfg.training.batch_size * len(cfg.data.channels) * len(cfg.data.offsets_minutes)
    batches *= cfg.data.image_size**2
    room = [memory()[0] / 2 / (0.5 * GB + batches)]
    if Path("/dev/shm").is_dir():
        room.append(free_space("/dev/shm") / batches)
    return int(min(cfg.training.loader_workers, *room))


def in_batches(data: Dataset, cfg: Config, workers: int, shuffle: bool = False) -> DataLoader:
    """Batches of these samples, in their order or in a seeded random one; `workers` processes read ahead."""
    return DataLoader(
        data,
        batch_size=cfg.training.batch_size,
        shuffle=shuffle,
        generator=torch.Generator().manual_seed(cfg.seed),  # an iterator draws, in order too: not from the global one
        num_workers=workers,
        # not fork: a forked process inherits CUDA and the threads of zarr in a state that it cannot use
        multiprocessing_context=multiprocessing.get_context("forkserver") if workers else None,
        pin_memory=torch.cuda.is_available(),
    )


def fingerprint(splits: Iterable[SolarDataset]) -> str:
    """Tells the times and labels of samples apart: a corrected label, or mask file, changes it."""
    digest = hashlib.sha256()
    for data in splits:
        digest.update(repr([time.isoformat() for time in data.samples["time"]]).encode())
        digest.update(b"" if data.targets is None else data.targets.double().numpy().tobytes())
        for path in getattr(data, "paths", ()):
            digest.update(Path(path).read_bytes() if Path(path).is_file() else path.encode())
    return digest.hexdigest()[:16]


def lost_by_reducing(data: SolarDataset, left: float) -> str:
    """A warning for the report where, with `left` pixels inside of a mask, more than a fifth of them are lost."""
    rows, own, side = _evenly_spaced(data), data.labels.rules, data.store.side // data.labels.rules.reduce
    paths = [data.paths[row] for row in rows]
    whole = sum(read_mask(path, own.variable, side, "mean", own.reader).sum().item() for path in paths)
    if left * len(rows) >= 0.8 * whole:
        return ""
    return (
        f"\nWARNING: of {whole:.0f} pixels inside, {left * len(rows):.0f} are left when the masks are reduced by "
        f"majority. Set labels.mask_reduce: any or mean for thin structures."
    )


def _target_statistics(data: SolarDataset, kind: str) -> dict[str, Tensor | float]:
    """Mean and deviation of the training targets, and of images their span, as `Loaders` has them."""
    targets = data.targets
    if targets is None:
        rows, mean, low, high = _evenly_spaced(data), torch.zeros(1), math.inf, -math.inf
        if kind == "mask" and not any(data.target(row).any() for row in rows):
            rows = np.arange(len(data))  # the others may hold something
        for image in map(data.target, rows):  # (C, H, W), one in memory at a time
            mean, low, high = mean + image / len(rows), min(low, image.min().item()), max(high, image.max().item())
        return {"target_mean": mean, "target_std": torch.ones(1), "target_span": high - low}
    std = torch.ones(targets.shape[1]) if kind == "event" else targets.std(0, correction=0)
    return {"target_mean": targets.mean(0), "target_std": torch.where(std > 0, std, 1.0)}


def _evenly_spaced(data: SolarDataset) -> np.ndarray:
    return np.unique(np.linspace(0, len(data) - 1, IMAGE_STATISTICS).round().astype(int))
