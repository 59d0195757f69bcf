"""A pretrained network that is never trained, and on its features a small one that is."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ups_fast.models.backbone import Backbone, pixel_scale
from ups_fast.models.mlp import MLP, widths_of
from ups_fast.models.network import Dropout, Network

LARGEST_INPUT = 4096  # side of images


class Frozen(Network):
    """float32 [B, channels, H, W], pixels in [0, 1] -> logits float32 [B, n_classes].

    Images are scaled, gray ones repeated as red, green and blue, and normalized as the pretrained network wants it.
    Its features are what its own classifier would get. They are standardized and go to the head. Only the head has
    dropout.

    name, weights    as of `Backbone`
    size             (height, width) of the images
    head             "linear" or "mlp-w[-w...]", with `heads` and `dropout` as of `MLP`
    input_size       length to which the shorter side of the images is scaled; 0: they stay as they are

    Raises ValueError as `Backbone` does.
    """

    feature_mean: Tensor  # float32 [D], by which features are standardized
    feature_std: Tensor
    pixel_mean: Tensor  # float32 [3, 1, 1]
    pixel_std: Tensor

    def __init__(
        self,
        name: str,
        n_classes: int,
        channels: int,
        size: tuple[int, int],
        *,
        head: str,
        heads: int,
        input_size: int,
        dropout: float,
        weights: str = "",
    ) -> None:
        super().__init__()
        widths = widths_of(head)
        assert widths is not None, head
        self.input_size, self.channels, self.min_size, self.heads = input_size, channels, 1, heads
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "weights: ")  # its classifier is not needed
            backbone = Backbone(name, 2, 3, self._scaled(size), dropout=0.0, weights=weights)
        *last, classifier = backbone.head
        self.body = nn.Sequential(backbone.net, *(each for each in last if not isinstance(each, Dropout)))
        self.body.requires_grad_(False).eval()
        self._head = widths, int(classifier.in_features), n_classes, dropout  # type: ignore[arg-type]
        self.head = self.new_head()
        for what, values in zip(("mean", "std"), pixel_scale(name), strict=True):
            self.register_buffer(f"pixel_{what}", torch.tensor(values).view(3, 1, 1))
        self.register_buffer("feature_mean", torch.zeros(self.n_features))
        self.register_buffer("feature_std", torch.ones(self.n_features))

    @property
    def n_features(self) -> int:
        """D, the number of features."""
        return self._head[1]

    def seen(self, size: Sequence[int]) -> tuple[int, int, int]:  # [H, W] -> [3, H, W]
        """In which shape the pretrained network gets images of this size."""
        return 3, *self._scaled((size[0], size[1]))

    def new_head(self) -> MLP:
        """One of new weights, from torch's generator."""
        widths, columns, n_classes, dropout = self._head
        head = MLP(widths, columns, n_classes, dropout=dropout, heads=self.heads)
        head.several = self.several
        return head

    def with_head(self, head: nn.Module) -> Frozen:
        """This network, its head with the weights of that one."""
        self.head.load_state_dict(head.state_dict())
        return self

    def standardize(self, mean: Sequence[float], std: Sequence[float]) -> None:  # D numbers each
        for buffer, values in ((self.feature_mean, mean), (self.feature_std, std)):
            buffer.copy_(torch.tensor(values))

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.body.eval()
        return self

    def check(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise ValueError(f"images must be [B, {self.channels}, H, W], got {list(images.shape)}")

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:  # [B, channels, H, W] -> [B, D]
        """As the pretrained network makes them, not standardized."""
        if self.input_size:
            images = interpolate(
                images, self._scaled(images.shape[-2:]), mode="bilinear", align_corners=False, antialias=True
            )
        pixels = (images.expand(-1, 3, -1, -1) - self.pixel_mean) / self.pixel_std
        features: Tensor = self.body(pixels.contiguous(memory_format=torch.channels_last))
        return features.float()

    def standardized(self, images: Tensor) -> Tensor:  # [B, channels, H, W] -> [B, D]
        """What the head gets, as ResidentFeatures has it, to the last bit."""
        return (self.features(images) - self.feature_mean) * (1 / self.feature_std)

    def prefix(self, images: Tensor, skip: int = 0) -> Tensor:
        return self.head.prefix(self.standardized(images), skip)

    def suffix(self, hidden: Tensor, keys: Tensor | None, skip: int = 0) -> Tensor:
        return self.head.suffix(hidden, keys, skip)

    def embed(self, hidden: Tensor, keys: Tensor | None, skip: int = 0) -> Tensor:
        """Of the head."""
        return self.head.embed(hidden, keys, skip)

    def classify(self, features: Tensor) -> Tensor:
        return self.head.classify(features)

    def members(self, images: Tensor, keys: Tensor | None) -> Tensor:
        return self.head.members(self.prefix(images), keys)

    def passes(self, hidden: Tensor, keys: Tensor, passes: int, skip: int = 0) -> Tensor:
        return self.head.passes(hidden, keys, passes, skip)

    def _scaled(self, size: Sequence[int]) -> tuple[int, int]:
        height, width = size
        if not self.input_size:
            return height, width
        factor = self.input_size / min(height, width)
        return max(1, round(height * factor)), max(1, round(width * factor))
