"""Which device computes, in which precision, and how much memory it has."""

import os
from functools import cache

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState

from helpers import shared
from helpers.config import Config


def make_accelerator(cfg: Config) -> Accelerator:
    """An Accelerator on `training.device` in `training.precision`; a ValueError where these do not fit the machine."""
    # Accelerate keeps the first device and precision of a process, and another cell may ask for another one
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # one of several processes: Accelerate knows which has which GPU
        cpu = cfg.training.device == "cpu" or not torch.cuda.is_available()
    else:
        device = choose_device(cfg.training.device)
        cpu, os.environ["ACCELERATE_TORCH_DEVICE"] = device.type == "cpu", str(device)
    if cfg.training.precision == "fp16" and cpu:
        raise ValueError("training.precision: fp16 needs a GPU, and this runs on cpu: set it to bf16 or fp32.")
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision={"fp32": "no"}.get(cfg.training.precision, cfg.training.precision),
        gradient_accumulation_steps=cfg.training.accumulation,
        dataloader_config=DataLoaderConfiguration(split_batches=True),  # batch_size is that of all processes together
    )
    if cfg.training.batch_size % accelerator.num_processes:
        raise ValueError(f"training.batch_size must be a multiple of {accelerator.num_processes}, the processes here.")
    return accelerator


@cache
def choose_device(wanted: str) -> torch.device:
    """The device that `training.device` means: for "auto" the GPU with the most free memory, or the CPU.

    Chosen once a process: the tensors of the first choice would send the next one away. Others are a ValueError.
    """
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if wanted == "auto" and len(gpus) > 1:
        free = {gpu: torch.cuda.mem_get_info(gpu)[0] for gpu in gpus}
        wanted = max(gpus, key=free.get)
        listed = ", ".join(f"{gpu} {size / 1e9:.1f}" for gpu, size in free.items())
        print(f"training on {wanted}, which has the most free memory (GB free: {listed})")
    name = {"auto": "cuda:0" if gpus else "cpu", "cuda": "cuda:0"}.get(wanted, wanted)
    if name not in (there := ["cpu", *gpus]):
        raise ValueError(f"training.device is {wanted!r}, and this machine has {', '.join(there)}. Or write auto.")
    return torch.device(name)


def free_memory(device: torch.device) -> int:
    """Bytes that a training may still take on the device; of the CPU's the share of each process on this machine."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return shared.memory()[0] // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
