"""Pascal VOC, whose images have several labels: torchvision downloads it, and its XML says what is in an image."""

from __future__ import annotations

import os
from http.client import HTTPException
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor

from ups_fast.data.folder import Folder
from ups_fast.data.label_sets import marks_of
from ups_fast.words import line_of

# Training and test part. The labels of the test images of 2012 are not public.
VOC = {"voc2007": ("2007", "trainval", "test"), "voc2012": ("2012", "train", "val")}
CLASSES = (
    *(
        "aeroplane",
        "bicycle",
        "bird",
        "boat",
        "bottle",
        "bus",
        "car",
        "cat",
        "chair",
        "cow",
        "diningtable",
        "dog",
    ),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


def voc(name: str, root: Path) -> Folder:
    """The files of a year of Pascal VOC, all of the training part labeled; downloaded to `root` where they lack.

    An object that is marked as difficult does not say whether its class is there: the label is unknown then.

    Raises ValueError with one sentence where files lack or are damaged.
    """
    year, *parts = VOC[name]
    found = [_part(name, year, part, root) for part in parts]
    folder = os.path.dirname(found[0][0][0])
    (train, train_labels), (test, test_labels) = found
    n = len(train)
    paths = [os.path.relpath(path, folder) for path in (*train, *test)]
    some = torch.arange(n + len(test))
    return Folder(
        Path(folder),
        paths,
        torch.cat([train_labels, test_labels]),
        some[:n],
        some[:0],
        some[n:],
        list(CLASSES),
        [],
    )


def _part(name: str, year: str, part: str, root: Path) -> tuple[list[str], Tensor]:
    """Paths of the images, and int8 [n, 20]."""
    from torchvision.datasets import VOCDetection

    try:
        try:
            data = VOCDetection(str(root), year, part)
        except (RuntimeError, FileNotFoundError):
            data = VOCDetection(str(root), year, part, download=True)
    except (OSError, RuntimeError, HTTPException) as error:
        raise ValueError(
            f"{name} is not complete in {str(root)!r} (data.root) and could not be downloaded ({line_of(error)}); "
            f"without a network, put its VOCdevkit into that folder"
        ) from error
    if not data.images:
        raise ValueError(f"{name} in {str(root)!r} (data.root) lists no image in its part {part}")
    return data.images, torch.from_numpy(np.stack([_labels(path) for path in data.targets]))


def _labels(path: str) -> np.ndarray:  # int8 [20]
    there: set[str] = set()
    unknown: set[str] = set()
    try:
        for each in ElementTree.parse(path).getroot().iter("object"):
            kind = unknown if each.findtext("difficult", "0").strip() == "1" else there
            kind.add(each.findtext("name", "").strip())
    except (OSError, ElementTree.ParseError) as error:
        raise ValueError(f"{path!r} is no annotation of Pascal VOC: {line_of(error)}") from error
    if strange := sorted((there | unknown) - set(CLASSES)):
        raise ValueError(f"{path!r} has an object of class {strange[0]!r}, which Pascal VOC does not know")
    text = ";".join([*there, *(f"?{name}" for name in unknown - there)]) or ";"
    return marks_of(text, {name: c for c, name in enumerate(CLASSES)})
