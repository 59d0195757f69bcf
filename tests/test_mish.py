"""mish: near torch's own in float64, in every type, layout and length; its derivative; compiled."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

from ups_fast import mish, reference

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def values(n: int = 9999) -> Tensor:
    """Float64, from where mish is 0 to where it is x, with the odd ones in front."""
    odd = [0.0, -0.0, math.inf, math.nan, 1e30, -1e30, 1e-30, -1e-30, -87.5, 87.5, -1.1924]
    return torch.cat(
        [torch.tensor(odd, dtype=torch.float64), torch.linspace(-95, 95, n, dtype=torch.float64)]
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_slope_against_torch_in_float64(isa, dtype):
    """Some five roundings in the type of the computation, and one in that of the result."""
    x = values().to(dtype)
    exact = x.double().requires_grad_()
    want = torch.nn.functional.mish(exact)
    d_y = torch.linspace(-3, 3, len(x)).to(dtype)
    (slope,) = torch.autograd.grad(want, exact, d_y.double())
    # Where torch says NaN, at the infinities, the limits are meant.
    want = torch.where(exact == -math.inf, 0.0, want)
    slope = torch.where(exact.isinf(), d_y.double() * (exact > 0), slope)
    eps = max(torch.finfo(dtype).eps / 2, 8 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps)
    small = torch.finfo(dtype).smallest_normal  # what is below may be 0 or have few bits
    for function in (mish, reference.mish):
        x = x.detach().requires_grad_()
        got = function(x)
        (d_x,) = torch.autograd.grad(got, x, d_y)
        assert got.dtype == d_x.dtype == dtype
        torch.testing.assert_close(
            got.double(), want.detach(), rtol=eps, atol=max(small, 1e-35), equal_nan=True
        )
        # The slope is a sum of two parts of size 1, which cancel near its zero.
        torch.testing.assert_close(d_x.double(), slope, rtol=eps, atol=3 * eps, equal_nan=True)
    assert abs(float(mish(torch.tensor(-math.inf, dtype=dtype)))) < 1e-35
    assert not torch.signbit(mish(torch.tensor(0.0, dtype=dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layout_and_length(isa, dtype):
    whole = torch.randn(4, 3, 9, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    want = mish(whole)
    layouts = [
        whole.to(memory_format=torch.channels_last),
        whole.transpose(0, 3).contiguous().transpose(0, 3),
    ]
    layouts += [torch.stack([whole, whole], dim=-1)[..., 0], whole[:1].expand(4, -1, -1, -1)]
    for each, value in zip(layouts, [want, want, want, want[:1].expand(4, -1, -1, -1)], strict=True):
        assert torch.equal(mish(each), value)
        x = each.detach().requires_grad_()
        for d_y in (whole, whole.to(memory_format=torch.channels_last), whole[:1].expand(4, -1, -1, -1)):
            (got,) = torch.autograd.grad(mish(x), x, d_y)
            plain = each.detach().contiguous().requires_grad_()
            (same,) = torch.autograd.grad(mish(plain), plain, d_y.contiguous())
            assert torch.equal(got, same)
    assert mish(layouts[0]).is_contiguous(memory_format=torch.channels_last)
    flat = whole.flatten()
    for n in (*range(0, 35), 63, 64, 65):
        large = torch.full((n + 3,), math.nan, dtype=dtype)
        large[2 : n + 2] = flat[:n]
        assert torch.equal(mish(large[2 : n + 2]), want.flatten()[:n])
    assert mish(torch.zeros((), dtype=dtype)).shape == () and mish(whole[:, :0]).shape == (4, 0, 9, 7)


def test_many_threads_give_the_bits_of_one():
    x = torch.randn(300_001)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = mish(x)
        torch.set_num_threads(3)
        assert torch.equal(mish(x), one)
    finally:
        torch.set_num_threads(before)


def test_derivatives():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(mish, (x,), check_forward_ad=True)
    torch.autograd.gradcheck(reference.mish, (x,), check_forward_ad=True)
    torch.autograd.gradgradcheck(reference.mish, (x,))
    grad = torch.func.vmap(torch.func.grad(lambda v: mish(v).sum()))(x.detach())
    (want,) = torch.autograd.grad(mish(x).sum(), x, create_graph=True)
    assert torch.allclose(grad, want)
    with pytest.raises(RuntimeError, match=r"no second derivative; use ups_fast\.reference"):
        torch.autograd.grad(want.sum(), x)
    torch.library.opcheck(torch.ops.ups_fast.mish, (x,))
    torch.library.opcheck(torch.ops.ups_fast.mish_backward, (torch.randn_like(x), x.detach()))


@pytest.mark.slow
def test_compiled_is_near():
    x = torch.randn(6, 8, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    compiled = torch.compile(lambda x: (mish(x * 2) + 1).square().sum(dim=(1, 2, 3)), fullgraph=True)
    eager = (mish(x * 2) + 1).square().sum(dim=(1, 2, 3))
    assert torch.allclose(compiled(x), eager, rtol=1e-5)
    grads = [torch.autograd.grad(each.sum(), x)[0] for each in (compiled(x), eager)]
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("x", "sentence"),
    [
        ([1.0], "x must be a tensor [...], got list"),
        (torch.ones(4, dtype=torch.int64), "x must be floating-point [...], got int64 [4]"),
        (torch.ones(4, dtype=torch.complex64), "x must be floating-point [...], got complex64 [4]"),
        (torch.ones(4, 3).to_sparse(), "x must be a dense tensor"),
    ],
)
def test_bad_arguments_are_named(x, sentence):
    for function in (mish, reference.mish):
        with pytest.raises((TypeError, ValueError), match=re.escape(sentence)):
            function(x)


def test_the_op_itself_checks_its_gradient():
    with pytest.raises(RuntimeError, match="d_y must have the shape and dtype of x"):
        torch.ops.ups_fast.mish_backward(torch.ones(3), torch.ones(4))


def test_any_number_of_dimensions():
    x = torch.ones([1] * 200)
    assert mish(x).shape == x.shape and mish(x).sum() == mish(torch.ones(1)).sum()
