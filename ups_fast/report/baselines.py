"""What simple classifiers reach with the same labels and features, so that a run can be held against them.

    logistic regression  on the labeled rows, C = 0.01
    label spreading      over the graph of nearest neighbors (k = 7, alpha = 0.2)
    self-training        of the logistic regression: what it is confident of is its next label, no uncertainty

All are scikit-learn's. One that would take minutes is skipped, one that fails is left out, and its row says why.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ups_fast.calibration import or_none
from ups_fast.words import line_of

C = 0.01  # of the logistic regression: inverse strength of its penalty
STEPS = 200  # of L-BFGS, at most
NEIGHBORS, ALPHA = 7, 0.2  # of label spreading
# What still takes seconds. Beyond it a baseline is skipped: one on a part of the data would be another baseline.
MOST_ROWS, MOST_COLUMNS = 20_000, 4096
MOST_PRODUCTS = {"fit": 2 * 10**8, "graph": 2 * 10**11}  # of numbers: in a step of L-BFGS, in all distances
_BATCH = 8192  # rows that are predicted at once


@dataclass(frozen=True)
class Part:
    """Rows that can be read, and what is known of them."""

    read: Callable[[Tensor], Tensor]  # int64 [n] of `index` -> float32 [n, d], standardized
    index: Tensor  # int64 [N]
    truth: Tensor  # int64 [N], -1 where unknown

    @property
    def known(self) -> int:
        return int((self.truth >= 0).sum())

    def batches(self) -> Iterator[np.ndarray]:
        for index in self.index.split(_BATCH):
            yield self.read(index).cpu().numpy()

    def rows(self) -> np.ndarray:  # float32 [N, d]
        return np.concatenate(list(self.batches()))


# labeled, unlabeled, test and val; the truth of the labeled rows is their label.
Parts = Mapping[str, Part]


class Rival(NamedTuple):
    """A baseline. Accuracies are None where nothing is known, or where there is no result."""

    name: str
    test: float | None = None
    unlabeled: float | None = None
    val: float | None = None
    seconds: float = 0.0
    why: str = ""  # there is no result
    failed: bool = False  # rather than skipped
    note: str = ""  # on a result


class Fitted(NamedTuple):
    predict: Callable[[np.ndarray], np.ndarray]  # float32 [n, d] -> int64 [n]
    unlabeled: np.ndarray | None = None  # int64 [U], where it is not what `predict` says
    note: str = ""


class Size(NamedTuple):
    labeled: int
    rows: int  # labeled and unlabeled
    columns: int
    classes: int


def compare(parts: Parts, n_classes: int, tau_p: float) -> list[Rival]:
    """All baselines. `tau_p` is the threshold of self-training."""
    with suppress(ImportError):  # so that the first one's seconds are its own
        import sklearn.linear_model
        import sklearn.semi_supervised  # noqa: F401
    labeled, unlabeled = parts["labeled"], parts["unlabeled"]
    columns = labeled.read(labeled.index[:1]).shape[1]
    size = Size(len(labeled.index), len(labeled.index) + len(unlabeled.index), columns, n_classes)
    return [_tried(name, parts, size, tau_p) for name in BASELINES]


def _tried(title: str, parts: Parts, size: Size, tau_p: float) -> Rival:
    """Whatever goes wrong costs this baseline, and nothing else."""
    baseline = BASELINES[title]
    if why := _too_large(size, baseline):
        return Rival(title, why=why)
    began = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # 200 steps of L-BFGS are enough, converged or not
            fitted = baseline(parts, tau_p)
            test, unlabeled, val = (
                _right(fitted, name, parts[name]) for name in ("test", "unlabeled", "val")
            )
    except Exception as error:
        return Rival(title, why=f"failed: {line_of(error)}", failed=True)
    seconds = round(time.perf_counter() - began, 3)
    return Rival(title, test, unlabeled, val, seconds, note=fitted.note)


def _right(fitted: Fitted, name: str, part: Part) -> float | None:
    """The share of right answers; None where no truth is known."""
    if not part.known:
        return None
    if name == "unlabeled" and fitted.unlabeled is not None:
        answers = fitted.unlabeled
    else:
        answers = np.concatenate([fitted.predict(rows) for rows in part.batches()])
    known = part.truth >= 0
    return or_none((torch.from_numpy(answers) == part.truth)[known].double().mean())


def _too_large(size: Size, baseline: Any) -> str:
    """Why it is skipped; empty where it takes seconds."""
    alone = baseline is logistic_regression
    if not alone and size.rows > MOST_ROWS:
        return f"skipped: {size.rows:,} rows are more than {MOST_ROWS:,}, which would take minutes"
    if not alone and size.columns > MOST_COLUMNS:
        return f"skipped: {size.columns:,} columns are more than {MOST_COLUMNS:,}, which would take minutes"
    if baseline is label_spreading:
        products, most = size.rows**2 * size.columns, MOST_PRODUCTS["graph"]
    else:
        rows = size.labeled if alone else size.rows
        products, most = rows * size.columns * size.classes, MOST_PRODUCTS["fit"]
    if products <= most:
        return ""
    many = f"{size.labeled:,} labeled" if alone else f"{size.rows:,}"
    return f"skipped: {many} rows of {size.columns:,} columns and {size.classes:,} classes would take minutes"


# The baselines ---------------------------------------------------------------------------------------------


def logistic_regression(parts: Parts, tau_p: float) -> Fitted:
    labeled = parts["labeled"]
    return Fitted(_logistic().fit(labeled.rows(), labeled.truth.numpy()).predict)


def label_spreading(parts: Parts, tau_p: float) -> Fitted:
    from sklearn.semi_supervised import LabelSpreading

    rows, labels = _both(parts)
    model = LabelSpreading(kernel=nearest, alpha=ALPHA).fit(rows, labels)
    return Fitted(model.predict, model.transduction_[len(parts["labeled"].index) :])


def self_training(parts: Parts, tau_p: float) -> Fitted:
    from sklearn.semi_supervised import SelfTrainingClassifier

    rows, labels = _both(parts)
    model = SelfTrainingClassifier(_logistic(), threshold=tau_p).fit(rows, labels)
    added = int((model.transduction_ >= 0).sum()) - len(parts["labeled"].index)
    note = f"trusted {added:,} labels" if added else f"no label reached {tau_p:g}: as logistic regression"
    return Fitted(model.predict, note=note)


BASELINES: dict[str, Callable[[Parts, float], Fitted]] = {
    "logistic regression": logistic_regression,
    "label spreading": label_spreading,
    "self-training": self_training,
}


def _logistic() -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=C, max_iter=STEPS)


def _both(parts: Parts) -> tuple[np.ndarray, np.ndarray]:
    """Labeled rows, then unlabeled ones, and labels with -1 for those."""
    labeled, unlabeled = parts["labeled"], parts["unlabeled"]
    if not len(unlabeled.index):
        return labeled.rows(), labeled.truth.numpy()
    none = np.full(len(unlabeled.index), -1)
    rows = np.concatenate([labeled.rows(), unlabeled.rows()])
    return rows, np.concatenate([labeled.truth.numpy(), none])


def nearest(x: np.ndarray, others: np.ndarray) -> Any:  # float32 [n, d], [m, d] -> sparse [n, m]
    """1 where a row of x is among the nearest neighbors of one of `others`, itself among them; else 0.

    What scikit-learn's kernel "knn" is, by matrix products in float32, which are several times as fast.
    """
    from scipy.sparse import csr_array

    a, b = torch.from_numpy(x), torch.from_numpy(others)
    if x is not others:  # rows are predicted: their neighbors are among x
        return csr_array(_graph(b, a).T)
    return csr_array(_graph(a, a))


def _graph(a: Tensor, b: Tensor) -> Any:
    """Sparse [n, m]: 1 for the nearest rows of b to each of a."""
    from scipy.sparse import csr_array

    k, length = min(NEIGHBORS, len(b)), b.square().sum(1)
    near = [(length - 2 * (part @ b.T)).topk(k, largest=False).indices for part in a.split(1024)]
    columns = torch.cat(near).numpy().ravel()
    starts = np.arange(0, len(columns) + 1, k)
    return csr_array((np.ones(len(columns)), columns, starts), shape=(len(a), len(b)))
