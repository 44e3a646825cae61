"""The local history is complete whatever happens; Weights & Biases gets the same and may fail."""

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from matplotlib.figure import Figure

from helpers import shared
from helpers.config import load_config
from helpers.shared import DiskFullError
from helpers.training import tracking
from helpers.training.tracking import claim_run, list_runs, start_run, wandb_mode

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def cfg(tmp_path):
    """The course's configuration with runs in a temporary folder and Weights & Biases disabled."""
    return load_config(ROOT / "config.yaml", {"paths.runs": str(tmp_path / "runs"), "tracking.wandb": "disabled"})


def with_wandb(cfg, mode):
    return load_config(ROOT / "config.yaml", {"paths.runs": cfg.paths.runs, "tracking.wandb": mode})


def test_a_run_leaves_config_history_figures_and_summary(cfg):
    with start_run(cfg) as run:
        run.log({"train": 1.0, "val": torch.tensor(0.5)}, step=0)
        run.log({"val": np.float32(0.25), "train": float("nan")}, step=1)
        figure = Figure()
        figure.add_subplot().plot([1, 2])
        assert run.figure("curves", figure).read_bytes().startswith(b"\x89PNG")
        run.summary({"test_rmse": np.float64(0.3)})
        run.summary({"test_tss": float("inf")})
    assert run.folder == Path(cfg.paths.runs) / "finetune-flare-tiny-001"
    table = pd.read_csv(run.folder / "history.csv")
    assert list(table) == ["step", "train", "val"] and table.val.tolist() == [0.5, 0.25] and table.train.isna()[1]
    assert yaml.safe_load((run.folder / "config.yaml").read_text()) == cfg.to_dict()
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["metrics"] == {"test_rmse": 0.3, "test_tss": None}


def test_a_new_name_is_a_new_column(cfg):
    run = start_run(cfg)
    run.log({"train": 1.0}, step=0)
    run.log({"train": 0.5, "lr": 0.1}, step=1)
    assert (run.folder / "history.csv").read_text().splitlines() == ["step,train,lr", "0,1.0,", "1,0.5,0.1"]


def test_a_killed_process_leaves_what_it_measured(cfg):
    code = (
        "import os, sys\nfrom helpers.config import load_config\nfrom helpers.training.tracking import start_run\n"
        "cfg = load_config(sys.argv[1], {'paths.runs': sys.argv[2], 'tracking.wandb': 'disabled'})\n"
        "run = start_run(cfg, 'killed')\nfor step in range(3): run.log({'loss': 1.0 / (step + 1)}, step)\n"
        f"os.kill(os.getpid(), {int(signal.SIGKILL)})"
    )
    subprocess.run([sys.executable, "-c", code, ROOT / "config.yaml", cfg.paths.runs], cwd=ROOT)
    folder = Path(cfg.paths.runs) / "killed"
    assert len(pd.read_csv(folder / "history.csv")) == 3
    assert json.loads((folder / "summary.json").read_text())["status"] == "running"
    assert list_runs(cfg.paths.runs).empty


def test_the_runners_folder_is_used_once_and_never_overwritten(cfg):
    folder = claim_run(Path(cfg.paths.runs), "baseline-flare-tiny")
    (folder / "baseline.ipynb").write_text("{}")
    with start_run(cfg, folder.name) as run:
        run.log({"loss": 1.0}, step=0)
    assert run.folder == folder
    with pytest.raises(FileExistsError, match="runs are not overwritten. Pass name=None"):
        start_run(cfg, folder.name)


def test_many_processes_never_share_a_folder(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: claim_run(tmp_path / "runs", "a"), range(40)))
    assert len(set(folders)) == 40 and folders[0].parent.joinpath("a-040").exists()
    assert claim_run(tmp_path / "runs", "a").name == "a-041" and claim_run(tmp_path / "runs", "b").name == "b-001"
    folders[0].rmdir()  # a deleted run's number is not given again: its name would mean another run
    (tmp_path / "runs/a-999-more").mkdir()
    assert claim_run(tmp_path / "runs", "a").name == "a-042"


def test_runs_are_found_by_experiment_task_and_profile(cfg):
    assert list_runs(cfg.paths.runs).empty
    settings = {"paths.runs": cfg.paths.runs, "tracking.wandb": "disabled"}
    baseline = load_config(ROOT / "config.yaml", settings, experiment="baseline")
    for of, rmse in [(baseline, 0.5), (cfg, 0.4), (baseline, 0.3)]:
        with start_run(of) as run:
            run.summary({"test_rmse": rmse})
    with pytest.raises(RuntimeError), start_run(baseline):
        raise RuntimeError("interrupted")
    table = list_runs(cfg.paths.runs, task="flare")
    assert table.test_rmse.tolist() == [0.5, 0.4, 0.3] and table.settings[0] == baseline.to_dict()
    assert table.experiment.tolist() == ["baseline", "finetune", "baseline"] and table.seed.tolist() == [cfg.seed] * 3
    assert list_runs(cfg.paths.runs, experiment="finetune").test_rmse.tolist() == [0.4]
    assert list_runs(cfg.paths.runs, task="wind").empty and list_runs(cfg.paths.runs, profile="surya").empty
    assert list_runs(cfg.paths.runs, commit="another").empty
    assert len(list_runs(cfg.paths.runs, commit=tracking.commit_of(cfg.root))) == 3


def test_wandb_offline_writes_a_run_that_wandb_can_read(cfg, capfd, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "same")
    with start_run(with_wandb(cfg, "offline")) as run:
        run.describe(data_fingerprint="d1", checkpoint_fingerprint="none")
        run.log({"loss": 0.125}, step=0)
        run.log({"loss": 0.0625}, step=1)
        figure = Figure()
        figure.add_subplot().plot([1, 2])
        run.figure("curves", figure)
        run.summary({"test_rmse": 0.3})
    (file,) = run.folder.glob("wandb/offline-run-*/*.wandb")
    assert "same" not in file.name
    deadline = time.monotonic() + 20  # wandb's own process writes the file, shortly after finish()
    while not (records := wandb_records(file)) or not records[-1].HasField("exit"):
        assert time.monotonic() < deadline, f"{file} is not complete"
        time.sleep(0.1)
    start = next(record.run for record in records if record.HasField("run"))
    assert (start.display_name, start.run_group, start.job_type) == (run.name, "flare-tiny", "finetune")
    noted = {item.key: item.value_json for record in records for item in record.config.update}
    noted |= {item.key: item.value_json for item in start.config.update}
    assert noted["data_fingerprint"] == '"d1"' and json.loads(noted["commit"]) == run._about["commit"]
    assert json.loads(noted["training"])["lr"] == cfg.training.lr
    rows = [{item.key or item.nested_key[0]: item.value_json for item in record.history.item} for record in records]
    assert [row["loss"] for row in rows if "loss" in row] == ["0.125", "0.0625"]
    assert any("curves" in row for row in rows)
    console = capfd.readouterr()
    assert "wandb" not in console.out + console.err


def wandb_records(file):
    """The records of an offline run: a LevelDB log (blocks of 32 KiB, each piece after a header of 7 bytes)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, pieces, records = file.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        pieces += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            records.append(Record.FromString(pieces))
            pieces = b""
    return records


class TestWandbMayFail:
    """Whatever happens to Weights & Biases, one sentence is said and the local history is complete."""

    def test_at_the_start(self, cfg, monkeypatch):
        monkeypatch.setattr("wandb.init", lambda **_: (_ for _ in ()).throw(OSError("no network")))
        with pytest.warns(UserWarning, match=r"did not start (online|offline) \(no network\)"):
            run = start_run(with_wandb(cfg, "online"))
        self.check_local_history(run)

    def test_in_the_middle_and_only_once(self, cfg, monkeypatch):
        class Broken:
            def log(self, *_, **__):
                raise ConnectionError("lost")

        monkeypatch.setattr(tracking, "_start_wandb", lambda *_: Broken())
        run = start_run(cfg)
        with pytest.warns(UserWarning, match=r"Weights & Biases failed \(lost\)") as caught:
            self.check_local_history(run)
        assert len(caught) == 1

    @staticmethod
    def check_local_history(run):
        with run:
            run.log({"loss": 1.0}, step=0)
            run.log({"loss": 0.5}, step=1)
        assert len(pd.read_csv(run.folder / "history.csv")) == 2


@pytest.mark.parametrize("silent", [False, True])
def test_a_server_that_does_not_answer_costs_seconds_and_the_run_is_offline(cfg, monkeypatch, silent):
    """Nobody listens there, or somebody who never replies."""
    monkeypatch.setattr(tracking, "UPLOAD_SECONDS", 3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1] if silent else 9}")
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        started = time.monotonic()
        with pytest.warns(UserWarning, match="did not start online"), start_run(with_wandb(cfg, "online")) as run:
            run.log({"loss": 1.0}, step=0)
        assert time.monotonic() - started < 40
    assert len(pd.read_csv(run.folder / "history.csv")) == 1 and list(run.folder.glob("wandb/offline-run-*"))
    for path in (path for path in run.folder.rglob("*") if path.is_file()):
        assert b"k" * 40 not in path.read_bytes(), f"{path} holds the key"


@pytest.mark.parametrize("name", ["", "..", ".", "/abs", "../x", "a/b", "-rf"])
def test_a_run_has_a_plain_name(cfg, name):
    with pytest.raises(ValueError, match="A run cannot be called"):
        start_run(cfg, name)


def test_one_damaged_record_is_left_out_and_named(cfg, capsys):
    for name in ("whole", "empty", "cut", "unset"):
        start_run(cfg, name).finish()
    (Path(cfg.paths.runs) / "unset/config.yaml").write_text("labels: [")
    (Path(cfg.paths.runs) / "empty/summary.json").write_text("{}")
    (Path(cfg.paths.runs) / "cut/summary.json").write_text('{"name": "cu')
    record = json.loads((Path(cfg.paths.runs) / "whole/summary.json").read_text())
    for key in ("name", "experiment", "task", "profile", "finished", "status", "metrics"):
        start_run(cfg, f"no-{key}").finish()
        content = {name: value for name, value in record.items() if name != key}
        (Path(cfg.paths.runs) / f"no-{key}/summary.json").write_text(json.dumps(content))
    assert list(list_runs(cfg.paths.runs, task="flare")["name"]) == ["whole"]
    said = capsys.readouterr().out
    assert "runs/empty" in said and "runs/cut" in said and "runs/unset" in said and said.count("runs/no-") == 7


def test_a_disk_that_stays_full_hides_no_error_and_the_run_is_not_listed(cfg, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with pytest.raises(ZeroDivisionError), start_run(cfg, "full") as run:
        monkeypatch.setattr(shared.os, "replace", full)
        raise ZeroDivisionError
    assert json.loads((run.folder / "summary.json").read_text())["status"] == "running"
    assert list_runs(cfg.paths.runs).empty
    with pytest.raises(DiskFullError), start_run(cfg, "unfinished"):
        pass


def test_a_run_says_which_code_data_and_weights_made_it(cfg, tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    assert start_run(cfg)._about["commit"] == tracking.commit_of(cfg.root)
    assert tracking.commit_of(tmp_path / "elsewhere") == "not in git"
    (tmp_path / "config.yaml").write_text("seed: 0")
    for words in (["init", "-q"], ["add", "config.yaml"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    clean = tracking.commit_of(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", clean)
    (tmp_path / "config.yaml").write_text("seed: 1")
    assert tracking.commit_of(tmp_path) == clean + "+changes"
    with start_run(cfg) as run:
        run.describe(data_fingerprint="abc", checkpoint_fingerprint="none")
    about = json.loads((run.folder / "summary.json").read_text())
    assert (about["data_fingerprint"], about["checkpoint_fingerprint"]) == ("abc", "none") and about["commit"]


def test_auto_is_online_only_for_who_is_logged_in(cfg, tmp_path, monkeypatch, capfd):
    import wandb

    auto = with_wandb(cfg, "auto")

    def mode() -> str:
        wandb.teardown()  # it reads the environment once a process
        return wandb_mode(auto)

    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert mode() == "offline"
    (tmp_path / "netrc").write_text(f"machine elsewhere.org login user password {'k' * 40}\n")
    os.chmod(tmp_path / "netrc", 0o600)
    assert mode() == "offline"
    monkeypatch.setenv("WANDB_BASE_URL", "https://elsewhere.org")
    assert mode() == "online"
    monkeypatch.delenv("WANDB_BASE_URL")
    monkeypatch.setenv("WANDB_API_KEY", "short")
    assert mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert mode() == "offline" and wandb_mode(with_wandb(cfg, "online")) == "online"
    assert "wandb" not in "".join(capfd.readouterr())
