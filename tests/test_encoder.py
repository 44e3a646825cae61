"""The encoder against the numbers of the released code, and against what people do to it."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from small_encoder import SMALL

from helpers.model.encoder import Neighbourhood, SuryaEncoder
from helpers.model.heads import Specformer2D

DATA = Path(__file__).parent / "data"
REFERENCES = ("surya_tiny", "surya_tiny_cls", "surya_tiny_rpe")


class Reference:
    """One npz of reference numbers, and the model filled with its weights."""

    def __init__(self, name: str):
        arrays = np.load(DATA / "reference" / f"{name}.npz")
        self.config = json.loads(str(arrays["config"]))
        self.numbers = {key: torch.from_numpy(arrays[key]) for key in arrays.files if key != "config"}
        self.state = {key[6:]: value for key, value in self.numbers.items() if key.startswith("state/")}
        self.cls_token = self.numbers.get("cls_token")

    def encoder(self, **changes) -> SuryaEncoder:
        encoder = SuryaEncoder(**self.config, **changes)
        own = encoder.state_dict()
        encoder.load_state_dict({key: value for key, value in self.state.items() if key in own})
        return encoder

    def forecaster(self) -> Specformer2D:
        model = Specformer2D(self.encoder(), out_chans=self.config["in_chans"])
        decoder = {k.removeprefix("unembed.unembed.0."): v for k, v in self.state.items() if k.startswith("unembed.")}
        model.unembed.unembed[0].load_state_dict(decoder)
        return model


@pytest.fixture(params=REFERENCES)
def reference(request: pytest.FixtureRequest) -> Reference:
    return Reference(request.param)


def assert_agrees(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def test_tokens_after_each_block_agree_with_the_released_code(reference: Reference):
    encoder, numbers = reference.encoder().eval(), reference.numbers
    blocks = [*encoder.backbone.blocks_spectral_gating, *encoder.backbone.blocks_attention]
    spectral, nglo = len(encoder.backbone.blocks_spectral_gating), encoder.nglo
    seen = {}

    def remember(index: int):
        def hook(module, inputs, output):
            patches = output[:, nglo:] if index >= spectral else output
            patches = encoder.backbone.near.from_blocks(patches) if index >= spectral else patches
            seen[index] = torch.cat([output[:, :nglo], patches], dim=1) if index >= spectral else patches

        return hook

    for index, block in enumerate(blocks):
        block.register_forward_hook(remember(index))
    with torch.no_grad():
        assert_agrees(encoder.embedding(numbers["ts"]), numbers["tokens_after_embedding"])
        assert_agrees(encoder(numbers["ts"], reference.cls_token), numbers["tokens"])
    compared = [key for key in numbers if key.startswith("tokens_after_block_")]
    assert len(compared) == 3
    for key in compared:
        assert_agrees(seen[int(key.rpartition("_")[2])], numbers[key])


def test_positions_are_those_of_the_checkpoint(reference: Reference):
    assert_agrees(reference.encoder().embedding.pos_embed, reference.state["embedding.pos_embed"])


@pytest.mark.parametrize("name", ["surya_tiny", "surya_tiny_rpe"])
def test_forecast_loss_and_gradients_agree_with_the_released_code(name: str):
    reference = Reference(name)
    model, numbers = reference.forecaster(), reference.numbers
    forecast = model({"ts": numbers["ts"]})
    assert_agrees(forecast, numbers["forecast"])
    loss = forecast.square().mean()
    assert loss.item() == pytest.approx(numbers["loss"].item(), rel=2e-5)
    loss.backward()
    norms = {key.removeprefix("grad_norm/"): value.item() for key, value in numbers.items() if key.startswith("grad_")}
    ours = {key.removeprefix("encoder."): parameter.grad.norm().item() for key, parameter in model.named_parameters()}
    assert ours.keys() == norms.keys()
    for key, norm in norms.items():
        assert ours[key] == pytest.approx(norm, rel=2e-5, abs=1e-6), key


@pytest.mark.parametrize("dtype", ["autocast", "weights"])
def test_bfloat16_stays_within_one_percent(reference: Reference, dtype: str):
    encoder, numbers = reference.encoder().eval(), reference.numbers
    if dtype == "weights":
        encoder.to(torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "autocast"):
        tokens = encoder(numbers["ts"], reference.cls_token)
    assert tokens.dtype == torch.float32  # the residual stream
    assert relative_error(tokens, numbers["tokens"]) < 0.01


def test_checkpointing_gives_the_same_gradients(reference: Reference):
    gradients = []
    for layers in ((), range(reference.config["depth"])):
        encoder = reference.encoder(recompute_blocks=layers)
        encoder(reference.numbers["ts"], reference.cls_token).square().mean().backward()
        gradients.append({key: parameter.grad for key, parameter in encoder.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=0, atol=0, msg=key)


def test_checkpointing_recomputes_only_the_chosen_blocks_and_only_for_gradients():
    encoder = SuryaEncoder(**SMALL, recompute_blocks=(0, 2))
    runs = dict.fromkeys(range(3), 0)
    blocks = [*encoder.backbone.blocks_spectral_gating, *encoder.backbone.blocks_attention]
    for index, block in enumerate(blocks):
        block.norm1.register_forward_hook(lambda *_, index=index: runs.__setitem__(index, runs[index] + 1))
    ts = torch.randn(1, 3, 2, 32, 32)
    with torch.no_grad():
        encoder(ts)
    assert runs == {0: 1, 1: 1, 2: 1}
    encoder(ts).sum().backward()
    assert runs == {0: 3, 1: 2, 2: 3}


def test_keys_and_shapes_are_those_of_the_released_checkpoint():
    released = json.loads((DATA / "surya_366m_state_dict.json").read_text())
    with torch.device("meta"):
        encoder = SuryaEncoder(
            img_size=4096,
            patch_size=16,
            in_chans=13,
            time_dim=2,
            embed_dim=1280,
            depth=10,
            n_spectral_blocks=2,
            num_heads=16,
        )
        model = Specformer2D(encoder, out_chans=13)
    ours = {key.removeprefix("encoder."): list(tensor.shape) for key, tensor in model.state_dict().items()}
    theirs = {key: shape for key, (shape, _) in released["state_dict"].items()}
    assert theirs.pop("embedding.pos_embed") == list(encoder.embedding.pos_embed.shape)
    assert ours == theirs
    assert sum(parameter.numel() for parameter in model.parameters()) == released["parameters"] == 366_190_080


@pytest.mark.parametrize(("grid", "side"), [(2, 2), (6, 2), (12, 4), (16, 8)])
@pytest.mark.parametrize("nglo", [0, 1])
def test_every_query_sees_its_window_and_nothing_else(grid: int, side: int, nglo: int):
    rank, tokens = 4, grid * grid
    near = Neighbourhood(grid, window=2, rank=rank, nglo=nglo)
    assert near.block == side
    keys = near.gather.view(near.blocks, 1, -1).expand(near.mask.shape)
    assert keys.shape[-1] % 8 == 0
    place = near.to_blocks(torch.arange(tokens).view(1, -1, 1)).flatten().tolist()  # position -> row-major index
    for position in range(tokens):
        block, query = divmod(position, side * side)
        seen = keys[block, query][near.mask[block, query] == 0].tolist()
        y, x = divmod(place[position], grid)
        window_y, window_x = y // 2 * 2, x // 2 * 2
        rows = [r for r in range(window_y - 1, window_y + 3) if 0 <= r < grid]
        columns = [c for c in range(window_x - 1, window_x + 3) if 0 <= c < grid]
        patches = sorted(place[key - nglo] for key in seen if nglo <= key < nglo + tokens)
        assert patches == sorted(r * grid + c for r in rows for c in columns)
        others = sorted(key for key in seen if not nglo <= key < nglo + tokens)
        assert others == [*range(nglo), *range(nglo + tokens, nglo + tokens + rank)]


@pytest.mark.parametrize("img_size", [8, 24, 40, 48])
def test_every_even_grid_gives_the_same_as_the_smallest_blocks(img_size: int, monkeypatch: pytest.MonkeyPatch):
    """The side of the blocks is a matter of speed alone."""
    config = dict(SMALL, img_size=img_size)
    encoder = SuryaEncoder(**config).eval()
    monkeypatch.setattr("helpers.model.encoder.BLOCK_SIDES", (2,))
    plain = SuryaEncoder(**config).eval()
    plain.load_state_dict(encoder.state_dict())
    assert plain.backbone.near.block == 2
    ts = torch.randn(2, 3, 2, img_size, img_size)
    with torch.no_grad():
        torch.testing.assert_close(encoder(ts), plain(ts))


def test_samples_of_a_batch_do_not_mix():
    encoder = SuryaEncoder(**SMALL).eval()
    ts = torch.randn(3, 3, 2, 32, 32)
    with torch.no_grad():
        together, alone = encoder(ts), torch.cat([encoder(sample[None]) for sample in ts])
    torch.testing.assert_close(together, alone)


def test_a_fresh_encoder_trains():
    torch.manual_seed(0)
    model = Specformer2D(SuryaEncoder(**SMALL, drop_rate=0.1), out_chans=3)
    ts = torch.randn(4, 3, 2, 32, 32)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = (model({"ts": ts}) - ts[:, :, 1]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert math.isfinite(losses[-1]) and losses[-1] < 0.8 * losses[0]


def test_dropout_acts_in_training_alone():
    encoder = SuryaEncoder(**SMALL, drop_rate=0.5)
    ts = torch.randn(1, 3, 2, 32, 32)
    assert not torch.equal(encoder(ts), encoder(ts))
    encoder.eval()
    assert torch.equal(encoder(ts), encoder(ts))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"img_size": 33}, "img_size 33 must be an even number of patches of patch_size 4"),
        ({"img_size": 36}, "must be an even number"),
        ({"num_heads": 3}, "embed_dim 16 is not a multiple of num_heads 3"),
        ({"embed_dim": 18}, "embed_dim 18 is not a multiple of 4"),
        ({"window_size": 4}, "window_size 4 is not in the release; use 2"),
        ({"n_spectral_blocks": 4}, "n_spectral_blocks 4 is not between 0 and depth 3"),
        ({"recompute_blocks": [3]}, "recompute_blocks [3] are no blocks"),
        ({"rpe": True, "nglo": 1}, "rpe together with nglo has no reference"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes: dict, sentence: str):
    with pytest.raises(ValueError, match="The encoder cannot be built") as error:
        SuryaEncoder(**{**SMALL, **changes})
    assert sentence in str(error.value)


def test_all_wrong_settings_are_named_at_once():
    with pytest.raises(ValueError, match="even.*num_heads.*window_size"):
        SuryaEncoder(**dict(SMALL, img_size=36, num_heads=3, window_size=4))


@pytest.mark.parametrize(
    "shape", [(1, 2, 3, 32, 32), (3, 2, 32, 32), (1, 3, 32, 32), (1, 3, 2, 32, 64), (1, 4, 1, 64, 64)]
)
def test_an_input_of_another_shape_is_answered_with_both_shapes(shape: tuple):
    with pytest.raises(ValueError, match="data.channels") as error:
        SuryaEncoder(**SMALL)(torch.zeros(shape))
    assert "(B, 3, 2, 32, 32)" in str(error.value) and str(shape) in str(error.value)


def test_global_tokens_are_needed_or_refused():
    ts, dim = torch.zeros(2, 3, 2, 32, 32), SMALL["embed_dim"]
    with_token, without = SuryaEncoder(**SMALL, nglo=1), SuryaEncoder(**SMALL)
    with pytest.raises(ValueError, match=r"global_tokens must be of shape \(1, 1, 16\) where nglo=1, not None"):
        with_token(ts)
    with pytest.raises(ValueError, match="global_tokens must be of shape None where nglo=0"):
        without(ts, torch.zeros(1, 1, dim))
    with pytest.raises(ValueError, match=r"shape \(1, 1, 16\) where nglo=1, not \(3, 1, 16\)"):
        with_token(ts, torch.zeros(3, 1, dim))
    one, each = with_token(ts, torch.ones(1, 1, dim)), with_token(ts, torch.ones(2, 1, dim))
    assert one.shape == (2, 1 + 64, dim)
    torch.testing.assert_close(one, each)
