"""The first hour at real size, without the network: frames of 13 x 4096^2 on a loopback S3 server, a Surya of 366M."""

from __future__ import annotations

import argparse
import logging
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import boto3
import h5py
import hdf5plugin
import numpy as np
import pandas as pd
import torch
import yaml
from moto.server import ThreadedMotoServer

from helpers.channels import CHANNELS, UNITS
from helpers.config import load_config
from helpers.data.synthetic import SyntheticSun
from helpers.model.encoder import SuryaEncoder
from helpers.model.heads import Specformer2D

ROOT = Path(__file__).parents[2]
BUCKET = "nasa-surya-bench"
DAYS = ("2014-01-07", "2014-03-01", "2015-03-01", "2015-05-01", "2017-09-01", "2017-10-01")  # two in each split
LABELS = pd.to_datetime([f"{day} 12:00" for day in DAYS])
MINE = {"path": "mine.csv", "time_column": "time", "value_columns": ["flux"], "transform": "log10", "lead_minutes": 0}
SETTINGS = {
    "tasks": {"flare": {"labels": MINE}},
    "tracking": {"wandb": "disabled"},
    # a CPU without units for bfloat16 takes many times as long in it
    "training": {"precision": "fp32", "frozen_dtype": "fp32"},
    "experiments": {"finetune": {"training": {"epochs": 1}}},
}


def write_frame(path: Path, images: np.ndarray) -> None:
    """A NetCDF-4 file of the archive's layout, Zstd-compressed as the release's own tools do."""
    with h5py.File(path, "w") as file:
        for axis in "yx":
            file.create_dataset(axis, (images.shape[1],), "f4").make_scale(axis)
        for name, image in zip(CHANNELS, images, strict=True):
            data = file.create_dataset(name, data=image, chunks=(1024, 1024), **hdf5plugin.Zstd(clevel=1))
            data.attrs["units"] = UNITS[name]
            for number, axis in enumerate("yx"):
                data.dims[number].attach_scale(file[axis])


def fill_bucket(folder: Path, endpoint: str, times: pd.DatetimeIndex) -> float:
    """A frame for each time, all of one Sun, a little brighter each time; returns the GB of one file."""
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket=BUCKET)
    images, path = SyntheticSun(0, 500).frame(200, 4096), folder / "frame.nc"
    for number, when in enumerate(times):
        write_frame(path, images * np.float32(1 + 0.01 * number))
        client.upload_file(str(path), BUCKET, f"{when:%Y/%m/%Y%m%d_%H%M.nc}")
    return path.stat().st_size / 1e9


def write_weights(shared: Path) -> None:
    """A random Surya of the released size, where the Hugging Face cache would have it."""
    cfg = load_config(ROOT / "config.yaml", profile="surya")
    folder = shared / "hub" / "models--nasa-ibm-ai4science--Surya-1.0" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    arguments = cfg.encoder_arguments() | {"img_size": cfg.data.native_size}  # the filters of the release's own grid
    model = Specformer2D(SuryaEncoder(**arguments), out_chans=len(CHANNELS))
    state = {key.removeprefix("encoder."): value for key, value in model.state_dict().items()}
    torch.save(state, folder / "surya.366m.v1.pt")


def call(words: list[str], folder: Path, environment: dict[str, str], **how: str) -> None:
    """One command of the README: its time, the memory of its largest process so far, and its last lines."""
    started = time.perf_counter()
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, **how)
    minutes = (time.perf_counter() - started) / 60
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    lines = [line for line in re.split(r"[\r\n]+", done.stdout + done.stderr * bool(done.returncode)) if line.strip()]
    print(
        f"\n$ {' '.join(words)}   # exit code {done.returncode}, {minutes:.1f} min, at most {memory:.1f} GB a process"
    )
    print("\n".join(f"    {line}" for line in lines[-12:]), flush=True)


def main() -> None:
    """Print what the three commands of the first hour take, in an empty clone of this repository."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--own-venv", action="store_true", help="let the clone install a .venv of its own")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, clone = Path(temporary), Path(temporary, "clone")
        os.environ.update(AWS_ACCESS_KEY_ID="any", AWS_SECRET_ACCESS_KEY="any", AWS_DEFAULT_REGION="us-east-1")
        os.environ.update(SURYA_SHARED=str(folder / "shared"))
        logging.getLogger("werkzeug").setLevel("ERROR")
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        size = fill_bucket(folder, endpoint, LABELS.union(LABELS - pd.Timedelta("1h")))
        write_weights(folder / "shared")
        print(f"{2 * len(LABELS)} frames of {size:.2f} GB each at {endpoint}", flush=True)
        subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
        pd.DataFrame({"time": LABELS, "flux": np.geomspace(1e-7, 1e-4, len(LABELS))}).to_csv(clone / "mine.csv")
        settings = SETTINGS | {"data": {"endpoint_url": endpoint}}
        (clone / "config.local.yaml").write_text(yaml.safe_dump(settings))
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        make = ["make"]
        if not asked.own_venv:
            environment |= {"VIRTUAL_ENV": sys.prefix, "PYTHONPATH": str(clone)}
            make = ["make", "-o", "env"]
        for words in (["plan"], ["cache"], ["run-notebook", "NB=finetune"]):
            call([*make, *words, "PROFILE=surya"], clone, environment)
        server.stop()


if __name__ == "__main__":
    main()
