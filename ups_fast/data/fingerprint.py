"""What tells data sets apart: a line for the checkpoint, and of arrays a hash and a label for each image.

By these a run notices that its data are others, and says in words what has changed.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ups_fast.data.equal import row_digests
from ups_fast.data.image_set import ImageSet
from ups_fast.files import load_arrays, read_bytes


def fingerprint(data: ImageSet, weights: str = "") -> str:
    """Tells data sets apart, in a line: sizes for people, and of each part a hash.

    weights  the file of pretrained weights, if there is one: a run that went on with others would be another
    """
    parts: dict[str, bytes] = {"classes": json.dumps(data.classes).encode()}
    files = data.manifest
    if data.names is not None:
        names = files.paths if files else [*data.names, *(data.test_names or ())]
        parts["files"] = "\0".join(names).encode("utf-8", "surrogateescape")
    if files is not None:
        parts["content of the files"] = "".join(files.digests).encode()
        parts["mean and std"] = repr((files.mean, files.std)).encode()
    elif not data.in_files:
        parts["training images"], parts["test images"] = content_of(data), content_of(data, test=True)
    parts["training labels"] = data.train_labels.numpy().tobytes()
    parts["test labels"] = data.test_labels.numpy().tobytes()
    parts["labeled part"] = b"" if data.labeled is None else data.labeled.numpy().tobytes()
    if data.val is not None:
        parts["validation part"] = data.val.numpy().tobytes()
    if weights:
        parts["pretrained weights"] = read_bytes(weights)
    n_val = 0 if data.val is None else len(data.val)
    sizes = f"{len(data.train_labels) - n_val} training and {len(data.test_labels)} test images"
    sizes = sizes.replace(" and ", f", {n_val} validation and ") if n_val else sizes
    return f"{sizes}; {', '.join(f'{name} {_hash(content).hex()}' for name, content in parts.items())}"


def content_of(data: ImageSet, *, test: bool = False) -> bytes:
    """Tells the images of a part from others, in their order; empty where nothing is known of their bytes."""
    images, files = data.test_images if test else data.train_images, data.manifest
    if not data.in_files:
        return repr(list(images.shape)).encode() + _hash(images.contiguous().numpy().data)
    if files is None:
        return b""
    digests = files.digests[files.train :] if test else files.digests[: files.train]
    return repr(list(images.shape[1:])).encode() + "".join(digests).encode()


def _hash(content: bytes | memoryview) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def array_record(data: ImageSet) -> dict[str, Tensor]:
    """A hash (int64) and a label for each image, kept by a run so that it can count what changes later."""
    images = {"train": data.train_images, "test": data.test_images}
    record = {
        name: torch.from_numpy(row_digests(each).view(np.int64).copy()) for name, each in images.items()
    }
    return {**record, "train_labels": data.train_labels, "test_labels": data.test_labels}


def differences(data: ImageSet, now: str, then: str, record: Path) -> str:
    """In words, what differs between two fingerprints, `now` that of `data`; counted, where the run has a `record`."""
    before, after = _parts(then), _parts(now)
    parts = [name for name in {**after, **before} if before.get(name) != after.get(name)]
    counted = _counted(data, record)
    said = [counted.pop(part, "") or f"other {part}" for part in parts]
    sizes, sizes_then = (each.split("; ")[0] for each in (now, then))
    sizes = sizes if sizes == sizes_then else f"now {sizes}, then {sizes_then}"
    return f"{', '.join(said) or 'other data'} ({sizes})"


def _parts(line: str) -> dict[str, str]:
    return {
        name: hash_ for name, _, hash_ in (part.rpartition(" ") for part in line.split("; ")[-1].split(", "))
    }


def _counted(data: ImageSet, record: Path) -> dict[str, str]:
    """Sentences by part; none where the record is gone, damaged or of as many other images."""
    try:
        before = load_arrays(record)
        after = {name: each.numpy() for name, each in array_record(data).items()}
        differ = {
            name: np.flatnonzero((before[name] != after[name]).reshape(len(after[name]), -1).any(1))
            for name in after
            if before[name].shape == after[name].shape
        }
    except Exception:  # the record only explains a refusal
        return {}
    val = np.zeros(0, np.int64) if data.val is None else data.val.numpy()
    train = np.delete(np.arange(len(data.train_labels)), val)
    rows = {"training": train, "validation": val, "test": np.arange(len(data.test_labels))}
    names = {"train": ("training", "validation"), "test": ("test",)}
    said: defaultdict[str, list[str]] = defaultdict(list)
    for name, places in differ.items():
        parts, what = names[name.removesuffix("_labels")], "labels" if name.endswith("labels") else "images"
        for part in parts:
            found = np.flatnonzero(np.isin(rows[part], places))
            if not len(found):
                continue
            example, i = f"the first is image {found[0]}", int(rows[part][found[0]])
            if what == "labels" and before[name].ndim == 1:
                example += f", then {_class(data, before[name][i])}, now {_class(data, after[name][i])}"
            sentence = f"{len(found):,} of {len(rows[part]):,} {part} {what} differ ({example})"
            said[f"{parts[0]} {what}"].append(sentence)
    return {part: ", ".join(sentences) for part, sentences in said.items()}


def _class(data: ImageSet, label: int) -> str:
    return (
        repr(data.classes[label])
        if 0 <= label < len(data.classes)
        else "without a label"
        if label < 0
        else f"{label}"
    )
