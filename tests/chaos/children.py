"""Processes that are killed in the middle of a change of the disk, that hang, or that leave others behind."""

import builtins
import ctypes
import io
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from helpers.tools.command import run

CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "os.symlink")
PATIENCE_S = 20  # how long what a process has started may live on after it
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: what a dead child has started becomes a child of ours


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (minus the signal that ended it; None: it hung), and all that it printed."""

    code: int | None
    said: str

    @property
    def last(self) -> str:
        """The last line that it printed."""
        return (self.said.strip().splitlines() or ["nothing was said"])[-1]

    @property
    def fault(self) -> str:
        """What a command may never do, whatever happened to it; "" where it has not."""
        traced = "Traceback" in self.said or "Where it happened stands in" in self.said
        return f"it hangs: {self.last}" if self.code is None else f"no sentence: {self.said[-300:]}" if traced else ""


def at_once(*works: Callable[[], object], seconds: float = 600) -> list[Ended]:
    """Call each function as a command, in a process of its own, all of them at the same time."""
    logs, pids, codes = [tempfile.TemporaryFile("w+") for _ in works], [], {}  # noqa: SIM115
    sys.stdout.flush()
    for work, log in zip(works, logs, strict=True):
        pids.append(pid := os.fork())
        if pid == 0:
            _be_a_command(work, log.fileno())
    end = time.monotonic() + seconds
    while len(codes) < len(pids) and time.monotonic() < end:
        for pid in set(pids) - set(codes):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    for pid in set(pids) - set(codes):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    left = "".join(f"\nTraceback: left running: {name}" for name in left_running())
    for log in logs:
        log.seek(0)
    return [Ended(codes.get(pid), log.read() + left) for pid, log in zip(pids, logs, strict=True)]


def _be_a_command(work: Callable[[], object], log: int) -> None:
    code = 1
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(1)
        run(work)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    finally:
        sys.stdout.flush()
        os._exit(code)


def left_running() -> list[str]:
    """The processes that ended children have left behind, after a while; they are ended."""
    end, names = time.monotonic() + PATIENCE_S, []
    while (living := psutil.Process().children(recursive=True)) and time.monotonic() < end:
        for process in living:
            with suppress(ChildProcessError, psutil.Error):
                if process.status() == psutil.STATUS_ZOMBIE:
                    os.waitpid(process.pid, os.WNOHANG)
        time.sleep(0.02)
    for process in living:
        with suppress(psutil.Error):
            names.append(" ".join(process.cmdline())[:120])
            process.kill()
    return names


class Changes:
    """Counts the changes of the disk below `folder` in this process: writes, renames, fsyncs, new and removed files.

    The process kills itself at the change of this number; a write is half done then.
    """

    def __init__(self, folder: Path, number: int = 0) -> None:
        self.folder, self.number, self.count = str(folder), number, 0
        opened, fsync, save = io.open, os.fsync, torch.save

        def watched_open(file, mode="r", *args, **settings):
            handle = opened(file, mode, *args, **settings)
            return Watched(handle, self) if set(mode) & set("wax+") and str(file).startswith(self.folder) else handle

        def watched_fsync(descriptor):
            self.happens(os.readlink(f"/proc/self/fd/{descriptor}"))
            return fsync(descriptor)

        def watched_save(content, file, *args, **settings):  # torch itself opens files beside Python
            with open(file, "wb") as handle:
                save(content, handle, *args, **settings)

        io.open = builtins.open = watched_open
        os.fsync, torch.save = watched_fsync, watched_save
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple) -> None:
        """Python calls this before everything that touches the system."""
        if event in CHANGES or event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
            self.happens(args[0])

    def happens(self, path: object, before: Callable[[], object] = bool) -> None:
        """A change of this path is about to happen; `before` a kill, do that."""
        inside = str(path).startswith(self.folder)
        self.count += inside
        if inside and self.count == self.number:
            before()
            os.kill(os.getpid(), signal.SIGKILL)


class Watched:
    """A file that is written under the eyes of `Changes`."""

    def __init__(self, file: io.IOBase, changes: Changes) -> None:
        self.file, self.changes = file, changes

    def write(self, content):
        def half():
            self.file.write(content[: len(content) // 2])
            self.file.flush()

        self.changes.happens(self.file.name, half)
        return self.file.write(content)

    def __getattr__(self, name: str):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
