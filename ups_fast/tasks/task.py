"""What a label is: all that differs between one class for each sample and several.

A task is stateless. Its records say of each sample what a network has answered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ups_fast.calibration import selection_on_test
from ups_fast.pseudo_labels import PseudoLabels

Tables = dict[str, Tensor]  # [N, ...] by sample id: what a step reads


CLASSES, WORDS, WEIGHTS = (
    -1,
    -2,
    -3,
)  # so many columns: each class, its bits in words of 32, each class or none


class Task:
    """The rules of a kind of label. `found` is a record of that task, `truth` int64 [U], or of several int8 [U, C]."""

    name: str  # as a saved network has it
    headline: str  # of the rows' keys: test_acc, or test_map
    word: str  # for it, in sentences
    # Of a record: dtype, and shape behind [U], where CLASSES, WORDS and WEIGHTS stand for their widths.
    kinds: ClassVar[Mapping[str, tuple[torch.dtype, tuple[int, ...]]]]

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

    def weighed(self, found: Any, known: Any, truth: Tensor) -> Any:
        """The record with each pseudo-label's weight: by what is right of the like in a labeling of known truth."""
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
        return selection_on_test(*self.entries(found, truth))

    def entries(self, found: Any, truth: Tensor) -> tuple[PseudoLabels, Tensor]:
        """Each single decision as a label of its own, and its truth: for pictures and tables of either task."""
        raise NotImplementedError

    def fits(self, found: Any, index: Tensor, n_classes: int) -> str:
        """Why tensors cannot be the record of a labeling of these samples, "" if they can. They may be anything."""
        if type(found) is not dict or set(found) != set(self.kinds):
            return "the list of its parts"
        words = (n_classes + 31) // 32
        for name, (dtype, shape) in self.kinds.items():
            each = found[name]
            if not (type(each) is Tensor and each.dtype == dtype and each.ndim == 1 + len(shape)):
                return f"{name} must be {str(dtype)[6:]} of {1 + len(shape)} dimensions"
            width = each.shape[1] if shape else 0
            fits = {CLASSES: width == n_classes, WORDS: width == words, WEIGHTS: width in (0, n_classes)}
            if len(each) != len(index) or not all(fits[size] for size in shape):
                return f"{name} has the shape {list(each.shape)}"
        if not torch.equal(found["index"], index):
            return "index is not that of the unlabeled images"
        return self.impossible(self.of(found), n_classes)
