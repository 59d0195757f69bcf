"""torch.compile as this package uses it."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch


def fullgraph(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled as one graph, anew for each shape, with a cache of its own.

    torch keeps what it compiled by code, and stops the ninth time: nine networks in one process would be too many.
    """
    assert isinstance(function, FunctionType)
    own = FunctionType(
        function.__code__.replace(),  # equal, but not the same
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return torch.compile(own, fullgraph=True, dynamic=False)
