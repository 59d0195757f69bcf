"""FixMatch and its relatives: the strong view of an image learns what the weak view is sure of.

    L = CE(labeled) + lambda * mean over all unlabeled rows of w * H(target, strong)

q is the softmax of the weak view, without gradient; p = max q and y = argmax q. The methods differ in w and target:

    fixmatch   w = [p >= tau]                                  y     Sohn et al., NeurIPS 2020
    flexmatch  w = [p >= tau a_y / (2 - a_y)]                  y     Zhang et al., NeurIPS 2021
    freematch  w = [p >= tau_t P_y / max P], and fairness      y     Wang et al., ICLR 2023
    softmatch  w = exp(-min(p' - mu, 0)^2 / (2 var / n^2))     y     Chen et al., ICLR 2023
    dash       w = [H(target, q) <= rho_t]         q sharpened, then y     Xu et al., ICML 2021
    uda        w = [p >= tau]                      q sharpened       Xie et al., NeurIPS 2020

Labeled, weak and strong rows go through one joint forward pass, so that batch-norm sees all of them, as FixMatch's
interleaving has it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ups_fast.methods.method import (
    Batch,
    Layout,
    Method,
    Options,
    Setting,
    labeled_and_unlabeled,
)
from ups_fast.models import Network
from ups_fast.ops import fixmatch_loss, ups_loss
from ups_fast.schema import key
from ups_fast.selection import passes_over


@dataclass
class ConsistencyOptions(Options):
    mu: int = key(7, "Unlabeled images in a batch for each labeled one.", within="[1, 1000]")
    weight: float = key(1.0, "Weight of the loss on unlabeled images.", within="[0, 1000]")
    uncertainty: str = key(
        "off",
        "What else an unlabeled image must be. passes: certain. The standard deviation of its label's probability over "
        "method.passes passes with dropout is below select.kappa_p.",
        choices=("off", "passes"),
    )
    passes: int = key(4, "Passes over each weak view for method.uncertainty=passes.", within="[2, 1000]")


@dataclass
class FixMatchOptions(ConsistencyOptions):
    tau: float = key(0.95, "Confidence from which on an unlabeled image is learned from.", within="[0, 1]")


class Consistency(Method):
    """A batch of labeled images, unlabeled ones, and these again in the strong view."""

    Options = ConsistencyOptions
    continues = True
    two_views = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.kappa = setting.select.kappa_p
        # In a list, so that its weights, which are the network's, are named once.
        self.judge: list[Network] = []

    def lay_out(self, sizes: dict[str, int], batch_size: int) -> Layout:
        return labeled_and_unlabeled(self.options.mu, sizes, batch_size, "weak", again=["strong"])

    def begin(self, layout: Layout) -> None:
        super().begin(layout)
        if self.options.uncertainty == "passes" and not self.judge:
            self.judge.append(self.answers if self.ema is not None else tied(self.network))

    def loss(self, batch: Batch) -> Tensor:
        labeled, weak, strong = self.split(self.logits(batch.images, batch.keys))
        return self.supervised(labeled, batch) + self.unsupervised(weak.detach(), strong, batch)

    def supervised(self, labeled: Tensor, batch: Batch) -> Tensor:
        target = self.split(batch.rows["target"])[0]
        return ups_loss(labeled, target, target >= 0)

    def unsupervised(self, weak: Tensor, strong: Tensor, batch: Batch) -> Tensor:
        q = weak.float().softmax(-1)
        target, weight = self.judged(q, strong.detach(), batch)
        label = q.argmax(-1)
        return self.options.weight * consistency(strong, target, weight * self.kept(label, batch))

    def judged(self, q: Tensor, strong: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Target, int64 [n] or float [n, C], and weight, float [n], of the unlabeled rows."""
        raise NotImplementedError

    def kept(self, label: Tensor, batch: Batch) -> Tensor:  # float [n]
        """0 where a file is gone, or by method.uncertainty=passes where the label is not certain."""
        kept = self.split(batch.rows["readable"])[1]
        if self.options.uncertainty == "passes":
            kept = kept & self.certain(label, batch)
        return kept.float()

    @torch.no_grad()
    def certain(self, label: Tensor, batch: Batch) -> Tensor:  # bool [n]
        """Whether the label's probability varies by less than select.kappa_p over passes with dropout."""
        assert batch.keys is not None
        images, keys = self.split_mine(batch.images)[1], self.split_mine(batch.keys)[1]
        # Its keys stand for the samples, so that each step drops others.
        logits = passes_over(self.judge[0], images, keys.long(), self.options.passes, 0)
        logits = self.world.whole(logits, dim=1)
        p = logits.float().softmax(-1)[:, torch.arange(len(label), device=label.device), label]
        return p.std(0) < self.kappa


def tied(network: Network) -> Network:
    """The network in eval mode, with the same tensors."""
    tensors: list[Tensor] = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(tensor): tensor for tensor in tensors}).eval()


def consistency(strong: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean over all rows of weight * H(target, strong)."""
    return ups_loss(strong, target, weight > 0, weight=weight, reduction="batchmean")


def mean_of(values: Tensor, readable: Tensor) -> Tensor:
    """Mean over the rows [n, ...] that are readable."""
    mask = readable.float().view(-1, *[1] * (values.ndim - 1))
    return (values * mask).sum(0) / mask.sum().clamp(min=1)


def shares(label: Tensor, n_classes: int) -> Tensor:  # int64 [n] -> float [n, C]
    return nn.functional.one_hot(label, n_classes).float()


class FixMatch(Consistency):
    """And what differs from it by the thresholds alone: one for all classes, or one for each."""

    Options: ClassVar[type[ConsistencyOptions]] = FixMatchOptions

    def unsupervised(self, weak: Tensor, strong: Tensor, batch: Batch) -> Tensor:
        tau = self.thresholds(weak, batch)
        kept = self.kept(weak.argmax(-1), batch)
        loss, mask = fixmatch_loss(strong, weak, tau=tau, weight=kept, return_mask=True)
        return self.options.weight * loss + self.beside(strong, mask * kept)

    def thresholds(self, weak: Tensor, batch: Batch) -> float | Tensor:  # float32 [C]
        return self.options.tau

    def beside(self, strong: Tensor, weight: Tensor) -> Tensor | float:
        """A further term; weight, float [n], is that of the rows learned from."""
        return 0.0


class FlexMatch(FixMatch):
    """The threshold of a class falls with the number of images that are confidently of it.

    status_i is the last class that image i had with p >= tau, -1 at first; n_c counts them, and
    a_c = n_c / max(max_c n_c, n_-1), which is the paper's warm-up. Both change after the batch's weights are drawn.
    """

    status: Tensor  # int64 [N + 1]
    counts: Tensor  # float32 [C + 2]

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        # The last entry of each is for nobody: what must not be written is written there.
        self.register_buffer("status", torch.full((setting.n_images + 1,), -1))
        counts = torch.zeros(self.n_classes + 2)
        counts[self.n_classes] = setting.n_unlabeled
        self.register_buffer("counts", counts)  # of each class, of -1, of nobody

    def ranges(self) -> dict[str, tuple[float, float]]:
        return {"status": (-1, self.n_classes - 1)}

    def thresholds(self, weak: Tensor, batch: Batch) -> Tensor:
        counts = self.counts[: self.n_classes + 1]
        progress = counts[: self.n_classes] / counts.max()
        p, label = weak.float().softmax(-1).max(-1)
        sure = (p >= self.options.tau) & self.split(batch.rows["readable"])[1]
        self.note(self.split(batch.index)[1], label, sure)
        return self.options.tau * progress / (2 - progress)

    @torch.no_grad()
    def note(self, index: Tensor, label: Tensor, sure: Tensor) -> None:
        """Renews status and counts. Of an image that comes twice in the batch the last row counts."""
        n = len(self.status) - 1
        order = torch.where(sure, index, n).argsort(stable=True)
        ids = torch.where(sure, index, n)[order]
        last = torch.cat([ids[1:] != ids[:-1], torch.ones_like(sure[:1])]) & (ids < n)
        ids, new = torch.where(last, ids, n), label[order]
        old = self.status[ids]
        nobody, one = self.n_classes + 1, last.float()
        was = torch.where(last, torch.where(old < 0, self.n_classes, old), nobody)
        self.counts.index_add_(0, was, -one)
        self.counts.index_add_(0, torch.where(last, new, nobody), one)
        self.status.index_copy_(0, ids, torch.where(last, new, -1))


@dataclass
class FreeMatchOptions(ConsistencyOptions):
    momentum: float = key(0.999, "Decay of the running means of confidence and classes.", within="[0, 1)")
    fairness: float = key(
        0.001, "Weight of the fairness of classes, which the paper calls w_f.", within="[0, 10]"
    )


class FreeMatch(FixMatch):
    """The thresholds are running means of what the network says; they are renewed before the mask.

    Fairness: w_f * sum_c N(P / h)_c log N(mean softmax(strong) / hist)_c over the selected rows, N: to sum 1.
    """

    Options = FreeMatchOptions
    confidence: Tensor  # float32 []
    classes: Tensor  # float32 [C], mean q
    labels: Tensor  # float32 [C], share of each label

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        uniform = torch.full((self.n_classes,), 1 / self.n_classes)
        self.register_buffer("confidence", uniform[0].clone())
        self.register_buffer("classes", uniform.clone())
        self.register_buffer("labels", uniform.clone())

    def thresholds(self, weak: Tensor, batch: Batch) -> Tensor:
        q = weak.float().softmax(-1)
        p, label = q.max(-1)
        readable, step = self.split(batch.rows["readable"])[1], 1 - self.options.momentum
        step = step * readable.any()
        with torch.no_grad():
            self.confidence.lerp_(mean_of(p, readable), step)
            self.classes.lerp_(mean_of(q, readable), step)
            self.labels.lerp_(mean_of(shares(label, self.n_classes), readable), step)
        return self.confidence * self.classes / self.classes.max()

    def beside(self, strong: Tensor, weight: Tensor) -> Tensor:
        return self.options.fairness * self.unfair(strong.float(), weight)

    def unfair(self, strong: Tensor, weight: Tensor) -> Tensor:
        count = weight.sum()
        p = strong.softmax(-1)
        mean = (p * weight[:, None]).sum(0) / count.clamp(min=1)
        hist = (shares(p.argmax(-1), self.n_classes) * weight[:, None]).sum(0) / count.clamp(min=1)
        expected = torch.where(self.labels > 1e-12, self.classes / self.labels.clamp(min=1e-12), 0.0)
        ratio = torch.where(hist > 0, mean / hist.clamp(min=1e-12), 0.0)
        ratio = ratio / ratio.sum().clamp(min=1e-12)
        return (expected / expected.sum() * (ratio + 1e-12).log()).sum() * (count > 0)


@dataclass
class SoftMatchOptions(ConsistencyOptions):
    momentum: float = key(0.999, "Decay of the running means of confidence and classes.", within="[0, 1)")
    n_sigma: float = key(
        2.0, "Standard deviations over which the weight falls; the paper's n.", within="(0, 100]"
    )


class SoftMatch(Consistency):
    """No threshold: a weight that falls from 1 where the aligned confidence is below its running mean.

    q' = q u / P, to sum 1, with u = 1 / C and P the running mean of q; the label is that of q.
    """

    Options = SoftMatchOptions
    classes: Tensor  # float32 [C]
    mean: Tensor  # float32 []
    var: Tensor  # float32 []

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.register_buffer("classes", torch.full((self.n_classes,), 1 / self.n_classes))
        self.register_buffer("mean", torch.tensor(1 / self.n_classes))
        self.register_buffer("var", torch.tensor(1.0))

    def judged(self, q: Tensor, strong: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        readable, step = self.split(batch.rows["readable"])[1], 1 - self.options.momentum
        step = step * readable.any()
        with torch.no_grad():
            self.classes.lerp_(mean_of(q, readable), step)
            aligned = q * (1 / self.n_classes + 1e-6) / (self.classes + 1e-6)
            p = (aligned / aligned.sum(-1, keepdim=True)).amax(-1)
            mean = mean_of(p, readable)
            n = readable.sum().clamp(min=2)
            self.mean.lerp_(mean, step)
            self.var.lerp_(mean_of((p - mean).square(), readable) * n / (n - 1), step)
        below = (p - self.mean).clamp(max=0)
        var = self.var.clamp(min=1e-12)  # 0 where all are equally sure
        return q.argmax(-1), torch.exp(-below.square() / (2 * var / self.options.n_sigma**2))


@dataclass
class DashOptions(ConsistencyOptions):
    rho_0: str = key(
        "labeled",
        "The first threshold. labeled: mean loss of the labeled images over the second half of the warm-up, as in the "
        "paper. unlabeled: of the unlabeled ones, as in the published code.",
        choices=("labeled", "unlabeled"),
    )
    warmup: float = key(0.05, "Share of the training that learns from labels alone.", within="(0, 1)")
    decays: int = key(
        100,
        "How often the threshold falls over the training. Published: every 10 of 1024 epochs.",
        within="[1, 1000000]",
    )
    gamma: float = key(1.27, "By this factor the threshold falls each time.", within="(1, 100]")
    factor: float = key(
        1.0001, "The first threshold is so many times rho_0; the paper's C.", within="(0, 100]"
    )
    rho_min: float = key(0.05, "The threshold falls no lower.", within="(0, 100]")
    temperature: float = key(0.5, "Of the soft target, until rho_min is reached.", within="(0, 100]")


class Dash(Consistency):
    """The threshold is one of the loss, and falls: rho_t = max(C gamma^-k rho_0, rho_min), k = 0, 1, ..."""

    Options = DashOptions
    rho: Tensor  # float32 [2], sums over batches: of their loss times their share of rows that have one, of the share

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.register_buffer("rho", torch.zeros(2))

    def loss(self, batch: Batch) -> Tensor:
        labeled, weak, strong = self.split(self.logits(batch.images, batch.keys))
        options, supervised = self.options, self.supervised(labeled, batch)
        q = weak.detach().float().softmax(-1)
        p, label = q.max(-1)
        soft = (q.log().clamp(min=-1e4) / options.temperature).softmax(-1)
        cross = -(soft * q.log().clamp(min=-1e4)).sum(-1)
        warm = batch.t < options.warmup
        readable = self.split(batch.rows["readable"])[1]
        with torch.no_grad():
            seen, rows = mean_of(cross, readable), readable
            if options.rho_0 == "labeled":
                seen, rows = supervised.float(), self.split(batch.rows["target"])[0] >= 0
            late = (self.rho[1] == 0) & ~warm  # a training of few steps may have none in that half
            counts = rows.float().mean() * (warm & (batch.t >= options.warmup / 2) | late)
            self.rho += torch.stack([seen, torch.ones_like(seen)]) * counts
        rho_0 = self.rho[0] / self.rho[1].clamp(min=1e-12)
        k = ((batch.t - options.warmup) / (1 - options.warmup) * options.decays).floor().clamp(min=0)
        rho = (options.factor * options.gamma**-k * rho_0).clamp(min=options.rho_min)
        hard = rho <= options.rho_min
        loss = torch.where(hard, -p.log(), cross)
        target = torch.where(hard, shares(label, self.n_classes), soft)
        weight = (loss <= rho).float() * (~warm) * self.kept(label, batch)
        return supervised + options.weight * consistency(strong, target, weight)


@dataclass
class UDAOptions(ConsistencyOptions):
    tau: float = key(0.8, "Confidence from which on an unlabeled image is learned from.", within="[0, 1]")
    temperature: float = key(0.4, "Of the soft target.", within="(0, 100]")


class UDA(Consistency):
    Options = UDAOptions

    def judged(self, q: Tensor, strong: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        soft = (q.log().clamp(min=-1e4) / self.options.temperature).softmax(-1)
        return soft, (q.amax(-1) >= self.options.tau).float()
