"""CNN-13, the 13-layer network of all published UPS settings."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from ups_fast.models.network import Chain, Dropout, Network


class CNN13(Network):
    """float32 [B, channels, H, W] -> logits float32 [B, n_classes], H and W at least 12.

    3x [128], pool, dropout, 3x [256], pool, dropout, 512 (3x3, no padding), 256 and 128 (1x1), mean, linear.
    Weight norm on every convolution and on the linear layer; PyTorch's initialization.
    The convolutions keep biases that batch-norm makes idle: the published 3.13 M parameters count them.
    """

    # Two poolings and a 3x3 convolution without padding leave one pixel: floor(floor(12 / 2) / 2) - 2 = 1.
    min_size: int = 12

    def __init__(
        self,
        n_classes: int,
        channels: int,
        *,
        dropout: float,
        kind: type[Dropout] = Dropout,
        bn_momentum: float,
    ) -> None:
        super().__init__()

        def conv(inputs: int, outputs: int, kernel: int, padding: int) -> list[nn.Module]:
            return [
                weight_norm(nn.Conv2d(inputs, outputs, kernel, padding=padding)),
                nn.BatchNorm2d(outputs, momentum=bn_momentum),
                nn.LeakyReLU(0.1, inplace=True),
            ]

        self.features = Chain(
            *conv(channels, 128, 3, 1),
            *conv(128, 128, 3, 1),
            *conv(128, 128, 3, 1),
            nn.MaxPool2d(2),
            kind(dropout, layer=0),
            *conv(128, 256, 3, 1),
            *conv(256, 256, 3, 1),
            *conv(256, 256, 3, 1),
            nn.MaxPool2d(2),
            kind(dropout, layer=1),
            *conv(256, 512, 3, 0),
            *conv(512, 256, 1, 0),
            *conv(256, 128, 1, 0),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.linear = weight_norm(nn.Linear(128, n_classes))

    def prefix(
        self,
        images: Tensor,  # [B, channels, H, W]
        skip: int = 0,
    ) -> Tensor:  # [B, 128, H // 2, W // 2]; with skip = 1 [B, 256, H // 4, W // 4]
        """All that comes before the first dropout: 42 % of the multiply-adds."""
        return self.features.before(images, skip)

    def embed(
        self,
        hidden: Tensor,  # as of `prefix`
        keys: Tensor | None,  # int32 [B]
        skip: int = 0,
    ) -> Tensor:  # [B, 128]
        return self.features.after(hidden, keys, skip)

    def classify(self, features: Tensor) -> Tensor:  # [B, n_classes]
        logits: Tensor = self.linear(features)
        return logits
