"""Estimates of what the released tasks need at 1024 and 4096 pixels: the table of CONTRIBUTING.md, without a GPU."""

import math

import torch
from accelerate import init_empty_weights

from helpers.config import load_config
from helpers.data.frames import COMPRESSED, FILE_GB
from helpers.model.encoder import SuryaEncoder
from helpers.model.heads import specformer
from helpers.model.lora import adapt
from helpers.shared import GB
from helpers.training.memory import estimate_memory

TASKS = {"flare_24h": 1, "solar_wind": 1, "ar_segmentation": 1, "euv_spectra": 1343}  # and how many numbers
# Python with torch and CUDA takes two GB, the checkpoint 1.5, frames in memory up to data.memory_cache_gb; a loader
# worker takes half a GB and holds up to three batches
PROCESS_GB, CHECKPOINT_GB, WORKER_GB = 2.0, 1.5, 0.5
HEAD = """\
| task | profile | frames | to read | to store | GPU memory | with every block recomputed | RAM |
| --- | --- | --- | --- | --- | --- | --- | --- |"""


def sizes(task: str, profile: str) -> dict[str, float]:
    """GB of one training as config.yaml has it: to `read` and to `store`, on the GPU (`step`, and `least` with every
    block recomputed), and `ram`; and the number of `frames`.
    """
    cfg = load_config(profile=profile, task=task, experiment="finetune")
    with init_empty_weights():  # shapes without numbers
        model = adapt(specformer(SuryaEncoder(**cfg.encoder_arguments()), cfg, TASKS[task]), cfg)
    model.to_empty(device="cpu")
    own, side, channels, times = cfg.training, cfg.data.image_size, len(cfg.data.channels), cfg.model.time_dim
    ts = torch.empty(own.batch_size, channels, times, side, side)
    steps = []
    for blocks in (0, cfg.model.depth):
        model.encoder.backbone.recompute_blocks = frozenset(range(blocks))
        steps.append(math.ceil((estimate_memory(model, {"ts": ts}, cfg).total + ts.nbytes) / GB))
    frames = times * (own.max_train_samples + own.max_val_samples + own.max_test_samples)
    workers = own.loader_workers * (WORKER_GB + 3 * ts.nbytes / GB)
    return {
        "frames": frames,
        "read": frames * FILE_GB * cfg.data.native_size**2,
        "store": frames * 2 * COMPRESSED * channels * side**2 / GB,
        "step": steps[0],
        "least": steps[1],
        "ram": math.ceil(PROCESS_GB + CHECKPOINT_GB + cfg.data.memory_cache_gb + workers),
    }


def row(task: str, profile: str) -> str:
    """One line of the table."""
    s = sizes(task, profile)
    numbers = f"{s['read']:.0f} GB | {s['store']:.1f} GB | {s['step']} GB | {s['least']} GB | {s['ram']} GB"
    return f"| `{task}` | `{profile}` | {s['frames']} | {numbers} |"


def main() -> None:
    """Print the table."""
    print(HEAD)
    for task in TASKS:
        for profile in ("surya", "surya_4k"):
            print(row(task, profile), flush=True)


if __name__ == "__main__":
    main()
