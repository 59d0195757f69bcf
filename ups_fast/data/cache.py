"""Features that were computed once, in files: an .npy array, behind which stands a hash of what it is and holds."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ups_fast.files import open_regular, write_atomic

_DIGEST = 16  # bytes


def write_rows(path: Path, key: str, rows: Tensor) -> None:  # float32 [N, d], on the host
    """Writes the file, atomically. Raises RunFolderError where that is not possible."""
    array = rows.contiguous().numpy()
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, np.lib.format.header_data_from_array_1_0(array))
    write_atomic(path, head.getvalue(), array.data, _digest(key, array))


def read_rows(path: Path, key: str, shape: tuple[int, int]) -> Tensor:  # float32 [N, d]
    """What was written for this key, from the file itself: processes of a machine have it in memory once.

    Raises FileNotFoundError where there is no such file; ValueError, or whatever a stranger's bytes cause, where it is
    damaged or of something else.
    """
    with open_regular(path) as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("it is of another version of NumPy's format")
        found, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if found != shape or fortran or dtype != np.float32:
            raise ValueError(f"it holds {dtype} {list(found)} and must hold float32 {list(shape)}")
        size = os.fstat(file.fileno()).st_size
        if size != file.tell() + 4 * shape[0] * shape[1] + _DIGEST:
            raise ValueError(f"it has {size:,} bytes, which are too few or too many")
        rows = np.memmap(file, np.float32, "c", file.tell(), shape)  # "c": no process changes the file
        file.seek(-_DIGEST, os.SEEK_END)
        if file.read() != _digest(key, rows):
            raise ValueError("its content has changed")
    return torch.from_numpy(rows)


def _digest(key: str, array: np.ndarray) -> bytes:
    found = hashlib.blake2b(key.encode(), digest_size=_DIGEST)
    found.update(array.data)
    return found.digest()
