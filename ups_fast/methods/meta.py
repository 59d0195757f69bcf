"""Meta Pseudo Labels: a teacher learns to give labels from which a student learns     Pham et al., CVPR 2021

    student  H(y, S(A(u))) on unlabeled images, y = argmax T(A(u))
    h        CE_l(S new) - CE_l(S old) on the labeled batch, both in train mode, less its running mean
    teacher  CE_l + w(t) UDA + h H(y, T(A(u)))

The official code has y = softmax T(A(u)) without gradient, for both (method.target=soft). The derivative of
H(softmax z, z) by z is softmax z - softmax z = 0: then h teaches nothing, and the teacher is that of UDA alone.
The student labels and is tested. Over the last round it learns from the labels alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ups_fast.methods.fixmatch import consistency, shares
from ups_fast.methods.method import (
    Batch,
    Known,
    Layout,
    Method,
    Options,
    Setting,
    Targets,
    labeled_and_unlabeled,
)
from ups_fast.ops import ups_loss
from ups_fast.schema import key


@dataclass
class MetaPseudoLabelsOptions(Options):
    mu: int = key(7, "Unlabeled images in a batch for each labeled one.", within="[1, 1000]")
    weight: float = key(8.0, "Weight of the teacher's consistency (UDA) in the end.", within="[0, 1000]")
    ramp: float = key(0.05, "Share of the training over which that weight grows.", within="(0, 1]")
    tau: float = key(0.6, "Confidence from which on the consistency counts.", within="[0, 1]")
    temperature: float = key(0.7, "Of the consistency's soft target.", within="(0, 100]")
    target: str = key(
        "hard",
        "What the student learns from the teacher. hard: its label, as in the paper. soft: its probabilities, as in "
        "the official code. Then how well the student does teaches the teacher nothing.",
        choices=("hard", "soft"),
    )
    label_smoothing: float = key(
        0.15, "Of the teacher's labels and of what the student learns from.", within="[0, 1)"
    )
    finetune: float = key(0.1, "Factor of the gradients in the last round.", within="(0, 1]")


class MetaPseudoLabels(Method):
    Options = MetaPseudoLabelsOptions
    continues = True
    two_views = True
    finetuning = False
    mean_h: Tensor  # float32 []

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.teacher = setting.network()
        self.register_buffer("mean_h", torch.zeros(()))

    def targets(self, known: Known) -> Targets:
        self.finetuning = known.last and known.round > 0
        return super().targets(known)

    def lay_out(self, sizes: dict[str, int], batch_size: int) -> Layout:
        whole = labeled_and_unlabeled(self.options.mu, sizes, batch_size, "weak", again=["strong"])
        return whole._replace(groups=whole.groups[:1]) if self.finetuning else whole

    def prepare(self, how: Callable[[Callable], Callable]) -> Callable[[Batch], Tensor]:
        def teach(batch: Batch) -> tuple[Tensor, Tensor]:
            return self.teach(batch)

        def learn(batch: Batch, target: Tensor) -> tuple[Tensor, Tensor]:
            return self.learn(batch, target)

        self.parts = how(teach), how(learn)
        return super().prepare(how)

    def loss(self, batch: Batch) -> Tensor:
        """CE of the student's labeled rows: smoothed where it learns from them, and not in h."""
        target = self.split(batch.rows["target"])[0]
        n = self.mine.groups[0].rows
        keys = None if batch.keys is None else batch.keys[:n]
        smoothing = self.options.label_smoothing if self.finetuning else 0.0
        return ups_loss(self.logits(batch.images[:n], keys), target, target >= 0, label_smoothing=smoothing)

    def teach(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The teacher's logits of strong rows, and its loss but for the student's part."""
        options = self.options
        labeled, weak, strong = self.split(self.logits(batch.images, batch.keys, self.teacher))
        q = weak.detach().float().softmax(-1)
        soft = (q.log().clamp(min=-1e4) / options.temperature).softmax(-1)
        weight = (q.amax(-1) >= options.tau).float() * self.split(batch.rows["readable"])[1]
        ramp = options.weight * (batch.t / options.ramp).clamp(max=1)
        target = self.split(batch.rows["target"])[0]
        supervised = ups_loss(labeled, target, target >= 0, label_smoothing=options.label_smoothing)
        return strong, supervised + ramp * consistency(strong, soft, weight)

    def learn(self, batch: Batch, target: Tensor) -> tuple[Tensor, Tensor]:
        """The student's loss on what the teacher gives, and its loss on the labels, without gradient."""
        n = self.mine.groups[0].rows
        u = n + self.mine.groups[1].rows
        assert batch.keys is not None
        images, keys = (torch.cat([each[:n], each[u:]]) for each in (batch.images, batch.keys))
        logits, n = self.logits(images, keys), self.layout.groups[0].rows
        labels, smoothing = self.split(batch.rows["target"])[0], self.options.label_smoothing
        readable = self.split(batch.rows["readable"])[1].float()
        target = (1 - smoothing) * target + smoothing / self.n_classes
        return consistency(logits[n:], target, readable), ups_loss(logits[:n].detach(), labels, labels >= 0)

    def step(
        self, loss_of: Callable[[Batch], Tensor], optimizer: torch.optim.Optimizer, batch: Batch
    ) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        if self.finetuning:
            loss = loss_of(batch)
            (loss * self.options.finetune).backward()
            self.descend(optimizer)
            self.after_step(batch)
            return loss.detach()
        teach, learn = self.parts
        strong, supervised = teach(batch)
        given = strong.detach().float().softmax(-1)
        if self.options.target == "hard":
            given = shares(given.argmax(-1), self.n_classes)
        loss, before = learn(batch, given)
        loss.backward()
        self.descend(optimizer)  # of the student: the teacher has no gradient yet
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            h = loss_of(batch) - before
            self.mean_h += 0.01 * (h - self.mean_h)
            h = h - self.mean_h
        readable = self.split(batch.rows["readable"])[1].float()
        (supervised + h * consistency(strong, given, readable)).backward()
        self.descend(optimizer)
        self.after_step(batch)
        return loss.detach()
