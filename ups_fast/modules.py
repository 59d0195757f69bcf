"""The ops as modules, and Monte-Carlo dropout for any network. Needs torch alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves

from .ops import counter_dropout, mish, nce_loss, ups_loss
from .reference import Reduction, check_dropout, check_label_smoothing, check_reduction, is_readable


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
    tensors are compared. A block that repeats no input ends with one more pass over its first one, for the comparison.
    Nothing is compared where the block itself is compiled, exported or captured.

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
    dropping = _switches(modules) if active else []
    modes = [(module, module.training) for module in modules]
    model.eval()
    for module in dropping:
        module.training = True
    check = _EqualPasses(model) if active else None
    try:
        yield
        if check:
            check.finish()
    finally:
        if check:
            check.hook.remove()
        for module, mode in modes:
            module.training = mode


def _switches(modules: list[nn.Module]) -> list[nn.Module]:
    """The modules whose training mode turns torch's own dropout on, and nothing else."""
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
    # In eval mode an encoder layer takes a fast path that skips the dropout within it.
    parts = (nn.Transformer, nn.TransformerEncoder, nn.TransformerEncoderLayer)
    return dropping + [module for module in modules if isinstance(module, parts)]


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


class _EqualPasses:
    """Compares a model's passes over the same input until two differ."""

    def __init__(self, model: nn.Module) -> None:
        self.done, self.compared = False, False
        self.arguments: list = []  # of the first pass
        self.versions: list[int] = []
        self.result: Tensor | None = None
        self.again: Callable[[], Any] | None = None  # another pass, as the first was made
        self.hook = model.register_forward_hook(self.called, with_kwargs=True)

    def called(self, model: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if self.done or torch.compiler.is_compiling():
            return
        result, arguments = _first_tensor(output), tree_leaves((args, kwargs))
        if result is None or not result.numel() or not is_readable(result):
            return
        if self.result is None:
            self.arguments, self.versions = arguments, _versions(arguments)
            self.result = result.detach().clone()
            self.again = _in_this_mode(model, args, kwargs, result.device)
        elif self.is_first(arguments):
            self.compared = True
            self.compare(result)

    def is_first(self, arguments: list) -> bool:
        same = len(arguments) == len(self.arguments)
        same = same and all(a is b for a, b in zip(arguments, self.arguments, strict=True))
        return same and _versions(arguments) == self.versions

    def compare(self, result: Tensor | None = None) -> None:
        """Raises where this pass, and so many more that it cannot be chance, equal the first one."""
        first, again = self.result, self.again
        assert first is not None and again is not None
        self.done = True  # the passes made here call the hook too
        with torch.random.fork_rng(devices=[first.device] if first.is_cuda else []):
            for _ in range(_TRIES):
                result = _first_tensor(again()) if result is None else result
                if result is None or result.shape != first.shape or not torch.equal(result.detach(), first):
                    self.arguments, self.result, self.again = [], None, None
                    return
                result = None
        raise RuntimeError(
            "all passes of model are equal bit for bit although dropout is on, so they measure no uncertainty: "
            "use nn.Dropout where the network calls F.dropout, and see that what is dropped reaches the output"
        )

    def finish(self) -> None:
        """At the end of the block: a model that saw no input twice makes one more pass."""
        if self.result is not None and not self.compared and _versions(self.arguments) == self.versions:
            self.compare()


def _in_this_mode(model: nn.Module, args: tuple, kwargs: dict, device: torch.device) -> Callable[[], Any]:
    """model(*args, **kwargs) as it runs here and now, whatever mode torch is in when it is called."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    kind = device.type
    autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

    def again() -> Any:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad), autocast:
            return model(*args, **kwargs)

    return again


def _first_tensor(output: Any) -> Tensor | None:
    """A floating-point tensor among results, in whatever they are wrapped."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    if isinstance(output, dict):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)):
        return next((x for x in map(_first_tensor, output) if x is not None), None)
    return None


def _versions(arguments: list) -> list[int]:
    """Changes when a tensor among the arguments is written to."""
    return [x._version for x in arguments if isinstance(x, Tensor) and not x.is_inference()]
