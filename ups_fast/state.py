"""Where a run stands, and whether a state that was read from a file can be believed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from ups_fast.calibration import BINS
from ups_fast.files import finite, misfit
from ups_fast.tasks import MULTI, SINGLE, Task

MOST = 10**12  # no count of a run is larger: epochs, steps, seconds, images


class Keeps(NamedTuple):
    """What goes on from a round to the next one."""

    weights: bool
    momentum: bool


class _Guess(TypedDict, total=False):
    """What the thresholds do to test images, where the truth of the unlabeled ones is not known."""

    test_positives: int
    test_positive_acc: float | None
    test_bins: dict[str, list[list[float]]]


class _Later(TypedDict, total=False):
    """What rows of earlier versions lack."""

    unlabeled_acc: float | None


class _Single(TypedDict, total=False):
    """Of one label for each sample."""

    test_acc: float | None
    val_acc: float | None
    test_mistakes: list[list[int]]
    test_recall: list[float | None]


class _Multi(TypedDict, total=False):
    """Of several labels for each sample."""

    test_map: float | None
    val_map: float | None
    unlabeled_map: float | None
    test_map_11: float | None
    test_map_classes: int
    test_cf1: float | None
    test_of1: float | None
    test_ap: list[float | None]
    test_class_ece: list[float | None]


class Row(_Guess, _Later, _Single, _Multi):
    """A finished round, a line of metrics.jsonl. None where there is nothing to average."""

    round: int
    positives: int
    positive_acc: float | None
    negatives: int
    negative_acc: float | None
    negative_samples: int
    ece: float | None
    ece_selected: float | None
    per_class_positives: list[int]
    no_label: int
    seconds: float
    outside: float
    train_loss: float | None
    test_ece: float | None


def task_in(row: Mapping[str, Any]) -> Task:
    """What a label is, by the row of a round."""
    return MULTI if f"test_{MULTI.headline}" in row else SINGLE


def headline_of(row: Mapping[str, Any], part: str = "test") -> float | None:
    """Accuracy, or of several labels mAP, on test, val or unlabeled samples; None where it is not known."""
    value: float | None = row.get(f"{part}_{task_in(row).headline}")
    return value


@dataclass
class Checkpoint:
    """Where a run stands. All else derives from this, the config and the data."""

    data: str  # fingerprint
    labeled: Tensor  # int64 [L]
    unlabeled: Tensor  # int64 [U]
    val: Tensor  # int64 [V], to validate: in neither of them
    round: int = 0  # the one in progress; all are done when it equals train.rounds
    epoch: int = 0  # epochs of the round done
    step: int = 0  # steps of the epoch done
    seconds: float = 0.0  # spent on the round so far
    outside: float = 0.0  # of these, on neither steps nor labeling
    loss: Tensor = field(default_factory=lambda: torch.zeros(()))  # sum over the epoch's steps
    train_loss: float | None = None  # mean over the last whole epoch; None where not finite
    rows: list[Row] = field(default_factory=list)  # one per finished round
    pseudo_labels: dict[str, Tensor] | None = None  # of the last finished round, as the task's `kinds` say
    # Of the method and its optimizer; None at the start of a round that begins with new weights.
    method: dict[str, Any] | None = None
    momentum: dict[str, Any] | None = None
    torch_version: str = str(torch.__version__)  # of the process that saved it


# What each value of a row may be -----------------------------------------------------------------------------


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MOST


def _number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= MOST  # NaN is not


def _share(value: Any) -> bool:
    return value is None or (_number(value) and value <= 1)


def _loss(value: Any) -> bool:
    return value is None or (type(value) is float and math.isfinite(value))


def _table(value: Any, columns: tuple[Callable[[Any], bool], ...], most: int) -> bool:
    """A list of at most so many lists, with such columns."""
    return (
        type(value) is list
        and len(value) <= most
        and all(
            type(row) is list
            and len(row) == len(columns)
            and all(f(x) for f, x in zip(columns, row, strict=True))
            for row in value
        )
    )


def _bins(value: Any) -> bool:
    columns = (_number, _share, _share)
    return (
        type(value) is dict
        and set(value) == {"all", "selected"}
        and all(_table(bins, columns, BINS) for bins in value.values())
    )


def _list(each: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: type(value) is list and all(map(each, value))


# A new column of metrics.jsonl needs its line here.
_ROW: dict[str, Callable[[Any], bool]] = {
    "round": _count,
    "positives": _count,
    "positive_acc": _share,
    "negatives": _count,
    "negative_acc": _share,
    "negative_samples": _count,
    "ece": _share,
    "ece_selected": _share,
    "per_class_positives": _list(_count),
    "no_label": _count,
    "seconds": _number,
    "outside": _number,
    "train_loss": _loss,
    "test_ece": _share,
}
_OF_TASK: dict[str, dict[str, Callable[[Any], bool]]] = {
    "single": {
        "test_acc": _share,
        "val_acc": _share,
        "test_mistakes": lambda value: _table(value, (_count, _count, _count), 10),
        "test_recall": _list(_share),
    },
    "multilabel": {
        "test_map": _share,
        "val_map": _share,
        "unlabeled_map": _share,
        "test_map_11": _share,
        "test_map_classes": _count,
        "test_cf1": _share,
        "test_of1": _share,
        "test_ap": _list(_share),
        "test_class_ece": _list(_share),
    },
}
_GUESS: dict[str, Callable[[Any], bool]] = {  # where the truth of the unlabeled images is unknown
    "test_positives": _count,
    "test_positive_acc": _share,
    "test_bins": _bins,
}

_LATER: dict[str, Callable[[Any], bool]] = {"unlabeled_acc": _share}  # rows of earlier versions lack it


def _row_fits(row: Any, task: Task, n_classes: int) -> bool:
    known = _ROW | _OF_TASK[task.name]
    if type(row) is not dict or set(row) - set(_LATER) not in (set(known), set(known | _GUESS)):
        return False
    by_class = [value for name, value in row.items() if name in _BY_CLASS]
    return (
        all((known | _GUESS | _LATER)[name](value) for name, value in row.items())
        and all(len(each) == n_classes for each in by_class)
        and sum(row["per_class_positives"]) == row["positives"]
        and all(max(line[:2]) < n_classes for line in row.get("test_mistakes", []))
    )


_BY_CLASS = ("per_class_positives", "test_recall", "test_ap", "test_class_ece")


# Whether a state can be believed -----------------------------------------------------------------------------


def _tensor(value: Any, dtype: torch.dtype, *shape: int) -> bool:
    """A plain tensor of that type and shape; -1 stands for any length."""
    return (
        type(value) is Tensor
        and not value.requires_grad
        and value.dtype == dtype
        and value.ndim == len(shape)
        and all(want in (-1, got) for want, got in zip(shape, value.shape, strict=True))
    )


def _printable(value: Any) -> bool:
    return type(value) is str and len(value) <= 1000 and value.isprintable()


def _version(value: Any) -> bool:
    return type(value) is str and re.fullmatch(r"[0-9][0-9A-Za-z.+_-]{0,60}", value) is not None


def alone(content: Mapping[str, Any]) -> str:
    """The first parts of a checkpoint's content that no run leaves behind, whatever its config; "" if all are right."""
    if set(content) != {each.name for each in fields(Checkpoint)}:
        return "the list of its parts"
    state = Checkpoint(**content)
    return next((parts for parts, fits in _parts(state) if not fits), "")


def _parts(state: Checkpoint) -> Iterator[tuple[str, bool]]:
    """Each part with whether it fits; a later one may rely on the earlier ones."""
    yield "data or torch_version", _printable(state.data) and _version(state.torch_version)
    yield "round, epoch or step", all(map(_count, (state.round, state.epoch, state.step)))
    yield "seconds or loss", _number(state.seconds) and _number(state.outside)
    yield "seconds or loss", _tensor(state.loss, torch.float32) and finite(state.loss)
    yield "train_loss", _loss(state.train_loss)
    split = state.labeled, state.unlabeled, state.val
    yield "labeled, unlabeled or val", all(_tensor(each, torch.int64, -1) for each in split)
    rows = state.rows
    yield "rows", type(rows) is list and len(rows) == state.round and all(type(row) is dict for row in rows)
    yield "rows", all(type(row.get("round")) is int and row["round"] == i for i, row in enumerate(rows))
    yield "pseudo_labels", _pseudo_labels_fit(state)
    training = state.momentum is not None
    yield (
        "method or momentum",
        all(each is None or isinstance(each, dict) for each in (state.method, state.momentum)),
    )
    yield "method or momentum", bool(state.method) >= training  # a method alone begins a round
    yield "method or momentum", training >= (state.epoch + state.step > 0)


def _pseudo_labels_fit(state: Checkpoint) -> bool:
    """Whether there are some; what they must be is their task's to say."""
    return state.pseudo_labels is None if state.round == 0 else type(state.pseudo_labels) is dict


def among(
    state: Checkpoint,
    fresh: Checkpoint,
    weights: Mapping[str, Tensor],
    trained: Mapping[str, Tensor],
    n_classes: int,
    *,
    task: Task,
    keeps: Keeps,
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> str:
    """The first parts of a checkpoint that its run cannot have left behind, "" if all are right.

    state    one in which `alone` found nothing
    fresh    the state in which config and data begin a run
    weights  of the run's method, any values
    trained  those that the optimizer moves, any values
    task     what a label is
    keeps    what goes on from round to round
    ranges   of some weights: the lowest and highest value
    """
    for name in ("labeled", "unlabeled", "val"):
        if not torch.equal(getattr(state, name), getattr(fresh, name)):
            return f"{name}, which is not the split that config and data give,"
    if not all(_row_fits(row, task, n_classes) for row in state.rows):
        return "rows"
    if state.round and (wrong := task.fits(state.pseudo_labels, fresh.unlabeled, n_classes)):
        return f"pseudo_labels ({wrong})"
    if state.epoch + state.step == 0:
        for name, kept in (("method", keeps.weights), ("momentum", keeps.momentum)):
            if (getattr(state, name) is not None) != (kept and state.round > 0):
                return f"{name}, which is there only while a round is trained, or before one that goes on with it,"
    if state.method is not None:
        if wrong := misfit(state.method, weights):
            return f"method ({wrong})"
        for name, (low, high) in (ranges or {}).items():
            if not ((state.method[name] >= low) & (state.method[name] <= high)).all():
                return f"method ({name} is not in [{low}, {high}])"
    if state.momentum is not None and (wrong := misfit(state.momentum, trained)):
        return f"momentum ({wrong})"
    return ""
