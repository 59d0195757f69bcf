"""Runs of several processes: the same labels bit for bit, the same training, and no rank that hangs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from ranks import results
from torch import Tensor

from ups_fast.methods import METHODS
from ups_fast.methods.method import Group, Layout
from ups_fast.world import ALONE, World


def equal(a: Any, b: Any) -> bool:
    """Bit for bit, NaN included."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, Tensor):
        alike = a.dtype == b.dtype and a.shape == b.shape
        return alike and all(torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in [(a, b)])
    return bool(a == b)


def test_rows_are_dealt_out() -> None:
    worlds = [World(rank, 3) for rank in range(3)]
    layout = Layout((Group("positive", 7), Group("negative", 5)), 4)
    mine = [[group.rows for group in layout.own(world).groups] for world in worlds]
    assert mine == [[3, 1], [2, 2], [2, 2]] and layout.own(ALONE) is layout
    rows = torch.arange(24).view(2, 12)
    assert torch.equal(torch.stack([world.own(rows) for world in worlds], -1).flatten(1), rows)


@pytest.mark.parametrize("n, rows", [(0, 4), (1, 4), (8, 4), (9, 4), (100, 7)])
def test_parts_are_whole_batches(n: int, rows: int) -> None:
    for size in (1, 2, 3, 8):
        parts = [World(rank, size).part(n, rows) for rank in range(size)]
        assert [i for part, _ in parts for i in range(n)[part]] == list(range(n))
        assert all(turns * rows >= len(range(n)[part]) for part, turns in parts)
        assert all(part.start % rows == 0 for part, _ in parts if part.start < n)


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_labels_are_equal_bit_for_bit(size: int, tmp_path: Path) -> None:
    (alone,) = results(1, ranks.label, tmp_path / "1")
    for found in results(size, ranks.label, tmp_path / "n"):
        for name, want in alone.items():
            if name.startswith("told"):
                assert found[name][1] <= want[1]
            else:
                assert equal(found[name], want), name
    assert sum(len(set(each["label"].tolist())) > 1 for name, each in alone.items() if isinstance(each, dict)) >= 4


QUICK = ("ups", "fixmatch", "freematch", "comatch", "meta_pseudo_labels")
CASES = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in METHODS]


def assert_trained_alike(size: int, tmp_path: Path, **changes: Any) -> None:
    """All ranks are equal after each step, and within rounding of one process."""
    work = partial(ranks.train, **changes)
    (alone,) = results(1, work, tmp_path / "1")
    first, *others = results(size, work, tmp_path / "n")
    for other in others:
        assert other["after"] == first["after"] and equal(other["found"], first["found"])
        assert equal(other["weights"], first["weights"])
    assert len(first["after"]) == len(alone["after"]) == len(set(alone["after"]))
    for name, want in alone["weights"].items():
        assert torch.allclose(first["weights"][name].float(), want.float(), atol=1e-4, rtol=1e-3), name
    for got, want in zip(first["rows"], alone["rows"], strict=True):
        assert got["train_loss"] == pytest.approx(want["train_loss"], rel=1e-3)
        assert got["positives"] == want["positives"] and got["test_acc"] == want["test_acc"]


@pytest.mark.parametrize("name", CASES)
def test_training_is_that_of_one_process(name: str, tmp_path: Path) -> None:
    assert_trained_alike(2, tmp_path, **{"method.name": name})


@pytest.mark.slow
@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize("name", ["ups", "flexmatch", "comatch", "meta_pseudo_labels"])
def test_training_of_more_ranks(name: str, size: int, tmp_path: Path) -> None:
    assert_trained_alike(size, tmp_path, **{"method.name": name})


@pytest.mark.parametrize(
    "changes",
    [
        {"train.ema": 0.5, "select.heads": 3, "train.momentum": 0.5},
        pytest.param({"train.optimizer": "adamw", "train.lr": 0.003}, marks=pytest.mark.slow),
    ],
)
def test_averages_heads_and_optimizers(changes: dict[str, Any], tmp_path: Path) -> None:
    assert_trained_alike(2, tmp_path, **changes)


def test_sync_bn_is_that_of_one_process(tmp_path: Path) -> None:
    assert_trained_alike(2, tmp_path, what="pictures", **{"train.sync_bn": True, "train.rounds": 1})


def test_batch_norm_is_local_and_its_statistics_are_shared(tmp_path: Path) -> None:
    work = partial(ranks.train, what="pictures", **{"train.rounds": 1, "train.ema": 0.5})
    first, other = results(2, work, tmp_path / "n")
    assert first["after"] == other["after"] and equal(first["weights"], other["weights"])
