"""What is to beat without any model: the mean of the training targets, and persistence."""

from helpers.config import Config
from helpers.data.dataset import Loaders
from helpers.training.tasks import ImagePredictions, Predictions, make_task


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
