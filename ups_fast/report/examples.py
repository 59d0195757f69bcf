"""Examples of a run's labels, as sections of its report: pictures of images, rows of numbers.

a sample of the positive labels by class      the least certain positive ones
the most confident ones that were rejected    confusions, where the truth is known
given labels that look wrong                  samples that are unlike all labeled ones
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ups_fast.data import Images, ImageSet
from ups_fast.pseudo_labels import PseudoLabels
from ups_fast.report.gallery import Group, Section, Shown, confusion_table, page_of
from ups_fast.report.thumbnails import thumbnails
from ups_fast.report.to_review import Review
from ups_fast.tasks import MULTI, task_of
from ups_fast.words import many


@dataclass(frozen=True)
class Most:
    """How many are shown: the page stays small, however many classes and samples there are."""

    samples: int  # of a section
    by_class: int  # of all classes together
    each: int  # of a class, or of a confusion
    confusions: int


IMAGES, ROWS = Most(24, 160, 8, 8), Most(10, 20, 2, 5)
_HEAT = 20  # classes of which all confusions stand in one table
_TITLE = 200  # characters of a path


@dataclass(frozen=True)
class _Labels:
    """What is known of the unlabeled samples."""

    found: PseudoLabels  # U samples, on the CPU
    truth: Tensor  # int64 [U], -1 where unknown
    classes: Sequence[str]
    data: ImageSet
    review: Review | None
    first: int  # the training set's index that counts as 0
    several: bool = False  # a sample may be of several classes: `found` has each class of each sample

    def title(self, i: int, first: int = 0) -> str:
        """The file of a sample, or its index."""
        if self.data.names is None:
            return f"index {i - first}"
        name = self.data.names[i]
        return name if len(name) <= _TITLE else f"...{name[-_TITLE:]}"

    def name(self, c: int) -> str:
        """Of several labels, C + c stands for "not of class c"."""
        n = len(self.classes)
        return "no label" if c < 0 else self.classes[c] if c < n else f"not {self.classes[c - n]}"

    def given(self, i: int) -> str:
        """What a labeled sample was said to be."""
        label = self.data.train_labels[i]
        if not self.several:
            return self.name(int(label))
        return " and ".join(self.name(c) for c in (label == 1).nonzero()[:, 0].tolist()) or "nothing"

    def nearest(self, i: int) -> str:
        """The labeled sample that is nearest, and its class."""
        if self.review is None or i not in self.review.nearest:
            return ""
        other = self.review.nearest[i]
        return f"{self.title(other)} ({self.given(other)})"

    def shown(self, place: int, note: str = "") -> Shown:  # of the U samples
        found, truth = self.found, int(self.truth[place])
        i, label = int(found.index[place]), int(found.label[place])
        confidence, std = float(found.confidence[place]), float(found.std[place])
        truth += label * (self.several and truth >= len(self.classes))  # not of this class
        return Shown(
            i,
            self.title(i, self.first),
            self.name(label),
            "" if math.isnan(confidence) else f"{confidence:.2f} ± {std:.2f}",
            self.name(truth) if truth >= 0 and truth != label else "",
            note,
            self.nearest(i),
        )

    def all_shown(self, places: Iterable[int]) -> list[Shown]:
        return [self.shown(place) for place in places]


def examples(
    data: ImageSet,
    images: Images,  # the training set as the run has it: which are gone
    found: Any,  # of the last round: U samples, a record of the task on the CPU
    truth: Tensor,  # int64 [U] or int8 [U, C], -1 where unknown
    review: Review
    | None = None,  # None: without given labels that look wrong and what is unlike all labeled ones
    *,
    first: int = 0,  # the training set's index that counts as 0
    threads: int | None = None,  # that read files; None: one for each core
) -> str:
    """The sections as HTML without links to others, well below 4 MB. An image that cannot be read says so.

    The choice depends on the labels alone: the same run has the same examples.
    """
    task = task_of(data.train_labels)
    entries, truth = task.entries(found, truth)
    labels = _Labels(entries, truth, data.classes, data, review, first, task is MULTI)
    pictures = len(data.shape) > 1
    most = IMAGES if pictures else ROWS
    makers = (_by_class, _least_certain, _rejected, _confusions, _suspects, _unfamiliar)
    sections = [section for make in makers for section in make(labels, most)]
    if not pictures:
        return page_of(sections, None)
    ids = (each.id for section in sections for group in section.groups for each in group.members)
    return page_of(sections, thumbnails(data, ids, images.unreadable, threads))


def _places(mask: Tensor, most: int, *keys: Tensor) -> list[int]:  # bool [U], each [U]
    """The first places of a mask, sorted by the first key, then by the next ones, the largest first."""
    place = np.flatnonzero(mask.numpy())
    if len(place) > most:  # of many classes and samples, to sort all pairs takes long
        first = keys[0].numpy()[place]
        place = place[first >= np.partition(first, -most)[-most]]
    order = np.lexsort([-key.numpy()[place] for key in reversed(keys)])
    return place[order[:most]].tolist()


def _by_class(labels: _Labels, most: Most) -> Iterator[Section]:
    found, rng = labels.found, np.random.default_rng(0)
    place = np.flatnonzero(found.positive.numpy())
    if not len(place):
        return
    place = rng.permutation(place)
    label = found.label.numpy()[place]
    known, counts = np.unique(label, return_counts=True)
    each = min(most.each, max(2, most.by_class // len(known)))
    largest = np.argsort(-counts, kind="stable")[: most.by_class // each]
    groups = []
    for c, n in zip(known[np.sort(largest)].tolist(), counts[np.sort(largest)].tolist(), strict=True):
        some = labels.all_shown(sorted(place[label == c][:each].tolist()))
        groups.append(Group(labels.name(c), f"{n:,}", some))
    rest = f" The {len(groups):,} of {len(known):,} classes with the most labels." * (
        len(groups) < len(known)
    )
    wrong = (
        " Where a label is wrong, the true class stands beside it." if bool((labels.truth >= 0).any()) else ""
    )
    yield Section("Positive labels, by class", f"A random sample.{wrong}{rest}", groups)


def _least_certain(labels: _Labels, most: Most) -> Iterator[Section]:
    found = labels.found
    place = _places(found.positive, most.samples, found.std, -found.confidence)
    if place:
        about = "The passes disagree most about these. Where many are wrong, set stricter limits."
        yield Section("The least certain positive labels", about, [Group("", "", labels.all_shown(place))])


def _rejected(labels: _Labels, most: Most) -> Iterator[Section]:
    found = labels.found
    rejected = ~found.candidate & ~found.positive & (found.label >= 0)
    place = _places(rejected, most.samples, found.confidence, -found.std)
    if not place:
        return
    balanced = int((found.candidate & ~found.positive).sum())
    also = (
        f" {many(balanced, 'other label')} passed them and were left out by the class balance."
        if balanced
        else ""
    )
    about = f"They do not pass the limits. Where nearly all are right, looser limits would trust more.{also}"
    some = labels.all_shown(place)
    yield Section("The most confident labels that were rejected", about, [Group("", "", some)])


def _confusions(labels: _Labels, most: Most) -> Iterator[Section]:
    """Of all labels whose truth is known, positive or not."""
    found, truth, n = labels.found, labels.truth, len(labels.classes)
    known = (truth >= 0) & (found.label >= 0)
    wrong = known & (truth != found.label)
    if labels.several or not bool(wrong.any()):
        return
    pair = truth * n + found.label
    kinds, counts = np.unique(pair[wrong].numpy(), return_counts=True)
    groups = []
    for at in np.argsort(-counts, kind="stable")[: most.confusions].tolist():
        here = wrong & (pair == int(kinds[at]))
        place = _places(here, most.each, found.positive.float(), found.confidence)
        a, b = (labels.name(c) for c in divmod(int(kinds[at]), n))
        trusted = int((here & found.positive).sum())
        groups.append(
            Group(f"{a} taken for {b}", f"{counts[at]:,}, {trusted:,} positive", labels.all_shown(place))
        )
    heat = ""
    if n <= _HEAT:
        table = torch.bincount(pair[known], minlength=n * n).reshape(n, n)
        heat = confusion_table(labels.classes, table.tolist())
    rest = f" The {len(groups)} most frequent of {len(kinds):,} confusions." * (len(groups) < len(kinds))
    about = f"{int(wrong.sum()):,} of {many(int(known.sum()), 'label')} whose truth is known are wrong.{rest}"
    yield Section("Taken for another class", about, groups, heat)


def _suspects(labels: _Labels, most: Most) -> Iterator[Section]:
    review = labels.review
    if review is None:
        return
    title = "Given labels that look wrong"
    if not review.suspects:
        yield Section(title, "A classifier that learned from the other labels agrees with all of them.", [])
        return
    some = []
    for i, given, likely, p_given, p_likely in review.suspects[: most.samples]:
        note = f"or {labels.name(likely)}, {p_likely:.2f}"
        some.append(Shown(i, labels.title(i), labels.name(given), f"{p_given:.2f}", "", note, ""))
    about = (
        "A classifier that learned from the other labels expects another class for "
        f"{many(len(review.suspects), 'label')}. It stands below the given one; suspects.csv lists all."
    )
    yield Section(title, about, [Group("", "", some)], note="expected")


def _unfamiliar(labels: _Labels, most: Most) -> Iterator[Section]:
    review = labels.review
    if review is None or not review.unfamiliar:
        return
    noun, ratio = labels.data.noun, review.unfamiliar
    places = torch.arange(len(labels.found.index))
    if labels.several:  # each sample once, by its most confident class
        n = len(labels.classes)
        places = places[::n] + labels.found.confidence.nan_to_num(-1.0).reshape(-1, n).argmax(1)
    ids = zip(places.tolist(), labels.found.index[places].tolist(), strict=True)
    far = [(-ratio[i], place) for place, i in ids if ratio.get(i, 0) > 1]
    some = [labels.shown(place, f"{-each:.1f} x") for each, place in sorted(far)[: most.samples]]
    trusted = int(labels.found.positive[torch.tensor([place for _, place in far], dtype=torch.int64)].sum())
    about = (
        f"{len(far):,} of {many(len(ratio), noun)} are farther from the nearest labeled one than 95 % of the labeled "
        "are from each other"
    )
    if far:
        about += (
            f", and {trusted:,} of these have a positive label. They may be of no class at all. "
            "The farthest are shown, with the factor; pseudo_labels.csv has it as unfamiliar"
        )
    about += "."
    yield Section(f"Unlike all labeled {noun}s", about, [Group("", "", some)], note="unfamiliar")
