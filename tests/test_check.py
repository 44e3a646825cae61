"""`make check`: what lacks is named with the command that mends it, and the exit code says whether a run can work."""

import json
import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from huggingface_hub import constants
from jupyter_client import kernelspec

from helpers.config import load_config
from helpers.data.frames import prepare_store
from helpers.data.synthetic import ensure_synthetic
from helpers.tools import check

SURYA = ["--profile", "surya", "--task", "solar_wind"]
FILL = "-> make cache TASK=solar_wind PROFILE=surya"


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Run the command with these words, with an empty shared folder; its exit code and its lines."""
    monkeypatch.setenv("SURYA_SHARED", str(tmp_path))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))

    def run(*words: str) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["check", *words])
        code = check.main()
        return code, [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]

    return run


@pytest.fixture
def hub(monkeypatch):
    """A hub that answers, with nothing but 404."""

    class Empty(SimpleHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Empty)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    server.server_close()


def test_an_empty_laptop_is_ready(call, tmp_path):
    code, lines = call()
    assert code == 0 and lines[-1] == "profile tiny, task flare: ready"
    assert "frames a synthetic Sun, to be drawn in two minutes" in lines and "-> make cache" in lines
    assert "-> wandb login" in lines and "-> make kernel" in lines and not (tmp_path / "surya-course").exists()


def test_what_would_be_downloaded_is_no_fault_where_the_hub_answers(call, hub):
    code, lines = call(*SURYA)
    assert code == 0 and lines[-1].endswith("ready")
    weights = next(i for i, line in enumerate(lines) if line.startswith("weights hf://") and "is not here" in line)
    assert lines[weights + 1] == FILL and "-> make plan TASK=solar_wind PROFILE=surya" in lines


def test_without_a_way_to_the_hub_it_cannot_run(call, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    code, lines = call(*SURYA)
    assert code == 1 and "profile surya, task solar_wind: cannot run here" in lines
    assert lines[-2:] == [f"{what}: http://127.0.0.1:9 does not answer" for what in ("weights", "labels")]


def test_a_checkpoint_that_is_not_there_is_no_matter_of_the_hub(call, hub):
    code, lines = call("--parameters", "model.weights=/tmp/nowhere.pt")
    assert code == 1 and any(line.startswith("weights There is no checkpoint at /tmp/nowhere.pt") for line in lines)


def test_labels_that_are_wrong_are_no_matter_of_the_network(call, hub):
    code, lines = call("--parameters", "synthetic.folder=null data.archive=. paths.labels=. data.store=.")
    assert code == 1 and lines[-1] == "labels: see above"
    assert any(line.startswith("labels There is no label file") for line in lines)


@pytest.mark.slow
def test_frames_are_counted_and_a_read_only_folder_without_them_is_no_place_to_run(call, monkeypatch, tmp_path):
    small = {"synthetic.visits": 24, "split.train": ["2014-01-01", "2014-01-29"], "paths.reserve_gb": 0}
    small |= {"split.val": ["2014-01-31", "2014-02-08"], "split.test": ["2014-02-10", "2014-02-20"]}
    words = ["--parameters", " ".join(f"{key}={json.dumps(value)}" for key, value in small.items())]
    cfg = load_config(parameters=small)
    ensure_synthetic(cfg)
    code, lines = call(*words)
    count = len(prepare_store(cfg, plan_only=True).samples.frames)
    assert code == 0 and any(line.startswith(f"frames to build: {count} frames;") for line in lines)
    monkeypatch.setattr(check, "is_writable", lambda path: False)
    code, lines = call(*words)
    assert code == 1 and lines[-1].startswith("frames: that folder is read-only for you;")
    prepare_store(cfg, progress=False)
    code, lines = call(*words)
    assert code == 0 and any(line.startswith(f"frames frames: {count} needed, {count} there") for line in lines)


def test_the_kernel_counts_if_it_is_of_this_python(call, tmp_path):
    folder = tmp_path / "jupyter" / "kernels" / "surya-course"
    folder.mkdir(parents=True)
    for python, told in {
        "/another/python": "kernel not registered",
        sys.executable: "kernel Surya course",
    }.items():
        (folder / "kernel.json").write_text(json.dumps({"argv": [python], "display_name": "x", "language": "python"}))
        assert "surya-course" in kernelspec.find_kernel_specs()
        assert told in call()[1]


@pytest.mark.slow
def test_make_check_ends_without_a_word_more(make, tmp_path):
    done = make("check", SURYA_SHARED=str(tmp_path), JUPYTER_DATA_DIR=str(tmp_path))
    assert done.returncode == 0 and done.stdout.endswith("profile tiny, task flare: ready\n") and done.stderr == ""
