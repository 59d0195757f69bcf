"""Features in an .npy or .parquet file, whose labels are in a CSV file beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ups_fast.data.equal import row_digests
from ups_fast.data.features import must_be_finite
from ups_fast.data.image_set import ImageSet
from ups_fast.data.parts import classes_of, held_out
from ups_fast.data.row_files import row_file
from ups_fast.data.table import LABELED, PARTS, TEST, read_labels


def read_labeled_rows(path: Path, test_share: float, seed: int) -> ImageSet:
    """Rows with the labels of the table of the same name, such as rows.csv beside rows.npy; see `read_labels`.

    The training set has the labeled rows, then the unlabeled ones, last those for validation. Mean and std are left
    to the caller. Without test rows, `test_share` of the labeled ones of each class is held out, as `scan` does it
    with images. Raises ValueError or FileNotFoundError with one sentence.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file {str(path)!r} (data.root)")
    found, table = row_file(str(path)), path.with_suffix(".csv")
    if not table.is_file():
        raise FileNotFoundError(
            f"{str(path)!r} (data.root) needs its labels beside it, and there is no file {str(table)!r}: it must have "
            "a column label with a line for each row, empty where a row has none, and perhaps a column split"
        )
    known = read_labels(table, found.n, path.name)
    notes: list[str] = []
    problems: list[str] = []
    classes = classes_of(str(table), known, notes, problems, "row")
    if problems:
        raise ValueError(problems[0])
    if found.dtype.itemsize == 8:
        notes.append(f"{path.name} has numbers of type {found.dtype}, which are read as float32")
    rows = torch.from_numpy(found.read())
    must_be_finite(rows, repr(str(path)))

    number = {name: c for c, name in enumerate(classes)} | {"": -1}
    label = np.array([number[name] for _, name in known])
    part = np.array([PARTS.index(each) for each, _ in known])
    names = [f"[{i}]" for i in range(found.n)]
    if TEST not in {each for each, _ in known}:
        drawn_from = np.where(part == PARTS.index(LABELED), label, -1)
        _, first, same = np.unique(row_digests(rows), return_index=True, return_inverse=True)
        held = held_out(str(table), names, drawn_from, first[same], classes, test_share, seed, notes, "row")
        part[held] = PARTS.index(TEST)
    labeled, unlabeled, test, val = (np.flatnonzero(part == p) for p in range(len(PARTS)))
    train = np.concatenate([labeled, unlabeled, val])
    _reorder(rows.numpy(), np.concatenate([train, test]))
    return ImageSet(
        "features",
        classes,
        rows[: len(train)],
        torch.from_numpy(label[train]),
        rows[len(train) :],
        torch.from_numpy(label[test]),
        (),
        (),
        labeled=torch.arange(len(labeled)),
        val=torch.arange(len(train) - len(val), len(train)) if len(val) else None,
        names=[path.name + names[i] for i in train],
        test_names=[path.name + names[i] for i in test],
        notes=tuple(notes),
    )


def _reorder(rows: np.ndarray, order: np.ndarray) -> None:  # [n, d], int64 [n]
    """rows <- rows[order], in place: some columns at a time, so that there are never two copies of all."""
    step = max(1, rows.shape[1] // 16)
    for a in range(0, rows.shape[1], step):
        rows[:, a : a + step] = rows[order, a : a + step]
