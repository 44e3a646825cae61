"""Memory of a training step, estimated without computing anything.

The very step runs forward and backward on fake tensors, which have shapes, types and lifetimes, but no numbers
(https://docs.pytorch.org/docs/main/torch.compiler_fake_tensor.html): a second for any size.
"""

import copy
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from helpers.config import Config
from helpers.model.encoder import encoder_of
from helpers.model.lora import trainable_summary
from helpers.training.devices import free_memory, make_accelerator

ADAM_BYTES = 8  # two float32 moments of each trained parameter
PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepMemory:
    """Bytes that one training step needs at its peak."""

    weights: int  # all parameters and buffers, frozen ones too
    optimizer: int  # Adam's two moments of what trains
    step: int  # what forward and backward add: activations, gradients, casts

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.step

    def __str__(self) -> str:
        parts = {"weights": self.weights, "optimizer": self.optimizer, "activations and gradients": self.step}
        return "\n".join(f"{name:26}{size / 1e6:10,.1f} MB" for name, size in {**parts, "together": self.total}.items())


def estimate_memory(
    model: nn.Module, batch: Mapping[str, Any], cfg: Config, batch_size: int | None = None
) -> StepMemory:
    """What a training step of `model` (with what trains chosen) will need; the model is not touched.

    Of `batch` only the shape of "ts" (B, C, T, H, W) counts, with `batch_size` or `training.batch_size` for B.
    """
    shape = (batch_size or cfg.training.batch_size, *batch["ts"].shape[1:])
    with FakeTensorMode() as fake:
        tensors = (*model.parameters(), *model.buffers())
        shadow = copy.deepcopy(model, {id(tensor): fake.from_tensor(tensor) for tensor in tensors}).train()
        ts = torch.empty(shape, device=next(model.parameters()).device)
        with LiveTensors() as live:
            forward_and_backward(shadow, {**batch, "ts": ts}, cfg.training.precision)
    weights = sum(tensor.nbytes for tensor in tensors)
    return StepMemory(weights, ADAM_BYTES * trainable_summary(model).trainable, live.peak)


def recompute_if_needed(model: nn.Module, batch: Mapping[str, Any], cfg: Config, free: int | None = None) -> None:
    """With `training.recompute_blocks: auto`, move the model (with what trains chosen) to its device, and let as few
    blocks of the encoder as possible recompute their activations, so that a training step of the shape of `batch` fits
    into 0.9 (the rest is for libraries) of `free` bytes (None: of the device); says so.
    """
    if cfg.training.recompute_blocks != "auto" or not hasattr(model, "encoder"):
        return
    accelerator, backbone = make_accelerator(cfg), encoder_of(model).backbone
    model.to(accelerator.device)
    free = free_memory(accelerator.device) if free is None else free
    for count in range(cfg.model.depth + 1):
        backbone.recompute_blocks = frozenset(range(count))
        estimate = estimate_memory(model, batch, cfg, cfg.training.batch_size // accelerator.num_processes)
        added = estimate.optimizer + estimate.step
        if added <= 0.9 * free:
            break
    if count:
        sizes = f"a step adds {added / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free on {accelerator.device}"
        print(f"{count} of {cfg.model.depth} blocks recompute their activations, so that {sizes}.")
    if added > 0.9 * free:
        print(f"Even so it may not fit: lower training.batch_size, which is {cfg.training.batch_size}.")


def forward_and_backward(model: nn.Module, batch: Mapping[str, Any], precision: str) -> None:
    """A training step but for its loss and the optimiser."""
    with torch.autocast(batch["ts"].device.type, PRECISION.get(precision), enabled=precision in PRECISION):
        output = model(batch)
    output.float().square().mean().backward()


class LiveTensors(TorchDispatchMode):
    """While inside, counts the bytes of tensors that were made inside and still live (`now`), and their `peak`."""

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
