"""The training loop that the notebooks share: device, precision, accumulation, schedule, best epoch, early stop."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from helpers.config import Config, find_named
from helpers.dataset import Loaders
from helpers.heads import FeatureModel
from helpers.metrics import METRICS
from helpers.tasks import Collector, ImagePredictions, Predictions, check_shapes, compute_loss, to_target_units

if TYPE_CHECKING:
    from helpers.tracking import Run


@dataclass
class History:
    """One row an epoch (epoch 0 is before training, on a part of the training split) and which epoch was kept."""

    rows: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0
    stopped: str = ""

    @property
    def table(self) -> pd.DataFrame:
        """The rows as a table indexed by epoch."""
        return pd.DataFrame(self.rows).set_index("epoch")


class Diverged(FloatingPointError):
    """The loss is no longer finite. `history` has the epochs before; the model holds the best of them again."""

    def __init__(self, message: str, history: History) -> None:
        super().__init__(message)
        self.history = history


def seed_everything(cfg: Config) -> None:
    """Seed Python, NumPy and torch, so that new layers start the same in every run of this configuration.

    With `training.deterministic` every later operation is the same bit for bit, too, or raises where the device has no
    such way; slower on a GPU.
    """
    set_seed(cfg.seed)
    if cfg.training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(cfg.training.deterministic)


def standardise_features(model: nn.Module, loaders: Loaders, cfg: Config) -> None:
    """Give a 1D model the mean and deviation of its features over `head.feature_batches` batches of the training split.

    The model is moved to the device that will train it, and runs in the precision of the training. A 2D model reads
    normalised pixels, or tokens as the decoder of the checkpoint does, and stays as it is.
    """
    if not isinstance(model, FeatureModel):
        return
    accelerator = make_accelerator(cfg)
    model.to(accelerator.device)
    with accelerator.autocast():
        model.fit_features(loaders.train, limit=cfg.head.feature_batches)


def fit(model: nn.Module, loaders: Loaders, cfg: Config, run: Run | None = None) -> History:
    """Train what requires a gradient and leave the model with the weights of its best epoch.

    Losses are in the units of learning (`helpers.tasks`: numbers are standardised), metrics in target units. Epoch 0 is
    judged before any step, so a broken set-up shows at once.

    Args:
        model: takes the batch dict, returns (B, K) or (B, C, H, W).
        loaders: of `helpers.dataset.make_loaders`.
        cfg: `training` and `target` are read.
        run: gets one row an epoch as it happens; None keeps the history in memory alone.

    Returns:
        The `History`; `history.table` has the learning rate, losses, validation metrics and seconds of each epoch.

    Raises:
        ValueError: nothing to train, an output that does not have the target's shape, or a metric that cannot choose.
        Diverged: the loss is no longer finite; says at which step, what to change, and which weights the model has now.
    """
    settings = cfg.training
    accelerator = make_accelerator(cfg)
    optimizer = torch.optim.AdamW(parameter_groups(model, cfg))
    inner = model  # accelerate may wrap it for several processes
    model, optimizer, train = accelerator.prepare(model, optimizer, loaders.train)
    steps = math.ceil(len(train) / settings.accumulation) * settings.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, _learning_rate_shape(cfg, steps))
    key, better = cfg.target.metrics[0], find_named(cfg.target.metrics[0], METRICS).higher_is_better
    history, best, kept = History(), -math.inf, {}
    bar = tqdm(total=settings.epochs * len(train), unit="batch", disable=not accelerator.is_main_process)
    try:
        for epoch in range(settings.epochs + 1):
            bar.set_description(f"epoch {epoch}/{settings.epochs}")
            started = time.perf_counter()
            if epoch:
                loss = _epoch(model, train, optimizer, schedule, loaders, cfg, accelerator, bar)
            else:
                loss = _loss_before(model, loaders, cfg, accelerator)
            judged = _judge(model, loaders, "val", cfg, accelerator)
            row = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"], "train_loss": loss, **judged}
            row["seconds"] = time.perf_counter() - started
            history.rows.append(row)
            if run is not None and accelerator.is_main_process:
                run.log(row, step=epoch)
            bar.set_postfix({"train loss": f"{loss:.3f}", f"val {key}": f"{row[f'val_{key}']:.3f}"})
            if epoch == 0:
                _check_judged(row, key)
            score = row[f"val_{key}"] * (1 if better else -1)
            if score > best:
                best, history.best_epoch, kept = score, epoch, _trainable_copy(inner)
            elif epoch - history.best_epoch >= settings.patience:
                history.stopped = f"no better validation {key} for {settings.patience} epochs"
                break
    except _NotFinite as error:
        raise Diverged(_what_diverged(error, history, cfg), history) from None
    finally:
        bar.close()
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # gives the model its own forward back
        inner.load_state_dict(kept, strict=False)
    return history


@torch.no_grad()
def predict(model: nn.Module, loaders: Loaders, split: str, cfg: Config) -> Predictions | ImagePredictions:
    """Predictions and targets of one split ("train", "val" or "test") in target units, in the order of time.

    Of images, the metrics of the split and of each image are kept, and a few examples.
    """
    accelerator = make_accelerator(cfg)
    model = model.to(accelerator.device)
    loader = _in_order(getattr(loaders, split), cfg) if split == "train" else getattr(loaders, split)
    collector = Collector(loaders, cfg, _times(loader.dataset))
    for output, target, batch in _outputs(model, loader, cfg, accelerator):
        collector.add(to_target_units(output, loaders, cfg), target, batch)
    return collector.predictions()


def reference_predictions(loaders: Loaders, split: str, cfg: Config) -> dict[str, Predictions | ImagePredictions]:
    """What is to beat without any model, for one split.

    Returns:
        "mean of training": the mean of the training targets for every sample (of images: the mean image). Where the
        target is a later frame also "persistence": the same channels at the time of the sample.
    """
    data = getattr(loaders, split).dataset
    found = {"mean of training": lambda row: loaders.target_mean}
    if cfg.labels.kind == "image" and cfg.labels.target_channels and cfg.labels.target_offset_minutes > 0:
        now = copy.copy(data)
        now.labels = replace(data.labels, offset_minutes=0)
        found["persistence"] = now.target
    collected = {}
    for name, predicted in found.items():
        collector = Collector(loaders, cfg)
        for row, moment in enumerate(_times(data)):
            target = data.targets[row] if cfg.labels.kind == "scalar" else data.target(row)
            collector.add(predicted(row)[None], target[None], {"timestamp": [moment]})
        collected[name] = collector.predictions()
    return collected


def metrics_table(found: Mapping[str, Predictions | ImagePredictions], cfg: Config) -> pd.DataFrame:
    """One row for each entry of `found`, one column a metric."""
    return pd.DataFrame({name: predictions.metrics(cfg) for name, predictions in found.items()}).T


# --------------------------------------------------------------------------------------------------------------------
# Device, precision, optimiser
# --------------------------------------------------------------------------------------------------------------------
def make_accelerator(cfg: Config) -> Accelerator:
    """A fresh Accelerator on `training.device` in `training.precision`: another cell may ask for another one.

    Raises:
        ValueError: the machine has no such device, or the device cannot compute in that precision.
    """
    device = choose_device(cfg.training.device)
    if cfg.training.precision == "fp16" and device.type != "cuda":
        raise ValueError(
            f"training.precision: fp16 needs a GPU, and this runs on {device}: its small range needs loss scaling, "
            "which exists for CUDA alone. Set training.precision to bf16 or fp32."
        )
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    precision = {"fp32": "no"}.get(cfg.training.precision, cfg.training.precision)
    return Accelerator(mixed_precision=precision, gradient_accumulation_steps=cfg.training.accumulation)


def choose_device(wanted: str) -> torch.device:
    """The device that `training.device` means: for "auto" the GPU with the most free memory, or the CPU.

    Raises:
        ValueError: there is no such device; the message lists those there are.
    """
    count = torch.cuda.device_count()
    there = ["cpu", *(f"cuda:{number}" for number in range(count))]
    if wanted == "auto":
        free = [torch.cuda.mem_get_info(number)[0] for number in range(count)]
        return torch.device(_emptiest(free))
    if (name := {"cuda": "cuda:0"}.get(wanted, wanted)) not in there:
        raise ValueError(f"training.device is {wanted!r}, and this machine has {', '.join(there)}. Or write auto.")
    return torch.device(name)


def _emptiest(free: Sequence[int]) -> str:
    """The GPU with the most free bytes, said aloud where there is a choice; without GPUs the CPU."""
    if not free:
        return "cpu"
    number = max(range(len(free)), key=free.__getitem__)
    if len(free) > 1:
        listed = ", ".join(f"cuda:{i} {size / 1e9:.1f}" for i, size in enumerate(free))
        print(f"training on cuda:{number}, which has the most free memory (GB free: {listed})")
    return f"cuda:{number}"


def parameter_groups(model: nn.Module, cfg: Config) -> list[dict]:
    """What trains, for the optimiser: encoder (adapters too) and head apart; matrices decay, vectors do not.

    Raises ValueError when nothing requires a gradient.
    """
    settings, groups = cfg.training, {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            inside, matrix = name.startswith("encoder."), parameter.ndim > 1
            groups.setdefault((inside, matrix), []).append(parameter)
    if not groups:
        raise ValueError("No parameter of the model requires a gradient, so there is nothing to train.")
    head = (settings.head_lr or settings.lr, settings.head_weight_decay)
    rates = {True: (settings.lr, settings.weight_decay), False: head}
    return [
        {"params": found, "lr": rates[inside][0], "weight_decay": rates[inside][1] if matrix else 0.0}
        for (inside, matrix), found in sorted(groups.items(), reverse=True)
    ]


# --------------------------------------------------------------------------------------------------------------------
# Inside the loop
# --------------------------------------------------------------------------------------------------------------------
def _learning_rate_shape(cfg: Config, steps: int) -> Callable[[int], float]:
    """Share of the learning rate at each optimiser step: a linear rise, then half a cosine or nothing."""
    warmup = round(cfg.training.warmup * steps)

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if cfg.training.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return share


def _epoch(
    model: nn.Module,
    train: DataLoader,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    loaders: Loaders,
    cfg: Config,
    accelerator: Accelerator,
    bar: tqdm,
) -> float:
    """One pass over the training split; the mean loss."""
    model.train()
    total, count = 0.0, 0
    for step, batch in enumerate(train, 1):
        with accelerator.accumulate(model):
            loss = compute_loss(model(batch), batch["target"], loaders, cfg)
            value = loss.item()
            if not math.isfinite(value):
                raise _NotFinite(value, step)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), cfg.training.gradient_clip)
            optimizer.step()
            optimizer.zero_grad()
            if accelerator.sync_gradients:
                schedule.step()
        total += value * len(batch["target"])
        count += len(batch["target"])
        bar.update()
    return total / count


@torch.no_grad()
def _loss_before(model: nn.Module, loaders: Loaders, cfg: Config, accelerator: Accelerator) -> float:
    """The training loss before any step, of as many training samples, evenly spaced, as validation has."""
    loader = _in_order(loaders.train, cfg)
    count = min(len(loader.dataset), len(loaders.val.dataset))
    chosen = torch.linspace(0, len(loader.dataset) - 1, count).round().long().tolist()
    part = DataLoader(Subset(loader.dataset, chosen), loader.batch_size, generator=torch.Generator())
    total = sum(
        compute_loss(output, target, loaders, cfg).item() * len(target)
        for output, target, _ in _outputs(model, part, cfg, accelerator)
    )
    return total / count


class _NotFinite(Exception):
    """Carries the loss and the number of the batch in its epoch."""


def _what_diverged(error: _NotFinite, history: History, cfg: Config) -> str:
    loss, step = error.args
    epoch = history.rows[-1]["epoch"] + 1
    return (
        f"The training loss became {loss} at batch {step} of epoch {epoch}. The model has the weights of epoch "
        f"{history.best_epoch} again, its best. Lower training.lr (now {cfg.training.lr}) or lengthen training.warmup; "
        "if it happens in the first batches, look for NaN in the inputs with one batch of the loader."
    )


def _check_judged(row: Mapping[str, float], key: str) -> None:
    """Raise where the validation before training says already that no epoch could be chosen."""
    if not math.isfinite(row["val_loss"]):
        raise FloatingPointError(
            f"The validation loss is {row['val_loss']} before any training. Look for NaN in the inputs and targets "
            "with one batch of loaders.val, and in the weights that were loaded."
        )
    if math.isnan(row[f"val_{key}"]):
        raise ValueError(
            f"The validation {key} is not a number, so it cannot choose the best epoch: tss and hss need events and "
            "quiet times, r2 and rrse targets that differ. Put another metric first in target.metrics, or lengthen "
            "split.val."
        )


@torch.no_grad()
def _judge(model: nn.Module, loaders: Loaders, split: str, cfg: Config, accelerator: Accelerator) -> dict[str, float]:
    """Loss and metrics of a split."""
    collector, total, count = Collector(loaders, cfg, detailed=False), 0.0, 0
    for output, target, batch in _outputs(model, getattr(loaders, split), cfg, accelerator):
        total += compute_loss(output, target, loaders, cfg).item() * len(target)
        count += len(target)
        collector.add(to_target_units(output, loaders, cfg), target, batch)
    return {f"{split}_{name}": value for name, value in {"loss": total / count, **collector.metrics()}.items()}


def _outputs(
    model: nn.Module, loader: DataLoader, cfg: Config, accelerator: Accelerator
) -> Iterator[tuple[Tensor, Tensor, dict]]:
    """Output and target of every batch on the CPU, in float32, with the batch itself."""
    model.eval()
    for batch in accelerator.prepare_data_loader(loader):
        with accelerator.autocast():
            output = model(batch).float()
        check_shapes(output, batch["target"], cfg)
        output, target = accelerator.gather_for_metrics((output, batch["target"]))
        times = accelerator.gather_for_metrics(batch["timestamp"], use_gather_object=True)
        yield output.cpu().contiguous(), target.cpu(), {**batch, "timestamp": times}


def _in_order(loader: DataLoader, cfg: Config) -> DataLoader:
    """The training samples in the order of time and as they are: neither shuffled nor augmented."""
    data = copy.copy(loader.dataset)
    data.augment = ()
    return DataLoader(
        data,
        loader.batch_size,
        num_workers=loader.num_workers,
        multiprocessing_context=loader.multiprocessing_context,
        pin_memory=loader.pin_memory,
    )


def _times(data: Dataset) -> list[str]:
    return [time.isoformat() for time in data.samples["time"]]


def _trainable_copy(model: nn.Module) -> dict[str, Tensor]:
    """The trained weights alone: of a 366M model with LoRA that is about one per cent."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
