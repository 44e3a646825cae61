"""Processes for work that threads cannot share, such as decompressing NetCDF files."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import forkserver

import torch


@contextmanager
def worker_pool(workers: int) -> Iterator[Executor]:
    """Processes with one torch thread each, which end when this one does, however it ends; one worker is a thread.

    After an error or Ctrl-C no job that waits is begun. The processes are not forked ones, which would inherit the
    threads of torch, zarr and Jupyter in a state that they cannot use.
    """
    pool = ThreadPoolExecutor(1) if workers <= 1 else _processes(workers)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _processes(workers: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers.data.frames"])  # imported once for all
    if threading.current_thread() is threading.main_thread():
        # Ctrl-C is for this process, which ends them: a worker that dies halfway through a message confuses the others
        heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            forkserver.ensure_running()
        finally:
            signal.signal(signal.SIGINT, heard)
    return ProcessPoolExecutor(workers, context, initializer=_start_worker)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # also where a DataLoader has started the server
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
