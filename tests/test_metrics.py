"""Metrics against their formulas written out in NumPy, and what they say where they are not defined."""

import math

import numpy as np
import pytest
import torch

from helpers.metrics import METRICS, compute_metrics

ALL = list(METRICS)


def formulas(p: np.ndarray, t: np.ndarray, threshold: float) -> dict[str, float]:
    """Every metric of one output (N,), from its definition."""
    event, alarm = t >= threshold, p >= threshold
    hits, misses = (alarm & event).sum(), (~alarm & event).sum()
    false, quiet = (alarm & ~event).sum(), (~alarm & ~event).sum()
    n = len(t)
    by_chance = ((hits + misses) * (hits + false) + (quiet + misses) * (quiet + false)) / n
    return {
        "rmse": np.sqrt(np.mean((p - t) ** 2)),
        "mae": np.mean(np.abs(p - t)),
        "r2": 1 - np.sum((p - t) ** 2) / np.sum((t - t.mean()) ** 2),
        "rrse": np.sqrt(np.sum((p - t) ** 2) / np.sum((t - t.mean()) ** 2)),
        "tss": hits / (hits + misses) - false / (false + quiet),
        "hss": (hits + quiet - by_chance) / (n - by_chance),
    }


@pytest.mark.parametrize(("outputs", "offset", "scale"), [(1, 0, 1), (3, 0, 1), (2, -5.5, 0.4), (2, 410, 95)])
def test_all_metrics_agree_with_their_formulas(outputs, offset, scale):
    rng = np.random.default_rng(outputs)
    target = offset + scale * rng.normal(size=(200, outputs))
    prediction = target + 0.7 * scale * rng.normal(size=(200, outputs)) + 0.1 * scale
    prediction, target = prediction.astype(np.float32), target.astype(np.float32)
    found = compute_metrics(torch.from_numpy(prediction), torch.from_numpy(target), ALL, offset + 0.5 * scale)
    pairs = zip(prediction.T.astype(float), target.T.astype(float), strict=True)
    each = [formulas(p, t, offset + 0.5 * scale) for p, t in pairs]
    for name in ALL:
        assert found[name] == pytest.approx(np.mean([values[name] for values in each]), rel=1e-5), name


def test_skills_know_perfect_blind_and_reversed_forecasts():
    target = torch.tensor([0.0, 0, 0, 1, 1])[:, None]
    for prediction, skill in ((target, 1), (torch.zeros(5, 1), 0), (torch.ones(5, 1), 0), (1 - target, -1)):
        found = compute_metrics(prediction, target, ["tss", "hss"], 0.5)
        assert found["tss"] == pytest.approx(skill)
        assert math.copysign(1, found["hss"]) == math.copysign(1, skill) or found["hss"] == pytest.approx(0)


def test_the_threshold_itself_is_an_event():
    target, prediction = torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0], [0.99]])
    assert compute_metrics(prediction, target, ["tss"], 1.0)["tss"] == 1


def test_the_direction_of_better_is_right():
    target = torch.randn(50, 1, generator=torch.Generator().manual_seed(0))
    close, far = (compute_metrics(target + error, target, ALL, 0.3) for error in (0.05, 1.0))
    for name, metric in METRICS.items():
        assert (close[name] > far[name]) is metric.higher_is_better, name


def test_one_dimensional_targets_are_refused_instead_of_broadcast():
    with pytest.raises(ValueError, match=r"Predictions \(4, 1\) and targets \(4,\) must both be \(samples, outputs\)"):
        compute_metrics(torch.zeros(4, 1), torch.zeros(4), ["rmse"])
    with pytest.raises(ValueError, match=r"\(4,\) and targets \(4,\)"):
        compute_metrics(torch.zeros(4), torch.zeros(4), ["rmse"])
    with pytest.raises(ValueError, match=r"\(4, 2\) and targets \(4, 1\)"):
        compute_metrics(torch.zeros(4, 2), torch.zeros(4, 1), ["rmse"])


def test_no_samples_and_unknown_names_are_said():
    with pytest.raises(ValueError, match="no samples to judge; look at the report"):
        compute_metrics(torch.zeros(0, 1), torch.zeros(0, 1), ["rmse"])
    with pytest.raises(KeyError, match=r"Unknown metrics \['accuracy', 'mse'\]; there are rmse, mae,"):
        compute_metrics(torch.zeros(3, 1), torch.zeros(3, 1), ["accuracy", "rmse", "mse"])
    with pytest.raises(ValueError, match="set target.event_threshold"):
        compute_metrics(torch.zeros(3, 1), torch.zeros(3, 1), ["tss"])


@pytest.mark.parametrize("target", [[0.0, 0.1, 0.2], [1.0, 1.1, 1.2]])
def test_skill_without_events_or_without_quiet_is_not_a_number(target):
    found = compute_metrics(torch.tensor([[0.0], [1.0], [0.0]]), torch.tensor(target)[:, None], ["tss", "rmse"], 0.5)
    assert math.isnan(found["tss"]) and found["rmse"] > 0


def test_what_is_relative_to_the_spread_needs_a_spread():
    for prediction, target in (([2.0, 3.0, 4.0], [2.0, 2.0, 2.0]), ([2.5], [2.0])):
        found = compute_metrics(torch.tensor(prediction)[:, None], torch.tensor(target)[:, None], ["r2", "rrse", "mae"])
        assert math.isnan(found["r2"]) and math.isnan(found["rrse"]) and found["mae"] > 0


def test_predictions_that_are_not_numbers_are_not_hidden():
    prediction = torch.tensor([[1.0], [float("nan")]])
    found = compute_metrics(prediction, torch.tensor([[1.0], [2.0]]), ["rmse", "mae", "r2", "rrse", "tss", "hss"], 1.5)
    assert all(math.isnan(value) for value in found.values()), found
