"""What every data set is read into: images with their labels, and what a run has to know of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ups_fast.data.manifest import Manifest


@dataclass(frozen=True)
class ImageSet:
    """A data set in memory, on the CPU: of images, of clips, or of features.

    train_labels are the truth: they give the labeled part its labels and serve reports on the rest.
    `labeled` holds the labeled indices into train where the data set itself decides them (npz), else None.
    """

    name: str
    classes: list[str]
    train_images: Tensor  # [N, H, W, C] uint8; clips [N, F, H, W, C]; features [N, d] float32 or float16
    # int64 [N], -1 where the truth is unknown; of several labels int8 [N, C]: 1, 0, or -1 where it is unknown.
    train_labels: Tensor
    test_images: Tensor  # likewise
    test_labels: Tensor  # likewise of M
    mean: tuple[float, ...]  # [C], of pixels in [0, 1]; of features [d]
    std: tuple[float, ...]  # likewise, above 0
    labeled: Tensor | None = None  # [L] int64, ascending
    # [V] int64, ascending: validation images among the training set's ids; nothing trains on them.
    val: Tensor | None = None
    names: list[str] | None = None  # [N] the file of each training image, where it has one of its own
    test_names: list[str] | None = None  # [M] likewise
    root: str | None = None  # folder of these files
    in_files: bool = False  # images stay in them: train_images and test_images are [0, S, S, C]
    notes: tuple[str, ...] = ()  # sentences for the user
    damaged: tuple[str, ...] = ()  # likewise, one for each file that could not be read and was left out
    # Images that are gone since a run began, black here: their positions, each with a sentence.
    unreadable: Mapping[int, str] = field(default_factory=dict)  # of the training set
    test_unreadable: Mapping[int, str] = field(default_factory=dict)
    manifest: Manifest | None = None  # of files: what a run compares at every start
    frames: int = 0  # that a network gets of a clip; 0: all of them
    stride: int = 1  # and each of so many one
    # int64 [N], of clips of other lengths: so many of their F frames are there, and the last one is repeated.
    lengths: Tensor | None = None
    test_lengths: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """[C, H, W] of an image as a network gets it, [C, T, H, W] of a clip; [d] of features."""
        sizes = tuple(self.train_images.shape[1:])
        if len(sizes) == 4 and self.frames:
            sizes = (self.frames, *sizes[1:])
        return sizes if len(sizes) == 1 else (sizes[-1], *sizes[:-1])

    @property
    def noun(self) -> str:
        """What its samples are called."""
        return {1: "row", 3: "image", 4: "clip"}[len(self.shape)]


def moments(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:  # [N, .., C] uint8
    """Mean and std per channel of pixels in [0, 1], from exact sums. A constant channel gets std 1."""
    pixels = images.flatten(0, -2)  # [n, C]
    n = len(pixels)
    total = torch.zeros(images.shape[-1], dtype=torch.int64)
    squares = torch.zeros_like(total)
    for chunk in pixels.split(1 << 22):  # a wide copy of all images at once would take gigabytes
        wide = chunk.to(torch.int32)
        total += wide.sum(0)
        squares += wide.square().sum(0)
    mean = tuple(s / n / 255 for s in total.tolist())
    variance = [
        (n * q - s * s) / n**2 / 255**2 for s, q in zip(total.tolist(), squares.tolist(), strict=True)
    ]
    return mean, tuple(v**0.5 if v > 0 else 1.0 for v in variance)
