"""Equal images, of equal bytes or pixels: one that is labeled and tested, or in two classes, makes numbers untrue."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ups_fast.data.image_set import ImageSet
from ups_fast.words import many

# Size, times of change of content and of entry in ns, inode: kept by what stays.
Stamp = tuple[int, int, int, int]
GONE: Stamp = (-1, -1, -1, -1)
_HEAD = 1 << 16  # bytes of a file that are compared before all of it


def same_content(base: Path, paths: list[str], known: np.ndarray) -> np.ndarray:  # bool [N] -> int64 [N]
    """For each file the place of the first with the same bytes, itself if none.

    Only files that have the size of a labeled or test one (`known`) are opened, and read to their ends only if they
    begin alike; unlabeled files are not compared with each other.
    """
    names = [os.path.join(base, path) for path in paths]
    sizes = np.fromiter((stamp(name)[0] for name in names), np.int64, len(names))

    def alike(group: Iterable[int], key: Callable[[int], object]) -> list[list[int]]:
        found = defaultdict(list)
        for i in group:
            if (k := key(i)) is not None:
                found[k].append(i)
        return [same for same in found.values() if len(same) > 1 and known[same].any()]

    content = np.arange(len(names))
    candidates = np.flatnonzero((sizes > 0) & np.isin(sizes, sizes[known]))
    for size in alike(candidates.tolist(), sizes.item):
        for head in alike(size, lambda i: _digest(names[i], _HEAD)):
            whole = [head] if sizes[head[0]] <= _HEAD else alike(head, lambda i: _digest(names[i], None))
            for same in whole:
                content[same] = same[0]
    return content


def stamp(name: str) -> Stamp:
    """GONE where there is no regular file."""
    try:
        status = os.stat(name)
    except (OSError, ValueError):
        return GONE
    if not stat.S_ISREG(status.st_mode):
        return GONE
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _digest(name: str, limit: int | None) -> bytes | None:
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(name, "rb") as file:
            while piece := file.read(limit or 1 << 20):
                digest.update(piece)
                if limit:
                    break
    except OSError:
        return None
    return digest.digest()


def file_digest(name: str) -> str:
    """A number of 128 bits, in hex, of all bytes of a file; empty where it cannot be read."""
    return (_digest(name, None) or b"").hex()


def row_digests(images: Tensor) -> np.ndarray:  # [N, ...], on the CPU -> uint64 [N]
    """A number for each image that equal pixels have in common."""
    rows = images.flatten(1).contiguous().view(torch.uint8).numpy()
    each = b"".join(hashlib.blake2b(row.data, digest_size=8).digest() for row in rows)
    return np.frombuffer(each, dtype="<u8")


def notes_on_equal_images(
    name: Callable[[int], str],
    label: np.ndarray,  # [N], -1 where unknown; or [N, C]: 1, 0, -1
    content: np.ndarray,  # [N], the same number for equal images
    labeled: np.ndarray,  # indices into these, likewise
    unlabeled: np.ndarray,
    test: np.ndarray,
    val: np.ndarray | None = None,
    noun: str = "image",
) -> list[str]:
    """What is to be said of equal images; `name` gives an image's name for a sentence."""
    notes: list[str] = []

    def note(what: str, some: np.ndarray, others: np.ndarray, so: str, *, apart: bool = False) -> None:
        """Of pairs from `some` and `others`; `apart`: only those of two classes."""
        some = some[np.isin(content[some], content[others])]
        first = {content[j]: j for j in others[np.isin(content[others], content[some])][::-1].tolist()}
        pairs = [(first[content[i]], i) for i in some.tolist()]
        if pairs := [(j, i) for j, i in pairs if not apart or _contradict(label[i], label[j])]:
            j, i = pairs[0]
            notes.append(f"{many(len(pairs), what)} {so} (such as {name(i)} and {name(j)})")

    val = labeled[:0] if val is None else val
    known = np.union1d(np.union1d(labeled, test), val)
    other = "another class" if label.ndim == 1 else "other classes"
    note(f"test {noun}", test, labeled, "equal to labeled ones: the test accuracy will look too good")
    note(f"test {noun}", test, val, f"equal to validation {noun}s: the test accuracy will look too good")
    note(
        f"validation {noun}",
        val,
        labeled,
        "equal to labeled ones: the validation accuracy will look too good",
    )
    note(f"{noun}", known, known, f"equal to ones of {other}: one of the two labels is wrong", apart=True)
    note(
        f"unlabeled {noun}", unlabeled, test, f"equal to test {noun}s: the test is not only of unseen {noun}s"
    )
    validation = f"equal to validation {noun}s: the validation is not only of unseen {noun}s"
    note(f"unlabeled {noun}", unlabeled, val, validation)
    note(f"unlabeled {noun}", unlabeled, labeled, "equal to labeled ones: they count twice")
    return notes


def _contradict(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two labels cannot both be right; of several labels some may be unknown."""
    return bool(a != b) if a.ndim == 0 else bool(((a != b) & (a >= 0) & (b >= 0)).any())


def notes_on_equal_arrays(data: ImageSet, labeled: Tensor) -> list[str]:
    """What is to be said of equal images; `labeled` are the labeled ones of the training set."""
    n, k = len(data.train_labels), 0 if data.labeled is None else len(data.labeled)
    val = np.zeros(0, np.int64) if data.val is None else data.val.numpy()
    first_val = n - len(val)  # of arrays that the user gives, they are the last

    names = None if data.names is None else [*data.names, *(data.test_names or [])]

    def name(i: int) -> str:
        if names:
            return repr(names[i])
        if data.labeled is None:
            return f"test image {i - n}" if i >= n else f"training image {i}"
        starts = {"x_test": n, "x_val": first_val, "x_unlabeled": k, "x_labeled": 0}
        array, start = next((array, start) for array, start in starts.items() if i >= start)
        return f"{array}[{i - start}]"

    train = np.ones(n, bool)
    train[labeled.numpy()] = False
    train[val] = False
    return notes_on_equal_images(
        name,
        torch.cat([data.train_labels, data.test_labels]).numpy(),
        np.concatenate([row_digests(data.train_images), row_digests(data.test_images)]),
        labeled.numpy(),
        np.flatnonzero(train),
        np.arange(n, n + len(data.test_labels)),
        val,
        data.noun,
    )
