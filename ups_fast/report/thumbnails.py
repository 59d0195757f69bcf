"""Small pictures of a run's images, to stand in a page that needs no other file."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ups_fast.data import DamagedImage, ImageSet, resize_crop
from ups_fast.data.clips import clean_clip
from ups_fast.data.image import ENOUGH, picture
from ups_fast.data.reading import in_order

SHORT, LONG = 64, 128  # pixels that the sides of a picture have at most
_EXACT = 32 * 32  # pixels of an image that is kept bit by bit; a larger one becomes a JPEG
_QUALITY = 85
_FRAMES, _PLAYED = 8, 1000  # of a clip at most, and in so many milliseconds


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


def thumbnail(pixels: np.ndarray) -> Thumbnail:  # uint8 [H, W, C], or of a clip [T, H, W, C], C = 1 or 3
    """The image as a data URI. A small one keeps its pixels, and is shown enlarged by a whole number. A clip plays."""
    from PIL import Image

    height, width, channels = pixels.shape[-3:]
    short, long = min(height, width), max(height, width)
    scale = min(1.0, SHORT / short, LONG / long)
    frames = pixels.reshape(-1, height, width, channels)
    frames = frames[np.linspace(0, len(frames) - 1, min(_FRAMES, len(frames))).round().astype(int)]
    images = [Image.fromarray(frame[..., 0] if channels == 1 else frame) for frame in frames]
    if scale < 1:
        size = max(1, round(scale * width)), max(1, round(scale * height))
        images = [image.resize(size, Image.Resampling.BILINEAR) for image in images]
    image, exact = images[0], images[0].width * images[0].height <= _EXACT
    file, kind = io.BytesIO(), "png" if exact else "jpeg"
    options: dict[str, Any] = {} if exact else {"quality": _QUALITY}
    if pixels.ndim == 4:
        kind = "webp"
        played = {
            "save_all": True,
            "append_images": images[1:],
            "duration": _PLAYED // len(images),
            "loop": 0,
        }
        options = {**played, "lossless": exact, **options}
    image.save(file, kind, **options)
    source = f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
    larger = max(1, min(SHORT // short, LONG // long))
    return Thumbnail(source, image.width * larger, image.height * larger)


def _pixels(data: ImageSet, i: int) -> np.ndarray:  # uint8 [H, W, C], or [T, H, W, C]
    """From memory, or from the file: the middle of it, as in training. Raises DamagedImage."""
    if data.noun == "clip":
        return clean_clip(data, i).numpy()
    if not data.in_files:
        return data.train_images[i].numpy()
    size, channels = data.train_images.shape[2:]
    assert data.names is not None  # all that stays in files has them
    with picture(os.path.join(data.root or "", data.names[i]), channels, ENOUGH * size) as found:
        return resize_crop(found.pixels, min(size, SHORT))
