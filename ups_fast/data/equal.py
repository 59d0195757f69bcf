"""Files of equal bytes: an image that is labelled and tested, or in two classes, makes numbers untrue."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

_HEAD = 1 << 16  # bytes of a file that are compared before all of it


def same_content(base: Path, paths: list[str], known: np.ndarray) -> np.ndarray:  # bool [N] -> int64 [N]
    """For each file the place of the first with the same bytes, itself if none.

    Only files that have the size of a labelled or test one (`known`) are opened, and read to their ends only if they
    begin alike; unlabelled files are not compared with each other.
    """
    names = [os.path.join(base, path) for path in paths]
    sizes = np.fromiter(map(_size, names), np.int64, len(names))

    def alike(group: Iterable[int], key: Callable[[int], object]) -> list[list[int]]:
        found = defaultdict(list)
        for i in group:
            if (k := key(i)) is not None:
                found[k].append(i)
        return [same for same in found.values() if len(same) > 1 and known[same].any()]

    content = np.arange(len(names))
    candidates = np.flatnonzero((sizes > 0) & np.isin(sizes, sizes[known]))
    for size in alike(candidates.tolist(), sizes.item):
        for head in alike(size, lambda i: _digest(names[i], _HEAD)):
            whole = [head] if sizes[head[0]] <= _HEAD else alike(head, lambda i: _digest(names[i], None))
            for same in whole:
                content[same] = same[0]
    return content


def _size(name: str) -> int:
    try:
        status = os.stat(name)
    except (OSError, ValueError):
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else -1


def _digest(name: str, limit: int | None) -> bytes | None:
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(name, "rb") as file:
            while piece := file.read(limit or 1 << 20):
                digest.update(piece)
                if limit:
                    break
    except OSError:
        return None
    return digest.digest()


def notes_on_equal_files(
    paths: list[str],
    label: np.ndarray,
    content: np.ndarray,
    labeled: np.ndarray,
    unlabeled: np.ndarray,
    test: np.ndarray,
) -> list[str]:
    """What is to be said of equal files."""
    notes: list[str] = []

    def note(what: str, some: np.ndarray, others: np.ndarray, so: str, *, apart: bool = False) -> None:
        """Of pairs from `some` and `others`; `apart`: only those of two classes."""
        first = {content[j]: j for j in others[::-1].tolist()}
        pairs = [(first[content[i]], i) for i in some.tolist() if content[i] in first]
        if pairs := [(j, i) for j, i in pairs if not apart or label[i] != label[j]]:
            j, i = pairs[0]
            notes.append(
                f"{len(pairs):,} {what}{'s' * (len(pairs) > 1)} {so} (such as {paths[i]!r} and {paths[j]!r})"
            )

    known = np.union1d(labeled, test)
    note("test image", test, labeled, "equal to labelled ones: the test accuracy will look too good")
    note("image", known, known, "equal to ones of another class: one of the two labels is wrong", apart=True)
    note("unlabelled image", unlabeled, test, "equal to test images: the test is not only of unseen images")
    note("unlabelled image", unlabeled, labeled, "equal to labelled ones: they count twice")
    return notes
