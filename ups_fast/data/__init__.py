"""Data sets, the user's image folders, the split, and batches augmented on the device."""

from __future__ import annotations

from ups_fast.data.folder import Folder, Listing, listing, scan
from ups_fast.data.image import DamagedImage, read_image, resize_crop
from ups_fast.data.image_set import ImageSet
from ups_fast.data.reading import Damaged, as_file_set, as_image_set, check
from ups_fast.data.resident import ResidentImages
from ups_fast.data.sets import load_set
from ups_fast.data.split import stratified_split
from ups_fast.data.stream import FileImages, PlainImages, file_images

__all__ = [
    "Damaged",
    "DamagedImage",
    "FileImages",
    "Folder",
    "ImageSet",
    "Listing",
    "PlainImages",
    "ResidentImages",
    "as_file_set",
    "as_image_set",
    "check",
    "file_images",
    "listing",
    "load_set",
    "read_image",
    "resize_crop",
    "scan",
    "stratified_split",
]
