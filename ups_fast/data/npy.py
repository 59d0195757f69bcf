"""Plain numbers in .npy files and .npz archives, judged by what their headers claim before memory is taken."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Sequence
from typing import IO, NamedTuple

import numpy as np

_CHUNK = 1 << 20  # bytes that are unpacked at once


class Header(NamedTuple):
    """What the header of an array says."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool  # its first index runs fastest

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype!s:.100} {list(self.shape[:8])}"


def header_of(file: IO[bytes], size: int) -> Header:
    """The header at the start of `file`, which must be that of plain numbers and fit its `size` bytes.

    The numbers follow where the file then stands. Raises ValueError that says what is wrong, without a name.
    """
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"its format {version[0]}.{version[1]} is not one of plain arrays")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    follows = size - file.tell()
    found = Header(shape, dtype, fortran)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    if dtype.kind not in "biuf" or dtype.subdtype:
        raise ValueError(f"it must hold plain numbers, got {str(dtype)[:100]}")
    if min(shape, default=0) < 0 or found.nbytes != follows:
        raise ValueError(f"its header says {found}, which the {follows:,} bytes after it are not")
    return found


def members_of(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The arrays of an archive by their names. ValueError where two have one, or one is encrypted."""
    members: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        key = member.filename.removesuffix(".npy")
        if key in members:
            raise ValueError(f"it has two arrays of the name {key!r}")
        if member.flag_bits & 1:
            raise ValueError(f"{key!r} is encrypted: store it without a password")
        members[key] = member
    return members


def member_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Header:
    """`header_of` an array in an archive, which cannot be larger than its compression allows."""
    if member.compress_size > os.path.getsize(str(archive.filename)):
        raise ValueError("it is longer than the file")
    if member.compress_type == zipfile.ZIP_DEFLATED and member.file_size > 1040 * (member.compress_size + 64):
        raise ValueError("its size cannot be right: no data shrink so far")
    with archive.open(member) as file:
        return header_of(file, member.file_size)


def one_kind(headers: Sequence[Header]) -> bool:
    """Whether such arrays, in C order, can lie one behind the other in the memory of one."""
    kinds = {(each.shape[1:], each.dtype, len(each.shape), each.fortran) for each in headers}
    return len(kinds) == 1 and headers[0].shape != () and not headers[0].fortran


def read_into(archive: zipfile.ZipFile, member: zipfile.ZipInfo, array: np.ndarray) -> None:
    """The numbers of a member, whose `member_header` is that of `array`, in C order.

    Raises ValueError where some are missing.
    """
    place = array.reshape(-1).view(np.uint8).data
    with archive.open(member) as file:
        header_of(file, member.file_size)
        for at in range(0, len(place), _CHUNK):
            wanted = min(_CHUNK, len(place) - at)
            part = file.read(wanted)
            if len(part) != wanted:  # the archive's directory may claim more than there is
                raise ValueError(f"it ends {len(place) - at - len(part):,} bytes early")
            place[at : at + wanted] = part
        file.read(1)  # its checksum is compared at the end
