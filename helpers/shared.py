"""Where weights, frames and runs live on this machine, and how several people write there without harm.

The shared folder is the first of: `paths.shared` in the config, SURYA_SHARED, HF_HOME, /shared, ~/shared, your own
cache. What we make goes into its subfolder `surya-course`; weights from the Hugging Face hub go into the standard cache
layout in `hub`, so that what others have downloaded is found. Locks are folders moved into place, which network disks
do atomically; none of this relies on flock.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import stat
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

SUBFOLDER = "surya-course"
GB = 1e9


class DiskFullError(OSError):
    """There is not enough free space; the message says how much is needed and what could be freed."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.errno = errno.ENOSPC


class LockedError(TimeoutError):
    """Someone else holds the lock of an item; the message says who."""


# --------------------------------------------------------------------------------------------------------------------
# Finding the folder
# --------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class SharedFolder:
    """The folder shared by everyone on this machine, and where to write when it is read-only."""

    path: Path  # <chosen folder>/surya-course
    reason: str  # why this one was taken
    writable: bool
    private: Path  # the same in your own cache; where we write when `path` is read-only

    @property
    def hub(self) -> Path:
        """The Hugging Face cache beside `path`."""
        beside = self.path.parent
        return beside / "huggingface" / "hub" if beside == _user_cache() else beside / "hub"

    def to_write(self, path: str | Path) -> Path:
        """Where you may write `path`: itself, or the same place in your private folder when it is read-only for you."""
        path = Path(path)
        if self.writable or not path.is_relative_to(self.path):
            return path
        return self.private / path.relative_to(self.path)

    def to_read(self, path: str | Path) -> Path:
        """Where `path` is read: itself if it is there, else its private counterpart if that is there, else itself."""
        path, own = Path(path), self.to_write(path)
        return own if own.exists() and not path.exists() else path

    def __str__(self) -> str:
        use = f"{free_space(self.path) / GB:.1f} GB free"
        if not self.writable:
            use = f"read-only for you: new files go to {self.private}, {free_space(self.private) / GB:.1f} GB free"
        return f"Shared folder: {self.path} (from {self.reason}; {use})"


_announced: set[SharedFolder] = set()


def find_shared(setting: str | None, root: Path) -> SharedFolder:
    """Find the shared folder of this machine, and print once which one it is and why.

    The first of these counts: `setting` (`paths.shared` of the configuration; a relative path starts at `root`),
    SURYA_SHARED, HF_HOME, /shared and ~/shared where they exist, your own cache.

    Raises:
        FileNotFoundError: `setting` or SURYA_SHARED names a folder whose parent does not exist.
    """
    choices = [
        (setting, "paths.shared in the config"),
        (os.environ.get("SURYA_SHARED"), "the environment variable SURYA_SHARED"),
        (os.environ.get("HF_HOME"), "the environment variable HF_HOME"),
        *((place, f"{place}, which exists") for place in ("/shared", "~/shared") if Path(place).expanduser().is_dir()),
        (str(_user_cache()), "your own cache, as no shared folder is set or found"),
    ]
    text, reason = next((text, reason) for text, reason in choices if text)
    base = root / Path(text).expanduser()
    if reason in (choices[0][1], choices[1][1]) and not base.parent.exists():
        raise FileNotFoundError(
            f"The shared folder {base} (from {reason}) does not exist, nor does the folder {base.parent}. Is the disk "
            f"mounted? Correct {reason}, or remove it to use your own cache."
        )
    path = base / SUBFOLDER
    found = SharedFolder(path, reason, is_writable(path), _user_cache() / SUBFOLDER)
    if found not in _announced:
        _announced.add(found)
        print(found)
    return found


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def is_writable(path: Path) -> bool:
    """Whether a file can be made in `path` (or in the nearest folder above that exists), found out by making one."""
    try:
        with tempfile.TemporaryFile(dir=_existing(path)):
            return True
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return False
        raise


def _existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


# --------------------------------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------------------------------
def find_weights(address: str | None, shared: SharedFolder, reserve_gb: float = 0.0) -> Path | None:
    """The local file of pretrained weights, downloaded into the shared Hugging Face cache if nobody did before.

    Args:
        address: a path, "hf://owner/name/file", or None (random weights), for which None is returned.
        reserve_gb: free space that must remain on the disk after a download.

    Raises:
        FileNotFoundError: no such file here or on the hub, or no network.
        PermissionError: the repository is gated.
        DiskFullError: the disk has no room for it.
    """
    if address is None:
        return None
    if not address.startswith("hf://"):
        path = shared.to_read(address)
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no checkpoint at {path} (model.weights in the config). Put the file there, or use "
                f'"hf://nasa-ibm-ai4science/Surya-1.0/surya.366m.v1.pt" to take it from the Hugging Face hub.'
            )
        return path
    owner, name, *parts = address.removeprefix("hf://").split("/")
    repository, filename = f"{owner}/{name}", "/".join(parts)
    private_hub = shared.private.parent / "huggingface" / "hub"
    from huggingface_hub import constants, try_to_load_from_cache

    for cache in (shared.hub, Path(constants.HF_HUB_CACHE), private_hub):
        found = try_to_load_from_cache(repository, filename, cache_dir=cache)
        if isinstance(found, str):
            return Path(found)
    return _download(repository, filename, shared.hub if shared.writable else private_hub, reserve_gb)


def _download(repository: str, filename: str, cache: Path, reserve_gb: float) -> Path:
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_download, hf_hub_url

    page = hf_hub_url(repository, filename)
    make_folder(cache)
    try:
        with item_lock(cache / f"{repository}/{filename}".replace("/", "--")), group_umask(cache):
            ensure_space(cache, get_hf_file_metadata(page).size or 0, reserve_gb, what=filename)
            return Path(hf_hub_download(repository, filename, cache_dir=cache))
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{repository} is gated. Accept its terms on its page in the browser, then run `hf auth login` here."
        ) from error
    except (errors.RepositoryNotFoundError, errors.RemoteEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"The Hugging Face hub has no {filename} in {repository}, or it is private and you are not logged in "
            f"(`hf auth login`). Check model.weights in the config; the address tried was {page}."
        ) from error
    except DiskFullError:
        raise
    except LockedError:
        raise
    except Exception as error:  # each HTTP library has its own kinds
        raise_if_full(error, cache)
        raise FileNotFoundError(
            f"{filename} is not in {cache}, and could not be downloaded from the Hugging Face hub: "
            f"{type(error).__name__}: {(str(error) or 'no reason given').splitlines()[0]}. Without network here, run "
            f"`hf download {repository} {filename}` on a machine that has it, copy the file to this one, and set "
            f"model.weights in the config to its path."
        ) from error


# --------------------------------------------------------------------------------------------------------------------
# Space
# --------------------------------------------------------------------------------------------------------------------
def free_space(path: str | Path) -> int:
    """Bytes that you may still write to the disk of `path` (which need not exist yet)."""
    return shutil.disk_usage(_existing(Path(path))).free


def ensure_space(path: str | Path, size: float, reserve_gb: float, what: str = "this") -> None:
    """Refuse to begin writing `size` bytes at `path` when less than `reserve_gb` GB would be left on its disk.

    Raises:
        DiskFullError: with the numbers, and the biggest folders nearby that could be freed.
    """
    free = free_space(path)
    if size + reserve_gb * GB <= free:
        return
    raise DiskFullError(
        f"Writing {what} takes {size / GB:.2f} GB, but the disk of {path} has {free / GB:.2f} GB free, of which "
        f"{reserve_gb:.2f} GB are to remain (paths.reserve_gb). {_what_to_free(Path(path))}",
    )


def biggest_folders(root: str | Path, count: int = 5, seconds: float = 3.0) -> tuple[list[tuple[Path, int]], bool]:
    """The biggest folders at most three levels below `root`, as (path, bytes), and whether the time was enough for all.

    A folder is left out when one folder in it makes up nearly all of it. Stops looking after `seconds`.
    """
    root, end = Path(root), time.monotonic() + seconds
    sizes: dict[Path, int] = {}
    for folder, _, files in os.walk(root):
        if time.monotonic() > end:
            break
        size = 0
        for name in files:
            with suppress(OSError):
                size += os.lstat(os.path.join(folder, name)).st_blocks * 512
        parts = Path(folder).relative_to(root).parts[:3]
        for depth in range(1, len(parts) + 1):
            place = root.joinpath(*parts[:depth])
            sizes[place] = sizes.get(place, 0) + size
    covered = {child.parent for child, size in sizes.items() if size > 0.9 * sizes.get(child.parent, size + 1)}
    ranked = sorted(((p, s) for p, s in sizes.items() if p not in covered and s), key=lambda pair: -pair[1])
    return ranked[:count], time.monotonic() <= end


def _what_to_free(path: Path) -> str:
    ours = next((folder for folder in path.absolute().parents if folder.name == SUBFOLDER), None)
    root = ours.parent if ours and ours.parent.is_dir() else _existing(path)
    folders, complete = biggest_folders(root)
    if not folders:
        return f"Nothing large was found in {root}: free space elsewhere on this disk, or choose another one."
    listed = "; ".join(f"{folder} ({size / GB:.2f} GB)" for folder, size in folders)
    return f"The biggest folders that could be freed{'' if complete else ' (of those seen in 3 s)'}: {listed}."


def raise_if_full(error: BaseException, path: Path, then: str = "Run this again then: it goes on.") -> None:
    """Raise DiskFullError when `error` (or what caused it) means that the disk or your quota of it is full.

    `then` says what to do when there is space again.
    """
    while error is not None:
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            raise DiskFullError(
                f"The disk of {path} became full ({free_space(path) / GB:.2f} GB free). What was being written has "
                f"been removed, the rest is still there. {_what_to_free(path)} {then}"
            ) from error
        error = error.__cause__ or error.__context__


@contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """While inside, "no space left" is told as a DiskFullError about the disk of `path`."""
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        raise_if_full(error, Path(path))
        raise


# --------------------------------------------------------------------------------------------------------------------
# Files that appear whole, with the modes of the folder
# --------------------------------------------------------------------------------------------------------------------
def make_folder(path: str | Path) -> Path:
    """Make `path` and the folders above it; they are group-writable where the folder above them is."""
    path = Path(path)
    if not path.is_dir():
        make_folder(path.parent)
        with group_umask(path.parent):
            path.mkdir(exist_ok=True)
    return path


@contextmanager
def group_umask(folder: str | Path) -> Iterator[None]:
    """While inside, new files of this process can be written by the group if `folder` (or the one above) can."""
    if not stat.S_IMODE(_existing(Path(folder)).stat().st_mode) & stat.S_IWGRP:
        yield
        return
    before = os.umask(0o002)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Write a file so that others see all of it or nothing: yields a temporary path that is moved to `path` at the end.

    The folder is made if needed. On an error the temporary file is removed and an older `path` stays as it was.

    Raises:
        DiskFullError: when the disk became full while writing.
    """
    path = Path(path)
    make_folder(path.parent)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:12]}{path.suffix}")
    try:
        with group_umask(path.parent):
            yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # the name must not be on the disk before the contents
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        raise_if_full(error, path.parent)
        raise


def flush_to_disk(file: str | Path, below: str | Path) -> None:
    """Return when a file, and the folders from `below` down to it, would survive a power cut."""
    file, below = Path(file), Path(below)
    for path in (file, *(folder for folder in file.parents if folder == below or below in folder.parents)):
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        except OSError as error:
            if path == file or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network disks: not for folders
                raise
        finally:
            os.close(number)


# --------------------------------------------------------------------------------------------------------------------
# Locks
# --------------------------------------------------------------------------------------------------------------------
@dataclass
class Lock:
    """A held lock. `lost` turns true when someone took it over because we seemed dead (asleep for minutes)."""

    owner_file: Path
    beat_s: float
    _released: threading.Event = field(default_factory=threading.Event)

    @property
    def lost(self) -> bool:
        return not self.owner_file.exists()

    def keep(self) -> None:
        """Touch the owner's file until released: the sign of life that others look at."""
        while not self._released.wait(self.beat_s):
            try:
                os.utime(self.owner_file)
            except OSError:
                return

    def release(self) -> None:
        self._released.set()
        with suppress(OSError):  # taken over, or the next one has come in already
            self.owner_file.unlink()
            self.owner_file.parent.rmdir()


@contextmanager
def item_lock(path: str | Path, timeout_s: float | None = None, stale_s: float = 120.0) -> Iterator[Lock]:
    """Hold the lock of the item at `path`, so that only one process on any machine works on it.

    The lock is a folder `.NAME.lock` beside the item with one file named after its owner. It is taken by moving a
    prepared folder into place, which fails when a folder with an owner is there, and taken over from a dead owner by
    renaming the owner's file, which only one of several can do. An owner is dead when its process on this machine is
    gone, or when its file was not touched for `stale_s` seconds by the clock of the disk.

    Args:
        timeout_s: how long to wait for it; 0 to try once, None to wait for ever.

    Raises:
        LockedError: it was not free in time.
    """
    place = Path(path).with_name(f".{Path(path).name}.lock")
    make_folder(place.parent)
    token = uuid.uuid4().hex
    prepared, mine = place.with_name(f"{place.name}.{token}"), place / f"owner-{token}-{os.getpid()}-{_machine()}"
    end = None if timeout_s is None else time.monotonic() + timeout_s
    pause = 0.02
    with group_umask(place.parent):
        prepared.mkdir()
        (prepared / mine.name).touch()
    try:
        while not _acquire(place, prepared, mine, stale_s):
            if end is not None and time.monotonic() >= end:
                raise LockedError(f"{path} is being worked on by {_owner(place)}. Wait for it, or try again later.")
            time.sleep(pause)
            pause = min(pause * 1.5, 1.0)
    finally:
        shutil.rmtree(prepared, ignore_errors=True)
    lock = Lock(mine, stale_s / 8)
    threading.Thread(target=lock.keep, daemon=True).start()
    try:
        yield lock
    finally:
        lock.release()


def _acquire(place: Path, prepared: Path, mine: Path, stale_s: float) -> bool:
    with suppress(OSError):
        os.rename(prepared, place)  # works when `place` is missing or empty
        return True
    if mine.exists():  # a network disk may report failure for a move that was done
        return True
    owner = next(place.glob("owner-*"), None)
    if owner is None:
        return False  # it is changing hands right now
    with suppress(OSError):
        os.utime(prepared / mine.name)
        age = (prepared / mine.name).stat().st_mtime - owner.stat().st_mtime
        _, _, pid, machine = owner.name.split("-", 3)
        if age > stale_s or (machine == _machine() and not _alive(int(pid))):
            os.utime(owner)  # before it is ours: a file with my name on it must never look dead to a third
            os.rename(owner, mine)
            return True
    return False


def _owner(place: Path) -> str:
    owner = next(place.glob("owner-*"), None)
    return "another process" if owner is None else "process {2} on {3}".format(*owner.name.split("-", 3))


def _machine() -> str:
    """This machine, or this container: process numbers mean the same wherever this is the same."""
    name = socket.gethostname()
    with suppress(OSError):
        name += f".{os.stat('/proc/self/ns/pid').st_ino}"
    return re.sub(r"[^\w.-]", "_", name)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
