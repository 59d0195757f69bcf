"""`UPSClassifier`: the rounds as an estimator of scikit-learn, on features or on images."""

from __future__ import annotations

import copy
import numbers
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from rich.console import Console
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from ups_fast import config
from ups_fast.build import prepare
from ups_fast.data import ImageSet
from ups_fast.data.features import column_moments
from ups_fast.data.image_set import moments
from ups_fast.data.label_sets import marks, notes_on_classes
from ups_fast.display import open_console, say, table_line
from ups_fast.models import Network
from ups_fast.pseudo_labels import MultiPseudoLabels, PseudoLabels
from ups_fast.reference import unpack_mask
from ups_fast.rounds import rounds
from ups_fast.words import said

_ROWS = 256  # of a batch that is predicted: always so many, so that an answer depends on its row alone
_NONE = -1  # stands for no label
# The network by whether there are images, and whether it is frozen.
_AUTO = {(False, False): "mlp-128", (True, False): "wrn-10-2", (True, True): "lite0", (False, True): "lite0"}


class UPSClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Semi-supervised classification by uncertainty-aware pseudo-label selection (Rizve et al., ICLR 2021).

    Heads of other initial weights label what has no label. Labels that are confident and certain are kept, all heads
    learn from them, and from what a sample surely is not, and label again.

    Args:
        method: name of a training method, see docs/methods.md.
        model: name of the network. "auto": ``"mlp-128"`` for features, ``"wrn-10-2"`` for images.
        heads: networks that are trained side by side. Images have one, unless `settings` freeze the network.
        passes: predictions of each unlabeled sample, of which confidence and std are taken. As many as `heads`: each
            head's, without dropout. Else a multiple of `heads`, which share them, with dropout.
        rounds: at least 1; the first learns from the given labels alone.
        steps: steps of a round at least.
        batch_size: samples in a step.
        learning_rate: the highest one of its schedule.
        dropout: in [0, 1).
        tau_p, kappa_p: a label is kept where confidence is at least tau_p and std at most kappa_p.
        tau_n, kappa_n: a class is excluded where probability and std are at most these.
        settings: other keys of a config, such as ``{"data.noise": 0.1}``; ``python -m ups_fast.train --help``
            explains them. With ``{"model.freeze": True}`` images become features of a pretrained network,
            ``model="lite0"``.
        run_dir: a folder for checkpoints and metrics, from which the same call goes on after it was stopped. None:
            nothing is written.
        device: "auto", "cpu", "cuda" or "cuda:N".
        n_jobs: CPU threads. None: as torch has it.
        random_state: int, RandomState or None, as in scikit-learn.
        verbose: 1 prints a line a round, and a progress bar in a terminal.

    Attributes:
        classes_: ndarray [C], the labels in order; of several labels 0 to C - 1.
        transduction_: ndarray [n], a label for each sample of `fit`: the given one, or the predicted one.
        confidence_: float32 [n], mean probability of that label over the passes; 1 where it was given.
        std_: float32 [n], its standard deviation over the passes; 0 where it was given.
        positive_: bool [n], the label was kept as it is confident and certain, or was given.
        negative_: bool [n, C], classes that a sample that was not kept surely has not.
        history_: list of dicts, a round each: what metrics.jsonl has.
        network_: the trained network, on the CPU.
        n_features_in_: columns of X.

        Of several labels, all but history_ and network_ have a column for each class: [n, C].

    Raises:
        ValueError, TypeError: naming the argument and what it got.

    >>> import numpy as np
    >>> from sklearn.datasets import make_blobs
    >>> from ups_fast import UPSClassifier
    >>> X, truth = make_blobs(300, n_features=8, centers=3, random_state=0)
    >>> y = np.full(300, -1)
    >>> for c in range(3):
    ...     y[np.flatnonzero(truth == c)[:2]] = c
    >>> model = UPSClassifier(rounds=2, steps=30, random_state=0).fit(X, y)
    >>> bool((model.transduction_ == truth).mean() > 0.9)
    True
    >>> model.predict_proba(X).shape
    (300, 3)
    """

    def __init__(
        self,
        *,
        method: str = "ups",
        model: str = "auto",
        heads: int = 5,
        passes: int = 5,
        rounds: int = 5,
        steps: int = 300,
        batch_size: int = 128,
        learning_rate: float = 0.1,
        dropout: float = 0.5,
        tau_p: float = 0.7,
        kappa_p: float = 0.1,
        tau_n: float = 0.05,
        kappa_n: float = 0.005,
        settings: Mapping[str, Any] | None = None,
        run_dir: str | None = None,
        device: str = "auto",
        n_jobs: int | None = None,
        random_state: Any = None,
        verbose: int = 0,
    ) -> None:
        self.method = method
        self.model = model
        self.heads = heads
        self.passes = passes
        self.rounds = rounds
        self.steps = steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.dropout = dropout
        self.tau_p = tau_p
        self.kappa_p = kappa_p
        self.tau_n = tau_n
        self.kappa_n = kappa_n
        self.settings = settings
        self.run_dir = run_dir
        self.device = device
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose

    # Learning ----------------------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any) -> UPSClassifier:
        """Learns from labeled and unlabeled samples.

        Args:
            X: float [n, d], features; or uint8 [n, H, W] or [n, H, W, 3], images.
            y: [n], labels, all strings or all numbers; -1 (or "-1" among strings) for samples without one. Or of
                several labels integers [n, C], C at least 2: 1, 0, or -1 where it is not known.

        Returns:
            The estimator.
        """
        X, y = self._checked(X, y)
        self._several = y.dtype if y.ndim == 2 else None  # of several labels: what predict returns
        self.classes_, target = _several(y) if y.ndim == 2 else _single(y)
        data = _data(torch.from_numpy(X), torch.from_numpy(target), [str(each) for each in self.classes_])
        assert data.labeled is not None
        cfg = self._config(data, any_unlabeled=len(data.labeled) < len(y))
        console = open_console() if self.verbose else Console(quiet=True)
        with _threads(self.n_jobs):
            run = prepare(cfg, data, console)
            self.history_ = []
            for row in rounds(run, console):
                say(console, table_line(row))
                self.history_.append(dict(row))
        self.network_ = copy.deepcopy(run.network).cpu().eval()
        self._mean, self._std = (torch.tensor(run.about[each]) for each in ("mean", "std"))
        found = run.task.of(run.state.pseudo_labels)  # type: ignore[arg-type]
        self._keep_several(found, target, X) if self._several else self._keep(found, target)
        return self

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags

    def _checked(self, X: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
        images = X if isinstance(X, np.ndarray) and X.dtype == np.uint8 and X.ndim in (3, 4) else None
        if y is not None:
            y = np.asarray(y)
            _check_objects(y)
        if images is None:
            several = y is not None and y.ndim == 2 and y.shape[1] > 1
            X, y = validate_data(self, X, y, dtype=np.float32, ensure_min_samples=2, multi_output=several)
            X = np.ascontiguousarray(X)
        else:
            if images.ndim == 4 and images.shape[3] not in (1, 3):
                raise ValueError(f"X must be images [n, H, W] or [n, H, W, 3], got {list(images.shape)}")
            if len(np.shape(y)) not in (1, 2) or len(y) != len(images):
                raise ValueError(
                    f"y must have a label or -1 for each of {len(images)} images, got {list(np.shape(y))}"
                )
            X = np.ascontiguousarray(images if images.ndim == 4 else images[..., None])
            self.n_features_in_, self._image_shape = int(np.prod(X.shape[1:])), X.shape[1:]
        if y.ndim == 1 and not _is_unlabeled(y).all():
            check_classification_targets(_plain(y[~_is_unlabeled(y)]))
        return X, y

    def _config(self, data: ImageSet, *, any_unlabeled: bool) -> config.Config:
        images = len(data.shape) == 3
        frozen = bool((self.settings or {}).get("model.freeze"))  # then what is trained has features
        trained = images and not frozen
        seed = self.random_state
        if not isinstance(seed, (int, np.integer)):
            seed = check_random_state(seed).randint(np.iinfo(np.int32).max)
        values: dict[str, Any] = {
            "recipe": "none" if trained else "features",
            "data.name": "npz" if images else "features",
            "method.name": self.method,
            "model.name": self.model if self.model != "auto" else _AUTO[images, frozen],
            "model.dropout": self.dropout,
            "train.rounds": self.rounds if any_unlabeled else 1,
            "train.min_steps": self.steps,
            "train.batch_size": self.batch_size,
            "train.lr": self.learning_rate,
            "select.heads": 1 if trained else self.heads,
            "select.passes": self.passes,
            "select.balance_rounds": self.rounds,
            "select.tau_p": self.tau_p,
            "select.tau_n": self.tau_n,
            "select.kappa_p": self.kappa_p,
            "select.kappa_n": self.kappa_n,
            "run_dir": self.run_dir or "",
            "device": self.device,
            "seed": int(seed),
        }
        if trained:
            values |= {"data.crop": min(data.shape[1:]) // 8, "train.epochs": 10}
        return config.make(values | dict(self.settings or {}))

    def _keep(self, found: PseudoLabels, target: np.ndarray) -> None:
        """What is told of the samples of `fit`."""
        index, n, n_classes = found.index.numpy(), len(target), len(self.classes_)
        label = target.copy()
        self.confidence_, self.std_ = np.ones(n, np.float32), np.zeros(n, np.float32)
        self.positive_, self.negative_ = np.ones(n, bool), np.zeros((n, n_classes), bool)
        label[index] = found.label.numpy()
        self.confidence_[index], self.std_[index] = found.confidence.numpy(), found.std.numpy()
        self.positive_[index] = found.positive.numpy()
        self.negative_[index] = unpack_mask(found.negative, n_classes).numpy()
        self.transduction_ = self.classes_[label]

    def _keep_several(self, found: MultiPseudoLabels, target: np.ndarray, X: np.ndarray) -> None:
        """The same of several labels. What is not known of a sample with labels is what the network says of it."""
        index, n_classes, known = found.index.numpy(), len(self.classes_), target >= 0
        p = np.where(known, 1, self.predict_proba(X if X.ndim == 2 else X.squeeze(-1))).astype(np.float32)
        std, positive, negative = np.zeros_like(p), target == 1, target == 0
        p[index], std[index] = found.confidence.numpy(), found.std.numpy()
        positive[index], negative[index] = (
            unpack_mask(each, n_classes).numpy() for each in (found.positive, found.negative)
        )
        self.confidence_, self.std_, self.positive_, self.negative_ = p, std, positive, negative
        self.transduction_ = np.where(known, target, p >= 0.5).astype(self._several)

    # Answers -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict_proba(self, X: Any) -> np.ndarray:  # float64 [n, C]
        """Probabilities of the classes, in the order of `classes_`: the mean over the heads, without dropout.

        Of several labels each is the probability of that class by itself.
        """
        check_is_fitted(self)
        network: Network = self.network_
        if hasattr(network, "columns"):
            rows = torch.from_numpy(
                np.ascontiguousarray(validate_data(self, X, dtype=np.float32, reset=False))
            )
        else:
            rows = _pixels(X, self._image_shape)
        shape = [-1, *[1] * (rows.ndim - 2)]
        mean, std = self._mean.view(shape), self._std.view(shape)
        found = []
        for part in rows.split(_ROWS):
            whole = part[torch.arange(_ROWS).clamp(max=len(part) - 1)]
            logits = network((whole - mean) / std)[: len(part)]
            found.append(network.probabilities(logits.double()))
        return torch.cat(found).numpy()

    def predict(self, X: Any) -> np.ndarray:  # [n]
        """The most probable class of each sample; of several labels 1 or 0 for each class, [n, C]."""
        check_is_fitted(self)
        if self._several:
            return (self.predict_proba(X) >= 0.5).astype(self._several)
        return self.classes_[self.predict_proba(X).argmax(1)]


def _single(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # [n] -> [C], int64 [n]
    unlabeled = _is_unlabeled(y)
    classes, code = np.unique(_plain(y[~unlabeled]), return_inverse=True)
    if len(classes) < 2:
        got = f"only the class {classes[:1].tolist()[0]!r}" if len(classes) else "no label"
        raise ValueError(f"y must hold at least two classes beside -1 for unlabeled samples, got {got}")
    target = np.full(len(y), _NONE)
    target[~unlabeled] = code
    return classes, target


def _several(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # [n, C] -> [C], int8 [n, C]
    target = marks(y, "y")
    classes = np.arange(y.shape[1])
    notes_on_classes(target[(target >= 0).any(1)], [str(c) for c in classes], "y")
    return classes, target.numpy()


def _data(X: torch.Tensor, target: torch.Tensor, classes: list[str]) -> ImageSet:
    mean, std = moments(X) if X.ndim == 4 else column_moments(X)
    labeled = (target >= 0).reshape(len(target), -1).any(1).nonzero()[:, 0]
    return ImageSet("features", classes, X, target, X[:0], target[:0], mean, std, labeled=labeled)


def _pixels(X: Any, shape: tuple[int, ...]) -> torch.Tensor:  # float32 [n, C, H, W] in [0, 1]
    given = np.asarray(X)
    images = given[..., None] if given.ndim == 3 else given
    if images.dtype != np.uint8 or images.shape[1:] != shape:
        fits = f"uint8 [n, {', '.join(map(str, shape))}]"
        raise ValueError(f"X must be images as in fit, {fits}, got {given.dtype} {list(given.shape)}")
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255


def _is_unlabeled(y: np.ndarray) -> np.ndarray:  # bool [n]
    if y.dtype.kind in "US":
        return y == np.array("-1", y.dtype)
    if y.dtype == object:
        return np.array([each == (str(_NONE) if isinstance(each, str) else _NONE) for each in y], bool)
    return y == _NONE


def _check_objects(y: np.ndarray) -> None:
    """Objects may be strings or numbers, and labels are of one of these kinds. Raises ValueError."""
    kinds: dict[bool, Any] = {}
    for i, each in enumerate(y.flat if y.dtype == object else ()):
        if not isinstance(each, (str, numbers.Real, np.bool_)) or each != each:
            raise ValueError(
                f"y must hold strings or numbers, and -1 for a sample without a label, got {said(each)} at place {i}"
            )
        if each not in (_NONE, str(_NONE)):
            kinds.setdefault(isinstance(each, str), each)
    if len(kinds) > 1:
        raise ValueError(
            f"y must hold labels of one kind, strings or numbers, got {said(kinds[True])} and {said(kinds[False])}"
        )


def _plain(y: np.ndarray) -> np.ndarray:
    """Labels among objects, in a type of their own."""
    return np.array(y.tolist()) if y.dtype == object else y


@contextmanager
def _threads(n: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if n is not None:
        torch.set_num_threads(n if n > 0 else max(1, before + 1 + n))
    try:
        yield
    finally:
        torch.set_num_threads(before)
