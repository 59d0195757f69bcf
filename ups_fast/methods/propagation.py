"""Labels spread over the features of all images, and are learned with a weight, round after round.

    label_propagation  on the graph of nearest neighbors                Iscen et al., CVPR 2019
    em                 by a mixture of Gaussians, labeled images fixed  Nigam et al., Machine Learning 2000

Round 0 learns from the labels alone. At the end of each round the network's features (centered, of length 1) give
each unlabeled image a label and a weight; the next round goes on with

    L = mean of weight * CE over labeled (weight 1) and unlabeled rows, each times N / (C n_c) for its class
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ups_fast.methods.fixmatch import shares
from ups_fast.methods.method import (
    Batch,
    Group,
    Known,
    Layout,
    Look,
    Method,
    Options,
    Setting,
    Targets,
    check_mu,
    epoch_steps,
)
from ups_fast.ops import ups_loss
from ups_fast.schema import key


@dataclass
class SpreadOptions(Options):
    mu: int = key(1, "Unlabeled images in a batch for each labeled one.", within="[1, 1000]")


@dataclass
class LabelPropagationOptions(SpreadOptions):
    k: int = key(50, "Nearest neighbors of each image.", within="[1, 10000]")
    alpha: float = key(0.99, "How far labels spread.", within="[0, 1)")


class _Spread(Method):
    continues = True
    label: Tensor  # int64 [N], -1 where there is none
    weight: Tensor  # float32 [N]

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.register_buffer("label", torch.full((setting.n_images,), -1))
        self.register_buffer("weight", torch.zeros(setting.n_images))

    def ranges(self) -> dict[str, tuple[float, float]]:
        return {"label": (-1, self.n_classes - 1)}

    def targets(self, known: Known) -> Targets:
        """The labels of the last round; unlabeled images without one, as all are in round 0, are not drawn."""
        (_, tables), label = super().targets(known), self.label.cpu()
        target = torch.where(tables["target"] >= 0, tables["target"], label)
        weight = torch.where(tables["target"] >= 0, 1.0, self.weight.cpu())
        unlabeled = known.unlabeled[label[known.unlabeled] >= 0]
        if len(unlabeled):
            count = torch.bincount(target[target >= 0], minlength=self.n_classes).clamp(min=1)
            weight = weight * (int(count.sum()) / (self.n_classes * count))[target.clamp(min=0)]
        return Targets(
            {"labeled": known.labeled, "unlabeled": unlabeled}, {"target": target, "weight": weight}
        )

    def check(self, sizes: dict[str, int], batch_size: int) -> None:
        check_mu(self.options.mu, sizes["unlabeled"], batch_size)  # later rounds have those with an answer

    def lay_out(self, sizes: dict[str, int], batch_size: int) -> Layout:
        if not sizes["unlabeled"]:
            return Layout((Group("labeled", batch_size),), epoch_steps([self.n_images], batch_size))
        unlabeled = self.options.mu * batch_size
        groups = Group("labeled", batch_size), Group("unlabeled", unlabeled)
        return Layout(groups, epoch_steps(list(sizes.values()), batch_size + unlabeled))

    def loss(self, batch: Batch) -> Tensor:
        target, weight = batch.rows["target"], batch.rows["weight"]
        logits = self.logits(batch.images, batch.keys)
        return ups_loss(logits, target, target >= 0, weight=weight, reduction="batchmean")

    @torch.no_grad()
    def end_round(self, look: Look) -> None:
        found = look.found
        ids = torch.cat([look.labeled, found.index[found.label >= 0]])  # those that have an answer
        if len(ids) == len(look.labeled):  # all files of unlabeled images are gone
            self.label.fill_(-1)
            return
        x = look.features(ids).cpu()  # sums of sparse rows on a GPU have no fixed order
        x = nn.functional.normalize(x - x.mean(0), dim=-1)
        label, weight = self.spread(x, look.labels[look.labeled])
        unlabeled, device = ids[len(look.labeled) :].to(self.label.device), self.label.device
        self.label.fill_(-1)
        self.label[unlabeled], self.weight[unlabeled] = label.to(device), weight.to(device)

    def spread(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Features [n, D], the first L of them labeled [L] -> label int64 and weight float32 of the other n - L."""
        raise NotImplementedError


class LabelPropagation(_Spread):
    Options = LabelPropagationOptions

    def spread(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Solves (I - alpha S) z_c = [labeled c] / n_c; the weight is 1 - H(z) / log C, over its maximum."""
        graph = neighbors(x, min(self.options.k, len(x) - 1))
        seeds = torch.zeros(len(x), self.n_classes, device=x.device)
        seeds[: len(labels)] = shares(labels, self.n_classes)
        seeds = seeds / seeds.sum(0).clamp(min=1)
        z = conjugate_gradients(graph, seeds, self.options.alpha)[len(labels) :].clamp(min=0)
        p = z / z.sum(-1, keepdim=True).clamp(min=1e-12)
        weight = 1 + (p * p.clamp(min=1e-12).log()).sum(-1) / math.log(self.n_classes)
        weight = torch.where(z.sum(-1) > 0, weight, 0.0)
        return p.argmax(-1), weight / weight.max().clamp(min=1e-12)


def neighbors(x: Tensor, k: int, rows: int = 2048) -> Tensor:
    """S = D^-1/2 (W + W^T) D^-1/2, W_ij = max(x_i x_j, 0)^3 for the k nearest j of i; sparse [n, n].

    By matrix products of `rows` rows at a time: n^2 D multiply-adds, and no index.
    """
    n = len(x)
    values, columns = [], []
    for first in range(0, n, rows):
        near = x[first : first + rows] @ x.T
        near[torch.arange(len(near)), torch.arange(first, first + len(near))] = -1.0  # not itself
        value, column = near.topk(k, dim=-1)
        values.append(value.clamp(min=0).pow(3))
        columns.append(column)
    value, column = torch.cat(values).flatten(), torch.cat(columns).flatten()
    row = torch.arange(n, device=x.device).repeat_interleave(k)
    both = torch.stack([torch.cat([row, column]), torch.cat([column, row])])
    w = torch.sparse_coo_tensor(both, torch.cat([value, value]), (n, n), check_invariants=False).coalesce()
    degree = torch.zeros(n, device=x.device).index_add_(0, w.indices()[0], w.values())
    scale = degree.clamp(min=1e-12).rsqrt()
    i, j = w.indices()
    return torch.sparse_coo_tensor(
        w.indices(), w.values() * scale[i] * scale[j], (n, n), check_invariants=False
    ).coalesce()


def conjugate_gradients(
    graph: Tensor, b: Tensor, alpha: float, steps: int = 20, tolerance: float = 1e-6
) -> Tensor:
    """z of (I - alpha S) z = b, all columns [n, C] at once, until each residual is below tolerance * |b|."""
    z, r = torch.zeros_like(b), b.clone()
    p, rr = r.clone(), r.square().sum(0)
    stop = tolerance**2 * rr
    for _ in range(steps):
        if bool((rr <= stop).all()):
            break
        ap = p - alpha * torch.sparse.mm(graph, p)
        step = torch.where(rr > stop, rr / (p * ap).sum(0).clamp(min=1e-30), 0.0)
        z, r = z + step * p, r - step * ap
        new = r.square().sum(0)
        p, rr = r + new / rr.clamp(min=1e-30) * p, new
    return z


@dataclass
class EMOptions(SpreadOptions):
    covariance: str = key(
        "tied",
        "Of the classes' Gaussians: diagonal, each its own; tied, one for all.",
        choices=("diagonal", "tied"),
    )
    iterations: int = key(50, "Steps of expectation and maximization, at most.", within="[1, 10000]")
    floor: float = key(
        1e-3, "Smallest variance, as a share of the mean variance of the features.", within="(0, 1]"
    )


class EM(_Spread):
    Options = EMOptions

    def spread(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The weight is the posterior of the label."""
        p = mixture(
            x.double(),
            shares(labels, self.n_classes).double(),
            self.options.covariance,
            self.options.iterations,
            self.options.floor,
        )[len(labels) :]
        weight, label = p.float().max(-1)
        return label, weight


def mixture(
    x: Tensor,  # float64 [n, D]
    known: Tensor,  # float64 [L, C], one-hot, of the first L
    covariance: str,
    iterations: int,
    floor: float,
) -> Tensor:  # float64 [n, C], posteriors; those of the first L are `known`
    """EM for a Gaussian to each class. E: posteriors by log-sum-exp. M: weighted means, variances and shares."""
    least = (floor * x.var(0).mean()).clamp(min=1e-12)
    p = torch.cat([known, known.new_zeros(len(x) - len(known), known.shape[1])])
    for _ in range(iterations):
        count = p.sum(0).clamp(min=1e-12)
        mean = p.T @ x / count[:, None]
        if covariance == "tied":
            cov = least * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
            for c in range(len(mean)):
                cov += ((x - mean[c]).T * p[:, c]) @ (x - mean[c]) / count.sum()
            root = torch.linalg.cholesky(cov)
            white, centers = (
                torch.linalg.solve_triangular(root, each.T, upper=False).T for each in (x, mean)
            )
            log = -0.5 * torch.cdist(white, centers).square()  # the determinant is the same for all
        else:
            var = (p.T @ x.square() / count[:, None] - mean.square()).clamp(min=0) + least
            log = -0.5 * (
                x.square() @ (1 / var).T - 2 * x @ (mean / var).T + (mean.square() / var + var.log()).sum(1)
            )
        log = log + (count / count.sum()).log()
        before, p = p, log.softmax(1)
        p[: len(known)] = known
        if bool((p - before).abs().max() < 1e-5):
            break
    return p
