"""Adapters: what they change, and above all what they never change."""

import copy

import loralib
import pytest
import torch
from small_encoder import SMALL
from torch import nn

from helpers.config import POOLINGS
from helpers.model.checkpoint import save_adapter
from helpers.model.encoder import SuryaEncoder
from helpers.model.heads import LinearBaseline1D, Specformer1D, Specformer2D
from helpers.model.lora import LoRALinear, apply_lora, dropout_linear, lora_state_dict, merge_lora, trainable_summary


def make(pooling: str = "mean", **lora) -> Specformer1D:
    torch.manual_seed(0)
    encoder = SuryaEncoder(**SMALL, nglo=int(pooling == "class_token"))
    return apply_lora(Specformer1D(encoder, pooling=pooling), **{"rank": 2, "alpha": 4, **lora})


def batch(size: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"ts": torch.randn(size, 3, 2, 32, 32, generator=generator)}


def leave_zero(model: nn.Module) -> None:
    """Give B values, as a few steps of training would."""
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.3)


def frozen_bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def assert_same_bits(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    now = dict(model.named_parameters())
    assert before and before.keys() <= now.keys()
    for name, value in before.items():
        assert torch.equal(now[name], value), name


def test_an_adapted_model_starts_as_the_model_it_was():
    torch.manual_seed(0)
    model = Specformer1D(SuryaEncoder(**SMALL)).eval()
    parameters, before = dict(model.named_parameters()), model(batch())
    assert apply_lora(model) is model
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in parameters.items())  # names and objects stay
    assert all("lora_" in name for name in after.keys() - parameters.keys())
    assert torch.equal(model(batch()), before)


def test_targets_are_the_linear_layers_of_the_blocks():
    model = make(targets=("qkv", "proj", "fc1", "fc2", "to_dynamic_projection"))
    adapted = {name for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}
    expected = {f"encoder.backbone.blocks_spectral_gating.0.mlp.{fc}" for fc in ("fc1", "fc2")}
    for block in range(2):
        for layer in ("mlp.fc1", "mlp.fc2", "attn.qkv", "attn.proj", "attn.to_dynamic_projection"):
            expected.add(f"encoder.backbone.blocks_attention.{block}.{layer}")
    assert adapted == expected
    assert not any("lora" in key for key in model.encoder.embedding.state_dict())
    only = make(targets=("proj",))
    assert {name.rpartition(".")[2] for name, m in only.named_modules() if isinstance(m, LoRALinear)} == {"proj"}


@pytest.mark.parametrize("parts", [("q", "k", "v"), ("q", "v"), ("k",)])
def test_the_update_of_the_fused_qkv_is_that_of_its_chosen_parts(parts: tuple[str, ...]):
    base = nn.Linear(6, 12)
    layer = LoRALinear(base, rank=2, alpha=3, dropout=0.5, parts=tuple(p in parts for p in "qkv")).eval()
    nn.init.normal_(layer.lora_B)
    assert layer.lora_A.shape == (2 * len(parts), 6) and layer.lora_B.shape == (4 * len(parts), 2)
    reference = loralib.MergedLinear(6, 12, r=2, lora_alpha=3, enable_lora=[p in parts for p in "qkv"])
    reference.load_state_dict(layer.state_dict())  # the layout is loralib's
    x = torch.randn(5, 6)
    torch.testing.assert_close(layer(x), reference(x))
    update = layer(x) - base(x)
    for i, part in enumerate("qkv"):
        assert bool(update[:, 4 * i : 4 * i + 4].any()) == (part in parts)


def test_the_update_goes_through_the_rank_and_is_never_a_dense_matrix():
    layer = LoRALinear(nn.Linear(64, 192, bias=False), rank=2, alpha=2, dropout=0.0, parts=(True, True, True))
    sizes = []

    class Sizes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != layer.weight.data_ptr():
                sizes.append(out.numel())  # anything but the frozen weight itself, seen from another side
            return out

    with Sizes():
        layer(torch.randn(1, 64))
    assert max(sizes) < 64 * 192 / 4


def test_dropout_touches_the_adapter_alone():
    layer = LoRALinear(nn.Linear(8, 8), rank=2, alpha=2, dropout=0.5).train()
    x = torch.randn(4, 8)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))  # B is zero
    nn.init.normal_(layer.lora_B)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def dropped(size: tuple[int, int], share: float) -> torch.Tensor:
    """The mask that `dropout_linear` draws, read off the map that changes nothing else."""
    return dropout_linear(torch.ones(size), torch.eye(size[1]), share) == 0


@pytest.mark.parametrize("share", [0.1, 0.5, 0.97])
def test_the_mask_drops_its_share_everywhere(share: float):
    torch.manual_seed(0)
    mask = dropped((1001, 333), share)
    assert mask.double().mean().item() == pytest.approx(share, abs=0.002)
    along, across = mask.double().mean(0), mask.double().mean(1)
    assert (along - share).abs().max() < 0.06 and (across - share).abs().max() < 0.1  # no row or column is spared
    assert not torch.equal(mask, dropped((1001, 333), share))


def test_gradients_go_through_what_the_dropout_keeps():
    """Against the same layer written out, with the very mask that the layer draws."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(40, 24), rank=2, alpha=6, dropout=0.3).train()
    nn.init.normal_(layer.lora_B)
    layer.weight.requires_grad_(False), layer.bias.requires_grad_(False)
    x, other = (torch.randn(5, 7, 40, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    torch.manual_seed(2)
    out = layer(x)
    out.square().sum().backward()
    found = [x.grad, layer.lora_A.grad, layer.lora_B.grad]
    layer.zero_grad()
    torch.manual_seed(2)
    mask = ~dropped((35, 40), 0.3).view(other.shape)
    low = nn.functional.linear(other * mask / 0.7, layer.lora_A)
    expected = nn.functional.linear(other, layer.weight, layer.bias) + 3 * nn.functional.linear(low, layer.lora_B)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    expected.square().sum().backward()
    for one, two in zip(found, [other.grad, layer.lora_A.grad, layer.lora_B.grad], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-3)


def test_frozen_weights_never_change_by_a_bit(tmp_path):
    model = make()
    before = frozen_bits(model)
    leave_zero(model)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=0.1, weight_decay=0.5
    )  # all of them, as a careless script would
    for _ in range(3):
        model.train()
        model(batch()).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
        model.eval()
        model(batch())
        merge_lora(model)
        save_adapter(tmp_path / "adapter.pt", model, {}, "none")
        lora_state_dict(model)
        model.train().eval().train()
    assert_same_bits(model, before)


def test_merging_gives_the_same_outputs_on_a_copy():
    model = make(qkv=("q", "v")).eval()
    leave_zero(model)
    before = copy.deepcopy(model.state_dict())
    merged = merge_lora(model)
    plain = Specformer1D(SuryaEncoder(**SMALL))
    assert merged.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        tokens = model.encoder(batch()["ts"])
        assert (merged(batch()) - model(batch())).abs().max() <= 1e-5
        assert (merged.encoder(batch()["ts"]) - tokens).abs().max() <= 1e-5 * tokens.abs().max()
        plain.load_state_dict(model.state_dict(), strict=False)
        assert (plain.encoder(batch()["ts"]) - tokens).abs().max() > 1e-3 * tokens.abs().max()  # the adapters matter
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    with torch.no_grad():
        merged.encoder.backbone.blocks_attention[0].attn.proj.bias.zero_()  # a copy shares nothing
        merged.encoder.backbone.blocks_attention[0].attn.qkv.weight.zero_()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


def test_merging_twice_is_harmless():
    model = make().eval()
    leave_zero(model)
    once = merge_lora(model)
    twice = merge_lora(once)
    assert all(torch.equal(value, twice.state_dict()[key]) for key, value in once.state_dict().items())


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_adapter_and_the_head_receive_gradient(pooling: str):
    model = make(pooling, dropout=0.0)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):  # A has no gradient while B is zero: that is the first step
        optimiser.zero_grad()
        (model(batch()) - 1).square().sum().backward()
        optimiser.step()
    trains = {name: p for name, p in model.named_parameters() if p.requires_grad}
    taught = {name for name, _ in model.named_parameters() if "lora_" in name or "encoder." not in name}
    assert trains.keys() == {name for name in taught if not name.startswith("unembed.")}  # the forecast is only read
    silent = [name for name, p in trains.items() if p.grad is None or not p.grad.any()]
    assert silent == []
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_the_decoder_of_a_2d_model_stays_trainable():
    model = apply_lora(Specformer2D(SuryaEncoder(**SMALL)))
    assert model.unembed.unembed[0].weight.requires_grad
    assert not model.encoder.backbone.blocks_attention[0].attn.qkv.weight.requires_grad


def test_a_bare_encoder_can_be_adapted():
    encoder = apply_lora(SuryaEncoder(**SMALL))
    assert set(lora_state_dict(encoder)) == {name for name, p in encoder.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("autocast", [True, False])
def test_frozen_weights_in_bfloat16_with_adapters_in_float32(autocast: bool):
    torch.manual_seed(0)
    model = Specformer1D(SuryaEncoder(**SMALL))
    exact = model.encoder(batch()["ts"])
    model.encoder.to(torch.bfloat16)
    apply_lora(model, dropout=0.0)
    before = frozen_bits(model)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        tokens, out = model.encoder(batch()["ts"]), model(batch())
    assert ((tokens - exact).norm() / exact.norm()) < 0.01
    out.square().sum().backward()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert all(p.grad.dtype == torch.float32 for name, p in model.named_parameters() if name.endswith("lora_B"))
    assert_same_bits(model, before)


def test_adapters_train_with_every_block_checkpointed():
    gradients = []
    for layers in ((), (0, 1, 2)):
        torch.manual_seed(0)
        model = apply_lora(Specformer1D(SuryaEncoder(**SMALL, recompute_blocks=layers)), dropout=0.0)
        leave_zero(model)
        model(batch()).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name


def test_the_adapters_alone_have_loralibs_names():
    model = make(targets=("qkv", "fc2"))
    keys = set(lora_state_dict(model))
    assert keys == {
        f"encoder.backbone.{layer}.lora_{matrix}"
        for layer in (
            "blocks_spectral_gating.0.mlp.fc2",
            "blocks_attention.0.mlp.fc2",
            "blocks_attention.0.attn.qkv",
            "blocks_attention.1.mlp.fc2",
            "blocks_attention.1.attn.qkv",
        )
        for matrix in "AB"
    }


def test_a_second_call_is_refused():
    with pytest.raises(ValueError, match="has adapters already"):
        apply_lora(make())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"targets": ("q_proj", "v_proj")}, "targets ['q_proj', 'v_proj'] match no linear layer"),
        ({"targets": ("patch_embed",)}, "match no linear layer"),
        ({"targets": ()}, "some targets"),
        ({"qkv": ("q", "x")}, "qkv=('q', 'x')"),
        ({"qkv": ()}, "none of q, k, v is chosen"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 1.5}, "rank=1.5"),
        ({"alpha": 0}, "alpha=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_settings_that_make_no_adapters_are_refused(changes: dict, sentence: str):
    model = Specformer1D(SuryaEncoder(**SMALL))
    with pytest.raises(ValueError, match="The adapters cannot be made") as error:
        apply_lora(model, **changes)
    assert sentence in str(error.value)
    assert all(p.requires_grad for p in model.parameters())  # untouched


def test_a_target_that_matches_nothing_names_what_exists():
    with pytest.raises(ValueError, match=r"fc1 \(3 layers\).*qkv \(2 layers\).*to_dynamic_projection \(2 layers\)"):
        apply_lora(SuryaEncoder(**SMALL), targets=("qkv", "out_proj"))


def test_a_model_without_an_encoder_is_refused():
    with pytest.raises(ValueError, match="LinearBaseline1D has no Surya encoder"):
        apply_lora(LinearBaseline1D(3))


def test_the_summary_counts_what_trains():
    model = make()
    summary = trainable_summary(model)
    adapters = sum(tensor.numel() for tensor in lora_state_dict(model).values())
    head = sum(p.numel() for name, p in model.named_parameters() if "encoder." not in name)
    total = sum(p.numel() for p in model.parameters())
    assert summary.groups["adapters"] == (adapters, adapters)
    assert summary.groups["head"] == (head, head)
    assert summary.groups["encoder"] == (0, total - adapters - head)
    assert (summary.trainable, summary.total) == (adapters + head, total)
    text = str(summary)
    assert f"{summary.trainable:,}" in text and f"{100 * summary.trainable / total:.2f}% trainable" in text


def test_the_summary_of_other_models():
    assert "100.00% trainable" in str(trainable_summary(SuryaEncoder(**SMALL)))
    baseline = trainable_summary(LinearBaseline1D(3, time_dim=2))
    assert baseline.groups["head"] == (7, 7) == (baseline.trainable, baseline.total)
    frozen = LinearBaseline1D(3).requires_grad_(False)
    assert trainable_summary(frozen).trainable == 0 and "0.00% trainable" in str(trainable_summary(frozen))
