"""The training loop that the notebooks share: device, precision, accumulation, schedule, best epoch.

Read `fit` and `Trainer.train_epoch`: they are the loop.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from helpers.config import Config, settings_that_matter
from helpers.data.dataset import Loaders, fingerprint, in_batches
from helpers.model.checkpoint import CheckpointError, load_adapter, loaded_from, read_file, save_adapter, trained_state
from helpers.model.heads import FeatureModel
from helpers.shared import DiskFullError, atomic_write, remove_leftovers
from helpers.training.devices import make_accelerator
from helpers.training.tasks import ImagePredictions, Predictions, Task, check_shapes, make_task
from helpers.training.tracking import BEST, STATE, Run, finished_run, how_to_go_on


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


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, or the stop button. The model holds the weights of the best epoch before."""


def seed_everything(cfg: Config) -> None:
    """Seed Python, NumPy and torch, so that new layers start the same in every run; with `training.deterministic` every
    later operation is the same bit for bit, or raises where the device cannot.
    """
    set_seed(cfg.seed)
    if cfg.training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(cfg.training.deterministic)


def standardise_features(model: nn.Module, loaders: Loaders, cfg: Config) -> None:
    """Move a 1D model to its device, and give it the mean and deviation of its features over 64 batches of
    the training split. A 2D model, which reads normalised pixels or tokens, stays as it is.
    """
    if isinstance(model, FeatureModel):
        accelerator = make_accelerator(cfg)
        model.to(accelerator.device)
        with accelerator.autocast():
            model.fit_features(loaders.train, limit=64)


def fit(model: nn.Module, loaders: Loaders, cfg: Config, run: Run | None = None) -> History:
    """Train what requires a gradient and leave the model with the weights of its best epoch.

    The model takes the batch dict and returns (B, K) or (B, C, H, W). Losses are in the units of learning (`tasks.py`),
    metrics in target units. Epoch 0 is judged before any step, so a broken set-up shows at once. The run gets a row an
    epoch as it happens, the best weights, and the state from which `training.resume` goes on. In several processes each
    computes its share of every batch; a last one that does not divide is filled up with samples that count twice then.

    Raises:
        ValueError: nothing to train, an output that does not have the target's shape, or a metric that cannot choose.
        CheckpointError: no state to resume, or one of another model, configuration or data.
        Diverged, Interrupted (Ctrl-C), DiskFullError: each says what is left of the training, and how to go on.
    """
    trainer = Trainer(model, loaders, cfg, run)
    try:
        if cfg.training.resume:
            trainer.resume()
        while trainer.epoch <= cfg.training.epochs and not trainer.history.stopped:
            started = time.perf_counter()
            loss = trainer.train_epoch() if trainer.epoch else trainer.loss_before_training()
            trainer.end_epoch(loss, started)
    except KeyboardInterrupt:
        raise Interrupted(f"Interrupted. {trainer.what_remains()}") from None
    except DiskFullError as error:
        raise DiskFullError(f"{error} {trainer.what_remains()}") from None
    finally:
        trainer.finish()
    return trainer.history


def predict(
    model: nn.Module, loaders: Loaders, split: str, cfg: Config, to_units: Callable | None = None
) -> Predictions | ImagePredictions:
    """Predictions and targets of one split ("train", "val" or "test") in target units, in the order of time.

    `to_units` is for a model whose outputs mean something else than those of the task.
    """
    accelerator, task, loader = make_accelerator(cfg), make_task(cfg, loaders), getattr(loaders, split)
    model.to(accelerator.device)
    in_order = in_batches(loader.dataset, cfg, loader.num_workers)  # the training loader shuffles
    return judge(model, in_order, task, accelerator, len(loader.dataset), to_units)[1]


def predict_splits(
    model: nn.Module, loaders: Loaders, cfg: Config, splits: Sequence[str] = ("val", "test"), **how: Callable
) -> dict[str, Predictions | ImagePredictions]:
    """Predictions of several splits; the threshold of events is chosen on validation and holds for all."""
    found = {split: predict(model, loaders, split, cfg, **how) for split in splits}
    threshold = found["val"].choose_threshold(cfg)
    for p in found.values():
        p.threshold = threshold
    return found


def parameter_groups(model: nn.Module, cfg: Config) -> list[dict]:
    """What trains, for the optimiser: encoder (adapters too) and head apart; matrices decay, vectors do not."""
    settings, groups = cfg.training, {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            inside = name.startswith("encoder.")
            lr = settings.lr if inside else settings.head_lr or settings.lr
            decay = settings.weight_decay if inside else settings.head_weight_decay
            groups.setdefault((inside, lr, decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    if not groups:
        raise ValueError("No parameter of the model requires a gradient, so there is nothing to train.")
    in_order = sorted(groups.items(), reverse=True)  # the encoder first: its rate is the one that is written
    return [{"params": found, "lr": lr, "weight_decay": decay} for (_, lr, decay), found in in_order]


def learning_rate_share(step: int, steps: int, cfg: Config) -> float:
    """Share of the learning rate at an optimiser step: a linear rise, then half a cosine or nothing."""
    warmup = round(cfg.training.warmup * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if cfg.training.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ---- The loop
class Trainer:
    """One call of `fit`, and all that a later process needs to go on as if it had never stopped.

    Of `epoch`, which is to be done, so many `batches` and `samples` are done already, and `loss` is the sum over these.
    """

    def __init__(self, model: nn.Module, loaders: Loaders, cfg: Config, run: Run | None) -> None:
        self.loaders, self.cfg = loaders, cfg
        self.task, self.accelerator = make_task(cfg, loaders), make_accelerator(cfg)
        if cfg.training.initial_run not in (None, "released") and not cfg.training.resume:
            start, now = finished_run(cfg.runs_folder / cfg.training.initial_run), cfg.to_dict()
            same = all(start["settings"][section] == now[section] for section in ("labels", "target", "head"))
            load_adapter(start["folder"] / BEST, model, head=same)
            if not same:
                standardise_features(model, loaders, cfg)
            head = "its head" if same else "a fresh head"
            self.accelerator.print(f"Begins with the encoder of {start['name']}, and {head}.")
        self.run = run if self.accelerator.is_main_process else None
        # whatever was drawn before, in cells of a notebook or elsewhere; and another dropout in each process
        set_seed(cfg.seed, device_specific=True)
        loaders.train.generator.manual_seed(cfg.seed)
        self.inner = model.to(self.accelerator.device)  # accelerate may wrap it for several processes
        optimizer = torch.optim.AdamW(parameter_groups(model, cfg))
        self.model, self.optimizer, self.train = self.accelerator.prepare(model, optimizer, loaders.train)
        steps = math.ceil(len(self.train) / cfg.training.accumulation) * cfg.training.epochs
        self.schedule = LambdaLR(optimizer, lambda step: learning_rate_share(step, steps, cfg))
        self.parts = [part for part in (optimizer, self.schedule, self.accelerator.scaler) if part is not None]
        data, weights = fingerprint(getattr(loaders, name).dataset for name in loaders.sizes), loaded_from(model)
        # what must be the same in the run that goes on, by what it is called where it is not
        self.origin = {"other frames or labels": data, "another checkpoint under the model": weights}
        processes, names = self.accelerator.num_processes, list(trained_state(model))
        self.origin |= {"another model": names, "another number of processes": processes}
        if self.run is not None:
            self.run.describe(data_fingerprint=data, checkpoint_fingerprint=weights or "none")
        self.history, self.best, self.saved = History(), {}, "nothing was saved to go on from"
        self.begin_epoch(0)
        total = cfg.training.epochs * len(self.train)
        self.bar = tqdm(total=total, unit="batch", disable=not self.accelerator.is_main_process)

    def train_epoch(self) -> float:
        """One pass over the training split, or over what is left of it; the mean loss."""
        accelerator = self.accelerator
        self.bar.set_description(f"epoch {self.epoch}/{self.cfg.training.epochs}")
        self.model.train()
        for batch in skip_first_batches(self.train, self.batches) if self.batches else self.train:
            with accelerator.accumulate(self.model):
                loss = self.task.loss(self.model(batch), batch["target"])
                value = accelerator.reduce(loss.detach(), "mean").item()  # of all processes
                if not math.isfinite(value):
                    raise self._diverged(f"The training loss became {value}")
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.model.parameters(), self.cfg.training.gradient_clip)
                    # the loss scaler of fp16 leaves such a step out by itself
                    if accelerator.scaler is None and not math.isfinite(norm):
                        raise self._diverged(f"The gradient became {float(norm)}")
                self.optimizer.step()
                self.optimizer.zero_grad()
            size = len(batch["target"]) * accelerator.num_processes
            self.loss += value * size
            self.samples += size
            self.batches += 1
            self.bar.update()
            if accelerator.sync_gradients:
                self.schedule.step()
                if self.schedule.last_epoch % self.cfg.training.save_every_steps == 0:
                    self.save()
        return self.loss / self.samples

    def loss_before_training(self) -> float:
        """The training loss before any step, of as many samples, evenly spaced, as validation has, and at least 64."""
        train = self.loaders.train
        # fewer are another loss: labels have long tails
        count = min(len(train.dataset), max(64, len(self.loaders.val.dataset)))
        chosen = torch.linspace(0, len(train.dataset) - 1, count).round().long().tolist()
        some = in_batches(Subset(train.dataset, chosen), self.cfg, train.num_workers)
        return judge(self.model, some, self.task, self.accelerator)[0]

    def end_epoch(self, train_loss: float, started: float) -> None:
        """Judge validation, write the row of the epoch, keep the weights if they are the best; stop out of patience."""
        history, name, patience = self.history, self.cfg.target.metrics[0], self.cfg.training.patience
        val_loss, found = judge(self.model, self.loaders.val, self.task, self.accelerator)
        found.threshold = found.choose_threshold(self.cfg)
        row = {"epoch": self.epoch, "lr": self.optimizer.param_groups[0]["lr"], "train_loss": train_loss}
        row |= {"val_loss": val_loss, **{f"val_{key}": value for key, value in found.metrics(self.cfg).items()}}
        history.rows.append(row | {"seconds": time.perf_counter() - started})
        if self.run is not None:
            self.run.log(history.rows[-1], step=self.epoch)
        value, best = row[f"val_{name}"], history.rows[history.best_epoch][f"val_{name}"]
        self.bar.set_postfix({"train loss": f"{train_loss:.3f}", f"val {name}": f"{value:.3f}"})
        if self.epoch == 0 and not math.isfinite(val_loss):
            raise FloatingPointError(
                f"The validation loss is {val_loss} before any training. Look for NaN in the inputs and targets of one "
                "batch of loaders.val, and in the weights that were loaded."
            )
        if self.epoch == 0 and math.isnan(value):
            raise ValueError(
                f"The validation {name} is not a number, so it cannot choose the best epoch: it needs events and "
                "quiet times in every column, targets that differ, or a mask with a pixel inside. Put another metric "
                "first in target.metrics, lengthen split.val, or raise training.max_val_samples."
            )
        better = value > best if self.task.metrics[name].higher_is_better else value < best
        if better or self.epoch == 0:
            history.best_epoch = self.epoch
            self.best = {key: tensor.detach().clone() for key, tensor in trained_state(self.inner).items()}
            self.keep_best()
        elif self.epoch - history.best_epoch >= patience:
            history.stopped = f"no better validation {name} for {patience} epochs"
        self.begin_epoch(self.epoch + 1)
        self.save()

    def keep_best(self) -> None:
        """Write the weights that the model has now as those of the best epoch."""
        if self.run is not None:
            scalers = {channel: asdict(scaler) for channel, scaler in self.cfg.scalers.items()}
            extra = {"epoch": self.history.best_epoch, "scalers": scalers, **self.loaders.scale}
            save_adapter(self.run.folder / BEST, self.inner, self.cfg.to_dict(), extra=extra)

    def begin_epoch(self, epoch: int) -> None:
        """Nothing of this epoch is done; the order of its samples follows from the generator as it is now."""
        self.epoch, self.batches, self.samples, self.loss = epoch, 0, 0, 0.0
        self.order = self.loaders.train.generator.get_state()

    def where(self) -> str:
        """How far the training is."""
        return f"after batch {self.batches} of epoch {self.epoch}" if self.batches else f"after epoch {self.epoch - 1}"

    def save(self) -> None:
        """Write all that changes to one file of the run's folder. All processes call this together.

        Accelerate's `save_state` writes a folder, which cannot take the place of the one before in one step. A file
        can: a kill at any moment leaves the old state or the new one, whole.
        """
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        randomness = gather_object([{"torch": torch.get_rng_state(), "cuda": cuda}])
        if self.run is None:
            return
        state = {
            "settings": settings_that_matter(self.cfg, "resume"),
            "origin": self.origin,
            "model": {key: tensor.detach() for key, tensor in trained_state(self.inner).items()},
            "best": self.best,
            "parts": [part.state_dict() for part in self.parts],
            "random": randomness,
            "order": self.order,
            "progress": (self.epoch, self.batches, self.samples, self.loss),
            "history": vars(self.history),
        }
        with atomic_write(self.run.folder / STATE) as path, path.open("wb") as file:  # as in `save_adapter`
            torch.save(state, file)
        self.saved = f"the last good state is {self.run.folder / STATE} ({self.where()})"

    def resume(self) -> None:
        """Take everything from the run `training.resume` (else a CheckpointError), as if it had never stopped."""
        path = self.cfg.runs_folder / self.cfg.training.resume / STATE
        if not path.is_file():
            there = sorted(found.parent.name for found in self.cfg.runs_folder.glob(f"*/{STATE}"))
            raise CheckpointError(
                f"There is no {path} to go on from (training.resume). Runs with a state: {', '.join(there) or 'none'}."
            )
        remove_leftovers(path.parent)  # of a kill while it saved
        state = read_file(path)
        before, now = state["settings"], settings_that_matter(self.cfg, "resume")
        other = [f"{key} ({before.get(key)} then, {now[key]} now)" for key in now if now[key] != before.get(key)]
        wrong = [what for what, value in self.origin.items() if state["origin"][what] != value]
        wrong += [f"other settings: {', '.join(other)}"] if other else []
        if wrong:
            raise CheckpointError(
                f"The run {path.parent.name} (training.resume) cannot be continued, because it had {'; '.join(wrong)}. "
                "Take back what differs, or start without training.resume."
            )
        self.history, self.best, self.order = History(**state["history"]), state["best"], state["order"]
        self.inner.load_state_dict(self.best, strict=False)
        self.keep_best()  # under the new name, too: no later epoch may be better
        self.inner.load_state_dict(state["model"], strict=False)
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)
        self.epoch, self.batches, self.samples, self.loss = state["progress"]
        self.loaders.train.generator.set_state(self.order)
        random = state["random"][self.accelerator.process_index]
        torch.set_rng_state(random["torch"])
        torch.cuda.set_rng_state_all(random["cuda"][: torch.cuda.device_count()])
        for row in self.history.rows if self.run is not None else ():
            self.run.log(row, step=row["epoch"])
        self.bar.update(max(self.epoch - 1, 0) * len(self.train) + self.batches)
        self.accelerator.print(f"going on with {path.parent.name}, {self.where()}")
        self.save()  # under the new name: this run, too, may be interrupted before its first step

    def finish(self) -> None:
        """Give the model its own forward back, and the weights of its best epoch."""
        self.bar.close()
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.inner.load_state_dict(self.best, strict=False)

    def what_remains(self) -> str:
        """Which weights the model has when a training ends early, what is on the disk, and how to go on."""
        best = f"The model has the weights of epoch {self.history.best_epoch}, its best so far"
        how = f" {how_to_go_on(self.run.name, self.cfg)}" if self.run is not None else ""
        return f"{best if self.best else 'Nothing is trained'}; {self.saved}.{how}"

    def _diverged(self, what: str) -> Diverged:
        message = (
            f"{what} at batch {self.batches + 1} of epoch {self.epoch}. Lower training.lr (now {self.cfg.training.lr}) "
            "or lengthen training.warmup; in the first batches, look for NaN in the inputs."
        )
        return Diverged(f"{message} {self.what_remains()}", self.history)


# ---- Judging
@torch.no_grad()
def judge(
    model: nn.Module,
    loader: DataLoader,
    task: Task,
    accelerator: Accelerator,
    samples: int | None = None,
    to_units: Callable[[Tensor], Tensor] | None = None,
) -> tuple[float, Predictions | ImagePredictions]:
    """Mean loss and predictions of all samples of a loader, each once, however many processes share them; `samples`
    is their number, where images are to be kept. Outputs that need `to_units` have no loss of the task: it is NaN.
    """
    collector, losses, sizes = task.collector(samples), [], []
    model.eval()
    for batch in accelerator.prepare_data_loader(loader):
        with accelerator.autocast():
            output = model(batch).float()
        output, target = accelerator.gather_for_metrics((output, batch["target"]))
        batch["timestamp"] = accelerator.gather_for_metrics(batch["timestamp"], use_gather_object=True)
        if accelerator.num_processes > 1:
            del batch["ts"]  # only this process's share
        output, target = output.cpu().contiguous(), target.cpu()
        if to_units:  # else the loss does so
            check_shapes(output, target)
        losses.append(math.nan if to_units else task.loss(output, target).item())
        collector.add((to_units or task.to_units)(output), target, batch)
        sizes.append(len(target))
    return float(np.average(losses, weights=sizes)), collector.predictions()
