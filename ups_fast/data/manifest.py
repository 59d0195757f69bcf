"""What a run remembers of its files: by it a run notices every change of labels, parts, classes and pixels.

It is the list of the files of a folder or table, each with its label and a hash of its bytes. On every start the folder
or table is read again and compared. What arrays have in its place is in `fingerprint.py`.
"""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ups_fast.data.classes import class_order
from ups_fast.data.equal import GONE, Stamp, file_digest, stamp
from ups_fast.data.folder import Folder, Listing, labels_of
from ups_fast.data.image_set import ImageSet
from ups_fast.data.label_sets import names_of, read_names
from ups_fast.data.reading import in_order
from ups_fast.data.table import LABELED, NAMES, PARTS, TEST, UNLABELED, VAL, Row, Tree, in_form
from ups_fast.words import are, many

FORMAT = "ups_fast files 3"
Progress = Callable[[int, int], object]  # files done, files in all


@dataclass(frozen=True)
class Manifest:
    """The files of a run as it first found them: the labeled ones, the unlabeled ones, those for validation, the
    test images."""

    classes: list[str]
    paths: list[str]  # [N], in this order; within each part ascending
    label: list[Any]  # [N] int, -1 where unlabeled; of several labels their text, "" where unlabeled
    stamps: list[Stamp]  # [N]
    digests: list[str]  # [N], of all bytes
    labeled: int  # how many
    train: int  # of the training set: labeled ones, unlabeled ones and those for validation
    val: int  # the last of these
    held_out: bool  # the test images are labeled ones of the folder or table
    left_out: dict[str, Row]  # damaged files, with part and class
    mean: tuple[float, ...]  # of the training images in [0, 1]
    std: tuple[float, ...]
    notes: list[str]  # sentences on what was drawn and found equal then
    damaged: list[str]  # sentences on the files that were left out

    def folder(self, now: Listing, paths: list[str], note: str) -> Folder:
        """These files, wherever they lie now; `paths` are theirs now, which may be in another Unicode form."""
        labeled, unlabeled, val, test = (torch.arange(a, b) for a, b in itertools.pairwise(self._ends()))
        notes = [*now.notes, *self.notes, *([note] if note else [])]
        texts = [self.row(i)[1] for i in range(len(paths))]
        label = labels_of(texts, self.classes, several=self.several)
        return Folder(now.base, paths, label, labeled, unlabeled, test, self.classes, notes, now, val)

    @property
    def several(self) -> bool:
        """Whether an image may be of several classes."""
        return type(self.label[0]) is str

    def _ends(self) -> list[int]:
        """Where each part ends, after a 0."""
        return [0, self.labeled, self.train - self.val, self.train, len(self.paths)]

    def row(self, i: int) -> Row:
        """What the folder or table said of a file."""
        label = self.label[i]
        name = label if self.several else self.classes[label] if label >= 0 else ""
        if i >= self.train and not self.held_out:
            return TEST, name
        if self.train - self.val <= i < self.train:
            return VAL, name
        return (LABELED, name) if name else (UNLABELED, "")

    def write(self) -> bytes:
        files = zip(self.paths, self.label, self.digests, self.stamps, strict=True)
        about = {"ups_fast": FORMAT, **vars(self)}
        for name in ("paths", "label", "digests", "stamps"):
            del about[name]
        return json.dumps({**about, "files": [[*first, *stamp] for *first, stamp in files]}).encode()

    @staticmethod
    def read(content: bytes) -> Manifest:
        """What `write` wrote. Raises ValueError with the end of a sentence where it cannot be that."""
        try:
            about = json.loads(content)
        except (ValueError, RecursionError):
            raise ValueError("is damaged") from None
        if not isinstance(about, dict) or about.pop("ups_fast", None) != FORMAT:
            if isinstance(about, dict) and "files" in about:
                raise ValueError("is of an older ups_fast, which knew no images for validation")
            raise ValueError("is damaged")
        try:
            files = about.pop("files")
            paths, label, digests, *stamps = map(list, zip(*files, strict=True))
            found = Manifest(
                paths=paths, label=label, digests=digests, stamps=list(zip(*stamps, strict=True)), **about
            )
            wrong = found._misfit()
        except Exception:  # whatever a stranger's bytes may cause
            wrong = "a part or its type"
        if wrong:
            raise ValueError(f"is damaged: {wrong} cannot be right")
        return Manifest(
            **{
                **vars(found),
                "mean": tuple(found.mean),
                "std": tuple(found.std),
                "left_out": {path: (part, name) for path, (part, name) in found.left_out.items()},
            }
        )

    def _misfit(self) -> str:
        """The first parts that do not fit the others; "" if all do. A wrong type may raise anything."""
        n, ends = len(self.paths), self._ends()
        given = [*range(self.labeled), *(range(self.train, n) if self.held_out else ())]
        texts = {self.row(i)[1] for i in given}
        texts |= {name for part, name in self.left_out.values() if part == LABELED}
        names = {name for text in texts for name in (names_of(text) if self.several else [text])}
        fits = {
            "labeled, train or val": all(type(end) is int for end in (*ends, self.val))
            and 0 < ends[1] < ends[2] <= ends[3] < n,
            "paths": all(type(path) is str and path and "\0" not in path for path in self.paths)
            and len({*self.paths, *self.left_out}) == n + len(self.left_out),
            "their order": all(
                self.paths[a:b] == sorted(self.paths[a:b]) for a, b in itertools.pairwise(ends)
            ),
            "classes": all(type(name) is str and name for name in self.classes)
            and len(self.classes) > 1 - self.several
            and self.classes == class_order(self.classes) == class_order(names),
            "labels": all((c in (-1, "")) == (ends[1] <= i < ends[2]) for i, c in enumerate(self.label))
            and (self._texts_fit() if self.several else self._numbers_fit()),
            "hashes": all(
                type(each) is str and len(each) in (0, 32) and set(each) <= set("0123456789abcdef")
                for each in self.digests
            ),
            "sizes or times": all(
                len(each) == 4 and all(type(x) is int for x in each) for each in self.stamps
            ),
            "held_out": type(self.held_out) is bool,
            "left_out": all(
                part in PARTS and type(name) is str and (name == "") == (part == UNLABELED)
                for part, name in self.left_out.values()
            ),
            "mean or std": len(self.mean) == len(self.std) in (1, 3)
            and all(type(x) is float and 0 <= x <= 1 for x in self.mean)
            and all(type(x) is float and 1e-12 < x <= 1 for x in self.std),
            "notes": all(type(note) is str for note in (*self.notes, *self.damaged))
            and type(self.notes) is type(self.damaged) is list,
        }
        return next((parts for parts, fit in fits.items() if not fit), "")

    def _numbers_fit(self) -> bool:
        whole = all(type(c) is int for c in self.label)
        return whole and -1 <= min(self.label) <= max(self.label) < len(self.classes)

    def _texts_fit(self) -> bool:
        if not all(type(text) is str and read_names(text, "a label") == text for text in self.label):
            return False
        named = {name for text in self.label for way in (False, True) for name in names_of(text, unknown=way)}
        return named <= set(self.classes)


def take(folder: Folder, data: ImageSet, threads: int | None, progress: Progress) -> Manifest:
    """The manifest of a folder's files as they are now; all of them are read once more, for their hashes."""
    assert folder.listing is not None and data.names is not None
    paths = [*data.names, *(data.test_names or [])]
    rows, names = folder.listing.rows, set(paths)
    where = [os.path.join(folder.root, path) for path in paths]
    stamps = [stamp(each) for each in where]
    return Manifest(
        list(data.classes),
        paths,
        [rows[path][1] for path in paths]
        if folder.listing.several
        else torch.cat([data.train_labels, data.test_labels]).tolist(),
        stamps,
        _digests(where, threads, progress),
        labeled=0 if data.labeled is None else len(data.labeled),
        train=len(data.names),
        val=0 if data.val is None else len(data.val),
        held_out=not any(part == TEST for part, _ in rows.values()),
        left_out={path: row for path, row in rows.items() if path not in names},
        mean=data.mean,
        std=data.std,
        notes=folder.notes[len(folder.listing.notes) :],
        damaged=list(data.damaged),
    )


def _digests(names: Sequence[str], threads: int | None, progress: Progress) -> list[str]:
    found = []
    for digest in in_order(file_digest, names, threads):
        found.append(digest)
        progress(len(found), len(names))
    return found


class Changed(ValueError):
    """A run's files are not what they were. The message is the end of a sentence."""


class Now(NamedTuple):
    """A manifest's files as they are at a later start."""

    paths: list[str]
    gone: list[int]  # into its paths
    note: str  # on new unlabeled files, or ""


def compare(
    known: Manifest, base: Path, listing: Callable[[], Listing], threads: int | None, progress: Progress
) -> tuple[Listing, Now]:
    """Holds a folder or table against the manifest; a file is read only if size, times or inode are others.

    Files that are gone are tolerated, up to half of them, and new unlabeled ones are left out, with a note. Raises
    Changed for anything else, which counts the changes and gives an example of each, and what `listing` raises.
    """
    tree = Tree(base)
    paths = [_as_there(tree, path) for path in known.paths]
    if len(set(paths)) < len(paths):  # both forms of a name were files of the run
        paths = known.paths
    where = [os.path.join(base, path) for path in paths]
    stamps = [stamp(each) for each in where]
    there = [each != GONE for each in stamps]
    if 2 * there.count(False) > len(there):
        raise Changed(f"lacks {there.count(False):,} of the {len(there):,} files of the run")
    found = listing()
    left_out = {_as_there(tree, path): row for path, row in known.left_out.items()}
    then = {path: known.row(i) for i, path in enumerate(paths)} | left_out
    changes = _Changes()
    for i, (path, row) in enumerate(then.items()):
        said = found.rows.get(path)
        if said is None and i < len(there) and there[i]:
            changes.add(_UNLISTED, repr(path))
        elif said is not None and _form(said) != _form(row):
            changes.add(_LABELS, f"{path!r}, then {_said(row)}, now {_said(said)}")
    _compare_content(known, where, stamps, there, changes, lambda names: _digests(names, threads, progress))
    gone = [i for i, here in enumerate(there) if not here]
    new = {path: row for path, row in found.rows.items() if path not in then}
    _compare_new(known, gone, new, base, changes)
    if changes.count:
        raise Changed(f"has changed since the run began: {changes.said()}")
    note = ""
    if new:
        note = (
            f"{many(len(new), 'unlabeled file')} {are(len(new))} new, such as {next(iter(new))!r}: "
            f"the run goes on without {'it' if len(new) == 1 else 'them'}. Choose another run_dir to use all files"
        )
    return found, Now(paths, gone, note)


def _as_there(tree: Tree, path: str) -> str:
    return path if path.isascii() else tree.in_any_form(path) or path


def _compare_content(
    known: Manifest,
    where: Sequence[str],
    stamps: Sequence[Stamp],
    there: list[bool],  # made False for a file that cannot be read
    changes: _Changes,
    digests: Callable[[Sequence[str]], list[str]],
) -> None:
    touched = [i for i, now in enumerate(stamps) if there[i] and now != known.stamps[i]]
    reread = [i for i in touched if stamps[i][0] == known.stamps[i][0]]
    fresh = dict(zip(reread, digests([where[i] for i in reread]), strict=True))
    for i in touched:
        if fresh.get(i) == "":
            there[i] = False
        elif fresh.get(i) != known.digests[i]:
            changes.add(_CONTENT, repr(known.paths[i]))


def _compare_new(
    known: Manifest, gone: list[int], new: Mapping[str, Row], base: Path, changes: _Changes
) -> None:
    """New files of a known class are changes, and so is one that is gone and lies elsewhere now, with another label."""
    moved = _moved(known, gone, new, base)
    for path, row in new.items():
        i = moved.get(path, -1)
        if i >= 0 and _form(row) != _form(before := known.row(i)):
            changes.add(_LABELS, f"{known.paths[i]!r}, then {_said(before)}, now {path!r}, {_said(row)}")
        elif i >= 0 and row[0] != UNLABELED:
            changes.add(_MOVED, f"{known.paths[i]!r}, now {path!r}")
        elif row[0] != UNLABELED:
            changes.add(_NEW, f"{path!r}, {_said(row)}")


def _moved(known: Manifest, gone: list[int], new: Mapping[str, Row], base: Path) -> dict[str, int]:
    """New files that are the ones that are gone, by another path; only those of a size that is missed are read."""
    missed: dict[int, dict[str, int]] = {}
    for i in gone:
        missed.setdefault(known.stamps[i][0], {})[known.digests[i]] = i
    moved = {}
    for path in new:
        name = os.path.join(base, path)
        some = missed.get(stamp(name)[0])
        if some and (i := some.get(file_digest(name), -1)) >= 0:
            moved[path] = i
    return moved


_LABELS = "{} another class or part", "has", "have"
_CONTENT = "{} other content", "has", "have"
_MOVED = "{} under another path", "lies", "lie"
_NEW = "{} new among the labeled, validation and test images", "is", "are"
_UNLISTED = "{} still there, but no longer listed", "is", "are"


class _Changes:
    """Counts the changes of each kind, with the first as an example."""

    def __init__(self) -> None:
        self.count: Counter[tuple[str, str, str]] = Counter()
        self.first: dict[tuple[str, str, str], str] = {}

    def add(self, kind: tuple[str, str, str], example: str) -> None:
        self.count[kind] += 1
        self.first.setdefault(kind, example)

    def said(self) -> str:
        return "; ".join(
            f"{many(n, 'file')} {kind[0].format(kind[1] if n == 1 else kind[2])} (such as {self.first[kind]})"
            for kind, n in self.count.items()
        )


def _form(row: Row) -> Row:
    """Systems that copy folders may give their names, and so classes, another Unicode form."""
    return row[0], in_form(row[1])


def _said(row: Row) -> str:
    if row[0] in NAMES:
        return f"{NAMES[row[0]]} image of {row[1]!r}"
    return repr(row[1]) if row[0] == LABELED else "unlabeled"
