"""Data sets, the user's image folders, the split, and batches augmented on the device."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ups_fast.data.clips import ResidentClips
from ups_fast.data.features import Noise, ResidentFeatures
from ups_fast.data.folder import Folder, Listing, listing, scan
from ups_fast.data.image import DamagedImage, read_image, resize_crop
from ups_fast.data.image_set import ImageSet
from ups_fast.data.images import Images, View
from ups_fast.data.reading import Damaged, as_file_set, as_image_set, check
from ups_fast.data.resident import ResidentImages
from ups_fast.data.sets import load_set
from ups_fast.data.split import split_label_sets, stratified_split
from ups_fast.data.stream import NO_DALI, FileImages, PlainImages

__all__ = [
    "Damaged",
    "DamagedImage",
    "FileImages",
    "Folder",
    "ImageSet",
    "Images",
    "Listing",
    "Noise",
    "PlainImages",
    "ResidentClips",
    "ResidentFeatures",
    "ResidentImages",
    "View",
    "as_file_set",
    "as_image_set",
    "check",
    "file_images",
    "listing",
    "load_set",
    "read_image",
    "resize_crop",
    "scan",
    "split_label_sets",
    "stratified_split",
]


def file_images(loader: str, root: str | Path | None, paths: Sequence[str], **settings: object) -> FileImages:
    """The loader by its name, with the arguments of `FileImages`.

    auto   DALI where it is installed; without it the plain one, and a warning says what to install
    dali   raises ImportError with the same sentence where DALI is not installed
    plain  Pillow
    """
    if loader not in ("auto", "dali", "plain"):
        raise ValueError(f"loader must be auto, dali or plain, got {loader!r}")
    if loader == "auto" and find_spec("nvidia.dali") is None:
        warnings.warn(f"files are decoded by Pillow, which is slower: {NO_DALI}", stacklevel=2)
        loader = "plain"
    if loader == "plain":
        return PlainImages(root, paths, **settings)  # type: ignore[arg-type]
    from ups_fast.data.dali import DaliImages

    return DaliImages(root, paths, **settings)  # type: ignore[arg-type]
