"""Models in the layout of Surya's released fine-tunes, against outputs of the release's own code."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.config import load_config
from helpers.model.checkpoint import CheckpointError, load_filtered, load_released
from helpers.model.encoder import SuryaEncoder
from helpers.model.heads import Specformer1D
from helpers.model.lora import lora_state_dict
from helpers.use import load_release

DATA = Path(__file__).parent / "data" / "reference"
NAMES = ("released_1d_lora", "released_1d_plain", "released_2d_lora")
WRAPS = {
    "plain": lambda state: state,
    "model_state_dict": lambda state: {"model_state_dict": state, "epoch": 3},
    "state_dict": lambda state: {"state_dict": state},
    "several GPUs": lambda state: {f"module.{key}": tensor for key, tensor in state.items()},
}


def reference(name):
    """State dict, what does not stand in it, and the numbers of the release."""
    arrays = np.load(DATA / f"{name}.npz")
    config, lora = (json.loads(str(arrays[key])) for key in ("config", "lora"))
    state = {key[6:]: torch.from_numpy(arrays[key]) for key in arrays.files if key.startswith("state/")}
    unknown = {"num_heads": config["num_heads"], "alpha": lora and lora["lora_alpha"]}
    return state, unknown, torch.from_numpy(arrays["ts"]), torch.from_numpy(arrays["output"])


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("name", NAMES)
def test_it_computes_what_the_release_computed(tmp_path, name, wrap):
    state, unknown, ts, output = reference(name)
    torch.save(WRAPS[wrap](state), tmp_path / "weights.pth")
    model = load_released(tmp_path / "weights.pth", **unknown)
    with torch.no_grad():
        found = model({"ts": ts})
    assert found.shape == output.shape
    assert (found - output).abs().max() <= 2e-5 * output.abs().max()
    assert not model.training and len(lora_state_dict(model)) == sum("lora_" in key for key in state)


def test_what_does_not_stand_in_the_file_is_known_of_the_release_or_must_be_given(tmp_path):
    state, unknown, ts, output = reference("released_1d_lora")
    for given in ({}, {"alpha": 8}, {"num_heads": 4}):
        with pytest.raises(CheckpointError, match="num_heads and LoRA alpha must be given"):
            load_released(state, **given)
    torch.save(state, tmp_path / "solar_flare_weights.pth")  # whose alpha is 8
    known = load_released(tmp_path / "solar_flare_weights.pth", num_heads=4)
    assert (
        {module.scaling for module in known.modules() if hasattr(module, "scaling")}
        == {8 / 8}
        != {unknown["alpha"] / 8}
    )


def without_one(state):
    del state["base_model.model.backbone.blocks_attention.1.mlp.fc2.base_layer.bias"]


def one_too_many(state):
    state["base_model.model.linear.extra"] = torch.zeros(3)


def another_shape(state):
    state["base_model.model.linear.weight"] = torch.zeros(32, 31)


def not_finite(state):
    state["base_model.model.linear.bias"][0] = float("nan")


def no_positions(state):
    del state["base_model.model.embedding.pos_embed"]


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (without_one, "encoder.backbone.blocks_attention.1.mlp.fc2.bias"),
        (one_too_many, "head.0.extra"),
        (another_shape, "head.0.weight"),
        (not_finite, "head.0.bias does not hold finite"),
        (no_positions, "pos_embed"),
    ],
)
def test_a_file_that_is_not_whole_is_refused_by_name(spoil, told):
    state, unknown, *_ = reference("released_1d_lora")
    spoil(state)
    with pytest.raises(CheckpointError, match=told):
        load_released(state, **unknown)


class Trap:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_a_pickle_that_is_no_state_dict_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weights": Trap()}, "trap.pth")
    Path("bare.pth").write_bytes(pickle.dumps(Trap()))
    for name in ("trap.pth", "bare.pth"):
        with pytest.raises(CheckpointError):
            load_released(Path(name), 8, 4)
    assert not Path("executed").exists()


def test_adapters_are_no_silent_starting_point():
    state, *_ = reference("released_1d_lora")
    config = json.loads(str(np.load(DATA / "released_1d_lora.npz")["config"]))
    model = Specformer1D(SuryaEncoder(**config), pooling="class_token")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="is fine-tuned, with adapters"):
        load_filtered(model, state)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_the_wind_gets_its_unit_from_the_labels_of_the_training(tmp_path):
    state, unknown, ts, output = reference("released_1d_lora")
    frames = state["base_model.model.embedding.patch_embed.proj.weight"].shape[1] // 13
    torch.save(state, tmp_path / "wind.pth")
    speeds = {"train": (300, 800), "val": (250, 900), "test": (200, 400)}
    for month, (name, values) in enumerate(speeds.items(), 1):
        rows = [f"2014-0{month}-0{day} 00:00:00,{value}" for day, value in enumerate(values, 1)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["timestamp,V", *rows]))
    changes = {"labels.path": {name: str(tmp_path / f"{name}.csv") for name in speeds}, "model.time_dim": frames}
    changes |= {"data.offsets_minutes": [-60, 0][2 - frames :], "data.native_size": 64, "data.reduce": 1}
    cfg = load_config(profile="tiny", task="solar_wind", experiment="finetune", overrides=changes)
    trained = load_release(str(tmp_path / "wind.pth"), cfg, **unknown)
    written = load_release("wind.pth", cfg.model_copy(update={"root": tmp_path}), **unknown)  # as in config.yaml
    assert written.about == trained.about
    shared = replace(cfg.shared, path=tmp_path)
    assert (
        load_release("{shared}/wind.pth", cfg.model_copy(update={"shared": shared}), **unknown).about == trained.about
    )
    with torch.no_grad():
        assert torch.allclose(trained.to_units(trained.model({"ts": ts})), 300 + 500 * output, atol=1e-2)
    for change, told in {
        "data.native_size": (128, "token grid 16 x 16 is larger than 8 x 8"),
        "data.channels": (["aia94"], "takes the channels and minutes"),
    }.items():
        other = load_config(profile="tiny", task="solar_wind", overrides=changes | {change: told[0]})
        with pytest.raises(CheckpointError, match=told[1]):
            load_release(str(tmp_path / "wind.pth"), other, **unknown)
