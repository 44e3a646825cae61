"""Metrics on top of TorchMetrics: errors and event skill of numbers, overlap of masks, likeness of images."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torchmetrics
from sklearn import metrics as skill
from torch import Tensor
from torchmetrics.classification import BinaryAveragePrecision, BinaryF1Score, BinaryJaccardIndex
from torchmetrics.image import StructuralSimilarityIndexMeasure as StructuralSimilarity


@dataclass(frozen=True, kw_only=True)
class NumberMetric:
    """A metric of numbers."""

    higher_is_better: bool
    # of prediction and target of a whole split, both (N, K) float64: one value, or one an output (K,), to be averaged
    compute: Callable[..., Tensor]
    of_events: bool = False  # `compute` takes the event threshold as a third argument
    of_alarms: bool = True  # ... and predictions from it on are alarms, else probabilities
    physical: bool = False  # all that `compute` takes is physical, 10**x of logarithms, instead of in target units

    def score(
        self,
        prediction: Tensor,  # (N, K) float in target units; several outputs are averaged with equal weight
        target: Tensor,
        threshold: float | None = None,  # what counts as an event, in target units
        physical: Callable[[Any], Any] = lambda values: values,  # from target units, `cfg.labels.physical`
        alarm: float | None = None,  # from which prediction on an event is forecast; None: `threshold`
    ) -> float:
        """The metric of a whole split; a ValueError where shapes differ: (N,) and (N, 1) would broadcast to N x N."""
        if prediction.shape != target.shape or prediction.ndim != 2:
            raise ValueError(
                f"Predictions {(*prediction.shape,)} and targets {(*target.shape,)} must both be (samples, outputs)."
            )
        given = [prediction.double().contiguous(), target.double().contiguous()]
        if self.of_events:
            given.append(float(np.float32(threshold)))  # as the targets are kept
            if self.of_alarms and alarm is not None:  # moved, so that both thresholds are the same
                given[0] = given[0] - alarm + given[2]
        given = [physical(values) for values in given] if self.physical else given
        return float(self.compute(*given).double().mean())


@dataclass(frozen=True, kw_only=True)
class ImageMetric:
    """A metric of masks and images."""

    higher_is_better: bool
    # of the mask threshold and the span of the training targets (largest minus smallest value): a TorchMetrics metric,
    # which pools all pixels of prediction and target (of masks int), given batch by batch (B, C, H, W)
    make: Callable[[float, float], torchmetrics.Metric]


# ---- Numbers
def mape(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error in per cent of each target; NaN if a target is zero, of which there are no per cent."""
    # not by TorchMetrics, which divides by 1.17e-6 at least: many fluxes in W/m^2 are smaller
    return 100 * ((prediction - target) / target.where(target != 0, torch.nan)).abs().mean()


def unexplained(prediction: Tensor, target: Tensor) -> Tensor:
    """Share of the variance of each output's targets that is not explained (K,), 1 for their mean; NaN if all equal."""
    share = ((prediction - target) ** 2).sum(0) / ((target - target.mean(0)) ** 2).sum(0)
    return share.where((target != target[0]).any(0), torch.nan)


def event_metric(score: Callable[..., Any], counts: bool, higher_is_better: bool = True) -> NumberMetric:
    """A score of yes or no as a metric; NaN for an output that has only events, or none, or a prediction that is NaN.

    With `counts` the score is of hits, false alarms, misses and correct rejections, each (K,); else, as those of
    scikit-learn, of the events and the predictions of one output.
    """

    def compute(prediction: Tensor, target: Tensor, threshold: float) -> Tensor:
        alarm, event = prediction >= threshold, target >= threshold  # (N, K)
        defined = event.any(0) & ~event.all(0) & ~prediction.isnan().any(0)  # (K,)
        if counts:
            found = score(*((a & e).sum(0).double() for a in (alarm, ~alarm) for e in (event, ~event)))
        else:
            columns = zip(event.T.numpy(), prediction.T.numpy(), defined.tolist(), strict=True)
            found = torch.tensor([score(e, p) if known else torch.nan for e, p, known in columns], dtype=torch.float64)
        return found.where(defined, torch.nan)

    return NumberMetric(higher_is_better=higher_is_better, compute=compute, of_events=True, of_alarms=counts)


def brier_skill(events: np.ndarray, probability: np.ndarray) -> float:
    """1 - mean squared error of the probability over that of always saying the share of events (Brier 1950)."""
    return 1 - ((probability - events) ** 2).mean() / events.var()


# of hits h, false alarms f, misses m and correct rejections c: true skill statistic (Hanssen & Kuipers 1965), Heidke
# skill score (HSS_2 of Bobra & Couvidat, arXiv:1411.1405)
SCORES = {
    "tss": lambda h, f, m, c: h / (h + m) - f / (f + c),
    "hss": lambda h, f, m, c: 2 * (h * c - f * m) / ((h + m) * (m + c) + (h + f) * (f + c)),
    "f1": lambda h, f, m, c: 2 * h / (2 * h + f + m),
    "precision": lambda h, f, m, c: h / (h + f),
    "recall": lambda h, f, m, c: h / (h + m),
}
RANKS = {"auc": skill.roc_auc_score, "average_precision": skill.average_precision_score}
PROBABILITIES = {"brier_skill": brier_skill, "log_loss": skill.log_loss}
EVENTS = {name: event_metric(score, counts=True) for name, score in SCORES.items()}  # what yes or no is judged by
EVENTS |= {name: event_metric(score, False, name != "log_loss") for name, score in (RANKS | PROBABILITIES).items()}
NUMBERS = {
    "rmse": NumberMetric(higher_is_better=False, compute=lambda p, t: ((p - t) ** 2).mean(0).sqrt()),
    "mae": NumberMetric(higher_is_better=False, compute=lambda p, t: (p - t).abs().mean(0)),
    "mape": NumberMetric(higher_is_better=False, compute=mape, physical=True),
    "r2": NumberMetric(higher_is_better=True, compute=lambda p, t: 1 - unexplained(p, t)),
    "rrse": NumberMetric(higher_is_better=False, compute=lambda p, t: unexplained(p, t).sqrt()),
    **{name: metric for name, metric in EVENTS.items() if name not in PROBABILITIES},
}


# ---- Masks and images
class PixelCorrelation(torchmetrics.PearsonCorrCoef):
    """Pearson's correlation over all pixels of all images; 0 for a constant prediction, NaN for a constant target."""

    def __init__(self) -> None:
        super().__init__()
        self.set_dtype(torch.float64)

    def update(self, preds: Tensor, target: Tensor) -> None:  # (B, C, H, W)
        super().update(preds.flatten().double(), target.flatten().double())

    def compute(self) -> Tensor:
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
    # Wang et al. 2004
    "ssim": ImageMetric(higher_is_better=True, make=lambda mask, span: StructuralSimilarity(data_range=span)),
}
