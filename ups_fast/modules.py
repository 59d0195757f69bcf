"""The ops as modules of torch, for networks built of parts. Needs torch alone."""

from __future__ import annotations

from torch import Tensor, nn

from .ops import counter_dropout, mish
from .reference import check_dropout


class Mish(nn.Module):
    """`ups_fast.mish` as a module: x tanh(log(1 + exp(x))), elementwise.

    >>> import torch
    >>> Mish()(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([-0.3034,  0.0000,  1.9440])
    """

    def forward(self, x: Tensor) -> Tensor:  # [...], floating-point
        return mish(x)


class CounterDropout(nn.Dropout):
    """`ups_fast.counter_dropout` as a module: with keys it drops by these, in training and in eval mode.

    Without keys it is nn.Dropout: it draws from torch's generator in training mode and is off in eval mode.

    Args:
        p: in [0, 1), how likely an element is dropped.
        layer: 0 .. 2^20 - 1, the number of this dropout in its network: each number has other masks.

    Raises:
        TypeError, ValueError: naming the argument and what it got.

    >>> import torch
    >>> from ups_fast import dropout_keys
    >>> dropout = CounterDropout(0.5, layer=3).eval()
    >>> x, keys = torch.ones(2, 8), dropout_keys(torch.tensor([4, 7]), seed=0, draw=0)
    >>> torch.equal(dropout(x, keys), dropout(x, keys))  # a function of x and keys
    True
    >>> torch.equal(dropout(x), x)
    True
    """

    def __init__(self, p: float = 0.5, layer: int = 0) -> None:
        check_dropout(p, layer)
        super().__init__(p)
        self.layer = layer

    def forward(  # type: ignore[override]
        self,
        x: Tensor,  # [B, C, ...]
        keys: Tensor | None = None,  # int32 [B], see `ups_fast.dropout_keys`
    ) -> Tensor:  # [B, C, ...]
        if keys is None:
            return super().forward(x)
        return counter_dropout(x, keys, p=self.p, layer=self.layer) if self.p else x

    def extra_repr(self) -> str:
        return f"p={self.p}, layer={self.layer}"
