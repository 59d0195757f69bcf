"""The examples run as their readers run them, and reach what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str) -> str:
    command = [sys.executable, EXAMPLES / name]
    done = subprocess.run(command, capture_output=True, text=True, cwd=EXAMPLES.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.\d+(?:e-\d+)?|\d\.?e-\d+", text)]


@pytest.mark.slow
def test_fixmatch():
    """Four labels of a class: the labels alone give some 0.75."""
    accuracy, right = numbers(run("fixmatch.py"))
    assert accuracy > 0.85 and right > 0.9


@pytest.mark.slow
def test_features():
    alone, spread, found, trusted = numbers(run("features.py"))
    assert found > alone + 0.03 and trusted > 0.9 and spread > 0


@pytest.mark.slow
def test_image_features():
    alone, found, trusted = numbers(run("image_features.py"))
    assert found > alone > 0.7 and trusted > 0.95


@pytest.mark.slow
def test_text():
    """It says that UPS does not win. Where that changes, its words must."""
    found, trusted, alone, surest = numbers(run("text.py"))
    assert found > 0.75 and trusted > 0.9
    assert alone > found - 0.03 and surest > trusted


@pytest.mark.slow
def test_dataset_workers():
    lines = run("dataset_workers.py").splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "0 workers (None)",
        "2 workers (fork)",
        "2 workers (spawn)",
    ]
    assert len({line.split(":")[1].rsplit(",", 1)[0] for line in lines}) == 1, lines  # accuracy and pixels
    assert numbers(lines[0])[0] > 0.8


@pytest.mark.slow
def test_ddp():
    one, two, difference = numbers(run("ddp.py"))
    assert abs(one - two) < 0.01 and one > 0.7 and difference < 1e-4
