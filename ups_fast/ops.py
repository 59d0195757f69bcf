"""The fused ops: public functions, schemas and fake kernels. The only file that imports `_C`.

Every op has a twin of the same name and arguments in `ups_fast.reference`, which also documents it; a device without
kernels is served by that twin, and `backend()` says so. Needs torch alone.
"""

from __future__ import annotations

import importlib.util
import os
import struct
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import reference
from .autograd import Constant, Dropout, Elementwise, FixMatch, Gradient, Loss, Op, register
from .policy import AugmentPlan, Policy, Tables, normalization, tables
from .reference import REDUCTIONS, MultiLabelSelection, Reduction, Selection

# Raised with kInterface of csrc/module.cpp whenever a schema below changes: kernels take no arguments but their own.
INTERFACE = 4


def _is_cut_off(path: Path) -> bool:
    """Whether a compiled module (ELF, 64 bits) ends before its last table: to load it would kill the process."""
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError:  # as the import will say
        return False
    if len(head) < 64 or not head.startswith(b"\x7fELF\x02\x01"):
        return False
    (start,), (size, count) = struct.unpack_from("<Q", head, 40), struct.unpack_from("<HH", head, 58)
    return bool(os.path.getsize(path) < start + size * count)


try:
    for _path in (Path(__file__).with_name(f"_C{suffix}") for suffix in EXTENSION_SUFFIXES):
        if _is_cut_off(_path):  # as a full disk leaves it
            raise ImportError(f"{_path} is cut off")
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
# Public functions ----------------------------------------------------------------------------------------------------

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _as_reference(function: _Function) -> _Function:
    """With the docstring of its twin."""
    function.__doc__ = getattr(reference, function.__name__).__doc__
    return function


@_as_reference
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


@_as_reference
def mc_select_multilabel(
    logits: Tensor,  # [P, N, C]
    *,
    tau_p: float | Tensor = 0.5,  # or float [C], as the others
    tau_n: float | Tensor = 0.05,
    kappa_p: float | Tensor = 0.05,
    kappa_n: float | Tensor = 0.005,
    temp_nl: float = 2.0,
    packed: bool = False,
) -> MultiLabelSelection:
    if not _has_kernels(logits):
        return reference.mc_select_multilabel(
            logits, tau_p=tau_p, tau_n=tau_n, kappa_p=kappa_p, kappa_n=kappa_n, temp_nl=temp_nl, packed=packed
        )
    *limits, temp_nl = reference.check_mc_select_multilabel(
        logits, tau_p, tau_n, kappa_p, kappa_n, temp_nl, packed
    )
    of_class = None
    if any(isinstance(x, Tensor) for x in limits):
        empty = logits.new_empty(logits.shape[2], dtype=_compute_dtype(logits))
        rows = (x.detach() if isinstance(x, Tensor) else torch.full_like(empty, x) for x in limits)
        of_class = torch.stack([x.to(empty.dtype) for x in rows])
        limits = [1.0, 0.0, 0.0, 0.0]  # not read
    return MultiLabelSelection(
        *torch.ops.ups_fast.mc_select_multilabel(logits.detach(), *limits, temp_nl, packed, of_class)
    )


@_as_reference
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


@_as_reference
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


@_as_reference
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


@_as_reference
def ups_loss_multilabel(
    logits: Tensor,  # [B, C]
    positive: Tensor,  # bool [B, C] or int32 [B, ceil(C / 32)]
    negative: Tensor,  # bool [B, C] or int32 [B, ceil(C / 32)]
    *,
    weight: Tensor | None = None,  # float [B] or [B, C]
    reduction: Reduction = "mean",
) -> Tensor:
    if not _has_kernels(logits):
        return reference.ups_loss_multilabel(logits, positive, negative, weight=weight, reduction=reduction)
    reference.check_ups_loss_multilabel(logits, positive, negative, weight, reduction)
    return torch.ops.ups_fast.ups_loss_multilabel.default(
        logits, positive, negative, REDUCTIONS.index(reduction), _of_loss(weight, logits)
    )[0]


def _of_loss(x: Tensor | None, logits: Tensor) -> Tensor | None:
    """In the dtype of the loss, and a constant to it."""
    return None if x is None else x.detach().to(_compute_dtype(logits))


@_as_reference
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


@_as_reference
def mish(x: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or not _has_kernels(x):
        return reference.mish(x)  # fuses with its neighbors
    reference.check_mish(x)
    return torch.ops.ups_fast.mish(x)


@_as_reference
@reference.once_epoch
def augment_plan(
    index: Tensor,  # int64 [B]
    *,
    policy: str | Policy,
    size: int | tuple[int, int],
    seed: int | Tensor,
    draw: int | Tensor,
) -> AugmentPlan:
    if not _has_kernels(index, above=4) and not _is_traced(index):
        return reference.augment_plan(index, policy=policy, size=size, seed=seed, draw=draw)
    found, (height, width) = reference.check_augment_plan(index, policy, size, seed, draw)
    table = _tables(found, height, width, 3, index.device)
    draws = torch.ops.ups_fast.augment_plan(
        index.contiguous(),
        table.variants,
        table.operations,
        *_counters(seed, draw, index),
        height,
        width,
        table.settings,
    )
    return AugmentPlan(draws, found, (height, width))


@_as_reference
@reference.once_epoch
def augment(
    images: Tensor,  # uint8 [N, H, W, C]
    index: Tensor,  # int64 [B]
    *,
    policy: str | Policy,
    seed: int | Tensor,
    draw: int | Tensor,
    mean: Sequence[float] | Tensor,
    std: Sequence[float] | Tensor,
    dtype: torch.dtype = torch.float32,
    plan: AugmentPlan | None = None,
    out: Tensor | None = None,
) -> Tensor:
    if not _has_kernels(images, above=4) and not _is_traced(images):
        return reference.augment(
            images,
            index,
            policy=policy,
            seed=seed,
            draw=draw,
            mean=mean,
            std=std,
            dtype=dtype,
            plan=plan,
            out=out,
        )
    found = reference.check_augment(images, index, policy, seed, draw, mean, std, dtype, plan, out)
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
        *_counters(seed, draw, index),
        None if plan is None else plan.draws.contiguous(),
        table.settings,
    )
    if not torch.compiler.is_compiling() and not out.is_inference():
        torch.autograd.graph.increment_version(out)  # so that a backward that needs what was there says so
    return out


def _counters(seed: int | Tensor, draw: int | Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Both as tensors, written on the device, so that nothing waits for a copy."""

    def tensor(x: int | Tensor) -> Tensor:
        return (
            x
            if isinstance(x, Tensor)
            else torch.full((), reference.plain(x), dtype=torch.int64, device=index.device)
        )

    return tensor(seed), tensor(draw)


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


def built_with() -> str:
    """The compiler and the torch of the compiled kernels; "" without them."""
    if _C is None:
        return ""
    about = _C.build_info()
    return f"compiler {about['compiler']}, torch {about['torch']}"


def has_kernels(device: torch.device) -> bool:
    """Whether fused kernels serve tensors on this device."""
    return _BACKEND.get(device.type, (False, ""))[0]


def _is_traced(x: Any) -> bool:
    """Whether nothing is computed now: the reference, which reads its tensors, could not be traced."""
    return torch.compiler.is_compiling() or isinstance(x, FakeTensor)


def _has_kernels(x: Any, above: int = 3) -> bool:
    """Whether the fused op serves x; if not, that is said of the caller `above` this, or raised when strict."""
    kind = x.device.type if isinstance(x, Tensor) else "cpu"
    if kind == "meta":
        return True  # nothing is computed there, and the fake kernels tell the shapes
    fused, why = _BACKEND.get(kind) or (False, f"there are no kernels for {kind} devices")
    if not fused and not _is_traced(x):
        message = f"ups_fast runs its reference ops on {kind}: {why}"
        if os.environ.get("UPS_FAST_STRICT") == "1":
            raise RuntimeError(message)
        warnings.warn(message, stacklevel=above)
    return fused


# The ops: of each its schema, its fake kernel (shapes and types of the results) and how it is differentiated. Backward
# ops read the logits again and recompute the softmax: less memory traffic than a gradient kept from the forward pass
# and scaled, and nothing is saved that was not there. `scale` holds the weights of the rows. Floating-point targets,
# weights and thresholds have the dtype of the loss.


def _op(schema: str, kind: type[Op] | None, backward: str = "") -> Any:
    """Defines an op, whose fake kernel is the function below. It is differentiated as `kind` says, by `backward`."""
    name = schema[: schema.index("(")]

    def define(fake: Any) -> Any:
        _lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"ups_fast::{name}", fake, lib=_lib)
        if kind is not None:
            register(_lib, name, kind, getattr(torch.ops.ups_fast, backward).default if backward else None)
        return fake

    return define


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _elementwise(x: Tensor) -> Tensor:
    """Memory for the result of an elementwise op on x: strides as torch's own unary ops choose them."""
    if x.is_contiguous():
        return x.new_empty(x.shape)
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.empty_like(x, memory_format=torch.channels_last)
    return torch.empty_like(x)


@_op(
    "mc_select(Tensor logits, float tau_p, float tau_n, float kappa_p, float kappa_n, float temp_nl,"
    " bool packed) -> (Tensor label, Tensor confidence, Tensor std, Tensor positive, Tensor negative)",
    Constant,
)
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


@_op(
    "nce_loss_backward(Tensor d_loss, Tensor logits, Tensor mask, Tensor scale, Tensor? weight=None)"
    " -> Tensor d_logits",
    Gradient,
)
def _(d_loss, logits, mask, scale, weight=None):
    return logits.new_empty(logits.shape)


@_op(
    "nce_loss(Tensor logits, Tensor mask, int reduction, Tensor? weight=None) -> (Tensor loss, Tensor scale)",
    Loss,
    backward="nce_loss_backward",
)
def _(logits, mask, reduction, weight=None):
    dtype = _compute_dtype(logits)
    loss = logits.new_empty(logits.shape[:1] if reduction == 0 else (), dtype=dtype)
    return loss, logits.new_empty((), dtype=dtype)


@_op(
    "ups_loss_backward(Tensor d_loss, Tensor logits, Tensor target, Tensor positive,"
    " Tensor? negative, Tensor scale, Tensor? weight=None, float label_smoothing=0.0)"
    " -> Tensor d_logits",
    Gradient,
)
def _(d_loss, logits, target, positive, negative, scale, weight=None, label_smoothing=0.0):
    return logits.new_empty(logits.shape)


@_op(
    "ups_loss(Tensor logits, Tensor target, Tensor positive, Tensor? negative, int reduction=1,"
    " Tensor? weight=None, float label_smoothing=0.0) -> (Tensor loss, Tensor scale)",
    Loss,
    backward="ups_loss_backward",
)
def _(logits, target, positive, negative, reduction=1, weight=None, label_smoothing=0.0):
    dtype = _compute_dtype(logits)
    loss = logits.new_empty(logits.shape[:1] if reduction == 0 else (), dtype=dtype)
    return loss, logits.new_empty(2, dtype=dtype)


@_op(
    "fixmatch_loss_backward(Tensor d_loss, Tensor strong, Tensor target, Tensor scale,"
    " Tensor? weight=None) -> Tensor d_strong",
    Gradient,
)
def _(d_loss, strong, target, scale, weight=None):
    return strong.new_empty(strong.shape)


# target: the pseudo-label of each row that counts, or -1.
@_op(
    "fixmatch_loss(Tensor strong, Tensor weak, Tensor? class_tau, float tau, float temperature,"
    " int reduction, Tensor? weight=None) -> (Tensor loss, Tensor mask, Tensor target, Tensor scale)",
    FixMatch,
    backward="fixmatch_loss_backward",
)
def _(strong, weak, class_tau, tau, temperature, reduction, weight=None):
    dtype = _compute_dtype(strong)
    return (
        strong.new_empty(strong.shape[:1] if reduction == 0 else (), dtype=dtype),
        strong.new_empty(strong.shape[0], dtype=torch.bool),
        strong.new_empty(strong.shape[0], dtype=torch.int64),
        strong.new_empty((), dtype=dtype),
    )


# class_thresholds: [4, C], tau_p, tau_n, kappa_p and kappa_n of each class in place of the numbers.
@_op(
    "mc_select_multilabel(Tensor logits, float tau_p, float tau_n, float kappa_p, float kappa_n,"
    " float temp_nl, bool packed, Tensor? class_thresholds=None)"
    " -> (Tensor confidence, Tensor std, Tensor positive, Tensor negative)",
    Constant,
)
def _(logits, tau_p, tau_n, kappa_p, kappa_n, temp_nl, packed, class_thresholds=None):
    _, n, c = logits.shape
    width, dtype = ((c + 31) // 32, torch.int32) if packed else (c, torch.bool)
    values = [logits.new_empty((n, c), dtype=_compute_dtype(logits)) for _ in range(2)]
    return *values, *(logits.new_empty((n, width), dtype=dtype) for _ in range(2))


@_op(
    "ups_loss_multilabel_backward(Tensor d_loss, Tensor logits, Tensor positive, Tensor negative,"
    " Tensor scale, Tensor? weight=None) -> Tensor d_logits",
    Gradient,
)
def _(d_loss, logits, positive, negative, scale, weight=None):
    return logits.new_empty(logits.shape)


@_op(
    "ups_loss_multilabel(Tensor logits, Tensor positive, Tensor negative, int reduction,"
    " Tensor? weight=None) -> (Tensor loss, Tensor scale)",
    Loss,
    backward="ups_loss_multilabel_backward",
)
def _(logits, positive, negative, reduction, weight=None):
    dtype = _compute_dtype(logits)
    loss = logits.new_empty(logits.shape[:1] if reduction == 0 else (), dtype=dtype)
    return loss, logits.new_empty((), dtype=dtype)


@_op(
    "counter_dropout(Tensor x, Tensor keys, float p, int layer) -> Tensor",
    Dropout,
)
def _(x, keys, p, layer):
    return _elementwise(x)


@_op(
    "mish_backward(Tensor d_y, Tensor x) -> Tensor d_x",
    Gradient,
)
def _(d_y, x):
    return _elementwise(x)


@_op(
    "mish(Tensor x) -> Tensor",
    Elementwise,
    backward="mish_backward",
)
def _(x):
    return _elementwise(x)


@_op(
    "augment(Tensor(a!) out, Tensor images, Tensor index, Tensor variants, Tensor operations,"
    " Tensor blends, Tensor norm, Tensor seed, Tensor draw, Tensor? plan, int[] settings) -> ()",
    None,
)
def _(out, images, index, variants, operations, blends, norm, seed, draw, plan, settings):
    return None


@_op(
    "augment_plan(Tensor index, Tensor variants, Tensor operations, Tensor seed, Tensor draw,"
    " int height, int width, int[] settings) -> Tensor",
    None,
)
def _(index, variants, operations, seed, draw, height, width, settings):
    return index.new_empty((index.shape[0], 3 * settings[0] + 11), dtype=torch.int32)
