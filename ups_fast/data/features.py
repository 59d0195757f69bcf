"""Rows of numbers, such as the features of a pretrained network, as a run reads them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from ups_fast.data.images import Draws, View
from ups_fast.ops import counter_dropout
from ups_fast.reference import counter_normal, dropout_keys
from ups_fast.words import many

# Of the numbers of a Dropout within a network, these are free: which columns are hidden, and the noise.
_HIDDEN, _NOISE = (1 << 20) - 1, (1 << 20) - 2


@dataclass(frozen=True)
class Noise:
    """What is done to rows in training, after they are standardized: what a `Policy` is to images."""

    std: float = 0.0  # of the Gaussian that is added
    drop: float = 0.0  # share of the columns that are set to 0, their mean, and the others scaled up
    views: int = 1  # of each row, of which one is drawn; 1: the clean one

    def __call__(self, x: Tensor, keys: Tensor) -> Tensor:  # float32 [B, d], int32 [B] -> float32 [B, d]
        if self.drop:
            x = counter_dropout(x, keys, p=self.drop, layer=_HIDDEN)
        if self.std:
            x = x + self.std * counter_normal(x.shape[1], keys, layer=_NOISE)
        return x


class ResidentFeatures:
    """Features in memory, standardized column by column, with noise that each sample draws by its own number.

    features float32 or float16 [N, d], or [V, N, d]: V views of each row, the first of which is the clean one. They
             are kept as they are: a batch is standardized when it is read
    mean, std of each column, d numbers each; std above 0

    See `Images` for the rest.
    """

    unreadable: dict[int, str]

    def __init__(
        self,
        features: Tensor,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str,
        unreadable: Mapping[int, str] | None = None,
    ) -> None:
        self.device, self.unreadable = torch.device(device), dict(unreadable or {})
        self.seen = features.to(self.device).contiguous().view(-1, features.shape[-1])  # [V * N, d]
        self.features = self.seen[: features.shape[-2]]  # [N, d], the clean ones
        self.shape: tuple[int, ...] = (features.shape[-1],)
        self.mean = torch.tensor(mean, dtype=torch.float32, device=self.device)
        self.scale = 1 / torch.tensor(std, dtype=torch.float32, device=self.device)

    def __len__(self) -> int:
        return len(self.features)

    def clean(self, index: Tensor) -> Tensor:  # int64 [B] -> float32 [B, d]
        return self._standardized(self.features[index])

    def _standardized(self, rows: Tensor) -> Tensor:  # [B, d] -> float32 [B, d]
        return (rows.float() - self.mean) * self.scale

    def clean_batches(self, index: Tensor, batch_size: int) -> Iterator[Tensor]:
        return map(self.clean, index.split(batch_size))

    def drawn_batches(self, index: Tensor, batch_size: int, draws: Draws) -> Iterator[Tensor]:
        for ids, draw in map(draws.of, index.split(batch_size)):
            yield draws.policy(self.clean(ids), dropout_keys(ids, seed=draws.seed, draw=draw))

    def ahead(
        self, steps: Iterable[tuple[Tensor, Tensor]], views: Sequence[View], *, seed: int, out: Tensor
    ) -> Iterator[None]:
        """Nothing."""
        return repeat(None)

    def read(self, index: Tensor, draw: Tensor, views: Sequence[View], *, seed: Tensor, out: Tensor) -> None:
        for view in views:
            rows, policy = slice(view.first, view.last), view.policy
            place = index[rows]
            if policy == Noise():
                out[rows] = self.clean(place)
                continue
            keys = dropout_keys(place, seed=view.seed(seed), draw=draw[rows])
            if policy.views > 1:
                place = place + len(self) * drawn_views(keys, policy.views)
            out[rows] = policy(self._standardized(self.seen[place]), keys)


def drawn_views(keys: Tensor, views: int | Tensor) -> Tensor:  # int32 [B], int64 [] or [B] -> int64 [B]
    """Which of so many views of its row each key draws, all alike likely."""
    return (keys.long() & 0xFFFFFFFF) * views >> 32


@torch.no_grad()
def column_moments(rows: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:  # [N, d]
    """Mean and std of each column, in float64. A constant column gets std 1, and so does one that is 0 in float32."""
    n, d = rows.shape
    total, squares = (torch.zeros(d, dtype=torch.float64) for _ in range(2))
    chunk = max(1, (1 << 22) // d)
    for part in rows.split(chunk):
        total += part.double().sum(0)
    mean = total / n
    for part in rows.split(chunk):
        squares += (part.double() - mean).square().sum(0)
    std = (squares / n).sqrt()
    # What rounding leaves of a constant column is not its spread.
    constant = std <= (1e-7 * mean.abs()).clamp(min=torch.finfo(torch.float32).tiny)
    return tuple(mean.tolist()), tuple(torch.where(constant, 1.0, std).tolist())


def constant_columns(rows: Tensor) -> int:  # [N, d]
    """How many columns have one value in all rows."""
    return int((rows.amin(0) == rows.amax(0)).sum())


def first_not_finite(rows: Tensor) -> tuple[int, int, int] | None:  # [N, d]
    """How many values are NaN or infinite, and row and column of the first; None where there is none."""
    if not len(rows):
        return None
    d = rows.shape[1]
    count, first, chunk = 0, -1, max(1, (1 << 24) // d)
    for at, part in zip(range(0, len(rows), chunk), rows.split(chunk), strict=True):
        # A sum is finite where all are, or nearly always: so the whole is read once, and no mask is made.
        if math.isfinite(float(part.sum(dtype=torch.float64))):
            continue
        bad = (~part.isfinite()).flatten().nonzero()[:, 0]
        if len(bad) and first < 0:
            first = at * d + int(bad[0])
        count += len(bad)
    return (count, first // d, first % d) if count else None


def must_be_finite(rows: Tensor, name: str) -> None:  # [N, d]
    """Raises ValueError with one sentence."""
    if bad := first_not_finite(rows):
        count, row, column = bad
        raise ValueError(
            f"{name} must hold finite numbers, got {many(count, 'value')} that are NaN or infinite, the first in row "
            f"{row:,}, column {column:,}: fill them, or leave out what has them"
        )
