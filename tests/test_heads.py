"""The poolings, the decoder and the linear baselines."""

import pytest
import torch
from small_encoder import SMALL
from torch import nn

from helpers.config import POOLINGS
from helpers.model.encoder import SuryaEncoder
from helpers.model.heads import LinearBaseline1D, LinearBaseline2D, PixelDecoder, Specformer1D, Specformer2D


def make(pooling: str = "mean", **settings) -> Specformer1D:
    torch.manual_seed(0)
    return Specformer1D(SuryaEncoder(**SMALL, nglo=int(pooling == "class_token")), pooling=pooling, **settings)


def batch(size: int = 3, seed: int = 1) -> dict[str, torch.Tensor]:
    return {"ts": torch.randn(size, 3, 2, 32, 32, generator=torch.Generator().manual_seed(seed))}


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("settings", [{}, {"penultimate": 5, "dropout": 0.5, "num_outputs": 4}])
def test_numbers_for_every_sample_alone_and_in_a_batch(pooling: str, settings: dict):
    model = make(pooling, **settings).eval()
    with torch.no_grad():
        together = model(batch())
        alone = torch.cat([model({"ts": sample[None]}) for sample in batch()["ts"]])
    assert together.shape == (3, settings.get("num_outputs", 1)) and together.dtype == torch.float32
    torch.testing.assert_close(together, alone)
    assert together.std(dim=0).min() > 0


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_batch_of_one_trains(pooling: str):
    model = make(pooling, penultimate=5, dropout=0.1)
    model(batch(1)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_fresh_model_starts_near_zero(pooling: str):
    model = make(pooling).eval().fit_features([batch(8, seed) for seed in range(3)])
    with torch.no_grad():
        assert 0 < model(batch(8)).abs().max() < 1


@pytest.mark.parametrize("pooling", POOLINGS)
def test_output_is_float32_under_autocast(pooling: str):
    model = make(pooling).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(batch()).dtype == torch.float32


def test_attention_pooling_starts_as_the_mean_and_can_pick_a_patch():
    tokens = torch.randn(2, 9, 16)
    pool = make("attention").pool
    torch.testing.assert_close(pool(tokens), tokens.mean(dim=1))
    with torch.no_grad():
        pool.query.copy_(1e3 * nn.functional.layer_norm(tokens[0, 4], (16,)))
    torch.testing.assert_close(pool(tokens)[0], tokens[0, 4])


def test_pooling_does_not_depend_on_where_the_patches_are():
    """All but the class token see a set of tokens; positions are in the tokens themselves."""
    tokens = torch.randn(2, 9, 16)
    for pooling in ("mean", "max", "attention", "transformer"):
        pool = make(pooling).pool.eval()
        with torch.no_grad():
            torch.testing.assert_close(pool(tokens), pool(tokens[:, torch.randperm(9)]), rtol=1e-4, atol=1e-5)


def test_the_class_token_belongs_to_the_head_and_starts_at_zero():
    model = make("class_token")
    assert model.class_token.shape == (1, 1, 16) and not model.class_token.any()
    assert "class_token" in model.state_dict()
    assert make("mean").class_token is None


@pytest.mark.parametrize(("pooling", "nglo"), [("class_token", 0), ("mean", 1), ("attention", 1)])
def test_a_pooling_that_does_not_suit_the_encoder_is_refused(pooling: str, nglo: int):
    with pytest.raises(ValueError, match=rf"pooling '{pooling}' needs nglo={1 - nglo}"):
        Specformer1D(SuryaEncoder(**SMALL, nglo=nglo), pooling=pooling)


def test_an_unknown_pooling_is_refused():
    with pytest.raises(ValueError, match="there is no pooling 'median'; choose one of mean, max"):
        make("median")


def test_fitted_features_are_standardised_and_saved():
    model = make("mean")
    assert model.training
    assert model.fit_features([batch(8, seed) for seed in range(3)]) is model and model.training
    with torch.no_grad():
        features = torch.cat([model.eval().features(batch(8, seed)) for seed in range(3)])
    z = (features - model.feature_mean) / model.feature_std
    torch.testing.assert_close(z.mean(dim=0), torch.zeros(16), atol=1e-3, rtol=0)
    torch.testing.assert_close(z.std(dim=0), torch.ones(16), atol=1e-3, rtol=0)
    assert {"feature_mean", "feature_std"} <= set(model.state_dict())


def test_fitting_features_needs_two_samples():
    with pytest.raises(ValueError, match="needs at least two training samples and got 1"):
        make().fit_features([batch(1)])
    with pytest.raises(ValueError, match="got 0"):
        make().fit_features([])


def test_fitting_features_reads_at_most_so_many_batches():
    seen = []
    model = LinearBaseline1D(3, time_dim=2)
    model.fit_features((seen.append(i) or batch(2, i) for i in range(9)), limit=2)
    assert len(seen) == 2


def test_a_constant_feature_is_not_blown_up():
    ts = torch.randn(8, 3, 2, 8, 8)
    ts[:, 1] = 0.5
    model = LinearBaseline1D(3, time_dim=2).fit_features([{"ts": ts}])
    assert model.feature_std.min() == pytest.approx(1e-3 * model.feature_std.max().item(), rel=1e-5)


def test_the_1d_baseline_reads_the_means_of_every_frame():
    model, ts = LinearBaseline1D(3, num_outputs=2, time_dim=2), batch()["ts"]
    torch.testing.assert_close(model.features({"ts": ts}), ts.mean(dim=(3, 4)).flatten(1))
    assert not model({"ts": ts}).any()  # zero at the start


def test_in_signed_log_values_the_1d_baseline_would_be_the_same_model():
    mean, std = torch.tensor([1.0, -2.0, 0.5]).view(3, 1, 1, 1), torch.tensor([2.0, 3.0, 0.1]).view(3, 1, 1, 1)
    ts = torch.randn(16, 3, 2, 8, 8)
    model, other = (LinearBaseline1D(3, time_dim=2).fit_features([{"ts": x}]) for x in (ts, ts * std + mean))
    nn.init.ones_(model.head.weight), nn.init.ones_(other.head.weight)
    torch.testing.assert_close(model({"ts": ts}), other({"ts": ts * std + mean}), rtol=1e-3, atol=1e-3)


def test_the_1d_baseline_trains_quickly_to_the_least_squares_solution():
    torch.manual_seed(0)
    offsets = torch.randn(64, 3, 2, 1, 1) * torch.tensor([1.0, 0.1, 0.01]).view(3, 1, 1, 1) + 5
    ts = offsets + 0.1 * torch.randn(64, 3, 2, 8, 8)
    target = (10 * offsets[:, 1, 0] - 30 * offsets[:, 2, 1]).flatten()[:, None]
    target = (target - target.mean()) / target.std()
    model = LinearBaseline1D(3, time_dim=2).fit_features([{"ts": ts}])
    optimiser = torch.optim.Adam(model.parameters(), lr=0.3)
    for _ in range(150):
        optimiser.zero_grad()
        (model({"ts": ts}) - target).square().mean().backward()
        optimiser.step()
    ones = torch.cat([model.features({"ts": ts}).detach(), torch.ones(64, 1)], dim=1).double()
    best = ones @ torch.linalg.lstsq(ones, target.double()).solution
    torch.testing.assert_close(model({"ts": ts}).detach().double(), best, atol=1e-2, rtol=0)


@pytest.mark.parametrize("model", [LinearBaseline1D(3, time_dim=2), LinearBaseline2D(3, time_dim=2)])
def test_the_baselines_refuse_another_number_of_channels_or_frames(model: nn.Module):
    for shape in [(1, 2, 3, 8, 8), (1, 4, 2, 8, 8), (3, 2, 8, 8)]:
        with pytest.raises(ValueError, match=r"C, T = \(3, 2\) and got"):
            model({"ts": torch.zeros(shape)})


@pytest.mark.parametrize("out_chans", [1, 13])
@pytest.mark.parametrize(("upscale", "side"), [(None, 32), (4, 32), (2, 16), (1, 8)])
def test_images_of_the_wanted_size(out_chans: int, upscale: int | None, side: int):
    model = Specformer2D(SuryaEncoder(**SMALL), out_chans=out_chans, upscale=upscale)
    out = model(batch(1))
    assert out.shape == (1, out_chans, side, side) and out.dtype == torch.float32
    assert 0 < out.abs().max() < 1


def test_the_decoder_is_a_convolution_and_a_pixel_shuffle():
    decoder, tokens = PixelDecoder(16, out_chans=3, upscale=4), torch.randn(2, 64, 16)
    image = tokens.transpose(1, 2).unflatten(2, (8, 8))
    expected = nn.PixelShuffle(4)(nn.functional.conv2d(image, decoder.weight, decoder.bias))
    torch.testing.assert_close(decoder(tokens), expected)
    model = Specformer2D(SuryaEncoder(**SMALL), out_chans=3)
    assert {k for k in model.state_dict() if "encoder" not in k} == {
        f"unembed.unembed.0.{k}" for k in ("weight", "bias")
    }


def test_a_2d_model_takes_no_class_token():
    with pytest.raises(ValueError, match="needs an encoder with nglo=0"):
        Specformer2D(SuryaEncoder(**SMALL, nglo=1))


def test_the_2d_baseline_maps_every_pixel_alike():
    model = LinearBaseline2D(3, out_chans=2, time_dim=2)
    nn.init.normal_(model.head.weight)
    ts = batch()["ts"]
    expected = torch.einsum("oi,bihw->bohw", model.head.weight, ts.flatten(1, 2)) + model.head.bias.view(1, 2, 1, 1)
    torch.testing.assert_close(model({"ts": ts}), expected)


def test_the_2d_baseline_for_a_smaller_target():
    model = LinearBaseline2D(3, time_dim=2, factor=2)
    nn.init.normal_(model.head.weight)
    whole = LinearBaseline2D(3, time_dim=2)
    whole.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(batch()), nn.functional.avg_pool2d(whole(batch()), 2))
