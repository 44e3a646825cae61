"""Every figure of the notebooks. Functions return the Figure; nothing is shown or saved here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import avg_pool2d

from helpers.channels import (
    UNITS,
    Scaler,
    colormap,
    denormalise,
    normalise,
    stack_scalers,
    standardise,
    to_signed_log,
)
from helpers.config import Config, find_named
from helpers.training.loop import History
from helpers.training.metrics import tss
from helpers.training.tasks import TASKS, ImageExample, ImagePredictions, Predictions

EXPERIMENT_COLORS = {"baseline": "0.35", "finetune": "tab:red"}
SPLIT_COLORS = {"train": "tab:blue", "val": "tab:orange", "test": "tab:green"}


def plot_channels(physical: Tensor | np.ndarray, channels: Sequence[str], title: str = "") -> Figure:
    """One frame, a panel a channel, with the colour maps of the field.

    Args:
        physical: (C, H, W) in physical units (DN, gauss, m/s); row 0 is drawn at the bottom, solar north is up.
        channels: the C names.
    """
    fig, axes = _panels(len(channels))
    for axis, image, name in zip(axes, np.asarray(physical), channels, strict=False):
        show_channel(axis, image, name)
        axis.set_title(f"{name} [{UNITS[name]}]", fontsize=9)
    fig.suptitle(title)
    return fig


def plot_sample(physical: Tensor | np.ndarray, sample: Mapping[str, Any], cfg: Config) -> Figure:
    """One frame with what is to be predicted from it: numbers in the title, masks and images as further panels.

    Args:
        physical: (C, H, W) the frame in physical units.
        sample: an item of `SolarDataset`; its `target` and `timestamp` are read.
    """
    target, time = sample["target"], sample["timestamp"][:16]
    if cfg.labels.kind == "scalar":
        numbers = ", ".join(f"{value:.3g}" for value in target.tolist())
        return plot_channels(physical, cfg.data.channels, f"{time}, to predict: {numbers} ({_label(cfg)})")
    names, channels = _target_names(cfg), cfg.data.channels
    fig, axes = _panels(len(channels) + len(_few(names)))
    for axis, image, name in zip(axes, np.asarray(physical), channels, strict=False):
        show_channel(axis, image, name)
        axis.set_title(f"{name} [{UNITS[name]}]", fontsize=9)
    for axis, name in zip(axes[len(channels) :], _few(names), strict=False):
        _show_target(axis, _target_images(target, cfg)[names.index(name)], name, cfg)
        axis.set_title(f"to predict: {name}", fontsize=9, color="tab:red")
    fig.suptitle(time)
    return fig


def _panels(count: int) -> tuple[Figure, np.ndarray]:
    """A figure with at least so many empty panels, five a row."""
    columns = min(count, 5)
    rows = -(-count // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(2.6 * columns, 2.9 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    return fig, axes.flat


def show_channel(axis: plt.Axes, physical: np.ndarray, name: str, like: np.ndarray | None = None) -> None:
    """Draw one channel (H, W): intensities with a square-root stretch, signed quantities symmetric about zero.

    Args:
        like: another image of the channel from which the range of colours is taken, so that the two can be compared.
    """
    like = physical if like is None else like
    if name.startswith("aia"):
        top = max(np.nanpercentile(like, 99.7), 1e-6)
        image, low, high = np.sqrt(np.clip(physical, 0, top)), 0.0, np.sqrt(top)
    else:
        high = max(np.nanmax(np.abs(like)), 1e-6)  # hmimag is grey up to about 2% of this, which hides the noise
        image, low = physical, -high
    axis.imshow(image, origin="lower", cmap=colormap(name), vmin=low, vmax=high, interpolation="nearest")
    axis.axis("off")


def plot_labels(targets: Mapping[str, pd.DataFrame], cfg: Config) -> Figure:
    """The targets of each split against time, and their distribution.

    Args:
        targets: `loaders.targets()`: split name to a table of targets indexed by image time (of images, the mean over
            the pixels); the first column is drawn.
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
    means = {"scalar": _label(cfg), "mask": "share of pixels inside", "image": f"mean of {_target_names(cfg)[0]}"}
    line.set(ylabel=means[cfg.labels.kind], title="labels against time")
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


def plot_range_test(table: pd.DataFrame, suggested: float, used: float) -> Figure:
    """Loss against learning rate of `range_test`, with the suggested and the configured rate."""
    fig, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
    axis.plot(table["lr"], table["loss"], color="0.8", lw=0.8, label="each batch")
    axis.plot(table["lr"], table["smoothed"], color=SPLIT_COLORS["train"], label="smoothed")
    axis.axvline(suggested, color="k", ls="--", lw=0.8, label=f"suggested: {suggested:.1e}")
    axis.axvline(used, color="tab:red", ls=":", lw=1.2, label=f"training.lr: {used:.1e}")
    low = table["smoothed"].min()
    axis.set(xscale="log", ylim=(0, 5 * low), xlabel="learning rate, rising at every step", ylabel="training loss")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    return fig


def plot_curves(tables: Mapping[str, pd.DataFrame], notes: Mapping[str, str]) -> Figure:
    """Training curves side by side on one scale.

    Args:
        tables: `history.table` of each training, by its label.
        notes: a word for each label, for the title.
    """
    fig, axes = plt.subplots(
        1, len(tables), figsize=(3 * len(tables), 3), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (label, table) in zip(axes[0], tables.items(), strict=True):
        axis.plot(table.index, table["train_loss"], ".-", color=SPLIT_COLORS["train"], label="train")
        axis.plot(table.index, table["val_loss"], ".-", color=SPLIT_COLORS["val"], label="validation")
        axis.set_title(f"{label}\n{notes[label]}", fontsize=9)
        axis.set(yscale="log", xlabel="epoch")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("loss")
    axes[0, 0].legend(fontsize=8)
    return fig


def plot_run_histories(runs: pd.DataFrame, cfg: Config) -> Figure:
    """Validation metric against epoch of every run (a thin line) and its mean over seeds, one colour an experiment.

    Args:
        runs: of `helpers.analysis.comparison.comparable_runs`.
    """
    key = f"val_{cfg.target.metrics[0]}"
    counts = sorted(runs["training samples"].unique())
    fig, axes = plt.subplots(
        1, len(counts), figsize=(4.5 * len(counts), 3.2), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, count in zip(axes[0], counts, strict=True):
        for experiment, group in runs[runs["training samples"] == count].groupby("experiment"):
            tables = [pd.read_csv(f"{folder}/history.csv", index_col="epoch")[key] for folder in group["folder"]]
            color = EXPERIMENT_COLORS[experiment]
            for table in tables:
                axis.plot(table.index, table, color=color, lw=0.6, alpha=0.6)
            mean = pd.concat(tables, axis=1).dropna().mean(axis=1)  # up to the epoch that all seeds reached
            axis.plot(mean.index, mean, color=color, label=f"{experiment}, {len(tables)} seeds")
        axis.set(xlabel="epoch", title=f"{count:.0f} training samples")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel(f"validation {cfg.target.metrics[0]} [{cfg.target.unit}]")
    axes[0, 0].legend(fontsize=8)
    return fig


def plot_scaling(runs: pd.DataFrame, cfg: Config) -> Figure:
    """Test metric against number of training samples, mean and standard deviation over seeds."""
    key = f"test_{cfg.target.metrics[0]}"
    fig, axis = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for experiment, group in runs.groupby("experiment"):
        by = group.groupby("training samples")[key]
        color = EXPERIMENT_COLORS[experiment]
        axis.errorbar(by.mean().index, by.mean(), by.std(), fmt="o-", color=color, capsize=3, label=experiment)
    axis.set(xlabel="training samples", ylabel=f"test {cfg.target.metrics[0]} [{cfg.target.unit}]")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    return fig


def plot_block_memory(kept: Mapping[str, Mapping[str, int]]) -> Figure:
    """What each block keeps for the backward pass, in MB: one group of bars a label (`StepMemory.by_block`)."""
    fig, axis = plt.subplots(figsize=(7, 3), layout="constrained")
    table = pd.DataFrame(kept) / 1e6
    table.plot.bar(ax=axis, rot=0, width=0.8)
    axis.set(ylabel="kept until the backward pass [MB]")
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=8)
    return fig


def plot_predictions(found: Mapping[str, Predictions | ImagePredictions], cfg: Config) -> Figure:
    """Prediction and truth of splits or models, drawn as `target.plot` says, or as suits the kind of target."""
    return find_named(cfg.target.plot or TASKS[cfg.labels.kind].figure, PLOTS)(found, cfg)


def plot_scatter(found: Mapping[str, Predictions], cfg: Config, output: int = 0) -> Figure:
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


def plot_trust(found: Mapping[str, Predictions | ImagePredictions], cfg: Config) -> Figure:
    """How far a prediction can be trusted: what was true, on average, where the model said so much.

    For numbers with events and for masks also the score against the threshold from which on a prediction counts.
    """
    return {"scalar": _trust_numbers, "mask": _trust_masks, "image": _trust_images}[cfg.labels.kind](found, cfg)


def _trust_numbers(found: Mapping[str, Predictions], cfg: Config) -> Figure:
    threshold = cfg.target.event_threshold
    panels = 1 if threshold is None else 2
    fig, axes = plt.subplots(1, panels, figsize=(1 + 4 * panels, 3.8), squeeze=False, layout="constrained")
    for name, p in found.items():
        color, prediction, target = SPLIT_COLORS.get(name), p.prediction[:, 0], p.target[:, 0]
        groups = [group for group in prediction.argsort(stable=True).tensor_split(8) if len(group)]
        means = np.array([[prediction[g].mean(), target[g].mean()] for g in groups])
        axes[0, 0].plot(*means.T, "o-", ms=4, color=color, label=name)
        if threshold is not None:
            tried = np.linspace(float(prediction.min()), float(prediction.max()), 60)
            scores = [tss(prediction, target, threshold, called_from=value) for value in tried]
            axes[0, 1].plot(tried, scores, color=color, label=name)
    axes[0, 0].axline((means[0, 0], means[0, 0]), slope=1, color="k", lw=0.8)
    axes[0, 0].set(xlabel=f"mean predicted {_label(cfg)}", ylabel="mean true, of an eighth of the samples")
    if threshold is not None:
        axes[0, 1].axvline(threshold, color="k", lw=0.8, ls="--", label="threshold of an event")
        axes[0, 1].set(xlabel="a prediction counts as an event from", ylabel="tss")
    for axis in axes.flat:
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    return fig


def plot_prediction_series(found: Mapping[str, Predictions | ImagePredictions], cfg: Config, output: int = 0) -> Figure:
    """One split against time, one line a model: truth and predictions of numbers, the first metric of each image."""
    fig, axis = plt.subplots(figsize=(11, 3), layout="constrained")
    key, images = cfg.target.metrics[0], cfg.labels.kind != "scalar"
    if not images:
        first = next(iter(found.values()))
        axis.plot(pd.to_datetime(first.timestamps), first.target[:, output], "k.-", lw=0.8, label="truth")
    for name, p in found.items():
        values = p.scores[key] if images else p.prediction[:, output]
        axis.plot(pd.to_datetime(p.timestamps), values, ".-", lw=0.8, alpha=0.8, label=name)
    axis.set(ylabel=f"{key} of each image" if images else _label(cfg))
    axis.tick_params(axis="x", rotation=20)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    return fig


def plot_sensitivity(physical: Tensor | np.ndarray, channels: Sequence[str], sensitivity: Tensor) -> Figure:
    """Where on the Sun, and in which channel, a small change would move the prediction.

    Args:
        physical: (C, H, W) one frame in physical units; the channel that counts most is drawn.
        channels: the C names.
        sensitivity: (C, gy, gx) from `helpers.analysis.diagnostics.input_sensitivity`.
    """
    values = np.asarray(sensitivity.detach().float())
    values = values / max(values.mean(), np.finfo(values.dtype).tiny)  # a model of zeros looks nowhere
    by_channel = values.mean((1, 2))
    top = int(by_channel.argmax())
    image = np.asarray(physical)[top]
    fig, (left, right, bars) = plt.subplots(1, 3, figsize=(12, 3.6), width_ratios=[1, 1.15, 1.3], layout="constrained")
    show_channel(left, image, channels[top])
    left.set_title(f"{channels[top]}, the channel that counts most", fontsize=9)
    show_channel(right, image, channels[top])
    height, width = image.shape
    box = (-0.5, width - 0.5, -0.5, height - 0.5)
    shown = right.imshow(values.mean(0), origin="lower", cmap="viridis", alpha=0.75, extent=box, vmin=0)
    fig.colorbar(shown, ax=right, shrink=0.8, label="sensitivity / its mean")
    right.set_title("where it looks", fontsize=9)
    bars.barh(np.arange(len(channels)), by_channel / len(channels), color="0.4")
    bars.set_yticks(np.arange(len(channels)), channels, fontsize=8)
    bars.invert_yaxis()
    bars.set_title("share of each channel", fontsize=9)
    return fig


# --------------------------------------------------------------------------------------------------------------------
# Masks and images
# --------------------------------------------------------------------------------------------------------------------
def plot_images(found: Mapping[str, ImagePredictions], cfg: Config) -> Figure:
    """Input, truth, prediction and error of the last entry of `found`, in physical units.

    A row an example; for targets of several channels, a row a channel of the first example.
    """
    split, p = list(found.items())[-1]
    names = _target_names(cfg)
    rows = [(e, names[0]) for e in p.examples] if len(names) == 1 else [(p.examples[0], name) for name in _few(names)]
    fig, axes = plt.subplots(len(rows), 4, figsize=(12, 3.1 * len(rows)), squeeze=False, layout="constrained")
    for row, (example, name) in zip(axes, rows, strict=True):
        truth, prediction = (
            _target_images(image, cfg)[names.index(name)] for image in (example.target, example.prediction)
        )
        shown = _show_input(row[0], example, name, cfg)
        row[0].set_title(f"input: {shown}", fontsize=9)
        _show_target(row[1], truth, name, cfg)
        row[1].set_title(f"truth: {name}, {example.timestamp[:16]}", fontsize=9)
        _show_target(row[2], prediction, name, cfg, like=truth)
        row[2].set_title("prediction", fontsize=9)
        _show_error(fig, row[3], prediction - truth, UNITS.get(name, cfg.target.unit))
    fig.suptitle(_scores(split, p), fontsize=10)
    return fig


def plot_masks(found: Mapping[str, ImagePredictions], cfg: Config) -> Figure:
    """Input with both outlines, truth, probability and error of the last entry of `found`, a row an example."""
    split, p = list(found.items())[-1]
    threshold = cfg.target.mask_threshold
    fig, axes = plt.subplots(
        len(p.examples), 4, figsize=(12, 3.2 * len(p.examples)), squeeze=False, layout="constrained"
    )
    for row, example in zip(axes, p.examples, strict=True):
        truth, prediction = example.target[0].numpy(), example.prediction[0].numpy()  # (h, w), h <= H
        name = _show_input(row[0], example, "hmi_m", cfg)
        extent = row[0].images[0].get_extent()
        for image, level, color in ((truth, 0.5, "tab:cyan"), (prediction, threshold, "tab:red")):
            if image.min() < level < image.max():
                row[0].contour(image, [level], colors=color, linewidths=1.2, extent=extent, origin="lower")
        row[0].set_title(f"{name}, {example.timestamp[:16]}\ntruth cyan, prediction red", fontsize=9)
        row[1].imshow(truth, origin="lower", cmap="gray", vmin=0, vmax=1)
        row[1].set_title("truth", fontsize=9)
        shown = row[2].imshow(prediction, origin="lower", cmap="magma", vmin=0, vmax=1)
        fig.colorbar(shown, ax=row[2], shrink=0.8)
        row[2].set_title("predicted probability", fontsize=9)
        row[3].imshow((prediction >= threshold) * 1.0 - truth, origin="lower", cmap="RdBu_r", vmin=-1, vmax=1)
        row[3].set_title("error: missed blue, too much red", fontsize=9)
        for axis in row:
            axis.axis("off")
    fig.suptitle(_scores(split, p), fontsize=10)
    return fig


def _trust_masks(found: Mapping[str, ImagePredictions], cfg: Config) -> Figure:
    fig, (reliable, score) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, p in found.items():
        color = SPLIT_COLORS.get(name)
        centres = ((p.edges[1:] + p.edges[:-1]) / 2).numpy()
        inside, pixels = p.joint[:, len(centres) // 2 :].sum(1).numpy(), p.joint.sum(1).numpy()  # by predicted value
        filled = pixels > 0
        reliable.plot(centres[filled], inside[filled] / pixels[filled], ".-", ms=4, color=color, label=name)
        called, right = pixels[::-1].cumsum()[::-1], inside[::-1].cumsum()[::-1]  # at or above each threshold
        union = called + inside.sum() - right
        score.plot(p.edges[:-1], right / np.maximum(union, 1), color=color, label=f"{name}: iou")
        score.plot(p.edges[:-1], 2 * right / np.maximum(called + inside.sum(), 1), ":", color=color, label="dice")
    reliable.plot([0, 1], [0, 1], color="k", lw=0.8)
    reliable.set(xlabel="predicted probability", ylabel="share of pixels really inside")
    score.axvline(cfg.target.mask_threshold, color="k", lw=0.8, ls="--", label="mask_threshold")
    score.set(xlabel="a pixel counts as inside from", ylabel="score")
    for axis in (reliable, score):
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    return fig


def _trust_images(found: Mapping[str, ImagePredictions], cfg: Config) -> Figure:
    fig, axes = plt.subplots(1, len(found), figsize=(4 * len(found), 3.8), squeeze=False, layout="constrained")
    for axis, (name, p) in zip(axes[0], found.items(), strict=True):
        edges, counts = p.edges.numpy(), p.joint.numpy()  # (predicted, true)
        axis.pcolormesh(edges, edges, np.ma.masked_equal(counts.T, 0), norm="log", cmap="viridis")
        true = (counts * (edges[1:] + edges[:-1]) / 2).sum(1)[counts.sum(1) > 0] / counts.sum(1)[counts.sum(1) > 0]
        axis.plot(((edges[1:] + edges[:-1]) / 2)[counts.sum(1) > 0], true, "r.-", ms=3, lw=1, label="mean truth")
        axis.axline((0, 0), slope=1, color="k", lw=0.8)
        axis.set(xscale="asinh", yscale="asinh", title=name, xlabel=f"predicted pixel [{cfg.target.unit}]")
        axis.legend(fontsize=8, loc="upper left")
    axes[0, 0].set_ylabel(f"true pixel [{cfg.target.unit}]")
    return fig


def _scores(split: str, p: ImagePredictions) -> str:
    return f"{split}: " + ", ".join(f"{name} {value:.2f}" for name, value in p.values.items())


def _target_names(cfg: Config) -> list[str]:
    """What the channels of an image target are called."""
    return list(cfg.labels.target_channels) or [cfg.target.name]


def _few(names: Sequence[str]) -> list[str]:
    """At most four of many channels, unlike each other."""
    return [name for name in ("aia171", "aia94", "hmi_m", "hmi_v") if name in names] if len(names) > 4 else list(names)


def _target_images(target: Tensor, cfg: Config) -> np.ndarray:
    """(C, H, W) targets or predictions in physical units where they are channels of the frames."""
    if not cfg.labels.target_channels:
        return target.numpy()
    return denormalise(target, stack_scalers(cfg.scalers, cfg.labels.target_channels)).numpy()


def _show_target(axis: plt.Axes, image: np.ndarray, name: str, cfg: Config, like: np.ndarray | None = None) -> None:
    if name in cfg.labels.target_channels:
        show_channel(axis, image, name, like)
        return
    like = image if like is None else like
    axis.imshow(image, origin="lower", cmap="viridis", vmin=like.min(), vmax=like.max(), interpolation="nearest")
    axis.axis("off")


def _show_input(axis: plt.Axes, example: ImageExample, wanted: str, cfg: Config) -> str:
    """Draw the last input frame in the channel `wanted`, else in one that shows much; returns its name."""
    names = cfg.data.channels
    name = next((name for name in (wanted, "aia171", "aia193") if name in names), names[0])
    scaler = stack_scalers(cfg.scalers, names)
    show_channel(axis, denormalise(example.ts[:, -1], scaler)[names.index(name)].numpy(), name)
    return name


def _show_error(fig: Figure, axis: plt.Axes, error: np.ndarray, unit: str) -> None:
    reach = max(np.percentile(np.abs(error), 99.7), 1e-6)
    shown = axis.imshow(error, origin="lower", cmap="RdBu_r", vmin=-reach, vmax=reach, interpolation="nearest")
    fig.colorbar(shown, ax=axis, shrink=0.8, label=unit)
    axis.set_title(f"error, rms {np.sqrt((error**2).mean()):.3g} {unit}", fontsize=9)
    axis.axis("off")


PLOTS: dict[str, Callable[[Mapping[str, Any], Config], Figure]] = {
    "scatter": plot_scatter,
    "mask": plot_masks,
    "image": plot_images,
}


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
