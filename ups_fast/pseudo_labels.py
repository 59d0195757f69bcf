"""What a labeling says of its samples, and which labels are kept: the class balance, and negatives of the others.

`PseudoLabels` are of one class for each sample, `MultiPseudoLabels` of several.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ups_fast.reference import Selection

BALANCE_FLOOR = 25  # published: a rarer class would starve all the others


@dataclass(frozen=True)
class PseudoLabels:
    """What a round's network says of the U unlabeled samples, after selection. All on one device."""

    index: Tensor  # int64 [U], into the training set
    label: (
        Tensor  # int64 [U], -1 where there is none: a logit was NaN or infinite, or the image is unreadable
    )
    confidence: Tensor  # float32 [U], mean probability of the label; NaN where label is -1
    std: Tensor  # float32 [U], of that probability over the passes; NaN where label is -1
    candidate: Tensor  # bool [U], passed the thresholds of a positive
    positive: Tensor  # bool [U], and was kept by the class balance
    negative: Tensor  # int32 [U, ceil(C / 32)], packed negative classes; 0 where positive

    def cpu(self) -> PseudoLabels:
        """The same on the host: one wait for the device, after which reports and files need no other."""
        return PseudoLabels(**{name: tensor.cpu() for name, tensor in vars(self).items()})

    def at(self, kept: Tensor) -> PseudoLabels:  # bool [U]
        """Of these samples alone."""
        return PseudoLabels(**{name: tensor[kept] for name, tensor in vars(self).items()})


def without(found: Selection, gone: Tensor) -> Selection:  # bool [U]
    """The selection as if these had given no answer."""
    return Selection(
        label=found.label.masked_fill(gone, -1),
        confidence=found.confidence.masked_fill(gone, math.nan),
        std=found.std.masked_fill(gone, math.nan),
        positive=found.positive & ~gone,
        negative=found.negative.masked_fill(gone[:, None], 0),
    )


def balance(
    label: Tensor,  # int64 [U], in [0, n_classes) where candidate
    std: Tensor,  # float32 [U], at least 0 where candidate
    candidate: Tensor,  # bool [U]
    n_classes: int,
    floor: int = BALANCE_FLOOR,
) -> Tensor:  # bool [U], the candidates that are kept
    """Keeps of each class the m candidates of lowest std, m = max(floor, size of the smallest class).

    A class without candidates counts too: m is then `floor`. Of equal stds the lower position is kept.
    """
    group = torch.where(candidate, label, n_classes)  # all others sort behind the last class
    # One stable sort by (class, std), as the bits of floats from 0 on are ordered like their values.
    bits = torch.where(candidate, std, 0.0).abs().view(torch.int32)
    order = ((group << 32) | bits).argsort(stable=True)
    group = group[order]
    start = torch.searchsorted(group, torch.arange(n_classes + 1, device=group.device))
    m = start.diff().min().clamp(min=floor)
    rank = torch.arange(len(group), device=group.device) - start[group]
    kept = torch.empty_like(candidate)
    kept[order] = (rank < m) & (group < n_classes)
    return kept


def drop_negatives(
    negative: Tensor,  # int32 [U, ceil(C / 32)]
    positive: Tensor,  # bool [U]
) -> Tensor:  # int32 [U, ceil(C / 32)]
    """Clears the negative classes of kept positives; what balance dropped becomes a negative sample."""
    return negative.masked_fill(positive[:, None], 0)


@dataclass(frozen=True)
class MultiPseudoLabels:
    """What a round's network says of the U unlabeled samples and each of C classes. All on one device."""

    index: Tensor  # int64 [U], into the training set
    confidence: Tensor  # float32 [U, C], mean probability of the class; NaN without a finite answer
    std: Tensor  # float32 [U, C], of that probability over the passes; NaN likewise
    candidate: Tensor  # int32 [U, ceil(C / 32)], packed: the class passed the thresholds of a positive
    positive: Tensor  # likewise, and was kept by the class balance
    negative: Tensor  # likewise: the sample surely is not of this class
    weight: Tensor  # float32 [U, C], of each entry in the loss; [U, 0]: all alike

    def cpu(self) -> MultiPseudoLabels:
        """The same on the host."""
        return MultiPseudoLabels(**{name: tensor.cpu() for name, tensor in vars(self).items()})

    def at(self, kept: Tensor) -> MultiPseudoLabels:  # bool [U]
        """Of these samples alone."""
        return MultiPseudoLabels(**{name: tensor[kept] for name, tensor in vars(self).items()})


def balance_entries(
    uncertainty: Tensor,  # float32 [U, C], at least 0 where candidate
    candidate: Tensor,  # bool [U, C]
    floor: int = BALANCE_FLOOR,
) -> Tensor:  # bool [U, C], the candidates that are kept
    """`balance` where a sample may be a candidate of several classes: each class is a list of its own.

    >>> std, candidate = torch.tensor([[0.3, 0.1], [0.2, 0.0]]), torch.tensor([[True, True], [True, False]])
    >>> balance_entries(std, candidate, floor=1).tolist()
    [[False, True], [True, False]]
    """
    m = candidate.sum(0).amin().clamp(min=floor) if candidate.shape[1] else floor
    order = torch.where(candidate, uncertainty, math.inf).argsort(dim=0, stable=True)
    place = torch.arange(len(candidate), device=candidate.device)[:, None].expand_as(order)
    rank = torch.empty_like(order).scatter_(0, order, place)
    return candidate & (rank < m)
