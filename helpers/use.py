"""Use what a run, or NASA, has trained: predictions at times that have no label, and embeddings."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
import yaml
import zarr
from einops import reduce
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from helpers.channels import UNITS, denormalise, stack_scalers
from helpers.config import SPLITS, Config, load_config, settings_that_matter
from helpers.data.dataset import Loaders, SolarDataset
from helpers.data.frames import open_store, prepare_store, store_path
from helpers.data.labels import labels_of
from helpers.experiment import build_model
from helpers.model.checkpoint import CheckpointError, fingerprint, load_adapter, load_released, read_file
from helpers.shared import atomic_write, find_weights
from helpers.training.devices import make_accelerator
from helpers.training.tasks import ImagePredictions, Predictions, make_task
from helpers.training.tracking import BEST

# the fine-tuned models of Surya's release, by their tasks in config.yaml
RELEASED = {
    "flare_24h": "hf://nasa-ibm-ai4science/solar_flares_surya/solar_flare_weights.pth",
    "solar_wind": "hf://nasa-ibm-ai4science/solar_wind_surya/solar_wind_weights.pth",
    "ar_segmentation": "hf://nasa-ibm-ai4science/ar_segmentation_surya/ar_segmentation_weights.pth",
    "euv_spectra": "hf://nasa-ibm-ai4science/euv_spectra_surya/euv_spectra_weights.pth",
}


@dataclass(frozen=True)
class Trained:
    """A model in eval mode, ready for images that have no label."""

    model: nn.Module
    cfg: Config  # of its images and its target
    to_units: Callable[[Tensor], Tensor]  # from its outputs to target units; of events and masks to probabilities
    about: dict[str, str]  # where it comes from, to be written beside its predictions
    interval: Tensor | None = None  # half width of the 90% interval of each number, (K,) in target units

    def outputs(self, loader: DataLoader) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Of each batch of a loader the predictions in target units, on the CPU, and the batch itself."""
        accelerator = make_accelerator(self.cfg)
        self.model.to(accelerator.device)
        for batch in loader:
            with torch.no_grad(), accelerator.autocast():
                output = self.model(batch).float()
            yield self.to_units(output.cpu().contiguous()), batch


def load_run(folder: str | Path, config: str | Path = "config.yaml") -> Trained:
    """The model of a finished run, from the configuration and the weights in its folder; labels are not looked at.

    Where and how fast something runs (paths, device, workers) is as `config` has it on this machine. A CheckpointError
    says why a run cannot be used: not finished, without weights, or its configuration, its checkpoint or the
    normalisation are not those that it was trained with.
    """
    folder = Path(folder)
    try:
        about = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        settings = settings_that_matter(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")), "resume")
        status, profile, task, commit = about["status"], settings["profile"], settings["task"], about["commit"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise CheckpointError(
            f"{folder} is no run, or its record is damaged ({type(error).__name__}: {error})."
        ) from None
    if status != "finished" or not (folder / BEST).exists():
        why = f"it is {status}" if status != "finished" else f"its weights ({BEST}) are not there"
        raise CheckpointError(f"The run {folder.name} cannot be used: {why}. Train it to the end, or choose another.")
    saved = read_file(folder / BEST)
    trained_with, extra = settings_that_matter(saved["config"], "resume"), saved["extra"]
    if changed := [key for key in {**settings, **trained_with} if settings.get(key) != trained_with.get(key)]:
        raise CheckpointError(
            f"{folder / 'config.yaml'} is not what the run was trained with: {', '.join(changed)}. Put that back."
        )
    blocks = {"profiles": {profile: {}}, "tasks": {task: {}}}  # which may be gone from today's configuration
    cfg = load_config(config, overrides=settings | blocks)
    if other := [name for name, numbers in extra["scalers"].items() if asdict(cfg.scalers[name]) != numbers]:
        raise CheckpointError(f"{folder.name} was trained with another normalisation (data.scalers) of {other}.")
    model = build_model(cfg, len(extra["target_mean"]))
    load_adapter(folder / BEST, model)
    mean, std = torch.tensor(extra["target_mean"]), torch.tensor(extra.get("target_std", 1.0))
    to_units = make_task(cfg, SimpleNamespace(target_mean=mean, target_std=std)).to_units
    interval = None
    if cfg.labels.kind == "scalar" and (folder / "predictions_val.csv").exists():
        interval = Predictions.from_table(pd.read_csv(folder / "predictions_val.csv")).interval()
    origin = {"run": folder.name, "commit": commit, "weights": fingerprint(saved["state"])}
    return Trained(model.eval(), cfg, to_units, origin, interval)


def load_release(name: str, cfg: Config, **unknown: float) -> Trained:
    """A fine-tuned model of Surya's release: a name of `RELEASED`, hf://owner/name/file, or a file.

    `cfg` is of its task, with frames as it takes them. `unknown` are alpha and num_heads of a file that is not the
    release's own. The outputs for spectra and the wind were scaled to 0 ... 1: of spectra the decades from -9 to -1.96,
    of the wind the span of the training labels of the release, which are read for it.
    """
    address = RELEASED.get(name, name)
    model = load_released(find_weights(address, cfg.shared, cfg.paths.reserve_gb), **unknown)
    takes = model.encoder.in_chans, model.encoder.time_dim, model.encoder.img_size
    given = len(cfg.data.channels), cfg.model.time_dim, cfg.data.image_size
    if takes != given:
        raise CheckpointError(
            f"{name} takes images of (channels, frames, pixels) {takes}, and task {cfg.task} on profile {cfg.profile} "
            f"has {given}. Those of the release want their own task and PROFILE=surya_4k."
        )
    low, high = -9.0, -1.96
    if cfg.labels.kind == "scalar" and cfg.labels.transform == "none":
        labels = labels_of(cfg)
        values = labels.values if labels.splits is None else labels.values[labels.splits == "train"]
        low, high = float(values.min()), float(values.max())

    def to_units(output: Tensor) -> Tensor:
        return low + (high - low) * output if cfg.labels.kind == "scalar" else output.sigmoid()

    return Trained(model, cfg, to_units, {"released": address, "weights": model.encoder.loaded_from})


def judge(trained: Trained, loaders: Loaders, split: str) -> Predictions | ImagePredictions:
    """What such a model says of a split whose truth is known."""
    loader = getattr(loaders, split)
    collector = make_task(trained.cfg, loaders).collector(len(loader.dataset))
    for prediction, batch in trained.outputs(loader):
        collector.add(prediction, batch["target"], batch)
    return collector.predictions()


def predict_times(trained: Trained, times: Iterable, out: str | Path, progress: bool = True) -> Path:
    """Predict at times (UTC) that need no label, and write `out`: numbers as CSV, masks and images as a Zarr store.

    Frames that lack are built, and no others. Times without frames are left out and named. A call that was interrupted
    goes on with the batch at which it stopped, and writes the same file.

    FileExistsError: `out` is there. ValueError: no time has its frames, or one is not in the calendar of frames.
    """
    cfg, out = trained.cfg, Path(out)
    if out.exists():
        raise FileExistsError(f"{out} is there already, and nothing is overwritten: name another file in OUT.")
    data = _samples(cfg, times, progress)
    group, size, first = _unfinished(out, trained, data), cfg.training.batch_size, 0
    # each batch begins where it would have in one go, as the last bits of a number may depend on its batch
    while "prediction" in group and first < len(data) and not np.isnan(group["prediction"][first : first + size]).any():
        first += size
    loader = DataLoader(Subset(data, range(first, len(data))), size, num_workers=cfg.training.loader_workers)
    with tqdm(total=len(data), initial=first, unit="time", disable=not progress) as bar:
        for prediction, _ in trained.outputs(loader):
            channels = cfg.labels.target_channels
            if channels:
                prediction = denormalise(prediction, stack_scalers(cfg.scalers, channels))
            if "prediction" not in group:
                _create(group, len(data), prediction, cfg)
            group["prediction"][first : first + len(prediction)] = prediction.numpy()
            first += len(prediction)
            bar.update(len(prediction))
    if cfg.labels.numbers:
        table = number_table(torch.from_numpy(group["prediction"][:]), data.samples["time"], trained)
        with atomic_write(out) as temporary:
            table.to_csv(temporary, index=False)
        shutil.rmtree(group.store.root)
    else:
        zarr.consolidate_metadata(group.store)
        group.store.root.rename(out)
    return out


def number_table(prediction: Tensor, times: Iterable, trained: Trained) -> pd.DataFrame:
    """A row for each of N times: `timestamp`, and of each of the K numbers `prediction_<k>` in target units, with the
    limits `lower_<k>` and `upper_<k>` of its 90% interval where there is one, and `physical_<k>` where the target is a
    logarithm. `prediction` is (N, K).
    """
    own, columns = trained.cfg.labels, {"timestamp": [pd.Timestamp(time).isoformat() for time in times]}
    for k, values in enumerate(prediction.T.numpy()):
        columns[f"prediction_{k}"] = values
        if trained.interval is not None:
            half = trained.interval[k].item()
            columns |= {f"lower_{k}": values - half, f"upper_{k}": values + half}
        if own.kind == "scalar" and own.transform != "none":
            columns[f"physical_{k}"] = own.physical(values)
    return pd.DataFrame(columns)


def _samples(cfg: Config, times: Iterable, progress: bool) -> SolarDataset:
    """The samples at these times, without labels, once their frames are built."""
    table, offsets = pd.DataFrame({"time": np.unique(np.array(list(times), "datetime64[s]"))}), cfg.data.offsets_minutes
    wanted = table["time"].to_numpy()[:, None] + np.array(offsets, "timedelta64[m]")  # (N, T)
    report = prepare_store(cfg, wanted.flatten(), progress=progress)
    store = open_store(store_path(cfg), cfg.data.channels, cfg.data.reduce, cfg.data.native_size, cfg.scalers)
    whole = np.isin(wanted, store.times).all(axis=1)
    if not whole.all():
        print(f"{report}\nLeft out, as a frame lacks: {', '.join(table['time'][~whole].astype(str))}")
    if not whole.any():
        raise ValueError(f"None of the {len(table)} times has its frames in {store.path}.")
    return SolarDataset(store, None, table[whole].reset_index(drop=True), offsets)


def _unfinished(out: Path, trained: Trained, data: SolarDataset) -> zarr.Group:
    """What an interrupted call for the same model and times has left beside `out`, or a group without predictions."""
    folder, own = out.with_name(f"{out.name}.unfinished"), trained.cfg.labels
    asked = trained.about | {"times": [time.isoformat() for time in data.samples["time"]]}
    if (folder / ".zattrs").exists() and dict(zarr.open_group(folder, mode="r").attrs) == asked:
        return zarr.open_group(folder, mode="a")
    axes = {"time": data.samples["time"].to_numpy("datetime64[ns]")}
    if not own.numbers:
        names = own.target_channels or [trained.cfg.target.name] * trained.cfg.num_outputs
        axes["channel"] = np.array(names, object)  # of any length
    xr.Dataset(coords=axes, attrs=asked).to_zarr(folder, mode="w", zarr_format=2, consolidated=False)
    return zarr.open_group(folder, mode="a")


def _create(group: zarr.Group, count: int, example: Tensor, cfg: Config) -> None:
    """Make the array of `count` predictions like those in `example` (B, K) or (B, C, H, W)."""
    own, shape = cfg.labels, tuple(example.shape[1:])
    axes, chunk = (("time", "number"), cfg.training.batch_size) if own.numbers else (("time", "channel", "y", "x"), 1)
    unit = "probability" if own.kind == "mask" else cfg.target.unit
    unit = ", ".join(UNITS[name] for name in own.target_channels) or unit
    note = {"units": unit, "long_name": cfg.target.name, "orientation": "row 0 is the south", "_ARRAY_DIMENSIONS": axes}
    form = {"chunks": (chunk, *shape), "fill_value": float("nan"), "attributes": note}
    group.create_array("prediction", shape=(count, *shape), dtype="f4", **form)


@torch.no_grad()
def embed(model: nn.Module, loaders: Loaders, cfg: Config, pooling: str = "mean") -> xr.Dataset:
    """The tokens of an encoder, pooled over each image (mean, max or class_token), for all samples of the three splits.

    Returns:
        `features` (sample, feature) float32, with `time` and `split` of each sample and, for numbers, `target` (sample,
        output) in target units. `.to_zarr(path)` keeps it.
    """
    accelerator, token, parts = make_accelerator(cfg), getattr(model, "class_token", None), []
    encoder = model.to(accelerator.device).eval().encoder

    def pooled(ts: Tensor) -> Tensor:
        with accelerator.autocast():
            tokens = encoder(ts.to(accelerator.device), token).float()  # (B, nglo + L, D)
        if pooling == "class_token":
            return tokens[:, 0].cpu()
        return reduce(tokens[:, encoder.nglo :], "b l d -> b d", pooling).cpu()

    for split in SPLITS:
        data = getattr(loaders, split).dataset
        batches = DataLoader(data, cfg.training.batch_size, num_workers=cfg.training.loader_workers)
        about = {"time": ("sample", data.samples["time"]), "split": ("sample", np.full(len(data), split, object))}
        features = torch.cat([pooled(batch["ts"]) for batch in batches]).numpy()
        parts.append(xr.Dataset({"features": (("sample", "feature"), features)}, about))
        if data.targets is not None:
            parts[-1]["target"] = ("sample", "output"), data.targets.numpy()
    return xr.concat(parts, "sample")
