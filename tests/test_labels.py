"""Labels as the release, archives and people write them: what is read, left out and counted, or refused."""

from pathlib import Path
from types import SimpleNamespace

import h5netcdf
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from frame_files import serving, write_netcdf
from matplotlib import image as pictures

from helpers.config import ConfigError, load_config
from helpers.data.archive import FrameError
from helpers.data.dataset import SolarDataset, read_mask
from helpers.data.labels import labels_of, load_labels, num_outputs, plan_samples, sample_window, spread_out

ROOT = Path(__file__).parents[1]
CASES = ROOT / "tests/data/cases/labels"
ALL = {"training.max_train_samples": None, "training.max_val_samples": None, "training.max_test_samples": None}
FLARES, WIND = "surya-bench-flare-forecasting", "Surya-bench-solarwind"
REGIONS, SPECTRA = "surya-bench-ar-segmentation", "euv-spectra/AIA_EVE_temporally_stratified.nc"
DAYS = {"split.train": ["2014-01-01", "2014-01-10"], "split.val": ["2014-01-12", "2014-01-15"]}
DAYS |= {"split.test": ["2014-01-17", "2014-01-20"], "split.guard_hours": 0, "data.cadence_minutes": 60}


@pytest.fixture
def config(tmp_path):
    """The course's configuration for the released model, with everything of a person in a temporary folder."""

    def make(task="flare", profile="surya", **overrides):
        own = {"paths.shared": str(tmp_path), "paths.released": str(tmp_path), "paths.labels": str(tmp_path)}
        return load_config(ROOT / "config.yaml", own | ALL | overrides, profile=profile, task=task)

    return make


@pytest.fixture
def mine(config, tmp_path):
    """A configuration whose label file holds this text."""

    def make(text, **overrides):
        (tmp_path / "mine.csv").write_text(text)
        own = {"labels.path": str(tmp_path / "mine.csv"), "labels.transform": "none", "labels.value_columns": ["value"]}
        own |= {"labels.time_column": "time", "labels.lead_minutes": 0, "labels.direction": "nearest"}
        return config("flare", **own | DAYS | overrides)

    return make


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def table(at: Path, **columns) -> None:
    at.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(columns).to_csv(at, index=False)


def hourly(first: str, last: str) -> pd.DatetimeIndex:
    return pd.date_range(first, last, freq="1h")


def sizes(plan) -> dict[str, int]:
    return {name: len(samples) for name, samples in plan.samples.items()}


def targets(plan, split: str) -> np.ndarray:
    return plan.labels.values[plan.samples[split]["label"]]


def pictures_of(plan, split: str, side: int) -> SolarDataset:
    """The samples of a plan, for a store of frames with this side that holds none."""
    return SolarDataset(SimpleNamespace(side=side), plan.labels, plan.samples[split])


# ---------------------------------------------------------------------------------------------------- released layouts
def write_flares(folder: Path) -> dict[str, pd.DatetimeIndex]:
    """Hourly, to 31 Dec 2019 and from 1 Jan 2020, with September for validation in between."""
    train = hourly("2019-06-01", "2019-08-31 23:00").append(hourly("2019-10-01", "2019-12-31 23:00"))
    splits = {"train": train, "validation": hourly("2019-09-01", "2019-09-30 23:00")}
    splits |= {"test": hourly("2020-01-01", "2020-02-28 23:00"), "leaky_validation": train}
    for name, times in splits.items():
        hot = times.hour == 7
        table(folder / FLARES / f"{name}.csv", timestamp=times, max_goes_class=np.where(hot, "M1.0", "FQ"),
              cumulative_index=1.5, label_max=hot.astype(int), label_cum=0)  # fmt: skip
    return splits


@pytest.mark.parametrize("guard", [0, 12])
def test_released_flares_lose_the_samples_whose_window_reaches_into_a_later_split(config, tmp_path, guard):
    splits = write_flares(tmp_path)
    plan = plan_samples(config("flare_24h", **{"split.guard_hours": guard}))
    whole = {name: set(splits[file]) for name, file in zip(("train", "val", "test"), splits, strict=False)}
    for name, own in whole.items():
        others, near = set().union(*whole.values()) - own, 0
        for time in own:  # sees t-1h ... t+24h; what another one at t+d sees begins at t+d-1h
            near += any(time + pd.Timedelta(d, "h") in others for d in range(1, 25 + guard))
        assert len(plan.samples[name]) == len(own) - near
        assert plan.dropped[name] == (
            {f"whose window, with {guard} h of guard, reaches into that of a later split": near} if near else {}
        )
    assert near == 0 and plan.dropped["train"] and plan.dropped["val"]  # nothing is later than the test split
    assert (plan.samples["train"]["time"] == plan.samples["train"]["label_time"]).all()
    np.testing.assert_array_equal(targets(plan, "test")[:, 0], plan.samples["test"]["time"].dt.hour == 7)
    assert sample_window(config("flare_24h")) == (pd.Timedelta("-1h"), pd.Timedelta("24h"))


def test_released_wind_is_joined_four_days_ahead(config, tmp_path):
    for name, first in {"train": "2014-01-01", "valid": "2014-02-01", "test": "2014-03-01"}.items():
        times = hourly(first, pd.Timestamp(first) + pd.Timedelta("9D"))
        speed = 300.0 + np.arange(len(times))
        table(tmp_path / WIND / f"solarwind_{name}.csv", timestamp=times + pd.Timedelta("7min"), V=speed, BX_GSE=1,
              BY_GSM=2, BZ_GSM=3, N=5)  # fmt: skip
    plan = plan_samples(config("solar_wind"))
    assert sizes(plan) == {"train": 217, "val": 217, "test": 217} and not plan.unmatched
    for samples in plan.samples.values():
        late = samples["label_time"] - samples["time"] - pd.Timedelta("4D")
        assert ((late >= pd.Timedelta(0)) & (late < pd.Timedelta("12min"))).all()
    assert plan.samples["val"]["time"].iloc[0] == pd.Timestamp("2014-01-28") and targets(plan, "val")[0] == 300


def test_released_masks_are_0_and_1_and_absent_ones_are_counted(config, tmp_path):
    folder, inside = tmp_path / REGIONS, np.zeros((64, 64), bool)
    inside[8:24, 16:20] = True
    folder.mkdir()
    forms = {"a": 255 * inside.astype("u1"), "b": inside[None].astype("u1"), "c": inside, "d": inside.astype("f4")}
    for name, mask in forms.items():
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["union_with_intersect"], file["intersection"] = mask, 0 * mask.astype("u1")
    write(folder / "old.csv", ",timestep,file_path,present\n0,2014-02-01 00:00:00,a.h5,1\n1,2014-02-01 00:12:00,,0\n"
          "2,2014-02-01 00:24:00,b.h5,1\n3,2014-02-01 00:36:00,gone.h5,0.0\n")  # fmt: skip
    write(folder / "new.csv", "timestep,file_path,present\n2014-08-01 00:00:00,c.h5,1\n2014-08-01 12:00:00,d.h5,True\n")
    own = {"labels.path": [str(folder / "old.csv"), str(folder / "new.csv")]}
    plan = plan_samples(config("ar_segmentation", **own))
    assert sizes(plan) == {"train": 0, "val": 2, "test": 2} and plan.labels.dropped == {"label not present": 2}
    for split in ("val", "test"):
        for row in range(2):
            mask = pictures_of(plan, split, 64).target(row)
            assert mask.shape == (1, 64, 64) and mask.dtype == torch.float32
            np.testing.assert_array_equal(mask[0], inside)


def write_spectra(path: Path, **changes) -> Path:
    rng, data = np.random.default_rng(0), {}
    for name, day in (("train", "2014-01-01"), ("val", "2014-02-01"), ("test", "2014-03-01")):
        data[f"{name}_time"] = (hourly(day, f"{day} 05:00") - pd.Timestamp("2010-01-01")) / pd.Timedelta("1h")
        data[f"{name}_spectra"] = 10 ** rng.uniform(-8, -3, (6, 5)).astype("f4")
    data["train_spectra"][2, 1] = data["train_spectra"][3, 4] = data["test_spectra"][0, 0] = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values in (data | changes).items():
            file[name] = values
            file[name].attrs["units"] = "W/m^2/nm" if "spectra" in name else "hours since 2010-01-01"
    return path


def test_released_spectra_take_the_smallest_value_of_their_wavelength_for_zeros(config, tmp_path):
    with h5py.File(write_spectra(tmp_path / SPECTRA)) as file:
        raw = {name: file[f"{name}_spectra"][()] for name in ("train", "val", "test")}
    cfg = config("euv_spectra")
    plan, smallest = plan_samples(cfg), [min(x for r in raw.values() for x in r[:, k] if x > 0) for k in range(5)]
    assert sizes(plan) == {"train": 6, "val": 6, "test": 6} and num_outputs(cfg) == 5 and not plan.labels.dropped
    for split, values in raw.items():
        np.testing.assert_allclose(targets(plan, split), np.log10(np.where(values == 0, smallest, values)), rtol=1e-6)
    in_lists = config("euv_spectra", **{"labels.path": [str(tmp_path / SPECTRA)]})
    assert num_outputs(in_lists) == 5
    dead = np.where(np.arange(5) == 3, 0, 1e-5) * np.ones((6, 1))
    write_spectra(tmp_path / SPECTRA, **{f"{name}_spectra": dead for name in raw})
    assert labels_of(cfg).dropped == {"label empty, quiet or not positive, so without a logarithm": 18}


# ---------------------------------------------------------------------------------------------------- wrong variants
def test_released_layouts_that_are_wrong_are_named_in_one_sentence(config, tmp_path):
    write_flares(tmp_path)
    with pytest.raises(
        ValueError, match=r"validation.csv has no column label_sum; it has timestamp, .*label_cum.*labels\.v"
    ):
        path = {s: str(tmp_path / FLARES / f) for s, f in (("train", "train.csv"), ("val", "validation.csv"))}
        table(Path(path["train"]), timestamp=hourly("2014-01-01", "2014-01-02"), label_sum=1)
        plan_samples(config("flare_24h", **{"labels.path": path, "labels.value_columns": ["label_sum"]}))
    cfg = config("euv_spectra", **{"labels.unit": "erg"})
    path = write_spectra(tmp_path / SPECTRA)
    with pytest.raises(
        ValueError, match=r"stratified.nc cannot be used: train_spectra is given in W/m\^2/nm.*labels.unit"
    ):
        plan_samples(cfg)
    for change, said in {
        "val_spectra": "val_spectra has 4 x 5 values for 6 times",
        "test_spectra": "test_spectra has 6 x 5 x 5 values for 6 times",
    }.items():
        write_spectra(path, **{change: np.ones((4, 5) if change[0] == "v" else (6, 5, 5), "f4")})
        with pytest.raises(ValueError, match=rf"The label file .*stratified.nc cannot be used: {said}"):
            plan_samples(config("euv_spectra"))
    whole = write_spectra(path).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"stratified.nc cannot be used: it cannot be read as NetCDF4.*labels.path"):
        plan_samples(config("euv_spectra"))
    write_spectra(path, val_time=np.array([35000, np.nan, 1, 2, 3, 4]))
    with pytest.raises(ValueError, match="stratified.nc cannot be used: val_time lacks its time 2"):
        plan_samples(config("euv_spectra"))


def test_masks_that_are_wrong_are_named(tmp_path):
    for mask, said in (
        (np.zeros((2, 16, 16), "u1"), r"m has the shape \(2, 16, 16\)"),
        (np.zeros((16, 8), "u1"), r"m has the shape \(16, 8\)"),
        (np.eye(16, dtype="u1") * 128, "it holds values from 0 to 128, but a mask is 0 outside and 1 inside"),
        (np.eye(16, dtype="f4") * -1, "it holds values from -1 to -?0, but a mask"),
        (np.full((16, 16), np.nan, "f4"), "it has pixels that are not numbers"),
    ):
        with h5py.File(tmp_path / "m.h5", "w") as file:
            file["m"] = mask
        with pytest.raises(FrameError, match=rf"The image label .*m.h5 cannot be used: {said}.*labels.path"):
            read_mask(str(tmp_path / "m.h5"), "m", 16)


def test_an_image_of_two_values_stays_what_it_is(tmp_path):
    """Only a mask is 0 and 1: a field that happens to hold 0 and 255 is not scaled, nor decided by a majority."""
    field = np.zeros((8, 8), "f4")
    field[:2, 0] = 255
    write_netcdf(tmp_path / "field.nc", {"b": field})
    table(tmp_path / "fields.csv", time=["2014-01-07"], path=["field.nc"])
    rules = {"kind": "image", "mask_reduce": "majority"}
    labels = load_labels(tmp_path / "fields.csv", "time", [], variable="b", **rules)
    assert SolarDataset(SimpleNamespace(side=4), labels, pd.DataFrame({"label": [0]})).target(0)[0, 0, 0] == 127.5


def test_a_packed_image_and_one_with_a_hole(tmp_path):
    field = np.linspace(-100, 100, 1024).reshape(32, 32).astype("f4")
    with h5netcdf.File(tmp_path / "packed.nc", "w") as file:
        file.dimensions = {"y": 32, "x": 32}
        variable = file.create_variable("b", ("y", "x"), "i2", fillvalue=np.int16(-32768))
        variable[:] = np.round(field * 10).astype("i2")
        variable.attrs["scale_factor"] = 0.1
        hole = file.create_variable("hole", ("y", "x"), "f4")
        hole[:] = np.where(np.arange(32) < 8, np.float32(-9999), field)
        hole.attrs["missing_value"] = np.float32(-9999)
    np.testing.assert_allclose(read_mask(str(tmp_path / "packed.nc"), "b", 32, None)[0], field, atol=0.051)
    with pytest.raises(FrameError, match="packed.nc cannot be used: it has pixels that are not numbers"):
        read_mask(str(tmp_path / "packed.nc"), "hole", 32, None)


# ---------------------------------------------------------------------------------------------------- tables
def test_a_comma_at_the_end_of_every_row_of_the_cases():
    fluxes = load_labels(CASES / "fluxes.csv", "peak", ["flux"])
    assert fluxes.values.tolist() == [[1.2e-4], [3.6e-5]]
    assert fluxes.times.astype(str).tolist() == ["2014-01-07T18:32:00", "2014-01-08T03:47:00"]
    flares = load_labels(CASES / "flares.csv", "peak", ["goes"], transform="goes")
    np.testing.assert_allclose(10 ** flares.values[:, 0], [1.2e-4, 3.6e-5])


@pytest.mark.parametrize(
    "text",
    [
        "time,value\n2014-01-07,5,,\n2014-01-08,6\n",
        "time , value,,\n2014-01-07,5,,\n\n2014-01-08,6,,\n\n",
        "\ufefftime,value\n2014-01-07, 5 \n2014-01-08,6,",
    ],
)
def test_commas_blanks_and_empty_lines_that_say_nothing(tmp_path, text):
    assert load_labels(write(tmp_path / "x.csv", text), "time", ["value"]).values.tolist() == [[5], [6]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("time,value\n2014-01-07,1,5\n2014-01-08,2,5\n", "row 2 has 3 cells, and the header 2"),  # decimal commas
        ("time,a,value\n2014-01-07,1,2\n\n2014-01-08,2\n", "row 4 has 2 cells, and the header 3"),
    ],
)
def test_a_row_that_does_not_fit_its_header_is_named(tmp_path, text, said):
    with pytest.raises(ValueError, match=rf"The label file .*x.csv cannot be read as a table \({said}\)"):
        load_labels(write(tmp_path / "x.csv", text), "time", ["value"])


def test_the_cases_that_are_no_tables():
    for name, said in {"empty": "", "latin1": "utf-8", "ragged": "row 3 has 4 cells, and the header 2"}.items():
        with pytest.raises(ValueError, match=rf"{name}.csv cannot be read as a table \(.*{said}.*UTF-8"):
            load_labels(CASES / f"{name}.csv", "time", ["value"])


def test_a_column_that_stands_twice_is_refused(tmp_path):
    path = write(tmp_path / "x.csv", "time,value,value,,\n2014-01-07,1,2,,\n")
    with pytest.raises(ValueError, match="x.csv has 2 column value; it has time, value, value"):
        load_labels(path, "time", ["value"])


def test_a_value_column_may_have_any_name(tmp_path):
    text = "when,time,path,split\n2014-01-07,1,2,3\n"
    labels = load_labels(write(tmp_path / "x.csv", text), "when", ["split", "time", "path"])
    assert labels.values.tolist() == [[3, 1, 2]] and labels.splits is None


def test_columns_of_a_pattern_are_joined_by_name(mine, tmp_path):
    """Two files with the same columns in another order."""
    write(tmp_path / "more.csv", "time,label_b,label_a\n2014-01-13,20,10\n")
    cfg = mine("time,label_a,label_b\n2014-01-07,1,2\n", **{
        "labels.path": [str(tmp_path / "mine.csv"), str(tmp_path / "more.csv")], "labels.value_columns": ["label_*"],
    })  # fmt: skip
    assert labels_of(cfg).values.tolist() == [[1, 2], [10, 20]] and num_outputs(cfg) == 2


def test_the_index_of_the_masks_of_the_cases():
    rules = {"kind": "mask", "variable": "union_with_intersect"}
    labels = load_labels(CASES / "ar_index.csv", "timestep", [], **rules)
    assert len(labels) == 1 and labels.dropped == {"label not present": 1}
    with h5py.File(labels.paths[0]) as file:
        raw = file["union_with_intersect"][()]
    mask = read_mask(labels.paths[0], "union_with_intersect", len(raw))[0]
    assert set(np.unique(raw)) == {0, 255} and np.array_equal(mask, raw == 255)


# ---------------------------------------------------------------------------------------------------- fill values
@pytest.mark.parametrize(("name", "fill", "shown"), [("omni", 9999.0, "9999"), ("cdaweb", -1e31, "-1e+31")])
def test_the_fill_values_of_the_cases(name, fill, shown):
    with pytest.raises(
        ValueError, match=rf"Row 4 of the label file .*{name}.csv has {shown[:2]}.* column V, .*fill_values"
    ):
        load_labels(CASES / f"{name}.csv", "Epoch", ["V"])
    labels = load_labels(CASES / f"{name}.csv", "Epoch", ["V"], fill_values=[fill])
    assert labels.values[:, 0].tolist() == [412, 409, 405] and labels.dropped == {"label is a fill value": 1}


FILLS = [
    "999.9",
    "9999.",
    "99999.9",
    "9999999.",
    "-9999",
    "-1.00000E+31",
    "1e31",
    "-32768",
    "9.96920996838687e+36",
    "99.99",
]


@pytest.mark.parametrize("text", FILLS)
def test_fill_values_in_a_table_and_in_float32(tmp_path, text):
    path = write(tmp_path / "x.csv", f"time,a,value\n2014-01-07,1,412\n2014-01-08,2,{text}\n2014-01-09,3,405\n")
    with h5py.File(tmp_path / "x.nc", "w") as file:
        file["time"], file["value"] = [0, 24, 48], np.array([412, float(text), 405], "f4")
        file["time"].attrs["units"] = "hours since 2014-01-07"
    for number, file in ((3, path), (2, tmp_path / "x.nc")):
        with pytest.raises(
            ValueError, match=rf"Row {number} of the label file .* in its column value, .*labels.fill_values"
        ):
            load_labels(file, "time", ["value"])
        labels = load_labels(file, "time", ["value"], fill_values=[float(text)])
        assert labels.values[:, 0].tolist() == [412, 405] and labels.dropped == {"label is a fill value": 1}
        assert labels.times.astype(str).tolist() == ["2014-01-07T00:00:00", "2014-01-09T00:00:00"]


def test_fill_values_in_one_of_several_columns_take_the_row_out(tmp_path):
    path = write(tmp_path / "x.csv", "time,a,b\n2014-01-07,1,2\n2014-01-08,-9999,3\n2014-01-09,4,999.9\n")
    labels = load_labels(path, "time", ["b", "a"], fill_values=[-9999, 999.9])
    assert labels.values.tolist() == [[2, 1]] and labels.dropped == {"label is a fill value": 2}
    with pytest.raises(ValueError, match="Row 4 of .* has 999.9 in its column b"):
        load_labels(path, "time", ["b", "a"], fill_values=[-9999])


def test_packed_values_and_their_attributes(tmp_path):
    with h5py.File(tmp_path / "x.nc", "w") as file:
        file["time"] = ["2014-01-07T00:00:00", "2014-01-08", "2014-01-09", "2014-01-10T06:00Z"]
        file["value"] = np.array([4120, -1, 4050, -2], "i2")
        file["value"].attrs.update({"scale_factor": 0.1, "add_offset": 5.0, "_FillValue": np.int16(-1)})
        file["value"].attrs["missing_value"] = np.array([-2], "i2")
        file["huge"] = np.array([1, 1e39, 3, 4])
    labels = load_labels(tmp_path / "x.nc", "time", ["value"])
    np.testing.assert_allclose(labels.values[:, 0], [417, 410], rtol=1e-6)
    assert labels.dropped == {"label empty": 2}
    with pytest.raises(ValueError, match="Row 2 of .*x.nc has inf in its column huge"):
        load_labels(tmp_path / "x.nc", "time", ["huge"])


# ---------------------------------------------------------------------------------------------------- times
def test_date_and_time_in_two_columns(tmp_path):
    path = write(
        tmp_path / "x.csv", "date,utc,value\n2014-01-07,23:59:59.6,1\n2014-01-08,06:00+01:00,2\n20140109,1830,3\n"
    )
    labels = load_labels(path, ["date", "utc"], ["value"])
    assert labels.times.astype(str).tolist() == ["2014-01-08T00:00:00", "2014-01-08T05:00:00", "2014-01-09T18:30:00"]


@pytest.mark.parametrize("row", ["2014-01-08,", ",06:00", "2014-01-08,noon", "2014-01-08,24:30", "2014,06:00", "8,6"])
def test_half_a_time_in_two_columns_is_refused(tmp_path, row):
    path = write(tmp_path / "x.csv", f"date,utc,value\n2014-01-07,06:00,1\n{row},2\n")
    with pytest.raises(ValueError, match="Row 3 of .*x.csv has .* in its column date and utc, which is not a time"):
        load_labels(path, ["date", "utc"], ["value"])


# ---------------------------------------------------------------------------------------------------- masks, readers
@pytest.mark.parametrize(("how", "left", "value"), [("any", 1024, 1), ("mean", 1024, 0.25), ("majority", 0, None)])
def test_a_line_of_one_pixel_in_a_mask_of_4096(tmp_path, how, left, value):
    mask = np.zeros((4096, 4096), "u1")
    mask[2001] = 255
    with h5py.File(tmp_path / "line.h5", "w") as file:
        file.create_dataset("m", data=mask, compression="gzip", compression_opts=1)
    small = read_mask(str(tmp_path / "line.h5"), "m", 1024, how)
    assert small.count_nonzero() == left and (not left or (small[0, 500] == value).all())


def read_png(path: str) -> np.ndarray:
    """A reader as people write it: the first row of a PNG is the north."""
    return np.flipud(pictures.imread(path)[..., 0])


def seen_at(time: str) -> np.ndarray:
    """A reader that is given times."""
    return np.full((4, 4), int(time[8:10]) == 7)


def test_a_reader_of_png_masks(config, tmp_path):
    north = np.zeros((8, 8, 3), "u1")
    north[0, 2] = 255
    pictures.imsave(tmp_path / "a.png", north)
    table(tmp_path / "masks.csv", timestep=["2014-01-07", "2014-08-07"], path=["a.png", "none.png"])
    own = {"labels.path": str(tmp_path / "masks.csv"), "labels.reader": "test_labels:read_png", "labels.variable": None}
    plan = plan_samples(config("ar_segmentation", **own | DAYS))
    assert pictures_of(plan, "train", 8).target(0).nonzero().tolist() == [[0, 7, 2]]
    with pytest.raises(FrameError, match="none.png cannot be used: test_labels:read_png .* raised FileNotFoundError"):
        read_mask(plan.labels.paths[1], None, 8, "any", "test_labels:read_png")
    with pytest.raises(FrameError, match=r"a.png cannot be used: it has the shape \(8, 8, 4\), expected a square"):
        read_mask(str(tmp_path / "a.png"), None, 8, "any", "matplotlib.image:imread")


def test_a_reader_may_be_given_the_time(config, tmp_path):
    table(tmp_path / "times.csv", timestep=["2014-01-06", "2014-01-07"])
    own = {"labels.path": str(tmp_path / "times.csv"), "labels.reader": "test_labels:seen_at", "labels.variable": None}
    plan = plan_samples(config("ar_segmentation", **own | DAYS))
    masks = pictures_of(plan, "train", 4)
    assert [masks.target(row).mean() for row in range(2)] == [0, 1]


# ---------------------------------------------------------------------------------------------------- event lists
EVENTS = (
    "time,value\n2013-12-20,B1.0\n2014-01-05 06:00,C5.0\n2014-01-07 06:00,M1.0\n2014-01-07 18:00,X2.0\n2014-02-01,A1\n"
)
WINDOW = {"labels.window_hours": [0, 24], "labels.transform": "goes", "data.every_minutes": 360}


def events(mine, text=EVENTS, **overrides):
    plan = plan_samples(mine(text, **WINDOW | overrides))
    return {
        f"{t:%d %H}": v for t, v in zip(plan.samples["train"]["time"], targets(plan, "train")[:, 0], strict=True)
    }, plan


def test_the_window_of_an_event_list_is_open_at_its_start_and_closed_at_its_end(mine):
    found, plan = events(mine)
    strongest = {"04 06": -5.301, "04 12": -5.301, "05 00": -5.301}  # (t, t+24 h] of the C5.0 at 06:00 on the 5th
    assert {key: round(value, 3) for key, value in found.items() if key[:2] < "06"} == strongest | {"04 18": -5.301}
    assert "05 06" not in found and "04 00" not in found
    assert round(found["06 06"], 3) == -5 and round(found["06 12"], 3) == -5  # M1.0 at 06:00 on the 7th
    assert round(found["06 18"], 3) == round(found["07 12"], 3) == -3.699 and "07 18" not in found
    assert plan.labels.dropped["label empty, quiet or not positive, so without a logarithm"] > 0
    assert sample_window(mine(EVENTS, **WINDOW)) == (pd.Timedelta("-1h"), pd.Timedelta("24h"))


def test_any_event_of_a_class_is_1_or_0(mine):
    found, _ = events(mine, **{"labels.aggregate": "any", "labels.event_at": "M1.0"})
    assert len(found) == 36 and set(found.values()) == {0, 1}
    ones = [key for key, value in found.items() if value]
    assert ones == ["06 06", "06 12", "06 18", "07 00", "07 06", "07 12"]
    every, _ = events(mine, **{"labels.aggregate": "any"})
    assert sum(every.values()) == 4 + 6
    numbers = EVENTS.replace("B1.0", "1").replace("C5.0", "50").replace("M1.0", "100").replace("X2.0", "2000")
    own = {"labels.aggregate": "any", "labels.event_at": 100, "labels.transform": "none"}
    assert events(mine, numbers.replace("A1", ".1"), **own)[0] == found


def test_what_a_quiet_window_is_said_to_hold(mine):
    found, _ = events(mine, **{"labels.when_none": "B1.0"})
    assert len(found) == 36 and round(found["01 00"], 6) == -7 and round(found["07 12"], 3) == -3.699


def test_the_value_of_a_quiet_window_is_no_floor_for_the_others(mine):
    text = "time,value\n2013-12-20,-10\n2014-01-07 06:00,-50\n2014-02-01,-10\n"
    found, _ = events(mine, text, **{"labels.when_none": 0, "labels.transform": "none"})
    assert found["06 06"] == -50 and found["01 00"] == 0


def test_quiet_cells_of_a_column_of_classes(tmp_path):
    path = write(tmp_path / "x.csv", "time,value\n2014-01-07,FQ\n2014-01-08,M1.0\n2014-01-09,\n")
    labels = load_labels(path, "time", ["value"], transform="goes", when_none="B1.0")
    np.testing.assert_allclose(labels.values[:, 0], [-7, -5])
    assert list(labels.dropped.values()) == [1]


def test_windows_beyond_the_list_and_events_without_a_value_are_counted(mine):
    text = "time,value\n2014-01-02,C1.0\n2014-01-03 05:00,FQ\n2014-01-05,M1.0\n2014-01-06,\n"
    found, plan = events(mine, text)
    assert list(found) == ["04 00"]
    assert plan.labels.dropped["event without a value"] == 2
    days = [*range(1, 10), 12, 13, 14, 17, 18, 19]
    times = [pd.Timestamp(f"2014-01-{day}") + pd.Timedelta(6 * k, "h") for day in days for k in range(4)]
    beyond = sum(t < pd.Timestamp("2014-01-02") or t + pd.Timedelta("24h") > pd.Timestamp("2014-01-05") for t in times)
    assert plan.labels.dropped["window beyond the list of events"] == beyond == 60 - 9
    nothing, plan = events(mine, "time,value\n")
    assert not nothing and plan.labels.dropped["window beyond the list of events"] == 60


def test_the_guard_follows_from_the_window(mine):
    own = {"split.val": ["2014-01-10 12:00", "2014-01-15"]}
    with pytest.raises(
        ValueError, match=r"split.train and split.val overlap by 13.0 h.*latest possible label \(\+24.0 h\)"
    ):
        plan_samples(mine(EVENTS, **WINDOW | own))
    assert plan_samples(mine(EVENTS, **WINDOW | own | {"labels.window_hours": [0, 11]}))
    with pytest.raises(ValueError, match="brings no splits of its own: split.val in the config needs its period"):
        plan_samples(mine(EVENTS, **WINDOW | {"split.val": None}))
    with pytest.raises(ValueError, match="brings no splits of its own: split.train in the config needs its period"):
        plan_samples(mine(EVENTS, **WINDOW | {"split.train": None, "split.val": None, "split.test": None}))
    back = mine(EVENTS, **WINDOW | own | {"labels.window_hours": [-24, 0]})  # the first one of val knows of train
    assert sample_window(back) == (pd.Timedelta("-24h"), pd.Timedelta(0))
    with pytest.raises(ValueError, match="split.train and split.val overlap by 12.0 h"):
        plan_samples(back)
    with pytest.raises(ValueError, match="split.train and split.val overlap by 13.0 h"):
        plan_samples(mine("time,value\n", **own | {"labels.spans_hours": 24, "labels.tolerance_minutes": 0}))


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (WINDOW | {"split.column": "part"}, "labels.window_hours, .*, split.column, labels.path"),
        (WINDOW | {"labels.event_at": "M1.0"}, "labels.event_at, labels.kind"),
        ({"labels.aggregate": "any"}, "labels.aggregate, labels.window_hours"),
        ({"labels.unit": "km/s"}, "labels.unit, labels.path"),
        (WINDOW | {"labels.window_hours": [24, 0]}, "labels.window_hours, labels.kind"),
    ],
)
def test_keys_that_would_be_ignored_are_refused(mine, overrides, keys):
    with pytest.raises(ConfigError, match=rf"has a mistake:\n  - {keys} \("):
        mine(EVENTS, **overrides)


# ---------------------------------------------------------------------------------------------------- splits
def daily(count=20) -> pd.DatetimeIndex:
    return pd.date_range("2014-01-01", periods=count, freq="1D")


def test_splits_of_several_periods(mine):
    text = pd.DataFrame({"time": daily(), "value": range(20)}).to_csv(index=False)
    own = {
        "split.train": [["2014-01-01", "2014-01-03"], ["2014-01-06", "2014-01-08"]],
        "split.val": ["2014-01-04", "2014-01-05"],
    }
    plan = plan_samples(mine(text, **own | {"labels.tolerance_minutes": 0}))
    assert targets(plan, "train")[:, 0].tolist() == [0, 1, 5, 6] and targets(plan, "val").tolist() == [[3]]
    with pytest.raises(ValueError, match="The windows of split.train and split.val are 23.0 h apart"):
        plan_samples(mine(text, **own | {"labels.tolerance_minutes": 0, "split.guard_hours": 23.5}))


NONE = {"split.train": None, "split.val": None, "split.test": None}


def test_splits_of_a_column(mine):
    parts = ["train"] * 8 + ["Valid", " validation ", "VAL"] + ["", ""] + ["testing"] * 7
    text = pd.DataFrame({"time": daily(), "value": range(20), "part": parts}).to_csv(index=False)
    plan = plan_samples(mine(text, **NONE | {"split.column": "part"}))
    assert sizes(plan) == {"train": 8, "val": 3, "test": 7} and plan.labels.dropped == {"label of no split": 2}
    plan = plan_samples(mine(text, **NONE | {"split.column": "part", "split.guard_hours": 22.9}))
    assert sizes(plan) == {"train": 7, "val": 3, "test": 7}  # 30 minutes of tolerance, 60 of the first frame
    plan = plan_samples(mine(text, **{"split.column": "part"}))  # and within the periods, too
    assert [targets(plan, name)[:, 0].tolist() for name in sizes(plan)] == [[*range(8)], [], [16, 17, 18]]
    with pytest.raises(ValueError, match='Row 20 of .*mine.csv has "tset" in its column part, which is no split'):
        plan_samples(mine(text.replace("18,testing", "18,tset"), **NONE | {"split.column": "part"}))
    with pytest.raises(ValueError, match="has no column fold; .*split.column"):
        plan_samples(mine(text, **NONE | {"split.column": "fold"}))


def test_a_file_without_splits_of_its_own_needs_periods(config, tmp_path):
    """Else every sample would be in all three."""
    with h5py.File(tmp_path / "x.nc", "w") as file:
        file["time"], file["spectra"] = np.arange(0, 480, 24), np.ones((20, 3))
        file["time"].attrs["units"] = "hours since 2014-01-01"
    own = {"labels.path": str(tmp_path / "x.nc")}
    with pytest.raises(ValueError, match="x.nc brings no splits of its own: split.train in the config"):
        plan_samples(config("euv_spectra", **own))
    assert sizes(plan_samples(config("euv_spectra", **own | DAYS))) == {"train": 9, "val": 3, "test": 3}


# ---------------------------------------------------------------------------------------------------- subsets
def test_first_parts_are_spread_over_the_time(mine):
    rng = np.random.default_rng(0)
    for count in (20, 100, 333):
        order = spread_out(np.zeros((5000, 0)), seed=3)
        assert sorted(order) == list(range(5000))
        gap, chance = (
            np.diff(np.sort(o[:count]), prepend=0, append=5000).max() for o in (order, rng.permutation(5000))
        )
        assert gap <= 3 * 5000 / count and gap < 0.6 * chance
    assert spread_out(np.zeros((50, 0)), 1).tolist() != spread_out(np.zeros((50, 0)), 2).tolist()


def test_both_kinds_keep_their_share_in_training_alone(mine):
    times = hourly("2014-01-01", "2014-01-19 23:00")
    rare = np.random.default_rng(0).random(len(times)) < 0.1
    text = pd.DataFrame({"time": times, "value": rare.astype(int)}).to_csv(index=False)
    whole = plan_samples(mine(text))
    share, before = targets(whole, "train").mean(), set()
    for count in (20, 50, 100, 200):
        plan = plan_samples(mine(text, **{"training.max_train_samples": count, "training.max_val_samples": 10}))
        times, kept = set(plan.samples["train"]["time"]), targets(plan, "train")
        assert len(times) == count and before < times and abs(kept.sum() - share * count) <= 2
        before = times
    flipped = pd.DataFrame({"time": hourly("2014-01-01", "2014-01-19 23:00"), "value": (~rare).astype(int)})
    other = plan_samples(mine(flipped.to_csv(index=False), **{"training.max_val_samples": 10}))
    assert other.samples["val"]["time"].tolist() == plan.samples["val"]["time"].tolist()  # labels choose no test


# ---------------------------------------------------------------------------------------------------- where files are
def test_label_files_and_masks_of_the_hub_are_found_without_network(config, tmp_path):
    owner = "nasa-ibm-ai4science"
    places = {name: tmp_path / f"hub/datasets--{owner}--{name}/snapshots/abc" for name in (FLARES, REGIONS)}
    write_flares(tmp_path / "made")
    places[FLARES].parent.mkdir(parents=True)
    (tmp_path / "made" / FLARES).rename(places[FLARES])
    plan = plan_samples(config("flare_24h", **{"paths.released": f"hf://datasets/{owner}"}))
    assert len(plan.samples["test"]) == 59 * 24
    write(places[REGIONS] / "ar_2014.csv", "timestep,file_path,present\n2014-01-02 00:00:00,2014/a.h5,1\n")
    address = f"hf://datasets/{owner}/{REGIONS}"
    plan = plan_samples(config("ar_segmentation", **DAYS | {"labels.path": [f"{address}/ar_2014.csv"]}))
    assert plan.labels.paths.tolist() == [f"{address}/2014/a.h5"]
    with pytest.raises(
        FileNotFoundError, match=rf"ar_2015.csv of {owner}/{REGIONS} could not be downloaded.*labels.path"
    ):
        plan_samples(config("ar_segmentation", **DAYS | {"labels.path": [f"{address}/ar_2015.csv"]}))


def test_label_files_of_a_bucket(config, tmp_path, monkeypatch):
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    write_spectra(tmp_path / "x.nc")
    with serving(tmp_path) as (address, _):
        own = {"data.endpoint_url": address, "data.anonymous": True}
        assert len(labels_of(config("euv_spectra", **own | {"labels.path": "s3://sun/x.nc"}))) == 18
        said = "The label file s3://sun/none.csv: there is no such file.*labels.path"
        with pytest.raises(FileNotFoundError, match=said):
            labels_of(config("euv_spectra", **own | {"labels.path": {"train": "s3://sun/none.csv"}}))
