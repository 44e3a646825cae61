"""Where weights, frames and runs live on this machine, and how several people write there without harm.

What we make goes into the subfolder `surya-course` of the shared folder; weights from the Hugging Face hub go into the
standard cache layout in `hub` beside it, so that what others have downloaded is found.
"""

import errno
import os
import re
import shlex
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import AcquireReturnProxy, SoftFileLease, Timeout

SUBFOLDER = "surya-course"
GB = 1e9
# The control groups of Linux limit a container, or a job of a cluster. Where the process is, where their files are, and
# the names there, in version 2 and 1: limit, use, and what of that are copies of files, which can be dropped.
OWN_GROUP, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
GROUP_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


class DiskFullError(OSError):
    """There is not enough free space; the message says how much is needed and what could be freed."""

    errno = errno.ENOSPC


@dataclass(frozen=True)
class SharedFolder:
    """The folder shared by everyone on this machine, and where to write when it is read-only for you."""

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
        """Where you may write `path`: itself, or the same place in your private folder."""
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
    """Find the shared folder of this machine, the first of the choices below, and print once which it is and why.

    `setting` is `paths.shared` of the configuration; where it is relative it starts at `root`. FileNotFoundError: it,
    or SURYA_SHARED, names a folder whose parent does not exist.
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
    """Whether you may make files in `path`, or in the nearest folder above that exists. On a read-only disk: no."""
    return os.access(_existing(path), os.W_OK | os.X_OK)


def _existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def find_weights(address: str | None, shared: SharedFolder, reserve_gb: float = 0.0) -> Path | None:
    """The local file of pretrained weights: of a path, of "hf://owner/name/file", or None of None (random weights).

    A download goes into the shared Hugging Face cache, if nobody did it before, and leaves `reserve_gb` GB free. It is
    a FileNotFoundError where there is no such file or no way to it, and a DiskFullError where there is no room.
    """
    if address is None:
        return None
    if address.startswith("hf://"):
        return download(address, shared, reserve_gb, "model.weights")
    path = shared.to_read(address)
    if not path.is_file():
        surya = "hf://nasa-ibm-ai4science/Surya-1.0/surya.366m.v1.pt"
        raise FileNotFoundError(f"There is no checkpoint at {path} (model.weights in the config); Surya is {surya}.")
    return path


def download(address: str, shared: SharedFolder, reserve_gb: float, setting: str) -> Path:
    """The local file of "hf://owner/name/file" or "hf://datasets/owner/name/file", which stands in the key `setting`.

    Errors are those of `find_weights`.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

    kind = "dataset" if address.startswith("hf://datasets/") else "model"
    parts = address.removeprefix("hf://").removeprefix("datasets/").split("/", 2)
    if len(parts) < 3:
        raise FileNotFoundError(f"{address} is no address on the hub, hf://owner/name/file: correct {setting}.")
    owner, name, filename = parts
    repository, folder = f"{owner}/{name}", f"{kind}s--{owner}--{name}"
    private_hub = shared.private.parent / "huggingface" / "hub"
    cache = shared.hub if shared.writable else private_hub

    def downloaded() -> Path | None:  # the newest: `refs/main` may be missing, or name a version that nobody has
        places = (shared.hub, Path(constants.HF_HUB_CACHE), private_hub)
        found = [path for place in places for path in place.glob(f"{folder}/snapshots/*/{filename}")]
        return max(found, key=lambda path: path.stat().st_mtime, default=None)

    if found := downloaded():
        return found
    with lease(cache / folder, what=filename), disk_errors(cache):
        if found := downloaded():  # by somebody else, meanwhile
            return found
        try:
            size = get_hf_file_metadata(hf_hub_url(repository, filename, repo_type=kind)).size or 0
            ensure_space(cache, size, reserve_gb, what=filename)
            path = Path(hf_hub_download(repository, filename, repo_type=kind, cache_dir=cache))
        except Exception as error:  # each HTTP library has its own kinds
            raise FileNotFoundError(
                f"{filename} of {repository} could not be downloaded from the Hugging Face hub: "
                f"{' '.join(str(error).split())} ({type(error).__name__}). Is {setting} in the config right? "
                f"Without network here, run `hf download {repository} {filename} --repo-type {kind}` on a machine that "
                f"has it, copy the file to this one, and set {setting} to its path."
            ) from error
        share(cache / folder)
        share(cache / ".locks")
        return path


def free_space(path: str | Path) -> int:
    """Bytes that you may still write to the disk of `path` (which need not exist yet)."""
    return shutil.disk_usage(_existing(Path(path))).free


def memory() -> tuple[int, int]:
    """Free and total bytes of memory: of this machine, or what a container or a cluster's job may have of it."""
    free, total = psutil.virtual_memory().available, psutil.virtual_memory().total
    groups = OWN_GROUP.read_text().splitlines() if OWN_GROUP.exists() else []
    for kind, group in (line.split(":", 2)[1:] for line in groups):
        if kind not in GROUP_FILES:
            continue
        limit, use, files = GROUP_FILES[kind]
        for name in (group, *map(str, Path(group).parents)):  # inside a container only the last one is there
            with suppress(OSError, ValueError):  # not there, or without a limit
                folder = GROUPS / kind / name.lstrip("/")
                most, used = (int((folder / file).read_text()) for file in (limit, use))
                droppable = int(re.search(rf"^{files} (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)[1])
                free, total = min(free, most - used + droppable), min(total, most)
    return free, total


def ensure_space(path: str | Path, size: float, reserve_gb: float, what: str = "this") -> None:
    """DiskFullError if, after writing `size` bytes at `path`, less than `reserve_gb` GB would be left on its disk."""
    free = free_space(path)
    if size + reserve_gb * GB > free:
        ours = next((folder for folder in Path(path).absolute().parents if folder.name == SUBFOLDER), Path(path))
        nearby = shlex.quote(str(_existing(ours.parent)))
        raise DiskFullError(
            f"Writing {what} takes {size / GB:.2f} GB, but the disk of {path} has {free / GB:.2f} GB free, of which "
            f"{reserve_gb:.2f} GB are to remain (paths.reserve_gb). What takes the room: `du -hd 3 {nearby} | sort -h`"
        )


@contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """While inside, an error that comes from a full disk or quota becomes a DiskFullError about the disk of `path`."""
    try:
        yield
    except Exception as error:
        for cause in causes(error):
            if isinstance(cause, DiskFullError):
                raise DiskFullError(str(cause)) from error
            if getattr(cause, "errno", 0) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(cause):
                raise DiskFullError(
                    f"The disk of {path} became full ({free_space(path) / GB:.2f} GB free). What was being written has "
                    "been removed, the rest is still there. Free some space and run this again: it goes on."
                ) from error
        raise


def share(path: Path) -> None:
    """Let others use `path`, and all in it, as they may use the folder above, whatever your umask is."""
    for place in (path, *path.rglob("*")):
        with suppress(OSError):  # gone, or of another person, who shares it
            rights = place.parent.stat().st_mode & (0o075 if place.is_dir() else 0o064)
            if not place.is_symlink():
                place.chmod(place.stat().st_mode & 0o7700 | rights)


def make_folder(path: str | Path) -> Path:
    """Make `path` and the folders above it, shared as the folder above them is."""
    path = Path(path)
    lacking = [folder for folder in (path, *path.parents) if not folder.is_dir()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(lacking):
        share(folder)
    return path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Write a file so that others see all of it or nothing: yields a temporary path that is moved to `path` at the end.

    The folder is made if needed. On an error, of a full disk too, the temporary file goes and an older `path` stays.
    """
    path = Path(path)
    remove_leftovers(make_folder(path.parent))
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:12]}.partial{path.suffix}")
    with disk_errors(path.parent):
        try:
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())  # the name must not be on the disk before the contents
            share(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, pattern: str = "*.partial*") -> None:
    """Remove what a process that was killed more than a day ago has left in a folder, half-written files at first."""
    for path in folder.glob(pattern):
        with suppress(OSError):  # gone by now, or somebody else's
            if path.lstat().st_mtime < time.time() - 86400:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def lease(path: str | Path, what: str, expires_s: float = 60.0) -> AcquireReturnProxy:
    """`with lease(...)`: one process of all machines is inside for `path` at a time; others wait, and say for what.

    A lock whose owner is dead, or has shown no sign of life for `expires_s` seconds, is taken over.
    """
    path = Path(path)
    lock = SoftFileLease(make_folder(path.parent) / f".{path.name}.lock", lease_duration=expires_s)
    try:
        return lock.acquire(timeout=1)
    except Timeout:
        print(f"Another process works on {what} (it holds {lock.lock_file}); waiting for it.")
        return lock.acquire()
