"""Runs of several processes: the same labels bit for bit, the same training, and no rank that hangs."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from ranks import End, commands, results
from torch import Tensor

from ups_fast.methods import METHODS
from ups_fast.methods.method import Group, Layout
from ups_fast.checkpoint import load_checkpoint
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
    work = partial(ranks.trained, **changes)
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
    work = partial(ranks.trained, what="pictures", **{"train.rounds": 1, "train.ema": 0.5})
    first, other = results(2, work, tmp_path / "n")
    assert first["after"] == other["after"] and equal(first["weights"], other["weights"])


# Kills -------------------------------------------------------------------------------------------------------


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A command of two rounds of eight steps that saves after each one."""
    data = ranks.blobs()
    x, y = data.train_images.numpy(), data.train_labels.numpy()
    tests = {"x_test": data.test_images.numpy(), "y_test": data.test_labels.numpy()}
    np.savez(tmp_path / "rows.npz", x_labeled=x[:24], y_labeled=y[:24], x_unlabeled=x[24:], y_unlabeled=y[24:], **tests)
    (tmp_path / "run.yaml").write_text("data: {name: features, root: rows.npz}\n")
    keys = {
        "data.root": tmp_path / "rows.npz", "run_dir": tmp_path / "run", "checkpoint_seconds": 0, "device": "cpu",
        "threads": 1, "model.name": "mlp-12", "train.rounds": 2, "train.epochs": 2, "train.min_steps": 8,
        "train.batch_size": 12, "select.passes": 2, "select.tau_p": 0.4, "report.baselines": "false",
        "report.review": "false",
    }  # fmt: skip
    return [str(tmp_path / "run.yaml"), *(f"{key}={value}" for key, value in keys.items())]


def signaled(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def fail() -> None:
    raise ValueError("the disk of this machine is gone")


def sentences(ends: list[End]) -> list[str]:
    return [line for end in ends for line in end.err.splitlines() if line.startswith("error: ")]


def assert_goes_on(words: list[str], tmp_path: Path, size: int = 2) -> None:
    """By the same command, to the end of a run that was left alone."""
    ends, _ = commands(words, tmp_path / "again", size)
    assert [end.status for end in ends] == [0] * size, ends
    assert "going on from round" in ends[0].out and all(end.out == "" for end in ends[1:])
    alone = [word if not word.startswith("run_dir=") else f"run_dir={tmp_path / 'whole'}" for word in words]
    commands(alone, tmp_path / "alone", 2)
    got, want = (load_checkpoint(tmp_path / name) for name in ("run", "whole"))
    assert got and want and got.round == want.round == 2
    assert got.pseudo_labels and want.pseudo_labels
    if size == 2:
        assert equal(got.pseudo_labels, want.pseudo_labels)
    else:
        assert equal(got.pseudo_labels["label"], want.pseudo_labels["label"])


@pytest.mark.parametrize(
    "rank, number",
    [(1, signal.SIGKILL), pytest.param(0, signal.SIGKILL, marks=pytest.mark.slow)],
)
def test_a_killed_rank_ends_all_and_the_same_command_goes_on(
    rank: int, number: int, words: list[str], tmp_path: Path
) -> None:
    ends, seconds = commands(words, tmp_path / "killed", at={rank: (5, signaled(number))})
    assert ends[rank].status == -number and ends[1 - rank].status == 2 and seconds < 10
    (said,) = sentences(ends)
    assert "has ended or does not answer" in said and said.endswith("the same command goes on")
    assert f"rank {rank} of 2" in said or rank == 0  # which kept the list of all
    assert_goes_on(words, tmp_path)


@pytest.mark.slow
def test_a_stopped_rank_ends_all_after_the_timeout(words: list[str], tmp_path: Path) -> None:
    ends, seconds = commands([*words, "runtime.timeout=2"], tmp_path / "stopped", at={1: (5, signaled(signal.SIGSTOP))})
    assert ends[0].status == 2 and "rank 1 of 2 has ended or does not answer" in sentences(ends)[0]
    assert ends[1].status == -signal.SIGKILL  # by the test
    assert_goes_on(words, tmp_path)


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_signal_to_one_rank_saves_and_ends_all(rank: int, words: list[str], tmp_path: Path) -> None:
    keep = [*words, "checkpoint_seconds=3600"]
    ends, seconds = commands(keep, tmp_path / "told", at={rank: (5, signaled(signal.SIGTERM))})
    assert [end.status for end in ends] == [130, 130] and seconds < 5
    assert "stopped in round 0" in ends[0].err and "to go on: " in ends[0].err and ends[1].err == ""
    state = load_checkpoint(tmp_path / "run")
    assert state and (state.epoch, state.step) == (1, 1)
    assert_goes_on(keep, tmp_path)


def test_a_rank_that_fails_says_why_and_ends_all(words: list[str], tmp_path: Path) -> None:
    ends, seconds = commands(words, tmp_path / "failed", at={1: (5, fail)})
    assert [end.status for end in ends] == [2, 2] and seconds < 10
    assert sentences(ends) == ["error: the disk of this machine is gone (rank 1 of 2)"]


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3, 4])
def test_another_number_of_ranks_goes_on(size: int, words: list[str], tmp_path: Path) -> None:
    ends, _ = commands(words, tmp_path / "told", at={0: (11, signaled(signal.SIGTERM))})
    assert [end.status for end in ends] == [130, 130]
    assert_goes_on(words, tmp_path, size)


# Bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, own, said",
    [
        (2, {0: ["train.batch_size=9"], 1: ["train.batch_size=9"]}, "train.batch_size=9 cannot be shared by 2 processes"),
        (2, {1: ["train.lr=0.5"]}, "train.lr is 0.03 for rank 0, but 0.5 for rank 1 of 2: all processes"),
        pytest.param(2, {1: ["train.lr=x"]}, "train.lr .* (rank 1 of 2)", marks=pytest.mark.slow),
        pytest.param(
            4, {r: ["train.batch_size=3"] for r in range(4)}, "train.batch_size=3 cannot be shared by 4 processes: make it a multiple of 4",
            marks=pytest.mark.slow,
        ),
        pytest.param(2, {r: ["data.root=none.npz"] for r in range(2)}, "none.npz", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_what_cannot_be_shared_is_said_by_rank_0(
    size: int, own: dict[int, list[str]], said: str, words: list[str], tmp_path: Path
) -> None:
    ends, seconds = commands(words, tmp_path / "refused", size, own=own)
    assert [end.status for end in ends] == [2] * size and seconds < 10
    (sentence,) = sentences(ends)
    assert sentence in ends[0].err and all(part in sentence for part in said.split(".*"))
    assert not (tmp_path / "run").exists()
