"""The published augmentation in other libraries, as fast as they let us write it: as many operations of the same kinds.

Neither is Pillow's result bit for bit: nearest neighbors, equalize, sharpness at the border and rounding differ.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

MAGNITUDE = 4 / 30
SHEAR, SHIFT, TURN, SIDE = 0.3 * MAGNITUDE, 100 * MAGNITUDE, 30 * MAGNITUDE, 40 * MAGNITUDE
FACTOR = 0.1 + 1.8 * MAGNITUDE  # of Color, Contrast, Brightness and Sharpness
THRESHOLD, ADDED = 256 * MAGNITUDE, int(110 * MAGNITUDE)
FILL = (125, 123, 114)


def torchvision_transform(
    mean: tuple[float, ...], std: tuple[float, ...], device: str
) -> Callable[[Tensor], Tensor]:
    """uint8 [3, 32, 32] -> float32, an image at a time: a v2 transform draws once for all that it is given.

    v2 has all 16 operations, but its RandAugment lacks Invert, SolarizeAdd and the square and draws from others.
    """

    def either(value: float) -> float:
        return random.choice((-value, value))

    def moved(
        image: Tensor, shift: tuple[float, float] = (0, 0), shear: tuple[float, float] = (0, 0)
    ) -> Tensor:
        return tv.affine(image, 0.0, list(shift), 1.0, [math.degrees(math.atan(each)) for each in shear])

    color = torch.tensor(FILL, dtype=torch.uint8, device=device)[:, None, None]

    def square(image: Tensor, longest: float, value: Tensor) -> Tensor:
        height, width = image.shape[1:]
        top = max(0, int(random.uniform(0, height) - longest / 2))
        left = max(0, int(random.uniform(0, width) - longest / 2))
        return tv.erase(image, top, left, int(longest), int(longest), value)

    operations: list[Callable[[Tensor], Tensor]] = [
        tv.autocontrast,
        tv.equalize,
        tv.invert,
        lambda image: tv.rotate(image, either(TURN)),
        lambda image: tv.posterize(image, 0),
        lambda image: tv.solarize(image, THRESHOLD),
        lambda image: tv.solarize(image.clamp(max=255 - ADDED) + ADDED, 128),
        lambda image: tv.adjust_saturation(image, FACTOR),
        lambda image: tv.adjust_contrast(image, FACTOR),
        lambda image: tv.adjust_brightness(image, FACTOR),
        lambda image: tv.adjust_sharpness(image, FACTOR),
        lambda image: moved(image, shear=(either(SHEAR), 0)),
        lambda image: moved(image, shear=(0, either(SHEAR))),
        lambda image: square(image, SIDE, color),
        lambda image: moved(image, shift=(either(SHIFT), 0)),
        lambda image: moved(image, shift=(0, either(SHIFT))),
    ]
    nothing = torch.zeros(1, 1, 1, device=device)
    rest = v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomCrop(32, padding=4, padding_mode="reflect"),
            v2.ColorJitter(0.4, 0.4, 0.4),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, std, inplace=True),
        ]
    )

    def transform(image: Tensor) -> Tensor:
        for operation in random.choices(operations, k=3):
            image = operation(image)
        return square(rest(image), random.randint(1, 16), nothing)

    return transform


def kornia_transform(mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[[Tensor], Tensor]:
    """uint8 [B, 3, 32, 32] -> float32, as a batch.

    kornia's own RandAugment draws its operations once for the batch; here each image draws its own: the batch is sorted
    by what was drawn and each operation sees its part of it. Flip, crop and squares are plain indexing, faster than
    kornia's. Still different: the order of the color jitter is drawn once for the batch, and all is in float32.
    """
    import kornia.augmentation as K
    import kornia.enhance as E
    from kornia.geometry import transform as T

    def either(images: Tensor, value: float) -> Tensor:
        return value * (torch.randint(2, (len(images),), device=images.device) * 2.0 - 1)

    def along(images: Tensor, axis: int, value: float) -> Tensor:  # [B, 2]
        return F.pad(either(images, value)[:, None], (axis, 1 - axis))

    def square(images: Tensor, side: Tensor | float, value: Tensor) -> Tensor:
        size = torch.arange(32, device=images.device)
        corner = (torch.rand(2, len(images), 1, device=images.device) * 32 - side / 2).clamp(min=0).floor()
        inside = (size >= corner) & (size < corner + side)  # [2, B, 32]
        return torch.where((inside[0, :, :, None] & inside[1, :, None, :])[:, None], value, images)

    operations: list[Callable[[Tensor], Tensor]] = [
        lambda images: E.normalize_min_max(images).clamp(0, 1),
        E.equalize,
        E.invert,
        lambda images: T.rotate(images, either(images, TURN), mode="nearest"),
        lambda images: E.posterize(images, 0),
        lambda images: E.solarize(images, THRESHOLD / 255),
        lambda images: E.solarize(images, 128 / 255, ADDED / 255),
        lambda images: E.adjust_saturation_with_gray_subtraction(images, FACTOR),
        lambda images: E.adjust_contrast_with_mean_subtraction(images, FACTOR),
        lambda images: E.adjust_brightness_accumulative(images, FACTOR),
        lambda images: E.sharpness(images, FACTOR),
        lambda images: T.shear(images, along(images, 0, SHEAR), mode="nearest"),
        lambda images: T.shear(images, along(images, 1, SHEAR), mode="nearest"),
        lambda images: square(images, int(SIDE), images.new_tensor(FILL).div(255)[:, None, None]),
        lambda images: T.translate(images, along(images, 0, SHIFT), mode="nearest"),
        lambda images: T.translate(images, along(images, 1, SHIFT), mode="nearest"),
    ]
    jitter, normalize = K.ColorJitter(0.4, 0.4, 0.4), K.Normalize(mean, std)

    def transform(pixels: Tensor) -> Tensor:
        device, n = pixels.device, len(pixels)
        images = pixels.float().div_(255)
        place = torch.arange(n, device=device)  # of each image in the batch that came in
        for _ in range(3):
            drawn, order = torch.randint(len(operations), (n,), device=device).sort()
            parts = images[order].split(drawn.bincount(minlength=len(operations)).tolist())
            images = torch.cat(
                [op(part) if len(part) else part for op, part in zip(operations, parts, strict=True)]
            )
            place = place[order]
        images = torch.where(torch.rand(n, 1, 1, 1, device=device) < 0.5, images.flip(3), images)
        windows = F.pad(images, (4, 4, 4, 4), mode="reflect").unfold(2, 32, 1).unfold(3, 32, 1)
        y, x = torch.randint(9, (2, n), device=device)
        images = normalize(jitter(windows[torch.arange(n, device=device), :, y, x]))
        side = torch.randint(1, 17, (n, 1), device=device)
        images = square(images, side, images.new_zeros(1))
        return torch.empty_like(images).index_copy_(0, place, images)

    return transform
