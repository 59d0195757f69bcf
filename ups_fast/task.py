"""What a label is: all that differs between one class for each sample and several.

A task is stateless, and its records say of each sample what a network has answered: `PseudoLabels`.
"""

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

Tables = dict[str, Tensor]  # [N, ...] by sample id: what a step reads


class Task:
    """The rules of a kind of label. `found` is a record of that task, `truth` int64 [U], or of several int8 [U, C]."""

    name: str  # as a saved network has it
    headline: str  # of the rows' keys: test_acc, or test_map
    word: str  # for it, in sentences
    kinds: Mapping[
        str, tuple[torch.dtype, tuple[int, ...]]
    ]  # of a record: dtype and shape behind [U], -1: any

    # Labeling ----------------------------------------------------------------------------------------------

    def select(self, logits: Tensor, limits: Mapping[str, float]) -> tuple[Tensor, ...]:  # [P, B, C]
        """What `mc_select` or its like says, masks of classes packed; each [B, ...]."""
        raise NotImplementedError

    def record(self, index: Tensor, parts: Any, gone: Tensor | None = None) -> Any:
        """The record of samples from the parts that `select` gave, nothing of those that are `gone`, bool [U]."""
        raise NotImplementedError

    def finish(self, found: Any, *, n_classes: int, balanced: bool, passes: int) -> Any:
        """The record after the class balance, and with the negatives that then hold."""
        raise NotImplementedError

    def answered(self, found: Any) -> Tensor:  # bool [U]
        """Whether the network had any finite answer."""
        raise NotImplementedError

    # Learning ----------------------------------------------------------------------------------------------

    def given(self, labels: Tensor, labeled: Tensor) -> Tables:  # [N] or [N, C], int64 [L]
        """The tables of the labels alone."""
        raise NotImplementedError

    def learned(self, tables: Tables, found: Any | None, n_classes: int) -> tuple[Tables, Tensor, Tensor]:
        """The tables with pseudo-labels, too; ids of the samples with positive labels, and of those with others."""
        raise NotImplementedError

    def loss(self, logits: Tensor, rows: Mapping[str, Tensor]) -> Tensor:  # [H, B, C], each [B, ...] -> []
        """The sum over heads of their losses, so that each learns as it would alone."""
        raise NotImplementedError

    # Judging -----------------------------------------------------------------------------------------------

    def of(self, tensors: Mapping[str, Tensor]) -> Any:
        """The record that a checkpoint holds."""
        raise NotImplementedError

    def impossible(self, found: Any, n_classes: int) -> str:
        """Which part of a record whose `kinds` fit no labeling can hold; "" if there is none."""
        raise NotImplementedError

    def score(self, found: Any, truth: Tensor) -> float | None:
        """The headline of answers, None where there is none."""
        raise NotImplementedError

    def report(self, found: Any, truth: Tensor, n_classes: int) -> dict[str, Any]:
        """The numbers of a labeling, by their names in metrics.jsonl."""
        raise NotImplementedError

    def tested(self, found: Any, truth: Tensor, n_classes: int) -> dict[str, Any]:
        """The numbers of a test beside the headline, likewise."""
        raise NotImplementedError

    def guess(self, found: Any, truth: Tensor) -> dict[str, Any]:
        """What the selection does to test images, likewise: where the truth of unlabeled ones is not known."""
        entries, truth = self.entries(found, truth)
        return calibration.selection_on_test(entries, truth)

    def entries(self, found: Any, truth: Tensor) -> tuple[PseudoLabels, Tensor]:
        """Each single decision as a label of its own, and its truth: for pictures and tables of either task."""
        raise NotImplementedError

    def fits(self, found: Any, index: Tensor, n_classes: int) -> str:
        """Why tensors cannot be the record of a labeling of these samples, "" if they can. They may be anything."""
        if type(found) is not dict or set(found) != set(self.kinds):
            return "the list of its parts"
        for name, (dtype, shape) in self.kinds.items():
            each = found[name]
            sizes = (len(index), *(_width(size, n_classes) for size in shape))
            if not (type(each) is Tensor and each.dtype == dtype and tuple(each.shape) == sizes):
                return f"{name} must be {str(dtype)[6:]} {list(sizes)}"
        if not torch.equal(found["index"], index):
            return "index is not that of the unlabeled images"
        return self.impossible(self.of(found), n_classes)


CLASSES, WORDS = -1, -2  # in `kinds`: as many columns as classes, or as words of 32 of them


def _width(size: int, n_classes: int) -> int:
    return {CLASSES: n_classes, WORDS: (n_classes + 31) // 32}.get(size, size)


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


SINGLE = SingleLabel()
TASKS: dict[str, Task] = {each.name: each for each in (SINGLE,)}


def task_of(labels: Tensor) -> Task:
    """By the shape of labels: [N], a class each, or [N, C], a mark for each class."""
    return SINGLE
