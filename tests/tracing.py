"""What a compiler does without the compiler: for tests of what is traced, where C++ would take a minute to make."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from ups_fast.fullgraph import fullgraph


def traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """`fullgraph`, whose one graph of forward and backward then runs op by op."""
    with patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")):
        return fullgraph(function)
