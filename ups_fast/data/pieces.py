"""The pieces of PNG and JPEG files, walked without Pillow: whether the data end early, and text that is too long."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

_PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
GRAY = 2  # from 128: the values that libjpeg makes of no data, in any color space
_LONG = 1 << 20  # bytes of text: Pillow refuses a file that has more
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by the color type of PNG
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_MARKER = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd7]")
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_START_OF_IMAGE, _END_OF_IMAGE, _START_OF_SCAN = 0xD8, 0xD9, 0xDA


def ends_early(image: Any, file: BinaryIO) -> bool:
    """Whether a decoded image, not yet turned, has a rest that its file holds no data for. Of PNG and JPEG, within
    MPO and TIFF, too: Pillow leaves it black or gray, and finds it itself in other formats.

    What shows that no rest is missing costs next to nothing; only else is the file looked at again. Of a progressive
    JPEG it is found when whole scans are missing, not when a part of the last one is.
    """
    width, height = image.size
    if image.format == "PNG":
        last = np.asarray(image.crop((0, height - 1, width, height)))
        return (image.info.get("interlace") == 1 or not last.any()) and _png_ends_early(_all_of(file))
    if image.format in ("JPEG", "MPO"):
        if image.info.get("progressive"):
            return lacks_scans(_all_of(file))
        return _is_gray(image, width - 1, height - 1) and jpeg_ends_early(_all_of(file))
    if image.format == "TIFF" and image.tag_v2.get(259) == 7:  # Pillow has turned it
        if _has_small_jpeg(image, file):
            return True
        corners = [(x, y) for x in (0, width - 1) for y in (0, height - 1)]
        return any(_is_gray(image, *corner) for corner in corners) and jpeg_ends_early(
            _last_jpeg(image, file)
        )
    return False


def _is_gray(image: Any, x: int, y: int) -> bool:
    """Whether the pixel may be one of those that libjpeg makes of no data."""
    pixel = image.getpixel((x, y))
    return all(abs(value - 128) <= GRAY for value in (pixel if isinstance(pixel, tuple) else (pixel,)))


def _all_of(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read()


# --- PNG ----------------------------------------------------------------------------------------------------


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Type, and where the whole chunk begins and ends."""
    at = 8
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], at, end
        at = end


def _png_ends_early(data: bytes) -> bool:
    width, height, depth, color, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    bits = depth * _CHANNELS[color]
    passes = _PASSES if interlaced else ((0, 0, 1, 1),)
    needed = 0
    for left, top, across, down in passes:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        needed += rows * (1 + -(-columns * bits // 8)) if columns > 0 and rows > 0 else 0
    stream, found = zlib.decompressobj(), 0
    try:
        for kind, start, end in _chunks(data):
            rest = data[start + 8 : end - 4] if kind == b"IDAT" else b""
            while rest and found < needed and not stream.eof:
                found += len(stream.decompress(rest, _LONG))
                rest = stream.unconsumed_tail
    except zlib.error:  # in what follows the last row: before it Pillow would have found it
        pass
    return found < needed


def has_too_much_text(error: BaseException | None) -> bool:
    """Whether this is how Pillow refuses a good PNG file with long text or a long color profile."""
    return isinstance(error, ValueError) and "MAX_TEXT" in str(error)


def without_long_text(file: BinaryIO) -> bytes:
    """A PNG file without its profile, and without text that is long: what tells how to turn the image is short."""
    data = _all_of(file)
    kept, text = [data[:8]], 0
    for kind, start, end in _chunks(data):
        if kind in _PNG_TEXT:
            text += _length_of_text(kind, data[start + 8 : end - 4])
            if kind == b"iCCP" or text > _LONG:
                continue
        kept.append(data[start:end])
    return b"".join(kept)


def _length_of_text(kind: bytes, body: bytes) -> int:
    """Of a chunk's text, unpacked; more than _LONG where it is longer than that."""
    _, _, rest = body.partition(b"\0")
    packed = kind == b"zTXt" or (kind == b"iTXt" and rest[:1] == b"\1")
    if not packed:
        return len(body)
    packed_text = rest[1:] if kind == b"zTXt" else rest[2:].split(b"\0", 2)[-1]
    try:
        return len(zlib.decompressobj().decompress(packed_text, _LONG + 1))
    except zlib.error:
        return len(body)


# --- JPEG ---------------------------------------------------------------------------------------------------


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Each marker of the first image, and where what belongs to it begins; data between them are of a scan."""
    at = 0
    while found := _MARKER.search(data, at):
        marker, at = data[found.end() - 1], found.end()
        yield marker, at
        if marker == _END_OF_IMAGE:
            return
        if marker != _START_OF_IMAGE:
            at += int.from_bytes(data[at : at + 2], "big")


def lacks_scans(data: bytes) -> bool:
    """Whether no scan of a progressive JPEG brings the last bit of some coefficient of some component."""
    components, known = 0, dict[int, set[int]]()
    for marker, at in _segments(data):
        if marker in _FRAMES:
            components = data[at + 7]
        elif marker == _START_OF_SCAN:
            n = data[at + 2]
            first, last, precision = data[at + 3 + 2 * n : at + 6 + 2 * n]
            if precision & 15 == 0:
                for component in data[at + 3 : at + 3 + 2 * n : 2]:
                    known.setdefault(component, set()).update(range(first, last + 1))
    return len(known) < components or any(len(found) < 64 for found in known.values())


def _has_small_jpeg(image: Any, file: BinaryIO) -> bool:
    """Whether a strip or tile of a TIFF file is a JPEG of fewer rows or columns: libtiff leaves its rest black."""
    tags, data = image.tag_v2, _all_of(file)
    width, height = tags[256], tags[257]
    tiled = 324 in tags
    offsets, counts = (tags[324], tags[325]) if tiled else (tags[273], tags[279])
    across, down = (tags[322], tags[323]) if tiled else (width, min(tags.get(278, height), height))
    parts = -(-width // across) * -(-height // down)
    for k, (offset, count) in enumerate(zip(offsets, counts, strict=True)):
        rows = down if tiled else min(down, height - k % parts * down)
        for marker, at in _segments(data[offset : offset + count]):
            if marker in _FRAMES:
                found = data[offset + at + 3 : offset + at + 7]
                if int.from_bytes(found[:2], "big") < rows or int.from_bytes(found[2:], "big") < across:
                    return True
                break
    return False


def _last_jpeg(image: Any, file: BinaryIO) -> bytes:
    """The last strip or tile of a TIFF file, as a JPEG file."""
    tags = image.tag_v2
    offset, count = ((tags.get(a) or tags.get(b))[-1] for a, b in ((273, 324), (279, 325)))
    part = _all_of(file)[offset : offset + count]
    tables = tags.get(347)  # those of all parts: from its start to its end, without an image
    return tables[:-2] + part[2:] if tables else part


def jpeg_ends_early(data: bytes) -> bool:
    """Whether the scan of a JPEG that is not progressive lacks data, but for the last blocks.

    Instead of the mark of its end it gets 64 bits that are no code and that libjpeg wants to see beyond the last one.
    Where it then asks for more, something is missing.
    """
    from io import BytesIO

    from PIL import Image

    end = next((at - 2 for marker, at in _segments(data) if marker == _END_OF_IMAGE), len(data))
    with Image.open(BytesIO(data[:end] + b"\xff\0" * 8), formats=("JPEG",)) as image:
        image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
        try:
            image.load()
        except OSError:
            return True
    return False
