"""Yes or no: loss, probabilities, thresholds, labels, figures and comparisons of events, against plain formulas."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from sklearn import metrics as skill
from sklearn.linear_model import LogisticRegression
from small_training import Linear, numbers, small_config
from torch.nn import functional as F

from helpers.analysis import comparison, diagnostics, plots
from helpers.config import ConfigError
from helpers.data.labels import labels_of, sample_window
from helpers.training.loop import fit, predict, predict_splits
from helpers.training.metrics import NumberMetric
from helpers.training.references import reference_predictions, verdict
from helpers.training.tasks import Predictions, make_task
from helpers.training.tracking import list_runs, start_run

ALL = ["log_loss", "tss", "hss", "f1", "precision", "recall", "auc", "average_precision", "brier_skill"]
EVENT = {"labels.kind": "event", "target.loss": "bce", "target.metrics": ALL}
WEIGHTS = {"none": 0, "sqrt": 0.5, "balanced": 1}
TIMES = [time.isoformat() for time in pd.date_range("2014-01-01", periods=60, freq="6h")]


@pytest.fixture
def config(tmp_path):
    return lambda **overrides: small_config(tmp_path, **(EVENT | overrides))


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def yes_or_no(outputs: int = 1, **how):
    """The loaders of `numbers` with events instead: what is above 400 + 30, or above 10."""
    loaders = numbers(outputs=outputs, **how)
    for data in (loaders.train.dataset, loaders.val.dataset, loaders.test.dataset):
        relabel(data, (data.targets > torch.tensor([430.0, 10.0])[:outputs]).float())
    return with_share(loaders)


def relabel(data, targets):
    data.targets = targets
    data.labels.values[:] = targets.double().numpy()


def with_share(loaders):
    loaders.target_mean, loaders.target_std = (
        loaders.train.dataset.targets.mean(0),
        loaders.train.dataset.targets.std(0, correction=0),
    )
    return loaders


def said(*probabilities, target, threshold=None) -> Predictions:
    rows = torch.tensor(probabilities)[:, None], torch.tensor(target, dtype=torch.float32)[:, None]
    return Predictions(*rows, TIMES[: len(target)], threshold)


def forecasts(seed: int = 0, size: int = 60) -> Predictions:
    """Probabilities and events that know of each other."""
    draw = np.random.default_rng(seed)
    truth = draw.random(size) < 0.3
    probability = (draw.random(size) + 0.6 * truth).clip(0, 1.5) / 1.6
    return said(*probability.astype(np.float32).tolist(), target=truth.tolist())


# ---------------------------------------------------------------------------------------------------- loss
@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_loss_is_the_weighted_cross_entropy_of_the_probability_with_its_odds_raised(config, weights):
    loaders = yes_or_no(outputs=2)
    task, share = make_task(config(**{"target.weights": weights}), loaders), loaders.target_mean.numpy()
    output = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    target = loaders.train.dataset.targets[:16]
    weight = ((1 - share) / share) ** WEIGHTS[weights]
    odds = np.exp(output.numpy()) * share / (1 - share)
    probability = task.to_units(output).numpy()
    np.testing.assert_allclose(probability, odds / (1 + odds), rtol=1e-5)
    raised, t = weight * odds / (1 + weight * odds), target.numpy()
    expected = -(weight * t * np.log(raised) + (1 - t) * np.log(1 - raised)).mean()
    assert task.loss(output, target).item() == pytest.approx(expected, rel=1e-5)
    if weights == "none":
        each = [skill.log_loss(t[:, k], probability[:, k].astype(float)) for k in range(2)]
        assert task.loss(output, target).item() == pytest.approx(np.mean(each), rel=1e-5)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_fresh_model_says_the_share_and_is_not_pushed_off_it(config, weights):
    loaders, model = yes_or_no(), Linear()
    cfg = config(**{"target.weights": weights})
    before = predict(model, loaders, "test", cfg).prediction
    torch.testing.assert_close(before, loaders.target_mean.expand(len(before), 1))
    task, data = make_task(cfg, loaders), loaders.train.dataset
    task.loss(model({"ts": data.ts}), data.targets).backward()
    assert abs(model.head.bias.grad.item()) < 1e-6 < model.head.weight.grad.abs().max()


@pytest.mark.parametrize("weights", WEIGHTS)
def test_probabilities_stay_true_whatever_the_weights(config, weights):
    """A logistic world: trained to the end, the model says the probability with which events were drawn."""
    loaders, draw = numbers(train_samples=20_000), torch.Generator().manual_seed(1)
    x = torch.randn(20_000, 2, generator=draw)
    truth = torch.sigmoid(-2.5 + 1.5 * x[:, :1] - x[:, 1:])
    targets = (torch.rand(20_000, 1, generator=draw) < truth).float()
    loaders.target_mean = targets.mean(0)
    task, head = make_task(config(**{"target.weights": weights}), loaders), torch.nn.Linear(2, 1)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def step():
        optimizer.zero_grad()
        loss = task.loss(head(x), targets)
        loss.backward()
        return loss

    optimizer.step(step)
    found = task.to_units(head(x)).detach()
    assert found.mean().item() == pytest.approx(truth.mean().item(), abs=0.01)
    assert (found - truth).abs().mean() < 0.02
    if weights == "none":
        plain = LogisticRegression(C=1e6).fit(x.numpy(), targets[:, 0].numpy())
        np.testing.assert_allclose(found[:, 0], plain.predict_proba(x.numpy())[:, 1], atol=2e-3)


def own_loss(output, target, share):
    own_loss.given = output, target, share
    return F.binary_cross_entropy_with_logits(output, target)


csi = NumberMetric(
    higher_is_better=True,
    of_events=True,
    compute=lambda p, t, level: torch.tensor(skill.jaccard_score((t >= level).numpy(), (p >= level).numpy())),
)
misses = NumberMetric(
    higher_is_better=False,
    of_events=True,
    compute=lambda p, t, level: ((p >= level) != (t >= level)).double().mean(),
)


def test_a_loss_of_ones_own_gets_logits_events_and_the_share(config):
    loaders = yes_or_no()
    task = make_task(config(**{"target.loss": "test_events:own_loss"}), loaders)
    from test_events import own_loss as called  # as the configuration imports it

    output, target = torch.randn(8, 1), loaders.train.dataset.targets[:8]
    task.loss(output, target)
    logits, given, share = called.given
    torch.testing.assert_close(logits.sigmoid(), task.to_units(output))
    assert torch.equal(given, target) and torch.equal(share, loaders.target_mean)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ({"target.loss": "mse"}, "target.loss"),
        ({"target.metrics": ["rmse"]}, "target.metrics"),
        ({"target.event_threshold": 0.5}, "target.event_threshold"),
        ({"target.weights": "sqrt", "target.loss": "test_events:own_loss"}, "target.weights"),
        ({"labels.kind": "scalar", "target.metrics": ["rmse"]}, "target.loss"),
        ({"labels.kind": "scalar", "target.loss": "mse", "target.metrics": ["brier_skill"]}, "target.metrics"),
        ({"labels.transform": "log10"}, "labels.transform"),
    ],
)
def test_what_does_not_suit_events_is_refused(config, overrides, key):
    with pytest.raises(ConfigError, match="has a mistake") as error:
        config(**overrides)
    assert f"- {key}" in str(error.value)


# ---------------------------------------------------------------------------------------------------- threshold
def test_metrics_are_those_of_scikit_learn_at_the_chosen_threshold_and_as_is(config):
    cfg, p = config(), forecasts()
    p.threshold = p.choose_threshold(cfg)
    found, truth, probability = p.metrics(cfg), p.target[:, 0].numpy(), p.prediction[:, 0].double().numpy()
    alarm = probability >= p.threshold
    tn, fp, fn, tp = skill.confusion_matrix(truth, alarm).ravel()
    expected = {
        "log_loss": skill.log_loss(truth, probability),
        "tss": tp / (tp + fn) - fp / (fp + tn),
        "hss": 2 * (tp * tn - fn * fp) / ((tp + fn) * (fn + tn) + (tp + fp) * (fp + tn)),
        "f1": skill.f1_score(truth, alarm),
        "precision": skill.precision_score(truth, alarm),
        "recall": skill.recall_score(truth, alarm),
        "auc": skill.roc_auc_score(truth, probability),
        "average_precision": skill.average_precision_score(truth, probability),
        "brier_skill": 1 - skill.brier_score_loss(truth, probability) / np.mean((truth - truth.mean()) ** 2),
        "tss_at_0.5": skill.balanced_accuracy_score(truth, probability >= 0.5, adjusted=True),
    }
    assert found == pytest.approx(expected)
    levels = np.linspace(0.01, 0.99, 500)
    best = max(skill.balanced_accuracy_score(truth, probability >= level, adjusted=True) for level in levels)
    assert found["tss"] == pytest.approx(best) and found["tss"] > found["tss_at_0.5"]


@pytest.mark.parametrize("first", ["f1", "hss", "test_events:csi", "test_events:misses"])
def test_the_first_metric_that_depends_on_a_threshold_chooses_it(config, first):
    cfg, p = config(**{"target.metrics": ["auc", "log_loss", first, "tss"]}), forecasts()
    p.threshold = p.choose_threshold(cfg)
    others = [forecasts().__class__(p.prediction, p.target, p.timestamps, level) for level in (0.2, 0.35, 0.5, 0.6)]
    scores = [other.metrics(cfg)[first] for other in others]
    own = p.metrics(cfg)[first]
    assert own <= min(scores) if first.endswith("misses") else own >= max(scores)


@pytest.mark.parametrize("first", ["f1", "hss", "tss"])
def test_the_threshold_of_rare_events_is_the_best_there_is(config, first):
    draw = np.random.default_rng(0)
    truth = draw.random(10_000) < 0.002
    probability = 1 / (1 + np.exp(10.7 - 3 * (draw.normal(size=10_000) + 3 * truth)))
    cfg, rows = config(**{"target.metrics": [first]}), [torch.tensor(x).float()[:, None] for x in (probability, truth)]
    p = Predictions(*rows, ["2014-01-01"] * 10_000)
    p.threshold = p.choose_threshold(cfg)
    scores = [Predictions(*rows, p.timestamps, level).metrics(cfg)[first] for level in rows[0][truth, 0].tolist()]
    assert p.metrics(cfg)[first] == pytest.approx(max(scores))


@pytest.mark.parametrize("kind", ["event", "scalar"])
def test_the_threshold_is_that_of_validation_whatever_the_test_split_holds(config, kind):
    level = {"labels.kind": "scalar", "target.loss": "mse", "target.metrics": ["rmse"], "target.event_threshold": 430.0}
    cfg, loaders, model = config(**level if kind == "scalar" else {}), yes_or_no(), Linear()
    loaders = numbers() if kind == "scalar" else loaders
    fit(model, loaders, cfg)
    first = predict_splits(model, loaders, cfg)
    assert first["test"].threshold == first["val"].threshold == first["val"].choose_threshold(cfg)
    data = loaders.test.dataset
    data.targets, data.ts = data.targets.flip(0), -3 * data.ts
    again = predict_splits(model, loaders, cfg)
    assert not torch.equal(again["test"].prediction, first["test"].prediction)
    assert again["test"].threshold == first["val"].threshold
    if kind == "scalar":  # in target units, near what is an event
        assert 350 < first["val"].threshold < 500 and "tss" in first["test"].metrics(cfg)
    relabel_val = loaders.val.dataset
    relabel_val.targets = relabel_val.targets.flip(0)
    assert predict_splits(model, loaders, cfg)["test"].threshold != first["val"].threshold


def test_a_run_keeps_its_threshold_and_is_judged_at_it_later(config):
    cfg, p = config(), forecasts()
    with start_run(cfg) as run:
        p.table().to_csv(run.folder / "predictions_test.csv", index=False)
        run.summary({"threshold": 0.3712345678901234})
    assert json.loads((run.folder / "summary.json").read_text())["metrics"]["threshold"] == 0.3712345678901234
    found = comparison.saved_predictions(run.folder, cfg)
    p.threshold = 0.3712345678901234
    assert found.metrics(cfg) == p.metrics(cfg) and torch.equal(found.prediction, p.prediction)


# ---------------------------------------------------------------------------------------------------- one class only
def test_one_event_in_five_hundred_is_learned_and_judged(config):
    loaders = yes_or_no(train_samples=500, batch_size=100)
    data = loaders.train.dataset
    relabel(data, (torch.arange(500) == data.ts.mean((2, 3, 4))[:, 0].argmax()).float()[:, None])
    cfg = config(**{"target.weights": "balanced", "training.epochs": 2})
    history = fit(Linear(), with_share(loaders), cfg)
    assert np.isfinite(history.table.to_numpy(float)).all()


def test_a_validation_split_of_one_class_cannot_choose_and_says_so(config):
    loaders = yes_or_no()
    relabel(loaders.val.dataset, torch.zeros(12, 1))
    with pytest.raises(ValueError, match=r"validation log_loss is not a number.*in every column.*max_val_samples"):
        fit(Linear(), loaders, config())
    found = predict_splits(Linear(), loaders, config())
    assert found["val"].threshold is None and all(map(math.isnan, found["val"].metrics(config()).values()))
    assert all(map(math.isfinite, (found["test"].metrics(config())[name] for name in ("log_loss", "tss", "auc"))))


@pytest.mark.parametrize("value", [0, 1])
@pytest.mark.parametrize("column", [0, 1])
def test_a_training_split_of_one_class_is_refused_and_its_column_named(config, column, value):
    loaders, cfg = yes_or_no(outputs=2), config(**{"labels.value_columns": ["one", "other"]})
    data = loaders.train.dataset
    relabel(data, torch.where(torch.arange(2) == column, float(value), data.targets))
    with pytest.raises(
        ValueError, match=f"column {column + 1} of 2 in the training split is {value}, so .*split.train"
    ):
        fit(Linear(2), with_share(loaders), cfg)
    floor = reference_predictions(loaders, "test", cfg)
    assert "past activity" not in floor and "mean of training" in floor


def test_labels_that_are_all_equal_are_shown_and_refused(config):
    loaders, cfg = yes_or_no(), config()
    for data in (loaders.train.dataset, loaders.val.dataset, loaders.test.dataset):
        relabel(data, torch.zeros_like(data.targets))
    table = {"train": pd.DataFrame({"target": np.zeros(32)}, loaders.train.dataset.samples["time"])}
    plots.plot_labels(table, cfg).canvas.draw()
    floor = reference_predictions(with_share(loaders), "test", cfg)
    assert all(math.isnan(value) for p in floor.values() for value in p.metrics(cfg).values())
    assert "not a number" in verdict(floor["mean of training"], floor, cfg)
    with pytest.raises(ValueError, match="nothing to tell apart"):
        predict(Linear(), loaders, "test", cfg)


def test_a_column_of_one_class_makes_no_score_of_the_others(config):
    p = forecasts()
    p.prediction, p.target = p.prediction.repeat(1, 2), torch.cat([p.target, torch.zeros(60, 1)], 1)
    assert p.choose_threshold(config()) is None
    assert all(map(math.isnan, p.metrics(config()).values()))


def test_the_precision_of_no_alarm_is_not_a_number(config):
    found = said(0.1, 0.2, 0.3, target=[0, 1, 0]).metrics(config())
    assert math.isnan(found["precision"]) and found["recall"] == found["f1"] == 0


# ---------------------------------------------------------------------------------------------------- labels
@pytest.fixture
def read(tmp_path):
    def labels(text, **overrides):
        (tmp_path / "mine.csv").write_text(text)
        own = {"labels.path": str(tmp_path / "mine.csv"), "labels.time_column": "time", "labels.transform": "none"}
        own |= {"labels.value_columns": ["value"], "labels.lead_minutes": 0, "labels.direction": "nearest"}
        return labels_of(small_config(tmp_path, **(EVENT | own | overrides)))

    return labels


def rows(*cells) -> str:
    times = pd.date_range("2014-01-03", periods=len(cells), freq="1D")
    return "\n".join(["time,value", *(f"{time:%Y-%m-%d},{cell}" for time, cell in zip(times, cells, strict=True))])


GOES = {"labels.transform": "goes", "labels.event_at": "M1.0"}


@pytest.mark.parametrize(
    ("cells", "overrides", "expected", "empty"),
    [
        (["0", "1", "", "1.0"], {}, [0, 1, 1], 1),
        (["FQ", "M1.0", "C9.9", "X2", "", "A0.0"], GOES, [0, 1, 0, 1, 0], 1),
        (["-3", "0", "2", ""], {"labels.event_at": 0}, [0, 1, 1], 1),
        (["-3", "0.5", "2"], {"labels.event_at": 0.5}, [0, 1, 1], 0),
        (["1e-6", "2e-5"], {"labels.event_at": 1e-5}, [0, 1], 0),
    ],
)
def test_what_is_an_event(read, cells, overrides, expected, empty):
    found = read(rows(*cells), **overrides)
    assert found.values[:, 0].tolist() == expected and found.dropped.get("label empty", 0) == empty


@pytest.mark.parametrize(
    ("cells", "overrides", "message"),
    [
        (["0", "2"], {}, "other numbers than 0 and 1 in value. Set labels.event_at"),
        (["C1.0", "M1.0"], {"labels.transform": "goes"}, "other numbers than 0 and 1"),
        (["C1.0"], {"labels.event_at": 1e-5}, "for flare classes such as M2.5 set labels.transform: goes"),
        (["C1.0"], GOES | {"labels.event_at": "Q1.0"}, "column event_at, which is no GOES class"),
        (["0", "yes"], {}, 'has "yes" in its column value'),
    ],
)
def test_what_is_neither_yes_nor_no_is_refused(read, cells, overrides, message):
    with pytest.raises(ValueError, match=message):
        read(rows(*cells), **overrides)


@pytest.mark.parametrize(("level", "expected"), [("M1.0", [5, 6]), ("X1.0", [6]), (None, [2, 5, 6])])
def test_a_list_of_events_becomes_yes_or_no_in_a_window(read, level, expected):
    text = rows("B1", "FQ", "C2.0", "", "FQ", "M1.0", "X1.5", "FQ", "B1.0")
    own = {"labels.window_hours": [0, 24], "labels.event_at": level, "data.every_minutes": 1440}
    found = read(text, **GOES | own)
    days = (found.times - np.datetime64("2014-01-03", "s")) / np.timedelta64(1, "D")
    yes = [round(day) + 1 for day, value in zip(days, found.values[:, 0], strict=True) if value == 1 and day < 7]
    assert set(np.unique(found.values)) == {0, 1} and yes == expected
    assert found.dropped["event without a value"] == 4  # FQ is no event


# ---------------------------------------------------------------------------------------------------- curves
def curve(train, val):
    return pd.DataFrame({"train_loss": train, "val_loss": val})


@pytest.mark.parametrize(
    "table",
    [curve([0.7, 0.2, -0.4, -0.6], [0.7, 0.5, 0.3, 0.2]), curve([0.7, 0.4, 0.2], [0.7, 0.1, -0.1]),
     curve([-0.1, -0.5], [-0.1, -0.5])],
)  # fmt: skip
def test_a_loss_below_zero_is_never_healthy(config, table):
    found = diagnostics.judge_curve(table, config())
    assert found.word == "below zero" and "targets are not 0 and 1" in found.advice
    assert diagnostics.judge_curve(table.abs(), config()).word != "below zero"


def test_targets_beyond_0_and_1_do_make_a_cross_entropy_negative(config):
    loaders = yes_or_no()
    loaders.train.dataset.targets *= 3
    history = fit(
        Linear(), loaders, config(**{"training.epochs": 8, "training.lr": 1.0, "training.gradient_clip": 9.0})
    )
    assert diagnostics.judge_curve(history.table, config()).word == "below zero"


@pytest.mark.parametrize("experiment", ["baseline", "finetune"])
@pytest.mark.parametrize("regime", ["lora", "probe", "full", "scratch"])
def test_advice_names_lora_only_where_it_trains(config, regime, experiment):
    cfg = config(**{"training.regime": regime}).model_copy(update={"experiment": experiment})
    found = diagnostics.judge_curve(curve([1, 0.5, 0.2, 0.1, 0.1], [1, 0.5, 0.4, 0.9, 0.9]), cfg)
    lora = regime == "lora" and experiment == "finetune"
    assert found.word == "overfitting" and ("lora" in found.advice) == lora
    head_alone = experiment == "baseline" or regime == "probe"
    assert ("training.head_weight_decay" in found.advice) == head_alone and "weight_decay" in found.advice


# ---------------------------------------------------------------------------------------------------- comparison
def leave_runs(config, finetune, baseline, truth, hours, threshold=0.5, **overrides):
    """A finished run of each experiment with these probabilities of the same samples."""
    times = [time.isoformat() for time in pd.date_range("2015-01-01", periods=len(truth), freq=f"{hours}h")]
    target = torch.tensor(truth, dtype=torch.float32)[:, None]
    cfg = config(**{"target.metrics": ["tss"], "compare.draws": 200} | overrides)
    for experiment, values in {"finetune": finetune, "baseline": baseline}.items():
        with start_run(cfg.model_copy(update={"experiment": experiment})) as run:
            p = Predictions(torch.tensor(values, dtype=torch.float32)[:, None], target, times)
            p.table().to_csv(run.folder / "predictions_test.csv", index=False)
            run.summary({"threshold": threshold})
    return list_runs(cfg.runs_folder), cfg


def worlds(events: int, size: int = 240, seed: int = 0):
    """A good forecast, a poor one, and the truth with so many events, all apart."""
    draw, truth = np.random.default_rng(seed), np.zeros(size)
    truth[draw.choice(size, events, replace=False)] = 1
    good, poor = (0.2 + 0.1 * truth * (draw.random(size) < hit) for hit in (0.9, 0.3))
    return good.astype(np.float32), poor.astype(np.float32), truth


@pytest.mark.parametrize(("days", "blocks"), [(None, 20), (1.0, 60), (10.0, 6)])
def test_blocks_are_as_long_as_a_label_looks_ahead_and_tss_is_at_the_threshold(config, days, blocks):
    good, poor, truth = worlds(60)
    own = {"labels.spans_hours": 72, "labels.lead_minutes": 0, "labels.tolerance_minutes": 0}
    own |= {"labels.direction": "nearest", "compare.block_days": days}
    runs, cfg = leave_runs(config, good, poor, truth, 6, threshold=0.25, **own)
    assert sample_window(cfg)[1] == pd.Timedelta("72h")
    found = comparison.paired_difference(runs, cfg, "tss")
    tss = [skill.balanced_accuracy_score(truth, values >= 0.25, adjusted=True) for values in (good, poor)]
    assert found.blocks == blocks and found.value == pytest.approx(tss[0] - tss[1])
    assert found.lost == 0 < found.low < found.value < found.high and "is better" in str(found)


def test_draws_without_an_event_leave_an_interval_unless_they_are_most(config):
    good, poor, truth = worlds(2)
    runs, cfg = leave_runs(config, truth.astype(np.float32), 1 - truth.astype(np.float32), truth, 6)
    found = comparison.paired_difference(runs, cfg)  # about exp(-2) of the draws hold none of the two
    assert 0.05 < found.lost < 0.3 and found.low == found.high == found.value == 2 and "is better" in str(found)
    few = str(comparison.Difference(("baseline", "finetune"), "tss", 0.4, 0.1, 0.6, 9, math.nan, 0.7))
    assert few.startswith("The difference CANNOT BE TOLD FROM NOISE: tss is not a number in 70% of the draws")


def test_one_block_of_time_or_no_event_at_all_is_said(config):
    good, poor, truth = worlds(3, size=8)
    runs, cfg = leave_runs(config, good, poor, truth, 1, threshold=0.25)
    found = comparison.paired_difference(runs, cfg)
    assert found.blocks == 1 and "CANNOT BE TOLD FROM NOISE" in str(found)


def test_without_any_event_nothing_can_be_measured(config):
    good, poor, _ = worlds(3)
    runs, cfg = leave_runs(config, good, poor, np.zeros(240), 6)
    found = comparison.paired_difference(runs, cfg)
    assert found.lost == 1 and str(found).startswith("tss cannot be measured")


def test_who_is_better_knows_the_direction_and_leaves_out_what_cannot_be_told(config):
    names = ["test_log_loss", "test_tss", "test_auc", "test_hss"]
    cfg = config(**{"target.metrics": ["log_loss", "tss", "hss", "auc"]})
    table = pd.DataFrame({"one": [0.3, 0.5, math.nan, 0.2], "other": [0.4, 0.4, 0.9, 0.2]}, names)
    said = comparison.who_is_better(table, cfg)
    assert said == "one is better, by every metric that tells them apart: log_loss, tss."
    table.loc["test_tss"] = [0.4, 0.5]
    assert "DISAGREE" in (said := comparison.who_is_better(table, cfg)) and "by log_loss it is one; by tss" in said
    assert comparison.who_is_better(table * math.nan, cfg) == "No metric tells these runs apart."
    assert comparison.who_is_better(table[["one"]], cfg) == "There is nothing to compare with yet."


def test_the_verdict_knows_the_direction_and_what_is_not_a_number(config):
    cfg, truth = config(), [0, 1, 0, 1]
    sure, poor = said(0.1, 0.9, 0.1, 0.9, target=truth), said(0.4, 0.6, 0.4, 0.6, target=truth)
    lost = said(0.1, math.nan, 0.1, 0.9, target=truth)
    best = {"poor": poor, "lost": lost, "worse": said(0.9, 0.1, 0.9, 0.1, target=truth)}
    assert verdict(sure, best, cfg).startswith("The model beats the best reference, poor: log_loss 0.105 against 0.511")
    assert "DOES NOT BEAT the best reference, sure" in verdict(poor, {"sure": sure, **best}, cfg)
    assert "DOES NOT BEAT" in verdict(poor, {"poor": poor}, cfg)
    assert verdict(lost, best, cfg) == verdict(sure, {"lost": lost}, cfg)
    auc = config(**{"target.metrics": ["auc"]})
    assert verdict(sure, {"worse": best["worse"], "lost": lost}, auc).startswith(
        "The model beats the best reference, w"
    )


# ---------------------------------------------------------------------------------------------------- figures
def test_the_figure_holds_the_numbers_that_it_should(config):
    cfg, p, other = config(), forecasts(), forecasts(seed=1)
    p.threshold = other.threshold = p.choose_threshold(cfg)
    figure = plots.plot_events({"val": other, "test": p}, cfg, {"persistence": other, "recurrence": p})
    figure.canvas.draw()
    time, roc, precision = figure.axes
    truth, probability = p.target[:, 0].numpy() == 1, p.prediction[:, 0].numpy()
    np.testing.assert_array_equal(time.lines[0].get_ydata(), probability)
    assert list(time.lines[1].get_xdata()) == list(pd.to_datetime(p.timestamps)[truth])
    assert time.lines[2].get_ydata()[0] == p.threshold and "log_loss" in time.get_title()
    lines = {line.get_label(): line for line in roc.lines}
    area = np.trapezoid(lines["test"].get_ydata(), lines["test"].get_xdata())
    assert area == pytest.approx(skill.roc_auc_score(truth, probability))
    alarm = probability >= p.threshold
    for axis, wanted in (
        (roc, (alarm[~truth].mean(), alarm[truth].mean())),
        (precision, (alarm[truth].mean(), truth[alarm].mean())),
    ):
        points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axis.lines if line.get_marker() == "o"]
        assert len(points) == 4 and points[1] == pytest.approx(wanted)
    labelled = [line for line in precision.lines if not line.get_label().startswith("_")]
    assert len({line.get_color() for line in labelled}) == 4
    recall, curve = lines["test"], {line.get_label(): line for line in precision.lines}["test"]
    assert recall.get_color() == curve.get_color() == plots.SPLIT_COLORS["test"]
    x, y = curve.get_xdata(), curve.get_ydata()
    assert -np.sum(np.diff(x) * y[:-1]) == pytest.approx(skill.average_precision_score(truth, probability))


@pytest.mark.parametrize("value", [0, 1])
def test_a_split_of_one_class_is_drawn_without_curves_and_says_so(config, value):
    p = said(*np.linspace(0.1, 0.7, 20).tolist(), target=[value] * 20, threshold=0.4)
    figure = plots.plot_events({"val": forecasts(), "test": p}, config(), {"persistence": p})
    figure.canvas.draw()
    assert figure.axes[1].get_title() == "one class only, so no curve: test, persistence"
    assert [line.get_label() for line in figure.axes[1].lines][0] == "val"
