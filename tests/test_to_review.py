"""The tables for a person: next_to_label.csv and suspects.csv."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from sklearn.datasets import load_digits

from ups_fast import config, report, rounds, train
from ups_fast.data import load_set
from ups_fast.report import comparison, to_review


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run on digits as features, of whose 60 labels three are wrong."""
    folder = tmp_path_factory.mktemp("review")
    x, truth = load_digits(return_X_y=True)
    x = x.astype(np.float32)
    given = np.concatenate([np.flatnonzero(truth == c)[:6] for c in range(10)])
    rest = np.setdiff1d(np.arange(600), given)
    y = truth[given].copy()
    y[[3, 20, 44]] = (y[[3, 20, 44]] + 1) % 10
    arrays = {"x_labeled": x[given], "y_labeled": y, "x_unlabeled": x[rest]}
    np.savez(folder / "rows.npz", **arrays, x_test=x[600:700], y_test=truth[600:700])
    values = {"recipe": "features", "data.name": "features", "data.root": str(folder / "rows.npz")}
    short = {"train.rounds": 1, "train.min_steps": 60, "threads": 1, "run_dir": str(folder / "run")}
    cfg = config.make({**values, **short})
    data = load_set("features", cfg.data.root)
    result = rounds.run(cfg, data, console=Console(file=io.StringIO()))
    return cfg, data, result, x[rest]


def write(run):
    _, data, result, _ = run
    return train._review(data, result, train._samples(data, result), len(data.labeled))[1]


def test_samples_to_label_next(run):
    said = write(run)
    folder, found = run[2].folder, run[2].pseudo_labels
    rows = table(folder / "next_to_label.csv")
    assert said.startswith(f"worth a label next: {folder / 'next_to_label.csv'}")
    assert [row["rank"] for row in rows] == [str(i + 1) for i in range(len(rows))] and len(rows) == 20
    place = [int(row["index"]) for row in rows]
    assert len(set(place)) == 20 and min(place) >= 0 and max(place) < len(run[3])
    assert found.confidence[place].mean() < found.confidence.mean() - 0.05, "less certain than the others"
    first = rows[0]["reason"]
    assert " or " in first and first.rpartition("std ")[2] == f"{found.std[place[0]]:.2f}"


def test_wrong_labels_come_first(run):
    write(run)
    rows = table(run[2].folder / "suspects.csv")
    assert {3, 20, 44} & {int(row["index"]) for row in rows[:8]}, "of 60 labels"
    assert {3, 20, 44} <= {int(row["index"]) for row in rows}
    for row in rows:
        assert row["label"] != row["likely"] and float(row["p_likely"]) >= float(row["p_label"])
        assert run[1].classes[int(row["likely"])] == row["likely_name"]


def test_what_fails_costs_no_run(run, monkeypatch):
    def broken(*_, **__):
        raise MemoryError("no room")

    monkeypatch.setattr(report, "write_review", broken)
    assert write(run) == "there is no table of what to label next: no room"


def test_features_of_images_are_computed_once_for_baselines_and_tables(tmp_path, monkeypatch):
    path = Path(__file__).parents[1] / "configs/digits.yaml"
    cfg = config.load(
        path, [f"run_dir={tmp_path / 'run'}", "train.rounds=1", "train.round0_epochs=2", "select.passes=2"]
    )
    data = load_set("digits", "")
    result = rounds.run(cfg, data, console=Console(file=io.StringIO()))
    samples, sizes, real = train._samples(data, result), [], comparison.features_of

    def counted(network, images, index, **how):
        sizes.append(len(index))
        return real(network, images, index, **how)

    monkeypatch.setattr(comparison, "features_of", counted)
    monkeypatch.setattr(to_review, "features_of", counted)
    train._baselines(cfg, data, result, samples)
    review, said = train._review(data, result, samples, 0)
    assert said.startswith("worth a label next")
    assert set(review.unfamiliar) == set(result.pseudo_labels.index.tolist()), "of all unlabeled images"
    assert set(review.nearest.values()) <= set(result.labeled.tolist())
    assert sizes == [40, 1397, 360], "labeled, unlabeled, test"
    place = [int(row["index"]) for row in table(result.folder / "next_to_label.csv")]
    assert set(place) <= set(result.pseudo_labels.index.tolist()) and len(place) == 20


def test_examples_of_a_run_on_features_are_rows(run):
    _, data, result, _ = run
    first = len(data.labeled)
    review, _ = train._review(data, result, train._samples(data, result), first)
    text = train._examples(data, result, review, first, 1, Console(file=io.StringIO()))
    assert "<img" not in text and "nearest labeled row" in text and "Positive labels, by class" in text
    assert "expects another class" in text and f"for {len(review.suspects)} labels" in text
    for suspect in review.suspects[:10]:
        assert f"<td>index {suspect.id}</td>" in text
