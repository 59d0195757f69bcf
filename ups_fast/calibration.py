"""What pseudo-labels and answers are worth: calibration, recall by class, and the numbers of a round."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ups_fast.pseudo_labels import PseudoLabels
from ups_fast.reference import unpack_mask

BINS = 15


class Reliability(NamedTuple):
    """A reliability diagram in equal bins of [0, 1], each with its lower edge, the last one also with 1."""

    count: Tensor  # type: ignore[assignment]  # int64 [bins]
    confidence: Tensor  # float64 [bins], mean over the bin, NaN in an empty one
    accuracy: Tensor  # float64 [bins], share of correct ones, NaN in an empty bin


def reliability(
    confidence: Tensor,  # float [N], in [0, 1]; NaN ones are left out
    correct: Tensor,  # bool [N]
    bins: int = BINS,
) -> Reliability:
    """Confidence against accuracy, bin by bin, summed in float64."""
    known = ~confidence.isnan()
    value, hit = confidence[known].double(), correct[known].double()
    where = (value * bins).long().clamp(max=bins - 1)
    count = torch.bincount(where, minlength=bins)
    return Reliability(
        count,
        torch.bincount(where, weights=value, minlength=bins) / count,
        torch.bincount(where, weights=hit, minlength=bins) / count,
    )


def selection_on_test(
    pseudo_labels: PseudoLabels,  # of test images, on the host
    truth: Tensor,  # int64 [U]
) -> dict[str, Any]:
    """What the selection does to images whose truth is known: a guess where that of the unlabeled is not.

    By their names in metrics.jsonl: test_positives, test_positive_acc (None where there is none), and test_bins:
    reliability of "all" and of the "selected", each bin that is not empty as [count, confidence, accuracy].
    """
    read = pseudo_labels.label >= 0
    correct, positive = pseudo_labels.label == truth, pseudo_labels.positive
    groups = {"all": read, "selected": positive}
    bins = {name: reliability(pseudo_labels.confidence[each], correct[each]) for name, each in groups.items()}
    return {
        "test_positives": int(positive.sum()),
        "test_positive_acc": or_none(correct[positive].double().mean()),
        "test_bins": {
            name: [list(row) for row in zip(*(x.tolist() for x in each), strict=True) if row[0]]
            for name, each in bins.items()
        },
    }


def interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share that was found in `count` cases."""
    middle, whole = share + z * z / (2 * count), 1 + z * z / count
    spread = z * math.sqrt((share * (1 - share) + z * z / (4 * count)) / count)
    return max(0.0, (middle - spread) / whole), min(1.0, (middle + spread) / whole)


def ece(bins: Reliability) -> float:
    """Expected calibration error: mean of |confidence - accuracy| over the samples' bins; NaN for none."""
    gap = (bins.confidence - bins.accuracy).abs().nan_to_num(0.0)
    return float((gap * bins.count).sum() / bins.count.sum())


def top_confusions(
    label: Tensor,  # int64 [M], -1 where there is none
    truth: Tensor,  # int64 [M]
    most: int = 10,
) -> list[tuple[int, int, int]]:  # true class, label, how often; of equal ones the lower classes first
    """The most frequent confusions of one class with another."""
    wrong = (label != truth) & (label >= 0)
    pairs, counts = torch.stack([truth[wrong], label[wrong]]).unique(dim=1, return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:most]
    return [(int(a), int(b), int(n)) for (a, b), n in zip(pairs.T[order], counts[order], strict=True)]


def recall(
    label: Tensor,  # int64 [M], -1 where there is none
    truth: Tensor,  # int64 [M], -1 where unknown
    n_classes: int,
) -> list[float | None]:
    """Of each class the share of its samples that have its label; None where it has none."""
    each = torch.bincount(truth[truth >= 0], minlength=n_classes)
    right = torch.bincount(truth[(truth >= 0) & (label == truth)], minlength=n_classes)
    return [or_none(share) for share in right.double() / each]


def report(
    pseudo_labels: PseudoLabels,
    truth: Tensor | None,  # int64 [U], -1 where unknown; None: all unknown
    n_classes: int,
) -> dict[str, Any]:
    """The numbers of a labeling by their names in metrics.jsonl; accuracies are over samples of known truth.

    unlabeled_acc (of all labels), positives, positive_acc, negatives ((sample, class) pairs), negative_acc (share that
    truly is not the class), negative_samples, ece (of all samples), ece_selected (of the positives),
    per_class_positives (by pseudo-label), no_label (samples without one). None where there is nothing to average.
    """
    found = pseudo_labels.cpu()
    truth = torch.full_like(found.label, -1) if truth is None else truth.cpu()
    known = truth >= 0
    correct = found.label == truth
    positive = found.positive & known
    negative = unpack_mask(found.negative, n_classes)
    judged = negative[known]
    wrong = judged.gather(1, truth[known][:, None])
    return {
        "unlabeled_acc": or_none(correct[known & (found.label >= 0)].double().mean()),
        "positives": int(found.positive.sum()),
        "positive_acc": or_none(correct[positive].double().mean()),
        "negatives": int(negative.sum()),
        "negative_acc": or_none(1 - wrong.sum().double() / judged.sum()),
        "negative_samples": int(negative.any(dim=1).sum()),
        "ece": or_none(ece(reliability(found.confidence[known], correct[known]))),
        "ece_selected": or_none(ece(reliability(found.confidence[positive], correct[positive]))),
        "per_class_positives": torch.bincount(found.label[found.positive], minlength=n_classes).tolist(),
        "no_label": int((found.label < 0).sum()),
    }


def or_none(value: Tensor | float) -> float | None:
    """For JSON: a mean over nothing, which is NaN, becomes None."""
    return None if math.isnan(value) else float(value)


# What other limits would keep of one labeling -----------------------------------------------------------------

KAPPAS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, math.inf)
TAUS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
SHARES = tuple(i / 20 for i in range(1, 21))
Kept = list[list[float | None]]  # of each limit: the share kept, the share right of these, their ECE


def by_limit(
    pseudo_labels: PseudoLabels,  # on the host
    truth: Tensor,  # int64 [U], -1 where unknown
    *,
    tau: float | None = None,
    kappa: float | None = None,
) -> Kept:
    """What would be kept, without new training: for each of KAPPAS at `tau`, or else for each of TAUS below `kappa`.

    kappa  with no `tau`: None keeps labels of any std, as one pass does
    """
    known = (truth >= 0) & (pseudo_labels.label >= 0)
    if tau is not None:
        sure = pseudo_labels.confidence >= tau
        kept = [sure & (pseudo_labels.std < limit) for limit in KAPPAS]
    else:
        sure = pseudo_labels.std < (math.inf if kappa is None else kappa)
        kept = [sure & (pseudo_labels.confidence >= limit) for limit in TAUS]
    return [_worth(pseudo_labels, truth, each & known, int(known.sum())) for each in kept]


def _worth(found: PseudoLabels, truth: Tensor, kept: Tensor, total: int) -> list[float | None]:
    right = (found.label == truth)[kept]
    error = ece(reliability(found.confidence[kept], right))
    return [or_none(kept.sum() / max(1, total)), or_none(right.double().mean()), or_none(error)]


def by_confidence(
    pseudo_labels: PseudoLabels,  # on the host
    truth: Tensor,  # int64 [U], -1 where unknown
) -> list[float]:
    """The share right of the most confident labels: of each of SHARES of all. Empty where no truth is known."""
    known = (truth >= 0) & (pseudo_labels.label >= 0)
    right, confidence = (pseudo_labels.label == truth)[known], pseudo_labels.confidence[known]
    order = confidence.argsort(descending=True, stable=True)
    mean = right[order].double().cumsum(0) / torch.arange(1, len(right) + 1)
    return [float(mean[max(1, round(share * len(mean))) - 1]) for share in SHARES] if len(mean) else []


def error_cells(
    pseudo_labels: PseudoLabels,  # on the host
    truth: Tensor,  # int64 [U], -1 where unknown
) -> list[
    list[list[int]]
]:  # [7, 10, 2]: std below each of KAPPAS by tenths of confidence; how many, and wrong
    """Labels of known truth, counted by their uncertainty and confidence."""
    known = (truth >= 0) & (pseudo_labels.label >= 0)
    confidence, std = pseudo_labels.confidence[known], pseudo_labels.std[known].contiguous()
    column = (confidence * 10).long().clamp(0, 9)
    row = torch.searchsorted(torch.tensor(KAPPAS[:-1]), std, right=True)
    place, size = 10 * row + column, 10 * len(KAPPAS)
    wrong = (pseudo_labels.label != truth)[known]
    counts = [torch.bincount(each, minlength=size) for each in (place, place[wrong])]
    cells: list[list[list[int]]] = torch.stack(counts, 1).reshape(len(KAPPAS), 10, 2).tolist()
    return cells
