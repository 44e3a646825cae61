"""Stopping and going on: all that changes during a training, in one file of the run's folder.

Accelerate's `save_state` writes a folder, and a folder cannot take the place of the one before in one step. A file can:
a kill at any moment leaves the old state or the new one, whole.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate.utils import gather_object
from torch import nn

from helpers.config import Config, settings_that_matter
from helpers.data.dataset import Loaders, fingerprint
from helpers.model.checkpoint import CheckpointError, loaded_from, read_file, trained_state
from helpers.shared import atomic_write, remove_leftovers
from helpers.training.tracking import STATE


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


class RunState:
    """All that a later process needs to go on as if the training had never stopped.

    Of `epoch`, which is to be done, so many `batches` and `samples` are done already, and `loss` is the sum over these.
    """

    def __init__(
        self,
        path: Path | None,  # that keeps it; None in a training without a run, and in all processes but the first
        model: nn.Module,
        parts: Mapping[str, Any],  # objects with a state_dict, by name: optimizer, schedule and loss scaler
        loaders: Loaders,
        cfg: Config,
    ) -> None:
        self.path, self.model, self.parts, self.generator = path, model, parts, loaders.train.generator
        # what must be the same in the run that goes on
        data = fingerprint(getattr(loaders, name).dataset for name in loaders.sizes)
        settings = settings_that_matter(cfg, "resume")
        self.origin = {"config": settings, "data": data, "checkpoint": loaded_from(model)}
        self.history, self.score, self.best = History(), -math.inf, {}
        self.saved = "nothing was saved to go on from"
        self.begin_epoch(0)

    def begin_epoch(self, epoch: int) -> None:
        """Nothing of this epoch is done; the order of its samples follows from the generator as it is now."""
        self.epoch, self.batches, self.samples, self.loss = epoch, 0, 0, 0.0
        self.order = self.generator.get_state()

    @property
    def where(self) -> str:
        """How far the training is."""
        return f"after batch {self.batches} of epoch {self.epoch}" if self.batches else f"after epoch {self.epoch - 1}"

    def save(self) -> None:
        """Write everything to `path`, in place of what was there. All processes call this together."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        randomness = gather_object([{"torch": torch.get_rng_state(), "cuda": cuda}])
        if self.path is None:
            return
        state = {
            **self.origin,
            "model": {key: tensor.detach() for key, tensor in trained_state(self.model).items()},
            "best": self.best,
            "score": self.score,
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "random": randomness,
            "order": self.order,
            "progress": (self.epoch, self.batches, self.samples, self.loss),
            "history": vars(self.history),
        }
        with atomic_write(self.path) as temporary:
            torch.save(state, temporary)
        self.saved = f"the last good state is {self.path} ({self.where})"

    def load(self, path: Path, process: int, processes: int) -> None:
        """Take everything from the file of another run (else a CheckpointError); this is the process of that number."""
        if not path.is_file():
            there = sorted(found.parent.name for found in path.parents[1].glob(f"*/{STATE}"))
            raise CheckpointError(
                f"There is no {path} to go on from (training.resume). Runs with a state: {', '.join(there) or 'none'}."
            )
        remove_leftovers(path.parent)  # of a kill while it saved
        state, own = read_file(path), trained_state(self.model)
        before, now = state["config"], self.origin["config"]
        other = [f"{key} ({before.get(key)} then, {now.get(key)} now)" for key in now if now[key] != before.get(key)]
        reasons = {
            f"other settings: {', '.join(other)}": bool(other),
            "other frames or labels": state["data"] != self.origin["data"],
            "another checkpoint under the model": state["checkpoint"] != self.origin["checkpoint"],
            "another model": set(state["model"]) != set(own),
            f"{len(state['random'])} process(es), and now there are {processes}": len(state["random"]) != processes,
        }
        if found := [reason for reason, holds in reasons.items() if holds]:
            raise CheckpointError(
                f"The run {path.parent.name} (training.resume) cannot be continued, because it had {'; '.join(found)}. "
                "Take back what differs, or start a new run without training.resume."
            )
        with torch.no_grad():
            for key, tensor in state["model"].items():
                own[key].copy_(tensor)
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        self.epoch, self.batches, self.samples, self.loss = state["progress"]
        self.history, self.score, self.best = History(**state["history"]), state["score"], state["best"]
        self.order = state["order"]
        self.generator.set_state(self.order)
        random = state["random"][process]
        torch.set_rng_state(random["torch"])
        if random["cuda"] and len(random["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(random["cuda"])
