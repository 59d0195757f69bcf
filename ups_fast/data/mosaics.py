"""Mosaics of digits, as embedded data with several labels: two by two tiles, each a digit or nothing."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ups_fast.data.image_set import ImageSet, moments
from ups_fast.seeds import frozen_random

TRAIN, TEST = 2000, 500  # mosaics
BLANK = 0.25  # of the tiles
_SEED = 0  # belongs to the data: they are the same whatever the run's seed


def mosaics_of(digits: ImageSet) -> ImageSet:
    """Images of 2h x 2w, and which classes are in them; training and test mosaics have no digit in common."""
    random = frozen_random(_SEED)
    train = _mosaics(digits.train_images, digits.train_labels, TRAIN, len(digits.classes), random)
    test = _mosaics(digits.test_images, digits.test_labels, TEST, len(digits.classes), random)
    mean, std = moments(train[0])
    return ImageSet("mosaics", digits.classes, *train, *test, mean, std)


def _mosaics(
    images: Tensor,  # uint8 [n, h, w, 1]
    labels: Tensor,  # int64 [n]
    count: int,
    n_classes: int,
    random: np.random.RandomState,
) -> tuple[Tensor, Tensor]:  # uint8 [count, 2h, 2w, 1], int8 [count, C]
    drawn = torch.from_numpy(random.randint(len(images), size=(count, 4)))
    there = torch.from_numpy(random.random_sample((count, 4)) >= BLANK)
    tiles = images[drawn] * there[..., None, None, None]
    h, w = images.shape[1:3]
    whole = tiles.view(count, 2, 2, h, w).permute(0, 1, 3, 2, 4).reshape(count, 2 * h, 2 * w, 1)
    marks = torch.zeros(count, n_classes + 1, dtype=torch.int8)
    marks.scatter_(1, torch.where(there, labels[drawn], n_classes), 1)
    return whole.contiguous(), marks[:, :n_classes].contiguous()
