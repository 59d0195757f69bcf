"""The configuration: what is accepted means what it says, everything else is one sentence."""

from __future__ import annotations

import itertools
import math
import os
import re
import threading
import warnings
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

import fuzz_config
import pytest
import torch

from ups_fast import config, config_file
from ups_fast.build import prepare
from ups_fast.config import KEYS, METHOD_KEYS, RENAMED, Config, load, validate
from ups_fast.data import ImageSet, load_set
from ups_fast.machine import pick_device
from ups_fast.methods import METHODS

CONFIGS = Path(__file__).parent.parent / "configs"
FILES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "study")
BASE = "data: {name: digits, n_labels: 40}\n"


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "my_run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.fixture
def base(write):
    return write(BASE)


def refusal(path, *words: str) -> str:
    """The message with which `load` refuses, which must be one line."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load(path, words)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


# What is accepted ---------------------------------------------------------------------------------


def test_file_and_words_are_merged_over_the_defaults(write):
    path = write("seed: 3\ntrain:\n  epochs: 7\n  lr: 1e-1\ndata: {n_labels: 20}\n")
    cfg = load(path, ["train.epochs=9", "select.tau_p=0.8", "data.flip=true"])
    assert type(cfg) is Config and type(cfg.train) is config.TrainConfig
    assert (cfg.seed, cfg.train.epochs, cfg.train.lr, cfg.data.n_labels) == (3, 9, 0.1, 20)
    assert (cfg.select.tau_p, cfg.data.flip) == (0.8, True)
    changed = {"seed", "run_dir", "train.epochs", "train.lr", "data.n_labels", "select.tau_p", "data.flip"}
    for name, key in KEYS.items():
        assert (config._get(cfg, name) == key.default) == (name not in changed), name


def test_a_recipe_lies_under_the_file_and_the_words(write):
    path = write("recipe: paper\ndata: {n_labels: 20, crop: 1}\ntrain: {epochs: 7}\n")
    cfg = load(path, ["data.cutout=3"])
    assert (cfg.recipe, cfg.train.rounds, cfg.data.ops, cfg.model.name) == ("paper", 20, "published", "cnn13")
    assert (cfg.train.epochs, cfg.data.crop, cfg.data.cutout) == (7, 1, 3)
    assert load(path, ["recipe=none"]) == load(write("data: {n_labels: 20, crop: 1}\ntrain: {epochs: 7}\n"))
    fast = load(path, ["recipe=fast"])
    assert (fast.recipe, fast.data.ops != "published", fast.train.epochs) == ("fast", True, 7)
    with pytest.raises(ValueError, match="recipe must be text, got"):
        load(write("recipe: [paper]\n"))


@pytest.mark.parametrize("path", sorted(config.RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_say_only_what_differs(path):
    assert path.stem in KEYS["recipe"].choices
    for name, value in config._read(path).items():
        assert KEYS[name].default != value, name


@pytest.mark.parametrize("word", ["inf", ".inf", "Infinity"])
def test_infinity_has_no_single_spelling(base, word):
    assert load(base, [f"select.kappa_p={word}"]).select.kappa_p == math.inf


def test_numbers_and_switches_as_people_write_them(base):
    words = ["select.kappa_p=1e-3", "seed=0x10", "train.lr=1", "data.flip=yes", "checkpoint_seconds=0"]
    cfg = load(base, words)
    assert (cfg.select.kappa_p, cfg.seed, cfg.train.lr) == (1e-3, 16, 1.0)
    assert cfg.data.flip is True and type(cfg.train.lr) is float and type(cfg.checkpoint_seconds) is float
    assert load(base, ["data.flip=0"]).data.flip is False


@pytest.mark.parametrize(
    "text", ["010", "1e3", "null", "a: b", "# no comment", "with = sign", "C:\\x", "[1]", "x,y"]
)
def test_text_on_the_command_line_stands_as_it_was_typed(base, text):
    assert load(base, [f"run_dir={text}"]).run_dir == text


def test_run_dir_follows_the_file_name(base):
    assert load(base).run_dir == str(Path("runs/my_run"))
    assert load(base, ["run_dir="]).run_dir == str(Path("runs/my_run"))
    assert load(base, ["run_dir=elsewhere"]).run_dir == "elsewhere"


def test_last_word_wins_and_dotted_keys_may_stand_in_a_file(write):
    path = write("data.n_labels: 40\ntrain.epochs: 5\nselect:\n")
    assert load(path).train.epochs == 5
    assert load(path, ["train.epochs=6", "train.epochs=8"]).train.epochs == 8


def test_a_resolved_config_reads_back_the_same(base, tmp_path):
    cfg = load(base, ["select.kappa_p=inf", "run_dir=010", "model.dropout=0.25", "seed=123456789012345678"])
    again = tmp_path / "again.yaml"
    again.write_text(config_file.write(asdict(cfg)))
    assert asdict(load(again)) == asdict(cfg)


TEXTS = ["08", "09:30", "1e5", "1_0", "y", "on", "- a", "a: b", "a #b", " x", "\x1b[0m", "\udcff\n", "\u2028"]


@pytest.mark.parametrize("text", [*TEXTS, *fuzz_config.SCALARS])
def test_text_that_is_written_is_read_back(text):
    """Also what looks like something else: a folder may be called 08, 09:30 or null."""
    tree = {"a": text, "b": {"c": [text]}}
    assert "\0" in text or config_file.parse(config_file.write(tree)) == tree


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("train.epoch=3", "unknown key 'train.epoch' (did you mean train.epochs?)"),
        ("lr=1", "unknown key 'lr' (did you mean train.lr?)"),
        ("selct.tau_p=0.9", "unknown key 'selct.tau_p' (did you mean select.tau_p?)"),
        ("seed[0]=1", "unknown key 'seed[0]' (did you mean seed?)"),
        ("seed.x=1", "unknown key 'seed.x'"),
        ("qwertyuiop=1", "unknown key 'qwertyuiop'"),
        ("=1", "unknown key ''"),
        ("train.epochs", "expected key=value, got 'train.epochs'"),
        ("train=3", "train is a group of keys, such as train.rounds"),
        ("train.epochs=abc", "train.epochs must be an integer, got 'abc'"),
        ("train.epochs=1.5", "train.epochs must be an integer, got 1.5"),
        ("train.epochs=", "train.epochs must be an integer, got nothing"),
        ("train.epochs=[1, 2]", "train.epochs must be an integer, got [1, 2]"),
        ("train.epochs=[", "train.epochs must be an integer, got '['"),
        ("train.epochs=true", "train.epochs must be an integer, got True"),
        ("train.lr=fast", "train.lr must be a number, got 'fast'"),
        ("train.lr=true", "train.lr must be a number, got True"),
        ("data.flip=5", "data.flip must be true or false, got 5"),
        ("data.flip=maybe", "data.flip must be true or false, got 'maybe'"),
        ("seed=${oc.env:HOME}", "seed must be an integer itself and not a reference"),
        ("run_dir=${seed}", "run_dir must be text itself and not a reference"),
        ("run_dir=???", "run_dir must be text itself and not a reference"),
        ("data.name=cifar", "voc2012, ucf101, npz, features, folder, got 'cifar' (did you mean cifar10?)"),
        ("model.preact=both", "model.preact must be one of published, fixed, got 'both'"),
        ("model.activation=relu", "model.activation must be one of mish, leaky_relu, got 'relu'"),
        ("trian.epochs=3", "unknown key 'trian.epochs' (did you mean train.epochs?)"),
        ("batchsize=3", "unknown key 'batchsize' (did you mean train.batch_size?)"),
        ("seed=010", "seed: a number must have no leading zeros or colons, got '010'"),
        ("seed=-0100", "seed: a number must have no leading zeros or colons, got '-0100'"),
        ("train.lr=010", "train.lr: a number must have no leading zeros or colons, got '010'"),
        ("checkpoint_seconds=12:30", "a number must have no leading zeros or colons, got '12:30'"),
        ("train.warmup_epochs=1:30.5", "a number must have no leading zeros or colons, got '1:30.5'"),
        ("train.rounds=99999999999999999999", "train.rounds must be in [1, 10000], got 99999999999999999999"),
        ("train.batch_size=1000001", "train.batch_size must be in [1, 1000000], got 1000001"),
        ("threads=1000000", "threads must be in [0, 1024], got 1000000"),
        ("seed=-1" + "0" * 4000, "seed must be at least 0, got -1000"),
        ("seed=" + "9" * 5000, "seed: "),
        ("model.name=" + "x" * 5000 + "${", "..."),
        ("seed=-1", "seed must be at least 0, got -1"),
        ("checkpoint_seconds=-1", "checkpoint_seconds must be at least 0 and finite, got -1.0"),
        ("checkpoint_seconds=inf", "checkpoint_seconds must be at least 0 and finite, got inf"),
        ("data.crop=-1", "data.crop must be in [0, 2047], got -1"),
        ("model.dropout=1", "model.dropout must be in [0, 1), got 1.0"),
        ("model.dropout=-0.1", "model.dropout must be in [0, 1), got -0.1"),
        ("model.dropout=0", "select.passes=10 needs model.dropout above 0"),
        ("train.rounds=0", "train.rounds must be in [1, 10000], got 0"),
        ("train.epochs=0", "train.epochs must be in [1, 1000000], got 0"),
        ("train.batch_size=0", "train.batch_size must be in [1, 1000000], got 0"),
        ("select.batch_size=-1", "select.batch_size must be in [0, 1000000], got -1"),
        ("recipe=papper", "must be one of none, paper, fast, fixmatch, features, got 'papper' (did you mean paper?)"),
        ("data.name=folder", "data.n_labels must be 0 for folder, where the files say what is labeled"),
        ("data.size=32", "data.size is for data.name=folder, images of digits keep theirs, got 32"),
        ("data.channels=2", "data.channels must be 1 or 3, got 2"),
        ("data.test_share=1", "data.test_share must be in (0, 1), got 1.0"),
        ("recipe=3", "recipe must be one of none, paper, fast, fixmatch, features, got '3'"),
        ("train.lr=0", "train.lr must be in (0, 1000], got 0.0"),
        ("train.lr=inf", "train.lr must be in (0, 1000], got inf"),
        ("train.momentum=1", "train.momentum must be in [0, 1), got 1.0"),
        ("train.warmup_epochs=31", "train.warmup_epochs must not exceed a round's 30 epochs, got 31.0"),
        ("select.tau_p=1.01", "select.tau_p must be in [0, 1], got 1.01"),
        ("select.tau_n=-0.01", "select.tau_n must be in [0, 1], got -0.01"),
        ("select.tau_n=0.71", "select.tau_n must not exceed select.tau_p, got tau_n=0.71 and tau_p=0.7"),
        ("select.kappa_n=-1", "select.kappa_n must be at least 0, got -1.0"),
        ("select.temp_nl=0", "select.temp_nl must be in [0.001, 1000], got 0.0"),
        ("select.passes=0", "select.passes must be in [1, 10000], got 0"),
        ("data.n_labels=0", "data.n_labels must say how many images of digits are labeled, got 0"),
        ("data.name=npz", "data.n_labels must be 0 for npz"),
        ("device=gpu", "device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        ("device=cuda:", "device must be auto, cpu, cuda or cuda:N, got 'cuda:'"),
        ("device=cuda:-1", "device must be auto, cpu, cuda or cuda:N, got 'cuda:-1'"),
        ("device=cpu:0", "device must be auto, cpu, cuda or cuda:N, got 'cpu:0'"),
    ],
)  # fmt: skip
def test_a_word_is_refused_with_one_sentence(base, word, said):
    assert said in refusal(base, word)


@pytest.mark.parametrize("name", [name for name, key in KEYS.items() if key.type in (int, float)])
def test_nan_is_refused_everywhere(base, name):
    assert refusal(base, f"{name}=nan").startswith(f"{name} must be ")


def test_one_pass_needs_no_dropout_and_no_infinite_kappas(base):
    for words in ([], ["select.kappa_p=inf"], ["select.kappa_p=inf", "select.kappa_n=inf"]):
        assert load(base, ["select.passes=1", "model.dropout=0", *words]).select.passes == 1


def test_warm_up_is_held_against_the_shorter_kind_of_round(base):
    words = ["train.epochs=30", "train.warmup_epochs=5", "train.round0_epochs=4"]
    assert "must not exceed a round's 4 epochs" in refusal(base, *words)
    assert load(base, words[:2]).train.warmup_epochs == 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- 1\n- 2\n", "a config must be a mapping of keys to values, got a list"),
        ("seed: 1\nseed: 2\n", "duplicate key"),
        ("train: {epochs: 1}\ntrain.epochs: 2\n", "train.epochs is given twice"),
        ("seed: [1\n", "not valid YAML"),
        ("train:\n\tepochs: 1\n", "not valid YAML"),
        ("seed: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        (b"seed: \xff\xfe\n", "not "),
        (b"\x00\x01", "not valid YAML"),
        ("null: 3\n", "not a readable config"),
        ("3: 4\n", "unknown key '3'"),
        ("just words\n", "a config must be a mapping of keys to values, got 'just words'"),
        ("5\n", "a config must be a mapping of keys to values, got '5'"),
        ("modle: {name: cnn13}\n", "unknown key 'modle' (did you mean model?)"),
        ("seed: 010\n", "a number must have no leading zeros or colons, got '010'"),
        ("checkpoint_seconds: 1:30\n", "a number must have no leading zeros or colons, got '1:30'"),
        ("run_dir: 010\n", "got '010' (where it is meant as text, put it in quotes)"),
        ('run_dir: "a\\0b"\n', "run_dir must not hold a NUL character, got 'a\\x00b'"),
        ("run_dir:\n", "run_dir must be text, got nothing"),
        ("seed: {a: 1}\n", "seed must be an integer, got {'a': 1}"),
        ("train: 5\n", "train is a group of keys"),
        ("train: [1]\n", "train is a group of keys"),
        ("train: {lr: {lr: 1}}\n", "train.lr must be a number"),
        ("train: {train.lr: 1}\n", "unknown key 'train.train.lr'"),
        ("train: ${seed}\n", "train is a group of keys"),
    ],
)
def test_a_file_is_refused_with_its_name(write, text, said):
    path = write(text)
    message = refusal(path)
    assert message.startswith(f"{path}: ") and said in message


def test_an_empty_file_is_the_defaults(write):
    assert load(write(""), ["data.n_labels=40"]).train == config.TrainConfig()


def test_a_missing_file_and_a_folder(tmp_path, base):
    assert "did you mean" in refusal(tmp_path / "my_runs.yaml") and "my_run.yaml" in refusal(
        tmp_path / "my_runs.yaml"
    )
    assert refusal(tmp_path / "nothing" / "x.yaml").startswith("there is no config file")
    assert refusal(tmp_path) == f"{tmp_path}: a config must be a file, and this is a folder"


def test_validate_looks_at_every_field():
    cfg = Config()
    cfg.data.n_labels = 40
    validate(cfg)
    for name, key in KEYS.items():
        if key.within or key.choices:
            group, _, last = name.rpartition(".")
            holder = getattr(cfg, group) if group else cfg
            setattr(holder, last, math.nan if key.within else "nonsense")
            with pytest.raises(ValueError, match=re.escape(name)):
                validate(cfg)
            setattr(holder, last, 40 if name == "data.n_labels" else key.default)
    validate(cfg)


# The device ---------------------------------------------------------------------------------------


def test_pick_device_with_and_without_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(pick_device(name)) for name in ("auto", "cpu", "cuda", "cuda:1")] == [
        "cuda",
        "cpu",
        "cuda",
        "cuda:1",
    ]
    with pytest.raises(ValueError, match=r"device=cuda:2 does not exist: this machine has cuda:0 to cuda:1"):
        pick_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert [str(pick_device(name)) for name in ("auto", "cpu")] == ["cpu", "cpu"]
    for name in ("cuda", "cuda:0"):
        with pytest.raises(ValueError, match=f"device={name} needs a GPU, but this PyTorch"):
            pick_device(name)


# Old names and the keys of methods -----------------------------------------------------------------

OLD = [
    ("engine.step=compile", "runtime.step", "compile"),
    ("engine.precision=bfloat16", "runtime.precision", "bfloat16"),
    ("train.first_epochs=7", "train.round0_epochs", 7),
    ("train.first_batch_size=9", "train.round0_batch_size", 9),
    ("train.later_lr=1e-2", "train.later_rounds_lr", 0.01),
    ("train.repeat_labels=3", "train.labeled_repeats", 3),
    ("select.dropouts=2", "select.mc_layers", 2),
]


def test_every_old_name_is_tried_and_no_new_one_is_old():
    assert {(word.partition("=")[0], new) for word, new, _ in OLD} == set(RENAMED.items())
    assert set(RENAMED.values()) <= set(KEYS) and not set(RENAMED) & set(KEYS)


@pytest.mark.parametrize(("word", "new", "value"), OLD)
@pytest.mark.parametrize("form", ["word", "nested", "dotted"])
def test_an_old_name_works_and_says_the_new_one(write, word, new, value, form):
    old, _, raw = word.partition("=")
    group, _, last = old.partition(".")
    more = {"nested": f"{group}: {{{last}: {raw}}}\n", "dotted": f"{old}: {raw}\n", "word": ""}[form]
    with pytest.warns(FutureWarning) as said:
        cfg = load(write(BASE + more), [word] if form == "word" else [])
    assert [str(each.message) for each in said] == [f"{old} is now {new}: the old name works for one release"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cfg == load(write(BASE), [f"{new}={raw}"])
    assert config._get(cfg, new) == value and type(config._get(cfg, new)) is KEYS[new].type


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("word", "new", "value"), OLD)
def test_an_old_name_beside_the_new_one_is_refused(base, write, word, new, value):
    old, _, raw = word.partition("=")
    sentence = f"{new} is given twice, once by its old name {old}"
    for words in ([word, f"{new}={raw}"], [f"{new}={raw}", word]):
        assert refusal(base, *words) == sentence
    path = write(f"{BASE}{new}: {raw}\n{old}: {raw}\n")
    assert refusal(path) == f"{path}: {sentence}"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_word_by_an_old_name_is_merged_over_a_file_and_checked_by_the_new_one(write):
    path = write(BASE + "train: {round0_epochs: 3}\n")
    assert load(path, ["train.first_epochs=5"]).train.round0_epochs == 5
    assert "train.round0_epochs must be an integer, got 'x'" in refusal(path, "train.first_epochs=x")
    assert "runtime.step must be one of auto, eager, compile, graph, got 'fast'" in refusal(
        path, "engine.step=fast"
    )
    assert "unknown key 'engine.stop'" in refusal(path, "engine.stop=1")
    assert "unknown key 'engine'" in refusal(path, "engine=1")


def own_keys():
    """Of each method the keys that not every method has."""
    return [(name, key) for name in METHODS for key in METHOD_KEYS[name].values() if key.name not in KEYS]


def test_a_method_has_its_own_keys_with_their_defaults(base):
    assert type(load(base).method) is METHODS["ups"].Options and load(base).method.name == "ups"
    for name, method in METHODS.items():
        cfg = load(base, [f"method.name={name}", "data.ops=ups"])
        assert type(cfg.method) is method.Options and cfg.method.name == name
        assert set(config.keys(cfg)) == set(KEYS) | set(METHOD_KEYS[name])
    for name, key in own_keys():
        assert key.help[0].isupper() and key.help.endswith(".") and type(key.default) is key.type, key.name
        assert not key.choices or key.default in key.choices, key.name
        cfg = load(base, [f"method.name={name}", "data.ops=ups"])
        assert config._get(cfg, key.name) == key.default


def test_a_method_and_its_keys_are_read_from_file_and_words_in_any_order(base, write):
    path = write(BASE + "method: {schedule: curriculum, name: self_training}\n")
    for cfg in (load(path), load(base, ["method.schedule=curriculum", "method.name=self_training"])):
        assert (cfg.method.name, cfg.method.schedule) == ("self_training", "curriculum")
    assert load(path, ["method.schedule=threshold"]).method.schedule == "threshold"
    assert (
        "method.schedule must be one of threshold, curriculum, got 'curiculum' (did you mean cur"
        in refusal(path, "method.schedule=curiculum")
    )
    assert asdict(load(path))["method"] == {"name": "self_training", "schedule": "curriculum"}


def test_a_key_of_another_method_is_unknown_and_says_whose_it_is(base, write):
    for name, key in own_keys():
        for other in METHODS:
            if key.name in METHOD_KEYS[other]:
                continue
            said = refusal(base, f"method.name={other}", f"{key.name}={key.default}")
            assert said.startswith(f"unknown key '{key.name}' for method.name={other}: it belongs to ")
            assert name in said.partition(": it belongs to ")[2].split(", ")
    path = write(BASE + "method: {schedule: curriculum}\n")
    assert refusal(path).startswith(
        f"{path}: unknown key 'method.schedule' for method.name=ups: it belongs to"
    )
    assert "unknown key 'method.shedule'" in refusal(path, "method.shedule=x", "method.name=self_training")
    assert "(did you mean method.schedule?)" in refusal(base, "method.shedule=x", "method.name=self_training")


def test_the_help_names_every_method():
    text = " ".join(config.help_text().split())
    assert f"docs/methods.md explains each method. [{' | '.join(METHODS)}]" in text


def test_an_unknown_method_has_a_hint(base, write):
    said = refusal(base, "method.name=self_traning")
    assert said.startswith("method.name must be one of ups, supervised, self_training")
    assert said.endswith("got 'self_traning' (did you mean self_training?)")
    for text, got in (
        ("upss", "'upss' (did you mean ups?)"),
        ("3", "3"),
        ("[ups]", "['ups'] (did you mean ups?)"),
        ("", "None"),
    ):
        path = write(BASE + f"method:\n  name: {text}\n")
        said = refusal(path)
        assert said.startswith(f"{path}: method.name must be one of ups, ") and said.endswith(f"got {got}")
    assert "method is a group of keys, such as method.name" in refusal(write(BASE), "method=ups")
    cfg = load(write(BASE))
    cfg.method.name = "upss"
    with pytest.raises(ValueError, match=r"^method\.name must be one of .* \(did you mean ups\?\)$"):
        validate(cfg)


def test_the_help_has_the_keys_of_each_method_under_its_name():
    text = config.help_text()
    for name, key in own_keys():
        part = text.partition(f"\nmethod.name={name}:\n")[2].partition("\n\n")[0]
        assert f"  {key.name}=" in part and key.help in " ".join(part.split())


def test_the_shares_and_averages_have_ranges(base):
    cfg = load(base, ["data.val_share=0.25", "train.ema=0.999", "train.decay_norms=no"])
    assert (cfg.data.val_share, cfg.train.ema, cfg.train.decay_norms) == (0.25, 0.999, False)
    assert "data.val_share must be in [0, 1), got 1.0" in refusal(base, "data.val_share=1")
    assert "train.ema must be in [0, 1), got 1.0" in refusal(base, "train.ema=1")
    assert "train.ema must be in [0, 1), got -0.1" in refusal(base, "train.ema=-0.1")


# Help and the files that come with the project ----------------------------------------------------


def test_every_field_is_a_key_with_a_sentence():
    leaves = 0
    for item in fields(Config):
        value = getattr(Config(), item.name)
        leaves += len(fields(value)) if is_dataclass(value) else 1
    assert len(KEYS) == leaves
    for key in KEYS.values():
        assert type(key.default) is key.type, key.name
        assert key.help[0].isupper() and key.help.endswith("."), key.name
        assert not key.choices or key.default in key.choices, key.name


def test_help_shows_every_key_default_and_sentence_in_80_columns():
    text = config.help_text()
    assert max(map(len, text.splitlines())) <= 80
    flat = " ".join(text.split())
    for key in KEYS.values():
        default = str(key.default).lower() if key.type is bool else key.default
        assert f"\n  {key.name}={default}\n" in text
        assert key.help in flat


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_config_files_load_and_say_only_what_differs(path):
    cfg = load(path)
    assert cfg.run_dir == str(Path("runs") / path.stem)
    lines = path.read_text().splitlines()
    head = [line.startswith("#") for line in lines[:4]]
    assert head[:2] == [True, True] and not head[3]  # two or three lines say what it is for
    given = config._read(path)
    if path.name in ("npz.yaml", "folder.yaml"):  # the examples that show everything
        assert list(given) == list(KEYS)
    else:
        base = {name: key.default for name, key in config.keys(cfg).items()}
        if cfg.recipe != "none":
            base |= config._read(config.RECIPES / f"{cfg.recipe}.yaml")
        del given["data.name"]  # which is always said
        assert [name for name, value in given.items() if base[name] == value] == []


def test_the_files_have_names_of_their_own():
    assert len({path.stem for path in FILES}) == len(FILES) == 40


@pytest.mark.parametrize(
    ("name", "n_labels", "first_batch", "balance"),
    [
        ("cifar10_1000", 1000, 64, 6),
        ("cifar10_4000", 4000, 0, 6),
        ("cifar100_4000", 4000, 0, 0),
        ("cifar100_10000", 10000, 0, 0),
    ],
)
def test_paper_configs_are_the_published_settings(name, n_labels, first_batch, balance):
    cfg = load(CONFIGS / "paper" / f"{name}.yaml")
    assert cfg.data.name == name.split("_")[0] and cfg.data.n_labels == n_labels
    assert (cfg.data.flip, cfg.data.crop, cfg.data.cutout) == (True, 4, 16)
    assert (cfg.model.name, cfg.model.dropout, cfg.model.preact) == ("cnn13", 0.3, "published")
    train = cfg.train
    assert (cfg.data.ops, cfg.data.n_ops, cfg.data.jitter, train.cosine) == ("published", 3, 0.4, 7 / 16)
    assert (train.rounds, train.epochs, train.batch_size, train.round0_epochs) == (20, 1024, 128, 0)
    assert (train.lr, train.momentum, train.weight_decay, train.warmup_epochs) == (0.03, 0.9, 0.0, 0.0)
    assert (train.round0_batch_size, cfg.select.balance_rounds) == (first_batch, balance)
    select = cfg.select
    assert (select.tau_p, select.tau_n, select.kappa_p, select.kappa_n) == (0.70, 0.05, 0.05, 0.005)
    assert (select.temp_nl, select.passes) == (2.0, 10)


PUBLISHED = sorted((CONFIGS / "methods").glob("*.yaml"))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_settings_of_a_method(path):
    """2^20 steps on 50,000 images, the optimizer of FixMatch, and a run that begins."""
    cfg = load(path)
    data, train, n_labels = cfg.data, cfg.train, cfg.data.n_labels
    assert path.stem == f"{cfg.method.name}_{data.name}_{n_labels}" and cfg.recipe == "fixmatch"
    large = data.name == "cifar100"
    assert (n_labels, cfg.model.name) == ((10000, "wrn-28-8") if large else (4000, "wrn-28-2"))
    assert (cfg.model.dropout, cfg.model.activation, train.decay_norms) == (0.0, "leaky_relu", False)
    assert (data.flip, data.crop, train.momentum) == (True, 4, 0.9)
    assert train.weight_decay == (1e-3 if large else 5e-4)
    if cfg.method.name != "meta_pseudo_labels":
        got = train.batch_size, train.lr, train.cosine, train.ema, cfg.model.bn_momentum
        assert got == (64, 0.03, 7 / 16, 0.999, 0.001)
    cfg.model.name = "wrn-10-1"  # the published network says nothing new, and takes seconds to make
    classes, n = [str(c) for c in range(100 if large else 10)], n_labels + 1000
    pixels, labels = torch.zeros(n, 32, 32, 3, dtype=torch.uint8), torch.arange(n) % len(classes)
    test = pixels[:10], labels[:10]
    made = ImageSet(data.name, classes, pixels, labels, *test, (0.5,) * 3, (0.3,) * 3)
    run = prepare(cfg, made)
    assert run.method.two_views == bool(data.ops)
    sizes = {"labeled": n_labels, "unlabeled": 50_000 - n_labels}
    steps = train.rounds * train.epochs * run.method.lay_out(sizes, train.batch_size).steps
    want = 300_000 if cfg.method.name == "meta_pseudo_labels" else 2**20
    assert abs(steps - want) < 0.003 * want


def test_passes_of_a_method_need_dropout():
    cfg = load(CONFIGS / "digits.yaml", ["method.name=fixmatch", "method.uncertainty=passes"])
    prepare(cfg, load_set("digits", ""))
    cfg = load(CONFIGS / "methods/fixmatch_cifar10_4000.yaml", ["method.uncertainty=passes"])
    cfg.data.n_labels, cfg.train.batch_size = 40, 32
    with pytest.raises(ValueError, match=r"^method\.uncertainty=passes needs model\.dropout above 0, got 0"):
        prepare(cfg, load_set("digits", ""))


# What nobody should write --------------------------------------------------------------------------


def test_whatever_is_in_a_config_it_loads_or_is_one_sentence(tmp_path):
    """The first hundreds of tests/fuzz_config.py, which tries any number of them."""
    for content, words in itertools.islice(fuzz_config.cases(seed=0), 0, 1300, 2):
        assert fuzz_config.fault(tmp_path / "fuzz.yaml", content, words) == "", (content[:200], words)


def test_a_config_may_come_through_a_pipe(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=("data: {n_labels: 40}\n",))
    writer.start()
    assert load(path).data.n_labels == 40
    writer.join()


def test_a_config_without_end_is_refused(write):
    assert "at most 1,048,576 bytes" in refusal(Path("/dev/zero"))
    assert "at most 1,048,576 bytes" in refusal(write("# x\n" * 300_000))


def test_aliases_of_single_values_stand_for_them(write):
    cfg = load(write("data: {n_labels: &n 40}\nseed: *n\n"))
    assert cfg.seed == 40
    assert "an alias must stand for a single value, got *t" in refusal(
        write("train: &t {lr: 1}\nselect: *t\n")
    )


def test_the_limits_of_self_training_are_in_its_config(tmp_path):
    """So that the run, predict and the report label by one rule."""
    (tmp_path / "c.yaml").write_text("data: {n_labels: 40}\nmethod: {name: self_training}\n")
    select = load(tmp_path / "c.yaml").select
    assert (select.tau_p, select.tau_n, select.kappa_p, select.kappa_n) == (0.7, 0.0, math.inf, math.inf)
    select = load(tmp_path / "c.yaml", ["method.schedule=curriculum", "select.tau_p=0.9"]).select
    assert select.tau_p == 0.0
    assert load(tmp_path / "c.yaml", ["method.name=fixmatch"]).select.kappa_p == 0.05


@pytest.mark.parametrize("schedule", ["threshold", "curriculum"])
@pytest.mark.parametrize("word", ["tau_p=7", "tau_n=-1", "kappa_p=-1", "kappa_n=nan"])
def test_a_limit_that_self_training_ignores_must_be_legal_too(base, word, schedule):
    sentence = refusal(base, f"select.{word}", "method.name=self_training", f"method.schedule={schedule}")
    assert sentence.startswith(f"select.{word.partition('=')[0]} must be ")


def test_the_method_of_a_word_takes_the_place_of_the_file_s(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("data: {n_labels: 40}\nmethod: {name: fixmatch}\n")
    for words in itertools.permutations(["method.temperature=0.5", "method.name=uda"]):
        assert load(file, words).method.temperature == 0.5
    file.write_text("data: {n_labels: 40}\nmethod: {name: nonsense}\n")
    assert load(file, ["method.name=uda"]).method.name == "uda"
    for text in ("{name: fixmatch, tau: 0.9}", "{tau: 0.9, name: fixmatch}"):
        file.write_text(f"data: {{n_labels: 40}}\nmethod: {text}\n")
        with pytest.raises(
            ValueError, match=r"unknown key 'method.tau' for method.name=supervised: it belongs to .*fixmatch"
        ):
            load(file, ["method.name=supervised"])


def test_keys_of_round_0_hold_where_rounds_are_trainings_of_their_own():
    words = ["train.warmup_epochs=20", "train.round0_epochs=10"]
    assert load(CONFIGS / "digits.yaml", [*words, "method.name=supervised"]).method.name == "supervised"
    with pytest.raises(ValueError, match="warmup_epochs must not exceed a round's 10 epochs"):
        load(CONFIGS / "digits.yaml", words)


def test_the_source_of_uncertainty_by_itself() -> None:
    def source(**select: object) -> str:
        return config.make(
            {"recipe": "features", "data.name": "features"}
            | {f"select.{key}": each for key, each in select.items()}
        ).select.uncertainty

    assert source() == source(heads=3, passes=3) == "heads"
    assert source(heads=1) == source(heads=1, passes=1) == source(passes=10) == source(passes=1) == "dropout"
    assert source(uncertainty="dropout") == "dropout"
    with pytest.raises(ValueError, match=r"select.uncertainty=heads has one pass for each head"):
        source(uncertainty="heads", passes=10)
