"""UPS: learn from labels that are confident and certain, and from what an image surely is not.

    L = mean over positives of CE(target) + mean over negatives of NCE        Rizve et al., ICLR 2021

Round 0 learns from the labels alone. Each later round learns, with a new network, from what the last one selected.
`self_training` is the same without uncertainty and negatives; `supervised` stops at the labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ups_fast.methods.method import (
    Batch,
    Group,
    Known,
    Layout,
    Method,
    Options,
    Setting,
    Targets,
    epoch_steps,
)
from ups_fast.pseudo_labels import PseudoLabels
from ups_fast.schema import key
from ups_fast.selection import Thresholds


class UPS(Method):
    splits = False  # a row's target says what it is
    many_heads = True
    many_labels = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.repeat = setting.labeled_repeats

    def targets(self, known: Known) -> Targets:
        """True labels of the labeled part, pseudo-labels and negative classes of the last labeling."""
        found, positives = known.found, known.labeled
        tables = self.task.given(known.labels, known.labeled)
        tables, kept, negatives = self.task.learned(tables, found, self.n_classes)
        if found is not None:
            positives = torch.cat([positives.repeat(self.repeat), kept])
            positives = expand(positives, len(negatives), known.generator)
        return Targets({"positive": positives, "negative": negatives}, tables)

    def lay_out(self, sizes: dict[str, int], batch_size: int) -> Layout:
        """Shares a batch in proportion to the positives (as expanded) and the negatives.

        nl_bs = batch_size * n_neg // (n_pos + n_neg), and an incomplete last batch is dropped, but an epoch has one
        step at least. Where samples are too few the round goes on with what there is, and `note` says so.
        """
        n_pos, n_neg = sizes["positive"], sizes["negative"]
        total = n_pos + n_neg
        if total < 1 or batch_size < 1:
            raise ValueError(f"a batch needs samples and a size, got {n_pos=}, {n_neg=}, {batch_size=}")
        nl_bs = batch_size * n_neg // total
        notes = []
        if n_neg and not nl_bs:
            notes.append(
                f"{n_neg} negative samples are too few for a place in a batch of {batch_size} and are not used"
            )
        if total < batch_size:
            notes.append(
                f"{total} samples are fewer than a batch of {batch_size}: each epoch is one batch with repeats"
            )
        groups = Group("positive", batch_size - nl_bs), Group("negative", nl_bs)
        return Layout(groups, max(1, total // batch_size), "; ".join(notes))

    def check(self, sizes: dict[str, int], batch_size: int) -> None:
        self.lay_out({"positive": sizes["labeled"], "negative": 0}, batch_size)

    def loss(self, batch: Batch) -> Tensor:
        """One forward pass over the joined batch, so that batch-norm sees both kinds."""
        return self.task.loss(self.members(batch.images, batch.keys), batch.rows)


def expand(positives: Tensor, n_neg: int, generator: torch.Generator) -> Tensor:
    """Too few positives [n_pos]: tiled, then topped up at random with replacement, to exactly n_neg.

    Nothing is expanded where n_pos >= n_neg, and nothing can be where n_pos = 0.
    """
    if not 0 < len(positives) < n_neg:
        return positives
    whole, rest = divmod(n_neg, len(positives))
    top_up = torch.randint(len(positives), (rest,), generator=generator)
    return torch.cat([positives.repeat(whole), positives[top_up]])


class Supervised(Method):
    """CE on the labels alone, over as many images as the training set has: what every method must beat."""

    continues = True
    splits = False
    many_heads = True
    many_labels = True

    def lay_out(self, sizes: dict[str, int], batch_size: int) -> Layout:
        return Layout((Group("labeled", batch_size),), epoch_steps(list(sizes.values()), batch_size))

    def loss(self, batch: Batch) -> Tensor:
        return self.task.loss(self.members(batch.images, batch.keys), batch.rows)


@dataclass
class SelfTrainingOptions(Options):
    schedule: str = key(
        "threshold",
        "What is kept of the labels. threshold: those of at least select.tau_p. curriculum: after round 0 the most "
        "confident 20 %, then 40 %, and so on.",
        choices=("threshold", "curriculum"),
    )


class SelfTraining(UPS):
    """Train, label, keep what is confident, train anew: UPS without std and without negative classes.

    With schedule=curriculum it is curriculum labeling (Cascante-Bonilla et al., AAAI 2021), whose thresholds are
    percentiles of the confidence.
    """

    Options = SelfTrainingOptions

    @staticmethod
    def limits(options: SelfTrainingOptions, limits: Thresholds) -> Thresholds:
        tau_p = 0.0 if options.schedule == "curriculum" else limits.tau_p
        return limits._replace(tau_p=tau_p, tau_n=0.0, kappa_p=math.inf, kappa_n=math.inf)

    def keep(self, found: PseudoLabels, round: int) -> PseudoLabels:
        if self.options.schedule != "curriculum":
            return found
        count = int(found.candidate.sum()) * min(5, round + 1) // 5
        order = found.confidence.nan_to_num(-1.0).argsort(descending=True, stable=True)
        positive = torch.zeros_like(found.positive)
        positive[order[:count]] = True
        return replace(found, positive=positive & found.positive)
