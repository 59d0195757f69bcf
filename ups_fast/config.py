"""The configuration of a run: every key, its default, its range and one sentence about it, in one place.

A run is described by a YAML file and by `key=value` words of the command line. `load` merges them over a recipe of
ups_fast/recipes, if they name one, and over the defaults below, and refuses unknown keys, wrong types and impossible
values, each with one sentence. The same fields print the help.
"""

from __future__ import annotations

import difflib
import os
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import yaml  # type: ignore[import-untyped]

from ups_fast import config_file
from ups_fast.words import said, shown

if TYPE_CHECKING:
    import torch

RECIPES = Path(__file__).parent / "recipes"
DATA_SETS = ("digits", "cifar10", "cifar100", "svhn", "fashion_mnist", "npz", "folder")


def _key(default: Any, text: str, *, within: str = "", choices: tuple[str, ...] = ()) -> Any:
    """A field with its sentence and its legal values: an interval such as "[0, 1)", or a list of words."""
    return field(default=default, metadata={"help": text, "within": within, "choices": choices})


@dataclass
class DataConfig:
    name: str = _key(
        "digits", "Which data set; folder means your own image files, npz your own arrays.", choices=DATA_SETS
    )
    root: str = _key(
        "data",
        "Folder of the data set, or where to download it; for npz the .npz file itself, for folder also a CSV file.",
    )
    n_labels: int = _key(
        0,
        "How many labeled images to draw, the same number of each class; 0 for folder and npz.",
        within="[0, inf]",
    )
    size: int = _key(
        0,
        "For folder: the side to which images are scaled, by their shorter side, and cropped; else 0.",
        within="[0, 4096]",
    )
    channels: int = _key(3, "For folder: 3 for color, 1 for gray.", within="[1, 3]")
    test_share: float = _key(
        0.2, "For folder, without test images: the share of labeled ones held out to test.", within="(0, 1)"
    )
    loader: str = _key(
        "auto",
        "Where images come from. resident: all in memory, on the device; dali, plain: from their files batch by batch, "
        "decoded by NVIDIA DALI or by Pillow; auto decides by what fits, and says why.",
        choices=("auto", "resident", "dali", "plain"),
    )
    resized_crop: float = _key(
        0.0,
        "For folder: train on random parts of images, of at least this share of the area, scaled to data.size; 0 is "
        "off. Such images are read from their files.",
        within="[0, 1]",
    )
    flip: bool = _key(False, "Mirror half of the training images left to right.")
    crop: int = _key(0, "Pad by this many mirrored pixels and crop at random; 0 is off.", within="[0, 2047]")
    ops: str = _key(
        "",
        "RandAugment's operations: published, ups (the same, never a black image), or names, each with the values "
        "of which it draws one, such as 'TranslateX -1 0 1, Rotate -9 9'; empty is off.",
    )
    n_ops: int = _key(3, "So many of data.ops are drawn for each training image.", within="[0, 64]")
    jitter: float = _key(
        0.0, "Brightness, contrast and saturation change by factors of up to 1 -+ this.", within="[0, 1]"
    )
    cutout: int = _key(
        0, "Blank out a square of at most this side in each training image; 0 is off.", within="[0, 2048]"
    )


@dataclass
class ModelConfig:
    name: str = _key(
        "wrn-28-2",
        "Network: wrn-DEPTH-WIDTH (depth 10, 16, 22, 28, ...) or cnn13; for real images torchvision:NAME or timm:NAME, "
        "such as torchvision:resnet50.",
    )
    weights: str = _key(
        "",
        "File of pretrained weights, .safetensors or .pth, with which every round of a torchvision or timm network "
        "starts; empty means none.",
    )
    dropout: float = _key(
        0.3, "Dropout rate; dropout is also what makes labeling passes differ.", within="[0, 1)"
    )
    preact: str = _key(
        "fixed",
        "Input of the first convolution of WRN stages 2 and 3: published is the raw one, as in the UPS code, "
        "fixed the activated one.",
        choices=("published", "fixed"),
    )
    activation: str = _key("mish", "Activation of a WRN; cnn13 has its own.", choices=("mish", "leaky_relu"))
    bn_momentum: float = _key(
        0.1,
        "Momentum of batch-norm's statistics; the published WRN has 0.001, too slow for short runs.",
        within="(0, 1]",
    )


@dataclass
class TrainConfig:
    rounds: int = _key(6, "Rounds in all; round 0 learns from the labels alone.", within="[1, 10000]")
    epochs: int = _key(30, "Epochs in each round.", within="[1, 1000000]")
    batch_size: int = _key(128, "Images in a batch.", within="[1, 1000000]")
    first_epochs: int = _key(0, "Epochs in round 0; 0 means as many as train.epochs.", within="[0, 1000000]")
    first_batch_size: int = _key(
        0, "Images in a batch of round 0; 0 means as train.batch_size.", within="[0, 1000000]"
    )
    lr: float = _key(0.03, "Highest learning rate of the cosine schedule.", within="(0, 1000]")
    later_lr: float = _key(
        0.0,
        "Highest learning rate of the rounds after the first, which warm starts want lower; 0 means as train.lr.",
        within="[0, 1000]",
    )
    momentum: float = _key(0.9, "Nesterov momentum of SGD.", within="[0, 1)")
    weight_decay: float = _key(5e-4, "Weight decay of SGD; the published runs have 0.", within="[0, inf)")
    cosine: float = _key(
        7 / 16,
        "The learning rate falls as cos(cosine pi t), t from 0 to 1: published 0.4375, to 0.195 of it; 0.5, to 0.",
        within="(0, 0.5]",
    )
    warm_start: bool = _key(
        False,
        "Rounds after the first go on from the last round's weights; in the published method every round starts anew.",
    )
    repeat_labels: int = _key(
        1,
        "The labeled images come so many times among the positives of later rounds; published 1.",
        within="[1, 1000]",
    )
    warmup_epochs: float = _key(0.0, "Epochs over which the learning rate rises from 0.", within="[0, inf)")


@dataclass
class EngineConfig:
    step: str = _key(
        "auto",
        "The training step: eager; compile, by torch.compile, which takes a minute first; graph, the same and the "
        "whole step as one CUDA graph; auto decides by the device and says why.",
        choices=("auto", "eager", "compile", "graph"),
    )
    precision: str = _key(
        "auto",
        "Of convolutions and products in training; auto takes bfloat16 where the device has it. Labeling is always "
        "in float32.",
        choices=("auto", "float32", "bfloat16"),
    )


@dataclass
class SelectConfig:
    tau_p: float = _key(0.70, "Positive label: mean probability of the class at least this.", within="[0, 1]")
    tau_n: float = _key(0.05, "Negative label: mean probability of the class below this.", within="[0, 1]")
    kappa_p: float = _key(
        0.05, "Positive label: standard deviation over the passes below this.", within="[0, inf]"
    )
    kappa_n: float = _key(
        0.005, "Negative label: standard deviation over the passes below this.", within="[0, inf]"
    )
    temp_nl: float = _key(2.0, "Softmax temperature for negative labels.", within="[0.001, 1000]")
    passes: int = _key(
        10,
        "Passes with dropout over each image; 1 switches uncertainty off, and the kappas are not used.",
        within="[1, 10000]",
    )
    dropouts: int = _key(
        0,
        "Only so many of the network's last dropout layers act in labeling passes: cheaper, and another method than "
        "the published one; 0 means all.",
        within="[0, 1000]",
    )
    balance_rounds: int = _key(
        0, "How many of the first rounds cut their positives to equal numbers per class.", within="[0, inf]"
    )
    batch_size: int = _key(
        0,
        "Rows in a labeling batch, each an image in one pass; affects memory and speed alone. 0 chooses by device and "
        "size: of 32x32 images 512 on a CPU, 8192 on a GPU.",
        within="[0, 1000000]",
    )


@dataclass
class Config:
    recipe: str = _key(
        "none",
        "Settings to start from, before the file's own: paper, the published ones, or fast, ours for small budgets; "
        "none: the defaults.",
        choices=("none", "paper", "fast"),
    )
    seed: int = _key(0, "Number from which all randomness of the run derives.", within="[0, inf]")
    run_dir: str = _key(
        "", "Folder for everything the run writes; empty means runs/<name of the config file>."
    )
    device: str = _key("auto", "Where to compute: auto (cuda if there is one), cpu, cuda or cuda:N.")
    threads: int = _key(
        0,
        "CPU threads; 0 leaves it to torch. Tiny images want 1: more only wait for each other.",
        within="[0, 1024]",
    )
    checkpoint_seconds: float = _key(
        30.0,
        "Save at least this often, so that a killed run goes on; 0 saves after every step.",
        within="[0, inf)",
    )
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    select: SelectConfig = field(default_factory=SelectConfig)


@dataclass(frozen=True)
class Key:
    """What is known about one key, for checks and help."""

    name: str  # dotted, such as "select.tau_p"
    type: type
    default: Any
    help: str
    within: str
    choices: tuple[str, ...]


_GROUPS: dict[str, type] = {
    "data": DataConfig,
    "model": ModelConfig,
    "train": TrainConfig,
    "engine": EngineConfig,
    "select": SelectConfig,
}
_NOUN = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
_BOOL_WORDS = ("true", "false", "yes", "no", "on", "off")


def _keys() -> Iterator[Key]:
    for prefix, cls in [("", Config)] + [(f"{group}.", cls) for group, cls in _GROUPS.items()]:
        types = get_type_hints(cls)
        for item in fields(cls):
            if item.metadata:
                yield Key(prefix + item.name, types[item.name], item.default, **item.metadata)


KEYS: dict[str, Key] = {key.name: key for key in _keys()}


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Merge a recipe, the YAML file `path` and the words `overrides` ("key=value") over the defaults, and validate.

    An empty `run_dir` becomes runs/<stem of the file>. Values stand for themselves: references such as
    ${oc.env:HOME} are refused, so that a file means the same everywhere.
    An ~ or ~user at the start of a path stands for that home folder.
    Raises ValueError or FileNotFoundError with one sentence that names the key.
    """
    path, cfg = Path(os.path.expanduser(path)), Config()
    words = dict(_parse(word) for word in overrides)
    try:
        given = _read(path)
        recipe = words.get("recipe", given.get("recipe"))
        if recipe in KEYS["recipe"].choices[1:]:
            _merge(cfg, _read(RECIPES / f"{recipe}.yaml"))
        _merge(cfg, given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    _merge(cfg, words)
    cfg.run_dir = _at_home("run_dir", cfg.run_dir) or str(Path("runs") / path.stem)
    cfg.data.root = _at_home("data.root", cfg.data.root)
    cfg.model.weights = _at_home("model.weights", cfg.model.weights)
    validate(cfg)
    return cfg


def _at_home(key: str, path: str) -> str:
    """The path with the home folder in place of ~ or ~user."""
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise ValueError(
            f"{key} must begin with a home folder that is there, got {said(path)} (for a name with ~ write ./~)"
        )
    return found


def validate(cfg: Config) -> None:
    """Raise ValueError with one sentence when a value is impossible, alone or together with another one."""
    for name, key in KEYS.items():
        value = _get(cfg, name)
        if key.choices and value not in key.choices:
            raise ValueError(
                f"{name} must be one of {', '.join(key.choices)}, "
                f"got {said(value)}{_hint(value, key.choices)}"
            )
        if key.within and not _inside(value, key.within):
            raise ValueError(f"{name} must be {_words(key.within)}, got {said(value)}")

    select, train = cfg.select, cfg.train
    if select.tau_n > select.tau_p:
        raise ValueError(
            f"select.tau_n must not exceed select.tau_p, got tau_n={select.tau_n} and tau_p={select.tau_p}: "
            "a class would be both likely enough to be the label and unlikely enough not to be"
        )
    if select.passes > 1 and cfg.model.dropout == 0:
        raise ValueError(
            f"select.passes={select.passes} needs model.dropout above 0, got 0: without it all passes are "
            "equal (for no uncertainty set select.passes=1)"
        )
    shortest = min(train.epochs, train.first_epochs or train.epochs)
    if train.warmup_epochs > shortest:
        raise ValueError(
            f"train.warmup_epochs must not exceed a round's {shortest} epochs, got {train.warmup_epochs}"
        )
    data = cfg.data
    if data.name in ("npz", "folder") and data.n_labels:
        raise ValueError(
            f"data.n_labels must be 0 for {data.name}, where the files say what is labeled, got {data.n_labels}"
        )
    if data.name not in ("npz", "folder") and not data.n_labels:
        raise ValueError(f"data.n_labels must say how many images of {data.name} are labeled, got 0")
    if data.channels == 2:
        raise ValueError("data.channels must be 1 or 3, got 2")
    if data.resized_crop and (data.name != "folder" or data.loader == "resident"):
        raise ValueError(
            f"data.resized_crop is for images that are read from a folder's files, got {data.resized_crop} with "
            f"data.name={data.name} and data.loader={data.loader}"
        )
    if data.name == "folder" and not data.size:
        raise ValueError(
            "data.size must say to which side the images of a folder are scaled, such as 64, got 0"
        )
    if data.name != "folder" and data.size:
        raise ValueError(
            f"data.size is for data.name=folder, images of {data.name} keep theirs, got {data.size}"
        )
    _device_parts(cfg.device)


def pick_device(name: str) -> torch.device:
    """The torch device for the value of `device`; ValueError where it is unknown or this machine lacks it."""
    import torch

    kind, index = _device_parts(name)
    count = torch.cuda.device_count()
    if kind == "auto":
        return torch.device("cuda" if count else "cpu")
    if kind == "cuda" and not count:
        why = "sees no GPU" if torch.version.cuda else "was built without CUDA"
        raise ValueError(
            f"device={name} needs a GPU, but this PyTorch ({torch.__version__}) {why}: use device=cpu"
        )
    if index is not None and index >= count:
        raise ValueError(f"device={name} does not exist: this machine has cuda:0 to cuda:{count - 1}")
    return torch.device(name)


def help_text(width: int = 80) -> str:
    """Every key with its default, its sentence and its legal values, in groups."""
    indent = " " * 6
    lines: list[str] = []
    for group in ("", *_GROUPS):
        lines.append(f"{group or 'the run'}:")
        for key in KEYS.values():
            if key.name.rpartition(".")[0] == group:
                default = str(key.default).lower() if key.type is bool else key.default
                legal = " | ".join(key.choices) or f"{_NOUN[key.type]} {_words(key.within)}".strip()
                text = f"{key.help} [{legal}]"
                lines.append(f"  {key.name}={default}")
                lines += textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)
        lines.append("")
    return "\n".join(lines[:-1])


def _read(path: Path) -> dict[str, Any]:
    """The YAML file as {dotted key: value}."""
    flat: dict[str, Any] = {}
    for key, value in _flatten(config_file.read(path)):
        if key in flat:
            raise ValueError(f"{shown(key)} is given twice")
        flat[key] = value
    return flat


def _flatten(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in _GROUPS and isinstance(value, Mapping):
            yield from _flatten(value, f"{key}.")
        elif key not in _GROUPS or value is not None:  # "train:" with nothing under it changes nothing
            yield key, value


def _parse(word: str) -> tuple[str, Any]:
    """One "key=value" word of the command line."""
    name, equals, raw = word.partition("=")
    if not equals:
        raise ValueError(f"expected key=value, got {said(word)}{_hint(name, KEYS)}")
    if name in KEYS and KEYS[name].type is str:
        return name, raw  # text stands as it was typed: run_dir=010 is not the number 8
    try:
        return name, config_file.parse(raw)
    except yaml.YAMLError:
        return name, raw  # the check of the type says what is wrong with it
    except ValueError as error:
        raise ValueError(f"{shown(name)}: {error}") from None


def _merge(cfg: Config, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if name in _GROUPS:
            member = next(key for key in KEYS if key.startswith(f"{name}."))
            raise ValueError(
                f"{name} is a group of keys, such as {member}, and has no value itself, got {said(value)}"
            )
        if name not in KEYS:
            raise ValueError(f"unknown key {said(name)}{_hint(name, [*KEYS, *_GROUPS])}")
        kind = KEYS[name].type
        if isinstance(value, str) and "\0" in value:
            raise ValueError(f"{name} must not hold a NUL character, got {said(value)}")
        if isinstance(value, str) and ("${" in value or value == "???"):
            raise ValueError(
                f"{name} must be {_NOUN[kind]} itself and not a reference to it, got {said(value)}"
            )
        try:
            typed = _typed(kind, value)
        except (ValueError, OverflowError):
            got = "nothing" if value is None else said(value)
            raise ValueError(f"{name} must be {_NOUN[kind]}, got {got}") from None
        group, _, last = name.rpartition(".")
        setattr(getattr(cfg, group) if group else cfg, last, typed)


def _typed(kind: type, value: Any) -> Any:
    """The value as a key of this type takes it: 1 and 0 may be true and false, "3" is 3, but 8 is no text."""
    word = isinstance(value, str)
    if kind is str and word:
        value.encode("utf-8", "surrogateescape")  # ValueError for half a character, as no file's name has it
        return value
    if kind is bool and (isinstance(value, (bool, int, float)) and value in (0, 1)):
        return bool(value)
    if kind is bool and word and value in _BOOL_WORDS:
        return value in ("true", "yes", "on")
    if kind is int and (word or type(value) is int):
        return config_file.integer(value) if word else value
    if kind is float and (word or type(value) in (int, float)):
        return config_file.decimal(value) if word else float(value)
    raise ValueError


def _hint(name: str, valid: Iterable[str]) -> str:
    """ " (did you mean ...?)" for the nearest valid name, or the one whose last part is nearest."""
    names = {key.rpartition(".")[2]: key for key in reversed(list(valid))}
    names |= {key: key for key in valid}
    near = difflib.get_close_matches(name[:100], names, n=1)
    return f" (did you mean {names[near[0]]}?)" if near else ""


def _get(cfg: Config, name: str) -> Any:
    group, _, last = name.rpartition(".")
    return getattr(getattr(cfg, group) if group else cfg, last)


def _inside(value: float, interval: str) -> bool:
    """Whether `value` is in an interval such as "[0, 1)"; NaN is in none."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below


def _words(interval: str) -> str:
    """The interval as people say it: "at least 0", "above 0 and finite", "in [0, 1)"; "" for no interval."""
    if not interval:
        return ""
    low, high = interval[1:-1].split(", ")
    if high != "inf":
        return f"in {interval}"
    return (
        f"{'at least' if interval[0] == '[' else 'above'} {low}{'' if interval[-1] == ']' else ' and finite'}"
    )


def _device_parts(name: str) -> tuple[str, int | None]:
    kind, colon, index = name.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (colon and (kind != "cuda" or not index.isdecimal())):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {said(name)}")
    return kind, int(index) if colon else None
