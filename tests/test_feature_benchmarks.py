"""Benchmarks on features: docs/results.md is made of their record, and what measures the record measures rightly."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def home(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)


@pytest.mark.parametrize("name", ["features", "methods", "uncertainty"])
def test_the_tables_of_the_docs_are_those_of_the_record(name):
    made, text = import_module(f"benchmarks.{name}"), (ROOT / "docs/results.md").read_text()
    for part in made.tables(made.read()):
        title, _, table = part.partition("\n\n")
        assert f"\n{table}\n" in text, title


def test_the_table_of_ranks_is_that_of_its_record():
    made = import_module("benchmarks.ranks")
    lines = [json.loads(each) for each in made.RECORD.read_text().splitlines()]
    assert f"\n{made.table(lines)}\n" in (ROOT / "docs/scale.md").read_text()


def line(seed, by_kappa):
    return {
        "set": "a",
        "labels": 4,
        "method": "UPS",
        "seed": seed,
        "unlabeled": 10,
        "by_kappa": [by_kappa] * 7,
    }


def test_curves_are_means_over_seeds_and_nothing_kept_is_no_number(tmp_path):
    from benchmarks import curves

    lines = [line(0, [5, 0.9, 0.1]), line(1, [0, None, None]), {**line(2, [9, 0, 0]), "labels": 10}]
    found = curves.means(lines, {"a": 4, "b": 4})
    assert found == {"a": [[25, 90, 10]] * 7}
    assert curves.table(found).count("25 / 90.0 / 10.0") == 7
    none = curves.means(lines[1:], {"a": 4})
    assert curves.table(none).count("0 / - / -") == 7
    curves.draw({**found, "b": none["a"]}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_doubt_is_found_where_labels_are_wrong():
    """Whose probability is 1/3 or 2/3 lies on the other side: every score of a given label finds all of them."""
    from benchmarks import doubt

    random = np.random.default_rng(0)
    p = random.choice([0, 1 / 3, 2 / 3, 1], 400, p=[0.4, 0.1, 0.1, 0.4])
    side = (p > 0.5) ^ ((p > 0) & (p < 1))
    x = random.normal(size=(400, 3)) + 12 * side[:, None]
    for score in ("suspects", "1 - p of the given label"):
        found = doubt.measure(x, p, 200, score, seed=1)
        assert found["average_precision"] > 0.99 and 0.1 < found["chance"] < 0.3


def test_a_fit_that_is_recorded_is_not_run_again(tmp_path, monkeypatch, capsys):
    from benchmarks import features

    rows = (np.zeros((4, 2)), np.array([0, 0, 1, 1]), np.zeros((2, 2)), np.array([0, 1]))
    ran = []
    monkeypatch.setattr(features, "RECORD", tmp_path / "record.jsonl")
    monkeypatch.setattr(features, "SETS", {"small": (lambda: rows, (1,))})
    methods = {"one": lambda split: ran.append(split.seed) or {"unlabeled_acc": 0.5}}
    monkeypatch.setattr(features, "METHODS", methods)
    for seeds in ("0", "1"), ("1", "2"):
        monkeypatch.setattr("sys.argv", ["features", "small", "--seeds", *seeds])
        features.main()
    assert ran == [0, 1, 2]
    lines = [json.loads(text) for text in (tmp_path / "record.jsonl").read_text().splitlines()]
    assert [each["seed"] for each in lines] == ran and all("commit" in each for each in lines)
