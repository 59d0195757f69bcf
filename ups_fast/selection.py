"""Pseudo-labels: the labeling pass, the selection and the class balance.

P passes over images, by dropout or another source of uncertainty (`pseudo_label`, `passes_over`). What they select,
and what of it is kept, is the task's: `task.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ups_fast.data.images import Draws, Images
from ups_fast.models import Dropout, Network
from ups_fast.modules import mc_dropout
from ups_fast.reference import dropout_keys
from ups_fast.tasks import SINGLE, Task
from ups_fast.world import ALONE, World


class Thresholds(NamedTuple):
    """Which labels are selected; see `mc_select`."""

    tau_p: float = 0.70
    tau_n: float = 0.05
    kappa_p: float = 0.05
    kappa_n: float = 0.005
    temp_nl: float = 2.0


@torch.no_grad()
def pseudo_label(
    model: nn.Module,
    images: Images,
    index: Tensor,  # int64 [U], on the device of the images
    *,
    task: Task = SINGLE,
    tau_p: float = 0.70,
    tau_n: float = 0.05,
    kappa_p: float = 0.05,
    kappa_n: float = 0.005,
    temp_nl: float = 2.0,
    passes: int = 10,
    batch_size: int = 512,
    mc_layers: int = 0,
    uncertainty: str = "dropout",
    policy: Any = None,
    keep: Callable[[Any], Any] = lambda found: found,
    balanced: bool = False,
    seed: int = 0,
    forward: Callable[..., Tensor] | None = None,
    progress: Callable[[int], None] = lambda images: None,
    world: World = ALONE,
) -> Any:  # the task's record, such as PseudoLabels
    """Labels images by `passes` passes and selects, on the device.

    passes = 1 means no uncertainty: clean images, no dropout, and confidence alone decides, whatever the kappas are.
    `keep` chooses which positives stay. `balanced` then cuts them to equal numbers per class.
    `progress` is told each finished batch's size. Of several processes in `world`, each labels whole batches that
    follow one another, is told of equally many, and gets the record of all: that of one process, bit for bit.
    `batch_size` rows go through the network at once: with several passes that many divided by `passes` images.
    What is dropped or drawn depends on `seed`, the pass, the sample and the layer alone, so `batch_size` and the
    order of `index` change nothing but the last bits of the logits. No more than one batch's logits [P, B, C] exist
    at once, whatever U and C are. An image of `images.unreadable` gets no label and is selected for
    nothing.

    mc_layers  if not 0, only so many of the network's last Dropouts act: another method, and cheaper, since all that
              comes before them is computed once for all passes
    uncertainty why passes differ. "augment": each sees an image as `policy` changes it, a `Policy`, or of features a
              `Noise`, without dropout; "heads": each is by another head, without dropout; else by dropout of
              whatever kind the network has
    forward   `passes_over`, or what `fullgraph` made of it; it always gets batches of one size

    Raises ValueError for an impossible threshold (see `mc_select`), passes > 1 where nothing makes them differ, or
    `mc_layers` where the network has fewer.
    """
    thresholds = {"tau_p": tau_p, "tau_n": tau_n, "kappa_p": kappa_p, "kappa_n": kappa_n, "temp_nl": temp_nl}
    if passes > 1:
        _check_passes(model, passes, uncertainty, policy)
    skip, forward = skipped(model, mc_layers), forward or passes_over
    salt = torch.full((), seed, dtype=torch.int64, device=index.device)
    rows = max(1, min(batch_size // passes, len(index)))
    draws = Draws(passes, policy, seed) if uncertainty == "augment" and passes > 1 else None
    part, turns = world.part(len(index), rows)
    ours = index[part]
    mine = ours if len(ours) else index[:rows]  # too few batches for all: this process does the first in vain
    batches = images.drawn_batches(mine, rows, draws) if draws else images.clean_batches(mine, rows)
    found, done = None, 0
    # Not in bfloat16: rounded logits put 2 to 8 % of samples on the other side of kappa_n.
    with mc_dropout(model, active=False), torch.autocast(index.device.type, enabled=False):
        for chunk, batch in zip(mine.split(rows), batches, strict=True):
            whole = torch.arange(rows, device=index.device).clamp(max=len(chunk) - 1) if len(chunk) else chunk
            places = whole
            if draws:  # the batch has each image once for each pass
                places, draw = draws.of(whole)
                places = places + draw * len(chunk)
            seen = batch[places]
            logits = forward(model, seen, chunk[whole], passes, salt, skip, uncertainty)[:, : len(chunk)]
            parts = task.select(logits, thresholds)
            # Made once: results kept between the batches would break the freed memory up, and it would grow.
            found = found or [each.new_empty((len(mine), *each.shape[1:])) for each in parts]
            for every, each in zip(found, parts, strict=True):
                every[done : done + len(chunk)] = each
            done += len(chunk)
            progress(len(chunk) if len(ours) else 0)
    assert found is not None
    for _ in range(turns - len(mine.split(rows))):
        progress(0)
    world.union(images.unreadable, {})
    found = world.gather([each[: len(ours)] for each in found], len(index), turns * rows)
    gone = torch.tensor(list(images.unreadable), dtype=torch.int64, device=index.device)
    kept = keep(task.record(index, found, torch.isin(index, gone) if images.unreadable else None))
    return task.finish(kept, n_classes=logits.shape[-1], balanced=balanced, passes=passes)


@torch.no_grad()
def features_of(
    model: Network,
    images: Images,
    index: Tensor,  # int64 [n], sample ids
    *,
    batch_size: int = 512,
    world: World = ALONE,
) -> Tensor:  # float32 [n, D], on the device
    """What the classifier gets for clean images, without dropout; several processes share the batches."""
    index = index.to(images.device)
    part, turns = world.part(len(index), batch_size)
    ours = index[part]
    mine = ours if len(ours) else index[:batch_size]
    with mc_dropout(model, active=False), torch.autocast(index.device.type, enabled=False):
        parts = [model.embed(model.prefix(batch), None) for batch in images.clean_batches(mine, batch_size)]
    return world.gather([torch.cat(parts)[: len(ours)]], len(index), turns * batch_size)[0]


def _check_passes(model: nn.Module, passes: int, uncertainty: str, policy: Any) -> None:
    """ValueError where nothing makes several passes differ."""
    heads = getattr(model, "heads", 1)
    drops = any(isinstance(module, Dropout) and module.p > 0 for module in model.modules())
    if uncertainty == "augment":
        if policy is None:
            raise ValueError("policy must say how uncertainty='augment' changes images, got None")
    elif uncertainty == "heads":
        if passes != heads:
            raise ValueError(
                f"passes must be the network's {heads} heads with uncertainty='heads', got {passes}"
            )
    elif heads == 1 and not drops:
        raise ValueError(
            "model must have a Dropout of ups_fast.models with p > 0, or several heads, for several passes, got none"
        )
    elif passes % heads:
        raise ValueError(f"passes must be a multiple of the network's {heads} heads, got {passes}")


def labeling_rows(device: torch.device, shape: Sequence[int]) -> int:
    """How many images [C, H, W], clips [C, T, H, W] or rows [d] a device takes at once, without gradients.

    No results depend on it. On a CPU 96 images of 32x32: what a layer makes of these stays in the caches, and below the
    32 MiB above which glibc returns memory with each tensor, so that each layer would fault its pages in again. Large
    images go eight at a time where these do not need more memory than 512 small ones, as the weights are read anew for
    each batch.
    """
    images = len(shape) > 1
    size = math.prod(shape[1:] if images else (max(256, shape[0]),))
    most = (8192 if device.type == "cuda" else 512) * 32 * 32 // size
    few = most if device.type == "cuda" or not images else max(96 * 32 * 32 // size, min(8, most))
    return max(1, few)


def skipped(model: nn.Module, mc_layers: int) -> int:
    """How many of the network's first Dropouts are off where its last `mc_layers` act; 0 means that all do."""
    count = model.n_dropouts if isinstance(model, Network) else 0
    if not 0 <= mc_layers <= count:
        raise ValueError(f"mc_layers must be in 0 .. {count}, as many as the network has, got {mc_layers}")
    return count - mc_layers if mc_layers else 0


def passes_over(
    model: nn.Module,  # in eval mode; a Network for more than one pass
    batch: Tensor,  # [B, C, H, W]; [P * B, C, H, W] with uncertainty="augment"
    index: Tensor,  # int64 [B], sample ids
    passes: int,
    seed: int | Tensor,  # int64 []
    skip: int = 0,
    uncertainty: str = "dropout",  # as of `pseudo_label`
) -> Tensor:  # [P, B, n_classes]
    """The logits of P passes: what comes before dropout is computed once, the rest as one batch of P * B rows.

    skip  so many of the network's first Dropouts are off
    """
    if passes == 1:
        return cast(Tensor, model(batch))[None]
    network = cast(Network, model)
    if uncertainty == "augment":  # the answer of all heads, if there are several
        logits = network(batch)
        return logits.view(passes, len(index), logits.shape[1])
    if uncertainty == "heads":
        return network.members(batch, None)
    hidden = network.prefix(batch, skip)
    draw = torch.arange(passes, device=index.device).repeat_interleave(len(index))
    keys = dropout_keys(index.repeat(passes), seed=seed, draw=draw)
    return network.passes(hidden, keys, passes, skip)


class Evaluation(NamedTuple):
    """A network on the m of M labeled images that can be read, on the host."""

    found: Any  # the task's record: what one pass without dropout says of them
    truth: Tensor  # [m] or [m, C], their labels


def evaluate(
    model: nn.Module,
    images: Images,
    labels: Tensor,  # int64 [M], or of several labels int8 [M, C]
    index: Tensor | None = None,  # int64 [M], which of the images; None: all
    *,
    task: Task = SINGLE,
    batch_size: int = 512,
    forward: Callable[..., Tensor] | None = None,  # as of `pseudo_label`
    world: World = ALONE,
) -> Evaluation:
    """One pass without dropout over images, under the rule that labels the unlabeled ones."""
    index = torch.arange(len(images)) if index is None else index
    index, inf = index.to(images.device), math.inf
    found = pseudo_label(
        model,
        images,
        index,
        task=task,
        passes=1,
        kappa_p=inf,
        kappa_n=inf,
        batch_size=batch_size,
        forward=forward,
        world=world,
    ).cpu()
    kept = ~torch.isin(found.index, torch.tensor(sorted(images.unreadable), dtype=torch.int64))
    return Evaluation(found.at(kept), labels.cpu()[kept])
