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
from torch import nn

from ups_fast import config, load_model, predict, rounds
from ups_fast.build import prepare
from ups_fast.config import Config
from ups_fast.data import ImageSet, Noise, ResidentFeatures, View, load_set
from ups_fast.data.features import column_moments
from ups_fast.display import Interrupted, Watch
from ups_fast.inputs import load_data
from ups_fast.models import MLP, build
from ups_fast.predict import HEAD, Predictor
from ups_fast.reference import counter_normal, dropout_keys
from ups_fast.tasks import SINGLE

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
    """Three rounds of 80 steps, three heads; changes as train__rounds=1."""
    values = {
        "recipe": "features",
        "run_dir": str(run_dir),
        "device": "cpu",
        "model.name": "mlp-64",
        "model.dropout": 0.2,
        "train.rounds": 3,
        "train.min_steps": 80,
        "train.batch_size": 128,
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


# --- rows in memory -----------------------------------------------------------------------------------------


def resident(rows: torch.Tensor, **changes: Any) -> ResidentFeatures:
    mean, std = column_moments(rows)
    return ResidentFeatures(rows, **{"mean": mean, "std": std, "device": "cpu", **changes})


def test_a_column_whose_spread_is_0_in_float32_counts_as_constant():
    rows = torch.tensor([[0.0, 1e-45, 1e-30], [1e-44, 0.0, 3e-30]])
    _, std = column_moments(rows)
    assert std == (1.0, 1.0, pytest.approx(1e-30))
    assert torch.isfinite(resident(rows).scale).all()


def read(
    images: ResidentFeatures, index: torch.Tensor, noise: Noise, *, seed: int = 3, draw: Any = 0, **view: Any
):
    """The rows as training gets them, in one view."""
    out = torch.full((len(index), *images.shape), torch.nan)
    draws = torch.as_tensor(draw).expand(len(index))
    whole = View(0, len(index), noise, source=0, **view)
    images.read(index, draws, [whole], seed=torch.tensor(seed), out=out)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_are_standardized_when_they_are_read(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows = (torch.randn(500, 5) * torch.tensor([1e-3, 1, 30, 1, 0]) + torch.tensor([0, -7.0, 900, 0, 3])).to(
        dtype
    )
    images = resident(rows)
    assert images.features.dtype == dtype and len(images) == 500 and images.shape == (5,)
    index = torch.tensor([7, 0, 499, 7])
    found = images.clean(torch.arange(500))
    assert found.dtype == torch.float32
    wide = rows.double()
    spread = wide.std(0, unbiased=False)
    spread[4] = 1  # a constant column
    torch.testing.assert_close(found.double(), (wide - wide.mean(0)) / spread, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(found[:, :4].std(0, unbiased=False), torch.ones(4), atol=1e-4, rtol=0)
    assert torch.equal(images.clean(index), found[index])
    assert torch.equal(torch.cat(list(images.clean_batches(index, 3))), found[index])
    assert torch.equal(read(images, index, Noise()), found[index]), "without noise nothing is drawn"


def test_noise_is_drawn_by_the_sample_alone() -> None:
    torch.manual_seed(0)
    images, noise = resident(torch.randn(64, 40)), Noise(std=0.5, drop=0.3)
    index = torch.randperm(64)
    whole = read(images, index, noise)
    assert torch.isfinite(whole).all() and not torch.equal(whole, images.clean(index))
    parts = [read(images, part, noise) for part in index.split([1, 30, 33])]
    assert torch.equal(torch.cat(parts), whole)
    back = read(images, index.flip(0), noise).flip(0)
    assert torch.equal(back, whole)
    # Each row is other than in another epoch, run or view.
    for other in ({"draw": 1}, {"seed": 4}, {"number": 1}):
        assert (read(images, index, noise, **other) != whole).any(1).all()
    draws = torch.arange(64) % 2
    mixed = read(images, index, noise, draw=draws)
    assert ((mixed == whole).all(1) == (draws == 0)).all()
    twice = read(images, index[:1].repeat(2), noise)
    assert torch.equal(twice[0], twice[1])


def test_a_batch_of_two_views() -> None:
    """As the methods with a weak and a strong view have them."""
    images, index = resident(torch.randn(8, 40)), torch.arange(8).repeat(2)
    out, draw = torch.empty(16, 40), torch.zeros(16, dtype=torch.int64)
    views = [View(0, 8, Noise(), 0), View(8, 16, Noise(std=0.1), 0, number=1)]
    images.read(index, draw, views, seed=torch.tensor(3), out=out)
    assert torch.equal(out[:8], images.clean(index[:8]))
    assert torch.equal(out[8:], read(images, index[8:], Noise(std=0.1), number=1))


def test_the_moments_of_noise() -> None:
    n, d = 400, 250
    images = ResidentFeatures(torch.ones(n, d), mean=[0.0] * d, std=[1.0] * d, device="cpu")
    added = read(images, torch.arange(n), Noise(std=0.5)) - 1
    sigma = 0.5 / math.sqrt(n * d)
    assert abs(added.mean().item()) < 5 * sigma
    assert added.std().item() == pytest.approx(0.5, abs=5 * sigma)
    kept = read(images, torch.arange(n), Noise(drop=0.3))
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.7])
    share, width = (kept == 0).float(), 5 * math.sqrt(0.3 * 0.7)
    assert share.mean().item() == pytest.approx(0.3, abs=width / math.sqrt(n * d))
    assert (share.mean(0) - 0.3).abs().max() < width / math.sqrt(n), "no column is preferred"
    both = read(images, torch.arange(n), Noise(std=0.5, drop=0.3)) - kept
    torch.testing.assert_close(both, added, atol=1e-6, rtol=0)
    # Noise of column c is made of the words 2c and 2c + 1, by which other numbers must not be drawn.
    related = ((share[:, ::2] - 0.3) * ((added[:, : d // 2] / 0.5).square() - 1)).mean().item()
    assert abs(related) < 5 * math.sqrt(0.21 * 2 / (n * d / 2))


def test_counter_normal() -> None:
    """Standard normal by its moments and tail; of each row, layer and place its own."""
    n, b = 500, 400
    keys = dropout_keys(torch.arange(b), seed=0, draw=0)
    z = counter_normal(n, keys)
    assert z.dtype == torch.float32 and z.shape == (b, n) and torch.isfinite(z).all()
    sigma = 1 / math.sqrt(n * b)
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):  # and the variance of each
        assert abs(z.double().pow(power).mean().item() - moment) < 5 * sigma * math.sqrt(spread), power
    for limit, beyond in ((1, 0.317311), (2, 0.045500), (3, 0.0026998)):
        share = (z.abs() > limit).double().mean().item()
        assert abs(share - beyond) < 5 * sigma * math.sqrt(beyond), limit
    assert torch.equal(counter_normal(n, keys[17:20]), z[17:20])
    assert torch.equal(counter_normal(7, keys), z[:, :7])
    other = counter_normal(n, keys, layer=1)
    for a, c in ((z[:, 1:], z[:, :-1]), (z[1:], z[:-1]), (z, other)):  # neighbors, rows, layers
        assert abs((a * c).mean().item()) < 5 * sigma and (a != c).float().mean() > 0.999
        assert abs(((a.square() - 1) * (c.square() - 1)).mean().item()) < 5 * sigma * 2
    assert not torch.equal(z, counter_normal(n, dropout_keys(torch.arange(b), seed=0, draw=1)))


# --- reading an .npz file -----------------------------------------------------------------------------------


def small(**changes: np.ndarray) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    found = {
        f"x_{part}": random.normal(size=(6, 3)).astype(np.float32)
        for part in ("labeled", "unlabeled", "test")
    }
    return {**found, "y_labeled": np.arange(6) % 2, "y_test": np.arange(6) % 2, **changes}


def broken(value: float, at: tuple[int, int] = (4, 1)) -> np.ndarray:
    rows = small()["x_unlabeled"]
    rows[at] = value
    return rows


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"x_unlabeled": broken(np.nan)}, "x_unlabeled must hold finite .* got 1 value .* in row 4, column 1: fill"),
        ({"x_test": broken(-np.inf, (0, 2))}, "x_test must hold finite numbers, got 1 value .* row 0, column 2"),
        ({"x_labeled": small()["x_labeled"][:, 0]}, r"x_labeled must be features, .* got float32 \[6\]$"),
        ({"x_labeled": np.zeros((6, 3), np.uint8)}, r"got uint8 \[6, 3\]: use x_labeled\.astype\(np\.float32\)$"),
        ({"x_labeled": np.zeros((6, 3))}, r"got float64 \[6, 3\]: use x_labeled\.astype\(np\.float32\)$"),
        ({"x_labeled": np.zeros((6, 8, 8), np.uint8)}, "got uint8 .*; images are data.name=npz$"),
        ({"x_test": np.zeros((6, 0), np.float32)}, r"x_test must not be empty, got float32 \[6, 0\]"),
        ({"x_test": np.zeros((6, 4), np.float32)}, r"the same number of columns, got .*3\] and x_test \[6, 4\]"),
        (
            {"x_labeled": np.ones((6, 3), np.float32), "x_unlabeled": np.ones((6, 3), np.float32)},
            "none of 3 columns has two values in the training rows: nothing can be learned",
        ),
    ],
)  # fmt: skip
def test_arrays_that_are_refused(here: Path, changes: dict[str, np.ndarray], said: str) -> None:
    np.savez("rows.npz", **small(**changes))
    with pytest.raises(ValueError, match=said) as caught:
        load(Path("rows.npz"))
    assert "\n" not in str(caught.value)


def test_constant_columns_are_counted_and_harmless(here: Path) -> None:
    arrays = small()
    for key in ("x_labeled", "x_unlabeled"):
        arrays[key][:, 1] = 1e-3  # which float32 cannot hold
    np.savez("rows.npz", **arrays)
    found = load(Path("rows.npz"))
    assert found.notes == ("1 of 3 columns has one value in all training rows and tells nothing",)
    assert found.std[1] == 1 and all(std > 0.1 for std in found.std)
    clean = resident(found.train_images, mean=found.mean, std=found.std).clean(torch.arange(12))
    assert clean[:, 1].abs().max() < 1e-6


def test_a_single_column(here: Path) -> None:
    np.savez("rows.npz", **{key: x[:, :1] if x.ndim == 2 else x for key, x in small().items()})
    found = load(Path("rows.npz"))
    assert found.shape == (1,) and len(found.mean) == len(found.std) == 1 and found.noun == "row"
    cfg = settings(train__rounds=1, train__min_steps=2, select__heads=1)
    assert len(run(cfg, found).rows) == 1


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


# --- networks -----------------------------------------------------------------------------------------------


HEADS, D = 3, 7


def network(name: str, *, heads: int = HEADS, dropout: float = 0.4) -> MLP:
    torch.manual_seed(0)
    found = build(name, n_classes=4, columns=D, heads=heads, dropout=dropout)
    assert isinstance(found, MLP)
    return found.eval()


def alone(whole: MLP, name: str, head: int) -> MLP:
    """A network of its own with the weights of one head."""
    found = network(name, heads=1)
    found.load_state_dict({key: value[head : head + 1] for key, value in whole.state_dict().items()})
    return found


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


X = torch.randn(5, D, generator=torch.Generator().manual_seed(1))
KEYS = dropout_keys(torch.arange(5), seed=0, draw=0)
NAMES = pytest.mark.parametrize("name", ["linear", "mlp-6", "mlp-6-8"])


@NAMES
def test_heads_are_networks_of_their_own(name: str) -> None:
    whole = network(name)
    each = [alone(whole, name, head) for head in range(HEADS)]
    found = whole.members(X, None)
    assert found.shape == (HEADS, 5, 4) and not torch.allclose(found[0], found[1])
    close(found, torch.stack([one(X) for one in each]))
    # Each head has masks of its own: those that a network of its own draws from these keys.
    own = [dropout_keys(KEYS.long() & 0xFFFFFFFF, seed=0, draw=head) for head in range(HEADS)]
    dropped = whole.members(X, KEYS)
    close(dropped, torch.stack([one(X, keys) for one, keys in zip(each, own, strict=True)]))
    assert not torch.allclose(dropped, found)
    close(whole.members(X[2:4], KEYS[2:4]), dropped[:, 2:4])
    for keys, logits in ((None, found), (KEYS, dropped)):
        close(whole(X, keys).softmax(1), logits.softmax(2).mean(0))


@NAMES
@pytest.mark.parametrize("passes", [HEADS, 2 * HEADS])
def test_a_pass_is_by_one_head(name: str, passes: int) -> None:
    whole = network(name)
    keys = dropout_keys(
        torch.arange(5).repeat(passes), seed=1, draw=torch.arange(passes).repeat_interleave(5)
    )
    for skip in range(len(whole.dropouts)):
        found = whole.passes(whole.prefix(X, skip), keys, passes, skip)
        assert found.shape == (passes, 5, 4)
        for p, own in enumerate(keys.view(passes, 5)):
            one = alone(whole, name, p % HEADS)
            close(found[p], one.suffix(one.prefix(X, skip), own, skip))


@NAMES
@pytest.mark.parametrize("heads", [1, HEADS])
def test_the_parts_of_a_network_make_the_whole(name: str, heads: int) -> None:
    model = network(name, heads=heads)
    for skip in range(len(model.dropouts)):
        hidden = model.prefix(X, skip)
        close(model.suffix(hidden, None, skip), model(X))
        if heads == 1:
            close(model.classify(model.embed(hidden, KEYS, skip)), model.suffix(hidden, KEYS, skip))
    assert not torch.allclose(model(X, KEYS), model(X))
    if heads == 1:
        # With its first dropouts off a network drops less, and at last in front of the classifier alone.
        last = len(model.dropouts) - 1
        close(model.embed(model.prefix(X), None), model.embed(model.prefix(X, last), None, last))
        assert (model.embed(model.prefix(X), KEYS) == 0).float().mean() > 0.2


def test_dropout_in_training_and_without() -> None:
    model = network("mlp-6").train()
    assert not torch.equal(model(X), model(X)), "as nn.Dropout does"
    assert torch.equal(model(X, KEYS), model(X, KEYS))
    off = network("mlp-6", dropout=0.0).train()
    assert torch.equal(off(X), off(X, KEYS))


def test_the_gradient_of_heads_is_that_of_each_alone() -> None:
    whole = network("mlp-6")
    target = torch.tensor([0, 1, 2, 3, 0])
    SINGLE.loss(whole.members(X, None), {"target": target}).backward()
    for head in range(HEADS):
        one = alone(whole, "mlp-6", head)
        nn.functional.cross_entropy(one(X), target).backward()
        for key, weight in one.named_parameters():
            both = whole.get_parameter(key).grad
            assert both is not None and weight.grad is not None
            close(both[head], weight.grad[0])


def test_networks_that_do_not_fit() -> None:
    for changes, said in (
        (
            {"name": "wrn-10-1"},
            "name must be linear or mlp-WIDTH, such as mlp-256, got 'wrn-10-1' for features",
        ),
        ({"name": "mlp-0"}, "got 'mlp-0' for features"),
        ({"name": "mlp"}, "got 'mlp' for features"),
        ({"name": "mlp-6", "columns": 0, "channels": 1, "size": 8}, "got 'mlp-6' for images"),
        ({"name": "mlp-6", "heads": 0}, "heads must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=said):
            build(**{"n_classes": 4, "columns": D, "dropout": 0.1, **changes})
    with pytest.raises(ValueError, match=r"features must be \[B, 7\], got \[5, 6\]"):
        network("linear")(X[:, :6])


# --- configs and whole runs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"select__passes": 4}, "select.passes must be a multiple of select.heads=3, got 4"),
        ({"select__heads": 0}, r"select.heads must be in \[1, 1000\], got 0"),
        (
            {"data__flip": True},
            "data.flip=True is for images that a network is trained on, got data.name=features",
        ),
        ({"data__cutout": 4}, "data.cutout=4 is for images"),
        ({"data__ops": "ups"}, "data.ops=ups is for images"),
        ({"data__n_labels": 40}, "data.n_labels must be 0 for features"),
        ({"data__size": 32}, "data.size is for data.name=folder"),
        (
            {"data__noise": 0.1, "data__name": "npz"},
            "data.noise and data.drop_columns are for data.name=features",
        ),
        ({"data__drop_columns": 1.0}, r"data.drop_columns must be in \[0, 1\), got 1.0"),
        ({"model__dropout": 0.0, "select__heads": 1}, "select.passes=6 needs model.dropout above 0, got 0"),
    ],
)
def test_configs_that_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        settings(**changes)


def test_heads_make_dropout_needless() -> None:
    assert settings(model__dropout=0.0).select.heads == 3
    assert settings(select__passes=1).select.passes == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model__name": "wrn-28-2"},
            "model.name: name must be linear or mlp-WIDTH, such as mlp-256, got 'wrn-28-2'",
        ),
        (
            {"method__name": "fixmatch", "data__noise": 0.1},
            "select.heads=3 is for method.name=.*, got method.name=f",
        ),
        (
            {"method__name": "fixmatch", "select__heads": 1},
            "data.noise and data.drop_columns are 0: raise one of them",
        ),
        ({"select__mc_layers": 3}, "select.mc_layers: mc_layers must be in 0 .. 2"),
    ],
)
def test_runs_that_are_refused(data: ImageSet, here: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        run(settings("run", **changes), data)
    assert "\n" not in str(caught.value) and not os.path.exists("run")


def test_later_rounds_are_better(finished: tuple[Path, rounds.Result]) -> None:
    rows = finished[1].rows
    assert [row["round"] for row in rows] == [0, 1, 2]
    first, last = rows[0]["test_acc"], rows[-1]["test_acc"]
    assert first is not None and last is not None and 0.7 < first < last
    assert rows[-1]["positives"] > 50 and rows[-1]["negatives"] > 100
    assert (finished[1].pseudo_labels.std[finished[1].pseudo_labels.positive] < 0.1).all()


def test_load_model_gives_the_network_of_the_run(
    finished: tuple[Path, rounds.Result], data: ImageSet
) -> None:
    model = load_model(finished[0])
    assert isinstance(model, MLP) and model.columns == COLUMNS and model.heads == 3 and not model.training
    assert model.classes == [str(c) for c in range(CLASSES)] and not hasattr(model, "channels")
    assert model.mean.tolist() == pytest.approx(data.mean) and model.std.shape == (COLUMNS,)
    with torch.no_grad():
        logits = model((data.test_images - model.mean) / model.std)
    accuracy = (logits.argmax(1) == data.test_labels).double().mean().item()
    assert accuracy == pytest.approx(finished[1].rows[-1]["test_acc"], abs=1e-9)
    assert model.std.min() > 0 and torch.isfinite(logits).all()


@pytest.mark.parametrize("optimizer", [pytest.param("sgd", marks=pytest.mark.slow), "adamw"])
def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(
    data: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    """In the middle of both rounds, and between them; with noise and an average of the weights."""
    more = {"train__rounds": 2, "train__min_steps": 8, "data__noise": 0.1, "train__ema": 0.9}
    more |= {"train__optimizer": optimizer, "train__lr": 0.3 if optimizer == "sgd" else 0.003}
    whole = run(settings(tmp_path / "whole", **more), data)
    cfg = settings(tmp_path / "run", **more)
    stops, real = [(0, 3), (1, 5)], Watch.show

    def show(self: Watch, *args: Any) -> None:
        if stops and (self.state.round, self.state.step) == stops[0]:
            stops.pop(0)
            self.stop.set()
        real(self, *args)

    monkeypatch.setattr(Watch, "show", show)
    quiet = Console(file=io.StringIO())
    with pytest.raises(Interrupted):
        run(cfg, data)
    steps = rounds.rounds(prepare(cfg, data), quiet)
    assert next(steps)["round"] == 0
    steps.close()  # round 1 has not begun
    with pytest.raises(Interrupted):
        run(cfg, data)
    again = run(cfg, data)
    assert not stops
    a, b = (load_model(tmp_path / name).state_dict() for name in ("whole", "run"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    for name, tensor in vars(whole.pseudo_labels).items():
        assert torch.equal(tensor.nan_to_num(), getattr(again.pseudo_labels, name).nan_to_num()), name


def test_a_run_without_a_folder_writes_nothing(data: ImageSet, here: Path) -> None:
    cfg = settings(train__rounds=2, train__min_steps=3)
    assert cfg.run_dir == ""
    text = io.StringIO()
    found = rounds.run(cfg, data, console=Console(file=text, width=200))
    assert list(here.iterdir()) == [] and len(found.rows) == 2
    assert "memory: a new run" in text.getvalue()
    kept = run(settings("run", train__rounds=2, train__min_steps=3), data)
    assert torch.equal(found.pseudo_labels.confidence, kept.pseudo_labels.confidence), "and learns the same"


def test_weight_decay_spares_the_biases_of_heads(data: ImageSet) -> None:
    job = prepare(settings(train__decay_norms=False, train__weight_decay=0.1), data)
    decays = {
        id(p): group["weight_decay"] for group in job.step.optimizer.param_groups for p in group["params"]
    }
    found = {name: decays[id(p)] for name, p in job.method.trained().items()}
    assert all(decay == (0.0 if name.endswith("bias") else 0.1) for name, decay in found.items())
    assert set(found.values()) == {0.0, 0.1}
