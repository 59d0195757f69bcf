"""All randomness of a run derives from its seed: a named stream for each use, so none disturbs another."""

from __future__ import annotations

import hashlib

import numpy as np


def derive(seed: int, *path: int | str) -> int:
    """The seed of the stream that `path` names, such as derive(seed, "epoch", round, epoch): 63 bits.

    It depends on nothing but the arguments, on any machine, so a resumed run can draw any stream again.
    3 and "3" are different names.
    """
    digest = hashlib.blake2b(repr((seed, *path)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def frozen_random(seed: int) -> np.random.RandomState:
    """What draws a split or a data set. RandomState is numpy's only generator whose stream is frozen for good.

    >>> frozen_random(7).permutation(5).tolist() == frozen_random(7).permutation(5).tolist()
    True
    """
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))
