"""A training of a few numbers, in which every promise of the loop can be checked exactly."""

from pathlib import Path

import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from helpers.config import Config, load_config
from helpers.data.dataset import Loaders
from helpers.data.labels import Labels

ROOT = Path(__file__).parents[1]
SHAPE = (2, 1, 8, 8)  # C, T, H, W
SETTINGS = {
    "training.lr": 0.05,
    "training.epochs": 6,
    "training.batch_size": 8,
    "training.warmup": 0.0,
    "training.schedule": "constant",
    "training.weight_decay": 0.0,
    "target.metrics": ["rmse"],
    "target.event_threshold": None,
    "tracking.wandb": "disabled",
}


def small_config(folder: Path, **overrides) -> Config:
    """The course's configuration with `SETTINGS`; its runs go to `folder`/runs."""
    (folder / "config.yaml").write_text((ROOT / "config.yaml").read_text())
    return load_config(folder / "config.yaml", SETTINGS | {"paths.runs": str(folder / "runs")} | overrides)


class Numbers(Dataset):
    """Images whose two channel means give the target, linearly; targets like solar-wind speeds."""

    def __init__(self, times, outputs: int = 1, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.samples = pd.DataFrame({"time": times, "label": range(len(times)), "label_time": times})
        self.ts = torch.randn(len(times), *SHAPE, generator=generator)
        self.ts += 2 * torch.randn(len(times), 2, 1, 1, 1, generator=generator)
        a, b = self.ts.mean((2, 3, 4)).T
        self.targets = torch.stack([400 + 50 * a - 30 * b, 20 * b], 1)[:, :outputs]
        self.labels = Labels(times.to_numpy("datetime64[s]"), self.targets.double().numpy())

    def __len__(self):
        return len(self.samples)

    def target(self, i):
        return self.targets[i]

    def __getitem__(self, i):
        time = self.samples["time"].iloc[i].isoformat()
        return {"ts": self.ts[i], "target": self.targets[i], "timestamp": time}


def numbers(
    batch_size: int = 8, shuffle: bool = True, outputs: int = 1, train_samples: int = 32, workers: int = 0
) -> Loaders:
    times = {"train": "2014-01-01", "val": "2014-03-01", "test": "2014-05-01"}
    counts = {"train": train_samples, "val": 12, "test": 11}
    sets = {
        name: Numbers(pd.date_range(start, periods=counts[name], freq="6h"), outputs, seed)
        for seed, (name, start) in enumerate(times.items())
    }
    loaders = {
        name: DataLoader(
            data,
            batch_size,
            shuffle=shuffle and name == "train",
            generator=torch.Generator().manual_seed(0),
            num_workers=workers,
            multiprocessing_context="forkserver" if workers else None,
        )
        for name, data in sets.items()
    }
    targets = sets["train"].targets
    return Loaders(**loaders, target_mean=targets.mean(0), target_std=targets.std(0, correction=0), report="")


def collected(task, judged, samples: int | None = None):
    """What the collector of a task makes of (prediction, target, batch), batch by batch."""
    collector = task.collector(samples)
    for batch in judged:
        collector.add(*batch)
    return collector.predictions()


class Linear(nn.Module):
    """The channel means, then a line: it can learn `Numbers` exactly."""

    def __init__(self, outputs: int = 1):
        super().__init__()
        self.head = nn.Linear(2, outputs)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch):
        return self.head(batch["ts"].mean((2, 3, 4)))
