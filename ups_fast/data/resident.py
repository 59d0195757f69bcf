"""Images that live on the device as uint8; a batch is gathered, augmented and normalized there by one op.

For a device without kernels (a GPU, where nvcc was missing at build time) they live on the host, and batches are
copied: the op's reference goes through Pillow image by image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat

import torch
from torch import Tensor

from ups_fast.data.images import Draws, View
from ups_fast.ops import augment, has_kernels
from ups_fast.policy import POLICIES, Policy, Tables, normalization, tables


class Resident(ABC):
    """What images and clips on a device have in common. Arguments as of `ResidentImages`."""

    shape: tuple[int, ...]

    def __init__(
        self,
        images: Tensor,  # [n, H, W, C] uint8, of clips all frames
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str,
        policy: Policy,
        unreadable: Mapping[int, str] | None,
    ) -> None:
        self.device, self.unreadable = torch.device(device), dict(unreadable or {})
        home = self.device if has_kernels(self.device) else torch.device("cpu")
        self.images = images.to(home).contiguous()
        self.mean, self.std, self.policy = tuple(mean), tuple(std), policy
        self._kept: dict[Policy, tuple[Tables, Tensor]] = {}

    def _outlive(self, policy: Policy) -> None:
        """A CUDA graph goes on reading what a policy needs, which must outlive the cache that it comes from."""
        if policy not in self._kept:
            height, width, channels = self.images.shape[1:]
            home = self.images.device
            of_pixels = normalization(self.mean, self.std, torch.float32, home)
            self._kept[policy] = tables(policy, height, width, channels, home), of_pixels

    @abstractmethod
    def clean(self, index: Tensor) -> Tensor:
        """A batch that is normalized, nothing else: (pixel / 255 - mean) / std."""

    def clean_batches(
        self,
        index: Tensor,  # [n] int64, on the device
        batch_size: int,
    ) -> Iterator[Tensor]:  # each [batch_size, *shape], the last may be short
        return map(self.clean, index.split(batch_size))

    def ahead(
        self, steps: Iterable[tuple[Tensor, Tensor]], views: Sequence[View], *, seed: int, out: Tensor
    ) -> Iterator[None]:
        """Nothing."""
        return repeat(None)


class ResidentImages(Resident):
    """A training or test set on its device, read by index.

    images  uint8 [N, H, W, C], C = 1 or 3
    mean    per channel, of pixels in [0, 1];  std likewise, above 0
    policy  what is done to the images of `augmented`
    unreadable    of images that were not there when the others were read: their positions, each with a sentence

    Raises ValueError or TypeError that names the argument.
    """

    def __init__(
        self,
        images: Tensor,  # [N, H, W, C] uint8
        *,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str,
        policy: Policy = POLICIES["none"],
        unreadable: Mapping[int, str] | None = None,
    ) -> None:
        super().__init__(images, mean, std, device, policy, unreadable)
        nothing = torch.zeros(0, dtype=torch.int64, device=self.images.device)
        self._read(nothing, policy, 0, 0)  # what is wrong with the arguments is said now
        height, width, channels = self.images.shape[1:]
        self.shape = channels, height, width
        self._outlive(policy)

    def __len__(self) -> int:
        return len(self.images)

    def clean(
        self,
        index: Tensor,  # [B] int64, on the device
    ) -> Tensor:  # [B, C, H, W] float32, channels_last
        """Normalizes, nothing else: (pixel / 255 - mean) / std."""
        return self._read(index, POLICIES["none"], 0, 0)

    def drawn_batches(
        self,
        index: Tensor,  # [n] int64, on the device
        batch_size: int,
        draws: Draws,
    ) -> Iterator[Tensor]:  # each [P * batch_size, C, H, W], the last may be short
        for ids, draw in map(draws.of, index.split(batch_size)):
            yield self._read(ids, draws.policy, draws.seed, draw)

    def augmented(
        self,
        index: Tensor,  # [B] int64, on the device
        *,
        seed: int | Tensor,
        epoch: int | Tensor,
    ) -> Tensor:  # [B, C, H, W] float32, channels_last
        """As the policy draws for each image from seed, epoch and its index.

        Never waits for the device, unless the images live on the host for want of kernels.
        """
        return self._read(index, self.policy, seed, epoch)

    def read(self, index: Tensor, draw: Tensor, views: Sequence[View], *, seed: Tensor, out: Tensor) -> None:
        """Augments each view into its rows of the batch, as `augmented` does."""
        for view in views:
            rows = slice(view.first, view.last)
            self._outlive(view.policy)
            self._read(index[rows], view.policy, view.seed(seed), draw[rows], out[rows])

    def _read(
        self,
        index: Tensor,
        policy: Policy,
        seed: int | Tensor,
        epoch: int | Tensor,
        out: Tensor | None = None,
    ) -> Tensor:
        home = self.images.device
        index, epoch = index.to(home), epoch.to(home) if isinstance(epoch, Tensor) else epoch
        here = out if home == self.device else None
        batch = augment(
            self.images, index, policy=policy, seed=seed, draw=epoch, mean=self.mean, std=self.std, out=here
        )
        if out is None or here is not None:
            return batch.to(self.device)
        return out.copy_(batch)
