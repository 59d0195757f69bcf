"""What help() says of every public name: its parts are there, and its examples run."""

from __future__ import annotations

import doctest
import inspect
import re
from dataclasses import asdict

import pytest
import torch

import ups_fast
from ups_fast.config import ModelConfig
from ups_fast.models.saved import rebuild, save_model

NAMES = [name for name in ups_fast.__all__ if name != "reference"]
FUNCTIONS = [name for name in NAMES if inspect.isfunction(getattr(ups_fast, name))]


def doc_of(name: str) -> str:
    return inspect.getdoc(getattr(ups_fast, name)) or ""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which runs/digits is a run, as far as load_model reads it."""
    place = tmp_path_factory.mktemp("place")
    (place / "runs/digits").mkdir(parents=True)
    model = asdict(ModelConfig(name="wrn-10-1"))
    about = {
        "model": model,
        "classes": list("0123456789"),
        "channels": 1,
        "size": [8, 8],
        "mean": [0.3],
        "std": [0.4],
    }
    save_model(place / "runs/digits", rebuild(about), about)
    return place


@pytest.mark.parametrize("name", NAMES)
def test_examples_run(name, place, monkeypatch):
    """As a reader types them, after `import torch, ups_fast` and `from ups_fast import *`."""
    monkeypatch.chdir(place)
    names = {each: getattr(ups_fast, each) for each in ups_fast.__all__}
    test = doctest.DocTestParser().get_doctest(
        doc_of(name), {"torch": torch, "ups_fast": ups_fast, **names}, name, None, 0
    )
    assert test.examples, f"{name} has no example"
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_tells_its_arguments_results_and_errors(name):
    doc, signature = doc_of(name), inspect.signature(getattr(ups_fast, name))
    assert ">>> " in doc, "an example"
    if signature.return_annotation not in ("None", "Iterator[None]"):
        assert re.search(r"^Returns:$", doc, re.MULTILINE), "what it returns"
    if not signature.parameters:
        return
    assert re.search(r"^Raises:$", doc, re.MULTILINE), "what it raises"
    assert re.search(r"^Args:$", doc, re.MULTILINE), "its arguments"
    told = doc[doc.index("Args:") :]
    for argument in signature.parameters:
        assert re.search(rf"\b{argument}\b.*:", told), f"the argument {argument}"
