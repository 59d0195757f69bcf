"""A trained network in its file: what it knows, and some hundred rotten or crafted files, refused with one sentence."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import ups_fast
from ups_fast.config import ModelConfig
from ups_fast.files import RunFolderError
from ups_fast.models import Network
from ups_fast.models.saved import load_model, rebuild, save_model

NAN, INF = math.nan, math.inf


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A folder with the file of a small network."""
    model = {**vars(ModelConfig()), "name": "wrn-10-1"}
    about = {"model": model, "classes": ["top", "middle", "bottom"], "channels": 1, "size": [8, 8]}
    about |= {"mean": [0.4], "std": [0.25]}
    folder = tmp_path / "trained"
    folder.mkdir()
    save_model(folder, rebuild(about), about)
    return folder


def test_it_is_public() -> None:
    assert ups_fast.load_model is load_model


def test_load_model_says_what_is_missing(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.* no such folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"it has no model\.safetensors"):
        load_model(tmp_path)
    (tmp_path / "checkpoint.pt").touch()
    with pytest.raises(FileNotFoundError, match="which the same train command makes when its first round is"):
        load_model(tmp_path)
    file = trained / "model.safetensors"
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors holds no trained network: it is a file"):
        load_model(file)
    with pytest.raises(ValueError, match="device must be auto, cpu, cuda or cuda:N, got 'gpu'"):
        load_model(trained, "gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device=cuda needs a GPU"):
            load_model(trained, device=torch.device("cuda"))
    whole = file.read_bytes()
    model = load_model(trained)
    assert not model.training
    with safetensors.safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()["ups_fast"])
    del about["mean"]
    save_model(trained, model, about)
    with pytest.raises(
        RunFolderError, match=r"is damaged or no network of ups_fast: its metadata lack 'mean'"
    ):
        load_model(trained)
    for damaged in (whole[: len(whole) // 2], b"", b"PK\3\4" + bytes(99)):
        file.write_bytes(damaged)
        with pytest.raises(RunFolderError, match=r"model\.safetensors is damaged"):
            load_model(trained)


def test_a_trained_network_knows_what_belongs_to_it(trained: Path) -> None:
    model = load_model(trained)
    assert isinstance(model, Network) and model.classes == ["top", "middle", "bottom"]
    assert (model.channels, model.size, model.mean.shape, model.std.shape) == (
        1,
        [8, 8],
        (1, 1, 1),
        (1, 1, 1),
    )
    stored = safetensors.torch.load_file(trained / "model.safetensors")
    assert set(model.state_dict()) == set(stored) and not model.training
    pixels = torch.zeros(2, model.channels, *model.size, dtype=torch.uint8)
    assert model((pixels / 255 - model.mean) / model.std).shape == (2, 3)
    assert copy.deepcopy(model).to(torch.float64).mean.dtype == torch.float64, (
        "they go where the network goes"
    )


@pytest.mark.slow
def test_no_mutated_network_is_believed(trained: Path, tmp_path: Path) -> None:
    file = trained / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    with safetensors.safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()["ups_fast"])
    good = about["model"]
    wide = {**about, "model": {**good, "name": "wrn-1000-100"}}  # of 20 TB
    cases: list[tuple[Any, dict[str, Tensor]]] = [
        (wide, weights),
        ([], weights),
        (None, weights),
        ({}, weights),
    ]
    cases += [({k: v for k, v in about.items() if k != key}, weights) for key in about if key != "heads"]
    for key in about:
        cases += [
            ({**about, key: value}, weights)
            for value in (None, "text", True, -1, 0.5, [], {}, [None], [10**400], ["a"])
        ]
    for key in good:
        for value in (None, "text", -1, 10**400):
            cases.append(({**about, "model": {**good, key: value}}, weights))
    cases += [
        ({**about, key: value}, weights)
        for key in ("mean", "std")
        for value in ([NAN], [INF], [1e300], [1, 1])
    ]
    cases += [
        ({**about, "size": value}, weights)
        for value in ([8], [8, 8, 8], [0, 8], [8.0, 8], [10**9, 8], [True, 8])
    ]
    cases += [({**about, "std": [0.0]}, weights), ({**about, "classes": ["a", "b"]}, weights)]
    cases += [({**about, "model": {**good, "weights": "/etc/passwd"}}, weights)]
    for name in list(weights)[:3]:
        cases += [
            (about, {**weights, name: weights[name].double()}),
            (about, {**weights, name: weights[name][None]}),
        ]
        cases += [(about, {key: value for key, value in weights.items() if key != name})]
    floats = [name for name in weights if weights[name].is_floating_point()]
    cases += [
        (about, {**weights, name: torch.full_like(weights[name], x)})
        for name in floats[:2]
        for x in (NAN, INF)
    ]
    cases += [(about, {**weights, "\x1b[2J": torch.zeros(2)}), (about, {})]
    for name in weights:
        if name.endswith("running_var"):
            cases.append((about, {**weights, name: -torch.ones_like(weights[name])}))
    assert len(cases) > 90
    for metadata, tensors_ in cases:
        safetensors.torch.save_file(
            tensors_, tmp_path / "model.safetensors", {"ups_fast": json.dumps(metadata)}
        )
        with pytest.raises(
            RunFolderError, match=r"model\.safetensors is damaged or no network of ups_fast"
        ) as caught:
            load_model(tmp_path)
            pytest.fail(f"{str(metadata)[:300]} is believed")
        assert str(caught.value).isprintable() and len(str(caught.value)) < 1000
    for raw in ("", "[" * 100_000, "NaN", '"text"'):
        safetensors.torch.save_file(weights, tmp_path / "model.safetensors", {"ups_fast": raw})
        with pytest.raises(RunFolderError, match=r"model\.safetensors is damaged"):
            load_model(tmp_path)


@pytest.mark.parametrize("name", ["torchvision:regnet_y_400mf", "torchvision:regnet_y_128gf"])
def test_a_network_that_needs_memory_to_be_made_is_as_large_as_its_file(tmp_path: Path, name: str) -> None:
    """Of a RegNet widths are read while it is made: it cannot be tried without memory."""
    pytest.importorskip("torchvision")
    model = {**vars(ModelConfig()), "name": "torchvision:regnet_y_400mf"}
    about = {
        "model": model,
        "classes": ["a", "b"],
        "channels": 1,
        "size": [64, 64],
        "mean": [0.5],
        "std": [0.5],
    }
    made = rebuild(about)
    save_model(tmp_path, made, {**about, "model": {**model, "name": name}})
    if name.endswith("400mf"):
        same = load_model(tmp_path).state_dict()
        assert all(torch.equal(same[key], value) for key, value in made.state_dict().items() if key in same)
    else:
        with pytest.raises(RunFolderError, match=r"regnet_y_128gf .* it is larger"):
            load_model(tmp_path)
