"""From the config to what a run works on: the data, their split, the images, the method and its step."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from ups_fast.checkpoint import READABLE
from ups_fast.config import Config, limits_of
from ups_fast.data import (
    Damaged,
    Folder,
    Images,
    ImageSet,
    Listing,
    ResidentImages,
    as_file_set,
    as_image_set,
    check,
    file_images,
    listing,
    load_set,
    scan,
    stratified_split,
)
from ups_fast.data.equal import notes_on_equal_arrays
from ups_fast.data.fingerprint import array_record, fingerprint
from ups_fast.data.manifest import Changed, Manifest, compare, take
from ups_fast.display import progress_bar
from ups_fast.files import home, read_bytes, write_arrays, write_atomic
from ups_fast.fullgraph import fullgraph
from ups_fast.machine import memory_bytes, pick_device
from ups_fast.methods import METHODS, Method, Setting
from ups_fast.models.saved import rebuild
from ups_fast.policy import POLICIES, Policy, parse_ops
from ups_fast.seeds import derive
from ups_fast.selection import labeling_rows, passes_over, skipped
from ups_fast.state import Checkpoint, Keeps
from ups_fast.step import TrainStep, plan_step

FILES = "files.json"  # in a run's folder: which files it is about
IMAGES = "images.npz"  # or else: a hash and a label of each image
FEW_TESTS = 100  # images: their accuracy is a rough guess


@contextmanager
def naming_key(key: str) -> Iterator[None]:
    """Says which key of the config led to a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def load_data(cfg: Config, device: torch.device, console: Console) -> ImageSet:
    """The data set that the config names; of a folder, whether its images are in memory or stay in files is said.

    A run that goes on takes the files of its first start, and compares them with what the folder or table says now.

    Raises ValueError with one sentence.
    """
    if cfg.data.name != "folder":
        data = load_set(cfg.data.name, cfg.data.root)
        return replace(data, notes=(*data.notes, *notes_on_equal_arrays(data, split_of(cfg, data)[0])))
    size, channels, threads = cfg.data.size, cfg.data.channels, cfg.threads or None
    run_dir, root = Path(cfg.run_dir).resolve(), home(cfg.data.root).resolve()
    if run_dir == root or root in run_dir.parents:
        raise ValueError(
            f"run_dir={cfg.run_dir} must not lie in data.root, where its pictures would become data"
        )
    known = _known_files(cfg)
    with progress_bar(console) as bar:

        def progress(what: str) -> Callable[[int, int], None]:
            task = bar.add_task(what, total=None, now="")
            return lambda done, total: bar.update(task, completed=done, total=total)

        if known:
            folder, gone = _as_known(cfg, known, progress("comparing files"))
            console.print("the run goes on with the files of its first start")
        else:
            with naming_key("data.root"):
                folder = scan(cfg.data.root, test_share=cfg.data.test_share, seed=cfg.seed)
            if (tests := len(folder.test)) < FEW_TESTS:
                note = f"only {tests:,} test images: each of them is {100 / tests:.1f} points of accuracy"
                folder = replace(folder, notes=[*folder.notes, note])
        needed = len(folder.paths) * size * size * channels
        why = _why_not_in_memory(cfg, needed, memory(device) // 2)
        damaged: list[Damaged] = []
        reading = progress("reading images")
        if not why:
            keep = known is not None
            data, _ = as_image_set(folder, size, channels, keep=keep, threads=threads, progress=reading)
            console.print(f"all images are in memory: {needed / 2**20:,.1f} MiB")
        else:
            if known is None:
                folder, damaged = check(folder, cache=_readable(cfg), threads=threads, progress=reading)
            console.print(f"images stay in their files: {why}")
            data = as_file_set(folder, size, channels, threads=threads)
            data = replace(data, damaged=tuple(each.reason for each in damaged))
        if known:
            return _again(data, known, gone)
        listed = replace(folder, notes=list(data.notes))
        return replace(data, manifest=take(listed, data, threads, progress("listing files")))


def _known_files(cfg: Config) -> Manifest | None:
    """The files of the run's first start; None at that start."""
    path = Path(cfg.run_dir) / FILES
    if not os.path.lexists(path):
        return None
    try:
        if not path.is_file():
            raise ValueError("is no file")
        return Manifest.read(read_bytes(path))
    except (ValueError, OSError) as error:
        why = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else error
        raise ValueError(f"{path}, the list of the run's files, {why}; choose another run_dir") from error


def _as_known(cfg: Config, known: Manifest, progress: Callable[[int, int], None]) -> tuple[Folder, list[int]]:
    """The run's files as they are now, and which of them are gone."""
    place = home(cfg.data.root)
    base = place if place.is_dir() else place.parent
    try:
        found, now = compare(
            known, base, lambda: _listing(cfg.data.root), threads=cfg.threads or None, progress=progress
        )
    except Changed as error:
        raise ValueError(
            f"data.root={cfg.data.root} {error}; choose another run_dir for a new run, or put the data back to go on "
            f"with the one in run_dir={cfg.run_dir}"
        ) from error
    return known.folder(found, now.paths, now.note), now.gone


def _listing(root: str) -> Listing:
    with naming_key("data.root"):
        return listing(root)


def _again(data: ImageSet, known: Manifest, gone: list[int]) -> ImageSet:
    """What vanishes after the first start moves no other file, and changes no mean or std."""
    data = replace(data, damaged=tuple(known.damaged), manifest=known)
    if len(known.mean) == len(
        data.mean
    ):  # else data.channels is another, which the comparison of configs says
        data = replace(data, mean=known.mean, std=known.std)
    if not data.in_files:  # what could not be read is known
        return data
    n, why = known.train, {i: f"{known.paths[i]!r} is gone" for i in gone}
    unreadable = {i: each for i, each in why.items() if i < n}
    return replace(
        data, unreadable=unreadable, test_unreadable={i - n: each for i, each in why.items() if i >= n}
    )


def write_files(run_dir: Path, data: ImageSet) -> None:
    """Keeps, at a run's first start, what it compares its data with later."""
    path = run_dir / (FILES if data.manifest else IMAGES)
    if path.exists() or (data.in_files and not data.manifest):
        return
    if data.manifest:
        write_atomic(path, data.manifest.write())
    else:
        write_arrays(path, array_record(data))


def _why_not_in_memory(cfg: Config, needed: int, room: int) -> str:
    if cfg.data.loader in ("dali", "plain"):
        return f"data.loader={cfg.data.loader}"
    if cfg.data.resized_crop:
        return f"data.resized_crop={cfg.data.resized_crop}"
    if cfg.data.loader == "auto" and needed > room:
        return f"they would take {needed / 2**30:.1f} GiB of memory, more than half of what there is"
    return ""


def memory(device: torch.device) -> int:
    """Bytes where images would live."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return memory_bytes()


def _readable(cfg: Config) -> Path | None:
    """Where the run remembers which files are good; nowhere if its folder may be somebody else's."""
    folder = Path(cfg.run_dir)
    return folder / READABLE if not folder.exists() or (folder / READABLE).exists() else None


def open_images(
    cfg: Config, data: ImageSet, device: torch.device, policy: Policy, *, test: bool = False
) -> Images:
    """The training or the test part of the data, on the device or in its files."""
    common: dict[str, Any] = {"mean": data.mean, "std": data.std, "device": device, "policy": policy}
    images, names, unreadable = data.train_images, data.names, data.unreadable
    if test:
        images, names, unreadable = data.test_images, data.test_names, data.test_unreadable
    common["unreadable"] = unreadable
    if not data.in_files and cfg.data.loader in ("auto", "resident"):
        with naming_key("data.crop"):
            return ResidentImages(images, **common)
    _, height, width, channels = images.shape
    if height != width:
        raise ValueError(
            f"data.loader={cfg.data.loader} needs square images, got {height}x{width}: use resident"
        )
    try:
        with naming_key("data.crop"):
            return file_images(
                cfg.data.loader,
                data.root if data.in_files else None,
                names or [] if data.in_files else [],
                size=height,
                channels=channels,
                resized_crop=(cfg.data.resized_crop, 1.0) if cfg.data.resized_crop else None,
                threads=cfg.threads or None,
                images=None if data.in_files else images,
                **common,
            )
    except ImportError as error:
        raise ValueError(f"data.loader={cfg.data.loader}: {error}") from error


def policies_of(cfg: Config, size: tuple[int, int]) -> dict[str, Policy]:
    """What is done to training images: all that the config says, or in the weak view mirroring and shifts alone.

    Where the config has no shifts, the weak view has those of FixMatch: by up to an eighth of the side.
    """
    data = cfg.data
    with naming_key("data.ops"):
        ops = parse_ops(data.ops)
    strong = Policy(
        ops=ops,
        n_ops=data.n_ops if ops else 0,
        flip=data.flip,
        crop=data.crop,
        jitter=(data.jitter,) * 3,
        cutout=data.cutout,
    )
    return {"strong": strong, "weak": Policy(flip=data.flip, crop=data.crop or min(size) // 8)}


def split_of(cfg: Config, data: ImageSet) -> tuple[Tensor, Tensor]:
    """Labeled and unlabeled indices into the training set: the data set's own, or drawn from the seed.

    Validation images are in neither.
    """
    rest = torch.ones(len(data.train_labels), dtype=torch.bool)
    if data.val is not None:
        rest[data.val] = False
    if data.labeled is None:
        index, seed = rest.nonzero()[:, 0], derive(cfg.seed, "split")
        with naming_key("data.n_labels"):
            split = stratified_split(data.train_labels[index], cfg.data.n_labels, len(data.classes), seed)
        return index[split[0]], index[split[1]]
    rest[data.labeled] = False
    return data.labeled, rest.nonzero()[:, 0]


def val_of(cfg: Config, data: ImageSet, labeled: Tensor) -> tuple[Tensor, Tensor]:
    """What stays labeled, and the validation part: the data set's own, or drawn from the labeled images."""
    if data.val is not None and len(data.val):
        if cfg.data.val_share:
            raise ValueError(
                f"data.val_share must be 0 where the data have a validation part of their own, got {cfg.data.val_share}"
            )
        return labeled, data.val
    return hold_out(labeled, data.train_labels, cfg.data.val_share, derive(cfg.seed, "val"))


def hold_out(
    labeled: Tensor,  # int64 [L], sample ids
    labels: Tensor,  # int64 [N]
    share: float,
    seed: int,
) -> tuple[Tensor, Tensor]:  # int64, ascending: what stays labeled, and the validation part
    """Draws a share of the labeled images of each class, rounded down, but of no class the last one."""
    if not share:
        return labeled, labeled[:0]
    random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))
    drawn = torch.zeros(len(labeled), dtype=torch.bool)
    for c in labels[labeled].unique().tolist():
        members = random.permutation(np.flatnonzero((labels[labeled] == c).numpy()))
        drawn[members[: min(int(share * len(members)), len(members) - 1)]] = True
    if not drawn.any():
        raise ValueError(
            f"data.val_share={share} holds out no image, because no class has enough labeled ones: raise it, or label "
            "more images"
        )
    return labeled[~drawn], labeled[drawn]


@dataclass
class Run:
    """All that the rounds work on. What is wrong with config and data has been said before one is made."""

    cfg: Config
    data: ImageSet
    device: torch.device
    about: dict[str, Any]  # what a saved network says of itself
    policies: dict[str, Policy]  # by the views of a method
    images: Images  # the training set
    test_images: Images
    new_method: Callable[[], Method]  # on the host, its weights drawn from torch's generator
    step: TrainStep
    forward: Callable[..., Tensor]  # `passes_over`, perhaps compiled
    state: Checkpoint  # at first that of a new run
    resumed: int = 0  # rounds that the folder held when the run was resumed

    @property
    def method(self) -> Method:
        return self.step.method

    @property
    def folder(self) -> Path:
        return Path(self.cfg.run_dir)

    @property
    def truth(self) -> Tensor:
        """int64 [U], of the unlabeled images, -1 where unknown."""
        return self.data.train_labels[self.state.unlabeled]

    @property
    def keeps(self) -> Keeps:
        goes_on = self.method.continues
        return Keeps(weights=goes_on or self.cfg.train.warm_start, momentum=goes_on)

    def budget(self, round: int) -> tuple[int, int]:
        """Epochs and batch size of a round; round 0 may have its own where each round is a training of its own."""
        train, own = self.cfg.train, round == 0 and not self.method.continues
        return (
            train.round0_epochs if own and train.round0_epochs else train.epochs,
            train.round0_batch_size if own and train.round0_batch_size else train.batch_size,
        )

    def lr(self, round: int) -> tuple[str, float]:
        """The key of the highest learning rate that holds in this round, and its value."""
        train = self.cfg.train
        if round and train.later_rounds_lr and not self.method.continues:
            return "later_rounds_lr", train.later_rounds_lr
        return "lr", train.lr

    def epochs_done(self) -> int:
        """Of the whole run."""
        return sum(self.budget(round)[0] for round in range(self.state.round)) + self.state.epoch

    def labeling_rows(self) -> int:
        _, height, width, _ = self.data.train_images.shape
        return self.cfg.select.batch_size or labeling_rows(self.device, height, width)

    def seed(self, stream: str, *path: int) -> int:
        return derive(self.cfg.seed, stream, self.state.round, *path)

    def stream(self, stream: str, *path: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed(stream, *path))


def prepare(cfg: Config, data: ImageSet) -> Run:
    """Raises ValueError, with the key and one sentence, where config and data cannot work. Writes nothing."""
    device = pick_device(cfg.device)
    _, height, width, channels = data.train_images.shape
    about = {
        "model": asdict(cfg.model),
        "classes": data.classes,
        "channels": channels,
        "size": [height, width],
        "mean": data.mean,
        "std": data.std,
    }
    select, train = cfg.select, cfg.train
    labeled, unlabeled = split_of(cfg, data)
    labeled, val = val_of(cfg, data, labeled)
    with naming_key("model.name"):
        trial = rebuild(about).eval()
    _check_small_batches(cfg, trial, (1, channels, height, width))
    with torch.no_grad():
        features = trial.embed(trial.prefix(torch.zeros(1, channels, height, width)), None).shape[1]
    setting = Setting(
        network=lambda: rebuild(about),
        options=cfg.method,
        select=limits_of(cfg),
        n_images=len(data.train_labels),
        n_unlabeled=len(unlabeled),
        n_classes=len(data.classes),
        batch_size=train.batch_size,
        features=features,
        labeled_repeats=train.labeled_repeats,
        ema=train.ema,
    )
    make = METHODS[cfg.method.name]
    method = make(setting)
    policies = policies_of(cfg, (height, width))
    _check_method(cfg, method, policies, len(labeled), len(unlabeled))
    memory_format: Any = {"memory_format": torch.channels_last}
    method.to(device, **memory_format)
    with naming_key("runtime.step"):
        plan = plan_step(cfg.runtime.step, cfg.runtime.precision, device)
    images = open_images(cfg, data, device, policies["strong"])
    test_images = open_images(cfg, data, device, POLICIES["none"], test=True)
    with naming_key("select.mc_layers"):
        skipped(method.network, select.mc_layers)
    step = TrainStep(
        method,
        images,
        plan,
        momentum=train.momentum,
        weight_decay=train.weight_decay,
        decay_norms=train.decay_norms,
    )
    state = Checkpoint(fingerprint(data, cfg.model.weights), labeled, unlabeled, val)
    forward = passes_over if plan.mode == "eager" else fullgraph(passes_over)
    return Run(
        cfg, data, device, about, policies, images, test_images, lambda: make(setting), step, forward, state
    )


def _check_method(
    cfg: Config, method: Method, policies: Mapping[str, Policy], labeled: int, unlabeled: int
) -> None:
    """ValueError where data, batch and method do not go together."""
    name, train = f"method.name={cfg.method.name}", cfg.train
    if method.two_views and policies["strong"].ops == ():
        raise ValueError(
            f"{name} compares a weak view of each image with a strong one, but data.ops is empty: set data.ops=ups, "
            "and data.cutout to half of the images' side"
        )
    if getattr(method.options, "uncertainty", "off") == "passes" and not cfg.model.dropout:
        raise ValueError(
            "method.uncertainty=passes needs model.dropout above 0, got 0: without it all passes are equal"
        )
    for key in ("batch_size", *(["round0_batch_size"] if train.round0_batch_size else [])):
        with naming_key(f"{name} with train.{key}={getattr(train, key)}"):
            method.check({"labeled": labeled, "unlabeled": unlabeled}, getattr(train, key))


def _check_small_batches(cfg: Config, model: nn.Module, shape: tuple[int, ...]) -> None:
    """ValueError where batch-norm would meet a single value per channel: a batch of one, images down to 1x1."""
    train = cfg.train
    for key, size in (("round0_batch_size", train.round0_batch_size), ("batch_size", train.batch_size)):
        if size != 1:
            continue
        trial = copy.deepcopy(model).train()
        try:
            with torch.no_grad():
                trial(torch.zeros(shape), torch.zeros(1, dtype=torch.int32))
        except ValueError as error:
            raise ValueError(
                f"train.{key}=1 is too small a batch for model.name={cfg.model.name}, whose normalization "
                f"needs more than one value per channel: raise it to 2 or more ({error})"
            ) from error
