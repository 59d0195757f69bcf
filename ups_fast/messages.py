"""What processes of a run send each other: the messages within a step, objects, and what it means if none comes.

`World` says who sends what to whom.
"""

from __future__ import annotations

import io
import pickle
import re
import signal
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ups_fast.words import line_of

# One tensor to each process from all; its old name is given up.
all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Lost(ConnectionError):
    """Another process of the run has ended, or does not answer. What the last checkpoint holds is safe."""


class Line:
    """The connection of this process."""

    size = 1  # processes
    devices: Any = None  # the group that the ops below speak to
    lost = False


LINE = Line()


def call(collective: Callable, *args: Any, **how: Any) -> Any:
    """Sends, or waits for, a message. Raises Lost."""
    try:
        return collective(*args, **how)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        LINE.lost = True
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it as soon as one has ended
        said = re.sub(r"^\[[^]]*\] *", "", line_of(error))  # without gloo's place in its code
        raise Lost(said.partition(". ")[0]) from error


# Within a step -----------------------------------------------------------------------------------------------


@torch.library.custom_op("ups_fast::whole_rows", mutates_args=())
def whole_rows(rows: Tensor, rank: int, size: int) -> Tensor:  # [b, ...] -> [size * b, ...]
    mine = rows.contiguous()
    found = mine.new_empty(size * len(mine), *mine.shape[1:])
    call(all_gather, found, mine, group=LINE.devices)
    return found.unflatten(0, (size, len(mine))).transpose(0, 1).flatten(0, 1).contiguous()


@whole_rows.register_fake
def _(rows: Tensor, rank: int, size: int) -> Tensor:
    return rows.new_empty(size * rows.shape[0], *rows.shape[1:])


def _rank_of(ctx: Any, inputs: Any, output: Any) -> None:
    _, ctx.rank, ctx.size = inputs


def _own_rows(ctx: Any, gradient: Tensor) -> Any:
    """Each process has the gradient of the whole batch."""
    return gradient.unflatten(0, (-1, ctx.size))[:, ctx.rank].contiguous(), None, None


whole_rows.register_autograd(_own_rows, setup_context=_rank_of)


@torch.library.custom_op("ups_fast::whole_sum", mutates_args=())
def whole_sum(x: Tensor) -> Tensor:
    found = x.clone(memory_format=torch.contiguous_format)
    call(dist.all_reduce, found, group=LINE.devices)
    return found


@whole_sum.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _total_gradient(ctx: Any, gradient: Tensor) -> Tensor:
    total: Tensor = whole_sum(gradient)
    return total


whole_sum.register_autograd(_total_gradient)


# Objects with large tensors ----------------------------------------------------------------------------------


def pickled(made: Any) -> tuple[bytes, list[Tensor]]:
    """All but the tensors as bytes, and these apart, so that no copy of a data set is made."""
    tensors: list[Tensor] = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, each: Any) -> int | None:
            if not isinstance(each, Tensor):
                return None
            tensors.append(each.contiguous())
            return len(tensors) - 1

    buffer = io.BytesIO()
    Pickler(buffer).dump(made)
    return buffer.getvalue(), tensors


def unpickled(text: bytes, tensors: list[Tensor]) -> Any:
    class Unpickler(pickle.Unpickler):
        def persistent_load(self, number: int) -> Tensor:
            return tensors[number]

    return Unpickler(io.BytesIO(text)).load()
