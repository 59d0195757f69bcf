"""Tables of labels: pseudo_labels.csv of a run, and the rows that `predict` writes of new images."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np

from ups_fast.data.cells import csv_line, write_cell
from ups_fast.files import write_atomic
from ups_fast.pseudo_labels import MultiPseudoLabels, PseudoLabels
from ups_fast.reference import MultiLabelSelection, Selection, unpack_mask


def write_pseudo_labels(
    path: str | Path,
    pseudo_labels: PseudoLabels | MultiPseudoLabels,  # U samples, on the CPU
    classes: Sequence[str],  # C names
    *,
    first: int = 0,  # the training set's index that counts as 0
    names: Sequence[str] | None = None,  # [N] the file of each training image
    unfamiliar: Mapping[int, float]
    | None = None,  # by index into the training set; None: without that column
) -> None:
    """Writes one line per unlabeled sample, in columns:

    index       its place in the training set; of one's own arrays, in x_unlabeled
    label       number of the class, -1 where the network gave no finite answer or the image could not be read
    confidence  mean probability of the label over the passes; nan for label -1
    std         standard deviation of that probability; nan for label -1
    positive    1 if the label is trusted, else 0
    negative    numbers of the classes that it surely is not, separated by spaces
    unfamiliar  how far it is from the nearest labeled sample, see `ups_fast.review.unfamiliar`; nan where unknown
    name        the label's class name
    path        the image's file, where it has one, as in the folder or table that was read

    Of several labels, without name:

    labels      names of the classes of at least probability 0.5 and of those that are positive, separated by ";". ";"
                alone: none. Empty: the network gave no finite answer, or the image could not be read
    confidence  of each of these, separated by spaces, and so std and positive
    negative    numbers as above

    A name or path that a spreadsheet would run as a formula begins with an apostrophe more; `scan` takes it away again.
    """
    table = io.StringIO(newline="")
    multi = isinstance(pseudo_labels, MultiPseudoLabels)
    columns = ["index", "labels" if multi else "label", "confidence", "std", "positive", "negative"]
    columns += ["unfamiliar"] if unfamiliar is not None else []
    columns += [*([] if multi else ["name"]), *(["path"] if names else [])]
    write = label_table(table, columns)
    rows = label_rows(pseudo_labels, classes)
    for index, row in zip(pseudo_labels.index.tolist(), rows, strict=True):
        row |= {"index": str(index - first), "path": names[index] if names else ""}
        write(row | {"unfamiliar": f"{(unfamiliar or {}).get(index, math.nan):.3f}"})
    # A file's name may be no text.
    write_atomic(Path(path), table.getvalue().encode("utf-8", "surrogateescape"))


def label_table(file: TextIO, columns: Sequence[str]) -> Callable[[Mapping[str, str]], None]:
    """Begins a table of labels and returns what writes a row by the names of its columns."""
    file.write(csv_line(columns))

    def write(row: Mapping[str, str]) -> None:
        # Numbers are the table's own and stay numbers: -1 is no formula.
        text = ("name", "labels", "path", "error")
        file.write(csv_line(write_cell(row[name]) if name in text else row[name] for name in columns))

    return write


def label_rows(
    found: PseudoLabels | Selection | MultiPseudoLabels | MultiLabelSelection, classes: Sequence[str]
) -> Iterator[dict[str, str]]:
    """Of each sample the columns of `write_pseudo_labels` that a network's answer gives."""
    if isinstance(found, (MultiPseudoLabels, MultiLabelSelection)):
        return _multi_rows(found, classes)
    return _single_rows(found, classes)


def _single_rows(found: PseudoLabels | Selection, classes: Sequence[str]) -> Iterator[dict[str, str]]:
    columns = zip(
        found.label.tolist(),
        found.confidence.numpy(),  # float32 prints as few digits as give the same number back
        found.std.numpy(),
        found.positive.int().tolist(),
        unpack_mask(found.negative, len(classes)).numpy(),
        strict=True,
    )
    for label, confidence, std, positive, negative in columns:
        yield {
            "label": str(label),
            "confidence": str(confidence),
            "std": str(std),
            "positive": str(positive),
            "negative": " ".join(map(str, np.flatnonzero(negative))),
            "name": classes[label] if label >= 0 else "",
        }


def _multi_rows(
    found: MultiPseudoLabels | MultiLabelSelection, classes: Sequence[str]
) -> Iterator[dict[str, str]]:
    positive, negative = (
        unpack_mask(each, len(classes)).numpy() for each in (found.positive, found.negative)
    )
    columns = zip(found.confidence.numpy(), found.std.numpy(), positive, negative, strict=True)
    for confidence, std, kept, excluded in columns:
        there = np.flatnonzero((confidence >= 0.5) | kept).tolist()
        answered = bool(np.isfinite(confidence).any())
        yield {
            "labels": (";".join(classes[c] for c in there) or ";") if answered else "",
            "confidence": " ".join(str(confidence[c]) for c in there),
            "std": " ".join(str(std[c]) for c in there),
            "positive": " ".join(str(int(kept[c])) for c in there),
            "negative": " ".join(map(str, np.flatnonzero(excluded))),
        }
