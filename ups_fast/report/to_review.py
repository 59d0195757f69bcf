"""What a person should look at: tables of samples to label next and of given labels that look wrong, and what is unlike
all labeled samples."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ups_fast.checkpoint import NEXT, SUSPECTS
from ups_fast.data.cells import csv_line, write_cell
from ups_fast.files import write_atomic
from ups_fast.models import Frozen, Network
from ups_fast.models.saved import load_model
from ups_fast.modules import mc_dropout
from ups_fast.report.comparison import MOST_IMAGES, Samples
from ups_fast.review import next_to_label, suspects, unfamiliar
from ups_fast.selection import features_of, labeling_rows

COUNT = 20  # samples to label next
MOST_CLASSES = 100  # of several labels, whose given ones are judged
_TEXT = ("reason", "name", "likely_name", "path")


class Suspect(NamedTuple):
    """A given label that looks wrong."""

    id: int
    given: int
    likely: int
    p_given: float
    p_likely: float


@dataclass(frozen=True)
class Review:
    """What a person should look at, by sample id of the training set."""

    to_label: Path  # next_to_label.csv
    wrong: Path  # suspects.csv
    suspects: list[Suspect]  # the most suspicious first
    unfamiliar: Mapping[int, float]  # of unlabeled samples that were looked at, where it is known
    nearest: Mapping[int, int]  # likewise the labeled sample that is nearest


def write_review(
    folder: Path,
    samples: Samples,
    classes: Sequence[str],
    std: Mapping[int, float],  # by sample id, of the unlabeled ones
    *,
    first: int = 0,  # the training set's index that counts as 0 among the unlabeled
    names: Sequence[str] | None = None,  # [N] the file of each training image
) -> Review:
    """Writes next_to_label.csv and suspects.csv by the network of the run's last round, and returns what they say.

    next_to_label.csv  rank, index (as in pseudo_labels.csv), reason, path where there are files
    suspects.csv       rank, index (among all training samples), label, name, likely, likely_name, p_label and p_likely,
                       path where there are files

    Of very many unlabeled images a random part is looked at.
    """
    network = load_model(folder, samples.images.device)
    if isinstance(network, Frozen) and len(samples.images.shape) == 1:
        network = network.head  # the run has seen features only
    ids, features, p = _seen(network, samples, "unlabeled")
    labeled, known, _ = _seen(network, samples, "labeled")
    # All that can fail comes before the first file.
    several = samples.labels.ndim == 2
    found = next_to_label(features, p, COUNT, several=several)
    wrong, far = _suspects(labeled, known, samples), unfamiliar(known, features)
    place = ids[torch.from_numpy(found.place)].tolist()
    rows = []
    for rank, i in enumerate(place):
        a, b = int(found.first[rank]), int(found.second[rank])
        shares = p[found.place[rank]]
        both = f"{classes[a]} {shares[a]:.0%}", f"{classes[b]} {shares[b]:.0%}"
        reason = f"{both[0]} or {both[1]}, std {std.get(i, 0.0):.2f}"
        if several:
            reason = f"{' and '.join(dict.fromkeys(both))}, std at most {std.get(i, 0.0):.2f}"
        path = {"path": names[i]} if names else {}
        rows.append({"rank": str(rank + 1), "index": str(i - first), "reason": reason, **path})
    columns = ["rank", "index", "reason", *(["path"] if names else [])]
    _write(folder / NEXT, columns, rows)
    _write_suspects(folder / SUSPECTS, wrong, classes, names, several=several)
    there = np.flatnonzero(far.nearest >= 0)
    at = ids[torch.from_numpy(there)].tolist()
    ratio = dict(zip(at, far.ratio[there].tolist(), strict=True))
    nearest = dict(zip(at, labeled[torch.from_numpy(far.nearest[there])].tolist(), strict=True))
    return Review(folder / NEXT, folder / SUSPECTS, wrong, ratio, nearest)


def _suspects(ids: Tensor, features: np.ndarray, samples: Samples) -> list[Suspect]:
    truth = samples.truth("labeled", ids).numpy()
    if truth.ndim == 2:
        return _suspect_marks(ids, features, truth)
    found = suspects(features, truth)
    place = ids[torch.from_numpy(found.place)].tolist()
    columns = (found.given.tolist(), found.likely.tolist(), found.p_given.tolist(), found.p_likely.tolist())
    return [Suspect(*row) for row in zip(place, *columns, strict=True)]


def _suspect_marks(ids: Tensor, features: np.ndarray, truth: np.ndarray) -> list[Suspect]:  # [L, C]: 1, 0, -1
    """Of several labels each class is a question of its own; of very many classes the most frequent are asked."""
    n_classes, found = truth.shape[1], []
    for c in np.argsort(-(truth == 1).sum(0), kind="stable")[:MOST_CLASSES].tolist():
        known = np.flatnonzero(truth[:, c] >= 0)
        each = suspects(features[known], truth[known, c].astype(np.int64))
        # Number C + c stands for "not of class c".
        number = {1: c, 0: n_classes + c}
        for place, given, likely, p_given, p_likely in zip(*vars(each).values(), strict=True):
            i = int(ids[known[place]])
            found.append(Suspect(i, number[given], number[likely], float(p_given), float(p_likely)))
    return sorted(found, key=lambda each: each.p_given - each.p_likely)


def _write_suspects(
    path: Path,
    found: Sequence[Suspect],
    classes: Sequence[str],
    names: Sequence[str] | None,
    *,
    several: bool,
) -> None:
    n, rows = len(classes), []
    if several:  # a label is 1 or 0 then
        classes = [*classes, *(f"not {name}" for name in classes)]
    for rank, (i, given, likely, p_given, p_likely) in enumerate(found):
        row = {"rank": str(rank + 1), "index": str(i), "label": str(given), "name": classes[given]}
        row |= {"likely": str(likely), "likely_name": classes[likely]}
        if several:
            row |= {"label": str(int(given < n)), "likely": str(int(likely < n))}
        row |= {"p_label": f"{p_given:.3f}", "p_likely": f"{p_likely:.3f}"}
        rows.append({**row, "path": names[i]} if names else row)
    columns = ["rank", "index", "label", "name", "likely", "likely_name", "p_label", "p_likely"]
    _write(path, [*columns, *(["path"] if names else [])], rows)


@torch.no_grad()
def _seen(network: Network, samples: Samples, name: str) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Ids [n], features [n, D] and probabilities [n, C] of clean training samples. Given features stay as they are."""
    images, ids = samples.readable(name)
    given, rows = len(images.shape) == 1, labeling_rows(images.device, images.shape)
    if len(ids) > MOST_IMAGES:
        some = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))[:MOST_IMAGES]
        ids = ids[some.sort().values]
        features = None if given else features_of(network, images, ids, batch_size=rows)
    else:
        ids, features = (ids, None) if given else samples.features(network, name)
    with mc_dropout(network, active=False):
        if features is None:
            parts = [(x.cpu(), network(x)) for x in images.clean_batches(ids.to(images.device), rows)]
            features = torch.cat([x for x, _ in parts])
            logits = torch.cat([each for _, each in parts])
        else:
            logits = torch.cat([network.classify(x.to(images.device)) for x in features.split(rows)])
    return ids, features.cpu().numpy(), network.probabilities(logits.double()).cpu().numpy()


def _write(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, str]]) -> None:
    table = io.StringIO(newline="")
    table.write(csv_line(columns))
    for row in rows:
        table.write(csv_line(write_cell(row[name]) if name in _TEXT else row[name] for name in columns))
    write_atomic(path, table.getvalue().encode("utf-8", "surrogateescape"))
