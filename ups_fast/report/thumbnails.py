"""Small pictures of a run's images, to stand in a page that needs no other file."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from ups_fast.data import DamagedImage, ImageSet, resize_crop
from ups_fast.data.image import ENOUGH, picture
from ups_fast.data.reading import in_order

SHORT, LONG = 64, 128  # pixels that the sides of a picture have at most
_EXACT = 32 * 32  # pixels of an image that is kept bit by bit; a larger one becomes a JPEG
_QUALITY = 85


class Thumbnail(NamedTuple):
    """An image in a page, and at which size it is shown."""

    source: str  # a data URI
    width: int
    height: int


def thumbnails(
    data: ImageSet,  # of images
    ids: Iterable[int],  # of the training set
    gone: Mapping[int, str],  # ids of images that are not there, each with a sentence
    threads: int | None = None,  # that read files; None: one for each core
) -> dict[int, Thumbnail | str]:
    """The images as a network sees them, at most 64 pixels high or wide, or in place of one why it cannot be read."""

    def small(i: int) -> Thumbnail | str:
        if i in gone:
            return gone[i]
        try:
            return thumbnail(_pixels(data, i))
        except DamagedImage as error:
            return str(error)

    each = sorted(set(ids))
    return dict(zip(each, in_order(small, each, threads), strict=True))


def thumbnail(pixels: np.ndarray) -> Thumbnail:  # uint8 [H, W, C], C = 1 or 3
    """The image as a data URI. A small one keeps its pixels, and is shown enlarged by a whole number."""
    from PIL import Image

    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    short, long = min(image.size), max(image.size)
    scale = min(1.0, SHORT / short, LONG / long)
    if scale < 1:
        width, height = (max(1, round(scale * side)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    file, kind = io.BytesIO(), "png" if image.width * image.height <= _EXACT else "jpeg"
    image.save(file, kind, **({"quality": _QUALITY} if kind == "jpeg" else {}))
    source = f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
    larger = max(1, min(SHORT // short, LONG // long))
    return Thumbnail(source, image.width * larger, image.height * larger)


def _pixels(data: ImageSet, i: int) -> np.ndarray:  # uint8 [H, W, C]
    """From memory, or from the file: the middle of it, as in training. Raises DamagedImage."""
    if not data.in_files:
        return data.train_images[i].numpy()
    size, channels = data.train_images.shape[2:]
    assert data.names is not None  # all that stays in files has them
    with picture(os.path.join(data.root or "", data.names[i]), channels, ENOUGH * size) as found:
        return resize_crop(found.pixels, min(size, SHORT))
