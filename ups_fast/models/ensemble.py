"""Whole networks side by side, of other initial weights, that answer together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ups_fast.models.network import Network, keys_by_head, mean_answer


class Ensemble(Network):
    """Networks of one kind -> the logarithm of their mean probability. A pass is by one of them.

    Its features are theirs, one after the other.
    """

    def __init__(self, new: Callable[[], Network], count: int) -> None:
        super().__init__()
        self.networks: Sequence[Network] = nn.ModuleList(new() for _ in range(count))  # type: ignore[assignment]
        self.heads, self.min_size = count, self.networks[0].min_size

    @property
    def n_dropouts(self) -> int:
        return self.networks[0].n_dropouts

    def check(self, images: Tensor) -> None:
        self.networks[0].check(images)

    def prefix(self, images: Tensor, skip: int = 0) -> Tensor:  # -> [H, B, ..]
        return torch.stack([each.prefix(images, skip) for each in self.networks])

    def suffix(self, hidden: Tensor, keys: Tensor | None, skip: int = 0) -> Tensor:
        return mean_answer(self._each(hidden, keys, skip), self.several)

    def embed(self, hidden: Tensor, keys: Tensor | None, skip: int = 0) -> Tensor:  # [B, H * D]
        parts = zip(self.networks, hidden, self._keys(keys), strict=True)
        return torch.cat([each.embed(its, own, skip) for each, its, own in parts], 1)

    def classify(self, features: Tensor) -> Tensor:
        parts = zip(self.networks, features.chunk(self.heads, 1), strict=True)
        return mean_answer(torch.stack([each.classify(its) for each, its in parts]), self.several)

    def members(self, images: Tensor, keys: Tensor | None) -> Tensor:
        self.check(images)
        return self._each(self.prefix(images), keys)

    def passes(self, hidden: Tensor, keys: Tensor, passes: int, skip: int = 0) -> Tensor:
        """Pass p is by network p mod H."""
        each = passes // self.heads
        keys = keys.view(each, self.heads, -1).transpose(0, 1).flatten(1)  # [H, each * B]
        parts = zip(self.networks, hidden, keys, strict=True)
        logits = torch.stack([network.passes(its, own, each, skip) for network, its, own in parts], 1)
        return logits.flatten(0, 1)  # [each, H, B, C] -> [P, B, C]

    def _each(self, hidden: Tensor, keys: Tensor | None, skip: int = 0) -> Tensor:  # [H, B, n_classes]
        parts = zip(self.networks, hidden, self._keys(keys), strict=True)
        return torch.stack([each.suffix(its, own, skip) for each, its, own in parts])

    def _keys(self, keys: Tensor | None) -> Sequence[Tensor | None]:
        """Of each network its own, so that their masks differ."""
        return [None] * self.heads if keys is None else keys_by_head(keys, self.heads).chunk(self.heads)
