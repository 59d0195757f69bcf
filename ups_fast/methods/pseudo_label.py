"""Pseudo-labels with a ramp: L = CE(labeled) + alpha(t) CE(argmax, unlabeled)     Lee, ICML workshop 2013

alpha is 0 until t1, grows to alpha at t2, and stays. Three variants: the argmax of every step, the same with labeled
and unlabeled steps by turns, or labels that stay for a round after a start on the labels alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ups_fast.methods.fixmatch import Consistency, ConsistencyOptions, consistency
from ups_fast.methods.method import (
    Batch,
    Known,
    Layout,
    Setting,
    Targets,
    labeled_and_unlabeled,
)
from ups_fast.ops import ups_loss
from ups_fast.schema import key


@dataclass
class PseudoLabelOptions(ConsistencyOptions):
    mu: int = key(1, "Unlabeled images in a batch for each labeled one.", within="[1, 1000]")
    variant: str = key(
        "step",
        "When labels are renewed. step: in every step. alternate: likewise, but labeled and unlabeled images are "
        "learned from in turns. round: after each round; round 0 learns from the labels alone.",
        choices=("step", "alternate", "round"),
    )
    alpha: float = key(3.0, "Weight of the loss on unlabeled images in the end.", within="[0, 1000]")
    t1: float = key(0.1, "Share of the training after which that weight begins to grow.", within="[0, 1]")
    t2: float = key(0.6, "Share of the training after which it is reached.", within="[0, 1]")


class PseudoLabel(Consistency):
    Options = PseudoLabelOptions
    two_views = False
    turn: Tensor  # float32 [], 0 for labeled and 1 for unlabeled steps of variant=alternate

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.register_buffer("turn", torch.zeros(()))

    def targets(self, known: Known) -> Targets:
        """By variant=round, the last round's labels of all unlabeled images, too."""
        lists, tables = super().targets(known)
        if known.found is not None and self.options.variant == "round":
            tables["target"][known.found.index] = known.found.label
        return Targets(lists, tables)

    def lay_out(self, sizes: dict[str, int], batch_size: int) -> Layout:
        return labeled_and_unlabeled(self.options.mu, sizes, batch_size)

    def loss(self, batch: Batch) -> Tensor:
        options, (labeled, own) = self.options, self.split(self.logits(batch.images, batch.keys))
        target, given = self.split(batch.rows["target"])
        label = given if options.variant == "round" else own.detach().argmax(-1)
        weight = self.kept(label, batch) * (label >= 0)
        ramp = ((batch.t - options.t1) / max(options.t2 - options.t1, 1e-9)).clamp(0, 1)
        supervised = ups_loss(labeled, target, target >= 0)
        unsupervised = options.weight * options.alpha * ramp * consistency(own, label, weight)
        if options.variant == "alternate":
            return (1 - self.turn) * supervised + self.turn * unsupervised
        return supervised + unsupervised

    @torch.no_grad()
    def after_step(self, batch: Batch) -> None:
        super().after_step(batch)
        self.turn.copy_(1 - self.turn)
