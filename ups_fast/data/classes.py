"""Names of classes as people write them: their order, those that look alike, and how many images each has."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal

import torch
from torch import Tensor

from ups_fast.words import are, many

CONSOLE = 20  # classes that the console lists; the report lists all
UNEVEN = 5  # times as many labeled images in one class as in another: worth a sentence

_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?|[+-]?\.[0-9]+")
_WRITTEN = re.compile(r"[+-]?([0-9]+([.,][0-9]*)?|[.,][0-9]+)(e[+-]?[0-9]{1,3})?")  # as spreadsheets may, too
# Cyrillic and Greek letters that look Latin.
_TWINS = str.maketrans(
    "\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0456\u0458\u0455\u03bf\u03b1\u03bd", "aeopcyxijsoav"
)
# What spreadsheets, data frames and people write where they have no label.
_MISSING = {
    *("nan", "na", "n/a", "n.a.", "<na>", "#n/a", "nat", "null", "nil", "none", "undefined", "unknown", "missing"),
    *("unlabeled", "unlabelled", "unassigned", "empty", "blank", "tbd", "todo", "-", "--", "?", "??", "???"),
    *("-1", "-1.0", "#ref!", "#value!", "#name?", "#null!"),
}  # fmt: skip


def class_order(names: Iterable[str]) -> list[str]:
    """Ascending without repeats: as numbers where all of them are numbers, else as text."""
    each = set(names)
    if each and all(map(_NUMBER.fullmatch, each)):
        return sorted(each, key=lambda name: (Decimal(name), name))
    return sorted(each)


def lookalikes(counts: Mapping[str, int], noun: str = "image") -> list[str]:
    """Sentences on classes that may be a mistake; `counts` are the images of each that have a label."""
    notes = [
        f"{many(n, noun)} {are(n)} of class {name!r}: if that means no label, leave the "
        "label empty (in folders: move the images to unlabeled/)"
        for name, n in counts.items()
        if _folded(name) in _MISSING
    ]
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for name in counts:
        alike[_key(name)].append(name)
    groups = [names for names in alike.values() if len(names) > 1]
    notes += [
        f"classes {_listed(names)} look alike: if they are one class, give it one name"
        for names in groups[:5]
    ]
    typos = sorted(_typos(counts, {name for names in groups for name in names}))
    notes += [
        f"class {rare!r} ({many(counts[rare], noun)}) differs from {name!r} ({counts[name]:,}) in one letter: "
        "if it is a typing error, correct it"
        for rare, name in typos[:5]
    ]
    if more := max(0, len(groups) - 5) + max(0, len(typos) - 5):
        notes.append(f"{more:,} more classes look alike")
    return notes


def _folded(name: str) -> str:
    """Without what cannot be seen: forms of Unicode, case, outer and repeated blanks, invisible characters."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    text = "".join(c for c in text if c.isspace() or unicodedata.category(c) not in ("Cf", "Cc"))
    return " ".join(text.split())


def _key(name: str) -> str:
    """Equal for names that look alike: `0` and `0.0` or `0,0`, `1` and `01` or `1E+00`, `cat` and `Cat` or one with
    letters of another script, `black cat` and `black_cat`."""
    text = _folded(name)
    if _WRITTEN.fullmatch(text):
        return f"= {Decimal(text.replace(',', '.')).normalize() + 0}"  # + 0: -0 is 0
    text = text.translate(_TWINS)
    return " ".join(re.split(r"[\s_-]+", text)) if re.search(r"\w", text) else text


def _typos(counts: Mapping[str, int], known: set[str]) -> Iterator[tuple[str, str]]:
    """Pairs of a rare class and a frequent one that differ in one letter."""
    near: defaultdict[str, list[str]] = defaultdict(list)
    for name in counts:
        if len(name) >= 5 and name not in known:
            for key in {name, *(name[:i] + name[i + 1 :] for i in range(len(name)))}:
                near[key].append(name)
    seen: set[str] = set()
    for names in near.values():
        name = max(names, key=lambda each: (counts[each], each))
        for rare in sorted(names):
            letters = [*(Counter(rare) - Counter(name)), *(Counter(name) - Counter(rare))]
            apart = len(rare) != len(name) or sum(a != b for a, b in zip(rare, name, strict=True)) == 1
            fits = rare != name and apart and not any(map(str.isdigit, letters))
            if fits and rare not in seen and counts[name] >= 10 * counts[rare] and counts[rare] <= 2:
                seen.add(rare)
                yield rare, name


def class_counts(labels: Tensor, n_classes: int) -> list[int]:  # int64 [N], -1 where unknown; or int8 [N, C]
    """How many labels each class has."""
    if labels.ndim == 2:
        return (labels == 1).sum(0).tolist()
    return torch.bincount(labels[labels >= 0], minlength=n_classes).tolist()


def classes_line(
    classes: Sequence[str],
    labeled: Sequence[int],
    test: Sequence[int],
    val: Sequence[int] | None = None,
    noun: str = "image",
) -> str:
    """The classes with their counts of samples, for a console: of many the first CONSOLE."""
    counts = [labeled, test] if val is None else [labeled, val, test]
    parts = "labeled + test" if val is None else "labeled + validation + test"
    each = [
        f"{name!r} {' + '.join(f'{n:,}' for n in some)}" for name, *some in zip(classes, *counts, strict=True)
    ]
    more = f" and {len(each) - CONSOLE:,} more, which the report lists" if len(each) > CONSOLE else ""
    return f"classes ({parts} {noun}s): {', '.join(each[:CONSOLE])}{more}"


def uneven(classes: Sequence[str], labeled: Sequence[int]) -> str:
    """A sentence where the labels of one class are UNEVEN times those of another; else empty."""
    most, least = (f(range(len(classes)), key=labeled.__getitem__) for f in (max, min))
    if not labeled[most] or labeled[most] < UNEVEN * labeled[least]:
        return ""
    return (
        f"the labels are uneven: {labeled[most]:,} of class {classes[most]!r}, {labeled[least]:,} of class "
        f"{classes[least]!r}. Look at the recall of each class, because the accuracy hides the small ones"
    )


def suffixes(counts: Counter[str], most: int = 5) -> str:
    """Such as "3 '.heic', 1 without one", the most frequent first."""
    first = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    more = f", {sum(n for _, n in first[most:]):,} others" if len(first) > most else ""
    return (
        ", ".join(f"{n:,} {repr(suffix) if suffix else 'without one'}" for suffix, n in first[:most]) + more
    )


def _listed(names: Sequence[str], most: int = 5) -> str:
    seen = {unicodedata.normalize("NFC", name).translate(_TWINS) for name in names}
    said = ascii if len(seen) < len(names) else repr  # two forms of one letter look the same
    some = [said(name) for name in names[:most]]
    if len(names) > most:
        return f"{', '.join(some)} and {len(names) - most:,} more"
    return f"{', '.join(some[:-1])} and {some[-1]}"
