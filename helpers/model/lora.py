"""Low-rank adapters (LoRA, arXiv:2106.09685) for the linear layers inside the encoder's blocks.

On loralib's base class and conventions: `lora_A` random and `lora_B` zero, so that an adapted model starts as the model
it was. Unlike loralib's own layers, an adapted layer shares the frozen parameters under their old names, computes the
update through the rank (never as a dense matrix), and never writes into a frozen weight.
"""

import copy
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import loralib
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.config import QKV, Config
from helpers.model.encoder import SpectralFilter, SuryaEncoder, encoder_of, to_working_dtype


class LoRALinear(nn.Linear, loralib.LoRALayer):
    """A frozen linear layer with an update of low rank: y = W x + b + (alpha / r) B A dropout(x).

    The parameters are laid out as in loralib: lora_A (n*r, in) and lora_B (n*out/len(parts), r), n = sum(parts), one
    part after the other.
    """

    def __init__(
        self,
        base: nn.Linear,  # the layer to adapt, whose very parameters are shared
        rank: int,  # r, of each pair (A, B)
        alpha: float,
        dropout: float,  # on the input of the adapter alone
        parts: tuple[bool, ...] = (True,),  # which equal parts of y get a pair: one for a plain layer, three for qkv
    ):
        nn.Linear.__init__(self, base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        loralib.LoRALayer.__init__(self, r=rank, lora_alpha=alpha, lora_dropout=dropout, merge_weights=False)
        self.weight, self.bias = base.weight, base.bias  # the same objects, under the same names
        self.lora_dropout = nn.Dropout(dropout)
        self.scaling = alpha / rank
        self.parts = parts
        n, out = sum(parts), base.out_features // len(parts)
        self.lora_A = nn.Parameter(torch.empty(n * rank, base.in_features, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(n * out, rank, device=base.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Shape: (..., in) to (..., out)."""
        x = to_working_dtype(x, self)
        low = dropout_linear(x, self.lora_A.to(x.dtype), self.lora_dropout.p if self.training else 0.0)
        update = F.linear(low, self.scaled_B().to(x.dtype), self.bias)  # (alpha / r) B A dropout(x) + b
        return add_linear(update, x, self.weight.to(x.dtype))  # + W x

    def scaled_B(self) -> Tensor:
        """(alpha / r) B as one matrix (out, n*r), the parts on the diagonal: 0.90 of the time of part by part."""
        blocks = iter(self.lora_B.chunk(sum(self.parts)))
        none = self.lora_B.new_zeros(self.out_features // len(self.parts), 0)
        return self.scaling * torch.block_diag(*[next(blocks) if adapted else none for adapted in self.parts])


def apply_lora(
    model: nn.Module,  # a Specformer (something with an `.encoder`), or a SuryaEncoder alone
    rank: int = 8,  # r of every pair
    alpha: float = 8,  # the update is scaled by alpha / rank
    dropout: float = 0.1,  # on the input of the adapters alone
    targets: Iterable[str] = ("qkv", "proj", "fc1", "fc2"),  # linear layers: these and to_dynamic_projection
    qkv: Iterable[str] = QKV,  # which of "q", "k", "v" get a pair where qkv is a target
) -> nn.Module:
    """Freeze the encoder and put adapters beside the chosen linear layers of its blocks, in place; returns the model.

    Everything outside the encoder (the head) keeps training; the patch embedding and the spectral filters are no linear
    layers of the blocks. A ValueError names what is out of range, or matches no layer, or is adapted already.
    """
    encoder, targets, qkv = encoder_of(model), tuple(targets), tuple(qkv)
    layers = [(name, layer) for name, layer in encoder.backbone.named_modules() if isinstance(layer, nn.Linear)]
    if any(isinstance(layer, LoRALinear) for _, layer in layers):
        raise ValueError("This model has adapters already; build it again, or adapt what merge_lora returns.")
    there = Counter(name.rpartition(".")[2] for name, _ in layers)
    problems = []
    if rank < 1 or rank % 1 or not alpha > 0 or not 0 <= dropout < 1 or not targets or set(qkv) - set(QKV):
        problems.append(
            f"it takes a whole rank >= 1, alpha > 0, 0 <= dropout < 1, some targets, and qkv of {', '.join(QKV)}; "
            f"got {rank=}, {alpha=}, {dropout=}, {targets=}, {qkv=}"
        )
    if "qkv" in targets and not qkv:
        problems.append("qkv is a target but none of q, k, v is chosen")
    if unknown := [target for target in targets if target not in there]:
        listed = ", ".join(f"{name} ({count} layers)" for name, count in there.items())
        problems.append(f"targets {unknown} match no linear layer; the encoder's blocks have {listed}")
    if problems:
        raise ValueError(f"The adapters cannot be made: {'; '.join(problems)}.")
    for name, layer in layers:
        leaf = name.rpartition(".")[2]
        if leaf in targets:
            parts = tuple(part in qkv for part in QKV) if leaf == "qkv" else (True,)
            adapted = LoRALinear(layer, rank, alpha, dropout, parts).train(layer.training)
            encoder.backbone.set_submodule(name, adapted)
    loralib.mark_only_lora_as_trainable(encoder)
    return model


def adapt(model: nn.Module, cfg: Config) -> nn.Module:
    """Choose what trains by `training.regime`, in place, and return the model.

    lora: adapters by `apply_lora` with the settings of `lora`, and the head. probe: the head alone. full, scratch: all,
    but for the decoder that head.pooling "forecast" reads, which trains only where it does not come from a checkpoint.
    What is frozen in the encoder is held in `training.frozen_dtype`.
    """
    if cfg.training.regime == "lora":
        apply_lora(model, **cfg.lora.model_dump())
    else:
        encoder_of(model).requires_grad_(cfg.training.regime != "probe")
    if getattr(model, "pooling", None) == "forecast":
        model.unembed.requires_grad_(cfg.initial_weights is None)
    if cfg.training.frozen_dtype == "bf16":
        hold_frozen(model, torch.bfloat16)
    return model


def hold_frozen(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Keep the frozen weights of the encoder in `dtype`, in place: half of the memory in bfloat16, and no cast a step.

    Spectral filters, which compute in float32, and normalisations, which have few weights, stay as they are.
    """
    for module in encoder_of(model).modules():
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad and not isinstance(module, SpectralFilter | nn.LayerNorm):
                parameter.data = parameter.data.to(dtype)
    return model


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters alone, under the names of the model's state dict."""
    return loralib.lora_state_dict(model)


def merge_lora(model: nn.Module) -> nn.Module:
    """A copy of the model for export, with every update added to its weight and no adapters left; same outputs in eval.

    Where the frozen weights are bfloat16, the sum is rounded to bfloat16; merge in float32 for equal outputs.
    """
    merged = copy.deepcopy(model)
    for name, layer in list(merged.named_modules()):
        if isinstance(layer, LoRALinear):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
            update = (layer.scaled_B() @ layer.lora_A).detach()
            plain.weight = nn.Parameter((layer.weight.float() + update).to(layer.weight.dtype))
            plain.bias = layer.bias
            merged.set_submodule(name, plain.train(layer.training))
    return merged


@dataclass(frozen=True)
class TrainableSummary:
    """Counts of parameters; prints as a table of the groups."""

    groups: dict[str, tuple[int, int]]  # {"adapters" | "head" | "encoder": (trainable, total)}
    trainable: int
    total: int

    def __str__(self) -> str:
        groups = {**self.groups, "all": (self.trainable, self.total)}
        rows = [f"{'':10}{'trainable':>14}{'frozen':>14}"]
        rows += [f"{name:10}{train:>14,}{total - train:>14,}" for name, (train, total) in groups.items() if total]
        rows[-1] += f"   {100 * self.trainable / max(self.total, 1):.2f}% trainable"
        return "\n".join(rows)


def trainable_summary(model: nn.Module) -> TrainableSummary:
    """Count what trains and what is frozen, for adapters, head (all outside the encoder) and encoder."""
    inside = "" if isinstance(model, SuryaEncoder) else "encoder."
    groups = {"adapters": (0, 0), "head": (0, 0), "encoder": (0, 0)}
    for name, parameter in model.named_parameters():
        group = "adapters" if "lora_" in name else "encoder" if name.startswith(inside) else "head"
        trainable, total = groups[group]
        groups[group] = (trainable + parameter.numel() * parameter.requires_grad, total + parameter.numel())
    trainable, total = (sum(counts) for counts in zip(*groups.values(), strict=True))
    return TrainableSummary(groups, trainable, total)


# ---- Two products of the adapters, made cheap. Measured: a LoRA step of one attention block (width 1280, 4096 tokens,
# ---- rank 8), float32, one thread of a CPU with AVX2.
def dropout_linear(x: Tensor, weight: Tensor, p: float) -> Tensor:
    """F.linear(F.dropout(x, p), weight), the same in distribution: in 0.91 of the time, as F.dropout draws floats."""
    if p == 0:
        return F.linear(x, weight)
    # 16 random bits an element, drawn 64 at once
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    dropped = (bits.view(torch.int16)[: x.numel()] < round((p - 0.5) * 2**16)).view(x.shape)
    return F.linear(x.masked_fill(dropped, 0), weight) / (1 - p)


def add_linear(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y + F.linear(x, weight), written into y: in 0.88 of the time, as `recompute` leaves out a last product."""
    return y.flatten(0, -2).addmm_(x.flatten(0, -2), weight.t()).view(y.shape)
