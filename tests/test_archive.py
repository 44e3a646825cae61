"""Files by time from a folder, an index or S3, and images out of them, however odd."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import hdf5plugin
import numpy as np
import pandas as pd
import pytest
import xarray
from frame_files import HOURS, ODD, build, files, physical_frame, serving, spoiled

from helpers.channels import CHANNELS, from_signed_log
from helpers.data.archive import Archive, ArchiveError, open_netcdf, read_index, read_variable
from helpers.data.frames import build_store, create_store, open_store, reduce_frame

ROOT = Path(__file__).parents[1]


# ---------------------------------------------------------------------------------------------------- odd files
def test_odd_files_are_listed_with_their_reason_and_built_once_they_are_mended(tmp_path):
    times = pd.date_range("2014-01-07", periods=len(ODD) + 1, freq="12min")
    paths = [tmp_path / f"{time:%Y/%m/%Y%m%d_%H%M}.nc" for time in times]
    for path, spoil in zip(paths, [spoiled(bool), *ODD.values()], strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        spoil(path)
    (paths[0].parent / "own.raw").write_bytes(b"secret.." * 512)
    shutil.copy(paths[0], paths[0].parent / "own.nc")
    report = build(tmp_path, times=times)
    assert report.built == 1 and report.lost == set(times[1:]) and report.missing == 0
    for path, reason in zip(paths[1:], ODD, strict=True):
        assert re.search(reason, report.unreadable[str(path)]), (reason, report.unreadable[str(path)])
    assert len(str(report).splitlines()) == 12 and f"and {len(ODD) - 10} more" in str(report)
    shutil.copy(paths[0], paths[1])
    assert build(tmp_path, times=times[:2]).built == 1


def test_a_frame_as_the_tools_of_the_release_compress_it(tmp_path):
    """LZ4 (filter 32004 of HDF5), 50 DN, G or m/s in every pixel."""
    create_store(tmp_path / "store.zarr", CHANNELS, 2, 64)
    store = open_store(tmp_path / "store.zarr")
    codes = reduce_frame(ROOT / "tests/data/cases/lz4_frame.nc", store)
    for (name, coding), image in zip(store.codings.items(), codes, strict=True):
        signed_log = image * coding.step + coding.offset
        np.testing.assert_allclose(from_signed_log(signed_log, store.scalers[name]), 50, rtol=2e-3)


@pytest.mark.parametrize("key", ["_FillValue", "missing_value"])
@pytest.mark.parametrize("dtype", ["f4", "i2", "i4"])
def test_frames_with_fill_values_are_unreadable(tmp_path, key, dtype):
    """Off the limb, a magnetogram may say -32768."""

    def change(file):
        image = np.full((32, 32), 50, dtype)
        image[:8] = -32768
        file.create_dataset("hmi_m", data=image).attrs[key] = np.array(-32768, dtype)

    spoiled(change, "hmi_m")(tmp_path / "2014/01/20140107_0000.nc")
    (reason,) = build(tmp_path, times=HOURS[:1]).unreadable.values()
    assert reason == "hmi_m has pixels that are not numbers (NaN)"


def test_what_the_attributes_of_a_variable_say_is_honoured(tmp_path):
    field = np.linspace(-100, 100, 1024, dtype=np.float32).reshape(32, 32)
    gap = np.where(np.arange(32) < 8, np.nan, field)
    encodings = {
        "packed": {"dtype": "int16", "scale_factor": 0.1, "_FillValue": -32768},
        "gap": {"_FillValue": -9999.0},
    }
    images = {"packed": field, "gap": gap, "kilogauss": field / 1000}
    dataset = xarray.Dataset({name: (("y", "x"), image) for name, image in images.items()})
    dataset["turned"] = (("x", "y"), field.T)
    dataset["missing"] = (("y", "x"), np.where(field > 0, 9999, field).astype("i4"), {"missing_value": np.int32(9999)})
    dataset["kilogauss"].attrs["units"] = "kG"
    dataset.to_netcdf(tmp_path / "a.nc", engine="h5netcdf", encoding=encodings)
    with open_netcdf(tmp_path / "a.nc") as file:
        np.testing.assert_allclose(read_variable(file, "packed"), field, atol=0.051)
        np.testing.assert_array_equal(read_variable(file, "gap"), gap)
        np.testing.assert_array_equal(read_variable(file, "turned"), field)
        np.testing.assert_allclose(read_variable(file, "kilogauss", "G"), field, rtol=1e-5)
        assert np.isnan(read_variable(file, "missing")[field > 0]).all()


def test_frames_of_other_compressors_are_read(tmp_path):
    image = physical_frame(64, 0)["aia94"]
    with h5py.File(tmp_path / "a.nc", "w") as file:
        for name, method in {"a": hdf5plugin.LZ4(), "b": hdf5plugin.Zstd(), "c": hdf5plugin.Blosc()}.items():
            file.create_dataset(name, data=image, chunks=(32, 64), **method)
    with open_netcdf(tmp_path / "a.nc") as file:
        for name in "abc":
            np.testing.assert_array_equal(read_variable(file, name), image)


# ---------------------------------------------------------------------------------------------------- an index
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"cannot be read \(.*No columns"),
        ("path;timestep;present\na.nc;2014-01-07;1\n", "cannot be read .*columns path, timestep, present"),
        ("path,timestep,present\na.nc,2014-01-07,yes\n", "cannot be read .*'yes'.* 0 or 1"),
        ("path,timestep,present\na,b.nc,2014-01-07,1\n", "cannot be read .*'2014-01-07'"),
        ("path,timestep,present\na,2014-01-07,1\nb,2014-01-07,1\n", "has for 2014-01-07 00:00:00 both 'a' and 'b'"),
        ("path,timestep,present\na.nc,yesterday,1\n", 'Row 2 of the index .*has "yesterday"'),
        ("path,timestep,present\na.nc,,1\n", "Row 2 of the index .*timestep"),
    ],
)
def test_an_odd_index_is_described(tmp_path, text, said):
    (tmp_path / "index.csv").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_index(str(tmp_path / "index.csv"), Archive())


def test_an_index_says_what_there_is_and_its_paths_may_be_of_another_machine(built):
    table = pd.read_csv(built / "index.csv")
    table["timestep"] = pd.to_datetime(table["timestep"]).dt.tz_localize("UTC").dt.tz_convert("Asia/Tokyo")
    table["path"] = "/nobackup/someone/" + table["path"].str.split("/").str[-1]
    table["dayofyear"] = 7
    pd.concat([table[::-1], table[:1]]).to_csv(built / "released.csv")  # unsorted, a row twice, an unnamed column
    index = read_index(str(built / "released.csv"), Archive())
    assert index.index.tolist() == HOURS.delete(2).tolist()
    for name in ("month.zarr", "flat.zarr"):  # files in folders by month, and all in one folder
        report = build(built, name, archive=Archive(str(built), index))
        assert (report.built, report.missing) == (5, 1) and files(built / name) == files(built / "store.zarr")
        for path in built.glob("2014/01/*.nc"):
            path.rename(built / path.name)


def test_the_real_index_is_understood():
    index = read_index(str(ROOT / "tests/data/surya_aws_s3_val_excerpt.csv"), Archive())
    assert len(index) == 14 and all(Archive(index=index).url(time) == Archive().url(time) for time in index.index)


# ---------------------------------------------------------------------------------------------------- S3
@pytest.fixture
def s3(built, monkeypatch):
    """The five frames in a bucket; returns (archive, the class that answers)."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    with serving(built) as (address, answers):
        yield Archive("s3://sun", endpoint_url=address), answers


def _key(hour: int) -> str:
    return f"/sun/2014/01/20140107_{hour:02d}00.nc"


def test_frames_from_s3_without_an_index_and_with_one(s3, built):
    archive, server = s3
    report = build(built, "s3.zarr", archive=archive)
    assert (report.built, report.missing, report.unreadable) == (5, 1, {})
    assert {signed for _, signed in server.seen} == {False}
    server.seen.clear()
    archive = replace(archive, anonymous=False)
    index = read_index("s3://sun/index.csv", archive)
    assert build(built, "index.zarr", archive=replace(archive, index=index)).built == 5
    assert {signed for _, signed in server.seen} == {True}
    assert files(built / "s3.zarr") == files(built / "index.zarr") == files(built / "store.zarr")
    with pytest.raises(ValueError, match="The index s3://.*none.csv cannot be read .*there is no such file"):
        read_index("s3://sun/none.csv", archive)


def test_a_download_lies_in_the_scratch_folder(s3, built):
    archive, _ = s3
    archive = replace(archive, scratch=str(built / "scratch"))
    (built / "scratch").mkdir()
    with archive.local_copy(archive.url(HOURS[0])) as path:
        assert path.is_relative_to(built / "scratch")
    assert not any((built / "scratch").iterdir())


def test_a_busy_server_and_a_broken_connection_are_tried_again(s3, built):
    archive, server = s3
    server.faults |= {_key(1): ["SlowDown", "InternalError", "SlowDown"], _key(3): ["cut", "SlowDown", "cut"]}
    assert build(built, "s3.zarr", archive=archive).built == 5
    assert [path for path, _ in server.seen].count(_key(1)) == 4
    assert files(built / "s3.zarr") == files(built / "store.zarr")


def test_what_cannot_be_fetched_is_reported_by_name_and_the_rest_is_built(s3, built, monkeypatch):
    archive, server = s3
    server.faults |= {_key(1): ["SlowDown"] * 50, _key(3): ["cut"] * 50, _key(4): ["AccessDenied"] * 50}
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 2)
    report = build(built, "s3.zarr", archive=archive)
    assert (report.built, report.missing) == (2, 1)
    reasons = {url[-7:-3]: reason for url, reason in report.unreadable.items()}
    assert reasons.keys() == {"0100", "0300", "0400"} and "AccessDenied" in reasons["0400"]
    assert "SlowDown" in reasons["0100"] and "ClientPayloadError" in reasons["0300"]
    assert len(report.unfetched) == 3 < len(report.lost)  # another day may bring these
    server.faults.clear()
    assert build(built, "s3.zarr", archive=archive).built == 3


@pytest.mark.parametrize(
    ("change", "environment", "said"),
    [
        ({"endpoint_url": "http://127.0.0.1:9"}, {}, "Could not connect to the endpoint"),
        ({}, {"HTTP_PROXY": "http://127.0.0.1:9"}, "prox"),
        ({"anonymous": False}, {"AWS_PROFILE": "nobody"}, "profile .*nobody"),
        ({"folder": "s3://no-such-bucket-here"}, {}, "bucket does not exist"),
    ],
)
def test_what_is_not_the_fault_of_a_frame_stops_at_the_first_ones(s3, built, monkeypatch, change, environment, said):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    many, tried, download = pd.date_range("2014-01-07", periods=200, freq="12min"), [], Archive._download
    monkeypatch.setattr(Archive, "_download", lambda *a: tried.append(a) or download(*a))
    with pytest.raises(ArchiveError, match=f"(?s)cannot be fetched from s3://.*{said}.*data.endpoint_url"):
        build(built, "s3.zarr", times=many, archive=replace(s3[0], **change))
    assert len(tried) < 100  # the first one, and those that were begun before that was noticed


def test_a_folder_may_hold_frames_without_years_and_months(made, tmp_path):
    """As the hub's validation data, from which `make verify` can be fed."""
    for hour in (0, 1):
        shutil.copy(made / "2014" / "01" / f"20140107_{hour:02}00.nc", tmp_path)
    flat = Archive(str(tmp_path))
    times = HOURS.to_numpy("datetime64[s]")
    assert flat.may_have(times).tolist() == [True, True, False, False, False, False]
    store = tmp_path / "store.zarr"
    assert build_store(HOURS[:3], store, reduce=2, archive=flat, native_size=32, progress=False).built == 2
    whole = Archive(str(made))
    assert flat.url(times[0]) != whole.url(times[0]) and flat.url(times[2]).endswith("2014/01/20140107_0200.nc")


def test_only_s3_and_folders(tmp_path):
    with pytest.raises(ArchiveError, match="not from foo://bar/2014/01/20140107_0.00.nc"):
        build(tmp_path, archive=Archive("foo://bar"))
    index = pd.Series({HOURS[0]: "file:///etc/passwd"})
    with pytest.raises(ArchiveError, match="not from file:///etc/passwd"):
        build(tmp_path, archive=Archive(str(tmp_path), index))
    with pytest.raises(ArchiveError, match="no folder .*nowhere. Correct data.archive"):
        build(tmp_path, archive=Archive(str(tmp_path / "nowhere")))
