"""The files of a run: written whole or not at all, locked, and checked before they are believed.

checkpoint.pt alone says where a run stands; everything else in the folder is a product of it.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from ups_fast import config_file
from ups_fast.files import (
    NotDense,
    RunFolderError,
    check_plain,
    home,
    is_leftover,
    load_torch,
    locked,
    misfit,
    open_regular,
    read_bytes,
    remove_leftovers,
    write_arrays,
    write_atomic,
    writing,
)
from ups_fast.machine import pick_device
from ups_fast.models import Network, build
from ups_fast.models.options import ModelConfig
from ups_fast.schema import keys_of
from ups_fast.selection import PseudoLabels
from ups_fast.state import Checkpoint, Keeps, Row, alone, among
from ups_fast.words import shown

CONFIG, CHECKPOINT, LOCK = "config.yaml", "checkpoint.pt", ".lock"
MODEL = "model.safetensors"  # the network of the last round
BEST = "best.safetensors"  # of the round of highest accuracy on the validation part, where there is one
READABLE = "readable.json"  # which files of a folder have been found good
TENSORBOARD = "tb"
# All that a run writes. In its folder each must be a regular file itself, or not there.
_PRODUCTS = (
    "files.json",
    "images.npz",
    "metrics.jsonl",
    "pseudo_labels.csv",
    "report.html",
    "report.png",
    "selection.npz",
    "split.npz",
)
RUN_FILES = frozenset((CONFIG, CHECKPOINT, LOCK, MODEL, BEST, READABLE, *_PRODUCTS))
# What may change when a run goes on: where it runs, where its (fingerprinted) data lie, and how many rounds it has, on
# which no round depends.
FREE_KEYS = ("run_dir", "device", "threads", "checkpoint_seconds", "data.root", "train.rounds")
FORMAT, VERSION = "ups_fast checkpoint", 5
MOST_CONFIG = 100_000  # bytes of a config.yaml; one has some 3,000


@contextmanager
def open_folder(folder: Path, config: Mapping[str, Any], free: Collection[str] = FREE_KEYS) -> Iterator[str]:
    """Holds a run's folder for this process; makes it, with its config.yaml, at first use.

    config  nested plain values, as resolved

    Yields a warning where the folder cannot be locked, else "". The folder itself may be a link. Raises
    RunFolderError: it is not a folder, holds files but no run, or a link or pipe in place of a run's file, is in use by
    another process, or its config.yaml contradicts `config` in more than the keys `free`.
    """
    with writing(folder):  # a name may be too long
        there = folder.exists()
    if there and not folder.is_dir():
        raise RunFolderError(f"run_dir must be a folder, but {folder} is a file")
    known = folder / CONFIG
    if not os.path.lexists(known) and any(not _is_ours(path) for path in folder.glob("*")):
        raise _no_run(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in sorted(RUN_FILES):
            check_plain(folder / name)
        for name in ("", "epochs", "rounds"):
            check_plain(folder / TENSORBOARD / name, folder=True)
    with locked(folder / LOCK) as warning:
        if known.exists():
            _check_config(known, config, free)
        else:
            write_atomic(known, config_file.write(config).encode())
        with writing(folder):
            remove_leftovers(folder, RUN_FILES)
        yield warning


def _is_ours(path: Path) -> bool:
    """What a run that was killed before its config.yaml stood may have left."""
    return path.name in (LOCK, READABLE) or is_leftover(path, frozenset((LOCK, READABLE, CONFIG)))


def _no_run(folder: Path) -> RunFolderError:
    if not (folder / CHECKPOINT).exists():
        return RunFolderError(f"run_dir={folder} holds files but no run of ups_fast: choose another folder")
    return RunFolderError(
        f"run_dir={folder} has a {CHECKPOINT}, but its {CONFIG}, which says of which run, is gone or has no keys: "
        "put it back, or choose another folder"
    )


def read_config(path: Path) -> dict[Any, Any]:
    """A run's config.yaml as nested plain values. Raises RunFolderError, one sentence, where it is none."""
    try:
        tree = config_file.parse(read_bytes(path, MOST_CONFIG).decode())
    except RunFolderError:
        raise
    except Exception as error:  # whatever a stranger's bytes may cause
        raise RunFolderError(f"{path} is damaged: {_line(error)}") from error
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise RunFolderError(f"{path} is damaged: it is not a mapping of keys to values")
    return tree


def _line(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _check_config(path: Path, config: Mapping[str, Any], free: Collection[str]) -> None:
    tree = read_config(path)
    here, there = dict(_flat(config)), dict(_flat(tree))
    if not here.keys() & there.keys():
        raise _no_run(path.parent)
    differing = [
        f"{shown(key)} is {shown(here.get(key, 'absent'))} and was {shown(there.get(key, 'absent'))}"
        for key in {**here, **there}
        if key not in free and here.get(key) != there.get(key)
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


def save_checkpoint(folder: Path, state: Checkpoint) -> None:
    buffer = io.BytesIO()  # so that write_atomic alone meets the disk
    made_by = {"format": FORMAT, "version": VERSION, "torch_version": str(torch.__version__)}
    torch.save({**vars(state), **made_by}, buffer)
    write_atomic(folder / CHECKPOINT, buffer.getbuffer())


def write_rows(folder: Path, rows: Sequence[Row]) -> None:
    lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    write_atomic(folder / "metrics.jsonl", lines.encode())


def write_split(folder: Path, state: Checkpoint) -> None:
    val = {"val": state.val} if len(state.val) else {}
    parts = {"labeled": state.labeled, "unlabeled": state.unlabeled, **val}
    write_arrays(folder / "split.npz", parts)


def write_selection(folder: Path, found: PseudoLabels, truth: torch.Tensor) -> None:
    write_arrays(folder / "selection.npz", {**vars(found), "truth": truth})


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint of `folder`, on the host; None where there is none yet.

    Raises RunFolderError where it is no regular file, damaged (check sums are compared), larger in memory than on the
    disk, foreign, of another version, or where its parts have impossible types or values or contradict each other.
    """
    path = folder / CHECKPOINT
    if not os.path.lexists(path):
        return None
    check_plain(path)
    try:
        content = load_torch(path)
    except Exception as error:  # whatever a stranger's bytes may cause
        why = f" ({error})" if type(error) in (ValueError, NotDense) else ""
        raise RunFolderError(
            f"{path} is damaged or no checkpoint{why}; move it away to start over"
        ) from error
    made_by = (
        (content.pop("format", None), content.pop("version", None)) if type(content) is dict else ("", 0)
    )
    if [type(each) for each in made_by] != [str, int] or made_by[0] != FORMAT:
        raise RunFolderError(f"{path} is not a checkpoint of ups_fast; move it away to start over")
    if made_by[1] != VERSION:
        raise RunFolderError(
            f"{path} has version {shown(made_by[1])}, but this ups_fast reads version {VERSION}: go on with the "
            "ups_fast that began the run, or choose another run_dir"
        )
    if wrong := alone(content):
        raise _unbelievable(path, wrong)
    return Checkpoint(**content)


def check_state(
    folder: Path,
    state: Checkpoint,
    fresh: Checkpoint,
    weights: Mapping[str, torch.Tensor],
    trained: Mapping[str, torch.Tensor],
    n_classes: int,
    *,
    keeps: Keeps,
) -> None:
    """Raises RunFolderError where the checkpoint of `folder` cannot come from this run; arguments as `state.among`."""
    if wrong := among(state, fresh, weights, trained, n_classes, keeps=keeps):
        raise _unbelievable(folder / CHECKPOINT, wrong)


def _unbelievable(path: Path, wrong: str) -> RunFolderError:
    return RunFolderError(f"{path} is no state of a run: {wrong} cannot be right; move it away to start over")


def rebuild(about: Mapping[str, Any]) -> Network:
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


def load_model(run_dir: str | Path, device: torch.device | str = "cpu", *, best: bool = False) -> Network:
    """The network of a run's last finished round, in eval mode on `device`.

    It takes float32 [B, channels, H, W], pixels normalized as (pixel / 255 - mean) / std, and returns logits float32
    [B, n_classes]. Its attributes say what belongs to it, see `Network`.

    Args:
        run_dir: the folder of the run; ~ stands for the home folder.
        device: as in a config: auto, cpu, cuda or cuda:N.
        best: the network of the round with the highest accuracy on the validation images, the later one where two are
            equal. Only a run with a validation part (data.val_share) has it.

    Returns:
        The network, an `nn.Module`.

    Raises:
        FileNotFoundError: there is no trained network.
        RunFolderError: its file is damaged, is no regular file, or has weights that are not finite.
        ValueError: there is no such device.

    >>> model = load_model("runs/digits")
    >>> pixels = torch.zeros(1, model.channels, *model.size, dtype=torch.uint8)
    >>> logits = model((pixels / 255 - model.mean) / model.std)
    >>> logits.shape
    torch.Size([1, 10])
    """
    device = pick_device(str(device))
    folder = home(run_dir)
    path = folder / (BEST if best else MODEL)
    if not path.exists():
        why = f"it has no {path.name}" if folder.is_dir() else "there is no such folder"
        why = "it is a file" if folder.is_file() else why
        if best and (folder / MODEL).exists():
            why += ", which only a run with a validation part has (data.val_share)"
        raise FileNotFoundError(f"run_dir={run_dir} holds no {'best' if best else 'trained'} network: {why}")
    try:
        open_regular(path).close()  # safetensors would wait for a pipe
        with safetensors.safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["ups_fast"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        _check_about(about)
        model = _filled(about, weights)
        for name in ("classes", "channels", "size"):
            setattr(model, name, about[name])
        for name in ("mean", "std"):
            value = torch.tensor(about[name], dtype=torch.float32).view(-1, 1, 1)
            model.register_buffer(name, value, persistent=False)  # goes where the network goes
    except RunFolderError:
        raise
    except Exception as error:  # whatever a stranger's bytes may cause
        why = f"its metadata lack {error}" if isinstance(error, KeyError) else _line(error)
        raise RunFolderError(f"{path} is damaged or no network of ups_fast: {shown(why)}") from error
    return model.to(device).eval()


def _check_about(about: Any) -> None:
    """Raises ValueError or KeyError where a file's metadata are not those of `save_model`."""
    if type(about) is not dict or type(about["model"]) is not dict:
        raise ValueError("its metadata are not those of a network")
    kinds = {each.name: each.type for each in keys_of(ModelConfig)}
    for name, value in about["model"].items():
        kind = kinds.get(name)
        if type(value) is not kind and (type(value), kind) != (int, float):
            raise ValueError(f"model.{name} in its metadata is unknown, or not of its type")
    if about["model"].get("weights"):
        raise ValueError("model.weights in its metadata names a file of pretrained weights")
    if type(about["channels"]) is not int or about["channels"] not in (1, 3):
        raise ValueError("channels in its metadata is neither 1 nor 3")
    for name in ("classes", "size", "mean", "std"):
        if type(about[name]) is not list:
            raise ValueError(f"{name} in its metadata is no list")
    if not all(type(each) is str for each in about["classes"]):
        raise ValueError("classes in its metadata are not names")
    size, mean, std, n = about["size"], about["mean"], about["std"], about["channels"]
    numbers = all(type(each) in (int, float) and abs(each) < 1e6 for each in (*mean, *std))  # NaN is not
    if not numbers or not len(mean) == len(std) == n or min(std) <= 0:
        raise ValueError("mean or std in its metadata do not fit")
    if len(size) != 2 or not all(type(each) is int and 0 < each <= 2**16 for each in size):
        raise ValueError("size in its metadata does not fit")


def _filled(about: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> Network:
    """The network with these weights. A few bytes may name a network of any size: it is first made without memory."""
    try:
        with torch.device("meta"):
            trial = rebuild(about)
    except Exception:  # some of the libraries' networks read a value while they are made
        with _no_larger_than(sum(tensor.numel() for tensor in weights.values())):
            trial = rebuild(about)
    if wrong := misfit(weights, trial.state_dict()):
        raise ValueError(f"its weights do not fit: {wrong}")
    model = rebuild(about)
    model.load_state_dict(weights)
    return model


@contextmanager
def _no_larger_than(numbers: int) -> Iterator[None]:
    """Raises ValueError as soon as a network has more than twice as many weights: some are made and then replaced."""
    made = 0

    def count(module: nn.Module, name: str, weight: nn.Parameter | None) -> None:
        nonlocal made
        made += 0 if weight is None else weight.numel()
        if made > 2 * numbers + 10**6:
            raise ValueError("it is larger than its file")

    hook = torch.nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()
