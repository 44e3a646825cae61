"""What is to beat without looking at the Sun: the references that a forecaster would ask for."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss, mean_squared_error
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from helpers.config import SPLITS, Config
from helpers.data.dataset import Loaders, SolarDataset
from helpers.data.labels import ANY_TIME, Labels
from helpers.training.tasks import ImagePredictions, Predictions, make_task, metrics_of

ROTATION = np.timedelta64(round(27.27 * 86400), "s")  # of the Sun, as the Earth sees it (synodic)
WINDOWS = 24, 72, 27 * 24  # hours that "past activity" looks back
PENALTIES = 0.01, 1, 100, 10_000  # of the weights of "past activity"


def reference_predictions(loaders: Loaders, split: str, cfg: Config) -> dict[str, Predictions | ImagePredictions]:
    """Predictions without a model of images for one split ("train", "val" or "test"), in target units.

    "mean of training": of events their share, of images the mean image.
    "persistence": the last label known at the time of the sample; of channels of later frames, those of that time.
    "recurrence" (numbers, events): the label known a solar rotation (within an hour) before that of the sample.
    "past activity" (numbers, events): as below, of at most 20 outputs and where training has both classes.

    Where no label is known yet, the mean of training takes its place, so that all are judged on the same samples; a
    reference without history for more than half of the samples is left out.
    """
    data, mean = getattr(loaders, split).dataset, loaders.target_mean.numpy()
    predictions, times = {}, [time.isoformat() for time in data.samples["time"]]
    if data.targets is None:
        references = {"mean of training": lambda row: loaders.target_mean}
        if cfg.labels.target_channels and cfg.labels.target_offset_minutes > 0:
            now = replace(data.labels, offset_minutes=0)
            references["persistence"] = SolarDataset(data.store, now, data.samples).target
        for name, predicted in references.items():
            collector = make_task(cfg, loaders).collector(samples=0)
            for n, time in enumerate(times):
                collector.add(predicted(n)[None], data.target(n)[None], {"timestamp": [time]})
            predictions[name] = collector.predictions()
        return predictions
    known = known_labels(data.labels, data.samples, cfg)
    before = pd.DatetimeIndex(data.samples["label_time"].to_numpy("datetime64[s]") - ROTATION)
    again = 1 + pd.DatetimeIndex(data.labels.times).get_indexer(before, "nearest", tolerance=pd.Timedelta("1h"))
    found = {"mean of training": np.tile(mean, (len(data), 1))}
    values = np.vstack([mean, data.labels.values])  # (1 + labels, K), so row n is the last of n labels
    rows = {"persistence": known, "recurrence": np.where(again <= known, again, 0)}
    found |= {name: values[row] for name, row in rows.items() if np.mean(row > 0) >= 0.5}
    one_class = cfg.labels.kind == "event" and np.isin(loaders.train.dataset.targets.mean(0), (0, 1)).any()
    if "persistence" in found and len(mean) <= 20 and not one_class:
        found["past activity"] = past_activity(loaders, data, cfg)
    said = {name: Predictions(torch.tensor(p, dtype=torch.float32), data.targets, times) for name, p in found.items()}
    chosen = said if split == "val" else reference_predictions(loaders, "val", cfg)
    for name in said.keys() & chosen:
        said[name].threshold = chosen[name].choose_threshold(cfg)
    return said


def known_labels(labels: Labels, samples: pd.DataFrame, cfg: Config) -> np.ndarray:
    """How many labels, counted from the first, are known at the time of each sample, (N,).

    What a label speaks of must be over (`labels.spans_hours`, or the end of `labels.window_hours`, after its own time).
    The label of the sample itself, or a later one, never counts.
    """
    hours = cfg.labels.window_hours[1] if cfg.labels.window_hours else cfg.labels.spans_hours
    over = labels.times + np.timedelta64(round(3600 * hours), "s")
    known = np.searchsorted(over, samples["time"].to_numpy("datetime64[s]"), side="right")
    return np.minimum(known, np.searchsorted(labels.times, samples["label_time"].to_numpy("datetime64[s]")))


def past_activity(loaders: Loaders, data: SolarDataset, cfg: Config) -> np.ndarray:
    """Predictions (N, K) from `history` alone: ridge regression, of events logistic regression (probabilities). Fitted
    on training without the labels of validation and test, even where these lie earlier; the penalty is chosen on
    validation, by squared error or log loss, without the labels of test.
    """
    train, val, test = (getattr(loaders, name).dataset for name in SPLITS)
    events, mean, columns = cfg.labels.kind == "event", loaders.target_mean.numpy(), []
    seen = history(train, pd.concat([val.samples, test.samples]), mean, cfg)
    asked = np.concatenate([history(val, test.samples, mean, cfg), history(data, data.samples[:0], mean, cfg)])
    for k, (target, truth) in enumerate(zip(train.targets.T.numpy(), val.targets.T.numpy(), strict=True)):
        tried = {}  # error on validation -> what is said of `data`
        for penalty in PENALTIES:
            linear = LogisticRegression(C=1 / penalty, max_iter=1000) if events else Ridge(alpha=penalty)
            model = make_pipeline(StandardScaler(), linear).fit(seen[:, k], target)
            said = model.predict_proba(asked[:, k])[:, 1] if events else model.predict(asked[:, k])
            guess, said = said[: len(val)], said[len(val) :]
            tried[log_loss(truth, guess, labels=[0, 1]) if events else mean_squared_error(truth, guess)] = said
        columns.append(tried[min(tried)])
    return np.stack(columns, axis=1)


def history(data: SolarDataset, hidden: pd.DataFrame, mean: np.ndarray, cfg: Config) -> np.ndarray:
    """What is known of each output at each sample, if the labels of the samples `hidden` are not: (N, K, features).

    The last label; mean and maximum of the `WINDOWS` that end with it; of events the hours from the last one to it, at
    most the longest window. Where nothing is known, the only label is `mean` (K,), long ago.
    """
    kept = ~np.isin(data.labels.times, hidden["label_time"].to_numpy("datetime64[s]"))
    labels = replace(data.labels, times=data.labels.times[kept], values=data.labels.values[kept])
    times, values = np.r_[np.datetime64(ANY_TIME[0], "s"), labels.times], np.vstack([mean, labels.values])
    windows = [pd.DataFrame(values, times).rolling(f"{hours}h") for hours in WINDOWS]
    parts = [values, *(window.mean() for window in windows), *(window.max() for window in windows)]
    if cfg.labels.kind == "event":
        now = times.astype(float)[:, None] / 3600
        parts.append(np.minimum(now - np.maximum.accumulate(np.where(values == 1, now, -np.inf)), WINDOWS[-1]))
    return np.stack(parts, axis=2)[known_labels(labels, data.samples, cfg)]


def verdict(
    found: Predictions | ImagePredictions, references: Mapping[str, Any], cfg: Config, key: str | None = None
) -> str:
    """A sentence: whether predictions beat every one of `reference_predictions` of the same split by a metric: `key`,
    or None for the first of the configuration, and TSS where events can be told apart.
    """
    if key is None and cfg.event_threshold is not None and cfg.target.metrics[0] != "tss":
        return "\n".join(verdict(found, references, cfg, name) for name in (cfg.target.metrics[0], "tss"))
    key = key or cfg.target.metrics[0]
    sign = 1 if metrics_of(cfg)[key].higher_is_better else -1
    scores = {name: p.metrics(cfg)[key] for name, p in references.items()}
    name = max(scores, key=lambda name: sign * scores[name] if math.isfinite(scores[name]) else -math.inf)
    own = found.metrics(cfg)[key]
    if math.isnan(own) or math.isnan(scores[name]):
        return f"{key} is not a number here, so nothing can be said about the references."
    word = "beats" if sign * (own - scores[name]) > 0 else "DOES NOT BEAT"
    return f"The model {word} the best reference, {name}: {key} {own:.3f} against {scores[name]:.3f}."
