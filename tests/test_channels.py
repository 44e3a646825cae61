"""The channels: order, units, colour maps, and the transform between the three spaces."""

import math
import re

import numpy as np
import pytest
import torch
import yaml

from helpers import channels as ch

ORDER = (
    *("aia94", "aia131", "aia171", "aia193", "aia211", "aia304", "aia335", "aia1600"),
    *("hmi_m", "hmi_bx", "hmi_by", "hmi_bz", "hmi_v"),
)
SCALERS = ch.load_scalers()
PHYSICAL = np.concatenate([-np.geomspace(1, 65000, 200)[::-1], [0.0], np.geomspace(1, 65000, 200)]).astype(np.float32)


def test_order_is_the_checkpoint_s_and_not_that_of_the_scalers_file():
    assert ch.CHANNELS == ORDER
    assert ORDER == tuple(SCALERS) != tuple(yaml.safe_load(ch.SCALERS_FILE.read_text()))
    assert {ch.UNITS[name] for name in ORDER} == {"DN", "G", "m/s"} and ch.UNITS["hmi_v"] == "m/s"


@pytest.mark.parametrize("name", ORDER)
def test_transform_is_the_formula_and_comes_back(name):
    scaler = SCALERS[name]
    for x, z in zip(PHYSICAL[::40].tolist(), ch.normalise(PHYSICAL[::40].astype(np.float64), scaler), strict=True):
        y = math.copysign(math.log(1 + abs(x * scaler.scale)), x)
        assert z == pytest.approx((y - scaler.mean) / (scaler.std + scaler.epsilon), rel=1e-12, abs=1e-12)
    for values in (PHYSICAL, torch.from_numpy(PHYSICAL)):
        back = ch.denormalise(ch.normalise(values, scaler), scaler)
        assert type(back) is type(values) and back.dtype == values.dtype
        np.testing.assert_allclose(np.asarray(back), PHYSICAL, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(
            np.asarray(ch.from_signed_log(ch.to_signed_log(values, scaler), scaler)), PHYSICAL, rtol=1e-5
        )


@pytest.mark.parametrize("trailing", [2, 3])
def test_channel_axis_takes_constants_by_name(trailing):
    names = ["hmi_v", "aia94", "hmi_bz"]
    x = np.random.default_rng(0).normal(scale=500, size=(3, *[4] * trailing)).astype(np.float32)
    stacked = ch.stack_scalers(SCALERS, names, trailing=trailing)
    expected = np.stack([ch.normalise(plane, SCALERS[name]) for plane, name in zip(x, names, strict=True)])
    np.testing.assert_allclose(ch.normalise(x, stacked), expected, rtol=1e-6, atol=1e-6)
    batch = ch.normalise(torch.from_numpy(x)[None], stacked)
    assert batch.dtype == torch.float32
    np.testing.assert_allclose(batch[0].numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ORDER)
def test_codes_lie_within_half_a_step_and_zero_stays_zero(name):
    scaler, coding = SCALERS[name], ch.coding_of(name, SCALERS[name])
    assert coding.step <= min(0.008 * (scaler.std + scaler.epsilon), 2**-10) * (1 + 1e-6)
    low, high = (coding.offset + sign * 32767 * coding.step for sign in (-1, 1))
    assert low <= (-0.45 if name.startswith("aia") else -25) and high >= 6.9
    signed_log = np.random.default_rng(0).uniform(max(low, -8), min(high, 8), 100_000).astype(np.float32)
    codes = coding.encode(signed_log)
    decoded = codes * coding.step + coding.offset
    assert codes.dtype == np.int16 and decoded.dtype == np.float32
    assert np.abs(decoded.astype(float) - signed_log).max() <= 0.51 * coding.step
    assert (coding.encode(np.zeros(1)) * coding.step + coding.offset)[0] == 0
    if not name.startswith("aia"):  # a sign changes exactly
        np.testing.assert_array_equal(-codes * coding.step + coding.offset, -decoded)
    for outside in (low - coding.step, high + coding.step, np.nan):
        with pytest.raises(ValueError, match="do not fit Coding"):
            coding.encode(np.array([0, outside], np.float32))


def test_colour_maps_are_sunpy_s():
    assert ch.colormap("aia171").name == "sdoaia171" and ch.colormap("hmi_bx").name == "hmimag"
    for name in ORDER:
        assert ch.colormap(name)(0.5) is not None


def test_unknown_repeated_or_missing_channels_are_named():
    for wrong in (["aia17", "hmi_m"], ["hmi_v", "hmi_m", "hmi_m"], [], "aia171"):
        with pytest.raises(ValueError, match=re.escape(f"{wrong!r}. There are aia94, ")):
            ch.check_channels(wrong)


CONSTANTS = {"mean": 1, "std": 2, "epsilon": 0, "sl_scale_factor": 0.5}


@pytest.mark.parametrize(
    "entry",
    [
        {key: CONSTANTS[key] for key in ("mean", "std", "epsilon")},
        CONSTANTS | {"sl_scale_factor": 0},
        CONSTANTS | {"sl_scale_factor": -1},
        CONSTANTS | {"std": 0},
        CONSTANTS | {"mean": float("nan")},
        CONSTANTS | {"mean": "one"},
        7,
    ],
)
def test_a_wrong_entry_of_a_scalers_file_is_named(tmp_path, entry):
    path = tmp_path / "scalers.yaml"
    path.write_text(yaml.safe_dump({"aia131": CONSTANTS, "aia94": entry}))
    with pytest.raises(ValueError, match="scalers.yaml: aia94 "):
        ch.load_scalers(path)


def test_a_file_has_the_constants_of_every_channel(tmp_path):
    (tmp_path / "scalers.yaml").write_text(yaml.safe_dump({name: CONSTANTS for name in ORDER if name != "hmi_v"}))
    with pytest.raises(ValueError, match=r"scalers.yaml: hmi_v needs the numbers mean, .*KeyError"):
        ch.load_scalers(tmp_path / "scalers.yaml")


def test_a_missing_or_another_file_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.yaml"):
        ch.load_scalers(tmp_path / "none.yaml")
    (tmp_path / "text.yaml").write_text("just text")
    with pytest.raises(ValueError, match="text.yaml"):
        ch.load_scalers(tmp_path / "text.yaml")
