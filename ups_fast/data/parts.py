"""What folders and tables have in common: which classes there are, and which labeled images are held out to test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np
import torch

from ups_fast.data.classes import class_order, lookalikes
from ups_fast.data.label_sets import names_of
from ups_fast.data.split import split_label_sets
from ups_fast.data.table import LABELED, NAMES, PARTS, UNLABELED, Row
from ups_fast.seeds import derive
from ups_fast.words import many


def classes_of(
    where: str,
    rows: Collection[Row],
    notes: list[str],
    problems: list[str],
    noun: str = "image",
    *,
    several: bool = False,
) -> list[str]:
    """Names of the classes, in order. It is a problem where a part is missing or its classes do not fit.

    several  each row has any number of names, as `label_sets` writes them
    """
    doubted = [names_of(text, unknown=True) for _, text in rows] if several else []
    unknown = {name for names in doubted for name in names}
    if several:
        named = [(part, names_of(text) if text else [""]) for part, text in rows]
        rows = [(part, name) for part, names in named for name in names]
    counts = Counter(name for part, name in rows if part != UNLABELED)
    found = {wanted: class_order(name for part, name in rows if part == wanted) for wanted in PARTS}
    classes = found[LABELED]
    if strange := sorted(unknown - set(classes)):
        problems.append(f"{where!r} calls the class {strange[0]!r} unknown, of which no {noun} is labeled")
    if several and not classes:
        problems.append(f"{where!r} must have labeled {noun}s of at least one class, got none")
    elif n := sum(len(names) >= len(classes) and set(classes) <= set(names) for names in doubted):
        problems.append(
            f"{where!r} has {many(n, noun)} with a question mark at each class: leave such a cell empty, which "
            "is unlabeled"
        )
    elif len(classes) < 2 and not several:
        got = f"only {classes[0]!r}" if classes else "none"
        problems.append(f"{where!r} must have labeled {noun}s of at least two classes, got {got}")
    if odd := [name for name in classes if name.encode(errors="replace").decode() != name]:
        problems.append(f"names of classes must be UTF-8, {where!r} has {odd[0]!r}")
    for part, what in NAMES.items():
        if strange := [name for name in found[part] if name not in set(classes)]:
            some = ", ".join(map(repr, strange[:5]))
            problems.append(
                f"the {what} {noun}s of {where!r} have class {some}, of which no {noun} is labeled"
            )
    if not any(part == UNLABELED for part, _ in rows):
        problems.append(f"{where!r} has no unlabeled {noun}s, and UPS needs some")
    for part, what in NAMES.items():
        if found[part] and (lacking := [name for name in classes if name not in set(found[part])]):
            notes.append(f"no {what} {noun} is of class {', '.join(map(repr, lacking[:5]))}")
    notes += lookalikes({name: counts[name] for name in class_order(counts)}, noun)
    return classes


def held_out(
    where: str,
    paths: Sequence[str],  # [N] names, by which the draw is made
    label: np.ndarray,  # -1 of all but the labeled images; of several labels [N, C]
    content: np.ndarray,  # [N] of each the place of the first that is equal
    classes: list[str],
    share: float,
    seed: int,
    notes: list[str],
    noun: str = "image",
) -> np.ndarray:
    """The labeled images, as places in paths, that become the test part; its draw is one of contents, not files."""
    if label.ndim == 2:
        return _held_sets(where, label, content, share, seed, notes, noun)
    held: list[np.ndarray] = []
    single: list[str] = []
    for c, name in enumerate(classes):
        members = np.flatnonzero(label == c)
        drawn = sorted(np.unique(content[members]), key=lambda i: derive(seed, "held out", paths[i]))
        n = min(max(1, int(share * len(drawn) + 0.5)), len(drawn) - 1)
        if n == 0:
            single.append(name)
        held.append(members[np.isin(content[members], drawn[:n])])
    index = np.concatenate(held)
    if not len(index):
        raise ValueError(
            f"{where!r} has no test {noun}s, and no class has the two different labeled {noun}s of which one could "
            f"be held out: label more, or give test {noun}s"
        )
    notes.append(
        f"there are no test {noun}s, so {len(index):,} of the {int((label >= 0).sum()):,} labeled ones "
        f"({share:.0%} of each class, drawn by seed {seed}) are held out to test and not trained on"
    )
    if single:
        some = ", ".join(map(repr, single[:5]))
        notes.append(f"no test {noun} is of class {some}: it has a single labeled {noun}")
    return index


def _held_sets(
    where: str,
    label: np.ndarray,  # int8 [N, C]
    content: np.ndarray,
    share: float,
    seed: int,
    notes: list[str],
    noun: str,
) -> np.ndarray:
    """The same of several labels: each class keeps its share of the images that stay, one at least."""
    members = np.flatnonzero((label >= 0).any(1))
    drawn = np.unique(content[members])
    left = len(drawn) - max(1, int(share * len(drawn) + 0.5))
    if left < 1:
        raise ValueError(
            f"{where!r} has no test {noun}s, and not the two different labeled {noun}s of which one could be held "
            f"out: label more, or give test {noun}s"
        )
    _, held = split_label_sets(torch.from_numpy(label[drawn]), left, derive(seed, "held out"))
    index = members[np.isin(content[members], drawn[held.numpy()])]
    notes.append(
        f"there are no test {noun}s, so {len(index):,} of the {len(members):,} labeled ones ({share:.0%}, drawn by "
        f"seed {seed}) are held out to test and not trained on"
    )
    return index
