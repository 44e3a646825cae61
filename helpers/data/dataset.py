"""Frames and labels joined into samples, split by time, and served in batches.

A sample at time t reads the frames at t + offsets and the label of the time t + lead. What finds no partner is dropped
and counted, and the counts are in the report.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torch.utils.data import DataLoader, Dataset

from helpers.channels import AUGMENTATION_SIGNS, Scaler, denormalise, load_scalers, normalise, stack_scalers
from helpers.config import Config
from helpers.data.archive import FrameError, open_netcdf
from helpers.data.frames import FrameStore, open_store, store_path
from helpers.data.labels import FrameTarget, Labels, Matching, check_splits, join, labels_of, matching_of
from helpers.shared import GB

FLIPS = {"flip_lr": (-1,), "flip_ud": (-2,), "rot180": (-2, -1)}  # axes that are reversed
IMAGE_STATISTICS = 64  # evenly spaced samples from which the mean and span of image targets are taken


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
        mask = read_mask(path, self.labels.variable, self.store.side // self.labels.reduce)
        if self._masks is not None:
            self._masks[path] = mask
        return mask

    def _finished(self, target: Tensor | list[list[Tensor]]) -> Tensor:
        """Channels of frames normalised and pooled; everything else as it is."""
        if self._outputs is None:
            return target
        target = self._outputs.normalise(target)[:, 0]  # (C, 1, H, W) -> (C, H, W)
        if self.labels.reduce == 1:
            return target
        pooled = avg_pool2d(denormalise(target, self._target_scaler), self.labels.reduce)
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
            hint = f"; labels.reduce {side // size} times as large would suit it" if side % size == 0 else ""
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
    store = open_store(store_path(cfg), cfg.data.channels, cfg.data.reduce, cfg.data.native_size, cfg.scalers)
    limits = {"train": cfg.training.max_train_samples, "val": cfg.training.max_val_samples, "test": None}
    sets = {
        name: SolarDataset(
            store,
            labels,
            cfg.scalers,
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
