"""Where weights, frames and runs live on this machine, and how several people write there without harm.

What we make goes into the subfolder `surya-course` of the shared folder; weights from the Hugging Face hub go into the
standard cache layout in `hub` beside it, so that what others have downloaded is found.
"""

import errno
import os
import shlex
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import SoftFileLease, Timeout

SUBFOLDER = "surya-course"
GB = 1e9


class DiskFullError(OSError):
    """There is not enough free space; the message says how much is needed and what could be freed."""

    errno = errno.ENOSPC


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
    """Find the shared folder of this machine, the first of the choices below, and print once which it is and why.

    Args:
        setting: `paths.shared` of the configuration; a relative path starts at `root`.

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
    """Whether you may make files in `path`, or in the nearest folder above that exists. On a read-only disk: no."""
    return os.access(_existing(path), os.W_OK | os.X_OK)


def _existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def find_weights(address: str | None, shared: SharedFolder, reserve_gb: float = 0.0) -> Path | None:
    """The local file of pretrained weights, downloaded into the shared Hugging Face cache if nobody did before.

    Args:
        address: a path, "hf://owner/name/file", or None (random weights), for which None is returned.
        reserve_gb: free space that must remain on the disk after a download.

    Raises:
        FileNotFoundError: no such file, here or on the hub, or it cannot be downloaded.
        DiskFullError: the disk has no room for it.
    """
    if address is None:
        return None
    if not address.startswith("hf://"):
        if not (path := shared.to_read(address)).is_file():
            raise FileNotFoundError(
                f"There is no checkpoint at {path} (model.weights in the config). Put the file there, or use "
                f'"hf://nasa-ibm-ai4science/Surya-1.0/surya.366m.v1.pt" to take it from the Hugging Face hub.'
            )
        return path
    return download(address, shared, reserve_gb, "model.weights")


def download(address: str, shared: SharedFolder, reserve_gb: float, setting: str) -> Path:
    """The local file of "hf://owner/name/file" or "hf://datasets/owner/name/file", which stands in the key `setting`.

    Errors are those of `find_weights`.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

    kind = "dataset" if address.startswith("hf://datasets/") else "model"
    owner, name, filename = address.removeprefix("hf://").removeprefix("datasets/").split("/", 2)
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
    if not path.is_dir():
        make_folder(path.parent)
        with suppress(FileExistsError):  # made by another process just now
            path.mkdir()
            share(path)
    return path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Write a file so that others see all of it or nothing: yields a temporary path that is moved to `path` at the end.

    The folder is made if needed. On an error the temporary file is removed and an older `path` stays as it was; where
    the disk became full it is a DiskFullError.
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


@contextmanager
def lease(path: str | Path, what: str, expires_s: float = 60.0) -> Iterator[None]:
    """Only one process of all machines is inside for `path` at a time; others wait, and say for what.

    A lock whose owner is dead, or has shown no sign of life for `expires_s` seconds, is taken over.
    """
    make_folder(Path(path).parent)
    lock = SoftFileLease(Path(path).with_name(f".{Path(path).name}.lock"), lease_duration=expires_s)
    try:
        lock.acquire(timeout=1)
    except Timeout:
        print(f"Another process works on {what} (it holds {lock.lock_file}); waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
