"""What the networks of this package have in common: dropout by keys, and a part that all passes share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ups_fast.modules import CounterDropout as Dropout
from ups_fast.modules import Mish
from ups_fast.reference import dropout_keys


class Chain(nn.Sequential):
    """Modules one after the other, Dropouts among them, cut in two before one of these."""

    def before(self, hidden: Tensor, skip: int) -> Tensor:
        """All that comes before the Dropout number `skip`; Dropouts in it act as nn.Dropout does."""
        for module in self[: self._cut(skip)]:
            hidden = module(hidden)
        return hidden

    def after(self, hidden: Tensor, keys: Tensor | None, skip: int, last: int | None = None) -> Tensor:
        """That Dropout and all the rest, up to the module `last`."""
        for module in self[self._cut(skip) : last]:
            hidden = module(hidden, keys) if isinstance(module, Dropout) else module(hidden)
        return hidden

    def _cut(self, skip: int) -> int:
        return [i for i, module in enumerate(self) if isinstance(module, Dropout)][skip]


class Network(nn.Module, ABC):
    """float32 [B, channels, H, W], of clips [B, channels, T, H, W] -> logits float32 [B, n_classes], in two parts.

    `prefix` has no dropout that acts, so it is the same in every pass over an image and is computed once for all of
    them; `suffix` has the dropout. It is `embed`, which gives the features, and `classify`. With `skip`, the first so
    many Dropouts belong to the prefix, in eval mode, and are off.
    """

    min_size: int  # of height and width
    heads = 1  # networks side by side, each with weights of its own
    several = False  # labels: each class has a probability of its own

    # What belongs to a trained network. Only the networks that `ups_fast.load_model` returns have these.
    classes: list[str]  # names, C of them
    channels: int  # 1 or 3
    size: list[int]  # [H, W], to which images must be scaled and cropped
    task: str  # "single", or "multilabel" where each class has a probability of its own
    frames: int  # of networks on clips, T, beside these two
    columns: int  # of networks on features, in their place
    # float32 [channels, 1, 1], of clips [channels, 1, 1, 1], on the network's device, of pixels in [0, 1]; of
    # features [d].
    mean: Tensor
    std: Tensor  # likewise

    def forward(
        self,
        images: Tensor,  # [B, channels, H, W], or [B, channels, T, H, W]
        keys: Tensor | None = None,  # int32 [B]: dropout drops by these; None: as nn.Dropout does
    ) -> Tensor:  # [B, n_classes]
        self.check(images)
        return self.suffix(self.prefix(images), keys)

    def check(self, images: Tensor) -> None:
        """ValueError where they do not fit."""
        if min(images.shape[-2:]) < self.min_size:
            raise ValueError(
                f"images must be at least {self.min_size}x{self.min_size}, got {tuple(images.shape)}"
            )

    @property
    def n_dropouts(self) -> int:
        """How many layers of dropout an image passes."""
        return sum(isinstance(module, Dropout) for module in self.modules())

    def members(self, images: Tensor, keys: Tensor | None) -> Tensor:  # [H, B, n_classes]
        """The logits of each head, of which `forward` is the mean answer."""
        return self(images, keys)[None]

    def passes(
        self,
        hidden: Tensor,  # as of `prefix`, of B images
        keys: Tensor,  # int32 [P * B], pass by pass
        passes: int,  # a multiple of the heads
        skip: int = 0,
    ) -> Tensor:  # [P, B, n_classes]
        """Passes with dropout, as one batch."""
        logits = self.suffix(torch.cat([hidden] * passes), keys, skip)
        return logits.view(passes, len(hidden), logits.shape[1])

    def probabilities(self, logits: Tensor) -> Tensor:  # [.., n_classes], likewise
        """Of one label for each sample the softmax, of several a sigmoid for each class."""
        return logits.sigmoid() if self.several else logits.softmax(-1)

    @abstractmethod
    def prefix(self, images: Tensor, skip: int = 0) -> Tensor: ...

    def suffix(
        self,
        hidden: Tensor,  # as of `prefix`
        keys: Tensor | None,  # int32 [B]
        skip: int = 0,
    ) -> Tensor:  # [B, n_classes]
        return self.classify(self.embed(hidden, keys, skip))

    @abstractmethod
    def embed(self, hidden: Tensor, keys: Tensor | None, skip: int = 0) -> Tensor:  # [B, D]
        """The features: what the last linear layer gets."""

    @abstractmethod
    def classify(self, features: Tensor) -> Tensor:  # [B, n_classes]
        """The last linear layer."""


class Blocks(Network):
    """A stem without dropout, blocks called as block(hidden, keys) with a Dropout each, a head, and a linear layer."""

    stem: nn.Module
    blocks: nn.ModuleList
    head: nn.Module  # -> [B, D]
    linear: nn.Linear

    def prefix(
        self,
        images: Tensor,  # [B, channels, ..]
        skip: int = 0,
    ) -> Tensor:  # as the stem makes it, or `skip` blocks
        """The stem; what a first block does before its Dropout would not be worth a split."""
        hidden: Tensor = self.stem(images)
        for block in self.blocks[:skip]:
            hidden = block(hidden, None)
        return hidden

    def embed(
        self,
        hidden: Tensor,  # as of `prefix`
        keys: Tensor | None,  # int32 [B]
        skip: int = 0,
    ) -> Tensor:  # [B, D]
        for block in self.blocks[skip:]:
            hidden = block(hidden, keys)
        features: Tensor = self.head(hidden)
        return features

    def classify(self, features: Tensor) -> Tensor:  # [B, n_classes]
        logits: Tensor = self.linear(features)
        return logits


def blocks_per_stage(kind: str, depth: int, convolutions: int, others: int) -> int:
    """n of depth = convolutions * n + others. ValueError names the nearest depths."""
    blocks, rest = divmod(depth - others, convolutions)
    if rest or blocks < 1:
        below, least = depth - rest, convolutions + others
        near = f"{below} or {below + convolutions}" if below >= least else f"{least}"
        raise ValueError(
            f"depth of a {kind} must be {convolutions}n + {others} with n >= 1, got {depth}; nearest: {near}"
        )
    return blocks


def activation_of(name: str) -> nn.Module:
    return Mish() if name == "mish" else nn.LeakyReLU(0.1, inplace=True)


def initialize(network: nn.Module, linear: nn.Linear) -> None:
    """Convolutions by their fan out (He et al. 2015), the last layer by Glorot and Bengio (2010)."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    nn.init.xavier_normal_(linear.weight)
    nn.init.zeros_(linear.bias)


def keys_by_head(keys: Tensor, heads: int) -> Tensor:  # int32 [B] -> [H * B]
    """Of each head its own."""
    head = torch.arange(heads, device=keys.device).repeat_interleave(len(keys))
    return dropout_keys(keys.long().repeat(heads) & 0xFFFFFFFF, seed=0, draw=head)


def mean_answer(logits: Tensor, several: bool = False) -> Tensor:  # [H, B, C] -> [B, C]
    """The logarithm of the heads' mean probability; of several labels what the sigmoid makes the mean of theirs."""
    if len(logits) == 1:
        return logits[0]
    if several:
        yes, no = (torch.nn.functional.logsigmoid(each).logsumexp(0) for each in (logits, -logits))
        return yes - no
    return logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))
