"""Looking into a model: what its input becomes on the way, and what moves its output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from einops import reduce
from torch import Tensor, nn

from helpers.heads import LinearBaseline1D, Specformer1D, Specformer2D


def input_sensitivity(model: nn.Module, batch: Mapping[str, Any], patch_size: int, output: int = 0) -> Tensor:
    """How strongly each patch and channel moves the prediction: mean |d output / d input| over pixels and frames.

    Args:
        model: takes the batch dict, returns (B, K) or (B, C, H, W).
        batch: `ts` (B, C, T, H, W), normalised.
        patch_size: side of the squares to average over, in pixels.
        output: which of the K outputs, or of the C channels (of an image, all pixels together).

    Returns:
        (B, C, H / patch_size, W / patch_size), in standardised target units per normalised input unit.
    """
    ts = batch["ts"].detach().to(next(model.parameters()).device, copy=True).requires_grad_()
    model.eval()
    prediction = model({**batch, "ts": ts})[:, output].sum()  # samples do not mix, so the sum keeps them apart
    (gradient,) = torch.autograd.grad(prediction, ts)
    return reduce(gradient.abs(), "b c t (gy y) (gx x) -> b c gy gx", "mean", y=patch_size, x=patch_size).cpu()


def trace_shapes(model: nn.Module, batch: Mapping[str, Any]) -> pd.DataFrame:
    """What a batch becomes on its way through a model: the shapes that one forward pass really met.

    Args:
        model: a Specformer1D or 2D, or a linear baseline.
        batch: `ts` (B, C, T, H, W).

    Returns:
        One row a stage: `shape`, what happens there (as an einops pattern where axes move), and `numbers` a sample.
    """
    rows: list[tuple[str, Tensor, str]] = [("pixels", batch["ts"], "(b c t h w)")]

    def note(name: str, how: str) -> Any:
        return lambda _, inputs, output: rows.append((name, inputs[0] if name == "features" else output, how))

    hooks = [module.register_forward_hook(note(name, how)) for name, module, how in _stages(model)]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            output = model(batch)
            rows.append(("output", output, "(b k)" if output.ndim == 2 else "(b c h w)"))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    table = {name: (tuple(x.shape), how, x[0].numel()) for name, x, how in rows}
    return pd.DataFrame.from_dict(table, orient="index", columns=["shape", "how", "numbers a sample"])


def _stages(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Modules of a model whose outputs are worth a row: name, module, and how its output comes about."""
    encoder = getattr(model, "encoder", None)
    if encoder is None:
        means = "b c t h w -> b (c t), the mean over h and w"
        how = means if isinstance(model, LinearBaseline1D) else "b c t h w -> b h w (c t)"
        return [("features", model.head, how)]  # the input of its only layer
    p, grid, blocks = encoder.patch_size, encoder.grid, encoder.backbone
    cut = f"b c t (gy {p}) (gx {p}) -> b (gy gx) (c t {p} {p}), then a linear map to d"
    stages = [("patches", encoder.embedding.patch_embed.proj, cut)]
    stages.append(("tokens", encoder.embedding, f"+ position on the {grid} x {grid} grid"))
    if len(blocks.blocks_spectral_gating):
        how = f"b (gy gx) d -> b gy gx d, Fourier filter, and back; {len(blocks.blocks_spectral_gating)} blocks"
        stages.append(("spectral blocks", blocks.blocks_spectral_gating[-1], how))
    stages.append(("attention blocks", encoder, f"long-short attention; {len(blocks.blocks_attention)} blocks"))
    if isinstance(model, Specformer2D):
        u = model.unembed.unembed[0].upscale
        how = f"a linear map to (c {u} {u}), then b (gy gx) (c {u} {u}) -> b c (gy {u}) (gx {u})"
        stages.append(("decoder", model.unembed.unembed[0], how))
    elif isinstance(model, Specformer1D):
        stages.append((f"{model.pooling} pooling", model.pool, "b l d -> b d"))
    return stages
