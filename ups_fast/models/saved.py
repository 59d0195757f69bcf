"""A trained network in its file: written with all that belongs to it, and checked before it is believed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from ups_fast.files import RunFolderError, home, misfit, open_regular, write_atomic
from ups_fast.machine import pick_device
from ups_fast.models import KINDS, Network, build
from ups_fast.models.options import MOST_FRAMES, ModelConfig
from ups_fast.models.pretrained import library_name
from ups_fast.schema import keys_of
from ups_fast.words import line_of, shown

MODEL = "model.safetensors"  # in a run's folder: the network of the last round
# What a network is made for: images, clips of so many frames, or rows of so many columns.
_SHAPE = ("channels", "size", "frames", "columns")
BEST = "best.safetensors"  # of the round of highest validation accuracy


def rebuild(about: Mapping[str, Any]) -> Network:
    """A new network as `about` says.

    It holds model (the config's values), heads, dropout_kind, classes, and its kind of samples (_SHAPE).
    """
    shape = {name: about[name] for name in _SHAPE if name in about}
    kind = about.get("dropout_kind", "dropout")
    heads = about.get("heads", 1)
    network = build(
        n_classes=len(about["classes"]), heads=heads, dropout_kind=kind, **shape, **about["model"]
    )
    for each in network.modules():
        if isinstance(each, Network):
            each.several = about.get("task") == "multilabel"
    return network


def save_model(folder: Path, model: nn.Module, about: Mapping[str, Any], *, best: bool = False) -> None:
    """The weights and `about`, with which `load_model` makes the network again; pretrained ones are not needed then.

    best  the network is the best one so far, too
    """
    name = library_name(about["model"]["name"])
    about = {**about, "model": {**about["model"], "name": name, "weights": ""}}
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    content = safetensors.torch.save(weights, {"ups_fast": json.dumps(about)})
    for name in (MODEL, BEST)[: 1 + best]:
        write_atomic(folder / name, content)


def load_model(run_dir: str | Path, device: torch.device | str = "cpu", *, best: bool = False) -> Network:
    """The network of a run's last finished round, in eval mode on `device`.

    It takes float32 [B, channels, H, W], of clips [B, channels, T, H, W], pixels normalized as
    (pixel / 255 - mean) / std, or of features float32 [B, d], as (feature - mean) / std. It returns logits float32
    [B, n_classes]. Its attributes say what belongs to it, see `Network`.

    Args:
        run_dir: the folder of the run; ~ stands for the home folder.
        device: as in a config: auto, cpu, cuda or cuda:N.
        best: the network of the round with the highest validation accuracy, the later one where two are equal. Only
            runs with a validation part have one.

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
        if (folder / "checkpoint.pt").exists() and not (folder / MODEL).exists():
            why += ", which the same train command makes when its first round is finished"
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
        model.task = about.get("task", "single")
        for name in ("classes", *_SHAPE):
            if name in about:
                setattr(model, name, about[name])
        for name in ("mean", "std"):
            value = torch.tensor(about[name], dtype=torch.float32)
            ones = 0 if "columns" in about else 3 if "frames" in about else 2
            value = value.view(-1, *[1] * ones)
            model.register_buffer(name, value, persistent=False)  # goes where the network goes
    except RunFolderError:
        raise
    except Exception as error:  # whatever a stranger's bytes may cause
        why = f"its metadata lack {error}" if isinstance(error, KeyError) else line_of(error)
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
    columns, n = about.get("columns"), about.get("channels")
    if columns is None and (type(n) is not int or n not in (1, 3)):
        raise ValueError("channels in its metadata is neither 1 nor 3")
    for name, highest in (("columns", 10**7), ("heads", 1000), ("frames", MOST_FRAMES)):
        if name in about and not (type(about[name]) is int and 1 <= about[name] <= highest):
            raise ValueError(f"{name} in its metadata is no possible number")
    if about.get("dropout_kind", "dropout") not in tuple(KINDS):  # it may be a list
        raise ValueError("dropout_kind in its metadata is unknown")
    for name in ("classes", "mean", "std", *([] if columns else ["size"])):
        if type(about[name]) is not list:
            raise ValueError(f"{name} in its metadata is no list")
    if not all(type(each) is str for each in about["classes"]):
        raise ValueError("classes in its metadata are not names")
    mean, std, most = about["mean"], about["std"], 1e38 if columns else 1e6
    numbers = all(type(each) in (int, float) and abs(each) < most for each in (*mean, *std))  # NaN is not
    if not numbers or not len(mean) == len(std) == (columns or n) or min(std) <= 0:
        raise ValueError("mean or std in its metadata do not fit")
    if about.get("task", "multilabel") != "multilabel":
        raise ValueError("task in its metadata is unknown")
    size = about.get("size", [1, 1])
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
