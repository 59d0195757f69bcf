"""UPSClassifier: scikit-learn's own checks, and what is told of the samples."""

from __future__ import annotations

import pickle
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits, make_blobs
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from ups_fast import UPSClassifier

SMALL = {"rounds": 2, "steps": 30, "heads": 2, "passes": 4, "random_state": 0, "n_jobs": 1}


def blobs(per_class: int = 2, n: int = 300) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, their labels of which few are given, and the truth."""
    x, truth = make_blobs(n, n_features=8, centers=3, random_state=0)
    y = np.full(n, -1)
    for c in range(3):
        y[np.flatnonzero(truth == c)[:per_class]] = c
    return x, y, truth


@cache
def fitted() -> UPSClassifier:
    x, y, _ = blobs()
    return UPSClassifier(**SMALL).fit(x, y)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_scikit_learns_checks():
    """All but the one that has the labels -1 and 1: here -1 means that there is none, as in sklearn.semi_supervised."""
    found = check_estimator(UPSClassifier(**SMALL), on_fail=None, on_skip=None)
    failed = {each["check_name"] for each in found if each["status"] == "failed"}
    assert failed == {"check_classifiers_classes"} and len(found) > 40


def test_few_labels_are_enough_and_attributes_tell_of_each_sample():
    model, (x, y, truth) = fitted(), blobs()
    given = y >= 0
    assert (model.transduction_ == truth).mean() > 0.97 and model.score(x, truth) > 0.97
    assert (model.transduction_[given] == y[given]).all() and model.positive_[given].all()
    assert (model.confidence_[given] == 1).all() and (model.std_[given] == 0).all()
    assert not model.negative_[model.positive_].any() and model.negative_.shape == (300, 3)
    kept = model.positive_ & ~given
    assert kept.sum() > 100 and (model.confidence_[kept] >= 0.7).all() and (model.std_[kept] <= 0.1).all()
    assert (model.std_[~given] > 0).any()
    assert [row["round"] for row in model.history_] == [0, 1]
    p = model.predict_proba(x)
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-6)
    assert (model.classes_[p.argmax(1)] == model.predict(x)).all()


def test_an_answer_depends_on_its_row_alone():
    model, (x, _, _) = fitted(), blobs()
    whole = model.predict_proba(x)
    for part in (slice(0, 1), slice(5, 12), slice(250, 300)):
        np.testing.assert_allclose(model.predict_proba(x[part]), whole[part], rtol=1e-5, atol=1e-9)


def test_the_same_seed_gives_the_same_model_and_it_pickles():
    x, y, _ = blobs()
    again, other = clone(fitted()).fit(x, y), UPSClassifier(**{**SMALL, "random_state": 1}).fit(x, y)
    np.testing.assert_array_equal(again.predict_proba(x), fitted().predict_proba(x))
    assert not np.array_equal(other.predict_proba(x), fitted().predict_proba(x))
    copy = pickle.loads(pickle.dumps(fitted()))
    np.testing.assert_array_equal(copy.predict_proba(x), fitted().predict_proba(x))


@pytest.mark.parametrize(
    "names",
    [np.array(["a", "b", "c"]), np.array(["a", "b", "c"], object), np.array([10, 7, 300]), [0.0, 2.0, 5.0]],
)
def test_labels_of_any_type(names):
    x, y, truth = blobs()
    names = np.asarray(names)
    labels = names[np.clip(y, 0, None)]
    labels[y < 0] = -1
    model = UPSClassifier(**SMALL).fit(x, labels)
    assert model.classes_.tolist() == sorted(names.tolist())
    assert (model.predict(x) == names[truth]).mean() > 0.97


def test_minus_one_is_no_class_among_string_objects():
    """So pandas gives a column of text."""
    x, y, truth = blobs()
    labels = np.array(["-1", "a", "b", "c"], object)[y + 1]
    model = UPSClassifier(**SMALL).fit(x, labels)
    assert model.classes_.tolist() == ["a", "b", "c"]
    assert (model.transduction_ == np.array(["a", "b", "c"])[truth]).mean() > 0.97


def test_all_labeled_is_plain_training():
    x, _, truth = blobs()
    model = UPSClassifier(**SMALL).fit(x, truth)
    assert len(model.history_) == 1 and model.score(x, truth) > 0.97


def test_in_a_pipeline_and_a_grid():
    x, y, truth = blobs(per_class=10)
    pipe = make_pipeline(StandardScaler(), UPSClassifier(**SMALL)).fit(x, y)
    assert pipe.score(x, truth) > 0.97
    grid = GridSearchCV(UPSClassifier(**{**SMALL, "rounds": 1}), {"tau_p": [0.5, 0.9]}, cv=2).fit(x, y)
    assert grid.best_params_["tau_p"] in (0.5, 0.9)


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, y, _ = blobs()
    UPSClassifier(**SMALL).fit(x, y)
    assert not list(tmp_path.iterdir())


def test_a_stopped_fit_goes_on_from_its_folder(tmp_path):
    x, y, _ = blobs()
    whole = UPSClassifier(**SMALL, run_dir=str(tmp_path / "run")).fit(x, y)
    assert (tmp_path / "run" / "model.safetensors").is_file()
    np.testing.assert_array_equal(whole.predict_proba(x), fitted().predict_proba(x))
    before = (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns
    again = UPSClassifier(**SMALL, run_dir=str(tmp_path / "run")).fit(x, y)
    assert (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns == before, "nothing was left to do"
    assert len(again.history_) == 2


def test_threads_are_given_back():
    x, y, _ = blobs()
    before = torch.get_num_threads()
    UPSClassifier(**{**SMALL, "n_jobs": before + 1, "steps": 1}).fit(x, y)
    assert torch.get_num_threads() == before


def test_images():
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:400]
    y = np.where(np.arange(400) < 200, digits.target[:400], -1)
    settings = {"train.epochs": 4, "train.batch_size": 40}
    model = UPSClassifier(**{**SMALL, "steps": 60, "learning_rate": 0.03, "dropout": 0.1, "rounds": 1})
    model = model.set_params(model="wrn-10-1", settings=settings).fit(images, y)
    assert (model.predict(images)[200:] == digits.target[200:400]).mean() > 0.8
    assert model.n_features_in_ == 64
    with pytest.raises(
        ValueError, match=r"X must be images as in fit, uint8 \[n, 8, 8, 1\], got float64 \[400, 64\]"
    ):
        model.predict(digits.data[:400])
    with pytest.raises(ValueError, match=r"X must be images as in fit, .* got uint8 \[400, 4, 16\]"):
        model.predict(images.reshape(400, 4, 16))
    with pytest.raises(ValueError, match=r"X must be images as in fit, .* got uint8 \[400, 8, 8, 3\]"):
        model.predict(images[..., None].repeat(3, 3))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"heads": 3}, "select.passes must be a multiple of select.heads=3, got 4"),
        ({"method": "fixmach"}, "method.name must be one of .*, got 'fixmach'"),
        ({"method": "fixmatch"}, "method.name=fixmatch compares a weak view of each row with a strong one"),
        ({"method": "fixmatch", "settings": {"data.noise": 0.1}}, "select.heads=2 is for method.name="),
        ({"model": "wrn-10-1"}, "model.name: name must be linear or mlp-WIDTH"),
        ({"tau_p": 2.0}, "select.tau_p must be"),
        ({"learning_rate": 0.0}, "train.lr must be"),
        ({"settings": {"train.lrr": 1}}, "unknown key 'train.lrr'"),
        ({"device": "gpu"}, "device must be"),
    ],
)
def test_wrong_settings_are_said(changes, why):
    x, y, _ = blobs()
    with pytest.raises(ValueError, match=why):
        UPSClassifier(**{**SMALL, **changes}).fit(x, y)


def objects(y: np.ndarray, first: object) -> np.ndarray:
    found = y.astype(object)
    found[0] = first
    return found


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        (lambda y: np.full_like(y, -1), "y must hold at least two classes beside -1 .*, got no label"),
        (lambda y: np.where(y > 0, -1, y), "at least two classes beside -1 .*, got only the class 0"),
        (lambda y: y[:-1], "inconsistent numbers of samples"),
        (
            lambda y: y[:, None].repeat(2, 1),
            "y must hold 1, 0 and, where it is not known, -1, got 2 in row 4",
        ),
        (lambda y: np.where(y == 0, 0.5, y), "Unknown label type"),
        (lambda y: np.where(y == 0, np.nan, y), "NaN"),
        (lambda y: objects(y, None), "y must hold strings or numbers, and -1 .*, got None at place 0"),
        (lambda y: objects(y, float("nan")), "y must hold strings or numbers, .*, got nan at place 0"),
        (lambda y: objects(y, (0, 1)), r"y must hold strings or numbers, .*, got \(0, 1\) at place 0"),
        (lambda y: objects(y, "a"), "y must hold labels of one kind, .*, got 'a' and [0-9]"),
    ],
)
def test_wrong_labels_are_said(labels, why):
    x, y, _ = blobs()
    with pytest.raises(ValueError, match=why):
        UPSClassifier(**SMALL).fit(x, labels(y))


@pytest.mark.parametrize(
    ("shape", "labels", "why"),
    [
        ((6, 8, 8, 4), 6, r"X must be images \[n, H, W\] or \[n, H, W, 3\], got \[6, 8, 8, 4\]"),
        ((6, 8, 8), 5, r"y must have a label or -1 for each of 6 images, got \[5\]"),
    ],
)
def test_wrong_images_are_said(shape, labels, why):
    with pytest.raises(ValueError, match=why):
        UPSClassifier(**SMALL).fit(np.zeros(shape, np.uint8), np.arange(labels) % 2)


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        (lambda x: np.where(x == x[0, 0], np.nan, x), "contains NaN"),
        (lambda x: np.where(x == x[0, 0], np.inf, x), "contains infinity"),
        (lambda x: x[:, 0], "Expected 2D array, got 1D"),
        (lambda x: x[:, :, None], "Found array with dim 3"),
    ],
)
def test_wrong_rows_are_said(rows, why):
    x, y, _ = blobs()
    with pytest.raises(ValueError, match=why):
        UPSClassifier(**SMALL).fit(rows(x), y)


def test_before_it_is_fitted():
    with pytest.raises(NotFittedError):
        UPSClassifier().predict(np.zeros((1, 2)))


def test_it_beats_labels_alone_on_digits():
    """40 labels, as pixels in rows: more than logistic regression, and than its own first round."""
    digits = load_digits()
    y = np.full(len(digits.target), -1)
    for c in range(10):
        y[np.flatnonzero(digits.target == c)[:4]] = c
    model = UPSClassifier(rounds=3, steps=100, random_state=0, n_jobs=1).fit(digits.data, y)
    hidden = y < 0
    found = (model.transduction_[hidden] == digits.target[hidden]).mean()
    alone = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    alone.fit(digits.data[~hidden], y[~hidden])
    assert found > alone.score(digits.data[hidden], digits.target[hidden]) + 0.02


def test_the_readme_shows_it():
    assert "UPSClassifier" in (Path(__file__).parents[1] / "README.md").read_text()
