"""The stratified, seeded split of a training set: made once per run, saved, reused by every round."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def stratified_split(
    labels: Tensor,  # [N] int64, 0..n_classes-1
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
    # RandomState is numpy's only generator whose stream is frozen for good.
    random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))
    is_labeled = np.zeros(len(values), dtype=bool)
    for c in range(n_classes):
        members = np.flatnonzero(values == c)
        if len(members) < per_class:
            raise ValueError(
                f"n_labels={n_labels} asks for {per_class} images of each class, class {c} has {len(members)}"
            )
        is_labeled[random.permutation(members)[:per_class]] = True
    return torch.from_numpy(np.flatnonzero(is_labeled)), torch.from_numpy(np.flatnonzero(~is_labeled))
