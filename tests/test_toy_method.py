"""The method that docs/methods.md adds: written, registered and run as a reader would, in a copy of the package."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from test_docs import ROOT, blocks, commands

PAGE = ROOT / "docs/methods.md"
TINY = ["model.name=wrn-10-1", "train.rounds=2", "train.epochs=1", "select.passes=2", "device=cpu"]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose package has the page's file and the page's lines in methods/__init__.py, and nothing else new."""
    place = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "ups_fast", place / "ups_fast", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", place / "configs")
    (code,) = blocks(PAGE, "python")
    name = re.match(r"# (ups_fast/methods/\w+\.py)\n", code)
    assert name, "the block says which file it is"
    (place / name[1]).write_text(code)
    (lines,) = blocks(PAGE, "diff")
    init = place / "ups_fast/methods/__init__.py"
    text = init.read_text()
    shown = lines.splitlines()
    for before, line in pairwise(shown):
        if line.startswith("+"):
            assert before.startswith(" ") and text.count(f"{before[1:]}\n") == 1
            text = text.replace(f"{before[1:]}\n", f"{before[1:]}\n{line[1:]}\n")
    assert len(text.splitlines()) == len(init.read_text().splitlines()) + 2
    init.write_text(text)
    return place


# All in one process and its forks, because the imports take longer than the runs.
DRIVER = """
import os, pathlib, signal, sys, time
from ups_fast import config, report, rounds, train

def fork(*words):
    print(flush=True)
    child = os.fork()
    if not child:
        os._exit(train.main([*WORDS, *words]))
    return child

def end(child):
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)

child = fork("run_dir=runs/killed", "checkpoint_seconds=0")  # which saves after every step
while not pathlib.Path("runs/killed/checkpoint.pt").exists() and not os.waitpid(child, os.WNOHANG)[0]:
    time.sleep(0.01)
os.kill(child, signal.SIGKILL)
end(child)
print("AGAIN")
end(fork("run_dir=runs/killed"))
print("WHOLE")
end(fork("run_dir=runs/whole"))
print("RANGE")
end(fork("run_dir=runs/whole", "method.weight=-1"))
print("HELP")
print(config.help_text())
"""


def command_of_page() -> list[str]:
    (words,) = (each for each in commands(PAGE, "python -m ups_fast.train") if "method.name=entropy" in each)
    return [word for word in words if not word.startswith("run_dir=")]


@pytest.mark.slow
def test_the_method_of_the_page_trains_and_goes_on_after_it_was_killed(copy: Path) -> None:
    """By the command's main; its keys have ranges and stand in the help."""
    code = f"WORDS = {[*command_of_page(), *TINY]}\n{DRIVER}"
    env = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, env=env, **pipes)
    assert done.returncode == 0, done.stdout
    killed, again, whole, refused, text = re.split(r"^[A-Z]{4,5}$", done.stdout, flags=re.MULTILINE)
    assert killed.endswith(f"\n{-signal.SIGKILL}\n") and "runs/killed: a new run" in killed
    assert again.endswith("\n0\n") and "runs/killed: going on from round " in again
    assert whole.endswith("\n0\n") and "runs/whole: a new run" in whole and "method: entropy" in whole
    want = load_file(copy / "runs/whole/model.safetensors")
    got = load_file(copy / "runs/killed/model.safetensors")
    assert want and all(tensor.equal(got[name]) for name, tensor in want.items())
    assert refused == "\n\nerror: method.weight must be in [0, 1000], got -1.0\n2\n"
    assert "\nmethod.name=entropy:\n" in text
    assert "| meta_pseudo_labels | entropy]" in " ".join(text.split())
