"""One typed, strict configuration for every notebook, read from `config.yaml`.

Layers are laid over each other (see the head of config.yaml), every value remembers which layer set it, and all
mistakes are reported in one error: unknown keys, wrong types, and values that contradict each other.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from helpers.channels import Scaler, load_scalers
from helpers.shared import SharedFolder, find_shared

Channel = Literal[
    "aia94", "aia131", "aia171", "aia193", "aia211", "aia304", "aia335", "aia1600",
    "hmi_m", "hmi_bx", "hmi_by", "hmi_bz", "hmi_v",
]  # fmt: skip
Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
# Marks of a key, beside its type. PATH: `load_config` makes it absolute. MACHINE: says where and how fast something
# runs and changes no number, so it may differ in a resumed run. COMPARED: differs between the runs of a comparison.
PATH, MACHINE, COMPARED = "path", "machine", "compared"
# names of the registries in metrics.py, tasks.py and plots.py, or `module:name` of your own
OWN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
KINDS: dict[str, dict[str, tuple[str, ...]]] = {  # what suits each kind of target; the first figure is the default
    "scalar": {
        "loss": ("mse", "mae", "huber"),
        "metric": ("rmse", "mae", "r2", "rrse", "tss", "hss"),
        "figure": ("scatter",),
    },
    "mask": {"loss": ("bce_dice",), "metric": ("iou", "dice", "average_precision"), "figure": ("image",)},
    "image": {
        "loss": ("mse", "mae", "huber"),
        "metric": ("rmse", "mae", "correlation", "ssim"),
        "figure": ("image",),
    },
}

_OVERLAYS = {
    "profiles": "profile",
    "tasks": "task",
    "experiments": "experiment",
}  # block -> the key that chooses from it


class ConfigError(ValueError):
    """All mistakes of a configuration in one message, ready to print."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class Paths(_Section):
    """Folders of this machine."""

    shared: str | None
    runs: Annotated[str, PATH]
    reserve_gb: Annotated[float, Field(ge=0)]
    labels: Annotated[str, PATH]


class Pretraining(_Section):
    """How the tiny checkpoint is made (`python -m helpers.data.synthetic`)."""

    seed: int
    suns: Count
    samples: Count
    held_out: Count
    noise: Annotated[float, Field(ge=1)]
    epochs: Count
    batch_size: Count
    lr: Positive


class Synthetic(_Section):
    """The synthetic Sun; `folder: null` means that all data is real."""

    folder: Annotated[str | None, PATH, MACHINE]
    seed: int
    start: str
    visits: Count
    hours_between_visits: Count
    workers: Annotated[Count, MACHINE]
    pretraining: Annotated[Pretraining, MACHINE]


class Data(_Section):
    """Where frames come from and what is kept of them."""

    index: Annotated[str, PATH]
    anonymous: Annotated[bool, MACHINE]
    endpoint_url: Annotated[str | None, MACHINE]
    channels: Annotated[list[Channel], Field(min_length=1)]
    native_size: Count
    reduce: Count
    offsets_minutes: Annotated[list[int], Field(min_length=1)]
    cadence_minutes: Annotated[int, Field(ge=12, multiple_of=12)]
    every_minutes: Annotated[int, Field(ge=12, multiple_of=12)]
    store: Annotated[str, PATH, MACHINE]
    build_workers: Annotated[Count, MACHINE]
    dask_address: Annotated[str | None, MACHINE]
    scalers: Annotated[str | None, PATH]
    retries: Annotated[NotNegative, MACHINE]
    memory_cache_gb: Annotated[float, Field(ge=0), MACHINE]

    @property
    def image_size(self) -> int:
        """Side of the images that the model sees, in pixels."""
        return self.native_size // self.reduce


class Labels(_Section):
    """Which label belongs to which image."""

    kind: Literal["scalar", "mask", "image"]
    path: Annotated[str | None, PATH]
    time_column: str
    value_columns: list[str]
    transform: Literal["none", "log10", "goes"]
    direction: Literal["nearest", "forward", "backward"]
    tolerance_minutes: NotNegative
    lead_minutes: NotNegative
    variable: str | None
    target_channels: list[Channel]
    target_offset_minutes: int
    reduce: Count


class Target(_Section):
    """How the target is called, learned, judged and drawn."""

    name: str
    unit: str
    loss: str
    metrics: Annotated[list[str], Field(min_length=1)]
    plot: str | None
    event_threshold: float | None
    mask_threshold: Share


class Split(_Section):
    """[first, end) of each split, ISO dates or times."""

    train: Annotated[list[str], Field(min_length=2, max_length=2)]
    val: Annotated[list[str], Field(min_length=2, max_length=2)]
    test: Annotated[list[str], Field(min_length=2, max_length=2)]
    guard_hours: Annotated[float, Field(ge=0)]


class Model(_Section):
    """The encoder; sizes must be the checkpoint's."""

    weights: Annotated[str | None, PATH]
    weights_channels: list[Channel]
    patch_size: Count
    embed_dim: Count
    depth: Count
    n_spectral_blocks: NotNegative
    num_heads: Count
    time_dim: Count
    mlp_ratio: Positive
    window_size: Literal[2]
    dp_rank: Count
    rpe: bool
    nglo: Annotated[int, Field(ge=0, le=1)]
    drop_rate: Share
    compile: bool


class Head(_Section):
    """From tokens to numbers or images."""

    pooling: Literal["mean", "max", "attention", "transformer", "class_token"]
    decoder_channels: list[Channel]
    penultimate: Count | None
    dropout: Share
    feature_batches: Count


class Lora(_Section):
    """Low-rank adapters."""

    rank: Count
    alpha: Positive
    dropout: Share
    targets: Annotated[list[Literal["qkv", "proj", "fc1", "fc2", "to_dynamic_projection"]], Field(min_length=1)]
    qkv: list[Literal["q", "k", "v"]]


class Training(_Section):
    """The loop."""

    lr: Positive
    epochs: Count
    regime: Literal["lora", "probe", "full", "scratch"]
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$"), MACHINE]
    processes: Annotated[Count, COMPARED]
    precision: Literal["fp32", "bf16", "fp16"]
    frozen_dtype: Literal["fp32", "bf16"]
    deterministic: bool
    batch_size: Count
    accumulation: Count
    weight_decay: Annotated[float, Field(ge=0)]
    head_lr: Positive | None
    head_weight_decay: Annotated[float, Field(ge=0)]
    warmup: Share
    schedule: Literal["cosine", "constant"]
    gradient_clip: Positive
    patience: Count
    save_every_steps: Annotated[Count, MACHINE]
    resume: Annotated[str | None, MACHINE]
    recompute_blocks: Annotated[list[int] | Literal["auto"], MACHINE]
    loader_workers: Annotated[NotNegative, MACHINE]
    max_train_samples: Annotated[Count | None, COMPARED]
    max_val_samples: Count | None
    max_test_samples: Count | None


class Diagnostics(_Section):
    """Limits of the verdict on a training curve, and how much `learning_rate.ipynb` trains."""

    range_lrs: Annotated[list[Positive], Field(min_length=2, max_length=2)]
    range_steps: Count
    sweep_lrs: Annotated[list[Positive], Field(min_length=1)]
    sweep_epochs: Count
    precision_seeds: Annotated[list[int], Field(min_length=2)]
    diverged: Positive
    erratic: Positive
    flat: Positive
    overfitting: Positive


class CompareEpochs(_Section):
    """Epochs of each experiment; null: as configured for its notebook."""

    baseline: Count | None
    finetune: Count | None


class Compare(_Section):
    """What `compare.ipynb` trains where runs are missing, and how it judges them."""

    seeds: Annotated[list[int], Field(min_length=2)]
    train_samples: Annotated[list[Count | None], Field(min_length=1)]
    epochs: CompareEpochs
    draws: Count


class Tracking(_Section):
    """Weights & Biases."""

    wandb: Literal["auto", "online", "offline", "disabled"]
    project: str
    entity: str | None


class Config(_Section):
    """A checked configuration; read values as attributes, for example `cfg.training.lr`."""

    root: Annotated[Path, Field(exclude=True)]  # the folder of config.yaml
    shared: Annotated[SharedFolder, Field(exclude=True)]  # the shared folder of this machine
    scalers: Annotated[dict[str, Scaler], Field(exclude=True)]  # normalisation constants of each channel
    written: Annotated[dict[str, Any], Field(exclude=True)]  # paths before they were made absolute
    profile: Annotated[str, COMPARED]
    task: str
    experiment: Annotated[Literal["baseline", "finetune"], COMPARED]
    seed: Annotated[int, COMPARED]
    paths: Annotated[Paths, MACHINE]
    synthetic: Synthetic
    data: Data
    labels: Labels
    target: Target
    split: Split
    model: Model
    head: Head
    lora: Lora
    training: Training
    diagnostics: Annotated[Diagnostics, MACHINE]
    compare: Annotated[Compare, MACHINE]
    tracking: Annotated[Tracking, MACHINE]

    def to_dict(self) -> dict[str, Any]:
        """The values as plain dicts and lists, to write beside a run; paths as written, so that the run can move."""
        return _nested({**dict(leaves(self.model_dump())), **self.written})

    @property
    def runs_folder(self) -> Path:
        """The folder that holds one folder a run."""
        return self.shared.to_write(self.paths.runs)

    @property
    def initial_weights(self) -> str | None:
        """The file, or the address on the Hugging Face hub, that the encoder starts from; None: random weights."""
        return None if self.training.regime == "scratch" else self.model.weights

    def encoder_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `SuryaEncoder` for this configuration."""
        own = self.model.model_dump(exclude={"weights", "weights_channels"})
        blocks = self.training.recompute_blocks
        own["recompute_blocks"] = () if blocks == "auto" else blocks  # `fit` sees what fits
        return {"img_size": self.data.image_size, "in_chans": len(self.data.channels), **own}

    @property
    def num_outputs(self) -> int:
        """Numbers, or channels of the image, that the model predicts."""
        return len(self.labels.value_columns) if self.labels.kind == "scalar" else len(self.labels.target_channels) or 1

    @property
    def target_axes(self) -> tuple[str, ...]:
        """Names of the axes of a batch of targets."""
        return ("B", "outputs") if self.labels.kind == "scalar" else ("B", "C", "H", "W")


# --------------------------------------------------------------------------------------------------------------------
# Rules of the model, for the constructors in helpers/model too: what is wrong with the settings, a sentence each
# --------------------------------------------------------------------------------------------------------------------
POOLINGS = ("mean", "max", "attention", "transformer", "class_token")
QKV = ("q", "k", "v")


def encoder_problems(
    img_size: int,
    patch_size: int,
    embed_dim: int,
    depth: int,
    n_spectral_blocks: int,
    num_heads: int,
    window_size: int = 2,
    rpe: bool = False,
    nglo: int = 0,
    recompute_blocks: Collection[int] = (),
    **_: Any,
) -> list[str]:
    """What keeps the arguments of a SuryaEncoder from making one; img_size is data.native_size / data.reduce."""
    problems = []
    if img_size % patch_size:
        problems.append(f"img_size {img_size} is not a multiple of patch_size {patch_size}")
    elif (grid := img_size // patch_size) % 2:
        problems.append(f"the token grid {img_size} / {patch_size} = {grid} must be even, for windows of 2 x 2")
    if embed_dim % num_heads:
        problems.append(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
    if embed_dim % 4:
        problems.append(f"embed_dim {embed_dim} is not a multiple of 4, as the positions need")
    if window_size != 2:
        problems.append(f"window_size {window_size} is not in the release; use 2")
    if not 0 <= n_spectral_blocks <= depth:
        problems.append(f"n_spectral_blocks {n_spectral_blocks} is not between 0 and depth {depth}")
    if wrong := sorted(set(recompute_blocks) - set(range(depth))):
        problems.append(f"recompute_blocks {wrong} are no blocks, which are numbered 0 to {depth - 1}")
    if rpe and nglo:
        problems.append("rpe together with nglo has no reference to be checked against; use one of them")
    return problems


def pooling_problems(pooling: str, nglo: int) -> list[str]:
    """What keeps a pooling from working on an encoder with `nglo` global tokens."""
    if pooling not in POOLINGS:
        return [f"there is no pooling {pooling!r}; choose one of {', '.join(POOLINGS)}"]
    needed = 1 if pooling == "class_token" else 0
    return [] if nglo == needed else [f"pooling {pooling!r} needs nglo={needed}, and nglo is {nglo}"]


def lora_problems(rank: int, alpha: float, dropout: float, targets: Collection[str], qkv: Collection[str]) -> list[str]:
    """What keeps the settings of `lora` from making adapters; which layers a model has is the model's matter."""
    problems = []
    if not isinstance(rank, int) or rank < 1:
        problems.append(f"rank must be a whole number of at least 1, not {rank!r}")
    if not alpha > 0:
        problems.append(f"alpha must be positive, not {alpha!r}")
    if not 0 <= dropout < 1:
        problems.append(f"dropout must be at least 0 and below 1, not {dropout!r}")
    if not targets:
        problems.append("targets is empty, so nothing would be adapted")
    if unknown := sorted(set(qkv) - set(QKV)):
        problems.append(f"qkv may hold 'q', 'k' and 'v' alone, not {unknown}")
    if "qkv" in targets and not qkv:
        problems.append("qkv is a target but none of q, k, v is chosen")
    return problems


# --------------------------------------------------------------------------------------------------------------------
# Reading and layering
# --------------------------------------------------------------------------------------------------------------------
def load_config(
    path: str | Path = "config.yaml",
    overrides: Mapping[str, Any] | None = None,
    *,
    profile: str | None = None,
    task: str | None = None,
    experiment: str | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> Config:
    """Read config.yaml and lay config.local.yaml, the notebook's parameters and `overrides` over it.

    Args:
        path: the YAML file; a bare name is looked for here, then in the folders above, then beside the helpers package.
        overrides: dotted key to value, for example `{"training.lr": 1e-3}`; wins over everything else.
        profile, task, experiment: choose other blocks than the file does; None keeps the file's choice.
        parameters: dotted keys from papermill (`make run-notebook P="training.lr=1e-3"`).

    Returns:
        The checked, immutable `Config`.

    Raises:
        ConfigError: one message with every mistake, each with its key path and the layer that set it.

    Every path of the result is absolute (an address with :// stays as it is); `shared` and `scalers` are the shared
    folder and the normalisation constants that it names.
    """
    path = _find(Path(path))
    local = path.with_name("config.local.yaml")
    files = [(_read(path), path.name)] + ([(_read(local), local.name)] if local.exists() else [])
    given = [(_nested(parameters or {}), "notebook parameters"), (_nested(overrides or {}), "overrides=")]
    asked = {"profile": profile, "task": task, "experiment": experiment}
    chosen = {key: _last(key, asked, [tree for tree, _ in files + given]) for key in asked}

    wrong_choices = _bad_choices(chosen, [tree for tree, _ in files])
    problems = [*wrong_choices.values()]
    problems += [problem for tree, origin in files + given for problem in _unknown_keys(tree, origin)]
    values: dict[str, tuple[Any, str]] = {}  # dotted key -> (value, the layer that set it)
    for tree, origin in files + given:
        for layer, where in _layers(tree, chosen, origin):
            values.update({key: (value, where) for key, value in leaves(layer) if key in _SCHEMA})
    values.update({key: (value, "chosen by the notebook") for key, value in chosen.items()})
    values = {key: value for key, value in values.items() if key not in wrong_choices}
    return _validated(values, problems, path, complete=not wrong_choices)


def _find(path: Path) -> Path:
    if path.is_absolute() or len(path.parts) > 1 or path.exists():
        candidates = [path]
    else:
        above = [Path.cwd(), *Path.cwd().parents, Path(__file__).resolve().parents[1]]
        candidates = [folder / path for folder in above]
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    raise ConfigError(
        f"There is no configuration file {path}. Start the notebook inside the repository, or pass its full path."
    )


class _Loader(yaml.SafeLoader):
    """YAML 1.2 where it matters: 1e-3 is a number, dates stay text, and a key may stand only once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key_node in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key_node.value}' stands twice in one section", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, regexp)
        for tag, regexp in resolvers
        if tag not in ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:float")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.\d+([eE][-+]?\d+)?|\.inf|\.nan)$"),
    list("-+0123456789."),
)


def parse_value(text: str) -> Any:
    """A value written on a command line ("1e-3", "[aia171, hmi_m]", "null") as config.yaml would read it."""
    return yaml.load(text, _Loader)  # noqa: S506 - derived from SafeLoader


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 - derived from SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{path.name} is not valid YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path.name} must hold sections such as 'training:', but it holds a {type(tree).__name__}.")
    return tree


def _nested(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """{"training.lr": 1} -> {"training": {"lr": 1}}; nested dicts may be mixed in."""
    tree: dict[str, Any] = {}
    for key, value in (pair for name, item in dotted.items() for pair in leaves({name: item}, keep_blocks=True)):
        *sections, leaf = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{key}: {section} is given both as a value and as a section.")
        node[leaf] = value
    return tree


def _last(key: str, asked: Mapping[str, str | None], trees: list[dict]) -> str | None:
    """The choice that counts: the function's argument, else the last layer that names one."""
    if asked[key] is not None:
        return asked[key]
    return next((tree[key] for tree in reversed(trees) if key in tree), None)


def _layers(tree: dict, chosen: Mapping[str, str | None], origin: str) -> Iterator[tuple[dict, str]]:
    """The parts of one file in the order in which they are laid over each other, each with a name for messages."""
    yield tree, origin
    sources = [(tree, "")]
    for block, key in _OVERLAYS.items():
        for source, prefix in list(sources):
            layer = _block(source, block).get(str(chosen[key]))
            if isinstance(layer, dict):
                where = f"{prefix}{block}.{chosen[key]}"
                yield layer, f"{where} in {origin}"
                sources.append((layer, f"{where}."))


def _block(tree: dict, block: str) -> dict[str, Any]:
    """The profiles, tasks or experiments of a file; {} where they are no mapping, as `_unknown_keys` tells."""
    return tree[block] if isinstance(tree.get(block), dict) else {}


def leaves(tree: Mapping[str, Any], prefix: str = "", keep_blocks: bool = False) -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every setting, without those in the overlay blocks unless they are to be kept."""
    for key, value in tree.items():
        if key in _OVERLAYS and not prefix and not keep_blocks:
            continue
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _schema_keys(section: type[BaseModel], prefix: str = "", marks: tuple = ()) -> Iterator[tuple[str, tuple]]:
    """Dotted key and marks of every setting; those of a section count for its keys."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, _Section):
            yield from _schema_keys(field.annotation, f"{prefix}{name}.", (*marks, *field.metadata))
        elif not field.exclude:
            yield f"{prefix}{name}", (*marks, *field.metadata)


_SCHEMA = dict(_schema_keys(Config))  # dotted key -> its marks


def settings_that_matter(settings: Config | Mapping[str, Any], purpose: Literal["resume", "compare"]) -> dict[str, Any]:
    """The settings, by dotted key, that must be equal in two runs.

    Args:
        settings: a configuration, or the config.yaml of a run as a dict.
        purpose: `resume`: one run goes on from the other; `compare`: they are compared, over seeds, experiments and
            numbers of training samples.
    """
    may_differ = (MACHINE,) if purpose == "resume" else (MACHINE, COMPARED)
    tree = settings.to_dict() if isinstance(settings, Config) else settings
    return {key: value for key, value in leaves(tree) if not any(mark in may_differ for mark in _SCHEMA.get(key, ()))}


# --------------------------------------------------------------------------------------------------------------------
# Saying every mistake at once
# --------------------------------------------------------------------------------------------------------------------
def _bad_choices(chosen: Mapping[str, str | None], trees: list[dict]) -> dict[str, str]:
    problems = {}
    for block, key in _OVERLAYS.items():
        names = sorted({str(name) for tree in trees for name in _block(tree, block)})
        if chosen[key] not in names:
            there = ", ".join(names) or "nothing"
            problems[key] = f"{key}: there is no {chosen[key]!r} under `{block}`; there is {there}"
    return problems


def _unknown_keys(tree: dict, origin: str, prefix: str = "") -> Iterator[str]:
    """Unknown keys anywhere in a file, in the blocks that are not chosen as well."""
    for key, _ in leaves(tree):
        if key not in _SCHEMA:
            yield f"{prefix}{key} ({origin}): {_nearest(key)}"
    for block in _OVERLAYS:
        if not isinstance(tree.get(block) or {}, dict):
            chooser = _OVERLAYS[block]
            yield f"{prefix}{block} ({origin}): must hold named sections, got {tree[block]!r}; {chooser}: chooses one"
        for name, layer in _block(tree, block).items():
            if isinstance(layer, dict):
                yield from _unknown_keys(layer, origin, f"{prefix}{block}.{name}.")
            else:
                yield f"{prefix}{block}.{name} ({origin}): must hold sections such as 'training:', got {layer!r}"


def _nearest(key: str) -> str:
    inside = [known for known in _SCHEMA if known.startswith(f"{key}.")]
    if inside:
        return f"is a section with the keys {', '.join(name.split('.', 1)[1] for name in inside)}, not a value"
    section, _, leaf = key.rpartition(".")
    if (short := f"{section}." + "".join(word[:1] for word in leaf.split("_"))) in _SCHEMA:  # learning_rate: lr
        return f"unknown key; did you mean {short}?"
    same_leaf = [known for known in _SCHEMA if known.split(".")[-1] == leaf]
    cutoff = 0.0 if same_leaf else 0.5
    near = difflib.get_close_matches(key, same_leaf or _SCHEMA, n=1, cutoff=cutoff)
    return f"unknown key; did you mean {near[0]}?" if near else "unknown key, and no known one is near"


def _validated(values: dict[str, tuple[Any, str]], problems: list[str], path: Path, complete: bool) -> Config:
    """The checked configuration; contradictions are only looked for in values that are `complete`."""
    expanded = _expand({key: value for key, (value, _) in values.items()})
    located, shared, scalers = _locate(expanded, path.parent, problems)
    tree = {**_nested(expanded | located), "root": path.parent, "shared": shared, "scalers": scalers}
    tree["written"] = {key: expanded[key] for key in located}
    config, faulty = None, set()
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        for mistake in error.errors():
            if mistake["type"] == "missing" and problems:
                continue  # the cause, a misspelt key or a wrong choice, is in the list already
            key = ".".join(str(part) for part in mistake["loc"] if isinstance(part, str))
            item = "".join(f"[{part}]" for part in mistake["loc"] if isinstance(part, int))
            where = f" ({values[key][1]})" if key in values else ""
            got = "" if mistake["type"] == "missing" else f", got {mistake['input']!r}"
            faulty.add(key)
            problems.append(f"{key}{item}{where}: {mistake['msg'][0].lower()}{mistake['msg'][1:]}{got}")
    if complete:
        problems += _contradictions({key: value for key, value in expanded.items() if key not in faulty})
    if problems or config is None:
        count = "a mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
        raise ConfigError("\n  - ".join([f"The configuration ({path.name}) has {count}:", *problems]))
    return config


def _expand(values: dict[str, Any]) -> dict[str, Any]:
    """Fill {seed}, {synthetic} and {labels} in paths; {shared} is left to shared.py, which knows the machine."""
    seed, folder = str(values.get("synthetic.seed")), values.get("synthetic.folder")
    names = {"{labels}": str(values.get("paths.labels")), "{seed}": seed}
    if folder is not None:  # else {synthetic} stays, and _contradictions says where
        names["{synthetic}"] = str(folder).replace("{seed}", seed)

    def fill(value: Any) -> Any:
        if isinstance(value, str):
            for name, text in names.items():
                value = value.replace(name, text)
        return value

    return {key: fill(value) for key, value in values.items()}


def _locate(values: dict[str, Any], root: Path, problems: list[str]) -> tuple[dict[str, str], Any, Any]:
    """Absolute paths of all settings that are paths, the shared folder, and the scalers; mistakes go to `problems`."""
    unusable = SharedFolder(root, "", False, root)
    setting, own_scalers = values.get("paths.shared"), None
    try:
        shared = find_shared(setting if isinstance(setting, str) else None, root)
    except FileNotFoundError as error:
        problems.append(f"paths.shared: {error}")
        shared = unusable
    located = {}
    for key, marks in _SCHEMA.items():
        text = values.get(key)
        if PATH not in marks or not isinstance(text, str) or "://" in text:
            continue
        unknown = [name for name in re.findall(r"\{\w+\}", text) if name not in ("{shared}", "{synthetic}")]
        if unknown:
            problems.append(f"{key}: {unknown[0]} in {text!r} stands for nothing; there is {{shared}}")
        located[key] = str(root / Path(text.replace("{shared}", str(shared.path))).expanduser())
    own_scalers = located.get("data.scalers")
    try:
        scalers = load_scalers(own_scalers and shared.to_read(own_scalers))
    except (OSError, ValueError) as error:
        problems.append(f"data.scalers: {error}")
        scalers = {}
    return located, shared, scalers


def _contradictions(values: dict[str, Any]) -> list[str]:
    """What no single key can know; a check is skipped when one of its keys is missing or already reported."""
    problems = []
    for keys, check in _CHECKS:
        if all(key in values for key in keys) and (problem := check(*(values[key] for key in keys))):
            problems.append(f"{', '.join(keys)}: {problem}")
    lost = [key for key, value in values.items() if key != "paths.labels" and "{synthetic}" in str(value)]
    if lost:
        problems.append(
            f"synthetic.folder: is null (all data is real), so {{synthetic}} stands for nothing in {', '.join(lost)}"
        )
    return problems


def _grid(native: int, pooling: int, patch: int) -> str | None:
    if native % pooling:
        return f"pooling {pooling} does not divide the {native}-pixel side of the frames"
    side = native // pooling
    if side % patch:
        return f"the image side {side} (= {native} / {pooling}) is not a multiple of the {patch}-pixel patch"
    if (side // patch) % 2:
        return f"the token grid would be {side // patch} x {side // patch}, but Surya's 2 x 2 windows need an even side"
    return None


def _offsets(offsets: list[int], frames: int) -> str | None:
    if len(offsets) != frames:
        return f"the model takes {frames} input frame(s), but {len(offsets)} offset(s) are given: {offsets}"
    if sorted(set(offsets)) != offsets or offsets[-1] > 0:
        return f"offsets must rise, without repeats, to at most 0 (the sample's own time), got {offsets}"
    return None


def _layers_in_range(layers: list[int] | str, depth: int) -> str | None:
    if layers == "auto":
        return None
    wrong = [layer for layer in layers if not 0 <= layer < depth]
    return f"blocks are numbered 0 to {depth - 1}, got {wrong}" if wrong else None


def _class_token(pooling: str, nglo: int) -> str | None:
    if pooling == "class_token" and nglo != 1:
        return "class-token pooling reads a global token, so model.nglo must be 1"
    if pooling != "class_token" and nglo:
        return f"a global token is only read by class-token pooling; set model.nglo: 0 for {pooling!r} pooling"
    return None


def _heads(width: int, heads: int) -> str | None:
    if width % 4:
        return f"embed_dim {width} must be a multiple of 4 (the position code has four features a frequency)"
    return f"embed_dim {width} does not divide into {heads} heads" if width % heads else None


def _split_order(train: list[str], val: list[str], test: list[str]) -> str | None:
    try:
        spans = [[datetime.fromisoformat(time) for time in span] for span in (train, val, test)]
    except ValueError as error:
        return f"splits are pairs of ISO dates such as 2014-02-12: {error}"
    if any(time.tzinfo for span in spans for time in span):
        return "splits are in UTC, like the frames; write them without a time zone"
    for name, (first, end) in zip(("train", "val", "test"), spans, strict=True):
        if first >= end:
            return f"split.{name} ends at {end} before it begins at {first}"
    return None


def _labels(kind: str, path: str | None, columns: list[str], variable: str | None, channels: list[str]) -> str | None:
    if kind == "scalar" and (not path or not columns):
        return "scalar labels need a CSV (labels.path) and at least one of its columns (labels.value_columns)"
    if kind != "scalar" and variable and not path:
        return "mask and image files (labels.variable) need a CSV that names them (labels.path)"
    if kind == "mask" and not variable:
        return "masks are read from files: name their variable (labels.variable)"
    if kind == "image" and bool(channels) == bool(variable):
        return "image labels come either from files (labels.variable) or from the frames (labels.target_channels)"
    return None


def _leak(kind: str, channels: list[str], targets: list[str], offset: int, offsets: list[int]) -> str | None:
    if kind == "image" and offset in offsets and (both := sorted(set(channels) & set(targets))):
        return f"{', '.join(both)} would be input and target at the same time: take it out of data.channels"
    return None


def _suits_kind(kind: str, loss: str, metrics: list[str], plot: str | None) -> str | None:
    asked = [("loss", loss), *(("metric", name) for name in metrics), *([("figure", plot)] if plot else [])]
    wrong = [
        f"there is no {what} {name!r} for {kind} labels (there is {', '.join(suiting)}; your own is module:name)"
        for what, name in asked
        if name not in (suiting := KINDS[kind][what]) and not OWN.fullmatch(name)
    ]
    return "; ".join(wrong) or None


def _own_objects(loss: str, metrics: list[str], plot: str | None) -> str | None:
    wrong = []
    for name in filter(None, (loss, *metrics, plot)):
        try:
            find_named(name, {name: None})
        except (ImportError, AttributeError) as error:
            wrong.append(f"{name} cannot be imported: {error}")
    return "; ".join(wrong) or None


def find_named(name: str, registry: Mapping[str, Any]) -> Any:
    """The entry `name` of a registry, or for `module:name` that object of a module of your own."""
    if OWN.fullmatch(name):
        module, _, attribute = name.partition(":")
        return getattr(importlib.import_module(module), attribute)
    return registry[name]


def _decoder(kind: str, targets: list[str], wanted: list[str], known: list[str]) -> str | None:
    if wanted and len(wanted) != (len(targets) or 1):
        return f"names {len(wanted)} channels for {len(targets) or 1} output(s)"
    if wanted and kind == "scalar":
        return "numbers have no decoder; this is for labels.kind: mask or image"
    if unknown := sorted(set(wanted) - set(known)):
        return f"the checkpoint has no decoder rows of {unknown}"
    return None


def _processes(count: int, batch: int, device: str) -> str | None:
    if batch % count:
        return (
            f"{count} processes cannot share batches of {batch} samples equally; set training.batch_size to a multiple "
            f"of {count} (and training.accumulation lower by the same factor, to keep the effective batch)"
        )
    if count > 1 and device.startswith("cuda:"):
        return f"{count} processes do not fit on {device} alone; set training.device: auto"
    return None


_CHECKS: tuple[tuple[tuple[str, ...], Callable[..., str | None]], ...] = (
    (("data.native_size", "data.reduce", "model.patch_size"), _grid),
    (("data.offsets_minutes", "model.time_dim"), _offsets),
    (("training.recompute_blocks", "model.depth"), _layers_in_range),
    (("head.pooling", "model.nglo"), _class_token),
    (("model.embed_dim", "model.num_heads"), _heads),
    (
        ("model.n_spectral_blocks", "model.depth"),
        lambda spectral, depth: (
            f"{spectral} spectral blocks do not fit into {depth} blocks" if spectral > depth else None
        ),
    ),
    (
        ("model.rpe", "model.nglo"),
        lambda rpe, nglo: "Surya has no bias table for a global token; choose one of the two" if rpe and nglo else None,
    ),
    (
        ("data.channels",),
        lambda channels: f"each channel once, got {channels}" if len(set(channels)) < len(channels) else None,
    ),
    (
        ("data.channels", "model.weights_channels", "model.weights"),
        lambda own, known, path: (
            f"the checkpoint was not trained with {sorted(set(own) - set(known))}"
            if path and set(own) - set(known)
            else None
        ),
    ),
    (
        ("lora.targets", "lora.qkv"),
        lambda targets, qkv: (
            "qkv is a target, but lora.qkv chooses none of q, k, v" if "qkv" in targets and not qkv else None
        ),
    ),
    (("training.processes", "training.batch_size", "training.device"), _processes),
    (
        ("training.frozen_dtype", "training.precision"),
        lambda held, precision: (
            f"weights held in {held} are computed with in {held}; set training.precision: {held}, or hold them in fp32"
            if held not in ("fp32", precision)
            else None
        ),
    ),
    (
        ("labels.direction", "labels.lead_minutes"),
        lambda direction, lead: (
            f"a lead of {lead} minutes is a forecast: set labels.direction: forward"
            if lead and direction != "forward"
            else None
        ),
    ),
    (("labels.kind", "labels.path", "labels.value_columns", "labels.variable", "labels.target_channels"), _labels),
    (
        (
            *("labels.kind", "data.channels", "labels.target_channels", "labels.target_offset_minutes"),
            "data.offsets_minutes",
        ),
        _leak,
    ),
    (("labels.kind", "target.loss", "target.metrics", "target.plot"), _suits_kind),
    (("target.loss", "target.metrics", "target.plot"), _own_objects),
    (("labels.kind", "labels.target_channels", "head.decoder_channels", "model.weights_channels"), _decoder),
    (
        ("labels.kind", "model.nglo"),
        lambda kind, nglo: (
            "images are decoded from the patches alone; set model.nglo: 0" if kind != "scalar" and nglo else None
        ),
    ),
    (
        ("labels.reduce", "model.patch_size"),
        lambda pooling, patch: f"{pooling} does not divide the {patch}-pixel patch" if patch % pooling else None,
    ),
    (
        ("target.metrics", "target.event_threshold"),
        lambda metrics, threshold: (
            "tss and hss count events: say from which value on (target.event_threshold)"
            if threshold is None and {"tss", "hss"} & set(metrics)
            else None
        ),
    ),
    (("split.train", "split.val", "split.test"), _split_order),
)


class UsageError(ValueError):
    """What was asked for cannot be run; the text is ready to print."""


def parse_parameters(texts: Sequence[str]) -> dict[str, Any]:
    """["training.lr=1e-3 data.channels=[aia171, hmi_m]"] -> dotted keys and their values, read as config.yaml would."""
    parameters = {}
    for item in re.split(r"\s+(?=[A-Za-z_][\w.]*=)", " ".join(texts).strip()):
        key, equals, value = item.partition("=")
        if item and not (equals and re.fullmatch(r"[A-Za-z_][\w.]*", key)):
            raise UsageError(
                f"Parameters are written key=value, for example P='training.lr=1e-3 seed=1'; got '{item}'."
            )
        try:
            parameters.update({key: parse_value(value)} if item else {})
        except yaml.YAMLError as error:
            raise UsageError(f"The value of '{item}' is not complete YAML: {error}") from None
    return parameters


def add_choices(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The options that choose a configuration."""
    parser.add_argument("--task", help="an entry under `tasks` in config.yaml")
    parser.add_argument("--profile", help="tiny or surya")
    parser.add_argument("--parameters", nargs="*", default=[], metavar="KEY=VALUE", help="other values of the config")
    return parser
