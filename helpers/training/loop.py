"""The training loop that the notebooks share: device, precision, accumulation, schedule, best epoch.

Read `fit` and `Trainer.train_epoch`: they are the loop. What lets a training stop and go on stands in `resume.py`.
"""

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from helpers.config import Config
from helpers.data.dataset import Loaders
from helpers.model.checkpoint import load_adapter, read_file, save_adapter, trained_state
from helpers.model.heads import FeatureModel
from helpers.shared import DiskFullError
from helpers.training.devices import make_accelerator
from helpers.training.resume import History, RunState
from helpers.training.tasks import ImagePredictions, Predictions, Task, make_task
from helpers.training.tracking import BEST, STATE, Run, how_to_go_on


class Diverged(FloatingPointError):
    """The loss is no longer finite. `history` has the epochs before; the model holds the best of them again."""

    def __init__(self, message: str, history: History) -> None:
        super().__init__(message)
        self.history = history


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, or the stop button. The model holds the weights of the best epoch before."""


def seed_everything(cfg: Config) -> None:
    """Seed Python, NumPy and torch, so that new layers start the same in every run of this configuration.

    With `training.deterministic` every later operation is the same bit for bit, or raises where the device cannot.
    """
    set_seed(cfg.seed)
    if cfg.training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(cfg.training.deterministic)


def standardise_features(model: nn.Module, loaders: Loaders, cfg: Config) -> None:
    """Give a 1D model the mean and deviation of its features over `head.feature_batches` batches of the training split.

    It is moved to the device that will train it. A 2D model, which reads normalised pixels or tokens, stays as it is.
    """
    if isinstance(model, FeatureModel):
        accelerator = make_accelerator(cfg)
        model.to(accelerator.device)
        with accelerator.autocast():
            model.fit_features(loaders.train, limit=cfg.head.feature_batches)


def fit(model: nn.Module, loaders: Loaders, cfg: Config, run: Run | None = None) -> History:
    """Train what requires a gradient and leave the model with the weights of its best epoch.

    Losses are in the units of learning (`tasks.py`: numbers are standardised), metrics in target units. Epoch 0 is
    judged before any step, so a broken set-up shows at once. In several processes each computes its share of every
    batch; where the last one of an epoch does not divide, Accelerate fills it up with samples that count twice then.

    Args:
        model: takes the batch dict, returns (B, K) or (B, C, H, W).
        cfg: `training` and `target` are read. With `training.resume` it goes on where that run stopped.
        run: gets a row an epoch as it happens, the best weights, and the state from which an interrupted training can
            go on. None keeps everything in memory alone.

    Raises:
        ValueError: nothing to train, an output that does not have the target's shape, or a metric that cannot choose.
        CheckpointError: no state to resume, or one of another model, configuration or data.
        Diverged, Interrupted (Ctrl-C), DiskFullError: each says what is left of the training, and how to go on.
    """
    trainer = Trainer(model, loaders, cfg, run)
    try:
        if cfg.training.resume:
            trainer.resume()
        while trainer.state.epoch <= cfg.training.epochs and not trainer.state.history.stopped:
            started = time.perf_counter()
            loss = trainer.train_epoch() if trainer.state.epoch else trainer.loss_before_training()
            trainer.end_epoch(loss, trainer.judge(loaders.val), time.perf_counter() - started)
    except KeyboardInterrupt:
        raise Interrupted(f"Interrupted. {trainer.what_remains()}") from None
    except DiskFullError as error:
        raise DiskFullError(f"{error} {trainer.what_remains()}") from None
    finally:
        trainer.finish()
    return trainer.state.history


def predict(model: nn.Module, loaders: Loaders, split: str, cfg: Config) -> Predictions | ImagePredictions:
    """Predictions and targets of one split ("train", "val" or "test") in target units, in the order of time."""
    accelerator, task, loader = make_accelerator(cfg), make_task(cfg, loaders), getattr(loaders, split)
    model.to(accelerator.device)
    return _judge(model, _in_order(loader), task, accelerator, samples=len(loader.dataset))[1]


def predict_splits(
    model: nn.Module, loaders: Loaders, cfg: Config, splits: Sequence[str] = ("val", "test")
) -> dict[str, Predictions | ImagePredictions]:
    """Predictions of several splits; the threshold of events is chosen on validation and holds for all."""
    found = {split: predict(model, loaders, split, cfg) for split in splits}
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


# ---- The loop
class Trainer:
    """One call of `fit`."""

    def __init__(self, model: nn.Module, loaders: Loaders, cfg: Config, run: Run | None) -> None:
        self.loaders, self.cfg = loaders, cfg
        self.task, self.accelerator = make_task(cfg, loaders), make_accelerator(cfg)
        self.run = run if self.accelerator.is_main_process else None
        # whatever was drawn before, in cells of a notebook or elsewhere; and another dropout in each process
        set_seed(cfg.seed, device_specific=self.accelerator.num_processes > 1)
        loaders.train.generator.manual_seed(cfg.seed)
        if cfg.training.initial_run and not cfg.training.resume:
            path, now = cfg.runs_folder / cfg.training.initial_run / BEST, cfg.to_dict()
            saved = read_file(path)["config"]
            same = all(saved[section] == now[section] for section in ("labels", "target", "head"))
            load_adapter(path, model, head=same)
            head = "its head" if same else "a fresh head, as labels, target or head differ"
            self.accelerator.print(f"Begins with what {path.parent.name} trained in the encoder, and {head}.")
        self.inner = model.to(self.accelerator.device)  # accelerate may wrap it for several processes
        optimizer = torch.optim.AdamW(parameter_groups(model, cfg))
        self.model, self.optimizer, self.train = self.accelerator.prepare(model, optimizer, loaders.train)
        steps = math.ceil(len(self.train) / cfg.training.accumulation) * cfg.training.epochs
        share = partial(_learning_rate_share, steps=steps, cfg=cfg)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        self.key = cfg.target.metrics[0]
        self.sign = 1 if self.task.metrics[self.key].higher_is_better else -1
        parts = {"optimizer": optimizer, "schedule": self.schedule}
        if self.accelerator.scaler is not None:
            parts["scaler"] = self.accelerator.scaler
        path = self.run.folder / STATE if self.run is not None else None
        self.state = RunState(path, model, parts, loaders, cfg)
        if self.run is not None:
            origin = self.state.origin
            self.run.describe(data_fingerprint=origin["data"], checkpoint_fingerprint=origin["checkpoint"] or "none")
        total = cfg.training.epochs * len(self.train)
        self.bar = tqdm(total=total, unit="batch", disable=not self.accelerator.is_main_process)

    def train_epoch(self) -> float:
        """One pass over the training split, or over what is left of it; the mean loss."""
        state, accelerator = self.state, self.accelerator
        self.bar.set_description(f"epoch {state.epoch}/{self.cfg.training.epochs}")
        self.model.train()
        for batch in skip_first_batches(self.train, state.batches) if state.batches else self.train:
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
            state.loss += value * size
            state.samples += size
            state.batches += 1
            self.bar.update()
            if accelerator.sync_gradients:
                self.schedule.step()
                if self.schedule.last_epoch % self.cfg.training.save_every_steps == 0:
                    state.save()
        return state.loss / state.samples

    def loss_before_training(self) -> float:
        """The training loss before any step, of as many samples, evenly spaced, as validation has, and at least 64."""
        data = self.loaders.train.dataset
        count = min(len(data), max(64, len(self.loaders.val.dataset)))  # fewer are another loss: labels have long tails
        chosen = torch.linspace(0, len(data) - 1, count).round().long().tolist()
        return self.judge(_in_order(self.loaders.train, Subset(data, chosen)))["loss"]

    def judge(self, loader: DataLoader) -> dict[str, float]:
        """Loss and metrics over all samples of a loader."""
        loss, found = _judge(self.model, loader, self.task, self.accelerator)
        found.threshold = found.choose_threshold(self.cfg)
        return {"loss": loss, **found.metrics(self.cfg)}

    def end_epoch(self, loss: float, judged: Mapping[str, float], seconds: float) -> None:
        """Write the row of the epoch, keep the weights if they are the best, and decide whether to go on."""
        state, epoch = self.state, self.state.epoch
        rate, judged = self.optimizer.param_groups[0]["lr"], {f"val_{name}": value for name, value in judged.items()}
        state.history.rows.append({"epoch": epoch, "lr": rate, "train_loss": loss, **judged, "seconds": seconds})
        if self.run is not None:
            self.run.log(state.history.rows[-1], step=epoch)
        value = judged[f"val_{self.key}"]
        self.bar.set_postfix({"train loss": f"{loss:.3f}", f"val {self.key}": f"{value:.3f}"})
        if epoch == 0 and not math.isfinite(judged["val_loss"]):
            raise FloatingPointError(
                f"The validation loss is {judged['val_loss']} before any training. Look for NaN in the inputs and "
                "targets with one batch of loaders.val, and in the weights that were loaded."
            )
        if epoch == 0 and math.isnan(value):
            raise ValueError(
                f"The validation {self.key} is not a number, so it cannot choose the best epoch: those of events need "
                "events and quiet times in every column, r2 and rrse targets that differ, mape targets other than "
                "zero, iou and dice a mask with a pixel inside. Put another metric first in target.metrics, lengthen "
                "split.val, or raise training.max_val_samples."
            )
        if value * self.sign > state.score:
            state.score, state.history.best_epoch = value * self.sign, epoch
            state.best = {key: tensor.detach().clone() for key, tensor in trained_state(self.inner).items()}
            if self.run is not None:
                scalers = {name: asdict(scaler) for name, scaler in self.cfg.scalers.items()}
                extra = {"epoch": epoch, "scalers": scalers, **self.loaders.scale}
                save_adapter(self.run.folder / BEST, self.inner, self.cfg.to_dict(), extra=extra)
        elif epoch - state.history.best_epoch >= self.cfg.training.patience:
            state.history.stopped = f"no better validation {self.key} for {self.cfg.training.patience} epochs"
        state.begin_epoch(epoch + 1)
        state.save()

    def resume(self) -> None:
        """Take everything from the run `training.resume`; what follows is as if it had never stopped."""
        name, state, accelerator = self.cfg.training.resume, self.state, self.accelerator
        state.load(self.cfg.runs_folder / name / STATE, accelerator.process_index, accelerator.num_processes)
        for row in state.history.rows if self.run is not None else ():
            self.run.log(row, step=row["epoch"])
        self.bar.update(min(max(state.epoch - 1, 0) * len(self.train) + state.batches, self.bar.total))
        accelerator.print(f"going on with {name}, {state.where}")
        state.save()  # under the new name: this run, too, may be interrupted before its first step

    def finish(self) -> None:
        """Give the model its own forward back, and the weights of its best epoch."""
        self.bar.close()
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.inner.load_state_dict(self.state.best, strict=False)

    def what_remains(self) -> str:
        """Which weights the model has when a training ends early, what is on the disk, and how to go on."""
        best = f"The model has the weights of epoch {self.state.history.best_epoch}, its best so far"
        weights = best if self.state.best else "Nothing is trained"
        how = f" {how_to_go_on(self.run.name, self.cfg)}" if self.run is not None else ""
        return f"{weights}; {self.state.saved}.{how}"

    def _diverged(self, what: str) -> Diverged:
        state, lr = self.state, self.cfg.training.lr
        return Diverged(
            f"{what} at batch {state.batches + 1} of epoch {state.epoch}. Lower training.lr (now {lr}) or lengthen "
            "training.warmup; if it happens in the first batches, look for NaN in the inputs with one batch of the "
            f"loader. {self.what_remains()}",
            state.history,
        )


def _learning_rate_share(step: int, steps: int, cfg: Config) -> float:
    """Share of the learning rate at an optimiser step: a linear rise, then half a cosine or nothing."""
    warmup = round(cfg.training.warmup * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if cfg.training.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ---- Judging
@torch.no_grad()
def _judge(
    model: nn.Module, loader: DataLoader, task: Task, accelerator: Accelerator, samples: int | None = None
) -> tuple[float, Predictions | ImagePredictions]:
    """Mean loss and predictions of all samples of a loader, each once, however many processes share them."""
    collector, total, count = task.collector(samples), 0.0, 0
    model.eval()
    for batch in accelerator.prepare_data_loader(loader):
        with accelerator.autocast():
            output = model(batch).float()
        output, target = accelerator.gather_for_metrics((output, batch["target"]))
        batch["timestamp"] = accelerator.gather_for_metrics(batch["timestamp"], use_gather_object=True)
        if accelerator.num_processes > 1:
            del batch["ts"]  # only this process's share
        output, target = output.cpu().contiguous(), target.cpu()
        total, count = total + task.loss(output, target).item() * len(target), count + len(target)
        collector.add(task.to_units(output), target, batch)
    return total / count, collector.predictions()


def _in_order(loader: DataLoader, data: Subset | None = None) -> DataLoader:
    """The samples of a loader, or `data`, in the order of time: a training loader shuffles."""
    names = ("batch_size", "num_workers", "multiprocessing_context", "pin_memory")
    same = {name: getattr(loader, name) for name in names}
    # a generator of its own, because an iterator would draw from the global one
    return DataLoader(data or loader.dataset, generator=torch.Generator(), **same)
