"""Dropout as the networks of this package have it."""

from __future__ import annotations

from torch import Tensor, nn

from ups_fast.ops import counter_dropout


class Dropout(nn.Dropout):
    """Drops by keys where it is given some, in training and in eval mode; without keys it is nn.Dropout.

    layer    number of this dropout in its network: each has other masks
    """

    def __init__(self, p: float, layer: int) -> None:
        super().__init__(p)
        self.layer = layer

    def forward(  # type: ignore[override]
        self,
        x: Tensor,  # [B, C, H, W]
        keys: Tensor | None = None,  # int32 [B], see ups_fast.dropout_keys
    ) -> Tensor:  # [B, C, H, W]
        if keys is None:
            return super().forward(x)
        return counter_dropout(x, keys, p=self.p, layer=self.layer) if self.p else x
