"""Weights in and out: a Surya checkpoint into a model of another shape, and the small files of a fine-tune.

`load_filtered` gives every tensor of the model's encoder a source in the checkpoint and every tensor of the
checkpoint a place, or says which has none. Two kinds, half of Surya's weights, are cut to the model's shape:

* `patch_embed.proj.weight`: channels picked by name, the most recent frames kept;
* `filter.complex_weight`: on a smaller token grid over the same field of view, the modes that this grid has. A mode is
  the same physical frequency on any grid, and norm="ortho" makes rescaling needless.
"""

import copy
import hashlib
import json
import math
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from einops import reduce
from torch import Tensor, nn

from helpers.channels import CHANNELS
from helpers.model.encoder import SuryaEncoder, encoder_of
from helpers.model.heads import Specformer1D, Specformer2D
from helpers.model.lora import apply_lora, merge_lora
from helpers.shared import atomic_write

State = Mapping[str, Tensor]
Transfer = tuple[Tensor, str]  # values for a tensor of the model, and how they were cut out of the checkpoint's
PATCHES = "embedding.patch_embed.proj.weight"
FILTER = ".filter.complex_weight"
POSITIONS = "embedding.pos_embed"
DECODER = "unembed.unembed.0."
# what torch.compile, PEFT and other classes add to names
WRAPPERS = {"_orig_mod", "module", "model", "encoder", "base_model", "base_layer"}
ADAPTER_FORMAT = "surya-course-adapter-1"
# Surya's own fine-tunes: by task the file on the hub, and the alpha of its adapters, which does not stand in it
RELEASED = {
    "flare_24h": ("hf://nasa-ibm-ai4science/solar_flares_surya/solar_flare_weights.pth", 8.0),
    "solar_wind": ("hf://nasa-ibm-ai4science/solar_wind_surya/solar_wind_weights.pth", 32.0),
    "ar_segmentation": ("hf://nasa-ibm-ai4science/ar_segmentation_surya/ar_segmentation_weights.pth", 64.0),
    "euv_spectra": ("hf://nasa-ibm-ai4science/euv_spectra_surya/euv_spectra_weights.pth", None),
}


class CheckpointError(ValueError):
    """A file or its tensors do not suit; the message says which, why, and what to do."""


@dataclass
class LoadReport:
    """What `load_filtered` did; prints as a table. Keys are the checkpoint's, but for missing and fresh."""

    source: str  # the file
    loaded: list[str] = field(default_factory=list)  # keys taken as they are
    adapted: dict[str, str] = field(default_factory=dict)  # {key: how} of those cut to the model's shape
    skipped: dict[str, str] = field(default_factory=dict)  # {key: why} of the checkpoint's tensors that were not used
    missing: list[str] = field(default_factory=list)  # encoder tensors of the model that found no source
    fresh: list[str] = field(default_factory=list)  # of the model, which no checkpoint has to fill: head and adapters
    parameters_loaded: int = 0  # of the model's
    parameters_total: int = 0

    def __str__(self) -> str:
        share = 100 * self.parameters_loaded / max(self.parameters_total, 1)
        rows = [f"{self.source}: {self.parameters_loaded:,} of {self.parameters_total:,} parameters ({share:.1f}%)"]
        rows.append(f"  loaded   {len(self.loaded):4} tensors as they are")
        for name, entries in (("adapted", self.adapted), ("skipped", self.skipped)):
            rows.append(f"  {name}  {len(entries):4} tensors")
            rows += [f"      {key}: {why}" for key, why in entries.items()]
        rows.append(f"  missing  {len(self.missing):4} tensors of the encoder: {_some(self.missing)}")
        rows.append(f"  fresh    {len(self.fresh):4} tensors, random or zero, trained from here: {_some(self.fresh)}")
        return "\n".join(rows)


def load_filtered(
    model: nn.Module,  # a Specformer1D, a Specformer2D or a SuryaEncoder, with adapters or without
    source: str | Path | State | None,  # a file or a state dict; None leaves the random weights, and reports so
    channels: Sequence[str] | None = None,  # the model's input channels in their order; None: the checkpoint's own
    source_channels: Sequence[str] | None = None,  # the checkpoint's channels in their order; None: Surya's 13
    strict: bool = True,  # raise when an encoder tensor of either side finds no partner
    decoder_channels: Sequence[str] | None = None,
    released: bool = False,  # the source is a fine-tuned model of the release: its encoder, the adapters merged
) -> LoadReport:
    """Fill a model from a Surya checkpoint, in place, and report on every tensor. Nothing is written when it raises.

    The decoder of a Specformer2D starts from the checkpoint's rows of `decoder_channels`, one for each of its outputs.
    With None or [] it is loaded whole where it fits (the checkpoint's channels in its order), else left fresh. The
    fingerprint of the checkpoint is noted in `encoder.loaded_from`. A CheckpointError says what does not suit.
    """
    total, encoder = sum(p.numel() for p in model.parameters()), encoder_of(model)
    if source is None:
        encoder.loaded_from = "none"
        return LoadReport("No checkpoint", fresh=list(model.state_dict()), parameters_total=total)
    state, name = open_checkpoint(source)
    report = LoadReport(name, parameters_total=total)
    targets = {key: tensor for key, tensor in encoder.state_dict(keep_vars=True).items() if "lora_" not in key}
    noted = fingerprint(state)
    if released:
        state = merge_lora(load_released(source)).encoder.state_dict()
    elif adapters := [key for key in state if "lora_" in key]:
        why = "a training begins with it where training.initial_run is released"
        raise CheckpointError(f"{name} is fine-tuned, with adapters ({_some(adapters)}): {why}.")
    try:
        source_channels = list(CHANNELS if source_channels is None else source_channels)
        channels = list(source_channels if channels is None else channels)
        transfers: dict[str, Transfer] = {key: (state[key], "") for key in targets if key in state}
        transfers[PATCHES] = fit_patches(state, encoder, channels, source_channels)
        for key in [key for key in transfers if key.endswith(FILTER) and state[key].ndim == 4]:
            transfers[key] = fit_filter(state[key], encoder.grid)
        if getattr(model, "unembed", None) is not None:
            transfers |= fit_decoder(state, model, source_channels, decoder_channels)
            if isinstance(model, Specformer1D) and f"{DECODER}weight" not in transfers:
                raise CheckpointError("It has no decoder of Surya's 13 channels, which head.pooling: forecast reads.")
            targets |= {f"{DECODER}{kind}": getattr(model.unembed.unembed[0], kind) for kind in ("weight", "bias")}
        elif decoder_channels:
            raise CheckpointError(f"decoder_channels is for a Specformer2D; {type(model).__name__} has no decoder.")
        report.missing = [key for key in targets if key not in transfers and not key.startswith(DECODER)]
        unused = [key for key in state if key not in transfers and key != POSITIONS]
        lost = [key for key in unused if key.startswith(("embedding.", "backbone."))]
        if strict and (report.missing or lost):
            raise CheckpointError(
                f"{len(report.missing)} encoder tensors of the model are not in it ({_some(report.missing)}) and "
                f"{len(lost)} of its encoder tensors have no place in the model ({_some(lost)}): set depth, "
                "n_spectral_blocks and rpe as the checkpoint has them."
            )
        fill({key: targets[key] for key in transfers}, {key: values for key, (values, _) in transfers.items()})
    except CheckpointError as error:
        raise CheckpointError(f"{name} does not suit the model. {error}") from None
    report.skipped = {key: "no such tensor in the model" for key in unused}
    if POSITIONS in state:
        report.skipped[POSITIONS] = f"regenerated for the {encoder.grid} x {encoder.grid} grid"
    report.parameters_loaded = sum(targets[key].numel() for key in transfers if isinstance(targets[key], nn.Parameter))
    report.adapted = {key: how for key, (_, how) in transfers.items() if how}
    report.loaded = [key for key in transfers if key not in report.adapted]
    encoder.loaded_from = noted
    filled = {*transfers, *report.missing}
    report.fresh = [key for key in model.state_dict() if key.removeprefix("encoder.") not in filled]
    return report


# --------------------------------------------------------------------------- Giving each tensor of the model its values
def fill(targets: State, values: State) -> None:
    """Copy `values` into the tensors of the same names. A CheckpointError, before anything is written, names what is on
    one side alone, of another shape, or does not hold finite floating-point numbers.
    """
    theirs, ours = [{key: tuple(tensor.shape) for key, tensor in side.items()} for side in (values, targets)]
    if other := [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]:
        raise CheckpointError(
            f"{len(other)} tensors are on one side alone or differ in shape ({_some(other)}); {other[0]}, "
            f"{theirs.get(other[0])} in the checkpoint and {ours.get(other[0])} in the model."
        )
    for key, value in values.items():
        sound = value.is_floating_point() and value.sum(dtype=torch.float32).isfinite()
        if targets[key].is_floating_point() and not sound:
            raise CheckpointError(f"{key} does not hold finite floating-point numbers: get the checkpoint anew.")
    with torch.no_grad():
        for key, value in values.items():
            targets[key].copy_(value)


def places(wanted: Sequence[str], source: Sequence[str], argument: str) -> list[int]:
    """Where these channels stand in the checkpoint."""
    if unknown := [name for name in wanted if name not in source]:
        raise CheckpointError(f"{argument} {unknown} are not among the checkpoint's channels {source}.")
    return [source.index(name) for name in wanted]


def fit_patches(state: State, encoder: SuryaEncoder, channels: list[str], source: list[str]) -> Transfer:
    """Channels by name, and the last frames: (D, C*T, p, p) of the checkpoint to that of the model."""
    if PATCHES not in state or state[PATCHES].ndim != 4:
        raise CheckpointError(f"It holds another architecture, without {PATCHES}; it begins with {_some(list(state))}.")
    if len(channels) != encoder.in_chans:
        raise CheckpointError(f"channels=[...] names {len(channels)} channels, and the model has {encoder.in_chans}.")
    (_, planes, patch, _), count, wanted = state[PATCHES].shape, len(set(source)), encoder.time_dim
    outputs = len(state.get(f"{DECODER}bias", ())) // patch**2
    if planes not in (count, 2 * count) or outputs not in (0, count) or count < len(source):
        raise CheckpointError(
            f"The checkpoint has {planes} input planes (channels x frames) and {outputs or 'no'} decoded channels, "
            f"and {len(source)} names are given for it: model.weights_channels names each of its channels once."
        )
    frames, picked = planes // count, places(channels, source, "channels")
    if wanted > frames:
        raise CheckpointError(f"The model takes {wanted} frames and the checkpoint {frames}: set time_dim to {frames}.")
    how = [f"{len(picked)} of {count} channels, by name"] if channels != source else []
    how += [f"the last {wanted} of {frames} frames"] if wanted != frames else []
    values = state[PATCHES].unflatten(1, (count, frames))  # (D, C, T, p, p)
    return values[:, picked, frames - wanted :].flatten(1, 2), "; ".join(how)


def fit_filter(values: Tensor, new: int) -> Transfer:
    """The modes that a smaller grid of side `new` has: (G, G/2+1, D, 2) of the checkpoint to that of the model."""
    old = values.shape[0]
    if new > old:
        raise CheckpointError(f"The token grid {new} x {new} is larger than {old} x {old}: set a larger data.reduce.")
    if new == old:
        return values, ""
    rows = torch.cat([torch.arange(new // 2 + 1), torch.arange(old - new // 2 + 1, old)])  # 0 ... G/2, -(G/2-1) ... -1
    modes = values[:, : new // 2 + 1].index_select(0, rows)
    return modes, f"the modes of a {new} x {new} grid, out of {old} x {old}"


def fit_decoder(state: State, model: nn.Module, source: list[str], wanted: Sequence[str] | None) -> dict[str, Transfer]:
    """Weight and bias of the decoder: whole where it is the model's own, else the rows of the wanted channels."""
    decoder, patch, count = model.unembed.unembed[0], model.encoder.patch_size, len(source)
    outputs, factor = decoder.out_channels // decoder.upscale**2, patch // decoder.upscale
    keys = (f"{DECODER}weight", f"{DECODER}bias")
    rows = {key: state[key] for key in keys if len(state.get(key, ())) == count * patch**2}
    if not wanted:
        return {key: (tensor, "") for key, tensor in rows.items() if outputs == count and factor == 1}
    if len(rows) < 2 or len(wanted) != outputs:
        decoded = count if rows else 0
        raise CheckpointError(f"decoder_channels must name {outputs} of the {decoded} channels the checkpoint decodes.")
    picked = places(wanted, source, "decoder_channels")
    how = f"the rows of {', '.join(wanted)}" + (f", averaged over {factor} x {factor} pixels" if factor > 1 else "")
    pattern = "c (uy fy ux fx) ... -> (c uy ux) ..."  # a smaller target is the mean over its pixels
    sizes = {"uy": decoder.upscale, "ux": decoder.upscale, "fy": factor, "fx": factor}
    rows = {key: tensor.unflatten(0, (count, patch**2))[picked] for key, tensor in rows.items()}  # (out, p*p, ...)
    return {key: (reduce(tensor, pattern, "mean", **sizes), how) for key, tensor in rows.items()}


def _some(keys: Sequence[str], count: int = 4) -> str:
    more = f" and {len(keys) - count} more" if len(keys) > count else ""
    return (", ".join(keys[:count]) or "none") + more


# ---------------------------------------------------------------------------------------------------------------- Files
def open_checkpoint(source: str | Path | State) -> tuple[State, str]:
    """The tensors of a checkpoint, memory-mapped, under Surya's keys without what wraps them; and a name to show."""
    contents = read_file(Path(source)) if isinstance(source, (str, Path)) else source
    name = Path(source).name if isinstance(source, (str, Path)) else "The given state dict"
    for wrapper in ("state_dict", "model_state_dict", "model", "module"):
        if isinstance(contents, Mapping) and isinstance(contents.get(wrapper), Mapping):
            contents = contents[wrapper]
    state: dict[str, Tensor] = {}
    for key, tensor in contents.items() if isinstance(contents, Mapping) else ():
        if isinstance(tensor, Tensor):
            own = ".".join(part for part in key.split(".") if part not in WRAPPERS)
            if own in state:
                raise CheckpointError(f"{name} holds {own} under two prefixes: keep one of its two models.")
            state[own] = tensor
    if not state:
        raise CheckpointError(f"{name} holds no tensors by name, so it is not a checkpoint of a model.")
    return state, name


def read_file(path: Path) -> Any:
    """torch.load, memory-mapped, without code (weights_only), after a test of the checksums; else a CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint file {path}: check the path, or let the course download it.")
    try:
        with zipfile.ZipFile(path) as archive:
            if spoilt := archive.testzip():
                raise zipfile.BadZipFile(f"the checksum of {spoilt} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, OSError, EOFError, ValueError) as error:
        what = f"cut short, damaged or no file of torch.save ({str(error).splitlines()[0]}): get it anew (git lfs pull)"
        if isinstance(error, pickle.UnpicklingError):
            what = "no plain state dict: it holds Python objects, which can run code. Save the tensors alone, anew"
        raise CheckpointError(f"{path} ({path.stat().st_size:,} bytes) is {what}.") from error


def fingerprint(source: str | Path | State, samples: int = 64) -> str:
    """Sixteen hexadecimal digits that tell one checkpoint from another, in a moment: of names, shapes and up to
    `samples` evenly spaced values of each tensor.
    """
    state, _ = open_checkpoint(source)
    digest = hashlib.sha256()
    for key in sorted(state):
        values = state[key].detach().flatten()
        digest.update(f"{key} {tuple(state[key].shape)} {values.dtype}\n".encode())
        index = torch.linspace(0, max(len(values) - 1, 0), min(samples, len(values)), dtype=torch.float64).long()
        digest.update(values[index.to(values.device)].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


# --------------------------------------------------------------------------------------- What a fine-tune leaves behind
def save_adapter(
    path: str | Path,
    model: nn.Module,  # any model of the course
    config: Mapping[str, Any],  # the settings of the run, as plain values (others are written as text)
    fingerprint: str | None = None,  # of the checkpoint under the encoder; None: as `load_filtered` has noted
    extra: Mapping[str, Any] | None = None,  # more plain values, such as metrics or the target's scaling
) -> Path:
    """Write what was trained, without the frozen weights, whole or not at all: a few MB; returns the path."""
    plain = json.loads(json.dumps({"config": dict(config), "extra": dict(extra or {})}, default=str))
    state = {key: tensor.detach().cpu().clone() for key, tensor in trained_state(model).items()}
    origin = fingerprint or loaded_from(model) or "none"
    with atomic_write(path) as temporary, temporary.open("wb") as file:  # torch itself loses the errors of a full disk
        torch.save({"format": ADAPTER_FORMAT, "fingerprint": origin, **plain, "state": state}, file)
    return Path(path)


def load_adapter(
    source: str | Path | Mapping[str, Any], model: nn.Module, fingerprint: str | None = None, head: bool = True
) -> dict[str, Any]:
    """Fill what `save_adapter` wrote, a file or its contents, into a model; returns {"config", "extra", "fingerprint"}.

    The model is built with the same settings, with `load_filtered` and `apply_lora` done. Another file, checkpoint
    (`fingerprint`; None: as `load_filtered` has noted) or shape raises a CheckpointError, and nothing is written then.
    Without `head`, what lies outside the encoder stays as it is in the model.
    """
    contents = read_file(Path(source)) if isinstance(source, (str, Path)) else source
    name = Path(source).name if isinstance(source, (str, Path)) else "The run"
    if not isinstance(contents, Mapping) or contents.get("format") != ADAPTER_FORMAT:
        raise CheckpointError(f"{name} is no adapter file of this course; load_filtered reads whole checkpoints.")
    holds, targets = fingerprint or loaded_from(model), trained_state(model)
    if holds != contents["fingerprint"] and any(key not in targets for key, _ in model.named_parameters()):
        raise CheckpointError(
            f"{name} was trained on the checkpoint {contents['fingerprint']}, and the model holds "
            f"{holds or 'none that load_filtered put there'}: fill it from the checkpoint that the run used first."
        )
    both = targets, {key: value for key, value in contents["state"].items() if isinstance(value, Tensor)}
    if not head:
        both = [{key: side[key] for key in side if key.startswith("encoder.")} for side in both]
    try:
        fill(*both)
    except CheckpointError as error:
        raise CheckpointError(f"{name} was trained with another model, head or apply_lora. {error}") from None
    return {key: contents[key] for key in ("config", "extra", "fingerprint")}


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors themselves, by name: what trains, and the buffers outside the encoder."""
    inside, tensors = "" if isinstance(model, SuryaEncoder) else "encoder.", model.state_dict(keep_vars=True)
    buffers = {key for key, t in tensors.items() if not key.startswith(inside) and not isinstance(t, nn.Parameter)}
    return {key: t for key, t in tensors.items() if t.requires_grad or key in buffers}


def loaded_from(model: nn.Module) -> str | None:
    """The fingerprint that `load_filtered` has noted; "none" for random weights, None where it was not called."""
    return getattr(getattr(model, "encoder", model), "loaded_from", None)


def export_merged(path: str | Path, model: nn.Module) -> Path:
    """Write the whole model's state dict in float32, every adapter added to its weight, as `load_filtered` reads it."""
    merged = merge_lora(copy.deepcopy(model).float())
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        torch.save({key: tensor.detach().cpu() for key, tensor in merged.state_dict().items()}, file)
    return Path(path)


# ------------------------------------------------------------------------------------- What the release has fine-tuned
def load_released(
    source: str | Path | State,  # a file, or its state dict; of PEFT where it has adapters
    alpha: float | None = None,  # of the adapters; None: as the files of the release have it, by their names
    num_heads: int | None = None,  # the same
    img_size: int | None = None,  # side of the images it will be given; None: of those it was trained on
) -> Specformer1D | Specformer2D:
    """A complete fine-tuned model of Surya's release in eval mode, its adapters kept as adapters.

    Sizes and rank follow from the shapes. The head is theirs: of numbers, two linear layers on the class token; of
    masks, the decoder. A CheckpointError names what is missing, too much, of another shape, or must be given.
    """
    state, name = open_checkpoint(source)
    known = {address.rpartition("/")[2]: alpha for address, alpha in RELEASED.values()}
    alpha = known.get(name) if alpha is None else alpha
    num_heads = 16 if num_heads is None and name in known else num_heads
    ranks = {tensor.shape[0] for key, tensor in state.items() if "lora_A" in key}
    if num_heads is None or ranks and alpha is None:
        raise CheckpointError(f"{name} is none of {', '.join(known)}: its num_heads and LoRA alpha must be given.")
    theirs = {"cls_token": "class_token", "linear.": "head.0.", "unembed.weight": "head.1.weight"}
    theirs |= {"unembed.bias": "head.1.bias", "embedding.": "encoder.embedding.", "backbone.": "encoder.backbone."}
    try:
        side = state[PATCHES].shape[3] * math.isqrt(state[POSITIONS].shape[1])
        model, values = _sized_as(state, num_heads, img_size or side), {}
        model.trained_side = side  # pixels of the images that it was trained on
        if ranks:
            adapted = {key.split(".")[-4] for key in state if key.endswith(".lora_A.default.weight")}
            apply_lora(model, max(ranks), alpha, dropout=0.0, targets=adapted)
        for key, tensor in state.items():
            old = next((old for old in theirs if key.startswith(old)), "")
            cut = fit_filter(tensor, model.encoder.grid)[0] if key.endswith(FILTER) else tensor
            values[f"{theirs.get(old, '')}{key.removeprefix(old).removesuffix('.default.weight')}"] = cut
        del values[f"encoder.{POSITIONS}"]  # they follow from the grid
        targets = model.state_dict(keep_vars=True)
        fill({key: targets[key] for key in targets if not key.startswith("feature_")}, values)  # these stay 0 and 1
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{name} is no whole fine-tuned model of the release: {error}") from None
    model.encoder.loaded_from = fingerprint(state)
    return model.eval()


def _sized_as(state: State, num_heads: int, img_size: int) -> Specformer1D | Specformer2D:
    """A model without adapters, as large as a released one; KeyError where the tensors that tell are not there."""
    dim, planes, patch, _ = state[PATCHES].shape
    blocks = {".".join(key.split(".")[1:3]) for key in state if key.startswith("backbone.blocks_")}
    first, spectral = "backbone.blocks_attention.0.", sum("spectral" in block for block in blocks)
    ratio = len(state[f"{first}mlp.fc1.weight"]) / dim
    dp_rank = len(state[f"{first}attn.to_dynamic_projection.weight"]) // num_heads
    encoder = SuryaEncoder(
        img_size=img_size,
        patch_size=patch,
        in_chans=len(CHANNELS),
        time_dim=planes // len(CHANNELS),
        embed_dim=dim,
        depth=len(blocks),
        n_spectral_blocks=spectral,
        num_heads=num_heads,
        mlp_ratio=ratio,
        dp_rank=dp_rank,
        nglo=int("cls_token" in state),
    )
    if not encoder.nglo:
        return Specformer2D(encoder, len(state[f"{DECODER}bias"]) // patch**2)
    outputs = len(state["unembed.bias"])
    model = Specformer1D(encoder, outputs, "class_token")
    model.norm, model.head = nn.Identity(), nn.Sequential(nn.Linear(dim, dim), nn.Linear(dim, outputs))
    return model
