"""The specification: every op of `ups_fast` in plain PyTorch, written to be read.

Same names, arguments, results and errors as the fused ops; the tests hold each kernel against these functions.
Needs torch alone. Equations: Rizve et al., "In Defense of Pseudo-Labeling", ICLR 2021, and Sohn et al., "FixMatch",
NeurIPS 2020.
"""

from __future__ import annotations

import math
import numbers
import warnings
from typing import Literal, NamedTuple, get_args

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

NCE_EPS = 1e-7
Reduction = Literal["none", "mean", "sum", "batchmean"]
REDUCTIONS = get_args(Reduction)  # their position is the op's argument, as in torch's own losses
_PLAIN = (Tensor, torch.nn.Parameter)
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
    z = logits.detach().to(_compute_dtype(logits))
    finite = z.isfinite().all(dim=-1).all(dim=0)
    p = torch.softmax(z, dim=-1)
    q = _softmax(z, temp_nl)
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
    w = _weights(logits, weight)
    loss, active = _nce_rows(logits, mask)
    return _reduced(loss, [active & (w != 0)], w, reduction)


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
    z = logits.to(_compute_dtype(logits))
    n_classes = z.shape[-1]
    w = _weights(logits, weight)
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
        g = _unpacked(negative, n_classes) if negative.dtype == torch.int32 else negative
    active = g.any(dim=-1) & ~positive & (w != 0)
    z = torch.where((positive | active)[:, None], z, 0)  # a NaN in a row that counts for nothing stays there
    ce = torch.where(positive, _ce_rows(z, target, label_smoothing), 0)
    nce = torch.where(active, _nce_rows(z, g)[0], 0)
    return _reduced(ce + nce, [positive, active], w, reduction)


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
    dtype = _compute_dtype(strong)
    z, w = strong.to(dtype), _weights(strong, weight)
    guess = weak.detach().to(dtype)
    confidence, label = _softmax(guess, temperature).amax(dim=-1), guess.argmax(dim=-1)
    threshold = tau.detach().to(dtype)[label] if isinstance(tau, Tensor) else tau
    mask = (confidence >= threshold) & guess.isfinite().all(dim=-1)
    counts = mask & (w != 0)
    z = torch.where(counts[:, None], z, 0)  # a NaN in a row that counts for nothing stays there
    loss = _reduced(_ce_rows(z, label, 0.0), [counts], w, reduction)
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
    z = x.to(_compute_dtype(x))
    limit = 87.0 if z.dtype == torch.float32 else 700.0  # beyond it mish is 0 or x to the last bit
    u = torch.exp(-z.clamp(-limit, limit).abs())
    small, large = u * (u + 2), u * 2 + 1
    tanh = torch.where(z > 0, large / (large + 2 * u * u), small / (small + 2))
    return (torch.where(z < -limit, -limit, z) * tanh).to(x.dtype)


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
    _check_tensor("mask", mask, "[N, C]", (torch.bool,))
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
    _check_tensor("packed", packed, "[N, ceil(n_classes / 32)]", (torch.int32,))
    if isinstance(n_classes, bool) or not isinstance(n_classes, (int, torch.SymInt)):
        raise TypeError(f"n_classes must be an integer, got {n_classes!r}")
    if n_classes < 0:
        raise ValueError(f"n_classes must be at least 0, got {n_classes}")
    if packed.shape[1] != (n_classes + 31) // 32:
        raise ValueError(
            f"packed must have {(n_classes + 31) // 32} columns for {n_classes} classes, got {list(packed.shape)}"
        )
    return _unpacked(packed, n_classes)


def _unpacked(packed: Tensor, n_classes: int) -> Tensor:
    bits = (packed[:, :, None] >> torch.arange(32, dtype=torch.int32, device=packed.device)) & 1
    return bits.flatten(1)[:, :n_classes].bool()


def _weights(logits: Tensor, weight: Tensor | None) -> Tensor:  # [N], in the type of the loss
    dtype = _compute_dtype(logits)
    return logits.new_ones(logits.shape[0], dtype=dtype) if weight is None else weight.to(dtype)


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


def _reduced(rows: Tensor, groups: list[Tensor], weight: Tensor, reduction: Reduction) -> Tensor:
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


def _nce_rows(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """NCE of each row (0 where its mask is empty) and which rows have a mask: [N], bool [N]."""
    z = logits.to(_compute_dtype(logits))
    g = _unpacked(mask, z.shape[-1]) if mask.dtype == torch.int32 else mask
    z = torch.where(g.any(dim=-1)[:, None], z, 0)
    log_not_p = torch.log(torch.clamp(1 - torch.softmax(z, dim=-1), NCE_EPS, 1.0))
    loss = -torch.where(g, log_not_p, 0).sum(dim=-1) / (g.sum(dim=-1, dtype=z.dtype) + NCE_EPS)
    return loss, g.any(dim=-1)


def _softmax(z: Tensor, temperature: float) -> Tensor:
    """Of z / temperature, which may be larger than any float."""
    return torch.softmax((z - z.amax(dim=-1, keepdim=True)) / temperature, dim=-1)


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


def _check_rows(name: str, x: Tensor, logits: Tensor, like: str = "logits") -> None:
    if x.device != logits.device:
        place = "the logits' device" if like == "logits" else f"the device of {like},"
        raise ValueError(f"{name} must be on {place} {logits.device}, got {x.device}")
    if x.shape[0] != logits.shape[-2]:
        raise ValueError(f"{name} must have {logits.shape[-2]} rows like {like}, got {list(x.shape)}")


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
    _check_classes("logits", logits)


def _check_classes(name: str, x: Tensor) -> None:
    if x.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one class, got {list(x.shape)}")


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
    if not is_integer(layer) or not 0 <= plain(layer) < 1 << 20:
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


def is_readable(x: Tensor) -> bool:
    """Whether x has values that may be looked at: not in a trace, a transform or the capture of a CUDA graph."""
    return (
        type(x) in _PLAIN  # not a fake one
        and x.device.type != "meta"
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and torch._C._len_torch_dispatch_stack() == 0
        and not (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def check_nce_loss(logits: Tensor, mask: Tensor, reduction: str, weight: Tensor | None) -> None:
    """Raise the error of the first `nce_loss` argument that is not as documented."""
    _check_logits(logits, "[N, C]")
    _check_mask("mask", mask, logits)
    check_reduction(reduction)
    _check_weight(weight, logits, "[N]")


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
    _check_logits(logits, "[B, C]")
    _check_dense("target", target, "int64 [B] or floating-point [B, C]")
    if target.dtype in _FLOATS:
        _check_tensor("target", target, "[B, C]", _FLOATS)
        if target.shape[1] != logits.shape[1]:
            raise ValueError(
                f"target must have {logits.shape[1]} classes like logits, got {list(target.shape)}"
            )
        _check_constant("target", target)
    elif target.dtype == torch.int64 or target.dim() == 1:
        _check_tensor("target", target, "[B]", (torch.int64,))
    else:
        got = f"{str(target.dtype)[6:]} {list(target.shape)}"
        raise TypeError(f"target must be int64 [B] or floating-point [B, C], got {got}")
    _check_rows("target", target, logits)
    _check_tensor("positive", positive, "[B]", (torch.bool,))
    _check_rows("positive", positive, logits)
    if negative is not None:
        _check_mask("negative", negative, logits)
    check_reduction(reduction)
    _check_weight(weight, logits, "[B]")
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
        _check_tensor("strong", strong, "[B, C]", _FLOATS)
        _check_tensor("weak", weak, "[B, C]", _FLOATS)
        _check_classes("strong", strong)
        _check_alike("weak", weak, "strong", strong)
    check_fixmatch_options(tau, temperature, reduction, return_mask)
    if isinstance(tau, Tensor):
        if tau.device != strong.device:
            raise ValueError(f"tau must be on the device of strong, {strong.device}, got {tau.device}")
        if tau.shape[0] != strong.shape[1]:
            raise ValueError(f"tau must have {strong.shape[1]} classes like strong, got {list(tau.shape)}")
    if weight is not None:
        _check_weight(weight, strong, "[B]", "strong")
    return tau if isinstance(tau, Tensor) else float(tau), float(temperature)


def check_fixmatch_options(
    tau: float | Tensor, temperature: float, reduction: str, return_mask: bool = False
) -> None:
    """Raise the error of the first option of `fixmatch_loss` that no batch could have."""
    if isinstance(tau, Tensor):
        _check_tensor("tau", tau, "[C]", _FLOATS)
        _check_constant("tau", tau)
    elif not (type(tau) is float and 0 <= tau <= 1):
        _check_number("tau", tau, 0.0, 1.0)
    if not (type(temperature) is float and 1e-3 <= temperature <= 1e3):
        _check_number("temperature", temperature, 1e-3, 1e3)
    check_reduction(reduction)
    if not isinstance(return_mask, bool):
        raise TypeError(f"return_mask must be True or False, got {return_mask!r}")


def _is_plain_matrix(x: Tensor) -> bool:
    return (
        type(x) in _PLAIN
        and x.dim() == 2
        and x.dtype in _FLOATS
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
    if type(logits) not in _PLAIN or logits.dim() != 2 or logits.dtype not in _FLOATS:
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


def check_reduction(reduction: str) -> None:
    """Raise an error if it is not a `Reduction`."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'mean', 'sum', 'batchmean' or 'none', got {reduction!r}")


def check_label_smoothing(label_smoothing: float) -> None:
    """Raise an error if it is not a number in [0, 1]."""
    _check_number("label_smoothing", label_smoothing, 0.0, 1.0)


def _check_weight(weight: Tensor | None, logits: Tensor, shape: str, like: str = "logits") -> None:
    if weight is None:
        return
    _check_tensor("weight", weight, shape, _FLOATS)
    _check_rows("weight", weight, logits, like)
    _check_constant("weight", weight)


def _check_constant(name: str, x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} must not require a gradient, as the loss has none for it: pass {name}.detach()"
        )
