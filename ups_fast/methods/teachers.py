"""Two networks that teach one another.

mean_teacher  CE + w(t) MSE(softmax student, softmax teacher), the teacher an average of the student's weights
              Tarvainen and Valpola, NeurIPS 2017
cps           CE + CE + lambda (H(argmax p2, p1) + H(argmax p1, p2)) on labeled and unlabeled images
              cross pseudo supervision, Chen et al., CVPR 2021
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ups_fast.methods.method import (
    Batch,
    Layout,
    Method,
    Options,
    Setting,
    average_weights,
    frozen_copy,
    labeled_and_unlabeled,
)
from ups_fast.ops import ups_loss
from ups_fast.schema import key


@dataclass
class MeanTeacherOptions(Options):
    mu: int = key(1, "Unlabeled images in a batch for each labeled one.", within="[1, 1000]")
    decay: float = key(
        0.99,
        "Decay of the teacher's weights, where train.ema is 0. It begins lower. Published: 0.999.",
        within="[0, 1)",
    )
    weight: float = key(
        50.0, "Weight of the consistency, a mean over classes, in the end.", within="[0, 1000000]"
    )
    ramp: float = key(0.4, "Share of the training over which that weight grows.", within="(0, 1]")


class MeanTeacher(Method):
    """The student sees the strong view and the teacher, which labels and is tested, the weak one."""

    Options = MeanTeacherOptions
    continues = True
    steps: Tensor  # float32 []

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.decay = setting.ema or self.options.decay
        self.ema = self.ema or frozen_copy(self.network)
        self.register_buffer("steps", torch.zeros(()))

    def lay_out(self, sizes: dict[str, int], batch_size: int) -> Layout:
        return labeled_and_unlabeled(self.options.mu, sizes, batch_size, again=["weak"])

    def loss(self, batch: Batch) -> Tensor:
        assert batch.keys is not None
        n = sum(group.rows for group in self.mine.groups[:2])
        labeled, student = self.logits(batch.images[:n], batch.keys[:n]).split(
            [group.rows for group in self.layout.groups[:2]]
        )
        with torch.no_grad():
            teacher = self.logits(batch.images[n:], batch.keys[n:], self.ema).float().softmax(-1)
        target = self.split(batch.rows["target"])[0]
        apart = (student.float().softmax(-1) - teacher).square().mean(-1)
        ramp = torch.exp(-5 * (1 - (batch.t / self.options.ramp).clamp(max=1)).square())
        readable = self.split(batch.rows["readable"])[1]
        return ups_loss(labeled, target, target >= 0) + self.options.weight * ramp * (apart * readable).mean()

    def train(self, mode: bool = True) -> MeanTeacher:
        """The teacher normalizes by its batch, as published, and has statistics of its own: of the weak view.

        By the student's, which are of the strong view, it is so wrong that on digits the student ended below labels
        alone.
        """
        super().train(mode)
        assert self.ema is not None
        self.ema.train(mode)
        return self

    @torch.no_grad()
    def after_step(self, batch: Batch) -> None:
        """decay is at most 1 - 1 / (steps + 1), so that the first weights are soon forgotten."""
        assert self.ema is not None
        self.steps += 1
        average_weights(self.ema, self.network, (1 - 1 / (self.steps + 1)).clamp(max=self.decay))


@dataclass
class CPSOptions(Options):
    mu: int = key(1, "Unlabeled images in a batch for each labeled one.", within="[1, 1000]")
    weight: float = key(1.5, "Weight of what each network learns from the other; lambda.", within="[0, 1000]")


class CPS(Method):
    """Two networks of other first weights; the first one labels and is tested."""

    Options = CPSOptions
    continues = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.partner = setting.network()

    def check(self, sizes: dict[str, int], batch_size: int) -> None:
        super().check(sizes, batch_size)
        pairs = zip(self.network.parameters(), self.partner.parameters(), strict=True)
        if all(torch.equal(*pair) for pair in pairs):
            raise ValueError(
                "two networks that begin with the same weights stay the same: model.weights must not hold a classifier "
                "of as many classes as the data have"
            )

    def lay_out(self, sizes: dict[str, int], batch_size: int) -> Layout:
        return labeled_and_unlabeled(self.options.mu, sizes, batch_size)

    def loss(self, batch: Batch) -> Tensor:
        ours, theirs = (self.logits(batch.images, batch.keys, net) for net in (self.network, self.partner))
        target, readable = batch.rows["target"], batch.rows["readable"]
        loss = self.options.weight * (
            ups_loss(ours, theirs.detach().argmax(-1), readable)
            + ups_loss(theirs, ours.detach().argmax(-1), readable)
        )
        for logits in (ours, theirs):
            loss = loss + ups_loss(logits, target, target >= 0)
        return loss
