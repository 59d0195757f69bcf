"""The user's own arrays, mostly in an .npz file: checked before memory is taken, and read into an ImageSet.

`read_arrays` reads images, `read_features` rows of numbers.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from ups_fast.data.features import column_moments, constant_columns, must_be_finite
from ups_fast.data.image_set import ImageSet, moments
from ups_fast.data.label_sets import check_marks, marks, notes_on_classes
from ups_fast.data.labeled_rows import read_labeled_rows
from ups_fast.data.npy import Header, member_header, members_of, one_kind, read_into
from ups_fast.data.row_files import SUFFIXES, either, is_row_file
from ups_fast.machine import memory_bytes
from ups_fast.words import line_of, many

_ARRAYS = ("x_labeled", "y_labeled", "x_unlabeled", "x_test", "y_test")
_OPTIONAL = ("y_unlabeled", "x_val", "y_val")
_TRAIN = ("x_labeled", "x_unlabeled", "x_val")  # they become one array


def read_arrays(path: Path) -> ImageSet:
    """An .npz file as `load_set` describes it. Raises ValueError or FileNotFoundError with one sentence."""
    data = _read(path, "npz", _images, "all images must have one size and number of channels")
    seen = data.train_images[: len(data.train_images) - (0 if data.val is None else len(data.val))]
    mean, std = moments(seen)
    return replace(data, mean=mean, std=std)


def read_features(path: Path, *, test_share: float = 0.2, seed: int = 0) -> ImageSet:
    """The same of features, standardized by the labeled and unlabeled rows together; or as `read_labeled_rows`."""
    if path.exists() and not is_row_file(path):
        raise ValueError(f"data.root must be a file of features, {either(SUFFIXES)}, got {str(path)!r}")
    if path.suffix.lower() == ".npz":
        data = _read(path, "features", _rows, "all rows must have the same number of columns")
    else:
        data = read_labeled_rows(path, test_share, seed)
    seen = data.train_images[: len(data.train_images) - (0 if data.val is None else len(data.val))]
    mean, std = column_moments(seen)
    notes = data.notes
    if constant := constant_columns(seen):
        of = many(seen.shape[1], "column")
        if constant == seen.shape[1]:
            raise ValueError(f"none of {of} has two values in the training rows: nothing can be learned")
        have, tell = ("has", "tells") if constant == 1 else ("have", "tell")
        notes += (f"{constant:,} of {of} {have} one value in all training rows and {tell} nothing",)
    return replace(data, mean=mean, std=std, notes=notes)


def _read(
    path: Path, name: str, samples: Callable[[dict[str, np.ndarray], str], Tensor], alike: str
) -> ImageSet:
    arrays, whole = _checked(path)
    x_labeled, x_unlabeled, x_test = (samples(arrays, key) for key in ("x_labeled", "x_unlabeled", "x_test"))
    x_val = samples(arrays, "x_val") if "x_val" in arrays else x_labeled[:0]
    for key, images in (("x_unlabeled", x_unlabeled), ("x_test", x_test), ("x_val", x_val)):
        if images.shape[1:] != x_labeled.shape[1:]:
            raise ValueError(f"{alike}, got x_labeled {list(x_labeled.shape)} and {key} {list(images.shape)}")

    sizes = {
        "y_labeled": len(x_labeled),
        "y_test": len(x_test),
        "y_val": len(x_val),
        "y_unlabeled": len(x_unlabeled),
    }
    sizes = {key: size for key, size in sizes.items() if key in arrays}
    read = _label_sets if arrays["y_labeled"].ndim == 2 else _classes
    n_classes, labels, notes = read(arrays, sizes)
    y_labeled = labels["y_labeled"]
    y_val = labels.get("y_val", y_labeled[:0])
    y_unlabeled = y_labeled.new_full((len(x_unlabeled), *y_labeled.shape[1:]), -1)
    y_unlabeled = labels.get("y_unlabeled", y_unlabeled)

    n = len(x_labeled) + len(x_unlabeled)
    if whole is None:
        train_images = torch.cat([x_labeled, x_unlabeled, x_val])
    else:
        train_images = torch.from_numpy(whole).view(-1, *x_labeled.shape[1:])
    return ImageSet(
        name,
        [str(c) for c in range(n_classes)],
        train_images,
        torch.cat([y_labeled, y_unlabeled, y_val]),
        x_test,
        labels["y_test"],
        (),
        (),
        labeled=torch.arange(len(x_labeled)),
        val=torch.arange(n, n + len(x_val)) if len(x_val) else None,
        notes=tuple(notes),
    )


def _classes(
    arrays: dict[str, np.ndarray], sizes: dict[str, int]
) -> tuple[int, dict[str, Tensor], list[str]]:
    """How many classes there are, and a label for each image."""
    labels = {key: _labels(arrays, key, n, lowest=-(key == "y_unlabeled")) for key, n in sizes.items()}
    known = set(labels["y_labeled"].tolist())
    n_classes = max(known) + 1
    if missing := list(islice((c for c in range(n_classes) if c not in known), 5)):
        some = ", ".join(map(str, missing))
        raise ValueError(f"y_labeled must hold every class of 0..{n_classes - 1}, got none of class {some}")
    if n_classes < 2:
        raise ValueError("y_labeled must hold at least two classes, got only class 0")
    for key, each in labels.items():
        if strange := each[each >= n_classes].unique().tolist():
            some = ", ".join(map(str, strange[:5]))
            raise ValueError(f"{key} has class {some}, of which x_labeled has no image")
    return n_classes, labels, []


def _label_sets(
    arrays: dict[str, np.ndarray], sizes: dict[str, int]
) -> tuple[int, dict[str, Tensor], list[str]]:
    """How many classes there are, a mark for each image and class, and sentences for the user."""
    labels = {}
    n_classes = arrays["y_labeled"].shape[1]
    for key, n in sizes.items():
        array = arrays[key]
        if key == "y_unlabeled" and array.ndim == 1 and (array == -1).all():
            array = np.full((len(array), n_classes), -1, np.int8)
        labels[key] = marks(array, key)
        _one_each(array, key, n)
        if array.shape[1] != n_classes:
            raise ValueError(
                f"{key} must have the {n_classes} columns of y_labeled, a class each, got {list(array.shape)}"
            )
        if key != "y_unlabeled":
            check_marks(labels[key], key)
    names = [str(c) for c in range(n_classes)]
    return n_classes, labels, notes_on_classes(labels["y_labeled"], names, "y_labeled")


def _one_each(array: np.ndarray, key: str, n: int) -> None:
    if len(array) != n:
        raise ValueError(f"{key} must have one label for each image of x{key[1:]}, got {len(array)} for {n}")


def _checked(path: Path) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """The file's arrays by name, the expected ones and no others. Nothing is ever unpickled.

    The second result is the one array in whose memory those of `_TRAIN` lie, one behind the other; None where they
    are not of one kind.

    What the archive and the arrays' headers claim is held against the file, and against memory, before an array is
    made.
    """
    arrays: dict[str, np.ndarray] = {}
    whole: np.ndarray | None = None
    place = ""
    if not path.exists():
        raise FileNotFoundError(f"there is no file {str(path)!r} (data.root)")
    try:
        if not path.is_file():
            raise ValueError("it is a folder" if path.is_dir() else "it is no regular file")
        with open(path, "rb") as start:
            if start.read(2) != b"PK":
                raise ValueError("it is not an .npz archive")
        with zipfile.ZipFile(path) as archive:
            members = members_of(archive)
            if lacking := [key for key in _ARRAYS if key not in members]:
                _refused(path, f"lacks {', '.join(lacking)}; it has {', '.join(members) or 'nothing'}")
            known = (*_ARRAYS, *_OPTIONAL)
            if unknown := [key for key in members if key not in known]:
                said = f"{', '.join(known[:-1])} and {known[-1]}"
                _refused(path, f"has {', '.join(unknown)}; known arrays are {said}")
            if ("x_val" in members) != ("y_val" in members):
                got, other = ("x_val", "y_val") if "x_val" in members else ("y_val", "x_val")
                _refused(path, f"has {got} but lacks {other}: give both or neither")
            headers = {}
            for key, member in members.items():
                place = f" at {key}"
                headers[key] = member_header(archive, member)
            place, train = "", {key: headers[key] for key in _TRAIN if key in headers}
            alike = one_kind(list(train.values()))
            needed = sum(each.nbytes for each in (*headers.values(), *(() if alike else train.values())))
            if needed > memory_bytes():
                raise MemoryError
            if alike:
                whole, arrays = _one_array(train)
            for key, member in members.items():
                place = f" at {key}"
                if key in arrays:
                    read_into(archive, member, arrays[key])
                else:
                    with archive.open(member) as file:
                        arrays[key] = np.lib.format.read_array(file, allow_pickle=False)
    except MemoryError:
        raise ValueError(
            f"the arrays of {str(path)!r} (data.root) take {needed / 2**30:,.1f} GiB to read, and this machine has "
            f"{memory_bytes() / 2**30:,.1f}: keep fewer or smaller images in x_unlabeled, or store them as image files "
            "for data.name=folder, which need not be in memory"
        ) from None
    except _Refused:
        raise
    except Exception as error:  # whatever a stranger's bytes may cause
        raise ValueError(
            f"data.root must be an .npz file of plain arrays, got {str(path)!r}{place}: {line_of(error)}"
        ) from error
    return arrays, whole


def _one_array(headers: dict[str, Header]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """An array for all of them, and the part of each."""
    lengths, first = [each.shape[0] for each in headers.values()], next(iter(headers.values()))
    whole = np.empty((sum(lengths), *first.shape[1:]), first.dtype)
    return whole, dict(zip(headers, np.split(whole, np.cumsum(lengths)[:-1]), strict=True))


class _Refused(ValueError):
    """The archive is sound, and is not what is asked for."""


def _refused(path: Path, why: str) -> NoReturn:
    raise _Refused(f"{str(path)!r} (data.root) {why}")


def _images(arrays: dict[str, np.ndarray], key: str) -> Tensor:  # [N, H, W, C] or [N, T, H, W, C] uint8
    array = arrays[key]
    got = f"{array.dtype} {list(array.shape)}"
    channels_last = array.ndim in (4, 5) and array.shape[-1] in (1, 3)
    if array.ndim == 4 and array.shape[1] in (1, 3) and not channels_last:
        raise ValueError(f"{key} must have its channels last, got {got}: use {key}.transpose(0, 2, 3, 1)")
    if array.ndim == 5 and not channels_last and 3 in array.shape[1:3]:
        order = "(0, 2, 3, 4, 1)" if array.shape[1] == 3 else "(0, 1, 3, 4, 2)"
        raise ValueError(f"{key} must have its channels last, got {got}: use {key}.transpose{order}")
    if array.dtype != np.uint8 or not (array.ndim == 3 or channels_last):
        kinds = "images [N, H, W], [N, H, W, 1] or [N, H, W, 3]"
        kinds = "clips [N, T, H, W, 1] or [N, T, H, W, 3]" if array.ndim == 5 else kinds
        raise ValueError(f"{key} must be uint8 {kinds}, got {got}")
    if array.size == 0:
        raise ValueError(f"{key} must not be empty, got {got}")
    if array.ndim == 5 and array.shape[1] == 1:
        raise ValueError(f"{key} must be clips of at least two frames, got {got}: use {key}[:, 0] as images")
    images = torch.from_numpy(np.ascontiguousarray(array))
    return images.unsqueeze(-1) if images.ndim == 3 else images


def _rows(arrays: dict[str, np.ndarray], key: str) -> Tensor:  # [N, d] float32 or float16
    array = arrays[key]
    got = f"{array.dtype} {list(array.shape)}"
    if array.ndim != 2 or array.dtype not in (np.float16, np.float32):
        more = ""
        if array.ndim == 2:
            more = f": use {key}.astype(np.float32)"
        elif array.dtype == np.uint8:
            more = "; images are data.name=npz"
        raise ValueError(f"{key} must be features, float32 or float16 [N, d], got {got}{more}")
    if array.size == 0:
        raise ValueError(f"{key} must not be empty, got {got}")
    rows = torch.from_numpy(np.ascontiguousarray(array))
    must_be_finite(rows, key)
    return rows


def _labels(arrays: dict[str, np.ndarray], key: str, n_images: int, lowest: int) -> Tensor:  # [N] int64
    array = arrays[key]
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise ValueError(f"{key} must be integer labels [N], got {array.dtype} {list(array.shape)}")
    _one_each(array, key, n_images)
    if array.min() < lowest:
        raise ValueError(f"{key} must be at least {lowest}, got {array.min()}")
    if array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{key} must be at most 2**63 - 1, got {array.max()}")
    return torch.from_numpy(array.astype(np.int64))
