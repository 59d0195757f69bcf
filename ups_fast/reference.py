"""The specification: every op of `ups_fast` in plain PyTorch, written to be read.

Same names, arguments, results and errors as the fused ops; the tests hold each kernel against these functions.
Needs torch alone. Equations: Rizve et al., "In Defense of Pseudo-Labeling", ICLR 2021.
"""

from __future__ import annotations

import math
import numbers
from typing import NamedTuple

import torch
from torch import Tensor

from .reference_augment import (  # noqa: F401
    augment,
    augment_plan,
    check_augment,
    check_augment_plan,
    check_counter,
    is_integer,
    replay,
)

NCE_EPS = 1e-7
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Selection(NamedTuple):
    """What `mc_select` says of N samples. Floats are float32 (float64 for float64 logits).

    >>> logits = torch.tensor([[[5.0, 0.0, 0.0]], [[5.0, 0.1, 0.0]]])
    >>> found = mc_select(logits)
    >>> found.label, found.positive
    (tensor([0]), tensor([True]))
    """

    label: Tensor  # int64 [N], argmax of the mean probability, lowest index on a tie; -1 for a non-finite row
    confidence: Tensor  # float [N], mean probability of the label over the passes; NaN for a non-finite row
    std: Tensor  # float [N], unbiased std of that probability over the passes; NaN for a non-finite row
    positive: Tensor  # bool [N], the label can be trusted
    negative: (
        Tensor  # bool [N, C], the sample is surely not of class c; or int32 [N, ceil(C / 32)] when packed
    )


def mc_select(
    logits: Tensor,
    *,
    tau_p: float = 0.70,
    tau_n: float = 0.05,
    kappa_p: float = 0.05,
    kappa_n: float = 0.005,
    temp_nl: float = 2.0,
    packed: bool = False,
) -> Selection:
    """Pseudo-labels from the logits of P stochastic passes (UPS, equations 4 to 6).

    With ``p = softmax(z)``, ``q = softmax(z / temp_nl)``, means and unbiased stds taken over the passes:

    - label ``l = argmax_c mean p_c``
    - positive: ``mean p_l >= tau_p`` and ``std p_l < kappa_p``
    - negative class c: ``mean q_c < tau_n`` and ``std q_c < kappa_n`` and ``c != l``

    A sample with a NaN or infinite logit in any pass is selected for nothing. P = 1 (no uncertainty) needs both
    kappas infinite; the std is then 0. The results are constants to every kind of differentiation.

    Args:
        logits: [P, N, C] float32, float16, bfloat16 or float64; any strides. P >= 1, N >= 0, C >= 1.
        tau_p, tau_n: confidence thresholds in [0, 1], ``tau_n <= tau_p``.
        kappa_p, kappa_n: uncertainty thresholds >= 0, may be infinite.
        temp_nl: temperature of the negatives' softmax, in [0.001, 1000].
        packed: return ``negative`` as bits: int32 [N, ceil(C / 32)], class c is bit ``c % 32`` of word ``c // 32``.

    Raises:
        TypeError, ValueError: naming the argument and what it got.
    """
    tau_p, tau_n, kappa_p, kappa_n, temp_nl = check_mc_select(
        logits, tau_p, tau_n, kappa_p, kappa_n, temp_nl, packed
    )
    z = logits.detach().to(_compute_dtype(logits))
    finite = z.isfinite().all(dim=-1).all(dim=0)
    p = torch.softmax(z, dim=-1)
    q = torch.softmax(z / temp_nl, dim=-1)
    mean_p, std_p = p.mean(dim=0), _std_over_passes(p)
    mean_q, std_q = q.mean(dim=0), _std_over_passes(q)

    label = mean_p.argmax(dim=-1)
    confidence = mean_p.gather(-1, label[:, None])[:, 0]
    std = std_p.gather(-1, label[:, None])[:, 0]
    positive = (confidence >= tau_p) & (std < kappa_p) & finite
    negative = (mean_q < tau_n) & (std_q < kappa_n) & finite[:, None]
    negative &= torch.arange(z.shape[-1], device=z.device) != label[:, None]

    return Selection(
        label=torch.where(finite, label, -1),
        confidence=torch.where(finite, confidence, math.nan),
        std=torch.where(finite, std, math.nan),
        positive=positive,
        negative=pack_mask(negative) if packed else negative,
    )


def nce_loss(logits: Tensor, mask: Tensor, *, reduction: str = "mean") -> Tensor:
    """Negative cross-entropy: pushes probability away from the classes that a sample surely is not (UPS, equation 3).

    ``NCE_i = -sum_c g_ic log(clamp(1 - softmax(z_i)_c, 1e-7, 1)) / (sum_c g_ic + 1e-7)``

    Args:
        logits: [N, C] float32, float16, bfloat16 or float64. Softmax, log and sums are float32 (float64 for float64).
        mask: g, bool [N, C], or packed int32 [N, ceil(C / 32)] as `mc_select` returns it.
        reduction: ``"mean"`` over the rows with at least one True (0 if there is none), ``"sum"``, or ``"none"``:
            [N] with 0 for the other rows.

    Returns:
        float32 (float64 for float64 logits) scalar, or [N] for ``"none"``.
    """
    check_nce_loss(logits, mask, reduction)
    loss, active = _nce_rows(logits, mask)
    if reduction == "none":
        return loss
    return loss.sum() / active.sum().clamp(min=1) if reduction == "mean" else loss.sum()


def ups_loss(logits: Tensor, target: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """The loss of a mixed UPS batch: mean CE over its positive rows + mean NCE over its negative rows, weights 1 : 1.

    A row is positive where ``positive`` says so (its negative classes are then ignored), negative where it is not and
    has at least one negative class, and else contributes nothing. The term of an empty group is 0.

    Args:
        logits: [B, C] float32, float16, bfloat16 or float64.
        target: int64 [B], read for positive rows only (others may hold -1); there it must lie in [0, C): the CPU
            raises a RuntimeError, a CUDA kernel returns NaN rather than wait for the device.
        positive: bool [B].
        negative: bool [B, C], or packed int32 [B, ceil(C / 32)] as `mc_select` returns it.

    Returns:
        float32 (float64 for float64 logits) scalar.
    """
    check_ups_loss(logits, target, positive, negative)
    z = logits.to(_compute_dtype(logits))
    n_classes = z.shape[-1]
    if z.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = positive & ((target < 0) | (target >= n_classes))
        if bad.any():
            raise RuntimeError(
                f"target must lie in [0, {n_classes}) in positive rows, got {target[bad][0].item()} "
                f"in row {int(bad.nonzero()[0])}"
            )
    g = unpack_mask(negative, n_classes) if negative.dtype == torch.int32 else negative
    active = g.any(dim=-1) & ~positive
    z = torch.where((positive | active)[:, None], z, 0)  # a NaN in a row that counts for nothing stays there
    safe = target.clamp(0, n_classes - 1)
    ce = torch.logsumexp(z, dim=-1) - z.gather(-1, safe[:, None])[:, 0]
    ce = torch.where((target >= 0) & (target < n_classes), ce, math.nan)
    ce_mean = torch.where(positive, ce, 0).sum() / positive.sum().clamp(min=1)

    nce, _ = _nce_rows(z, g)
    nce_mean = torch.where(active, nce, 0).sum() / active.sum().clamp(min=1)
    return ce_mean + nce_mean


def counter_dropout(x: Tensor, keys: Tensor, *, p: float, layer: int = 0) -> Tensor:
    """Dropout that is a function of its arguments: element e of row b is kept where hash(keys[b], layer, e) >= p.

    What is kept is scaled by 1 / (1 - p), the rest is 0. The mask of a row depends neither on the batch, nor on the
    memory layout, device or process, and is computed again in the backward pass instead of being stored. Wellons'
    32-bit mixing hash ("lowbias32", 2018), twice.

    Args:
        x: [B, C] or [B, C, ...] float32, float16, bfloat16 or float64; less than 2^32 elements in a row.
        keys: [B] int32, of each row its own random number: see `dropout_keys`.
        p: in [0, 1), how likely an element is dropped.
        layer: 0 .. 2^20 - 1; layers of other numbers have other masks.

    Returns:
        As x. Differentiable in x.

    Raises:
        TypeError, ValueError: naming the argument and what it got.

    >>> keys = dropout_keys(torch.arange(3), seed=0, draw=0)
    >>> y = counter_dropout(torch.ones(3, 8, 4, 4), keys, p=0.5)
    >>> sorted(y.unique().tolist())
    [0.0, 2.0]
    >>> torch.equal(counter_dropout(torch.ones(1, 8, 4, 4), keys[2:], p=0.5), y[2:])
    True
    """
    check_counter_dropout(x, keys, p, layer)
    channels, spatial = x.shape[1], x.shape[2:]
    device = x.device
    places = torch.arange(math.prod(spatial), dtype=torch.int32, device=device).view(1, 1, *spatial)
    element = places * channels + torch.arange(channels, dtype=torch.int32, device=device).view(
        1, channels, *[1] * len(spatial)
    )
    layer_keys = _mix(keys + _signed(layer * 0x9E3779B9)).view(x.shape[0], *[1] * (x.ndim - 1))
    layout = torch.zeros_like(x, dtype=torch.int32)  # where() takes that of its first tensor
    kept = _mix(layout ^ layer_keys ^ element) ^ -(
        1 << 31
    )  # the order of unsigned numbers as that of signed ones
    dropped = kept < min(int(p * 2**32), 2**32 - 1) - 2**31
    return torch.where(dropped, 0.0, x * (1 / (1 - p))).to(x.dtype)


def dropout_keys(index: Tensor, *, seed: int | Tensor, draw: int | Tensor) -> Tensor:
    """int32 [B], the `keys` of `counter_dropout`: a hash of seed, draw and sample id (SplitMix64, Steele et al. 2014).

    Args:
        index: [B] int64, sample ids.
        seed: integer of 0 .. 2^63 - 1, or an int64 tensor [].
        draw: integer of 0 .. 2^63 - 1, or an int64 tensor [] or [B]: which pass, epoch or step.

    Returns:
        int32 [B], on the device of `index`.

    Raises:
        TypeError, ValueError: naming the argument and what it got.

    >>> dropout_keys(torch.tensor([4, 7]), seed=0, draw=1)
    tensor([1608235242,  232030960], dtype=torch.int32)
    """
    _check_tensor("index", index, "[B]", (torch.int64,))
    check_counter("seed", seed, 63, index)
    check_counter("draw", draw, 63, index, each=True)

    def mix(x: Tensor) -> Tensor:
        x = (x ^ (x >> 30 & (1 << 34) - 1)) * (0xBF58476D1CE4E5B9 - 2**64)
        x = (x ^ (x >> 27 & (1 << 37) - 1)) * (0x94D049BB133111EB - 2**64)
        return x ^ (x >> 31 & (1 << 33) - 1)

    golden = 0x9E3779B97F4A7C15 - 2**64
    hashed = torch.zeros_like(index)
    for word in (seed, draw, index):
        hashed = mix((hashed ^ word) + golden)
    return hashed.to(torch.int32)


def mish(x: Tensor) -> Tensor:
    """x tanh(log(1 + exp(x))), elementwise (Misra 2019), by a single exponential.

    With u = exp(-|x|) the tanh is (u^2 + 2u) / (u^2 + 2u + 2) below 0 and (1 + 2u) / (1 + 2u + 2u^2) above. Computed in
    float32, or float64 for float64. As torch.nn.functional.mish, but next to 0 instead of NaN at -inf.

    Args:
        x: any shape, float32, float16, bfloat16 or float64.

    Returns:
        As x. Differentiable once (by the fused op; any number of times by this reference).

    Raises:
        TypeError: naming the argument and what it got.

    >>> mish(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([-0.3034,  0.0000,  1.9440])
    """
    check_mish(x)
    z = x.to(_compute_dtype(x))
    limit = 87.0 if z.dtype == torch.float32 else 700.0  # beyond it mish is 0 or x to the last bit
    u = torch.exp(-z.clamp(-limit, limit).abs())
    small, large = u * (u + 2), u * 2 + 1
    tanh = torch.where(z > 0, large / (large + 2 * u * u), small / (small + 2))
    return (torch.where(z < -limit, -limit, z) * tanh).to(x.dtype)


def pack_mask(mask: Tensor) -> Tensor:
    """bool [N, C] -> int32 [N, ceil(C / 32)]; class c becomes bit ``c % 32`` of word ``c // 32``."""
    n, c = mask.shape
    words = (c + 31) // 32
    padded = torch.zeros(n, words * 32, dtype=torch.int64, device=mask.device)
    padded[:, :c] = mask
    bits = padded.view(n, words, 32) << torch.arange(32, device=mask.device)
    return bits.sum(dim=-1).to(torch.int32)  # wraps bit 31 into the sign


def unpack_mask(packed: Tensor, n_classes: int) -> Tensor:
    """int32 [N, ceil(C / 32)] -> bool [N, C]: the inverse of `pack_mask`."""
    bits = (packed[:, :, None] >> torch.arange(32, dtype=torch.int32, device=packed.device)) & 1
    return bits.flatten(1)[:, :n_classes].bool()


def _nce_rows(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """NCE of each row (0 where its mask is empty) and which rows have a mask: [N], bool [N]."""
    z = logits.to(_compute_dtype(logits))
    g = unpack_mask(mask, z.shape[-1]) if mask.dtype == torch.int32 else mask
    z = torch.where(g.any(dim=-1)[:, None], z, 0)
    log_not_p = torch.log(torch.clamp(1 - torch.softmax(z, dim=-1), NCE_EPS, 1.0))
    loss = -torch.where(g, log_not_p, 0).sum(dim=-1) / (g.sum(dim=-1, dtype=z.dtype) + NCE_EPS)
    return loss, g.any(dim=-1)


def _std_over_passes(x: Tensor) -> Tensor:
    """Unbiased std over dim 0; 0 for a single pass, where it is undefined and unused."""
    # std itself warns where there is nothing to average.
    return x.std(dim=0) if x.shape[0] > 1 and x.numel() else torch.zeros_like(x[0])


def _mix(x: Tensor) -> Tensor:  # int32
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * _signed(0x846CA68B)
    return x ^ (x >> 16 & 0xFFFF)


def _signed(word: int) -> int:
    """The int32 of the same lower 32 bits."""
    return (word + 2**31) % 2**32 - 2**31


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# What an argument must be. Shared with the fused ops, so both raise the same sentences.


def _check_dense(name: str, x: Tensor, shape: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor {shape}, got {type(x).__name__}")
    if x.layout != torch.strided or x.is_nested:
        layout = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a dense tensor {shape}, got layout {layout}")


def _check_tensor(name: str, x: Tensor, shape: str, dtypes: tuple[torch.dtype, ...]) -> None:
    _check_dense(name, x, shape)
    if x.dim() != shape.count(",") + 1:
        raise ValueError(f"{name} must have shape {shape}, got {list(x.shape)}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(str(d)[6:] for d in dtypes)}, got {str(x.dtype)[6:]}")


def _check_rows(name: str, x: Tensor, logits: Tensor) -> None:
    if x.device != logits.device:
        raise ValueError(f"{name} must be on the logits' device {logits.device}, got {x.device}")
    if x.shape[0] != logits.shape[-2]:
        raise ValueError(f"{name} must have {logits.shape[-2]} rows like logits, got {list(x.shape)}")


def _check_number(name: str, x: float, low: float, high: float) -> float:
    if not isinstance(x, numbers.Real) or isinstance(x, bool):
        raise TypeError(f"{name} must be a number, got {type(x).__name__}")
    try:
        x = float(x)
    except OverflowError:
        raise ValueError(f"{name} must lie in [{low}, {high}], got a number that no float holds") from None
    if not low <= x <= high:  # also catches NaN
        raise ValueError(f"{name} must lie in [{low}, {high}], got {x}")
    return x


def _check_logits(logits: Tensor, shape: str) -> None:
    _check_tensor("logits", logits, shape, _FLOATS)
    if logits.shape[-1] == 0:
        raise ValueError(f"logits must have at least one class, got {list(logits.shape)}")


def _check_mask(name: str, mask: Tensor, logits: Tensor) -> None:
    n_classes = logits.shape[-1]
    _check_tensor(name, mask, "[N, C]", (torch.bool, torch.int32))
    _check_rows(name, mask, logits)
    width = n_classes if mask.dtype == torch.bool else (n_classes + 31) // 32
    if mask.shape[1] != width:
        form = "bool" if mask.dtype == torch.bool else "packed int32"
        raise ValueError(
            f"{name} as {form} must have {width} columns for {n_classes} classes, got {list(mask.shape)}"
        )


def check_counter_dropout(x: Tensor, keys: Tensor, p: float, layer: int) -> None:
    """Raise the error of the first `counter_dropout` argument that is not as documented."""
    _check_dense("x", x, "[B, C, ...]")
    if x.dtype not in _FLOATS or x.dim() < 2:
        raise TypeError(f"x must be floating-point [B, C, ...], got {str(x.dtype)[6:]} {list(x.shape)}")
    _check_tensor("keys", keys, "[B]", (torch.int32,))
    if keys.device != x.device or keys.shape[0] != x.shape[0]:
        raise ValueError(
            f"keys must be [{x.shape[0]}] on {x.device} like x, got {list(keys.shape)} on {keys.device}"
        )
    check_dropout(p, layer)


def check_dropout(p: float, layer: int) -> None:
    """Raise the error of the first number that `counter_dropout` cannot take."""
    _check_number("p", p, 0.0, 1.0)
    if p == 1:
        raise ValueError("p must be below 1, got 1")
    if not is_integer(layer) or not 0 <= layer < 1 << 20:
        raise ValueError(f"layer must be an integer of 0 .. 2^20 - 1, got {layer!r}")


def check_mish(x: Tensor) -> None:
    """Raise the error if `mish` cannot take x."""
    _check_dense("x", x, "[...]")
    if x.dtype not in _FLOATS:
        raise TypeError(f"x must be floating-point [...], got {str(x.dtype)[6:]} {list(x.shape)}")


def check_mc_select(
    logits: Tensor, tau_p: float, tau_n: float, kappa_p: float, kappa_n: float, temp_nl: float, packed: bool
) -> tuple[float, float, float, float, float]:
    """Raise the error of the first `mc_select` argument that is not as documented; the thresholds as floats."""
    _check_logits(logits, "[P, N, C]")
    if logits.shape[0] == 0:
        raise ValueError(f"logits must hold at least one pass, got {list(logits.shape)}")
    tau_p = _check_number("tau_p", tau_p, 0.0, 1.0)
    tau_n = _check_number("tau_n", tau_n, 0.0, 1.0)
    kappa_p = _check_number("kappa_p", kappa_p, 0.0, math.inf)
    kappa_n = _check_number("kappa_n", kappa_n, 0.0, math.inf)
    temp_nl = _check_number("temp_nl", temp_nl, 1e-3, 1e3)
    if not isinstance(packed, bool):
        raise TypeError(f"packed must be True or False, got {packed!r}")
    if tau_n > tau_p:
        raise ValueError(f"tau_n must not exceed tau_p = {tau_p}, got {tau_n}")
    if logits.shape[0] == 1 and not (math.isinf(kappa_p) and math.isinf(kappa_n)):
        raise ValueError(
            "kappa_p and kappa_n must both be inf with a single pass, because one pass has no std to hold them "
            f"against; got kappa_p = {kappa_p}, kappa_n = {kappa_n}"
        )
    return tau_p, tau_n, kappa_p, kappa_n, temp_nl


def check_nce_loss(logits: Tensor, mask: Tensor, reduction: str) -> None:
    """Raise the error of the first `nce_loss` argument that is not as documented."""
    _check_logits(logits, "[N, C]")
    _check_mask("mask", mask, logits)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def check_ups_loss(logits: Tensor, target: Tensor, positive: Tensor, negative: Tensor) -> None:
    """Raise the error of the first `ups_loss` argument that is not as documented."""
    _check_logits(logits, "[B, C]")
    _check_tensor("target", target, "[B]", (torch.int64,))
    _check_rows("target", target, logits)
    _check_tensor("positive", positive, "[B]", (torch.bool,))
    _check_rows("positive", positive, logits)
    _check_mask("negative", negative, logits)
