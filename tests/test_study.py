"""Studies: what a file may say, trials in processes that die, and the page that comes of them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from test_rounds import one_thread

from ups_fast import study, workers
from ups_fast.calibration import KAPPAS, TAUS, by_confidence, by_limit, error_cells, report
from ups_fast.files import InUse
from ups_fast.pseudo_labels import PseudoLabels
from ups_fast.report import study_figure
from ups_fast.report.study_page import Table, study_page
from ups_fast.study_file import read
from ups_fast.trials import check, record_of
from ups_fast.workers import News, run_trials

__all__ = ["one_thread"]  # the fixture
ROOT = Path(__file__).parents[1]
TINY = """
keys:
  recipe: features
  data.root: {root}
  train: {{rounds: 2, min_steps: 0, batch_size: 25}}
  select.heads: 1
  select.passes: 2
seeds: [0]
tables:
  Selection:
    none: {{select.tau_p: 0, select.tau_n: 0, select.kappa_p: .inf}}
    UPS:
  Decay:
    UPS:
    decay: {{train.weight_decay: [1e30, 0.001]}}
"""


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    x, y = load_digits(return_X_y=True)
    path = tmp_path_factory.mktemp("data") / "x.npz"
    parts = {"labeled": slice(0, 100), "unlabeled": slice(100, 200), "test": slice(200, 260)}
    arrays = {f"x_{name}": x[part].astype(np.float32) for name, part in parts.items()}
    np.savez(path, **arrays, **{f"y_{name}": y[part] for name, part in parts.items()})
    return path


@pytest.fixture
def tiny(features: Path, tmp_path: Path) -> list[str]:
    """The words of a command that runs the study of TINY."""
    (tmp_path / "tiny.yaml").write_text(TINY.format(root=features))
    return [str(tmp_path / "tiny.yaml"), f"run_dir={tmp_path / 'out'}"]


class InThread:
    """A worker that is a thread of this process."""

    exitcode = None

    def __init__(self, run_one: Any, pipe: Any) -> None:
        self.thread = threading.Thread(target=workers._work, args=(run_one, pipe))
        self.thread.start()

    def join(self) -> None:
        self.thread.join()

    terminate = join


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(run_one: Any) -> Any:
        here, there = Pipe()
        return workers._Worker(InThread(run_one, there), here)

    monkeypatch.setattr(workers, "_started", started)


# The file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", "a config must be a mapping of keys to values, got a list"),
        ("tabels: {}", "unknown key 'tabels' of a study (did you mean tables?)"),
        ("seeds: [0]\ntables: {a: {b: }}", "a study needs base, a config file, or keys"),
        ("base: 3", "base must be the path of a config file, got 3"),
        ("base: gone.yaml\ntables: {a: {b: }}", "there is no config file"),
        ("keys: 3", "keys must be a mapping of keys to values, got 3"),
        ("{keys: {train: {lr: 1}, train.lr: 2}}", "keys: train.lr is given twice"),
        ("{keys: {seed: 1}}", "keys: seed is set by the study itself: give seeds"),
        ("{keys: {train.lr: }}", "keys: train.lr must have a value, got None"),
        ("{base: X, seeds: [0, -1]}", "seeds must be a list of integers from 0"),
        ("{base: X, seeds: []}", "seeds must be a list of integers from 0"),
        ("{base: X, seeds: [true]}", "seeds must be a list of integers from 0"),
        ("{base: X, seeds: [1, 1]}", "seeds must differ, got [1, 1]"),
        ("{base: X}", "tables must be a mapping of titles to variants, got None"),
        ("{base: X, tables: {a: [b]}}", "table 'a' must be a mapping of variants to keys, got ['b']"),
        ("{base: X, tables: {a: {b: 3}}}", "variant 'b' must be a mapping of keys to values, got 3"),
        (
            "{base: X, tables: {a: {b: {select.tau: 1}}}}",
            "variant 'b': unknown key 'select.tau' (did you mean select.tau",
        ),
        (
            "{base: X, tables: {a: {b: {train.lr: fast}}}}",
            "variant 'b': train.lr must be a number, got 'fast'",
        ),
        ("{base: X, tables: {a: {b: {run_dir: x}}}}", "variant 'b': run_dir is set by the study itself"),
        (
            "{base: X, tables: {a: {b: {select.tau_p: []}}}}",
            "select.tau_p must be a value or a list of values",
        ),
        ("{base: X, tables: {a: {b: {select.tau_p: [1], train.lr: [1]}}}}", "must list values of one key"),
        (
            "{base: X, tables: {a: {b: }, c: {b: {train.lr: 1}}}}",
            "variant 'b' is there twice with different keys",
        ),
        (
            "{base: X, tables: {a: {x y: , x_Y: {train.lr: 1}}}}",
            "would have a folder name like that of 'x y'",
        ),
        ("{base: X, tables: {a: {'..': }}}", "variant '..' would have a folder name empty"),
        (
            "{base: X, tables: {a: {p: {select.tau_p: [1]}, q: {select.tau_n: [0]}}}}",
            "table 'a' lists values of select.tau_p and of select.tau_n: make two tables",
        ),
    ],
)
def test_what_is_wrong_in_a_file_is_one_sentence(tmp_path, capsys, text, said):
    path = tmp_path / "bad.yaml"
    path.write_text(text.replace("X", str(ROOT / "configs/digits.yaml")))
    assert study.main([str(path), f"run_dir={tmp_path / 'out'}"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["digits", "paper"])
def test_the_files_of_the_project_can_be_read(name):
    found = read(ROOT / f"configs/study/{name}.yaml")
    assert len(found.seeds) == 3 and {"no selection", "confidence only", "UPS"} <= set(found.variants)
    assert len(found.jobs) == 3 * len(found.variants)
    assert {job.trial.cfg.threads for job in found.jobs} == {1}
    kappa = next(table for table in found.tables if table.key == "select.kappa_p")
    values = list(kappa.values.values())
    assert "0.05" in values and values == sorted(values, key=float), "the base's own value is among them"
    cfgs = {job.variant: job.trial.cfg for job in found.jobs}
    assert cfgs["UPS"].select.kappa_p == 0.05 and cfgs["negative only"].select.kappa_p == 0


def test_words_change_the_base_but_not_what_a_variant_changes(tmp_path, tiny):
    words = ["select.tau_p=0.5", "train.rounds=3", "threads=2", f"run_dir={tmp_path / 'x'}"]
    found = read(tiny[0], words, seeds=[7])
    cfgs = {job.variant: job.trial.cfg for job in found.jobs}
    assert (cfgs["none"].select.tau_p, cfgs["UPS"].select.tau_p) == (0, 0.5)
    assert {(cfg.train.rounds, cfg.seed, cfg.threads) for cfg in cfgs.values()} == {(3, 7, 2)}
    assert found.jobs[0].trial.folder == tmp_path / "x/trials/none-seed7"


def test_a_dry_run_lists_the_trials_and_writes_nothing(tiny, capsys):
    assert study.main([*tiny, "--dry-run", "--workers", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[1].split() == ["ups-seed0", "to", "do"]
    assert not Path(tiny[1].partition("=")[2]).exists()


@pytest.mark.parametrize(
    "words", [["--workers", "0"], ["--seeds", "1,x"], ["--seeds", "1,1"], ["--jobs", "2"]]
)
def test_wrong_options_are_one_sentence(tiny, capsys, words):
    with pytest.raises(SystemExit) as end:
        study.main([*tiny, *words])
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_folder_of_something_else_is_refused(tiny, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/study.html").write_text("mine")
    assert study.main(tiny) == 2
    assert "holds files but no study" in capsys.readouterr().err
    assert (tmp_path / "out/study.html").read_text() == "mine"


# Trials ----------------------------------------------------------------------------------------------------


def lines_of(tmp_path: Path) -> dict[str, dict[str, Any]]:
    lines = map(json.loads, (tmp_path / "out/study.jsonl").read_text().splitlines())
    return {line["trial"]: line for line in lines}


def test_a_study_with_a_trial_that_diverges_and_again(
    tiny, tmp_path, capsys, monkeypatch, threads, one_thread
):
    """A trial that is done is not trained again."""
    for name in ("curves", "trained", "cells"):  # which take longer than the trials
        monkeypatch.setattr(study_figure, name, lambda *_: "")
    assert study.main([*tiny, "--workers", "1"]) == 2
    err = capsys.readouterr().err
    assert "1 of 4 trials are not done, such as decay_1e30-seed0: training diverged in round 0" in err
    lines = lines_of(tmp_path)
    assert [name for name, line in lines.items() if "error" in line] == ["decay_1e30-seed0"] and len(
        lines
    ) == 4
    best = lines["ups-seed0"]
    last = json.loads((tmp_path / "out/trials/ups-seed0/metrics.jsonl").read_text().splitlines()[-1])
    assert (best["variant"], best["keys"], best["seed"]) == ("UPS", {}, 0) and best["unlabeled"] == 100
    assert all(best[key] == last[key] for key in ("test_acc", "positives", "ece_selected"))
    assert lines["none-seed0"]["positives"] == 100
    page = (tmp_path / "out/study.html").read_text()
    assert "3 of 4 trials done" in page and "training diverged" in page

    kept = {path: path.read_bytes() for path in (tmp_path / "out/trials").glob("ups-*/*.*")}
    assert study.main([*tiny, "--dry-run"]) == 0
    assert capsys.readouterr().out.count("  done") == 3
    assert study.main([*tiny, "train.lr=0.2"]) == 2  # the trials there have another
    assert "train.lr is 0.2 and was 0.1" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in kept} == kept

    # A trial that another process holds is left to it, and damaged results are made anew from the checkpoint.
    found = read(tiny[0], tiny[1:])
    trial = next(job.trial for job in found.jobs if job.name == "ups-seed0")
    check(trial)
    before = record_of(trial)
    (trial.folder / "selection.npz").write_bytes(b"PK\x03\x04 nonsense")
    (trial.folder / "metrics.jsonl").write_text("{}\n")
    assert record_of(trial) is None
    again = study.run_one(next(job for job in found.jobs if job.name == "ups-seed0"), lambda text: None)
    assert json.dumps(again) == json.dumps(before)


def test_a_study_of_several_labels_has_map_and_counts_pairs(tmp_path, monkeypatch, threads, one_thread):
    for name in ("curves", "cells"):
        monkeypatch.setattr(study_figure, name, lambda *_: "")
    x = np.random.default_rng(0).random((120, 3), np.float32)
    y = (x > 0.5).astype(np.int8)
    parts = {"labeled": slice(0, 40), "unlabeled": slice(40, 100), "test": slice(100, 120)}
    arrays = {
        f"{kind}_{name}": each[part] for name, part in parts.items() for kind, each in (("x", x), ("y", y))
    }
    np.savez(tmp_path / "x.npz", **arrays)
    text = TINY.format(root=tmp_path / "x.npz").partition("tables:")[0]
    (tmp_path / "s.yaml").write_text(f"{text}tables: {{T: {{tau: {{select.tau_p: [0.6, 0.9]}}}}}}")
    assert study.main([str(tmp_path / "s.yaml"), f"run_dir={tmp_path / 'out'}", "--workers", "1"]) == 0
    found = lines_of(tmp_path)["tau_0.6-seed0"]
    rows = list(
        map(json.loads, (tmp_path / "out/trials/tau_0.6-seed0/metrics.jsonl").read_text().splitlines())
    )
    assert found["test_map"] == rows[-1]["test_map"] and found["round0_test_map"] == rows[0]["test_map"]
    assert found["unlabeled"] == 60 * 3 and 0 < found["positives"] <= 180 and "test_acc" not in found
    by_tau = dict(zip(TAUS, found["by_tau"], strict=True))
    assert by_tau[0.6][:2] == pytest.approx([found["positives"] / 180, found["positive_acc"]])
    page = (tmp_path / "out/study.html").read_text()
    assert "<th>test mAP</th>" in page and "<th>test</th>" not in page and "counts pairs" in page
    assert "Results by select.tau_p" in page


class Toy:
    def __init__(self, name: str) -> None:
        self.name = name


def toy(trial: Toy, tell: Any) -> str:
    """What becomes of a trial stands in its name."""
    tell("on its way")
    kind = trial.name.rstrip("0123456789")
    if kind == "value":
        raise ValueError("a mistake\nof the user")
    if kind == "bug":
        raise KeyError("a bug")
    if kind == "held":
        raise InUse("in use")
    if kind == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "waits":
        time.sleep(60)
    return kind.upper()


def heard(names: list[str], count: int) -> dict[str, list[News]]:
    from rich.console import Console

    said: dict[str, list[News]] = {}
    trials = map(Toy, names)
    run_trials(
        trials,
        count,
        toy,
        Console(quiet=True),
        lambda trial, news: said.setdefault(trial.name, []).append(news),
    )
    return said


@pytest.mark.parametrize("count", [1, 3, 9])
def test_the_others_go_on_when_one_fails(threads, count):
    said = heard(["good1", "value", "bug", "held", "good2", "good3"], count)
    assert {name: news[-1] for name, news in said.items()} == {
        **{f"good{i}": News("done", "", "GOOD") for i in (1, 2, 3)},
        "value": News("failed", "a mistake of the user"),
        "bug": News("failed", "KeyError: 'a bug'"),
        "held": News("held", "in use"),
    }
    assert all([each.state for each in news][:2] == ["begun", "says"] for news in said.values())


def test_a_trial_may_depend_on_those_before_it(threads):
    from rich.console import Console

    results: list[str] = []

    def trials():
        for i in range(4):
            yield Toy(f"good{i + len(results)}")

    names: list[str] = []

    def told(trial: Toy, news: News) -> None:
        names.extend([trial.name] * (news.state == "begun"))
        results.extend([news.result] * (news.state == "done"))

    run_trials(trials(), 1, toy, Console(quiet=True), told)
    assert names == ["good0", "good2", "good4", "good6"] and results == ["GOOD"] * 4


@pytest.mark.slow
def test_a_process_that_dies_costs_its_trial_alone():
    said = heard(["dies1", "good1", "dies2", "good2"], 2)
    assert all(said[f"dies{i}"][-1].text.startswith("its process was killed by signal 9") for i in (1, 2))
    assert all(said[f"good{i}"][-1].state == "done" for i in (1, 2))


def command(*words: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-m", "ups_fast.study", *words, "--workers", "2"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    return subprocess.Popen(call, start_new_session=True, **pipes)


def in_progress(folder: Path, since: float) -> float:
    """Waits for a checkpoint that is younger, and returns its time."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        found = [path.stat().st_mtime for path in folder.glob("trials/*/checkpoint.pt")]
        if found and max(found) > since:
            return max(found)
        time.sleep(0.02)
    raise AssertionError("no trial has begun")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stopped_study_goes_on_to_the_same_numbers(tiny, tmp_path):
    words = [*tiny, "train.min_steps=300", "checkpoint_seconds=0.1"]
    since = 0.0
    for how in ("ctrl-c", "killed", "sigterm"):
        process = command(*words)
        since = in_progress(tmp_path / "out", since)
        if how == "ctrl-c":  # as a terminal sends it: to all
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.SIGTERM if how == "sigterm" else signal.SIGKILL)
        out, err = process.communicate(timeout=300)
        assert "Traceback" not in err
        if how != "killed":
            assert process.returncode == 130 and "everything is saved in" in err, (out, err)
        deadline = time.monotonic() + 100
        while subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True).stdout:
            assert time.monotonic() < deadline, "no worker outlives it"
            time.sleep(0.1)
    for each in (words, [word.replace("/out", "/whole") for word in words]):
        process = command(*each)
        out, err = process.communicate(timeout=400)
        assert process.returncode == 2 and "training diverged" in err, (out, err)
    found, want = ((tmp_path / name / "study.jsonl").read_text() for name in ("out", "whole"))
    drop = re.compile(r'"(seconds|error)": (".*?"|[\d.]+)')
    assert drop.sub("", found) == drop.sub("", want)


# Numbers and the page --------------------------------------------------------------------------------------


def labels(n: int, seed: int = 0, known: bool = True) -> tuple[PseudoLabels, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    confidence, std = torch.rand(n, generator=draw), torch.rand(n, generator=draw) ** 3
    label = torch.randint(0, 3, (n,), generator=draw)
    truth = torch.where(torch.rand(n, generator=draw) < confidence, label, (label + 1) % 3)
    if n > 3:
        confidence[0], std[0], label[0] = torch.nan, torch.nan, -1  # unreadable
        truth[1] = -1
    positive = (confidence >= 0.7) & (std < 0.05)
    negative = torch.zeros(n, 1, dtype=torch.int32)
    found = PseudoLabels(torch.arange(n), label, confidence, std, positive, positive, negative)
    return found, truth if known else torch.full_like(truth, -1)


@pytest.mark.parametrize("n", [0, 1, 5000])
def test_what_other_limits_would_keep(n):
    found, truth = labels(n)
    known = (truth >= 0) & (found.label >= 0)
    kappa, tau = by_limit(found, truth, tau=0.7), by_limit(found, truth, kappa=0.05)
    for rows, limits in ((kappa, KAPPAS), (tau, TAUS)):
        assert len(rows) == len(limits)
        shares = [row[0] for row in rows]
        assert shares == sorted(shares, reverse=limits is TAUS)
    kept = known & found.positive
    same = kappa[KAPPAS.index(0.05)]
    assert same == tau[TAUS.index(0.7)]
    assert same[0] == pytest.approx(int(kept.sum()) / max(1, int(known.sum())))
    numbers = report(found, truth, 3)
    assert same[1:] == [numbers["positive_acc"], numbers["ece_selected"]]
    curve = by_confidence(found, truth)
    assert len(curve) == (20 if known.any() else 0)
    assert not curve or curve[-1] == pytest.approx(float((found.label == truth)[known].double().mean()))
    cells = torch.tensor(error_cells(found, truth))
    assert cells.shape == (len(KAPPAS), 10, 2) and int(cells[..., 0].sum()) == int(known.sum())
    assert int(cells[..., 1].sum()) == int((found.label != truth)[known].sum())
    low = known & (found.std < 0.005) & (found.confidence < 0.1)
    assert int(cells[0, 0, 0]) == int(low.sum())


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def record(variant: str, seed: int, known: bool = True) -> dict[str, Any]:
    found, truth = labels(300, seed, known)
    numbers = report(found, truth, 3)
    curves = {
        "by_kappa": by_limit(found, truth, tau=0.7),
        "by_tau": by_limit(found, truth, kappa=0.05),
        "by_confidence": by_confidence(found, truth),
        "cells": error_cells(found, truth),
    }
    about = {"trial": f"{variant}-{seed}", "variant": variant, "seed": seed, "unlabeled": 300, "seconds": 2.5}
    return {**numbers, **about, **curves, "test_acc": 0.9 + 0.01 * seed, "torch": "2", "ups_fast": "0"}


def test_the_page_needs_no_network_and_shows_what_it_is_given():
    nasty = "<b>&$x_1$ " + "long " * 20
    keys: dict[str, dict[str, object]] = {"UPS": {}, nasty: {"data.ops": "<script>"}, "never": {}}
    tables = [
        Table("<Selection>", ["UPS", nasty, "never"], "train.lr", {"UPS": "0.1", nasty: "0.2", "never": "1"}),
        Table("Empty", ["never"]),
    ]
    records = [record(name, seed) for name in ("UPS", nasty) for seed in range(3)]
    bad = {"trial": "never-0", "variant": "never", "seed": 0, "error": "<i>training diverged"}
    page = study_page("S", tables, keys, [*records, bad], "lr: 1 <")
    links = Links()
    links.feed(page)
    assert not links.open and len(page) < 1_000_000 and len(links.found) == 3
    assert all(link.startswith("data:image/svg+xml;base64,") for link in links.found)
    assert "<td>91.0 ± 1.0</td>" in page and "6 of 7 trials done" in page
    assert "&lt;script&gt;" in page and "&lt;i&gt;training diverged" in page and "<i>" not in page


def test_without_truth_the_page_has_what_is_known():
    page = study_page("S", [Table("T", ["UPS"])], {"UPS": {}}, [record("UPS", 0, known=False)], "")
    assert "<td>90.0</td>" in page and "<img" not in page and "<th>right</th>" not in page
    assert "0 of 0 trials done" in study_page("S", [Table("T", ["UPS"])], {"UPS": {}}, [], "")
