"""The published recipe written anew, as the rival: each image through Pillow and torchvision in a worker process.

What the UPS code (Rizve et al., 2021) does to a training image, call by call, drawn from Python's and NumPy's global
random states. Posterize to 0 bits is a black image, which Pillow itself refuses since 13.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch import Tensor
from torchvision import transforms


def _either(value: float) -> float:
    return -value if random.random() > 0.5 else value


def _affine(picture: Image.Image, *matrix: float) -> Image.Image:
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix)


def _square(picture: Image.Image, side: float) -> Image.Image:
    width, height = picture.size
    left = int(max(0, np.random.uniform(width) - side / 2))
    top = int(max(0, np.random.uniform(height) - side / 2))
    picture = picture.copy()
    box = left, top, min(width, left + side), min(height, top + side)
    ImageDraw.Draw(picture).rectangle(box, (125, 123, 114))
    return picture


def _solarize_add(picture: Image.Image, added: float) -> Image.Image:
    lighter = np.clip(np.array(picture).astype(int) + added, 0, 255).astype(np.uint8)
    return ImageOps.solarize(Image.fromarray(lighter), 128)


def _posterize(picture: Image.Image, bits: float) -> Image.Image:
    return ImageOps.posterize(picture, int(bits)) if bits >= 1 else picture.point(lambda level: 0)


OPERATIONS = [  # with the range that magnitudes 0 to 30 span
    (lambda picture, _: ImageOps.autocontrast(picture), 0, 1),
    (lambda picture, _: ImageOps.equalize(picture), 0, 1),
    (lambda picture, _: ImageOps.invert(picture), 0, 1),
    (lambda picture, v: picture.rotate(_either(v)), 0, 30),
    (_posterize, 0, 4),
    (lambda picture, v: ImageOps.solarize(picture, v), 0, 256),
    (_solarize_add, 0, 110),
    (lambda picture, v: ImageEnhance.Color(picture).enhance(v), 0.1, 1.9),
    (lambda picture, v: ImageEnhance.Contrast(picture).enhance(v), 0.1, 1.9),
    (lambda picture, v: ImageEnhance.Brightness(picture).enhance(v), 0.1, 1.9),
    (lambda picture, v: ImageEnhance.Sharpness(picture).enhance(v), 0.1, 1.9),
    (lambda picture, v: _affine(picture, 1, _either(v), 0, 0, 1, 0), 0, 0.3),
    (lambda picture, v: _affine(picture, 1, 0, 0, _either(v), 1, 0), 0, 0.3),
    (_square, 0, 40),
    (lambda picture, v: _affine(picture, 1, 0, _either(v), 0, 1, 0), 0, 100),
    (lambda picture, v: _affine(picture, 1, 0, 0, 0, 1, _either(v)), 0, 100),
]


def rand_augment(picture: Image.Image, n: int = 3, m: int = 4) -> Image.Image:
    for operation, low, high in random.choices(OPERATIONS, k=n):
        picture = operation(picture, m / 30 * (high - low) + low)
    return picture


def cutout(image: Tensor, longest: int = 16) -> Tensor:
    """One square of zeros in a tensor [C, H, W]."""
    _, height, width = image.shape
    half = random.randint(1, longest) // 2
    y, x = np.random.randint(height), np.random.randint(width)
    mask = np.ones((height, width), np.float32)
    mask[max(0, y - half) : min(height, y + half), max(0, x - half) : min(width, x + half)] = 0
    return image * torch.from_numpy(mask)


def training_transform(mean: tuple[float, ...], std: tuple[float, ...]) -> transforms.Compose:
    """From a Pillow image to a tensor [C, H, W]."""
    return transforms.Compose(
        [
            rand_augment,
            transforms.RandomHorizontalFlip(),
            transforms.RandomCrop(32, padding=4, padding_mode="reflect"),
            transforms.ColorJitter(0.4, 0.4, 0.4),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
            cutout,
        ]
    )
