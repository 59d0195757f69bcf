"""Terminals, pipes and logs of every kind: what they cannot take is lost or escaped, and the run goes on."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import ups_fast
from ups_fast import command, terminal, train
from ups_fast.display import open_console

ROOT = Path(__file__).parents[1]
DIGITS = str(ROOT / "configs" / "digits.yaml")
TINY = [
    "model.name=wrn-10-1",
    "train.epochs=1",
    "train.round0_epochs=1",
    "select.passes=2",
    "device=cpu",
    "train.rounds=1",
]


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("Käfer 甲虫 🪲 a\u200db", "Käfer 甲虫 🪲 a\u200db"),
        ("a\x1b[2Jb", r"a\x1b[2Jb"),
        ("a\nb\r\tc\x00\x7f", r"a\nb\r\tc\x00\x7f"),
        ("\x9b31m\x85\x90", r"\x9b31m\x85\x90"),
        ("abc\u202egnp.exe\u2066\u200f", r"abc\u202egnp.exe\u2066\u200f"),
        ("a\udcffb\ud800", r"a\udcffb\ud800"),
        ("\u2028\u2029\ufeff\U000e0041", r"\u2028\u2029\ufeff\U000e0041"),
        ("", ""),
    ],
)
def test_nothing_raw_reaches_a_terminal(raw, shown, monkeypatch):
    assert terminal.printable(raw) == shown
    text = io.StringIO()
    monkeypatch.setattr(sys, "stdout", text)
    monkeypatch.setattr(sys, "stderr", text)
    open_console().print(raw)
    terminal.complain(f"error: {raw}")
    assert text.getvalue() == f"{shown}\nerror: {shown}\n"
    table = io.StringIO()
    terminal.Shown(table).write("a\x1b,b\nc\r\n")
    assert table.getvalue() == "a\\x1b,b\nc\\r\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_what_an_encoding_lacks_is_escaped(encoding, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    open_console().print("Käfer 甲虫 \udcff")
    said = raw.getvalue().decode(encoding)
    assert (
        said.endswith("\\udcff\n")
        and ("甲" in said) == (encoding == "utf-8")
        and ("ä" in said) == (encoding != "ascii")
    )


class Broken(io.StringIO):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error

    flush = write  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), ""),
        (
            OSError(errno.ENOSPC, "No space left"),
            "standard output could not be written (No space left): the rest of it is missing\n",
        ),
        (ValueError("I/O operation on closed file"), ""),
    ],
)
def test_a_stream_that_fails_is_left_alone(error, said, monkeypatch):
    heard = io.StringIO()
    monkeypatch.setattr(sys, "stdout", Broken(error))
    monkeypatch.setattr(sys, "stderr", heard)
    console = open_console()
    for _ in range(3):
        console.print("a line")
    assert heard.getvalue() == said


def test_no_streams_at_all(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    open_console().print("a line")
    assert not open_console(error=True).is_terminal
    terminal.complain("error: nobody hears it")
    assert train.main([DIGITS, "sed=1"]) == 2


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "memory is used up: do this (no more is known)"),
        (torch.OutOfMemoryError("CUDA out of memory"), "memory is used up: do this"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "memory is used up"),
        (RuntimeError("std::bad_alloc"), "memory is used up"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling x"), "memory is used up"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory is used up"),
        (RuntimeError("can't start new thread"), "set threads=1"),
        (ValueError("two\nlines"), "two lines"),
        (ModuleNotFoundError("No module named 'rich'", name="rich.console"), "rich cannot be imported"),
        (ModuleNotFoundError("No module named 'ours'", name="ups_fast.ours"), None),
        (RuntimeError("a bug"), None),
        (KeyError("a bug"), None),
    ],
)  # fmt: skip
def test_whose_mistake_an_error_is(error, said):
    found = command.mistake_of(error, "do this")
    assert found is None if said is None else said in str(found) and "\n" not in str(found)


def test_strict_without_kernels_names_the_variable_and_leaves_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("UPS_FAST_STRICT", "1")
    monkeypatch.setattr(command, "has_kernels", lambda device: False)
    assert train.main([DIGITS, f"run_dir={tmp_path / 'run'}"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: UPS_FAST_STRICT=1 forbids to run without fused kernels, and cpu has"
    )
    assert not list(tmp_path.iterdir())


PACKAGES = ["yaml", "rich", "tensorboard", "matplotlib", "PIL", "safetensors", "sklearn"]
CORE = "import runpy, sys\nfor name in {names}: sys.modules[name] = None\nsys.argv = {argv}\n"
CORE += "runpy.run_module('ups_fast.{module}', run_name='__main__', alter_sys=True)"


def run(*words: str, **how) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **how.pop("env", {})}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, env=env, text=True, errors="replace", **how
    )


@pytest.mark.parametrize(
    ("module", "names"),
    [("train", PACKAGES), ("predict", PACKAGES), *(("train", [name]) for name in PACKAGES[1:])],
)
@pytest.mark.slow
def test_the_core_alone_says_what_to_install(module, names, tmp_path):
    argv = (
        [module, DIGITS, f"run_dir={tmp_path / 'run'}"] if module == "train" else [module, "run", "image.png"]
    )
    done = run("-c", CORE.format(names=names, argv=argv, module=module), cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ") and "pip install 'ups_fast[train]'" in done.stderr
    assert not list(tmp_path.iterdir())


def test_load_model_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "ups_fast.models.saved", raising=False)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"load_model needs what pip install 'ups_fast\[train\]' brings"):
        _ = ups_fast.load_model


@pytest.mark.parametrize("how", ["| head -1", ">&-", "> /dev/full", ">&- 2>&- <&-", "| cat"])
@pytest.mark.slow
def test_a_run_outlives_its_terminal(how, tmp_path):
    """In a folder that ASCII cannot name, with a terminal that knows only that."""
    folder = tmp_path / "甲虫 Käfer \x1b[2J"
    words = [sys.executable, "-m", "ups_fast.train", DIGITS, *TINY, f"run_dir={folder}"]
    script = f'set -o pipefail; "$@" {how}'
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(["bash", "-c", script, "-", *words], capture_output=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (folder / "report.html").exists() and b"\x1b" not in done.stdout
    if how == "| cat":
        assert b"\\u7532\\u866b K\\xe4fer \\x1b[2J" in done.stdout
    wanted = b"standard output could not be written (No space left on device): the rest of it is missing\n"
    assert done.stderr == (wanted if "full" in how else b"")


@pytest.mark.parametrize("module", ["train", "predict"])
@pytest.mark.slow
def test_help_goes_through_any_pipe(module):
    script = f"set -o pipefail; {sys.executable} -m ups_fast.{module} --help | head -1"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, env=env, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: python -m ups_fast.")


@pytest.mark.parametrize("module", ["train", "predict"])
@pytest.mark.slow
def test_ctrl_c_at_any_time_of_the_start(module):
    for delay in (0.3, 0.8, 1.3, 2.0, 3.0):
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        words = [sys.executable, "-m", f"ups_fast.{module}", "nowhere", "x.png"]
        process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=env)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        started = "ups_fast" in err or "stopped" in err or err.startswith("error: ")
        assert not started or (process.returncode in (2, 130) and "Traceback" not in err), err
