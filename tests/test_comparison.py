"""Which runs are compared, and what a difference between them is worth, on runs whose truth is known."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from helpers.analysis import comparison
from helpers.config import load_config
from helpers.training.tracking import list_runs, start_run

ROOT = Path(__file__).parents[1]
DAYS = 30


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.yaml").write_text((ROOT / "config.yaml").read_text())
    fixed = {"paths.runs": str(tmp_path / "runs"), "tracking.wandb": "disabled", "target.metrics": ["rmse"]}
    return lambda experiment="finetune", **overrides: load_config(
        tmp_path / "config.yaml", fixed | overrides, experiment=experiment
    )


def leave_run(cfg, error: float, samples: int = 100, days: int = DAYS, noise: str = "") -> str:
    """A finished run whose predictions miss by `error` (standard deviation) on `days` days of three frames."""
    times = pd.date_range("2015-01-01", periods=days, freq="1D").repeat(3)
    truth = np.random.default_rng(0).normal(size=len(times))
    noise = [cfg.seed, cfg.experiment == "baseline", *noise.encode()]
    miss = np.random.default_rng(noise).normal(0, error, len(times))
    with start_run(cfg) as run:
        table = pd.DataFrame({"timestamp": times, "target_0": truth, "prediction_0": truth + miss})
        table.to_csv(run.folder / "predictions_test.csv", index=False)
        run.summary({"test_rmse": error, "seconds": 10.0 + cfg.seed, "trained parameters": 7, "step MB": 3.0})
        run.summary({comparison.SAMPLES: samples})
    return run.name


def runs_of(config, baseline: float, finetune: float, seeds=(0, 1, 2)):
    for seed in seeds:
        leave_run(config("baseline", seed=seed), baseline)
        leave_run(config(seed=seed), finetune)
    return list_runs(config().runs_folder)


def test_a_clear_gain_is_found_with_its_interval(config):
    difference = comparison.paired_difference(runs_of(config, 1.0, 0.5), config())
    assert 0.3 < difference.low < difference.value < difference.high < 0.7
    assert difference.value == pytest.approx(0.5, abs=0.15) and difference.blocks == DAYS
    assert str(difference).startswith("finetune is better than baseline. rmse: 0.")
    assert "between seeds" in str(difference)


def test_a_loss_is_said_as_plainly(config):
    difference = comparison.paired_difference(runs_of(config, 0.5, 1.0), config())
    assert difference.high < 0 and "finetune is WORSE than baseline" in str(difference)


def test_two_fine_tunes_of_ones_own_are_compared_with_a_seed_each(config):
    runs = list_runs(config().runs_folder)
    for choice, error in {"max": 0.5, "mean": 1.0}.items():
        name = leave_run(config(**{"head.pooling": choice}), error, noise=choice)
        run = list_runs(config().runs_folder).set_index("name", drop=False).loc[[name]]
        runs = pd.concat([runs, run.assign(experiment=choice)])
    said = str(comparison.paired_difference(runs, config(), sides=("mean", "max")))
    assert said.startswith("max is better than mean. rmse: 0.") and "one seed each" in said and "nan" not in said
    with pytest.raises(ValueError, match="No seed has a finished run of both mean and attention"):
        comparison.paired_difference(runs, config(), sides=("mean", "attention"))


def test_a_score_that_cannot_be_measured_is_no_loss():
    nan = float("nan")
    assert str(comparison.Difference(("baseline", "finetune"), "tss", nan, nan, nan, 9, nan)).startswith(
        "tss cannot be measured"
    )


def test_equal_models_are_within_noise(config):
    difference = comparison.paired_difference(runs_of(config, 0.7, 0.7), config())
    assert str(difference).startswith("The difference is WITHIN NOISE")


@pytest.mark.notebook  # with the other long ones
def test_the_interval_covers_the_truth_about_as_often_as_it_says(config):
    """Two equally good models, many times: 95% of the intervals hold zero."""
    cfg, seeds = config(**{"compare.draws": 100}), range(30)
    runs = runs_of(config, 0.7, 0.7, seeds)
    found = [comparison.paired_difference(runs[runs["seed"] == seed], cfg) for seed in seeds]
    assert sum(difference.low <= 0 <= difference.high for difference in found) >= 25


def test_a_run_is_found_by_exactly_its_settings(config):
    name = leave_run(config(), 0.5)
    fewer = leave_run(config(**{"training.max_train_samples": 60}), 0.6, samples=60)
    leave_run(config(**{"training.lr": 0.5}), 0.4)
    leave_run(config(**{"data.channels": ["aia94", "hmi_m"]}), 0.4)
    assert comparison.find_run(config()) == name
    changes = {"training.resume": name, "training.device": "cpu", "training.recompute_blocks": [0]}  # change no score
    again = leave_run(config(**changes), 0.5)  # the same seed again: the newest counts
    with start_run(config()) as of_a_notebook:  # says nothing of samples and cost
        of_a_notebook.summary({"test_rmse": 0.1})
    assert comparison.find_run(config()) == again
    assert comparison.find_run(config(**{"training.max_train_samples": 60})) == fewer
    for other in (config(seed=5), config("baseline"), config(**{"training.max_train_samples": 61})):
        assert comparison.find_run(other) is None


def test_runs_on_other_test_samples_and_lonely_runs_are_refused(config):
    leave_run(config("baseline"), 0.5)
    with pytest.raises(ValueError, match="No seed has a finished run of both"):
        comparison.paired_difference(list_runs(config().runs_folder), config())
    leave_run(config(), 0.5, days=DAYS - 1)
    with pytest.raises(ValueError, match="tested on different samples"):
        comparison.paired_difference(list_runs(config().runs_folder), config())


def test_the_plan_has_every_experiment_seed_and_number_of_samples(config):
    overrides = {"compare.seeds": [3, 4], "compare.train_samples": [50, None]}
    planned = comparison.plan(config(**overrides))
    assert len(planned) == 8
    assert ("finetune", {"seed": 4, "training.max_train_samples": None}) in planned
    assert all(config(experiment, **changes) for experiment, changes in planned)


def test_the_budgets_of_the_latest_runs_are_shown_and_it_is_said_where_they_differ(config, capsys):
    leave_run(config("baseline", **{"training.epochs": 60}), 0.5)
    leave_run(config(**{"training.epochs": 60}), 0.4)
    table, _ = comparison.compare_runs(config())
    assert list(table.index[:4]) == list(comparison.BUDGET) and np.isinf(table.loc["max_train_samples"]).all()
    assert capsys.readouterr().out.startswith("These runs differ in lr, see the first rows.")
    newest = leave_run(config(seed=3, **{"training.epochs": 5, "training.max_train_samples": 64}), 0.3)
    table, _ = comparison.compare_runs(config())
    assert list(table[f"finetune ({newest})"]) == [3, 5, config().training.lr, 64, 0.3]
    said = capsys.readouterr().out
    assert "differ in seed, epochs, lr, max_train_samples, see" in said and "only epochs and lr may differ" in said


def test_a_damaged_run_is_left_out_and_named(config, capsys):
    good, damaged = leave_run(config(), 0.5), leave_run(config(seed=7), 0.5)
    (config().runs_folder / damaged / "config.yaml").write_text("labels: [")
    assert comparison.find_run(config()) == good and comparison.find_run(config(seed=7)) is None
    table, predictions = comparison.compare_runs(config())
    assert list(table) == [f"finetune ({good})"] and list(predictions) == ["finetune"]
    assert damaged in capsys.readouterr().out
