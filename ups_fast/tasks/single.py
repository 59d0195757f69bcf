"""One class for each sample: softmax, `mc_select` and `ups_loss`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ups_fast import calibration, pseudo_labels
from ups_fast.calibration import ece, or_none, recall, reliability, top_confusions
from ups_fast.ops import mc_select, ups_loss
from ups_fast.pseudo_labels import PseudoLabels, balance, drop_negatives
from ups_fast.reference import Selection, unpack_mask
from ups_fast.tasks.task import WORDS, Tables, Task


class SingleLabel(Task):
    """Each sample is of one class."""

    name, headline, word = "single", "acc", "accuracy"
    kinds: ClassVar = {
        "index": (torch.int64, ()),
        "label": (torch.int64, ()),
        "confidence": (torch.float32, ()),
        "std": (torch.float32, ()),
        "candidate": (torch.bool, ()),
        "positive": (torch.bool, ()),
        "negative": (torch.int32, (WORDS,)),
    }

    def select(self, logits: Tensor, limits: Mapping[str, float]) -> tuple[Tensor, ...]:
        return mc_select(logits, **limits, packed=True)

    def record(self, index: Tensor, parts: Any, gone: Tensor | None = None) -> PseudoLabels:
        found = Selection(*parts)
        found = found if gone is None else pseudo_labels.without(found, gone)
        return PseudoLabels(
            index=index,
            label=found.label,
            confidence=found.confidence,
            std=found.std,
            candidate=found.positive,
            positive=found.positive,
            negative=found.negative,
        )

    def finish(self, found: PseudoLabels, *, n_classes: int, balanced: bool, passes: int) -> PseudoLabels:
        positive = found.positive
        if balanced:
            # One pass has no std to rank by: confidence alone decides here too.
            uncertainty = found.std if passes > 1 else (1 - found.confidence).clamp(min=0)
            positive = balance(found.label, uncertainty, positive, n_classes=n_classes)
        return replace(found, positive=positive, negative=drop_negatives(found.negative, positive))

    def answered(self, found: PseudoLabels) -> Tensor:
        return found.label >= 0

    def given(self, labels: Tensor, labeled: Tensor) -> Tables:
        target = torch.full_like(labels, -1)
        target[labeled] = labels[labeled]
        return {"target": target}

    def learned(
        self, tables: Tables, found: PseudoLabels | None, n_classes: int
    ) -> tuple[Tables, Tensor, Tensor]:
        target = tables["target"]
        negative = torch.zeros(len(target), (n_classes + 31) // 32, dtype=torch.int32)
        kept = negatives = torch.zeros(0, dtype=torch.int64)
        if found is not None:
            kept = found.index[found.positive]
            target[kept] = found.label[found.positive]
            negative[found.index] = found.negative
            negatives = found.index[found.negative.any(dim=1)]
        return {**tables, "negative": negative}, kept, negatives

    def loss(self, logits: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        heads, target, negative = len(logits), rows["target"], rows.get("negative")
        if heads == 1:
            return ups_loss(logits[0], target, target >= 0, negative)
        target, negative = target.repeat(heads), None if negative is None else negative.repeat(heads, 1)
        return heads * ups_loss(logits.flatten(0, 1), target, target >= 0, negative)

    def of(self, tensors: Mapping[str, Tensor]) -> PseudoLabels:
        return PseudoLabels(**tensors)

    def impossible(self, found: PseudoLabels, n_classes: int) -> str:
        none = found.label < 0
        answers = ~none
        negative = unpack_mask(found.negative, 32 * found.negative.shape[1])
        wrong = {
            "label": (found.label < -1) | (found.label >= n_classes),
            # Means of float32 probabilities may exceed 1 by a few bits.
            "confidence": ~((found.confidence >= 0) & (found.confidence <= 1.001)) & answers,
            "std": ~((found.std >= 0) & (found.std <= 1)) & answers,
            "confidence or std of an image without a label": none
            & ~(found.confidence.isnan() & found.std.isnan()),
            "candidate": found.candidate & none,
            "positive": found.positive & ~found.candidate,
            "negative": negative.any(1) & (found.positive | none) | negative[:, n_classes:].any(1),
        }
        return next((name for name, where in wrong.items() if where.any()), "")

    def score(self, found: PseudoLabels, truth: Tensor) -> float | None:
        return or_none((found.label == truth).double().mean())

    def report(self, found: PseudoLabels, truth: Tensor, n_classes: int) -> dict[str, Any]:
        return calibration.report(found, truth, n_classes)

    def tested(self, found: PseudoLabels, truth: Tensor, n_classes: int) -> dict[str, Any]:
        return {
            "test_ece": or_none(ece(reliability(found.confidence, found.label == truth))),
            "test_mistakes": [list(each) for each in top_confusions(found.label, truth)],  # as JSON has it
            "test_recall": recall(found.label, truth, n_classes),
        }

    def entries(self, found: PseudoLabels, truth: Tensor) -> tuple[PseudoLabels, Tensor]:
        return found, truth
