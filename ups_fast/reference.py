"""The specification: every op of `ups_fast` in plain PyTorch, written to be read.

Same names, arguments, results and errors as the fused ops; the tests hold each kernel against these functions.
Needs torch alone. Equations: Rizve et al., "In Defense of Pseudo-Labeling", ICLR 2021, and Sohn et al., "FixMatch",
NeurIPS 2020.
"""

from __future__ import annotations

import math
import warnings
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
    once_epoch,
    plain,
    replay,
)
from .reference_multilabel import (  # noqa: F401
    MultiLabelSelection,
    check_mc_select_multilabel,
    check_ups_loss_multilabel,
    mc_select_multilabel,
    ups_loss_multilabel,
)
from .reference_shared import (  # noqa: F401
    FLOATS,
    PLAIN,
    REDUCTIONS,
    Reduction,
    check_classes,
    check_constant,
    check_dense,
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
    unpack_mask,
    unpacked,
    weights,
)

NCE_EPS = 1e-7


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
    """Pseudo-labels from the logits of P stochastic passes (Rizve et al., ICLR 2021, equations 4 to 6).

    With ``p = softmax(z)``, ``q = softmax(z / temp_nl)``, means and unbiased stds taken over the passes:

    - label ``l = argmax_c mean p_c``
    - positive: ``mean p_l >= tau_p`` and ``std p_l < kappa_p``
    - negative class c: ``mean q_c < tau_n`` and ``std q_c < kappa_n`` and ``c != l``

    A sample with a NaN or infinite logit in any pass is selected for nothing. A single pass (P = 1) has no std: 0 is
    returned, and confidence alone decides, whatever the kappas are. The results are constants to every kind of
    differentiation.

    Args:
        logits: [P, N, C] float32, float16, bfloat16 or float64; any strides. P >= 1, N >= 0, C >= 1. Logits, not
            probabilities: on the CPU, rows that lie in [0, 1] and sum to 1 raise a UserWarning.
        tau_p, tau_n: confidence thresholds in [0, 1], ``tau_n <= tau_p``.
        kappa_p, kappa_n: uncertainty thresholds >= 0, may be infinite. Ignored for P = 1.
        temp_nl: temperature of the negatives' softmax, in [0.001, 1000].
        packed: return ``negative`` as bits: int32 [N, ceil(C / 32)], class c is bit ``c % 32`` of word ``c // 32``.

    Returns:
        A `Selection` of N samples.

    Raises:
        TypeError, ValueError: naming the argument and what it got.

    Example:
        >>> logits = torch.tensor([[[6.0, 0.0, 0.0], [0.0, 0.1, 0.0]], [[5.9, 0.0, 0.0], [0.1, 0.0, 0.0]]])  # P = 2
        >>> found = ups_fast.mc_select(logits)
        >>> found.label.tolist(), found.positive.tolist()
        ([0, 0], [True, False])
        >>> found.negative.tolist()
        [[False, True, True], [False, False, False]]
    """
    tau_p, tau_n, kappa_p, kappa_n, temp_nl = check_mc_select(
        logits, tau_p, tau_n, kappa_p, kappa_n, temp_nl, packed
    )
    z = logits.detach().to(compute_dtype(logits))
    finite = z.isfinite().all(dim=-1).all(dim=0)
    p = torch.softmax(z, dim=-1)
    q = _softmax(z, temp_nl)
    mean_p, std_p = p.mean(dim=0), std_over_passes(p)
    mean_q, std_q = q.mean(dim=0), std_over_passes(q)

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


def nce_loss(
    logits: Tensor, mask: Tensor, *, reduction: Reduction = "mean", weight: Tensor | None = None
) -> Tensor:
    """Negative cross-entropy: pushes probability away from classes that a sample surely is not.

    ``NCE_i = -sum_c g_ic log(clamp(1 - softmax(z_i)_c, 1e-7, 1)) / (sum_c g_ic + 1e-7)``
    (Rizve et al., ICLR 2021, equation 3). With w the weights, or 1, and i over the rows with at least one True in g:

    - ``"mean"``: ``sum_i w_i NCE_i / sum_i w_i``, or 0 if there is no such row
    - ``"sum"``: ``sum_i w_i NCE_i``
    - ``"batchmean"``: ``sum_i w_i NCE_i / N``, over all N rows of the batch
    - ``"none"``: ``w_i NCE_i`` of each row, [N], with 0 for the other rows

    Args:
        logits: [N, C] float32, float16, bfloat16 or float64. Softmax, log and sums are float32 (float64 for float64).
        mask: g, bool [N, C], or packed int32 [N, ceil(C / 32)] as `mc_select` returns it.
        reduction: see above.
        weight: floating-point [N], at least 0. A row of weight 0 counts for nothing, as if its mask were empty.

    Returns:
        float32 (float64 for float64 logits) scalar, or [N] for ``"none"``. Differentiable in the logits alone.

    Raises:
        TypeError, ValueError: naming the argument and what it got.

    Example:
        >>> logits = torch.zeros(2, 4, requires_grad=True)
        >>> not_these = torch.tensor([[False, True, True, False], [False, False, False, False]])
        >>> loss = ups_fast.nce_loss(logits, not_these)  # -log(1 - 1/4), of the first row
        >>> round(loss.item(), 4)
        0.2877
        >>> loss.backward()
    """
    check_nce_loss(logits, mask, reduction, weight)
    w = weights(logits, weight)
    loss, active = _nce_rows(logits, mask)
    return reduced(loss, [active & (w != 0)], w, reduction)


def ups_loss(
    logits: Tensor,
    target: Tensor,
    positive: Tensor,
    negative: Tensor | None = None,
    *,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss of a mixed UPS batch: cross-entropy of its positive rows + negative cross-entropy of its negative rows.

    A row is positive where ``positive`` says so (its negative classes are then ignored), negative where it is not and
    has at least one negative class, and else counts for nothing. With w the weights, or 1, and ``NCE_i`` as in
    `nce_loss` (Rizve et al., ICLR 2021, equation 3):

    - ``CE_i = -sum_c t_ic log softmax(z_i)_c``, ``t_i = (1 - label_smoothing) target_i + label_smoothing / C``, where a
      class as target stands for its one-hot row
    - ``L_i = w_i CE_i`` of a positive row, ``w_i NCE_i`` of a negative row, and 0 of another
    - ``"mean"``: ``sum_positive L_i / sum_positive w_i + sum_negative L_i / sum_negative w_i``: without weights the
      mean over the positive rows + the mean over the negative rows; the term of an empty group is 0
    - ``"sum"``: ``sum_i L_i``
    - ``"batchmean"``: ``sum_i L_i / B``, over all B rows of the batch, as FixMatch divides
    - ``"none"``: ``L_i`` of each row, [B]

    Ranks of one distributed batch are exact with ``"sum"`` or ``"none"``, divided by counts that are summed over ranks.

    Args:
        logits: [B, C] float32, float16, bfloat16 or float64. Softmax, log and sums are float32 (float64 for float64).
        target: int64 [B], or floating-point [B, C] class probabilities. Read for positive rows only (others may hold
            -1). There a class must lie in [0, C): the CPU raises a RuntimeError, a CUDA kernel returns NaN rather than
            wait for the device. Probabilities are used as they are, as in torch's cross_entropy.
        positive: bool [B].
        negative: bool [B, C], or packed int32 [B, ceil(C / 32)] as `mc_select` returns it. None: no negative classes.
        reduction: see above.
        weight: floating-point [B], at least 0. A row of weight 0 counts for nothing.
        label_smoothing: in [0, 1], of the positive rows.

    Returns:
        float32 (float64 for float64 logits) scalar, or [B] for ``"none"``. Differentiable in the logits alone.

    Raises:
        TypeError, ValueError: naming the argument and what it got.

    Example:
        >>> logits = torch.zeros(3, 4, requires_grad=True)
        >>> target, positive = torch.tensor([2, -1, -1]), torch.tensor([True, False, False])
        >>> negative = torch.tensor([[False] * 4, [True, False, False, False], [False] * 4])
        >>> loss = ups_fast.ups_loss(logits, target, positive, negative)  # log 4 - log(1 - 1/4)
        >>> round(loss.item(), 4)
        1.674
        >>> loss.backward()
        >>> rows = ups_fast.ups_loss(logits, target, positive, negative, reduction="none")
        >>> [round(row, 4) for row in rows.tolist()]
        [1.3863, 0.2877, 0.0]
    """
    check_ups_loss(logits, target, positive, negative, reduction, weight, label_smoothing)
    z = logits.to(compute_dtype(logits))
    n_classes = z.shape[-1]
    w = weights(logits, weight)
    positive = positive & (w != 0)
    if target.dtype == torch.int64 and z.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = positive & ((target < 0) | (target >= n_classes))
        if bad.any():
            raise RuntimeError(
                f"target must lie in [0, {n_classes}) in positive rows, got {target[bad][0].item()} "
                f"in row {int(bad.nonzero()[0])}"
            )
    if negative is None:
        g = torch.zeros_like(z, dtype=torch.bool)
    else:
        g = unpacked(negative, n_classes) if negative.dtype == torch.int32 else negative
    active = g.any(dim=-1) & ~positive & (w != 0)
    z = torch.where((positive | active)[:, None], z, 0)  # a NaN in a row that counts for nothing stays there
    ce = torch.where(positive, _ce_rows(z, target, label_smoothing), 0)
    nce = torch.where(active, _nce_rows(z, g)[0], 0)
    return reduced(ce + nce, [positive, active], w, reduction)


def fixmatch_loss(
    strong: Tensor,
    weak: Tensor,
    *,
    tau: float | Tensor = 0.95,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    reduction: Reduction = "batchmean",
    return_mask: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The consistency loss of FixMatch: strong views learn the confident pseudo-labels of weak views.

    (Sohn et al., "FixMatch", NeurIPS 2020, arXiv:2001.07685, equation 4.) With ``q = softmax(weak / temperature)``:

    - pseudo-label ``y_i = argmax_c q_ic``, the lowest class of a tie
    - mask: ``max_c q_ic >= tau``, or ``tau[y_i]`` where each class has its own threshold
    - ``L_i = w_i CE_i``, ``CE_i = -log softmax(strong_i)_y`` of a masked row, and 0 of another; w the weights, or 1
    - ``"batchmean"``: ``sum_i L_i / B``, over all B rows of the batch: the rule of FixMatch
    - ``"mean"``: ``sum_i L_i / sum_i w_i`` over the masked rows, or 0 if there is none
    - ``"sum"``: ``sum_i L_i``
    - ``"none"``: ``L_i`` of each row, [B]

    A row whose weak logits hold a NaN or an infinity is not masked, as `mc_select` does not select it. A row whose
    strong logits hold a NaN or +inf has a loss that is not finite if it is masked, and is not looked at if it is not;
    -inf is a class of probability 0.

    Args:
        strong: [B, C] float32, float16, bfloat16 or float64. Softmax, log and sums are float32 (float64 for float64).
        weak: [B, C], of the same dtype. A constant to the loss: it is detached, and no gradient flows to it.
        tau: threshold in [0, 1]; or floating-point [C], the threshold of each class (FlexMatch, FreeMatch). The values
            of a tensor are not checked, so that nothing waits for the device.
        temperature: divides the weak logits, in [0.001, 1000].
        weight: floating-point [B], at least 0. A row of weight 0 counts for nothing, whatever its mask is.
        reduction: see above.
        return_mask: return the mask, too.

    Returns:
        float32 (float64 for float64 logits) scalar, or [B] for ``"none"``. Differentiable in `strong` alone.
        With return_mask, that and the mask, bool [B].

    Raises:
        TypeError, ValueError: naming the argument and what it got.

    Example:
        >>> weak = torch.tensor([[9.0, 0.0, 0.0], [1.0, 0.0, 0.0]])  # only the first row is confident
        >>> strong = torch.zeros(2, 3, requires_grad=True)
        >>> loss, mask = ups_fast.fixmatch_loss(strong, weak, tau=0.95, return_mask=True)
        >>> round(loss.item(), 4), mask.tolist()  # log 3, of one row of two
        (0.5493, [True, False])
        >>> loss.backward()
    """
    tau, temperature = check_fixmatch_loss(strong, weak, tau, temperature, weight, reduction, return_mask)
    dtype = compute_dtype(strong)
    z, w = strong.to(dtype), weights(strong, weight)
    guess = weak.detach().to(dtype)
    confidence, label = _softmax(guess, temperature).amax(dim=-1), guess.argmax(dim=-1)
    threshold = tau.detach().to(dtype)[label] if isinstance(tau, Tensor) else tau
    mask = (confidence >= threshold) & guess.isfinite().all(dim=-1)
    counts = mask & (w != 0)
    z = torch.where(counts[:, None], z, 0)  # a NaN in a row that counts for nothing stays there
    loss = reduced(_ce_rows(z, label, 0.0), [counts], w, reduction)
    return (loss, mask) if return_mask else loss


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
    layer_keys = _mix(keys + _signed(plain(layer) * 0x9E3779B9)).view(x.shape[0], *[1] * (x.ndim - 1))
    layout = torch.zeros_like(x, dtype=torch.int32)  # where() takes that of its first tensor
    kept = _mix(layout ^ layer_keys ^ element) ^ -(
        1 << 31
    )  # the order of unsigned numbers as that of signed ones
    dropped = kept < min(int(p * 2**32), 2**32 - 1) - 2**31
    return torch.where(dropped, 0.0, x * (1 / (1 - p))).to(x.dtype)


def counter_uniform(n: int, keys: Tensor, *, layer: int = 0) -> Tensor:  # int32 [B] -> float32 [B, n]
    """Numbers of (0, 1] that are a function of keys, layer and place: the hashed words of `counter_dropout`."""
    layer_keys = _mix(keys + _signed(plain(layer) * 0x9E3779B9))[:, None]
    word = _mix(layer_keys ^ torch.arange(n, dtype=torch.int32, device=keys.device))
    return ((word >> 8 & 0xFFFFFF) + 0.5) * 2.0**-24


def counter_normal(n: int, keys: Tensor, *, layer: int = 0) -> Tensor:  # int32 [B] -> float32 [B, n]
    """Standard normal numbers that are a function of keys, layer and place: Box and Muller (1958)."""
    u, v = counter_uniform(2 * n, keys, layer=layer).view(len(keys), n, 2).unbind(-1)
    return (-2 * u.log()).sqrt() * (2 * math.pi * v).cos()


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
    check_tensor("index", index, "[B]", (torch.int64,))
    check_counter("seed", seed, 63, index)
    check_counter("draw", draw, 63, index, each=True)

    def mix(x: Tensor) -> Tensor:
        x = (x ^ (x >> 30 & (1 << 34) - 1)) * (0xBF58476D1CE4E5B9 - 2**64)
        x = (x ^ (x >> 27 & (1 << 37) - 1)) * (0x94D049BB133111EB - 2**64)
        return x ^ (x >> 31 & (1 << 33) - 1)

    golden = 0x9E3779B97F4A7C15 - 2**64
    hashed = torch.zeros_like(index)
    for word in (seed, draw, index):
        hashed = mix((hashed ^ (word if isinstance(word, Tensor) else plain(word))) + golden)
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
    z = x.to(compute_dtype(x))
    limit = 87.0 if z.dtype == torch.float32 else 700.0  # beyond it mish is 0 or x to the last bit
    near, above = z.clamp(-limit, limit), z > 0
    u = torch.exp(-near.abs())
    top = torch.where(above, u * 2 + 1, u * (u + 2))
    bottom = top + torch.where(above, 2 * u * u, 2)
    # By a reciprocal, whose derivative takes no further division: a compiled step on a GPU computed longer on six of
    # them than it moved memory. An autograd.Function is faster still, but torch 2.11 compiles a wrong gradient of it.
    return (torch.where(z < near, near, z) * (top * bottom.reciprocal())).to(x.dtype)


def _ce_rows(z: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """CE of each row [B]; NaN where a class is out of range."""
    n_classes = z.shape[-1]
    if target.dtype != torch.int64:
        t, known = target.to(z.dtype), torch.ones_like(z[:, 0], dtype=torch.bool)
    else:
        known = (target >= 0) & (target < n_classes)
        if label_smoothing == 0:
            ce = torch.logsumexp(z, dim=-1) - z.gather(-1, target.clamp(0, n_classes - 1)[:, None])[:, 0]
            return torch.where(known, ce, math.nan)
        t = (torch.arange(n_classes, device=z.device) == target[:, None]).to(z.dtype)
    t = (1 - label_smoothing) * t + label_smoothing / n_classes
    # A class that is closed by a logit of -inf costs nothing where no target is on it.
    log_p = torch.where(t == 0, 0, torch.log_softmax(z, dim=-1))
    return torch.where(known, -(t * log_p).sum(dim=-1), math.nan)


def _nce_rows(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """NCE of each row (0 where its mask is empty) and which rows have a mask: [N], bool [N]."""
    z = logits.to(compute_dtype(logits))
    g = unpacked(mask, z.shape[-1]) if mask.dtype == torch.int32 else mask
    z = torch.where(g.any(dim=-1)[:, None], z, 0)
    log_not_p = torch.log(torch.clamp(1 - torch.softmax(z, dim=-1), NCE_EPS, 1.0))
    loss = -torch.where(g, log_not_p, 0).sum(dim=-1) / (g.sum(dim=-1, dtype=z.dtype) + NCE_EPS)
    return loss, g.any(dim=-1)


def _softmax(z: Tensor, temperature: float) -> Tensor:
    """Of z / temperature, which may be larger than any float."""
    return torch.softmax((z - z.amax(dim=-1, keepdim=True)) / temperature, dim=-1)


def _mix(x: Tensor) -> Tensor:  # int32
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * _signed(0x846CA68B)
    return x ^ (x >> 16 & 0xFFFF)


def _signed(word: int) -> int:
    """The int32 of the same lower 32 bits."""
    return (word + 2**31) % 2**32 - 2**31


# What an argument must be. Shared with the fused ops, so both raise the same sentences; more in reference_shared.


def check_counter_dropout(x: Tensor, keys: Tensor, p: float, layer: int) -> None:
    """Raise the error of the first `counter_dropout` argument that is not as documented."""
    check_dense("x", x, "[B, C, ...]")
    if x.dtype not in FLOATS or x.dim() < 2:
        raise TypeError(f"x must be floating-point [B, C, ...], got {str(x.dtype)[6:]} {list(x.shape)}")
    check_tensor("keys", keys, "[B]", (torch.int32,))
    if keys.device != x.device or keys.shape[0] != x.shape[0]:
        raise ValueError(
            f"keys must be [{x.shape[0]}] on {x.device} like x, got {list(keys.shape)} on {keys.device}"
        )
    check_dropout(p, layer)


def check_dropout(p: float, layer: int) -> None:
    """Raise the error of the first number that `counter_dropout` cannot take."""
    check_number("p", p, 0.0, 1.0)
    if p == 1:
        raise ValueError("p must be below 1, got 1")
    if not is_integer(layer) or not 0 <= plain(layer) < 1 << 20:
        raise ValueError(f"layer must be an integer of 0 .. 2^20 - 1, got {layer!r}")


def check_mish(x: Tensor) -> None:
    """Raise the error if `mish` cannot take x."""
    check_dense("x", x, "[...]")
    if x.dtype not in FLOATS:
        raise TypeError(f"x must be floating-point [...], got {str(x.dtype)[6:]} {list(x.shape)}")


def check_mc_select(
    logits: Tensor, tau_p: float, tau_n: float, kappa_p: float, kappa_n: float, temp_nl: float, packed: bool
) -> tuple[float, float, float, float, float]:
    """Raise the error of the first `mc_select` argument that is not as documented; the thresholds as floats."""
    check_logits(logits, "[P, N, C]")
    if logits.shape[0] == 0:
        raise ValueError(f"logits must hold at least one pass, got {list(logits.shape)}")
    tau_p = check_number("tau_p", tau_p, 0.0, 1.0)
    tau_n = check_number("tau_n", tau_n, 0.0, 1.0)
    kappa_p = check_number("kappa_p", kappa_p, 0.0, math.inf)
    kappa_n = check_number("kappa_n", kappa_n, 0.0, math.inf)
    temp_nl = check_number("temp_nl", temp_nl, 1e-3, 1e3)
    if not isinstance(packed, bool):
        raise TypeError(f"packed must be True or False, got {packed!r}")
    if tau_n > tau_p:
        raise ValueError(f"tau_n must not exceed tau_p = {tau_p}, got {tau_n}")
    if logits.shape[0] == 1:  # no std to hold them against
        kappa_p = kappa_n = math.inf
    _warn_of_probabilities(logits)
    return tau_p, tau_n, kappa_p, kappa_n, temp_nl


def _warn_of_probabilities(logits: Tensor) -> None:  # [P, N, C]
    """Looks at 8 samples at most, and only where that costs nothing: never on a GPU, never in a trace."""
    if logits.device.type != "cpu" or not is_readable(logits) or logits.shape[-1] == 1:
        return
    if not 0 <= logits[0, :1, 0].sum() <= 1:
        return
    rows = logits.detach()[0, :: -(-logits.shape[1] // 8) or 1].double()
    close = 1e-4 if torch.finfo(logits.dtype).bits >= 32 else 0.02  # bfloat16 keeps 8 bits of each
    if len(rows) and ((rows >= 0) & (rows <= 1)).all() and ((rows.sum(dim=-1) - 1).abs() < close).all():
        warnings.warn(
            "logits look like probabilities: they lie in [0, 1] and sum to 1 over the classes. mc_select applies "
            "softmax itself: pass the network's output before softmax, or log(p)",
            stacklevel=4,
        )


def check_nce_loss(logits: Tensor, mask: Tensor, reduction: str, weight: Tensor | None) -> None:
    """Raise the error of the first `nce_loss` argument that is not as documented."""
    check_logits(logits, "[N, C]")
    check_mask("mask", mask, logits)
    check_reduction(reduction)
    check_weight(weight, logits, "[N]")


def check_ups_loss(
    logits: Tensor,
    target: Tensor,
    positive: Tensor,
    negative: Tensor | None,
    reduction: str,
    weight: Tensor | None,
    label_smoothing: float,
) -> None:
    """Raise the error of the first `ups_loss` argument that is not as documented."""
    usual = (
        weight is None and type(label_smoothing) is float and label_smoothing == 0 and reduction in REDUCTIONS
    )
    if usual and _is_usual(logits, target, positive, negative):
        return
    check_logits(logits, "[B, C]")
    check_dense("target", target, "int64 [B] or floating-point [B, C]")
    if target.dtype in FLOATS:
        check_tensor("target", target, "[B, C]", FLOATS)
        if target.shape[1] != logits.shape[1]:
            raise ValueError(
                f"target must have {logits.shape[1]} classes like logits, got {list(target.shape)}"
            )
        check_constant("target", target)
    elif target.dtype == torch.int64 or target.dim() == 1:
        check_tensor("target", target, "[B]", (torch.int64,))
    else:
        got = f"{str(target.dtype)[6:]} {list(target.shape)}"
        raise TypeError(f"target must be int64 [B] or floating-point [B, C], got {got}")
    check_rows("target", target, logits)
    check_tensor("positive", positive, "[B]", (torch.bool,))
    check_rows("positive", positive, logits)
    if negative is not None:
        check_mask("negative", negative, logits)
    check_reduction(reduction)
    check_weight(weight, logits, "[B]")
    check_label_smoothing(label_smoothing)


def check_fixmatch_loss(
    strong: Tensor,
    weak: Tensor,
    tau: float | Tensor,
    temperature: float,
    weight: Tensor | None,
    reduction: str,
    return_mask: bool,
) -> tuple[float | Tensor, float]:
    """Raise the error of the first `fixmatch_loss` argument that is not as documented; the numbers as floats."""
    if not (_is_plain_matrix(strong) and _is_plain_matrix(weak) and _are_alike(strong, weak)):
        check_tensor("strong", strong, "[B, C]", FLOATS)
        check_tensor("weak", weak, "[B, C]", FLOATS)
        check_classes("strong", strong)
        _check_alike("weak", weak, "strong", strong)
    check_fixmatch_options(tau, temperature, reduction, return_mask)
    if isinstance(tau, Tensor):
        if tau.device != strong.device:
            raise ValueError(f"tau must be on the device of strong, {strong.device}, got {tau.device}")
        if tau.shape[0] != strong.shape[1]:
            raise ValueError(f"tau must have {strong.shape[1]} classes like strong, got {list(tau.shape)}")
    if weight is not None:
        check_weight(weight, strong, "[B]", "strong")
    return tau if isinstance(tau, Tensor) else float(tau), float(temperature)


def check_fixmatch_options(
    tau: float | Tensor, temperature: float, reduction: str, return_mask: bool = False
) -> None:
    """Raise the error of the first option of `fixmatch_loss` that no batch could have."""
    if isinstance(tau, Tensor):
        check_tensor("tau", tau, "[C]", FLOATS)
        check_constant("tau", tau)
    elif not (type(tau) is float and 0 <= tau <= 1):
        check_number("tau", tau, 0.0, 1.0)
    if not (type(temperature) is float and 1e-3 <= temperature <= 1e3):
        check_number("temperature", temperature, 1e-3, 1e3)
    check_reduction(reduction)
    if not isinstance(return_mask, bool):
        raise TypeError(f"return_mask must be True or False, got {return_mask!r}")


def _is_plain_matrix(x: Tensor) -> bool:
    return (
        type(x) in PLAIN
        and x.dim() == 2
        and x.dtype in FLOATS
        and x.layout is torch.strided
        and not x.is_nested
        and x.shape[1] > 0
    )


def _are_alike(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and x.dtype is y.dtype and x.device == y.device


def _check_alike(name: str, x: Tensor, like: str, y: Tensor) -> None:
    if x.device != y.device:
        raise ValueError(f"{name} must be on the device of {like}, {y.device}, got {x.device}")
    if x.dtype != y.dtype:
        raise TypeError(f"{name} must be {str(y.dtype)[6:]} like {like}, got {str(x.dtype)[6:]}")
    if x.shape != y.shape:
        raise ValueError(f"{name} must have the shape {list(y.shape)} of {like}, got {list(x.shape)}")


def _is_usual(logits: Tensor, target: Tensor, positive: Tensor, negative: Tensor | None) -> bool:
    """Whether these are what most calls of `ups_loss` have: nothing is wrong, at half the time of the checks."""
    rest = (target, positive) if negative is None else (target, positive, negative)
    if type(logits) not in PLAIN or logits.dim() != 2 or logits.dtype not in FLOATS:
        return False
    device, (n, c) = logits.device, logits.shape
    for x in rest:
        if type(x) is not Tensor or x.device != device or x.layout is not torch.strided or x.is_nested:
            return False
    return (
        c > 0
        and logits.layout is torch.strided
        and not logits.is_nested
        and target.dtype is torch.int64
        and target.shape == (n,)
        and positive.dtype is torch.bool
        and positive.shape == (n,)
        and (negative is None or (negative.dtype is torch.bool and negative.shape == (n, c)))
    )


def check_label_smoothing(label_smoothing: float) -> None:
    """Raise an error if it is not a number in [0, 1]."""
    check_number("label_smoothing", label_smoothing, 0.0, 1.0)
