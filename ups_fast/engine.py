"""Training as functions of values: what a round learns from, its batches, the schedule, evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ups_fast.data.resident import ResidentImages
from ups_fast.data.stream import FileImages
from ups_fast.selection import PseudoLabels, pseudo_label


@dataclass(frozen=True)
class Supervision:
    """What a round learns from: tables by sample, read on the device, and the lists that epochs draw from."""

    target: Tensor  # int64 [N], true label of the labeled, pseudo-label of the positives, -1 of all others
    negative: Tensor  # int32 [N, ceil(C / 32)], packed negative classes; 0 where there are none
    positives: Tensor  # int64 [n_pos] on the host: labeled + positives, expanded to at least n_neg
    negatives: Tensor  # int64 [n_neg] on the host: samples with a negative class that are not positive


def supervise(
    labels: Tensor,  # int64 [N], read at `labeled` only
    labeled: Tensor,  # int64 [L]
    pseudo_labels: PseudoLabels | None,  # on the host; None in round 0, which learns from the labels alone
    n_classes: int,
    *,
    repeat: int = 1,  # the labeled images come so often among the positives of rounds that have others
    device: torch.device | str,
    generator: torch.Generator,  # of the host; draws the top-up of the expanded list, once per round
) -> Supervision:
    """The supervision of a round: true labels of the labeled part, pseudo-labels of the last labeling."""
    target = torch.full_like(labels, -1)
    target[labeled] = labels[labeled]
    negative = torch.zeros(len(labels), (n_classes + 31) // 32, dtype=torch.int32)
    positives, negatives = labeled, labeled[:0]
    if pseudo_labels is not None:
        found = pseudo_labels.index[pseudo_labels.positive]
        target[found] = pseudo_labels.label[pseudo_labels.positive]
        negative[pseudo_labels.index] = pseudo_labels.negative
        negatives = pseudo_labels.index[pseudo_labels.negative.any(dim=1)]
        positives = expand(torch.cat([labeled.repeat(repeat), found]), len(negatives), generator)
    return Supervision(target.to(device), negative.to(device), positives, negatives)


def expand(positives: Tensor, n_neg: int, generator: torch.Generator) -> Tensor:
    """Too few positives [n_pos]: tiled, then topped up at random with replacement, to exactly n_neg.

    Nothing is expanded where n_pos >= n_neg, and nothing can be where n_pos = 0.
    """
    if not 0 < len(positives) < n_neg:
        return positives
    whole, rest = divmod(n_neg, len(positives))
    top_up = torch.randint(len(positives), (rest,), generator=generator)
    return torch.cat([positives.repeat(whole), positives[top_up]])


@dataclass(frozen=True)
class Mix:
    """How a round's batches are made up: the first `pos_bs` rows are positive, the other `nl_bs` negative."""

    pos_bs: int
    nl_bs: int
    steps: int  # per epoch
    note: str = ""  # a sentence for the user where the sizes forced something unusual

    def positive(self, device: torch.device | str) -> Tensor:
        """bool [pos_bs + nl_bs]: which rows of each batch are positive."""
        return torch.arange(self.pos_bs + self.nl_bs, device=device) < self.pos_bs


def batch_mix(n_pos: int, n_neg: int, batch_size: int) -> Mix:
    """Shares a batch in proportion to the positives (as expanded) and the negatives.

    nl_bs = batch_size * n_neg // (n_pos + n_neg), and steps = (n_pos + n_neg) // batch_size: an incomplete
    last batch is dropped, but an epoch has one step at least. Where samples are too few the round goes on
    with what there is, and `note` says so. Raises ValueError where there is nothing at all.
    """
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
    return Mix(batch_size - nl_bs, nl_bs, max(1, total // batch_size), "; ".join(notes))


def epoch_plan(positives: Tensor, negatives: Tensor, mix: Mix, generator: torch.Generator) -> Tensor:
    """The samples of an epoch's batches: int64 [steps, pos_bs + nl_bs], on the host, positives first.

    Each group comes in the order of a new permutation, and of another one when that is used up.
    """
    rows = [
        _shuffled(group, mix.steps * size, generator).view(mix.steps, size)
        for group, size in ((positives, mix.pos_bs), (negatives, mix.nl_bs))
    ]
    return torch.cat(rows, dim=1)


def occurrences(plan: Tensor) -> Tensor:
    """How often each sample of an epoch's plan has come before: of the same shape, 0 for the first time.

    An expanded list brings a sample several times an epoch: counted apart, each is augmented in another way.
    """
    flat = plan.flatten()
    order = flat.argsort(stable=True)
    ordered = flat[order]
    counts = torch.empty_like(flat)
    counts[order] = torch.arange(len(flat), device=flat.device) - torch.searchsorted(ordered, ordered)
    return counts.view(plan.shape)


def _shuffled(group: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` samples of `group` [n] in the order of as many permutations as that takes."""
    if count == 0:
        return group[:0]
    runs = [torch.randperm(len(group), generator=generator) for _ in range(math.ceil(count / len(group)))]
    return group[torch.cat(runs)[:count]]


def lr_at(step: int, total: int, *, lr: float, warmup: float = 0.0, cosine: float = 7 / 16) -> float:
    """The learning rate of a step in 0..total-1: linear over `warmup`, then lr * max(0, cos(cosine pi t))."""
    if step < warmup:
        return lr * step / warmup
    t = (step - warmup) / max(1, total - warmup)
    return lr * max(0.0, math.cos(cosine * math.pi * t))


class Evaluation(NamedTuple):
    """A network on those of M labeled images that can be read, on the host. Accuracy is the mean of `correct`."""

    index: Tensor  # type: ignore[assignment]  # int64 [m], which of the M
    confidence: Tensor  # float32 [m], NaN where a logit was NaN or infinite
    correct: Tensor  # bool [m], False there
    label: Tensor  # int64 [m], -1 there


def evaluate(
    model: nn.Module,
    images: ResidentImages | FileImages,
    labels: Tensor,  # int64 [M]
    *,
    batch_size: int = 512,
    forward: Callable[..., Tensor] | None = None,  # as of `pseudo_label`
) -> Evaluation:
    """One pass without dropout over all `images`, under the rule that labels the unlabeled ones."""
    index = torch.arange(len(images), device=images.device)
    inf = math.inf
    found = pseudo_label(
        model, images, index, passes=1, kappa_p=inf, kappa_n=inf, batch_size=batch_size, forward=forward
    ).cpu()
    kept = ~torch.isin(found.index, torch.tensor(sorted(images.unreadable), dtype=torch.int64))
    confidence, correct, answer = found.confidence, found.label == labels.cpu(), found.label
    return Evaluation(found.index[kept], confidence[kept], correct[kept], answer[kept])
