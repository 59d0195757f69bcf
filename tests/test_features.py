"""Rows of numbers in place of images: how they are read and disturbed, the networks on them, whole runs."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from sklearn.datasets import load_digits
from test_rounds import one_thread

from ups_fast import config, predict, rounds
from ups_fast.config import Config
from ups_fast.data import ImageSet, load_set
from ups_fast.predict import HEAD, Predictor

__all__ = ["one_thread"]  # the fixture

COLUMNS, CLASSES = 64, 10


def digits() -> tuple[np.ndarray, np.ndarray]:
    """The digits' pixels as features, shuffled."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    return x[order].astype(np.float32), y[order]


def digit_arrays() -> dict[str, np.ndarray]:
    """5 labeled rows of each class, 350 unlabeled and 300 test rows."""
    x, y = digits()
    labeled = np.concatenate([np.flatnonzero(y[:400] == c)[:5] for c in range(CLASSES)])
    unlabeled = np.setdiff1d(np.arange(400), labeled)
    return {
        "x_labeled": x[labeled],
        "y_labeled": y[labeled],
        "x_unlabeled": x[unlabeled],
        "x_test": x[400:700],
        "y_test": y[400:700],
    }


def settings(run_dir: str | Path = "", **changes: Any) -> Config:
    """Three rounds of 30 steps, three heads; changes as train__rounds=1."""
    values = {
        "recipe": "features",
        "run_dir": str(run_dir),
        "device": "cpu",
        "model.name": "mlp-32",
        "train.rounds": 3,
        "train.min_steps": 30,
        "train.batch_size": 64,
        "select.heads": 3,
        "select.passes": 6,
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    return config.make(values)


def run(cfg: Config, data: ImageSet) -> rounds.Result:
    return rounds.run(cfg, data, console=Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(path, **digit_arrays())
    return load_set("features", str(path))


@pytest.fixture(scope="module")
def finished(data: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, rounds.Result]:
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, run(settings(folder), data)


# --- labels for further rows --------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def table(path: str) -> list[dict[str, str]]:
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_predict_has_a_row_for_each_row_of_its_files(finished, here: Path, capsys) -> None:
    x, y = digits()
    rows, truth = x[400:420].copy(), y[400:420]
    rows[3, 7], rows[5, [1, 2]] = np.nan, np.inf
    (here / "more").mkdir()
    np.save("more/rows.npy", rows)
    np.savez("more/two.npz", x=rows[:2].astype(np.float16), other=rows)
    (here / "more" / "notes.txt").write_text("none")
    assert predict.main([str(finished[0]), "more", "--out", "table.csv"]) == 0
    said = capsys.readouterr().err
    assert "1 file ignored for the suffix: 1 '.txt'" in said and "22 rows, 2 with an error" in said
    found = table("table.csv")
    assert list(found[0]) == HEAD
    names = [f"more/rows.npy[{i}]" for i in range(20)] + ["more/two.npz[0]", "more/two.npz[1]"]
    assert [row["path"] for row in found] == names
    assert found[3]["error"] == "1 value is NaN or infinite, the first in column 7"
    assert found[5]["error"] == "2 values are NaN or infinite, the first in column 1"
    good = [row for i, row in enumerate(found[:20]) if i not in (3, 5)]
    assert all(found[i]["label"] == found[i]["confidence"] == "" for i in (3, 5))
    right = [row["label"] == str(c) for row, c in zip(good, np.delete(truth, [3, 5]), strict=True)]
    assert np.mean(right) > 0.6 and all(row["name"] == row["label"] and not row["error"] for row in good)
    # Small whole numbers are the same in both types.
    assert [list(row.values())[1:] for row in found[20:]] == [list(row.values())[1:] for row in found[:2]]


def test_an_answer_depends_on_the_row_alone(finished, here: Path) -> None:
    x, _ = digits()
    np.save("all.npy", x[400:440])
    np.save("back.npy", np.asfortranarray(x[439:399:-1].astype(np.float64)))
    np.savez("one.npz", only=x[411:412])
    predictor = Predictor(finished[0])
    found = [answer.row for answer in predict.predict(predictor, ["all.npy"])]
    assert len({tuple(row) for row in found}) > 20
    (alone,) = predict.predict(predictor, ["one.npz"])
    assert alone.path == "one.npz[0]" and alone.row[0] == found[11][0]
    heard: list[int] = []
    predictor.rows = 17
    back = list(predict.predict(predictor, ["back.npy"], progress=heard.append))
    assert heard == [17, 17, 6]
    for a, b in zip([alone.row, *(each.row for each in back[::-1])], [found[11], *found], strict=True):
        assert a[:2] == b[:2] and math.isclose(float(a[2]), float(b[2]), rel_tol=1e-5)
        assert math.isclose(float(a[3]), float(b[3]), rel_tol=1e-3, abs_tol=1e-6)


ROWS = np.ones((4, COLUMNS), np.float32)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.npy", ROWS[:, :5], "'rows.npy' must have 64 columns as the run's features, got 5"),
        ("rows.npy", ROWS[0], "must hold features, float16, float32 or float64 [n, d], got float32 [64]"),
        ("rows.npy", ROWS.astype(np.uint8), "float64 [n, d], got uint8 [4, 64]"),
        ("rows.npy", ROWS[:0], "'rows.npy' must not be empty, got 0 rows of 64 columns"),
        ("rows.npy", ROWS.astype(object), "is damaged or no file of features: it holds Python objects"),
        ("rows.npy", b"\x93NUMPY", "'rows.npy' is damaged or no file of features"),
        ("rows.npz", b"PK\3\4", "'rows.npz' is damaged or no file of features"),
        ("rows.npz", {"a": ROWS, "b": ROWS}, "has 2 arrays of features, a, b: give it one"),
        ("rows.npz", {"a": ROWS[0]}, "has no array of features: give it one"),
        (
            "rows.npz",
            {"x": ROWS[0], "a": ROWS},
            "must hold features, float16, float32 or float64 [n, d], got",
        ),
        ("rows.png", b"", "'rows.png' must be a file of features, .npy, .npz or .parquet: the run's network"),
        ("folder/rows.png", b"", "'folder' holds no file .npy, .npz or .parquet, but 1 '.png'"),
    ],
)
def test_predict_refuses_other_files(
    finished, here: Path, capsys, name: str, content: Any, said: str
) -> None:
    (here / name).parent.mkdir(exist_ok=True)
    if isinstance(content, bytes):
        Path(name).write_bytes(content)
    elif isinstance(content, dict):
        np.savez(name, **content)
    else:
        np.save(name, content, allow_pickle=True)
    np.save("good.npy", ROWS)
    word = name.partition("/")[0]
    assert predict.main([str(finished[0]), "good.npy", word, "--out", "table.csv"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
    assert not os.path.exists("table.csv"), "nothing is written before all files were looked at"
