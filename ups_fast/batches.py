"""Which samples each step of a round reads, and its learning rate: the same after any interruption."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ups_fast.data.images import VIEW_BITS, View
from ups_fast.methods import Group, Layout

# Of the number by which things are drawn for an image, from below: the epoch, how often the sample came before in it,
# and which view of it this is.
EPOCH_BITS = 20


def views_of(groups: Sequence[Group], policies: Mapping[str, Any]) -> tuple[View, ...]:
    """Which rows of the batch are seen alike. Neighboring groups that are make one view, whatever their shares are."""
    views: list[View] = []
    sources: list[int] = []  # of each group
    first = read = 0
    for number, group in enumerate(groups):
        again, policy, last = group.view_of is not None, policies[group.view], first + group.rows
        sources.append(read if group.view_of is None else sources[group.view_of])
        if views and not again and not views[-1].again and views[-1].policy == policy:
            views[-1] = views[-1]._replace(last=last)
        else:
            views.append(View(first, last, policy, sources[-1], number if again else 0))
        first = last
        read += 0 if again else group.rows
    return tuple(views)


def epoch_order(
    lists: Mapping[str, Tensor],  # int64 [n] each
    layout: Layout,
    generator: torch.Generator,  # of the host
    epoch: int,
) -> tuple[Tensor, Tensor]:
    """The sample ids of an epoch's batches and their draws: int64 [steps, B] each, on the host.

    Each group comes in the order of a new permutation, and of another one when that is used up. A group that shows an
    earlier one again has its samples, with other draws.
    """
    steps = layout.steps
    ids: list[Tensor] = []
    for group in layout.groups:
        if group.view_of is None:
            ids.append(_shuffled(lists[group.source], steps * group.rows, generator).view(steps, group.rows))
        else:
            ids.append(ids[group.view_of])
    drawn = [rows for rows, group in zip(ids, layout.groups, strict=True) if group.view_of is None]
    before = iter(occurrences(torch.cat(drawn, dim=1)).split([rows.shape[1] for rows in drawn], dim=1))
    draws: list[Tensor] = []
    for view, group in enumerate(layout.groups):
        if group.view_of is None:
            draws.append(epoch + (next(before) << EPOCH_BITS))
        else:
            draws.append(draws[group.view_of] + (view << VIEW_BITS))
    return torch.cat(ids, dim=1), torch.cat(draws, dim=1)


def occurrences(plan: Tensor) -> Tensor:
    """How often each sample of an epoch's plan has come before: of the same shape, 0 for the first time.

    An expanded list brings a sample several times an epoch: counted apart, each is augmented in another way, up to the
    4,096th, from which on the ways repeat.
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
