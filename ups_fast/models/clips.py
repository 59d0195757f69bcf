"""A small network for clips: R(2+1)D (Tran et al., 2018) in the order of a wide residual network."""

from __future__ import annotations

from torch import Tensor, nn

from ups_fast.models.network import Blocks, Dropout, initialize

MOST_WIDTH = 512


class _Block(nn.Module):
    """[B, inputs, T, H, W] -> [B, outputs, T', H', W']: a convolution in space, dropout, then one in time.

    `stride` divides T, H and W, rounded up.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: Dropout, bn_momentum: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm3d(inputs, momentum=bn_momentum)
        self.space = nn.Conv3d(inputs, outputs, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False)
        self.dropout = dropout
        self.bn2 = nn.BatchNorm3d(outputs, momentum=bn_momentum)
        self.time = nn.Conv3d(outputs, outputs, (3, 1, 1), (stride, 1, 1), (1, 0, 0), bias=False)
        self.shortcut = nn.Conv3d(inputs, outputs, 1, stride, bias=False)
        self.activation = nn.LeakyReLU(0.1, inplace=True)

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        active = self.activation(self.bn1(x))
        branch = self.dropout(self.space(active), keys)
        branch = self.time(self.activation(self.bn2(branch)))
        shortcut: Tensor = self.shortcut(active)
        return shortcut + branch


class Conv2Plus1D(Blocks):
    """float32 [B, channels, T, H, W] -> logits float32 [B, n_classes], H and W at least 8, T at least 2.

    The first convolution halves the space. Three blocks of `width`, 2 and 4 times `width` channels follow, of which
    the second and the third halve time and space.
    """

    min_size: int = 8
    frames: int

    def __init__(
        self, width: int, n_classes: int, channels: int, frames: int, *, dropout: float, bn_momentum: float
    ) -> None:
        if not 1 <= width <= MOST_WIDTH:
            raise ValueError(f"the width of conv2plus1d must be in 1..{MOST_WIDTH}, got {width}")
        super().__init__()
        self.frames = frames
        self.stem = nn.Conv3d(channels, width, (3, 5, 5), (1, 2, 2), (1, 2, 2), bias=False)
        widths = [width, width, 2 * width, 4 * width]
        self.blocks = nn.ModuleList(
            _Block(widths[i], widths[i + 1], 2 if i else 1, Dropout(dropout, layer=i), bn_momentum)
            for i in range(3)
        )
        self.head = nn.Sequential(
            nn.BatchNorm3d(widths[-1], momentum=bn_momentum),
            nn.LeakyReLU(0.1, inplace=True),
            nn.AdaptiveAvgPool3d(1),
            nn.Flatten(),
        )
        self.linear = nn.Linear(widths[-1], n_classes)
        initialize(self, self.linear)
