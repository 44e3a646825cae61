"""Metrics against their formulas written out in NumPy, and what they say where they are not defined."""

import math
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_training import collected

from helpers.analysis.plots import PLOTS
from helpers.config import KINDS, load_config
from helpers.training.metrics import EVENTS, IMAGES, NUMBERS, RANKS, NumberMetric
from helpers.training.tasks import LOSSES, make_task

ROOT = Path(__file__).parents[1]
ALL = list(NUMBERS)


def compute_metrics(prediction, target, names, threshold=None):
    return {name: NUMBERS[name].score(prediction, target, threshold) for name in names}


def collect(names, threshold, span, *batches, samples=None):
    """What is found in (prediction, target) batches; with `samples` of each image, too."""
    task = "active_region" if set(names) <= set(KINDS["mask"]["metric"]) else "translation"
    cfg = load_config(ROOT / "config.yaml", task=task)
    target = cfg.target.model_copy(update={"metrics": names, "mask_threshold": threshold})
    task = make_task(cfg.model_copy(update={"target": target}), SimpleNamespace(target_span=span))
    times = [{"timestamp": [f"{k}-{i}" for i in range(len(batch[1]))]} for k, batch in enumerate(batches)]
    return collected(task, [(*batch, time) for batch, time in zip(batches, times, strict=True)], samples)


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
        "mape": 100 * np.mean(np.abs(p / t - 1)),
        "r2": 1 - np.sum((p - t) ** 2) / np.sum((t - t.mean()) ** 2),
        "rrse": np.sqrt(np.sum((p - t) ** 2) / np.sum((t - t.mean()) ** 2)),
        "tss": hits / (hits + misses) - false / (false + quiet),
        "hss": (hits + quiet - by_chance) / (n - by_chance),
        "f1": 2 * hits / (2 * hits + false + misses),
        "precision": hits / (hits + false),
        "recall": hits / (hits + misses),
        "auc": np.mean([(a > b) + 0.5 * (a == b) for a in p[event] for b in p[~event]]),
        "average_precision": average_precision(p, event),
    }


def average_precision(p: np.ndarray, event: np.ndarray) -> float:
    """Precision at the prediction of each event, averaged over the events."""
    return np.mean([(event & (p >= level)).sum() / (p >= level).sum() for level in p[event]])


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
    for name in set(ALL) - {"recall"}:  # whoever always warns has the best one
        better = close[name] > far[name] if NUMBERS[name].higher_is_better else close[name] < far[name]
        assert better or name in RANKS and close[name] == far[name] == 1, name  # which a shift does not change
    prediction, target = images()
    for name, metric in IMAGES.items():
        close, far = (collect([name], 0.4, 1.0, (p, target)).values[name] for p in (prediction, 1 - prediction))
        assert (close > far) is metric.higher_is_better, name


def test_one_dimensional_targets_are_refused_instead_of_broadcast():
    with pytest.raises(ValueError, match=r"Predictions \(4, 1\) and targets \(4,\) must both be \(samples, outputs\)"):
        compute_metrics(torch.zeros(4, 1), torch.zeros(4), ["rmse"])
    with pytest.raises(ValueError, match=r"\(4,\) and targets \(4,\)"):
        compute_metrics(torch.zeros(4), torch.zeros(4), ["rmse"])
    with pytest.raises(ValueError, match=r"\(4, 2\) and targets \(4, 1\)"):
        compute_metrics(torch.zeros(4, 2), torch.zeros(4, 1), ["rmse"])


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
    found = compute_metrics(prediction, torch.tensor([[1.0], [2.0]]), ALL, 1.5)
    assert all(math.isnan(value) for value in found.values()), found


def test_an_output_that_cannot_be_judged_is_not_hidden_by_the_others():
    target = torch.tensor([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])  # the second has no spread, and no quiet time
    found = compute_metrics(target + 0.5, target, ALL, 2.5)
    undefined = {"r2", "rrse", *EVENTS} - {"brier_skill", "log_loss"}
    assert {name for name, value in found.items() if math.isnan(value)} == undefined
    prediction = torch.tensor([[1.0, 1.0], [2.0, float("nan")], [3.0, 3.0]])
    assert all(math.isnan(value) for value in compute_metrics(prediction, target, ALL, 2.5).values())


@pytest.mark.parametrize("scale", [1e-7, 1.0])
def test_explained_variance_and_percentages_do_not_depend_on_the_unit(scale):
    """TorchMetrics has floors: 1e-4 in r2_score, 1.17e-6 in its mape; a flux in W/m^2 lies below them."""
    rng = np.random.default_rng(0)
    target = scale * rng.uniform(1, 3, 50)
    prediction = target * rng.uniform(0.7, 1.3, 50)
    found = compute_metrics(*(torch.from_numpy(values)[:, None] for values in (prediction, target)), ["mape", "r2"])
    expected = formulas(prediction, target, 2 * scale)
    assert found == pytest.approx({name: expected[name] for name in found})


# ---------------------------------------------------------------------------------------------------- physical values
def labels(transform: str):
    with_columns = {"labels.transform": transform, "labels.value_columns": ["a", "b", "c"]}
    return load_config(ROOT / "config.yaml", with_columns).labels


@pytest.mark.parametrize("transform", ["none", "log10", "goes"])
def test_percentages_are_of_physical_values_and_the_other_metrics_in_target_units(transform):
    rng = np.random.default_rng(1)
    target = rng.uniform(-9, -3, (40, 3))  # of fluxes from 1e-9 to 1e-3 W/m^2
    prediction = target + rng.normal(0, 0.1, (40, 3))
    both = [torch.from_numpy(values) for values in (prediction, target)]
    some = {name: NUMBERS[name] for name in ("mape", "mae")}
    found = {name: metric.score(*both, physical=labels(transform).physical) for name, metric in some.items()}
    p, t = (prediction, target) if transform == "none" else (10**prediction, 10**target)
    each = [np.mean(np.abs((p[:, k] - t[:, k]) / t[:, k])) for k in range(3)]
    assert found["mape"] == pytest.approx(100 * np.mean(each))
    assert found["mae"] == pytest.approx(np.abs(prediction - target).mean())


def test_a_target_of_zero_has_no_percentage():
    prediction, target = torch.tensor([[1.0], [2.0], [0.0]]), torch.tensor([[1.0], [1.0], [0.0]])
    found = compute_metrics(prediction, target, ["mape", "mae"])
    assert math.isnan(found["mape"]) and found["mae"] == pytest.approx(1 / 3)
    assert compute_metrics(prediction[:2], target[:2], ["mape"])["mape"] == pytest.approx(50)
    assert compute_metrics(-prediction[:2], -target[:2], ["mape"])["mape"] == pytest.approx(50)


def test_a_metric_of_ones_own_may_ask_for_physical_values():
    given = []

    def largest(*values):
        given.append(values)
        return (values[0] - values[1]).abs().amax(0)

    kinds = {"label": {}, "physical": {"physical": True}, "events": {"physical": True, "of_events": True}}
    own = {name: NumberMetric(higher_is_better=False, compute=largest, **kind) for name, kind in kinds.items()}
    prediction, target = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    physical = labels("log10").physical
    found = {name: metric.score(prediction, target, 2.0, physical) for name, metric in own.items()}
    assert found == pytest.approx({"label": 1, "physical": (9 + 90) / 2, "events": (9 + 90) / 2})
    assert [len(values) for values in given] == [2, 2, 3] and given[2][2] == 100


def test_a_spectrum_is_judged_at_once():
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(200, 40, generator=generator) - 4
    prediction = target + 0.1 * torch.randn(200, 40, generator=generator)
    calls = []
    counted = {
        name: replace(metric, compute=lambda *given, of=metric.compute: calls.append(given[0].shape) or of(*given))
        for name, metric in NUMBERS.items()
    }
    found = {name: metric.score(prediction, target, -4.0) for name, metric in counted.items()}
    assert calls == [(200, 40)] * len(NUMBERS)  # not once an output, which took 3 s
    some = [formulas(prediction[:, k].double().numpy(), target[:, k].double().numpy(), -4.0) for k in range(40)]
    assert found == pytest.approx({name: np.mean([values[name] for values in some]) for name in NUMBERS}, rel=1e-6)


# ---------------------------------------------------------------------------------------------------- masks and images
def images(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and masks (5, 1, 32, 32) that agree in part."""
    generator = torch.Generator().manual_seed(seed)
    target = (torch.rand(5, 1, 32, 32, generator=generator) > 0.8).float()
    return (0.5 * target + 0.4 * torch.rand(5, 1, 32, 32, generator=generator)).clamp(0, 1), target


def test_masks_are_judged_by_their_overlap_over_all_pixels():
    prediction, target = images()
    called, inside = prediction >= 0.4, target == 1
    both, either = (called & inside).sum(), (called | inside).sum()
    names, batches = ["iou", "dice", "average_precision"], ((prediction[:2], target[:2]), (prediction[2:], target[2:]))
    found = collect(names, 0.4, 1.0, *batches).values
    assert found["iou"] == pytest.approx((both / either).item())
    assert found["dice"] == pytest.approx((2 * both / (called.sum() + inside.sum())).item())
    order = prediction.flatten().argsort(descending=True)
    hits = target.flatten()[order]
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    assert found["average_precision"] == pytest.approx(((precision * hits).sum() / hits.sum()).item(), abs=1e-2)


def test_the_averaged_edge_of_a_finer_mask_is_inside_from_one_half():
    prediction, target = torch.tensor([[[[0.9, 0.9], [0.1, 0.1]]]]), torch.tensor([[[[1.0, 0.5], [0.25, 0.0]]]])
    assert collect(["iou"], 0.5, 1.0, (prediction, target)).values["iou"] == 1


def test_empty_masks_agree_with_empty_predictions_alone():
    nothing, something = torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
    batches = ((nothing, nothing), (something, nothing))
    scores = collect(["iou", "dice"], 0.5, 1.0, *batches, samples=0).scores
    assert scores["iou"].tolist() == scores["dice"].tolist() == [1, 0]


def test_images_are_judged_by_error_and_likeness():
    prediction, target = images()
    prediction, target = 300 * prediction + 1000, 300 * target  # an offset leaves the correlation
    names, batches = (
        ["rmse", "mae", "correlation", "ssim"],
        ((prediction[:2], target[:2]), (prediction[2:], target[2:])),
    )
    judged = collect(names, 0.5, 300.0, *batches, samples=0)
    found, both = judged.values, torch.stack([prediction.flatten(), target.flatten()])
    assert found["rmse"] == pytest.approx((prediction - target).square().mean().sqrt().item(), rel=1e-5)
    assert found["mae"] == pytest.approx((prediction - target).abs().mean().item(), rel=1e-5)
    assert found["correlation"] == pytest.approx(torch.corrcoef(both.double())[0, 1].item(), rel=1e-6)
    first = torch.stack([prediction[0].flatten(), target[0].flatten()])
    assert judged.scores["correlation"][0] == pytest.approx(torch.corrcoef(first.double())[0, 1].item(), rel=1e-6)
    perfect = collect(["ssim", "correlation"], 0.5, 300.0, (target, target))
    assert perfect.values == pytest.approx({"ssim": 1, "correlation": 1}, rel=1e-5)
    assert found["ssim"] < 0.9


def test_a_large_offset_leaves_the_correlation_over_many_batches():
    torch.manual_seed(0)
    target = torch.randn(40, 1, 16, 16)
    prediction = target + torch.randn_like(target) + 1e5
    batches = zip(prediction[:, None], target[:, None], strict=True)
    both = torch.stack([prediction.flatten(), target.flatten()]).double()
    found = collect(["correlation"], 0.5, 1.0, *batches).values["correlation"]
    assert found == pytest.approx(torch.corrcoef(both)[0, 1].item(), rel=1e-9)


def test_a_constant_image_has_no_likeness():
    flat, varied = torch.full((2, 1, 16, 16), 3.3), torch.rand(2, 1, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert collect(["correlation"], 0.5, 1.0, (flat, varied)).values["correlation"] == 0
        assert math.isnan(collect(["correlation"], 0.5, 1.0, (varied, flat)).values["correlation"])


def test_the_names_that_the_config_allows_are_those_there_are():
    assert set(KINDS["scalar"]["metric"]) == set(NUMBERS) and set(KINDS["event"]["metric"]) == set(EVENTS)
    assert {*KINDS["mask"]["metric"], *KINDS["image"]["metric"]} == set(IMAGES)
    for allowed in KINDS.values():
        assert set(allowed["loss"]) <= set(LOSSES) and set(allowed["figure"]) <= set(PLOTS)
    assert set(LOSSES) == {name for kind in KINDS.values() for name in kind["loss"]}
