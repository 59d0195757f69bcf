"""The index of a user's images or clips, in folders or listed in a CSV file, and what is known of each."""

from __future__ import annotations

import os
import posixpath
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ups_fast.data import video
from ups_fast.data.classes import suffixes
from ups_fast.data.equal import notes_on_equal_images, same_content
from ups_fast.data.image import SUFFIXES
from ups_fast.data.label_sets import marks_of
from ups_fast.data.parts import classes_of, held_out
from ups_fast.data.table import LABELED, PARTS, TEST, UNLABELED, VAL, Row, Rows, has_several, read_table
from ups_fast.files import home
from ups_fast.words import many

_NOBODYS = {"thumbs.db", "desktop.ini", "__macosx", "@eadir"}  # what systems leave beside people's images


class Wanted(NamedTuple):
    """The files that are looked for."""

    noun: str
    suffixes: frozenset[str]
    instead: str  # what files of other kinds can be converted to


IMAGES = Wanted("image", SUFFIXES, "JPEG or PNG")
CLIPS = Wanted("clip", video.SUFFIXES, "MP4 or WebM")


@dataclass(frozen=True)
class Listing:
    """What a folder or a table says, before anything is drawn or left out."""

    base: Path  # what paths are relative to
    rows: Rows
    classes: list[str]  # of the labeled images, in order
    notes: list[str]  # sentences for the user
    problems: list[str]  # sentences too; with one of them no run can begin
    several: bool = (
        False  # an image may be of several classes: its row has their names as `label_sets` writes them
    )
    noun: str = "image"  # what its samples are


@dataclass(frozen=True)
class Folder:
    """The files of a data set, without their pixels. Each file is in exactly one of the four parts."""

    root: Path  # what paths are relative to
    paths: list[str]  # [N] with "/", ascending
    label: Tensor  # int64 [N], -1 where unlabeled; of several labels int8 [N, C]: 1, 0, or -1 where unknown
    labeled: Tensor  # int64 [L] into paths, ascending; likewise
    unlabeled: Tensor  # [U]
    test: Tensor  # [M]
    classes: list[str]  # by name, or by number where all are numbers; label counts into them
    notes: list[str]  # sentences for the user
    listing: Listing | None = None  # what it was drawn from
    val: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))  # [V] likewise, often none


def listing(root: str | Path, wanted: Wanted = IMAGES) -> Listing:
    """Finds the files of `root`, as `scan` does, and leaves it to the caller to judge whether they are enough.

    Raises ValueError with one sentence where `root` is not there, or is no such folder or table.
    """
    place = home(root)
    notes: list[str] = []
    problems: list[str] = []
    several = False
    if os.path.isdir(place):
        base, rows = place, _folders(place, wanted, notes, problems)
    elif os.path.isfile(place):
        several = has_several(place)
        base, rows = place.parent, read_table(place, notes, problems, several=several)
    else:
        raise ValueError(f"there is no folder or CSV file {str(place)!r}")
    classes = classes_of(str(place), rows.values(), notes, problems, wanted.noun, several=several)
    return Listing(base, rows, classes, notes, problems, several, wanted.noun)


def scan(root: str | Path, *, test_share: float = 0.2, seed: int = 0, wanted: Wanted = IMAGES) -> Folder:
    """Finds the images or clips of `root`; none is opened, unless to compare two files of one size.

    root  a folder with labeled/<class>/, unlabeled/ and perhaps val/<class>/ and test/<class>/, each with its images at
          any depth;
          or a CSV file as `read_table` describes it

    Hidden files and files that are no images by their suffix are ignored; links are followed, loops of them are not.
    Without test images, `test_share` of the labeled ones of each class is held out: at least one, never all, drawn
    by `seed` and the names alone, so that further images hardly change it; equal files stay together.

    Raises ValueError with one sentence where no run could follow: a part or a class without an image, a class of val or
    test that is not in labeled, a row that contradicts itself. What a run survives (a test image that is labeled too,
    one image in two classes, what was left out) becomes a note.
    """
    if not 0 < test_share < 1:
        raise ValueError(f"test_share must be above 0 and below 1, got {test_share}")
    where, found = str(home(root)), listing(root, wanted)
    if found.problems:
        raise ValueError(found.problems[0])
    rows, classes, notes = found.rows, found.classes, list(found.notes)
    paths = sorted(rows)
    label = labels_of([rows[path][1] for path in paths], classes, several=found.several).numpy()
    known = np.any((label >= 0).reshape(len(label), -1), axis=1)
    part = np.fromiter((PARTS.index(rows[path][0]) for path in paths), np.int8, len(paths))
    content = same_content(found.base, paths, np.asarray(known))
    if not (part == 2).any():
        drawn_from = np.where((part == 0).reshape(-1, *[1] * (label.ndim - 1)), label, -1)
        part[held_out(where, paths, drawn_from, content, classes, test_share, seed, notes, wanted.noun)] = 2
    labeled, unlabeled, test, val = (np.flatnonzero(part == p) for p in range(len(PARTS)))
    parts = labeled, unlabeled, test, val
    notes += notes_on_equal_images(lambda i: repr(paths[i]), label, content, *parts, noun=wanted.noun)
    return Folder(
        found.base,
        paths,
        torch.from_numpy(label),
        torch.from_numpy(labeled),
        torch.from_numpy(unlabeled),
        torch.from_numpy(test),
        classes,
        notes,
        found,
        torch.from_numpy(val),
    )


def labels_of(texts: Sequence[str], classes: Sequence[str], *, several: bool) -> Tensor:
    """Of rows' names the numbers int64 [N], -1 where there is none; of several names marks int8 [N, C]."""
    number = {name: c for c, name in enumerate(classes)}
    if several:
        return torch.from_numpy(np.stack([marks_of(text, number) for text in texts]))
    return torch.tensor([number.get(text, -1) for text in texts], dtype=torch.int64)


def leave_out(folder: Folder, damaged: Mapping[int, str]) -> Folder:
    """The folder without these files, given by their place in `paths` with a sentence on each.

    Raises ValueError if a class is left without labeled images, or no image of another part is left.
    """
    if not damaged:
        return folder
    where = repr(str(folder.root))
    noun = folder.listing.noun if folder.listing else "image"
    keep = torch.ones(len(folder.paths), dtype=torch.bool)
    keep[list(damaged)] = False
    given = folder.label[folder.labeled]
    needed = {
        f"labeled {noun} of class {name!r}": folder.labeled[
            given == c if given.ndim == 1 else given[:, c] == 1
        ]
        for c, name in enumerate(folder.classes)
    }
    needed |= {f"unlabeled {noun}": folder.unlabeled} if len(folder.unlabeled) else {}
    needed |= {f"test {noun}": folder.test}
    needed |= {f"validation {noun}": folder.val} if len(folder.val) else {}
    for what, index in needed.items():
        if not keep[index].any():
            raise ValueError(f"no {what} in {where} can be read: {damaged[int(index[0])]}")
    place = keep.cumsum(0) - 1
    labeled, unlabeled, test, val = (
        place[index[keep[index]]] for index in (folder.labeled, folder.unlabeled, folder.test, folder.val)
    )
    paths = [path for path, kept in zip(folder.paths, keep.tolist(), strict=True) if kept]
    note = f"{many(len(damaged), 'damaged file')} left out, such as {damaged[min(damaged)]}"
    notes = [*folder.notes, note]
    label, classes = folder.label[keep], folder.classes
    return Folder(folder.root, paths, label, labeled, unlabeled, test, classes, notes, folder.listing, val)


# --- folders ------------------------------------------------------------------------------------------------


def _folders(root: Path, wanted: Wanted, notes: list[str], problems: list[str]) -> Rows:
    where, images = repr(str(root)), f"{wanted.noun}s"
    there, stray = _folders_in(root, "", wanted)
    if lacking := [part for part in (LABELED, UNLABELED) if part not in there]:
        problems.append(
            f"{where} must have the folders labeled/<class>/ and unlabeled/, "
            f"it lacks {' and '.join(lacking)} and has {', '.join(map(repr, there)) or 'no folder'}"
        )
    if others := [name for name in there if name not in PARTS]:
        some = ", ".join(map(repr, others[:5]))
        notes.append(f"{where} has other folders, which are not read: {some}{', ...' * (len(others) > 5)}")
    ignored: Counter[str] = Counter()
    rows: Rows = {}
    if UNLABELED in there:
        unread: Counter[str] = Counter()
        row: Row = (UNLABELED, "")  # one for all
        rows |= dict.fromkeys(_files_below(root, UNLABELED, wanted, unread, notes), row)
        if not rows and unread:
            problems.append(
                f"{where} has no unlabeled {images} that can be read: {_unread('unlabeled/', unread, wanted)}"
            )
        ignored += unread
    for part in (LABELED, TEST, VAL):
        if part not in there:
            continue
        names, stray_here = _folders_in(root, part, wanted)
        unread_in_part: Counter[str] = Counter()
        for name in names:
            before, unread = len(notes), Counter()
            found = _files_below(root, f"{part}/{name}", wanted, unread, notes)
            unread_in_part += unread
            if not found and len(notes) > before:
                problems.append(f"{where}: {notes[-1].removesuffix(' and is left out')}")
            elif not found:
                place = repr(f"{part}/{name}")
                empty = f"class folder {place} of {where} has no {images}"
                if unread:
                    empty += f" that can be read: {_unread(f'{part}/{name}', unread, wanted)}"
                if part == LABELED:
                    problems.append(empty if unread else f"{empty}: put some there or delete it")
                else:
                    notes.append(empty)
            row = (part, name)
            rows |= dict.fromkeys(found, row)
        ignored += unread_in_part
        if part != LABELED and not any(row[0] == part for row in rows.values()):
            problems.append(
                f"{part}/ of {where} has no {images} in class folders: "
                + (_unread(f"{part}/", unread_in_part, wanted) if unread_in_part else "put some there")
                + (f", or delete it to have labeled {images} held out" if part == TEST else ", or delete it")
            )
        stray += stray_here
    if stray:
        notes.append(
            f"{many(len(stray), wanted.noun)} outside of any class left out, the first: {stray[0]!r}"
        )
    if ignored:
        notes.append(f"{many(ignored.total(), 'file')} ignored for the suffix: {suffixes(ignored)}")
    return rows


def _unread(place: str, unread: Counter[str], wanted: Wanted) -> str:
    """What to do with files of suffixes that are not read."""
    clips = wanted is IMAGES and unread.keys() <= video.SUFFIXES
    return (
        f"{place!r} has {many(unread.total(), 'file')} of kinds that are not read ({suffixes(unread)}); "
        + ("set data.frames, which reads clips" if clips else f"convert them to {wanted.instead}")
    )


def seen_by_people(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in _NOBODYS


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _folders_in(root: Path, part: str, wanted: Wanted) -> tuple[list[str], list[str]]:
    """Names of the folders in root/part, ascending, and paths of the wanted files that lie directly in it."""
    try:
        names = sorted(filter(seen_by_people, os.listdir(root / part)))
    except OSError as error:
        raise ValueError(f"{str(root / part)!r} cannot be read ({error.strerror})") from error
    folders = [name for name in names if os.path.isdir(root / part / name)]
    others = set(names).difference(folders)
    return folders, sorted(posixpath.join(part, name) for name in others if _suffix(name) in wanted.suffixes)


def _files_below(root: Path, part: str, wanted: Wanted, ignored: Counter[str], notes: list[str]) -> list[str]:
    """Paths of the wanted files at any depth below root/part; `ignored` counts the suffixes of other files.

    A real folder is read once, under its own name before that of a link, and none that holds root/part itself.
    """
    real_part, above = Path(os.path.realpath(root / part)), Path(os.path.realpath((root / part).parent))
    seen = {_identity(folder) for folder in (*real_part.parents, above, *above.parents)}
    found: list[str] = []
    real, links = [part], list[str]()
    while real or links:
        folder = real.pop() if real else links.pop(0)
        try:
            identity = _identity(root / folder)
            if identity in seen:
                continue
            seen.add(identity)
            with os.scandir(root / folder) as entries:
                inside = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            notes.append(f"folder {folder!r} cannot be read ({error.strerror}) and is left out")
            continue
        for entry in filter(lambda entry: seen_by_people(entry.name), inside):
            path = f"{folder}/{entry.name}"
            if entry.is_symlink() and os.path.isdir(entry.path):
                links.append(path)
            elif entry.is_dir(follow_symlinks=False):
                real.append(path)
            elif _suffix(entry.name) not in wanted.suffixes:
                ignored[_suffix(entry.name)] += 1
            elif entry.is_symlink() or entry.is_file():  # a link to nothing counts: it is to be found damaged
                found.append(path)
    return found


def _identity(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino
