"""Metrics on top of TorchMetrics: errors and event skill of numbers, overlap of masks, likeness of images."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torchmetrics
from torch import Tensor
from torchmetrics.classification import BinaryAveragePrecision, BinaryF1Score, BinaryJaccardIndex
from torchmetrics.functional import mean_absolute_error, mean_squared_error, relative_squared_error
from torchmetrics.image import StructuralSimilarityIndexMeasure


@dataclass(frozen=True, kw_only=True)
class NumberMetric:
    """A metric of numbers."""

    higher_is_better: bool
    # of prediction and target of a whole split, both (N, K) float64: one value, or one an output (K,), to be averaged
    compute: Callable[..., Tensor]
    of_events: bool = False  # it counts events, so `compute` takes the event threshold as a third argument
    physical: bool = False  # all that `compute` takes is physical, 10**x of logarithms, instead of in target units


@dataclass(frozen=True, kw_only=True)
class ImageMetric:
    """A metric of masks and images."""

    higher_is_better: bool
    # of the mask threshold and the span of the training targets (largest minus smallest value): a TorchMetrics metric,
    # which is given prediction and target (B, C, H, W) batch by batch, because a split of images does not fit into
    # memory, and pools all their pixels; of masks the target is int
    make: Callable[[float, float], torchmetrics.Metric]


# ---- Numbers
def rmse(prediction: Tensor, target: Tensor) -> Tensor:
    """Root mean square error of each output."""
    return mean_squared_error(prediction, target, squared=False, num_outputs=target.shape[1])


def mape(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error in per cent of each target; NaN if a target is zero, of which there are no per cent."""
    # not by TorchMetrics, which divides by 1.17e-6 at least: many fluxes in W/m^2 are smaller
    return 100 * ((prediction - target) / target.where(target != 0, torch.nan)).abs().mean()


def r2(prediction: Tensor, target: Tensor) -> Tensor:
    """Share of the target's variance explained; 0 is as good as the mean of these targets; NaN if they are equal."""
    return 1 - relative_squared_error(prediction, target) if _varies(target) else torch.tensor(torch.nan)


def rrse(prediction: Tensor, target: Tensor) -> Tensor:
    """Root relative square error: RMSE over that of predicting the mean of these targets; NaN if they are equal."""
    return relative_squared_error(prediction, target, squared=False) if _varies(target) else torch.tensor(torch.nan)


def _varies(target: Tensor) -> bool:
    return bool((target != target[0]).any(0).all())


def tss(prediction: Tensor, target: Tensor, threshold: float) -> Tensor:
    """True skill statistic, hit rate minus false-alarm rate (Hanssen & Kuipers 1965); NaN without both kinds."""
    tp, fp, tn, fn = _contingency(prediction, target, threshold)
    return tp / (tp + fn) - fp / (fp + tn)


def hss(prediction: Tensor, target: Tensor, threshold: float) -> Tensor:
    """Heidke skill score: accuracy beyond chance (Heidke 1926; HSS_2 of Bobra & Couvidat, arXiv:1411.1405)."""
    tp, fp, tn, fn = _contingency(prediction, target, threshold)
    return 2 * (tp * tn - fn * fp) / ((tp + fn) * (fn + tn) + (tp + fp) * (fp + tn))


def _contingency(prediction: Tensor, target: Tensor, threshold: float) -> Tensor:
    """True and false positives, true and false negatives (4, K); an event or alarm is a value from the threshold on."""
    alarm, event = prediction >= threshold, target >= threshold
    counts = torch.stack([alarm & event, alarm & ~event, ~alarm & ~event, ~alarm & event]).sum(1).double()
    # a prediction that is not a number is neither an alarm nor none
    return counts.where(~prediction.isnan().any(0), torch.nan)


NUMBERS = {
    "rmse": NumberMetric(higher_is_better=False, compute=rmse),
    "mae": NumberMetric(higher_is_better=False, compute=mean_absolute_error),
    "mape": NumberMetric(higher_is_better=False, compute=mape, physical=True),
    "r2": NumberMetric(higher_is_better=True, compute=r2),
    "rrse": NumberMetric(higher_is_better=False, compute=rrse),
    "tss": NumberMetric(higher_is_better=True, compute=tss, of_events=True),
    "hss": NumberMetric(higher_is_better=True, compute=hss, of_events=True),
}


def compute_metrics(
    prediction: Tensor,  # (N, K) float in target units; several outputs are averaged with equal weight
    target: Tensor,
    metrics: dict[str, NumberMetric],  # by name, entries of `NUMBERS`, or your own
    threshold: float | None = None,  # what counts as an event, in target units
    physical: Callable[[Any], Any] = lambda values: values,  # from target units to physical ones, `cfg.labels.physical`
) -> dict[str, float]:
    """These metrics of a whole split.

    Raises ValueError where shapes differ: a (N,) target against (N, 1) would broadcast to N x N without a word.
    """
    if prediction.shape != target.shape or prediction.ndim != 2:
        raise ValueError(
            f"Predictions {tuple(prediction.shape)} and targets {tuple(target.shape)} must both be (samples, outputs)."
        )
    prediction, target, found = prediction.double().contiguous(), target.double().contiguous(), {}
    for name, metric in metrics.items():
        given = [prediction, target, threshold] if metric.of_events else [prediction, target]
        given = [physical(values) for values in given] if metric.physical else given
        found[name] = float(metric.compute(*given).double().mean())
    return found


# ---- Masks and images
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


# an IoU, or a Dice coefficient (which is the F1 score of the pixels), is 1 where nothing is inside either
IMAGES = {
    "rmse": ImageMetric(higher_is_better=False, make=lambda mask, span: torchmetrics.MeanSquaredError(squared=False)),
    "mae": ImageMetric(higher_is_better=False, make=lambda mask, span: torchmetrics.MeanAbsoluteError()),
    "iou": ImageMetric(higher_is_better=True, make=lambda mask, span: BinaryJaccardIndex(mask, zero_division=1)),
    "dice": ImageMetric(higher_is_better=True, make=lambda mask, span: BinaryF1Score(mask, zero_division=1)),
    "average_precision": ImageMetric(
        higher_is_better=True, make=lambda mask, span: BinaryAveragePrecision(thresholds=50)
    ),
    "correlation": ImageMetric(higher_is_better=True, make=lambda mask, span: PixelCorrelation()),
    # structural similarity, Wang et al. 2004
    "ssim": ImageMetric(
        higher_is_better=True, make=lambda mask, span: StructuralSimilarityIndexMeasure(data_range=span)
    ),
}
