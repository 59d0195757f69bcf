"""What other systems lack, tried where it is there: no sched_getaffinity, clang in place of GCC, ARM, an old make."""

from __future__ import annotations

import ast
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ups_fast import machine

ROOT = Path(__file__).parents[1]
CLANG = shutil.which("clang++")
ARM_HEADERS = Path("/usr/aarch64-linux-gnu/include/c++")  # of g++-aarch64-linux-gnu


def test_a_machine_that_says_less(monkeypatch):
    assert machine.cores() == len(os.sched_getaffinity(0)) and machine.load() >= 0
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 2**20 < machine.memory_bytes() <= physical
    for name in ("sched_getaffinity", "getloadavg", "sysconf"):
        monkeypatch.delattr(os, name)
    assert machine.cores() == os.cpu_count() and machine.load() == 0
    assert machine.memory_bytes() >= physical or machine.memory_bytes() > 2**20
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert machine.cores() == 1


def test_only_one_module_asks_the_system():
    asked = re.compile(r"os\.(sched_\w+|getloadavg|sysconf|cpu_count)|/proc/|/sys/")
    for path in (ROOT / "ups_fast").rglob("*.py"):
        assert path.name == "machine.py" or not asked.search(path.read_text()), path


def test_the_kernels_use_nothing_of_one_compiler_or_system_alone():
    sources = "".join(
        path.read_text() for path in (ROOT / "csrc").rglob("*.*") if path.suffix not in (".cu", ".cuh")
    )
    for word in ("immintrin", "ifunc", "target_clones", "dlopen", "aligned_alloc(", "<omp.h>", "malloc.h"):
        assert word not in sources, word


def test_the_makefile_needs_no_newer_make_than_macos_has():
    text = (ROOT / "Makefile").read_text()
    for word in (
        ".ONESHELL",
        "$(file ",
        "!=",
        "::=",
        ".SHELLFLAGS",
        "undefine",
        "private ",
        "$(let ",
        "$(intcmp ",
    ):
        assert word not in text, word  # all of them newer than 3.81
    assert not re.search(r"^[^#\t\n]*: *export ", text, re.M)
    assert not re.search(r"\b(realpath|readlink|nproc|sed -i|cp --|install -D|grep -P)\b", text)


def flags() -> list[str]:
    """Those of setup.py, but for the optimization, and with all warnings as errors in our own files."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id in ("CXX_FLAGS", "STABLE_ABI")
    }  # fmt: skip
    pybind11 = pytest.importorskip("pybind11")
    torch_headers = Path(torch.__file__).parent / "include"
    includes = [torch_headers, torch_headers / "torch/csrc/api/include", pybind11.get_include()]
    includes.append(sysconfig.get_paths()["include"])
    strict = [
        "-O0",
        "-Wextra",
        "-Werror",
        "-fPIC",
        "-DUPS_WITH_CUDA=0",
        '-DUPS_TORCH="x"',
        '-DUPS_CUDA="none"',
    ]
    return [
        *values["CXX_FLAGS"],
        values["STABLE_ABI"],
        *strict,
        *(word for p in includes for word in ("-isystem", str(p))),
    ]


@pytest.mark.slow
@pytest.mark.skipif(CLANG is None, reason="clang++ is not installed")
@pytest.mark.parametrize("target", ["", "aarch64-linux-gnu"])
def test_clang_compiles_the_cpu_kernels_without_a_warning(target, tmp_path):
    if target and platform.machine() != "aarch64" and not ARM_HEADERS.is_dir():
        pytest.skip("the headers of g++-aarch64-linux-gnu are not installed")
    sources = sorted((ROOT / "csrc/cpu").glob("*.cpp"))
    sources += [] if target else [ROOT / "csrc/module.cpp"]  # Python's own header is for this processor alone
    assert len(sources) >= 8 and flags()

    def compiled(source: Path) -> str:
        words = [str(CLANG), *([f"--target={target}"] if target else []), *flags(), "-c", str(source)]
        done = subprocess.run(
            [*words, "-o", str(tmp_path / f"{source.stem}.o")], capture_output=True, text=True
        )
        return done.stderr

    with ThreadPoolExecutor(machine.cores()) as pool:
        assert [said for said in pool.map(compiled, sources) if said] == []
