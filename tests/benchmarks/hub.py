"""A student's first hour on a copy of the hub, all on loopback: S3, Hugging Face, a read-only shared folder, 366M."""

from __future__ import annotations

import argparse
import io
import logging
import os
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import yaml
from moto.server import ThreadedMotoServer
from real_size import ROOT, call, fill_bucket, write_weights

# two images in each split of solar_wind; the labels are those of four days later
IMAGES = pd.to_datetime(["2014-01-03", "2014-01-04", "2015-03-01", "2015-03-02", "2017-09-01", "2017-09-02"])
SPLITS = {"train": 0, "valid": 2, "test": 4}
SETTINGS = {
    "tracking": {"wandb": "disabled"},
    # a CPU without units for bfloat16 takes many times as long in it
    "training": {"precision": "fp32", "frozen_dtype": "fp32"},
    "experiments": {"finetune": {"training": {"epochs": 1}}},
}


class Mirror(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as the label files of solar_wind need."""

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool):
        split = self.path.rpartition("solarwind_")[2].removesuffix(".csv")
        text = io.StringIO()
        if known := split in SPLITS:
            first = SPLITS[split]
            times = IMAGES[first : first + 2] + pd.Timedelta("4D")
            pd.DataFrame({"timestamp": times, "V": [400.0, 500.0]}).to_csv(text, index=False)
        data = text.getvalue().encode()
        self.send_response(200 if known else 404)
        about = {"ETag": f'"{split}"', "X-Repo-Commit": "0" * 40} if known else {"X-Error-Code": "EntryNotFound"}
        for key, value in {"Content-Length": str(len(data)), **about}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


def main() -> None:
    """Fill the shared folder as an instructor, then type what the README says as a student who may only read it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=1, help="so many of the eight times of make verify")
    parser.add_argument("--only", nargs="*", default=["check", "plan", "verify", "run-notebook"])
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, clone = Path(temporary), Path(temporary, "clone")
        folder.chmod(0o755)
        os.environ.update(AWS_ACCESS_KEY_ID="any", AWS_SECRET_ACCESS_KEY="any", AWS_DEFAULT_REGION="us-east-1")
        os.environ.update(SURYA_SHARED=str(folder / "shared"), HF_HUB_DISABLE_XET="1", OMP_NUM_THREADS="2")
        logging.getLogger("werkzeug").setLevel("ERROR")
        bucket = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        bucket.start()
        endpoint = "http://{}:{}".format(*bucket.get_host_and_port())
        mirror = ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
        threading.Thread(target=mirror.serve_forever, daemon=True).start()
        verified = pd.Timestamp("2014-01-07 15:00") + pd.to_timedelta(
            sorted({12 * step + 60 * hour for step in range(asked.times) for hour in range(4)}), "min"
        )
        times = IMAGES.union(verified if "verify" in asked.only else [])
        print(f"{len(times)} frames of {fill_bucket(folder, endpoint, times):.2f} GB each at {endpoint}", flush=True)
        write_weights(folder / "shared")
        subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
        (clone / "config.local.yaml").write_text(yaml.safe_dump(SETTINGS | {"data": {"endpoint_url": endpoint}}))
        environment = os.environ | {"VIRTUAL_ENV": sys.prefix, "PYTHONPATH": str(clone), "HOME": str(folder / "home")}
        environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{mirror.server_port}", "XDG_CACHE_HOME": str(folder / "home")}
        (folder / "home").mkdir()
        surya = ["TASK=solar_wind", "PROFILE=surya"]
        verify = ["verify", "PROFILE=surya_4k", f"ARGS=--times {asked.times}"]  # with random weights: "wrong"
        words = {"check": ["check", *surya], "plan": ["plan", *surya], "verify": verify}
        words["run-notebook"] = ["run-notebook", "NB=finetune", *surya]
        make = ["make", "-o", "env"]
        print("\nAs the instructor")
        call([*make, "cache", *surya], clone, environment)
        if "verify" in asked.only:
            span = f"ARGS=--span {verified[0]:%Y-%m-%dT%H:%M} {verified[-1] + pd.Timedelta('12min'):%Y-%m-%dT%H:%M}"
            call([*make, "cache", "TASK=forecast", "PROFILE=surya_4k", span], clone, environment)
        print("\nAs a student, who may only read the shared folder")
        subprocess.run(["chmod", "-R", "a-w", folder / "shared"], check=True)
        if os.geteuid() == 0:  # who may write everywhere, but for this
            make = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override", *make]
        for name in asked.only:
            call([*make, *words[name]], clone, environment)
        subprocess.run(["chmod", "-R", "u+w", folder / "shared"], check=True)
        mirror.shutdown()
        bucket.stop()


if __name__ == "__main__":
    main()
