"""Looking into a model, what its input becomes on the way; and into its training, curve by curve."""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.func import functional_call

from helpers.config import Config
from helpers.data.dataset import Loaders
from helpers.model.heads import LinearBaseline1D, LinearBaseline2D, Specformer1D
from helpers.training.devices import make_accelerator
from helpers.training.loop import parameter_groups
from helpers.training.tasks import make_task


def trace_shapes(model: nn.Module, batch: Mapping[str, Any]) -> pd.DataFrame:
    """What a batch becomes on its way through a Specformer or linear baseline: the shapes that one forward pass met.

    One row a stage, with what happens there (as an einops pattern where axes move) and the numbers a sample.
    """
    found: dict[str, tuple[Tensor, str]] = {"pixels": (batch["ts"], "(b c t h w)")}

    def note(name: str, module: nn.Module, how: str) -> None:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            # of a baseline's only layer, what goes in
            found[name] = inputs[0] if isinstance(module, nn.Linear) else output, how

        hooks.enter_context(module.register_forward_hook(hook))

    with ExitStack() as hooks, torch.no_grad():
        if isinstance(model, LinearBaseline1D):
            note("features", model.head, "b c t h w -> b (c t), the mean over h and w")
        elif isinstance(model, LinearBaseline2D):
            note("features", model.head, "b c t h w -> b h w (c t)")
        else:
            encoder, blocks = model.encoder, model.encoder.backbone
            p, grid = encoder.patch_size, encoder.grid
            how = f"b c t (gy {p}) (gx {p}) -> b (gy gx) (c t {p} {p}), then a linear map to d"
            note("patches", encoder.embedding.patch_embed.proj, how)
            note("tokens", encoder.embedding, f"+ position on the {grid} x {grid} grid")
            if spectral := len(blocks.blocks_spectral_gating):
                how = f"b (gy gx) d -> b gy gx d, Fourier filter, and back; {spectral} blocks"
                note("spectral blocks", blocks.blocks_spectral_gating[-1], how)
            note("attention blocks", encoder, f"long-short attention; {len(blocks.blocks_attention)} blocks")
        if getattr(model, "unembed", None) is not None:
            u = model.unembed.unembed[0].upscale
            how = f"a linear map to (c {u} {u}), then b (gy gx) (c {u} {u}) -> b c (gy {u}) (gx {u})"
            note("decoder", model.unembed.unembed[0], how)
        if isinstance(model, Specformer1D):
            how = "b c h w -> b (3 c)" if model.pooling == "forecast" else "b l d -> b d"
            note(f"{model.pooling} pooling", model.pool, how)
        output = model(batch)
    found["output"] = output, "(b k)" if output.ndim == 2 else "(b c h w)"
    table = {name: (tuple(x.shape), how, x[0].numel()) for name, (x, how) in found.items()}
    return pd.DataFrame.from_dict(table, orient="index", columns=["shape", "how", "numbers a sample"])


# ---- Learning rates, read off curves
def range_test(model: nn.Module, loaders: Loaders, cfg: Config) -> pd.DataFrame:
    """Learning-rate range test (Smith 2015, arXiv:1506.01186): raise the rate at every step and watch the loss.

    It grows geometrically between the `diagnostics.range_lrs`; the test stops early when the smoothed loss is four
    times its lowest. The model keeps its weights. One row a step: `lr`, `loss` of that batch as a share of its loss
    before the test, and `smoothed`, the same of the batches so far. (Labels have long tails: losses of batches differ
    by factors, whatever the model.)
    """
    accelerator, task = make_accelerator(cfg), make_task(cfg, loaders)
    model.to(accelerator.device).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = accelerator.prepare(torch.optim.AdamW(parameter_groups(model, cfg)))  # with the loss scaler of fp16
    rates, losses = np.geomspace(*cfg.diagnostics.range_lrs, cfg.diagnostics.range_steps), []
    batches = chain.from_iterable(repeat(accelerator.prepare(loaders.train)))
    for lr, batch in zip(rates, batches, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = lr
        with accelerator.autocast():
            loss = task.loss(model(batch), batch["target"])
            unchanged = task.loss(functional_call(model, before, (batch,)), batch["target"])
        losses.append((loss.item(), unchanged.item()))
        now, then = pd.DataFrame(losses).ewm(alpha=0.1).mean().to_numpy().T
        smoothed = now / then
        if not math.isfinite(losses[-1][0]) or smoothed[-1] > 4 * smoothed.min():
            break
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    model.load_state_dict(before, strict=False)
    return pd.DataFrame({"lr": rates[: len(losses)], "loss": [a / b for a, b in losses], "smoothed": smoothed})


@dataclass(frozen=True)
class Verdict:
    """What a training curve says."""

    word: str  # healthy, too small (flat), too large (erratic), diverged, overfitting or below zero
    measured: str  # with the limits
    advice: str

    def __str__(self) -> str:
        return f"{self.word}: {self.measured}. {self.advice}"


def judge_curve(table: pd.DataFrame, cfg: Config, diverged: bool = False) -> Verdict:
    """Read `history.table` of a training by stated rules; the first that holds is the verdict.

    All numbers are shares of the same loss before training (epoch 0). *rise* is the highest training loss; *jumps* the
    mean rise of the training loss from one epoch to the next; *fall* how much the training loss has fallen; *turn* how
    far the validation loss ends above its lowest; *gap* how many times as high as the training loss it ends.
    `diverged`: the run stopped because the loss was no longer finite.
    """
    limits, lowest = cfg.diagnostics, float(table[["train_loss", "val_loss"]].min().min())
    if lowest < 0:
        advice = "No error is, nor a cross-entropy, unless targets are not 0 and 1: look at the labels."
        return Verdict("below zero", f"the loss fell to {lowest:.3g}", f"{advice} The rules cannot judge such a loss.")
    train, val = (table[name] / table[name].iloc[0] for name in ("train_loss", "val_loss"))
    rise = math.inf if diverged else float(train.max())
    jumps = float(train.iloc[1:].diff().clip(lower=0).mean()) if len(train) > 2 else 0.0
    train_end, val_end = float(train.iloc[-2:].mean()), float(val.iloc[-2:].mean())
    fall, turn, gap = 1 - train_end, val_end - float(val.min()), val_end / max(train_end, 1e-9)
    if rise > limits.diverged:
        word, advice = "diverged", "Divide training.lr by ten."
    elif jumps > limits.erratic or fall < -limits.flat:
        word, advice = "too large (erratic)", "Divide training.lr by three."
    elif fall < limits.flat:
        word, advice = "too small (flat)", "Triple training.lr, or train longer."
    elif turn > limits.overfitting or gap > limits.gap:
        word, regime = "overfitting", cfg.training.regime if cfg.experiment == "finetune" else "probe"
        decay = "training.head_weight_decay" if regime == "probe" else "training.weight_decay"
        raised = f"lora.dropout or {decay}, lower lora.rank" if regime == "lora" else decay
        advice = f"Keep the best epoch; raise {raised}, or get more samples."
    else:
        word, advice = "healthy", "Nothing to mend."
    measures = {"rise": rise, "jumps": jumps, "fall": fall, "turn": turn, "gap": gap}
    allowed = (limits.diverged, limits.erratic, limits.flat, limits.overfitting, limits.gap)
    pairs = zip(measures.items(), allowed, strict=True)
    measured = ", ".join(f"{name} {value:.2g} (limit {limit:g})" for (name, value), limit in pairs)
    return Verdict(word, measured, advice)
