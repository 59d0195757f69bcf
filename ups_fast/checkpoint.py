"""The files of a run: written whole or not at all, locked, and checked before they are believed.

checkpoint.pt alone says where a run stands; everything else in the folder is a product of it.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import math
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from ups_fast.config import pick_device
from ups_fast.data import ImageSet
from ups_fast.models import build
from ups_fast.selection import Labelling

CONFIG, CHECKPOINT, LOCK = "config.yaml", "checkpoint.pt", ".lock"
MODEL = "model.safetensors"  # the network of the last round
BEST = "best.safetensors"  # of the round of highest test accuracy
READABLE = "readable.json"  # which files of a folder have been found good
# What may change when a run goes on: where it runs, where its (fingerprinted) data lie, and how many rounds it has, on
# which no round depends.
FREE_KEYS = ("run_dir", "device", "threads", "checkpoint_seconds", "data.root", "train.rounds")
FORMAT, VERSION = "ups_fast checkpoint", 3


class RunFolderError(ValueError):
    """A run's folder cannot be used as asked. The message is a sentence; what was there is unchanged."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the system's refusal to write (a full disk, a missing right) into a RunFolderError."""
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"{path} could not be written: {error.strerror}; nothing was overwritten"
        ) from error


def write_atomic(path: Path, content: bytes | memoryview) -> None:
    """Replaces `path` by `content`: a reader, even after a power cut, meets the old file or the new one.

    Raises RunFolderError where it cannot be written; the old file then stands.
    """
    tmp = _tmp(path)
    with writing(path):
        try:
            with open(tmp, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(tmp, path)
        finally:
            tmp.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """A new name outlasts a power cut only once its folder is on the disk; some file systems cannot say so."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_arrays(path: Path, arrays: Mapping[str, Tensor]) -> None:
    """Writes host tensors as an .npz file, atomically."""
    buffer = io.BytesIO()
    columns: dict[str, Any] = {name: tensor.numpy() for name, tensor in arrays.items()}
    np.savez(buffer, **columns)
    write_atomic(path, buffer.getbuffer())


@contextmanager
def open_folder(folder: Path, config: Mapping[str, Any]) -> Iterator[None]:
    """Holds a run's folder for this process; makes it, with its config.yaml, at first use.

    config  nested plain values, as resolved

    Raises RunFolderError: it is not a folder, holds files but no run, is in use by another process, or its
    config.yaml contradicts `config` in more than FREE_KEYS.
    """
    with writing(folder):  # a name may be too long
        there = folder.exists()
    if there and not folder.is_dir():
        raise RunFolderError(f"run_dir must be a folder, but {folder} is a file")
    known = folder / CONFIG
    if not known.exists() and any(not _is_ours(path) for path in folder.glob("*")):
        raise _no_run(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "ab")  # noqa: SIM115 (closed by the with that follows)
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
        except BlockingIOError:
            raise RunFolderError(f"run_dir={folder} is in use by another process") from None
        if known.exists():
            _check_config(known, config)
        else:
            write_atomic(known, OmegaConf.to_yaml(OmegaConf.create(dict(config))).encode())
        yield


def _tmp(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _is_ours(path: Path) -> bool:
    """What a run that was killed before its config.yaml stood may have left."""
    known = path in (path.with_name(LOCK), path.with_name(READABLE), _tmp(path.with_name(CONFIG)))
    return known or (path.name.startswith(f".{READABLE}.") and path.name.endswith(".tmp"))


def _no_run(folder: Path) -> RunFolderError:
    if not (folder / CHECKPOINT).exists():
        return RunFolderError(f"run_dir={folder} holds files but no run of ups_fast: choose another folder")
    return RunFolderError(
        f"run_dir={folder} has a {CHECKPOINT}, but its {CONFIG}, which says of which run, is gone or has no keys: "
        "put it back, or choose another folder"
    )


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:
        raise RunFolderError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise RunFolderError(f"{path} is damaged: it is not a mapping of keys to values")
    here, there = dict(_flat(config)), dict(_flat(tree))
    if not here.keys() & there.keys():
        raise _no_run(path.parent)
    differing = [
        f"{key} is {here.get(key, 'absent')} and was {there.get(key, 'absent')}"
        for key in {**here, **there}
        if key not in FREE_KEYS and here.get(key) != there.get(key)
    ]
    if differing:
        more = f" and {len(differing) - 5} others" if len(differing) > 5 else ""
        raise RunFolderError(
            f"run_dir={path.parent} belongs to a run with another config: {', '.join(differing[:5])}{more}; "
            "choose another run_dir, or delete that folder to start over"
        )


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested {a: {b: 1}} as ("a.b", 1)."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def fingerprint(data: ImageSet, weights: str = "") -> str:
    """Tells data sets apart: sizes for people, a hash over every label and pixel (or file name) for the rest.

    weights  the file of pretrained weights, if there is one: a run that went on with others would be another
    """
    digest = hashlib.blake2b(repr(data.classes).encode(), digest_size=16)
    images = () if data.names else (data.train_images, data.test_images)  # files have a list of their own
    for tensor in (*images, data.train_labels, data.test_labels, data.labeled):
        if tensor is not None:
            digest.update(repr(list(tensor.shape)).encode())
            digest.update(tensor.reshape(-1).numpy().data)
    for name in (*(data.names or ()), *(data.test_names or ())):
        digest.update(f"{name}\0".encode("utf-8", "surrogateescape"))
    sizes = f"{len(data.train_labels)} training and {len(data.test_labels)} test images"
    found = f"{sizes}, hash {digest.hexdigest()}"
    if weights:
        found += f", weights {hashlib.blake2b(Path(weights).read_bytes(), digest_size=16).hexdigest()}"
    return found


@dataclass
class Checkpoint:
    """Where a run stands. All else derives from this, the config and the data."""

    data: str  # fingerprint
    labeled: Tensor  # int64 [L]
    unlabeled: Tensor  # int64 [U]
    round: int = 0  # the one in progress; all are done when it equals train.rounds
    epoch: int = 0  # epochs of the round done
    step: int = 0  # steps of the epoch done
    seconds: float = 0.0  # spent on the round so far
    outside: float = 0.0  # of these, on neither steps nor labelling
    loss: Tensor = field(default_factory=lambda: torch.zeros(()))  # sum over the epoch's steps
    train_loss: float | None = None  # mean over the last whole epoch; None where not finite
    rows: list[dict[str, Any]] = field(default_factory=list)  # one per finished round
    labelling: dict[str, Tensor] | None = None  # of the last finished round
    # None at the start of a round, where they are made anew: weights from the seed, if not the last round's go on.
    model: dict[str, Any] | None = None
    momentum: dict[str, Any] | None = None


def save_checkpoint(folder: Path, state: Checkpoint) -> None:
    buffer = io.BytesIO()  # so that write_atomic alone meets the disk
    torch.save({"format": FORMAT, "version": VERSION, **vars(state)}, buffer)
    write_atomic(folder / CHECKPOINT, buffer.getbuffer())


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint of `folder`, on the host; None where there is none yet.

    Raises RunFolderError where it is damaged (check sums are compared), foreign, of another version, or where its
    parts contradict each other.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load leaves the check sums aside
        content = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a stranger's bytes may cause
        raise RunFolderError(f"{path} is damaged or no checkpoint; move it away to start over") from error
    if damaged:
        raise RunFolderError(f"{path} is damaged ({damaged} in it has changed); move it away to start over")
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise RunFolderError(f"{path} is not a checkpoint of ups_fast; move it away to start over")
    if (version := content.pop("version", None)) != VERSION:
        raise RunFolderError(f"{path} has version {version}, but this ups_fast reads version {VERSION}")
    try:
        state = Checkpoint(**content)
        wrong = _misfit(state)
    except Exception:  # as above
        wrong = "a part or its type"
    if wrong:
        raise RunFolderError(
            f"{path} is no state of a run: {wrong} cannot be right; move it away to start over"
        )
    return state


def _misfit(state: Checkpoint) -> str:
    """The first parts of a checkpoint that do not fit the others; "" if all do. A wrong type may raise anything."""
    counts = state.round, state.epoch, state.step
    tables = vars(Labelling(**state.labelling)).values() if state.labelling else ()
    fits = {
        "round, epoch or step": all(type(count) is int and count >= 0 for count in counts),
        "seconds or loss": math.isfinite(state.seconds + state.outside) and state.loss.ndim == 0,
        "train_loss": math.isfinite(state.train_loss or 0),
        "labeled or unlabeled": all(
            x.dtype == torch.int64 and x.ndim == 1 for x in (state.labeled, state.unlabeled)
        ),
        "rows": [row["round"] for row in state.rows] == list(range(len(state.rows)))
        and len(state.rows) == state.round,
        "labelling": bool(tables) == (state.round > 0)
        and all(len(x) == len(state.unlabeled) for x in tables),
        "model or momentum": bool(state.model) >= bool(state.momentum)  # a model alone begins a round
        and (bool(state.momentum) or state.epoch == state.step == 0),
    }
    return next((parts for parts, fit in fits.items() if not fit), "")


def rebuild(about: Mapping[str, Any]) -> nn.Module:
    """A new network as `about` says: model (the config's values), classes, channels and size."""
    classes, channels, size = about["classes"], about["channels"], about["size"]
    return build(n_classes=len(classes), channels=channels, size=size, **about["model"])


def save_model(folder: Path, model: nn.Module, about: Mapping[str, Any], *, best: bool = False) -> None:
    """The weights and `about`, with which `load_model` makes the network again; pretrained ones are not needed then.

    best  the network is the best one so far, too
    """
    about = {**about, "model": {**about["model"], "weights": ""}}
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    content = safetensors.torch.save(weights, {"ups_fast": json.dumps(about)})
    for name in (MODEL, BEST)[: 1 + best]:
        write_atomic(folder / name, content)


def load_model(run_dir: str | Path, device: torch.device | str = "cpu", *, best: bool = False) -> nn.Module:
    """The network of a run's last finished round, in eval mode on `device`.

    It takes float32 [B, channels, H, W], pixels normalised as (pixel / 255 - mean) / std, and returns logits
    [B, n_classes]. Attributes say what belongs to it: classes (names), channels, size ([H, W]), and mean and std,
    float32 [channels, 1, 1] on the device.

    Args:
        run_dir: the folder of the run.
        device: as in a config: auto, cpu, cuda or cuda:N.
        best: the network of the round with the highest test accuracy (the last one of equals). The test images have
            chosen it, so its test accuracy is a little too good.

    Returns:
        The network, an `nn.Module`.

    Raises:
        FileNotFoundError: there is no trained network.
        RunFolderError: the folder is damaged.
        ValueError: there is no such device.

    >>> model = load_model("runs/digits")
    """
    device = pick_device(str(device))
    path = Path(run_dir) / (BEST if best else MODEL)
    if not path.exists():
        why = f"it has no {path.name}" if path.parent.is_dir() else "there is no such folder"
        why = "it is a file" if path.parent.is_file() else why
        raise FileNotFoundError(f"run_dir={run_dir} holds no trained network: {why}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["ups_fast"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        model = rebuild(about)
        model.load_state_dict(weights)
        size, channels = about["size"], about["channels"]
        if [len(about[name]) for name in ("size", "mean", "std")] != [2, channels, channels] or min(size) < 1:
            raise ValueError("size, mean or std in its metadata do not fit")
        for name in ("classes", "channels", "size"):
            setattr(model, name, about[name])
        for name in ("mean", "std"):
            setattr(model, name, torch.tensor(about[name], dtype=torch.float32, device=device).view(-1, 1, 1))
    except Exception as error:  # whatever a stranger's bytes may cause
        why = (
            f"its metadata lack {error}"
            if isinstance(error, KeyError)
            else " ".join(str(error).split())[:300]
        )
        raise RunFolderError(f"{path} is damaged or no network of ups_fast: {why}") from error
    return model.to(device).eval()
