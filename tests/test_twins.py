"""Every method against a plain twin of its paper's rule: loss, gradient and state over hostile batches.

A twin goes row by row and class by class in Python floats, and in float64 where a gradient is taken. Most twins see
`Glass`, whose logits are its images: the gradient of the images then tells each row's mask, weight and target.
"""

from __future__ import annotations

import copy
import math
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from tracing import traced

from ups_fast.fullgraph import fullgraph
from ups_fast.methods import METHODS, Batch, Group, Known, Layout, Method, Setting
from ups_fast.methods.method import Look
from ups_fast.methods.propagation import conjugate_gradients, mixture, neighbors
from ups_fast.models import Network
from ups_fast.models.network import Dropout
from ups_fast.pseudo_labels import PseudoLabels
from ups_fast.reference import dropout_keys, pack_mask
from ups_fast.selection import Thresholds

L, U, B, MU = 6, 24, 4, 3  # labeled and unlabeled images, labeled rows of a batch, unlabeled ones to each
N = L + U
FIXMATCH = ["fixmatch", "flexmatch", "freematch", "softmatch", "dash", "uda"]


class Glass(Network):
    """Logits are the images, times a matrix that begins as 1."""

    min_size = 1

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(n_classes))

    def prefix(self, images: Tensor, skip: int = 0) -> Tensor:
        return images.flatten(1)

    def embed(self, hidden: Tensor, keys: Tensor | None, skip: int = 0) -> Tensor:
        return hidden

    def classify(self, features: Tensor) -> Tensor:
        return features @ self.weight


class Tiny(Network):
    min_size = 1

    def __init__(self, n_classes: int, dropout: float = 0.0, hidden: int = 8) -> None:
        super().__init__()
        self.first, self.drop = nn.Linear(n_classes, hidden), Dropout(dropout, layer=0)
        self.last = nn.Linear(hidden, n_classes)

    def prefix(self, images: Tensor, skip: int = 0) -> Tensor:
        return nn.functional.leaky_relu(self.first(images.flatten(1)), 0.1)

    def embed(self, hidden: Tensor, keys: Tensor | None, skip: int = 0) -> Tensor:
        return self.drop(hidden, keys)

    def classify(self, features: Tensor) -> Tensor:
        return self.last(features)


class Normed(Tiny):
    """It normalizes by its batch."""

    def __init__(self, n_classes: int) -> None:
        super().__init__(n_classes)
        self.norm = nn.BatchNorm1d(n_classes)

    def prefix(self, images: Tensor, skip: int = 0) -> Tensor:
        return super().prefix(self.norm(images.flatten(1)))


def make(name: str, n_classes: int, *, network: Any = Glass, ema: float = 0.0, **options: Any) -> Method:
    """A method on images [n_classes, 1, 1], at the beginning of a round."""
    kind = METHODS[name]
    torch.manual_seed(5)
    if "mu" in kind.Options.__dataclass_fields__:
        options = {"mu": MU, **options}
    kappa = options.pop("kappa_p", 0.05)
    method = kind(
        Setting(
            network=lambda: network(n_classes),
            options=kind.Options(name=name, **options),
            select=Thresholds(kappa_p=kappa),
            n_images=N,
            n_unlabeled=U,
            n_classes=n_classes,
            batch_size=B,
            features=n_classes if network is Glass else 8,
            ema=ema,
        )
    )
    method.train()
    sizes = {"labeled": L, "unlabeled": U, "positive": L, "negative": U}
    method.begin(method.lay_out(sizes, B * (1 + MU) if name == "ups" else B))
    return method


def hostile(
    method: Method, n_classes: int, steps: int = 20, *, seed: int = 0, tame: bool = False
) -> list[Batch]:
    """Batches with ties, huge logits, rows on both sides of thresholds, samples that come twice, and lost files.

    tame  no logits of 1000, for networks that learn from the images
    """
    g = torch.Generator().manual_seed(seed)

    def rows_of_kinds(kinds: Tensor) -> Tensor:
        noise = torch.randn(len(kinds), n_classes, generator=g)
        order = torch.rand(len(kinds), n_classes, generator=g).argsort(1)
        tie = noise.scatter(1, order[:, :2], noise.amax(1, keepdim=True).expand(-1, 2) + 2)  # to the last bit
        scale = torch.tensor([0.0, 0.3, 3.0, 1.0, 3.0 if tame else 1000.0, 0.0])[kinds]
        sure = 8.0 * nn.functional.one_hot(order[:, 0], n_classes) * (kinds == 3)[:, None]
        return torch.where((kinds == 5)[:, None], tie, scale[:, None] * noise + sure)

    labels = torch.randint(n_classes, (N,), generator=g)
    negative = torch.rand(N, n_classes, generator=g) < 0.3
    batches = []
    for step in range(steps):
        ids: list[Tensor] = []
        for group in method.layout.groups:
            first, n = (0, L) if group.source in ("labeled", "positive") else (L, U)
            new = first + torch.randint(n, (group.rows,), generator=g)
            ids.append(ids[group.view_of] if group.view_of is not None else new)
        if step == 12:  # one sample alone
            ids = [torch.full_like(each, int(each[0])) for each in ids]
        index = torch.cat(ids)
        gone = torch.rand(N, generator=g) < 0.15
        gone[L:] |= step == 8
        gone[:L] |= step == 9
        kinds = torch.randint(6, (len(index),), generator=g)
        if step in (4, 6):
            kinds.fill_({4: 1, 6: 3}[step])  # none is sure, all are
        target = torch.where(torch.arange(N) < L, labels, -1).masked_fill(gone, -1)
        if method.options.name in ("label_propagation", "em") or "round" in vars(method.options).values():
            target = torch.where(torch.arange(N) % 5 == 4, -1, labels).masked_fill(gone, -1)
        tables = {
            "target": target,
            "readable": ~gone,
            "weight": torch.rand(N, generator=g).masked_fill(gone, 0),
            "negative": pack_mask(negative & (target < 0)[:, None] & ~gone[:, None]),
        }
        images = rows_of_kinds(kinds).view(len(index), n_classes, 1, 1)
        keys = dropout_keys(index, seed=1, draw=torch.arange(len(index)) + 1000 * step)
        rows = {name: table[index] for name, table in tables.items()}
        batches.append(Batch(images, keys, index, rows, torch.tensor((step + 0.3) / steps)))
    return batches


class Rows(NamedTuple):
    """A batch as twins see it, group by group."""

    z: list[Tensor]  # float64 [n, C], logits, through which gradients flow
    target: list[list[int]]
    readable: list[list[bool]]
    index: list[list[int]]
    weight: list[float]
    negative: list[list[bool]]
    t: float

    @property
    def values(self) -> list[list[list[float]]]:
        return [z.tolist() for z in self.z]


def rows_of(method: Method, batch: Batch, z: Tensor) -> Rows:
    sizes = [group.rows for group in method.layout.groups]

    def split(table: Tensor) -> list[Any]:
        return [each.tolist() for each in table.split(sizes)]

    bits = [
        [bool(word >> c & 1) for c in range(z.shape[1])] for word in batch.rows["negative"][:, 0].tolist()
    ]
    return Rows(
        list(z.split(sizes)),
        split(batch.rows["target"]),
        split(batch.rows["readable"]),
        split(batch.index),
        batch.rows["weight"].tolist(),
        bits,
        float(batch.t),
    )


# What twins are written in -----------------------------------------------------------------------------------


def softmax(z: list[float], temperature: float = 1.0) -> list[float]:
    e = [math.exp((value - max(z)) / temperature) for value in z]
    return [value / sum(e) for value in e]


def first_max(values: list[float]) -> int:
    return max(range(len(values)), key=lambda c: (values[c], -c))


def ce(z: Tensor, target: int | list[float]) -> Tensor:  # [C] -> []
    log_p = z - z.logsumexp(0)
    if isinstance(target, int):
        return -log_p[target]
    return -sum((t * log_p[c] for c, t in enumerate(target) if t), torch.zeros((), dtype=z.dtype))


def mean_ce(z: Tensor, target: list[int]) -> Tensor:
    """Over the rows that have a target."""
    losses = [ce(z[i], y) for i, y in enumerate(target) if y >= 0]
    return sum(losses, z.sum() * 0) / max(1, len(losses))


def joined(groups: list[list[Any]]) -> list[Any]:
    return list(chain.from_iterable(groups))


def close(ours: Tensor, exact: Tensor, what: Any, rtol: float, atol: float) -> None:
    torch.testing.assert_close(
        ours.double(), exact.double(), rtol=rtol, atol=atol, msg=lambda text: f"{what}: {text}"
    )


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


class Twin:
    """Of FixMatch; its relatives differ in `weights`, or in `loss`."""

    def __init__(self, method: Method) -> None:
        self.o, self.c = method.options, method.n_classes

    def loss(self, rows: Rows) -> Tensor:
        q = [softmax(z) for z in rows.values[1]]
        target, weight = self.weights(q, rows)
        weight = [w * kept for w, kept in zip(weight, rows.readable[1], strict=True)]
        return mean_ce(rows.z[0], rows.target[0]) + self.o.weight * self.unlabeled(rows.z[2], target, weight)

    def unlabeled(self, z: Tensor, target: list[Any], weight: list[float]) -> Tensor:
        """Mean over all rows, selected or not."""
        losses = [w * ce(z[i], y) for i, (w, y) in enumerate(zip(weight, target, strict=True)) if w]
        return sum(losses, z.sum() * 0) / len(z)

    def weights(self, q: list[list[float]], rows: Rows) -> tuple[list[Any], list[float]]:
        label = [first_max(p) for p in q]
        return label, [float(p[y] >= self.o.tau) for p, y in zip(q, label, strict=True)]

    def state(self) -> dict[str, Any]:
        return {}


class FlexMatchTwin(Twin):
    def __init__(self, method: Method) -> None:
        super().__init__(method)
        self.last: dict[int, int] = dict.fromkeys(range(L, N), -1)

    def counted(self) -> list[int]:
        return [sum(c == known for known in self.last.values()) for c in [*range(self.c), -1]]

    def weights(self, q, rows):
        label, counts = [first_max(p) for p in q], self.counted()
        weight = []
        for p, y in zip(q, label, strict=True):
            a = counts[y] / max(counts)
            weight.append(float(p[y] >= self.o.tau * a / (2 - a)))
        for i, p, y, kept in zip(rows.index[1], q, label, rows.readable[1], strict=True):
            if kept and p[y] >= self.o.tau:
                self.last[i] = y
        return label, weight

    def state(self):
        status = [self.last.get(i, -1) for i in range(N + 1)]
        return {"status": status, "counts": [*map(float, self.counted()), 0.0]}


class FreeMatchTwin(Twin):
    def __init__(self, method: Method) -> None:
        super().__init__(method)
        self.tau, self.p, self.h = 1 / self.c, [1 / self.c] * self.c, [1 / self.c] * self.c

    def weights(self, q, rows):
        label, m = [first_max(p) for p in q], self.o.momentum
        seen = [i for i, kept in enumerate(rows.readable[1]) if kept]
        if seen:
            self.tau = m * self.tau + (1 - m) * mean([max(q[i]) for i in seen])
            for c in range(self.c):
                self.p[c] = m * self.p[c] + (1 - m) * mean([q[i][c] for i in seen])
                self.h[c] = m * self.h[c] + (1 - m) * mean([float(label[i] == c) for i in seen])
        tau = [self.tau * self.p[c] / max(self.p) for c in range(self.c)]
        self.weight = [float(p[y] >= tau[y]) for p, y in zip(q, label, strict=True)]
        return label, self.weight

    def loss(self, rows: Rows) -> Tensor:
        loss = super().loss(rows)
        chosen = [i for i, w in enumerate(self.weight) if w and rows.readable[1][i]]
        if not chosen:
            return loss
        strong = [rows.z[2][i].softmax(0) for i in chosen]
        hist = [mean([float(first_max(p.tolist()) == c) for p in strong]) for c in range(self.c)]
        ratio = [sum(p[c] for p in strong) / len(strong) / hist[c] if hist[c] else 0.0 for c in range(self.c)]
        wanted = [p / h if h > 0 else 0.0 for p, h in zip(self.p, self.h, strict=True)]
        for c in range(self.c):
            share = torch.as_tensor(ratio[c] / sum(ratio), dtype=torch.float64)
            loss = loss + self.o.fairness * wanted[c] / sum(wanted) * (share + 1e-12).log()
        return loss

    def state(self):
        return {"confidence": self.tau, "classes": self.p, "labels": self.h}


class SoftMatchTwin(Twin):
    def __init__(self, method: Method) -> None:
        super().__init__(method)
        self.p, self.mu, self.var = [1 / self.c] * self.c, 1 / self.c, 1.0

    def weights(self, q, rows):
        m, seen = self.o.momentum, [i for i, kept in enumerate(rows.readable[1]) if kept]
        if seen:
            for c in range(self.c):
                self.p[c] = m * self.p[c] + (1 - m) * mean([q[i][c] for i in seen])
        top = []
        for p in q:
            aligned = [p[c] * (1 / self.c + 1e-6) / (self.p[c] + 1e-6) for c in range(self.c)]
            top.append(max(aligned) / sum(aligned))
        if seen:
            now = mean([top[i] for i in seen])
            var = sum((top[i] - now) ** 2 for i in seen) / max(1, len(seen) - 1)
            self.mu, self.var = m * self.mu + (1 - m) * now, m * self.var + (1 - m) * var
        n = self.o.n_sigma
        weight = [math.exp(-(min(p - self.mu, 0) ** 2) / (2 * self.var / n**2)) for p in top]
        return [first_max(p) for p in q], weight

    def state(self):
        return {"classes": self.p, "mean": self.mu, "var": self.var}


class DashTwin(Twin):
    def __init__(self, method: Method) -> None:
        super().__init__(method)
        self.seen: list[float] = []

    def loss(self, rows: Rows) -> Tensor:
        o, supervised = self.o, mean_ce(rows.z[0], rows.target[0])
        q = [softmax(z) for z in rows.values[1]]
        soft = [softmax(z, o.temperature) for z in rows.values[1]]
        cross = [float(ce(z.detach(), t)) for z, t in zip(rows.z[1], soft, strict=True)]
        # The mean over images, each batch counting as its share of rows that can be read.
        if o.warmup / 2 <= rows.t < o.warmup:
            if o.rho_0 == "labeled":
                share = mean([float(y >= 0) for y in rows.target[0]])
                self.seen.append((float(supervised.detach()), share))
            else:
                known = [loss for loss, kept in zip(cross, rows.readable[1], strict=True) if kept]
                self.seen.append((mean(known or [0.0]), len(known) / len(cross)))
        if rows.t < o.warmup:
            return supervised
        rho_0 = sum(loss * share for loss, share in self.seen) / sum(share for _, share in self.seen)
        k = math.floor((rows.t - o.warmup) / (1 - o.warmup) * o.decays)
        rho = max(o.factor * o.gamma**-k * rho_0, o.rho_min)
        label = [first_max(p) for p in q]
        if rho == o.rho_min:
            target, losses = label, [float(ce(z.detach(), y)) for z, y in zip(rows.z[1], label, strict=True)]
        else:
            target, losses = soft, cross
        weight = [float(x <= rho and kept) for x, kept in zip(losses, rows.readable[1], strict=True)]
        return supervised + o.weight * self.unlabeled(rows.z[2], target, weight)

    def state(self):
        return {"rho": [sum(x * share for x, share in self.seen), sum(share for _, share in self.seen)]}


class UDATwin(Twin):
    def weights(self, q, rows):
        soft = [softmax(z, self.o.temperature) for z in rows.values[1]]
        return soft, [float(max(p) >= self.o.tau) for p in q]


class PseudoLabelTwin(Twin):
    steps = 0

    def loss(self, rows: Rows) -> Tensor:
        o, t = self.o, rows.t
        alpha = 0.0 if t < o.t1 else o.alpha * min(1.0, (t - o.t1) / (o.t2 - o.t1))
        label = [first_max(z) for z in rows.values[1]]
        weight = [float(kept) for kept in rows.readable[1]]
        if o.variant == "round":
            label = rows.target[1]
            weight = [float(y >= 0) for y in label]
        supervised = mean_ce(rows.z[0], rows.target[0])
        unsupervised = o.weight * alpha * self.unlabeled(rows.z[1], label, weight)
        self.steps += 1
        if o.variant == "alternate":
            return supervised if self.steps % 2 else unsupervised
        return supervised + unsupervised

    def state(self):
        return {"turn": float(self.steps % 2)}


class CPSTwin(Twin):
    """`rows.z` are the first network's logits; the second's are these in the opposite order, halved."""

    def loss(self, rows: Rows) -> Tensor:
        one = torch.cat(rows.z)
        two = one.flip(1) * 0.5
        target, kept = joined(rows.target), joined(rows.readable)
        loss = mean_ce(one, target) + mean_ce(two, target)
        for a, b in ((one, two), (two, one)):
            label = [first_max(z) if keep else -1 for z, keep in zip(b.tolist(), kept, strict=True)]
            loss = loss + self.o.weight * mean_ce(a, label)
        return loss


class CoMatchTwin(Twin):
    def __init__(self, method: Method) -> None:
        super().__init__(method)
        self.project = copy.deepcopy(method.project).double()
        self.means: list[list[float] | None] = []
        self.memory: list[tuple[list[Tensor], list[list[float]], list[bool]]] = []

    def loss(self, rows: Rows) -> Tensor:
        o, n, kept = self.o, len(rows.z[1]), rows.readable[1]
        z = [[e / e.norm() for e in self.project(each)] for each in rows.z]
        q = [softmax(values) for values in rows.values[1]]
        seen = [p for p, keep in zip(q, kept, strict=True) if keep]
        self.means.append([mean([p[c] for p in seen]) for c in range(self.c)] if seen else None)
        recent = [each for each in self.means[-32:] if each]
        by = [mean([each[c] for each in recent]) if recent else 1.0 for c in range(self.c)]
        aligned = [[p[c] / by[c] for c in range(self.c)] for p in q]
        aligned = [[value / sum(p) for value in p] for p in aligned]
        smooth = aligned
        if len(self.memory) == o.queue:
            known = [
                (e, p) for es, ps, ok in self.memory for e, p, good in zip(es, ps, ok, strict=True) if good
            ]
            smooth = []
            for e, p in zip(z[1], aligned, strict=True):
                near = softmax([float(e @ other) / o.temperature for other, _ in known])
                memory = [
                    sum(a * other[c] for a, (_, other) in zip(near, known, strict=True))
                    for c in range(self.c)
                ]
                smooth.append([o.alpha * p[c] + (1 - o.alpha) * memory[c] for c in range(self.c)])
        one_hot = [[float(c == max(y, 0)) for c in range(self.c)] for y in rows.target[0]]
        entry = [e.detach() for e in z[1] + z[0]], aligned + one_hot, kept + [y >= 0 for y in rows.target[0]]
        self.memory = [*self.memory, entry][-o.queue :]
        weight = [float(max(p) >= o.tau and keep) for p, keep in zip(smooth, kept, strict=True)]
        loss = mean_ce(rows.z[0], rows.target[0]) + o.weight * self.unlabeled(rows.z[2], smooth, weight)
        there = [j for j in range(n) if kept[j]]  # as if the others were not in the batch
        for i in there:
            graph = [
                1.0 if i == j else sum(a * b for a, b in zip(smooth[i], smooth[j], strict=True))
                for j in there
            ]
            graph = [value if value >= o.graph_tau else 0.0 for value in graph]
            similar = torch.stack([z[2][i] @ z[3][j] / o.temperature for j in there])
            loss = loss + o.contrast / n * ce(similar, [value / sum(graph) for value in graph])
        return loss

    def state(self):
        """As rings, of which only what has been written."""
        means = torch.zeros(32, self.c, dtype=torch.float64)
        for at, each in enumerate(self.means):
            means[at % 32] = torch.tensor(each or [0.0] * self.c)
        steps = len(self.means)
        blocks = [(steps - len(self.memory) + i) % self.o.queue for i in range(len(self.memory))]
        ring = [entry for _, entry in sorted(zip(blocks, self.memory, strict=True), key=lambda each: each[0])]
        return {
            "means": means,
            "steps": steps,
            "queue_z": torch.stack([e for es, _, _ in ring for e in es]),
            "queue_q": [p for _, ps, _ in ring for p in ps],
            "queue_valid": [float(good) for _, _, ok in ring for good in ok],
        }


class SpreadTwin(Twin):
    def loss(self, rows: Rows) -> Tensor:
        z, target = torch.cat(rows.z), joined(rows.target)
        weight = [w * (y >= 0) for w, y in zip(rows.weight, target, strict=True)]
        return self.unlabeled(z, target, weight)


class SupervisedTwin(Twin):
    def loss(self, rows: Rows) -> Tensor:
        return mean_ce(rows.z[0], rows.target[0])


class UPSTwin(Twin):
    def loss(self, rows: Rows) -> Tensor:
        z, target = torch.cat(rows.z), joined(rows.target)
        losses = []
        for i, y in enumerate(target):
            classes = [c for c in range(self.c) if rows.negative[i][c]]
            if y < 0 and classes:
                p = z[i].softmax(0)
                losses.append(-sum((1 - p[c]).clamp(1e-7, 1).log() for c in classes) / (len(classes) + 1e-7))
        return mean_ce(z, target) + sum(losses, z.sum() * 0) / max(1, len(losses))


TWINS: list[tuple[str, type[Twin], dict[str, Any]]] = [
    ("fixmatch", Twin, {}),
    ("fixmatch", Twin, {"tau": 0.5, "weight": 2.5}),  # with two classes, a tie is just enough
    ("flexmatch", FlexMatchTwin, {"tau": 0.7}),
    ("freematch", FreeMatchTwin, {}),
    ("freematch", FreeMatchTwin, {"momentum": 0.8, "fairness": 0.5}),
    ("softmatch", SoftMatchTwin, {}),
    ("softmatch", SoftMatchTwin, {"momentum": 0.5, "n_sigma": 1.0}),
    ("dash", DashTwin, {"warmup": 0.25, "decays": 12}),
    ("dash", DashTwin, {"warmup": 0.3, "decays": 6, "rho_0": "unlabeled", "rho_min": 0.1}),
    ("uda", UDATwin, {}),
    ("pseudo_label", PseudoLabelTwin, {}),
    ("pseudo_label", PseudoLabelTwin, {"variant": "alternate"}),
    ("pseudo_label", PseudoLabelTwin, {"variant": "round"}),
    ("cps", CPSTwin, {}),
    ("comatch", CoMatchTwin, {"embedding": 5, "queue": 3}),
    ("comatch", CoMatchTwin, {"embedding": 3, "queue": 2, "tau": 0.6, "graph_tau": 0.3, "alpha": 0.6}),
    ("label_propagation", SpreadTwin, {}),
    ("em", SpreadTwin, {}),
    ("supervised", SupervisedTwin, {}),
    ("ups", UPSTwin, {}),
]


def with_partner(method: Method) -> Method:
    if method.options.name == "cps":
        with torch.no_grad():
            method.partner.weight.copy_(torch.eye(method.n_classes).flip(0) * 0.5)
    if isinstance(method.layout, Layout) and method.options.name in ("label_propagation", "em"):
        method.begin(Layout((Group("labeled", B), Group("unlabeled", B * MU)), 1))
    return method


@pytest.mark.parametrize("n_classes", [2, 10])
@pytest.mark.parametrize(
    ("name", "kind", "options"), TWINS, ids=lambda each: each if isinstance(each, str) else ""
)
def test_loss_gradient_and_state_against_the_twin(name, kind, options, n_classes):
    method = with_partner(make(name, n_classes, **options))
    twin, selected = kind(method), set()
    steps = 36 if name == "comatch" and n_classes == 2 else 20  # more than the means that it keeps
    for step, batch in enumerate(hostile(method, n_classes, steps)):
        batch.images.requires_grad_()
        loss = method.loss(batch)
        loss.backward()
        method.after_step(batch)
        exact = batch.images.detach().double().flatten(1).requires_grad_()
        want = twin.loss(rows_of(method, batch, exact))
        assert float(loss.detach()) == pytest.approx(float(want.detach()), rel=1e-5, abs=1e-6), step
        (d_exact,) = torch.autograd.grad(want, exact)
        assert batch.images.grad is not None
        grad = batch.images.grad.flatten(1)
        close(grad, d_exact, step, 1e-4, 1e-6)
        state = method.state_dict()
        for key, value in twin.state().items():
            value = torch.as_tensor(value, dtype=torch.float64)
            close(state[key][: len(value)] if value.ndim else state[key], value, (key, step), 1e-5, 1e-6)
        parts = grad.split([group.rows for group in method.layout.groups])
        if name in [*FIXMATCH, "comatch"]:
            assert not parts[1].any(), "the weak view has a gradient"
            selected |= {("some" if part.any() else "none") for part in parts[2]}
    if selected:
        assert "some" in selected and ("none" in selected or name in ("comatch", "softmatch"))


def test_flexmatch_counts_what_a_batch_brings_twice_once():
    """The last of a sample's sure rows counts, and a row that is not sure changes nothing."""
    method = make("flexmatch", 10)
    index = torch.tensor([7, 7, 7, 8, 8, 9, 9, 10, 10, 10, 10, 11])
    label = torch.tensor([1, 2, 3, 4, 4, 5, 6, 1, 2, 1, 2, 0])
    sure = torch.tensor([1, 1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1], dtype=torch.bool)
    for _ in range(2):  # the same again changes nothing
        method.note(index, label, sure)
        assert method.status[7:12].tolist() == [2, 4, -1, 1, 0]
        assert method.counts.tolist() == [1, 1, 1, 0, 1, 0, 0, 0, 0, 0, U - 4, 0]


def test_softmatch_without_any_spread():
    """All rows equally sure, and a variance that is forgotten at once: 0 / 0 would be a loss of NaN."""
    method = make("softmatch", 3, momentum=0.0)
    batch = hostile(method, 3, 1)[0]
    images = torch.zeros_like(batch.images)
    images[:, 1] = 500.0
    batch.rows["readable"].fill_(True)
    loss = method.loss(batch._replace(images=images))
    assert loss.isfinite() and method.var == 0
    ours = method.judged(images[:12].flatten(1).softmax(-1), images[:12], batch)[1]
    assert torch.equal(ours, torch.ones(12))


def test_freematch_forgets_a_class_that_never_comes():
    """1/0 is 0, in the histogram of labels as in that of the strong view."""
    method = make("freematch", 4, fairness=1.0)
    method.labels.copy_(torch.tensor([0.5, 0.5, 0.0, 1e-30]))
    method.classes.copy_(torch.tensor([0.3, 0.5, 0.1, 0.1]))
    strong = torch.tensor([[2.0, 0, 0, 0], [0, 1.0, 0, 0]])
    p = strong.double().softmax(-1).mean(0)
    ratio = p[:2] / 0.5
    want = (torch.tensor([0.3, 0.5]) / 0.8 * (ratio / ratio.sum()).log()).sum()
    assert float(method.unfair(strong, torch.ones(2))) == pytest.approx(float(want), rel=1e-5)


# Methods of two networks, trained beside a twin in float64 ----------------------------------------------------


def sgd(loss: Tensor, network: nn.Module, lr: float) -> None:
    weights = list(network.parameters())
    with torch.no_grad():
        for weight, grad in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight -= lr * grad


def same_weights(ours: nn.Module, twin: nn.Module) -> None:
    for (name, weight), want in zip(ours.named_parameters(), twin.parameters(), strict=True):
        close(weight, want, name, 1e-4, 1e-5)


@pytest.mark.parametrize("n_classes", [2, 10])
@pytest.mark.parametrize("ema", [0.0, 0.6])
def test_mean_teacher_against_the_twin(n_classes, ema):
    method = make("mean_teacher", n_classes, network=Normed, ema=ema, weight=5.0, decay=0.8).train()
    student, teacher = (copy.deepcopy(method.network).double().train() for _ in range(2))
    optimizer, o = torch.optim.SGD(method.trained().values(), lr=0.05), method.options
    for step, batch in enumerate(hostile(method, n_classes, tame=True)):
        theirs, weak = batch.images.double().split([B + B * MU, B * MU])
        with torch.no_grad():
            judged = teacher(weak)  # normalized by itself
            told = [softmax(z) for z in judged.tolist()]
        rows = rows_of(method, batch, torch.cat([student(theirs), judged]))
        apart = [
            sum((p[c] - told[i][c]) ** 2 for c in range(n_classes)) / n_classes
            for i, p in enumerate(rows.z[1].softmax(1))
            if rows.readable[1][i]
        ]
        ramp = math.exp(-5 * (1 - min(1.0, rows.t / o.ramp)) ** 2)
        unsupervised = sum(apart, torch.zeros((), dtype=torch.float64)) / (B * MU)
        want = mean_ce(rows.z[0], rows.target[0]) + o.weight * ramp * unsupervised
        loss = method.step(method.loss, optimizer, batch)
        assert float(loss) == pytest.approx(float(want), rel=1e-4, abs=1e-6)
        sgd(want, student, 0.05)
        decay = min(1 - 1 / (step + 2), ema or 0.8)
        with torch.no_grad():
            for mean_weight, weight in zip(teacher.parameters(), student.parameters(), strict=True):
                mean_weight.copy_(decay * mean_weight + (1 - decay) * weight)
    same_weights(method.network, student)
    assert method.ema is not None and method.answers is method.ema
    same_weights(method.ema, teacher)
    for ours, want in zip(method.ema.buffers(), teacher.buffers(), strict=True):  # of the weak view alone
        close(ours, want, "statistics", 1e-4, 1e-5)
    assert not any(p.requires_grad for p in method.ema.parameters())
    assert not method.eval().ema.training


def hot(z: list[float]) -> list[float]:
    return [float(c == max(range(len(z)), key=z.__getitem__)) for c in range(len(z))]


@pytest.mark.parametrize("target", ["hard", "soft"])
@pytest.mark.parametrize("n_classes", [2, 10])
def test_meta_pseudo_labels_against_the_twin(n_classes, target):
    """As the published code has it: label smoothing of the teacher's labels and of the student's targets, not in h."""
    lr, smoothing = 0.1, 0.15
    method = make("meta_pseudo_labels", n_classes, network=Tiny, ramp=0.5, target=target)
    student, teacher = (copy.deepcopy(each).double() for each in (method.network, method.teacher))
    optimizer, o, mean_h = torch.optim.SGD(method.trained().values(), lr=lr), method.options, 0.0
    loss_of = method.prepare(lambda function: function)

    def smooth(target: list[float]) -> list[float]:
        return [(1 - smoothing) * value + smoothing / n_classes for value in target]

    def labeled_ce(z: Tensor, target: list[int], smoothed: bool) -> Tensor:
        rows = [[float(c == y) for c in range(n_classes)] for y in target]
        losses = [ce(z[i], smooth(rows[i]) if smoothed else rows[i]) for i, y in enumerate(target) if y >= 0]
        return sum(losses, z.sum() * 0) / max(1, len(losses))

    for batch in hostile(method, n_classes, tame=True):
        images = batch.images.double()
        rows = rows_of(method, batch, teacher(images))
        n, kept = len(rows.z[2]), rows.readable[1]
        told = [softmax(z) if target == "soft" else hot(z) for z in rows.values[2]]
        weak = rows.values[1]
        z = student(images)
        learned = [ce(z[B + n + i], smooth(told[i])) for i in range(n) if kept[i]]
        want = sum(learned, z.sum() * 0) / n
        old = float(labeled_ce(z[:B], rows.target[0], False))
        sgd(want, student, lr)
        h = float(labeled_ce(student(images[:B]), rows.target[0], False)) - old
        mean_h += 0.01 * (h - mean_h)
        h -= mean_h
        loss = labeled_ce(rows.z[0], rows.target[0], True)
        ramp = o.weight * min(1.0, rows.t / o.ramp)
        for i in range(n):
            if kept[i] and max(softmax(weak[i])) >= o.tau:
                loss = loss + ramp / n * ce(rows.z[2][i], softmax(weak[i], o.temperature))
            if kept[i]:
                loss = loss + h / n * ce(rows.z[2][i], told[i])
        sgd(loss, teacher, lr)
        assert float(method.step(loss_of, optimizer, batch)) == pytest.approx(float(want), rel=1e-4, abs=1e-6)
        assert float(method.mean_h) == pytest.approx(mean_h, rel=1e-3, abs=1e-6)
    same_weights(method.network, student)
    same_weights(method.teacher, teacher)


class Told(torch.optim.SGD):
    """Says which weights had a gradient in each step, and which moved."""

    def __init__(self, method: Method, lr: float = 0.1) -> None:
        self.names, self.log = method.trained(), []
        super().__init__(self.names.values(), lr=lr)

    def step(self, closure=None):
        before = {name: weight.detach().clone() for name, weight in self.names.items()}
        super().step()
        given = {name: weight.grad.clone() for name, weight in self.names.items() if weight.grad is not None}
        self.log.append((given, {name for name, w in self.names.items() if not torch.equal(w, before[name])}))


def test_meta_pseudo_labels_move_one_network_at_a_time():
    steps, batch = [], None
    for mean_h in (0.0, 100.0):
        method = make("meta_pseudo_labels", 3, network=Tiny)
        method.mean_h.fill_(mean_h)
        batch = batch or hostile(method, 3, tame=True)[1]
        optimizer = Told(method)
        method.step(method.prepare(lambda function: function), optimizer, batch)
        (student, moved), (teacher, moved_then) = optimizer.log
        assert set(student) == moved == {n for n in optimizer.names if n.startswith("network.")}
        assert set(teacher) == moved_then == {n for n in optimizer.names if n.startswith("teacher.")}
        steps.append((student, teacher))
    (student, teacher), (student_2, teacher_2) = steps
    assert all(torch.equal(student[name], student_2[name]) for name in student)  # h is none of its business
    # The h-term, with its sign: a larger mean makes h smaller by 0.99 of it.
    method = make("meta_pseudo_labels", 3, network=Tiny)
    strong = method.split(method.logits(batch.images, batch.keys, method.teacher))[2]
    kept = method.split(batch.rows["readable"])[1]
    rows = [ce(strong[i], hot(strong[i].tolist())) for i in range(len(strong)) if kept[i]]
    grads = torch.autograd.grad(sum(rows) / len(strong), list(method.teacher.parameters()))
    for (name, _), grad in zip(method.teacher.named_parameters(), grads, strict=True):
        apart = teacher_2[f"teacher.{name}"] - teacher[f"teacher.{name}"]
        torch.testing.assert_close(apart, -99.0 * grad, rtol=1e-3, atol=1e-5)
    assert max(float(grad.abs().max()) for grad in grads) > 1e-3, "not rounding"


def test_meta_pseudo_labels_finetune_the_student_alone():
    method = make("meta_pseudo_labels", 3, network=Tiny, finetune=0.25)
    known = Known(2, True, torch.zeros(N, dtype=torch.int64), torch.arange(L), torch.arange(L, N), None, None)
    method.targets(known._replace(round=0))
    assert not method.finetuning
    method.targets(known)
    method.begin(method.lay_out({"labeled": L, "unlabeled": U}, B))
    batch = hostile(method, 3, tame=True)[0]
    optimizer = Told(method)
    logits = method.logits(batch.images, batch.keys)
    target = batch.rows["target"]
    want = nn.functional.cross_entropy(logits, target, ignore_index=-1, label_smoothing=0.15)
    grads = torch.autograd.grad(want, list(method.network.parameters()))
    loss = method.step(method.prepare(lambda function: function), optimizer, batch)
    assert float(loss) == pytest.approx(float(want), rel=1e-5)
    ((given, moved),) = optimizer.log
    assert moved == set(given) == {n for n in optimizer.names if n.startswith("network.")}
    for got, grad in zip(given.values(), grads, strict=True):
        torch.testing.assert_close(got, 0.25 * grad, rtol=1e-4, atol=1e-7)


# Which term moves which weights -------------------------------------------------------------------------------


def grads_of(method: Method, batch: Batch) -> dict[str, Tensor]:
    trained = method.trained()
    found = torch.autograd.grad(method.loss(batch), list(trained.values()), allow_unused=True)
    return {
        n: torch.zeros_like(w) if g is None else g for (n, w), g in zip(trained.items(), found, strict=True)
    }


def sure_batch(method: Method, n_classes: int, *, labeled: bool) -> Batch:
    """All can be read; targets only if `labeled`; late in the training, when ramps have ended."""
    batch = hostile(method, n_classes, tame=True)[1]
    batch.rows["readable"].fill_(True)
    target = torch.arange(len(batch.index)) % n_classes
    first = torch.arange(len(target)) < method.layout.groups[0].rows
    batch.rows["target"].copy_(torch.where(first & torch.tensor(labeled), target, -1))
    return batch._replace(t=torch.tensor(0.9))


UNLABELED = {
    "fixmatch": {"tau": 0.0},
    "flexmatch": {},
    "freematch": {},
    "softmatch": {},
    "dash": {"decays": 1},
    "uda": {"tau": 0.0},
    "pseudo_label": {},
    "mean_teacher": {},
    "cps": {},
    "comatch": {"tau": 0.0},
}


@pytest.mark.parametrize("name", UNLABELED)
def test_both_terms_move_all_that_is_trained(name):
    n_classes = 3
    for labeled in (True, False):
        weight = 0.0 if labeled else 1.0
        extra = {"freematch": {"fairness": 0.0}, "comatch": {"contrast": 0.0}}.get(name, {})
        method = make(name, n_classes, network=Tiny, weight=weight, **UNLABELED[name], **extra)
        if name == "dash":
            method.rho.copy_(torch.tensor([1000.0, 1.0]))
        if name == "mean_teacher":  # another one than the student
            for p in method.ema.parameters():
                p.mul_(1.5)
        grads = grads_of(method, sure_batch(method, n_classes, labeled=labeled))
        assert all(grad.any() == ("project" not in key) for key, grad in grads.items()), labeled
        assert not any(key.startswith("ema") for key in grads)


def test_fairness_and_contrast_move_what_they_should():
    method = make("freematch", 3, network=Tiny, weight=0.0, fairness=1.0)
    assert all(grad.any() for grad in grads_of(method, sure_batch(method, 3, labeled=False)).values())
    method = make("comatch", 3, network=Tiny, weight=0.0, contrast=1.0)
    grads = grads_of(method, sure_batch(method, 3, labeled=False))
    for key, grad in grads.items():  # through the embeddings, so not the classifier
        assert grad.any() == ("last" not in key), key
    assert sum("project" in key for key in grads) == 4


def test_each_cps_network_learns_from_the_other_alone():
    """The labels that a network gets change with the other's answers, and carry no gradient to them."""
    method = make("cps", 3, network=Tiny)
    batch = sure_batch(method, 3, labeled=False)
    ours, theirs = (net(batch.images, batch.keys) for net in (method.network, method.partner))
    for net, z, other in ((method.network, ours, theirs), (method.partner, theirs, ours)):
        want = 1.5 * nn.functional.cross_entropy(z, other.detach().argmax(-1))
        grads = torch.autograd.grad(want, list(net.parameters()))
        loss = torch.autograd.grad(method.loss(batch), list(net.parameters()))
        for got, grad in zip(loss, grads, strict=True):
            torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-7)
            assert got.any()
    first, second = (next(iter(net.parameters())) for net in (method.network, method.partner))
    assert not torch.equal(first, second)


# State -------------------------------------------------------------------------------------------------------

ALL = [
    *((name, {"ema": 0.9}) for name in METHODS if name != "self_training"),
    ("pseudo_label", {"variant": "alternate"}),
    ("fixmatch", {"uncertainty": "passes", "kappa_p": 0.2}),
    ("mean_teacher", {}),
]


def tiny_with_dropout(n_classes: int) -> Tiny:
    return Tiny(n_classes, dropout=0.3)


@pytest.mark.parametrize(("name", "options"), ALL, ids=lambda each: str(each) if each else "")
def test_state_stays_in_its_place_and_is_all_there_is(name, options):
    """Tensors keep their memory; a new instance with the state of step 10 has that of step 20, bit for bit."""

    def run(method: Method, batches: list[Batch]) -> None:
        optimizer = torch.optim.SGD(method.trained().values(), lr=0.05)
        loss_of = method.prepare(lambda function: function)
        for batch in batches:
            method.step(loss_of, optimizer, batch)

    def new() -> Method:
        method = make(name, 4, network=tiny_with_dropout, **options)
        return with_partner(method) if name != "cps" else method

    one = new()
    places = {key: tensor.data_ptr() for key, tensor in one.state_dict().items()}
    batches = hostile(one, 4, tame=True)
    run(one, batches[:10])
    saved = copy.deepcopy(one.state_dict())
    run(one, batches[10:])
    assert {key: tensor.data_ptr() for key, tensor in one.state_dict().items()} == places
    two = new()
    with torch.no_grad():
        for tensor in two.state_dict().values():
            tensor.fill_(1)  # all is in the state
    two.load_state_dict(saved)
    run(two, batches[10:])
    for key, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[key]), key
        assert tensor.isfinite().all(), key


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), ALL, ids=lambda each: str(each) if each else "")
def test_compiled_as_one_graph(name, options):
    """Steps with the loss compiled or, for most, traced against eager ones.

    Labels, counts and masks are equal, floats up to rounding.
    """
    pair = []
    for how in (lambda function: function, fullgraph if name in ("ups", "fixmatch", "comatch") else traced):
        method = make(name, 4, network=tiny_with_dropout, **options)
        method = with_partner(method) if name != "cps" else method
        optimizer, losses = torch.optim.SGD(method.trained().values(), lr=0.05), []
        loss_of = method.prepare(how)
        for batch in hostile(method, 4, tame=True):
            losses.append(method.step(loss_of, optimizer, batch))
        pair.append((torch.stack(losses), method.state_dict()))
    (eager, state), (compiled, state_2) = pair
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    for key, tensor in state.items():
        if tensor.is_floating_point() and key != "counts":
            close(state_2[key], tensor, key, 1e-3, 1e-4)
        else:
            assert torch.equal(state_2[key], tensor), key


# method.uncertainty=passes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fixmatch", {"tau": 0.4}),
        ("fixmatch", {"tau": 0.4, "ema": 0.9}),
        ("flexmatch", {}),
        ("freematch", {}),
        ("softmatch", {}),
        ("dash", {"decays": 1}),
        ("uda", {"tau": 0.4}),
        ("comatch", {"tau": 0.4, "contrast": 0.0}),
        ("pseudo_label", {}),
        ("pseudo_label", {"variant": "round"}),
    ],
)
def test_certain_and_confident(name, options):
    """A row is learned from where it is by uncertainty=off, and its label's std over passes is below kappa_p."""
    n_classes, kappa, passes = 4, 0.1, 5
    kinds = {}
    for uncertainty in ("off", "passes"):
        asked = {**options, "uncertainty": uncertainty, "passes": passes, "kappa_p": kappa}
        method = make(name, n_classes, network=tiny_with_dropout, **asked)
        if name == "dash":
            method.rho.copy_(torch.tensor([1.0, 1.0]))
        kinds[uncertainty] = method
    method, seen = kinds["passes"], set()
    if method.ema is not None:
        with torch.no_grad():
            for p in method.ema.parameters():  # it is this one that is asked
                p.mul_(1.3)
    for batch in hostile(method, n_classes, 6, tame=True):
        batch = batch._replace(t=torch.tensor(0.5))
        moved = {}
        for uncertainty, each in kinds.items():
            images = batch.images.clone().requires_grad_()
            each.loss(batch._replace(images=images)).backward()
            learned = each.split(images.grad)[2 if name == "comatch" else -1]
            moved[uncertainty] = [bool(row.any()) for row in learned]
        weak = method.split(batch.images)[1]
        keys, index = method.split(batch.keys)[1], method.split(batch.rows["target"])[1]
        with torch.no_grad():
            label = method.split(method.network(batch.images, batch.keys))[1].argmax(-1).tolist()
        if options.get("variant") == "round":
            label = index.tolist()
        judge, want = copy.deepcopy(method.answers).eval(), []
        with torch.no_grad():
            drawn = [dropout_keys(keys.long(), seed=0, draw=draw) for draw in range(passes)]
            answers = [judge(weak, each).tolist() for each in drawn]
        for i in range(len(weak)):
            p = [softmax(answer[i])[label[i]] for answer in answers]
            std = math.sqrt(sum((value - mean(p)) ** 2 for value in p) / (passes - 1))
            assert abs(std - kappa) > 1e-6
            want.append(moved["off"][i] and std < kappa)
            seen.add((moved["off"][i], std < kappa))
        if name == "comatch":  # its labels are smoothed by memory, so they may be others
            assert all(a or not b for a, b in zip(moved["off"], moved["passes"], strict=True))
        else:
            assert moved["passes"] == want
    assert {(True, True), (True, False)} <= seen


def test_the_judge_is_the_network_of_now():
    method = make("fixmatch", 4, network=tiny_with_dropout, uncertainty="passes")
    judge = method.judge[0]
    assert not judge.training and method.network.training
    with torch.no_grad():
        method.network.last.weight.add_(1.0)
    assert torch.equal(judge.last.weight, method.network.last.weight)
    method.begin(method.layout)
    assert method.judge == [judge]
    assert not any("judge" in key for key in method.state_dict())


# Known answers: schedules ------------------------------------------------------------------------------------


def loss_at(method: Method, batch: Batch, t: float) -> float:
    return float(method.loss(batch._replace(t=torch.tensor(t))))


def test_ramp_of_pseudo_labels():
    method = make("pseudo_label", 3)
    batch = hostile(method, 3)[1]
    start, end = loss_at(method, batch, 0.0), loss_at(method, batch, 1.0)
    assert end - start > 0.1
    shares = {0.05: 0.0, 0.1: 0.0, 0.225: 0.25, 0.35: 0.5, 0.6: 1.0, 0.8: 1.0}
    for t, share in shares.items():
        assert (loss_at(method, batch, t) - start) / (end - start) == pytest.approx(share, abs=1e-4)
    method = make("pseudo_label", 3, t1=0.5, t2=0.5)  # at once
    assert loss_at(method, batch, 0.499) == start and loss_at(method, batch, 0.501) == pytest.approx(end)


def test_ramp_of_mean_teacher():
    method = make("mean_teacher", 3, network=Tiny)
    with torch.no_grad():
        method.ema.last.weight.mul_(-2)
    batch = hostile(method, 3, tame=True)[1]
    at = {t: loss_at(method, batch, t) for t in (0.0, 0.1, 0.2, 0.4, 0.7, 1.0)}
    supervised = float(nn.functional.cross_entropy(
        method.network(batch.images[:B], batch.keys[:B]), batch.rows["target"][:B], ignore_index=-1
    ))  # fmt: skip
    full = at[1.0] - supervised
    assert full > 0.1
    for t in at:
        share = math.exp(-5 * (1 - min(1, t / 0.4)) ** 2)
        assert (at[t] - supervised) / full == pytest.approx(share, abs=1e-4)


def test_thresholds_of_dash():
    """rho_t = max(C gamma^-k rho_0, rho_min) by rows whose loss is 1 % below and above it."""
    decays, rho_0, rho_min = 10, 0.5, 0.06
    method = make("dash", 2, decays=decays, warmup=0.2, rho_min=rho_min)
    method.rho.copy_(torch.tensor([rho_0 * 8, 8.0]))

    def loss_of(a: float, soft: bool) -> float:
        return float(ce(torch.tensor([a, 0.0], dtype=torch.float64), softmax([a, 0.0], 0.5) if soft else 0))

    def logit_of(loss: float, soft: bool) -> float:
        low, high = 0.0, 50.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if loss_of(middle, soft) > loss else (low, middle)
        return low

    batch, ks = hostile(method, 2, 1)[0], set()
    batch.rows["readable"].fill_(True)
    for i in range(40):
        t = 0.2 + 0.8 * (i + 0.5) / 40
        k = math.floor((t - 0.2) / 0.8 * decays)
        rho = max(1.0001 * rho_0 * 1.27**-k, rho_min)
        ks.add(k)
        images = torch.zeros_like(batch.images)
        soft = rho > rho_min
        images[B, 0], images[B + 1, 0] = (logit_of(rho * factor, soft) for factor in (0.99, 1.01))
        images.requires_grad_()
        method.loss(batch._replace(images=images, t=torch.tensor(t))).backward()
        strong = images.grad[B + B * MU :].flatten(1)
        assert strong[0].any() and not strong[1].any(), k
        target = softmax([float(images[B, 0]), 0.0], 0.5)[0] if soft else 1.0
        assert float(strong[0, 0]) == pytest.approx((0.5 - target) / (B * MU), rel=1e-4)
    assert ks == set(range(decays)) and 1.0001 * rho_0 * 1.27 ** -(decays - 1) < rho_min


def labels_found(confidence: Tensor, *, positive: Tensor | None = None) -> PseudoLabels:
    n = len(confidence)
    known = ~confidence.isnan()
    return PseudoLabels(
        index=torch.arange(L, L + n),
        label=torch.where(known, torch.arange(n) % 3, -1),
        confidence=confidence,
        std=torch.zeros(n),
        candidate=known,
        positive=known if positive is None else positive & known,
        negative=torch.zeros(n, 1, dtype=torch.int32),
    )


def test_curriculum_keeps_a_fifth_more_after_each_round():
    method = make_self_training("curriculum")
    g = torch.Generator().manual_seed(0)
    confidence = torch.rand(U, generator=g)
    confidence[[3, 11]] = math.nan
    confidence[6:8] = float(confidence[5])  # a tie
    found = labels_found(confidence)
    order = sorted((i for i in range(U) if i not in (3, 11)), key=lambda i: (-float(confidence[i]), i))
    for round in range(7):
        kept = method.keep(found, round).positive.nonzero().flatten().tolist()
        share = min(100, 20 * (round + 1))
        assert kept == sorted(order[: 22 * share // 100]), round
        percentile = np.percentile([float(confidence[i]) for i in order], 100 - share)
        assert all(float(confidence[i]) >= percentile - 1e-6 for i in kept)
    assert (
        method.limits(method.options, Thresholds()).tau_p == 0
        and method.limits(method.options, Thresholds()).tau_n == 0
    )
    assert math.isinf(method.limits(method.options, Thresholds()).kappa_p) and math.isinf(
        method.limits(method.options, Thresholds()).kappa_n
    )
    by_threshold = make_self_training("threshold")
    assert (
        by_threshold.keep(found, 0) is found
        and by_threshold.limits(by_threshold.options, Thresholds()).tau_p == 0.7
    )


def make_self_training(schedule: str) -> Method:
    kind = METHODS["self_training"]
    options = kind.Options(name="self_training", schedule=schedule)
    return kind(Setting(lambda: Glass(3), options, Thresholds(), N, 3, U, B, 3))


# Known answers: labels that spread ----------------------------------------------------------------------------


def clouds(n: int, d: int, c: int, *, seed: int = 0, apart: float = 1.5) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    label = torch.arange(n) % c
    return apart * torch.randn(c, d, generator=g)[label] + torch.randn(n, d, generator=g), label


def dense_graph(x: np.ndarray, k: int) -> np.ndarray:
    """S by loops: the k nearest of each, the cube of their product, both ways, by the roots of the degrees."""
    n = len(x)
    a = np.zeros((n, n))
    for i in range(n):
        similar = {j: float(x[i] @ x[j]) for j in range(n) if j != i}
        for j in sorted(similar, key=lambda j: -similar[j])[:k]:
            a[i, j] = max(similar[j], 0.0) ** 3
    w = a + a.T
    degree = np.maximum(w.sum(1), 1e-12)
    return w / np.sqrt(degree[:, None] * degree[None])


@pytest.mark.parametrize(("n", "k", "c"), [(70, 5, 3), (40, 39, 2), (65, 8, 10)])
def test_label_propagation_against_a_dense_solution(n, k, c):
    x, label = clouds(n, 6, c, seed=n)
    x = nn.functional.normalize(x - x.mean(0), dim=-1)
    s = dense_graph(x.double().numpy(), k)
    graph = neighbors(x, k, rows=32)
    np.testing.assert_allclose(graph.to_dense().numpy(), s, atol=1e-5)
    labels = label[: 2 * c]
    y = np.zeros((n, c))
    for i, each in enumerate(labels.tolist()):
        y[i, each] = 1 / 2
    for alpha, steps in ((0.5, 20), (0.99, 2000)):
        z = np.linalg.solve(np.eye(n) - alpha * s, y)
        ours = conjugate_gradients(graph, torch.tensor(y).float(), alpha, steps)
        np.testing.assert_allclose(ours.numpy(), z, rtol=1e-3, atol=1e-4 * z.max())
    method = make("label_propagation", c, k=k, alpha=0.5)
    z = np.linalg.solve(np.eye(n) - 0.5 * s, y)[len(labels) :].clip(min=0)
    p = z / z.sum(1, keepdims=True)
    weight = np.array([1 + sum(v * math.log(v) for v in row if v > 0) / math.log(c) for row in p])
    got, trust = method.spread(x, labels)
    assert got.tolist() == p.argmax(1).tolist()
    np.testing.assert_allclose(trust.numpy(), weight / weight.max(), rtol=2e-3, atol=2e-4)


def test_conjugate_gradients_as_scipy_does_them():
    """20 steps at alpha = 0.99 are not the whole way, so it matters which they are."""
    from scipy.sparse.linalg import cg

    x, label = clouds(150, 6, 3)
    x = nn.functional.normalize(x - x.mean(0), dim=-1)
    s = dense_graph(x.double().numpy(), 5)
    b = torch.zeros(150, 4)  # of the last class nobody is
    b[torch.arange(9), label[:9]] = 1 / 3
    ours = conjugate_gradients(neighbors(x, 5), b, 0.99)
    for c in range(4):
        theirs, _ = cg(np.eye(150) - 0.99 * s, b[:, c].double().numpy(), rtol=1e-6, maxiter=20)
        np.testing.assert_allclose(ours[:, c].numpy(), theirs, rtol=1e-2, atol=1e-3 * max(theirs.max(), 1e-9))
    assert not ours[:, 3].any()


def test_an_image_without_neighbors_counts_for_nothing():
    x = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0.1, 0], [0.1, 1, 0], [0, 0, 1]])
    x = nn.functional.normalize(x, dim=-1)
    method = make("label_propagation", 2, k=2)
    label, weight = method.spread(x, torch.tensor([0, 1]))
    assert label[:2].tolist() == [0, 1] and weight[2] == 0 and weight.isfinite().all()
    assert weight.max() == 1


@pytest.mark.parametrize("name", ["label_propagation", "em"])
def test_where_all_unlabeled_files_are_gone_the_next_round_learns_from_the_labels(name):
    method = make(name, 3, network=Tiny)
    features, truth = clouds(N, 8, 3, apart=4.0)
    found = labels_found(torch.rand(U))
    for label, drawn in ((torch.arange(U) % 3, U), (torch.full((U,), -1), 0)):
        found.label.copy_(label)
        method.end_round(Look(found, truth, torch.arange(L), lambda index: features[index]))
        known = Known(1, False, truth, torch.arange(L), torch.arange(L, N), found, None)
        assert len(method.targets(known).lists["unlabeled"]) == drawn


@pytest.mark.parametrize("name", ["label_propagation", "em"])
def test_spread_labels_weigh_by_class_in_the_next_round(name):
    method = make(name, 3, network=Tiny)
    features, truth = clouds(N, 8, 3, apart=4.0)
    known = Known(0, False, truth, torch.arange(L), torch.arange(L, N), None, None)
    first = method.targets(known)
    assert first.lists["unlabeled"].numel() == 0 and set(first.tables["weight"][:L].tolist()) == {1.0}
    found = labels_found(torch.rand(U))
    found.label.copy_(torch.arange(U) % 3)
    found.label[4] = -1  # unreadable
    method.end_round(Look(found, truth, torch.arange(L), lambda index: features[index]))
    lists, tables = method.targets(known)
    assert lists["unlabeled"].tolist() == [i for i in range(L, N) if i != L + 4]
    target = [int(truth[i]) if i < L else int(method.label[i]) for i in range(N)]
    assert target[L + 4] == -1 and tables["target"].tolist() == target
    right = [target[i] == int(truth[i]) for i in range(L, N)]
    assert sum(right) >= U - 4
    for i in range(N):
        if target[i] >= 0:
            n_c, all_of = sum(y == target[i] for y in target), sum(y >= 0 for y in target)
            want = (1.0 if i < L else float(method.weight[i])) * all_of / (3 * n_c)
            assert float(tables["weight"][i]) == pytest.approx(want, rel=1e-5)


# EM ----------------------------------------------------------------------------------------------------------


def m_step(x: np.ndarray, p: np.ndarray, covariance: str, least: float) -> Any:
    """scikit-learn's mixture with the maximum-likelihood parameters of responsibilities p."""
    from sklearn.mixture import GaussianMixture
    from sklearn.mixture._gaussian_mixture import _compute_precision_cholesky

    c, d = p.shape[1], x.shape[1]
    gm = GaussianMixture(c, covariance_type="diag" if covariance == "diagonal" else "tied")
    count = p.sum(0)
    gm.weights_, gm.means_ = count / count.sum(), (p.T @ x) / count[:, None]
    if covariance == "diagonal":
        cov = [(p[:, j, None] * (x - gm.means_[j]) ** 2).sum(0) / count[j] + least for j in range(c)]
        cov = np.stack(cov)
    else:
        cov = least * np.eye(d)
        for j in range(c):
            apart = x - gm.means_[j]
            cov = cov + (p[:, j, None] * apart).T @ apart / count.sum()
    gm.covariances_ = cov
    gm.precisions_cholesky_ = _compute_precision_cholesky(cov, gm.covariance_type)
    return gm


@pytest.mark.parametrize(
    ("covariance", "n", "d", "c", "iterations"),
    [
        ("diagonal", 120, 4, 3, (1, 2, 5, 12)),
        ("tied", 120, 4, 3, (1, 2, 5, 12)),
        # So many that the scatter is not taken of all differences.
        pytest.param("tied", 16_400, 64, 16, (2,), marks=pytest.mark.slow),
    ],
)
def test_em_against_a_loop_around_scikit_learn(covariance, n, d, c, iterations):
    x, label = clouds(n, d, c, apart=0.8 if n < 1000 else 0.3)
    known = nn.functional.one_hot(label[: 5 * c], c).double()
    data, floor = x.double(), 1e-3
    least = floor * float(data.var(0).mean())
    p, at = np.zeros((n, c)), 0
    p[: len(known)] = known.numpy()
    for i in range(max(iterations)):
        gm = m_step(data.numpy(), p, covariance, least)
        p[len(known) :] = gm.predict_proba(data.numpy()[len(known) :])
        if i + 1 in iterations:
            ours = mixture(data, known, covariance, i + 1, floor)
            np.testing.assert_allclose(ours.numpy(), p, atol=1e-6)
            at += 1
    assert at == len(iterations) and (p.max(1) < 0.99).mean() > 0.05  # there is something to differ in


@pytest.mark.parametrize("covariance", ["diagonal", "tied"])
def test_em_likelihood_never_falls_and_has_settled_where_it_stops(covariance):
    x, label = clouds(150, 3, 3, apart=0.7)
    known, data = nn.functional.one_hot(label[:9], 3).double(), x.double()

    def likelihood(p: Tensor) -> float:
        gm = m_step(data.numpy(), p.numpy(), covariance, 1e-12)
        joint = gm._estimate_weighted_log_prob(data.numpy()[:9])[np.arange(9), label[:9].numpy()]
        return float(joint.sum() + gm.score_samples(data.numpy()[9:]).sum())

    values = [likelihood(mixture(data, known, covariance, i, 1e-12)) for i in range(1, 40)]
    assert all(b >= a - 1e-8 for a, b in pairwise(values))
    assert values[-1] > values[0] + 1
    done = mixture(data, known, covariance, 3000, 1e-12)
    assert likelihood(done) - values[-1] > -1e-8
    gm = m_step(data.numpy(), done.numpy(), covariance, 1e-12)
    np.testing.assert_allclose(gm.predict_proba(data.numpy()[9:]), done[9:].numpy(), atol=1e-5)


@pytest.mark.parametrize("covariance", ["tied", "diagonal"])
def test_em_on_features_without_any_spread(covariance):
    p = mixture(torch.zeros(9, 3).double(), torch.eye(2).double(), covariance, 10, 1e-3)
    assert torch.equal(p[:2], torch.eye(2).double()) and p.isfinite().all()


def test_two_networks_that_begin_alike_are_refused():
    method = make("cps", 3)
    method.partner.load_state_dict(method.network.state_dict())
    with pytest.raises(ValueError, match=r"stay the same: model\.weights must not hold a classifier"):
        method.check({"labeled": L, "unlabeled": U}, B)


def test_dash_with_a_warm_up_of_a_single_step():
    """The first loss after it stands for those of the half that had no step."""
    method = make("dash", 3, warmup=0.05, rho_0="labeled")
    batch = hostile(method, 3, tame=True)[1]
    method.loss(batch._replace(t=torch.tensor(0.0)))
    assert method.rho.tolist() == [0, 0]
    method.loss(batch._replace(t=torch.tensor(0.5)))
    assert method.rho[1] > 0 and method.rho[0] > 0
    before = method.rho.clone()
    method.loss(batch._replace(t=torch.tensor(0.6)))
    assert torch.equal(method.rho, before)
