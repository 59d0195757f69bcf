"""Whole networks side by side: each is the network that it would be alone, and together they run, resume and answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.testing import assert_close
from tracing import traced

from ups_fast import config, load_model, rounds
from ups_fast.data import load_set
from ups_fast.models import Ensemble, build
from ups_fast.models.network import keys_by_head
from ups_fast.modules import mc_dropout
from ups_fast.reference import dropout_keys
from ups_fast.selection import passes_over, skipped
from ups_fast.tasks import SINGLE

H, B, C = 3, 4, 5
X = torch.rand(B, 1, 12, 12, generator=torch.Generator().manual_seed(0))
KEYS = torch.arange(B, dtype=torch.int32)
NAMES = ("wrn-10-1", "cnn13")


def network(name: str) -> Ensemble:
    torch.manual_seed(3)
    found = build(name, n_classes=C, channels=1, size=12, heads=H, dropout=0.4)
    assert isinstance(found, Ensemble)
    return found.eval()


def alone(model: Ensemble, keys: Tensor | None) -> Tensor:  # [H, B, C]
    own = [None] * H if keys is None else keys_by_head(keys, H).chunk(H)
    return torch.stack([each(X, key) for each, key in zip(model.networks, own, strict=True)])


@pytest.mark.parametrize("name", NAMES)
def test_the_answer_is_the_mean_probability(name: str) -> None:
    model = network(name)
    for keys in (None, KEYS):
        each = alone(model, keys)
        assert not torch.allclose(each[0], each[1], atol=1e-3)
        assert_close(model.members(X, keys), each)
        assert_close(model(X, keys).exp(), each.softmax(-1).mean(0))
        assert_close(model.classify(model.embed(model.prefix(X), keys)), model(X, keys))


@pytest.mark.parametrize("name, mc_layers", [("wrn-10-1", 0), ("wrn-10-1", 1), ("cnn13", 1)])
def test_a_pass_is_by_one_of_them(name: str, mc_layers: int) -> None:
    """Pass p is what network p mod H says with the keys of pass p."""
    model, passes = network(name), 2 * H
    skip, first = skipped(model, mc_layers), model.networks[0]
    assert skip == (first.n_dropouts - 1 if mc_layers else 0) and first.n_dropouts > 1
    with mc_dropout(model, active=False), torch.no_grad():
        found = passes_over(model, X, torch.arange(B), passes, 7, skip)
        assert found.shape == (passes, B, C)
        draw = torch.arange(passes).repeat_interleave(B)
        keys = dropout_keys(torch.arange(B).repeat(passes), seed=7, draw=draw).view(passes, B)
        for p in range(passes):
            one = model.networks[p % H]
            assert_close(found[p], one.passes(one.prefix(X, skip), keys[p], 1, skip)[0])


def test_each_learns_as_it_would_alone() -> None:
    whole, target = network("wrn-10-1"), torch.tensor([0, 1, 4, 2])
    SINGLE.loss(whole.members(X, None), {"target": target}).backward()
    for mine, own in zip(whole.networks, network("wrn-10-1").networks, strict=True):
        SINGLE.loss(own.members(X, None), {"target": target}).backward()
        for (name, ours), theirs in zip(mine.named_parameters(), own.parameters(), strict=True):
            assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_heads_must_be_positive() -> None:
    with pytest.raises(ValueError, match="heads must be at least 1, got 0"):
        build("wrn-10-1", n_classes=C, channels=1, size=12, heads=0, dropout=0.4)


def settings(run_dir: Path, **changes: object) -> config.Config:
    return config.make({
        "data.name": "digits", "data.n_labels": 40, "model.name": "wrn-10-1", "model.dropout": 0.0,
        "select.heads": 2, "select.passes": 2, "train.rounds": 1, "train.epochs": 1, "train.batch_size": 64,
        "threads": 1, "runtime.step": "eager", "run_dir": str(run_dir), "report.baselines": False, **changes,
    })  # fmt: skip


def test_a_run_of_two_networks(tmp_path: Path) -> None:
    """Without dropout the passes are the networks. The folder's network says what the run's said."""
    data = load_set("digits", "")
    data = replace(
        data,
        train_images=data.train_images[:240],
        train_labels=data.train_labels[:240],
        test_images=data.test_images[:20],
        test_labels=data.test_labels[:20],
    )
    result = rounds.run(settings(tmp_path / "run"), data, console=Console(quiet=True))
    model = load_model(tmp_path / "run")
    assert isinstance(model, Ensemble) and model.heads == 2
    found = result.pseudo_labels
    x = data.train_images[found.index].permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        p = model.members((x - model.mean) / model.std, None).softmax(-1)  # [2, U, C]
    mean = p.mean(0)
    assert torch.equal(mean.argmax(-1), found.label)
    of_label = p.gather(-1, found.label.expand(2, -1)[..., None])[..., 0]
    assert_close(found.confidence, of_label.mean(0), rtol=1e-4, atol=1e-5)
    assert found.std.max() > 0.01
    with pytest.raises(ValueError, match=r"select\.heads=2 is for method\.name="):
        rounds.run(
            settings(tmp_path / "other", **{"method.name": "fixmatch"}), data, console=Console(quiet=True)
        )


@pytest.mark.slow
def test_members_compile_as_one_graph() -> None:
    model = network("wrn-10-1")
    compiled = traced(passes_over)
    with mc_dropout(model, active=False), torch.no_grad():
        assert_close(
            compiled(model, X, torch.arange(B), H, torch.tensor(7), 0),
            passes_over(model, X, torch.arange(B), H, 7, 0),
            rtol=1e-3,
            atol=1e-4,
        )
