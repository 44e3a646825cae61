"""Processes that are killed in the middle of a change of the disk, that hang, or that leave others behind."""

import ctypes
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

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
        traced = re.match(r"Traceback|Where it happened stands in|[\w.]+(Error|Exception)\b", self.last)
        return f"it hangs: {self.last}" if self.code is None else f"no sentence: {self.said[-300:]}" if traced else ""


def at_once(*works: Callable[[], object], seconds: float = 600) -> list[Ended]:
    """Call each function as a command, in a process of its own, all of them at the same time."""
    logs, pids, codes = [tempfile.TemporaryFile("w+") for _ in works], [], {}  # noqa: SIM115
    sys.stdout.flush()
    for work, log in zip(works, logs, strict=True):
        pids.append(pid := os.fork())
        if pid == 0:
            code = 1
            try:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                run(work)
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 0
            finally:
                sys.stdout.flush()
                os._exit(code)
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
    """Counts the changes of the disk below `folder` in this process: new, renamed and removed files, and fsyncs.

    The process kills itself at the change of this number, and half of what it was writing is lost then.
    """

    def __init__(self, folder: Path, number: int = 0) -> None:
        self.folder, self.number, self.count, fsync = str(folder), number, 0, os.fsync

        def watched_fsync(file: int) -> None:
            self.happens(os.readlink(f"/proc/self/fd/{file}"), written=True)
            fsync(file)

        os.fsync = watched_fsync
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple) -> None:
        """Python calls this before everything that touches the system."""
        if event in CHANGES or event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
            self.happens(args[0], written=event == "os.rename")

    def happens(self, path: object, written: bool) -> None:
        """A change of this path is about to happen; whether it is a file that was written aside."""
        inside = str(path).startswith(self.folder)
        self.count += inside
        if inside and self.count == self.number:
            if written and os.path.isfile(path):
                os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
