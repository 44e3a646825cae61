"""`make verify` on the tiny profile: it passes, and calls wrong whatever would spoil Surya without an error."""

import json
import shutil
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml

from helpers import channels
from helpers.channels import CHANNELS, load_scalers
from helpers.data import archive  # noqa: F401  (its filters for h5py)
from helpers.model import checkpoint, encoder
from helpers.model.encoder import SuryaEncoder
from helpers.model.heads import Specformer2D
from helpers.tools import verify
from helpers.tools.command import Refusal

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "helpers" / "data" / "surya.tiny.pt"
STORED = json.loads(WEIGHTS.with_suffix(".losses.json").read_text())

pytestmark = pytest.mark.xdist_group("verify")  # draws a Sun of its own


@pytest.fixture
def call(monkeypatch, capsys):
    """Run the command on the tiny profile with these words; its exit code and what it said."""

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["verify", "--profile", "tiny", *words])
        return verify.main(), capsys.readouterr().out

    return run


def test_it_passes_and_says_what_reducing_leaves(call):
    code, said = call("--reduce", "2", "--times", "2")
    assert code == 0 and "\npass: mean loss" in said and verify.LOOK_AT not in said
    rows = dict(line.rsplit(maxsplit=2)[:2] for line in said.splitlines() if "reduced" in line and "loss" not in line)
    assert [*rows] == ["forecast, then reduced", "persistence, then reduced", "forecast of reduced images"]
    assert float(rows["forecast, then reduced"]) < float(rows["forecast of reduced images"])


def test_the_stored_losses_are_those_of_a_plain_loop():
    """Nothing of archive, store or loading: h5py, averages in numpy, the formula of the release."""
    folder = verify.configure({"profile": "tiny", "parameters": {}}).synthetic.folder
    verify.measure(verify.configure({"profile": "tiny", "parameters": {}}), count=1)  # draws the Sun
    model = Specformer2D(SuryaEncoder(64, 8, 13, 2, 64, 5, 2, 4), 13).eval()
    state = torch.load(WEIGHTS, weights_only=True)
    own = {key if key.startswith("unembed") else f"encoder.{key}": value for key, value in state.items()}
    assert not model.load_state_dict(own, strict=False).missing_keys
    scalers = load_scalers()

    def frame(hour: int) -> np.ndarray:
        planes = []
        with h5py.File(Path(folder, "2014", "01", f"20140101_{hour:02}00.nc")) as file:
            for name in CHANNELS:
                x = file[name][()].astype(float).reshape(64, 2, 64, 2).mean((1, 3)) * scalers[name].scale
                y = np.sign(x) * np.log(1 + np.abs(x))
                planes.append((y - scalers[name].mean) / (scalers[name].std + scalers[name].epsilon))
        return np.stack(planes)

    losses = []
    for hour in range(1, 9):
        past, errors = [frame(hour - 1), frame(hour)], []
        for ahead in (1, 2):
            ts = torch.tensor(np.stack(past[-2:], axis=1)[None], dtype=torch.float32)  # (1, C, T, H, W)
            past.append(model({"ts": ts})[0].detach().numpy())
            errors.append(np.mean((past[-1] - frame(hour + ahead)) ** 2))
        losses.append(np.mean(errors))
    np.testing.assert_allclose(losses, STORED["losses"], rtol=1e-3)  # the store rounds to 0.4% of a deviation


def exchange(names: list[str] | tuple[str, ...], one: str, other: str) -> list[str]:
    return [{one: other, other: one}.get(name, name) for name in names]


def channel_order(monkeypatch, folder):
    return f"model.weights_channels={json.dumps(exchange(CHANNELS, 'aia171', 'hmi_bz'))}"


def frame_order(monkeypatch, folder):
    right = encoder.PatchProjection.forward
    monkeypatch.setattr(encoder.PatchProjection, "forward", lambda self, ts: right(self, ts.flip(2)))


def a_scaler(monkeypatch, folder):
    constants = yaml.safe_load(channels.SCALERS_FILE.read_text())
    constants["aia304"]["std"] *= 2
    (folder / "scalers.yaml").write_text(yaml.safe_dump(constants))
    monkeypatch.setattr(channels, "SCALERS_FILE", folder / "scalers.yaml")


def no_shift_of_the_norms(monkeypatch, folder):
    right = encoder.LayerNorm.forward
    monkeypatch.setattr(encoder.LayerNorm, "forward", lambda self, x, shift=0.0: right(self, x))


def the_grid_of_the_filter(monkeypatch, folder):
    monkeypatch.setattr(checkpoint, "fit_filter", lambda values, new: (values.roll(1, dims=0), ""))


def the_weights(monkeypatch, folder):
    state = torch.load(WEIGHTS, weights_only=True)
    state["backbone.blocks_attention.0.mlp.fc2.weight"] *= -1
    torch.save(state, folder / "spoilt.pt")
    shutil.copy(WEIGHTS.with_suffix(".losses.json"), folder / "spoilt.losses.json")
    return f"model.weights={folder / 'spoilt.pt'}"


@pytest.mark.parametrize(
    "spoil",
    [channel_order, frame_order, a_scaler, no_shift_of_the_norms, the_grid_of_the_filter, the_weights],
)
def test_what_spoils_surya_is_called_wrong(call, monkeypatch, tmp_path, spoil):
    changed = spoil(monkeypatch, tmp_path)
    code, said = call("--times", "3", *(["--parameters", changed] if changed else []))
    assert code == 1 and "\nwrong: mean loss" in said and verify.LOOK_AT in said, said


def test_a_deviation_of_a_per_cent_is_close(call, monkeypatch):
    right = verify.measure
    monkeypatch.setattr(verify, "measure", lambda *given: {"forecast": 1.01 * right(*given)["forecast"]})
    code, said = call("--times", "2")
    assert code == 0 and "\nclose: mean loss" in said and "1.00% off" in said and verify.LOOK_AT in said


def test_images_of_another_size_have_nothing_to_be_compared_with(call):
    with pytest.raises(Refusal, match="of 64 pixels, not of 32: make verify PROFILE=surya_4k"):
        call("--parameters", "data.reduce=4")
