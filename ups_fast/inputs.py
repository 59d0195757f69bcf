"""From the config to what a run works on: the data set, its split, the images and what is done to them."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from ups_fast.checkpoint import READABLE
from ups_fast.config import Config
from ups_fast.data import (
    FileImages,
    Folder,
    ImageSet,
    ResidentImages,
    as_file_set,
    as_image_set,
    check,
    file_images,
    load_set,
    scan,
    stratified_split,
)
from ups_fast.display import progress_bar
from ups_fast.files import read_bytes, write_atomic
from ups_fast.machine import memory_bytes
from ups_fast.policy import Policy, parse_ops
from ups_fast.seeds import derive

FILES = "files.json"  # in a run's folder: which files it is about
GONE = (-1, -1)  # the stamp of a file that is not there
FEW_TESTS = 100  # images: their accuracy is a rough guess


@contextmanager
def blame(key: str) -> Iterator[None]:
    """Says which key of the config led to a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def load_data(cfg: Config, device: torch.device, console: Console) -> ImageSet:
    """The data set that the config names; of a folder, whether its images are in memory or stay in files is said.

    Raises ValueError with one sentence.
    """
    if cfg.data.name != "folder":
        return load_set(cfg.data.name, cfg.data.root)
    size, channels, threads = cfg.data.size, cfg.data.channels, cfg.threads or None
    home, root = Path(cfg.run_dir).resolve(), Path(cfg.data.root).expanduser().resolve()
    if home == root or root in home.parents:
        raise ValueError(
            f"run_dir={cfg.run_dir} must not lie in data.root, where its pictures would become data"
        )
    known = _known_files(cfg)
    with blame("data.root"):
        folder = known.folder if known else scan(cfg.data.root, test_share=cfg.data.test_share, seed=cfg.seed)
    if known:
        console.print("the run goes on with the files of its first start: new ones are not looked for")
    if (tests := len(folder.test)) < FEW_TESTS and known is None:
        note = f"only {tests:,} test images: one more or less right is {100 / tests:.1f} points of accuracy"
        folder = replace(folder, notes=[*folder.notes, note])
    needed = len(folder.paths) * size * size * channels
    why = _why_not_in_memory(cfg, needed, memory(device) // 2)
    with progress_bar(console) as bar:
        task = bar.add_task("reading images", total=len(folder.paths), now="")

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done)

        if not why:
            keep = known is not None
            data, _ = as_image_set(folder, size, channels, keep=keep, threads=threads, progress=progress)
            console.print(f"all images are in memory: {needed / 2**20:,.1f} MiB")
            return known.again(data) if known else data
        if known is None:
            folder, damaged = check(folder, cache=_readable(cfg), threads=threads, progress=progress)
    console.print(f"images stay in their files: {why}")
    data = as_file_set(folder, size, channels, threads=threads)
    return known.again(data) if known else replace(data, damaged=tuple(each.reason for each in damaged))


class _Known(NamedTuple):
    """A folder as a run first found it. What vanishes later moves no other file, and changes no mean or std."""

    folder: Folder
    mean: tuple[float, ...]
    std: tuple[float, ...]
    damaged: tuple[str, ...]  # sentences of then
    gone: list[int]  # positions in folder.paths

    def again(self, data: ImageSet) -> ImageSet:
        data = replace(data, mean=self.mean, std=self.std, damaged=self.damaged)
        if not data.in_files:  # what could not be read is known
            return data
        n, why = len(data.names or ()), {i: f"{self.folder.paths[i]!r} is gone" for i in self.gone}
        lost = {i: each for i, each in why.items() if i < n}
        return replace(data, lost=lost, test_lost={i - n: each for i, each in why.items() if i >= n})


def write_files(run_dir: Path, data: ImageSet) -> None:
    """Keeps, at a run's first start, which files it has, with size and time of change of each."""
    if data.names is None or data.root is None or (run_dir / FILES).exists():
        return
    names = [*data.names, *(data.test_names or [])]
    labels = torch.cat([data.train_labels, data.test_labels]).tolist()
    files = [[name, c, *_stamp(data.root, name)] for name, c in zip(names, labels, strict=True)]
    about = {"root": data.root, "classes": data.classes, "mean": data.mean, "std": data.std}
    about |= {"notes": data.notes, "damaged": data.damaged}
    counts = {"labeled": 0 if data.labeled is None else len(data.labeled), "train": len(data.names)}
    write_atomic(run_dir / FILES, json.dumps({**about, **counts, "files": files}).encode())


def _known_files(cfg: Config) -> _Known | None:
    path, place = Path(cfg.run_dir) / FILES, Path(cfg.data.root).expanduser()
    if not path.exists():
        return None
    try:
        about = {"root": "", **json.loads(read_bytes(path))}
        names, labels, *_ = zip(*about["files"], strict=True)
        ends = [0, about["labeled"], about["train"], len(names)]
        labeled, unlabeled, test = (torch.arange(a, b) for a, b in itertools.pairwise(ends))
        mean, std = tuple(about["mean"]), tuple(about["std"])
        stamps = [tuple(file[2:]) for file in about["files"]]
        base = place if place.is_dir() else place.parent
        label, classes = torch.tensor(labels), list(about["classes"])
        folder = Folder(base, list(names), label, labeled, unlabeled, test, classes, list(about["notes"]))
        damaged = tuple(about["damaged"])
    except Exception as error:  # whatever a stranger's bytes may cause
        raise ValueError(f"{path} is damaged; choose another run_dir") from error
    numbers = 2 if about["root"] == str(base) else 1  # a copy elsewhere has other times
    now = [_stamp(str(base), name) for name in names]
    if 2 * now.count(GONE) > len(names):
        raise ValueError(
            f"data.root={cfg.data.root} lacks {now.count(GONE):,} of the {len(names):,} files of the run in "
            f"run_dir={cfg.run_dir}: choose another run_dir for other files"
        )
    for name, before, after in zip(names, stamps, now, strict=True):
        if after != GONE and after[:numbers] != before[:numbers]:
            raise ValueError(
                f"{name!r} of data.root has changed since the run began: choose another run_dir, or take the file away"
            )
    return _Known(folder, mean, std, damaged, [i for i, stamp in enumerate(now) if stamp == GONE])


def _stamp(root: str, name: str) -> tuple[int, int]:
    """Size and time of change."""
    try:
        status = os.stat(os.path.join(root, name))
    except OSError:
        return GONE
    return status.st_size, status.st_mtime_ns


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
) -> ResidentImages | FileImages:
    """The training or the test part of the data, on the device or in its files."""
    common: dict[str, Any] = {"mean": data.mean, "std": data.std, "device": device, "policy": policy}
    images, names, lost = data.train_images, data.names, data.lost
    if test:
        images, names, lost = data.test_images, data.test_names, data.test_lost
    common["lost"] = lost
    if not data.in_files and cfg.data.loader in ("auto", "resident"):
        with blame("data.crop"):
            return ResidentImages(images, **common)
    _, height, width, channels = images.shape
    if height != width:
        raise ValueError(
            f"data.loader={cfg.data.loader} needs square images, got {height}x{width}: use resident"
        )
    try:
        with blame("data.crop"):
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


def policy_of(cfg: Config) -> Policy:
    """What is done to training images."""
    data = cfg.data
    with blame("data.ops"):
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
    """Labelled and unlabelled indices into the training set: the data set's own, or drawn from the seed."""
    if data.labeled is None:
        seed = derive(cfg.seed, "split")
        return stratified_split(data.train_labels, cfg.data.n_labels, len(data.classes), seed)
    unlabeled = torch.ones(len(data.train_labels), dtype=torch.bool)
    unlabeled[data.labeled] = False
    return data.labeled, unlabeled.nonzero()[:, 0]
