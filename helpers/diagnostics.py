"""Looking into a model and its training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from einops import reduce
from torch import Tensor, nn


def input_sensitivity(model: nn.Module, batch: Mapping[str, Any], patch_size: int, output: int = 0) -> Tensor:
    """How strongly each patch and channel moves the prediction: mean |d output / d input| over pixels and frames.

    Args:
        model: takes the batch dict, returns (B, K).
        batch: `ts` (B, C, T, H, W), normalised.
        patch_size: side of the squares to average over, in pixels.
        output: which of the K outputs.

    Returns:
        (B, C, H / patch_size, W / patch_size), in standardised target units per normalised input unit.
    """
    ts = batch["ts"].detach().to(next(model.parameters()).device, copy=True).requires_grad_()
    model.eval()
    prediction = model({**batch, "ts": ts})[:, output].sum()  # samples do not mix, so the sum keeps them apart
    (gradient,) = torch.autograd.grad(prediction, ts)
    return reduce(gradient.abs(), "b c t (gy y) (gx x) -> b c gy gx", "mean", y=patch_size, x=patch_size).cpu()
