"""Rarer kinds of image files, where Pillow alone shows something else than a viewer does, or takes much memory.

`described` looks at an opened file before it is decoded. It sets right what Pillow would decode wrongly, says what
`as_bytes` has to know, and refuses by name what cannot be set right: a reason follows "cannot be decoded".
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

_WHITE = 255
_FEW = 4095  # values of wider numbers that leave most of the 8 bits unused: 12 bits in a file of 16
# Bytes a pixel; others take 4.
_STORED = {"1": 1, "L": 1, "P": 1, **dict.fromkeys(("I;16", "I;16B", "I;16L", "I;16N"), 2)}
_KEPT = {"WEBP": 8, "AVIF": 16, "JPEG2000": 32}  # bytes a pixel that a decoder holds until its file is closed
_ROWS = 1 << 20  # pixels that are made narrow at once


class Kind(NamedTuple):
    """What decides how the decoded numbers of a file are read."""

    deep: bool = False  # more than 8 bits a channel
    top: int = 65535  # the value of white, of integers wider than 8 bits
    negative: bool = False  # 0 is white, and Pillow leaves it so
    frame: tuple[int, int, int, int] | None = None  # left, top, right, bottom: around it nothing is drawn
    key: int | tuple[int, ...] | None = None  # the transparent color of 16 bits a channel
    clear_is_opaque: bool = False  # alpha that is 0 everywhere stands for none


def described(image: Any) -> Kind:
    """Of an opened image that is not decoded yet. Raises ValueError with the reason why it must not be."""
    if image.format == "TIFF":
        return _tiff(image)
    if image.format == "PNG":
        return _png(image)
    if image.format in ("BMP", "DIB"):
        return _bmp(image)
    if image.format == "GIF":
        box = image.tile[0].extents if image.tile else None
        whole = box == (0, 0, *image.size)
        return Kind(frame=None if whole or image.info.get("transparency") is not None else box)
    if image.format == "PPM":
        args = image.tile[0].args
        return Kind(deep=isinstance(args, tuple) and isinstance(args[-1], int) and args[-1] > 255)
    return Kind()


# --- before decoding ----------------------------------------------------------------------------------------


def _png(image: Any) -> Kind:
    at = image.fp.tell()
    image.fp.seek(24)
    depth = image.fp.read(1)[0]
    image.fp.seek(at)
    if image.mode == "P" and image.palette is None:
        raise ValueError("it has no palette")
    key = image.info.get("transparency")
    if image.mode == "L" and isinstance(key, int) and depth in (2, 4):  # Pillow widens the pixels alone
        image.info["transparency"] = (key & (1 << depth) - 1) * 255 // ((1 << depth) - 1)
    if depth < 16 or image.mode not in ("I;16", "RGB"):
        key = None
    elif key is not None:
        del image.info["transparency"]
    return Kind(deep=depth == 16, key=key)


def _bmp(image: Any) -> Kind:
    start = 14 if image.format == "BMP" else 0
    image.fp.seek(start)
    size = int.from_bytes(image.fp.read(4), "little")
    image.fp.seek(start + (10 if size == 12 else 14))
    bits = int.from_bytes(image.fp.read(2), "little")
    tile = image.tile[0]
    if tile.codec_name == "raw" and (image.mode, bits) == ("1", 8):  # Pillow would read a byte as 8 pixels
        image.tile = [tile._replace(args=("1;8", *tile.args[1:]))]
    elif tile.codec_name == "raw" and (image.mode, bits) in (("1", 4), ("L", 1), ("L", 4)):
        raise ValueError(f"it is a BMP of {bits} bits a pixel with an unusual palette")
    return Kind(clear_is_opaque=True)


def _tiff(image: Any) -> Kind:
    tags = image.tag_v2
    photometric, planar = tags.get(262), tags.get(284, 1)
    bits, formats = tags.get(258, (1,)), tags.get(339, (1,))
    extra, samples = tags.get(338, ()), tags.get(277, 1)
    raw = tags.get(259, 1) == 1
    if photometric is None:
        raise ValueError("it is a TIFF that does not say whether 0 is black or white")
    if tags.get(254, 0) & 1 and (tags.next or 330 in tags):
        raise ValueError("its first image is a thumbnail of another one in it")
    if 2 in formats and bits[0] == 8:
        raise ValueError("its 8-bit numbers are signed")
    if photometric == 5 and tags.get(332, 1) != 1:
        raise ValueError("its inks are not cyan, magenta, yellow and black")
    if photometric == 6 and raw and tuple(tags.get(530, (2, 2))) != (1, 1):
        raise ValueError("it is a TIFF of uncompressed YCbCr with fewer colors than pixels")
    if planar == 2 and samples > 1:
        colors = {2: 3, 5: 4, 6: 3, 8: 3}.get(photometric, 1)
        if (raw and bits[0] != 8) or samples != colors + len(extra) or (colors == 1 and any(extra)):
            raise ValueError(f"it is a TIFF of {samples} separate planes of {bits[0]} bits")
    if photometric == 3:
        colors = tags[320]
        if max(colors) < 256:  # 8 bits in a map of 16: viewers know, Pillow makes black of them
            from PIL import ImagePalette

            image.palette = ImagePalette.raw("RGB;L", bytes(colors))
    if raw:
        _check_parts(tags, image.tile, planar, samples, bits)
    elif image.tile:
        tile = image.tile[0]  # libtiff gives numbers in this machine's order, whatever the file's
        native = {"I;16BS": "I;16NS", "I;32BS": "I;32NS", "F;32BF": "F;32NF"}.get(tile.args[0])
        if native:
            image.tile = [tile._replace(args=(native, *tile.args[1:]))]
    negative = photometric == 0 and (image.mode == "F" or image.mode.startswith("I"))
    return Kind(deep=bits[0] > 8, top=4095 if bits[0] == 12 else 65535, negative=negative)


def _check_parts(tags: Any, tiles: list[Any], planar: int, samples: int, bits: tuple[int, ...]) -> None:
    """Raises ValueError if there are fewer strips or tiles than the image has, or fewer bytes in one than it needs."""
    width, height = tags[256], tags[257]
    tiled = 324 in tags
    offsets, counts = (tags.get(tag, ()) for tag in ((324, 325) if tiled else (273, 279)))
    across, down = (tags[322], tags[323]) if tiled else (width, min(tags.get(278, height), height))
    per_plane = math.ceil(width / across) * math.ceil(height / down)
    planes = samples if planar == 2 else 1
    line = math.ceil(across * (bits[0] if planar == 2 else bits[0] * samples) / 8)
    short = len(offsets) < per_plane * planes
    for k, count in enumerate(counts[: per_plane * planes]):
        rows = down if tiled else min(down, height - k % per_plane * down)
        short |= count < line * rows
    if short or len(tiles) < 1:
        raise ValueError("its data end before its last row")


def cost(image: Image.Image, kind: Kind, channels: int, scale: int = 1) -> int:
    """Bytes that decoding takes at its peak, the result included; of a JPEG decoded at 1 / scale of its size."""
    picture: Any = image
    kept = _KEPT.get(image.format or "", 0)
    width, height = image.size
    stored = _STORED.get(image.mode, 4)
    own, coefficients = 0.0, 0.0
    codec = picture.tile[0].codec_name if getattr(picture, "tile", None) else ""
    if codec == "libtiff":
        own = sum(picture.tag_v2.get(258, (8,)) or (8,)) / 8 * 2 + 4
    elif codec in ("ppm", "ppm_plain", "bmp_rle"):
        own = 3.0 * (1 if image.mode in ("1", "L", "P") else 4)
    elif codec == "jpeg" and _has_many_scans(picture):
        most = max(h * v for _, h, v, _ in picture.layer)
        coefficients = 2 * sum(h * v for _, h, v, _ in picture.layer) / most
    if kind.key is not None and image.mode == "RGB":
        own += 8
    after: float = 3 * channels + (0 if image.mode == ("L" if channels == 1 else "RGB") else 5)
    if image.has_transparency_data:
        after = 3 * channels + 16
    elif image.mode in ("I", "F") or image.mode.startswith("I;"):
        after = 2 * stored + 1 + channels
    pixels = math.ceil(width / scale) * math.ceil(height / scale)
    return math.ceil(pixels * (stored + kept + max(own, after, stored)) + width * height * coefficients)


def _has_many_scans(image: Any) -> bool:
    """Whether libjpeg holds the coefficients of the whole image: the first scan is progressive or lacks a component."""
    if image.info.get("progressive"):
        return True
    at, length = image.fp.tell(), 6 + 2 * image.layers  # Pillow has just read the header of the first scan
    image.fp.seek(max(0, at - length))
    header = image.fp.read(length)
    image.fp.seek(at)
    return header[:3] != bytes((0, length, image.layers))


# --- after decoding -----------------------------------------------------------------------------------------


def as_bytes(image: Image.Image, kind: Kind, channels: int) -> tuple[np.ndarray, bool]:
    """A decoded image of any mode as uint8 [H, W, C], C = 1 or 3; and whether it is coarse.

    Coarse: it has more than 8 bits a channel, and of these uses so few values that 17 or fewer are left of 256.
    """
    from PIL import Image

    if image.mode == "F" or image.mode.startswith("I"):
        gray, coarse = _narrow(np.asarray(image), kind)
        return np.repeat(gray[..., None], channels, axis=2) if channels > 1 else gray[..., None], coarse
    coarse = kind.deep and 0 < _highest(image) <= _FEW >> 8
    if image.has_transparency_data:
        clear = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
        if _highest(clear.getchannel("A")):
            white = Image.new("RGBA", clear.size, "white")
            white.alpha_composite(clear)
            image = white
        elif not kind.clear_is_opaque:
            raise ValueError("it is transparent everywhere")
        else:
            image = clear
        image = image.convert("RGB")
    elif image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")
    mode = "L" if channels == 1 else "RGB"
    pixels = np.array(image if image.mode == mode else image.convert(mode))
    pixels = pixels.reshape(*pixels.shape[:2], channels)
    if kind.frame:
        left, top, right, bottom = kind.frame
        outside = np.ones(pixels.shape[:2], bool)
        outside[top:bottom, left:right] = False
        pixels[outside] = _WHITE
    return pixels, coarse


def _highest(image: Image.Image) -> int:
    """The greatest value of any band but alpha, unless that is the only one."""
    extremes: Any = image.getextrema()
    bands = extremes if isinstance(extremes[0], tuple) else [extremes]
    return max(
        high for name, (_, high) in zip(image.getbands(), bands, strict=True) if name not in ("A", "a")
    )


def _narrow(wide: np.ndarray, kind: Kind) -> tuple[np.ndarray, bool]:  # [H, W] -> uint8 [H, W]
    """Numbers wider than 8 bits, scaled; and whether they use few of their values."""
    low, high = wide.min(), wide.max()
    floats = wide.dtype.kind == "f"
    if floats and not (low >= 0 and high <= 1):  # so that NaN is refused too
        raise ValueError("its floating-point numbers are not in 0..1")
    if not floats and (low < 0 or high > 65535):
        raise ValueError("its integers are not in 0..65535")
    if isinstance(kind.key, int) and low == high == kind.key:
        raise ValueError("it is transparent everywhere")
    out = np.empty(wide.shape, np.uint8)
    step = max(1, _ROWS // wide.shape[1])
    for row in range(0, len(wide), step):
        part = wide[row : row + step]
        if floats:
            scaled = np.rint((1 - part if kind.negative else part) * 255)
        else:
            part = part.astype(np.uint32)
            scaled = ((kind.top - part if kind.negative else part) * 255 + kind.top // 2) // kind.top
        out[row : row + step] = scaled
        if isinstance(kind.key, int):
            out[row : row + step][part == kind.key] = _WHITE
    most = _FEW / 65535 if floats else _FEW if kind.top == 65535 else 0
    return out, bool(0 < high <= most)
