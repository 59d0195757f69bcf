"""Wide residual networks WRN-d-k as semi-supervised learning uses them (Zagoruyko & Komodakis 2016)."""

from __future__ import annotations

from torch import Tensor, nn

from ups_fast.models.network import Blocks, Dropout, activation_of, blocks_per_stage, initialize


def _batch_norm(channels: int, momentum: float) -> nn.BatchNorm2d:
    """The published "BN + 0.1": a positive shift before the activation.

    A learnt bias that starts at 0.1 is the same function with the same gradients, at no cost. Only weight
    decay on that bias could tell the two apart, and the published training has none.
    """
    bn = nn.BatchNorm2d(channels, momentum=momentum)
    nn.init.constant_(bn.bias, 0.1)
    return bn


class _Block(nn.Module):
    """Pre-activation residual block, [B, inputs, H, W] -> [B, outputs, ceil(H / stride), ceil(W / stride)].

    With a = activation(bn1(x)), conv1 takes a, or x where `raw_branch` (bn1 is then dead: it is kept for its
    published parameters and never run); the shortcut takes x, or a where `activated_shortcut`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        *,
        dropout: Dropout,
        activation: str,
        bn_momentum: float,
        raw_branch: bool,
        activated_shortcut: bool,
    ) -> None:
        super().__init__()
        self.raw_branch = raw_branch
        self.activated_shortcut = activated_shortcut
        self.bn1 = _batch_norm(inputs, bn_momentum)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.dropout = dropout
        self.bn2 = _batch_norm(outputs, bn_momentum)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.activation = activation_of(activation)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(
        self,
        x: Tensor,  # [B, inputs, H, W]
        keys: Tensor | None,  # int32 [B]
    ) -> Tensor:  # [B, outputs, ceil(H / stride), ceil(W / stride)]
        activated = x if self.raw_branch else self.activation(self.bn1(x))
        branch = self.dropout(self.conv1(activated), keys)
        branch = self.conv2(self.activation(self.bn2(branch)))
        shortcut: Tensor = self.shortcut(activated if self.activated_shortcut else x)
        return shortcut + branch


class WideResNet(Blocks):
    """WRN-d-k: float32 [B, channels, H, W] -> logits float32 [B, n_classes], H and W at least 8.

    Three stages of n = (d - 4) / 6 blocks with 16k, 32k and 64k channels; dropout between conv1 and bn2 of
    every block. The first block of the net activates its input for both of its paths. The first blocks of
    stages 2 and 3 feed conv1 the activated input, or the raw one with `published_preact`, as published.
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
        published_preact: bool,
        activation: str,
        bn_momentum: float,
    ) -> None:
        if depth > 1000 or not 1 <= width <= 100:
            raise ValueError(
                f"a WRN must have depth at most 1000 and width in [1, 100], got {depth} and {width}"
            )
        n = blocks_per_stage("WRN", depth, 6, 4)
        super().__init__()

        blocks: list[nn.Module] = []
        inputs = 16
        for stage in range(3):
            outputs = 16 * width * 2**stage
            for first in [True] + [False] * (n - 1):
                blocks.append(
                    _Block(
                        inputs,
                        outputs,
                        stride=2 if first and stage > 0 else 1,
                        dropout=kind(dropout, layer=len(blocks)),
                        activation=activation,
                        bn_momentum=bn_momentum,
                        raw_branch=published_preact and first and stage > 0,
                        activated_shortcut=first and stage == 0,
                    )
                )
                inputs = outputs

        self.stem = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Sequential(
            _batch_norm(inputs, bn_momentum), activation_of(activation), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.linear = nn.Linear(inputs, n_classes)
        initialize(self, self.linear)
