"""All randomness of a run derives from its seed: a named stream for each use, so none disturbs another."""

from __future__ import annotations

import hashlib


def derive(seed: int, *path: int | str) -> int:
    """The seed of the stream that `path` names, such as derive(seed, "epoch", round, epoch): 63 bits.

    It depends on nothing but the arguments, on any machine, so a resumed run can draw any stream again.
    3 and "3" are different names.
    """
    digest = hashlib.blake2b(repr((seed, *path)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
