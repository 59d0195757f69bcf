"""The specification of the multi-label ops: classes that do not exclude each other, each judged by its own sigmoid.

Part of `ups_fast.reference`. Needs torch alone. Equations: Rizve et al., "In Defense of Pseudo-Labeling", ICLR 2021.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from .reference_shared import (
    FLOATS,
    Reduction,
    check_constant,
    check_logits,
    check_mask,
    check_number,
    check_reduction,
    check_rows,
    check_tensor,
    check_weight,
    compute_dtype,
    is_readable,
    pack_mask,
    reduced,
    std_over_passes,
    unpacked,
    weights,
)


class MultiLabelSelection(NamedTuple):
    """What `mc_select_multilabel` says of N samples and C classes. Floats are float32 (float64 for float64 logits).

    >>> found = mc_select_multilabel(torch.tensor([[[5.0, 0.0, -8.0]], [[5.1, 0.0, -8.0]]]))
    >>> found.positive.tolist(), found.negative.tolist()
    ([[True, True, False]], [[False, False, True]])
    """

    confidence: Tensor  # float [N, C], mean probability over the passes; NaN where a logit is not finite
    std: Tensor  # float [N, C], unbiased std of that probability over the passes; NaN where a logit is not finite
    positive: Tensor  # bool [N, C], the sample is surely of class c; or int32 [N, ceil(C / 32)] when packed
    negative: Tensor  # the same of what it surely is not


def mc_select_multilabel(
    logits: Tensor,
    *,
    tau_p: float | Tensor = 0.5,
    tau_n: float | Tensor = 0.05,
    kappa_p: float | Tensor = 0.05,
    kappa_n: float | Tensor = 0.005,
    temp_nl: float = 2.0,
    packed: bool = False,
) -> MultiLabelSelection:
    """Pseudo-labels of several classes at once from the logits of P stochastic passes (Rizve et al., ICLR 2021).

    With ``p = sigmoid(z)``, ``q = sigmoid(z / temp_nl)``, means and unbiased stds taken over the passes, each class c
    of a sample is judged by itself:

    - positive: ``mean p_c >= tau_p`` and ``std p_c < kappa_p``
    - negative: ``mean q_c < tau_n`` and ``std q_c < kappa_n``

    Nothing is cleared from the negatives. With unusual thresholds a class can be both, and `ups_loss_multilabel` then
    takes it for positive. A class with a NaN or infinite logit in any pass is selected for nothing; the other classes
    of that sample are judged as ever. A single pass (P = 1) has no std: 0 is returned, and confidence alone decides,
    whatever the kappas are. The results are constants to every kind of differentiation.

    Args:
        logits: [P, N, C] float32, float16, bfloat16 or float64; any strides. P >= 1, N >= 0, C >= 1. Logits, not
            probabilities: on the CPU, samples that lie in [0, 1] throughout raise a UserWarning.
        tau_p, tau_n: confidence thresholds in [0, 1], ``tau_n <= tau_p``; or floating-point [C], of each class. The
            values of a tensor are not checked, so that nothing waits for the device.
        kappa_p, kappa_n: uncertainty thresholds >= 0, may be infinite; or floating-point [C]. Ignored for P = 1.
        temp_nl: temperature of the negatives' sigmoid, in [0.001, 1000].
        packed: return both masks as bits: int32 [N, ceil(C / 32)], class c is bit ``c % 32`` of word ``c // 32``.

    Returns:
        A `MultiLabelSelection` of N samples.

    Raises:
        TypeError, ValueError: naming the argument and what it got.

    Example:
        >>> logits = torch.tensor([[[4.0, 1.0, -8.0]], [[4.1, -1.0, -8.0]]])  # P = 2, and the passes differ on class 1
        >>> found = ups_fast.mc_select_multilabel(logits)
        >>> found.positive.tolist(), found.negative.tolist()
        ([[True, False, False]], [[False, False, True]])
        >>> rare = torch.tensor([0.99, 0.5, 0.5])  # a threshold for each class
        >>> ups_fast.mc_select_multilabel(logits, tau_p=rare).positive.tolist()
        [[False, False, False]]
    """
    found = check_mc_select_multilabel(logits, tau_p, tau_n, kappa_p, kappa_n, temp_nl, packed)
    z = logits.detach().to(compute_dtype(logits))
    tau_p, tau_n, kappa_p, kappa_n = (
        x.detach().to(z.dtype) if isinstance(x, Tensor) else x for x in found[:4]
    )
    finite = z.isfinite().all(dim=0)
    p, q = torch.sigmoid(z), torch.sigmoid(z / found[4])
    confidence, std = p.mean(dim=0), std_over_passes(p)
    positive = (confidence >= tau_p) & (std < kappa_p) & finite
    negative = (q.mean(dim=0) < tau_n) & (std_over_passes(q) < kappa_n) & finite
    return MultiLabelSelection(
        confidence=torch.where(finite, confidence, math.nan),
        std=torch.where(finite, std, math.nan),
        positive=pack_mask(positive) if packed else positive,
        negative=pack_mask(negative) if packed else negative,
    )


def ups_loss_multilabel(
    logits: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Binary cross-entropy over the selected classes of each image, divided by how many they are.

    (Rizve et al., ICLR 2021, for several labels.) With ``p = sigmoid(z)``, g = 1 where a class is positive or negative,
    y = 1 where it is positive, and ``s_i = sum_c g_ic``:

    ``L_i = -w_i / s_i sum_c g_ic w_ic [y_ic log p_ic + (1 - y_ic) log(1 - p_ic)]``

    with w_i or w_ic the weights, or 1. An image without a selected class counts for nothing. A class that is both
    positive and negative is positive, as a positive row's negatives are ignored by `ups_loss`. Of a labeled image all
    classes are selected: pass ``labels, ~labels``. The logarithms are exact for logits of any size: no probability is
    formed.

    - ``"mean"``: ``sum_i L_i / sum_i w_i`` over the images with at least one selected class, or 0 if there is none:
      without weights [B] the mean over these images
    - ``"sum"``: ``sum_i L_i``
    - ``"batchmean"``: ``sum_i L_i / B``, over all B images of the batch
    - ``"none"``: ``L_i`` of each image, [B]

    Args:
        logits: [B, C] float32, float16, bfloat16 or float64. Logarithms and sums are float32 (float64 for float64).
        positive, negative: bool [B, C], or packed int32 [B, ceil(C / 32)], as `mc_select_multilabel` returns them.
        weight: floating-point [B], at least 0, scales an image; or [B, C], scales an entry and leaves s_i as it is. An
            image of weight 0 counts for nothing. An entry of weight 0 adds nothing, whatever its logit is.
        reduction: see above.

    Returns:
        float32 (float64 for float64 logits) scalar, or [B] for ``"none"``. Differentiable in the logits alone. A NaN in
        a selected class gives NaN; what is not selected is not looked at.

    Raises:
        TypeError, ValueError: naming the argument and what it got.

    Example:
        >>> logits = torch.zeros(2, 3, requires_grad=True)
        >>> positive = torch.tensor([[True, False, False], [False, False, False]])
        >>> negative = torch.tensor([[False, True, False], [False, False, False]])
        >>> loss = ups_fast.ups_loss_multilabel(logits, positive, negative)  # log 2, of the first image
        >>> round(loss.item(), 4)
        0.6931
        >>> loss.backward()
        >>> logits.grad.tolist()
        [[-0.25, 0.25, 0.0], [0.0, 0.0, 0.0]]
    """
    check_ups_loss_multilabel(logits, positive, negative, weight, reduction)
    z = logits.to(compute_dtype(logits))
    y, n = (
        unpacked(mask, z.shape[1]) if mask.dtype == torch.int32 else mask for mask in (positive, negative)
    )
    g = y | n
    of_image = weights(logits, weight if weight is None or weight.dim() == 1 else None)
    counts = g & (of_image != 0)[:, None]
    of_entry = None
    if weight is not None and weight.dim() == 2:
        of_entry = weight.to(z.dtype)
        counts = counts & (of_entry != 0)
    z = torch.where(counts, z, 0)  # a NaN in an entry that counts for nothing stays there
    entries = -torch.nn.functional.logsigmoid(torch.where(y, z, -z))
    if of_entry is not None:
        entries = entries * torch.where(counts, of_entry, 0)
    rows = torch.where(counts, entries, 0).sum(dim=1) / g.sum(dim=1).clamp(min=1)
    return reduced(rows, [g.any(dim=1) & (of_image != 0)], of_image, reduction)


def check_mc_select_multilabel(
    logits: Tensor,
    tau_p: float | Tensor,
    tau_n: float | Tensor,
    kappa_p: float | Tensor,
    kappa_n: float | Tensor,
    temp_nl: float,
    packed: bool,
) -> tuple[float | Tensor, float | Tensor, float | Tensor, float | Tensor, float]:
    """Raise the error of the first `mc_select_multilabel` argument that is not as documented; the numbers as floats."""
    check_logits(logits, "[P, N, C]")
    if logits.shape[0] == 0:
        raise ValueError(f"logits must hold at least one pass, got {list(logits.shape)}")
    tau_p = _check_threshold("tau_p", tau_p, 1.0, logits)
    tau_n = _check_threshold("tau_n", tau_n, 1.0, logits)
    kappa_p = _check_threshold("kappa_p", kappa_p, math.inf, logits)
    kappa_n = _check_threshold("kappa_n", kappa_n, math.inf, logits)
    temp_nl = check_number("temp_nl", temp_nl, 1e-3, 1e3)
    if not isinstance(packed, bool):
        raise TypeError(f"packed must be True or False, got {packed!r}")
    if not isinstance(tau_p, Tensor) and not isinstance(tau_n, Tensor) and tau_n > tau_p:
        raise ValueError(f"tau_n must not exceed tau_p = {tau_p}, got {tau_n}")
    if logits.shape[0] == 1:  # no std to hold them against
        kappa_p = kappa_n = math.inf
    _warn_of_probabilities(logits)
    return tau_p, tau_n, kappa_p, kappa_n, temp_nl


def _check_threshold(name: str, x: float | Tensor, high: float, logits: Tensor) -> float | Tensor:
    if not isinstance(x, Tensor):
        return check_number(name, x, 0.0, high)
    check_tensor(name, x, "[C]", FLOATS)
    if x.device != logits.device:
        raise ValueError(f"{name} must be on the logits' device {logits.device}, got {x.device}")
    if x.shape[0] != logits.shape[-1]:
        raise ValueError(f"{name} must have {logits.shape[-1]} classes like logits, got {list(x.shape)}")
    return x


def _warn_of_probabilities(logits: Tensor) -> None:  # [P, N, C]
    """Looks at 8 samples at most, and only where that costs nothing, as that of `mc_select` does."""
    if logits.device.type != "cpu" or not is_readable(logits) or logits.shape[1] == 0:
        return
    if not 0 <= logits[0, 0, 0] <= 1:
        return
    some = logits.detach()[0, :: -(-logits.shape[1] // 8)]
    if (
        some.numel() >= 24 and 0 <= some.min() < some.max() <= 1
    ):  # by chance, logits of two signs hardly ever do
        warnings.warn(
            "logits look like probabilities: they lie in [0, 1]. mc_select_multilabel applies sigmoid itself: pass the "
            "network's output before sigmoid, or torch.logit(p)",
            stacklevel=4,
        )


def check_ups_loss_multilabel(
    logits: Tensor, positive: Tensor, negative: Tensor, weight: Tensor | None, reduction: str
) -> None:
    """Raise the error of the first `ups_loss_multilabel` argument that is not as documented."""
    check_logits(logits, "[B, C]")
    check_mask("positive", positive, logits)
    check_mask("negative", negative, logits)
    check_reduction(reduction)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        check_weight(weight, logits, "[B]")
        return
    check_tensor("weight", weight, "[B, C]", FLOATS)
    check_rows("weight", weight, logits)
    if weight.shape != logits.shape:
        raise ValueError(f"weight must be [B] or have the shape of logits, got {list(weight.shape)}")
    check_constant("weight", weight)
