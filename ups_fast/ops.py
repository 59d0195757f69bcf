"""The fused ops: schemas, fake kernels, derivatives and public functions. The only file that imports `_C`.

Every op has a twin of the same name and arguments in `ups_fast.reference`, which also documents it; a device without
kernels is served by that twin, and `backend()` says so. Needs torch alone.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from . import reference
from .policy import AugmentPlan, Policy, Tables, normalization, tables
from .reference import REDUCTIONS, Reduction, Selection

# Raised with kInterface of csrc/module.cpp whenever a schema below changes: kernels take no arguments but their own.
INTERFACE = 3

try:
    from . import _C  # registers the kernels

    _why = ""
    if getattr(_C, "interface", 1) != INTERFACE:
        _C, _why = None, "the compiled module is of another version of ups_fast"  # type: ignore[assignment]
except ImportError as error:
    _C = None  # type: ignore[assignment]
    _found = importlib.util.find_spec(f"{__package__}._C") is not None
    _why = (
        f"the compiled module is missing ({error if _found else f'there is none in {Path(__file__).parent}'})"
    )
_NO_KERNELS = (
    f"{_why}; build it with `pip install --no-build-isolation --editable .` in the folder of setup.py"
)

_lib = torch.library.Library("ups_fast", "DEF")
_tags = (torch.Tag.pt2_compliant_tag,)
_lib.define(
    "mc_select(Tensor logits, float tau_p, float tau_n, float kappa_p, float kappa_n, float temp_nl, bool packed)"
    " -> (Tensor label, Tensor confidence, Tensor std, Tensor positive, Tensor negative)",
    tags=_tags,
)
# Floating-point targets and weights have the dtype of the loss.
_lib.define(
    "nce_loss(Tensor logits, Tensor mask, int reduction, Tensor? weight=None) -> (Tensor loss, Tensor scale)",
    tags=_tags,
)
_lib.define(
    "nce_loss_backward(Tensor d_loss, Tensor logits, Tensor mask, Tensor scale, Tensor? weight=None)"
    " -> Tensor d_logits",
    tags=_tags,
)
_lib.define(
    "ups_loss(Tensor logits, Tensor target, Tensor positive, Tensor? negative, int reduction=1, Tensor? weight=None,"
    " float label_smoothing=0.0) -> (Tensor loss, Tensor scale)",
    tags=_tags,
)
_lib.define(
    "ups_loss_backward(Tensor d_loss, Tensor logits, Tensor target, Tensor positive, Tensor? negative, Tensor scale,"
    " Tensor? weight=None, float label_smoothing=0.0) -> Tensor d_logits",
    tags=_tags,
)
# target: the pseudo-label of each row that counts, or -1.
_lib.define(
    "fixmatch_loss(Tensor strong, Tensor weak, Tensor? class_tau, float tau, float temperature, int reduction,"
    " Tensor? weight=None) -> (Tensor loss, Tensor mask, Tensor target, Tensor scale)",
    tags=_tags,
)
_lib.define(
    "fixmatch_loss_backward(Tensor d_loss, Tensor strong, Tensor target, Tensor scale, Tensor? weight=None)"
    " -> Tensor d_strong",
    tags=_tags,
)
_lib.define("counter_dropout(Tensor x, Tensor keys, float p, int layer) -> Tensor", tags=_tags)
_lib.define("mish(Tensor x) -> Tensor", tags=_tags)
_lib.define("mish_backward(Tensor d_y, Tensor x) -> Tensor d_x", tags=_tags)
_lib.define(
    "augment(Tensor(a!) out, Tensor images, Tensor index, Tensor variants, Tensor operations, Tensor blends,"
    " Tensor norm, Tensor seed, Tensor epoch, Tensor? plan, int[] settings) -> ()",
    tags=_tags,
)
_lib.define(
    "augment_plan(Tensor index, Tensor variants, Tensor operations, Tensor seed, Tensor epoch, int height, int width,"
    " int[] settings) -> Tensor",
    tags=_tags,
)


# Public functions ----------------------------------------------------------------------------------------------------


def mc_select(
    logits: Tensor,  # [P, N, C]
    *,
    tau_p: float = 0.70,
    tau_n: float = 0.05,
    kappa_p: float = 0.05,
    kappa_n: float = 0.005,
    temp_nl: float = 2.0,
    packed: bool = False,
) -> Selection:
    if not _has_kernels(logits):
        return reference.mc_select(
            logits, tau_p=tau_p, tau_n=tau_n, kappa_p=kappa_p, kappa_n=kappa_n, temp_nl=temp_nl, packed=packed
        )
    thresholds = reference.check_mc_select(logits, tau_p, tau_n, kappa_p, kappa_n, temp_nl, packed)
    return Selection(*torch.ops.ups_fast.mc_select(logits.detach(), *thresholds, packed))


def nce_loss(
    logits: Tensor,  # [N, C]
    mask: Tensor,  # bool [N, C] or int32 [N, ceil(C / 32)]
    *,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,  # float [N]
) -> Tensor:
    if not _has_kernels(logits):
        return reference.nce_loss(logits, mask, reduction=reduction, weight=weight)
    reference.check_nce_loss(logits, mask, reduction, weight)
    code = REDUCTIONS.index(reduction)
    return torch.ops.ups_fast.nce_loss.default(logits, mask, code, _of_loss(weight, logits))[0]


def ups_loss(
    logits: Tensor,  # [B, C]
    target: Tensor,  # int64 [B], or float [B, C]
    positive: Tensor,  # bool [B]
    negative: Tensor | None = None,  # bool [B, C] or int32 [B, ceil(C / 32)]
    *,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,  # float [B]
    label_smoothing: float = 0.0,
) -> Tensor:
    if not _has_kernels(logits):
        return reference.ups_loss(
            logits,
            target,
            positive,
            negative,
            reduction=reduction,
            weight=weight,
            label_smoothing=label_smoothing,
        )
    reference.check_ups_loss(logits, target, positive, negative, reduction, weight, label_smoothing)
    return torch.ops.ups_fast.ups_loss.default(
        logits,
        target if target.dtype == torch.int64 else _of_loss(target, logits),
        positive,
        negative,
        REDUCTIONS.index(reduction),
        _of_loss(weight, logits),
        float(label_smoothing),
    )[0]


def fixmatch_loss(
    strong: Tensor,  # [B, C]
    weak: Tensor,  # [B, C]
    *,
    tau: float | Tensor = 0.95,  # or float [C]
    temperature: float = 1.0,
    weight: Tensor | None = None,  # float [B]
    reduction: Reduction = "batchmean",
    return_mask: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    if not _has_kernels(strong):
        return reference.fixmatch_loss(
            strong,
            weak,
            tau=tau,
            temperature=temperature,
            weight=weight,
            reduction=reduction,
            return_mask=return_mask,
        )
    tau, temperature = reference.check_fixmatch_loss(
        strong, weak, tau, temperature, weight, reduction, return_mask
    )
    class_tau, tau = (_of_loss(tau, strong), 1.0) if isinstance(tau, Tensor) else (None, tau)
    code = REDUCTIONS.index(reduction)
    loss, mask, _, _ = torch.ops.ups_fast.fixmatch_loss.default(
        strong, weak.detach(), class_tau, tau, temperature, code, _of_loss(weight, strong)
    )
    return (loss, mask) if return_mask else loss


def _of_loss(x: Tensor | None, logits: Tensor) -> Tensor | None:
    """In the dtype of the loss, and a constant to it."""
    return None if x is None else x.detach().to(_compute_dtype(logits))


def counter_dropout(
    x: Tensor,  # [B, C, ...]
    keys: Tensor,  # int32 [B]
    *,
    p: float,
    layer: int = 0,
) -> Tensor:
    if torch.compiler.is_compiling() or not _has_kernels(x):
        return reference.counter_dropout(x, keys, p=p, layer=layer)  # fuses with its neighbors
    reference.check_counter_dropout(x, keys, p, layer)
    return torch.ops.ups_fast.counter_dropout(x, keys, float(p), reference.plain(layer))


def mish(x: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or not _has_kernels(x):
        return reference.mish(x)  # fuses with its neighbors
    reference.check_mish(x)
    return torch.ops.ups_fast.mish(x)


def augment_plan(
    index: Tensor,  # int64 [B]
    *,
    policy: str | Policy,
    size: int | tuple[int, int],
    seed: int | Tensor,
    epoch: int | Tensor,
) -> AugmentPlan:
    if not _has_kernels(index) and not _is_traced(index):
        return reference.augment_plan(index, policy=policy, size=size, seed=seed, epoch=epoch)
    found, (height, width) = reference.check_augment_plan(index, policy, size, seed, epoch)
    table = _tables(found, height, width, 3, index.device)
    draws = torch.ops.ups_fast.augment_plan(
        index.contiguous(),
        table.variants,
        table.operations,
        *_counters(seed, epoch, index),
        height,
        width,
        table.settings,
    )
    return AugmentPlan(draws, found, (height, width))


def augment(
    images: Tensor,  # uint8 [N, H, W, C]
    index: Tensor,  # int64 [B]
    *,
    policy: str | Policy,
    seed: int | Tensor,
    epoch: int | Tensor,
    mean: Sequence[float] | Tensor,
    std: Sequence[float] | Tensor,
    dtype: torch.dtype = torch.float32,
    plan: AugmentPlan | None = None,
    out: Tensor | None = None,
) -> Tensor:
    if not _has_kernels(images) and not _is_traced(images):
        return reference.augment(
            images,
            index,
            policy=policy,
            seed=seed,
            epoch=epoch,
            mean=mean,
            std=std,
            dtype=dtype,
            plan=plan,
            out=out,
        )
    found = reference.check_augment(images, index, policy, seed, epoch, mean, std, dtype, plan, out)
    policy, (height, width), mean, std = found
    if out is None:
        out = images.new_empty(index.shape + images.shape[1:], dtype=dtype).permute(0, 3, 1, 2)
    table = _tables(policy, height, width, len(mean), images.device)
    torch.ops.ups_fast.augment(
        out.permute(0, 2, 3, 1),
        images,
        index.contiguous(),
        table.variants,
        table.operations,
        table.blends,
        _normalization(mean, std, dtype, images.device),
        *_counters(seed, epoch, index),
        None if plan is None else plan.draws.contiguous(),
        table.settings,
    )
    if not torch.compiler.is_compiling() and not out.is_inference():
        torch.autograd.graph.increment_version(out)  # so that a backward that needs what was there says so
    return out


def _counters(seed: int | Tensor, epoch: int | Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Both as tensors, written on the device, so that nothing waits for a copy."""

    def tensor(x: int | Tensor) -> Tensor:
        return (
            x
            if isinstance(x, Tensor)
            else torch.full((), reference.plain(x), dtype=torch.int64, device=index.device)
        )

    return tensor(seed), tensor(epoch)


# The tables are constants. A mode that sees ops gets them as it gets a new torch.tensor(...): FakeTensorMode as fakes,
# a tracer as constants of its graph. Dynamo takes a tensor that is an attribute for an input of its graph, and what
# makes it must run while Dynamo traces.


class _Constants:
    """What graphs of Dynamo read: an attribute for each set of tables, which lives as long as the process."""

    def __init__(self) -> None:
        self._names: dict[Any, str] = {}

    def keep(self, make: Any, *args: Any) -> str:
        """The name of the attribute that holds make(*args)."""
        if (make, args) not in self._names:
            name = f"{make.__name__}_{len(self._names)}"
            setattr(self, name, make(*args))
            self._names[make, args] = name
        return self._names[make, args]


_constants = _Constants()


def _kept_tables(*args: Any) -> str:
    return _constants.keep(tables, *args)


def _kept_normalization(*args: Any) -> str:
    return _constants.keep(normalization, *args)


for _kept in (_kept_tables, _kept_normalization):
    # torch.compiler.assume_constant_result, which would import Dynamo, and that takes seconds
    _kept._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _tables(policy: Policy, height: int, width: int, channels: int, device: torch.device) -> Tables:
    if torch.compiler.is_dynamo_compiling():
        return getattr(_constants, _kept_tables(policy, height, width, channels, device))
    if not torch._C._len_torch_dispatch_stack():
        return tables(policy, height, width, channels, device)
    table = tables(policy, height, width, channels, torch.device("cpu"))  # a fake device may not be there
    return Tables(
        _lifted(table.variants, device),
        _lifted(table.operations, device),
        _lifted(table.blends, device),
        table.settings,
    )


def _normalization(
    mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    if torch.compiler.is_dynamo_compiling():
        return getattr(_constants, _kept_normalization(mean, std, dtype, device))
    if not torch._C._len_torch_dispatch_stack():
        return normalization(mean, std, dtype, device)
    return _lifted(normalization(mean, std, dtype, torch.device("cpu")), device)


def _lifted(real: Tensor, device: torch.device) -> Tensor:
    return torch.ops.aten.lift_fresh(real).to(device)


for _function in (mc_select, nce_loss, ups_loss, fixmatch_loss, counter_dropout, mish, augment_plan, augment):
    _function.__doc__ = getattr(reference, _function.__name__).__doc__


# Backend -------------------------------------------------------------------------------------------------------------


def backend() -> dict[str, str]:
    """Which implementation serves which device, and why: ``{"cpu": "...", "cuda": "..."}``.

    A device without compiled kernels runs the reference ops with a warning, or, with ``UPS_FAST_STRICT=1`` in the
    environment, raises a RuntimeError.

    Returns:
        A sentence for each device type, which starts with "fused kernels" or "reference ops".

    >>> sorted(backend())
    ['cpu', 'cuda']
    """
    return {
        device: ("fused kernels, " if fused else "reference ops: ") + why
        for device, (fused, why) in _BACKEND.items()
    }


def _find_backend() -> dict[str, tuple[bool, str]]:
    """Of each device type: whether it has kernels, and which or why not."""
    if _C is None:
        return {"cpu": (False, _NO_KERNELS), "cuda": (False, _NO_KERNELS)}
    cpu = f"{_C.isa()} (this machine runs {', '.join(_C.available_isas())})"
    return {"cpu": (True, cpu), "cuda": (_C.build_info()["with_cuda"] == "1", _C.build_info()["cuda"])}


_BACKEND = _find_backend()


def has_kernels(device: torch.device) -> bool:
    """Whether fused kernels serve tensors on this device."""
    return _BACKEND.get(device.type, (False, ""))[0]


def _is_traced(x: Any) -> bool:
    """Whether nothing is computed now: the reference, which reads its tensors, could not be traced."""
    return torch.compiler.is_compiling() or isinstance(x, FakeTensor)


def _has_kernels(x: Any) -> bool:
    """Whether the fused op serves x; if not, that is said, or raised when strict."""
    kind = x.device.type if isinstance(x, Tensor) else "cpu"
    if kind == "meta":
        return True  # nothing is computed there, and the fake kernels tell the shapes
    fused, why = _BACKEND.get(kind) or (False, f"there are no kernels for {kind} devices")
    if not fused and not _is_traced(x):
        message = f"ups_fast runs its reference ops on {kind}: {why}"
        if os.environ.get("UPS_FAST_STRICT") == "1":
            raise RuntimeError(message)
        warnings.warn(message, stacklevel=3)
    return fused


# Fake kernels: shapes and types of the results -----------------------------------------------------------------------


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


@torch.library.register_fake("ups_fast::mc_select", lib=_lib)
def _(logits, tau_p, tau_n, kappa_p, kappa_n, temp_nl, packed):
    _, n, c = logits.shape
    width, dtype = ((c + 31) // 32, torch.int32) if packed else (c, torch.bool)
    return (
        logits.new_empty(n, dtype=torch.int64),
        logits.new_empty(n, dtype=_compute_dtype(logits)),
        logits.new_empty(n, dtype=_compute_dtype(logits)),
        logits.new_empty(n, dtype=torch.bool),
        logits.new_empty((n, width), dtype=dtype),
    )


@torch.library.register_fake("ups_fast::nce_loss", lib=_lib)
def _(logits, mask, reduction, weight=None):
    dtype = _compute_dtype(logits)
    loss = logits.new_empty(logits.shape[:1] if reduction == 0 else (), dtype=dtype)
    return loss, logits.new_empty((), dtype=dtype)


@torch.library.register_fake("ups_fast::ups_loss", lib=_lib)
def _(logits, target, positive, negative, reduction=1, weight=None, label_smoothing=0.0):
    dtype = _compute_dtype(logits)
    loss = logits.new_empty(logits.shape[:1] if reduction == 0 else (), dtype=dtype)
    return loss, logits.new_empty(2, dtype=dtype)


@torch.library.register_fake("ups_fast::fixmatch_loss", lib=_lib)
def _(strong, weak, class_tau, tau, temperature, reduction, weight=None):
    dtype = _compute_dtype(strong)
    return (
        strong.new_empty(strong.shape[:1] if reduction == 0 else (), dtype=dtype),
        strong.new_empty(strong.shape[0], dtype=torch.bool),
        strong.new_empty(strong.shape[0], dtype=torch.int64),
        strong.new_empty((), dtype=dtype),
    )


@torch.library.register_fake("ups_fast::fixmatch_loss_backward", lib=_lib)
def _(d_loss, strong, target, scale, weight=None):
    return strong.new_empty(strong.shape)


def _elementwise(x: Tensor) -> Tensor:
    """Memory for the result of an elementwise op on x: strides as torch's own unary ops choose them."""
    if x.is_contiguous():
        return x.new_empty(x.shape)
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.empty_like(x, memory_format=torch.channels_last)
    return torch.empty_like(x)


@torch.library.register_fake("ups_fast::counter_dropout", lib=_lib)
def _(x, keys, p, layer):
    return _elementwise(x)


@torch.library.register_fake("ups_fast::mish", lib=_lib)
def _(x):
    return _elementwise(x)


@torch.library.register_fake("ups_fast::mish_backward", lib=_lib)
def _(d_y, x):
    return _elementwise(x)


@torch.library.register_fake("ups_fast::augment", lib=_lib)
def _(out, images, index, variants, operations, blends, norm, seed, epoch, plan, settings):
    return None


@torch.library.register_fake("ups_fast::augment_plan", lib=_lib)
def _(index, variants, operations, seed, epoch, height, width, settings):
    return index.new_empty((index.shape[0], 3 * settings[0] + 11), dtype=torch.int32)


@torch.library.register_fake("ups_fast::nce_loss_backward", lib=_lib)
def _(d_loss, logits, mask, scale, weight=None):
    return logits.new_empty(logits.shape)


@torch.library.register_fake("ups_fast::ups_loss_backward", lib=_lib)
def _(d_loss, logits, target, positive, negative, scale, weight=None, label_smoothing=0.0):
    return logits.new_empty(logits.shape)


# Derivatives. The backward ops read the logits again and recompute the softmax: less memory traffic than a gradient
# kept from the forward pass and scaled, and nothing is saved that was not there. `scale` holds the weights of the rows.


class _Op(torch.autograd.Function):
    """An op above its kernels, for autograd, forward mode and the transforms of torch.func.

    torch.library.register_autograd would serve the first alone, and give forward mode a silent 0.
    """

    op: Any

    @classmethod
    def forward(cls, *inputs):
        with torch._C._AutoDispatchBelowAutograd():  # the dispatcher goes on below this function
            return cls.op(*inputs)

    @classmethod
    def vmap(cls, info, in_dims, *inputs):
        """Sample by sample."""
        pairs = list(zip(inputs, in_dims, strict=True))
        samples = [
            cls.op(*(x if dim is None else x.select(dim, i) for x, dim in pairs))
            for i in range(info.batch_size)
        ]
        if isinstance(samples[0], Tensor):
            return torch.stack(samples), 0
        return tuple(map(torch.stack, zip(*samples, strict=True))), (0,) * len(samples[0])


def _gradient(ctx: Any, *inputs: Any) -> Tensor:
    """ctx.backward_op(*inputs), straight at its kernel unless someone may differentiate that again: 10 us less."""
    if torch.is_grad_enabled() or forward_ad._current_level >= 0 or torch.compiler.is_compiling():
        return ctx.backward_op(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return ctx.backward_op(*inputs)


class _Loss(_Op):
    """(logits, what else describes the rows..., reduction, weight, label_smoothing?) -> (loss, scale)."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        loss, scale = output
        at = 2 if isinstance(inputs[2], int) else 4  # where the reduction stands
        tensors = *inputs[:at], scale, inputs[at + 1]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.mark_non_differentiable(scale)
        ctx.set_materialize_grads(False)  # so that jvp sees which arguments have a tangent
        ctx.shape, ctx.smoothing, ctx.others = loss.shape, inputs[at + 2 :], len(inputs) - 1

    @staticmethod
    def backward(ctx, d_loss, *_):
        if any(ctx.needs_input_grad[1:]):
            raise RuntimeError(_CONSTANTS)
        if d_loss is None:
            return (None,) * (1 + ctx.others)
        return _gradient(ctx, d_loss, *ctx.saved_tensors, *ctx.smoothing), *(None,) * ctx.others

    @staticmethod
    def jvp(ctx, tangent, *others):
        if any(other is not None for other in others):
            raise RuntimeError(_CONSTANTS)
        scale = ctx.saved_tensors[-2]
        ones = scale.new_ones(ctx.shape)
        d_logits = ctx.backward_op(ones, *ctx.saved_tensors, *ctx.smoothing)
        rows = (d_logits.to(scale.dtype) * tangent).sum(dim=-1)  # a row's loss depends on its logits alone
        return (rows if ctx.shape else rows.sum()), None


class _FixMatch(_Loss):
    """(strong, weak, class_tau, tau, temperature, reduction, weight) -> (loss, mask, target, scale)."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        loss, mask, target, scale = output
        tensors = inputs[0], target, scale, inputs[6]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.mark_non_differentiable(mask, target, scale)
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.smoothing, ctx.others = loss.shape, (), len(inputs) - 1

    @staticmethod
    def jvp(ctx, *tangents):
        return *_Loss.jvp(ctx, *tangents), None, None


class _Mish(_Op):
    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, d_y):
        return _gradient(ctx, d_y, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx, tangent):
        return ctx.backward_op(tangent, *ctx.saved_tensors)  # elementwise: the slope times the tangent


class _Backward(_Op):
    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("the ops of ups_fast have no second derivative; use ups_fast.reference for one")

    jvp = backward


class _Constant(_Op):
    """An op whose results are constants to every kind of differentiation."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output)
        ctx.others, ctx.results = len(inputs), len(output)

    @staticmethod
    def backward(ctx, *_):
        return (None,) * ctx.others

    @staticmethod
    def jvp(ctx, *_):
        return (None,) * ctx.results


class _Dropout(_Op):
    """Linear in x: the gradient and the tangent take the same mask."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, keys, ctx.p, ctx.layer = inputs
        ctx.save_for_backward(keys)
        ctx.save_for_forward(keys)

    @staticmethod
    def backward(ctx, d_y):
        (keys,) = ctx.saved_tensors
        return ctx.op(d_y, keys, ctx.p, ctx.layer), None, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return ctx.op(tangent, *ctx.saved_tensors, ctx.p, ctx.layer)


_CONSTANTS = "the losses of ups_fast have a gradient for their logits alone: detach target and weight"


def _register(name: str, base: type[_Op], backward_op: Any = None) -> Any:
    """Puts a subclass of `base` above the kernels of the op `name`, which it returns."""
    op = getattr(torch.ops.ups_fast, name).default
    defaults = [argument.default_value for argument in op._schema.arguments]

    # Compiled autograd takes a backward that is a staticmethod alone, so what it needs to know goes through ctx.
    def setup_context(ctx, inputs, output):
        ctx.op, ctx.backward_op = op, backward_op
        base.setup_context(ctx, inputs, output)

    function: Any = type(name, (base,), {"op": op, "setup_context": staticmethod(setup_context)})

    def forward(ctx, *inputs):
        output = function.forward(*inputs)
        setup_context(ctx, inputs, output)
        return output

    # torch.func needs the two apart; autograd takes them in one, which is 10 us faster.
    joined = {"forward": staticmethod(forward), "setup_context": torch.autograd.Function.setup_context}
    plain: Any = type(name, (function,), joined)

    def above(apply: Any) -> Any:
        return lambda *inputs: apply(*inputs, *defaults[len(inputs) :])  # the dispatcher leaves defaults out

    _lib.impl(name, above(plain.apply), "Autograd")
    _lib.impl(name, above(function.apply), "FuncTorchDynamicLayerFrontMode")
    return op


_register("mc_select", _Constant)
for _name in ("nce_loss", "ups_loss"):
    _register(_name, _Loss, backward_op=_register(f"{_name}_backward", _Backward))
_register("fixmatch_loss", _FixMatch, backward_op=_register("fixmatch_loss_backward", _Backward))
_register("mish", _Mish, backward_op=_register("mish_backward", _Backward))
_register("counter_dropout", _Dropout)
