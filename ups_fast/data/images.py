"""What a run asks of images, wherever they live: `ResidentImages` on the device, `FileImages` in files.

Features are images of a single dimension: `ResidentFeatures`. Clips have one more: `ResidentClips`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

# Of the numbers of 63 bits by which things are drawn, the uppermost say for which view of an image.
VIEW_BITS = 56


class View(NamedTuple):
    """Rows of a batch whose images are augmented in one way."""

    first: int
    last: int  # behind the last row
    policy: Any  # a `Policy`; of features a `Noise`
    source: int  # of the images that a batch reads, each once, the one that is in row `first`
    number: int = 0  # of the view; 0 where no earlier one reads these images

    @property
    def again(self) -> bool:
        return self.number > 0

    def seed(self, seed: int | Tensor) -> int | Tensor:
        """By which the view is drawn. Of a draw `augment` reads 32 bits, which epochs and repeats need."""
        return seed ^ (self.number << VIEW_BITS) if self.number else seed


class Draws(NamedTuple):
    """What is drawn for clean images that are seen several times: test-time augmentation (Ayhan & Berens 2018)."""

    passes: int
    policy: Any  # as of `View`
    seed: int

    def of(self, index: Tensor) -> tuple[Tensor, Tensor]:  # int64 [B] -> [P * B], pass by pass
        """Sample ids, and the draw of each, which is its pass."""
        draw = torch.arange(self.passes, device=index.device)
        return index.repeat(self.passes), draw.repeat_interleave(len(index))


def memory_format(ndim: int) -> torch.memory_format:
    """In which order a batch of so many dimensions lies in memory: its channels last."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return formats.get(ndim, torch.contiguous_format)


class Images(Protocol):
    """A training or test set, read by sample id, a batch at a time.

    A batch is a tensor float32 [B, C, H, W] in channels_last on the device, [B, C, T, H, W] in channels_last_3d, or
    [B, d], and each step writes over the last one. What is drawn depends on seed, draw and sample id alone.
    """

    device: torch.device
    shape: tuple[int, ...]  # of an image in a batch: [C, H, W], of a clip [C, T, H, W], of features [d]
    # Ids of images that are not there, each with a sentence: black, not to be learned from.
    unreadable: dict[int, str]

    def __len__(self) -> int: ...

    def ahead(
        self,
        steps: Iterable[tuple[Tensor, Tensor]],  # of each step sample ids and draws, int64 [B], on the host
        views: Sequence[View],
        *,
        seed: int,
        out: Tensor,  # the batch
    ) -> Iterator[None]:
        """Before each step: what cannot be done on the device, such as reading files."""

    def read(
        self,
        index: Tensor,  # int64 [B], on the device
        draw: Tensor,  # int64 [B], likewise
        views: Sequence[View],
        *,
        seed: Tensor,  # int64 []
        out: Tensor,
    ) -> None:
        """In each step: all the rest. Never waits for the device."""

    def clean_batches(
        self,
        index: Tensor,  # int64 [n], on the device
        batch_size: int,
    ) -> Iterator[Tensor]:  # each [batch_size, *shape], the last may be short
        """Images that are normalized, and nothing else."""

    def drawn_batches(
        self,
        index: Tensor,  # int64 [n], on the device
        batch_size: int,
        draws: Draws,
    ) -> Iterator[Tensor]:  # each [P * batch_size, *shape], pass by pass, the last may be short
        """The same images, each changed once for each pass by `draws`, and then normalized."""
