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

Found = Mapping[str, Predictions | ImagePredictions]  # by the name of a split or a model
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
    if name not in UNITS:  # a mask, or an image of one's own
        show(axis, physical, title, "viridis", like.min(), like.max())
    elif name.startswith("aia"):
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


def plot_channels(physical: Any, channels: Sequence[str], title: str = "", targets: Mapping[str, Any] = {}) -> Figure:
    """One frame (C, H, W) in physical units (DN, gauss, m/s), a panel a channel, and one for each of the `targets`.

    Row 0 is drawn at the bottom, solar north is up.
    """
    frame = zip(np.asarray(physical), channels, strict=True)
    shown = [(image, name, f"{name} [{UNITS[name]}]") for image, name in frame]
    shown += [(image, name, f"to predict: {name}") for name, image in targets.items()]
    columns = min(len(shown), 5)
    fig, axes = panels(-(-len(shown) // columns), columns, width=2.6, height=2.9)
    for axis in axes.flat:
        axis.axis("off")
    for axis, drawn in zip(axes.flat, shown, strict=False):
        show_channel(axis, *drawn)
    fig.suptitle(title)
    return fig


def plot_sample(physical: Tensor | np.ndarray, sample: Mapping[str, Any], cfg: Config) -> Figure:
    """One frame (C, H, W) in physical units with what is to be predicted from it, the target of an item of the dataset:
    numbers in the title, masks and images as further panels.
    """
    target, title, images = sample["target"], sample["timestamp"][:16], {}
    if cfg.labels.numbers:
        numbers = ", ".join(f"{value:.3g}" for value in target[:4].tolist()) + ", ..." * (len(target) > 4)
        title = f"{title}, to predict: {numbers} ({_label(cfg)})"
    else:
        images = _target_images(target, cfg)
    return plot_channels(physical, cfg.data.channels, title, {name: images[name] for name in _few(images)})


def plot_labels(targets: Mapping[str, pd.DataFrame], cfg: Config) -> Figure:
    """The targets of each split (`loaders.targets()`, the first column) against time, and their distribution."""
    fig, (line, histogram) = plt.subplots(1, 2, figsize=(11, 3), width_ratios=[3, 1], sharey=True, layout="constrained")
    bins = np.histogram_bin_edges(np.concatenate([table.iloc[:, 0] for table in targets.values()]), 23)
    for split, table in targets.items():
        color, series = SPLIT_COLORS[split], table.iloc[:, 0]
        line.plot(series.index, series, ".", ms=4, color=color, label=f"{split} ({len(series)})")
        histogram.hist(series, bins=bins, orientation="horizontal", histtype="step", density=True, color=color)
    if cfg.target.event_threshold is not None:
        line.axhline(cfg.target.event_threshold, color="k", lw=0.8, ls="--", label="event threshold")
    label = {"mask": "share of pixels inside", "image": "mean over the image"}.get(cfg.labels.kind, _label(cfg))
    line.set(xlabel="time of the image (UTC)", ylabel=label, title="labels")
    line.tick_params(axis="x", rotation=20)
    line.legend(fontsize=8, ncols=4)
    histogram.set(title="distribution", xlabel="density")
    return fig


def plot_history(history: History, cfg: Config) -> Figure:
    """Training curves: the losses, and the validation metric that chooses the epoch."""
    fig, axes = panels(1, 2, width=4.5, height=3)
    table, key = history.table, cfg.target.metrics[0]
    table = table.rename(columns={"train_loss": "train", "val_loss": "validation", f"val_{key}": f"validation {key}"})
    losses = f"loss ({cfg.target.loss}{', standardised' if cfg.labels.kind == 'scalar' else ''})"
    colors = [SPLIT_COLORS["train"], SPLIT_COLORS["val"]]
    table.plot(y=["train", "validation"], ax=axes[0, 0], marker=".", logy=True, color=colors, ylabel=losses)
    table.plot(y=f"validation {key}", ax=axes[0, 1], marker=".", color=colors[1], ylabel=f"validation {key}")
    for axis in axes[0]:
        axis.axvline(history.best_epoch, color="k", lw=0.8, ls="--", label=f"kept: epoch {history.best_epoch}")
    _finish(axes[0])
    return fig


def plot_predictions(found: Found, cfg: Config, references: Found | None = None) -> Figure:
    """Prediction and truth of splits or models, drawn as `target.plot` says, or as suits the kind of target.

    The curves of events show the `references` for the last entry of `found`, too.
    """
    draw = find_named(cfg.target.plot or KINDS[cfg.labels.kind]["figure"][0], PLOTS)
    return draw(found, cfg, references) if draw is plot_events else draw(found, cfg)


def plot_events(found: Found, cfg: Config, references: Found | None = None) -> Figure:
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
    label, log = _label(cfg), cfg.labels.transform != "none"
    axes[0, 0].set(yscale="log" if log else "linear", ylabel=label.replace("log10 ", "") if log else label)
    axes[1, 0].set_ylabel("error [% of the mean truth]")
    _finish(axes.flat)
    return fig


def plot_images(found: Mapping[str, ImagePredictions], cfg: Config) -> Figure:
    """Input, truth, prediction and error of the last entry of `found`, in physical units.

    A row an example; for targets of several channels, a row a channel of the first example. The input of masks carries
    both outlines, and their error is that of the pixels called inside at `target.mask_threshold`.
    """
    split, p = list(found.items())[-1]
    channels, mask = cfg.data.channels, cfg.labels.kind == "mask"
    names = _few(_target_images(p.examples[0]["target"], cfg))
    rows = [(example, name) for example in p.examples[: None if len(names) == 1 else 1] for name in names]
    fig, axes = panels(len(rows), 4)
    for (given, true, said, wrong), (example, name) in zip(axes, rows, strict=True):
        truth, prediction = (_target_images(example[which], cfg)[name] for which in ("target", "prediction"))
        # the last frame, in the channel that is predicted if it is there, else in one that shows much
        wanted = ("hmi_m" if mask else name, "aia171", "aia193", channels[0])
        seen = next(channel for channel in wanted if channel in channels)
        frame = denormalise(example["ts"][channels.index(seen), -1], cfg.scalers[seen])
        show_channel(given, frame.numpy(), seen, f"input: {seen}")
        show_channel(true, truth, name, f"truth: {name}, {example['timestamp'][:16]}")
        show_channel(said, prediction, name, "predicted probability" if mask else "prediction", like=truth)
        if mask:
            given.set_title("truth cyan, prediction red", fontsize=9)
            level, extent = cfg.target.mask_threshold, given.images[0].get_extent()  # the target may be smaller
            for image, edge, color in ((truth, 0.5, "tab:cyan"), (prediction, level, "tab:red")):
                if image.min() < edge < image.max():
                    given.contour(image, [edge], colors=color, linewidths=1.2, extent=extent, origin="lower")
            prediction = prediction >= level
        error, unit = prediction - truth, UNITS.get(name, cfg.target.unit)
        show_error(wrong, error, f"error, rms {np.sqrt((error**2).mean()):.3g} {unit}", unit)
    fig.suptitle(f"{split}: " + ", ".join(f"{name} {value:.2f}" for name, value in p.values.items()), fontsize=10)
    return fig


PLOTS = {"scatter": plot_scatter, "spectrum": plot_spectrum, "event": plot_events, "image": plot_images}


def plot_prediction_series(found: Found, cfg: Config) -> Figure:
    """One split against time, one line a model: truth and predictions of numbers, the first metric of each image."""
    fig, ((axis,),) = panels(1, 1, width=11, height=3)
    key = cfg.target.metrics[0]
    if cfg.labels.numbers:
        first = next(iter(found.values()))
        axis.plot(pd.to_datetime(first.timestamps), first.target[:, 0], "k.-", lw=0.8, label="truth")
    for name, p in found.items():
        values = p.prediction[:, 0] if cfg.labels.numbers else p.scores[key]
        axis.plot(pd.to_datetime(p.timestamps), values, ".-", lw=0.8, alpha=0.8, label=name)
    axis.set(xlabel="time of the image (UTC)", ylabel=_label(cfg) if cfg.labels.numbers else f"{key} of each image")
    axis.tick_params(axis="x", rotation=20)
    _finish([axis])
    return fig


def plot_trust(found: Found, cfg: Config) -> Figure:
    """How far a prediction can be trusted: what was true, on average, where the model said so much (first output, or
    all pixels of the examples).
    """
    fig, ((axis,),) = panels(1, 1, width=4.5, height=3.8)
    for name, p in found.items():
        if cfg.labels.numbers:
            said, true = p.prediction[:, 0], p.target[:, 0]
        else:
            said, true = (torch.stack([x[of] for x in p.examples]).flatten() for of in ("prediction", "target"))
        pairs = pd.DataFrame({"said": said.double().numpy(), "true": true.double().numpy()})
        # few bins, because one with a single sample says nothing
        means = pairs.groupby(pd.cut(pairs["said"], 6), observed=True).mean()
        axis.plot(means["said"], means["true"], "o-", ms=4, color=SPLIT_COLORS.get(name), label=name)
    axis.axline((means["said"].min(),) * 2, slope=1, color="k", lw=0.8)
    axis.set(xlabel=f"predicted {_label(cfg)}", ylabel="what was true there, on average")
    if cfg.labels.kind == "event":
        axis.set(xlabel="predicted probability", ylabel="share of these that were events")
    _finish([axis])
    return fig


def _target_images(target: Tensor, cfg: Config) -> dict[str, np.ndarray]:
    """The channels (H, W) of a target (C, H, W) by name, in physical units where they are channels of the frames."""
    channels = cfg.labels.target_channels
    physical = denormalise(target, stack_scalers(cfg.scalers, channels)) if channels else target
    return dict(zip(channels or [cfg.target.name], physical.numpy(), strict=True))


def _few(names: Iterable[str]) -> list[str]:
    """At most four of many channels, unlike each other where these are there."""
    return sorted(names, key=lambda name: name not in ("aia171", "aia94", "hmi_m", "hmi_v"))[:4]
