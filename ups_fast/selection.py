"""Pseudo-labels: the labeling pass, the selection and the class balance.

Each rule is one function: P passes over clean images, dropout alone being active (`pseudo_label`, `passes_over`), the
thresholds (`ups_fast.mc_select`), equal numbers per class (`balance`), negatives of what is not kept
(`drop_negatives`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from ups_fast.data.images import Images
from ups_fast.models import Dropout, Network
from ups_fast.modules import mc_dropout
from ups_fast.ops import mc_select
from ups_fast.reference import Selection, dropout_keys


class Thresholds(NamedTuple):
    """Which labels are selected; see `mc_select`."""

    tau_p: float = 0.70
    tau_n: float = 0.05
    kappa_p: float = 0.05
    kappa_n: float = 0.005
    temp_nl: float = 2.0


BALANCE_FLOOR = 25  # published: a rarer class would starve all the others


@dataclass(frozen=True)
class PseudoLabels:
    """What a round's network says of the U unlabeled samples, after selection. All on one device."""

    index: Tensor  # int64 [U], into the training set
    label: (
        Tensor  # int64 [U], -1 where there is none: a logit was NaN or infinite, or the image is unreadable
    )
    confidence: Tensor  # float32 [U], mean probability of the label; NaN where label is -1
    std: Tensor  # float32 [U], of that probability over the passes; NaN where label is -1
    candidate: Tensor  # bool [U], passed the thresholds of a positive
    positive: Tensor  # bool [U], and was kept by the class balance
    negative: Tensor  # int32 [U, ceil(C / 32)], packed negative classes; 0 where positive

    def cpu(self) -> PseudoLabels:
        """The same on the host: one wait for the device, after which reports and files need no other."""
        return PseudoLabels(**{name: tensor.cpu() for name, tensor in vars(self).items()})


@torch.no_grad()
def pseudo_label(
    model: nn.Module,
    images: Images,
    index: Tensor,  # int64 [U], on the device of the images
    *,
    tau_p: float = 0.70,
    tau_n: float = 0.05,
    kappa_p: float = 0.05,
    kappa_n: float = 0.005,
    temp_nl: float = 2.0,
    passes: int = 10,
    batch_size: int = 512,
    mc_layers: int = 0,
    keep: Callable[[PseudoLabels], PseudoLabels] = lambda found: found,
    balanced: bool = False,
    seed: int = 0,
    forward: Callable[..., Tensor] | None = None,
    progress: Callable[[int], None] = lambda images: None,
) -> PseudoLabels:
    """Labels clean images by `passes` passes, only dropout being active, and selects, on the device.

    passes = 1 means no uncertainty: dropout is off too, and confidence alone decides, whatever the kappas are.
    `keep` chooses which positives stay. `balanced` then cuts them to equal numbers per class.
    `progress` is told each finished batch's size.
    `batch_size` rows go through the network at once: with several passes that many divided by `passes` images.
    Which elements are dropped depends on `seed`, the pass, the sample and the layer alone, so `batch_size` and the
    order of `index` change nothing but the last bits of the logits. No more than one batch's logits [P, B, C] exist
    at once, whatever U and C are. An image of `images.unreadable` gets no label and is selected for
    nothing.

    mc_layers  if not 0, only so many of the network's last Dropouts act: another method, and cheaper, since all that
              comes before them is computed once for all passes
    forward   `passes_over`, or what `fullgraph` made of it; it always gets batches of one size

    Raises ValueError for an impossible threshold (see `mc_select`), passes > 1 where the network has no
    `ups_fast.models.Dropout` with p > 0, or `mc_layers` where it has fewer.
    """
    thresholds = {"tau_p": tau_p, "tau_n": tau_n, "kappa_p": kappa_p, "kappa_n": kappa_n, "temp_nl": temp_nl}
    heads = getattr(model, "heads", 1)
    drops = any(isinstance(module, Dropout) and module.p > 0 for module in model.modules())
    if passes > 1 and heads == 1 and not drops:
        raise ValueError(
            "model must have a Dropout of ups_fast.models with p > 0, or several heads, for several passes, got none"
        )
    if passes > 1 and passes % heads:
        raise ValueError(f"passes must be a multiple of the network's {heads} heads, got {passes}")
    skip, forward = skipped(model, mc_layers), forward or passes_over
    salt = torch.full((), seed, dtype=torch.int64, device=index.device)
    rows = max(1, min(batch_size // passes, len(index)))
    found, done = None, 0
    # Not in bfloat16: rounded logits put 2 to 8 % of samples on the other side of kappa_n.
    with mc_dropout(model, active=False), torch.autocast(index.device.type, enabled=False):
        for chunk, batch in zip(index.split(rows), images.clean_batches(index, rows), strict=True):
            whole = torch.arange(rows, device=index.device).clamp(max=len(chunk) - 1) if len(chunk) else chunk
            logits = forward(model, batch[whole], chunk[whole], passes, salt, skip)[:, : len(chunk)]
            part = mc_select(logits, **thresholds, packed=True)
            # Made once: results kept between the batches would break the freed memory up, and it would grow.
            found = found or Selection(*(each.new_empty((len(index), *each.shape[1:])) for each in part))
            for every, each in zip(found, part, strict=True):
                every[done : done + len(chunk)] = each
            done += len(chunk)
            progress(len(chunk))
    assert found is not None
    if images.unreadable:
        found = _without(found, torch.isin(index, torch.tensor(list(images.unreadable), device=index.device)))
    kept = keep(
        PseudoLabels(
            index=index,
            label=found.label,
            confidence=found.confidence,
            std=found.std,
            candidate=found.positive,
            positive=found.positive,
            negative=found.negative,
        )
    )
    positive = kept.positive
    if balanced:
        # One pass has no std to rank by: confidence alone decides here too.
        uncertainty = found.std if passes > 1 else (1 - found.confidence).clamp(min=0)
        positive = balance(found.label, uncertainty, positive, n_classes=logits.shape[-1])
    return replace(kept, positive=positive, negative=drop_negatives(kept.negative, positive))


@torch.no_grad()
def features_of(
    model: Network,
    images: Images,
    index: Tensor,  # int64 [n], sample ids
    *,
    batch_size: int = 512,
) -> Tensor:  # float32 [n, D], on the device
    """What the classifier gets for clean images, without dropout."""
    index = index.to(images.device)
    with mc_dropout(model, active=False), torch.autocast(index.device.type, enabled=False):
        parts = [model.embed(model.prefix(batch), None) for batch in images.clean_batches(index, batch_size)]
    return torch.cat(parts)


def _without(found: Selection, gone: Tensor) -> Selection:  # bool [U]
    """The selection as if these had given no answer."""
    return Selection(
        label=found.label.masked_fill(gone, -1),
        confidence=found.confidence.masked_fill(gone, math.nan),
        std=found.std.masked_fill(gone, math.nan),
        positive=found.positive & ~gone,
        negative=found.negative.masked_fill(gone[:, None], 0),
    )


def labeling_rows(device: torch.device, shape: Sequence[int]) -> int:
    """How many images [C, H, W], clips [C, T, H, W] or rows [d] a device takes at once, without gradients.

    No results depend on it.
    """
    images = len(shape) > 1
    many = (8192 if device.type == "cuda" else 512) * 32 * 32
    return max(1, many // math.prod(shape[1:] if images else (max(256, shape[0]),)))


def skipped(model: nn.Module, mc_layers: int) -> int:
    """How many of the network's first Dropouts are off where its last `mc_layers` act; 0 means that all do."""
    count = model.n_dropouts if isinstance(model, Network) else 0
    if not 0 <= mc_layers <= count:
        raise ValueError(f"mc_layers must be in 0 .. {count}, as many as the network has, got {mc_layers}")
    return count - mc_layers if mc_layers else 0


def passes_over(
    model: nn.Module,  # in eval mode; a Network for more than one pass
    batch: Tensor,  # [B, C, H, W]
    index: Tensor,  # int64 [B], sample ids
    passes: int,
    seed: int | Tensor,  # int64 []
    skip: int = 0,
) -> Tensor:  # [P, B, n_classes]
    """The logits of P passes: what comes before dropout is computed once, the rest as one batch of P * B rows.

    skip  so many of the network's first Dropouts are off
    """
    if passes == 1:
        return cast(Tensor, model(batch))[None]
    network = cast(Network, model)
    hidden = network.prefix(batch, skip)
    draw = torch.arange(passes, device=index.device).repeat_interleave(len(index))
    keys = dropout_keys(index.repeat(passes), seed=seed, draw=draw)
    return network.passes(hidden, keys, passes, skip)


def balance(
    label: Tensor,  # int64 [U], in [0, n_classes) where candidate
    std: Tensor,  # float32 [U], at least 0 where candidate
    candidate: Tensor,  # bool [U]
    n_classes: int,
    floor: int = BALANCE_FLOOR,
) -> Tensor:  # bool [U], the candidates that are kept
    """Keeps of each class the m candidates of lowest std, m = max(floor, size of the smallest class).

    A class without candidates counts too: m is then `floor`. Of equal stds the lower position is kept.
    """
    group = torch.where(candidate, label, n_classes)  # all others sort behind the last class
    # One stable sort by (class, std), as the bits of floats from 0 on are ordered like their values.
    bits = torch.where(candidate, std, 0.0).abs().view(torch.int32)
    order = ((group << 32) | bits).argsort(stable=True)
    group = group[order]
    start = torch.searchsorted(group, torch.arange(n_classes + 1, device=group.device))
    m = start.diff().min().clamp(min=floor)
    rank = torch.arange(len(group), device=group.device) - start[group]
    kept = torch.empty_like(candidate)
    kept[order] = (rank < m) & (group < n_classes)
    return kept


def drop_negatives(
    negative: Tensor,  # int32 [U, ceil(C / 32)]
    positive: Tensor,  # bool [U]
) -> Tensor:  # int32 [U, ceil(C / 32)]
    """Clears the negative classes of kept positives; what balance dropped becomes a negative sample."""
    return negative.masked_fill(positive[:, None], 0)


class Evaluation(NamedTuple):
    """A network on those of M labeled images that can be read, on the host. Accuracy is the mean of `correct`."""

    index: Tensor  # type: ignore[assignment]  # int64 [m], which of the M
    confidence: Tensor  # float32 [m], NaN where a logit was NaN or infinite
    correct: Tensor  # bool [m], False there
    label: Tensor  # int64 [m], -1 there


def evaluate(
    model: nn.Module,
    images: Images,
    labels: Tensor,  # int64 [M]
    index: Tensor | None = None,  # int64 [M], which of the images; None: all
    *,
    batch_size: int = 512,
    forward: Callable[..., Tensor] | None = None,  # as of `pseudo_label`
) -> Evaluation:
    """One pass without dropout over images, under the rule that labels the unlabeled ones."""
    index = torch.arange(len(images)) if index is None else index
    index, inf = index.to(images.device), math.inf
    found = pseudo_label(
        model, images, index, passes=1, kappa_p=inf, kappa_n=inf, batch_size=batch_size, forward=forward
    ).cpu()
    kept = ~torch.isin(found.index, torch.tensor(sorted(images.unreadable), dtype=torch.int64))
    confidence, correct, answer = found.confidence, found.label == labels.cpu(), found.label
    place = torch.arange(len(kept))
    return Evaluation(place[kept], confidence[kept], correct[kept], answer[kept])
