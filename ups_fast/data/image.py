"""One image file, read the slow and sure way: any kind that Pillow knows becomes uint8 [H, W, C], or DamagedImage."""

from __future__ import annotations

import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

from ups_fast.data.kinds import Kind, as_bytes, cost, described
from ups_fast.data.memory import budget
from ups_fast.data.pieces import ends_early, has_too_much_text, without_long_text

if TYPE_CHECKING:
    from PIL import Image

_KINDS = "jpg jpeg jpe jfif png webp bmp dib tif tiff gif avif jp2 ppm pgm pbm pnm"
SUFFIXES = frozenset(f".{kind}" for kind in _KINDS.split())
# A file is what its content says, whatever its suffix, but only of these kinds: others may run programs (EPS).
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF", "JPEG2000", "PPM")


class DamagedImage(ValueError):
    """A file that cannot be read as an image. The message is a sentence that names it."""


# A JPEG that is to be scaled down is decoded at this many times the side it is scaled to: docs/data.md has the
# difference.
ENOUGH = 3


class Picture(NamedTuple):
    pixels: np.ndarray  # [H, W, C] uint8
    coarse: bool  # the file has more than 8 bits a channel and uses so few values that hardly a gray level is left


def read_image(path: str | Path, channels: int, at_least: int = 0) -> np.ndarray:  # [H, W, C] uint8
    """The file's first frame as people see it in a viewer, with 1 channel (gray) or 3 (RGB).

    Turned as its EXIF orientation says; what is transparent lies on white, as in most viewers. Colors become gray
    by the luma of ITU-R 601, and CMYK becomes RGB without its color profile. 16 bits are scaled to 8 over the
    whole range, never clipped. Wider numbers have no agreed range: integers must be in 0..65535 and are read as
    16 bits, floats must be in 0..1.

    at_least  a JPEG is decoded at 1/2, 1/4 or 1/8 of its size (by scaled inverse DCTs, up to 9 times as fast) where
              its shorter side then still has so many pixels; 0: never

    Raises DamagedImage for whatever is wrong with the file, be it that it is gone, that viewers and we would show
    different images, or that it takes more memory than `ups_fast.data.memory` gives, and nothing else.
    """
    with picture(path, channels, at_least) as found:
        return found.pixels


@contextmanager
def picture(path: str | Path, channels: int, at_least: int = 0) -> Iterator[Picture]:
    """What `read_image` reads, and more about it. Its memory counts as decoding's for as long as it is open: make it
    small there. Do not open two in one thread."""
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    name = repr(str(path))
    with _opened(path, name) as file, _decoded(file, name, channels, at_least) as found:
        yield found


@contextmanager
def picture_of(encoded: bytes, channels: int, name: str) -> Iterator[Picture]:
    """What `picture` makes of a file with these bytes; `name` stands for it in sentences.

    A JPEG that at its full size takes more memory than decoding may take is decoded at a fraction of it.
    """
    with _decoded(BytesIO(encoded), name, channels, fit=True) as found:
        yield found


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
        raise DamagedImage(f"{name} {_unknown(file)}") from error
    except DamagedImage:
        raise
    except Exception as error:  # a broken file makes Pillow raise anything, from KeyError to struct.error
        raise DamagedImage(f"{name} cannot be decoded ({_reason(error)})") from error


@contextmanager
def _decoded(
    file: BinaryIO, name: str, channels: int, at_least: int = 0, fit: bool = False
) -> Iterator[Picture]:
    """The memory that the picture took stays held until it is of no use any more."""
    with ExitStack() as held:
        try:
            found = _decode(file, name, channels, at_least, fit, held)
        except DamagedImage as error:
            if not has_too_much_text(error.__cause__):
                raise
            held.close()
            found = _decode(BytesIO(without_long_text(file)), name, channels, at_least, fit, held)
        yield found


def _decode(file: BinaryIO, name: str, channels: int, at_least: int, fit: bool, held: ExitStack) -> Picture:
    with decoding(file, name) as image:
        kind = described(image)
        scale = _scale(image, kind, channels, at_least, fit)
        held.enter_context(budget.hold(cost(image, kind, channels, scale)))
        if scale > 1:
            image.draft(None, (image.width // scale, image.height // scale))
        image.load()
        if ends_early(image, file):
            raise ValueError("its data end before its last row")
        _turn(image)
        found = Picture(*as_bytes(image, kind, channels))
        if isinstance(kind.key, tuple):
            clear = _is_of(kind.key, image, file, name)
            if clear.all():
                raise ValueError("it is transparent everywhere")
            found.pixels[clear] = 255
        return found


def _scale(image: Image.Image, kind: Kind, channels: int, at_least: int, fit: bool) -> int:
    """1, 2, 4 or 8: the part of a JPEG's size at which it is decoded."""
    if image.format not in ("JPEG", "MPO"):
        return 1
    shorter = min(image.size)
    if at_least:
        return next((scale for scale in (8, 4, 2) if shorter // at_least >= scale), 1)
    scales = [scale for scale in (1, 2, 4, 8) if shorter >= scale] if fit else [1]
    return next((each for each in scales if cost(image, kind, channels, each) <= budget.total), scales[-1])


def _turn(image: Image.Image) -> None:
    """As its EXIF data say."""
    from PIL import ImageOps

    with suppress(Exception):  # where the EXIF data alone are broken, the pixels are still good
        ImageOps.exif_transpose(image, in_place=True)


def _is_of(
    color: tuple[int, ...], image: Image.Image, file: BinaryIO, name: str
) -> np.ndarray:  # bool [H, W]
    """Where a PNG file has this RGB color of 16 bits: Pillow gives the upper bytes, and in the other order the lower.

    image  the upper bytes, turned
    """
    from PIL import Image

    wanted = np.array(color)
    with Image.open(file, formats=("PNG",)) as lower:
        lower.tile = [lower.tile[0]._replace(args="RGB;16L")]
        lower.load()
        _turn(lower)
        same = np.asarray(lower) == wanted % 256
        return (same & (np.asarray(image) == wanted // 256)).all(-1)


def _unknown(file: BinaryIO) -> str:
    """What is said of a file that Pillow does not know, or knows by its first bytes and cannot read."""
    from PIL import Image

    file.seek(0)
    start = file.read(16)
    for kind in _formats():
        factory, accept = Image.OPEN[kind]
        if (
            kind in ("DIB", "PPM") or accept is None or accept(start) is not True
        ):  # texts may begin like these
            continue
        try:
            file.seek(0)
            with _pillow_unheard():
                factory(file, "")
        except Exception as error:
            return f"is a {kind} file that is damaged or of a kind that cannot be read ({_reason(error)})"
    return "is not an image, or of a kind that cannot be read"


@cache
def _formats() -> tuple[str, ...]:
    from PIL import Image

    Image.init()
    return tuple(kind for kind in _FORMATS if kind in Image.OPEN)


def _reason(error: Exception) -> str:
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return " ".join(text.split()).rstrip(".") or type(error).__name__


# Python's warning filters and Pillow's limit of pixels belong to the process, not to a thread: the first reader
# silences Pillow's warnings and lifts the limit, in whose place `budget` counts bytes; the last one puts both back.
_lock = threading.Lock()
_readers = 0
_filters = warnings.catch_warnings()
_limit: int | None = None


@contextmanager
def _pillow_unheard() -> Iterator[None]:
    """Pillow warns of odd files that it reads all the same; what it cannot read raises."""
    from PIL import Image

    global _readers, _filters, _limit
    with _lock:
        if not _readers:
            _filters = warnings.catch_warnings()
            _filters.__enter__()
            warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
            _limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        _readers += 1
    try:
        yield
    finally:
        with _lock:
            _readers -= 1
            if not _readers:
                _filters.__exit__(None, None, None)
                Image.MAX_IMAGE_PIXELS = _limit
