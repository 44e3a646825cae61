"""Metrics for numbers: regression errors and skill in forecasting events, on top of TorchMetrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional import mean_absolute_error, mean_squared_error, r2_score, relative_squared_error
from torchmetrics.functional.classification import binary_stat_scores


@dataclass(frozen=True)
class Metric:
    """A number that judges predictions: its function, whether larger is better, and a line for the table.

    The function takes prediction and target, both (N,) float in target units, and the event threshold or None.
    """

    compute: Callable[[Tensor, Tensor, float | None], Tensor]
    higher_is_better: bool
    meaning: str


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


METRICS: dict[str, Metric] = {
    "rmse": Metric(rmse, False, "root mean square error"),
    "mae": Metric(mae, False, "mean absolute error"),
    "r2": Metric(r2, True, "explained variance"),
    "rrse": Metric(rrse, False, "RMSE relative to predicting the mean"),
    "tss": Metric(tss, True, "true skill statistic of events"),
    "hss": Metric(hss, True, "Heidke skill score of events"),
}


def compute_metrics(
    prediction: Tensor, target: Tensor, names: Sequence[str], threshold: float | None = None
) -> dict[str, float]:
    """The named metrics of a whole split.

    Args:
        prediction, target: (N, K) float in target units; several outputs are averaged with equal weight.
        names: keys of `METRICS`.
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
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise KeyError(f"Unknown metrics {unknown}; there are {', '.join(METRICS)}.")
    prediction, target = prediction.double(), target.double()
    values = {}
    for name in names:
        each = [
            METRICS[name].compute(p.contiguous(), t.contiguous(), threshold)
            for p, t in zip(prediction.T, target.T, strict=True)
        ]
        values[name] = float(torch.stack([value.double() for value in each]).mean())
    return values
