"""One image file, read the slow and sure way: any kind that Pillow knows becomes uint8 [H, W, C], or DamagedImage."""

from __future__ import annotations

import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

_KINDS = "jpg jpeg jpe jfif png webp bmp dib tif tiff gif avif jp2 ppm pgm pbm pnm"
SUFFIXES = frozenset(f".{kind}" for kind in _KINDS.split())
# A file is what its content says, whatever its suffix, but only of these kinds: others may run programs (EPS).
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF", "JPEG2000", "PPM")


class DamagedImage(ValueError):
    """A file that cannot be read as an image. The message is a sentence that names it."""


ENOUGH = (
    3  # times the side that a JPEG is scaled to is what it is decoded to: docs/data.md has the difference
)


def read_image(path: str | Path, channels: int, at_least: int = 0) -> np.ndarray:  # [H, W, C] uint8
    """The file's first frame as people see it in a viewer, with 1 channel (grey) or 3 (RGB).

    Turned as its EXIF orientation says; what is transparent lies on white, as in most viewers. Colours become grey
    by the luma of ITU-R 601, and CMYK becomes RGB without its colour profile. 16 bits are scaled to 8 over the
    whole range, never clipped. Wider numbers have no agreed range: integers must be in 0..65535 and are read as
    16 bits, floats must be in 0..1.

    at_least  a JPEG is decoded at 1/2, 1/4 or 1/8 of its size (by scaled inverse DCTs, up to 9 times as fast) where
              its shorter side then still has so many pixels; 0: never

    Raises DamagedImage for whatever is wrong with the file, be it that it is gone, and nothing else.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    name = repr(str(path))
    with _opened(path, name) as file:
        return _decoded(file, name, channels, at_least)


def read_bytes(path: str | Path) -> tuple[bytes, int]:
    """The file as it is, and its time of change in ns.

    Raises DamagedImage as `read_image` does where it is gone, empty or no file.
    """
    name = repr(str(path))
    with _opened(path, name) as file:
        try:
            return file.read(), os.fstat(file.fileno()).st_mtime_ns
        except OSError as error:
            raise DamagedImage(f"{name} cannot be read ({_reason(error)})") from error


def decode_image(encoded: bytes, channels: int, name: str) -> np.ndarray:  # [H, W, C] uint8
    """What `read_image` makes of a file with these bytes; `name` stands for it in sentences."""
    return _decoded(BytesIO(encoded), name, channels)


def resize_crop(
    image: np.ndarray,  # [H, W, C] uint8, C = 1 or 3
    size: int,
) -> np.ndarray:  # [size, size, C] uint8
    """Scales the shorter side to `size` (bilinear, antialiased) and keeps the middle of the longer one.

    The middle is cut out first, so that a very long image takes no more memory than a square one.
    """
    height, width, _ = image.shape
    side = min(height, width)
    return resize_box(image, ((height - side) // 2, (width - side) // 2, side, side), size)


def resize_box(
    image: np.ndarray,  # [H, W, C] uint8, C = 1 or 3
    box: tuple[int, int, int, int],  # top, left, height and width, within the image
    size: int,
) -> np.ndarray:  # [size, size, C] uint8
    """Cuts the box out and scales it (bilinear, antialiased): what lies around it is not seen."""
    from PIL import Image

    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    top, left, height, width = box
    cut = np.ascontiguousarray(image[top : top + height, left : left + width])
    picture = Image.fromarray(cut[..., 0] if cut.shape[2] == 1 else cut)
    return np.array(picture.resize((size, size), Image.Resampling.BILINEAR)).reshape(size, size, -1)


@contextmanager
def _opened(path: str | Path, name: str) -> Iterator[BinaryIO]:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe could wait for ever
            raise DamagedImage(f"{name} is not a file")
        file = open(path, "rb")  # noqa: SIM115  (the errors of opening are not those of decoding)
    except (OSError, ValueError) as error:
        if isinstance(error, DamagedImage):
            raise
        raise DamagedImage(f"{name} cannot be opened ({_reason(error)})") from error
    with file:
        if not os.fstat(file.fileno()).st_size:
            raise DamagedImage(f"{name} is empty")
        yield file


@contextmanager
def decoding(file: BinaryIO, name: str) -> Iterator[Image.Image]:
    """The file as a Pillow image, not yet decoded; an error while it is used says which file and why.

    Pillow gets no name: it would map some files into memory, and one that shrinks would then kill the process.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with _pillow_unheard(), Image.open(file, formats=_formats()) as image:
            yield image
    except UnidentifiedImageError as error:
        raise DamagedImage(f"{name} is not an image, or of a kind that cannot be read") from error
    except DamagedImage:
        raise
    except Exception as error:  # a broken file makes Pillow raise anything, from KeyError to struct.error
        raise DamagedImage(f"{name} cannot be decoded ({_reason(error)})") from error


def _decoded(file: BinaryIO, name: str, channels: int, at_least: int = 0) -> np.ndarray:  # [H, W, C] uint8
    from PIL import ImageOps

    with decoding(file, name) as image:
        if at_least:
            image.draft(None, (at_least, at_least))
        image.load()
        with suppress(Exception):  # where the EXIF data alone are broken, the pixels are still good
            ImageOps.exif_transpose(image, in_place=True)
        return _as_bytes(image, channels)


@cache
def _formats() -> tuple[str, ...]:
    from PIL import Image

    Image.init()
    return tuple(kind for kind in _FORMATS if kind in Image.OPEN)


def _reason(error: Exception) -> str:
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return " ".join(text.split()).rstrip(".") or type(error).__name__


def _as_bytes(image: Image.Image, channels: int) -> np.ndarray:  # [H, W, C] uint8
    """A decoded image of any mode as bytes, of 1 or 3 channels."""
    from PIL import Image

    if 0 in image.size:
        raise ValueError("it has no pixels")
    if image.mode == "F":
        numbers = np.asarray(image)
        if not (numbers.min() >= 0 and numbers.max() <= 1):  # so that NaN is refused too
            raise ValueError("its floating-point numbers are not in 0..1")
        image = Image.fromarray(np.rint(numbers * 255).astype(np.uint8))
    elif image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.int64)
        if wide.min() < 0 or wide.max() > 65535:
            raise ValueError("its integers are not in 0..65535")
        image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    elif image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")
    pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels)


# Python's warning filters belong to the process, not to a thread: the first reader silences Pillow's warnings, and
# the last one puts the filters back.
_lock = threading.Lock()
_readers = 0
_filters = warnings.catch_warnings()


@contextmanager
def _pillow_unheard() -> Iterator[None]:
    """Pillow warns of odd files that it reads all the same; what it cannot read raises."""
    global _readers, _filters
    with _lock:
        if not _readers:
            _filters = warnings.catch_warnings()
            _filters.__enter__()
            warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
        _readers += 1
    try:
        yield
    finally:
        with _lock:
            _readers -= 1
            if not _readers:
                _filters.__exit__(None, None, None)
