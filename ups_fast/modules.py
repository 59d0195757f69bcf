"""The ops as modules, and Monte-Carlo dropout for any network. Needs torch alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves

from .ops import counter_dropout, fixmatch_loss, mish, nce_loss, ups_loss
from .reference import (
    Reduction,
    check_dropout,
    check_fixmatch_options,
    check_label_smoothing,
    check_reduction,
    is_readable,
)


class Mish(nn.Module):
    """`ups_fast.mish` as a module: x tanh(log(1 + exp(x))), elementwise.

    >>> import torch
    >>> Mish()(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([-0.3034,  0.0000,  1.9440])
    """

    def forward(self, x: Tensor) -> Tensor:  # [...], floating-point
        return mish(x)


class CounterDropout(nn.Dropout):
    """`ups_fast.counter_dropout` as a module: with keys it drops by these, in training and in eval mode.

    Without keys it is nn.Dropout: it draws from torch's generator in training mode and is off in eval mode.

    Args:
        p: in [0, 1), how likely an element is dropped.
        layer: 0 .. 2^20 - 1, the number of this dropout in its network: each number has other masks.

    Raises:
        TypeError, ValueError: naming the argument and what it got.

    >>> import torch
    >>> from ups_fast import dropout_keys
    >>> dropout = CounterDropout(0.5, layer=3).eval()
    >>> x, keys = torch.ones(2, 8), dropout_keys(torch.tensor([4, 7]), seed=0, draw=0)
    >>> torch.equal(dropout(x, keys), dropout(x, keys))  # a function of x and keys
    True
    >>> torch.equal(dropout(x), x)
    True
    """

    def __init__(self, p: float = 0.5, layer: int = 0) -> None:
        check_dropout(p, layer)
        super().__init__(p)
        self.layer = layer

    def forward(  # type: ignore[override]
        self,
        x: Tensor,  # [B, C, ...]
        keys: Tensor | None = None,  # int32 [B], see `ups_fast.dropout_keys`
    ) -> Tensor:  # [B, C, ...]
        if keys is None:
            return super().forward(x)
        return counter_dropout(x, keys, p=self.p, layer=self.layer) if self.p else x

    def extra_repr(self) -> str:
        return f"p={self.p}, layer={self.layer}"


class UPSLoss(nn.Module):
    """`ups_fast.ups_loss` as a module (Rizve et al., ICLR 2021).

    Args:
        reduction: ``"mean"``, ``"sum"``, ``"batchmean"`` or ``"none"``, see `ups_fast.ups_loss`.
        label_smoothing: in [0, 1], of the positive rows.

    Raises:
        TypeError, ValueError: naming the argument and what it got.

    Example:
        >>> loss = ups_fast.UPSLoss(reduction="batchmean", label_smoothing=0.1)
        >>> loss
        UPSLoss(reduction='batchmean', label_smoothing=0.1)
        >>> logits, target = torch.zeros(2, 4, requires_grad=True), torch.tensor([1, 3])
        >>> round(loss(logits, target, torch.tensor([True, False])).item(), 4)  # log 4, of one row of two
        0.6931
    """

    def __init__(self, reduction: Reduction = "mean", label_smoothing: float = 0.0) -> None:
        super().__init__()
        check_reduction(reduction)
        check_label_smoothing(label_smoothing)
        self.reduction, self.label_smoothing = reduction, label_smoothing

    def forward(
        self,
        logits: Tensor,  # [B, C]
        target: Tensor,  # int64 [B], or float [B, C]
        positive: Tensor,  # bool [B]
        negative: Tensor | None = None,  # bool [B, C] or int32 [B, ceil(C / 32)]
        *,
        weight: Tensor | None = None,  # float [B]
    ) -> Tensor:  # [], or [B] for reduction="none"
        return ups_loss(
            logits,
            target,
            positive,
            negative,
            reduction=self.reduction,
            weight=weight,
            label_smoothing=self.label_smoothing,
        )

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, label_smoothing={self.label_smoothing}"


class NCELoss(nn.Module):
    """`ups_fast.nce_loss` as a module (Rizve et al., ICLR 2021, equation 3).

    Args:
        reduction: ``"mean"``, ``"sum"``, ``"batchmean"`` or ``"none"``, see `ups_fast.nce_loss`.

    Raises:
        ValueError: naming the argument and what it got.

    Example:
        >>> loss = ups_fast.NCELoss()
        >>> loss
        NCELoss(reduction='mean')
        >>> round(loss(torch.zeros(1, 4), torch.tensor([[False, True, True, False]])).item(), 4)
        0.2877
    """

    def __init__(self, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.reduction = reduction

    def forward(
        self,
        logits: Tensor,  # [N, C]
        mask: Tensor,  # bool [N, C] or int32 [N, ceil(C / 32)]
        *,
        weight: Tensor | None = None,  # float [N]
    ) -> Tensor:  # [], or [N] for reduction="none"
        return nce_loss(logits, mask, reduction=self.reduction, weight=weight)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"


class FixMatchLoss(nn.Module):
    """`ups_fast.fixmatch_loss` as a module (Sohn et al., NeurIPS 2020, equation 4).

    Args:
        tau: threshold in [0, 1]. Thresholds of each class change while a network learns: give them to the call.
        temperature: divides the weak logits, in [0.001, 1000].
        reduction: ``"batchmean"``, ``"mean"``, ``"sum"`` or ``"none"``, see `ups_fast.fixmatch_loss`.

    Raises:
        TypeError, ValueError: naming the argument and what it got.

    Example:
        >>> loss = ups_fast.FixMatchLoss(tau=0.8)
        >>> loss
        FixMatchLoss(tau=0.8, temperature=1.0, reduction='batchmean')
        >>> round(loss(torch.zeros(1, 4), torch.tensor([[0.0, 9.0, 0.0, 0.0]])).item(), 4)  # log 4
        1.3863
    """

    def __init__(
        self, tau: float = 0.95, temperature: float = 1.0, reduction: Reduction = "batchmean"
    ) -> None:
        super().__init__()
        if isinstance(tau, Tensor):
            raise TypeError("tau must be a number, got Tensor: give the thresholds of each class to the call")
        check_fixmatch_options(tau, temperature, reduction)
        self.tau, self.temperature, self.reduction = tau, temperature, reduction

    def forward(
        self,
        strong: Tensor,  # [B, C]
        weak: Tensor,  # [B, C]
        *,
        tau: Tensor | None = None,  # float [C], in place of the module's own
        weight: Tensor | None = None,  # float [B]
        return_mask: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:  # [], or [B] for reduction="none"; and bool [B]
        return fixmatch_loss(
            strong,
            weak,
            tau=self.tau if tau is None else tau,
            temperature=self.temperature,
            weight=weight,
            reduction=self.reduction,
            return_mask=return_mask,
        )

    def extra_repr(self) -> str:
        return f"tau={self.tau}, temperature={self.temperature}, reduction={self.reduction!r}"


# Monte-Carlo dropout -------------------------------------------------------------------------------------------------

_TRIES = 16  # passes that must all be equal before they count as equal by more than chance


@contextmanager
def mc_dropout(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Eval mode with dropout on or off, for any network (Gal and Ghahramani, ICML 2016).

    All of torch's own dropout acts: the Dropout modules, the ``dropout`` of `nn.MultiheadAttention`, `nn.LSTM`,
    `nn.GRU` and `nn.RNN`, and the whole of `nn.Transformer` and its parts, whose fast path would skip it. All else is
    in eval mode: batch-norm uses its running statistics, stochastic depth is off. Every module gets its own mode back
    afterwards.

    A module of your own that calls `F.dropout(x, p, self.training)` cannot be seen: give it an `nn.Dropout`. Where
    nothing drops, all passes are equal bit for bit, and that is an error: the first two calls of `model` on the same
    tensors are compared. A block that repeats no input ends with one more pass over its first one, for the comparison,
    until the model was once seen to vary. Nothing is compared where the block itself is compiled, exported or captured.

    Args:
        model: the network. Passes are its calls, ``model(images)``, within the block.
        active: False turns all dropout off, as `model.eval()` does.

    Raises:
        TypeError: `model` is no module, or holds a TorchScript one with dropout, which is switched by none of this.
        ValueError: dropout shall be active, and nothing that drops with p > 0 was found.
        RuntimeError: the passes are equal bit for bit.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Dropout(0.5), torch.nn.Linear(64, 3)).eval()
        >>> images = torch.ones(5, 8)
        >>> with torch.no_grad(), ups_fast.mc_dropout(model):
        ...     logits = torch.stack([model(images) for _ in range(10)])  # [P, N, C]
        >>> bool(logits.std(dim=0).min() > 0), model.training
        (True, False)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    modules = list(model.modules())
    dropping = _dropping(modules) if active else []
    modes = [(module, module.training) for module in modules]
    block = next(_blocks)
    check = None
    try:
        model.eval()
        if active:
            _switch_on(modules, dropping)
            check = _EqualPasses(model, dropping, block)
        else:
            _off[block] = {id(module) for module in modules}
        yield
        if check:
            check.finish()
    finally:
        _off.pop(block, None)
        if check and check.hook:
            check.hook.remove()
        _restore(modes)


_blocks = count()
_off: dict[int, set[int]] = {}  # of each block that turns dropout off: the modules (by id) it is about


def _restore(modes: list[tuple[nn.Module, bool]]) -> None:
    """Gives every module its mode back, by its own train(): some merge weights there."""
    try:
        for module, mode in modes:  # a module comes before the modules within it
            if module.training != mode:
                module.train(mode)
    finally:
        for module, mode in modes:
            module.training = mode


def _dropping(modules: list[nn.Module]) -> list[nn.Module]:
    """Torch's own modules among these that drop in training mode."""
    for module in modules:
        name = getattr(module, "original_name", "")  # of the module that a ScriptModule was made from
        if isinstance(module, torch.jit.ScriptModule) and (
            "Dropout" in name or name in ("MultiheadAttention", "LSTM", "GRU", "RNN")
        ):
            raise TypeError(
                f"model must not hold TorchScript modules with dropout, got a scripted {name}: "
                "pass the module that it was made from"
            )
    dropping = [module for module in modules if _drops(module)]
    if not dropping:
        raise ValueError(
            "model must have a dropout module with p > 0 for more than one pass, got none "
            "(a call of F.dropout is not seen: use nn.Dropout)"
        )
    return dropping


def _switch_on(modules: list[nn.Module], dropping: list[nn.Module]) -> None:
    """Training mode for the modules where it turns dropout on, and nothing else."""
    # In eval mode an encoder layer takes a fast path that skips the dropout within it.
    parts = (nn.Transformer, nn.TransformerEncoder, nn.TransformerEncoderLayer)
    for module in (*dropping, *(module for module in modules if isinstance(module, parts))):
        module.training = True


def _drops(module: nn.Module) -> bool:
    if isinstance(module, _DropoutNd):
        return module.p > 0
    rate = getattr(module, "dropout", 0.0)
    if not type(module).__module__.startswith("torch.") and not isinstance(
        module, (nn.RNNBase, nn.MultiheadAttention)
    ):
        return False
    # nn.MultiheadAttention and the recurrent networks, quantized ones too. A single layer has nothing to drop between.
    return isinstance(rate, (int, float)) and rate > 0 and getattr(module, "num_layers", 2) > 1


# Networks that were seen to vary, and how often each of their modules dropped: no pass is made for these again.
_varied: WeakKeyDictionary[nn.Module, list] = WeakKeyDictionary()


class _EqualPasses:
    """Compares a model's passes over the same input until two differ."""

    def __init__(self, model: nn.Module, dropping: list[nn.Module], block: int) -> None:
        self.model, self.dropping, self.block = model, dropping, block
        self.done, self.compared = False, False
        self.arguments: list = []  # of the first pass
        self.versions: list[int] = []
        self.results: list[Tensor] = []
        self.again: Callable[[], Any] | None = None  # another pass, as the first was made
        self.hook: Any = model.register_forward_hook(self.called, with_kwargs=True)

    def __reduce__(self) -> Any:
        return _no_check, ()  # a copy of the network, made within the block, is none of its business

    def called(self, model: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if self.done or torch.compiler.is_compiling() or self.is_off():
            return
        results, arguments = _floats(output), tree_leaves((args, kwargs))
        if not any(x.numel() for x in results) or not all(map(is_readable, results)):
            return
        if self.again is None:
            self.arguments, self.versions = arguments, _versions(arguments)
            self.results = [x.detach().clone() for x in results]
            self.again = _in_this_mode(model, args, kwargs, results[0].device)
        elif self.is_first(arguments):
            self.compared = True
            self.compare(results)

    def is_off(self) -> bool:
        """Whether a block within this one has turned dropout off."""
        return any(block > self.block and id(self.model) in modules for block, modules in _off.items())

    def is_first(self, arguments: list) -> bool:
        same = len(arguments) == len(self.arguments)
        same = same and all(a is b for a, b in zip(arguments, self.arguments, strict=True))
        return same and _versions(arguments) == self.versions

    def compare(self, results: list[Tensor] | None = None) -> None:
        """Raises where this pass, and so many more that it cannot be chance, equal the first one."""
        assert self.again is not None
        self.done = True  # the passes made here call the hook too
        device = self.results[0].device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            if self.differs(_floats(self.again()) if results is None else results):
                return
            with _often(self.dropping):
                if any(self.differs(_floats(self.again())) for _ in range(_TRIES)):
                    return
        raise RuntimeError(
            "all passes of model are equal bit for bit although dropout is on, so they measure no uncertainty: "
            "use nn.Dropout where the network calls F.dropout, and see that what is dropped reaches the output"
        )

    def differs(self, results: list[Tensor]) -> bool:
        pairs = zip(results, self.results, strict=False)
        if len(results) == len(self.results) and all(
            a.shape == b.shape and torch.equal(a.detach(), b) for a, b in pairs
        ):
            return False
        self.arguments, self.results, self.again = [], [], None
        _varied[self.model] = _rates(self.dropping)
        return True

    def finish(self) -> None:
        """At the end of the block: a model that saw no input twice makes one more pass, unless it varied before."""
        if self.again is None or self.compared or _versions(self.arguments) != self.versions:
            return
        if _varied.get(self.model) != _rates(self.dropping):
            self.compare()


def _no_check() -> _EqualPasses:
    check = _EqualPasses.__new__(_EqualPasses)
    check.done = True
    return check


def _rate(module: nn.Module) -> str:
    return "p" if isinstance(module, _DropoutNd) else "dropout"


def _rates(modules: list[nn.Module]) -> list:
    return [getattr(module, _rate(module)) for module in modules]


@contextmanager
def _often(modules: list[nn.Module]) -> Iterator[None]:
    """These modules drop every other element at least: a small p in a small layer gives equal passes by chance."""
    rates = _rates(modules)
    try:
        for module, rate in zip(modules, rates, strict=True):
            setattr(module, _rate(module), max(rate, 0.5))
        yield
    finally:
        for module, rate in zip(modules, rates, strict=True):
            setattr(module, _rate(module), rate)


def _in_this_mode(model: nn.Module, args: tuple, kwargs: dict, device: torch.device) -> Callable[[], Any]:
    """model(*args, **kwargs) as it runs here and now, whatever mode torch is in when it is called."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    kind = device.type
    autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

    def again() -> Any:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad), autocast:
            return model(*args, **kwargs)

    return again


def _floats(output: Any) -> list[Tensor]:
    """The floating-point tensors among results, in whatever they are wrapped."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = tuple(output.values())
    elif is_dataclass(output) and not isinstance(output, type):
        output = tuple(getattr(output, field.name, None) for field in fields(output))
    return [x for each in output for x in _floats(each)] if isinstance(output, (tuple, list)) else []


def _versions(arguments: list) -> list[int]:
    """Changes when a tensor among the arguments is written to."""
    return [x._version for x in arguments if isinstance(x, Tensor) and not x.is_inference()]
