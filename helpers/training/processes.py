"""The same training in several processes at once, started from one notebook cell by Accelerate's launchers.

Each process computes its share of every batch. On GPUs the processes are Accelerate's notebook launcher, on the CPU its
debug launcher; both copy (fork) this very process, with its model and data, and the result comes back through a file.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import debug_launcher, notebook_launcher
from accelerate.state import AcceleratorState
from torch import nn

from helpers.config import Config
from helpers.data.dataset import Loaders
from helpers.model.checkpoint import trained_state

if TYPE_CHECKING:
    from helpers.training.tracking import Run

# Asking whether there is a GPU must not start CUDA here: a process that has started it cannot be copied.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


@dataclass
class _Relay:
    """Stands for the run in the copies: sends what it is told to the process that has the run."""

    folder: Path
    queue: Any

    @property
    def name(self) -> str:
        return self.folder.name

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        self.queue.put(("log", {"metrics": dict(metrics), "step": step}))

    def describe(self, **origin: str) -> None:
        self.queue.put(("describe", origin))


def launch(fit: Callable, model: nn.Module, loaders: Loaders, cfg: Config, run: Run | None) -> Any:
    """Call `fit(model, loaders, cfg, run)` in `training.processes` copies of this process.

    Returns:
        What `fit` returned in the first of them; `model` gets the weights that it had at the end there.

    Raises:
        ValueError: fewer GPUs than processes.
        RuntimeError: this process has used a GPU already, or one of the copies died.
        Exception: what `fit` raised.
    """
    gpus = 0 if cfg.training.device == "cpu" else torch.cuda.device_count()
    _check(cfg.training.processes, gpus)
    start = notebook_launcher if gpus else debug_launcher
    options = {"use_port": _free_port()} if gpus else {}
    AcceleratorState._reset_state(reset_partial_state=True)
    failure = None
    with tempfile.TemporaryDirectory(prefix="processes-") as folder, _relayed(run) as relay, _interrupts_passed_on():
        result = Path(folder, "result")
        try:
            start(_work, (fit, model, loaders, cfg, relay, result), cfg.training.processes, **options)
        except Exception as error:
            failure = error
        outcome = pickle.loads(result.read_bytes()) if result.exists() else {}
    if gpus:
        torch.cuda.init()  # from here on this process may use them, too
    model.load_state_dict(outcome.get("state", {}), strict=False)
    if "error" in outcome:
        raise outcome["error"]
    if failure is not None or not outcome:
        reason = (str(failure).strip() or "it was killed").splitlines()[-1]
        raise RuntimeError(f"One of the {cfg.training.processes} processes of the training died: {reason}") from failure
    return outcome["returned"]


def _check(count: int, gpus: int) -> None:
    if gpus and gpus < count:
        raise ValueError(
            f"training.processes is {count} and this machine has {gpus} GPU(s), one for each process at most. Lower "
            "it, or set training.device: cpu."
        )
    if gpus and torch.cuda.is_initialized():
        raise RuntimeError(
            f"training.processes: {count} starts copies of this process, and a process that has used a GPU cannot be "
            "copied. Restart the kernel and run all cells, or train without a notebook: accelerate launch "
            f"--num_processes {count} -m helpers.tools.train finetune"
        )


def _work(fit: Callable, model: nn.Module, loaders: Loaders, cfg: Config, run: _Relay | None, result: Path) -> None:
    """In each copy. The first one leaves what `fit` returned or raised, and the weights."""
    torch.set_num_threads(1)  # the threads of the original are not in the copy: waiting for them would never end
    os.environ["OMP_NUM_THREADS"] = "1"
    for loader in (loaders.train, loaders.val, loaders.test):
        if loader.num_workers:
            loader.multiprocessing_context = "spawn"  # the fork server is a child of the original, out of reach here
    outcome: dict[str, Any] = {}
    try:
        outcome["returned"] = fit(model, loaders, cfg, run)
    except BaseException as error:
        outcome["error"] = error
        raise
    finally:
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            outcome["state"] = {key: tensor.detach().cpu() for key, tensor in trained_state(model).items()}
            result.write_bytes(pickle.dumps(outcome))


@contextmanager
def _relayed(run: Run | None) -> Iterator[_Relay | None]:
    """A stand-in for the run whose rows are logged here, as they come."""
    if run is None:
        yield None
        return
    queue, failed = multiprocessing.get_context("fork").SimpleQueue(), []

    def log() -> None:
        for method, said in iter(queue.get, None):
            try:
                getattr(run, method)(**said)
            except Exception as error:
                failed.append(error)

    thread = threading.Thread(target=log, daemon=True)
    thread.start()
    try:
        yield _Relay(run.folder, queue)
    finally:
        queue.put(None)
        thread.join()
    if failed:
        raise failed[0]


@contextmanager
def _interrupts_passed_on() -> Iterator[None]:
    """While inside, the first Ctrl-C goes to the copies, which stop cleanly; the second one stops them at once."""
    others = set(multiprocessing.active_children())

    def mine() -> list:
        return [child for child in multiprocessing.active_children() if child not in others]

    def pass_on(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for child in mine():
            os.kill(child.pid, signal.SIGINT)

    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, pass_on) if in_main else None
    try:
        yield
    finally:
        for child in mine():
            child.terminate()
        if in_main:
            signal.signal(signal.SIGINT, before)


def _free_port() -> str:
    """A port that nobody on this machine uses: two people may train at once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])
