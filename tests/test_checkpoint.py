"""Filtered loading, adapter files, and a sentence for every file that is something else."""

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from einops import rearrange
from small_encoder import SMALL
from torch import Tensor, nn

from helpers.channels import CHANNELS
from helpers.config import POOLINGS, load_config
from helpers.experiment import build_model
from helpers.model.checkpoint import (
    CheckpointError,
    export_merged,
    fingerprint,
    load_adapter,
    load_filtered,
    save_adapter,
)
from helpers.model.encoder import SuryaEncoder, fourier_positions
from helpers.model.heads import LinearBaseline1D, Specformer1D, Specformer2D
from helpers.model.lora import apply_lora, lora_state_dict, merge_lora
from helpers.shared import DiskFullError

ROOT = Path(__file__).parent.parent
CONFIG = SMALL | {"img_size": 64, "in_chans": 13}
FILTER = "backbone.blocks_spectral_gating.0.filter.complex_weight"
PATCHES = "embedding.patch_embed.proj.weight"


def encoder(**changes) -> SuryaEncoder:
    return SuryaEncoder(**{**CONFIG, **changes})


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """A checkpoint as the release has it: flat, no prefix, with the decoder and the positions."""
    torch.manual_seed(0)
    model = Specformer2D(encoder(), out_chans=13)
    own = {key.removeprefix("encoder."): torch.randn_like(value) for key, value in model.state_dict().items()}
    return own | {"embedding.pos_embed": fourier_positions(16, 16)}


@pytest.fixture(scope="module")
def file(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "surya.test.pt"
    torch.save(state, path)
    return path


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


def test_everything_is_loaded_into_the_same_shape(file: Path, state: dict[str, Tensor]):
    model = Specformer2D(encoder(), out_chans=13)
    report = load_filtered(model, file)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key.removeprefix("encoder.")]), key
    assert set(report.loaded) == state.keys() - {"embedding.pos_embed"}
    assert report.adapted == {} and report.missing == [] and report.fresh == []
    assert report.skipped == {"embedding.pos_embed": "regenerated for the 16 x 16 grid"}
    assert report.parameters_loaded == report.parameters_total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("adapted", [False, True])
def test_the_head_and_the_adapters_stay_fresh(file: Path, state: dict[str, Tensor], pooling: str, adapted: bool):
    model = Specformer1D(encoder(nglo=int(pooling == "class_token")), pooling=pooling)
    model = apply_lora(model) if adapted else model
    before = bits(model)
    report = load_filtered(model, file)
    decoder = {key for key in report.loaded if key.startswith("unembed.")}
    loaded = {f"encoder.{key}" for key in report.loaded} - {f"encoder.{key}" for key in decoder} | decoder
    assert loaded | set(report.fresh) == before.keys() and not loaded & set(report.fresh)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] if key in report.fresh else state[key.removeprefix("encoder.")]), key
    assert all("lora_" in key or not key.startswith("encoder.") for key in report.fresh)
    both = {"unembed.unembed.0.weight", "unembed.unembed.0.bias"}
    assert decoder == (both if pooling == "forecast" else set())
    assert {key for key in report.skipped if key != "embedding.pos_embed"} == both - decoder
    assert report.parameters_loaded == sum(p.numel() for n, p in model.named_parameters() if n in loaded)


def test_the_report_prints_as_a_table(file: Path):
    model = apply_lora(Specformer1D(encoder(img_size=32, in_chans=1, time_dim=1)))
    text = str(load_filtered(model, file, channels=["hmi_m"]))
    assert text.startswith("surya.test.pt: ")
    assert f"{FILTER}: the modes of a 8 x 8 grid, out of 16 x 16" in text
    assert f"{PATCHES}: 1 of 13 channels, by name; the last 1 of 2 frames" in text
    assert "missing     0 tensors" in text and "random or zero, trained from here" in text


def test_fewer_frames_are_the_most_recent_ones(file: Path):
    """A model of the last frame alone gives what the whole one gives for an empty first frame."""
    whole, last = encoder().eval(), encoder(time_dim=1).eval()
    load_filtered(whole, file)
    report = load_filtered(last, file)
    assert report.adapted == {PATCHES: "the last 1 of 2 frames"}
    ts = torch.randn(1, 13, 2, 64, 64)
    ts[:, :, 0] = 0
    torch.testing.assert_close(last.embedding(ts[:, :, 1:]), whole.embedding(ts), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("names", [("hmi_v", "aia171"), tuple(reversed(CHANNELS)), ("aia94",)])
def test_channels_are_picked_by_name(file: Path, names: tuple[str, ...]):
    whole, some = encoder().eval(), encoder(in_chans=len(names)).eval()
    load_filtered(whole, file)
    report = load_filtered(some, file, channels=names)
    assert report.adapted == {PATCHES: f"{len(names)} of 13 channels, by name"}
    ts = torch.zeros(1, 13, 2, 64, 64)
    values = torch.randn(1, len(names), 2, 64, 64)
    for i, name in enumerate(names):
        ts[:, CHANNELS.index(name)] = values[:, i]
    torch.testing.assert_close(some.embedding(values), whole.embedding(ts), rtol=1e-4, atol=1e-4)


def test_a_checkpoint_of_other_channels(state: dict[str, Tensor]):
    """Their number follows from the decoder; without one it must leave frames that a checkpoint can have."""
    small = {**{key: value for key, value in state.items() if "unembed" not in key}, PATCHES: state[PATCHES][:, :4]}
    model = encoder(in_chans=1)
    load_filtered(model, small, channels=["hmi_m"], source_channels=["aia171", "hmi_m"])
    assert torch.equal(model.state_dict()[PATCHES], state[PATCHES][:, 2:4])
    with pytest.raises(CheckpointError, match="4 input planes .*1 names are given"):
        load_filtered(model, small, source_channels=["hmi_m"])


@pytest.mark.parametrize("side", [8, 24, 48])
def test_a_smaller_grid_filters_a_band_limited_image_alike(file: Path, side: int):
    """Below the Nyquist frequency of the small grid, sampling commutes with the filter exactly."""
    small_grid, large_grid = side // 4, 16
    large, small = encoder(), encoder(img_size=side)
    load_filtered(large, file)
    report = load_filtered(small, file)
    assert FILTER in report.adapted and "embedding.pos_embed" in report.skipped
    modes = torch.zeros(large_grid, large_grid // 2 + 1, 16, dtype=torch.complex64)
    below = range(-(small_grid // 2) + 1, small_grid // 2)
    for m in below:
        for n in range(small_grid // 2):
            modes[m, n] = torch.randn(16, dtype=torch.complex64)

    def sampled(grid: int, of: Tensor) -> Tensor:
        """The band-limited image of these modes at the points of a grid, straight from the definition."""
        x = torch.arange(grid) / grid
        image = torch.zeros(grid, grid, 16)
        for m in below:
            for n in range(small_grid // 2):
                wave = torch.exp(2j * torch.pi * (m * x[:, None] + n * x[None, :]))
                image += (1 if n == 0 else 2) * (of[m, n] * wave[:, :, None]).real
        return rearrange(image, "gy gx d -> 1 (gy gx) d")

    with torch.no_grad():
        gains = torch.view_as_complex(large.backbone.blocks_spectral_gating[0].filter.complex_weight)
        gains = gains.clone()
        for m in range(1, small_grid // 2):  # a real image: the column of n = 0 holds conjugate pairs
            modes[-m, 0] = modes[m, 0].conj()
        modes[0, 0] = modes[0, 0].real.to(modes.dtype)
        filtered = {g: e.backbone.blocks_spectral_gating[0].filter(sampled(g, modes))
                    for g, e in ((large_grid, large), (small_grid, small))}  # fmt: skip
        back = torch.fft.rfft2(rearrange(filtered[large_grid], "1 (gy gx) d -> gy gx d", gx=16), dim=(0, 1))
        expected = sampled(small_grid, back / large_grid**2)
    torch.testing.assert_close(filtered[small_grid], expected, rtol=1e-4, atol=1e-4)


def test_positions_are_made_for_the_models_own_grid(file: Path):
    model = encoder(img_size=32)
    load_filtered(model, file)
    assert torch.equal(model.embedding.pos_embed, fourier_positions(8, 16))


def test_a_decoder_from_the_rows_of_named_channels(file: Path):
    whole, two = Specformer2D(encoder(), out_chans=13).eval(), Specformer2D(encoder(), out_chans=2).eval()
    load_filtered(whole, file)
    report = load_filtered(two, file, decoder_channels=["hmi_m", "aia131"])
    assert report.adapted["unembed.unembed.0.weight"] == "the rows of hmi_m, aia131"
    batch = {"ts": torch.randn(1, 13, 2, 64, 64)}
    with torch.no_grad():
        picked = whole(batch)[:, [CHANNELS.index("hmi_m"), CHANNELS.index("aia131")]]
        torch.testing.assert_close(two(batch), picked, rtol=1e-3, atol=1e-3)
        half = Specformer2D(encoder(), out_chans=2, upscale=2).eval()
        load_filtered(half, file, decoder_channels=["hmi_m", "aia131"])
        torch.testing.assert_close(half(batch), nn.functional.avg_pool2d(picked, 2), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "settings", [{"out_chans": 1}, {"out_chans": 13, "upscale": 2}, {"out_chans": 52, "upscale": 2}]
)
def test_a_decoder_of_another_meaning_stays_fresh(file: Path, settings: dict):
    """52 outputs at a quarter of the pixels have the very shape of 13 whole ones, and are something else."""
    model = Specformer2D(encoder(), **settings)
    before = bits(model.unembed)
    report = load_filtered(model, file)
    assert same(before, bits(model.unembed))
    assert sorted(report.fresh) == ["unembed.unembed.0.bias", "unembed.unembed.0.weight"]


@pytest.mark.parametrize(
    "wrap",
    [
        "state_dict",
        "model",
        "module.",
        "_orig_mod.module.",
        "model._orig_mod.",
        "model.module.encoder.",
    ],
)
def test_wrapped_checkpoints_are_unwrapped(state: dict[str, Tensor], wrap: str, tmp_path: Path):
    wrapped = {f"{wrap}{k}": v for k, v in state.items()} if wrap.endswith(".") else {wrap: state, "epoch": 3}
    torch.save(wrapped, tmp_path / "wrapped.pt")
    model = encoder()
    assert load_filtered(model, tmp_path / "wrapped.pt").missing == []
    assert torch.equal(model.state_dict()[FILTER], state[FILTER])


def test_an_exported_model_of_the_course_is_a_checkpoint(file: Path):
    model = apply_lora(Specformer1D(encoder()))
    load_filtered(model, file)
    merged = merge_lora(model)
    again = Specformer1D(encoder())
    report = load_filtered(again, merged.state_dict())
    assert report.skipped["head.1.weight"] == "no such tensor in the model"
    assert same(bits(merged.encoder), bits(again.encoder))


def test_relative_position_bias_is_loaded(state: dict[str, Tensor]):
    source = encoder(rpe=True)
    nn.init.normal_(source.backbone.blocks_attention[0].attn.local_relative_position_bias_table)
    model = encoder(rpe=True)
    assert load_filtered(model, source.state_dict()).missing == []
    assert same(bits(source), bits(model))


REFUSALS = [
    ({"embed_dim": 32}, {}, "embedding.patch_embed.proj.weight, (16, 26, 4, 4) in the checkpoint and (32, 26, 4, 4)"),
    ({"patch_size": 8}, {}, "embedding.patch_embed.proj.weight, (16, 26, 4, 4) in the checkpoint and (16, 26, 8, 8)"),
    ({"dp_rank": 4}, {}, "attn.to_dynamic_projection.weight, (4, 16) in the checkpoint and (8, 16) in the model"),
    ({"mlp_ratio": 2}, {}, "mlp.fc1.weight, (64, 16) in the checkpoint and (32, 16) in the model"),
    ({"img_size": 128}, {}, "The token grid 32 x 32 is larger than 16 x 16"),
    ({"time_dim": 3}, {}, "The model takes 3 frames and the checkpoint 2: set time_dim to 2"),
    ({"in_chans": 5}, {}, "channels=[...] names 13 channels, and the model has 5"),
    ({}, {"channels": ["aia94"]}, "channels=[...] names 1 channels, and the model has 13"),
    ({"in_chans": 1}, {"channels": ["aia95"]}, "channels ['aia95'] are not among the checkpoint's channels"),
    ({"in_chans": 1}, {"channels": ["x"], "source_channels": ["x", "y", "z"]}, "26 input planes"),
    ({"in_chans": 2}, {"source_channels": ["aia94", "aia131"]}, "13 decoded channels, and 2 names are given"),
    ({}, {"source_channels": [*CHANNELS[:12], "aia94"]}, "names each of its channels once"),

    ({"depth": 4}, {}, "17 encoder tensors of the model are not in it (backbone.blocks_attention.2."),
    ({"depth": 2}, {}, "17 of its encoder tensors have no place in the model (backbone.blocks_attention.1."),
    ({"rpe": True}, {}, "4 encoder tensors of the model are not in it"),
    ({}, {"decoder_channels": ["aia94"]}, "decoder_channels is for a Specformer2D"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "arguments", "sentence"), REFUSALS)
def test_what_cannot_be_loaded_is_said_and_nothing_is_written(
    file: Path, changes: dict, arguments: dict, sentence: str
):
    model = encoder(**changes)
    before = bits(model)
    with pytest.raises(CheckpointError) as error:
        load_filtered(model, file, **arguments)
    assert sentence in str(error.value) and "surya.test.pt" in str(error.value)
    assert same(before, bits(model))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda weight: weight[:, :8],
        lambda weight: (100 * weight).to(torch.int8),
        lambda weight: weight * torch.nan,
    ],
    ids=["shape", "int8", "nan"],
)
@pytest.mark.parametrize("key", ["backbone.blocks_attention.1.mlp.fc2.bias", FILTER])
def test_nothing_is_written_before_everything_fits(state: dict[str, Tensor], spoil: Callable, key: str):
    spoilt = spoil(state[key]) if key == FILTER else spoil(state[key][None])[0]
    model = encoder()
    before = bits(model)
    with pytest.raises(CheckpointError, match=re.escape(key)):
        load_filtered(model, {**state, key: spoilt})
    assert same(before, bits(model)) and model.loaded_from is None


def test_two_models_in_one_file_are_refused(state: dict[str, Tensor]):
    with pytest.raises(CheckpointError, match="under two prefixes"):
        load_filtered(encoder(), state | {f"module.{key}": value for key, value in state.items()})


def test_partial_loading_on_request(file: Path, state: dict[str, Tensor]):
    deeper = encoder(depth=4)
    report = load_filtered(deeper, file, strict=False)
    assert len(report.missing) == 17 and all(key.startswith("backbone.blocks_attention.2.") for key in report.missing)
    assert "missing    17 tensors of the encoder: backbone.blocks_attention.2." in str(report)
    shallower = encoder(depth=2)
    report = load_filtered(shallower, file, strict=False)
    assert report.skipped["backbone.blocks_attention.1.attn.qkv.weight"] == "no such tensor in the model"
    key = "backbone.blocks_attention.0.attn.qkv.weight"
    assert torch.equal(shallower.state_dict()[key], state[key])


def test_decoder_channels_must_be_as_many_as_the_outputs(file: Path, state: dict[str, Tensor]):
    with pytest.raises(CheckpointError, match="must name 1 of the 13 channels"):
        load_filtered(Specformer2D(encoder()), file, decoder_channels=["aia94", "hmi_m"])
    without = {key: value for key, value in state.items() if "unembed" not in key}
    with pytest.raises(CheckpointError, match="must name 1 of the 0 channels"):
        load_filtered(Specformer2D(encoder()), without, decoder_channels=["aia94"])


def test_adapters_in_a_checkpoint_are_not_dropped_in_silence(file: Path):
    adapted = apply_lora(encoder())
    with pytest.raises(CheckpointError, match="lora_A"):
        load_filtered(encoder(), adapted.state_dict())


def test_a_model_without_an_encoder_is_refused(file: Path):
    with pytest.raises(ValueError, match="LinearBaseline1D has no Surya encoder"):
        load_filtered(LinearBaseline1D(13), file)


def broken(kind: str, file: Path, folder: Path) -> Path:
    path = folder / f"{kind}.pt"
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("<html>404 Not Found</html>")
    elif kind == "empty":
        path.touch()
    elif kind == "pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    elif kind == "truncated":
        path.write_bytes(file.read_bytes()[:-5000])
    elif kind == "hole":
        torch.save({"weight": torch.ones(100_000)}, path)
        whole = bytearray(path.read_bytes())
        whole[200_000:204_096] = bytes(4096)
        path.write_bytes(whole)
    elif kind == "archive":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("notes.txt", "hello")
    elif kind == "damaged":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("damaged/data.pkl", "not a pickle")
    elif kind == "objects":
        torch.save({"model": nn.Linear(2, 2)}, path)
    elif kind == "numbers":
        torch.save({"epoch": 3}, path)
    elif kind == "other":
        torch.save({"fc.weight": torch.zeros(2), "fc.bias": torch.zeros(2)}, path)
    return path


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("absent", "There is no checkpoint file"),
        ("folder", "There is no checkpoint file"),
        ("text", "no file of torch.save"),
        ("empty", "(0 bytes)"),
        ("pointer", "get it anew (git lfs pull)"),
        ("truncated", "is cut short"),
        ("hole", "the checksum of hole/data"),
        ("archive", "no file of torch.save"),
        ("damaged", ""),
        ("objects", "holds Python objects, which can run code"),
        ("numbers", "holds no tensors by name"),
        ("other", "It holds another architecture, without embedding.patch_embed.proj.weight"),
    ],
)
def test_a_file_that_is_no_checkpoint_gets_one_sentence(kind: str, sentence: str, file: Path, tmp_path: Path):
    path = broken(kind, file, tmp_path)
    with pytest.raises(CheckpointError) as error:
        load_filtered(encoder(), path)
    assert sentence in str(error.value) and path.name in str(error.value) and "\n" not in str(error.value)


def test_the_fingerprint_tells_checkpoints_apart(file: Path, state: dict[str, Tensor]):
    one = fingerprint(file)
    assert one == fingerprint(str(file)) == fingerprint(state) == fingerprint(dict(reversed(state.items())))
    assert len(one) == 16 and int(one, 16) >= 0
    assert one != fingerprint({**state, FILTER: state[FILTER] + 1e-6})
    assert one != fingerprint({key: value for key, value in state.items() if key != FILTER})


def trained(pooling: str = "attention", seed: int = 0) -> Specformer1D:
    torch.manual_seed(seed)
    model = apply_lora(Specformer1D(encoder(nglo=int(pooling == "class_token")), pooling=pooling), rank=2)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        nn.init.normal_(parameter)
    model.feature_std.fill_(seed + 2.0)
    return model


@pytest.mark.parametrize("pooling", POOLINGS)
def test_an_adapter_file_brings_the_fine_tune_back(pooling: str, file: Path, tmp_path: Path):
    model, other = trained(pooling), trained(pooling, seed=1)
    for m in (model, other):
        load_filtered(m, file)
    config = {"lora": {"rank": 2}, "path": tmp_path, "lr": 1e-3}
    path = save_adapter(tmp_path / "new" / "adapter.pt", model, config, fingerprint(file), extra={"rmse": 0.5})
    batch = {"ts": torch.randn(1, 13, 2, 64, 64)}
    encoder_before = {name: p.detach().clone() for name, p in other.named_parameters() if not p.requires_grad}
    back = load_adapter(path, other, fingerprint(file))
    assert back["config"] == {"lora": {"rank": 2}, "path": str(tmp_path), "lr": 1e-3}
    assert back["extra"] == {"rmse": 0.5} and back["fingerprint"] == fingerprint(file)
    assert same(bits(model), bits(other))
    assert torch.equal(model.eval()(batch), other.eval()(batch))
    assert all(torch.equal(dict(other.named_parameters())[name], value) for name, value in encoder_before.items())


def test_an_adapter_file_holds_adapters_and_head_and_is_small(tmp_path: Path):
    model = trained("class_token")
    path = save_adapter(tmp_path / "adapter.pt", model, {}, "0" * 16)
    contents = torch.load(path, weights_only=True)
    head = {key for key in model.state_dict() if not key.startswith("encoder.")}
    assert set(contents["state"]) == set(lora_state_dict(model)) | head
    assert {"class_token", "feature_mean", "feature_std"} <= head
    assert path.stat().st_size < sum(p.numel() for p in model.parameters())
    assert [p.name for p in tmp_path.iterdir()] == ["adapter.pt"]  # no temporary file is left


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a file that is always full")
def test_a_full_disk_is_understood_whatever_torch_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    opened, model = Path.open, trained()
    monkeypatch.setattr(Path, "open", lambda path, *mode: opened(Path("/dev/full"), *mode))
    for save in (lambda path: save_adapter(path, model, {}), lambda path: export_merged(path, model)):
        with pytest.raises(DiskFullError, match="became full"):
            save(tmp_path / "model.pt")
        assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = save_adapter(tmp_path / "adapter.pt", trained(), {}, "0" * 16)
    before = path.read_bytes()

    def die(contents, target):
        target.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(path, trained(seed=1), {}, "0" * 16)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["adapter.pt"]


def test_a_baseline_is_saved_whole(tmp_path: Path):
    model = LinearBaseline1D(3).fit_features([{"ts": torch.randn(4, 3, 1, 8, 8)}])
    nn.init.normal_(model.head.weight)
    path = save_adapter(tmp_path / "baseline.pt", model, {}, "none")
    other = LinearBaseline1D(3)
    load_adapter(path, other)
    assert same(bits(model), bits(other))


def test_an_adapter_on_another_checkpoint_or_model_is_refused(file: Path, tmp_path: Path):
    path = save_adapter(tmp_path / "adapter.pt", trained(), {}, "a" * 16)
    target = trained(seed=1)
    before = bits(target)
    with pytest.raises(
        CheckpointError, match=f"adapter.pt was trained on the checkpoint {'a' * 16}, and the model holds b"
    ):
        load_adapter(path, target, "b" * 16)
    wider = apply_lora(Specformer1D(encoder(), pooling="attention"), rank=4)
    with pytest.raises(CheckpointError, match=r"20 tensors are on one side alone or differ in shape \(encoder.*lora_A"):
        load_adapter(path, wider, "a" * 16)
    with pytest.raises(CheckpointError, match="adapter.pt was trained with another model.*apply_lora"):
        load_adapter(path, Specformer1D(encoder(), pooling="attention"), "a" * 16)
    with pytest.raises(CheckpointError, match="surya.test.pt is no adapter file of this course"):
        load_adapter(file, target)
    with pytest.raises(CheckpointError, match="There is no checkpoint file"):
        load_adapter(tmp_path / "absent.pt", target)
    contents = torch.load(path)
    key = next(iter(contents["state"]))
    tensor = contents["state"][key]
    for wrong in (3, tensor * torch.nan, (100 * tensor).to(torch.int8), tensor[:1]):
        with pytest.raises(CheckpointError, match=f"The run was trained with another.*{key}"):
            load_adapter(contents | {"state": contents["state"] | {key: wrong}}, target, "a" * 16)
    assert same(before, bits(target))


def test_the_checkpoint_under_an_adapter_is_noted_and_compared_by_itself(file: Path, state: dict, tmp_path: Path):
    model, same_weights, other, bare = (trained(seed=seed) for seed in range(4))
    for m in (model, same_weights):
        load_filtered(m, file)
    load_filtered(other, {**state, FILTER: state[FILTER] + 1})
    path = save_adapter(tmp_path / "adapter.pt", model, {})
    assert load_adapter(path, same_weights)["fingerprint"] == fingerprint(file)
    with pytest.raises(CheckpointError, match=f"trained on the checkpoint {fingerprint(file)}, and the model holds"):
        load_adapter(path, other)
    with pytest.raises(CheckpointError, match="the model holds none that load_filtered put there"):
        load_adapter(path, bare)


def test_an_adapter_of_the_full_model_takes_a_few_megabytes(tmp_path: Path):
    cfg = load_config(profile="surya")
    with torch.device("meta"):
        encoder = SuryaEncoder(**cfg.encoder_arguments() | {"img_size": 4096})
        model = apply_lora(Specformer1D(encoder), **cfg.lora.model_dump())
    model.to_empty(device="cpu")  # room for 366 million weights, of which the file needs none
    assert sum(p.numel() for p in model.encoder.parameters()) > 360e6
    path = save_adapter(tmp_path / "adapter.pt", model, cfg.to_dict())
    assert path.stat().st_size < 15e6
    kept = torch.load(path, weights_only=True)["state"]
    assert set(lora_state_dict(model)) <= set(kept) and kept["head.1.weight"].shape == (1, 1280)


def test_a_merged_copy_works_without_adapters(file: Path, tmp_path: Path):
    model = trained()
    load_filtered(model, file)
    before, batch = bits(model), {"ts": torch.randn(1, 13, 2, 64, 64)}
    path = export_merged(tmp_path / "merged.pt", model)
    plain = Specformer1D(encoder(), pooling="attention")
    plain.load_state_dict(torch.load(path, weights_only=True))  # every key, and none is left
    expected = model.eval()(batch)
    torch.testing.assert_close(plain.eval()(batch), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert same(before, bits(model))
    qkv = "backbone.blocks_attention.0.attn.qkv.weight"
    assert not torch.equal(plain.encoder.state_dict()[qkv], torch.load(file, weights_only=True)[qkv])
    report = load_filtered(Specformer1D(encoder(), pooling="attention"), path)
    assert not report.missing and not report.adapted


MEMORY = """
import sys, torch
from helpers.model.checkpoint import load_filtered
from helpers.experiment import build_model
from helpers.model.encoder import SuryaEncoder

def peak():
    lines = open("/proc/self/status").read().split("\\n")
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

encoder = SuryaEncoder(img_size={side}, patch_size=16, in_chans=13, time_dim=2, embed_dim=256, depth=1,
                       n_spectral_blocks=1, num_heads=4)
before = peak()
load_filtered(encoder, {path!r})
print(peak() - before, sum(p.numel() * 4 for p in encoder.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory as Linux reports it")
@pytest.mark.parametrize("side", [4096, 2048])
def test_loading_takes_little_more_memory_than_checkpoint_and_model(side: int, big_file: Path):
    command = [sys.executable, "-c", MEMORY.format(side=side, path=str(big_file))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    extra, model = map(int, done.stdout.split())
    checkpoint = big_file.stat().st_size
    assert checkpoint > 100e6
    assert extra <= 1.3 * checkpoint, f"{extra / 1e6:.0f} MB on top of the model of {model / 1e6:.0f} MB"


@pytest.fixture(scope="module")
def big_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    big = SuryaEncoder(
        img_size=4096, patch_size=16, in_chans=13, time_dim=2, embed_dim=256, depth=1, n_spectral_blocks=1, num_heads=4
    )
    path = tmp_path_factory.mktemp("big") / "big.pt"
    torch.save(big.state_dict() | {"embedding.pos_embed": big.embedding.pos_embed}, path)
    yield path
    path.unlink()


@pytest.mark.parametrize("regime", ["lora", "probe", "full", "scratch"])
def test_the_decoder_that_a_forecast_is_read_from_trains_only_from_scratch(regime: str, tmp_path: Path):
    """It is the checkpoint's to the bit, is not saved with the run, and is there again when the run is loaded."""
    small = {"training.regime": regime, "head.pooling": "forecast", "data.native_size": 64}
    cfg = load_config(task="flare", experiment="finetune", overrides=small)
    model, ts = build_model(cfg), torch.randn(2, 13, 2, 32, 32)
    before = model.unembed.unembed[0].weight.detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model({"ts": ts}).square().sum().backward()
    optimizer.step()
    assert torch.equal(before, model.unembed.unembed[0].weight) == (regime != "scratch")
    save_adapter(tmp_path / "model.pt", model, cfg.to_dict())
    saved = torch.load(tmp_path / "model.pt", weights_only=True)["state"]
    assert any(key.startswith("unembed.") for key in saved) == (regime == "scratch")
    again = build_model(cfg)
    load_adapter(tmp_path / "model.pt", again)
    assert torch.equal(again.eval()({"ts": ts}), model.eval()({"ts": ts}))
