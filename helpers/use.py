"""Use what a run, or NASA, has trained: predictions at times that have no label, and embeddings."""

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
import xarray as xr
import zarr
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from tqdm.auto import tqdm

from helpers.analysis.comparison import saved_predictions
from helpers.channels import CHANNELS, UNITS, denormalise, stack_scalers
from helpers.config import SPLITS, Config, load_config, settings_that_matter
from helpers.data.dataset import Loaders, SolarDataset, in_batches, loader_workers
from helpers.data.frames import open_store, prepare_store, store_path
from helpers.data.labels import labels_of, num_outputs
from helpers.experiment import build_model
from helpers.model.checkpoint import RELEASED, CheckpointError, fingerprint, load_adapter, load_released, read_file
from helpers.model.encoder import encoder_of
from helpers.model.heads import POOLS
from helpers.shared import atomic_write, disk_errors, find_weights, lease
from helpers.training.devices import make_accelerator
from helpers.training.loop import predict_splits
from helpers.training.tasks import ImagePredictions, Predictions, make_task
from helpers.training.tracking import BEST, commit_of, finished_run


@dataclass(frozen=True)
class Trained:
    """A model in eval mode, ready for images that have no label."""

    model: nn.Module
    cfg: Config  # of its images and its target
    to_units: Callable[[Tensor], Tensor]  # from its outputs to target units; of events and masks to probabilities
    about: dict[str, str]  # where it comes from, to be written beside its predictions
    count: int  # numbers that it predicts, or channels of its images
    interval: Tensor | None = None  # half width of the 90% interval of each number, (K,) in target units
    coverage: float | None = None  # share of the run's test that lies in its interval
    threshold: float = 0.5  # the probability from which on an event is forecast


def load_run(folder: str | Path, config: str | Path = "config.yaml") -> Trained:
    """The model of a finished run, from the configuration and the weights in its folder; labels are not looked at.

    Where and how fast something runs (paths, device, workers) is as `config` has it on this machine. A CheckpointError
    says why a run cannot be used: not finished, without weights, or its configuration, its checkpoint or the
    normalisation are not those that it was trained with.
    """
    folder, run = Path(folder), finished_run(Path(folder))
    saved, settings = read_file(folder / BEST), settings_that_matter(run["settings"], "resume")
    trained_with, extra = settings_that_matter(saved["config"], "resume"), saved["extra"]
    if changed := [key for key in {**settings, **trained_with} if settings.get(key) != trained_with.get(key)]:
        raise CheckpointError(
            f"{folder / 'config.yaml'} is not what the run was trained with: {', '.join(changed)}. Put that back."
        )
    named = [settings.get(key) or "" for key in ("target.loss", "target.plot", "labels.reader")]
    if foreign := [name for name in named + settings["target.metrics"] if ":" in name and name[:8] != "helpers."]:
        raise CheckpointError(f"{folder / 'config.yaml'} names {foreign}: only what lies in helpers/ is called.")
    blocks = {"profiles": {run["profile"]: {}}, "tasks": {run["task"]: {}}}  # may be gone from today's configuration
    cfg = load_config(config, overrides=settings | blocks)
    if other := [name for name, scaler in cfg.scalers.items() if extra.get("scalers", {}).get(name) != asdict(scaler)]:
        raise CheckpointError(f"{folder.name} was trained with another normalisation (scalers.yaml) of {other}.")
    model = build_model(cfg, len(extra["target_mean"]))
    load_adapter(saved, model)
    mean, std = torch.tensor(extra["target_mean"]), torch.tensor(extra.get("target_std", 1.0))
    to_units = make_task(cfg, SimpleNamespace(target_mean=mean, target_std=std)).to_units
    interval = coverage = None
    if cfg.labels.kind == "scalar" and (folder / "predictions_test.csv").exists():
        val, test = [saved_predictions(folder, cfg, split) for split in ("val", "test")]
        interval = val.interval()
        coverage = ((test.prediction - test.target).abs() <= interval).float().mean().item()
    about = {"run": folder.name, "commit": run["commit"], "weights": fingerprint(saved["state"])}
    count, threshold = len(mean) if cfg.labels.numbers else num_outputs(cfg), run.get("threshold") or 0.5
    return Trained(model.eval(), cfg, to_units, about, count, interval, coverage, threshold)


def load_release(name: str, cfg: Config, **unknown: float) -> Trained:
    """A fine-tuned model of Surya's release: a task of `RELEASED`, hf://owner/name/file, or a file.

    `cfg` is of its task; where its frames are smaller than those of the training, that is said. `unknown` are alpha and
    num_heads of a file that is not the release's own. Its numbers were scaled to 0 ... 1: of spectra the decades from
    -9 to -1.96, of the wind the span of the labels that it has learned from.
    """
    address = RELEASED[name][0] if name in RELEASED else name
    if "://" not in address:
        # a file, which is written like the paths of config.yaml
        address = str(cfg.root / Path(address.replace("{shared}", str(cfg.shared.path))).expanduser())
    own, side = cfg.labels, cfg.data.image_size
    model = load_released(find_weights(address, cfg.shared, cfg.paths.reserve_gb), img_size=side, **unknown)
    takes = list(CHANNELS), [-60, 0][-model.encoder.time_dim :]
    given = cfg.data.channels, cfg.data.offsets_minutes
    if takes != given:
        raise CheckpointError(f"{name} takes the channels and minutes {takes}, and task {cfg.task} has {given}.")
    if side != model.trained_side:
        print(f"{name} was trained at {model.trained_side}^2 pixels, and is given {side}^2.")
    low, high = -9.0, -1.96
    if cfg.task == "solar_wind":
        values = _learned_from(cfg)[1]
        low, high = float(values.min()), float(values.max())
    elif own.kind not in ("event", "mask") and cfg.task != "euv_spectra":
        raise CheckpointError(f"What numbers of {name} mean is known of the tasks solar_wind and euv_spectra alone.")

    def to_units(output: Tensor) -> Tensor:
        return low + (high - low) * output if own.kind == "scalar" else output.sigmoid()

    about = {"released": address, "weights": model.encoder.loaded_from}
    return Trained(model, cfg, to_units, about, model.head[-1].out_features if own.numbers else num_outputs(cfg))


def _learned_from(cfg: Config) -> tuple[np.ndarray, np.ndarray]:
    """Times (N,) and values (N, K) of the labels that the release has learned from: those its files call training."""
    labels = labels_of(cfg)
    training = slice(None) if labels.splits is None else labels.splits == "train"
    return labels.times[training], labels.values[training]


def released_predictions(loaders: Loaders, cfg: Config) -> dict[str, Predictions | ImagePredictions]:
    """What the model `compare.released` says of the test split, as a row beside your runs; {} where it names none.

    How much of the test lies in the years of its training is said.
    """
    name = cfg.compare.released
    if name is None:
        return {}
    trained = load_release(name, cfg)
    found = predict_splits(trained.model, loaders, cfg, to_units=trained.to_units)["test"]
    # of active regions the release has a file a year
    learned = pd.to_datetime(["2011", "2012", "2013"] if cfg.task == "ar_segmentation" else _learned_from(cfg)[0]).year
    inside = pd.to_datetime(found.timestamps).year.isin(learned)
    print(f"{inside.sum()} of {len(inside)} test samples lie in years of its training: {sorted({*learned.tolist()})}.")
    return {f"released {name}": found}


def computed(compute: Callable[[dict], Tensor], model: nn.Module, data: Dataset, cfg: Config) -> Iterator[Tensor]:
    """What `compute`, the model or a part of it, returns of each batch of the samples, in order, on the CPU."""
    accelerator = make_accelerator(cfg)
    model.to(accelerator.device)
    for batch in in_batches(data, cfg, loader_workers(cfg)):
        with torch.no_grad(), accelerator.autocast():
            output = compute(batch).float()
        yield output.cpu().contiguous()


def predict_times(trained: Trained, times: Iterable, out: str | Path, progress: bool = True) -> Path:
    """Predict at times (UTC) that need no label, and write `out`: numbers as .csv, masks and images as .zarr.

    Frames that lack are built, and no others. Times without frames are left out and named. A call that was interrupted
    goes on with the batch at which it stopped, and writes the same file. Of numbers a row has `timestamp`, and of each
    `prediction_<k>` in target units, `lower_<k>` and `upper_<k>` of its 90% interval where there is one, `physical_<k>`
    where the target is a logarithm, and of a probability `event_<k>`, whether it reaches the run's threshold.

    FileExistsError: `out` is there. ValueError: its ending is wrong, no time has its frames, or one is not in their
    calendar.
    """
    cfg, own, out = trained.cfg, trained.cfg.labels, Path(out)
    ending = ".csv" if own.numbers else ".zarr"
    if out.suffix != ending:
        raise ValueError(f"OUT={out} must end in {ending} for task {cfg.task}.")
    with disk_errors(out.parent), lease(out, what=out.name):  # two at once would write into one store
        if out.exists():
            raise FileExistsError(f"{out} is there already, and nothing is overwritten: name another file in OUT.")
        data = _samples(cfg, times, progress)
        folder = _unfinished(out, trained, data)
        array = zarr.open_group(folder, mode="a", use_consolidated=False)["prediction"]
        # each batch begins where it would have in one go, as the last bits of a number may depend on its batch
        done = array.attrs.get("done", 0)
        with tqdm(total=len(data), initial=done, unit="time", disable=not progress) as bar:
            for output in computed(trained.model, trained.model, Subset(data, range(done, len(data))), cfg):
                found = trained.to_units(output)
                if own.target_channels:
                    found = denormalise(found, stack_scalers(cfg.scalers, own.target_channels))
                array[done : done + len(found)] = found.numpy()
                array.attrs["done"] = done = done + len(found)
                bar.update(len(found))
        if not own.numbers:
            return folder.rename(out)
        table = pd.DataFrame({"timestamp": [time.isoformat() for time in data.samples["time"]]})
        for k, values in enumerate(array[:].T):
            table[f"prediction_{k}"] = values
            if trained.interval is not None:
                half = trained.interval[k].item()
                table[f"lower_{k}"], table[f"upper_{k}"] = values - half, values + half
            if own.kind == "event":
                table[f"event_{k}"] = values >= trained.threshold
            elif own.transform != "none" and own.aggregate != "any":
                table[f"physical_{k}"] = own.physical(values)
        with atomic_write(out) as temporary:
            table.to_csv(temporary, index=False)
        shutil.rmtree(folder)
        return out


def _samples(cfg: Config, times: Iterable, progress: bool) -> SolarDataset:
    """The samples at these times, without labels, once their frames are built."""
    table, offsets = pd.DataFrame({"time": np.unique(np.array(list(times), "datetime64[s]"))}), cfg.data.offsets_minutes
    wanted = table["time"].to_numpy()[:, None] + np.array(offsets, "timedelta64[m]")  # (N, T)
    report = prepare_store(cfg, wanted.flatten(), progress=progress)
    store = open_store(store_path(cfg), cfg.data.channels, cfg.data.reduce, cfg.data.native_size, cfg.scalers)
    whole = np.isin(wanted, store.times).all(axis=1)
    if not whole.all():
        lacking = table["time"][~whole]
        span = f"{lacking.iloc[0]} to {lacking.iloc[-1]}"
        print(f"{report}\n{len(lacking)} of {len(table)} times are left out, {span}, as a frame lacks.")
    if not whole.any():
        raise ValueError(f"None of the {len(table)} times has its frames in {store.path}.")
    return SolarDataset(store, None, table[whole].reset_index(drop=True), offsets)


def _unfinished(out: Path, trained: Trained, data: SolarDataset) -> Path:
    """The store that an interrupted call for the same model and times has left beside `out`, or a new one of NaN."""
    folder, cfg, own = out.with_name(f"{out.name}.unfinished"), trained.cfg, trained.cfg.labels
    request = repr((settings_that_matter(cfg, "resume"), [time.isoformat() for time in data.samples["time"]]))
    asked = trained.about | {"predicted_by": commit_of(cfg.root)}
    asked["request"] = hashlib.sha256(request.encode()).hexdigest()[:16]
    if (folder / ".zmetadata").exists() and dict(zarr.open_group(folder, mode="r").attrs) == asked:  # written last
        return folder
    side, coords = cfg.data.image_size // own.reduce, {"time": data.samples["time"].to_numpy("datetime64[ns]")}
    axes, shape, chunk = ("time", "number"), (trained.count,), cfg.training.batch_size
    unit = {"mask": "probability", "event": "probability"}.get(own.kind, cfg.target.unit)
    if not own.numbers:
        axes, shape, chunk = ("time", "channel", "y", "x"), (trained.count, side, side), 1
        coords["channel"] = np.array(own.target_channels or [cfg.target.name], object)
    note = {
        "units": ", ".join(UNITS[name] for name in own.target_channels) or unit,
        "orientation": "row 0 is the south",
        "native_pixels": cfg.data.reduce * own.reduce,  # of SDO to a side of one of these
    }
    nothing = xr.Variable(axes, np.broadcast_to(np.float32("nan"), (len(data), *shape)), note)
    form = {"zarr_format": 2, "consolidated": True, "encoding": {"prediction": {"chunks": (chunk, *shape)}}}
    xr.Dataset({"prediction": nothing}, coords, asked).to_zarr(folder, mode="w", **form)
    return folder


def embed(model: nn.Module, loaders: Loaders, cfg: Config, pooling: str = "mean") -> xr.Dataset:
    """The tokens of an encoder, pooled over each image (mean, max or class_token), for all samples of the three splits.

    Returns:
        `features` (sample, feature) float32, with `time` and `split` of each sample and, for numbers, `target` (sample,
        output) in target units. `.to_zarr(path)` keeps it.
    """
    encoder, token, parts = encoder_of(model.eval()), getattr(model, "class_token", None), []
    if pooling not in ("mean", "max", "class_token") or pooling == "class_token" and not encoder.nglo:
        raise ValueError(f"Features are pooled by mean or max, or class_token of a model that has one, not {pooling}.")
    pool, first = POOLS[pooling](encoder.embed_dim), 0 if pooling == "class_token" else encoder.nglo

    def pooled(batch: dict) -> Tensor:
        return pool(encoder(batch["ts"].to(next(encoder.parameters()).device), token)[:, first:])

    for split in SPLITS:
        data = getattr(loaders, split).dataset
        features = torch.cat([*computed(pooled, model, data, cfg)]).numpy()
        coords = {"time": ("sample", data.samples["time"]), "split": ("sample", np.full(len(data), split, object))}
        parts.append(xr.Dataset({"features": (("sample", "feature"), features)}, coords))
        if data.targets is not None:
            parts[-1]["target"] = ("sample", "output"), data.targets.numpy()
    return xr.concat(parts, "sample")
