"""Data sets, the split into labelled and unlabelled, and batches augmented on the device."""

from __future__ import annotations

from ups_fast.data.resident import ResidentImages
from ups_fast.data.sets import ImageSet, load_set
from ups_fast.data.split import stratified_split

__all__ = ["ImageSet", "ResidentImages", "load_set", "stratified_split"]
