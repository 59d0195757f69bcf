"""Any number of classes for each sample: a sigmoid each, `mc_select_multilabel` and `ups_loss_multilabel`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ups_fast.calibration import ece, or_none, reliability, selection_on_test
from ups_fast.ops import mc_select_multilabel, ups_loss_multilabel
from ups_fast.precision import average_precision, cell_precision, class_ece, f1_scores, mean_over_classes
from ups_fast.pseudo_labels import MultiPseudoLabels, PseudoLabels, balance_entries
from ups_fast.reference import pack_mask, unpack_mask
from ups_fast.tasks.task import CLASSES, WEIGHTS, WORDS, Tables, Task


class MultiLabel(Task):
    """Each sample is of any number of classes. Labels are int8 [N, C]: 1, 0, or -1 where it is not known."""

    name, headline, word = "multilabel", "map", "mAP"
    kinds: ClassVar = {
        "index": (torch.int64, ()),
        "confidence": (torch.float32, (CLASSES,)),
        "std": (torch.float32, (CLASSES,)),
        "candidate": (torch.int32, (WORDS,)),
        "positive": (torch.int32, (WORDS,)),
        "negative": (torch.int32, (WORDS,)),
        "weight": (torch.float32, (WEIGHTS,)),
    }

    # Labeling ----------------------------------------------------------------------------------------------

    def select(self, logits: Tensor, limits: Mapping[str, float]) -> tuple[Tensor, ...]:
        with (
            warnings.catch_warnings()
        ):  # those of a network that has learned little may look like probabilities
            warnings.filterwarnings("ignore", "logits look like probabilities")
            return mc_select_multilabel(logits, **limits, packed=True)

    def record(self, index: Tensor, parts: Any, gone: Tensor | None = None) -> MultiPseudoLabels:
        confidence, std, positive, negative = parts
        if gone is not None:
            confidence, std = (each.masked_fill(gone[:, None], torch.nan) for each in (confidence, std))
            positive, negative = (each.masked_fill(gone[:, None], 0) for each in (positive, negative))
        none = confidence.new_zeros(len(index), 0)
        return MultiPseudoLabels(index, confidence, std, positive, positive, negative, none)

    def finish(
        self, found: MultiPseudoLabels, *, n_classes: int, balanced: bool, passes: int
    ) -> MultiPseudoLabels:
        """What the balance leaves out says nothing of its class: it is neither positive nor negative."""
        if not balanced:
            return found
        uncertainty = found.std if passes > 1 else (1 - found.confidence).clamp(min=0)
        positive = balance_entries(uncertainty, unpack_mask(found.positive, n_classes))
        return replace(found, positive=pack_mask(positive))

    def answered(self, found: MultiPseudoLabels) -> Tensor:
        return found.confidence.isfinite().any(1)

    # Learning ----------------------------------------------------------------------------------------------

    def given(self, labels: Tensor, labeled: Tensor) -> Tables:
        known = labels[labeled]
        tables = {}
        for name, mark in (("positive", 1), ("negative", 0)):
            packed = pack_mask(known == mark)
            tables[name] = packed.new_zeros(len(labels), packed.shape[1])
            tables[name][labeled] = packed
        return tables

    def learned(
        self, tables: Tables, found: MultiPseudoLabels | None, n_classes: int
    ) -> tuple[Tables, Tensor, Tensor]:
        """A sample learns from its positives and negatives at once, so that there is one list."""
        none = torch.zeros(0, dtype=torch.int64)
        if found is None:
            return tables, none, none
        for name in ("positive", "negative"):
            tables[name][found.index] = getattr(found, name)
        if found.weight.shape[1]:
            tables["weight"] = torch.ones(len(tables["positive"]), n_classes)
            tables["weight"][found.index] = found.weight
        selected = ((found.positive | found.negative) != 0).any(1)
        return tables, found.index[selected], none

    def loss(self, logits: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        heads = len(logits)
        names = ("positive", "negative", "weight")
        positive, negative, weight = (rows.get(name) for name in names)
        assert positive is not None and negative is not None
        if heads > 1:
            positive, negative = positive.repeat(heads, 1), negative.repeat(heads, 1)
            weight = None if weight is None else weight.repeat(heads, 1)
        return heads * ups_loss_multilabel(logits.flatten(0, 1), positive, negative, weight=weight)

    def weighed(self, found: MultiPseudoLabels, known: MultiPseudoLabels, truth: Tensor) -> MultiPseudoLabels:
        n_classes = truth.shape[1]
        weight = torch.ones_like(found.confidence)
        for name, mark in (("positive", 1), ("negative", 0)):
            new, judged = (unpack_mask(getattr(each, name), n_classes) for each in (found, known))
            judged &= truth >= 0
            weight[new] = cell_precision(
                (known.confidence[judged], known.std[judged]),
                (truth == mark)[judged],
                (found.confidence[new], found.std[new]),
            )
        return replace(found, weight=weight)

    # Judging -----------------------------------------------------------------------------------------------

    def of(self, tensors: Mapping[str, Tensor]) -> MultiPseudoLabels:
        return MultiPseudoLabels(**tensors)

    def impossible(self, found: MultiPseudoLabels, n_classes: int) -> str:
        none = found.confidence.isnan()
        answers = pack_mask(~none)  # a bit beyond the last class is none of them
        wrong = {
            "confidence": ~((found.confidence >= 0) & (found.confidence <= 1.001)) & ~none,
            "std": ~((found.std >= 0) & (found.std <= 1)) & ~none | none & ~found.std.isnan(),
            "candidate": (found.candidate & ~answers) != 0,
            "positive": (found.positive & ~found.candidate) != 0,
            "negative": (found.negative & ~answers) != 0,
            "weight": ~((found.weight >= 0) & (found.weight <= 1)),
        }
        return next((name for name, where in wrong.items() if where.any()), "")

    def score(self, found: MultiPseudoLabels, truth: Tensor) -> float | None:
        return mean_over_classes(average_precision(found.confidence, truth))

    def report(self, found: MultiPseudoLabels, truth: Tensor, n_classes: int) -> dict[str, Any]:
        """Of pairs of sample and class: positives are right where the sample is of the class, negatives where not."""
        positive, negative = (unpack_mask(each, n_classes) for each in (found.positive, found.negative))
        known, is_one = truth >= 0, truth == 1
        p = found.confidence
        return {
            "unlabeled_map": self.score(found, truth),
            "positives": int(positive.sum()),
            "positive_acc": or_none(is_one[positive & known].double().mean()),
            "negatives": int(negative.sum()),
            "negative_acc": or_none((~is_one[negative & known]).double().mean()),
            "negative_samples": int(negative.any(dim=1).sum()),
            "ece": or_none(ece(reliability(p[known], is_one[known]))),
            "ece_selected": or_none(ece(reliability(p[positive & known], is_one[positive & known]))),
            "per_class_positives": positive.sum(0).tolist(),
            "no_label": int((~self.answered(found)).sum()),
        }

    def tested(self, found: MultiPseudoLabels, truth: Tensor, n_classes: int) -> dict[str, Any]:
        known, ap = truth >= 0, average_precision(found.confidence, truth)
        cf1, of1 = f1_scores(found.confidence, truth)
        return {
            "test_ece": or_none(ece(reliability(found.confidence[known], truth[known] == 1))),
            "test_map_11": mean_over_classes(average_precision(found.confidence, truth, points=11)),
            "test_map_classes": int((~ap.isnan()).sum()),
            "test_cf1": cf1,
            "test_of1": of1,
            "test_ap": [or_none(each) for each in ap],
            "test_class_ece": class_ece(found.confidence, truth),
        }

    def guess(self, found: MultiPseudoLabels, truth: Tensor) -> dict[str, Any]:
        entries, truth = self.entries(found, truth)
        return selection_on_test(entries.at(truth >= 0), truth[truth >= 0])

    def entries(self, found: MultiPseudoLabels, truth: Tensor) -> tuple[PseudoLabels, Tensor]:
        """A label for each sample and class. Its truth is the class, or C where the sample is not of it."""
        n, c = found.confidence.shape
        label = torch.arange(c).expand(n, c)
        is_one = torch.where(truth == 1, label, c)
        bits = {name: unpack_mask(getattr(found, name), c).flatten() for name in ("candidate", "positive")}
        return PseudoLabels(
            index=found.index.repeat_interleave(c),
            label=torch.where(found.confidence.isnan(), -1, label).flatten(),
            confidence=found.confidence.flatten(),
            std=found.std.flatten(),
            **bits,
            negative=torch.zeros(n * c, 0, dtype=torch.int32),
        ), torch.where(truth < 0, -1, is_one).flatten()
