"""One typed, strict configuration for every notebook, read from `config.yaml`.

Layers are laid over each other (see the head of config.yaml), every value remembers which layer set it, and mistakes
are reported in one error: unknown keys and wrong types, and once these are mended, values that contradict each other.
"""

import difflib
import importlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer, ValidationError, ValidationInfo

from helpers.channels import CHANNELS, Scaler, load_scalers
from helpers.shared import SharedFolder, find_shared

Channel = Literal[CHANNELS]
Pooling = Literal["mean", "max", "attention", "transformer", "class_token", "forecast"]
POOLINGS, QKV = get_args(Pooling), ("q", "k", "v")
Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
# Marks of a key, beside its type. MACHINE: says where and how fast something runs and changes no number, so it may
# differ in a resumed run. COMPARED: differs between the runs of a comparison.
MACHINE, COMPARED = "machine", "compared"
# names of the registries in metrics.py, tasks.py and plots.py
EVENT_METRICS = ("tss", "hss", "f1", "precision", "recall", "auc", "average_precision")
KINDS: dict[str, dict[str, tuple[str, ...]]] = {  # what suits each kind of target; the first figure is the default
    "scalar": {
        "loss": ("mse", "mae", "huber"),
        "metric": ("rmse", "mae", "mape", "r2", "rrse", *EVENT_METRICS),
        "figure": ("scatter", "spectrum"),
    },
    "event": {"loss": ("bce",), "metric": (*EVENT_METRICS, "brier_skill", "log_loss"), "figure": ("event",)},
    "mask": {"loss": ("bce_dice",), "metric": ("iou", "dice", "average_precision"), "figure": ("image",)},
    "image": {"loss": ("mse", "mae", "huber"), "metric": ("rmse", "mae", "correlation", "ssim"), "figure": ("image",)},
}
SPLITS = ("train", "val", "test")
NETCDF = (".nc", ".nc4", ".h5", ".hdf5")
_OVERLAYS = {"profiles": "profile", "tasks": "task", "experiments": "experiment"}  # block -> the key that chooses
MATTER = ("profile", "task", "experiment", "seed", "data.reduce", "labels.path", "target.loss", "target.metrics")
MATTER += ("head.pooling", "lora.rank", *(f"training.{key}" for key in ("regime", "lr", "epochs", "batch_size")))


class ConfigError(ValueError):
    """All mistakes of a configuration in one message, ready to print."""


class Location(str):
    """An absolute path, or an address; `written` is how it stood in the configuration, where a run is to move."""

    written: str


def _locate(text: str, info: ValidationInfo) -> Location:
    for name, value in info.context["names"].items():
        text = text if value is None else text.replace(name, str(value))
    unknown = set(re.findall(r"\{\w+\}", text)) - {"{shared}"}
    if unknown and info.field_name not in ("labels", "released"):  # who uses {labels} says it
        raise ValueError(f"{', '.join(unknown)} in {text!r} stands for nothing; the head of config.yaml has the names")
    full = text.replace("{shared}", str(info.context["shared"].path))
    located = Location(full if "://" in full else info.context["root"] / Path(full).expanduser())
    located.written = text
    return located


Place = Annotated[str, AfterValidator(_locate), PlainSerializer(lambda place: getattr(place, "written", place))]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


# The sections of config.yaml, where each key is explained.
class Paths(_Section):
    shared: str | None
    runs: Place
    reserve_gb: Annotated[float, Field(ge=0)]
    labels: Place
    released: Place
    scratch: Place | None


class Synthetic(_Section):
    folder: Annotated[Place | None, MACHINE]
    seed: int
    start: str
    visits: Count
    hours_between_visits: Count
    workers: Annotated[Count, MACHINE]


class Data(_Section):
    archive: Annotated[Place, MACHINE]
    index: Place | None
    anonymous: Annotated[bool, MACHINE]
    endpoint_url: Annotated[str | None, MACHINE]
    channels: Annotated[list[Channel], Field(min_length=1)]
    native_size: Count
    reduce: Count
    offsets_minutes: Annotated[list[int], Field(min_length=1)]
    cadence_minutes: Annotated[int, Field(ge=12, multiple_of=12)]
    every_minutes: Annotated[int, Field(ge=12, multiple_of=12)]
    store: Annotated[Place, MACHINE]
    build_workers: Annotated[Count, MACHINE]
    private_cache: Annotated[bool, MACHINE]
    ask_above_gb: Annotated[float, Field(ge=0), MACHINE]
    memory_cache_gb: Annotated[float, Field(ge=0), MACHINE]

    @property
    def image_size(self) -> int:
        """Side of the images that the model sees, in pixels."""
        return self.native_size // self.reduce


class Labels(_Section):
    kind: Literal["scalar", "event", "mask", "image"]
    path: dict[Literal[SPLITS], list[Place] | Place] | list[Place] | Place | None
    time_column: str | Annotated[list[str], Field(min_length=1)]
    value_columns: Annotated[list[str], Field(min_length=1)]
    transform: Literal["none", "log10", "goes"]
    fill_values: list[Annotated[float, Field(allow_inf_nan=True)]]  # files may mark it with an infinity
    zero: Literal["drop", "floor"]
    unit: str | None
    window_hours: Annotated[list[float], Field(min_length=2, max_length=2)] | None
    aggregate: Literal["max", "any"]
    event_at: str | float | None
    when_none: str | float | None
    spans_hours: Annotated[float, Field(ge=0)]
    direction: Literal["nearest", "forward", "backward"]
    tolerance_minutes: NotNegative
    lead_minutes: NotNegative
    variable: str | None
    target_channels: list[Channel]
    target_offset_minutes: int
    reduce: Count
    mask_reduce: Literal["majority", "any", "mean"]
    reader: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None

    @property
    def netcdf(self) -> bool:
        """Whether labels come from NetCDF or HDF5 files, which may hold vectors and bring their own splits."""
        return any(ending in str(self.path).lower() for ending in NETCDF)

    @property
    def numbers(self) -> bool:
        """Whether numbers are predicted (1D), probabilities of events too; else pictures (2D)."""
        return self.kind in ("scalar", "event")

    def physical(self, values: Any) -> Any:
        """From target units to physical values: 10**x where the transform took a logarithm."""
        return values if self.transform == "none" else 10**values


class Target(_Section):
    name: str
    unit: str
    loss: str
    weights: Literal["none", "sqrt", "balanced"]
    metrics: Annotated[list[str], Field(min_length=1)]
    plot: str | None
    event_threshold: float | None
    mask_threshold: Share


def periods_of(given: list[str] | list[list[str]] | None) -> list[list[str]]:
    """The periods of a split, each its first and end time (ISO, in UTC, the end excluded): one, several, or none."""
    return [given] if given and isinstance(given[0], str) else given or []


def _check_periods(given: list[str] | list[list[str]] | None) -> list[str] | list[list[str]] | None:
    for period in periods_of(given):
        if len(period) != 2:
            raise ValueError(f"a period is the time at which it begins and the one at which it ends, not {period}")
        first, end = (datetime.fromisoformat(time) for time in period)
        if first.tzinfo or end.tzinfo:
            raise ValueError("splits are in UTC, like the frames; write them without a time zone")
        if first >= end:
            raise ValueError(f"it ends at {end} before it begins at {first}")
    return given


Periods = Annotated[list[str] | list[list[str]] | None, AfterValidator(_check_periods)]


class Split(_Section):
    train: Periods
    val: Periods
    test: Periods
    column: str | None
    guard_hours: Annotated[float, Field(ge=0)]

    def periods(self, name: str) -> list[list[str]]:
        """The periods of the split train, val or test."""
        return periods_of(getattr(self, name))


class Model(_Section):
    weights: Place | None
    weights_channels: list[Channel]
    patch_size: Count
    embed_dim: Count
    depth: Count
    n_spectral_blocks: NotNegative
    num_heads: Count
    time_dim: Count
    nglo: Annotated[int, Field(ge=0, le=1)]


class Head(_Section):
    pooling: Pooling
    decoder_channels: list[Channel]
    penultimate: Count | None
    dropout: Share


class Lora(_Section):
    rank: Count
    alpha: Positive
    dropout: Share
    targets: Annotated[list[Literal["qkv", "proj", "fc1", "fc2", "to_dynamic_projection"]], Field(min_length=1)]
    qkv: Annotated[list[Literal["q", "k", "v"]], Field(min_length=1)]


class Training(_Section):
    lr: Positive
    epochs: Count
    regime: Literal["lora", "probe", "full", "scratch"]
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$"), MACHINE]
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
    initial_run: str | None
    recompute_blocks: Annotated[list[int] | Literal["auto"], MACHINE]
    loader_workers: Annotated[NotNegative, MACHINE]
    max_train_samples: Annotated[Count | None, COMPARED]
    max_val_samples: Count | None
    max_test_samples: Count | None


class Diagnostics(_Section):
    train_samples: Count
    range_lrs: Annotated[list[Positive], Field(min_length=2, max_length=2)]
    range_steps: Count
    sweep_lrs: Annotated[list[Positive], Field(min_length=1)]
    sweep_epochs: Count
    diverged: Positive
    erratic: Positive
    flat: Positive
    overfitting: Positive
    gap: Positive


class Compare(_Section):
    seeds: Annotated[list[int], Field(min_length=2)]
    train_samples: Annotated[list[Count | None], Field(min_length=1)]
    draws: Count
    block_days: Positive | None
    released: str | None


class Tracking(_Section):
    wandb: Literal["auto", "online", "offline", "disabled"]
    project: str
    entity: str | None


class Config(_Section):
    """A checked configuration; read values as attributes, for example `cfg.training.lr`."""

    root: Annotated[Path, Field(exclude=True)]  # the folder of config.yaml
    shared: Annotated[SharedFolder, Field(exclude=True)]  # the shared folder of this machine
    set_by: Annotated[dict[str, str], Field(exclude=True)]  # dotted key -> the layer that its value is from
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
        return self.model_dump()

    @cached_property
    def scalers(self) -> dict[str, Scaler]:
        """The normalisation constants of each channel, those of the release."""
        return load_scalers()

    def explain(self, *keys: str) -> str:
        """Lines "key value <- layer that set it" of these keys or sections, or of MATTER; ConfigError: no such key."""
        values, lines = dict(leaves(self.to_dict())), []
        for asked in keys or MATTER:
            found = [key for key in values if f"{key}.".startswith(f"{asked}.")]
            if not found:
                raise ConfigError(f"{asked}: {_nearest(asked)}")
            lines += [f"{key:28} {json.dumps(values[key]):20} <- {self.set_by[key]}" for key in found]
        return "\n".join(lines)

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
        own["recompute_blocks"] = () if blocks == "auto" else blocks  # `recompute_if_needed` sees what fits
        return {"img_size": self.data.image_size, "in_chans": len(self.data.channels), **own}

    @property
    def event_threshold(self) -> float | None:
        """From which target on a sample is an event, or None."""
        return 0.5 if self.labels.kind == "event" else self.target.event_threshold


# ---- Rules of the model, for the constructors in helpers/model too: what is wrong with the settings, a sentence each
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
    pair, spectral, wrong = 2 * patch_size, n_spectral_blocks, sorted(set(recompute_blocks) - set(range(depth)))
    problems = {
        f"img_size {img_size} must be an even number of patches of patch_size {patch_size}": img_size % pair,
        f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}": embed_dim % num_heads,
        f"embed_dim {embed_dim} is not a multiple of 4, as the positions need": embed_dim % 4,
        f"window_size {window_size} is not in the release; use 2": window_size != 2,
        f"n_spectral_blocks {spectral} is not between 0 and depth {depth}": spectral not in range(depth + 1),
        f"recompute_blocks {wrong} are no blocks, which are numbered 0 to {depth - 1}": wrong,
        "rpe together with nglo has no reference to be checked against; use one of them": rpe and nglo,
    }
    return [sentence for sentence, broken in problems.items() if broken]


def pooling_problems(pooling: str, nglo: int) -> list[str]:
    """What keeps a pooling from working on an encoder with `nglo` global tokens."""
    if pooling not in POOLINGS:
        return [f"there is no pooling {pooling!r}; choose one of {', '.join(POOLINGS)}"]
    needed = 1 if pooling == "class_token" else 0
    return [] if nglo == needed else [f"pooling {pooling!r} needs nglo={needed}, and nglo is {nglo}"]


# ---- Reading and layering
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

    The file is looked for here, then in the folders above, then beside the helpers package. `overrides` and
    `parameters` have dotted keys, such as {"training.lr": 1e-3}; `profile`, `task` and `experiment` choose other blocks
    than the file does. ConfigError: every mistake in one message, each with its key and the layer that set it.
    """
    folders = (Path(), *Path.cwd().parents, Path(__file__).resolve().parents[1])
    found = [folder / path for folder in folders if (folder / path).is_file()]
    if not found:
        raise ConfigError(f"There is no configuration file {path}. Start inside the repository, or pass its full path.")
    path = found[0].resolve()
    sources = [(file.name, _read(file)) for file in (path, path.with_name("config.local.yaml")) if file.exists()]
    sources += [("notebook parameters", parameters or {}), ("overrides=", overrides or {})]
    arguments = {"profile": profile, "task": task, "experiment": experiment}
    sources += [("this call", {key: name for key, name in arguments.items() if name is not None})]
    problems: list[str] = []
    settings = [setting for origin, tree in sources for setting in _settings(tree, origin, problems)]
    chosen, choices_exist = {}, True
    for block, key in _OVERLAYS.items():
        chosen[key] = next((tree[key] for _, tree in reversed(sources) if key in tree), None)
        # an empty block has the name ""
        names = sorted({setting.needs[key] for setting in settings if [*setting.needs][:1] == [key]} - {""})
        if chosen[key] not in names:
            choices_exist = False
            there = ", ".join(names) or "nothing"
            problems.append(f"{key}: there is no {chosen[key]!r} under `{block}`; there is {there}")
    counting = [setting for setting in settings if setting.needs.items() <= chosen.items()]
    config = _validated(counting, chosen, problems, path.parent) if choices_exist else None
    if problems := list(dict.fromkeys(problems)):  # each key of a section may have the same
        count = "a mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
        raise ConfigError("\n  - ".join([f"The configuration in {path.parent} has {count}:", *problems]))
    return config


class _Loader(yaml.SafeLoader):
    """YAML 1.2 where it matters: 1e-3 is a number; dates, 010, 1:30, 1_000 and yes are text; a key stands only once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, _ in node.value:
            if (name := str(key.value)) in seen:
                raise yaml.MarkedYAMLError(None, None, f"the key '{name}' stands twice in one section", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern in {
    "null": r"^(~|null|)$",
    "bool": r"^(true|false)$",
    "int": r"^[-+]?(0|[1-9]\d*)$",
    "float": r"^[-+]?((0|[1-9]\d*)(\.\d*)?([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\.inf|\.nan)$",
    "merge": r"^<<$",
}.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), first=None)


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 - derived from SafeLoader
        json.dumps(tree, default=str)  # raises where an anchor holds itself
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{path} must hold sections such as 'training:', but it holds a {type(tree).__name__}.")
    return tree or {}


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every entry, whose own key may be dotted; `labels.path` may be a dict itself."""
    for key, value in tree.items():
        if isinstance(value, dict) and value and not f"{prefix}{key}".endswith("labels.path"):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class _Setting(NamedTuple):
    key: str  # dotted, "" of a profile, task or experiment that sets nothing
    value: Any
    layer: str  # which sets it, such as "profiles.tiny in config.yaml"
    needs: dict[str, str]  # the choices for which it counts, such as {"profile": "tiny"}


def _settings(tree: dict, origin: str, problems: list[str]) -> list[_Setting]:
    """All that a file sets; of one key the last that counts wins. Mistakes are added to `problems`."""
    settings = []
    for dotted, value in leaves(tree):
        key, needs = dotted, {}
        while (block := key.partition(".")[0]) in _OVERLAYS:
            inner = key.partition(".")[2]
            name, _, key = inner.partition(".")
            if _OVERLAYS[block] in needs:
                problems.append(f"{dotted} ({origin}): {block} stand here already, one inside another never counts")
            needs[_OVERLAYS[block]] = name
        layer = f"{dotted.removesuffix(f'.{key}')} in {origin}" if needs else origin
        first, _, after_dot = key.partition(".")
        if needs and after_dot in _SCHEMA and first not in Config.model_fields:
            name = dotted.removesuffix(f".{after_dot}")
            problems.append(f"{name} ({origin}): a name holds no dot, which parts keys")
        elif key and key not in _SCHEMA:
            problems.append(f"{dotted} ({origin}): {_nearest(key)}")
        elif value and not key:
            problems.append(f"{dotted} ({origin}): must hold sections such as 'training:', got {value!r}")
        settings.append(_Setting(key, value, layer, needs))
    return sorted(settings, key=lambda setting: [key in setting.needs for key in ("experiment", "task", "profile")])


def _schema_keys(section: type[BaseModel], prefix: str = "", marks: tuple = ()) -> Iterator[tuple[str, tuple]]:
    """Dotted key and marks of every setting; those of a section count for its keys."""
    for name, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, _Section):
            yield from _schema_keys(info.annotation, f"{prefix}{name}.", (*marks, *info.metadata))
        elif not info.exclude:
            yield f"{prefix}{name}", (*marks, *info.metadata)


_SCHEMA = dict(_schema_keys(Config))  # dotted key -> its marks


def settings_that_matter(settings: Config | Mapping[str, Any], purpose: Literal["resume", "compare"]) -> dict[str, Any]:
    """The settings, by dotted key, that must be equal in two runs: where one resumes the other, or to compare them.

    They are those of a configuration, or of the config.yaml of a run as a dict.
    """
    may_differ = (MACHINE,) if purpose == "resume" else (MACHINE, COMPARED)
    tree = settings.to_dict() if isinstance(settings, Config) else settings
    return {key: value for key, value in leaves(tree) if not any(mark in may_differ for mark in _SCHEMA.get(key, ()))}


# ---- Saying every mistake at once
def _nearest(key: str) -> str:
    if inside := [known.split(".", 1)[1] for known in _SCHEMA if known.startswith(f"{key}.")]:
        return f"is a section with the keys {', '.join(inside)}, not a value"
    leaf = key.rpartition(".")[2]
    leaf = {"learning_rate": "lr"}.get(leaf, leaf)
    same_leaf = [known for known in _SCHEMA if known.split(".")[-1] == leaf]
    near = difflib.get_close_matches(key, same_leaf or _SCHEMA, n=1, cutoff=0.0 if same_leaf else 0.5)
    return f"unknown key; did you mean {near[0]}?" if near else "unknown key, and no known one is near"


def _validated(settings: list[_Setting], chosen: dict, problems: list[str], root: Path) -> Config | None:
    """The checked configuration of these settings; None where a mistake was added to `problems`."""
    settings = [setting for setting in settings if setting.key in _SCHEMA]
    values = {setting.key: setting.value for setting in settings} | chosen
    set_by = {setting.key: setting.layer for setting in settings}
    names = {
        "{labels}": values.get("paths.labels"),
        "{released}": values.get("paths.released"),
        "{synthetic}": values.get("synthetic.folder"),
        "{seed}": values.get("synthetic.seed"),
    }
    tree: dict[str, Any] = {"root": root, "set_by": set_by}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    setting = values.get("paths.shared")
    try:
        shared = find_shared(setting if isinstance(setting, str) else None, root)
    except OSError as error:
        problems.append(f"paths.shared: {error}")
        shared = SharedFolder(root, "none is found", False, root)  # so that all other mistakes are found, too
    try:
        config = Config.model_validate(
            tree | {"shared": shared}, context={"root": root, "shared": shared, "names": names}
        )
    except ValidationError as error:
        told: dict[str, str] = {}
        for mistake in sorted(error.errors(), key=lambda one: one["type"] not in ("value_error", "string_type")):
            key = ".".join(str(part) for part in mistake["loc"] if isinstance(part, str))
            known = next((known for known in _SCHEMA if key.startswith(f"{known}.")), key)
            item = "".join(f"[{part}]" for part in mistake["loc"] if isinstance(part, int))
            where = f" ({set_by[known]})" if known in set_by else ""
            got = "" if mistake["type"] == "missing" else f", got {mistake['input']!r}"
            message = f"{known}{item}{where}: {mistake['msg'][0].lower()}{mistake['msg'][1:]}{got}"
            # a key may be of several types, and the mistake in one of them is enough: in that of text, if there is
            told.setdefault(f"{known}{item}" if known == key else known, message)
        problems += told.values()
        return None
    for keys, sentence in _contradictions(config):
        origins = dict.fromkeys(set_by[key] for key in keys.split(", ") if key in set_by)
        problems.append(f"{keys} ({', '.join(origins)}): {sentence}")
    return config


def _contradictions(c: Config) -> Iterator[tuple[str, str]]:
    """What no single key can know: the keys to look at, and what is wrong with them."""
    # frames
    offsets, channels, native = c.data.offsets_minutes, c.data.channels, c.data.native_size
    if len(offsets) != c.model.time_dim or sorted(set(offsets)) != offsets or offsets[-1] > 0:
        rule = f"{c.model.time_dim} offset(s) that rise, each once, to at most 0 (the sample's time), not {offsets}"
        yield "data.offsets_minutes, model.time_dim", rule
    if len(set(channels)) < len(channels):
        yield "data.channels", f"each channel once, not {channels}"

    # model
    held = c.training.frozen_dtype
    if held not in ("fp32", c.training.precision):
        yield "training.frozen_dtype, training.precision", f"weights held in {held} are computed with in {held}"
    if c.training.initial_run == "released" and c.initial_weights is None:
        yield "training.initial_run, model.weights", "released needs the weights, and a regime that begins with them"
    if native % c.data.reduce:
        yield "data.native_size, data.reduce", f"{c.data.reduce} does not divide the {native}-pixel side of the frames"
    else:
        for problem in encoder_problems(**c.encoder_arguments()):
            keys = {name: f"model.{name}" for name in Model.model_fields}
            keys |= {"img_size": "data.native_size, data.reduce", "recompute_blocks": "training.recompute_blocks"}
            yield ", ".join(keys[name] for name in re.findall(r"\w+", problem) if name in keys), problem
    for problem in pooling_problems(c.head.pooling, c.model.nglo):
        yield "head.pooling, model.nglo", problem

    # labels
    own, kind, window = c.labels, c.labels.kind, c.labels.window_hours
    files = own.variable or own.reader
    if own.lead_minutes and own.direction != "forward":
        yield "labels.direction, labels.lead_minutes", "a lead is a forecast: set labels.direction: forward"
    if window and not (window[0] < window[1] and own.numbers):
        yield "labels.window_hours, labels.kind", "a window is [first, last] in hours, for labels that are numbers"
    if window and (own.lead_minutes or own.spans_hours or c.split.column or isinstance(own.path, dict)):
        keys = "labels.window_hours, labels.lead_minutes, labels.spans_hours, split.column, labels.path"
        yield keys, "the window says how far ahead a label looks, and only periods split a list of events"
    if own.event_at is not None and kind != "event" and not (window and own.aggregate == "any"):
        yield "labels.event_at, labels.kind", "event_at is for labels.kind: event, or for aggregate: any in a window"
    for name, size in {"event_at": own.event_at, "when_none": own.when_none}.items():
        if size is not None and isinstance(size, str) != (own.transform == "goes"):
            yield f"labels.{name}, labels.transform", "a class such as M1.0 with transform: goes, else a number"
    if kind == "event" and own.transform == "log10":
        yield "labels.transform, labels.kind", "event_at is in the unit of the file, so events need no logarithm: none"
    if own.aggregate == "any" and not window:
        yield "labels.aggregate, labels.window_hours", "events are put together in a window: set labels.window_hours"
    if own.unit and not own.netcdf:
        yield "labels.unit, labels.path", "only NetCDF and HDF5 files say what unit their values have"
    if not own.path and (own.numbers or files):
        yield "labels.path, labels.kind", f"{kind} labels need a file: a table of them, or one that names their files"
    if not own.numbers and bool(files) == bool(kind == "image" and own.target_channels):
        keys = "labels.variable, labels.target_channels"
        yield keys, "masks come from files, images from files or from channels of the frames: set one of the two"
    both = sorted(set(channels) & set(own.target_channels))
    if kind == "image" and both and own.target_offset_minutes in offsets:
        yield "data.channels, labels.target_channels", f"{both} would be input and target at the same time"
    if c.model.patch_size % own.reduce:
        yield "labels.reduce, model.patch_size", f"{own.reduce} does not divide the {c.model.patch_size}-pixel patch"

    # target
    asked = {"target.loss": [c.target.loss], "target.metrics": c.target.metrics, "target.plot": [c.target.plot]}
    for (key, names), there in zip(asked.items(), KINDS[kind].values(), strict=True):
        for name in (name for name in names if name not in (None, *there)):
            if ":" not in name:
                yield f"{key}, labels.kind", f"for {kind} labels there is {', '.join(there)}, not {name!r}"
                continue
            try:
                found = find_named(name, {})
            except Exception as error:  # whatever a module of one's own raises
                yield key, f"{name} cannot be imported: {type(error).__name__}: {error}"
                continue
            if not (hasattr(found, "higher_is_better") if key == "target.metrics" else callable(found)):
                yield key, f"{name} must be a function, or of metrics a NumberMetric or ImageMetric"
    counted = ", ".join(name for name in c.target.metrics if name in EVENT_METRICS)
    if kind == "scalar" and c.target.event_threshold is None and counted:
        yield "target.metrics, target.event_threshold", f"{counted} count events: say from which value on"
    if c.target.weights != "none" and c.target.loss != "bce":
        yield "target.weights, target.loss", f"{c.target.weights} weights are of bce; a loss of your own gets the share"
    if kind == "event" and c.target.event_threshold is not None:
        yield "target.event_threshold, labels.kind", "of events, the threshold is chosen on validation; leave it null"


def find_named(name: str, registry: Mapping[str, Any]) -> Any:
    """The entry `name` of a registry, or for `module:name` that object of a module of your own."""
    module, is_own, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute) if is_own else registry[name]


def parse_parameters(texts: Sequence[str]) -> dict[str, Any]:
    """["training.lr=1e-3 data.channels=[aia171, hmi_m]"] -> dotted keys and their values, read as config.yaml would."""
    parameters = {}
    for item in filter(None, re.split(r"\s+(?=[A-Za-z_][\w.]*=)", " ".join(texts).strip())):
        key, equals, value = item.partition("=")
        if not (equals and re.fullmatch(r"[A-Za-z_][\w.]*", key)):
            raise ConfigError(f"Parameters are written key=value, as in P='training.lr=1e-3 seed=1'; got '{item}'.")
        try:
            parameters[key] = yaml.load(value, _Loader)  # noqa: S506 - derived from SafeLoader
        except yaml.YAMLError as error:
            raise ConfigError(f"The value of '{item}' is not complete YAML: {error}") from None
    return parameters
