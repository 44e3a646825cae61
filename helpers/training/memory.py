"""Memory of a training step: estimated without computing anything, and measured.

The estimate runs the very step, forward and backward, on fake tensors: they have shapes, types and lifetimes, but no
numbers (https://docs.pytorch.org/docs/main/torch.compiler_fake_tensor.html). So it takes a second for any size, and
knows what frozen weights, adapters, mixed precision and recomputed layers save.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from helpers.config import Config
from helpers.model.encoder import SuryaEncoder
from helpers.model.lora import hold_frozen, trainable_summary
from helpers.training.devices import free_memory, make_accelerator

ADAM_BYTES = 8  # two float32 moments of each trained parameter
PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepMemory:
    """Bytes that one training step needs at its peak.

    Attributes:
        weights: all parameters and buffers, frozen ones too.
        optimizer: Adam's two moments of what trains.
        step: what forward and backward add: activations, gradients, casts.
        by_block: of the step, what each block of the encoder keeps for the backward pass.
    """

    weights: int
    optimizer: int
    step: int
    by_block: dict[str, int]

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.step

    def __str__(self) -> str:
        parts = {"weights": self.weights, "optimizer": self.optimizer, "activations and gradients": self.step}
        return "\n".join(f"{name:26}{size / 1e6:10,.1f} MB" for name, size in {**parts, "together": self.total}.items())


def estimate_memory(
    model: nn.Module,
    batch: Mapping[str, Any],
    cfg: Config,
    *,
    batch_size: int | None = None,
    precision: str | None = None,
    recompute: bool | None = None,
    frozen_dtype: str | None = None,
) -> StepMemory:
    """What one training step of `model` will need, without computing it and without touching the model.

    Args:
        model: takes the batch dict, on any device, with what trains chosen.
        batch: one batch, for its shapes (B, C, T, H, W).
        cfg: `training.batch_size`, `training.precision` and `training.recompute_blocks` are what the others default to.
        batch_size: B to ask for instead.
        precision: fp32, bf16 or fp16 to ask for instead.
        recompute: whether all blocks recompute their activations instead of keeping them.
        frozen_dtype: bf16 to hold the frozen weights in.
    """
    shape = (batch_size or cfg.training.batch_size, *batch["ts"].shape[1:])
    fake = FakeTensorMode()
    with fake:
        tensors = (*model.parameters(), *model.buffers())
        shadow = copy.deepcopy(model, {id(tensor): fake.from_tensor(tensor) for tensor in tensors}).train()
        ts = torch.empty(shape, device=next(model.parameters()).device)
    encoder = _encoder_of(shadow)
    if encoder is not None and frozen_dtype == "bf16":
        with fake:
            hold_frozen(shadow, torch.bfloat16)
    if encoder is not None and recompute is not None:
        encoder.backbone.recompute_blocks = frozenset(range(cfg.model.depth)) if recompute else frozenset()
    with fake, _Live() as live, _watched_blocks(encoder, live) as kept:
        _step(shadow, {**batch, "ts": ts}, precision or cfg.training.precision)
    weights = sum(t.numel() * t.element_size() for t in (*shadow.parameters(), *shadow.buffers()))
    return StepMemory(weights, ADAM_BYTES * trainable_summary(model).trainable, live.peak, kept)


def measure_memory(model: nn.Module, batch: Mapping[str, Any], cfg: Config) -> int:
    """Bytes that forward and backward of one real batch add at their peak: `StepMemory.step`, measured.

    On a GPU from CUDA's allocator; on the CPU all tensors that live at once are counted, without what libraries keep
    for themselves. Gradients are cleared afterwards.
    """
    accelerator = make_accelerator(cfg)
    model = model.to(accelerator.device).train()
    batch = {**batch, "ts": batch["ts"].to(accelerator.device)}
    cuda = accelerator.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(accelerator.device)
        before = torch.cuda.memory_allocated(accelerator.device)
        _step(model, batch, cfg.training.precision)
        peak = torch.cuda.max_memory_allocated(accelerator.device) - before
    else:
        with _Live() as live:
            _step(model, batch, cfg.training.precision)
        peak = live.peak
    model.zero_grad()
    return peak


def recompute_if_needed(model: nn.Module, batch: Mapping[str, Any], cfg: Config, free: int | None = None) -> None:
    """With `training.recompute_blocks: auto`, let as few blocks of the encoder as possible recompute their activations,
    so that a training step fits; says so.

    Args:
        model: with what trains chosen; it is moved to its device, and its encoder's `recompute_blocks` is set.
        batch: one batch, for its shapes (B, C, T, H, W).
        free: bytes to fit into; None asks the device. A tenth is left for what libraries keep for themselves.
    """
    encoder = _encoder_of(model)
    if encoder is None or cfg.training.recompute_blocks != "auto":
        return
    accelerator = make_accelerator(cfg)
    model.to(accelerator.device)
    free = free_memory(accelerator.device) if free is None else free
    share = cfg.training.batch_size // accelerator.num_processes

    def needed(count: int) -> StepMemory:
        encoder.backbone.recompute_blocks = frozenset(range(count))
        return estimate_memory(model, batch, cfg, batch_size=share)

    kept = estimate = needed(0)
    count, blocks = 0, list(kept.by_block.values())[1:]  # the first entry is the embedding
    while (excess := estimate.optimizer + estimate.step - 0.9 * free) > 0 and count < len(blocks):
        while excess > 0 and count < len(blocks):  # a block that recomputes keeps little but its input
            excess -= blocks[count]
            count += 1
        estimate = needed(count)
    if count:
        sizes = f"{(kept.optimizer + kept.step) / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free on {accelerator.device}"
        print(f"{count} of {len(blocks)} blocks recompute their activations: a step would add {sizes}.")
    if excess > 0:
        print(f"Even so it may not fit: lower training.batch_size, which is {cfg.training.batch_size}.")


def memory_options(model: nn.Module, batch: Mapping[str, Any], cfg: Config) -> pd.DataFrame:
    """What to turn when a training does not fit: the estimate for this configuration and for one change at a time.

    Returns:
        One row a choice: `MB` together, `saves` as a share of it, and `costs`, what one pays for it.
    """
    changes = {
        "as configured": ({}, ""),
        "training.precision: bf16": ({"precision": "bf16"}, "three digits in the products"),
        "and training.frozen_dtype: bf16": ({"precision": "bf16", "frozen_dtype": "bf16"}, "nothing more"),
        "training.batch_size: 1": ({"batch_size": 1}, "raise training.accumulation by the same factor; slower"),
        "training.recompute_blocks: all": ({"recompute": True}, "1.4 times the time"),
    }
    rows = {
        name: (estimate_memory(model, batch, cfg, **change).total, cost) for name, (change, cost) in changes.items()
    }
    now = rows["as configured"][0]
    return pd.DataFrame(
        [(size / 1e6, 1 - size / now, cost) for size, cost in rows.values()], list(rows), ["MB", "saves", "costs"]
    )


def _encoder_of(model: nn.Module) -> SuryaEncoder | None:
    encoder = getattr(model, "encoder", None)
    return encoder if isinstance(encoder, SuryaEncoder) else None


def _step(model: nn.Module, batch: Mapping[str, Any], precision: str) -> None:
    """Forward and backward."""
    with torch.autocast(batch["ts"].device.type, PRECISION.get(precision), enabled=precision in PRECISION):
        output = model(batch)
    output.float().square().mean().backward()


@contextmanager
def _watched_blocks(encoder: SuryaEncoder | None, live: _Live) -> Iterator[dict[str, int]]:
    """While inside, a forward pass fills the dict with the bytes that each block leaves alive behind it."""
    kept: dict[str, int] = {}
    before = 0

    def note(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            nonlocal before
            if name not in kept:  # recomputation comes here again
                kept[name], before = live.now - before, live.now

        return hook

    hooks = []
    if encoder is not None:
        blocks = (*encoder.backbone.blocks_spectral_gating, *encoder.backbone.blocks_attention)
        watched = {"embedding": encoder.embedding} | {f"block {i}": block for i, block in enumerate(blocks)}
        hooks = [module.register_forward_hook(note(name)) for name, module in watched.items()]
    yield kept
    for hook in hooks:
        hook.remove()


class _Live(TorchDispatchMode):
    """Counts the bytes of tensors that were made inside and still live, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen[storage] = size = storage.nbytes()
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, size)
        return result

    def _freed(self, size: int) -> None:
        self.now -= size
