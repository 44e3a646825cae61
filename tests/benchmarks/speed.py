"""Surya's 366M encoder: share of the machine's matrix rate, memory, adapters, loading, cost as work grows."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from unittest import mock

import loralib
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.config import load_config
from helpers.model import lora
from helpers.model.checkpoint import load_filtered
from helpers.model.encoder import SuryaEncoder
from helpers.model.heads import Specformer2D
from helpers.model.lora import LoRALinear, apply_lora, hold_frozen

CFG = load_config(profile="surya")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LORA = CFG.lora.model_dump() | {"rank": 8}
SIDES = (512, 1024, 2048, *([4096] if DEVICE.type == "cuda" else []))
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def matrix_products(side: int) -> float:
    """Floating-point operations of the matrix products in one forward pass of one sample."""
    model, tokens = CFG.model, (side // CFG.model.patch_size) ** 2
    width, attention = model.embed_dim, model.depth - model.n_spectral_blocks
    patch = 2 * len(CFG.data.channels) * model.time_dim * model.patch_size**2 * width
    return tokens * (16 * model.depth * width**2 + 8 * attention * width**2 + patch)


def alternately(repeats: int, runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each run, taken in turns, so that a busy machine is busy for all; the first turn warms up."""
    times = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: median(taken[1:]) for name, taken in times.items()}


def large_product(precision: str) -> tuple[Callable[[], Tensor], float]:
    """The product that shares are counted against, F.linear of (rows, 1280) with (5120, 1280), and its operations."""
    rows = 4096 if DEVICE.type == "cpu" else 65536
    x, weight = (torch.randn(size, 1280, device=DEVICE, dtype=DTYPES[precision]) for size in (rows, 5120))
    return torch.no_grad()(lambda: F.linear(x, weight)), 2 * rows * 1280 * 5120


def peak_gb() -> float:
    """Largest memory of this process so far: of the device, else resident (imports, weights and mapped files too)."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def build(side: int, **changes) -> SuryaEncoder:
    torch.manual_seed(0)
    return SuryaEncoder(**CFG.encoder_arguments() | {"img_size": side, "recompute_blocks": ()} | changes)


def images(side: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, len(CFG.data.channels), CFG.model.time_dim, side, side, device=DEVICE)


def step(model: nn.Module, ts: Tensor, precision: str = "bf16") -> None:
    model.zero_grad()
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16"):
        tokens = model(ts)
    tokens.square().mean().backward()


# --------------------------------------------------------------------------------------------------------------------
# Measurements: each runs in a process of its own, for its memory, and returns numbers
# --------------------------------------------------------------------------------------------------------------------
def measure_work(repeats: int, side: int, batch=1, precision="bf16", checkpointed=False, train=True):
    """A LoRA step, or a forward pass: seconds, share of the large product's rate, peak memory."""
    layers = range(CFG.model.depth) if checkpointed else ()
    model = build(side, recompute_blocks=layers)
    model = apply_lora(model, **LORA) if train else model.requires_grad_(False)
    model = hold_frozen(model, DTYPES[precision]).to(DEVICE)
    ts, (product, operations) = images(side, batch), large_product(precision)

    def forward() -> None:
        with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16"):
            model.eval()(ts)

    run = (lambda: step(model, ts, precision)) if train else forward
    run()
    seconds = alternately(repeats, {"product": product, "run": run})
    rate, passes = operations / seconds["product"], 3 if train else 1  # a backward pass counts as two forward passes
    share = passes * batch * matrix_products(side) / seconds["run"] / rate
    return {"run": seconds["run"], "share": share, "rate": rate, "peak": peak_gb()}


def measure_error(repeats: int) -> dict[str, float]:
    """Relative L2 error of the tokens in bfloat16."""
    model, ts = build(1024).to(DEVICE).eval(), images(1024)
    with torch.no_grad():
        exact = model(ts)
        hold_frozen(model.requires_grad_(False), torch.bfloat16)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return {"error": ((model(ts) - exact).norm() / exact.norm()).item()}


def measure_adapters(repeats: int) -> dict[str, float]:
    """A step with adapters, and one without in which the gradient flows through every block to the patch embedding."""
    models = [build(1024).requires_grad_(False), apply_lora(build(1024), **LORA)]
    models, ts = [hold_frozen(model, torch.bfloat16).to(DEVICE) for model in models], images(1024)
    models[0].embedding.patch_embed.proj.bias.requires_grad_()
    bare, adapted = (lambda model=model: step(model, ts) for model in models)
    return alternately(repeats, {"bare": bare, "adapted": adapted})


def measure_dropout(repeats: int) -> dict[str, float]:
    """A step with the adapters' own dropout (at the end of lora.py), and with that of torch in its place."""
    model, ts = hold_frozen(apply_lora(build(1024), **LORA), torch.bfloat16).to(DEVICE), images(1024)

    def torchs() -> None:
        plain = lambda x, weight, p: F.linear(F.dropout(x, p), weight)  # noqa: E731
        with mock.patch.object(lora, "dropout_linear", plain):
            step(model, ts)

    return alternately(repeats, {"ours": lambda: step(model, ts), "torchs": torchs})


@torch.no_grad()
def measure_qkv(repeats: int) -> dict[str, float]:
    """Forward pass of the fused qkv: the frozen product, ours, and loralib's own layer."""
    width, x = CFG.model.embed_dim, torch.randn(4096, CFG.model.embed_dim, device=DEVICE, dtype=torch.bfloat16)
    frozen = nn.Linear(width, 3 * width, bias=False)
    ours = LoRALinear(frozen, LORA["rank"], LORA["alpha"], LORA["dropout"], (True, True, True)).eval()
    theirs = loralib.MergedLinear(width, 3 * width, LORA["rank"], LORA["alpha"], enable_lora=[True] * 3, bias=False)
    frozen, ours, theirs = (layer.to(DEVICE, torch.bfloat16) for layer in (frozen, ours, theirs))
    return alternately(8 * repeats, {"frozen": lambda: frozen(x), "ours": lambda: ours(x), "theirs": lambda: theirs(x)})


def write_checkpoint(repeats: int, path: str) -> dict[str, float]:
    """A full-size checkpoint of random numbers, with positions and decoder, as the release has it."""
    with torch.device("meta"):
        model = Specformer2D(build(CFG.data.native_size), out_chans=len(CFG.data.channels))
    state = {key.removeprefix("encoder."): torch.randn(value.shape) for key, value in model.state_dict().items()}
    state["embedding.pos_embed"] = torch.randn(model.encoder.embedding.pos_embed.shape)
    torch.save(state, path)
    return {}


def measure_loading(repeats: int, path: str) -> dict[str, float]:
    """`load_filtered` into the model at 1024 x 1024, against a plain read of the file (both from the page cache)."""
    model, buffer = build(1024), bytearray(2**24)

    def read() -> None:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    seconds = alternately(repeats, {"read": read, "load": lambda: load_filtered(model, path)})
    size = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]) / 1e9
    return {**seconds, "peak": peak_gb(), "model": size, "file": Path(path).stat().st_size / 1e9}


def alone(measure: Callable[..., dict[str, float]], repeats: int, *words, **settings) -> dict[str, float]:
    """The measurement, made in a process of its own."""
    task = json.dumps([measure.__name__, [repeats, *words], settings])
    done = subprocess.run([sys.executable, __file__, "--one", task], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# --------------------------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------------------------
def row(name: str, value: str, target: str = "") -> None:
    print(f"{name:58}{value:>24}  {target}", flush=True)


def machine() -> str:
    """The processor, or the accelerator, with the number of cores and threads."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    instructions = " with AMX" if any("amx_bf16" in line for line in lines) else ""
    return f"{model}{instructions}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def encoder_rows(repeats: int) -> dict[str, float]:
    """Forward passes and steps at 1024 x 1024; returns the step, which is a row of the growth, too."""
    for precision, target in (("fp32", "at least 0.83"), ("bf16", "at least 0.50")):
        found = alone(measure_work, repeats, 1024, precision=precision, train=False)
        row(f"forward {precision}, 1024 x 1024", f"{found['run']:.2f} s")
        row(f"  share of F.linear's {found['rate'] / 1e12:.2f} Tflop/s", f"{found['share']:.2f}", target)
    row("  relative error of bf16", f"{alone(measure_error, 1)['error']:.2%}", "at most 0.6%")
    found = alone(measure_work, repeats, 1024)
    spared = alone(measure_work, repeats, 1024, checkpointed=True)
    row("LoRA step bf16, 1024 x 1024", f"{found['run']:.2f} s  {found['peak']:.2f} GB", "at most 4.0 GB")
    row(f"  share of F.linear's {found['rate'] / 1e12:.2f} Tflop/s", f"{found['share']:.2f}", "at least 0.35")
    row("  every block checkpointed", f"{spared['run']:.2f} s  {spared['peak']:.2f} GB", "at most 3.0 GB")
    both = alone(measure_adapters, repeats)
    row("  ratio to the step without adapters", f"{both['adapted'] / both['bare']:.2f}", "at most 1.25")
    dropout = alone(measure_dropout, repeats)
    row("  ratio to the step with torch's dropout", f"{dropout['ours'] / dropout['torchs']:.2f}", "at most 0.95")
    layer = alone(measure_qkv, repeats)
    row("fused qkv with adapters / frozen product", f"{layer['ours'] / layer['frozen']:.2f}", "at most 1.25")
    row("  loralib's MergedLinear", f"{layer['theirs'] / layer['frozen']:.2f}")
    return found


def loading_rows(repeats: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "surya.pt")
        alone(write_checkpoint, 1, path)
        found = alone(measure_loading, repeats, path)
    limit = 1.3 * (found["file"] + found["model"])
    row(f"load_filtered, {found['file']:.2f} GB into {found['model']:.2f} GB", f"{found['load']:.2f} s")
    row("  peak memory", f"{found['peak']:.2f} GB", f"at most {limit:.2f} GB")
    row("  plain read of the file", f"{found['read']:.2f} s")


def growth_rows(repeats: int, known: dict[str, float]) -> None:
    for side in SIDES:
        found = known if side == 1024 else alone(measure_work, repeats, side, checkpointed=side > 2048)
        each = f"{1e6 * found['run'] / (side // CFG.model.patch_size) ** 2:.0f} microseconds a token"
        name = f"LoRA step bf16, {side} x {side}{', checkpointed' * (side > 2048)}"
        row(name, f"{found['run']:.2f} s  {found['peak']:.2f} GB", f"{each}, {found['share']:.2f} of the rate")


def gpu_rows(repeats: int) -> None:
    """On a GPU: batches, with and without activation checkpointing."""
    for side, batch in ((1024, 1), (1024, 8), (1024, 16), (4096, 1)):
        for checkpointed in (False, True):
            name = f"LoRA step {side}, batch {batch}{', checkpointed' * checkpointed}"
            try:
                found = alone(measure_work, repeats, side, batch=batch, checkpointed=checkpointed)
            except subprocess.CalledProcessError:
                row(name, "failed (its message is above)")
                continue
            rest = f"{found['share']:.2f} of the rate"
            row(name, f"{batch / found['run']:.2f} /s  {found['peak']:.1f} GB", rest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    if asked.one:
        name, words, settings = json.loads(asked.one)
        return print(json.dumps(globals()[name](*words, **settings)))
    print(f"{machine()}; torch {torch.__version__}; medians of {asked.repeats}")
    found = encoder_rows(asked.repeats)
    loading_rows(asked.repeats)
    growth_rows(asked.repeats, found)
    if DEVICE.type == "cuda":
        gpu_rows(asked.repeats)


if __name__ == "__main__":
    main()
