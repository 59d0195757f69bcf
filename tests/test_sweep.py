"""Sweeps: what words may say, trials that nobody loses, processes that die, and the page that comes of them."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from test_rounds import one_thread
from test_study import Links, features, threads

from ups_fast import sweep, sweep_drive, sweep_optuna, sweep_storage, sweep_worker, workers
from ups_fast.files import RunFolderError
from ups_fast.report import sweep_figure
from ups_fast.report.sweep_page import points_of, sweep_page
from ups_fast.state import task_in
from ups_fast.sweep_claims import Claims, Rescue
from ups_fast.sweep_space import read
from ups_fast.sweep_storage import FAILED, RUNNING, WAITING, Board, Plan, StorageGone

__all__ = ["features", "one_thread", "threads"]  # the fixtures
ROOT = Path(__file__).parents[1]
DIGITS = str(ROOT / "configs/digits.yaml")


@pytest.fixture
def tiny(features: Path, tmp_path: Path) -> list[str]:
    """The words of a command whose trials take a moment."""
    return tiny_in(tmp_path, features)


def tiny_in(folder: Path, features: Path) -> list[str]:
    config = folder / "tiny.yaml"
    config.write_text(
        f"recipe: features\ndata: {{root: {features}, val_share: 0.3}}\n"
        "train: {rounds: 2, min_steps: 2, batch_size: 25}\nselect: {heads: 1, passes: 2, uncertainty: dropout}\n"
    )
    return [str(config), f"run_dir={folder / 'out'}", "--workers", "2"]


@cache
def empty() -> bytes:
    """A storage without trials, whose tables take a while to make."""
    with TemporaryDirectory() as place:
        sweep_optuna.open_storage(f"sqlite:///{place}/empty.db").engine.dispose()
        return Path(place, "empty.db").read_bytes()


def plan_of(tmp_path: Path, *words: str, trials: int = 0, url: str = "") -> Plan:
    if not url and not (tmp_path / "sweep.db").exists():
        (tmp_path / "sweep.db").write_bytes(empty())
    space = read(DIGITS, [f"run_dir={tmp_path / 'out'}", *words])
    count = trials or len(space.grid) * len(space.seeds)
    return Plan(space, url or f"sqlite:///{tmp_path / 'sweep.db'}", count)


# Words -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "nothing varies: give a key several values"),
        ("train.lr=0.3..0.1", "train.lr must be a range from a lower to a higher number, got '0.3..0.1'"),
        ("train.lr=0.1..0.1", "train.lr must be a range from a lower to a higher number"),
        ("train.lr=0..0.1:log", "train.lr must be a range above 0 for :log"),
        ("train.lr=0.1..inf", "train.lr must be a range from a lower to a higher number"),
        ("train.lr=a..b", "train.lr must be a range of numbers such as 1..10, got 'a..b'"),
        ("train.epochs=1.5..3", "train.epochs must be a range of integers"),
        ("train.lr=-1..0.1", "train.lr=-1.0: train.lr must be in (0, 1000], got -1.0"),
        ("train.lr=0.1,0.2..0.3", "train.lr must be a list or a range, got both"),
        ("train.lr=0.1,0.10", "train.lr must list different values"),
        ("train.lr=0.1,", "train.lr must list different values"),
        ("train.warm_start=true,True", "train.warm_start must list different values"),
        ("train.warm_start=1,yes", "train.warm_start must list different values"),
        ("train.warm_start=true..false", "train.warm_start must be true or false, got 'true..false'"),
        ("method.name=ups..fixmatch", "method.name must be one of"),
        ("train.lr=0.1..0.2:LOG", "train.lr must be a number, got '0.1..0.2:LOG'"),
        ("train.lr=", "train.lr must be a number, got nothing"),
        ("seed=0,1 seed=2", "seed is given twice"),
        ("train.lr=0.1,0.2 train.lr=0.3", "train.lr is given twice"),
        ("train.lr=0.1,0.2 train.lr=0.3,0.4", "train.lr is given twice"),
        ("select.tau_n=0.6..0.9", "select.tau_n=0.9: select.tau_n must not exceed select.tau_p"),
        ("method.name=ups,fixmtch", "method.name=fixmtch: method.name must be one of"),
        ("foo=1,2", "foo=1: unknown key 'foo'"),
        ("data.n_labels=40,80", "data.n_labels decides which samples validate"),
        ("data.val_share=0.1..0.3", "data.val_share decides which samples validate"),
        ("seed=1,1", "seed must be different integers"),
        ("seed=3..1", "seed must be different integers"),
        ("seed=x,y", "seed must be different integers"),
        ("seed=0..1999 train.lr=1,2", "these lists make 4,000 trials, and 2,000 are allowed"),
        ("train.lr=1,2 --trials 3", "--trials is for ranges, and these lists make a grid of 2 trials"),
        ("train.lr=1,2", "a sweep is judged by validation samples, and never by test samples"),
        ("train.lr=1,2 data.val_share=0.001", "data.val_share=0.001 holds out no sample"),
        ("train.lr=1,2 data.val_share=0.3 --storage nonsense", "--storage must be a URL such as"),
        ("train.lr=1,2 data.val_share=0.3 --storage oracledb://x", "--storage oracledb://x cannot be used"),
        (
            "train.lr=1,2 data.val_share=0.3 --storage sqlite://",
            "--storage must be a file that all workers can open",
        ),
        ("train.lr=1,2 data.val_share=0.3 device=cuda:77", "device=cuda:77"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_nothing_is_written(tmp_path, capsys, words, said):
    assert sweep.main([DIGITS, f"run_dir={tmp_path / 'new/out'}", *words.split()]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err
    assert not list(tmp_path.glob("new/out/*.db"))
    assert "storage" in words or not list(tmp_path.iterdir())


def test_words_make_axes(tmp_path):
    words = [
        *("train.lr=0.01..0.3:log", "train.epochs=5..20", "select.tau_p=0.6,0.7", "seed=0..2"),
        *("data.ops=Rotate -9 9, Sharpness 1", "train.rounds=3", f"run_dir={tmp_path}"),
    ]
    space = read(DIGITS, words)
    lr, epochs, tau = space.axes
    assert (lr.log, lr.whole, lr.ends, epochs.whole, epochs.ends) == (True, False, (0.01, 0.3), True, (5, 20))
    assert tau.words == ("0.6", "0.7") and space.seeds == (0, 1, 2) and space.is_search
    cfg = space.trial(7, {"train.lr": 1.5e-05, "train.epochs": 6, "select.tau_p": "0.7"}, 2)
    assert (cfg.train.lr, cfg.train.epochs, cfg.select.tau_p, cfg.seed) == (1.5e-05, 6, 0.7, 2)
    assert cfg.data.ops == "Rotate -9 9, Sharpness 1" and cfg.run_dir == str(tmp_path / "trials/0007")
    assert cfg.threads == 1 and space.folder == tmp_path
    assert [len(read(DIGITS, [*words[2:4]]).grid)] == [2]


# The storage -----------------------------------------------------------------------------------------------


def test_a_trial_is_claimed_once_and_comes_back_when_its_process_is_gone(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(sweep_storage.time, "monotonic", lambda: now[0])
    plan = plan_of(tmp_path, "train.lr=0.1,0.2", "seed=0,1")
    one, two = Board(plan), Board(plan)
    of_one, of_two = Rescue(one), Rescue(two)
    one.begin()
    two.begin()  # adds nothing
    claimed = [Claims(board).take() for board in (one, two, one, two, one)]
    assert [claim.entry.index if claim else None for claim in claimed] == [0, 1, 2, 3, None]
    assert claimed[1].entry.values == {"train.lr": "0.1"} and claimed[1].entry.seed == 1
    assert of_one(one.entries()) == []  # this process lives
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = one.me.rpartition(":")[0]
    one.note(claimed[1].id, "worker", f"{host}:{dead.pid}")
    one.note(claimed[2].id, "worker", "elsewhere:1")
    assert of_two(two.entries()) == [1]
    assert of_one(one.entries()) == []  # it is done
    assert [entry.state for entry in one.entries()] == [RUNNING, WAITING, RUNNING, RUNNING]
    again = Claims(one).take()
    assert again.entry.index == 1 and again.id == claimed[1].id

    # Of another machine only silence tells.
    now[0] = 59
    assert of_one(one.entries()) == []
    one.note(claimed[2].id, "beat", 7)
    now[0] = 100
    assert of_one(one.entries()) == []
    now[0] = 170
    assert of_one(one.entries()) == [2]


def test_a_trial_that_ends_its_process_again_and_again_has_failed(tmp_path):
    board = Board(plan_of(tmp_path, "train.lr=0.1,0.2"))
    board.begin()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for deaths in range(1, 6):
        claim = Claims(board).take()
        assert claim.entry.index == 0
        if deaths == 3:
            assert claim.report(0, 0.5) is False  # a finished round: it gets further
            assert board.entries()[0].notes["deaths"] == 0
        board.note(claim.id, "worker", f"{board.me.rpartition(':')[0]}:{dead.pid}")
        Rescue(board)(board.entries())
    for _ in range(2):
        claim = Claims(board).take()
        board.note(claim.id, "worker", f"{board.me.rpartition(':')[0]}:{dead.pid}")
        Rescue(board)(board.entries())
    first = board.entries()[0]
    assert first.state == FAILED and "its process ended 5 times" in first.notes["error"]
    assert first.curve == {0: 0.5} and Claims(board).take().entry.index == 1


def test_the_seeds_of_a_point_share_its_values_and_points_do_not_depend_on_who_draws(tmp_path):
    words = ("train.lr=0.01..0.3:log", "select.tau_p=0.6,0.7", "seed=0,1")
    drawn = []
    for name, count in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        plan = plan_of(tmp_path / name, *words, trials=5)
        boards = [Board(plan) for _ in range(count)]
        boards[0].begin()
        for at in range(5):
            claim = Claims(boards[at % count]).take()
            assert claim.entry.index == at
            values = claim.board.draw(claim.entry)
            assert claim.board.draw(claim.entry) == values  # again: the same
            claim.report(0, 0.5)
            claim.ended({})
        assert Claims(boards[0]).take() is None
        entries = boards[0].entries()
        values = [tuple(entry.values.items()) for entry in entries]
        assert len(set(values)) == 3 and values[0] == values[1] and values[2] == values[3]
        assert [entry.seed for entry in entries] == [0, 1, 0, 1, 0]
        drawn.append(values)
    assert drawn[0] == drawn[1]
    more = Board(plan_of(tmp_path / "b", *words, trials=8))
    more.begin()
    assert [entry.index for entry in more.entries()] == [*range(7)]  # the last one once its point is drawn


def test_a_process_that_was_taken_for_dead_gives_up_its_trial(tmp_path):
    board = Board(plan_of(tmp_path, "train.lr=0.1,0.2"))
    board.begin()
    claim = Claims(board).take()
    board.requeue(claim.id)
    with pytest.raises(sweep_storage.Lost):
        claim.report(0, 0.5)
    assert board.entries()[0].curve == {}
    board.end(claim.id, sweep_storage.COMPLETE, 1.0)
    board.end(claim.id, FAILED)  # said twice: the first counts
    assert board.entries()[0].state == sweep_storage.COMPLETE


def test_another_sweep_in_the_same_place_is_refused(tmp_path):
    Board(plan_of(tmp_path, "train.lr=0.1,0.2")).begin()
    with pytest.raises(RunFolderError, match=r"has another sweep: train.weight_decay is 0.1 and was 0.005;"):
        Board(plan_of(tmp_path, "train.lr=0.1,0.2", "train.weight_decay=0.1")).begin()
    with pytest.raises(
        RunFolderError, match=r"train.lr by the sweep is \['0.1', '0.3', ''\] and was \['0.1', '0.2', ''\]"
    ):
        Board(plan_of(tmp_path, "train.lr=0.1,0.3")).begin()
    Board(plan_of(tmp_path, "train.lr=0.1,0.2", "checkpoint_seconds=1")).begin()


def test_storages_that_cannot_be_used_are_named_without_their_password(tmp_path, monkeypatch):
    text = tmp_path / "text.db"
    text.write_text("not a database " * 100)
    with pytest.raises(ValueError, match=r"text.db cannot be used: file is not a database"):
        Board(plan_of(tmp_path, "train.lr=0.1,0.2", url=f"sqlite:///{text}"))
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as mine:
        mine.execute("create table mine (x)")
    with pytest.raises(ValueError, match=r"other.db holds tables of something else, such as mine"):
        Board(plan_of(tmp_path, "train.lr=0.1,0.2", url=f"sqlite:///{other}"))
    with sqlite3.connect(other) as mine:
        assert [row[0] for row in mine.execute("select name from sqlite_master")] == ["mine"]
    Board(plan_of(tmp_path, "train.lr=0.1,0.2"))
    with sqlite3.connect(tmp_path / "sweep.db") as ours:
        ours.execute("update alembic_version set version_num = 'v99.0.0'")
    with pytest.raises(ValueError, match=r"sweep.db is of another version: The runtime optuna version"):
        Board(plan_of(tmp_path, "train.lr=0.1,0.2"))
    monkeypatch.setitem(
        sys.modules, "psycopg", None
    )  # the driver of SQLAlchemy 2.1; earlier ones have psycopg2
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(
        ValueError, match=r"postgresql://me:\*\*\*@nowhere/x needs a package.*pip install 'psycopg"
    ) as found:
        Board(plan_of(tmp_path, "train.lr=0.1,0.2", url="postgresql://me:secret@nowhere/x"))
    assert "secret" not in str(found.value)


def test_a_storage_that_is_away_is_waited_for(tmp_path, monkeypatch):
    board = Board(plan_of(tmp_path, "train.lr=0.1,0.2"))
    board.begin()
    monkeypatch.setattr(sweep_storage, "RETRY_SECONDS", 0.02)
    hidden = tmp_path / "hidden"
    board.storage.engine.dispose()
    (tmp_path / "sweep.db").rename(hidden)
    threading.Timer(0.3, lambda: hidden.replace(tmp_path / "sweep.db")).start()
    assert Claims(board).take().entry.index == 0
    board.storage.engine.dispose()
    (tmp_path / "sweep.db").rename(hidden)
    board.patience = 0.1
    with pytest.raises(StorageGone, match="the storage does not answer: no such table"):
        Claims(board).take()


def test_a_process_that_has_lost_its_trial_says_no_more_of_it(tmp_path):
    """It may wake up after a minute: what it then says of the trial must not count."""
    board = Board(plan_of(tmp_path, "train.lr=0.1,0.2"))
    board.begin()
    claim = Claims(board).take()
    for worker in ("elsewhere:1", ""):
        board.note(claim.id, "worker", worker)
        for say in (
            lambda: claim.failed("x"),
            lambda: claim.ended({}),
            lambda: claim.starts_at(0, 1),
            lambda: claim.report(0, 0.5),
        ):
            with pytest.raises(sweep_storage.Lost):
                say()
        claim.release()
        now = board.entries()[0]
        assert (now.state, now.worker, now.curve) == (RUNNING, worker, {})
        assert not {"error", "numbers", "starts"} & set(now.notes)
    board.end(claim.id, sweep_storage.COMPLETE, 1.0)
    with pytest.raises(sweep_storage.Lost):
        board.note(claim.id, "error", "x")


def test_only_what_is_silent_now_is_taken_for_dead(tmp_path, monkeypatch):
    """Between looking and acting this process may have been stopped for long, and others go on."""
    now = [0.0]
    monkeypatch.setattr(sweep_storage.time, "monotonic", lambda: now[0])
    board = Board(plan_of(tmp_path, "train.lr=0.1,0.2", "seed=0,1"))
    board.begin()
    rescue = Rescue(board)
    ids = [Claims(board).take().id for _ in range(4)]
    host, _, pid = board.me.rpartition(":")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    board.note(ids[0], "worker", "elsewhere:1")
    board.note(ids[1], "worker", f"{host}:{dead.pid}")
    board.note(
        ids[2], "worker", f"{host.partition('/')[0]}:{dead.pid}"
    )  # of another machine of the same name
    old = board.entries()
    assert rescue(old[:1] + old[2:]) == []
    board.note(ids[0], "beat", 8)
    board.end(ids[1], sweep_storage.COMPLETE, 1.0)
    now[0] = 100.0
    assert rescue(old) == [2]
    entries = board.entries()
    assert [entry.state.name for entry in entries] == ["RUNNING", "COMPLETE", "WAITING", "RUNNING"]
    assert entries[3].where == f"{host.partition('/')[0]}:{pid}"


def test_a_trial_that_gets_further_is_not_blamed_for_processes_that_end(tmp_path):
    board = Board(plan_of(tmp_path, "train.lr=0.1,0.2"))
    board.begin()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    deaths = []
    for epoch in (0, 0, 1, 2, 2):
        claim = Claims(board).take()
        claim.starts_at(0, epoch)
        board.note(claim.id, "worker", f"{board.me.rpartition(':')[0]}:{dead.pid}")
        Rescue(board)(board.entries(), blame=epoch < 2)
        deaths.append(board.entries()[0].notes["deaths"])
    assert deaths == [1, 2, 1, 0, 0]


def test_a_study_that_no_sweep_has_made_is_refused(tmp_path):
    import optuna

    plan = plan_of(tmp_path, "train.lr=0.1,0.2")
    with pytest.raises(StorageGone, match="the storage has lost its sweep"):
        Board(plan, new=False)  # as a worker opens it
    theirs = optuna.create_study(storage=plan.url, study_name=plan.name, direction="minimize")
    with pytest.raises(RunFolderError, match=r"has a study named .*out that is no sweep"):
        Board(plan).begin()
    optuna.delete_study(study_name=plan.name, storage=plan.url)
    theirs = optuna.create_study(storage=plan.url, study_name=plan.name, direction="maximize")
    theirs.add_trial(optuna.trial.create_trial(value=1.0))
    with pytest.raises(RunFolderError, match=r"has a study named .*out that is no sweep"):
        Board(plan).begin()
    assert len(theirs.trials) == 1 and not theirs.user_attrs


def test_a_config_that_is_edited_meanwhile_changes_no_later_trial(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("recipe: features\ntrain: {momentum: 0.8}\n")
    space = read(path, ["train.lr=0.1,0.2"])
    before = space.plan()
    path.write_text("train: {momentum: 0.7}\n")
    assert space.trial(1, {"train.lr": "0.2"}, 3).train.momentum == 0.8 and space.plan() == before
    path.unlink()
    assert space.first.recipe == "features" and hash(space)


# Sweeps ----------------------------------------------------------------------------------------------------


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "sweep.jsonl").read_text().splitlines()]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pictures, which take longer than the trials."""
    monkeypatch.setattr(sweep_figure, "rounds", lambda *_: "")
    monkeypatch.setattr(sweep_figure, "by_key", lambda *_: "")
    monkeypatch.setattr(sweep_drive, "POLL_SECONDS", 0.1)


def test_a_sweep_and_the_same_command_again(tiny, tmp_path, capsys, quick, threads, one_thread):
    """A trial that diverges costs the others nothing, and what is done is not run again."""
    words = [*tiny[:-1], "1", "train.weight_decay=0.001,1e30", "seed=3", "train.rounds=1"]
    assert sweep.main([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.count("to do") == 2 and "2 trials: a grid; pruner: none" in said
    assert not (tmp_path / "out").exists()
    assert sweep.main(words) == 0
    out = capsys.readouterr().out
    assert "1 trial failed, such as 0001: training diverged in round 0" in out and "best: val " in out
    lines = lines_of(tmp_path / "out")
    assert [line["state"] for line in lines] == ["done", "failed"]
    assert [line["seed"] for line in lines] == [3, 3]
    first = list(map(json.loads, (tmp_path / "out/trials/0000/metrics.jsonl").read_text().splitlines()))
    assert lines[0]["val_by_round"] == [row["val_acc"] for row in first] and task_in(first[0])
    assert lines[0]["val"] == max(lines[0]["val_by_round"])
    assert lines[0]["test"] == first[lines[0]["round"]]["test_acc"]
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/trials").glob("*/*.*")}
    assert sweep.main(words) == 0 and sweep.main([*words, "--dry-run"]) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert capsys.readouterr().out.count("  complete  ") == 1
    from ups_fast import config

    best = config.load(tmp_path / "out/best.yaml")
    assert best.train.weight_decay == 0.001 and best.seed == 3 and best.run_dir == "runs/best"
    with open(tmp_path / "out/best.yaml", "a") as file:
        file.write("device: cpu\n")
    edited = (tmp_path / "out/best.yaml").read_bytes()
    assert sweep.main(words) == 0 and (tmp_path / "out/best.yaml").read_bytes() == edited
    assert "best.yaml was changed by hand and stays as it is" in capsys.readouterr().out
    assert sweep.main([*words, "train.lr=0.2"]) == 2
    assert "has another sweep: train.lr is 0.2 and was 0.1" in capsys.readouterr().err


def rows_of(*scores: float) -> Any:
    """In place of a run's rounds: rows with these shares of validation samples."""
    for round, score in enumerate(scores):
        about = {"test_acc": 0.5, "unlabeled_acc": None, "positive_acc": None, "positives": 1, "ece": 0.1}
        yield {"round": round, "val_acc": score, "seconds": 1.0, **about}


def test_a_disk_that_is_full_ends_the_sweep_and_costs_no_trial(
    tiny, tmp_path, capsys, quick, threads, monkeypatch
):
    def full(*_: Any) -> Any:
        yield from rows_of(0.5)
        raise RunFolderError("x could not be written") from OSError(errno.ENOSPC, "No space left on device")

    words = [*tiny, "train.lr=0.05,0.1"]
    monkeypatch.setattr(sweep_worker, "begin", full)
    assert sweep.main(words) == 2
    err = capsys.readouterr().err
    assert "x could not be written: make room; 0 done of 2, and the same command goes on" in err
    assert [line["state"] for line in lines_of(tmp_path / "out")] == ["waiting", "waiting"]
    monkeypatch.setattr(sweep_worker, "begin", lambda trial: rows_of(0.5, 0.7))
    assert sweep.main(words) == 0
    assert [line["val_by_round"] for line in lines_of(tmp_path / "out")] == [[0.5, 0.7]] * 2


def test_a_pruner_ends_trials_that_lag_behind(tiny, tmp_path, capsys, monkeypatch, quick, threads):
    def begin(trial: Any) -> Any:
        number = int(trial.name)
        if number == 2:
            raise MemoryError
        return rows_of(0.1, 0.2, 0.9) if number > 4 else rows_of(0.5, 0.7, 0.6)

    monkeypatch.setattr(sweep_worker, "begin", begin)
    words = [*tiny[:-1], "1", "train.lr=0.05..0.1", "--trials", "7", "--sampler", "random"]
    assert sweep.main(words) == 0
    lines = lines_of(tmp_path / "out")
    assert [line["state"] for line in lines] == ["done", "done", "failed", "done", "done", "pruned", "pruned"]
    assert len({line["keys"]["train.lr"] for line in lines}) == 7 and lines[0]["val"] == 0.7
    assert "memory is used up: fewer --workers need less" in lines[2]["error"]
    out = capsys.readouterr().out
    assert "0002  failed: memory is used up" in out and "best: val 70.0 %" in out
    assert lines[5]["val_by_round"] == [0.1, 0.2] and "0005  pruned after round 1, val 20.0 %" in out


def test_what_has_run_stays_on_the_page_and_a_page_that_cannot_be_written_hides_no_reason(
    tiny, tmp_path, capsys, quick, threads, monkeypatch
):
    words = [
        *tiny[:-1],
        "1",
        f"run_dir={tmp_path / '50% a?b#c'}",
        "train.lr=0.05..0.1",
        "--sampler",
        "random",
    ]
    del words[1]
    monkeypatch.setattr(sweep_worker, "begin", lambda trial: rows_of(0.5 + 0.1 * int(trial.name)))
    assert sweep.main([*words, "--trials", "3"]) == 0
    folder = tmp_path / "50% a?b#c"
    assert (folder / "sweep.db").is_file()
    best = (folder / "best.yaml").read_bytes()
    assert sweep.main([*words, "--trials", "1"]) == 0
    assert [line["val"] for line in lines_of(folder)] == [0.5, 0.6, 0.7]
    assert (folder / "best.yaml").read_bytes() == best
    capsys.readouterr()

    def full(*_: Any) -> Any:
        raise RunFolderError("x could not be written") from OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sweep_worker, "begin", full)
    monkeypatch.setattr(sweep_drive, "write", full)
    assert sweep.main([*words, "--trials", "4"]) == 2
    assert "x could not be written: make room; 3 done of 4" in capsys.readouterr().err
    monkeypatch.undo()
    (folder / "sweep.jsonl").unlink()
    (folder / "sweep.jsonl").mkdir()
    assert sweep.main([*words, "--trials", "4"]) == 2
    assert "sweep.jsonl is a folder and must be a regular file" in capsys.readouterr().err


@pytest.mark.parametrize("width", [40, 100])
def test_the_table_of_trials_in_progress_fits_its_terminal(width):
    entry = sweep_drive.Entry(7, RUNNING, {"train.lr": 0.0312, "select.tau_p": "0.6"}, 3, 0.5, {0: 0.5}, {})
    entry.notes = {"worker": "host/1234-5:678"}
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(sweep_drive.table_of("1 begun of 9", [entry], {7: 12.3}, width))
    shown = console.export_text()
    assert max(map(len, shown.splitlines())) <= width and "…" not in shown
    row = "".join(shown.split())
    assert "train.lr=0.0312" in row and "50.0" in shown and ("host:678" in shown) == (width > 80)


@pytest.mark.timeout(60)
def test_a_worker_that_hears_no_signal_ends_after_its_trial(threads):
    """A run that is about to end has no use for SIGTERM, and its process must not go on to the next one."""
    ran, going = [], threading.Event()

    def run_one(slot: Any, tell: Any) -> None:
        while len(ran) < 200:
            tell("looks for a trial")
            ran.append(len(ran))
            going.set()
            time.sleep(0.05)

    def tick() -> None:
        assert not going.wait(30), "the storage is gone"

    slot = SimpleNamespace(name="x")
    with pytest.raises(AssertionError, match="the storage is gone"):
        workers.run_trials([slot], 1, run_one, Console(quiet=True), tick=tick)
    assert len(ran) < 100


def test_a_folder_of_something_else_is_refused(tiny, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/sweep.html").write_text("mine")
    assert sweep.main([*tiny, "train.lr=0.1,0.2"]) == 2
    assert "holds files but no sweep" in capsys.readouterr().err
    assert (tmp_path / "out/sweep.html").read_text() == "mine"
    (tmp_path / "out/trials").mkdir()
    (tmp_path / "out/study.jsonl").touch()
    assert sweep.main([*tiny, "train.lr=0.1,0.2"]) == 2
    assert "holds files but no sweep" in capsys.readouterr().err


# The page --------------------------------------------------------------------------------------------------


def record(point: int, seed: int, state: str = "done", **more: Any) -> dict[str, Any]:
    val = [0.5 + 0.01 * point, 0.6 + 0.01 * point + 0.02 * seed]
    return {
        **{"trial": f"{2 * point + seed:04d}", "point": point, "seed": seed, "state": state, "val": max(val)},
        "keys": {"train.lr": 0.01 * (point + 1), "method.name": "<ups>" if point % 2 else "fixmatch"},
        **{
            "val_by_round": val,
            "seconds": 2.5,
            "torch": "2",
            "ups_fast": "0",
            "test": 0.5,
            "unlabeled": None,
        },
        **more,
    }


def test_the_page_needs_no_network_and_shows_what_it_is_given():
    records = [record(point, seed) for point in range(9) for seed in range(2)]
    records.append(record(9, 0))  # a point that lacks a seed does not win
    records.append(record(10, 0, "pruned"))
    records.append(record(11, 0, "failed", val=None, val_by_round=[], error="<i>training diverged"))
    points = points_of(records, 2)
    assert [point.number for point in points] == [*range(8, -1, -1), 9]
    assert points[0].said == "val 69.0 ± 1.4 % over 2 seeds"
    page = sweep_page("S", {"train.lr": True, "method.name": False}, records, points, {"train.lr": 0.7}, "<y")
    links = Links()
    links.feed(page)
    assert not links.open and len(page) < 1_000_000 and len(links.found) == 2
    assert "<td>69.0 ± 1.4</td>" in page and "&lt;ups&gt;" in page and "<i>" not in page
    assert (
        "Ended early by the pruner" in page and "train.lr 70 %" in page and "<th>unlabeled</th>" not in page
    )
    assert "0 of" not in sweep_page("S", {}, [], [], {}, "") and points_of([], 1) == []


# Processes that die ------------------------------------------------------------------------------------------


def command(*words: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-m", "ups_fast.sweep", *words]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    return subprocess.Popen(call, start_new_session=True, **pipes)


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    found = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "spawn_main"], capture_output=True, text=True
    )
    return [int(pid) for pid in found.stdout.split()]


def under_way(process: subprocess.Popen[str], folder: Path, since: float) -> None:
    """Waits for a checkpoint within a round that is younger."""
    from ups_fast.checkpoint import load_checkpoint

    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        for path in folder.glob("trials/*/checkpoint.pt"):
            young = path.stat().st_mtime > since
            if young and (stood := load_checkpoint(path.parent)) and stood.epoch + stood.step:
                return
        time.sleep(0.02)
    process.kill()
    raise AssertionError(f"no trial is under way: {process.communicate()}")


def left_behind(process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 100
    while subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True).stdout:
        assert time.monotonic() < deadline, "no worker outlives it"
        time.sleep(0.1)


def numbers(folder: Path) -> list[dict[str, Any]]:
    return [{key: line[key] for key in line if key != "seconds"} for line in lines_of(folder)]


LONG = (
    *("train.epochs=25", "checkpoint_seconds=0.05", "train.lr=0.05,0.1", "select.tau_p=0.6,0.8,0.9"),
    "seed=0,1",
)


def plan_from(words: Sequence[str]) -> Plan:
    args = sweep._words(words)
    return sweep._plan(args, read(args.config, args.overrides))


@pytest.fixture(scope="module")
def two_at_once(features: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The words of a sweep of twelve that two commands have run at once, while the storage was away for a while."""
    folder = tmp_path_factory.mktemp("two")
    words = [*tiny_in(folder, features), *LONG]
    both = [command(*words), command(*words)]
    under_way(both[0], folder / "out", 0)
    with sqlite3.connect(folder / "out/sweep.db", timeout=60, isolation_level=None) as held:
        held.execute("BEGIN EXCLUSIVE")
        time.sleep(10)
        held.execute("ROLLBACK")
    ends = [process.communicate(timeout=1200) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    return words


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_sweeps_on_one_storage_share_the_trials_and_outlast_it_for_ten_seconds(two_at_once):
    entries = Board(plan_from(two_at_once)).entries()
    assert [entry.state.name for entry in entries] == ["COMPLETE"] * 12
    assert all(len(entry.notes["starts"]) == 1 for entry in entries), "no trial is run twice"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_sweep_of_twelve_that_is_killed_ends_with_the_same_twelve(tiny, tmp_path, two_at_once):
    words = [*tiny, *LONG]
    for how in ("worker", "sweep", "ctrl-c", "sigterm"):
        process = command(*words)
        under_way(process, tmp_path / "out", time.time())
        if how == "worker":
            os.kill(workers_of(process)[0], signal.SIGKILL)
            under_way(process, tmp_path / "out", time.time())
        if how == "ctrl-c":  # as a terminal sends it: to all
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.SIGTERM if how == "sigterm" else signal.SIGKILL)
        out, err = process.communicate(timeout=300)
        assert "Traceback" not in err, err
        if how in ("ctrl-c", "sigterm"):
            assert process.returncode == 130 and "everything is saved in" in err, (out, err)
        left_behind(process)
    process = command(*words)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, (out, err)
    found = numbers(tmp_path / "out")
    assert [line["state"] for line in found] == ["done"] * 12
    starts = [entry.notes["starts"] for entry in Board(plan_from(words)).entries()]
    again = [start for each in starts for start in each[1:]]
    assert again and any(epoch > 0 for _, epoch in again), "a trial goes on from its checkpoint"
    assert found == numbers(Path(two_at_once[1].partition("=")[2]))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_hundred_trials_with_random_kills(tiny, tmp_path):
    draw = random.Random(0)
    words = [*tiny, "train.min_steps=20", "checkpoint_seconds=0.02", "train.lr=0.05..0.1", "seed=0..4"]
    words += ["--trials", "100", "--sampler", "random", "--pruner", "none"]
    kills, starts = 9, 0
    while True:
        process, starts = command(*words), starts + 1
        while process.poll() is None:
            begun = len(list((tmp_path / "out/trials").glob("*")))
            if kills and begun > 100 - 10 * kills:  # so that it is killed as often, however quick it is
                time.sleep(draw.random() / 2)
                found = workers_of(process)
                kills -= 1
                if kills % 3 == 0 or not found:
                    process.kill()
                else:
                    with suppress(ProcessLookupError):  # the last trial of all is done
                        os.kill(draw.choice(found), signal.SIGKILL)
            time.sleep(0.02)
        out, err = process.communicate()
        assert process.returncode in (0, -9) and "Traceback" not in err, (out, err)
        if process.returncode == 0:
            break
        left_behind(process)
    assert kills == 0 and starts == 4
    entries = Board(plan_from(words)).entries()
    assert any(len(entry.notes["starts"]) > 1 for entry in entries), "a kill has met a trial"
    found = numbers(tmp_path / "out")
    assert [line["state"] for line in found] == ["done"] * 100
    process = command(*[word.replace("/out", "/whole") for word in words])
    assert process.wait(timeout=1500) == 0
    assert found == numbers(tmp_path / "whole")
