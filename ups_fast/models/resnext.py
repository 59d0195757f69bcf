"""ResNeXt for small images (Xie et al. 2017, section 5.3): bottleneck blocks with a grouped convolution."""

from __future__ import annotations

from torch import Tensor, nn

from ups_fast.models.network import Blocks, Dropout, activation_of, blocks_per_stage, initialize


class _Block(nn.Module):
    """[B, inputs, H, W] -> [B, outputs, ceil(H / stride), ceil(W / stride)].

    1x1, grouped 3x3 with `groups` groups, 1x1, each with BN, and an activation behind all but the last; one more
    follows the sum with the shortcut. That is x, or where the shape changes a 1x1 convolution and BN.
    """

    def __init__(
        self,
        inputs: int,
        inner: int,
        outputs: int,
        stride: int,
        *,
        groups: int,
        dropout: Dropout,
        activation: str,
        bn_momentum: float,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner, momentum=bn_momentum)
        self.dropout = dropout
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner, momentum=bn_momentum)
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs, momentum=bn_momentum)
        self.activation = activation_of(activation)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False),
                nn.BatchNorm2d(outputs, momentum=bn_momentum),
            )

    def forward(
        self,
        x: Tensor,  # [B, inputs, H, W]
        keys: Tensor | None,  # int32 [B]
    ) -> Tensor:  # [B, outputs, ceil(H / stride), ceil(W / stride)]
        hidden = self.dropout(self.activation(self.bn1(self.conv1(x))), keys)
        hidden = self.activation(self.bn2(self.conv2(hidden)))
        result: Tensor = self.activation(self.shortcut(x) + self.bn3(self.conv3(hidden)))
        return result


class ResNeXt(Blocks):
    """ResNeXt-D CxWd: float32 [B, channels, H, W] -> logits float32 [B, n_classes], H and W at least 8.

    Three stages of n = (D - 2) / 9 blocks with 256, 512 and 1,024 channels. Their grouped convolutions have C groups
    of W, 2 W and 4 W channels, and stand behind a dropout. D may leave out the last layer: 28 is the same as 29.
    """

    min_size: int = 8

    def __init__(
        self,
        depth: int,
        cardinality: int,
        width: int,
        n_classes: int,
        channels: int,
        *,
        dropout: float,
        kind: type[Dropout] = Dropout,
        activation: str,
        bn_momentum: float,
    ) -> None:
        if depth > 1000 or not 1 <= cardinality <= 128 or not 1 <= width <= 1000:
            raise ValueError(
                "a ResNeXt must have depth at most 1000, cardinality in [1, 128] and width in [1, 1000], "
                f"got {depth}, {cardinality} and {width}"
            )
        n = blocks_per_stage("ResNeXt", depth, 9, 1 if depth % 9 == 1 else 2)
        super().__init__()
        blocks: list[nn.Module] = []
        inputs = 64
        for stage in range(3):
            outputs = 256 * 2**stage
            for at in range(n):
                blocks.append(
                    _Block(
                        inputs,
                        cardinality * width * 2**stage,
                        outputs,
                        stride=2 if stage and not at else 1,
                        groups=cardinality,
                        dropout=kind(dropout, layer=len(blocks)),
                        activation=activation,
                        bn_momentum=bn_momentum,
                    )
                )
                inputs = outputs
        self.stem = nn.Sequential(
            nn.Conv2d(channels, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64, momentum=bn_momentum),
            activation_of(activation),
        )
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.linear = nn.Linear(inputs, n_classes)
        initialize(self, self.linear)
