"""Pretrain the tiny checkpoint again, and write it to ARGS=FILE (most of an hour on two cores)."""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from helpers.channels import CHANNELS, Scaler, load_scalers, normalise, stack_scalers
from helpers.config import Config, load_config
from helpers.data.synthetic import SyntheticSun
from helpers.data.workers import worker_pool
from helpers.model.encoder import SuryaEncoder
from helpers.model.heads import Specformer2D
from helpers.shared import atomic_write
from helpers.tools.command import run
from helpers.tools.verify import configure, measure


def pretrain(
    cfg: Config,
    path: Path,
    *,
    seed=0,
    suns=256,
    samples=10240,
    held_out=128,
    epochs=14,
    batch_size=16,
    lr=2e-3,
) -> dict[str, float]:
    """Pretrain the configured encoder on synthetic Suns with Surya's own pretext, the forecast of the next frame.

    Args:
        cfg: `model` (all 13 channels, two frames), `data` and `synthetic.workers` are read.
        path: the checkpoint to write: a flat float32 state_dict with the keys of the released one.

    Returns:
        Mean squared errors in normalised units on Suns that were not trained on: `before`, `after`, `persistence` (the
        last frame stays) and `mean_frame` (their own average frame: the best constant), and the `seconds` of training.
    """
    torch.manual_seed(seed)
    frames = _forecast_samples(cfg, suns, samples, seed)  # (N, 13, 3, H, W) normalised float16
    unseen = _forecast_samples(cfg, suns, held_out, seed + suns)
    model = Specformer2D(SuryaEncoder(**cfg.encoder_arguments()), out_chans=len(CHANNELS))
    report = {"before": _forecast_error(model, unseen)}
    started = time.perf_counter()
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)
    steps = epochs * (len(frames) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    zero = torch.from_numpy(normalise(np.zeros((len(CHANNELS), 1, 1, 1), np.float32), _scaler()))  # of 0 gauss
    model.train()
    for _ in (bar := tqdm(range(epochs), "pretraining", unit="epoch")):
        order = torch.randperm(len(frames))[: steps // epochs * batch_size]
        for index in order.split(batch_size):
            batch = frames[index].float()
            if torch.rand(()) < 0.5:
                batch = _mirrored(batch, zero)
            loss = F.mse_loss(model({"ts": batch[:, :, :2]}), batch[:, :, 2])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    report |= {"seconds": time.perf_counter() - started, "after": _forecast_error(model, unseen)}
    future = unseen[:, :, 2].float()
    report["persistence"] = F.mse_loss(unseen[:, :, 1].float(), future).item()
    report["mean_frame"] = F.mse_loss(future.mean(0).expand_as(future), future).item()
    state = {key.removeprefix("encoder."): value.detach().clone() for key, value in model.state_dict().items()}
    # a function of the grid, but the release has it
    state["embedding.pos_embed"] = model.encoder.embedding.pos_embed.clone()
    with atomic_write(path) as temporary:
        torch.save(state, temporary)
    return report


def _scaler() -> Scaler:
    return stack_scalers(load_scalers(), CHANNELS, trailing=3)


def _mirrored(frames: Tensor, zero: Tensor) -> Tensor:
    """North and south exchanged, (B, 13, T, H, W) normalised: fields along the mirror change sign about `zero`."""
    turned = torch.tensor([name in ("hmi_m", "hmi_bx", "hmi_bz") for name in CHANNELS])[:, None, None, None]
    return torch.where(turned, 2 * zero - frames, frames).flip(3)


def _forecast_samples(cfg: Config, suns: int, count: int, seed: int) -> Tensor:
    """Frames at -60, 0 and +60 minutes of random hours of `suns` Suns, (count, 13, 3, H, W) normalised float16."""
    jobs = [(seed + i % suns, i, cfg.data.native_size, cfg.data.reduce) for i in range(count)]
    with worker_pool(cfg.synthetic.workers) as pool:
        samples = list(tqdm(pool.map(_forecast_sample, jobs, chunksize=8), "pretraining frames", count, unit="sample"))
    return torch.from_numpy(np.stack(samples))


def _forecast_sample(job: tuple[int, int, int, int]) -> np.ndarray:
    seed, number, side, pooling = job
    sun = SyntheticSun(10_000 + seed, 60 * 24)  # far from the seeds of the course
    rng = np.random.default_rng([seed, number])
    hour = rng.integers(1, 59 * 24)
    images = [sun.frame(hour + step, side) for step in (-1, 0, 1)]
    frames = torch.from_numpy(np.stack(images, axis=1))  # (13, 3, N, N)
    return normalise(F.avg_pool2d(frames, pooling), _scaler()).half().numpy()


@torch.no_grad()
def _forecast_error(model: Specformer2D, samples: Tensor) -> float:
    model.eval()
    errors = [F.mse_loss(model({"ts": s[:, :, :2].float()}), s[:, :, 2].float()) * len(s) for s in samples.split(16)]
    return (sum(errors) / len(samples)).item()


def main() -> None:
    """Make the tiny checkpoint again: `python tests/benchmarks/pretrain_tiny.py helpers/data/surya.tiny.pt`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("path", type=Path, help="the checkpoint to write")
    path = parser.parse_args().path.absolute()
    report = pretrain(load_config(profile="tiny"), path)
    for name, value in report.items():
        print(f"{name:12s} {value:.4f}")
    write_losses(path)


def write_losses(path: Path) -> None:
    """The losses that `make verify` compares with, beside the checkpoint."""
    cfg = configure({"profile": "tiny", "parameters": {"model.weights": str(path)}})
    losses = measure(cfg)["forecast"].mean(axis=1).round(7).tolist()
    path.with_suffix(".losses.json").write_text(json.dumps({"image_size": cfg.data.image_size, "losses": losses}))


if __name__ == "__main__":
    run(main)
