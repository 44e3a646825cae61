"""What depends on the kind of target, one object for each kind: `make_task(cfg, loaders)`.

A model learns numbers standardised by the training split, events and masks as log-odds beyond the share of the training
targets that are 1, and images in normalised values. So an output of zero means the mean of the training targets for
all but images. Predictions of numbers are kept whole; images are judged as they come, a few are kept to be drawn.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
import torchmetrics
from torch import Tensor
from torch.nn import functional as F

from helpers.config import Config, find_named
from helpers.data.dataset import Loaders
from helpers.training.metrics import EVENTS, IMAGES, NUMBERS

EXAMPLES = 3  # image predictions of each split that are kept to be drawn, evenly spaced in time


# ---- Predictions
@dataclass
class Predictions:
    """What a model says of one split: prediction and target (N, K) in target units, and the N image times (ISO)."""

    prediction: Tensor
    target: Tensor
    timestamps: list[str]
    threshold: float | None = None  # from this prediction on an event is forecast (`choose_threshold`); None: as events

    def metrics(self, cfg: Config) -> dict[str, float]:
        """Those of `metrics_of`; of yes or no with a chosen threshold "tss_at_0.5", too, the TSS at 0.5."""
        found = {key: self.score(key, slice(None), cfg) for key in metrics_of(cfg)}
        if self.threshold is not None and cfg.labels.kind == "event":
            found["tss_at_0.5"] = replace(self, threshold=None).score("tss", slice(None), cfg)
        return found

    def score(self, key: str, rows: np.ndarray | slice, cfg: Config) -> float:
        """One metric of some of the samples."""
        both = self.prediction[rows], self.target[rows]
        return metrics_of(cfg)[key].score(*both, cfg.event_threshold, cfg.labels.physical, self.threshold)

    def choose_threshold(self, cfg: Config) -> float | None:
        """The prediction from which on an event is best forecast here (validation), by the first metric that depends
        on it; None where a column has no events to tell apart, or the configuration does not say what an event is.
        """
        events = self.target >= (math.nan if cfg.event_threshold is None else cfg.event_threshold)
        if not events.any():
            return None
        # recall alone would have it always warn, precision hardly ever; tss is always there
        asked = [metric for key, metric in metrics_of(cfg).items() if key not in ("recall", "precision")]
        metric = next(metric for metric in asked if metric.of_events and metric.of_alarms)
        said, best = self.prediction.double().unique(), self.prediction[events].double().unique()
        # scores are best right below the prediction of an event, of which there may be few among many others
        below = torch.searchsorted(said, best.quantile(torch.linspace(0, 1, 50).double(), interpolation="nearest"))
        levels = ((said[below] + said[(below - 1).clamp(0)]) / 2).tolist()
        given = self.prediction, self.target, cfg.event_threshold, cfg.labels.physical
        scores = np.array([metric.score(*given, level) for level in levels])
        scores = scores if metric.higher_is_better else -scores
        return None if np.isnan(scores).all() else levels[np.nanargmax(scores)]

    def interval(self, level: float = 0.9) -> Tensor:
        """Half width (K,) of intervals that hold a share `level` of the truth, if what comes is like this split.

        Split conformal prediction (arXiv:1604.04173): the ceil((N + 1) level)-th smallest error, or infinity where N is
        too small to say. Of validation.
        """
        errors, rank = (self.prediction - self.target).abs(), math.ceil((len(self.target) + 1) * level)
        return errors.kthvalue(rank, dim=0).values if rank <= len(errors) else torch.full_like(errors[0], math.inf)

    def table(self) -> pd.DataFrame:
        """One row a sample: timestamp, then target_<k> and prediction_<k> for each output."""
        columns: dict[str, object] = {"timestamp": self.timestamps}
        for k in range(self.target.shape[1]):
            columns |= {f"target_{k}": self.target[:, k].numpy(), f"prediction_{k}": self.prediction[:, k].numpy()}
        return pd.DataFrame(columns)

    @classmethod
    def from_table(cls, table: pd.DataFrame) -> Self:
        """The way back from `table()`."""
        parts = [table.filter(regex=rf"^{name}_\d+$").to_numpy() for name in ("prediction", "target")]
        prediction, target = (torch.tensor(part, dtype=torch.float32) for part in parts)
        return cls(prediction, target, table["timestamp"].astype(str).tolist())

    def same_samples(self, other: Self) -> bool:
        """Whether both were judged on the same times and targets."""
        return self.timestamps == other.timestamps and torch.allclose(self.target, other.target)


@dataclass
class ImagePredictions:
    """What is kept of one split of masks or images, with the methods of `Predictions`."""

    values: dict[str, float]  # the metrics over the whole split
    scores: pd.DataFrame  # one row an image: timestamp, the metrics of this image alone, and the mean of its target
    examples: list[dict[str, Any]] = field(default_factory=list)  # items of the dataset, with the `prediction`
    threshold: None = None  # that of masks is target.mask_threshold

    def choose_threshold(self, cfg: Config) -> None:
        """Nothing to choose."""

    @property
    def timestamps(self) -> list[str]:
        return list(self.scores["timestamp"])

    def metrics(self, cfg: Config) -> dict[str, float]:
        return self.values

    def score(self, key: str, rows: np.ndarray, cfg: Config) -> float:
        """The mean of one metric over some of the images."""
        return float(self.scores[key].to_numpy()[rows].mean())

    def table(self) -> pd.DataFrame:
        return self.scores

    @classmethod
    def from_table(cls, table: pd.DataFrame) -> Self:
        """The scores of each image again; metrics of the split and images are not in a table."""
        return cls({}, table.astype({"timestamp": str}))

    def same_samples(self, other: Self) -> bool:
        mine, others = (p.scores["target_mean"].to_numpy() for p in (self, other))
        return self.timestamps == other.timestamps and np.allclose(mine, others, rtol=1e-4, atol=1e-6)


class NumberCollector:
    """Takes predictions of numbers batch by batch, and keeps them all."""

    def __init__(self) -> None:
        self.given, self.targets, self.times = [], [], []

    def add(self, prediction: Tensor, target: Tensor, batch: Mapping[str, Any]) -> None:
        """One batch: prediction and target (B, K) in target units on the CPU, and the batch itself."""
        self.given.append(prediction)
        self.targets.append(target)
        self.times += batch["timestamp"]

    def predictions(self) -> Predictions:
        return Predictions(torch.cat(self.given), torch.cat(self.targets), self.times)


class ImageCollector:
    """Takes predictions of masks or images batch by batch: metrics, and of `samples`, the number that will come, those
    of each image and a few examples; None is faster. A pixel on the averaged edge of a finer mask is inside from one
    half up.
    """

    def __init__(self, metrics: dict[str, torchmetrics.Metric], samples: int | None, masks: bool) -> None:
        self.metrics, self.samples, self.masks, self.inside = metrics, samples, masks, False
        self.drawn = set(np.linspace(0, (samples or 0) - 1, EXAMPLES + 2)[1:-1].round())
        self.rows, self.examples = [], []  # a dict an image

    def add(self, prediction: Tensor, target: Tensor, batch: Mapping[str, Any]) -> None:
        """One batch: prediction and target (B, C, H, W) in target units on the CPU, and the batch itself."""
        truth = (target >= 0.5).int() if self.masks else target
        self.inside = self.inside or bool(truth.any())
        if self.samples is None:
            for metric in self.metrics.values():
                metric.update(prediction, truth)
            return
        for k, time in enumerate(batch["timestamp"]):
            if len(self.rows) in self.drawn and "ts" in batch:
                seen = {"timestamp": time, "ts": batch["ts"][k].cpu()}
                self.examples.append({**seen, "prediction": prediction[k], "target": target[k]})
            # calling a metric takes the image in and returns the value of this image by itself
            scores = {name: float(metric(prediction[[k]], truth[[k]])) for name, metric in self.metrics.items()}
            self.rows.append({"timestamp": time, **scores, "target_mean": target[k].mean().item()})

    def predictions(self) -> ImagePredictions:
        nothing = self.masks and not self.inside  # then an empty mask would be a perfect one
        values = {name: math.nan if nothing else float(metric.compute()) for name, metric in self.metrics.items()}
        scores = pd.DataFrame(self.rows, columns=["timestamp", *values, "target_mean"])
        return ImagePredictions(values, scores, self.examples)


def metrics_table(found: Mapping[str, Predictions | ImagePredictions], cfg: Config) -> pd.DataFrame:
    """One row for each entry of `found`, one column a metric."""
    return pd.DataFrame({name: predictions.metrics(cfg) for name, predictions in found.items()}).T


# ---- Losses
def bce_dice(output: Tensor, target: Tensor, share: float) -> Tensor:
    """Cross-entropy plus soft Dice loss (V-Net, arXiv:1606.04797; one term an image) of masks.

    Output are (B, C, H, W) logits, the target is 0 outside and 1 inside, as a `share` of the training pixels is. Pixels
    inside weigh sqrt((1 - share) / share) times as much: full balance would draw the masks too large.
    """
    weight = torch.as_tensor(((1 - share) / share) ** 0.5, device=output.device)
    cross_entropy = F.binary_cross_entropy_with_logits(output, target, pos_weight=weight)
    inside = output.sigmoid()
    both, sizes = (inside * target).sum((1, 2, 3)), (inside + target).sum((1, 2, 3))
    return cross_entropy + (1 - (2 * both + 1) / (sizes + 1)).mean()


def bce(output: Tensor, target: Tensor, share: Tensor, weights: str) -> Tensor:
    """Cross-entropy of events: (B, K) logits and 0 or 1, of which `share` (K,) of the training samples are 1.

    By `weights` an event counts as much more as it is rarer: none, sqrt((1 - share) / share) or balanced, (1 - share)
    / share. The logits of the weighted loss are higher by the logarithm of it, so that `output` stays a probability.
    """
    weight = ((1 - share) / share) ** {"none": 0, "sqrt": 0.5, "balanced": 1}[weights]
    return F.binary_cross_entropy_with_logits(output + weight.log(), target, pos_weight=weight)


# functions of output and target in the units of learning; of masks and events also of the share of training targets
LOSSES = {"mse": F.mse_loss, "mae": F.l1_loss, "huber": F.smooth_l1_loss, "bce": bce, "bce_dice": bce_dice}


# ---- Tasks
class Task:
    """What a kind of target decides. Each has a `collector(samples)`, which takes the predictions of a split."""

    registry: dict[str, Any]  # the metrics that there are
    predictions: type[Predictions] | type[ImagePredictions]  # of a split; `from_table` reads it from a run's CSV

    def __init__(self, cfg: Config, loaders: Loaders) -> None:
        self.cfg, self.loaders, self.metrics = cfg, loaders, metrics_of(cfg)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """The configured loss of a model's output and the target of a batch, which is in target units."""
        check_shapes(output, target)
        return find_named(self.cfg.target.loss, LOSSES)(*self.learned(output.float(), target))

    def learned(self, output: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        """What the loss takes: output and target in the units of learning."""
        return output, target

    def to_units(self, output: Tensor) -> Tensor:
        """What an output means, in target units."""
        return output


class NumberTask(Task):
    """Numbers, (B, K): learned standardised by the training split, judged in target units."""

    registry, predictions = NUMBERS, Predictions

    def learned(self, output: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        mean, std = self.loaders.target_mean.to(target.device), self.loaders.target_std.to(target.device)
        return output, (target - mean) / std

    def to_units(self, output: Tensor) -> Tensor:
        return output * self.loaders.target_std.to(output.device) + self.loaders.target_mean.to(output.device)

    def collector(self, samples: int | None = None) -> NumberCollector:
        return NumberCollector()


class ImageTask(Task):
    """Images, (B, C, H, W): learned and judged in normalised values."""

    registry, predictions = IMAGES, ImagePredictions

    def collector(self, samples: int | None = None) -> ImageCollector:
        threshold, span = self.cfg.target.mask_threshold, self.loaders.target_span
        metrics = {name: metric.make(threshold, span) for name, metric in self.metrics.items()}
        return ImageCollector(metrics, samples, masks=self.cfg.labels.kind == "mask")


class Odds(Task):
    """What is learned as log-odds beyond the share of the training targets that are 1, and judged as probabilities."""

    @cached_property
    def share(self) -> Tensor:
        """Of the training targets that are 1: of events for each output (K,), of pixels for all together."""
        share = self.loaders.target_mean.float()
        share = share if share.ndim == 1 else share.mean()
        for k in np.flatnonzero((share <= 0) | (share >= 1))[:1]:
            what = f"pixel of the training masks is {'inside' if share.max() else 'outside'}"
            mend = "labels.mask_reduce: any or mean keeps thin structures"
            if share.ndim:
                what = f"label of column {k + 1} of {len(share)} in the training split is {share[k]:.0f}"
                mend = "rare events need a longer split.train or another event_at"
            raise ValueError(f"Every {what}, so there is nothing to tell apart. Look at labels.path; {mend}.")
        return share

    def learned(self, output: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        return output + self.share.to(output.device).logit(), target, self.share.to(output.device)

    def to_units(self, output: Tensor) -> Tensor:
        return (output + self.share.to(output.device).logit()).sigmoid()


class MaskTask(Odds, ImageTask):
    """Masks, (B, 1, H, W)."""


class EventTask(Odds, NumberTask):
    """Yes or no, (B, K)."""

    registry = EVENTS

    def learned(self, output: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        weights = (self.cfg.target.weights,) if self.cfg.target.loss == "bce" else ()
        return *super().learned(output, target), *weights


TASKS = {"scalar": NumberTask, "event": EventTask, "mask": MaskTask, "image": ImageTask}


def make_task(cfg: Config, loaders: Loaders) -> Task:
    """The task of `labels.kind`, which knows the training targets of these loaders."""
    return TASKS[cfg.labels.kind](cfg, loaders)


def metrics_of(cfg: Config) -> dict[str, Any]:
    """The metrics that the configuration names, plus tss and hss where it says what an event of numbers is."""
    registry, names = TASKS[cfg.labels.kind].registry, list(cfg.target.metrics)
    if "tss" in registry and cfg.event_threshold is not None:
        names += [name for name in ("tss", "hss") if name not in names]
    return {name: find_named(name, registry) for name in names}


def check_shapes(output: Tensor, target: Tensor) -> None:
    """Raise ValueError with both shapes and the settings to look at when they differ."""
    if output.shape != target.shape:
        raise ValueError(
            f"The model returns {tuple(output.shape)} but the targets of the batch are {tuple(target.shape)}: look at "
            "num_outputs or out_chans of the head, labels.value_columns, and for the size of images labels.reduce."
        )
