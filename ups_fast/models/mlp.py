"""Networks on features, `linear` and `mlp-WIDTH[-WIDTH...]`: one, or several heads that are trained side by side."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import torch
from torch import Tensor, nn

from ups_fast.models.network import Dropout, Network, keys_by_head, mean_answer

# So that one learning rate serves all features: a standardized value is cut off here, and rows of more columns than
# this are scaled down to the length of such rows.
_LARGEST, _WIDEST = 10.0, 1024


def widths_of(name: str) -> list[int] | None:
    """The widths of the hidden layers that the name of such a network tells; None where it is none."""
    found = re.fullmatch(r"linear|mlp((?:-[1-9][0-9]{0,5}){1,20})", name)
    return [int(width) for width in (found[1] or "").split("-")[1:]] if found else None


class Linears(nn.Module):
    """H linear layers side by side: [H, B, n_in] -> [H, B, n_out], one product. Each is drawn as nn.Linear is."""

    def __init__(self, heads: int, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, n_in, n_out))
        self.bias = nn.Parameter(torch.empty(heads, 1, n_out))
        bound = 1 / math.sqrt(n_in)
        for parameter in (self.weight, self.bias):
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class MLP(Network):
    """Standardized features, float32 [B, d] -> logits [B, C]: before every linear layer dropout, between them ReLU.

    With several heads, each is a whole network of its own weights and dropout masks. The answer is the logarithm of
    their mean probability; a pass has one head.
    """

    def __init__(
        self, widths: list[int], n_features: int, n_classes: int, *, dropout: float, heads: int = 1
    ) -> None:
        super().__init__()
        self.heads, self.columns = heads, n_features
        sizes = [n_features, *widths, n_classes]
        self.dropouts = nn.ModuleList(Dropout(dropout, layer=i) for i in range(len(sizes) - 1))
        self.layers = nn.ModuleList(Linears(heads, n_in, n_out) for n_in, n_out in pairwise(sizes))

    def check(self, images: Tensor) -> None:
        if images.ndim != 2 or images.shape[1] != self.columns:
            raise ValueError(f"features must be [B, {self.columns}], got {list(images.shape)}")

    def prefix(self, images: Tensor, skip: int = 0) -> Tensor:  # -> [B, d] or [H, B, width]
        x = images.clamp(-_LARGEST, _LARGEST)
        if self.columns > _WIDEST:
            x = x * (_WIDEST / self.columns) ** 0.5
        return self._run(x, None, 0, skip) if skip else x

    def suffix(self, hidden: Tensor, keys: Tensor | None, skip: int = 0) -> Tensor:
        return mean_answer(self._run(hidden, self._keys(keys), skip, len(self.layers)), self.several)

    def embed(self, hidden: Tensor, keys: Tensor | None, skip: int = 0) -> Tensor:
        """Of several heads, the mean."""
        last, keys = len(self.layers) - 1, self._keys(keys)
        return self._enter(last, self._run(hidden, keys, skip, last), keys).mean(0)

    def classify(self, features: Tensor) -> Tensor:
        return mean_answer(self.layers[-1](features[None].expand(self.heads, -1, -1)), self.several)

    def members(self, images: Tensor, keys: Tensor | None) -> Tensor:
        return self._run(self.prefix(images), self._keys(keys), 0, len(self.layers))

    def passes(self, hidden: Tensor, keys: Tensor, passes: int, skip: int = 0) -> Tensor:
        """Pass p is by head p mod H."""
        each = passes // self.heads
        many = hidden.repeat(*[1] * (hidden.ndim - 2), each, 1)  # [.., each * B, width]
        keys = keys.view(each, self.heads, -1).transpose(0, 1).reshape(-1)
        logits = self._run(many, keys, skip, len(self.layers))  # [H, each * B, C]
        return logits.view(self.heads, each, -1, logits.shape[-1]).transpose(0, 1).flatten(0, 1)

    def _run(
        self,
        hidden: Tensor,  # [B, d], or [H, B, width]
        keys: Tensor | None,  # int32 [H * B]
        first: int,
        behind: int,
    ) -> Tensor:  # [H, B, width]
        """Layers [first, behind)."""
        if hidden.ndim == 2:
            hidden = hidden.expand(self.heads, -1, -1)
        for i in range(first, behind):
            hidden = self.layers[i](self._enter(i, hidden, keys))
        return hidden

    def _enter(self, i: int, hidden: Tensor, keys: Tensor | None) -> Tensor:  # [H, B, width], int32 [H * B]
        """What layer i gets: ReLU behind another layer, then dropout."""
        if i:
            hidden = hidden.relu()
        dropout = self.dropouts[i]
        if dropout.p and (keys is not None or dropout.training):
            hidden = dropout(hidden.flatten(0, 1), keys).view(hidden.shape)
        return hidden

    def _keys(self, keys: Tensor | None) -> Tensor | None:  # int32 [B] -> [H * B]
        """Of each head its own. One head has those that are given."""
        if keys is None or self.heads == 1:
            return keys
        return keys_by_head(keys, self.heads)
