"""The training loop that the notebooks share: device, precision, accumulation, schedule, best epoch, resume.

Read `fit` and `_Training.train_epoch` first: they are the loop, the rest is what it calls.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from helpers.config import Config, settings_that_matter
from helpers.data.dataset import Loaders
from helpers.model.checkpoint import (
    CheckpointError,
    load_state,
    loaded_from,
    save_adapter,
    save_state,
    trained_state,
)
from helpers.model.heads import FeatureModel
from helpers.shared import raise_if_full
from helpers.training import processes
from helpers.training.devices import make_accelerator, one_of_several
from helpers.training.memory import recompute_if_needed
from helpers.training.tasks import ImagePredictions, Predictions, Task, check_shapes, make_task

if TYPE_CHECKING:
    from helpers.training.tracking import Run

STATE = "last.pt"  # in the run's folder: all that a later process needs to go on
BEST = "best.pt"  # the trained weights of the best epoch so far, as `load_adapter` reads them


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

    def __init__(self, message: str, history: History | None = None) -> None:
        super().__init__(message)
        self.history = history


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, or the stop button. `history` has the epochs before; the model holds the best of them."""

    def __init__(self, message: str, history: History | None = None) -> None:
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

    Losses are in the units of learning (`tasks.py`: numbers are standardised), metrics in target units. Epoch 0 is
    judged before any step, so a broken set-up shows at once.

    Args:
        model: takes the batch dict, returns (B, K) or (B, C, H, W).
        loaders: of `helpers.data.dataset.make_loaders`.
        cfg: `training` and `target` are read. With `training.resume` it goes on where that run stopped.
        run: gets one row an epoch as it happens; its folder gets the best weights and the state from which an
            interrupted training can go on. None keeps everything in memory alone.

    Returns:
        The `History`; `history.table` has the learning rate, losses, validation metrics and seconds of each epoch.

    Raises:
        ValueError: nothing to train, an output that does not have the target's shape, or a metric that cannot choose.
        CheckpointError: no state to resume, or one of another model, configuration or data.
        Diverged: the loss is no longer finite; says at which step, what to change, and which weights the model has now.
        Interrupted: Ctrl-C; the training stopped after a whole step, and the message says how to go on.
        DiskFullError: the disk of the run is full; its last good state is still there.
    """
    if cfg.training.processes > 1 and not one_of_several():
        return processes.launch(fit, model, loaders, cfg, run)
    with _Training(model, loaders, cfg, run) as training:
        while not training.finished:
            started = time.perf_counter()
            loss = training.train_epoch() if training.at.epoch else training.loss_before()
            training.end_epoch(loss, training.judge(), time.perf_counter() - started)
    return training.history


@torch.no_grad()
def predict(model: nn.Module, loaders: Loaders, split: str, cfg: Config) -> Predictions | ImagePredictions:
    """Predictions and targets of one split ("train", "val" or "test") in target units, in the order of time.

    Of images, the metrics of the split and of each image are kept, and a few examples.
    """
    accelerator = make_accelerator(cfg)
    model = model.to(accelerator.device)
    loader = _in_order(getattr(loaders, split), cfg) if split == "train" else getattr(loaders, split)
    task = make_task(cfg, loaders)
    collector = task.collector(_times(loader.dataset))
    for output, target, batch in _outputs(model, loader, cfg, accelerator):
        collector.add(task.to_units(output), target, batch)
    return collector.predictions()


# --------------------------------------------------------------------------------------------------------------------
# The optimiser
# --------------------------------------------------------------------------------------------------------------------
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
# The loop
# --------------------------------------------------------------------------------------------------------------------
@dataclass
class _Position:
    """Where a training stands: the epoch that is to be done, and what is done of it already."""

    epoch: int = 0
    batches: int = 0
    loss: float = 0.0  # summed over the samples of these batches
    samples: int = 0


class _Training:
    """One call of `fit`: what the loop needs, and all that a later process needs to go on. Use it with `with`.

    At the end, whatever happened, the model has its own forward and the weights of its best epoch.
    """

    def __init__(self, model: nn.Module, loaders: Loaders, cfg: Config, run: Run | None) -> None:
        self.loaders, self.cfg, self.run = loaders, cfg, run
        self.accelerator = make_accelerator(cfg)
        if one_of_several():
            set_seed(cfg.seed, device_specific=True)  # another dropout in each process
        self.recorded = broadcast_object_list([run is not None])[0]  # the first process has the run, the others may not
        self.inner = model.to(self.accelerator.device)  # accelerate may wrap it for several processes
        if cfg.training.recompute_blocks == "auto":
            share = cfg.training.batch_size // self.accelerator.num_processes
            recompute_if_needed(model, (share, *loaders.train.dataset[0]["ts"].shape), cfg, self.accelerator.device)
        optimizer = torch.optim.AdamW(parameter_groups(model, cfg))
        self.model, self.optimizer, self.train = self.accelerator.prepare(model, optimizer, loaders.train)
        steps = math.ceil(len(self.train) / cfg.training.accumulation) * cfg.training.epochs
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _learning_rate_shape(cfg, steps))
        self.key = cfg.target.metrics[0]
        self.task = make_task(cfg, loaders)
        self.sign = 1 if self.task.metrics[self.key].higher_is_better else -1
        self.at, self.history, self.score, self.best = _Position(), History(), -math.inf, {}
        self.order: Tensor | None = None  # state of the loader's generator at the start of the epoch
        self.saved = "nothing was saved yet"
        self.stop = _Stop()
        settings = settings_that_matter(cfg, "resume")
        self.origin = {"config": settings, "data": _data_fingerprint(loaders), "checkpoint": loaded_from(model)}
        if self.run is not None and self.accelerator.is_main_process:
            checkpoint = self.origin["checkpoint"] or "none"
            self.run.describe(data_fingerprint=self.origin["data"], checkpoint_fingerprint=checkpoint)
        if cfg.training.resume:
            self._resume(cfg.training.resume)
        total = cfg.training.epochs * len(self.train)
        done = max(self.at.epoch - 1, 0) * len(self.train) + self.at.batches
        hidden = not self.accelerator.is_main_process
        self.bar = tqdm(total=total, initial=min(done, total), unit="batch", disable=hidden)

    @property
    def finished(self) -> bool:
        return self.at.epoch > self.cfg.training.epochs or bool(self.history.stopped)

    def train_epoch(self) -> float:
        """One pass over the training split, or over what is left of it; the mean loss."""
        self.model.train()
        for batch in self._batches():
            with self.accelerator.accumulate(self.model):
                loss, size = self._loss(batch)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self._clip_gradients()
                self.optimizer.step()
                self.optimizer.zero_grad()
            self._count(size)
            if self.accelerator.sync_gradients:
                self._end_step()
        return self.at.loss / self.at.samples

    def _batches(self) -> DataLoader:
        """The batches of this epoch that are not done yet, in the order that the seed and the epoch decide."""
        self.bar.set_description(f"epoch {self.at.epoch}/{self.cfg.training.epochs}")
        if (generator := self.loaders.train.generator) is not None:
            self.order = generator.get_state()
        batches = skip_first_batches(self.train, self.at.batches) if self.at.batches else self.train
        batches.set_epoch(self.at.epoch)
        return batches

    def _loss(self, batch: dict) -> tuple[Tensor, int]:
        """The loss of this process's share of a batch, and the number of samples of the whole batch.

        The mean over the processes is the mean over the samples of the batch, each once: where the last batch of an
        epoch does not divide, Accelerate fills the shares with samples that do not count.
        """
        count, index = self.accelerator.num_processes, self.accelerator.process_index
        whole = self.loaders.train.batch_size
        left = len(self.loaders.train.dataset) - self.at.batches * whole
        size, share = min(whole, left), whole // count
        own = min(max(size - index * share, 0), share)
        output, target = self.model(batch), batch["target"]
        loss = self.task.loss(output[: max(own, 1)], target[: max(own, 1)]) * (own * count / size)
        own_state = torch.stack([loss.detach(), loss.new_tensor(float(self.stop.asked))])
        value, stop = self.accelerator.reduce(own_state, "mean").tolist()
        self.stop.agreed = stop > 0
        if not math.isfinite(value):
            raise _NotFinite(f"The training loss became {value}")
        self.at.loss += value * size
        return loss, size

    def _clip_gradients(self) -> None:
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.cfg.training.gradient_clip)
        if self.accelerator.scaler is None and not math.isfinite(norm):  # with a scaler the step is left out instead
            raise _NotFinite(f"The gradient became {float(norm)}")

    def _count(self, size: int) -> None:
        self.at.batches += 1
        self.at.samples += size
        self.bar.update()

    def _end_step(self) -> None:
        """After each optimiser step: the next learning rate, a state now and then, and a wish to stop."""
        self.schedule.step()
        due = self.schedule.last_epoch % self.cfg.training.save_every_steps == 0
        if due or self.stop.agreed:
            self.save()
        if self.stop.agreed:
            raise KeyboardInterrupt

    def loss_before(self) -> float:
        """The training loss before any step, of as many training samples, evenly spaced, as validation has."""
        loader = _in_order(self.loaders.train, self.cfg)
        count = min(len(loader.dataset), len(self.loaders.val.dataset))
        chosen = torch.linspace(0, len(loader.dataset) - 1, count).round().long().tolist()
        part = DataLoader(Subset(loader.dataset, chosen), loader.batch_size, generator=torch.Generator())
        return _judge(self.model, part, self.task, self.cfg, self.accelerator)["loss"]

    def judge(self) -> dict[str, float]:
        """Loss and metrics of the validation split."""
        judged = _judge(self.model, self.loaders.val, self.task, self.cfg, self.accelerator)
        return {f"val_{name}": value for name, value in judged.items()}

    def end_epoch(self, loss: float, judged: Mapping[str, float], seconds: float) -> None:
        """Write the row of the epoch, keep the weights if they are the best, and decide whether to go on."""
        epoch, rate = self.at.epoch, self.optimizer.param_groups[0]["lr"]
        row = {"epoch": epoch, "lr": rate, "train_loss": loss, **judged, "seconds": seconds}
        self._log(row)
        self.bar.set_postfix({"train loss": f"{loss:.3f}", f"val {self.key}": f"{row[f'val_{self.key}']:.3f}"})
        if epoch == 0:
            _check_judged(row, self.key)
        score = row[f"val_{self.key}"] * self.sign
        if score > self.score:
            self.score, self.history.best_epoch = score, epoch
            self._keep()
        elif epoch - self.history.best_epoch >= self.cfg.training.patience:
            self.history.stopped = f"no better validation {self.key} for {self.cfg.training.patience} epochs"
        self.at = _Position(epoch + 1)
        self.save()

    def _log(self, row: dict[str, float]) -> None:
        self.history.rows.append(row)
        if self.run is not None and self.accelerator.is_main_process:
            self.run.log(row, step=row["epoch"])

    def _keep(self) -> None:
        """Keep the present weights as the best: of a 366M model with LoRA they are about one per cent."""
        self.best = {key: tensor.detach().clone() for key, tensor in trained_state(self.inner).items()}
        if self.run is not None and self.accelerator.is_main_process:
            extra = {"epoch": self.history.best_epoch, **self.loaders.scale}
            save_adapter(self.run.folder / BEST, self.inner, self.cfg.to_dict(), extra=extra)

    # ------------------------------------------------------------------------------------------------ stop and go on
    def save(self) -> None:
        """Write the whole state into the run's folder, in place of the one before."""
        if not self.recorded:
            return
        randomness = gather_object([_random_state()])
        if self.accelerator.is_main_process:
            generator = self.loaders.train.generator
            between = generator.get_state() if generator is not None else None
            state = {
                **self.origin,
                "model": _on_cpu(trained_state(self.inner)),
                "best": _on_cpu(self.best),
                "score": self.score,
                "optimizer": self.optimizer.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
                "random": randomness,
                "order": self.order if self.at.batches else between,
                "position": dataclasses.asdict(self.at),
                "history": dataclasses.asdict(self.history),
            }
            save_state(self.run.folder / STATE, state)
            self.saved = f"the last good state is {self.run.folder / STATE} ({self._where()})"

    def _where(self) -> str:
        if not self.at.batches:
            return f"after epoch {self.at.epoch - 1}"
        return f"after batch {self.at.batches} of epoch {self.at.epoch}"

    def _resume(self, name: str) -> None:
        """Take everything from the state of the run `name`; what follows is as if it had never stopped."""
        state = _read_state(name, self.cfg, self.origin, self.inner, self.accelerator.num_processes)
        own = trained_state(self.inner)
        with torch.no_grad():
            for key, tensor in state["model"].items():
                own[key].copy_(tensor)
        self.best, self.score = {key: tensor.clone() for key, tensor in state["best"].items()}, state["score"]
        self.optimizer.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if (order := state["order"]) is not None:
            self.order = order
            self.loaders.train.generator.set_state(order)
        self.at = _Position(**state["position"])
        rows = state["history"].pop("rows")
        self.history = History(**state["history"])
        for row in rows:
            self._log(row)
        if self.accelerator.is_main_process:
            print(f"going on with {name}, {self._where()}")
        _set_random_state(state["random"][self.accelerator.process_index])
        self.save()  # under the new name: this run, too, may be interrupted before its first step

    def __enter__(self) -> Self:
        self.stop.listen()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self.stop.no_longer()
        self.bar.close()
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)  # gives the model its own forward back
        self.inner.load_state_dict(self.best, strict=False)
        if isinstance(error, _NotFinite):
            raise Diverged(self._what_diverged(error), self.history) from None
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(f"Interrupted. {self._what_remains()}", self.history) from None
        if isinstance(error, OSError) and self.run is not None:
            raise_if_full(error, self.run.folder, self._what_remains())

    def _what_remains(self) -> str:
        epoch = self.history.best_epoch
        weights = f"The model has the weights of epoch {epoch}, its best so far" if self.best else "Nothing is trained"
        if self.run is None or not self.history.rows:
            return f"{weights}. {'Without a run' if self.run is None else 'Yet'} nothing was saved to go on from."
        return f"{weights}; {self.saved}. {how_to_go_on(self.run.name, self.cfg)}"

    def _what_diverged(self, error: _NotFinite) -> str:
        where = f"at batch {self.at.batches + 1} of epoch {self.at.epoch}"
        best = f"The model has the weights of epoch {self.history.best_epoch} again, its best"
        state = f"; {self.saved}" if self.run is not None else ""
        return (
            f"{error} {where}. {best}{state}. Lower training.lr (now {self.cfg.training.lr}) or lengthen "
            "training.warmup; if it happens in the first batches, look for NaN in the inputs with one batch of the "
            "loader."
        )


class _NotFinite(Exception):
    """What is no longer a number."""


class _Stop:
    """Ctrl-C during the training: `asked` here, `agreed` among all processes. The training ends after a whole step.

    A second Ctrl-C ends it at once, but in one of several processes: there the first process decides.
    """

    def __init__(self) -> None:
        self.asked = self.agreed = False
        self._before: Any = None

    def listen(self) -> None:
        """Signals reach the main thread alone; elsewhere Ctrl-C is not ours to handle."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)

    def no_longer(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _ask(self, *_: object) -> None:
        if self.asked and not one_of_several():
            raise KeyboardInterrupt
        self.asked = True


def how_to_go_on(name: str, cfg: Config) -> str:
    """What to type to go on with the interrupted run `name`."""
    words = f"NB={cfg.experiment} TASK={cfg.task} PROFILE={cfg.profile}"
    return (
        f'To go on: make run-notebook {words} P="training.resume={name}" with the other parameters of the run, or in '
        f'the notebook parameters = {{"training.resume": "{name}"}}, and run all cells.'
    )


def _read_state(name: str, cfg: Config, origin: Mapping[str, Any], model: nn.Module, count: int) -> dict[str, Any]:
    """The state of the run `name`, if this training, of that `origin`, may go on from it."""
    path = cfg.runs_folder / name / STATE
    if not path.is_file():
        there = sorted(found.parent.name for found in path.parents[1].glob(f"*/{STATE}"))
        raise CheckpointError(
            f"There is no {path} to go on from (training.resume). Runs with a state: {', '.join(there) or 'none'}."
        )
    state = load_state(path)
    before, now = state["config"], origin["config"]
    differing = [f"{key} ({before.get(key)} then, {now.get(key)} now)" for key in now if now[key] != before.get(key)]
    reasons = [
        (differing, f"other settings: {', '.join(differing)}"),
        (state["data"] != origin["data"], "other frames or labels in the training or validation split"),
        (state["checkpoint"] != origin["checkpoint"], "another checkpoint under the model"),
        (set(state["model"]) != set(trained_state(model)), "another model"),
        (len(state["random"]) != count, f"{len(state['random'])} process(es), and now there are {count}"),
    ]
    if found := [reason for wrong, reason in reasons if wrong]:
        raise CheckpointError(
            f"The run {name} (training.resume) cannot be gone on with, because it had {'; '.join(found)}. Take back "
            "what differs, or start a new run without training.resume."
        )
    return state


def _data_fingerprint(loaders: Loaders) -> str:
    """Of the times of training and validation and the mean of the training targets."""
    digest = hashlib.sha256(repr([_times(loaders.train.dataset), _times(loaders.val.dataset)]).encode())
    digest.update(loaders.target_mean.double().numpy().tobytes())
    return digest.hexdigest()[:16]


def _random_state() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - a dataset of one's own may draw from it
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def _set_random_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().cpu() for key, tensor in tensors.items()}


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


# --------------------------------------------------------------------------------------------------------------------
# Judging
# --------------------------------------------------------------------------------------------------------------------
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
def _judge(model: nn.Module, loader: DataLoader, task: Task, cfg: Config, accelerator: Accelerator) -> dict[str, float]:
    """Loss and metrics over all samples of a loader, each once, however many processes share them."""
    collector, total, count = task.collector(), 0.0, 0
    for output, target, batch in _outputs(model, loader, cfg, accelerator):
        total += task.loss(output, target).item() * len(target)
        count += len(target)
        collector.add(task.to_units(output), target, batch)
    return {"loss": total / count, **collector.metrics()}


def _outputs(
    model: nn.Module, loader: DataLoader, cfg: Config, accelerator: Accelerator
) -> Iterator[tuple[Tensor, Tensor, dict]]:
    """Output and target of every batch on the CPU, in float32, with the batch itself."""
    model.eval()
    for batch in accelerator.prepare_data_loader(loader):
        with accelerator.autocast():
            output = model(batch).float()
        check_shapes(output, batch["target"])
        output, target = accelerator.gather_for_metrics((output, batch["target"]))
        batch["timestamp"] = accelerator.gather_for_metrics(batch["timestamp"], use_gather_object=True)
        if accelerator.num_processes > 1:
            del batch["ts"]  # only this process's share
        yield output.cpu().contiguous(), target.cpu(), batch


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
