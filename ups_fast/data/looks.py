"""What is odd about the look of images that were read all the same, so that nobody learns from it unawares."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np

PLAIN, COARSE = "plain", "coarse"  # of one color; of 12 bits in a file of 16


def is_plain(pixels: np.ndarray) -> bool:  # [.., H, W, C] uint8
    """Whether all pixels have one color."""
    flat = pixels.reshape(-1, pixels.shape[-1])
    return bool((flat[0] == flat[-1]).all() and (flat == flat[0]).all())


def plain_rows(images: np.ndarray) -> list[int]:  # [N, .., H, W, C] uint8
    """The rows whose pixels have one color. Nearly all are left out by two of their pixels."""
    if not images.size:
        return []
    pixels = images.reshape(len(images), -1, images.shape[-1])
    alike = (pixels[:, 0] == pixels[:, pixels.shape[1] // 2]).all(1)
    return [row for row in np.flatnonzero(alike).tolist() if is_plain(images[row])]


def notes_on_looks(
    odd: Mapping[int, Collection[str]],  # by sample id: PLAIN, COARSE
    parts: Mapping[str, Collection[int]],  # "labeled", "unlabeled", "test": sample ids
    name: Callable[[int], str],
    noun: str = "image",
) -> list[str]:
    """Sentences for the user."""
    notes = []
    if plain := sorted(i for i, looks in odd.items() if PLAIN in looks):
        counts = ((len(set(ids) & set(plain)), part) for part, ids in parts.items())
        where = ", ".join(f"{n:,} {part}" for n, part in counts if n)
        are = f"{noun} is" if len(plain) == 1 else f"{noun}s are"
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
