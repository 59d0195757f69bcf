"""Files of features: an .npy file, one array of an .npz archive, or a .parquet table, as rows of numbers."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from ups_fast.data.npy import Header, header_of, member_header, members_of
from ups_fast.files import open_regular
from ups_fast.machine import memory_bytes
from ups_fast.words import are, line_of, many, said

SUFFIXES = (".npy", ".npz", ".parquet")
ROWS = "float16, float32 or float64 [n, d]"
_INDEX = re.compile(r"__index_level_[0-9]+__")  # of a pandas table: names of its rows, no features


@dataclass(frozen=True)
class RowFile:
    """A file of rows that has been looked at, and not yet read."""

    path: str
    n: int  # rows
    d: int  # columns
    dtype: np.dtype  # of the file; of a .parquet table float32
    key: str = ""  # the array in an archive
    columns: tuple[str, ...] = ()  # of a .parquet table

    def read(self) -> np.ndarray:  # [n, d] float32, or float16 where the file has it
        """Raises ValueError with one sentence, as it may have changed since."""
        try:
            rows = self._read()
        except Exception as error:  # whatever a stranger's bytes may cause
            raise ValueError(f"{self.path!r} cannot be read: {line_of(error)}") from error
        if rows.shape != (self.n, self.d):
            raise ValueError(f"{self.path!r} has changed while it was read")
        with np.errstate(over="ignore"):  # what float32 cannot hold is found as infinite
            return np.ascontiguousarray(rows, np.float16 if rows.dtype.itemsize == 2 else np.float32)

    def _read(self) -> np.ndarray:  # [n, d], as the file has it
        with open_regular(self.path) as file:
            if self.columns:
                return _read_table(file, self)
            if not self.key:
                return np.lib.format.read_array(file, allow_pickle=False)
            with zipfile.ZipFile(file) as archive, archive.open(members_of(archive)[self.key]) as member:
                return np.lib.format.read_array(member, allow_pickle=False)


def is_row_file(path: str | os.PathLike[str]) -> bool:
    """By its suffix."""
    return os.fspath(path).lower().endswith(SUFFIXES)


def either(kinds: Collection[str]) -> str:
    """Such as ".npy, .npz or .parquet"."""
    *most, last = kinds
    return f"{', '.join(most)} or {last}"


def look_at(paths: Iterable[str], columns: int) -> list[RowFile]:
    """What files of so many columns hold. Raises ValueError or OSError, with one sentence, for any other file."""
    files = []
    for path in paths:
        if not is_row_file(path):
            raise ValueError(
                f"{path!r} must be a file of features, {either(SUFFIXES)}: the run's network takes rows of "
                f"{many(columns, 'number')}"
            )
        files.append(row_file(path))
        if (d := files[-1].d) != columns:
            raise ValueError(f"{path!r} must have {many(columns, 'column')} as the run's features, got {d:,}")
    return files


def row_file(path: str) -> RowFile:
    """What the file says that it holds. Raises ValueError or OSError with one sentence that names it."""
    try:
        found = _looked_at(path)
    except (_Refused, OSError):
        raise
    except Exception as error:  # whatever a stranger's bytes may cause
        raise ValueError(f"{path!r} is damaged or no file of features: {line_of(error)}") from error
    if not found.n or not found.d:
        raise ValueError(
            f"{path!r} must not be empty, got {many(found.n, 'row')} of {many(found.d, 'column')}"
        )
    width = found.dtype.itemsize
    # While float64 becomes float32, there are both.
    if (needed := found.n * found.d * (width + 4 * (width == 8))) > memory_bytes():
        have = memory_bytes() / 2**30
        raise ValueError(
            f"{path!r} takes {needed / 2**30:,.1f} GiB to read, and this machine has {have:,.1f}: split it"
        )
    return found


def rows_of(files: Iterable[RowFile]) -> Iterator[tuple[str, np.ndarray | str]]:
    """Each row by its name, such as rows.npy[17]: float32 [d], or a sentence where it has no finite numbers."""
    for file in files:
        rows = file.read()
        for i, row in enumerate(rows):
            name, finite = f"{file.path}[{i}]", np.isfinite(row)
            if finite.all():
                yield name, row.astype(np.float32)
            else:
                column = int(finite.argmin())
                n = int((~finite).sum())
                yield name, f"{many(n, 'value')} {are(n)} NaN or infinite, the first in column {column:,}"


class _Refused(ValueError):
    """The file is sound, and is not what is asked for."""


def _looked_at(path: str) -> RowFile:
    if path.lower().endswith(".parquet"):
        return _look_at_table(path)
    with open_regular(path) as file:
        if not path.lower().endswith(".npz"):
            return _fitting(path, header_of(file, os.fstat(file.fileno()).st_size))
        with zipfile.ZipFile(path) as archive:
            headers = {key: member_header(archive, member) for key, member in members_of(archive).items()}
    if "x" in headers:
        return _fitting(path, headers["x"], "x")
    fit = [key for key, header in headers.items() if _are_rows(header)]
    if len(fit) != 1:
        what = f"{len(fit)} arrays of features, {', '.join(fit[:5])}" if fit else "no array of features"
        raise _Refused(f"{path!r} has {what}: give it one, {ROWS}, or name the one that is meant x")
    return _fitting(path, headers[fit[0]], fit[0])


def _are_rows(header: Header) -> bool:
    return len(header.shape) == 2 and header.dtype.kind == "f" and header.dtype.itemsize in (2, 4, 8)


def _fitting(path: str, header: Header, key: str = "") -> RowFile:
    if not _are_rows(header):
        raise _Refused(f"{path!r} must hold features, {ROWS}, got {header}")
    n, d = header.shape
    return RowFile(path, n, d, header.dtype, key)


# --- Parquet ------------------------------------------------------------------------------------------------


def _parquet() -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise _Refused(f"a .parquet file needs pyarrow ({line_of(error)}): pip install pyarrow") from error
    return parquet


def _look_at_table(path: str) -> RowFile:
    with open_regular(path) as file:
        table = _parquet().ParquetFile(file)
        fields = [field for field in table.schema_arrow if not _INDEX.fullmatch(field.name)]
        n = table.metadata.num_rows
    for field in fields:
        if not re.fullmatch(r"u?int[0-9]+|float|double|halffloat", str(field.type)):
            raise _Refused(
                f"{path!r} must have a column of numbers for each feature, got {said(field.name)} of {field.type}"
            )
    return RowFile(path, n, len(fields), np.dtype(np.float32), columns=tuple(field.name for field in fields))


def _read_table(file: BinaryIO, found: RowFile) -> np.ndarray:
    rows, table = np.empty((found.n, found.d), np.float32), _parquet().ParquetFile(file)
    with np.errstate(over="ignore"):
        for c, name in enumerate(found.columns):
            rows[:, c] = table.read([name])[name].to_numpy()  # what is missing is NaN
    return rows
