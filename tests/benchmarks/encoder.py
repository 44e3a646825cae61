"""Time of a training step of the encoder: python tests/benchmarks/encoder.py [--img-size 128 ...].

Rows: all weights training, LoRA, LoRA with every block checkpointed; in float32 and bfloat16 autocast. The minimum over
the repeats is printed, because other work on the machine only ever adds.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from helpers.encoder import SuryaEncoder  # noqa: E402
from helpers.heads import Specformer1D  # noqa: E402
from helpers.lora import apply_lora, trainable_summary  # noqa: E402


def milliseconds(run: Callable[[], None], device: torch.device, repeats: int) -> float:
    """Shortest time of `run` after one warm-up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 1e3 * min(times[1:])


def run_forward(model: Specformer1D, batch: dict[str, torch.Tensor], bf16: bool) -> torch.Tensor:
    with torch.autocast(batch["ts"].device.type, dtype=torch.bfloat16, enabled=bf16):
        return model(batch)


def run_step(model: Specformer1D, batch: dict[str, torch.Tensor], bf16: bool) -> None:
    model.zero_grad()
    run_forward(model, batch, bf16).square().mean().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = dict(img_size=128, patch_size=8, in_chans=13, time_dim=2)
    sizes |= dict(embed_dim=64, depth=5, n_spectral_blocks=2, num_heads=4)
    for name, value in {**sizes, "batch": 8, "repeats": 10, "rank": 8}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    args = vars(parser.parse_args())
    config = {name: args[name] for name in sizes}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ts = torch.randn(args["batch"], config["in_chans"], config["time_dim"], config["img_size"], config["img_size"])
    batch = {"ts": ts.to(device)}
    print(f"{config}\nbatch {args['batch']} on {device}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'model':22}{'trainable':>12}{'precision':>11}{'forward ms':>12}{'step ms':>10}")
    every = range(config["depth"])
    for name, layers, lora in (("all weights", (), False), ("LoRA", (), True), ("LoRA, checkpointed", every, True)):
        model = Specformer1D(SuryaEncoder(**config, checkpoint_layers=layers))
        model = (apply_lora(model, rank=args["rank"]) if lora else model).to(device)
        for precision in ("fp32", "bf16"):
            forward, step = (partial(f, model, batch, precision == "bf16") for f in (run_forward, run_step))
            with torch.no_grad():
                alone = milliseconds(forward, device, args["repeats"])
            whole = milliseconds(step, device, args["repeats"])
            print(f"{name:22}{trainable_summary(model).trainable:>12,}{precision:>11}{alone:>12.1f}{whole:>10.1f}")


if __name__ == "__main__":
    main()
