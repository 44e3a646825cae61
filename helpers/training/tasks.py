"""What depends on the kind of target: its loss, what an output of the model means, and what is kept of a split.

A model learns numbers standardised by the training split, masks as log-odds beyond the share of the training pixels
that are inside, and images in normalised values. So an output of zero means the mean of the training targets for
numbers and masks. Predictions of numbers are kept whole; images are judged as they come, a few are kept to be drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from helpers.config import Config, find_named
from helpers.data.dataset import Loaders
from helpers.training.metrics import ImageMetrics, compute_metrics

EXAMPLES = 3  # image predictions of each split that are kept to be drawn, evenly spaced in time
BINS = 50  # of the joint histogram of predicted and true pixels

# --------------------------------------------------------------------------------------------------------------------
# Losses and units
# --------------------------------------------------------------------------------------------------------------------
Loss = Callable[[Tensor, Tensor, float], Tensor]


def bce_dice(output: Tensor, target: Tensor, share: float) -> Tensor:
    """Cross-entropy plus soft Dice loss of masks; both count the few pixels inside for more than their number.

    Args:
        output: (B, C, H, W) logits.
        target: (B, C, H, W), 0 outside and 1 inside.
        share: of the training pixels that are inside. Pixels inside weigh sqrt((1 - share) / share) times as much in
            the cross-entropy: full balance would draw the masks too large.

    Source: soft Dice of V-Net (arXiv:1606.04797), one term an image.
    """
    weight = torch.tensor(((1 - share) / share) ** 0.5, device=output.device)
    cross_entropy = F.binary_cross_entropy_with_logits(output, target, pos_weight=weight)
    inside = output.sigmoid()
    both, sizes = (inside * target).sum((1, 2, 3)), (inside + target).sum((1, 2, 3))
    return cross_entropy + (1 - (2 * both + 1) / (sizes + 1)).mean()


# Functions of output and target in the units of learning, and of the share of training pixels inside the masks.
LOSSES: dict[str, Loss] = {
    "mse": lambda output, target, _: F.mse_loss(output, target),
    "mae": lambda output, target, _: F.l1_loss(output, target),
    "huber": lambda output, target, _: F.smooth_l1_loss(output, target),
    "bce_dice": bce_dice,
}


def compute_loss(output: Tensor, target: Tensor, loaders: Loaders, cfg: Config) -> Tensor:
    """The configured loss of a batch.

    Args:
        output: of the model, (B, K) or (B, C, H, W).
        target: of the batch, in target units; the same shape, because broadcasting would hide a mistake.

    Raises:
        ValueError: the shapes differ.
    """
    check_shapes(output, target, cfg)
    output, share = output.float(), math.nan
    if cfg.labels.kind == "scalar":
        mean, std = (value.to(target.device) for value in (loaders.target_mean, loaders.target_std))
        target = (target - mean) / std
    elif cfg.labels.kind == "mask":
        share = _share_inside(loaders)
        output = output + _log_odds(share)
    return find_named(cfg.target.loss, LOSSES)(output, target, share)


def to_target_units(output: Tensor, loaders: Loaders, cfg: Config) -> Tensor:
    """What an output means: numbers in target units, probabilities for masks, normalised values for images."""
    if cfg.labels.kind == "scalar":
        return output * loaders.target_std.to(output.device) + loaders.target_mean.to(output.device)
    return (output + _log_odds(_share_inside(loaders))).sigmoid() if cfg.labels.kind == "mask" else output


def _share_inside(loaders: Loaders) -> float:
    share = loaders.target_mean.mean().item()
    if not 0 < share < 1:
        where = "outside" if share == 0 else "inside"
        raise ValueError(f"Every pixel of the training masks is {where}, so there is nothing to tell apart.")
    return share


def _log_odds(share: float) -> float:
    return math.log(share / (1 - share))


def check_shapes(output: Tensor, target: Tensor, cfg: Config) -> None:
    """Raise ValueError with both shapes and the setting to look at when they differ."""
    if output.shape == target.shape:
        return
    found = f"The model returns {tuple(output.shape)} but the targets of the batch are {tuple(target.shape)}."
    if cfg.labels.kind == "scalar":
        hint = "num_outputs of the head must be the number of labels.value_columns; check head.pooling too."
    elif output.shape[:2] == target.shape[:2]:
        hint = (
            "The target has another resolution than the output: labels.reduce (now "
            f"{cfg.labels.reduce}) says by which factor targets are smaller than the input; build the model with it."
        )
    else:
        hint = "Images are (B, C, H, W): out_chans of the head must be the number of channels of the target."
    raise ValueError(f"{found} {hint}")


# --------------------------------------------------------------------------------------------------------------------
# Predictions
# --------------------------------------------------------------------------------------------------------------------
@dataclass
class Predictions:
    """What a model says of one split: prediction and target (N, K) in target units, and the N image times (ISO)."""

    prediction: Tensor
    target: Tensor
    timestamps: list[str]

    def metrics(self, cfg: Config) -> dict[str, float]:
        """The metrics that the configuration names, plus tss and hss where it says what an event is."""
        names = list(cfg.target.metrics)
        if cfg.target.event_threshold is not None:
            names += [name for name in ("tss", "hss") if name not in names]
        return compute_metrics(self.prediction, self.target, names, cfg.target.event_threshold)

    def table(self) -> pd.DataFrame:
        """One row a sample: timestamp, then target_<k> and prediction_<k> for each output."""
        columns: dict[str, object] = {"timestamp": self.timestamps}
        for k in range(self.target.shape[1]):
            columns |= {f"target_{k}": self.target[:, k].numpy(), f"prediction_{k}": self.prediction[:, k].numpy()}
        return pd.DataFrame(columns)

    @classmethod
    def from_table(cls, table: pd.DataFrame) -> Predictions:
        """The way back from `table()`."""
        values = {
            kind: torch.tensor(table.filter(regex=rf"^{kind}_\d+$").to_numpy(), dtype=torch.float32)
            for kind in ("prediction", "target")
        }
        return cls(values["prediction"], values["target"], [str(time) for time in table["timestamp"]])

    def same_samples(self, other: Predictions) -> bool:
        """Whether both were judged on the same times and targets."""
        return self.timestamps == other.timestamps and torch.allclose(self.target, other.target)


@dataclass
class ImageExample:
    """One prediction to draw: its time, input frames (C, T, H, W) normalised, and prediction and truth (C, H, W)."""

    timestamp: str
    ts: Tensor
    prediction: Tensor
    target: Tensor


@dataclass
class ImagePredictions:
    """What is kept of one split of masks or images.

    Attributes:
        values: the metrics over the whole split.
        scores: one row an image: timestamp, the same metrics of this image alone, and the mean of its target.
        examples: a few images to be drawn.
        joint: (BINS, BINS) counts of pixels by predicted (rows) and true value (columns).
        edges: (BINS + 1,) edges of its bins.
    """

    values: dict[str, float]
    scores: pd.DataFrame
    examples: list[ImageExample] = field(default_factory=list)
    joint: Tensor | None = None
    edges: Tensor | None = None

    @property
    def timestamps(self) -> list[str]:
        """The N image times (ISO)."""
        return list(self.scores["timestamp"])

    def metrics(self, cfg: Config) -> dict[str, float]:
        """The metrics of the split."""
        return self.values

    def table(self) -> pd.DataFrame:
        """One row an image."""
        return self.scores

    @classmethod
    def from_table(cls, table: pd.DataFrame) -> ImagePredictions:
        """The scores of each image again; metrics of the split and images are not in a table."""
        return cls({}, table.astype({"timestamp": str}))

    def same_samples(self, other: ImagePredictions) -> bool:
        """Whether both were judged on the same times and targets."""
        means = (torch.tensor(found.scores["target_mean"].to_numpy()) for found in (self, other))
        return self.timestamps == other.timestamps and torch.allclose(*means, rtol=1e-4, atol=1e-6)


def predictions_from_table(table: pd.DataFrame, cfg: Config) -> Predictions | ImagePredictions:
    """The predictions of a run's CSV again."""
    return (Predictions if cfg.labels.kind == "scalar" else ImagePredictions).from_table(table)


class Collector:
    """Takes predictions batch by batch and keeps what this kind of target needs.

    Args:
        samples: times (ISO) of the split, from which the examples are chosen.
        detailed: keep scores of each image, examples and the histogram, too; needed for `predictions`.
    """

    def __init__(self, loaders: Loaders, cfg: Config, samples: list[str] = (), detailed: bool = True) -> None:
        self.cfg, self.detailed, self._images = cfg, detailed, cfg.labels.kind != "scalar"
        self._numbers: list[tuple[Tensor, Tensor]] = []
        self._times: list[str] = []
        self._rows: list[dict[str, Any]] = []
        self._examples: list[ImageExample] = []
        places = [len(samples) * (2 * k + 1) // (2 * EXAMPLES) for k in range(EXAMPLES)] if samples else []
        self._wanted = {samples[place] for place in places}
        if self._images:
            self._metrics = ImageMetrics(cfg.target.metrics, cfg.target.mask_threshold, loaders.target_span)
            self._edges = _edges(cfg.labels.kind, loaders)
            self._joint = torch.zeros(BINS, BINS)

    def add(self, prediction: Tensor, target: Tensor, batch: Mapping[str, Any]) -> None:
        """One batch: prediction and target in target units on the CPU, and the batch with its timestamps and ts."""
        if not self._images:
            self._numbers.append((prediction, target))
            self._times += batch["timestamp"]
        elif not self.detailed:
            self._metrics.update(prediction, target)
        else:
            means = target.mean((1, 2, 3)).tolist()
            each = self._metrics.each(prediction, target)
            for k, (time, scores, mean) in enumerate(zip(batch["timestamp"], each, means, strict=True)):
                self._rows.append({"timestamp": time, **scores, "target_mean": mean})
                if time in self._wanted and "ts" in batch:
                    self._examples.append(ImageExample(time, batch["ts"][k].cpu(), prediction[k], target[k]))
            pixels = torch.stack([prediction.flatten(), target.flatten()], 1).clamp(self._edges[0], self._edges[-1])
            self._joint += torch.histogramdd(pixels, [self._edges] * 2).hist

    def metrics(self) -> dict[str, float]:
        """The metrics of what was taken so far."""
        return self._metrics.compute() if self._images else self.predictions().metrics(self.cfg)

    def predictions(self) -> Predictions | ImagePredictions:
        """Everything that was taken, in the order of time."""
        if self._images:
            scores = pd.DataFrame(self._rows).sort_values("timestamp", ignore_index=True)
            examples = sorted(self._examples, key=lambda example: example.timestamp)
            return ImagePredictions(self._metrics.compute(), scores, examples, self._joint, self._edges)
        prediction, target = (torch.cat(part) for part in zip(*self._numbers, strict=True))
        order = sorted(range(len(self._times)), key=self._times.__getitem__)
        return Predictions(prediction[order], target[order], [self._times[i] for i in order])


def _edges(kind: str, loaders: Loaders) -> Tensor:
    """Equal bins of probability for masks; for images narrow bins near zero and wide ones far from it."""
    if kind == "mask":
        return torch.linspace(0, 1, BINS + 1)
    return torch.sinh(torch.linspace(-1, 1, BINS + 1) * math.asinh(loaders.target_span))
