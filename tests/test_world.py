"""Runs of several processes: the same labels bit for bit, the same training, and no rank that hangs."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
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

from ups_fast import train
from ups_fast.checkpoint import load_checkpoint
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


@pytest.mark.parametrize(
    "size", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_labels_are_equal_bit_for_bit(size: int, tmp_path: Path) -> None:
    (alone,) = results(1, ranks.label, tmp_path / "1")
    for found in results(size, ranks.label, tmp_path / "n"):
        for name, want in alone.items():
            if name.startswith("told"):
                assert found[name][1] <= want[1]
            else:
                assert equal(found[name], want), name
    assert (
        sum(len(set(each["label"].tolist())) > 1 for name, each in alone.items() if isinstance(each, dict))
        >= 4
    )


QUICK = ("ups", "comatch")
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"train.ema": 0.5, "select.heads": 3, "train.momentum": 0.5},
        {"train.optimizer": "adamw", "train.lr": 0.003},
    ],
)
def test_averages_heads_and_optimizers(changes: dict[str, Any], tmp_path: Path) -> None:
    assert_trained_alike(2, tmp_path, **changes)


def test_sync_bn_is_that_of_one_process(tmp_path: Path) -> None:
    assert_trained_alike(2, tmp_path, what="pictures", **{"train.sync_bn": True, "train.rounds": 1})


@pytest.mark.slow
def test_batch_norm_is_local_and_its_statistics_are_shared(tmp_path: Path) -> None:
    work = partial(ranks.trained, what="pictures", **{"train.rounds": 1, "train.ema": 0.5})
    first, other = results(2, work, tmp_path / "n")
    assert first["after"] == other["after"] and equal(first["weights"], other["weights"])


# Kills -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data, path = ranks.blobs(), tmp_path_factory.mktemp("data") / "rows.npz"
    x, y = data.train_images.numpy(), data.train_labels.numpy()
    tests = {"x_test": data.test_images.numpy(), "y_test": data.test_labels.numpy()}
    np.savez(path, x_labeled=x[:24], y_labeled=y[:24], x_unlabeled=x[24:], y_unlabeled=y[24:], **tests)
    (path.parent / "run.yaml").write_text("data: {name: features}\n")
    return path


def command(rows: Path, folder: Path) -> list[str]:
    """Two rounds of eight steps, with a checkpoint after each."""
    keys = {
        "data.root": rows, "run_dir": folder, "checkpoint_seconds": 0, "device": "cpu", "threads": 1,
        "model.name": "mlp-12", "train.rounds": 2, "train.epochs": 2, "train.min_steps": 8, "train.batch_size": 12,
        "select.passes": 2, "select.tau_p": 0.4, "report.baselines": "false", "report.review": "false",
    }  # fmt: skip
    return [str(rows.parent / "run.yaml"), *(f"{key}={value}" for key, value in keys.items())]


@pytest.fixture
def words(rows: Path, tmp_path: Path) -> list[str]:
    return command(rows, tmp_path / "run")


@pytest.fixture(scope="module")
def whole(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The last labels of such a run that was left alone."""
    folder = tmp_path_factory.mktemp("whole")
    ends, _ = commands(command(rows, folder / "run"), folder / "said")
    assert [end.status for end in ends] == [0, 0], ends
    state = load_checkpoint(folder / "run")
    assert state and state.pseudo_labels and state.round == 2
    return state.pseudo_labels


def signaled(number: int) -> Callable[[], None]:
    return partial(ranks.signal_me, number)


def sentences(ends: list[End]) -> list[str]:
    return [line for end in ends for line in end.err.splitlines() if line.startswith("error: ")]


def assert_goes_on(words: list[str], tmp_path: Path, whole: dict[str, Tensor], size: int = 2) -> None:
    """By the same command, to the end of a run that was left alone."""
    ends, _ = commands(words, tmp_path / "again", size)
    assert [end.status for end in ends] == [0] * size, ends
    assert "going on from round" in ends[0].out and all(end.out == "" for end in ends[1:])
    got = load_checkpoint(tmp_path / "run")
    assert got and got.pseudo_labels and got.round == 2
    assert equal(got.pseudo_labels["label"], whole["label"])
    assert size != 2 or equal(got.pseudo_labels, whole)


@pytest.mark.parametrize(
    "rank, number",
    [(1, signal.SIGKILL), pytest.param(0, signal.SIGKILL, marks=pytest.mark.slow)],
)
def test_a_killed_rank_ends_all_and_the_same_command_goes_on(
    rank: int, number: int, words: list[str], tmp_path: Path, whole: dict[str, Tensor]
) -> None:
    ends, seconds = commands(words, tmp_path / "killed", at={rank: (5, signaled(number))})
    assert ends[rank].status == -number and ends[1 - rank].status == 2 and seconds < 10
    (said,) = sentences(ends)
    assert "has ended or does not answer" in said and said.endswith("the same command goes on")
    assert f"rank {rank} of 2" in said or rank == 0  # which kept the list of all
    assert_goes_on(words, tmp_path, whole)


@pytest.mark.slow
def test_a_stopped_rank_ends_all_after_the_timeout(
    words: list[str], tmp_path: Path, whole: dict[str, Tensor]
) -> None:
    ends, _ = commands(
        [*words, "runtime.timeout=2"], tmp_path / "stopped", at={1: (5, signaled(signal.SIGSTOP))}
    )
    assert ends[0].status == 2 and "rank 1 of 2 has ended or does not answer" in sentences(ends)[0]
    assert ends[1].status == -signal.SIGKILL  # by the test
    assert_goes_on(words, tmp_path, whole)


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_signal_to_one_rank_saves_and_ends_all(
    rank: int, words: list[str], tmp_path: Path, whole: dict[str, Tensor]
) -> None:
    keep = [*words, "checkpoint_seconds=3600"]
    ends, seconds = commands(keep, tmp_path / "told", at={rank: (5, signaled(signal.SIGTERM))})
    assert [end.status for end in ends] == [130, 130] and seconds < 5
    assert "stopped in round 0" in ends[0].err and ends[1].err == ""
    assert "to go on: the same command by torchrun, or in one process " in ends[0].err
    state = load_checkpoint(tmp_path / "run")
    assert state and (state.epoch, state.step) == (1, 1)
    assert_goes_on(keep, tmp_path, whole)


def test_a_rank_that_fails_says_why_and_ends_all(words: list[str], tmp_path: Path) -> None:
    ends, seconds = commands(words, tmp_path / "failed", at={1: (5, ranks.fail)})
    assert [end.status for end in ends] == [2, 2] and seconds < 10
    assert sentences(ends) == ["error: the disk of this machine is gone (rank 1 of 2)"]


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3, 4])
def test_another_number_of_ranks_goes_on(
    size: int, words: list[str], tmp_path: Path, whole: dict[str, Tensor]
) -> None:
    ends, _ = commands(words, tmp_path / "told", at={0: (11, signaled(signal.SIGTERM))})
    assert [end.status for end in ends] == [130, 130]
    assert_goes_on(words, tmp_path, whole, size)


# Bad input ---------------------------------------------------------------------------------------------------


UNEQUAL = {1: ["train.lr=0.5"]}, "train.lr is 0.03 for rank 0, but 0.5 for rank 1 of 2: all processes"


def all_of(size: int, *words: str) -> dict[int, list[str]]:
    return {rank: [*words] for rank in range(size)}


@pytest.mark.parametrize(
    "own, said",
    [
        (all_of(2, "train.batch_size=9"), "train.batch_size=9 cannot be shared by 2 processes"),
        UNEQUAL,
        pytest.param({1: ["train.lr=x"]}, "(rank 1 of 2)", marks=pytest.mark.slow),
        pytest.param(
            all_of(4, "train.batch_size=3"), "make it a multiple of 4, such as 4", marks=pytest.mark.slow
        ),
        pytest.param(all_of(2, "data.root=none.npz"), "none.npz", marks=pytest.mark.slow),
        pytest.param(all_of(2, "method.name=oops"), "method.name", marks=pytest.mark.slow),
        pytest.param(all_of(2, "device=cuda:1"), "device=cuda:1", marks=pytest.mark.slow),
        pytest.param(all_of(2, "run_dir=/dev/null"), "run_dir must be a folder", marks=pytest.mark.slow),
        pytest.param(all_of(2, "train.batch_sise=9"), "train.batch_size", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_is_said_by_rank_0(
    own: dict[int, list[str]], said: str, words: list[str], tmp_path: Path
) -> None:
    size = max(2, len(own))
    ends, seconds = commands(words, tmp_path / "refused", size, own=own)
    assert [end.status for end in ends] == [2] * size and seconds < 10
    (sentence,) = sentences(ends)
    assert sentence in ends[0].err and said in sentence
    assert not (tmp_path / "run").exists()


def test_an_address_in_use_and_variables_that_are_wrong(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        for name, value in ranks.environment(0, 2, other.getsockname()[1]).items():
            monkeypatch.setenv(name, value)
        assert train.main(words) == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert "is in use by another program: choose another port with torchrun --master-port" in said
    monkeypatch.setenv("RANK", "first")
    assert train.main(words) == 2
    assert "RANK must be a number where WORLD_SIZE is set, got first: use torchrun" in capfd.readouterr().err
    monkeypatch.setenv("RANK", "2")
    assert train.main(words) == 2
    assert "RANK must be below WORLD_SIZE=2, got 2: use torchrun" in capfd.readouterr().err
    for size in ("abc", "-3", "²"):
        monkeypatch.setenv("WORLD_SIZE", size)
        assert train.main(words) == 2
        assert f"WORLD_SIZE must be a number, got {size}: use torchrun" in capfd.readouterr().err


@pytest.mark.slow
def test_files_that_one_rank_finds_gone(tmp_path: Path) -> None:
    """All know of it before they learn from the batch."""
    first, other = results(2, partial(ranks.with_files, folder=str(tmp_path)), tmp_path / "n")
    assert first["after"] == other["after"] and equal(first["found"], other["found"])
    assert first["gone"] == other["gone"] and len(first["gone"]) == 3
    assert (first["found"]["label"] == -1).sum() == 3


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A folder with those of a network to freeze."""
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    torch.save(models.shufflenet_v2_x0_5(weights=None).state_dict(), tmp_path / "weights.pth")
    return tmp_path


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_features_of_a_frozen_network_are_shared_out_and_equal_bit_for_bit(size: int, weights: Path) -> None:
    cache = weights / "cache"
    (alone,) = results(1, partial(ranks.features, folder=str(weights)), weights / "1")
    work = partial(ranks.features, folder=str(weights), cache=str(cache))
    for way, said in (("n", "computed"), ("again", "from ")):
        ranks_of = results(size, work, weights / way)
        for found in ranks_of:
            assert torch.equal(found["train"], alone["train"]) and torch.equal(found["test"], alone["test"])
        assert ranks_of[0]["said"].count(said) == 4, ranks_of[0]["said"]
        assert len(list(cache.glob("*.npy"))) == 4
    assert len(alone["train"]) == 240 and not torch.equal(alone["train"][:80], alone["train"][80:160])


@pytest.mark.slow
def test_training_on_features_of_a_frozen_network(weights: Path) -> None:
    own = {"name": "torchvision:shufflenet_v2_x0_5", "weights": str(weights / "weights.pth"), "freeze": True}
    changes = {f"model.{key}": value for key, value in {**own, "input_size": 32, "head": "mlp-12"}.items()}
    more = {**changes, "train.rounds": 1, "data.crop": 0, "data.noise": 0.1, "data.cache": ""}
    assert_trained_alike(2, weights, what="pictures", **more)


@pytest.mark.slow
def test_the_messages_of_a_loss_are_part_of_its_graph(tmp_path: Path) -> None:
    """And their gradients: eager, compiled, in two processes and in one."""
    quick = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    (alone,) = results(1, ranks.compiled, tmp_path / "1", 400, **quick)
    for found in results(2, ranks.compiled, tmp_path / "n", 400, **quick):
        half = len(found) // 2
        for eager, compiled, want in zip(found[:half], found[half:], alone[:half], strict=True):
            assert torch.allclose(eager, want, rtol=1e-4, atol=1e-5)
            assert torch.allclose(compiled, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_torchrun(words: list[str], tmp_path: Path, whole: dict[str, Tensor]) -> None:
    """A process that dies, and the same command."""
    python = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command = [*python, f"--master-port={ranks.free_port()}", "-m", "ups_fast.train", *words]
    done = subprocess.Popen([*command, "train.min_steps=20000"], stderr=subprocess.PIPE, text=True)
    checkpoint, end = tmp_path / "run" / "checkpoint.pt", time.monotonic() + 100
    while not checkpoint.exists() and time.monotonic() < end:
        time.sleep(0.1)
    children = f"/proc/{done.pid}/task/{done.pid}/children"
    os.kill(int(Path(children).read_text().split()[-1]), signal.SIGKILL)
    _, err = done.communicate(timeout=60)
    assert done.returncode == 1 and err.count("error: ") == 1 and "; the same command goes on" in err
    shutil.rmtree(tmp_path / "run")
    done2 = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done2.returncode == 0 and "2 processes" in done2.stdout, done2.stderr
    state = load_checkpoint(tmp_path / "run")
    assert state and state.pseudo_labels and equal(state.pseudo_labels, whole)
    assert (tmp_path / "run" / "report.html").exists()
