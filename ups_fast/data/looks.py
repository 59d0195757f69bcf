"""What is odd about the look of images that were read all the same, so that nobody learns from it unawares."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np

PLAIN, COARSE = "plain", "coarse"  # of one color; of 12 bits in a file of 16


def is_plain(pixels: np.ndarray) -> bool:  # [H, W, C] uint8
    """Whether all pixels have one color."""
    return bool((pixels[0, 0] == pixels[-1, -1]).all() and (pixels == pixels[0, 0]).all())


def plain_rows(images: np.ndarray) -> list[int]:  # [N, H, W, C] uint8
    """The rows whose pixels have one color. Nearly all are left out by two of their pixels."""
    if not images.size:
        return []
    height, width = images.shape[1:3]
    alike = (images[:, 0, 0] == images[:, height // 2, width // 2]).all(1)
    return [row for row in np.flatnonzero(alike).tolist() if is_plain(images[row])]


def notes_on_looks(
    odd: Mapping[int, Collection[str]],  # by sample id: PLAIN, COARSE
    parts: Mapping[str, Collection[int]],  # "labeled", "unlabeled", "test": sample ids
    name: Callable[[int], str],
) -> list[str]:
    """Sentences for the user."""
    notes = []
    if plain := sorted(i for i, looks in odd.items() if PLAIN in looks):
        counts = ((len(set(ids) & set(plain)), part) for part, ids in parts.items())
        where = ", ".join(f"{n:,} {part}" for n, part in counts if n)
        are = "image is" if len(plain) == 1 else "images are"
        notes.append(
            f"{len(plain):,} {are} of a single color ({where}), such as {name(plain[0])}: "
            "check whether they should be"
        )
    if coarse := sorted(i for i, looks in odd.items() if COARSE in looks):
        have = "file has" if len(coarse) == 1 else "files have"
        notes.append(
            f"{len(coarse):,} {have} more than 8 bits a channel but no value above 4,095, such as {name(coarse[0])}: "
            "as in a viewer they are nearly black, with at most 17 levels. Scale 12 bits up to 16 first"
        )
    return notes
