"""The shared folder, the weights in it, free space, and writing side by side."""

import errno
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import torch

from helpers import shared
from helpers.shared import (
    DiskFullError,
    atomic_write,
    ensure_space,
    find_shared,
    find_weights,
    lease,
    make_folder,
    share,
)
from helpers.training.devices import free_memory

ROOT = Path(__file__).parents[1]
HF = "hf://nasa-ibm-ai4science/Surya-1.0/surya.366m.v1.pt"


@pytest.fixture
def find(tmp_path, monkeypatch):
    """A machine where nothing is set; returns `find_shared` for a project in `tmp_path`."""
    for name in ("SURYA_SHARED", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(shared, "_announced", set())
    return lambda setting=None: find_shared(setting and str(setting), tmp_path)


# ---------------------------------------------------------------------------------------------------- the folder
def test_the_order_is_config_then_environment_then_folders_then_cache(find, tmp_path, monkeypatch, capsys):
    assert find().path == tmp_path / "cache/surya-course"
    (tmp_path / "home/shared").mkdir(parents=True)
    assert find().path == tmp_path / "home/shared/surya-course"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    assert find().path == tmp_path / "hf/surya-course"
    monkeypatch.setenv("SURYA_SHARED", str(tmp_path / "env"))
    assert find().path == tmp_path / "env/surya-course"
    found = find("config")  # from the folder of the configuration
    assert found.path == tmp_path / "config/surya-course" and found.hub == tmp_path / "config/hub"
    find("config")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5  # one a folder, however often it is asked for
    for line, why in zip(lines, ("your own cache", "~/shared", "HF_HOME", "SURYA_SHARED", "paths.shared"), strict=True):
        assert why in line and "GB free" in line


def test_a_disk_that_is_not_mounted_is_said(find, tmp_path):
    with pytest.raises(FileNotFoundError, match="paths.shared"):
        find(tmp_path / "not/mounted")


READ_ONLY = """
import sys
from pathlib import Path
from helpers.shared import find_shared
folder = find_shared(sys.argv[1], Path())
for name in ("old", "mine", "new"):
    print(folder.to_read(folder.path / name), folder.to_write(folder.path / name), sep="|")
print(folder.writable, folder.to_write("/elsewhere"), sep="|")
"""


def test_a_read_only_shared_folder_is_read_and_a_private_one_written(find, tmp_path):
    folder, own = tmp_path / "s/surya-course", tmp_path / "cache/surya-course"
    (folder / "old").mkdir(parents=True)
    (own / "mine").mkdir(parents=True)
    command = [sys.executable, "-c", READ_ONLY, str(tmp_path / "s")]
    if os.geteuid() == 0:  # root may write anywhere but on a disk that is mounted read-only
        mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
        command = ["unshare", "-rm", "sh", "-c", mount, str(tmp_path / "s"), *command]
        if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
            pytest.skip("root, and mounting is not allowed")
    else:
        folder.chmod(0o555)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    line, *answers = done.stdout.splitlines()
    assert "read-only for you: new files go to" in line
    assert answers == [
        f"{folder}/old|{own}/old",
        f"{own}/mine|{own}/mine",
        f"{folder}/new|{own}/new",
        "False|/elsewhere",
    ]


# ---------------------------------------------------------------------------------------------------- weights
def test_a_local_checkpoint_and_a_missing_one(find, tmp_path):
    (tmp_path / "tiny.pt").touch()
    assert find_weights(str(tmp_path / "tiny.pt"), find()) == tmp_path / "tiny.pt"
    assert find_weights(None, find()) is None
    with pytest.raises(FileNotFoundError, match="none.pt .model.weights.*hf://nasa-ibm"):
        find_weights(str(tmp_path / "none.pt"), find())
    with pytest.raises(FileNotFoundError, match="hf://a is no address .* correct model.weights"):
        find_weights("hf://a", find())


@pytest.mark.parametrize("refs", ["abc", "a-version-that-was-never-downloaded", None])
def test_weights_that_someone_downloaded_are_found(find, tmp_path, refs):
    repository = tmp_path / "s/hub/models--nasa-ibm-ai4science--Surya-1.0"
    (repository / "snapshots/abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    if refs:
        (repository / "refs/main").write_text(refs)
    (repository / "snapshots/abc/surya.366m.v1.pt").write_text("weights")
    found = find_weights(HF, find(tmp_path / "s"))
    assert found.read_text() == "weights" and found.is_relative_to(tmp_path / "s/hub")


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as a download needs; `repository` chooses how it behaves."""

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        if "gated" in self.path:
            headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model is restricted"}
            return self._say(403, headers)
        if "absent" in self.path:
            return self._say(404, {"X-Error-Code": "RepoNotFound"})
        if "nofile" in self.path:
            return self._say(404, {"X-Error-Code": "EntryNotFound"})
        size = 10**16 if "huge" in self.path else 7
        self._say(200, {"ETag": '"e7"', "X-Repo-Commit": "abc", "Content-Length": str(size)})

    def do_GET(self):
        self._say(200, {"ETag": '"e7"', "X-Repo-Commit": "abc", "Content-Length": "7"})
        self.wfile.write(b"weights")

    def _say(self, status, headers):
        self.send_response(status)
        for key, value in {"Content-Length": "0", **headers}.items():
            self.send_header(key, value)
        self.end_headers()


ASK = """
import sys
from pathlib import Path
from helpers.shared import find_shared, find_weights
for name in sys.argv[2:]:
    try:
        print(find_weights(name, find_shared(sys.argv[1], Path())))
    except OSError as error:
        print(type(error).__name__, error)
"""


def test_downloads_and_what_stands_in_their_way(find, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    quiet = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def ask(endpoint, *names):
        (tmp_path / "s").mkdir(exist_ok=True)
        command = [sys.executable, "-c", ASK, str(tmp_path / "s"), *(f"hf://someone/{name}/w.pt" for name in names)]
        environment = os.environ | quiet | {"HF_ENDPOINT": endpoint}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[1:]

    here = f"http://127.0.0.1:{server.server_port}"
    good, gated, absent, nofile, huge = ask(here, "good", "gated", "absent", "nofile", "huge")
    server.shutdown()
    server.server_close()
    assert Path(good).read_text() == "weights" and Path(good).is_relative_to(tmp_path / "s/hub")
    for answer, name in ((gated, "gated"), (absent, "absent"), (nofile, "nofile")):
        assert answer.startswith(f"FileNotFoundError w.pt of someone/{name} ") and "model.weights" in answer
    assert huge.startswith("DiskFullError Writing w.pt takes 10000000.00 GB, but the disk of")
    again, offline = ask("http://127.0.0.1:9", "good", "other")
    assert again == good  # the cache answers without network
    assert offline.startswith("FileNotFoundError") and "hf download someone/other w.pt" in offline


# ---------------------------------------------------------------------------------------------------- space
def test_too_little_space_is_said_before_anything_is_written(tmp_path):
    store = tmp_path / "surya-course/frames/c.zarr"
    for name, size in {"frames/a.zarr": 300_000, "synthetic/sun": 100_000}.items():
        (tmp_path / "surya-course" / name / "c").mkdir(parents=True)
        (tmp_path / "surya-course" / name / "c/data").write_bytes(os.urandom(size))
    with pytest.raises(
        DiskFullError, match=r"Writing 9 frames takes 5\.00 GB, .* 1000000\.00 GB are to remain"
    ) as error:
        ensure_space(store, 5e9, 1e6, what="9 frames")
    assert error.value.errno == errno.ENOSPC and not store.exists()
    command = re.search("`(.*)`", str(error.value))[1]
    listed = subprocess.check_output(command, shell=True, text=True).splitlines()
    assert listed[-1].split()[1] == str(tmp_path)  # the largest last
    assert str(tmp_path / "surya-course/frames/a.zarr") in [line.split()[1] for line in listed]
    ensure_space(store, 1, 0)


# ---------------------------------------------------------------------------------------------------- atomic files
def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep/er/table.csv"
    with atomic_write(path) as temporary:
        temporary.write_text("first")
        assert not path.exists() and temporary.suffix == ".csv"
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "first" and os.listdir(path.parent) == ["table.csv"]
    with pytest.raises(DiskFullError, match="became full"), atomic_write(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "first"


def test_a_leftover_of_a_killed_process_goes_once_it_is_old(tmp_path):
    (tmp_path / ".git").mkdir()
    for name in (".last.0123456789ab.partial.pt", ".last.ba9876543210.partial.pt", ".keep.pt", "last.pt"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / ".last.ba9876543210.partial.pt").touch()  # of a process that is writing now
    with atomic_write(tmp_path / "table.csv") as temporary:
        temporary.touch()
    assert sorted(os.listdir(tmp_path)) == [".git", ".keep.pt", ".last.ba9876543210.partial.pt", "last.pt", "table.csv"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000])
@pytest.mark.parametrize(("mode", "file"), [(0o2775, 0o664), (0o755, 0o644), (0o700, 0o600), (0o1777, 0o664)])
def test_others_may_use_what_we_make_as_they_may_use_the_folder(tmp_path, mode, file, umask):
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(mode)
    before = os.umask(umask)
    try:
        with atomic_write(make_folder(folder / "a/b") / "file") as temporary:
            temporary.touch()
        (folder / "a/made/by").mkdir(parents=True)
        (folder / "a/made/by/another").touch()
        share(folder / "a/made")
    finally:
        os.umask(before)
    for path in (folder / "a", folder / "a/b", folder / "a/made/by"):
        assert path.stat().st_mode & 0o2777 == (mode & 0o2775), path
    for path in (folder / "a/b/file", folder / "a/made/by/another"):
        assert path.stat().st_mode & 0o777 == file, path


# ---------------------------------------------------------------------------------------------------- leases
HOLD = """
import sys, time
from helpers.shared import lease
with lease(sys.argv[1], "it", expires_s=3.0):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def hold(path) -> Iterator[subprocess.Popen]:
    """Another process that holds the lease until it is killed."""
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_who_waits_says_for_what_and_a_killed_owner_is_followed(tmp_path, capsys):
    with hold(tmp_path / "item") as process:
        threading.Timer(2.0, process.kill).start()
        with lease(tmp_path / "item", "it", expires_s=3.0):
            assert process.wait() != 0
    assert "Another process works on it" in capsys.readouterr().out
    assert os.listdir(tmp_path) == []


def test_an_owner_without_a_sign_of_life_is_followed(tmp_path):
    """Stopped, as on a machine that sleeps; that its process is still there must not count."""
    with hold(tmp_path / "item") as process:
        process.send_signal(signal.SIGSTOP)
        with lease(tmp_path / "item", "it", expires_s=3.0):
            assert process.poll() is None


CONTEND = """
import os, sys
from helpers.shared import lease
folder, rounds = sys.argv[1], int(sys.argv[2])
for _ in range(rounds):
    with lease(folder + "/item", "it"):
        count = int(open(folder + "/count").read())
        inside = os.open(folder + "/inside", os.O_CREAT | os.O_EXCL)
        open(folder + "/count", "w").write(str(count + 1))
        os.close(inside)
        os.unlink(folder + "/inside")
"""


def test_many_contenders_for_a_dead_owner_s_lease_never_hold_it_together(tmp_path):
    (tmp_path / "count").write_text("0")
    with hold(tmp_path / "item") as process:
        command = [sys.executable, "-c", CONTEND.replace('"it"', '"it", expires_s=3.0'), str(tmp_path), "15"]
        contenders = [subprocess.Popen(command, cwd=ROOT) for _ in range(3)]
        process.kill()
        assert [contender.wait() for contender in contenders] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "45"
    assert sorted(os.listdir(tmp_path)) == ["count"]


# --- memory of a container ---


@pytest.mark.parametrize(
    "version, own",
    [
        (2, "0::/"),  # in a container: its own group is all that it sees
        (2, "0::/job/step"),  # the limit is that of a group above
        (1, "9:name=systemd:/x\n4:memory:/kubepods/pod7\n0::/"),  # a path of the machine outside
    ],
)
def test_memory_is_what_the_container_leaves(tmp_path, monkeypatch, version, own):
    monkeypatch.setattr(shared, "OWN_GROUP", tmp_path / "own")
    monkeypatch.setattr(shared, "GROUPS", tmp_path / "groups")
    names = shared.GROUP_FILES["" if version == 2 else "memory"]
    folder = tmp_path / "groups" / ("" if version == 2 else "memory")
    (folder / "job" / "step").mkdir(parents=True)
    machine = shared.memory()
    assert machine[0] < machine[1] == psutil.virtual_memory().total  # no groups on this system
    (tmp_path / "own").write_text(own)
    (folder / "job" / "step" / names[0]).write_text("max")
    (folder / names[0]).write_text("3000000")
    (folder / names[1]).write_text("2500000")
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} 2000000\nactive_file 5\n")
    assert shared.memory() == (2_500_000, 3_000_000)
    assert free_memory(torch.device("cpu")) == 2_500_000
    (folder / names[0]).write_text("max")  # version 1 writes a very large number
    assert shared.memory()[1] == machine[1]
