"""From the config to the data of a run: the images, their split, and what is done to them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from ups_fast.checkpoint import READABLE
from ups_fast.config import Config
from ups_fast.data import (
    Damaged,
    Folder,
    Images,
    ImageSet,
    Listing,
    Noise,
    ResidentClips,
    ResidentFeatures,
    ResidentImages,
    as_file_set,
    as_image_set,
    check,
    file_images,
    listing,
    load_set,
    scan,
    split_label_sets,
    stratified_split,
)
from ups_fast.data.clips import framed
from ups_fast.data.equal import notes_on_equal_arrays
from ups_fast.data.fingerprint import array_record
from ups_fast.data.folder import CLIPS, Wanted
from ups_fast.data.folder import IMAGES as PICTURES
from ups_fast.data.manifest import Changed, Manifest, compare, take
from ups_fast.data.ucf101 import ucf101
from ups_fast.data.video import Clip, check_installed, clip_of
from ups_fast.data.voc import VOC, voc
from ups_fast.display import progress_bar
from ups_fast.files import home, read_bytes, write_arrays, write_atomic
from ups_fast.machine import memory_bytes
from ups_fast.policy import Policy, parse_ops, weak_policy
from ups_fast.seeds import derive, frozen_random
from ups_fast.words import many

PUBLISHED = (*VOC, "ucf101")  # data sets of files that are not compared at every start
FILES = "files.json"  # in a run's folder: which files it is about
IMAGES = "images.npz"  # or else: a hash and a label of each image
FEW_TESTS = 100  # of them accuracy or mAP is a rough guess


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
    if cfg.data.name not in ("folder", *PUBLISHED):
        data = load_set(cfg.data.name, cfg.data.root, test_share=cfg.data.test_share, seed=cfg.seed)
        data = framed(data, cfg.data.frames, cfg.data.stride)
        return replace(data, notes=(*data.notes, *notes_on_equal_arrays(data, split_of(cfg, data)[0])))
    size, channels, threads = cfg.data.size, cfg.data.channels, cfg.threads or None
    wanted, clip = _wanted(cfg)
    run_dir, root = Path(cfg.run_dir).resolve(), home(cfg.data.root).resolve()
    if run_dir == root or root in run_dir.parents:
        raise ValueError(
            f"run_dir={cfg.run_dir} must not lie in data.root, where its pictures would become data"
        )
    known = _known_files(cfg) if cfg.data.name == "folder" else None
    with progress_bar(console) as bar:

        def progress(what: str) -> Callable[[int, int], None]:
            task = bar.add_task(what, total=None, now="")
            return lambda done, total: bar.update(task, completed=done, total=total)

        if cfg.data.name in PUBLISHED:
            folder = ucf101(root) if cfg.data.name == "ucf101" else voc(cfg.data.name, root)
        elif known:
            folder, gone = _as_known(cfg, known, progress("comparing files"))
            console.print("the run goes on with the files of its first start")
        else:
            with naming_key("data.root"):
                folder = scan(cfg.data.root, test_share=cfg.data.test_share, seed=cfg.seed, wanted=wanted)
            if (tests := len(folder.test)) < FEW_TESTS:
                rough = f"each of them is {100 / tests:.1f} points of accuracy"
                if folder.label.ndim == 2:
                    rough = "their mAP is a rough guess"
                note = f"only {tests:,} test {wanted.noun}s: {rough}"
                folder = replace(folder, notes=[*folder.notes, note])
        needed = len(folder.paths) * (clip.most if clip else 1) * size * size * channels
        why = _why_not_in_memory(cfg, needed, memory(device) // 2)
        damaged: list[Damaged] = []
        reading = progress(f"reading {wanted.noun}s")
        if why and clip:
            raise ValueError(
                f"clips must be in memory, but {why}: lower data.size or data.frames, or set data.loader=resident"
            )
        if not why:
            more: dict[str, Any] = {"keep": known is not None, "threads": threads, "progress": reading}
            data, _ = as_image_set(folder, size, channels, clip=clip, **more)
            if clip:
                data = framed(data, cfg.data.frames, 1)  # the files were read by data.stride
            console.print(f"all {wanted.noun}s are in memory: {needed / 2**20:,.1f} MiB")
        else:
            if known is None:
                folder, damaged = check(folder, cache=_readable(cfg), threads=threads, progress=reading)
            console.print(f"images stay in their files: {why}")
            data = as_file_set(folder, size, channels, threads=threads)
            data = replace(data, damaged=tuple(each.reason for each in damaged))
        if cfg.data.name in PUBLISHED:
            return replace(data, name=cfg.data.name, labeled=None)  # data.n_labels of them are drawn
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
            known, base, lambda: _listing(cfg), threads=cfg.threads or None, progress=progress
        )
    except Changed as error:
        raise ValueError(
            f"data.root={cfg.data.root} {error}; choose another run_dir for a new run, or put the data back to go on "
            f"with the one in run_dir={cfg.run_dir}"
        ) from error
    return known.folder(found, now.paths, now.note), now.gone


def _wanted(cfg: Config) -> tuple[Wanted, Clip | None]:
    """Which files of a folder are read, and of clips what of each."""
    data = cfg.data
    if not data.frames:
        return PICTURES, None
    with naming_key("data.frames"):
        check_installed()
    return CLIPS, clip_of(data.frames, data.stride, data.size, data.channels)


def _listing(cfg: Config) -> Listing:
    with naming_key("data.root"):
        return listing(cfg.data.root, _wanted(cfg)[0])


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


def files_line(data: ImageSet) -> str:
    """Tells the files of two machines apart: how many of those of the data are here, and a hash of their sizes."""
    sizes = []
    for name in [*(data.names or ()), *(data.test_names or ())]:
        try:
            sizes.append(os.stat(os.path.join(data.root or "", name)).st_size)
        except OSError:
            sizes.append(-1)
    there = sum(size >= 0 for size in sizes)
    digest = hashlib.blake2b(repr(sizes).encode(), digest_size=4).hexdigest()
    return f"a folder with {there:,} of {many(len(sizes), 'file')} (sizes {digest})"


def open_images(
    cfg: Config, data: ImageSet, device: torch.device, policy: Policy, *, test: bool = False
) -> Images:
    """The training or the test part of the data, on the device or in its files."""
    if len(data.shape) == 1:
        rows = data.test_images if test else data.train_images
        return ResidentFeatures(rows, mean=data.mean, std=data.std, device=device)
    common: dict[str, Any] = {"mean": data.mean, "std": data.std, "device": device, "policy": policy}
    images, names, unreadable, lengths = data.train_images, data.names, data.unreadable, data.lengths
    if test:
        lengths = data.test_lengths
        images, names, unreadable = data.test_images, data.test_names, data.test_unreadable
    common["unreadable"] = unreadable
    if len(data.shape) == 4:
        if cfg.data.loader not in ("auto", "resident"):
            raise ValueError(
                f"data.loader={cfg.data.loader} is for images, and clips live in memory: use auto"
            )
        with naming_key("data.crop"):
            return ResidentClips(images, frames=data.shape[1], stride=data.stride, lengths=lengths, **common)
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


def policies_of(cfg: Config, shape: tuple[int, ...]) -> dict[str, Any]:
    """What is done to training images: all that the config says, or in the weak view mirroring and shifts alone.

    Where the config has no shifts, the weak view has those of FixMatch: by up to an eighth of the side. Features have
    noise and augmented views in the strong view, and none in the weak one. "passes" is what labeling sees by
    select.uncertainty=augment: the weak view of images, noise on features.
    """
    data = cfg.data
    if len(shape) == 1:
        noise = Noise(data.noise, data.drop_columns)
        return {"strong": replace(noise, views=data.views), "weak": Noise(), "passes": noise}
    weak = weak_policy(data.flip, data.crop, shape[-2:])
    return {"strong": image_policy(cfg), "weak": weak, "passes": weak}


def image_policy(cfg: Config) -> Policy:
    """All that the config says about the augmentation of images."""
    data = cfg.data
    with naming_key("data.ops"):
        ops = parse_ops(data.ops)
    return Policy(
        ops=ops,
        n_ops=data.n_ops if ops else 0,
        flip=data.flip,
        crop=data.crop,
        jitter=(data.jitter,) * 3,
        cutout=data.cutout,
    )


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


def validates(cfg: Config, device: torch.device, console: Console) -> bool:
    """Whether a run of `cfg` has validation samples. Reads the data, or of a folder only what files there are.

    Raises ValueError with one sentence where there can be none.
    """
    if cfg.data.name != "folder":
        data = load_data(cfg, device, console)
        return len(val_of(cfg, data, split_of(cfg, data)[0])[1]) > 0
    with naming_key("data.root"):
        found = scan(cfg.data.root, test_share=cfg.data.test_share, seed=cfg.seed, wanted=_wanted(cfg)[0])
    return cfg.data.val_share > 0 or len(found.val) > 0


def hold_out(
    labeled: Tensor,  # int64 [L], sample ids
    labels: Tensor,  # int64 [N], or of several int8 [N, C]
    share: float,
    seed: int,
) -> tuple[Tensor, Tensor]:  # int64, ascending: what stays labeled, and the validation part
    """Draws a share of the labeled images of each class, rounded down, but of no class the last one.

    Of several labels each class keeps its share of the images, one at least.
    """
    if not share:
        return labeled, labeled[:0]
    if labels.ndim == 2:
        left = len(labeled) - int(share * len(labeled) + 1e-9)
        if left == len(labeled):
            raise ValueError(
                f"data.val_share={share} of {left} labeled samples is none: raise it, or label more"
            )
        kept, drawn_sets = split_label_sets(labels[labeled], left, seed)
        return labeled[kept], labeled[drawn_sets]
    random = frozen_random(seed)
    drawn = torch.zeros(len(labeled), dtype=torch.bool)
    for c in labels[labeled].unique().tolist():
        members = random.permutation(np.flatnonzero((labels[labeled] == c).numpy()))
        drawn[members[: min(int(share * len(members) + 1e-9), len(members) - 1)]] = True
    if not drawn.any():
        raise ValueError(
            f"data.val_share={share} holds out no sample, because no class has enough labeled ones: raise it, or label "
            "more"
        )
    return labeled[~drawn], labeled[drawn]
