"""Builds `ups_fast._C`; metadata and dependencies stand in pyproject.toml.

Install with `pip install --no-build-isolation`, so that the extension is built against the torch that will load it.

    UPS_FAST_CUDA=0|1       forbid or force the CUDA kernels (default: built when a matching nvcc is found)
    TORCH_CUDA_ARCH_LIST    their architectures (default: the visible GPU's, or 8.0+PTX and 9.0 without one)

Without a C++ compiler, or without torch at build time, the package installs with its pure-PyTorch reference ops alone,
and `ups_fast.backend()` says so.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
CXX_FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
NVCC_FLAGS = ["-std=c++17", "-O3"]
MACOS = sys.platform == "darwin"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11


def say(message: str) -> None:
    print(f"ups_fast: {message}", file=sys.stderr)


def find_cuda_home() -> Path | None:
    """The CUDA toolkit: the folder that really holds nvcc and cuda_runtime.h (nvcc on PATH may be a wrapper script)."""
    nvcc = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places += [str(Path(nvcc).resolve().parents[1])] if nvcc else []
    places += ["/usr/local/cuda"]
    for place in places:
        if (
            place
            and (Path(place) / "include/cuda_runtime.h").is_file()
            and (Path(place) / "bin/nvcc").is_file()
        ):
            return Path(place)
    return None


def cuda_toolkit(torch_cuda: str | None) -> tuple[Path | None, str]:
    """The toolkit to build with and its version; or None and why there will be no CUDA kernels."""
    wish = os.environ.get("UPS_FAST_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"UPS_FAST_CUDA must be 0, 1 or unset, got {wish!r}")
    if wish == "0":
        return None, "built with UPS_FAST_CUDA=0"
    home = None if MACOS else find_cuda_home()
    why_not = ""
    if MACOS:
        why_not = "macOS has no CUDA"
    elif home is None:
        why_not = "nvcc was not found at build time"
    else:
        banner = subprocess.run(
            [home / "bin/nvcc", "--version"], capture_output=True, text=True, check=True
        ).stdout
        found = re.search(r"release (\d+)\.(\d+)", banner)
        version = f"{found[1]}.{found[2]}" if found else "unknown"
        if torch_cuda and found and found[1] != torch_cuda.split(".")[0]:
            why_not = f"nvcc is {version} but torch was built for CUDA {torch_cuda}"
    if not why_not:
        return home, version
    if wish == "1":
        raise SystemExit(f"UPS_FAST_CUDA=1, but {why_not}")
    return None, why_not


def extension() -> dict:
    """The setup() arguments that build the extension; empty where it cannot be built."""
    try:
        import pybind11
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        say(
            f"{error}: installing without compiled kernels (pip install --no-build-isolation sees the installed torch)"
        )
        return {}
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        say(f"no C++ compiler ({compiler}): installing without compiled kernels")
        return {}

    if MACOS:  # a Python for two kinds of processor would build both, and torch is there for one
        os.environ.setdefault("ARCHFLAGS", f"-arch {platform.machine()}")
    sources = sorted([*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")])
    include_dirs, library_dirs, libraries = [pybind11.get_include()], [], []
    home, cuda = cuda_toolkit(torch.version.cuda)
    if home:
        cpp_extension.CUDA_HOME = str(home)
        if not torch.cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0+PTX;9.0")
        sources += sorted(ROOT.glob("csrc/cuda/*.cu"))
        include_dirs.append(str(home / "include"))
        library_dirs.append(str(home / "lib64"))
        libraries += ["cudart_static", "dl", "rt", "pthread"]
        cuda = f"CUDA {cuda} for {os.environ.get('TORCH_CUDA_ARCH_LIST', 'the GPU of the build machine')}"
    say(f"CUDA kernels: {cuda}")

    defines = [STABLE_ABI, f"-DUPS_WITH_CUDA={int(home is not None)}"]
    described = [f'-DUPS_TORCH="{torch.__version__}"', f'-DUPS_CUDA="{cuda}"']
    module = cpp_extension.CppExtension(
        "ups_fast._C",
        [str(s.relative_to(ROOT)) for s in sources],
        include_dirs=include_dirs,
        library_dirs=library_dirs,
        libraries=libraries,
        extra_compile_args={"cxx": [*CXX_FLAGS, *defines, *described], "nvcc": [*NVCC_FLAGS, *defines]},
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


setup(**extension())
