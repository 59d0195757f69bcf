"""Shake-Shake networks (Gastaldi 2017): two branches in each block, mixed at random."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ups_fast.models.network import Blocks, Dropout, blocks_per_stage, initialize
from ups_fast.reference import counter_uniform

_GATES = 1 << 19  # the layer whose words are the gates: a number that no Dropout has


def shake(
    first: Tensor,  # [B, C, H, W]
    second: Tensor,  # [B, C, H, W]
    gates: Tensor,  # float [B, 2], in [0, 1]: alpha, beta
) -> Tensor:  # [B, C, H, W]
    """alpha first + (1 - alpha) second, with the gradient of beta first + (1 - beta) second.

    >>> first, second = (torch.full((1, 1, 1, 1), x, requires_grad=True) for x in (8.0, 4.0))
    >>> mixed = shake(first, second, torch.tensor([[0.75, 0.25]]))
    >>> mixed.sum().backward()
    >>> mixed.item(), first.grad.item(), second.grad.item()
    (7.0, 0.25, 0.75)
    """
    alpha, beta = gates.to(first.dtype)[:, :, None, None, None].unbind(1)
    difference = first - second
    # What is detached has no gradient, and nothing of the size of the images is stored for the backward pass.
    return second + beta * difference + (alpha - beta) * difference.detach()


class _Halves(nn.Module):
    """Where the image is halved: two 1x1 convolutions, each of every other pixel, one moved by a pixel."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.even, self.odd = (nn.Conv2d(inputs, outputs // 2, 1, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:  # [B, inputs, H, W] -> [B, outputs, ceil(H / 2), ceil(W / 2)]
        moved = F.pad(x[:, :, :-1, :-1], (1, 0, 1, 0))  # right and down
        # Not a 1x1 convolution of stride 2, which is the same: that of oneDNN writes out of bounds for few channels.
        even, odd = (F.avg_pool2d(each, 1, stride=2) for each in (x, moved))
        return torch.cat([self.even(even), self.odd(odd)], 1)


class _Block(nn.Module):
    """[B, inputs, H, W] -> [B, outputs, ceil(H / stride), ceil(W / stride)].

    Both branches are ReLU, 3x3, BN, ReLU, 3x3, BN. The ReLU that they begin with is one, and so is the dropout
    after it. The shortcut is x, or where the shape changes a convolution of ReLU(x) and BN.
    """

    def __init__(
        self, inputs: int, outputs: int, stride: int, *, dropout: Dropout, bn_momentum: float
    ) -> None:
        super().__init__()

        def branch() -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(outputs, momentum=bn_momentum),
                nn.ReLU(inplace=True),
                nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
                nn.BatchNorm2d(outputs, momentum=bn_momentum),
            )

        self.dropout = dropout
        self.first, self.second = branch(), branch()
        self.shortcut: nn.Module | None = None
        if inputs != outputs:
            change = nn.Conv2d(inputs, outputs, 1, bias=False) if stride == 1 else _Halves(inputs, outputs)
            self.shortcut = nn.Sequential(change, nn.BatchNorm2d(outputs, momentum=bn_momentum))

    def forward(
        self,
        x: Tensor,  # [B, inputs, H, W]
        keys: Tensor | None,  # int32 [B]
        gates: Tensor | None = None,  # float32 [B, 2]; None: one half
    ) -> Tensor:  # [B, outputs, ceil(H / stride), ceil(W / stride)]
        active = F.relu(x)
        shortcut = x if self.shortcut is None else self.shortcut(active)
        dropped = self.dropout(active, keys)
        first, second = self.first(dropped), self.second(dropped)
        mixed: Tensor = (first + second) / 2 if gates is None else shake(first, second, gates)
        return shortcut + mixed


class ShakeShake(Blocks):
    """Shake-Shake D 2xWd: float32 [B, channels, H, W] -> logits float32 [B, n_classes], H and W at least 8.

    Three stages of n = (D - 2) / 6 blocks with W, 2 W and 4 W channels; dropout in front of both branches of every
    block. In training mode each image and block has a gate of its own, alpha in the forward and beta in the backward
    pass ("Shake-Shake-Image"): by keys, or without them by torch's generator. In eval mode, and so in all labeling
    passes, gates are one half.
    """

    min_size: int = 8

    def __init__(
        self,
        depth: int,
        width: int,
        n_classes: int,
        channels: int,
        *,
        dropout: float,
        kind: type[Dropout] = Dropout,
        bn_momentum: float,
    ) -> None:
        if depth > 1000 or not 1 <= width <= 1000:
            raise ValueError(
                f"a Shake-Shake must have depth at most 1000 and width in [1, 1000], got {depth} and {width}"
            )
        n = blocks_per_stage("Shake-Shake", depth, 6, 2)
        super().__init__()
        blocks: list[nn.Module] = []
        inputs = 16
        for stage in range(3):
            outputs = width * 2**stage
            for at in range(n):
                stride, each = 2 if stage and not at else 1, kind(dropout, layer=len(blocks))
                blocks.append(_Block(inputs, outputs, stride, dropout=each, bn_momentum=bn_momentum))
                inputs = outputs
        self.stem = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16, momentum=bn_momentum)
        )
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.linear = nn.Linear(inputs, n_classes)
        initialize(self, self.linear)

    def embed(
        self,
        hidden: Tensor,  # as of `prefix`
        keys: Tensor | None,  # int32 [B]
        skip: int = 0,
    ) -> Tensor:  # [B, 4 W]
        gates = self._gates(hidden, keys)
        for i, block in enumerate(self.blocks[skip:], skip):
            hidden = block(hidden, keys, None if gates is None else gates[:, i])
        features: Tensor = self.head(hidden)
        return features

    def _gates(self, hidden: Tensor, keys: Tensor | None) -> Tensor | None:  # float32 [B, blocks, 2]
        if not self.training:
            return None
        rows, blocks = len(hidden), len(self.blocks)
        if keys is None:
            return torch.rand(rows, blocks, 2, device=hidden.device)
        return counter_uniform(2 * blocks, keys, layer=_GATES).view(rows, blocks, 2)
