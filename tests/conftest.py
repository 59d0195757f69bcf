from __future__ import annotations

import signal

import pytest

from ups_fast import ops

# A shell that runs the tests in the background ignores SIGINT, as would all processes that they start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ISAS = ops._C.available_isas() if ops._C else ["reference"]


@pytest.fixture(params=ISAS)
def isa(request):
    """Runs a test once for each instruction set of this machine."""
    if ops._C is None:
        yield request.param
        return
    before = ops._C.isa()
    ops._C.set_isa(request.param)
    yield request.param
    ops._C.set_isa(before)


def pytest_collection_modifyitems(items):
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: not proved on a GPU here"))
