"""The configuration of a run: every key, its default, its range and one sentence about it, in one place.

A run is described by a YAML file and by `key=value` words of the command line. `load` merges them over a recipe of
ups_fast/recipes, if they name one, and over the defaults below, and refuses unknown keys, wrong types and impossible
values, each with one sentence. The same fields print the help.
"""

from __future__ import annotations

import os
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from ups_fast import config_file
from ups_fast.machine import device_parts
from ups_fast.methods import METHODS, Options
from ups_fast.models import KINDS
from ups_fast.models.backbone import VIDEO, VIDEO_NAMES
from ups_fast.models.dropouts import has_maps
from ups_fast.models.mlp import widths_of
from ups_fast.models.options import MOST_FRAMES, ModelConfig
from ups_fast.models.pretrained import LITE
from ups_fast.schema import NOUN, Key, check, hint, interval, key, keys_of, typed
from ups_fast.selection import Thresholds
from ups_fast.words import said, shown

SOURCES = (*KINDS, "augment", "heads")
RECIPES = Path(__file__).parent / "recipes"
DATA_SETS = (
    *("digits", "mosaics", "moving_digits", "cifar10", "cifar100", "svhn", "fashion_mnist"),
    *("voc2007", "voc2012", "ucf101", "npz", "features", "folder"),
)
OF_CLIPS = ("npz", "folder", "moving_digits", "ucf101")  # data sets that are, or may be, of clips


@dataclass
class DataConfig:
    name: str = key(
        "digits",
        "Which data set; folder means your own image files, npz your own arrays of images, features your own rows of "
        "numbers.",
        choices=DATA_SETS,
    )
    root: str = key(
        "data",
        "Where the data set is, or where to download it; ucf101 must be there. For npz the .npz file, for features an "
        ".npz, .npy or .parquet file, for folder a folder or a CSV file.",
    )
    n_labels: int = key(
        0,
        "Number of labeled images to draw, equally many of each class. 0 for folder, npz and features, whose files "
        "decide.",
        within="[0, inf]",
    )
    size: int = key(
        0,
        "For folder, voc and ucf101: the shorter side is scaled to this length and the middle of the longer one is "
        "kept. Else 0.",
        within="[0, 4096]",
    )
    channels: int = key(3, "For folder and ucf101: 3 for color, 1 for gray.", within="[1, 3]")
    frames: int = key(
        0,
        "For clips: how many frames the network gets. Training draws where they start, all else reads the middle of "
        "the clip. 0: as many as there are, and of a folder its images. Else its video files are read.",
        within=f"[0, {MOST_FRAMES}]",
    )
    stride: int = key(1, "For clips: of so many frames the network gets one.", within="[1, 1000]")
    test_share: float = key(
        0.2,
        "For folder and features without a test part: the share of labeled images that is held out to test.",
        within="(0, 1)",
    )
    val_share: float = key(
        0.0,
        "The share of labeled images that is held out to validate. The best network is the one that does best on "
        "them. 0: none, unless the data have a validation part of their own.",
        within="[0, 1)",
    )
    loader: str = key(
        "auto",
        "Where images live. resident: all in memory, on the device. dali, plain: in their files, decoded batch by "
        "batch by NVIDIA DALI or Pillow. auto: in memory if they fit into half of it.",
        choices=("auto", "resident", "dali", "plain"),
    )
    resized_crop: float = key(
        0.0,
        "For folder: train on random parts of the images, each at least this share of the area. Reads from files. 0 "
        "is off.",
        within="[0, 1]",
    )
    flip: bool = key(False, "Mirrors half of the training images left to right.")
    crop: int = key(
        0,
        "Shifts images at random by up to this many pixels. Mirrored pixels fill the gap. 0 is off.",
        within="[0, 2047]",
    )
    ops: str = key(
        "",
        "RandAugment's operations: published, ups (the same, but never a black image), or your own, each with the "
        "values to draw from: 'TranslateX -1 0 1, Rotate -9 9'. Empty is off.",
    )
    n_ops: int = key(3, "Number of operations of data.ops that each training image gets.", within="[0, 64]")
    jitter: float = key(
        0.0, "Scales brightness, contrast and saturation by factors of 1 - this to 1 + this.", within="[0, 1]"
    )
    cutout: int = key(
        0, "Blanks out a square of at most this side in each training image. 0 is off.", within="[0, 2048]"
    )
    noise: float = key(
        0.0,
        "For features: standard deviation of the Gaussian noise on standardized training rows. 0 is off.",
        within="[0, 100]",
    )
    drop_columns: float = key(
        0.0, "For features: the share of the columns that each training row lacks. 0 is off.", within="[0, 1)"
    )
    views: int = key(
        1,
        "With model.freeze, features of so many views of each training image are kept: the image itself and augmented "
        "ones. Each epoch draws one of them.",
        within="[1, 64]",
    )
    cache: str = key(
        "~/.cache/ups_fast",
        "With model.freeze, the folder that keeps features for later runs. It may be deleted. Empty: none is kept.",
    )


@dataclass
class TrainConfig:
    rounds: int = key(6, "Number of rounds. Round 0 trains on the labeled images alone.", within="[1, 10000]")
    epochs: int = key(30, "Epochs in each round.", within="[1, 1000000]")
    batch_size: int = key(128, "Images in a batch.", within="[1, 1000000]")
    round0_epochs: int = key(0, "Epochs in round 0. 0: train.epochs.", within="[0, 1000000]")
    round0_batch_size: int = key(
        0, "Images in a batch of round 0. 0: train.batch_size.", within="[0, 1000000]"
    )
    min_steps: int = key(
        0,
        "Steps of a round at least. Where its lists are short, an epoch passes over them several times.",
        within="[0, 1000000000]",
    )
    lr: float = key(0.03, "Highest learning rate of the cosine schedule.", within="(0, 1000]")
    later_rounds_lr: float = key(
        0.0,
        "Highest learning rate of later rounds. Give a lower one with train.warm_start. 0: train.lr.",
        within="[0, 1000]",
    )
    optimizer: str = key(
        "sgd",
        "SGD with Nesterov momentum, as published, or AdamW, which minds no scale of the features and wants a "
        "train.lr near 0.001.",
        choices=("sgd", "adamw"),
    )
    momentum: float = key(0.9, "Nesterov momentum of SGD, or the first beta of AdamW.", within="[0, 1)")
    weight_decay: float = key(5e-4, "Weight decay of SGD. The published runs have 0.", within="[0, inf)")
    decay_norms: bool = key(
        True, "Whether weight decay acts on biases and normalization, too. The FixMatch family has false."
    )
    ema: float = key(
        0.0,
        "Decay of an average of the weights over the steps, such as 0.999. The average is then tested, labels and is "
        "saved. 0: none.",
        within="[0, 1)",
    )
    cosine: float = key(
        7 / 16,
        "The rate is lr * cos(cosine * pi * t), where t goes from 0 to 1 in a round. 0.4375 (published) decays to 19.5 "
        "% of lr, 0.5 to 0.",
        within="(0, 0.5]",
    )
    warm_start: bool = key(
        False,
        "Later rounds go on from the last weights. In the published method each round starts from new ones.",
    )
    labeled_repeats: int = key(
        1,
        "How often each labeled image occurs among the positives of later rounds. Published: 1.",
        within="[1, 1000]",
    )
    warmup_epochs: float = key(0.0, "Epochs over which the learning rate rises from 0.", within="[0, inf)")
    sync_bn: bool = key(
        False,
        "Whether batch-norm sees the whole batch where several processes share it. Else each sees its own part.",
    )


@dataclass
class RuntimeConfig:
    step: str = key(
        "auto",
        "How a training step runs. eager: op by op. compile: by torch.compile, which first takes a minute. graph: "
        "compiled, as one CUDA graph. auto: graph on a GPU, eager on a CPU, and it says why.",
        choices=("auto", "eager", "compile", "graph"),
    )
    precision: str = key(
        "auto",
        "Precision of convolutions and matrix products in training, and of features by model.freeze on a GPU. auto: "
        "bfloat16 where the device has it. Labeling always runs in float32.",
        choices=("auto", "float32", "bfloat16"),
    )
    timeout: float = key(
        600.0,
        "Seconds after which a run of several processes ends because one of them does not answer.",
        within="[1, 1000000]",
    )


@dataclass
class SelectConfig:
    tau_p: float = key(0.70, "A positive label has at least this mean probability.", within="[0, 1]")
    tau_n: float = key(
        0.05, "A negative class has less than this mean probability, at select.temp_nl.", within="[0, 1]"
    )
    kappa_p: float = key(
        0.05, "A positive label has less than this standard deviation over the passes.", within="[0, inf]"
    )
    kappa_n: float = key(
        0.005,
        "A negative class has less than this standard deviation over the passes, at select.temp_nl.",
        within="[0, inf]",
    )
    temp_nl: float = key(
        2.0,
        "Softmax temperature of the probabilities that decide on negative classes.",
        within="[0.001, 1000]",
    )
    uncertainty: str = key(
        "dropout",
        "Why the passes over an image differ. dropout: of elements. spatial, dropblock: of channels, or of squares in "
        "them, in training too. augment: no dropout, but mirrored and shifted images, or noise on features. heads: no "
        "dropout, each pass is another head's. auto: heads if there are as many passes as heads, else dropout.",
        choices=(*SOURCES, "auto"),
    )
    passes: int = key(
        10,
        "Passes over each image. 1 turns uncertainty off: confidence alone decides.",
        within="[1, 10000]",
    )
    mc_layers: int = key(
        0,
        "Number of dropout layers that act in labeling, counted from the last. Few are cheaper, but not the published "
        "method. 0: all.",
        within="[0, 1000]",
    )
    heads: int = key(
        1,
        "That many networks with other initial weights are trained side by side, and the passes are spread over them. "
        "On features, frozen ones too, they are cheap: one batched product.",
        within="[1, 1000]",
    )
    weight: str = key(
        "none",
        "How much each pseudo-label of several labels counts. none: all alike. measured: as much as the share that is "
        "right of the validation labels of like confidence and standard deviation.",
        choices=("none", "measured"),
    )
    balance_rounds: int = key(
        0, "Number of first rounds that keep equal numbers of positives per class.", within="[0, inf]"
    )
    batch_size: int = key(
        0,
        "Rows in a labeling batch: images times passes. Changes memory and speed, not the method. 0: by device and "
        "image size, 96 on a CPU and 8192 on a GPU for 32x32.",
        within="[0, 1000000]",
    )


@dataclass
class ReportConfig:
    baselines: bool = key(
        True,
        "Whether the report compares the run with logistic regression, label spreading and self-training on the same "
        "labels and features.",
    )
    review: bool = key(
        True,
        "Whether the run writes next_to_label.csv, samples that are worth a person's label, suspects.csv, given labels "
        "that look wrong, and how unfamiliar each unlabeled sample is.",
    )


@dataclass
class Config:
    recipe: str = key(
        "none",
        "Settings to start from, which the file then changes. none: the defaults. paper: the published ones of UPS. "
        "fixmatch: those of FixMatch and its relatives. fast: ours for small budgets. features: ours for features.",
        choices=("none", "paper", "fast", "fixmatch", "features"),
    )
    seed: int = key(0, "All randomness of the run derives from this number.", within="[0, inf]")
    run_dir: str = key("", "Folder for all files of the run. Empty: runs/<name of the config file>.")
    device: str = key(
        "auto", "Where to compute: auto, cpu, cuda or cuda:N. auto takes a GPU if there is one."
    )
    threads: int = key(
        0,
        "CPU threads. 0: torch decides. For tiny images 1 is often fastest.",
        within="[0, 1024]",
    )
    checkpoint_seconds: float = key(
        30.0,
        "Seconds between saves: a killed run repeats at most this much training. 0 saves after every step.",
        within="[0, inf)",
    )
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    method: Options = field(default_factory=METHODS["ups"].Options)  # those of method.name
    select: SelectConfig = field(default_factory=SelectConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    @property
    def noun(self) -> str:
        """What a sentence calls a sample of the run: "image", "clip" or "row".

        >>> Config(data=DataConfig(name="features")).noun
        'row'
        """
        clips = self.model.name.startswith(("conv2plus1d-", f"{VIDEO}:")) or self.model.name in VIDEO_NAMES
        return "row" if self.data.name == "features" else "clip" if clips else "image"


_GROUPS: dict[str, type] = {
    "data": DataConfig,
    "model": ModelConfig,
    "train": TrainConfig,
    "runtime": RuntimeConfig,
    "method": Options,
    "select": SelectConfig,
    "report": ReportConfig,
}


def _keys(cls: type, prefix: str) -> Iterator[Key]:
    for each in keys_of(cls, prefix):
        yield replace(each, choices=tuple(METHODS)) if each.name == "method.name" else each


# The keys of every run; those of its method are beside them in `keys`.
KEYS: dict[str, Key] = {
    each.name: each
    for prefix, cls in [("", Config)] + [(f"{group}.", cls) for group, cls in _GROUPS.items()]
    for each in _keys(cls, prefix)
}
METHOD_KEYS = {
    name: {each.name: each for each in _keys(method.Options, "method.")} for name, method in METHODS.items()
}
# Old names, which work for one release.
RENAMED = {
    "engine.step": "runtime.step",
    "engine.precision": "runtime.precision",
    "train.first_epochs": "train.round0_epochs",
    "train.first_batch_size": "train.round0_batch_size",
    "train.later_lr": "train.later_rounds_lr",
    "train.repeat_labels": "train.labeled_repeats",
    "select.dropouts": "select.mc_layers",
}


def keys(cfg: Config) -> dict[str, Key]:
    """All keys of a run, its method's among them."""
    return KEYS | METHOD_KEYS[cfg.method.name]


def load(path: str | Path, overrides: Sequence[str] = (), tree: Mapping[str, Any] | None = None) -> Config:
    """Merge a recipe, the YAML file `path` and the words `overrides` ("key=value") over the defaults, and validate.

    An empty `run_dir` becomes runs/<stem of the file>. Values stand for themselves: references such as
    ${oc.env:HOME} are refused, so that a file means the same everywhere.
    An ~ or ~user at the start of a path stands for that home folder.
    `tree` is what the file holds, as `config_file.read` gives it, where it has been read before.
    Raises ValueError or FileNotFoundError with one sentence that names the key.
    """
    path = Path(os.path.expanduser(path))
    words = dict(parse_word(word) for word in overrides)
    if "method.name" in words:
        _check_method(words["method.name"])
    try:
        cfg = _begun(_read(path) if tree is None else _flat(tree), words)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    cfg = _finished(cfg, words)
    cfg.run_dir = cfg.run_dir or str(Path("runs") / path.stem)
    return cfg


def make(values: Mapping[str, Any]) -> Config:
    """The same from plain values by their keys, such as {"train.rounds": 3}. An empty `run_dir` stays: no folder."""
    values = dict(values)
    return _finished(_begun({}, values), values)


def _begun(given: dict[str, Any], words: dict[str, Any]) -> Config:
    """The defaults, the recipe and the values of the file. Method and recipe may be those of `words`."""
    cfg = Config()
    name = words.pop("method.name", None) or _check_method(given.get("method.name", "ups"))
    cfg.method = METHODS[_check_method(name)].Options(name)
    given.pop("method.name", None)
    recipe = words.get("recipe", given.get("recipe"))
    if recipe in KEYS["recipe"].choices[1:]:
        _merge(cfg, _read(RECIPES / f"{recipe}.yaml"))
    _merge(cfg, given)
    return cfg


def _finished(cfg: Config, words: Mapping[str, Any]) -> Config:
    _merge(cfg, words)
    _check_values(cfg)  # those that the limits below take the place of, too
    for each, limit in limits_of(cfg)._asdict().items():  # so that all that reads the config later has them
        setattr(cfg.select, each, limit)
    if cfg.select.uncertainty == "auto":
        cfg.select.uncertainty = "heads" if cfg.select.passes == cfg.select.heads > 1 else "dropout"
    cfg.run_dir = _at_home("run_dir", cfg.run_dir)
    cfg.data.root = _at_home("data.root", cfg.data.root)
    cfg.model.weights = _at_home("model.weights", cfg.model.weights)
    validate(cfg)
    return cfg


def limits_of(cfg: Config) -> Thresholds:
    """The thresholds by which the run labels: those of `select`, as its method changes them."""
    given = Thresholds(*(getattr(cfg.select, name) for name in Thresholds._fields))
    return METHODS[cfg.method.name].limits(cfg.method, given)


def _at_home(key: str, path: str) -> str:
    """The path with the home folder in place of ~ or ~user."""
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise ValueError(
            f"{key} must begin with a home folder that is there, got {said(path)} (for a name with ~ write ./~)"
        )
    return found


def _check_method(name: Any) -> str:
    if not isinstance(name, str) or name not in METHODS:
        near = hint(str(name), METHODS)
        raise ValueError(f"method.name must be one of {', '.join(METHODS)}, got {said(name)}{near}")
    return name


def _check_values(cfg: Config) -> None:
    for name, each in keys(cfg).items():
        check(each, _get(cfg, name))


def validate(cfg: Config) -> None:
    """Raise ValueError with one sentence when a value is impossible, alone or together with another one."""
    _check_method(cfg.method.name)
    _check_values(cfg)
    select, train = cfg.select, cfg.train
    if select.tau_n > select.tau_p:
        raise ValueError(
            f"select.tau_n must not exceed select.tau_p, got tau_n={select.tau_n} and tau_p={select.tau_p}: "
            "else one class could be label and negative class at once"
        )
    if select.passes > 1 and select.passes % select.heads:
        raise ValueError(
            f"select.passes must be a multiple of select.heads={select.heads}, got {select.passes}"
        )
    _validate_uncertainty(cfg)
    drops = select.uncertainty in KINDS
    if drops and select.passes > 1 and select.heads == 1 and cfg.model.dropout == 0:
        raise ValueError(
            f"select.passes={select.passes} needs model.dropout above 0, got 0: without it all passes are "
            "equal (to do without uncertainty set select.passes=1)"
        )
    apart = train.round0_epochs and not METHODS[cfg.method.name].continues
    shortest = min(train.epochs, train.round0_epochs if apart else train.epochs)
    if train.warmup_epochs > shortest:
        raise ValueError(
            f"train.warmup_epochs must not exceed a round's {shortest} epochs, got {train.warmup_epochs}"
        )
    data = cfg.data
    own = ("npz", "features", "folder")
    if data.name in own and data.n_labels:
        raise ValueError(
            f"data.n_labels must be 0 for {data.name}, where the files say what is labeled, got {data.n_labels}"
        )
    if data.name not in own and not data.n_labels:
        raise ValueError(f"data.n_labels must say how many images of {data.name} are labeled, got 0")
    _validate_freeze(cfg)
    features = (
        "data.name=features" if data.name == "features" else "model.freeze=true" if cfg.model.freeze else ""
    )
    if (data.noise or data.drop_columns) and not features:
        raise ValueError(
            "data.noise and data.drop_columns are for data.name=features and model.freeze=true, got "
            f"{data.noise} and {data.drop_columns}"
        )
    if features:
        done = ("flip", "crop", "ops", "jitter", "cutout", "resized_crop")
        image = [f"data.{each}={getattr(data, each)}" for each in done if getattr(data, each)]
        if image and data.views == 1:
            views = ", and data.views=4 is for augmented images" if cfg.model.freeze else ""
            raise ValueError(
                f"{image[0]} is for images that a network is trained on, got {features}: data.noise is for features"
                f"{views}"
            )
    if data.channels == 2:
        raise ValueError("data.channels must be 1 or 3, got 2")
    files = data.name in ("folder", "voc2007", "voc2012")
    if data.resized_crop and (not files or data.loader == "resident"):
        raise ValueError(
            f"data.resized_crop is for images that are read from a folder's files, got {data.resized_crop} with "
            f"data.name={data.name} and data.loader={data.loader}"
        )
    scaled = files or data.name == "ucf101"
    if scaled and not data.size:
        raise ValueError(
            f"data.size must say to which side the {'clips' if data.frames else 'images'} of a {data.name} are scaled, "
            "such as 64, got 0"
        )
    if not scaled and data.size:
        raise ValueError(
            f"data.size is for data.name=folder, images of {data.name} keep theirs, got {data.size}"
        )
    _validate_clips(cfg)
    device_parts(cfg.device)


def _validate_uncertainty(cfg: Config) -> None:
    select, source = cfg.select, f"select.uncertainty={cfg.select.uncertainty}"
    if select.uncertainty == "dropout":
        return
    if select.uncertainty in KINDS:
        if cfg.data.name == "features" or not has_maps(cfg.model.name):
            raise ValueError(
                f"{source} drops parts of feature maps, which model.name=wrn-DEPTH-WIDTH, cnn13, shake-26-2x96d and "
                "resnext-29-8x64d have, got "
                f"{said(cfg.model.name)}: use dropout, heads or augment"
            )
        if not cfg.model.dropout:
            raise ValueError(f"{source} needs model.dropout above 0, got 0")
        return
    if select.mc_layers:
        raise ValueError(
            f"{source} labels without dropout: set select.mc_layers=0, or select.uncertainty=dropout, got "
            f"select.mc_layers={select.mc_layers}"
        )
    if select.uncertainty == "heads":
        if select.heads == 1:
            raise ValueError(f"{source} needs select.heads above 1, got 1")
        if select.passes != select.heads:
            raise ValueError(
                f"{source} has one pass for each head: set select.passes={select.heads}, got {select.passes}"
            )
        return
    if select.passes == 1:
        raise ValueError(f"{source} needs select.passes above 1, got 1")
    rows = cfg.data.name == "features" or cfg.model.freeze
    if rows and not cfg.data.noise and not cfg.data.drop_columns:
        raise ValueError(
            f"{source} changes features by data.noise and data.drop_columns, but both are 0: set one of them"
        )


def _validate_clips(cfg: Config) -> None:
    data = cfg.data
    if data.name not in OF_CLIPS and (data.frames or data.stride > 1):
        raise ValueError(
            f"data.frames and data.stride are for clips, got {data.frames} and {data.stride} for data.name={data.name}"
        )
    if data.frames == 1:
        raise ValueError("data.frames must be at least 2, or 0 for as many as there are, got 1")
    if data.name == "ucf101" and not data.frames:
        raise ValueError(
            "data.frames must say how many frames of each clip the network gets, such as 16, got 0"
        )
    if data.name == "folder" and data.stride > 1 and not data.frames:
        raise ValueError(f"data.stride={data.stride} is for clips: say how many frames by data.frames, got 0")
    if data.frames and data.resized_crop:
        raise ValueError(
            f"data.resized_crop is for images, got {data.resized_crop} with data.frames={data.frames}"
        )
    if data.frames and data.loader in ("dali", "plain"):
        raise ValueError(f"data.loader={data.loader} is for images, and clips live in memory: use auto")


def _validate_freeze(cfg: Config) -> None:
    model, data = cfg.model, cfg.data
    if data.views > 1 and not model.freeze:
        raise ValueError(
            f"data.views is for model.freeze=true, got {data.views}: other networks get new views in every epoch"
        )
    if data.views > 1 and not (
        (data.ops and data.n_ops) or data.flip or data.crop or data.jitter or data.cutout or data.resized_crop
    ):
        raise ValueError(
            f"data.views={data.views} needs views that differ, but data.flip, crop, ops, jitter, cutout and "
            "resized_crop change nothing: set one of them, such as data.flip=true"
        )
    if model.name in LITE and model.weights:
        raise ValueError(
            f"model.weights must be empty for {model.name}, which has its own, got {said(model.weights)}"
        )
    if not model.freeze:
        if model.input_size:
            raise ValueError(f"model.input_size is for model.freeze=true, got {model.input_size}")
        return
    if model.name not in LITE and not model.name.startswith(("torchvision:", "timm:")):
        raise ValueError(
            f"model.freeze=true needs a pretrained network on images, model.name=lite0, torchvision:NAME or timm:NAME, "
            f"got {said(model.name)}"
        )
    if cfg.data.name == "features":
        raise ValueError(
            "model.freeze=true makes features of images, got data.name=features, which are some already"
        )
    if model.name not in LITE and not model.weights:
        raise ValueError(
            "model.freeze=true needs pretrained weights: name their file by model.weights, or set model.name=lite0"
        )
    if widths_of(model.head) is None:
        raise ValueError(f"model.head must be linear or mlp-WIDTH, such as mlp-256, got {said(model.head)}")


def help_text(width: int = 80) -> str:
    """Every key with its default, its sentence and its legal values, in groups, and then those of each method."""
    lines: list[str] = []
    for group in ("", *_GROUPS):
        lines.append(f"{group or 'the run'}:")
        lines += _key_lines((each for each in KEYS.values() if each.name.rpartition(".")[0] == group), width)
        lines.append("")
    for name, found in METHOD_KEYS.items():
        if own := [each for each in found.values() if each.name not in KEYS]:
            lines += [f"method.name={name}:", *_key_lines(own, width), ""]
    return "\n".join(lines[:-1])


def _key_lines(found: Iterable[Key], width: int) -> Iterator[str]:
    indent = " " * 6
    for each in found:
        default = str(each.default).lower() if each.type is bool else each.default
        legal = " | ".join(each.choices) or f"{NOUN[each.type]} {interval(each.within)}".strip()
        yield f"  {each.name}={default}"
        yield from textwrap.wrap(
            f"{each.help} [{legal}]",
            width,
            initial_indent=indent,
            subsequent_indent=indent,
            break_on_hyphens=False,  # many names have them
        )


def _read(path: Path) -> dict[str, Any]:
    return _flat(config_file.read(path))


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What a YAML file holds as {dotted key: value}."""
    flat: dict[str, Any] = {}
    for name, value in flatten(tree):
        if name in flat:
            raise ValueError(f"{shown(name)} is given twice")
        flat[name] = value
    return flat


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys in groups, as a file may have them, as (dotted key, value)."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in (*_GROUPS, "engine") and isinstance(value, Mapping):
            yield from flatten(value, f"{key}.")
        elif (
            key not in (*_GROUPS, "engine") or value is not None
        ):  # "train:" with nothing under it changes nothing
            yield key, value


def parse_word(word: str) -> tuple[str, Any]:
    """One "key=value" word of the command line."""
    name, equals, raw = word.partition("=")
    if not equals:
        raise ValueError(f"expected key=value, got {said(word)}{hint(name, KEYS)}")
    if any(found[name].type is str for found in (KEYS, *METHOD_KEYS.values()) if name in found):
        return name, raw  # text stands as it was typed: run_dir=010 is not the number 8
    try:
        return name, config_file.parse(raw)
    except yaml.YAMLError:
        return name, raw  # the check of the type says what is wrong with it
    except ValueError as error:
        raise ValueError(f"{shown(name)}: {error}") from None


def _renamed(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The keys by their names of today; each old name is said in a warning."""
    for name, value in values.items():
        new = RENAMED.get(name)
        if new in values:
            raise ValueError(f"{new} is given twice, once by its old name {name}")
        if new:
            warnings.warn(
                f"{name} is now {new}: the old name works for one release", FutureWarning, stacklevel=4
            )
        yield new or name, value


def _merge(cfg: Config, values: Mapping[str, Any]) -> None:
    for name, value in _renamed(values):
        if name in _GROUPS:
            member = next(key for key in KEYS if key.startswith(f"{name}."))
            raise ValueError(
                f"{name} is a group of keys, such as {member}, and has no value itself, got {said(value)}"
            )
        known = keys(cfg)
        if name not in known:
            raise ValueError(f"unknown key {said(name)}{_whose(cfg, name) or hint(name, [*known, *_GROUPS])}")
        kind = known[name].type
        if isinstance(value, str) and "\0" in value:
            raise ValueError(f"{name} must not hold a NUL character, got {said(value)}")
        if isinstance(value, str) and ("${" in value or value == "???"):
            raise ValueError(
                f"{name} must be {NOUN[kind]} itself and not a reference to it, got {said(value)}"
            )
        try:
            plain = typed(kind, value)
        except (ValueError, OverflowError):
            got = "nothing" if value is None else said(value)
            raise ValueError(f"{name} must be {NOUN[kind]}, got {got}") from None
        group, _, last = name.rpartition(".")
        setattr(getattr(cfg, group) if group else cfg, last, plain)


def _whose(cfg: Config, name: str) -> str:
    """Which methods have a key that that of `cfg` lacks."""
    names = [method for method, found in METHOD_KEYS.items() if name in found]
    return f" for method.name={cfg.method.name}: it belongs to {', '.join(names)}" if names else ""


def _get(cfg: Config, name: str) -> Any:
    group, _, last = name.rpartition(".")
    return getattr(getattr(cfg, group) if group else cfg, last)
