"""Bad inputs, made by rules: a valid file and one thing wrong. Each must end in a sentence that names what is wrong."""

import io
import json
import math
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import torch
import yaml
from frame_files import HOURS, ODD, build, spoiled, write_index
from jobs import BEST, ROOT, small
from parts import Tried, some

from helpers.channels import CHANNELS
from helpers.config import leaves, load_config, parse_parameters
from helpers.data.archive import Archive, read_index
from helpers.data.dataset import read_mask
from helpers.data.frames import open_store, reduce_frame
from helpers.data.labels import load_labels
from helpers.experiment import build_model
from helpers.model.checkpoint import load_adapter, load_filtered
from helpers.tools import new_notebook, run_notebook
from helpers.tools.command import run
from helpers.tools.predict import read_times
from helpers.training.tracking import list_runs, start_run

GIVEN = yaml.load(Path(__file__).with_name("inputs.yaml").read_text(encoding="utf-8"), yaml.BaseLoader)  # all text
Cases = Iterator[tuple[str, Callable[[], object], str]]  # what is wrong; what uses it; what the sentence must name


def bad_inputs(ground: Path, folder: Path, most: int | None) -> Tried:
    """Every case, in this one process, as a command would end."""
    kinds = (settings, label_files, vectors, masks, frames, indices, weights, run_folders, names, stores)
    cases = [case for kind in kinds for case in kind(ground, folder)]
    signal.signal(signal.SIGALRM, lambda *_: print(1 / 0))
    for number in some(len(cases), most):
        (what, use, name), said = cases[number - 1], io.StringIO()
        signal.alarm(60)
        with redirect_stdout(said):
            try:
                run(lambda use=use: print("accepted:", use()))
            except SystemExit:
                signal.alarm(0)
        told = said.getvalue().strip()
        sentence = name in told and not told.startswith("accepted") and "Where it happened stands in" not in told
        yield what, "" if sentence else f"must name {name!r}: {told[-300:]}"


def settings(ground: Path, folder: Path) -> Cases:
    """Every key with a value of another type, and one that there is not; whole files; P=; TIMES=."""
    source = ROOT / "config.yaml"
    for key, value in leaves(load_config(source).to_dict()):
        wrong = [{"a": 1}, [[1]]]
        if isinstance(value, int | float) and not isinstance(value, bool):
            wrong += ["many", math.nan, [value]]
        elif isinstance(value, str | bool):
            wrong += [7, [7]]
        for other in wrong if key not in ("labels.path", "labels.time_column") else ():
            yield f"{key}: {other}", partial(load_config, source, {key: other}), key
        yield f"{key}s", partial(load_config, source, {f"{key}s": value}), f"{key}s"
    for number, text in enumerate(GIVEN["settings"]):
        (place := folder / f"config-{number}").mkdir()
        shutil.copy(source, place)
        (place / "config.local.yaml").write_text(text, encoding="latin-1")
        yield f"config.local.yaml, {text}", partial(load_config, place / "config.yaml"), str(place)
    for text in GIVEN["parameters"]:
        use = partial(lambda text: load_config(source, parameters=parse_parameters([text])), text)
        yield f"P={text}", use, text.split()[-1].partition("=")[0]
    for text in GIVEN["times"]:
        yield f"TIMES={text}", partial(read_times, text, 60), "TIMES"


def label_files(ground: Path, folder: Path) -> Cases:
    """A table with one cell, one row or all wrong."""
    good = ["time,value", "2014-01-01,1.5", "2014-01-02,2.5"]
    rows = [f"{cell},3.5" for cell in GIVEN["moments"]] + [f"2014-01-03,{cell}" for cell in GIVEN["numbers"]]
    texts = ["\n".join([*good, row, "2014-01-04,4.5"]) for row in rows + GIVEN["rows"]] + GIVEN["tables"]
    classes = [f"time,value\n2014-01-01,M1.0\n2014-01-02,{cell}" for cell in GIVEN["classes"]]
    for number, text in enumerate(texts + classes):
        (path := folder / f"labels-{number}.csv").write_text(text, encoding="utf-8")
        transform = "goes" if text in classes else "none"
        yield f"label file, {text[-30:]!r}", partial(load_labels, path, "time", ["value"], transform), path.name


def put(file: h5py.File, name: str, data: object, **attributes: object) -> None:
    """Another variable in place of this one; None: no variable."""
    if name in file:
        del file[name]
    if data is not None:
        file.create_dataset(name, data=data).attrs.update(attributes)


def vectors(ground: Path, folder: Path) -> Cases:
    """A NetCDF label file whose times, values or attributes are wrong."""
    hours, since = np.arange(5.0), {"units": "hours since 2014-01-01"}
    odd = (np.array([b"now"] * 5), hours[:4], hours + 1j, np.array(1.0), None)
    cases = [("time", data, since) for data in (*odd, hours * np.nan, hours * 1e300, hours * 1e9)]
    cases += [("time", hours, {"units": unit}) for unit in ("", "hours", "hours since yesterday", "hours since")]
    cases += [("value", data, {}) for data in (*odd, hours + np.inf, hours - 9999.9, np.ones((5, 2, 2)))]
    strange = {"units": "furlong", "scale_factor": "two", "_FillValue": "none", "add_offset": np.array([], "f4")}
    cases += [("value", hours, {key: value}) for key, value in strange.items()]
    for number, (name, data, attributes) in enumerate(cases):
        with h5py.File(path := folder / f"vectors-{number}.nc", "w") as file:
            put(file, "time", hours, **since)
            put(file, "value", hours + 1)
            put(file, name, data, **attributes)
        use = partial(load_labels, path, "time", ["value"], unit="km/s")
        yield f"labels, {name} {data} {attributes}", use, path.name


def masks(ground: Path, folder: Path) -> Cases:
    """An image that is no mask of 32 x 32 pixels."""
    spot = np.eye(32)
    images = [np.where(spot, value, 0) for value in (3, -1, 254, np.nan, np.inf, 1j, 1e30)]
    images += [spot[0], spot[:16], spot[:0], np.ones((2, 32, 32)), np.eye(33), np.eye(16), spot.astype("S1")]
    for number, image in enumerate(images):
        with h5py.File(path := folder / f"mask-{number}.nc", "w") as file:
            put(file, "mask", image)
        yield f"mask {number}, {image.shape}", partial(read_mask, str(path), "mask", 32), path.name
    yield "no variable", partial(read_mask, str(folder / "mask-0.nc"), "other", 32), "mask-0.nc"
    yield "no mask", partial(read_mask, str(folder / "none.nc"), "mask", 32), "none.nc"


def frames(ground: Path, folder: Path) -> Cases:
    """A frame with one of its channels wrong, or the file."""
    spoils, whole = [("", what, spoil) for what, spoil in ODD.items()], np.ones((32, 32))
    build(folder, times=())
    store = open_store(folder / "store.zarr")
    wrong = [(data, {}) for data in (None, 0 * whole, whole[:16, :16], whole[0], 1.0, "quiet", 1j * whole)]
    wrong += [(np.where(np.eye(32), pixel, whole), {}) for pixel in (np.nan, np.inf, -np.inf, 3e38)]
    wrong += [(whole, {"units": "furlong"}), (whole, {"scale_factor": 0.0}), (whole, {"add_offset": np.nan})]
    for name in CHANNELS:
        for data, attributes in wrong:
            spoil = spoiled(partial(put, name=name, data=data, **attributes))
            spoils.append((name, f"{str(data)[:9]} {attributes}", spoil))
    for number, (name, what, spoil) in enumerate(spoils):
        spoil(path := folder / f"frame-{number}.nc")
        yield f"frame, {name} {what}", partial(reduce_frame, path, store), name


def indices(ground: Path, folder: Path) -> Cases:
    """An index of frames with one wrong row, or a wrong header."""
    good = "path,timestep,present\na.nc,2014-01-07 00:00,1\nb.nc,2014-01-07 00:12,1\n"
    texts = [good + row for row in GIVEN["index"]] + ["", "path,timestep", good.replace(",", ";")]
    for number, text in enumerate(texts):
        (path := folder / f"index-{number}.csv").write_text(text)
        yield f"index, {text[-30:]!r}", partial(fetch, path, Archive(str(folder))), ""


def fetch(path: Path, archive: Archive) -> object:
    """The last frame of an index."""
    index = read_index(str(path), archive)
    with replace(archive, index=index).local_copy(index.iloc[-1]) as file:
        return file


def weights(ground: Path, folder: Path) -> Cases:
    """A checkpoint, and what a training leaves: cut short, with a hole, or with one tensor wrong."""
    model = build_model(small(ground / "sun", folder))
    readers = {ROOT / "helpers/data/surya.tiny.pt": lambda path: load_filtered(model, path)}
    readers[next((ground / "runs").glob(f"*/{BEST}"))] = lambda path: load_adapter(path, model)
    for source, use in readers.items():
        whole, contents = source.read_bytes(), torch.load(source, weights_only=True)
        spoilt = {"empty": b"", "a page": b"<html>", "a pointer": b"version https://git-lfs.github.com/x"}
        for place in range(0, len(whole) - 4096, len(whole) // 10):
            hole = whole[:place] + bytes(4096) + whole[place + 4096 :]
            spoilt |= {f"{place} bytes": whole[:place], f"a hole at {place}": hole}
        state = contents.get("state", contents)
        key = next(name for name in state if name.endswith(("lora_A", "mlp.fc1.weight")))
        changes = {"NaN": lambda tensor: tensor * np.nan, "int8": lambda tensor: tensor.to(torch.int8)}
        changes |= {"cut": lambda tensor: tensor[:1], "flat": torch.flatten, "a number": lambda tensor: 3}
        for what, change in (changes | {"another name": None}).items():
            changed = {f"{name}x" if name == key and not change else name: value for name, value in state.items()}
            changed |= {key: change(state[key])} if change else {}
            spoilt[what] = contents | {"state": changed} if "state" in contents else changed
        spoilt |= {"a list": [1], "a model": torch.nn.Linear(2, 2), "nothing": {}, "only a number": 3}
        for what, content in spoilt.items():
            path = folder / f"{source.stem}-{what.replace(' ', '-')}.pt"
            path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
            yield f"{source.name}, {what}", partial(use, path), path.name


def run_folders(ground: Path, folder: Path) -> Cases:
    """A damaged record is left out of every list, and named."""
    (source,) = (ground / "runs").iterdir()
    record = json.loads((source / "summary.json").read_text())
    needed = ("name", "experiment", "task", "profile", "finished", "status", "metrics")
    texts = [("summary.json", json.dumps({k: v for k, v in record.items() if k != key})) for key in needed]
    texts += [("summary.json", text) for text in ('{"metrics": null}', "[]", "{}", "3", "null", "\0", '{"a": ', "")]
    texts += [("config.yaml", text) for text in ("a: [", "3", "", "task: flare", "[]", "\0")]
    for number, (name, text) in enumerate(texts):
        shutil.copytree(source, place := folder / f"runs-{number}" / source.name)
        (place / name).write_text(text)
        yield f"{name}, {text[:40]}", partial(lambda runs: exit(len(list_runs(runs))), place.parent), str(place)


def names(ground: Path, folder: Path) -> Cases:
    """Names of notebooks and runs that are more than a name."""
    for name in GIVEN["names"]:
        yield f"NB={name!r}", partial(run_notebook.main, ["--", name], ground), "otebook"
        yield f"NAME={name!r}", partial(new_notebook.main, "lesson", name, ground), "NAME"
        yield f"run {name!r}", partial(start_run, small(ground / "sun", folder / "runs"), name), repr(name)


def stores(ground: Path, folder: Path) -> Cases:
    """A store with one thing wrong in what it says of itself, or a byte of a frame changed."""
    write_index(folder, HOURS[:1])
    build(folder, "good.zarr", times=HOURS[:1])
    good, spoils = json.loads((folder / "good.zarr/zarr.json").read_text()), ["", "{}", "[]", "null", "\0"]
    pickle = [{"name": "numcodecs.pickle", "configuration": {}}]
    strange = {"shape": [3], "data_type": "float64", "codecs": pickle, "zarr_format": 2, "node_type": "x"}
    told = {"space", "codes", "units"}  # for strangers; nothing here depends on them
    keys = sorted({*good["attributes"]} - told)
    changes = [("attributes", key, value) for key in keys for value in (None, "x", -1, [], 7.5)]
    changes += [(name, *new) for name in good["consolidated_metadata"]["metadata"] for new in strange.items()]
    for part, key, value in changes:
        new = json.loads(json.dumps(good))
        (new["attributes"] if part == "attributes" else new["consolidated_metadata"]["metadata"][part])[key] = value
        spoils.append(json.dumps(new))
    (frame,) = (folder / "good.zarr/frames").glob("c.*")
    whole = frame.read_bytes()
    spoils += [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in range(0, len(whole), 211)]
    for number, content in enumerate(spoils):
        shutil.copytree(folder / "good.zarr", path := folder / f"store-{number}.zarr")
        target = path / "zarr.json" if isinstance(content, str) else path / "frames" / frame.name
        target.write_bytes(content.encode() if isinstance(content, str) else content)
        read = partial(lambda path: open_store(path, reduce=2, native_size=32).read(HOURS[:1]).sum(), path)
        yield f"store {number}, {changes[number - 5] if 5 <= number < 5 + len(changes) else ''}", read, path.name
