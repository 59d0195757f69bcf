"""What the references share: masks as bits, sums over rows, and what an argument must be. Needs torch alone."""

from __future__ import annotations

import numbers
from typing import Literal, get_args

import torch
from torch import Tensor

Reduction = Literal["none", "mean", "sum", "batchmean"]
REDUCTIONS = get_args(Reduction)  # their position is the op's argument, as in torch's own losses
PLAIN = (Tensor, torch.nn.Parameter)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def pack_mask(mask: Tensor) -> Tensor:
    """A mask of classes as bits: class c becomes bit ``c % 32`` of word ``c // 32``.

    Args:
        mask: bool [N, C].

    Returns:
        int32 [N, ceil(C / 32)]; bits beyond the last class are 0.

    Raises:
        TypeError, ValueError: naming the argument and what it got.

    Example:
        >>> ups_fast.pack_mask(torch.tensor([[True, False, True]]))
        tensor([[5]], dtype=torch.int32)
    """
    check_tensor("mask", mask, "[N, C]", (torch.bool,))
    n, c = mask.shape
    words = (c + 31) // 32
    padded = torch.zeros(n, words * 32, dtype=torch.int64, device=mask.device)
    padded[:, :c] = mask
    bits = padded.view(n, words, 32) << torch.arange(32, device=mask.device)
    return bits.sum(dim=-1).to(torch.int32)  # wraps bit 31 into the sign


def unpack_mask(packed: Tensor, n_classes: int) -> Tensor:
    """The inverse of `pack_mask`.

    Args:
        packed: int32 [N, ceil(n_classes / 32)].
        n_classes: C, at least 0.

    Returns:
        bool [N, C].

    Raises:
        TypeError, ValueError: naming the argument and what it got.

    Example:
        >>> ups_fast.unpack_mask(torch.tensor([[5]], dtype=torch.int32), n_classes=3)
        tensor([[ True, False,  True]])
    """
    check_tensor("packed", packed, "[N, ceil(n_classes / 32)]", (torch.int32,))
    if isinstance(n_classes, bool) or not isinstance(n_classes, (int, torch.SymInt)):
        raise TypeError(f"n_classes must be an integer, got {n_classes!r}")
    if n_classes < 0:
        raise ValueError(f"n_classes must be at least 0, got {n_classes}")
    if packed.shape[1] != (n_classes + 31) // 32:
        raise ValueError(
            f"packed must have {(n_classes + 31) // 32} columns for {n_classes} classes, got {list(packed.shape)}"
        )
    return unpacked(packed, n_classes)


def unpacked(packed: Tensor, n_classes: int) -> Tensor:
    bits = (packed[:, :, None] >> torch.arange(32, dtype=torch.int32, device=packed.device)) & 1
    return bits.flatten(1)[:, :n_classes].bool()


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def weights(logits: Tensor, weight: Tensor | None) -> Tensor:  # [N], in the type of the loss
    dtype = compute_dtype(logits)
    return logits.new_ones(logits.shape[0], dtype=dtype) if weight is None else weight.to(dtype)


def reduced(rows: Tensor, groups: list[Tensor], weight: Tensor, reduction: Reduction) -> Tensor:
    """Losses [N] of rows of these groups, each bool [N], weighted and reduced."""
    zero = rows.new_zeros(())
    losses = [torch.where(group, rows * weight, zero) for group in groups]
    if reduction == "none":
        return torch.stack(losses).sum(dim=0)
    total = zero
    for loss, group in zip(losses, groups, strict=True):
        weights = torch.where(group, weight, zero).sum()
        by = torch.where(weights == 0, 1, weights) if reduction == "mean" else 1
        total = total + loss.sum() / by
    return total / max(1, rows.shape[0]) if reduction == "batchmean" else total


def std_over_passes(x: Tensor) -> Tensor:
    """Unbiased std over dim 0; 0 for a single pass, where it is undefined and unused."""
    # std itself warns where there is nothing to average.
    return x.std(dim=0) if x.shape[0] > 1 and x.numel() else torch.zeros_like(x[0])


# What an argument must be. Shared with the fused ops, so both raise the same sentences.


def check_dense(name: str, x: Tensor, shape: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor {shape}, got {type(x).__name__}")
    if x.layout != torch.strided or x.is_nested:
        layout = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a dense tensor {shape}, got layout {layout}")


def check_tensor(name: str, x: Tensor, shape: str, dtypes: tuple[torch.dtype, ...]) -> None:
    check_dense(name, x, shape)
    if x.dim() != shape.count(",") + 1:
        raise ValueError(f"{name} must have shape {shape}, got {list(x.shape)}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(str(d)[6:] for d in dtypes)}, got {str(x.dtype)[6:]}")


def check_rows(name: str, x: Tensor, logits: Tensor, like: str = "logits") -> None:
    if x.device != logits.device:
        place = "the logits' device" if like == "logits" else f"the device of {like},"
        raise ValueError(f"{name} must be on {place} {logits.device}, got {x.device}")
    if x.shape[0] != logits.shape[-2]:
        raise ValueError(f"{name} must have {logits.shape[-2]} rows like {like}, got {list(x.shape)}")


def check_number(name: str, x: float, low: float, high: float) -> float:
    if not isinstance(x, numbers.Real) or isinstance(x, bool):
        raise TypeError(f"{name} must be a number, got {type(x).__name__}")
    try:
        x = float(x)
    except OverflowError:
        raise ValueError(f"{name} must lie in [{low}, {high}], got a number that no float holds") from None
    if not low <= x <= high:  # also catches NaN
        raise ValueError(f"{name} must lie in [{low}, {high}], got {x}")
    return x


def check_logits(logits: Tensor, shape: str) -> None:
    check_tensor("logits", logits, shape, FLOATS)
    check_classes("logits", logits)


def check_classes(name: str, x: Tensor) -> None:
    if x.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one class, got {list(x.shape)}")


def check_mask(name: str, mask: Tensor, logits: Tensor) -> None:
    n_classes = logits.shape[-1]
    check_tensor(name, mask, "[N, C]", (torch.bool, torch.int32))
    check_rows(name, mask, logits)
    width = n_classes if mask.dtype == torch.bool else (n_classes + 31) // 32
    if mask.shape[1] != width:
        form = "bool" if mask.dtype == torch.bool else "packed int32"
        raise ValueError(
            f"{name} as {form} must have {width} columns for {n_classes} classes, got {list(mask.shape)}"
        )


def is_readable(x: Tensor) -> bool:
    """Whether x has values that may be looked at: not in a trace, a transform or the capture of a CUDA graph."""
    return (
        type(x) in PLAIN  # not a fake one
        and x.device.type != "meta"
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and torch._C._len_torch_dispatch_stack() == 0
        and not (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def check_reduction(reduction: str) -> None:
    """Raise an error if it is not a `Reduction`."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'mean', 'sum', 'batchmean' or 'none', got {reduction!r}")


def check_weight(weight: Tensor | None, logits: Tensor, shape: str, like: str = "logits") -> None:
    if weight is None:
        return
    check_tensor("weight", weight, shape, FLOATS)
    check_rows("weight", weight, logits, like)
    check_constant("weight", weight)


def check_constant(name: str, x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} must not require a gradient, as the loss has none for it: pass {name}.detach()"
        )
