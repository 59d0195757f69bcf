"""Files that the project writes and files that strangers made: the only place that opens a file for writing.

What is written stays in its folder, whatever links lie there. What is read is a regular file, so that nothing waits for
a pipe, and what torch.save made is loaded only if it cannot grow beyond the size of its file.
"""

from __future__ import annotations

import errno
import io
import os
import pickletools
import re
import secrets
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

# Flags that a system lacks are 0 there. A pipe opened with NONBLOCK does not wait for its other end.
_NOFOLLOW, _NONBLOCK = getattr(os, "O_NOFOLLOW", 0), getattr(os, "O_NONBLOCK", 0)
_BINARY = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_NO_LOCKS = {getattr(errno, name, None) for name in ("ENOLCK", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EINVAL")}
# What a pickle of tensors needs. Torch allows more, such as bytearray(n), which takes n bytes out of nothing.
_GLOBALS = re.compile(
    r"collections (OrderedDict|Counter)|builtins set"
    r"|torch\._utils _rebuild_(tensor_v2|parameter|sparse_tensor|meta_tensor_no_storage)"
    r"|torch\.serialization _get_layout|torch ([A-Z]\w*Storage|Size|device|b?float\d+|u?int\d+|bool)"
)


class RunFolderError(ValueError):
    """A run's folder cannot be used as asked. The message is a sentence; what was there is unchanged."""


class InUse(RunFolderError):
    """Another process works in the folder."""


class NotDense(ValueError):
    """A file holds a tensor without plain memory: a sparse or quantized one, or one of torch's meta device."""


def home(path: str | Path) -> Path:
    """The path with ~ and ~user at its start replaced by that home folder. An unknown user's stays as it is."""
    return Path(os.path.expanduser(path))


# --- writing ------------------------------------------------------------------------------------------------


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the system's refusal to write (a full disk, a missing right) into a RunFolderError."""
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"{path} could not be written: {error.strerror}; nothing was overwritten"
        ) from error


def write_atomic(path: Path, *content: bytes | memoryview) -> None:
    """Replaces `path` by `content`, one part after the other.

    A reader, even after a power cut, meets the old file or the new one.

    Writes a new file of a random name in the same folder, and follows no link. Raises RunFolderError where it cannot
    be written, or where `path` is a link, a folder or anything but a regular file; what is there then stands.
    """
    with writing(path):
        check_plain(path)
        tmp = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        try:
            with _new(tmp) as file:
                for part in content:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            os.replace(tmp, path)
        finally:
            tmp.unlink(missing_ok=True)
    _sync_folder(path.parent)


def check_new(path: Path) -> None:
    """Raises RunFolderError where there is something at `path`, if only a link to nothing."""
    if os.path.lexists(path):
        raise RunFolderError(f"{path} is there already: choose another name, or delete it")


def write_new(path: Path, content: bytes) -> None:
    """Writes a file that was not there before. Raises RunFolderError where it was, or cannot be written."""
    with writing(path):
        try:
            file = _new(path)
        except FileExistsError:
            check_new(path)
            raise
        try:
            with file:
                file.write(content)
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def _new(path: Path) -> IO[bytes]:
    """A file that was not there before, with the rights that the process gives to new files."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NOFOLLOW | _BINARY
    return os.fdopen(os.open(path, flags, 0o666), "wb")


def _sync_folder(folder: Path) -> None:
    """A new name outlasts a power cut only once its folder is on the disk; some file systems cannot say so."""
    with suppress(OSError):  # Windows opens no folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_arrays(path: Path, arrays: Mapping[str, Tensor]) -> None:
    """Writes host tensors as an .npz file, atomically."""
    buffer = io.BytesIO()
    columns: dict[str, Any] = {name: tensor.numpy() for name, tensor in arrays.items()}
    np.savez(buffer, **columns)
    write_atomic(path, buffer.getbuffer())


def is_leftover(path: Path, names: frozenset[str]) -> bool:
    """Whether a killed process left `path` behind while it wrote one of the files `names` of that folder."""
    found = re.fullmatch(r"\.(.+?)(\.[0-9a-f]+)?\.tmp", path.name)
    return bool(found) and found[1] in names and not stat.S_ISDIR(path.lstat().st_mode)  # type: ignore[index]


def remove_leftovers(folder: Path, names: frozenset[str]) -> None:
    """Removes what `is_leftover`; of a link the link alone. The caller holds the folder's lock."""
    for path in folder.iterdir():
        if is_leftover(path, names):
            path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Makes a folder inside a run's folder. Raises RunFolderError where a link or a file has that name."""
    with writing(path):
        check_plain(path, folder=True)
        path.mkdir(exist_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[str]:
    """Holds a lock file for this process, and ends with the process, however that ends.

    Yields a warning where the file system has no locks, else "". Raises RunFolderError where another process holds
    it, or `path` is no regular file. Nothing is written into the file.
    """
    with writing(path):
        check_plain(path)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _NOFOLLOW | _NONBLOCK | _BINARY, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise RunFolderError(f"{path} must be a regular file; delete it, or choose another folder")
        yield _lock(descriptor, path)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> str:
    why = "this system has no file locks"
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return ""
        except BlockingIOError:
            raise InUse(f"run_dir={path.parent} is in use by another process") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise RunFolderError(f"{path} could not be locked: {error.strerror}") from error
            why = f"its file system has no locks ({error.strerror})"
    return (
        f"run_dir={path.parent} cannot be locked, as {why}. The run goes on. Start no second process in this folder: "
        "the two would overwrite each other's files"
    )


# --- reading ------------------------------------------------------------------------------------------------


def check_plain(path: Path, *, folder: bool = False) -> None:
    """Raises RunFolderError where there is something at `path`, and it is not a regular file (or a folder) itself."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not (stat.S_ISDIR(mode) if folder else stat.S_ISREG(mode)):
        must = "a folder" if folder else "a regular file"
        raise RunFolderError(
            f"{path} is {_kind(mode)} and must be {must} in a run's folder; delete it, or choose another run_dir"
        )


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "a file")


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a regular file, or what a link to one leads to, for reading. Never waits, as opening a pipe does.

    Raises OSError as `open` does, and RunFolderError for a pipe, a socket, a device or a folder.
    """
    mode = os.stat(path).st_mode  # before opening: some devices act when they are opened
    if stat.S_ISREG(mode):
        descriptor = os.open(path, os.O_RDONLY | _NONBLOCK | _BINARY)
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISREG(mode):
            return os.fdopen(descriptor, "rb")
        os.close(descriptor)
    raise RunFolderError(f"{path} is {_kind(mode)}, and only regular files are read")


def read_bytes(path: str | Path, most: int | None = None) -> bytes:
    """The bytes of a regular file. Raises as `open_regular`, and RunFolderError for a file of more than `most`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            raise RunFolderError(f"{path} has {size:,} bytes, and no such file has more than {most:,}")
        return file.read() if most is None else file.read(most)


def load_torch(path: str | Path) -> Any:
    """What torch.save wrote, on the host. Nothing in it is run, and it takes no more memory than its file's size.

    Raises ValueError, whose text says what is wrong, OSError, or whatever a stranger's bytes cause in torch.
    """
    with open_regular(path) as file:
        if file.read(4) == b"PK\x03\x04":  # as torch itself tells them apart
            _check_archive(file)
        else:
            file.seek(0)
            for _ in range(4):  # as torch saved until 1.5: three numbers, then the content
                _check_pickle(file)
        file.seek(0)
        content = torch.load(file, map_location="cpu", weights_only=True)
        _check_tensors(content, os.fstat(file.fileno()).st_size)
    return content


def _check_archive(file: BinaryIO) -> None:
    """An archive as torch and `write_arrays` write it: stored, not compressed, with right check sums."""
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        names = {m.filename.lower() for m in members}  # torch does not tell A from a
        stored = all(
            m.compress_type == zipfile.ZIP_STORED and m.compress_size == m.file_size for m in members
        )
        if not stored or sum(m.file_size for m in members) > size:
            raise ValueError("its parts are compressed or larger than the file")
        if len(names) != len(members) or archive.comment:
            raise ValueError("it has two parts of one name, or a comment")
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} in it has changed")
        for member in members:
            if member.filename.lower().endswith(".pkl"):
                _check_pickle(io.BytesIO(archive.read(member)))


def _check_pickle(file: BinaryIO) -> None:
    for opcode, argument, _ in pickletools.genops(file):
        if "GLOBAL" in opcode.name and not _GLOBALS.fullmatch(str(argument)):
            raise ValueError(f"it holds {str(argument)[:60]!r}, which is no part of a tensor")


def _check_tensors(content: Any, size: int) -> None:
    """A few bytes may call themselves a tensor of any shape, by strides of 0."""
    todo, seen = [content], {id(content)}
    while todo:
        item = todo.pop()
        if isinstance(item, Tensor):
            if item.layout != torch.strided or item.device.type != "cpu" or item.is_quantized:
                raise NotDense("it holds a tensor that is not dense")
            if item.numel() * item.element_size() > min(size, item.untyped_storage().nbytes()):
                raise ValueError(f"a tensor of {list(item.shape)} in it has more elements than bytes")
        inside = list(item.values()) if isinstance(item, dict) else item
        for each in inside if isinstance(inside, (list, tuple, set)) else ():
            if id(each) not in seen:  # a container may hold itself, or one thing a million times
                seen.add(id(each))
                todo.append(each)


def load_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """What `write_arrays` wrote. Raises as `load_torch`, and takes no more memory than that either."""
    with open_regular(path) as file:
        _check_archive(file)
        file.seek(0)
        with np.load(file, allow_pickle=False) as archive:
            return dict(archive)


def misfit(found: Any, wanted: Mapping[str, Tensor]) -> str:
    """How the tensors `found`, such as a state_dict, differ in names, shapes or types from `wanted`; "" if in nothing.

    Values that no training leaves behind count too: NaN, infinity, a negative variance.
    """
    if not isinstance(found, Mapping):
        return "it is no table of tensors"
    for name, tensor in wanted.items():
        have = found.get(name)
        if not isinstance(have, Tensor):
            return f"{name} is missing"
        if have.dtype != tensor.dtype or have.shape != tensor.shape:
            return f"{name} is {_described(have)} and must be {_described(tensor)}"
        if not finite(have):
            return f"{name} has NaN or infinite values"
        if name.endswith(("running_var", "num_batches_tracked")) and bool((have < 0).any()):
            return f"{name} has negative values"
    if unknown := [name for name in found if name not in wanted]:
        return f"{ascii(unknown[0])[:100]} is unknown"
    return ""


def finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype)[6:]} {list(tensor.shape)}"
