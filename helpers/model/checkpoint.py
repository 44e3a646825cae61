"""Weights in and out: a Surya checkpoint into a model of another shape, and the small files of a fine-tune.

`load_filtered` gives every tensor of the model's encoder a source in the checkpoint and every tensor of the
checkpoint a place, or says which has none. Three kinds are adapted on the way (the two first are half of Surya's
parameters, so a loader that drops what does not match leaves a half-random model):

* `patch_embed.proj.weight`: channels picked by name, the most recent frames kept;
* `filter.complex_weight`: on a smaller token grid over the same field of view, the modes that this grid has. A mode is
  the same physical frequency on any grid, and norm="ortho" makes rescaling needless;
* `unembed.unembed.0.*`: rows of the decoder for named output channels, on request.

Files are read memory-mapped and with weights_only=True: nothing in a checkpoint can run code.
"""

import copy
import hashlib
import json
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from einops import reduce
from torch import Tensor, nn

from helpers.channels import CHANNELS
from helpers.model.encoder import SuryaEncoder
from helpers.model.heads import Specformer2D
from helpers.model.lora import merge_lora
from helpers.shared import atomic_write

State = Mapping[str, Tensor]
PATCHES = "embedding.patch_embed.proj.weight"
POSITIONS = "embedding.pos_embed"
DECODER = "unembed.unembed.0."
ADAPTER_FORMAT = "surya-course-adapter-1"
STATE_FORMAT = "surya-course-state-1"


class CheckpointError(ValueError):
    """A file or its tensors do not suit; the message says which, why, and what to do."""


@dataclass
class LoadReport:
    """What `load_filtered` did; prints as a table. Keys are the checkpoint's.

    Attributes:
        source: the file.
        loaded: keys taken as they are.
        adapted: {key: how} of those cut to the model's shape.
        skipped: {key: why} of the checkpoint's tensors that were not used.
        missing: encoder tensors of the model that found no source.
        fresh: tensors of the model that no checkpoint has to fill: head and adapters.
        parameters_loaded: how many of the model's parameters were filled.
        parameters_total: how many the model has.
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    adapted: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    parameters_loaded: int = 0
    parameters_total: int = 0

    def __str__(self) -> str:
        share = 100 * self.parameters_loaded / max(self.parameters_total, 1)
        rows = [
            f"{self.source}: {self.parameters_loaded:,} of {self.parameters_total:,} parameters ({share:.1f}%)",
            f"  loaded   {len(self.loaded):4} tensors as they are",
        ]
        for name, entries in (("adapted", self.adapted), ("skipped", self.skipped)):
            rows.append(f"  {name}  {len(entries):4} tensors" + ":" * bool(entries))
            rows += [f"      {key}: {why}" for key, why in entries.items()]
        for name, keys in (("missing", self.missing), ("fresh", self.fresh)):
            note = " (random or zero, trained from here)" if name == "fresh" and keys else ""
            rows.append(f"  {name:7}  {len(keys):4} tensors{note}" + (f": {_some(keys)}" if keys else ""))
        return "\n".join(rows)


def load_filtered(
    model: nn.Module,
    source: str | Path | State | None,
    channels: Sequence[str] | None = None,
    source_channels: Sequence[str] | None = None,
    strict: bool = True,
    decoder_channels: Sequence[str] | None = None,
) -> LoadReport:
    """Fill a model from a Surya checkpoint, in place, and report on every tensor. Nothing is written when it raises.

    Args:
        model: a Specformer1D, a Specformer2D or a SuryaEncoder, with adapters or without.
        source: a checkpoint file, or a state dict; None leaves the random weights, and the report says so.
        channels: names of the model's input channels in their order; None for the checkpoint's own.
        source_channels: names of the checkpoint's channels in their order; None for Surya's 13.
        strict: raise when an encoder tensor of either side finds no partner; False leaves the model's as it is.
        decoder_channels: checkpoint channels from whose decoder rows a Specformer2D starts, one for each of its
            outputs. None or [] loads the decoder whole where it fits (the checkpoint's channels in its order), else
            leaves it fresh.

    Raises:
        CheckpointError: when the file is no checkpoint, its architecture is another, it has less frames or a smaller
            grid than the model, a channel is unknown, or (strict) a tensor finds no partner.
    """
    total = sum(p.numel() for p in model.parameters())
    encoder = getattr(model, "encoder", model)
    if source is None:
        encoder.loaded_from = "none"
        return LoadReport("No checkpoint", fresh=list(model.state_dict()), parameters_total=total)
    state, name = open_checkpoint(source)
    if not isinstance(encoder, SuryaEncoder):
        raise CheckpointError(f"{type(model).__name__} has no Surya encoder, so a Surya checkpoint has no place in it.")
    _check_architecture(state, encoder, name)
    try:
        names = _Channels.of(channels, source_channels, encoder.in_chans)
        targets, copies = _plan(model, encoder, state, names, decoder_channels)
    except CheckpointError as error:
        raise CheckpointError(f"{name} does not suit the model. {error}") from None
    report = LoadReport(name, parameters_total=total)
    report.missing = [key for key in targets if key not in copies and not key.startswith(DECODER)]
    report.skipped = {key: _why_skipped(key, encoder) for key in state if key not in copies}
    lost = [key for key in report.skipped if key.startswith(("embedding.", "backbone.")) and key != POSITIONS]
    if strict and (report.missing or lost):
        raise CheckpointError(_no_partner(name, report.missing, lost))
    for key, (take, how) in copies.items():
        with torch.no_grad():
            targets[key].copy_(take(state[key]))
        report.parameters_loaded += targets[key].numel() * isinstance(targets[key], nn.Parameter)
        if how:
            report.adapted[key] = how
        else:
            report.loaded.append(key)
    encoder.loaded_from = fingerprint(state)
    known = {*copies, *report.missing}
    report.fresh = [key for key in model.state_dict() if key.removeprefix("encoder.") not in known]
    return report


# --------------------------------------------------------------------------------------------------------------------
# Giving each tensor its source: (function from the checkpoint's tensor to the model's, how it was adapted or "")
# --------------------------------------------------------------------------------------------------------------------
Copy = tuple[Callable[[Tensor], Tensor], str]


@dataclass(frozen=True)
class _Channels:
    model: tuple[str, ...]
    source: tuple[str, ...]

    @classmethod
    def of(cls, model: Sequence[str] | None, source: Sequence[str] | None, count: int) -> "_Channels":
        source = CHANNELS if source is None else tuple(source)
        model = source if model is None else tuple(model)
        if len(model) != count:
            raise CheckpointError(
                f"The model has {count} input channels, but {len(model)} names are given for them: pass channels=[...] "
                "with their names in the model's order. Which ones they are cannot be read off the shapes."
            )
        return cls(model, source)

    def find(self, wanted: Sequence[str], argument: str) -> list[int]:
        unknown = [name for name in wanted if name not in self.source]
        if unknown:
            raise CheckpointError(f"{argument} {unknown} are not among the checkpoint's channels {list(self.source)}.")
        return [self.source.index(name) for name in wanted]


def _plan(
    model: nn.Module, encoder: SuryaEncoder, state: State, names: _Channels, decoder_channels: Sequence[str] | None
) -> tuple[dict[str, Tensor], dict[str, Copy]]:
    """The model's tensors that a checkpoint may fill, and how to fill those for which it has something."""
    targets = {key: tensor for key, tensor in encoder.state_dict(keep_vars=True).items() if "lora_" not in key}
    copies = {key: _fit(key, state[key], tensor, encoder, names) for key, tensor in targets.items() if key in state}
    if isinstance(model, Specformer2D):
        copies |= _fit_decoder(state, model, names, decoder_channels)
        targets |= {f"{DECODER}{kind}": getattr(model.unembed.unembed[0], kind) for kind in ("weight", "bias")}
    elif decoder_channels:
        raise CheckpointError(f"decoder_channels is for a Specformer2D; {type(model).__name__} has no decoder.")
    return targets, copies


def _fit(key: str, source: Tensor, target: Tensor, encoder: SuryaEncoder, names: _Channels) -> Copy:
    if key == PATCHES:
        return _fit_patches(source, encoder, names)
    if key.endswith(".filter.complex_weight"):
        return _fit_filter(key, source, target)
    if source.shape != target.shape:
        raise CheckpointError(
            f"{key} has the shape {tuple(source.shape)} in the checkpoint and {tuple(target.shape)} in the model, "
            "and the one cannot be cut to the other: give the model the settings of the checkpoint."
        )
    return (lambda tensor: tensor), ""


def _fit_patches(source: Tensor, encoder: SuryaEncoder, names: _Channels) -> Copy:
    planes, count = source.shape[1], len(names.source)
    frames, wanted = planes // count, encoder.time_dim
    if planes % count:
        raise CheckpointError(
            f"The checkpoint's patch embedding has {planes} input planes, no multiple of its {count} channels: "
            "pass source_channels=[...] with the channels that it was trained with."
        )
    if wanted > frames:
        raise CheckpointError(
            f"The model takes {wanted} frames and the checkpoint was trained with {frames}: "
            f"set time_dim to {frames} or less."
        )
    picked = names.find(names.model, "channels")
    index = torch.tensor([c * frames + t for c in picked for t in range(frames - wanted, frames)])  # (C*T,)
    how = []
    if picked != list(range(count)):
        how.append(f"{len(picked)} of {count} channels, by name")
    if wanted != frames:
        how.append(f"the last {wanted} of {frames} frames")
    return (lambda tensor: tensor.index_select(1, index) if how else tensor), "; ".join(how)


def _fit_filter(key: str, source: Tensor, target: Tensor) -> Copy:
    old, new = source.shape[0], target.shape[0]
    if new > old:
        raise CheckpointError(
            f"The model's token grid is {new} x {new} and the checkpoint's is {old} x {old}: {key} has no values for "
            "the higher frequencies. Use smaller images (a larger data.reduce)."
        )
    rows = torch.cat([torch.arange(new // 2 + 1), torch.arange(old - new // 2 + 1, old)])  # 0 ... G/2, -(G/2-1) ... -1
    how = f"the modes of a {new} x {new} grid, out of {old} x {old}" if new < old else ""
    return (lambda tensor: tensor.narrow(1, 0, new // 2 + 1).index_select(0, rows) if how else tensor), how


def _fit_decoder(state: State, model: Specformer2D, names: _Channels, wanted: Sequence[str] | None) -> dict[str, Copy]:
    decoder, patch, count = model.unembed.unembed[0], model.encoder.patch_size, len(names.source)
    outputs = decoder.out_channels // decoder.upscale**2
    keys = [f"{DECODER}weight", f"{DECODER}bias"]
    there = all(key in state and len(state[key]) == count * patch**2 for key in keys)
    if not wanted:
        whole = there and outputs == count and decoder.upscale == patch
        return dict.fromkeys(keys, ((lambda tensor: tensor), "")) if whole else {}
    if not there:
        raise CheckpointError(f"decoder_channels is given, but the checkpoint has no decoder for {count} channels.")
    if len(wanted) != outputs:
        raise CheckpointError(
            f"decoder_channels names {len(wanted)} channels {list(wanted)} and the model has {outputs} outputs."
        )
    picked = names.find(wanted, "decoder_channels")
    factor = patch // decoder.upscale

    def take(tensor: Tensor) -> Tensor:
        rows = tensor.unflatten(0, (count, patch**2))[picked]  # (out, p*p, ...)
        pattern = "c (uy fy ux fx) ... -> (c uy ux) ..."  # a smaller target is the mean over its pixels
        return reduce(rows, pattern, "mean", uy=decoder.upscale, ux=decoder.upscale, fy=factor, fx=factor)

    how = f"the rows of {', '.join(wanted)}" + (f", averaged over {factor} x {factor} pixels" if factor > 1 else "")
    return dict.fromkeys(keys, (take, how))


def _why_skipped(key: str, encoder: SuryaEncoder) -> str:
    if key == POSITIONS:
        return f"regenerated for the {encoder.grid} x {encoder.grid} grid"
    if key.startswith(DECODER):
        return "pretraining decoder; the model has a head of its own"
    return "no such tensor in the model"


def _some(keys: Sequence[str], count: int = 4) -> str:
    more = f" and {len(keys) - count} more" if len(keys) > count else ""
    return (", ".join(keys[:count]) or "none") + more


def _no_partner(name: str, missing: list[str], lost: list[str]) -> str:
    sentences = []
    if missing:
        sentences.append(f"{len(missing)} encoder tensors of the model are not in it ({_some(missing)})")
    if lost:
        sentences.append(f"{len(lost)} of its encoder tensors have no place in the model ({_some(lost)})")
    return (
        f"{name} does not fill this encoder: {'; '.join(sentences)}. Set depth, n_spectral_blocks and rpe as the "
        "checkpoint has them, or pass strict=False to leave the rest as it is."
    )


def _check_architecture(state: State, encoder: SuryaEncoder, name: str) -> None:
    """Raise one CheckpointError with every number in which the checkpoint's architecture differs from the model's."""
    if PATCHES not in state or not any(key.startswith("backbone.blocks_") for key in state):
        raise CheckpointError(
            f"{name} holds another architecture: a Surya checkpoint has keys such as {PATCHES} and "
            f"backbone.blocks_attention.0.attn.qkv.weight, and this one begins with {_some(list(state))}."
        )
    own = encoder.state_dict()
    numbers = {
        "embed_dim": lambda s: s[PATCHES].shape[0],
        "patch_size": lambda s: s[PATCHES].shape[-1],
        "num_heads x dp_rank": lambda s: _first(s, ".attn.to_dynamic_projection.weight"),
        "hidden width of the MLPs (embed_dim x mlp_ratio)": lambda s: _first(s, ".mlp.fc1.weight"),
    }
    wrong = []
    for what, number in numbers.items():
        theirs, ours = number(state), number(own)
        if None not in (theirs, ours) and theirs != ours:
            wrong.append(f"{what} is {theirs} in the checkpoint and {ours} in the model")
    if wrong:
        raise CheckpointError(
            f"{name} has another architecture: {'; '.join(wrong)}. Set the model as the checkpoint is."
        )


def _first(state: State, ending: str) -> int | None:
    return next((tensor.shape[0] for key, tensor in state.items() if key.endswith(ending)), None)


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------
def open_checkpoint(source: str | Path | State) -> tuple[State, str]:
    """The tensors of a checkpoint under Surya's keys, memory-mapped, and a name for messages.

    A state dict inside another dict ("state_dict", "model") and the prefixes that wrappers leave are taken off.
    """
    if isinstance(source, (str, Path)):
        contents, name = _read(Path(source)), Path(source).name
    else:
        contents, name = source, "The given state dict"
    for wrapper in ("state_dict", "model_state_dict", "model", "module"):
        if isinstance(contents, Mapping) and isinstance(contents.get(wrapper), Mapping):
            contents = contents[wrapper]
    tensors = {k: v for k, v in contents.items() if isinstance(v, Tensor)} if isinstance(contents, Mapping) else {}
    if not tensors:
        raise CheckpointError(f"{name} holds no tensors by name, so it is not a checkpoint of a model.")
    for prefix in ("_orig_mod.", "module.", "model.", "encoder."):
        if any(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return tensors, name


def _read(path: Path) -> Any:
    """torch.load, memory-mapped and weights_only, with a sentence for everything that the file can be instead."""
    if not path.is_file():
        kind = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise CheckpointError(f"The checkpoint {path} {kind}: check the path, or let the course download it.")
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path} is a git-LFS pointer, not the weights themselves: run `git lfs pull` or download the file."
        )
    if not zipfile.is_zipfile(path):
        if head.startswith(b"PK"):
            size = path.stat().st_size
            raise CheckpointError(
                f"{path} is truncated ({size:,} bytes, without its end): delete it and download it again."
            )
        raise CheckpointError(
            f"{path} is not a PyTorch checkpoint (a file that torch.save writes); it begins with {head[:20]!r}."
        )
    with zipfile.ZipFile(path) as archive:
        if not any(entry.endswith("data.pkl") for entry in archive.namelist()):
            raise CheckpointError(f"{path} is a zip archive of something else, not a checkpoint that torch.save wrote.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds Python objects besides tensors, which are not read because they can run code: "
            "save it anew as a plain state dict."
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged and cannot be read: delete it and download it again.") from error


def fingerprint(source: str | Path | State | None, samples: int = 64) -> str:
    """Sixteen hexadecimal digits that tell one checkpoint from another; "none" for None.

    From names, shapes and up to `samples` evenly spaced values of each tensor, so that it takes a moment for 1.8 GB
    too. The same for a file and for its state dict.
    """
    if source is None:
        return "none"
    state, _ = open_checkpoint(source)
    digest = hashlib.sha256()
    for key in sorted(state):
        values = state[key].detach().flatten()
        digest.update(f"{key} {tuple(state[key].shape)} {values.dtype}\n".encode())
        index = torch.linspace(0, max(len(values) - 1, 0), min(samples, len(values)), dtype=torch.float64).long()
        digest.update(values[index.to(values.device)].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


# --------------------------------------------------------------------------------------------------------------------
# What a fine-tune leaves behind
# --------------------------------------------------------------------------------------------------------------------
def save_adapter(
    path: str | Path,
    model: nn.Module,
    config: Mapping[str, Any],
    fingerprint: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write what was trained, without the frozen weights: a few MB in place of the whole model. Others see all or
    nothing.

    Args:
        path: file to write.
        model: any model of the course.
        config: the settings of the run, as plain values (others are written as text).
        fingerprint: of the checkpoint that the encoder was filled from; None: as `load_filtered` has noted.
        extra: more plain values, such as metrics or the target's scaling.

    Returns:
        The path.
    """
    plain = json.loads(json.dumps({"config": dict(config), "extra": dict(extra or {})}, default=str))
    state = {key: tensor.detach().cpu().clone() for key, tensor in trained_state(model).items()}
    origin = fingerprint or loaded_from(model) or "none"
    contents = {"format": ADAPTER_FORMAT, "fingerprint": origin, **plain, "state": state}
    with atomic_write(path) as temporary:
        torch.save(contents, temporary)
    return Path(path)


def load_adapter(path: str | Path, model: nn.Module, fingerprint: str | None = None) -> dict[str, Any]:
    """Fill what was trained into a model built the same way, adapters and encoder weights in place, and return the
    settings.

    Args:
        path: a file of `save_adapter`.
        model: built with the same settings, with `load_filtered` and `apply_lora` done.
        fingerprint: of the checkpoint that the model's encoder was filled from; None: as `load_filtered` has noted.

    Returns:
        {"config", "extra", "fingerprint"} as they were saved.

    Raises:
        CheckpointError: for another file, another checkpoint, or a model of another shape. Nothing is written then.
    """
    contents, name = _read(Path(path)), Path(path).name
    if not isinstance(contents, Mapping) or contents.get("format") != ADAPTER_FORMAT:
        raise CheckpointError(
            f"{name} is no adapter file of this course; a whole checkpoint is read with load_filtered."
        )
    holds = fingerprint or loaded_from(model)
    if holds != contents["fingerprint"] and _has_frozen(model):
        raise CheckpointError(
            f"{name} was trained on the checkpoint {contents['fingerprint']}, and the model holds "
            f"{holds or 'none that load_filtered put there'}: its adapters mean nothing on other weights. Fill the "
            "model from the checkpoint that the run used (load_filtered), then load this file."
        )
    state, targets = contents["state"], trained_state(model)
    missing, lost = [k for k in targets if k not in state], [k for k in state if k not in targets]
    if missing or lost:
        raise CheckpointError(
            f"{name} was trained with another model: {len(lost)} of its tensors have no place here ({_some(lost, 2)}) "
            f"and {len(missing)} of the model's are not in it ({_some(missing, 2)}). Build the model, its head and its "
            "adapters (apply_lora) with the settings in the file."
        )
    for key, tensor in state.items():
        if tensor.shape != targets[key].shape:
            raise CheckpointError(
                f"{name} holds {key} of shape {tuple(tensor.shape)}, and the model's is {tuple(targets[key].shape)}: "
                "rank, head or number of outputs differ. Build the model with the settings in the file."
            )
    with torch.no_grad():
        for key, tensor in state.items():
            targets[key].copy_(tensor)
    return {key: contents[key] for key in ("config", "extra", "fingerprint")}


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors themselves, by name: everything outside the encoder, buffers too, and what trains inside it."""
    inside = "" if isinstance(model, SuryaEncoder) else "encoder."
    tensors = model.state_dict(keep_vars=True)
    return {key: t for key, t in tensors.items() if not key.startswith(inside) or t.requires_grad}


def loaded_from(model: nn.Module) -> str | None:
    """The fingerprint that `load_filtered` has noted; "none" for random weights, None where it was not called."""
    return getattr(getattr(model, "encoder", model), "loaded_from", None)


def _has_frozen(model: nn.Module) -> bool:
    """Whether the encoder has weights that an adapter file does not hold."""
    encoder = getattr(model, "encoder", model)
    return isinstance(encoder, SuryaEncoder) and not all(p.requires_grad for p in encoder.parameters())


def export_merged(path: str | Path, model: nn.Module) -> Path:
    """Write the whole model in float32 with every adapter added to its weight, for use without this course.

    A plain state dict with the keys of the model without adapters: `load_state_dict` of such a model reads it, and
    `load_filtered` takes the encoder from it. The model itself does not change.
    """
    merged = merge_lora(copy.deepcopy(model).float())
    with atomic_write(path) as temporary:
        torch.save({key: tensor.detach().cpu() for key, tensor in merged.state_dict().items()}, temporary)
    return Path(path)


def save_state(path: str | Path, contents: Mapping[str, Any]) -> None:
    """Write what a training needs to go on (plain values and tensors); others see the old file or the new one, whole.

    Raises:
        DiskFullError: the disk became full; the old file is still there.
    """
    with atomic_write(path) as temporary:
        torch.save({"format": STATE_FORMAT, **contents}, temporary)


def load_state(path: str | Path) -> dict[str, Any]:
    """What `save_state` wrote.

    Raises:
        CheckpointError: no such file, or another one.
    """
    contents = _read(Path(path))
    if not isinstance(contents, Mapping) or contents.get("format") != STATE_FORMAT:
        raise CheckpointError(f"{path} does not hold the state of a training.")
    return dict(contents)
