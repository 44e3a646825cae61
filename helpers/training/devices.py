"""Which device computes, in which precision, and how much memory it has."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache

import psutil
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState

from helpers.config import Config


def one_of_several() -> bool:
    """Whether this is one of several processes that train together, whoever started them."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def make_accelerator(cfg: Config) -> Accelerator:
    """A fresh Accelerator on `training.device` in `training.precision`: another cell may ask for another one.

    Raises:
        ValueError: the machine has no such device, or the device cannot compute in that precision, or the processes
            cannot share the batches.
    """
    device = _device_of_this_process(cfg)
    if cfg.training.precision == "fp16" and device.type != "cuda":
        raise ValueError(
            f"training.precision: fp16 needs a GPU, and this runs on {device}: its small range needs loss scaling, "
            "which exists for CUDA alone. Set training.precision to bf16 or fp32."
        )
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
    if not one_of_several():  # else Accelerate knows which process has which GPU
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision={"fp32": "no"}.get(cfg.training.precision, cfg.training.precision),
        gradient_accumulation_steps=cfg.training.accumulation,
        dataloader_config=DataLoaderConfiguration(split_batches=True),  # batch_size is that of all processes together
    )
    if cfg.training.batch_size % accelerator.num_processes:
        raise ValueError(
            f"{accelerator.num_processes} processes cannot share batches of {cfg.training.batch_size} samples equally: "
            f"set training.batch_size to a multiple of {accelerator.num_processes}."
        )
    return accelerator


def _device_of_this_process(cfg: Config) -> torch.device:
    if one_of_several():
        return torch.device("cuda" if cfg.training.device != "cpu" and torch.cuda.is_available() else "cpu")
    if cfg.training.processes > 1 and not torch.cuda.is_initialized():
        return torch.device("cpu")  # a process that has used a GPU cannot be copied: `fit` uses them first
    return choose_device(cfg.training.device)


def choose_device(wanted: str) -> torch.device:
    """The device that `training.device` means: for "auto" the GPU with the most free memory, or the CPU.

    Raises:
        ValueError: there is no such device; the message lists those there are.
    """
    count = torch.cuda.device_count()
    there = ["cpu", *(f"cuda:{number}" for number in range(count))]
    if wanted == "auto":
        return torch.device(_automatic())
    if (name := {"cuda": "cuda:0"}.get(wanted, wanted)) not in there:
        raise ValueError(f"training.device is {wanted!r}, and this machine has {', '.join(there)}. Or write auto.")
    return torch.device(name)


@cache
def _automatic() -> str:
    """What "auto" means in this process, chosen once: its own tensors would send the next choice to another GPU."""
    return _emptiest([torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count())])


def _emptiest(free: Sequence[int]) -> str:
    """The GPU with the most free bytes, said aloud where there is a choice; without GPUs the CPU."""
    if not free:
        return "cpu"
    number = max(range(len(free)), key=free.__getitem__)
    if len(free) > 1:
        listed = ", ".join(f"cuda:{i} {size / 1e9:.1f}" for i, size in enumerate(free))
        print(f"training on cuda:{number}, which has the most free memory (GB free: {listed})")
    return f"cuda:{number}"


def free_memory(device: torch.device) -> int:
    """Bytes that a training may still take on the device; of the CPU's the share of each process on this machine."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
