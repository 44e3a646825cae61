"""What is to beat without any model: the mean of the training targets, and persistence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from helpers.config import Config
from helpers.data.dataset import Loaders
from helpers.training.tasks import ImagePredictions, Predictions, make_task, metrics_of


def reference_predictions(loaders: Loaders, split: str, cfg: Config) -> dict[str, Predictions | ImagePredictions]:
    """Predictions without a model for one split ("train", "val" or "test"), in target units.

    Returns:
        "mean of training": the mean of the training targets for every sample (of images: the mean image). Where the
        target is a later frame also "persistence": the same channels at the time of the sample.
    """
    data = getattr(loaders, split).dataset
    references = {"mean of training": lambda row: loaders.target_mean}
    if cfg.labels.target_channels and cfg.labels.target_offset_minutes > 0:
        references["persistence"] = data.at_offset(0).target
    predictions = {}
    for name, predicted in references.items():
        collector = make_task(cfg, loaders).collector(samples=0)
        for row, time in enumerate(data.samples["time"]):
            target = data.target(row)
            collector.add(predicted(row)[None], target[None], {"timestamp": [time.isoformat()]})
        predictions[name] = collector.predictions()
    return predictions


def verdict(found: Predictions | ImagePredictions, references: Mapping[str, Any], cfg: Config) -> str:
    """A sentence: whether predictions beat every reference on the same samples, by the first metric.

    Args:
        references: of `reference_predictions`, for the same split.
    """
    key = cfg.target.metrics[0]
    sign = 1 if metrics_of(cfg)[key].higher_is_better else -1
    scores = {name: p.metrics(cfg)[key] for name, p in references.items()}
    name = max(scores, key=lambda name: sign * scores[name] if math.isfinite(scores[name]) else -math.inf)
    own = found.metrics(cfg)[key]
    if math.isnan(own) or math.isnan(scores[name]):
        return f"{key} is not a number here, so nothing can be said about the references."
    word = "beats" if sign * (own - scores[name]) > 0 else "DOES NOT BEAT"
    return f"The model {word} the best reference, {name}: {key} {own:.3f} against {scores[name]:.3f}."
