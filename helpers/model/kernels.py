"""Two products of the adapters, made cheap: each stands behind one name in lora.py, and may be skipped by readers.

Measured: a LoRA step of one attention block (width 1280, 4096 tokens, rank 8), float32, one thread of a CPU with AVX2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def dropout_linear(x: Tensor, weight: Tensor, p: float) -> Tensor:
    """F.linear(F.dropout(x, p), weight), the same in distribution: in 0.91 of the time, as F.dropout draws floats."""
    if p == 0:
        return F.linear(x, weight)
    # 16 random bits an element, drawn 64 at once
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    dropped = (bits.view(torch.int16)[: x.numel()] < round((p - 0.5) * 2**16)).view(x.shape)
    return F.linear(x.masked_fill(dropped, 0), weight) / (1 - p)


def add_linear(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y + F.linear(x, weight), written into y: in 0.88 of the time, as `recompute` leaves out a last product."""
    return y.flatten(0, -2).addmm_(x.flatten(0, -2), weight.t()).view(y.shape)
