"""Calibration, and the numbers that are reported of a labeling, against torchmetrics and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from ups_fast import reference
from ups_fast.calibration import ece, interval, recall, reliability, report, top_confusions
from ups_fast.pseudo_labels import PseudoLabels


@pytest.mark.parametrize("bins", [15, 7])
def test_ece_against_torchmetrics(bins: int) -> None:
    g = torch.Generator().manual_seed(bins)
    probability = torch.softmax(2 * torch.randn(4000, 6, generator=g), dim=1)
    truth = torch.randint(0, 6, (4000,), generator=g)
    confidence, prediction = probability.max(dim=1)
    want = multiclass_calibration_error(probability, truth, 6, n_bins=bins, norm="l1")
    got = ece(reliability(confidence, prediction == truth, bins))
    assert got == pytest.approx(float(want), abs=1e-6)
    assert got > 0.1, "these random labels must be badly calibrated"


@pytest.mark.parametrize(
    ("right", "count", "low", "high"), [(7, 7, 0.6457, 1.0), (0, 10, 0.0, 0.2775), (81, 263, 0.2553, 0.3662)]
)
def test_intervals_are_wilson_s(right: int, count: int, low: float, high: float) -> None:
    """The last one as in Newcombe, Statistics in Medicine 17 (1998), table I."""
    assert interval(right / count, count) == pytest.approx((low, high), abs=1e-4)


def test_mistakes_come_by_their_number() -> None:
    truth = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    label = torch.tensor([0, 1, 1, 2, 1, 0, 0, -1, 1])
    assert top_confusions(label, truth) == [(0, 1, 2), (2, 0, 2), (1, 2, 1), (2, 1, 1)]
    assert top_confusions(label, truth, most=1) == [(0, 1, 2)]
    assert top_confusions(truth, truth) == top_confusions(truth[:0], truth[:0]) == []


def test_reliability_by_hand() -> None:
    confidence = torch.tensor([0.0, 0.24, 0.25, 0.5, 0.74, 1.0, 1.0000001, math.nan])
    correct = torch.tensor([False, True, True, False, True, True, False, True])
    bins = reliability(confidence, correct, bins=4)
    assert bins.count.tolist() == [2, 1, 2, 2]
    assert bins.confidence.tolist() == pytest.approx([0.12, 0.25, 0.62, 1.0], abs=1e-6)
    assert bins.accuracy.tolist() == [0.5, 1.0, 0.5, 0.5]
    assert ece(bins) == pytest.approx((2 * 0.38 + 0.75 + 2 * 0.12 + 2 * 0.5) / 7, abs=1e-6)


def test_ece_of_nothing_and_of_empty_bins() -> None:
    nothing = reliability(torch.empty(0), torch.empty(0, dtype=torch.bool))
    assert math.isnan(ece(nothing)) and nothing.confidence.isnan().all()
    assert ece(reliability(torch.tensor([0.9]), torch.tensor([True]))) == pytest.approx(0.1)


def test_recall_by_hand() -> None:
    assert recall(torch.tensor([0, 1, -1, 0]), torch.tensor([0, 0, 2, -1]), 4) == [0.5, None, 0.0, None]


# The report.


def six_samples() -> PseudoLabels:
    negative = torch.zeros(6, 34, dtype=torch.bool)
    negative[2, [0, 1, 33]] = True
    negative[3, [1, 32]] = True
    negative[5, 31] = True
    return PseudoLabels(
        index=torch.arange(6),
        label=torch.tensor([0, 1, 33, 33, 0, -1]),
        confidence=torch.tensor([0.9, 0.8, 0.6, 0.5, 0.9, math.nan]),
        std=torch.tensor([0.01, 0.01, 0.2, 0.2, 0.0, math.nan]),
        candidate=torch.tensor([True, True, False, False, True, False]),
        positive=torch.tensor([True, True, False, False, True, False]),
        negative=reference.pack_mask(negative),
    )


def test_report_by_hand() -> None:
    # Sample 4 is of unknown truth. Sample 2 truly is of class 33, one of its negatives; 5 gave NaN.
    numbers = report(six_samples(), torch.tensor([0, 2, 33, 7, -1, 31]), 34)
    per_class = [2, 1] + [0] * 32
    assert numbers == {
        "unlabeled_acc": pytest.approx(2 / 4),
        "positives": 3,
        "positive_acc": 0.5,
        "negatives": 6,
        "negative_acc": pytest.approx(4 / 6),
        "negative_samples": 3,
        "ece": pytest.approx((0.1 + 0.8 + 0.4 + 0.5) / 4, abs=1e-6),
        "ece_selected": pytest.approx((0.1 + 0.8) / 2, abs=1e-6),
        "per_class_positives": per_class,
        "no_label": 1,
    }


@pytest.mark.parametrize("truth", [None, torch.full((6,), -1)])
def test_report_without_truth_counts_but_does_not_judge(truth: Tensor | None) -> None:
    numbers = report(six_samples(), truth, 34)
    assert (numbers["positives"], numbers["negatives"], numbers["negative_samples"]) == (3, 6, 3)
    assert [numbers[key] for key in ("positive_acc", "negative_acc", "ece", "ece_selected")] == [None] * 4
