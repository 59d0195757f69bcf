"""Which part of an image a batch gets: the random resized crop, drawn from seed, draw and sample id, or the middle.

A box is (top, left, height, width) in pixels of the upright image, and always within it.
"""

from __future__ import annotations

import math

import numpy as np

Box = tuple[int, int, int, int]

RATIO = (3 / 4, 4 / 3)  # width by height of a random box
TRIES = 10
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def box_draws(
    ids: np.ndarray,  # [B] int64
    draw: np.ndarray,  # [B] int64
    seed: int,
) -> np.ndarray:  # [B, TRIES, 4] float64 in [0, 1): area, shape, top and left of each try
    """Depends on nothing but its arguments, row by row. Counter-based: SplitMix64 keyed by seed, draw and id."""
    key = _mixed(np.array(seed % 2**64, np.uint64))
    for part in (draw, ids):
        key = _mixed(key ^ _mixed(part.astype(np.uint64)))
    counter = np.arange(4 * TRIES, dtype=np.uint64) * _GOLDEN
    words = _mixed(key[:, None] + counter)
    return ((words >> np.uint64(11)) * 2.0**-53).reshape(-1, TRIES, 4)


def _mixed(x: np.ndarray) -> np.ndarray:  # uint64
    x = x.ravel() + _GOLDEN if x.ndim else x[None] + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def random_box(
    draws: np.ndarray,  # [TRIES, 4], a row of `box_draws`
    height: int,
    width: int,
    scale: tuple[float, float],
) -> Box:
    """The rule of torchvision's RandomResizedCrop: a share of the area in `scale` and a shape in RATIO, each evenly
    (the shape's logarithm), anywhere in the image. The first try that fits counts; after the last one, the middle."""
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    for area, shape, top, left in draws.tolist():
        pixels = height * width * (scale[0] + (scale[1] - scale[0]) * area)
        ratio = math.exp(low + (high - low) * shape)
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
    h, w = height, width
    if width < RATIO[0] * height:
        h = round(width / RATIO[0])
    elif width > RATIO[1] * height:
        w = round(height * RATIO[1])
    return (height - h) // 2, (width - w) // 2, h, w


def middle_box(height: int, width: int, share: float) -> Box:
    """The square in the middle, of `share` of the shorter side: to scale it to S is to scale the shorter side to
    S / share and to keep the middle S x S."""
    side = max(1, round(min(height, width) * share))
    return (height - side) // 2, (width - side) // 2, side, side
