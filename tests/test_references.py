"""The references without a model of images: known answers, causality, and what the fitted one may read."""

from dataclasses import replace
from datetime import timedelta

import numpy as np
import pandas as pd
import pytest
import torch
from small_training import small_config
from torch.utils.data import DataLoader

from helpers.data.dataset import Loaders, SolarDataset
from helpers.data.labels import Labels, plan_samples
from helpers.training.references import history, reference_predictions
from helpers.training.tasks import metrics_table

DAYS = {"split.train": ["2014-01-01", "2014-05-01"], "split.val": ["2014-05-06", "2014-06-01"]}
DAYS |= {"split.test": ["2014-06-06", "2014-07-01"], "split.guard_hours": 0}
NOWCAST = {"labels.lead_minutes": 0, "labels.direction": "nearest", "labels.tolerance_minutes": 0}
SPANS, WINDOW = NOWCAST | {"labels.spans_hours": 24}, NOWCAST | {"labels.window_hours": [0, 24]}
LEAD = NOWCAST | {"labels.lead_minutes": 5760, "labels.direction": "forward"}
RULES = {"nowcast": (NOWCAST, 0), "spans": (SPANS, 24), "window": (WINDOW, 24), "lead": (LEAD, 0)}  # and known after
ROTATION = pd.Timedelta(27.27, "D")


@pytest.fixture
def config(tmp_path):
    def make(kind="scalar", **overrides):
        event = {"labels.kind": "event", "target.loss": "bce", "target.metrics": ["log_loss"]}
        return small_config(tmp_path, **(NOWCAST | DAYS | (event if kind == "event" else {}) | overrides))

    return make


def series(kind="scalar", seed=0, days=181, missing=0.05, outputs=1, memory=0.99) -> Labels:
    """Hourly labels (numbers, or 0 and 1) that remember so much from one hour to the next, a few of them missing."""
    draw, steps = np.random.default_rng(seed), 24 * days
    values = np.zeros((steps, outputs))
    for step in range(1, steps):
        values[step] = memory * values[step - 1] + (1 - memory**2) ** 0.5 * draw.normal(size=outputs)
    values = 400 + 70 * values if kind == "scalar" else (values > 1).astype(float)
    there = draw.random(steps) >= missing
    times = pd.date_range("2014-01-01", periods=steps, freq="1h").to_numpy().astype("datetime64[s]")
    return Labels(times[there], values[there])


def loaders_of(labels: Labels, cfg) -> Loaders:
    """Loaders without frames, which no reference looks at."""
    scalar = cfg.model_copy(update={"labels": cfg.labels.model_copy(update={"kind": "scalar"})})
    plan = plan_samples(scalar, labels=labels)
    sets = {name: DataLoader(SolarDataset(None, labels, table)) for name, table in plan.samples.items()}
    targets = sets["train"].dataset.targets
    return Loaders(**sets, target_mean=targets.mean(0), target_std=targets.std(0, correction=0), report="")


def spoiled(labels: Labels, rows: np.ndarray, kind: str) -> Labels:
    values = labels.values.copy()
    values[rows] = 1 - values[rows] if kind == "event" else 9000 - values[rows]
    return replace(labels, values=values)


def known_before(labels: Labels, sample, after: int) -> list[int]:
    """Rows of the labels that are known at a sample, one by one."""
    now, own, wait = sample.time.to_pydatetime(), sample.label_time.to_pydatetime(), timedelta(hours=after)
    return [row for row, time in enumerate(labels.times.tolist()) if time + wait <= now and time < own]


@pytest.mark.parametrize("rules", RULES)
def test_persistence_and_recurrence_say_what_a_plain_loop_finds(config, rules):
    overrides, after = RULES[rules]
    labels, cfg = series(), config(**overrides)
    loaders = loaders_of(labels, cfg)
    for split in ("train", "test"):
        found, data = reference_predictions(loaders, split, cfg), getattr(loaders, split).dataset
        assert list(found) == ["mean of training", "persistence", "recurrence", "past activity"]
        filled = dict.fromkeys(found, 0)
        for n in range(0, len(data), 151):
            sample = data.samples.iloc[n]
            rows, mean = known_before(labels, sample, after), loaders.target_mean.item()
            wanted = sample.label_time - ROTATION
            off = {row: abs(pd.Timestamp(labels.times[row]) - wanted) for row in rows}
            nearest = min(off, key=off.get, default=None)
            near = nearest is not None and off[nearest] <= pd.Timedelta("1h")
            expected = {"persistence": labels.values[rows[-1], 0] if rows else mean}
            expected |= {"recurrence": labels.values[nearest, 0] if near else mean, "mean of training": mean}
            filled["recurrence"] += not near
            for name, value in expected.items():
                assert found[name].prediction[n].tolist() == pytest.approx([value], rel=1e-6), (split, n, name)
        assert (filled["recurrence"] > 0) == (split == "train")  # the first rotation has none before it
        for reference in found.values():
            assert reference.same_samples(found["mean of training"]) and torch.equal(reference.target, data.targets)


@pytest.mark.parametrize("kind", ["scalar", "event"])
@pytest.mark.parametrize("rules", RULES)
def test_no_label_that_is_not_known_yet_changes_what_is_said(config, rules, kind):
    overrides, after = RULES[rules]
    labels, cfg = series(kind), config(kind, **overrides)
    loaders = loaders_of(labels, cfg)
    before, samples = reference_predictions(loaders, "test", cfg), loaders.test.dataset.samples
    assert len(before) == 4
    for n in (0, 1, 100, len(samples) - 1):
        known = known_before(labels, samples.iloc[n], after)
        future = spoiled(labels, np.arange(known[-1] + 1, len(labels)), kind)
        again = reference_predictions(loaders_of(future, cfg), "test", cfg)
        for name, reference in before.items():
            assert torch.equal(again[name].prediction[: n + 1], reference.prediction[: n + 1]), (name, n)
        assert not torch.equal(again["persistence"].prediction, before["persistence"].prediction) or n > 100
        latest = reference_predictions(loaders_of(spoiled(labels, known[-1:], kind), cfg), "test", cfg)
        for name in ("persistence", "past activity"):  # they do go by the last one that is known
            assert latest[name].prediction[n] != before[name].prediction[n]


def test_recurrence_knows_a_sun_that_repeats_itself(config):
    times = pd.date_range("2014-01-01", "2014-07-01", freq="1h").to_numpy().astype("datetime64[s]")
    phase = (times - times[0]) / ROTATION.to_timedelta64()
    labels, cfg = Labels(times, 400 + 100 * np.sin(2 * np.pi * phase)[:, None]), config(**LEAD)
    table = metrics_table(reference_predictions(loaders_of(labels, cfg), "test", cfg), cfg)
    assert table.loc["recurrence", "rmse"] < 1 < 40 < table.loc["persistence", "rmse"]
    month = cfg.model_copy(update={"labels": cfg.labels.model_copy(update={"spans_hours": 720.0})})
    assert "recurrence" not in reference_predictions(loaders_of(labels, cfg), "test", month)  # not over yet
    short = {"split.train": ["2014-01-01", "2014-01-10"], "split.val": ["2014-01-11", "2014-01-14"]}
    short = config(**short, **{"split.test": ["2014-01-15", "2014-01-24"]})
    assert "recurrence" not in reference_predictions(loaders_of(labels, short), "test", short)


def test_where_little_is_known_a_reference_is_left_out(config):
    labels = series(days=40)  # they begin with the test split
    labels = replace(labels, times=labels.times + np.timedelta64(150, "D"))
    periods = {"split.test": ["2014-05-31", "2014-06-03"], "split.train": ["2014-06-10", "2014-06-20"]}
    cfg = config(**SPANS, **periods, **{"split.val": ["2014-06-25", "2014-07-01"]})
    few = cfg.model_copy(update={"labels": cfg.labels.model_copy(update={"spans_hours": 48.0})})
    assert list(reference_predictions(loaders_of(labels, few), "test", few)) == ["mean of training"]
    found = reference_predictions(loaders_of(labels, cfg), "test", cfg)
    assert list(found) == ["mean of training", "persistence", "past activity"]
    unknown = found["persistence"].prediction[:20] == found["mean of training"].prediction[:20]
    assert unknown.all() and found["past activity"].prediction.isfinite().all()


@pytest.mark.parametrize("rules", RULES)
def test_history_is_what_a_plain_loop_finds(config, rules):
    overrides, after = RULES[rules]
    labels, cfg = series("event", outputs=2), config("event", **overrides)
    loaders = loaders_of(labels, cfg)
    data, mean = loaders.train.dataset, loaders.target_mean.numpy()
    features = history(data, data.samples[:0], mean, cfg)
    assert features.shape == (len(data), 2, 8)
    for n in (0, *range(1, len(data), 211)):
        rows = known_before(labels, data.samples.iloc[n], after)
        for k in range(2):
            values = [labels.values[row, k] for row in rows]
            ages = [(labels.times[rows[-1]] - labels.times[row]) / np.timedelta64(1, "h") for row in rows]
            past = [[v for v, age in zip(values, ages, strict=True) if age < hours] for hours in (24, 72, 648)]
            past = [window or [mean[k]] for window in past]
            expected = [values[-1] if rows else mean[k], *(sum(w) / len(w) for w in past), *map(max, past)]
            expected.append(min([age for v, age in zip(values, ages, strict=True) if v == 1] + [648]))
            np.testing.assert_allclose(features[n, k], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["scalar", "event"])
def test_past_activity_gains_on_the_mean_where_labels_remember(config, kind):
    labels, cfg = series(kind, outputs=2, memory=0.9), config(kind, **SPANS | {"labels.spans_hours": 6})
    found = reference_predictions(loaders_of(labels, cfg), "test", cfg)
    squared = {name: (p.prediction - p.target).square().mean(0) for name, p in found.items()}
    assert (squared["past activity"] < 0.9 * squared["mean of training"]).all()
    assert (squared["past activity"] < squared["persistence"]).all()
    said = found["past activity"].prediction
    assert said.shape == found["past activity"].target.shape and (
        kind == "scalar" or 0 <= said.min() <= said.max() <= 1
    )


@pytest.mark.parametrize("kind", ["scalar", "event"])
def test_past_activity_is_fitted_without_the_labels_of_later_steps(config, kind):
    """Training and validation go on after the test split, so that their history would reach into it."""
    periods = {"split.train": [["2014-01-01", "2014-03-01"], ["2014-05-15", "2014-07-01"]]}
    periods |= {"split.val": [["2014-03-05", "2014-04-01"], ["2014-05-12", "2014-05-13"]]}
    periods |= {"split.test": ["2014-04-05", "2014-05-10"]}
    labels, cfg = series(kind), config(kind, **SPANS, **periods)
    loaders = loaders_of(labels, cfg)
    rows = {name: getattr(loaders, name).dataset.samples["label"].to_numpy() for name in ("val", "test")}
    without_test = loaders_of(spoiled(labels, rows["test"], kind), cfg)
    one, other = (reference_predictions(given, "val", cfg)["past activity"] for given in (loaders, without_test))
    earlier = torch.tensor((loaders.val.dataset.samples["time"] < "2014-04-05").tolist())
    assert torch.equal(one.prediction[earlier], other.prediction[earlier])
    assert not torch.equal(one.prediction[~earlier], other.prediction[~earlier])  # they may go by what is known
    both = loaders_of(spoiled(labels, np.concatenate(list(rows.values())), kind), cfg)
    hidden = pd.concat([loaders.val.dataset.samples, loaders.test.dataset.samples])
    mean = loaders.target_mean.numpy()
    seen = [history(given.train.dataset, hidden, mean, cfg) for given in (loaders, both)]
    np.testing.assert_array_equal(*seen)
    seen = [history(given.train.dataset, hidden[:0], mean, cfg) for given in (loaders, both)]
    assert (seen[0] != seen[1]).any()  # they were within reach


def test_past_activity_needs_both_classes_and_few_outputs(config):
    labels, cfg = series("event"), config("event")
    quiet = replace(labels, values=np.where(labels.times[:, None] < np.datetime64("2014-05-05"), 0.0, labels.values))
    assert "past activity" not in reference_predictions(loaders_of(quiet, cfg), "test", cfg)
    assert "past activity" in reference_predictions(loaders_of(labels, cfg), "test", cfg)
    cfg = config()
    assert "past activity" in reference_predictions(loaders_of(series(outputs=20), cfg), "test", cfg)
    many = reference_predictions(loaders_of(series(outputs=21), cfg), "test", cfg)
    assert list(many) == ["mean of training", "persistence", "recurrence"]
    assert many["recurrence"].prediction.shape == many["recurrence"].target.shape
