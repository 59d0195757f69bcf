"""Rows of numbers in place of images: how they are read and disturbed, the networks on them, whole runs."""

from __future__ import annotations

import csv
import io
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from sklearn.datasets import load_digits
from test_rounds import one_thread

from ups_fast import config, predict, rounds
from ups_fast.config import Config
from ups_fast.data import ImageSet, load_set
from ups_fast.inputs import load_data
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


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield tmp_path


# --- rows in a file with a table of labels beside it --------------------------------------------------------

LABELS = ["b", "b", "", "a", "a", "", "b", "a", "", "b"]


def beside(rows: np.ndarray, lines: list[str], *, head: str = "label", name: str = "rows.npy") -> Path:
    np.save(name, rows)
    path = Path(name)
    path.with_suffix(".csv").write_text("\n".join([head, *lines]) + "\n")
    return path


def ten(dtype: Any = np.float32) -> np.ndarray:
    return np.arange(30).reshape(10, 3).astype(dtype)


def load(path: Path, **how: Any) -> ImageSet:
    return load_set("features", str(path), **how)


def test_a_table_of_labels_beside_the_rows(here: Path) -> None:
    splits = ["", "train", "", "", "test", "train", "test", "val", "", "TEST"]
    lines = [f"x{i},{label},{split}" for i, (label, split) in enumerate(zip(LABELS, splits, strict=True))]
    found = load(beside(ten(np.float16), lines, head="id,Label,split"))
    assert found.classes == ["a", "b"] and found.train_images.dtype == torch.float16
    assert found.names == [f"rows.npy[{i}]" for i in (0, 1, 3, 2, 5, 8, 7)]
    assert found.test_names == ["rows.npy[4]", "rows.npy[6]", "rows.npy[9]"]
    assert found.train_images[:, 0].tolist() == [0, 3, 9, 6, 15, 24, 21]
    assert found.test_images[:, 0].tolist() == [12, 18, 27] and found.test_labels.tolist() == [0, 1, 1]
    assert found.train_labels.tolist() == [1, 1, 0, -1, -1, -1, 0]
    assert found.labeled is not None and found.labeled.tolist() == [0, 1, 2]
    assert found.val is not None and found.val.tolist() == [6]
    # Of the labeled and unlabeled rows alone.
    assert found.mean[0] == pytest.approx(np.mean([0, 3, 9, 6, 15, 24]))
    assert found.std[0] == pytest.approx(np.std([0, 3, 9, 6, 15, 24]))


def test_a_share_is_held_out_where_there_are_no_test_rows(here: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    rows[8] = rows[0]  # of one class: they stay together
    path = beside(rows, ["9", "10", "", ""] * 10)
    found, again, other = (load(path, test_share=0.3, seed=seed) for seed in (0, 0, 1))
    assert found.classes == ["9", "10"], "numbers have the order of numbers"
    assert 5 <= len(found.test_labels) <= 7 and found.test_labels.bincount().min() >= 3
    assert found.test_names == again.test_names != other.test_names
    assert any("are held out to test" in note and "row" in note for note in found.notes)
    for each in (found, other):
        assert ("rows.npy[0]" in each.test_names) == ("rows.npy[8]" in each.test_names)  # type: ignore[operator]
    assert sorted([*found.names, *found.test_names]) == sorted(f"rows.npy[{i}]" for i in range(40))  # type: ignore[misc]


def test_float64_is_read_as_float32_with_a_note(here: Path) -> None:
    found = load(beside(ten(np.float64), LABELS))
    assert found.train_images.dtype == torch.float32
    assert "rows.npy has numbers of type float64, which are read as float32" in found.notes
    assert not any("float" in note for note in load(beside(ten(), LABELS)).notes)


def test_a_run_names_the_rows_of_its_file(here: Path) -> None:
    x, y = digits()
    lines = [str(c) if i < 120 else "" for i, c in enumerate(y[:200])]
    path = beside(x[:200], lines)
    cfg = settings("run", train__rounds=1, train__min_steps=5, data__root=str(path))
    found = load_data(cfg, torch.device("cpu"), Console(file=io.StringIO()))
    result = run(cfg, found)
    assert result.rows[0]["test_acc"] is not None and result.pseudo_labels.index.tolist() == [
        found.names.index(f"rows.npy[{i}]")  # type: ignore[union-attr]
        for i in range(120, 200)
    ]


@pytest.mark.parametrize(
    ("rows", "lines", "head", "said"),
    [
        (ten(), LABELS[:9], "label", "must have a line for each of the 10 rows of 'rows.npy', got 9"),
        (ten(), [*LABELS, "a"], "label", "must have a line for each of the 10 rows of 'rows.npy', got 11"),
        (ten(), LABELS, "class", "must begin with a line of column names, each once, label among them"),
        (
            ten(),
            [f"{c},tset" for c in LABELS],
            "label,split",
            "line 2 of .* train, val, test or .*, got 'tset'",
        ),
        (
            ten(),
            ["a,", "b,", ",test", *["a,"] * 7],
            "label,split",
            "line 4 of .* is a test row and must have",
        ),
        (ten(), ["a,", "b,", "c,test", *[","] * 7], "label,split", "test rows .* class 'c', of which no row"),
        (ten(), [""] * 10, "label", "must have labeled rows of at least two classes, got none"),
        (ten(), ["a", *[""] * 9], "label", "must have labeled rows of at least two classes, got only 'a'"),
        (ten(), ["a", "b"] * 5, "label", "has no unlabeled rows, and UPS needs some"),
        (
            ten(),
            ["a", "b", *[""] * 8],
            "label",
            "has no test rows, and no class has the two different labeled",
        ),
        (ten(np.uint8), LABELS, "label", "must hold features, float16, float32 or float64 .*, got uint8"),
        (np.full((10, 3), np.nan, np.float32), LABELS, "label", "'rows.npy' must hold finite .* 30 values"),
        (np.full((10, 3), 1e300), LABELS, "label", "'rows.npy' must hold finite numbers, got 30 values"),
        (ten()[:, 0], LABELS, "label", r"must hold features, .* got float32 \[10\]"),
    ],
)
def test_rows_and_labels_that_are_refused(
    here: Path, rows: np.ndarray, lines: list[str], head: str, said: str
) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        load(beside(rows, lines, head=head))
    assert "\n" not in str(caught.value)


def test_rows_without_a_table_or_of_another_kind(here: Path) -> None:
    path = beside(ten(), LABELS)
    Path("rows.csv").rename("other.csv")
    with pytest.raises(
        FileNotFoundError, match=r"needs its labels beside it, and there is no file 'rows\.csv'"
    ):
        load(path)
    with pytest.raises(ValueError, match=r"features, \.npy, \.npz or \.parquet, got 'other\.csv'"):
        load(Path("other.csv"))
    with pytest.raises(FileNotFoundError, match=r"there is no file 'gone\.npy' \(data\.root\)"):
        load(Path("gone.npy"))


def test_blank_lines_of_a_table(here: Path) -> None:
    """In a table of one column they are rows without a label, but behind the last row they are none."""
    assert load(beside(ten(), [*LABELS, "", ""])).train_labels.tolist().count(-1) == 3
    lines = [f"{label}," for label in LABELS]
    assert load(beside(ten(), [*lines[:4], "", *lines[4:], ""], head="label,split")).classes == ["a", "b"]


def test_a_parquet_table_without_pyarrow(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("rows.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"^a \.parquet file needs pyarrow .*: pip install pyarrow$"):
        load(Path("rows.parquet"))


def test_a_parquet_table(here: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"a": ten()[:, 0], "b": np.arange(10), "__index_level_0__": list("abcdefghij")}
    parquet.write_table(pyarrow.table(columns), "rows.parquet")
    Path("rows.csv").write_text("\n".join(["label", *LABELS]))
    found = load(Path("rows.parquet"))
    assert found.shape == (2,) and found.train_images.dtype == torch.float32
    order = [int(name[13:-1]) for name in found.names or []]
    assert found.train_images.tolist() == [[3 * i, i] for i in order]
    for bad, said in ((["x"] * 10, "got 'b' of string"), ([None, *range(9)], "finite numbers, got 1 value")):
        parquet.write_table(pyarrow.table({**columns, "b": bad}), "rows.parquet")
        with pytest.raises(ValueError, match=said):
            load(Path("rows.parquet"))
    Path("rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"'rows\.parquet' is damaged or no file of features"):
        load(Path("rows.parquet"))


# --- labels for further rows --------------------------------------------------------------------------------


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
