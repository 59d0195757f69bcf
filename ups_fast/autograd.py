"""How the ops are differentiated: by autograd, forward mode and the transforms of torch.func. Needs torch alone.

Each kind of op has a class here, and `register` puts one of these above the kernels of an op.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


class Op(torch.autograd.Function):
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


class Loss(Op):
    """(logits, what else describes the rows..., reduction, weight, label_smoothing?) -> (loss, scale)."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        loss, scale = output
        at = next(i for i, x in enumerate(inputs) if isinstance(x, int))  # where the reduction stands
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


class FixMatch(Loss):
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
        return *Loss.jvp(ctx, *tangents), None, None


class Elementwise(Op):
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


class Gradient(Op):
    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("the ops of ups_fast have no second derivative; use ups_fast.reference for one")

    jvp = backward


class Constant(Op):
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


class Dropout(Op):
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


def register(lib: torch.library.Library, name: str, kind: type[Op], backward_op: Any = None) -> None:
    """Puts a subclass of `kind` above the kernels of the op `name`; `backward_op` gives its gradient."""
    op = getattr(torch.ops.ups_fast, name).default
    defaults = [argument.default_value for argument in op._schema.arguments]

    # Compiled autograd takes a backward that is a staticmethod alone, so what it needs to know goes through ctx.
    def setup_context(ctx, inputs, output):
        ctx.op, ctx.backward_op = op, backward_op
        kind.setup_context(ctx, inputs, output)

    function: Any = type(name, (kind,), {"op": op, "setup_context": staticmethod(setup_context)})

    def forward(ctx, *inputs):
        output = function.forward(*inputs)
        setup_context(ctx, inputs, output)
        return output

    # torch.func needs the two apart; autograd takes them in one, which is 10 us faster.
    joined = {"forward": staticmethod(forward), "setup_context": torch.autograd.Function.setup_context}
    plain: Any = type(name, (function,), joined)

    def above(apply: Any) -> Any:
        return lambda *inputs: apply(*inputs, *defaults[len(inputs) :])  # the dispatcher leaves defaults out

    lib.impl(name, above(plain.apply), "Autograd")
    lib.impl(name, above(function.apply), "FuncTorchDynamicLayerFrontMode")
