"""What answers of several labels are worth: average precision, F1, and calibration class by class."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ups_fast.calibration import BINS, ece, or_none, reliability

_ENTRIES = 1 << 22  # sorted at once


def average_precision(
    confidence: Tensor,  # float [M, C]; NaN counts as the lowest
    truth: Tensor,  # int8 [M, C]: 1, 0, or -1 where unknown, which is left out
    *,
    points: int = 0,
) -> Tensor:  # float64 [C], NaN for a class without a positive
    """Of each class the area under precision by recall, with every threshold, as scikit-learn defines it.

    points  11: VOC's of 2007, the mean over recalls 0, 0.1, ..., 1 of the best precision from there on

    >>> average_precision(torch.tensor([[0.9], [0.8], [0.1]]), torch.tensor([[1], [0], [1]]))
    tensor([0.8333], dtype=torch.float64)
    """
    found = [_of_columns(p, t, points) for p, t in _columns(confidence, truth)]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)


def _columns(*tables: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some columns of each at once: a copy of all would take too much memory."""
    rows, n = tables[0].shape
    step = max(1, _ENTRIES // max(1, rows))
    for at in range(0, n, step):
        yield tuple(each[:, at : at + step] for each in tables)


def _of_columns(confidence: Tensor, truth: Tensor, points: int) -> Tensor:
    if not len(truth):
        return torch.full((truth.shape[1],), math.nan, dtype=torch.float64)
    value = torch.where(truth >= 0, confidence.nan_to_num(-1.0), -2.0)  # what is unknown comes last
    value, order = value.sort(dim=0, descending=True, stable=True)
    sorted_truth = truth.gather(0, order)
    right = (sorted_truth == 1).cumsum(0).double()
    count = (sorted_truth >= 0).cumsum(0).double()
    # Equal confidences are one threshold: all have the precision of the last of them.
    place = torch.arange(len(value), device=value.device)[:, None].expand_as(order)
    last = torch.ones_like(place, dtype=torch.bool)
    last[:-1] = value[:-1] != value[1:]
    end = torch.where(last, place, len(value)).flip(0).cummin(0).values.flip(0)
    precision = (right / count.clamp(min=1)).gather(0, end)
    positives = right[-1]
    if not points:
        return torch.where(sorted_truth == 1, precision, 0.0).sum(0) / positives
    recall = right.gather(0, end) / positives
    levels = [torch.where(recall >= i / (points - 1) - 1e-12, precision, 0.0).amax(0) for i in range(points)]
    return torch.where(positives > 0, torch.stack(levels).mean(0), math.nan)


def mean_over_classes(values: Tensor) -> float | None:  # float64 [C]
    """Without the classes that have none; None where no class has one."""
    return or_none(values[~values.isnan()].mean())


def f1_scores(
    confidence: Tensor,  # float [M, C]
    truth: Tensor,  # int8 [M, C]
) -> tuple[float | None, float | None]:
    """CF1 and OF1 at probability 0.5: by class, the harmonic mean of mean precision and mean recall; and of all pairs.

    Classes without a positive are left out. A class that is never answered has precision 0.

    >>> f1_scores(torch.tensor([[0.9, 0.6], [0.2, 0.7]]), torch.tensor([[1, 0], [1, 1]]))
    (0.75, 0.6666666666666666)
    """
    said, known = confidence >= 0.5, truth >= 0
    right = (said & (truth == 1)).sum(0).double()
    answered, there = (said & known).sum(0).double(), (truth == 1).sum(0).double()
    kept = there > 0
    precision, recall = (right / answered.clamp(min=1))[kept], (right / there)[kept]
    by_class = _harmonic(precision.mean(), recall.mean())
    return by_class, _harmonic(right.sum() / answered.sum().clamp(min=1), right.sum() / there.sum())


def _harmonic(a: Tensor, b: Tensor) -> float | None:
    return or_none(torch.where(a + b == 0, 0.0, 2 * a * b / (a + b)))


def class_ece(confidence: Tensor, truth: Tensor, bins: int = BINS) -> list[float | None]:
    """Of each class the calibration error of its probability; None where nothing is known."""
    found = []
    for p, t in zip(confidence.T, truth.T, strict=True):
        known = t >= 0
        found.append(or_none(ece(reliability(p[known], t[known] == 1, bins))))
    return found


CELLS, PRIOR = 5, 10.0  # quantiles along each axis; samples that the mean of all counts for in a cell


def cell_precision(
    known: tuple[Tensor, Tensor],  # confidence and std [n], of labels whose truth is known
    right: Tensor,  # bool [n]
    new: tuple[Tensor, Tensor],  # [m] likewise
) -> Tensor:  # float32 [m]
    """For new labels the share that is right of the known ones in their cell of confidence and std; 1 where n is 0.

    The cells are quantiles of the known ones. That of few is drawn towards the share of all.

    >>> sure, unsure = torch.full((40,), 0.9), torch.full((40,), 0.6)
    >>> confidence, right = torch.cat([sure, unsure]), torch.arange(80) < 60
    >>> new = torch.tensor([0.95, 0.5]), torch.zeros(2)
    >>> cell_precision((confidence, torch.zeros(80)), right, new).round(decimals=2)
    tensor([0.9500, 0.5500])
    """
    if not len(right):
        return torch.ones(len(new[0]))
    cell, place = torch.zeros(len(right), dtype=torch.int64), torch.zeros(len(new[0]), dtype=torch.int64)
    for axis, values in zip(known, new, strict=True):
        edges = torch.from_numpy(np.quantile(axis.numpy(), np.linspace(0, 1, CELLS + 1)[1:-1]))
        cell = cell * CELLS + torch.bucketize(axis.double(), edges, right=True)
        place = place * CELLS + torch.bucketize(values.double(), edges, right=True)
    mean = right.double().mean()
    hits = torch.bincount(cell, weights=right.double(), minlength=CELLS**2)
    counts = torch.bincount(cell, minlength=CELLS**2)
    return ((hits + PRIOR * mean) / (counts + PRIOR))[place].float()
