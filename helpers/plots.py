"""Every figure of the notebooks. Functions return the Figure; nothing is shown or saved here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import avg_pool2d

from helpers.channels import UNITS, Scaler, colormap, normalise, standardise, to_signed_log
from helpers.config import Config
from helpers.training import History, Predictions

SPLIT_COLORS = {"train": "tab:blue", "val": "tab:orange", "test": "tab:green"}


def plot_channels(physical: Tensor | np.ndarray, channels: Sequence[str], title: str = "") -> Figure:
    """One frame, a panel a channel, with the colour maps of the field.

    Args:
        physical: (C, H, W) in physical units (DN, gauss, m/s); row 0 is drawn at the bottom, solar north is up.
        channels: the C names.
    """
    columns = min(len(channels), 5)
    rows = -(-len(channels) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(2.6 * columns, 2.9 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, name in zip(axes.flat, np.asarray(physical), channels, strict=False):
        show_channel(axis, image, name)
        axis.set_title(f"{name} [{UNITS[name]}]", fontsize=9)
    fig.suptitle(title)
    return fig


def show_channel(axis: plt.Axes, physical: np.ndarray, name: str) -> None:
    """Draw one channel (H, W): intensities with a square-root stretch, signed quantities symmetric about zero."""
    if name.startswith("aia"):
        top = max(np.nanpercentile(physical, 99.7), 1e-6)
        image, low, high = np.sqrt(np.clip(physical, 0, top)), 0.0, np.sqrt(top)
    else:
        high = max(np.nanmax(np.abs(physical)), 1e-6)  # hmimag is grey up to about 2% of this, which hides the noise
        image, low = physical, -high
    axis.imshow(image, origin="lower", cmap=colormap(name), vmin=low, vmax=high, interpolation="nearest")
    axis.axis("off")


def plot_labels(targets: Mapping[str, pd.DataFrame], cfg: Config) -> Figure:
    """The targets of each split against time, and their distribution.

    Args:
        targets: split name to a table of targets (target units, the first column is drawn) indexed by image time.
    """
    fig, (line, histogram) = plt.subplots(1, 2, figsize=(11, 3), width_ratios=[3, 1], sharey=True, layout="constrained")
    first = {split: table.iloc[:, 0] for split, table in targets.items()}
    values = np.concatenate([series.to_numpy() for series in first.values()])
    bins = np.linspace(values.min(), values.max(), 24)
    for split, series in first.items():
        line.plot(series.index, series, ".", ms=4, color=SPLIT_COLORS[split], label=f"{split} ({len(series)})")
        histogram.hist(series, bins=bins, orientation="horizontal", alpha=0.6, density=True, color=SPLIT_COLORS[split])
    if cfg.target.event_threshold is not None:
        line.axhline(cfg.target.event_threshold, color="k", lw=0.8, ls="--", label="event threshold")
    line.set(ylabel=_label(cfg), title="labels against time")
    line.tick_params(axis="x", rotation=20)
    line.legend(fontsize=8, ncols=4)
    histogram.set(title="distribution", xlabel="density")
    return fig


def plot_history(history: History, cfg: Config) -> Figure:
    """Training curves: losses, the validation metric that chooses the epoch, and the learning rate."""
    table, key = history.table, cfg.target.metrics[0]
    fig, (loss, metric, rate) = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
    loss.plot(table.index, table["train_loss"], ".-", color=SPLIT_COLORS["train"], label="train")
    loss.plot(table.index, table["val_loss"], ".-", color=SPLIT_COLORS["val"], label="validation")
    loss.set(yscale="log", ylabel=f"loss ({cfg.target.loss}, standardised)")
    metric.plot(table.index, table[f"val_{key}"], ".-", color=SPLIT_COLORS["val"])
    metric.set(ylabel=f"validation {key} [{cfg.target.unit}]")
    rate.plot(table.index[1:], table["lr"][1:], ".-", color="0.3")
    rate.set(ylabel="learning rate")
    for axis in (loss, metric):
        axis.axvline(history.best_epoch, color="k", lw=0.8, ls="--", label=f"kept: epoch {history.best_epoch}")
    for axis in (loss, metric, rate):
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
    loss.legend(fontsize=8)
    return fig


def plot_predictions(found: Mapping[str, Predictions], cfg: Config, output: int = 0) -> Figure:
    """Predicted against true: a panel for each entry of `found` (a split or a model), and the perfect line."""
    fig, axes = plt.subplots(
        1, len(found), figsize=(4 * len(found), 4), squeeze=False, sharey=True, layout="constrained"
    )
    values = np.concatenate([np.r_[p.target[:, output], p.prediction[:, output]] for p in found.values()])
    ends = np.array([values.min(), values.max()])
    for axis, (name, p) in zip(axes[0], found.items(), strict=True):
        axis.plot(ends, ends, color="k", lw=0.8)
        axis.scatter(
            p.target[:, output], p.prediction[:, output], s=12, alpha=0.7, color=SPLIT_COLORS.get(name, "tab:purple")
        )
        if cfg.target.event_threshold is not None:
            axis.axvline(cfg.target.event_threshold, color="k", lw=0.6, ls="--")
            axis.axhline(cfg.target.event_threshold, color="k", lw=0.6, ls="--")
        scores = p.metrics(cfg)
        axis.set_title(f"{name}: " + ", ".join(f"{key} {scores[key]:.2f}" for key in list(scores)[:3]), fontsize=9)
        axis.set(xlabel=f"true {_label(cfg)}", aspect="equal")
    axes[0, 0].set_ylabel(f"predicted {_label(cfg)}")
    return fig


def plot_prediction_series(found: Mapping[str, Predictions], cfg: Config, output: int = 0) -> Figure:
    """Truth and predictions of one split against time, one line a model."""
    fig, axis = plt.subplots(figsize=(11, 3), layout="constrained")
    first = next(iter(found.values()))
    axis.plot(pd.to_datetime(first.timestamps), first.target[:, output], "k.-", lw=0.8, label="truth")
    for name, p in found.items():
        axis.plot(pd.to_datetime(p.timestamps), p.prediction[:, output], ".-", lw=0.8, alpha=0.8, label=name)
    axis.set(ylabel=_label(cfg))
    axis.tick_params(axis="x", rotation=20)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    return fig


def plot_sensitivity(physical: Tensor | np.ndarray, channels: Sequence[str], sensitivity: Tensor) -> Figure:
    """Where on the Sun, and in which channel, a small change would move the prediction.

    Args:
        physical: (C, H, W) one frame in physical units; the channel that counts most is drawn.
        channels: the C names.
        sensitivity: (C, gy, gx) from `helpers.diagnostics.input_sensitivity`.
    """
    values = np.asarray(sensitivity.detach().float())
    by_channel = values.mean((1, 2))
    top = int(by_channel.argmax())
    image = np.asarray(physical)[top]
    fig, (left, right, bars) = plt.subplots(1, 3, figsize=(12, 3.6), width_ratios=[1, 1.15, 1.3], layout="constrained")
    show_channel(left, image, channels[top])
    left.set_title(f"{channels[top]}, the channel that counts most", fontsize=9)
    show_channel(right, image, channels[top])
    height, width = image.shape
    shares = values.mean(0) / values.mean()
    box = (-0.5, width - 0.5, -0.5, height - 0.5)
    shown = right.imshow(shares, origin="lower", cmap="viridis", alpha=0.75, extent=box, vmin=0)
    fig.colorbar(shown, ax=right, shrink=0.8, label="sensitivity / its mean")
    right.set_title("where it looks", fontsize=9)
    bars.barh(np.arange(len(channels)), by_channel / by_channel.sum(), color="0.4")
    bars.set_yticks(np.arange(len(channels)), channels, fontsize=8)
    bars.invert_yaxis()
    bars.set_title("share of each channel", fontsize=9)
    return fig


# --------------------------------------------------------------------------------------------------------------------
# The data notebook
# --------------------------------------------------------------------------------------------------------------------
def plot_index(times: pd.Series, cfg: Config) -> Figure:
    """How many frames the index has in each month, and which split they fall into.

    Args:
        times: UTC times of the frames that are present.
    """
    fig, axis = plt.subplots(figsize=(11, 2.6), layout="constrained")
    counts = times.dt.to_period("M").value_counts().sort_index()
    axis.bar(counts.index.to_timestamp(), counts, width=counts.index.days_in_month, align="edge", fc="0.45", ec="w")
    for split, color in SPLIT_COLORS.items():
        start, end = map(pd.Timestamp, getattr(cfg.split, split))
        count = int(((times >= start) & (times < end)).sum())
        axis.axvspan(start, end, color=color, alpha=0.35, lw=0, zorder=0, label=f"{split}: {count} frames")
    axis.set(ylabel="frames a month", ylim=(0, 1.35 * counts.max()), title="frames in the index, and the splits")
    axis.legend(fontsize=8, ncols=3)
    return fig


def plot_three_spaces(physical: Mapping[str, np.ndarray], scalers: Mapping[str, Scaler]) -> Figure:
    """The same pixels in physical, signed-log and normalised values: a row a channel, a column a space.

    Args:
        physical: channel name to its image (H, W) in physical units. Colours are linear in the values of each space;
            for signed channels the middle of the colour map stands for a physical zero.
        scalers: the normalisation of each channel.
    """
    rows = len(physical)
    fig, axes = plt.subplots(rows, 3, figsize=(10.5, 3.1 * rows), squeeze=False, layout="constrained")
    for row, (name, image) in zip(axes, physical.items(), strict=True):
        zeros = _in_three_spaces(np.zeros(1, np.float32), scalers[name])
        titles = f"{name}: physical [{UNITS[name]}]", "signed-log", "normalised"
        for axis, values, zero, title in zip(row, _in_three_spaces(image, scalers[name]), zeros, titles, strict=True):
            low, high = np.percentile(values, [0.1, 99.95])
            if not name.startswith("aia"):
                reach = max(high - zero[0], zero[0] - low)
                low, high = zero[0] - reach, zero[0] + reach
            shown = axis.imshow(values, origin="lower", cmap=colormap(name), vmin=low, vmax=high)
            fig.colorbar(shown, ax=axis, shrink=0.85)
            axis.set_title(title, fontsize=9)
            axis.axis("off")
    return fig


def plot_distributions(physical: Mapping[str, np.ndarray], scalers: Mapping[str, Scaler]) -> Figure:
    """How the pixels of every channel are distributed in each of the three spaces (at most 256 x 256 of them are used).

    Args:
        physical: channel name to its image (H, W) in physical units.
        scalers: the normalisation of each channel.
    """
    fig, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    fields = {"hmi_m": "k", "hmi_bx": "tab:purple", "hmi_by": "tab:pink", "hmi_bz": "0.5", "hmi_v": "tab:red"}
    for name, image in physical.items():
        step = -(-image.shape[-1] // 256)
        color = fields.get(name) or colormap(name)(0.65)
        for axis, values in zip(axes, _in_three_spaces(image[::step, ::step], scalers[name]), strict=True):
            ends = np.arcsinh(np.percentile(values, [0.05, 99.95]))
            edges = np.sinh(np.linspace(*ends, 50))  # narrow bins near zero, wide ones far from it
            shares = np.histogram(values, edges)[0] / values.size
            filled = shares > 0  # narrow bins may lie between two of the steps in which an instrument counts
            centres = (edges[1:] + edges[:-1])[filled] / 2
            axis.plot(centres, shares[filled], "--" if name in fields else "-", color=color, lw=1.2, label=name)
    for axis, title in zip(axes, ("physical [DN, G, m/s]", "signed-log", "normalised"), strict=True):
        axis.set(title=title, yscale="log")
    axes[0].set_ylabel("share of the pixels")
    axes[0].set_xscale("symlog", linthresh=10)
    axes[2].set_xscale("symlog", linthresh=3)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return fig


def _in_three_spaces(physical: np.ndarray, scaler: Scaler) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return physical, to_signed_log(physical, scaler), normalise(physical, scaler)


def brightest_box(image: Tensor, side: int) -> tuple[slice, slice]:
    """Rows and columns of a square of `side` pixels around the place where |image| (H, W) is largest on average."""
    step = side // 8
    blocks = avg_pool2d(image.abs()[None, None], step)[0, 0]  # (H / step, W / step)
    row, column = divmod(int(blocks.argmax()), blocks.shape[1])
    starts = [min(max(n - 4, 0), count - 8) * step for n, count in zip((row, column), blocks.shape, strict=True)]
    return slice(starts[0], starts[0] + side), slice(starts[1], starts[1] + side)


def plot_pooling_effect(region: Tensor, name: str, factors: Sequence[int], scaler: Scaler) -> Figure:
    """A region averaged over more and more pixels, and what goes wrong when the logarithm is taken before the average.

    Args:
        region: (H, W) physical values of the channel `name`; each of `factors` divides H and W.
        factors: sides of the squares that are averaged, in pixels.
        scaler: the normalisation of the channel; the lower row is in normalised units.
    """

    def pooled(values: Tensor, factor: int) -> Tensor:
        return avg_pool2d(values[None, None], factor)[0, 0]  # (H / factor, W / factor)

    fig, axes = plt.subplots(2, len(factors), figsize=(2.7 * len(factors), 5.8), layout="constrained", squeeze=False)
    images = [pooled(region, factor) for factor in factors]
    wrong = [standardise(pooled(to_signed_log(region, scaler), factor), scaler) for factor in factors]
    errors = [other - normalise(image, scaler) for other, image in zip(wrong, images, strict=True)]
    worst = max(error.abs().max().item() for error in errors) or 1.0
    top = region.abs().max().item()
    for (upper, lower), factor, image, error in zip(axes.T, factors, images, errors, strict=True):
        low = 0 if name.startswith("aia") else -top
        upper.imshow(image, origin="lower", cmap=colormap(name), vmin=low, vmax=top)
        upper.set_title(f"pooling {factor}: {image.min():.0f} to {image.max():.0f} {UNITS[name]}", fontsize=9)
        shown = lower.imshow(error, origin="lower", cmap="RdBu_r", vmin=-worst, vmax=worst)
        lower.set_title(f"log first: off by up to {error.abs().max():.2f}", fontsize=9)
        upper.axis("off")
        lower.axis("off")
    fig.colorbar(shown, ax=axes[1], shrink=0.8, label="normalised units")
    fig.suptitle(f"{name}, one active region", fontsize=10)
    return fig


def _label(cfg: Config) -> str:
    return f"{cfg.target.name} [{cfg.target.unit}]" if cfg.target.unit else cfg.target.name
