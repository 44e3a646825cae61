"""One strict configuration: layers in their order, and every mistake at once with its key path."""

import pickle
import re
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from helpers import config
from helpers.channels import load_scalers
from helpers.config import ConfigError, load_config, parse_parameters, settings_that_matter

ROOT = Path(__file__).parents[1]
SHIPPED = yaml.safe_load((ROOT / "config.yaml").read_text())
TASKS = list(SHIPPED["tasks"])


@pytest.fixture
def folder(tmp_path):
    """A folder with the shipped config.yaml, without the config.local.yaml that a person may have beside it."""
    (tmp_path / "config.yaml").write_text((ROOT / "config.yaml").read_text())
    return tmp_path


@pytest.fixture
def path(folder):
    return folder / "config.yaml"


def local(folder: Path, text: str) -> Path:
    """Write config.local.yaml; returns the config.yaml beside it."""
    (folder / "config.local.yaml").write_text(text)
    return folder / "config.yaml"


def mistakes(path: Path, overrides=None, **choices) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, **choices)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------- what is shipped
@pytest.mark.parametrize("experiment", list(SHIPPED["experiments"]))
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("profile", list(SHIPPED["profiles"]))
def test_every_combination_that_is_shipped_loads(path, profile, task, experiment):
    cfg = load_config(path, profile=profile, task=task, experiment=experiment)
    assert (cfg.profile, cfg.task, cfg.experiment) == (profile, task, experiment)
    assert not any(name in str(cfg.to_dict()) for name in ("{seed}", "{synthetic}", "{labels}"))


def test_every_key_stands_once_in_its_section():
    sections = {name: value for name, value in SHIPPED.items() if name not in config._OVERLAYS}
    assert dict(config.leaves(sections)).keys() == config._SCHEMA.keys()


def test_every_key_is_explained_where_it_stands():
    """A remark beside it, or in the line above where the value takes the whole line."""
    lines = (ROOT / "config.yaml").read_text().split("\nprofiles:")[0].splitlines()
    keys = [(above, line) for above, line in pairwise(lines) if re.match(r" *[a-z_]+: +[^# ]", line)]
    assert len(keys) == len(config._SCHEMA)
    assert not [line for above, line in keys if "#" not in line and not above.strip().startswith("#")]


def test_it_is_found_from_a_folder_below(folder, monkeypatch):
    (folder / "notebooks").mkdir()
    local(folder, "seed: 11")
    monkeypatch.chdir(folder / "notebooks")
    cfg = load_config()
    assert cfg.root == folder and cfg.seed == 11


def test_a_missing_file_says_what_to_do(tmp_path):
    assert "no configuration file" in mistakes(tmp_path / "config.yaml")


# ---------------------------------------------------------------------------------------------------- layers
LAYERS = [
    "training: {lr: 1.0}",
    "profiles: {tiny: {training: {lr: 2.0}}}",
    "profiles: {tiny: {tasks: {flare: {training: {lr: 3.0}}}}}",
    "tasks: {flare: {training: {lr: 4.0}}}",
    "experiments: {finetune: {training: {lr: 5.0}}}",
    "tasks: {flare: {experiments: {finetune: {profiles: {tiny: {training: {lr: 6.0}}}}}}}",
]


@pytest.mark.parametrize("upto", range(1, len(LAYERS) + 1))
def test_layers_of_a_file_lie_over_each_other_in_their_order(folder, upto):
    """The order in the text must not matter, nor which block holds the other: the layers are written upside down."""
    tree = {"profile": "tiny", "task": "flare", "experiment": "finetune"}
    for layer in reversed(LAYERS[:upto]):
        _merge(tree, yaml.safe_load(layer))
    cfg = load_config(local(folder, yaml.safe_dump(tree, sort_keys=False)))
    # a task inside a profile is more special than the same task for all profiles
    assert cfg.training.lr == {1: 1.0, 2: 2.0, 3: 3.0, 4: 3.0, 5: 5.0, 6: 6.0}[upto]


def _merge(tree: dict, other: dict) -> None:
    for key, value in other.items():
        if isinstance(value, dict):
            _merge(tree.setdefault(key, {}), value)
        else:
            tree[key] = value


def test_later_layers_win_and_leave_the_rest(folder):
    shipped = load_config(folder / "config.yaml")
    path = local(folder, "training: {lr: 0.5}\nexperiments: {finetune: {training: {epochs: 77}}}")
    assert load_config(path).training.lr == 0.5  # the person's own file, over the experiments of config.yaml
    assert load_config(path).training.epochs == 77
    assert load_config(path).training.weight_decay == shipped.training.weight_decay
    baseline = load_config(path, experiment="baseline").training.epochs
    assert baseline == SHIPPED["experiments"]["baseline"]["training"]["epochs"]
    both = {"parameters": {"training.lr": 0.25, "training.epochs": 3}, "overrides": {"training.lr": 0.125}}
    assert load_config(path, **both).training.lr == 0.125
    assert load_config(path, **both).training.epochs == 3


def test_blocks_apply_only_when_they_are_chosen(folder):
    path = local(folder, "profiles: {surya: {seed: 5}}\ntasks: {mine: {labels: {path: mine.csv}, seed: 6}}")
    assert load_config(path).seed == 0
    assert load_config(path, profile="surya").seed == 5
    assert load_config(path, task="mine").labels.path == str(folder / "mine.csv")
    assert load_config(path, profile="surya", task="mine").seed == 6


def test_the_last_choice_counts(folder):
    path = local(folder, "profile: surya")
    assert load_config(path).profile == "surya" and load_config(path).model.embed_dim == 1280
    assert load_config(path, parameters={"profile": "tiny"}).model.embed_dim == 64
    assert load_config(path, profile="tiny").model.embed_dim == 64


def test_nested_and_dotted_overrides_mean_the_same(path):
    dotted = load_config(path, {"training.lr": 0.5, "training.epochs": 2})
    assert dotted.to_dict() == load_config(path, {"training": {"lr": 0.5, "epochs": 2}}).to_dict()


def test_names_in_paths_are_filled_in(path):
    cfg = load_config(path, {"synthetic.seed": 4, "paths.shared": "s", "paths.runs": "~/r"})
    sun = path.parent / "s/surya-course/synthetic/sun-4"
    assert cfg.shared.path == path.parent / "s/surya-course"
    assert cfg.synthetic.folder == str(sun)
    assert cfg.data.archive == str(sun) and cfg.labels.path == str(sun / "flares.csv")
    assert cfg.model.weights == str(path.parent / "helpers/data/surya.tiny.pt")
    assert cfg.runs_folder == Path.home() / "r"
    assert load_config(path, {"data.index": "s3://bucket/i.csv"}).data.index == "s3://bucket/i.csv"
    assert "data.store (overrides=): value error, {share} in '{share}/x' stands for nothing" in mistakes(
        path, {"data.store": "{share}/x"}
    )
    several = {"labels.path": ["{labels}/a.csv", "/b.csv"]}
    assert load_config(path, several).labels.path[1] == "/b.csv"
    assert load_config(path, several).to_dict()["labels"]["path"] == ["{shared}/synthetic/sun-0/a.csv", "/b.csv"]
    for wrong in ({"train": "{share}/x"}, ["a.csv", "{share}/x"]):
        assert "labels.path" in mistakes(path, {"labels.path": wrong})


def test_the_shared_folder_and_the_scalers_come_with_it(path, tmp_path):
    cfg = load_config(path, {"training.regime": "scratch"})
    assert cfg.scalers == load_scalers() and cfg.initial_weights is None
    assert pickle.loads(pickle.dumps(cfg)).to_dict() == cfg.to_dict()
    assert "paths.shared: " in mistakes(path, {"paths.shared": str(tmp_path / "not/mounted")})


@pytest.mark.parametrize(
    ("changes", "resumed", "compared"),
    [
        ({"data.build_workers": 7, "training.device": "cpu", "paths.runs": "r"}, True, True),
        ({"seed": 3, "training.max_train_samples": 5}, False, True),
        ({"training.lr": 0.5}, False, False),
        ({"data.reduce": 4}, False, False),
        ({"synthetic.seed": 4}, False, False),
    ],
)
def test_what_may_differ_between_runs_is_said_once(path, changes, resumed, compared):
    cfg, other = load_config(path), load_config(path, changes)
    written = yaml.safe_load(yaml.safe_dump(other.to_dict()))
    for purpose, same in (("resume", resumed), ("compare", compared)):
        assert (settings_that_matter(cfg, purpose) == settings_that_matter(written, purpose)) == same


def test_a_configuration_means_the_same_in_a_clone_elsewhere(path, tmp_path):
    (tmp_path / "clone").mkdir()
    elsewhere = tmp_path / "clone/config.yaml"
    elsewhere.write_text(path.read_text())
    assert load_config(path).to_dict() == load_config(elsewhere, {"paths.shared": None}).to_dict()


def test_each_value_is_explained_by_the_layer_that_set_it(folder):
    path = local(folder, "lora: {rank: 4}\nseed: 3")
    cfg = load_config(path, {"lora.alpha": 3.0}, task="flare", parameters={"lora.dropout": 0.0})
    said = dict(re.fullmatch(r"(\S+ +\S.*?) +<- (.+)", line).groups() for line in cfg.explain().splitlines())
    said = {tuple(key.split(maxsplit=1)): layer for key, layer in said.items()}
    assert [key for key, _ in said] == list(config.MATTER)
    assert said["training.lr", "0.003"] == "profiles.tiny.tasks.flare.experiments.finetune in config.yaml"
    assert said["head.pooling", '"forecast"'] == "tasks.flare in config.yaml"
    assert said["seed", "3"] == "config.local.yaml" and said["task", '"flare"'] == "this call"
    of_lora = [line.split(maxsplit=2) for line in cfg.explain("lora.alpha", "lora").splitlines()]
    assert [key for key, *_ in of_lora] == ["lora.alpha", *(f"lora.{key}" for key in SHIPPED["lora"])]
    assert [rest for *_, rest in of_lora][:4] == [
        "<- overrides=", "<- config.local.yaml", "<- overrides=", "<- notebook parameters"
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"training.learning_rate: unknown key; did you mean training.lr\?"):
        cfg.explain("training.learning_rate")


def test_make_config_prints_them(make):
    done = make("config", "TASK=translation", "KEY=head.decoder_channels", "P=training.lr=0.5")
    assert re.search(r'^head.decoder_channels +\["hmi_m"\] +<- tasks.translation in config.yaml$', done.stdout, re.M)
    assert "training.lr" not in done.stdout
    assert re.search(r"^training.lr +0.5 +<- notebook parameters$", make("config", "P=training.lr=0.5").stdout, re.M)
    done = make("config", "KEY=lr")
    assert done.returncode and done.stdout.endswith("lr: unknown key; did you mean training.lr?\n")


# ---------------------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("text", "key", "near"),
    [
        ("training: {learning_rate: 1.0e-3}", "training.learning_rate", "training.lr"),
        ("training: {epoch: 3}", "training.epoch", "training.epochs"),
        ("lr: 1.0e-3", "lr", "training.lr"),
        ("profiles: {surya: {trainning: {lr: 0.1}}}", "profiles.surya.trainning.lr", "training.lr"),
        ("tasks: {other: {labels: {pth: a.csv}}}", "tasks.other.labels.pth", "labels.path"),
        (
            "profiles: {surya: {experiments: {baseline: {training: {epocs: 3}}}}}",
            "profiles.surya.experiments.baseline.training.epocs",
            "training.epochs",
        ),
    ],
)
def test_unknown_keys_are_named_with_the_nearest_known(folder, text, key, near):
    message = mistakes(local(folder, text))
    assert f"{key} (config.local.yaml): unknown key; did you mean {near}?" in message
    (folder / "config.local.yaml").unlink()
    (folder / "config.yaml").write_text(yaml.safe_dump(_with(SHIPPED, yaml.safe_load(text))))
    assert f"{key} (config.yaml): unknown key; did you mean {near}?" in mistakes(folder / "config.yaml")


def _with(tree: dict, other: dict) -> dict:
    tree = yaml.safe_load(yaml.safe_dump(tree))
    _merge(tree, other)
    return tree


def test_unknown_keys_of_parameters_and_overrides_are_named(path):
    message = mistakes(path, overrides={"training.lrr": 1.0}, parameters={"lora.rnk": 4, "colour": "red"})
    assert "training.lrr (overrides=): unknown key; did you mean training.lr?" in message
    assert "lora.rnk (notebook parameters): unknown key; did you mean lora.rank?" in message
    assert "colour (notebook parameters): unknown key" in message


def test_a_value_in_the_place_of_a_section_is_said(folder):
    assert "training (overrides=): is a section with the keys lr, epochs," in mistakes(
        folder / "config.yaml", {"training": 3}
    )
    message = mistakes(local(folder, "profiles: {surya: 3}"))
    assert "profiles.surya (config.local.yaml): must hold sections such as 'training:', got 3" in message
    message = mistakes(local(folder, "profiles: surya\ntraining: {lrr: 3}"))
    assert "profiles (config.local.yaml): must hold sections such as 'training:', got 'surya'" in message
    assert "training.lrr" in message


WRONG_TYPES = {
    "training.epochs": ("three", 3.0, 0, True),
    "training.lr": ("1e-3", 0.0, -1.0, float("nan")),
    "target.event_threshold": (float("nan"), float("inf")),
    "training.precision": ("fp8",),
    "data.channels[2]": (["aia94", "aia131", "aia17"],),
    "data.offsets_minutes[0]": (["-60", 0],),
    "data.anonymous": ("yes",),
    "lora.targets[0]": (["q_proj", "proj"],),
    "lora.targets": ([],),
    "lora.qkv": ([],),
    "labels.value_columns": ([],),
    "model.nglo": (2,),
    "head.dropout": (1.0,),
    "split.train": (["2014-01-01"],),
    "split.train[0]": ([2014, "2015-01-01"],),
    "labels.lead_minutes": (-60,),
    "paths.shared": (5,),
}


@pytest.mark.parametrize(("where", "value"), [(key, value) for key, values in WRONG_TYPES.items() for value in values])
def test_wrong_types_are_named_with_the_item_and_the_value(path, where, value):
    key, _, index = where.partition("[")
    message = mistakes(path, {key: value})
    bad = value[int(index[0])] if index else value
    line = next(line for line in message.splitlines() if line.startswith(f"  - {where} (overrides=): "))
    assert line.endswith(f", got {bad!r}")


IMAGE = {"labels.kind": "image", "labels.target_channels": ["hmi_m"], "labels.target_offset_minutes": 60}
IMAGE |= {"target.metrics": ["correlation"]}
MASK = {"labels.kind": "mask", "labels.variable": "mask", "target.loss": "bce_dice", "target.metrics": ["iou"]}
EVENT = {"labels.kind": "event", "target.loss": "bce", "target.metrics": ["tss"], "target.event_threshold": None}

# overrides -> the keys that are named
CONTRADICTIONS = [
    ({"data.reduce": 3}, "data.native_size, data.reduce"),
    ({"model.patch_size": 48}, "data.native_size, data.reduce, model.patch_size"),
    ({"data.native_size": 48}, "data.native_size, data.reduce, model.patch_size"),
    ({"data.offsets_minutes": [-60, -30, 0]}, "data.offsets_minutes, model.time_dim"),
    ({"model.time_dim": 3}, "data.offsets_minutes, model.time_dim"),
    ({"data.offsets_minutes": [0, -60]}, "data.offsets_minutes, model.time_dim"),
    ({"data.offsets_minutes": [0, 0]}, "data.offsets_minutes, model.time_dim"),
    ({"data.offsets_minutes": [0, 60]}, "data.offsets_minutes, model.time_dim"),
    ({"data.channels": ["aia94", "aia94"]}, "data.channels"),
    ({"training.recompute_blocks": [0, 5]}, "training.recompute_blocks"),
    ({"training.recompute_blocks": [-1]}, "training.recompute_blocks"),
    ({"head.pooling": "class_token"}, "head.pooling, model.nglo"),
    ({"model.nglo": 1}, "head.pooling, model.nglo"),
    ({"model.embed_dim": 4, "model.num_heads": 8}, "model.embed_dim, model.num_heads"),
    ({"model.embed_dim": 66, "model.num_heads": 6}, "model.embed_dim"),
    ({"model.n_spectral_blocks": 6}, "model.n_spectral_blocks, model.depth"),
    ({"training.frozen_dtype": "bf16"}, "training.frozen_dtype, training.precision"),
    (
        {"labels.window_hours": [0, 24]},
        "labels.window_hours, labels.lead_minutes, labels.spans_hours, split.column, labels.path",
    ),
    ({"labels.direction": "nearest"}, "labels.direction, labels.lead_minutes"),
    ({"labels.when_none": 5}, "labels.when_none, labels.transform"),
    (EVENT | {"labels.event_at": 5}, "labels.event_at, labels.transform"),
    (EVENT | {"labels.event_at": "M1.0", "labels.transform": "none"}, "labels.event_at, labels.transform"),
    ({"labels.path": None}, "labels.path, labels.kind"),
    (IMAGE | {"labels.target_channels": []}, "labels.variable, labels.target_channels"),
    (IMAGE | {"labels.variable": "mask"}, "labels.variable, labels.target_channels"),
    (MASK | {"labels.path": None}, "labels.path, labels.kind"),
    (MASK | {"labels.variable": None}, "labels.variable, labels.target_channels"),
    (IMAGE | {"labels.target_offset_minutes": -60}, "data.channels, labels.target_channels"),
    (MASK | {"target.loss": "mse"}, "target.loss, labels.kind"),
    (IMAGE | {"target.metrics": ["rmse", "iou"]}, "target.metrics, labels.kind"),
    ({"target.plot": "image"}, "target.plot, labels.kind"),
    ({"target.loss": "nowhere.at_all:loss"}, "target.loss"),
    ({"target.loss": "math:pi"}, "target.loss"),
    ({"target.metrics": ["math:floor"]}, "target.metrics"),
    (MASK | {"labels.reduce": 3}, "labels.reduce, model.patch_size"),
    ({"target.metrics": ["tss"], "target.event_threshold": None}, "target.metrics, target.event_threshold"),
    ({"split.train": ["2014-02-01", "2014-01-01"]}, "split.train"),
    ({"split.val": ["2014-02-30", "2014-03-01"]}, "split.val"),
    ({"split.test": ["2015-01-01", "2015-02-01T00:00Z"]}, "split.test"),
    ({"split.test": ["2015-01-01Z", "2015-02-01Z"]}, "split.test"),
]


@pytest.mark.parametrize(("overrides", "keys"), CONTRADICTIONS)
def test_contradictions_name_their_keys_and_who_set_them(path, overrides, keys):
    header, *lines = mistakes(path, overrides).splitlines()
    assert "has a mistake" in header and len(lines) == 1  # and nothing else is blamed
    named, origins = re.fullmatch(r"  - (.*?) \((.*?)\): .+", lines[0]).groups()
    assert set(named.split(", ")) == set(keys.split(", "))
    assert "overrides=" in origins


def test_a_contradiction_names_the_file_that_is_wrong(folder):
    assert "model.embed_dim, model.num_heads (profiles.tiny in config.yaml, config.local.yaml): " in mistakes(
        local(folder, "model: {num_heads: 5}")
    )


def test_without_a_synthetic_sun_its_paths_stand_for_nothing(path):
    message = mistakes(path, {"synthetic.folder": None})
    assert "has 3 mistakes" in message  # paths.labels and paths.released may stay
    for key in ("labels.path", "data.archive", "data.store"):
        assert re.search(rf"- {key} \(.*\): value error, {{synthetic}} in ", message), key


@pytest.mark.parametrize(
    "overrides",
    [
        {"model.nglo": 1, "head.pooling": "class_token"},
        {"data.offsets_minutes": [0], "model.time_dim": 1},
        IMAGE | {"labels.path": None},
        IMAGE | {"head.decoder_channels": ["hmi_v"], "labels.reduce": 2},
        MASK | {"target.metrics": ["dice", "iou"], "target.plot": "image"},
        {"model.weights": None, "model.weights_channels": []},
        {"target.event_threshold": None},
        {"target.plot": "spectrum", "labels.value_columns": ["goes_class", "another"]},
        {"training.lr": 1},  # a whole number is a number
        {"labels.fill_values": [float("inf"), float("-inf"), -9999]},
        {"labels.direction": "backward", "labels.lead_minutes": 0},
        {"labels.when_none": "B1.0"},
        EVENT | {"labels.event_at": "M1.0"},
    ],
)
def test_what_only_looks_contradictory_loads(path, overrides):
    load_config(path, overrides)


def test_all_mistakes_come_in_one_error(folder):
    path = local(folder, "training: {lrr: 1.0, epochs: many}\nlora: {rank: 0}")
    message = mistakes(path, {"data.channels": ["aia171", "aia99"], "labels.colour": 1})
    for part in (
        "has 5 mistakes:",
        "training.lrr (config.local.yaml): unknown key; did you mean training.lr?",
        "labels.colour (overrides=): unknown key",
        "training.epochs (config.local.yaml): input should be a valid integer, got 'many'",
        "lora.rank (config.local.yaml): input should be greater than or equal to 1, got 0",
        "data.channels[1] (overrides=): ",
    ):
        assert part in message, message
    assert len(message.splitlines()) == 6


def test_a_name_that_suits_no_kind_of_label_is_told_with_those_that_do(path):
    message = mistakes(path, EVENT | {"target.loss": "mse", "target.metrics": ["tsss"]})
    assert "target.loss, labels.kind (overrides=): for event labels there is bce, not 'mse'" in message
    assert re.search(r"for event labels there is tss, hss, .*, not 'tsss'", message) and "import" not in message


def test_without_the_shared_folder_all_other_mistakes_are_said(path, tmp_path):
    nowhere = {"paths.shared": str(tmp_path / "not/mounted")}
    assert "has a mistake:\n  - paths.shared: " in mistakes(path, nowhere)
    both = mistakes(path, nowhere | {"training.epochs": "many"})
    assert "has 2 mistakes" in both and "training.epochs (overrides=): " in both
    assert "has 2 mistakes" in mistakes(path, nowhere | {"model.num_heads": 5})


def test_all_contradictions_come_in_one_error(folder):
    wrong = {"model.num_heads": 5, "model.nglo": 1, "target.weights": "sqrt"}
    message = mistakes(local(folder, "training: {lrr: 1.0}"), wrong)
    for part in (
        "has 4 mistakes:",
        "training.lrr (config.local.yaml): unknown key; did you mean training.lr?",
        "model.embed_dim, model.num_heads (profiles.tiny in config.yaml, overrides=): ",
        "head.pooling, model.nglo (tasks.flare in config.yaml, overrides=): ",
        "target.weights, target.loss (overrides=, config.yaml): ",
    ):
        assert part in message, message


def test_unknown_choices_list_those_there_are(folder):
    message = mistakes(folder / "config.yaml", profile="hub", task="nothing", experiment="other")
    assert "profile: there is no 'hub' under `profiles`; there is surya, surya_4k, tiny" in message
    assert f"task: there is no 'nothing' under `tasks`; there is {', '.join(sorted(TASKS))}" in message
    assert "experiment: there is no 'other' under `experiments`; there is baseline, finetune" in message
    assert len(message.splitlines()) == 4  # the values that the profile would have set are not listed as well
    path = local(folder, "tasks:\nprofiles: {hub: {seed: 1}}\nprofile: [hub]")
    message = mistakes(path, task="")
    assert "there is no ['hub'] under `profiles`; there is hub, surya, surya_4k, tiny" in message
    assert f"there is no '' under `tasks`; there is {', '.join(sorted(TASKS))}" in message


@pytest.mark.parametrize("within", ["", "profiles.tiny."])
def test_a_name_with_a_dot_is_refused(folder, within):
    content = {"tasks": {"flare.v2": {"labels": {"lead_minutes": 60}, "seed": 3}}}
    content = {"profiles": {"tiny": content}} if within else content
    message = mistakes(local(folder, yaml.safe_dump(content)))
    assert f"has a mistake:\n  - {within}tasks.flare.v2 (config.local.yaml): a name holds no dot" in message
    assert len(message.splitlines()) == 2


# ---------------------------------------------------------------------------------------------------- YAML
def test_a_key_may_stand_only_once(folder):
    message = mistakes(local(folder, "training:\n  lr: 0.1\n  epochs: 2\n  lr: 0.2\n"))
    assert "config.local.yaml is not valid YAML: the key 'lr' stands twice in one section" in message
    assert "line 4" in message


@pytest.mark.parametrize("text", ["training: {lr: 0.1", "training:\n\tlr: 1", "a: b: c", "? [a, b]\n: 1"])
def test_broken_yaml_is_one_sentence_with_the_file(folder, text):
    assert "config.local.yaml is not valid YAML" in mistakes(local(folder, text))


@pytest.mark.parametrize("text", ["seed: 3 # \xe9".encode("latin-1"), "seed: 3".encode("utf-16"), b"a: &x {b: *x}"])
def test_a_file_that_cannot_be_read_is_one_sentence_with_its_name(folder, text):
    (folder / "config.local.yaml").write_bytes(text)
    assert "config.local.yaml" in mistakes(folder / "config.yaml")


def test_a_file_that_is_no_sections_is_refused(folder):
    assert "config.local.yaml must hold sections such as 'training:'" in mistakes(local(folder, "- a\n- b\n"))


def test_an_empty_local_file_changes_nothing(folder):
    before = load_config(folder / "config.yaml").to_dict()
    assert load_config(local(folder, "# nothing yet\n")).to_dict() == before


def test_values_mean_what_a_person_expects():
    texts = ("010", "1:30", "1_000", "0x10", "yes", "2014-02-12", "2014-02-12 06:00", "1.0.0", "e5")
    numbers = {"-7": -7, "0": 0, "1e-3": 1e-3, "1E5": 1e5, "-2.5e+3": -2500.0, ".5": 0.5, "3": 3}
    others = {"true": True, "null": None, "[aia171, hmi_m]": ["aia171", "hmi_m"]}
    for text, value in ({text: text for text in texts} | numbers | others).items():
        parsed = parse_parameters([f"seed={text}"])["seed"]
        assert parsed == value and type(parsed) is type(value)


def test_numbers_and_dates_of_a_file(folder):
    cfg = load_config(local(folder, "training: {lr: 1e-3}\nsplit: {test: [2014-12-05, 2015-02-20 12:00]}"))
    assert cfg.training.lr == 0.001 and cfg.split.periods("test") == [["2014-12-05", "2015-02-20 12:00"]]


# ---------------------------------------------------------------------------------------------------- the result
def test_a_configuration_does_not_change(path):
    cfg = load_config(path)
    with pytest.raises(ValidationError, match="frozen"):
        cfg.training.lr = 1.0
    with pytest.raises(ValidationError, match="frozen"):
        cfg.seed = 1


@pytest.mark.parametrize("profile", list(SHIPPED["profiles"]))
def test_the_copy_beside_a_run_says_it_all(path, profile):
    cfg = load_config(path, profile=profile)
    copy = yaml.safe_load(yaml.safe_dump(cfg.to_dict()))
    assert copy == cfg.to_dict()
    assert str(path.parent) not in str(copy)  # no folder of one machine
    assert load_config(path, {**copy, "profile": profile}).to_dict() == copy


def test_a_block_inside_its_like_never_counts_and_is_refused(folder):
    message = mistakes(local(folder, "tasks: {flare: {tasks: {forecast: {seed: 3}}}}"))
    assert "tasks.flare.tasks.forecast.seed (config.local.yaml): tasks stand here already" in message
