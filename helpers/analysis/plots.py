"""The figures of the notebooks. Functions return the Figure; nothing is shown or saved here."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from sklearn import metrics as skill
from torch import Tensor

from helpers.channels import UNITS, colormap, denormalise, stack_scalers
from helpers.config import KINDS, Config, find_named
from helpers.training.loop import History
from helpers.training.tasks import ImagePredictions, Predictions

SPLIT_COLORS = {"train": "tab:blue", "val": "tab:orange", "test": "tab:green"}


def panels(rows: int, columns: int, width: float = 3.0, height: float = 3.1, **how: Any) -> tuple[Figure, np.ndarray]:
    """A figure of panels, and these as an array (rows, columns); the size is that of one panel, in inches."""
    size = (width * columns, height * rows)
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **how)


def _finish(axes: Iterable[plt.Axes]) -> None:
    """A legend where lines have labels, and a grid."""
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)


def show(axis: plt.Axes, image: Any, title: str, cmap: Any, low: float, high: float, bar: str | None = None) -> None:
    """Draw an image (H, W) with row 0 at the bottom; `bar` is the label of a colour bar."""
    shown = axis.imshow(image, origin="lower", cmap=cmap, vmin=low, vmax=high, interpolation="nearest")
    axis.set_title(title, fontsize=9)
    axis.axis("off")
    if bar is not None:
        axis.figure.colorbar(shown, ax=axis, shrink=0.8, label=bar)


def show_channel(axis: plt.Axes, physical: Any, name: str, title: str = "", like: Any = None) -> None:
    """Draw one channel (H, W) in its unit: intensities with a square-root stretch, signed quantities about zero.

    Of `like`, another image of the channel, the range of colours is taken, so that the two can be compared.
    """
    like = physical if like is None else like
    if name.startswith("aia"):
        top = max(np.nanpercentile(like, 99.7), 1e-6)
        show(axis, np.sqrt(np.clip(physical, 0, top)), title, colormap(name), 0.0, np.sqrt(top))
    else:
        # hmimag is grey up to about 2% of the range, which hides the noise
        top = max(np.nanmax(np.abs(like)), 1e-6)
        show(axis, physical, title, colormap(name), -top, top)


def show_error(axis: plt.Axes, error: Any, title: str, unit: str) -> None:
    """Draw an error (H, W), symmetric about zero: too low blue, too high red."""
    error = np.asarray(error)
    reach = max(np.percentile(np.abs(error), 99.7), 1e-6)
    show(axis, error, title, "RdBu_r", -reach, reach, bar=unit)


def _label(cfg: Config) -> str:
    return f"{cfg.target.name} [{cfg.target.unit}]" if cfg.target.unit else cfg.target.name


def _title(name: str, p: Predictions, cfg: Config) -> str:
    return f"{name}: " + ", ".join(f"{key} {value:.2f}" for key, value in list(p.metrics(cfg).items())[:3])


def plot_channels(physical: Tensor | np.ndarray, channels: Sequence[str], title: str = "", more: int = 0) -> Figure:
    """One frame (C, H, W) in physical units (DN, gauss, m/s), a panel a channel, and so many `more` empty ones.

    Row 0 is drawn at the bottom, solar north is up.
    """
    count = len(channels) + more
    columns = min(count, 5)
    fig, axes = panels(-(-count // columns), columns, width=2.6, height=2.9)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, name in zip(axes.flat, np.asarray(physical), channels, strict=False):
        show_channel(axis, image, name, f"{name} [{UNITS[name]}]")
    fig.suptitle(title)
    return fig


def plot_sample(physical: Tensor | np.ndarray, sample: Mapping[str, Any], cfg: Config) -> Figure:
    """One frame (C, H, W) in physical units with what is to be predicted from it, the target of an item of the dataset:
    numbers in the title, masks and images as further panels.
    """
    target, title, channels = sample["target"], sample["timestamp"][:16], cfg.data.channels
    if cfg.labels.numbers:
        numbers = ", ".join(f"{value:.3g}" for value in target[:4].tolist()) + ", ..." * (len(target) > 4)
        return plot_channels(physical, channels, f"{title}, to predict: {numbers} ({_label(cfg)})")
    images, names = _target_images(target, cfg), _few(_target_names(cfg))
    fig = plot_channels(physical, channels, title, more=len(names))
    for axis, name in zip(fig.axes[len(channels) :], names, strict=False):
        _show_target(axis, images[name], name, f"to predict: {name}", cfg)
        axis.title.set_color("tab:red")
    return fig


def plot_labels(targets: Mapping[str, pd.DataFrame], cfg: Config) -> Figure:
    """The targets of each split (`loaders.targets()`, the first column) against time, and their distribution."""
    fig, (line, histogram) = plt.subplots(1, 2, figsize=(11, 3), width_ratios=[3, 1], sharey=True, layout="constrained")
    first = {split: table.iloc[:, 0] for split, table in targets.items()}
    values = np.concatenate(list(first.values()))
    bins = np.histogram_bin_edges(values, 23)  # of equal values, too
    for split, series in first.items():
        color = SPLIT_COLORS[split]
        line.plot(series.index, series, ".", ms=4, color=color, label=f"{split} ({len(series)})")
        histogram.hist(series, bins=bins, orientation="horizontal", histtype="step", density=True, color=color)
    if cfg.target.event_threshold is not None:
        line.axhline(cfg.target.event_threshold, color="k", lw=0.8, ls="--", label="event threshold")
    means = {"mask": "share of pixels inside", "image": f"mean of {_target_names(cfg)[0]}"}
    line.set(xlabel="time of the image (UTC)", ylabel=means.get(cfg.labels.kind, _label(cfg)), title="labels")
    line.tick_params(axis="x", rotation=20)
    line.legend(fontsize=8, ncols=4)
    histogram.set(title="distribution", xlabel="density")
    return fig


def plot_history(history: History, cfg: Config) -> Figure:
    """Training curves: the losses, and the validation metric that chooses the epoch."""
    table, kept = history.table, history.best_epoch
    fig, axes = panels(1, 2, width=4.5, height=3)
    loss, metric = axes[0]
    loss.plot(table.index, table["train_loss"], ".-", color=SPLIT_COLORS["train"], label="train")
    loss.plot(table.index, table["val_loss"], ".-", color=SPLIT_COLORS["val"], label="validation")
    units = ", standardised" if cfg.labels.kind == "scalar" else ""
    loss.set(yscale="log", xlabel="epoch", ylabel=f"loss ({cfg.target.loss}{units})")
    loss.axvline(kept, color="k", lw=0.8, ls="--", label=f"kept: epoch {kept}")
    metric.plot(table.index, table[f"val_{cfg.target.metrics[0]}"], ".-", color=SPLIT_COLORS["val"])
    metric.set(xlabel="epoch", ylabel=f"validation {cfg.target.metrics[0]}")
    metric.axvline(kept, color="k", lw=0.8, ls="--")
    _finish(axes[0])
    return fig


def plot_predictions(
    found: Mapping[str, Predictions | ImagePredictions],
    cfg: Config,
    references: Mapping[str, Predictions | ImagePredictions] | None = None,
) -> Figure:
    """Prediction and truth of splits or models, drawn as `target.plot` says, or as suits the kind of target.

    The curves of events show the `references` for the last entry of `found`, too.
    """
    draw = find_named(cfg.target.plot or KINDS[cfg.labels.kind]["figure"][0], PLOTS)
    return draw(found, cfg, references) if draw is plot_events else draw(found, cfg)


def plot_events(
    found: Mapping[str, Predictions], cfg: Config, references: Mapping[str, Predictions] | None = None
) -> Figure:
    """Above, the probability of events (first output) of the last entry of `found` against time.

    Below, hit rate against false-alarm rate (ROC), and precision against hit rate, at every threshold; a point marks
    the chosen one. What has one class only has no curves.
    """
    fig = plt.figure(figsize=(11, 6.5), layout="constrained")
    axes = fig.subplot_mosaic([["time", "time"], ["roc", "precision"]], height_ratios=[2, 3])
    drawn, left_out = {**found, **(references or {})}, []
    colors = {name: f"C{3 + number % 7}" for number, name in enumerate(drawn)} | SPLIT_COLORS
    name, p = list(found.items())[-1]
    times, event = pd.to_datetime(p.timestamps), p.target[:, 0] >= 0.5
    axes["time"].plot(times, p.prediction[:, 0], ".-", lw=0.8, color=colors[name], label=f"{name}: forecast")
    axes["time"].plot(times[event.numpy()], event[event] * 1.03, "k|", label="event")
    if p.threshold is not None:
        axes["time"].axhline(p.threshold, color="k", lw=0.8, ls="--", label="threshold, chosen on validation")
    axes["time"].set(ylabel="probability", ylim=(0, 1.08), title=_title(name, p, cfg))
    for name, p in drawn.items():
        truth, said = p.target[:, 0].numpy() >= 0.5, p.prediction[:, 0].numpy()
        if truth.all() or not truth.any():
            left_out.append(name)
            continue
        style = {"color": colors[name], **({"lw": 1.5} if name in found else {"lw": 0.8, "ls": "--"})}
        axes["roc"].plot(*skill.roc_curve(truth, said)[:2], label=name, **style)
        # steps: no forecast lies on a line between two points
        curve = skill.precision_recall_curve(truth, said)[1::-1]
        axes["precision"].plot(*curve, label=name, drawstyle="steps-post", **style)
        if p.threshold is not None and (alarm := said >= p.threshold).any():
            hits = alarm[truth].mean()
            axes["roc"].plot(alarm[~truth].mean(), hits, "o", color=style["color"])
            axes["precision"].plot(hits, truth[alarm].mean(), "o", color=style["color"])
    if left_out:
        axes["roc"].set_title(f"one class only, so no curve: {', '.join(left_out)}", fontsize=9)
    axes["roc"].plot([0, 1], [0, 1], "k", lw=0.6)
    axes["roc"].set(xlabel="false alarms / quiet times (POFD)", ylabel="hits / events (POD, recall)", aspect="equal")
    axes["precision"].set(xlabel="hits / events (POD, recall)", ylabel="precision (true alarms)", ylim=(0, 1.03))
    _finish(axes.values())
    return fig


def plot_scatter(found: Mapping[str, Predictions], cfg: Config) -> Figure:
    """Predicted against true, of the first output: a panel for each split or model, and the perfect line."""
    fig, axes = panels(1, len(found), width=4, height=4, sharey=True)
    values = np.concatenate([np.r_[p.target[:, 0], p.prediction[:, 0]] for p in found.values()])
    ends = [values.min(), values.max()]
    for axis, (name, p) in zip(axes[0], found.items(), strict=True):
        axis.plot(ends, ends, color="k", lw=0.8)
        color = SPLIT_COLORS.get(name, "tab:purple")
        axis.scatter(p.target[:, 0], p.prediction[:, 0], s=12, alpha=0.7, color=color)
        if cfg.event_threshold is not None:
            axis.axvline(cfg.event_threshold, color="k", lw=0.6, ls="--")
            axis.axhline(cfg.event_threshold if p.threshold is None else p.threshold, color="k", lw=0.6, ls="--")
        axis.set_title(_title(name, p, cfg), fontsize=9)
        axis.set(xlabel=f"true {_label(cfg)}", aspect="equal")
    axes[0, 0].set_ylabel(f"predicted {_label(cfg)}")
    return fig


def plot_spectrum(found: Mapping[str, Predictions], cfg: Config) -> Figure:
    """Many outputs against their number, in physical values: a column for each split or model.

    Above, the middle sample; below, the error of each output in per cent of its mean truth over all samples.
    """
    fig, axes = panels(2, len(found), width=5, height=2.8, sharex=True, sharey="row")
    for (sample, errors), (name, p) in zip(axes.T, found.items(), strict=True):
        said, true = (cfg.labels.physical(values.double()) for values in (p.prediction, p.target))
        middle, color = len(true) // 2, SPLIT_COLORS.get(name, "tab:purple")
        sample.plot(true[middle], "k", lw=0.8, label=f"truth, {p.timestamps[middle][:16]}")
        sample.plot(said[middle], color=color, lw=0.8, label="prediction")
        sample.set_title(_title(name, p, cfg), fontsize=9)
        low, median, high = np.percentile(100 * (said - true) / true.mean(0), [16, 50, 84], axis=0)
        errors.fill_between(range(len(median)), low, high, color=color, alpha=0.3, label="16 to 84% of the samples")
        errors.plot(median, color=color, lw=0.8, label="median")
        errors.axhline(0, color="k", lw=0.6)
        errors.set_xlabel("bin")
    positive = all((line.get_ydata() > 0).all() for axis in axes[0] for line in axis.lines)
    label = _label(cfg) if cfg.labels.transform == "none" else _label(cfg).replace("log10 ", "")
    axes[0, 0].set(yscale="log" if positive else "linear", ylabel=label)
    axes[1, 0].set_ylabel("error [% of the mean truth]")
    _finish(axes.flat)
    return fig


def plot_images(found: Mapping[str, ImagePredictions], cfg: Config) -> Figure:
    """Input, truth, prediction and error of the last entry of `found`, in physical units.

    A row an example; for targets of several channels, a row a channel of the first example. The input of masks carries
    both outlines, and their error is that of the pixels called inside at `target.mask_threshold`.
    """
    split, p = list(found.items())[-1]
    names, channels, mask = _target_names(cfg), cfg.data.channels, cfg.labels.kind == "mask"
    examples = p.examples if len(names) == 1 else p.examples[:1]
    rows = [(example, name) for example in examples for name in _few(names)]
    fig, axes = panels(len(rows), 4)
    for (given, true, said, wrong), (example, name) in zip(axes, rows, strict=True):
        truth, prediction = (_target_images(image, cfg)[name] for image in (example["target"], example["prediction"]))
        # the last frame, in the channel that is predicted if it is there, else in one that shows much
        wanted = ("hmi_m" if mask else name, "aia171", "aia193", channels[0])
        seen = next(channel for channel in wanted if channel in channels)
        frame = denormalise(example["ts"][channels.index(seen), -1], cfg.scalers[seen])
        show_channel(given, frame.numpy(), seen, f"input: {seen}")
        _show_target(true, truth, name, f"truth: {name}, {example['timestamp'][:16]}", cfg)
        _show_target(said, prediction, name, "predicted probability" if mask else "prediction", cfg, like=truth)
        error, unit = prediction - truth, UNITS.get(name, cfg.target.unit)
        if mask:
            level = cfg.target.mask_threshold
            error = (prediction >= level) - truth
            given.set_title("truth cyan, prediction red", fontsize=9)
            # the target may be smaller than the input (labels.reduce), so the outlines are stretched over it
            extent = given.images[0].get_extent()
            for image, edge, color in ((truth, 0.5, "tab:cyan"), (prediction, level, "tab:red")):
                if image.min() < edge < image.max():
                    given.contour(image, [edge], colors=color, linewidths=1.2, extent=extent, origin="lower")
        show_error(wrong, error, f"error, rms {np.sqrt((error**2).mean()):.3g} {unit}", unit)
    fig.suptitle(f"{split}: " + ", ".join(f"{name} {value:.2f}" for name, value in p.values.items()), fontsize=10)
    return fig


PLOTS = {"scatter": plot_scatter, "spectrum": plot_spectrum, "event": plot_events, "image": plot_images}


def plot_prediction_series(found: Mapping[str, Predictions | ImagePredictions], cfg: Config) -> Figure:
    """One split against time, one line a model: truth and predictions of numbers, the first metric of each image."""
    fig, ((axis,),) = panels(1, 1, width=11, height=3)
    key, images = cfg.target.metrics[0], not cfg.labels.numbers
    if not images:
        first = next(iter(found.values()))
        axis.plot(pd.to_datetime(first.timestamps), first.target[:, 0], "k.-", lw=0.8, label="truth")
    for name, p in found.items():
        values = p.scores[key] if images else p.prediction[:, 0]
        axis.plot(pd.to_datetime(p.timestamps), values, ".-", lw=0.8, alpha=0.8, label=name)
    axis.set(xlabel="time of the image (UTC)", ylabel=f"{key} of each image" if images else _label(cfg))
    axis.tick_params(axis="x", rotation=20)
    _finish([axis])
    return fig


def plot_trust(found: Mapping[str, Predictions | ImagePredictions], cfg: Config) -> Figure:
    """How far a prediction can be trusted: what was true, on average, where the model said so much (first output, or
    all pixels of the examples).
    """
    fig, ((axis,),) = panels(1, 1, width=4.5, height=3.8)
    for name, p in found.items():
        if isinstance(p, ImagePredictions):
            said, true = (torch.stack([x[of] for x in p.examples]).flatten() for of in ("prediction", "target"))
        else:
            said, true = p.prediction[:, 0], p.target[:, 0]
        pairs = pd.DataFrame({"said": said.double().numpy(), "true": true.double().numpy()})
        # few bins, because one with a single sample says nothing
        means = pairs.groupby(pd.cut(pairs["said"], 6), observed=True).mean()
        axis.plot(means["said"], means["true"], "o-", ms=4, color=SPLIT_COLORS.get(name), label=name)
    low = means["said"].min()
    axis.axline((low, low), slope=1, color="k", lw=0.8)
    if cfg.labels.kind == "event":
        axis.set(xlabel="predicted probability", ylabel="share of these that were events")
    else:
        axis.set(xlabel=f"predicted {_label(cfg)}", ylabel="what was true there, on average")
    _finish([axis])
    return fig


def _target_names(cfg: Config) -> list[str]:
    """What the channels of an image target are called."""
    return list(cfg.labels.target_channels) or [cfg.target.name]


def _target_images(target: Tensor, cfg: Config) -> dict[str, np.ndarray]:
    """The channels (H, W) of a target (C, H, W) by name, in physical units where they are channels of the frames."""
    if cfg.labels.target_channels:
        target = denormalise(target, stack_scalers(cfg.scalers, cfg.labels.target_channels))
    return dict(zip(_target_names(cfg), target.numpy(), strict=True))


def _few(names: Sequence[str]) -> list[str]:
    """At most four of many channels, unlike each other where these are there."""
    return sorted(names, key=lambda name: name not in ("aia171", "aia94", "hmi_m", "hmi_v"))[:4]


def _show_target(axis: plt.Axes, image: np.ndarray, name: str, title: str, cfg: Config, like: Any = None) -> None:
    like = image if like is None else like
    if name in cfg.labels.target_channels:
        show_channel(axis, image, name, title, like)
    else:
        show(axis, image, title, "viridis", like.min(), like.max())
