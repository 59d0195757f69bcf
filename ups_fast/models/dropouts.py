"""What a layer of dropout drops: elements, whole channels, or squares of them, by keys as `CounterDropout` does."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d, pad

from ups_fast.modules import CounterDropout as Dropout
from ups_fast.ops import counter_dropout

LARGEST_BLOCK = 7  # published


class _MapDropout(Dropout):
    """Dropout of feature maps [B, C, H, W]. Without keys it acts in training mode, by keys of torch's generator."""

    def forward(
        self,
        x: Tensor,  # [B, C, H, W]
        keys: Tensor | None = None,  # int32 [B], see `ups_fast.dropout_keys`
    ) -> Tensor:  # [B, C, H, W]
        if not self.p or (keys is None and not self.training):
            return x
        if keys is None:
            keys = torch.randint(-(1 << 31), 1 << 31, (len(x),), dtype=torch.int32, device=x.device)
        return (x * self.scale(x, keys)).to(x.dtype)

    def scale(self, x: Tensor, keys: Tensor) -> Tensor:  # float32, as x or with sizes of 1
        """By what x is multiplied: 0 where it is dropped, at least 1 elsewhere."""
        raise NotImplementedError


class SpatialDropout(_MapDropout):
    """Drops whole channels with probability p: neighbors in a map are too alike to be dropped alone (Tompson 2015).

    >>> import torch
    >>> from ups_fast import dropout_keys
    >>> x, keys = torch.ones(2, 8, 4, 4), dropout_keys(torch.tensor([4, 7]), seed=0, draw=0)
    >>> SpatialDropout(0.5)(x, keys).flatten(2).std(2).max().item()
    0.0
    """

    def scale(self, x: Tensor, keys: Tensor) -> Tensor:
        ones = torch.ones(x.shape[:2], device=x.device)
        return counter_dropout(ones, keys, p=self.p, layer=self.layer)[:, :, None, None]


class DropBlock(_MapDropout):
    """Drops squares of each channel, about a share p of it in all (Ghiasi et al. 2018).

    Squares have sides of 7, or of half the map where that is less. They lie within the map and may overlap. What is
    kept is scaled up so that the sum of a row's mask stays: row by row, where the published code takes a whole batch,
    so that an image's answer depends on no other.

    >>> import torch
    >>> from ups_fast import dropout_keys
    >>> x, keys = torch.ones(2, 8, 4, 4), dropout_keys(torch.tensor([4, 7]), seed=0, draw=0)
    >>> y = DropBlock(0.5)(x, keys)
    >>> 0.2 < (y == 0).double().mean().item() < 0.8, y.sum((1, 2, 3)).round().tolist()
    (True, [128.0, 128.0])
    """

    def scale(self, x: Tensor, keys: Tensor) -> Tensor:
        height, width = x.shape[2:]
        side = max(1, min(LARGEST_BLOCK, height // 2, width // 2))
        corners = height - side + 1, width - side + 1  # where the first pixel of a square may lie
        # gamma, with which each such pixel begins a square that is dropped
        rate = self.p * height * width / (side * side * corners[0] * corners[1])
        ones = torch.ones(*x.shape[:2], *corners, device=x.device)
        begins = (counter_dropout(ones, keys, p=rate, layer=self.layer) == 0).float()
        columns = max_pool2d(
            pad(begins, [side - 1] * 4), (side, 1), 1
        )  # one way, then the other: cheaper, and equal
        kept = 1 - max_pool2d(columns, (1, side), 1)
        total = kept.sum((1, 2, 3), keepdim=True).clamp(min=1)
        return kept * (x.shape[1] * height * width / total)


# By the names of select.uncertainty that are kinds of dropout.
KINDS: dict[str, type[Dropout]] = {"dropout": Dropout, "spatial": SpatialDropout, "dropblock": DropBlock}


def has_maps(name: str) -> bool:
    """Whether the dropout of the network of this name meets feature maps; elsewhere it meets rows of features."""
    return name == "cnn13" or name.startswith(("wrn-", "shake-", "resnext-"))
