"""The stratified, seeded split of a training set: made once per run, saved, reused by every round."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ups_fast.seeds import frozen_random


def stratified_split(
    labels: Tensor,  # [N] int64, 0..n_classes-1; or [N, C] int8, as of `split_label_sets`
    n_labels: int,
    n_classes: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Draws n_labels / n_classes images of each class, without replacement.

    Returns (labeled [n_labels], unlabeled [N - n_labels]): int64, ascending, disjoint, together 0..N-1.
    The same arguments give the same split on every machine and with every version of numpy and torch.

    Raises ValueError if n_labels is not a positive multiple of n_classes or exceeds N, if a class has fewer
    images than asked for (the message names it), or if a label is outside 0..n_classes-1.
    """
    if labels.ndim == 2:
        return split_label_sets(labels, n_labels, seed)
    values = labels.cpu().numpy()
    if n_classes < 1:
        raise ValueError(f"n_classes must be positive, got {n_classes}")
    if values.size and not 0 <= values.min() <= values.max() < n_classes:
        raise ValueError(f"labels must be in 0..{n_classes - 1}, got {values.min()}..{values.max()}")
    if n_labels < 1 or n_labels % n_classes:
        raise ValueError(f"n_labels must be a positive multiple of the {n_classes} classes, got {n_labels}")
    if n_labels > len(values):
        raise ValueError(f"n_labels must be at most the {len(values)} training images, got {n_labels}")

    per_class = n_labels // n_classes
    random = frozen_random(seed)
    is_labeled = np.zeros(len(values), dtype=bool)
    for c in range(n_classes):
        members = np.flatnonzero(values == c)
        if len(members) < per_class:
            raise ValueError(
                f"n_labels={n_labels} asks for {per_class} images of each class, class {c} has {len(members)}"
            )
        is_labeled[random.permutation(members)[:per_class]] = True
    return torch.from_numpy(np.flatnonzero(is_labeled)), torch.from_numpy(np.flatnonzero(~is_labeled))


def split_label_sets(
    labels: Tensor,  # [N, C] int8: 1, 0, or -1 where unknown
    n_labels: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Draws n_labels images such that each class has the share of them that it has of all, and one at least.

    The classes are served one by one, the one with the fewest images left first, as in iterative stratification
    (Sechidis et al., ECML PKDD 2011). Images without a known label are not drawn.

    Returns (labeled [n_labels], unlabeled [N - n_labels]) as `stratified_split`. Raises ValueError where n_labels is
    not in 1 .. the number of images with a known label.
    """
    is_one, usable = (labels == 1).numpy(), (labels >= 0).any(1).numpy()
    if not 1 <= n_labels <= usable.sum():
        raise ValueError(
            f"n_labels must be in 1 .. {usable.sum()}, the images with known labels, got {n_labels}"
        )
    random = frozen_random(seed)
    order = random.permutation(np.flatnonzero(usable))  # the draw: of images that serve alike, the first
    there = is_one[order].sum(0)
    wanted = np.where(there > 0, np.maximum(1.0, there * (n_labels / len(order))), 0.0)
    left, drawn = np.ones(len(order), bool), np.zeros(len(order), bool)
    for c in np.argsort(there, kind="stable"):
        while wanted[c] >= 0.5 and drawn.sum() < n_labels:
            members = np.flatnonzero(left & is_one[order, c])
            if not len(members):
                break
            # That which does most for what is still wanted, and least for what is not.
            gain = np.where(wanted > 0, np.minimum(wanted, 1.0), -1.0)
            best = members[(is_one[order[members]] @ gain).argmax()]
            left[best], drawn[best] = False, True
            wanted -= is_one[order[best]]
    rest = np.flatnonzero(left)
    alone = ~is_one[order[rest]].any(1)  # first those of no class
    rest = np.concatenate([rest[alone], rest[~alone]])
    drawn[rest[: n_labels - drawn.sum()]] = True
    is_labeled = np.zeros(len(labels), bool)
    is_labeled[order[drawn]] = True
    return torch.from_numpy(np.flatnonzero(is_labeled)), torch.from_numpy(np.flatnonzero(~is_labeled))
