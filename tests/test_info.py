"""`python -m ups_fast.info`: it says all that there is, whatever is missing or broken, and nothing private."""

from __future__ import annotations

import ast
import doctest
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ups_fast
from ups_fast import info, machine, ops

ROOT = Path(__file__).parents[1]
BROKEN = {
    "ups_good": "__version__ = '1.2'; print('hello'); import sys; print('oh', file=sys.stderr)",
    "ups_silent": "__version__ = ('a', 1)",
    "ups_needs": "import ups_absent",
    "ups_raises": "raise OSError('libx.so: cannot open /home/ann lee/lib/libx.so\\n\\x1b[2J')",
    "ups_exits": "raise SystemExit(3)",
    "ups_panics": "raise BaseException('a panic of Rust')",
    "ups_bytes": "__version__ = '3'; import sys; sys.stdout.buffer.write(b'hello')",
}


def told(name: str) -> str:
    return info.found(name.replace("_", "-"), name, "ups_fast[train]")


def test_packages_that_are_missing_or_broken(tmp_path, monkeypatch, capfd):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("HOME", "/home/ann lee")
    for name, code in BROKEN.items():
        (tmp_path / f"{name}.py").write_text(code)
    assert told("ups_good") == "1.2" and told("ups_silent") == "of unknown version"
    assert told("ups_absent") == told("ups_absent.part") == 'not installed: pip install "ups_fast[train]"'
    remedy = ': pip install --force-reinstall "ups_fast[train]"'
    assert told("ups_needs") == f"broken (ModuleNotFoundError: No module named 'ups_absent'){remedy}"
    assert told("ups_raises") == f"broken (OSError: libx.so: cannot open lib/libx.so \x1b[2J){remedy}"
    assert told("ups_exits") == f"broken (SystemExit: 3){remedy}"
    assert (
        told("ups_panics") == f"broken (BaseException: a panic of Rust){remedy}" and told("ups_bytes") == "3"
    )
    monkeypatch.setitem(sys.modules, "ups_good", None)
    assert told("ups_good").startswith("broken (ModuleNotFoundError") or "not installed" in told("ups_good")
    assert capfd.readouterr() == ("", "")


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "ups_raises.py").write_text(BROKEN["ups_raises"])
    monkeypatch.setattr(
        info, "PACKAGES", {"x": ("ups_raises", "x"), "none": ("ups_absent", "ups_fast[train]")}
    )
    monkeypatch.setenv("UPS_FAST_STRICT", "0\n\x1b[2J")
    assert info.main([]) == 0
    out, err = capsys.readouterr()
    rows = dict(line.split(maxsplit=1) for line in out.replace("ops on ", "ops_on_").splitlines())
    assert err == "" and "\x1b" not in out
    assert rows["ups_fast"] == ups_fast.__version__ and rows["torch"] == torch.__version__
    assert rows["ops_on_cpu"] == info.without_paths(ups_fast.backend()["cpu"])
    assert machine.cpu_name() in rows["cpu"] and r"UPS_FAST_STRICT=0\n\x1b" in rows["environment"]
    assert rows["x"].startswith("broken (OSError") and rows["none"].startswith("not installed")
    with pytest.raises(SystemExit) as end:
        info.main(["run"])
    assert end.value.code == 2 and "it takes no words" in capsys.readouterr().err


def test_devices(monkeypatch):
    def properties(index):
        if index:
            raise RuntimeError("CUDA error: out of memory")
        return SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=80 * 2**30)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(machine, "driver", lambda: "580.95.05")
    monkeypatch.setattr(info, "PACKAGES", {})
    rows = dict(info.lines())
    assert rows["gpu"].startswith("2, driver 580.95.05, torch is built ")
    assert rows["cuda:0"] == "NVIDIA H100, capability 9.0, 80 GiB"
    assert rows["cuda:1"] == "failed (RuntimeError: CUDA error: out of memory)"

    def broken():
        raise RuntimeError("no driver at /usr/lib/ann/libcuda.so")

    monkeypatch.setattr(torch.cuda, "device_count", broken)
    rows = dict(info.lines())
    assert rows["gpu"] == "failed (RuntimeError: no driver at libcuda.so)" and "cuda:0" not in rows


@pytest.mark.skipif(ops._C is None or sys.platform != "linux", reason="there is no compiled module of Linux")
def test_a_compiled_module_that_is_cut_off_is_not_loaded(tmp_path):
    """To load one kills the process by SIGBUS."""
    content = Path(ops._C.__file__).read_bytes()
    path = tmp_path / "_C.so"
    for size, cut in ((len(content), False), (len(content) // 2, True), (64, True), (63, False), (0, False)):
        path.write_bytes(content[:size])
        assert ops._is_cut_off(path) is cut
    assert not ops._is_cut_off(tmp_path) and not ops._is_cut_off(tmp_path / "none")


def test_without_kernels(monkeypatch):
    monkeypatch.setattr(ops, "_C", None)
    monkeypatch.setattr(info, "PACKAGES", {})
    monkeypatch.setattr(ops, "_BACKEND", ops._find_backend())
    rows = dict(info.lines())
    assert rows["kernels"] == "none"
    assert rows["ops on cpu"].startswith("reference ops") and "pip install" in rows["ops on cpu"]


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 2023\n", "535.104.05"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\nGCC 12.2.0",
            "580.95.05",
        ),
        ("", ""),
        (None, ""),
    ],
)
def test_the_driver(text, version, monkeypatch):
    def opened(*_, **__):
        if text is None:
            raise PermissionError
        return io.StringIO(text)

    monkeypatch.setattr(machine, "open", opened, raising=False)
    assert machine.driver() == version


def test_the_cpu(monkeypatch):
    monkeypatch.setattr(machine, "open", lambda *_, **__: io.StringIO("flags : a\n"), raising=False)
    for part in ("processor", "machine"):
        monkeypatch.setattr(machine.platform, part, str)
    assert machine.cpu_name() == "unknown"


def test_no_path_is_told(monkeypatch):
    monkeypatch.setenv("HOME", "/home/Ann Lee")
    assert info.without_paths("none in /home/Ann Lee/my venv/ups_fast") == "none in my venv/ups_fast"
    assert info.without_paths("/home/Ann Lee") == "~"
    assert info.without_paths("'/mnt/ann/x.so' (/a/b/c: no), ../d/e 3/4") == "'x.so' (c: no), ../d/e 3/4"
    assert info.without_paths(r"C:\Users\ann\x.dll: no") == "x.dll: no"
    assert str(ROOT) not in info.without_paths(f"in {ROOT}") and not doctest.testmod(info).failed


def test_every_optional_package_is_listed():
    text = (ROOT / "pyproject.toml").read_text()
    extras = re.findall(
        r"^(train|timm|lite|export|video|sweep|dali) = (\[.*?\])(?: +#[^\n]*)?$",
        text,
        re.MULTILINE | re.DOTALL,
    )
    assert len(extras) == 7
    wanted = {}
    for extra, names in extras:
        for name in ast.literal_eval(names):
            name = re.split(r"[ >=;]", name)[0].replace("nvidia-dali-cuda130", "nvidia-dali")
            wanted.setdefault(name, f"ups_fast[{extra}]")
    there = {name: wanted for name, (_, wanted) in info.PACKAGES.items()}
    assert there == {**wanted, "pillow": "ups_fast[train]", "pyarrow": "pyarrow"}


@pytest.mark.slow
def test_in_a_process_of_its_own(tmp_path):
    """Where the home is a folder with a user's name, and the working directory too."""
    place = tmp_path / "ann"
    place.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "ups_fast.info"],
        capture_output=True, text=True, cwd=place,
        env={**os.environ, "HOME": str(place), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "torch" in done.stdout and not re.search(r"(?<!\w)/\w+/|\bann\b", done.stdout)
