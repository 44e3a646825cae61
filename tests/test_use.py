"""What was trained is used: on times without labels, on images, and models of the release's layout."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
import yaml
import zarr
from test_released import reference

from helpers import use
from helpers.channels import UNITS
from helpers.config import ConfigError, load_config
from helpers.data.dataset import make_loaders
from helpers.data.frames import prepare_store
from helpers.data.synthetic import ensure_synthetic
from helpers.experiment import train_run
from helpers.model.checkpoint import CheckpointError, fingerprint, load_released
from helpers.model.lora import merge_lora
from helpers.shared import DiskFullError
from helpers.training.tasks import Predictions

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.xdist_group("use")
SMALL = {
    "paths.reserve_gb": 0.0,
    "tracking.wandb": "disabled",
    "synthetic.visits": 14,
    "training.epochs": 1,
    "training.batch_size": 4,
    "target.event_threshold": None,
    "split.train": ["2014-01-01", "2014-01-15"],
    "split.val": ["2014-01-17", "2014-01-22"],
    "split.test": ["2014-01-24", "2014-01-29"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a configuration that runs write to, and a Sun that all tests here share."""
    folder = tmp_path_factory.mktemp("use")
    (folder / "config.yaml").write_text((ROOT / "config.yaml").read_text())
    sun = {"synthetic.folder": str(folder / "sun"), "paths.runs": str(folder / "runs")}
    sun["model.weights"] = str(ROOT / "helpers/data/surya.tiny.pt")
    (folder / "config.local.yaml").write_text(yaml.safe_dump(sun))
    return folder


@pytest.fixture(scope="module")
def run_of(place):
    """The folder of a run of this task and experiment, trained when it is asked for first."""

    def of(task: str, experiment: str = "finetune", **more) -> Path:
        found = sorted((place / "runs").glob(f"{experiment}-{task}-tiny-*")) if not more else []
        if not found:
            settings = SMALL | more
            cfg = load_config(place / "config.yaml", settings, task=task, experiment=experiment)
            ensure_synthetic(cfg)
            prepare_store(cfg, progress=False)
            found = [place / "runs" / train_run(cfg)]
        return found[0]

    return of


def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / run.name))


@pytest.mark.parametrize("experiment", ["baseline", "finetune"])
def test_a_run_says_again_what_it_said_of_its_test_split(run_of, place, tmp_path, experiment):
    run = run_of("flare", experiment)
    said = pd.read_csv(run / "predictions_test.csv")
    bare = copied(run, tmp_path)
    for path in bare.glob("predictions_*"):
        path.unlink()
    labels = place / "sun" / "flares.csv"
    labels.rename(labels.with_suffix(".away"))
    try:
        trained = use.load_run(bare, place / "config.yaml")
        out = use.predict_times(trained, pd.to_datetime(said["timestamp"]), tmp_path / "again.csv", progress=False)
    finally:
        labels.with_suffix(".away").rename(labels)
    again = pd.read_csv(out)
    assert again["timestamp"].tolist() == said["timestamp"].tolist()
    assert np.array_equal(again["prediction_0"], said["prediction_0"])
    assert np.allclose(again["physical_0"], 10 ** said["prediction_0"]) and "lower_0" not in again


def test_the_interval_is_that_of_the_validation_errors(run_of, place, tmp_path):
    run = run_of("flare")
    trained = use.load_run(run, place / "config.yaml")
    errors = np.sort(np.abs(pd.read_csv(run / "predictions_val.csv").eval("prediction_0 - target_0")))
    rank = int(np.ceil(0.9 * (len(errors) + 1)))
    expected = errors[rank - 1] if rank <= len(errors) else np.inf
    assert trained.interval.item() == pytest.approx(expected, rel=1e-6)
    out = use.predict_times(trained, ["2014-01-25T01:00"], tmp_path / "a.csv", progress=False)
    table = pd.read_csv(out)
    assert table["upper_0"][0] - table["lower_0"][0] == pytest.approx(2 * expected, rel=1e-5)
    held = np.abs(pd.read_csv(run / "predictions_test.csv").eval("prediction_0 - target_0")) <= expected
    assert trained.coverage == pytest.approx(held.mean(), abs=1e-6)


def test_intervals_hold_the_share_that_they_promise():
    generator = torch.Generator().manual_seed(0)
    zeros, held = torch.zeros(39, 1), []
    for _ in range(400):
        half = Predictions(zeros, torch.randn(39, 1, generator=generator), []).interval()
        held.append((torch.randn(50, generator=generator).abs() <= half).float().mean())
    assert np.mean(held) == pytest.approx(0.9, abs=0.02)
    assert Predictions(zeros[:5], zeros[:5], []).interval().isinf().all()  # five errors cannot promise 90%


@pytest.mark.notebook
def test_maps_are_written_as_xarray_reads_them(run_of, place, tmp_path):
    trained = use.load_run(run_of("active_region"), place / "config.yaml")
    times = pd.to_datetime(["2014-01-25T02:00", "2014-01-25T01:00"])
    with xr.open_zarr(use.predict_times(trained, times, tmp_path / "map.zarr", progress=False)) as found:
        assert found["prediction"].shape == (2, 1, 64, 64) and list(found["time"].values) == sorted(times.values)
        assert 0 <= found["prediction"].min() <= found["prediction"].max() <= 1
        assert found.attrs["run"] == trained.about["run"] and found.attrs["commit"]
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.notebook
def test_images_are_physical(run_of, place, tmp_path):
    trained = use.load_run(run_of("translation"), place / "config.yaml")
    data, scaler = make_loaders(trained.cfg).test.dataset, trained.cfg.scalers["hmi_m"]
    with torch.no_grad():
        normalised = trained.model({"ts": data[0]["ts"][None]})[0].double().numpy()
    y = normalised * (scaler.std + scaler.epsilon) + scaler.mean
    gauss = np.sign(y) * np.expm1(abs(y)) / scaler.scale
    out = use.predict_times(trained, [data[0]["timestamp"]], tmp_path / "b.zarr", progress=False)
    with xr.open_zarr(out) as found:
        assert found["channel"].values.tolist() == ["hmi_m"] and found["prediction"].attrs["units"] == UNITS["hmi_m"]
        assert np.allclose(found["prediction"][0], gauss, rtol=1e-4, atol=1e-4)


@pytest.mark.notebook
@pytest.mark.parametrize(("task", "ending"), [("active_region", ".zarr"), ("flare", ".csv")])
def test_a_killed_prediction_goes_on_to_the_same_file(run_of, place, tmp_path, monkeypatch, task, ending):
    trained = use.load_run(run_of(task), place / "config.yaml")
    times = prepare_store(trained.cfg, progress=False).samples.samples["train"]["time"]
    whole = use.predict_times(trained, times, tmp_path / f"whole{ending}", progress=False)
    take = use.computed

    def killed_after(batches: int):
        def computed(*words):
            yield from islice(take(*words), batches)
            raise KeyboardInterrupt

        return computed

    for batches in (0, 1, 1):
        monkeypatch.setattr(use, "computed", killed_after(batches))
        with pytest.raises(KeyboardInterrupt):
            use.predict_times(trained, times, tmp_path / f"parts{ending}", progress=False)
        assert not (tmp_path / f"parts{ending}").exists()
    monkeypatch.setattr(use, "computed", take)
    asked = []
    monkeypatch.setattr(use, "Subset", lambda data, rows: asked.append(rows) or torch.utils.data.Subset(data, rows))
    again = use.predict_times(trained, times, tmp_path / f"parts{ending}", progress=False)
    assert asked == [range(8, len(times))] and not list(tmp_path.glob("*.unfinished"))
    if ending == ".csv":
        assert again.read_bytes() == whole.read_bytes()
    else:
        assert xr.open_zarr(whole).identical(xr.open_zarr(again))


def test_what_another_request_has_left_is_not_taken(run_of, place, tmp_path, monkeypatch):
    trained = use.load_run(run_of("flare"), place / "config.yaml")
    times = pd.to_datetime(["2014-01-25T01:00", "2014-01-25T02:00", "2014-01-27T01:00"])
    whole = use.predict_times(trained, times, tmp_path / "whole.csv", progress=False)
    monkeypatch.setattr(pd.DataFrame, "to_csv", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # all is computed, and nothing written yet
        use.predict_times(trained, [*times[:2], pd.Timestamp("2014-01-27T02:00")], tmp_path / "a.csv", progress=False)
    monkeypatch.undo()
    assert use.predict_times(trained, times, tmp_path / "a.csv", progress=False).read_bytes() == whole.read_bytes()


def test_nothing_is_overwritten(run_of, place, tmp_path):
    trained = use.load_run(run_of("flare"), place / "config.yaml")
    out = use.predict_times(trained, ["2014-01-25T01:00"], tmp_path / "a.csv", progress=False)
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        use.predict_times(trained, ["2014-01-25T01:00"], out)
    with pytest.raises(ValueError, match="must end in .csv"):
        use.predict_times(trained, ["2014-01-25T01:00"], tmp_path / "b.nc")
    with ThreadPoolExecutor(2) as pool:  # of two at once the second one waits
        words = trained, ["2014-01-25T01:00"], tmp_path / "c.csv", False
        both = [pool.submit(use.predict_times, *words) for _ in range(2)]
    assert sorted((type(one.exception()) for one in both), key=str) == [FileExistsError, type(None)]
    assert (tmp_path / "c.csv").read_bytes() == out.read_bytes() and len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_ends_a_prediction_in_a_sentence(run_of, place, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    trained = use.load_run(run_of("flare"), place / "config.yaml")
    monkeypatch.setattr(zarr.storage._local, "_put", full)
    with pytest.raises(DiskFullError, match="became full"):
        use.predict_times(trained, ["2014-01-25T01:00"], tmp_path / "a.csv", progress=False)


def test_a_time_without_frames_is_left_out_and_named(run_of, place, tmp_path, capsys):
    trained = use.load_run(run_of("flare"), place / "config.yaml")
    out = use.predict_times(trained, ["2014-01-25T01:00", "2014-01-25T12:00"], tmp_path / "a.csv", progress=False)
    assert len(pd.read_csv(out)) == 1 and "1 of 2 times are left out, 2014-01-25 12:00:00" in capsys.readouterr().out
    with pytest.raises(ValueError, match="None of the 1 times has its frames"):
        use.predict_times(trained, ["2014-01-25T12:00"], tmp_path / "b.csv", progress=False)


def spoil_config(run):
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["data"]["channels"].reverse()
    (run / "config.yaml").write_text(yaml.safe_dump(settings))


def spoil_status(run):
    about = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(about | {"status": "running"}))


def name_a_function(run):
    """As somebody might who shares the folder; the module is where Python finds it."""
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["target"]["loss"] = "trap:spring"
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    torch.save(torch.load(run / "best.pt", weights_only=True) | {"config": settings}, run / "best.pt")
    (run / "trap.py").write_text("raise SystemExit('executed')")


SPOILT = {
    "names .'trap:spring'.: only what lies in helpers/": name_a_function,
    "data.channels. Put that back": spoil_config,
    "is no finished run .* Finished runs there: none": spoil_status,
    "with its weights .best.pt.": lambda run: (run / "best.pt").unlink(),
    "is no finished run": lambda run: (run / "summary.json").write_text("{}"),
    "cut short": lambda run: (run / "best.pt").write_bytes((run / "best.pt").read_bytes()[:1000]),
}


@pytest.mark.parametrize("told", SPOILT)
def test_a_run_that_cannot_be_used_says_why(run_of, place, tmp_path, monkeypatch, told):
    run = copied(run_of("flare"), tmp_path)
    SPOILT[told](run)
    monkeypatch.syspath_prepend(run)
    with pytest.raises(CheckpointError, match=told):
        use.load_run(run, place / "config.yaml")


@pytest.mark.notebook
def test_another_checkpoint_or_normalisation_is_refused(run_of, place, tmp_path):
    run = run_of("translation")
    saved = torch.load(run / "best.pt", weights_only=True)
    spoilt = copied(run, tmp_path)
    saved["extra"]["scalers"]["hmi_m"]["mean"] += 1  # of the target alone
    torch.save(saved, spoilt / "best.pt")
    with pytest.raises(CheckpointError, match="another normalisation .* of .'hmi_m'"):
        use.load_run(spoilt, place / "config.yaml")
    saved = torch.load(run / "best.pt", weights_only=True)
    torch.save(saved | {"fingerprint": "0" * 16}, spoilt / "best.pt")
    with pytest.raises(CheckpointError, match="was trained on the checkpoint 0000"):
        use.load_run(spoilt, place / "config.yaml")


def test_embeddings_are_the_pooled_tokens(run_of, place, tmp_path):
    trained = use.load_run(run_of("flare"), place / "config.yaml")
    loaders = make_loaders(trained.cfg)
    table = use.embed(trained.model, loaders, trained.cfg, "max")
    assert table.sizes["sample"] == sum(loaders.sizes.values())
    batch = next(iter(loaders.test))
    with torch.no_grad():
        expected = trained.model.encoder(batch["ts"]).amax(dim=1)
    of_test = table.isel(sample=table["split"] == "test")
    assert np.allclose(of_test["features"][: len(expected)], expected, atol=1e-5)
    assert np.array_equal(of_test["target"][: len(expected)], batch["target"])
    for wrong in ("class_token", "median"):
        with pytest.raises(ValueError, match="Features are pooled by"):
            use.embed(trained.model, loaders, trained.cfg, wrong)
    table.to_zarr(tmp_path / "embeddings.zarr", zarr_format=2)
    assert xr.open_zarr(tmp_path / "embeddings.zarr").identical(table)


@pytest.mark.notebook
def test_make_predict(run_of, place, make):
    run = run_of("flare")
    code = f"import pathlib, helpers.tools.predict as p; p.ROOT = pathlib.Path({str(place)!r}); p.run(p.main)"
    words = ["--run", run.name, "--times", "2014-01-25 01:00/2014-01-25 02:00"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(pd.read_csv(run / f"{run.name}-20140125_0100-20140125_0200.csv")) == 2
    for words, told in {
        ("RUN=none", "TIMES=2014-01-25"): "is no finished run",
        ("TIMES=2014-01-25",): "Which model?",
        ("RUN=none", "TIMES=now"): "which is not a time",
        ("RUN=none", "TIMES=2014-01-25/2014-01-24"): "holds no times",
        ("RUN=none", "TIMES=2014-01-25", "TASK=flare"): "A run has its own task",
        ("RELEASED=hf://a/b/c.pth", "TIMES=2014-01-25"): "needs the TASK",
    }.items():
        done = make("predict", *words)
        assert done.returncode and told in done.stdout and "Traceback" not in done.stderr, done.stdout + done.stderr


@pytest.mark.notebook
def test_a_training_begins_with_what_another_run_has_trained(run_of, capsys):
    first = torch.load(run_of("flare") / "best.pt", weights_only=True)["state"]
    begin = {"training.initial_run": run_of("flare").name, "training.lr": 1e-12}
    for task, same_head in (("flare", True), ("flare_now", False)):
        second = torch.load(run_of(task, **begin) / "best.pt", weights_only=True)["state"]
        assert ("and its head." if same_head else "a fresh head") in capsys.readouterr().out
        for key in first:
            if key.startswith("encoder.") or same_head:
                assert torch.allclose(second[key], first[key], atol=1e-6), key
    assert second["head.1.weight"].shape != first["head.1.weight"].shape


@pytest.mark.notebook
def test_an_initial_run_that_is_not_there_is_told_with_those_that_are(run_of):
    name = run_of("flare").name
    with pytest.raises(CheckpointError, match=f"mistyped is no finished run with its weights .* there: .*{name}"):
        run_of("flare", **{"training.initial_run": "mistyped"})


@pytest.fixture
def wind(place, tmp_path, monkeypatch):
    """Settings of the task solar_wind, and a file in the layout of the release, in the hub's cache."""
    file = tmp_path / "hub/models--nasa-ibm-ai4science--solar_wind_surya/snapshots/x/solar_wind_weights.pth"
    file.parent.mkdir(parents=True)
    state = reference("released_1d_lora")[0]
    for key in (key for key in state if "to_dynamic_projection" in key):
        state[key] = torch.cat([state[key]] * 4)  # 16 heads, as in the release, of 4 long-range keys each
    torch.save(state, file)
    sizes = {"embed_dim": 32, "depth": 4, "n_spectral_blocks": 2, "num_heads": 16, "weights": None}
    monkeypatch.setenv("SURYA_SHARED", str(tmp_path))
    wind = str(place / "sun/released/Surya-bench-solarwind/solarwind_train.csv")
    settings = {"labels.path": wind, "labels.lead_minutes": 0, **{f"model.{key}": sizes[key] for key in sizes}}
    return file, SMALL | settings


@pytest.mark.notebook
def test_a_training_begins_with_the_released_model_where_that_is_asked_for(run_of, place, wind, tmp_path):
    file, settings = wind
    settings |= {"model.weights": "hf://nasa-ibm-ai4science/solar_wind_surya/solar_wind_weights.pth"}
    with pytest.raises(CheckpointError, match="a training begins with it where training.initial_run is"):
        run_of("solar_wind", **settings)
    settings["training.initial_run"] = "released"
    with pytest.raises(ConfigError, match="released needs the weights"):
        run_of("solar_wind", **settings, **{"training.regime": "scratch"})
    run = run_of("solar_wind", **settings)
    trained = use.load_run(run, place / "config.yaml")
    assert trained.model.encoder.loaded_from == fingerprint(file)
    merged, own = merge_lora(load_released(file)).encoder.state_dict(), trained.model.encoder.state_dict()
    assert all(torch.equal(own[key], merged[key]) for key in merged)
    table = pd.read_csv(run / "predictions_test.csv")
    again = use.predict_times(trained, table["timestamp"], tmp_path / "again.csv", progress=False)
    assert np.array_equal(pd.read_csv(again)["prediction_0"], table["prediction_0"])


@pytest.mark.parametrize("reduce", [2, 4])
def test_the_released_model_is_a_row_beside_the_runs(place, wind, capsys, reduce):
    file, settings = wind
    settings |= {
        "data.reduce": reduce,
        "data.store": str(file.parent / f"frames-{reduce}"),
        "compare.released": str(file),
    }
    cfg = load_config(place / "config.yaml", settings, task="solar_wind", experiment="finetune")
    ensure_synthetic(cfg)
    prepare_store(cfg, progress=False)
    loaders = make_loaders(cfg)
    capsys.readouterr()
    ((name, found),) = use.released_predictions(loaders, cfg).items()
    assert file.name in name and found.same_samples(predictions_of(loaders.test.dataset))
    model, learned = load_released(file, img_size=128 // reduce), pd.read_csv(cfg.labels.path)
    with torch.no_grad():
        output = model({"ts": torch.stack([item["ts"] for item in loaders.test.dataset])})
    span = learned["V"].max() - learned["V"].min()
    assert torch.allclose(found.prediction, learned["V"].min() + span * output, rtol=1e-4)
    years = sorted({*pd.to_datetime(learned.iloc[:, 0]).dt.year})
    inside = pd.to_datetime(found.timestamps).year.isin(years).sum()
    said = capsys.readouterr().out
    assert f"{inside} of {len(output)} test samples lie in years of its training: {years}" in said
    assert ("was trained at 64^2 pixels, and is given 32^2" in said) == (reduce == 4)
    without = load_config(place / "config.yaml", settings | {"compare.released": None}, task="solar_wind")
    assert use.released_predictions(loaders, without) == {}


def predictions_of(data):
    """The truth of a split, as if it had been predicted."""
    return Predictions(data.targets, data.targets, [data[row]["timestamp"] for row in range(len(data))])
