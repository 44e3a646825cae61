"""Metrics on top of TorchMetrics: errors and event skill of numbers, overlap of masks, likeness of images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torchmetrics
from torch import Tensor
from torchmetrics.classification import BinaryAveragePrecision, BinaryF1Score, BinaryJaccardIndex
from torchmetrics.functional import mean_absolute_error, mean_squared_error, r2_score, relative_squared_error
from torchmetrics.functional.classification import binary_stat_scores
from torchmetrics.image import StructuralSimilarityIndexMeasure

from helpers.config import find_named


@dataclass(frozen=True)
class Metric:
    """A number that judges predictions: how it is computed, whether larger is better, and a line for the table.

    Attributes:
        compute: for numbers: a function of prediction and target of a whole split, both (N,) float in target units,
            and the event threshold or None. None if the metric is not for numbers.
        of_images: for masks and images: a function of the mask threshold and the span of the training targets that
            returns a TorchMetrics metric, which is given prediction and target (B, C, H, W) batch by batch (a split of
            images does not fit into memory) and pools all their pixels. None if the metric is not for images.
    """

    compute: Callable[[Tensor, Tensor, float | None], Tensor] | None
    higher_is_better: bool
    meaning: str
    of_images: Callable[[float, float], torchmetrics.Metric] | None = None


def rmse(prediction: Tensor, target: Tensor, threshold: float | None = None) -> Tensor:
    """Root mean square error of (N,) tensors, in target units."""
    return mean_squared_error(prediction, target, squared=False)


def mae(prediction: Tensor, target: Tensor, threshold: float | None = None) -> Tensor:
    """Mean absolute error of (N,) tensors, in target units."""
    return mean_absolute_error(prediction, target)


def r2(prediction: Tensor, target: Tensor, threshold: float | None = None) -> Tensor:
    """Share of the target's variance explained; 0 is as good as the mean of these targets; NaN if they are equal."""
    return r2_score(prediction, target) if _varies(target) else torch.tensor(torch.nan)


def rrse(prediction: Tensor, target: Tensor, threshold: float | None = None) -> Tensor:
    """Root relative square error: RMSE over that of predicting the mean of these targets; NaN if they are equal."""
    return relative_squared_error(prediction, target, squared=False) if _varies(target) else torch.tensor(torch.nan)


def _varies(target: Tensor) -> bool:
    return bool((target != target[0]).any())


def tss(prediction: Tensor, target: Tensor, threshold: float | None = None) -> Tensor:
    """True skill statistic, hit rate minus false-alarm rate (Hanssen & Kuipers 1965); NaN without both kinds."""
    tp, fp, tn, fn = _contingency(prediction, target, threshold)
    return tp / (tp + fn) - fp / (fp + tn)


def hss(prediction: Tensor, target: Tensor, threshold: float | None = None) -> Tensor:
    """Heidke skill score: accuracy beyond chance (Heidke 1926; HSS_2 of Bobra & Couvidat, arXiv:1411.1405)."""
    tp, fp, tn, fn = _contingency(prediction, target, threshold)
    return 2 * (tp * tn - fn * fp) / ((tp + fn) * (fn + tn) + (tp + fp) * (fp + tn))


def _contingency(prediction: Tensor, target: Tensor, threshold: float | None) -> Tensor:
    if threshold is None:
        raise ValueError("tss and hss count events: set target.event_threshold in config.yaml, in target units.")
    if prediction.isnan().any():  # neither an alarm nor none
        return torch.full((4,), torch.nan)
    tp, fp, tn, fn, _ = binary_stat_scores((prediction >= threshold).int(), (target >= threshold).int()).double()
    return torch.stack([tp, fp, tn, fn])


def event_probability(prediction: Tensor, spread: float, threshold: float) -> Tensor:
    """Chance that the truth reaches the threshold, if it lies around the prediction as a normal distribution.

    Args:
        prediction: (N,) in target units.
        spread: standard deviation of target minus prediction, of another split than the one that is judged.
        threshold: of an event, in target units.
    """
    return torch.special.ndtr((prediction.double() - threshold) / max(spread, 1e-12))


def brier_skill(probability: Tensor, event: Tensor) -> Tensor:
    """1 minus the mean squared error of the probabilities over that of always saying the share of events; (N,) both.

    1 is perfect, 0 is no better than the share (Brier 1950; Murphy 1973); NaN without both kinds.
    """
    return r2(probability.double(), event.double())


class PixelCorrelation(torchmetrics.PearsonCorrCoef):
    """Pearson's correlation over all pixels of all images; 0 for a constant prediction, NaN for a constant target."""

    def __init__(self) -> None:
        super().__init__()
        self.set_dtype(torch.float64)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Take (B, C, H, W) images."""
        super().update(preds.flatten().double(), target.flatten().double())

    def compute(self) -> Tensor:
        """The correlation of everything since the last reset."""
        if self.var_y == 0:
            return torch.tensor(torch.nan)
        return super().compute() if self.var_x > 1e-12 * self.var_y else torch.tensor(0.0)


class _OfMasks:
    """Of a target that is the averaged edge of a finer mask, a pixel is inside from one half up."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Take probabilities and masks (B, C, H, W)."""
        super().update(preds, (target >= 0.5).int())


class MaskIoU(_OfMasks, BinaryJaccardIndex):
    """Intersection over union, the pixels of all images pooled; 1 when nothing is inside either."""


class MaskDice(_OfMasks, BinaryF1Score):
    """The Dice coefficient, which is the F1 score of the pixels of all images; 1 when nothing is inside either."""


class MaskAveragePrecision(BinaryAveragePrecision):
    """Area under precision against recall of all pixels, at 200 thresholds.

    TorchMetrics compares every pixel with every threshold; sorting the pixels into bins between the thresholds and
    summing the bins up gives the same counts in a hundredth of the time.
    """

    def __init__(self) -> None:
        super().__init__(thresholds=200)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Take probabilities and masks (B, C, H, W)."""
        bins = torch.bucketize(preds.flatten(), self.thresholds, right=True)  # how many thresholds a pixel reaches
        inside = (target >= 0.5).flatten()
        for kind, chosen in enumerate((~inside, inside)):
            counts = torch.bincount(bins[chosen], minlength=len(self.thresholds) + 1)
            reached = counts.sum() - counts.cumsum(0)[:-1]  # (thresholds,) pixels at or above each
            self.confmat[:, kind, 1] += reached
            self.confmat[:, kind, 0] += counts.sum() - reached


METRICS: dict[str, Metric] = {
    "rmse": Metric(*(rmse, False, "root mean square error"), lambda *_: torchmetrics.MeanSquaredError(squared=False)),
    "mae": Metric(mae, False, "mean absolute error", lambda *_: torchmetrics.MeanAbsoluteError()),
    "r2": Metric(r2, True, "explained variance"),
    "rrse": Metric(rrse, False, "RMSE relative to predicting the mean"),
    "tss": Metric(tss, True, "true skill statistic of events"),
    "hss": Metric(hss, True, "Heidke skill score of events"),
    "iou": Metric(
        *(None, True, "intersection over union of the masks"),
        lambda threshold, _: MaskIoU(threshold, zero_division=1),
    ),
    "dice": Metric(
        *(None, True, "twice the intersection over the sum of the areas"),
        lambda threshold, _: MaskDice(threshold, zero_division=1),
    ),
    "average_precision": Metric(
        *(None, True, "area under precision against recall"),
        lambda *_: MaskAveragePrecision(),
    ),
    "correlation": Metric(None, True, "Pearson's correlation of the pixels", lambda *_: PixelCorrelation()),
    "ssim": Metric(
        *(None, True, "structural similarity (Wang et al. 2004), data range = span of the training targets"),
        lambda _, span: StructuralSimilarityIndexMeasure(data_range=span),
    ),
}


class ImageMetrics:
    """The named metrics of images, collected batch by batch.

    Args:
        names: entries of `METRICS`, or `module:name` of a `Metric` of your own.
        threshold: from which probability on a pixel counts as inside a mask.
        span: largest minus smallest value of the training targets, the data range of ssim.
    """

    def __init__(self, names: Sequence[str], threshold: float, span: float) -> None:
        self.collected: Mapping[str, torchmetrics.Metric] = {
            name: find_named(name, METRICS).of_images(threshold, span) for name in names
        }

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Take in one batch, both (B, C, H, W) float on the CPU: probabilities for masks, else target units."""
        for metric in self.collected.values():
            metric.update(prediction, target)

    def each(self, prediction: Tensor, target: Tensor) -> list[dict[str, float]]:
        """Take in one batch, and return the metrics of each of its images by itself."""
        return [
            {name: float(metric(p[None], t[None])) for name, metric in self.collected.items()}
            for p, t in zip(prediction, target, strict=True)
        ]

    def compute(self) -> dict[str, float]:
        """The metrics over everything that was taken in."""
        return {name: float(metric.compute()) for name, metric in self.collected.items()}


def compute_metrics(
    prediction: Tensor, target: Tensor, names: Sequence[str], threshold: float | None = None
) -> dict[str, float]:
    """The named metrics of a whole split.

    Args:
        prediction, target: (N, K) float in target units; several outputs are averaged with equal weight.
        names: keys of `METRICS`, or `module:name` of a `Metric` of your own.
        threshold: what counts as an event, in target units; needed by tss and hss.

    Raises:
        ValueError: shapes differ (a (N,) target against (N, 1) would broadcast to N x N without a word), or no samples.
        KeyError: an unknown metric, with the known ones.
    """
    if prediction.shape != target.shape or prediction.ndim != 2:
        raise ValueError(
            f"Predictions {tuple(prediction.shape)} and targets {tuple(target.shape)} must both be (samples, outputs)."
        )
    if not len(target):
        raise ValueError("There are no samples to judge; look at the report of the dataset for what was dropped.")
    numbers = {name: metric for name, metric in METRICS.items() if metric.compute}
    unknown = [name for name in names if ":" not in name and name not in numbers]
    if unknown:
        raise KeyError(f"Unknown metrics {unknown}; for numbers there are {', '.join(numbers)}.")
    prediction, target = prediction.double(), target.double()
    values = {}
    for name in names:
        each = [
            find_named(name, METRICS).compute(p.contiguous(), t.contiguous(), threshold)
            for p, t in zip(prediction.T, target.T, strict=True)
        ]
        values[name] = float(torch.stack([value.double() for value in each]).mean())
    return values
