"""Images that live on the device as uint8; a batch is gathered, augmented and normalised there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class ResidentImages:
    """A training or test set on its device, read by index.

    images  uint8 [N, H, W, C]
    mean    per channel, of pixels in [0, 1];  std likewise, above 0
    flip    flip left to right with probability 1/2
    crop    reflect-pad by so many pixels on each side and crop back at random; 0 is off; below H and W
    cutout  largest side of the random square filled with 0 after normalisation; 0 is off

    The order is flip, crop, normalise, cutout. Raises ValueError or TypeError that names the argument.
    """

    def __init__(
        self,
        images: Tensor,  # [N, H, W, C] uint8
        *,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str,
        flip: bool,
        crop: int,
        cutout: int,
    ) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise TypeError(f"images must be uint8 [N, H, W, C], got {images.dtype} {list(images.shape)}")
        _, height, width, channels = images.shape
        if len(mean) != channels or len(std) != channels:
            raise ValueError(f"mean and std must have {channels} values, got mean={mean} and std={std}")
        if not all(value > 0 for value in std):
            raise ValueError(f"std must be above 0, got {std}")
        if not 0 <= crop < min(height, width):
            raise ValueError(f"crop must be at least 0 and below the image size {height}x{width}, got {crop}")
        if cutout < 0:
            raise ValueError(f"cutout must be at least 0, got {cutout}")
        self.images = images.to(device).contiguous()
        self.mean = torch.tensor(mean, dtype=torch.float32, device=self.images.device)
        self.std = torch.tensor(std, dtype=torch.float32, device=self.images.device)
        self.flip = flip
        self.crop = crop
        self.cutout = cutout

    def __len__(self) -> int:
        return len(self.images)

    def clean(
        self,
        index: Tensor,  # [B] int64, on the device
    ) -> Tensor:  # [B, C, H, W] float32, channels_last
        """Normalises, nothing else: (pixel / 255 - mean) / std."""
        return self._normalized(self.images.index_select(0, index)).permute(0, 3, 1, 2)

    def augmented(
        self,
        index: Tensor,  # [B] int64, on the device
        generator: torch.Generator,  # of the same device
    ) -> Tensor:  # [B, C, H, W] float32, channels_last
        """Every image draws its own flip, crop and cutout from the generator. Never waits for the device.

        Flip and crop only choose which pixel goes where: they are one gather of pixels [C] from the flat set,
        which is faster than to pad and crop and never makes the padded images.
        """
        _, height, width, channels = self.images.shape
        rows, cols = self._source_pixels(len(index), generator)
        source = ((index[:, None] * height + rows) * width)[:, :, None] + cols[:, None, :]  # [B, H, W]
        pixels = self.images.view(-1, channels).index_select(0, source.view(-1))
        batch = self._normalized(pixels.view(-1, height, width, channels))
        if self.cutout:
            batch.masked_fill_(self._holes(len(index), generator)[..., None], 0.0)
        return batch.permute(0, 3, 1, 2)

    def _normalized(
        self,
        pixels: Tensor,  # [B, H, W, C] uint8
    ) -> Tensor:  # [B, H, W, C] float32
        return pixels.to(torch.float32).div_(255).sub_(self.mean).div_(self.std)

    def _source_pixels(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Which row [B, H] and column [B, W] of its image each output pixel shows."""
        _, height, width, _ = self.images.shape
        rows = torch.arange(height, device=self.images.device).expand(batch, -1)
        cols = torch.arange(width, device=self.images.device).expand(batch, -1)
        if self.crop:
            rows = _reflected(rows + self._draw(-self.crop, self.crop, batch, generator), height)
            cols = _reflected(cols + self._draw(-self.crop, self.crop, batch, generator), width)
        if self.flip:
            # The flip comes before the crop, so what the crop has chosen are columns of the flipped image.
            cols = torch.where(self._draw(0, 1, batch, generator) == 1, width - 1 - cols, cols)
        return rows, cols

    def _holes(self, batch: int, generator: torch.Generator) -> Tensor:  # [B, H, W] bool, True in the square
        """A side of 1..cutout, a centre anywhere: side // 2 pixels each way, cut off at the border."""
        _, height, width, _ = self.images.shape
        half = self._draw(1, self.cutout, batch, generator) // 2
        row = torch.arange(height, device=self.images.device) - self._draw(0, height - 1, batch, generator)
        col = torch.arange(width, device=self.images.device) - self._draw(0, width - 1, batch, generator)
        return ((-half <= row) & (row < half))[:, :, None] & ((-half <= col) & (col < half))[:, None, :]

    def _draw(self, low: int, high: int, batch: int, generator: torch.Generator) -> Tensor:  # [B, 1] int64
        """One integer from low..high for each image."""
        return torch.randint(low, high + 1, (batch, 1), generator=generator, device=self.images.device)


def _reflected(index: Tensor, size: int) -> Tensor:
    """Folds -size < index < 2 * size - 1 into 0..size-1 as reflect padding does (the border stays single)."""
    return (size - 1) - (size - 1 - index.abs()).abs()
