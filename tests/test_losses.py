"""nce_loss and ups_loss against the float64 oracle, the reference and finite differences, on every instruction set."""

from __future__ import annotations

import itertools
import math

import numpy as np
import oracle
import pytest
import torch
from torch.autograd import forward_ad

import ups_fast
from ups_fast import reference

REDUCTIONS = ("none", "mean", "sum", "batchmean")
C_HOSTILE = [1, 2, 3, 10, 31, 32, 33, 100, 257, 1000, 4097]
HALF = {torch.float16: 2**-11, torch.bfloat16: 2**-8}  # relative rounding of a stored gradient


def batch(n, c, *, dtype=torch.float32, seed=0, scale=4.0):
    g = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(n, c, generator=g)).to(dtype)
    target = torch.randint(0, c, (n,), generator=g)
    positive = torch.rand(n, generator=g) < 0.4
    negative = torch.rand(n, c, generator=g) < torch.rand(n, 1, generator=g)
    negative[::5] = False
    return logits, target, positive, negative


def value_and_grad(function, logits, *rest, **options):
    logits = logits.detach().clone().requires_grad_()
    loss = function(logits, *rest, **options)
    cotangent = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return loss.detach(), torch.autograd.grad(loss, logits, cotangent)[0]


def assert_as_good_as_reference(got, ref, exact, *, rounding=2**-24):
    """The largest error is at most twice the reference's own, or a few roundings of the largest value."""
    got, ref, exact = (x.double().numpy() for x in (got, ref, exact))
    error, allowed = np.abs(got - exact).max(initial=0), np.abs(ref - exact).max(initial=0)
    assert error <= 2 * allowed + 4 * rounding * max(1, np.abs(exact).max(initial=0)), (error, allowed)


@pytest.mark.parametrize(
    ("n", "c"),
    [
        pytest.param(n, c, marks=pytest.mark.slow if n * c > 100_000 else ())  # the oracle's loops
        for n in (0, 1, 7, 64)
        for c in C_HOSTILE
    ],
)
def test_against_oracle_and_reference(isa, n, c):
    logits, target, positive, negative = batch(n, c, seed=n + c)
    cases = [
        ("nce_loss", (negative,), {"reduction": r}, w)
        for r, w in (("mean", oracle.nce_loss), ("sum", None), ("none", oracle.nce_rows))
    ]
    cases.append(("ups_loss", (target, positive, negative), {}, oracle.ups_loss))
    for name, rest, options, want in cases:
        fused, ref = getattr(ups_fast, name), getattr(reference, name)
        loss, d_logits = value_and_grad(fused, logits, *rest, **options)
        loss_ref, d_ref = value_and_grad(ref, logits, *rest, **options)
        loss_64, d_64 = value_and_grad(ref, logits.double(), *rest, **options)
        assert loss.dtype == torch.float32 and d_logits.dtype == torch.float32
        assert_as_good_as_reference(loss, loss_ref, loss_64)
        assert_as_good_as_reference(d_logits, d_ref, d_64)
        if want is not None and n:
            np.testing.assert_allclose(
                loss_64.numpy(), want(logits.numpy(), *(x.numpy() for x in rest)), rtol=1e-9, atol=1e-9
            )


@pytest.mark.parametrize("c", [1, 10, 33, 100])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(isa, c, dtype):
    logits, target, positive, negative = batch(50, c, dtype=dtype)
    for name, rest in (("nce_loss", (negative,)), ("ups_loss", (target, positive, negative))):
        loss, d_logits = value_and_grad(getattr(ups_fast, name), logits, *rest)
        loss_64, d_64 = value_and_grad(getattr(reference, name), logits.double(), *rest)
        assert (
            loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            and d_logits.dtype == dtype
        )
        torch.testing.assert_close(
            loss.double(), loss_64, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=1e-12
        )
        torch.testing.assert_close(
            d_logits.double(), d_64, rtol=2 * HALF.get(dtype, 1e-12), atol=2e-7 if dtype in HALF else 1e-14
        )


@pytest.mark.parametrize("c", [1, 10, 32, 33, 100])
def test_packed_masks_are_the_same(isa, c):
    logits, target, positive, negative = batch(40, c)
    packed = reference.pack_mask(negative)
    for function, front in ((ups_fast.nce_loss, ()), (ups_fast.ups_loss, (target, positive))):
        plain, bits = (value_and_grad(function, logits, *front, m) for m in (negative, packed))
        assert torch.equal(plain[0], bits[0]) and torch.equal(plain[1], bits[1])


@pytest.mark.parametrize("c", [1, 3, 16, 17, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(isa, c, packed):
    logits, target, positive, negative = batch(9, c, dtype=torch.float64, scale=1.5)
    logits.requires_grad_()
    mask = reference.pack_mask(negative) if packed else negative
    for reduction in ("none", "mean", "sum"):
        assert torch.autograd.gradcheck(
            lambda z, r=reduction: ups_fast.nce_loss(z, mask, reduction=r), logits
        )
    assert torch.autograd.gradcheck(lambda z: ups_fast.ups_loss(z, target, positive, mask), logits)


def test_near_certain_rows_keep_their_digits(isa):
    """p = 1 - 1e-6 of a negative class: 1 - p in float32 has one digit, the kernel has all."""
    for c in (2, 10, 40):
        logits = torch.zeros(1, c)
        logits[0, 0] = math.log(1e6 * (c - 1))
        mask = torch.zeros(1, c, dtype=torch.bool)
        mask[0, 0] = True
        loss, d_logits = value_and_grad(ups_fast.nce_loss, logits, mask)
        exact, d_exact = value_and_grad(reference.nce_loss, logits.double(), mask)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
        torch.testing.assert_close(d_logits.double(), d_exact, rtol=2e-6, atol=1e-9)


def test_the_clamp_is_flat(isa):
    for c in (2, 10, 40):
        logits = torch.zeros(2, c)
        logits[:, 1] = 60
        mask = torch.zeros(2, c, dtype=torch.bool)
        mask[:, 1] = True
        loss, d_logits = value_and_grad(ups_fast.nce_loss, logits, mask)
        torch.testing.assert_close(loss.item(), -math.log(1e-7), rtol=1e-5, atol=0)
        assert (d_logits == 0).all()


def test_one_class_and_full_masks(isa):
    """C = 1 has p = 1: the clamp's value and no gradient. A mask of all classes is a legal mask."""
    loss, d_logits = value_and_grad(ups_fast.nce_loss, torch.randn(3, 1), torch.ones(3, 1, dtype=torch.bool))
    torch.testing.assert_close(loss.item(), -math.log(1e-7), rtol=1e-5, atol=0)
    assert (d_logits == 0).all()
    logits = torch.randn(5, 33)
    full = torch.ones(5, 33, dtype=torch.bool)
    np.testing.assert_allclose(
        ups_fast.nce_loss(logits, full).item(), oracle.nce_loss(logits.numpy(), full.numpy()), rtol=1e-5
    )


def test_empty_groups(isa):
    logits, target, positive, negative = batch(12, 10)
    none = torch.zeros(12, dtype=torch.bool)
    nothing = torch.zeros(12, 10, dtype=torch.bool)
    for pos, neg in ((none, nothing), (~none, negative), (none, negative), (positive, nothing)):
        loss, d_logits = value_and_grad(ups_fast.ups_loss, logits, target, pos, neg)
        want, d_want = value_and_grad(reference.ups_loss, logits, target, pos, neg)
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(d_logits, d_want)
    assert ups_fast.ups_loss(logits, target, none, nothing) == 0
    assert ups_fast.nce_loss(logits, nothing) == 0
    assert ups_fast.ups_loss(logits[:0], target[:0], none[:0], nothing[:0]) == 0
    torch.testing.assert_close(
        ups_fast.ups_loss(logits, target, ~none, negative), torch.nn.functional.cross_entropy(logits, target)
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_is_not_hidden(isa, bad):
    for c in (3, 40):
        logits, target, positive, negative = batch(10, c)
        positive[:] = torch.arange(10) < 5
        negative[:] = True
        for row in (2, 7):
            broken = logits.clone()
            broken[row, c - 1] = bad
            loss, d_logits = value_and_grad(ups_fast.ups_loss, broken, target, positive, negative)
            assert loss.isnan() and d_logits[row].isnan().any()
            assert d_logits[torch.arange(10) != row].isfinite().all()


def test_minus_infinity_is_a_closed_class(isa):
    """A class masked out by -inf has p = 0: PyTorch's cross_entropy allows it, so do these."""
    for c in (3, 40):
        logits, target, positive, negative = batch(10, c)
        logits[:, c - 1] = -math.inf
        target.clamp_(max=c - 2)
        loss, d_logits = value_and_grad(ups_fast.ups_loss, logits, target, positive, negative)
        want, _ = value_and_grad(reference.ups_loss, logits.double(), target, positive, negative)
        torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
        assert d_logits.isfinite().all() and (d_logits[:, c - 1].abs() < 1e-30).all()


def test_target_is_read_in_positive_rows_only(isa):
    logits, target, positive, negative = batch(30, 10)
    want = ups_fast.ups_loss(logits, target, positive, negative)
    free = torch.where(positive, target, -1)
    free[~positive] = torch.tensor([-1, 10, 2**62, -(2**62)])[torch.arange(int((~positive).sum())) % 4]
    for function in (ups_fast.ups_loss, reference.ups_loss):
        torch.testing.assert_close(function(logits, free, positive, negative), want)
        for bad in (-1, 10):
            wrong = target.clone()
            wrong[int(positive.nonzero()[1])] = bad
            with pytest.raises(
                (IndexError, RuntimeError),
                match=rf"target must lie in \[0, 10\) in positive rows, got {bad} in row",
            ):
                function(logits, wrong, positive, negative)


def test_strides_and_threads(isa):
    logits, target, positive, negative = batch(3000, 20)
    wide, mask = torch.randn(3000, 41), torch.zeros(3000, 45, dtype=torch.bool)
    wide[:, 3:23], mask[:, 5:25] = logits, negative
    want = value_and_grad(ups_fast.ups_loss, logits, target, positive, negative)
    every_second = torch.stack([target, target], dim=1)[:, 0]
    positive_2 = torch.stack([positive, positive], dim=1)[:, 1]
    for z in (wide[:, 3:23], logits.t().contiguous().t()):
        for m in (mask[:, 5:25], negative.t().contiguous().t()):
            got = value_and_grad(ups_fast.ups_loss, z, every_second, positive_2, m)
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = value_and_grad(ups_fast.ups_loss, logits, target, positive, negative)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone[0], want[0]) and torch.equal(alone[1], want[1])


def test_expanded_cotangent():
    logits, _, _, negative = batch(20, 10)
    z = logits.clone().requires_grad_()
    ups_fast.nce_loss(z, negative, reduction="none").sum().backward()  # a stride-0 gradient
    want = value_and_grad(reference.nce_loss, logits, negative, reduction="sum")[1]  # with a cotangent of 1/2
    torch.testing.assert_close(z.grad, 2 * want, rtol=1e-4, atol=1e-6)


def test_autocast():
    layer = torch.nn.Linear(8, 10)
    x, (_, target, positive, negative) = torch.randn(16, 8), batch(16, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = layer(x)
        assert logits.dtype == torch.bfloat16
        loss = ups_fast.ups_loss(logits, target, positive, negative)
    assert loss.dtype == torch.float32
    loss.backward()
    torch.testing.assert_close(
        loss, reference.ups_loss(logits.float(), target, positive, negative), rtol=1e-5, atol=0
    )
    assert layer.weight.grad.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_compiles_whole(packed):
    logits, target, positive, negative = batch(32, 10)
    mask = reference.pack_mask(negative) if packed else negative

    def step(z):
        return ups_fast.ups_loss(z * 2, target, positive, mask) + ups_fast.nce_loss(z, mask)

    eager = value_and_grad(step, logits)
    compiled = value_and_grad(torch.compile(step, fullgraph=True), logits)
    torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize(
    ("n", "c", "packed"),
    [
        (6, 10, True),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in ((6, 10, False), (0, 3, False), (0, 3, True), (5, 70, False), (5, 70, True))
        ),
    ],
)
def test_opcheck(n, c, packed):
    logits, target, positive, negative = batch(n, c)
    logits.requires_grad_()
    mask = reference.pack_mask(negative) if packed else negative
    ops = torch.ops.ups_fast
    for reduction in (0, 1, 2):
        torch.library.opcheck(ops.nce_loss.default, (logits, mask, reduction))
    torch.library.opcheck(ops.ups_loss.default, (logits, target, positive, mask))
    d = logits.detach()
    torch.library.opcheck(ops.nce_loss_backward.default, (torch.ones(()), d, mask, torch.tensor(0.5)))
    torch.library.opcheck(
        ops.ups_loss_backward.default, (torch.ones(()), d, target, positive, mask, torch.tensor([0.5, 0.2]))
    )


def test_second_derivative_is_refused():
    logits, _, _, negative = batch(4, 5)
    logits.requires_grad_()
    (d_logits,) = torch.autograd.grad(ups_fast.nce_loss(logits, negative), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        d_logits.sum().backward()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_forward_mode_and_torch_func_agree_with_the_reference(dtype, compiled):
    logits, target, positive, negative = batch(9, 5, dtype=dtype)
    tangent = batch(9, 5, dtype=dtype, seed=1)[0]

    def transforms(module):
        losses = [lambda z, r=r: module.nce_loss(z, negative, reduction=r) for r in ("none", "mean", "sum")]
        losses.append(lambda z: module.ups_loss(z, target, positive, negative))
        return lambda z, t: [
            *(torch.func.jvp(loss, (z,), (t,)) for loss in losses),
            *(torch.func.grad(loss)(z) for loss in losses[1:]),
        ]

    fused = torch.compile(transforms(ups_fast)) if compiled else transforms(ups_fast)
    want = transforms(reference)(logits.double(), tangent.double())
    step = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.02)
    torch.testing.assert_close(fused(logits, tangent), want, rtol=step, atol=step, check_dtype=False)


def test_gradients_of_each_sample():
    logits, target, positive, negative = batch(6, 5, dtype=torch.float64)
    args = logits.view(2, 3, 5), target.view(2, 3), positive.view(2, 3), negative.view(2, 3, 5)
    got = torch.func.vmap(torch.func.grad(ups_fast.ups_loss))(*args)
    one_by_one = [torch.func.grad(reference.ups_loss)(*parts) for parts in zip(*args, strict=True)]
    torch.testing.assert_close(got, torch.stack(one_by_one))


def test_dual_numbers():
    logits, target, positive, negative = batch(6, 5, dtype=torch.float64)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(logits, logits)
        for name, rest in (("nce_loss", (negative,)), ("ups_loss", (target, positive, negative))):
            got, want = (getattr(module, name)(dual, *rest) for module in (ups_fast, reference))
            torch.testing.assert_close(*(forward_ad.unpack_dual(loss).tangent for loss in (got, want)))


def test_second_derivative_is_refused_in_every_mode():
    logits, _, _, negative = batch(4, 5)

    def loss(z):
        return ups_fast.nce_loss(z, negative)

    def gradient(z):
        return torch.func.grad(loss)(z)

    for second in (
        lambda: torch.func.jacrev(gradient)(logits),
        lambda: torch.func.jvp(gradient, (logits,), (logits,)),
        lambda: torch.func.grad(lambda z: torch.func.jvp(loss, (z,), (z,))[1])(logits),
    ):
        with pytest.raises(RuntimeError, match="no second derivative"):
            second()


Z, M = torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.bool)
T, P = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.bool)
BAD = [
    ("nce_loss", (Z[0], M), {}, ValueError, r"logits must have shape \[N, C\], got \[4\]"),
    ("nce_loss", (Z.int(), M), {}, TypeError, "logits must be .* got int32"),
    ("nce_loss", (Z[:, :0], M), {}, ValueError, "at least one class"),
    ("nce_loss", (Z, M[:2]), {}, ValueError, r"mask must have 3 rows like logits, got \[2, 4\]"),
    (
        "nce_loss",
        (Z, M[:, :3]),
        {},
        ValueError,
        r"mask as bool must have 4 columns for 4 classes, got \[3, 3\]",
    ),
    ("nce_loss", (Z, M.int()), {}, ValueError, "mask as packed int32 must have 1 columns"),
    ("nce_loss", (Z, M.float()), {}, TypeError, "mask must be bool or int32, got float32"),
    (
        "nce_loss",
        (Z, M),
        {"reduction": "avg"},
        ValueError,
        "reduction must be 'mean', 'sum', 'batchmean' or 'none', got 'avg'",
    ),
    ("nce_loss", (Z, M.to("meta")), {}, ValueError, "mask must be on the logits' device cpu, got meta"),
    ("nce_loss", (Z.to_sparse(), M), {}, TypeError, "logits must be a dense tensor .* got layout sparse_coo"),
    ("nce_loss", (Z, M.to_sparse()), {}, TypeError, "mask must be a dense tensor .* got layout sparse_coo"),
    ("ups_loss", (Z, T.to_sparse(), P, M), {}, TypeError, "target must be a dense tensor .* got layout"),
    ("ups_loss", (Z, T.int(), P, M), {}, TypeError, "target must be int64, got int32"),
    ("ups_loss", (Z, T[:2], P, M), {}, ValueError, "target must have 3 rows"),
    ("ups_loss", (Z, T, P.float(), M), {}, TypeError, "positive must be bool, got float32"),
    ("ups_loss", (Z, T, P[:, None], M), {}, ValueError, r"positive must have shape \[B\], got \[3, 1\]"),
    ("ups_loss", (Z, T, P, [M]), {}, TypeError, "negative must be a tensor .* got list"),
    ("ups_loss", (Z, None, P, M), {}, TypeError, r"target must be a tensor int64 \[B\] or .* got NoneType"),
    ("ups_loss", (Z, Z[0], P), {}, ValueError, r"target must have shape \[B, C\], got \[4\]"),
    ("ups_loss", (Z, Z[:, 1:], P), {}, ValueError, r"target must have 4 classes like logits, got \[3, 3\]"),
    ("ups_loss", (Z, Z[1:], P), {}, ValueError, r"target must have 3 rows like logits, got \[2, 4\]"),
    (
        "ups_loss",
        (Z, M, P),
        {},
        TypeError,
        r"target must be int64 \[B\] or floating-point \[B, C\], got bool \[3, 4\]",
    ),
    (
        "ups_loss",
        (Z, Z.clone().requires_grad_(), P),
        {},
        ValueError,
        r"target must not require .* target.detach\(\)",
    ),
    ("ups_loss", (Z, T, P), {"reduction": None}, ValueError, "reduction must be .* got None"),
    ("ups_loss", (Z, T, P), {"weight": P}, TypeError, "weight must be float16 or .* got bool"),
    ("ups_loss", (Z, T, P), {"weight": 2.0}, TypeError, r"weight must be a tensor \[B\], got float"),
    ("ups_loss", (Z, T, P), {"weight": Z[:2, 0]}, ValueError, "weight must have 3 rows"),
    ("ups_loss", (Z, T, P), {"weight": Z}, ValueError, r"weight must have shape \[B\], got \[3, 4\]"),
    (
        "ups_loss",
        (Z, T, P),
        {"weight": Z[:, 0].to("meta")},
        ValueError,
        "weight must be on the logits' device",
    ),
    ("nce_loss", (Z, M), {"weight": Z[:, 0].clone().requires_grad_()}, ValueError, "weight must not require"),
    (
        "ups_loss",
        (Z, T, P),
        {"label_smoothing": 1.5},
        ValueError,
        r"label_smoothing must lie in \[0.0, 1.0\], got 1.5",
    ),
    ("ups_loss", (Z, T, P), {"label_smoothing": math.nan}, ValueError, "label_smoothing must lie in"),
    (
        "ups_loss",
        (Z, T, P),
        {"label_smoothing": "0.1"},
        TypeError,
        "label_smoothing must be a number, got str",
    ),
]


@pytest.mark.parametrize("name, arguments, options, error, sentence", BAD)
def test_bad_arguments(name, arguments, options, error, sentence):
    for module in (ups_fast, reference):
        with pytest.raises(error, match=sentence):
            getattr(module, name)(*arguments, **options)


def test_direct_calls_of_the_op_are_guarded():
    ops = torch.ops.ups_fast
    with pytest.raises(RuntimeError, match="mask must have size 4 in dimension 1, got 3"):
        ops.nce_loss(Z, M[:, :3], 1)
    with pytest.raises(RuntimeError, match="target must be int64"):
        ops.ups_loss(Z, T.int(), P, M)
    with pytest.raises(RuntimeError, match="logits must have 3 dimensions, got 2"):
        ops.mc_select(Z, 0.7, 0.05, 0.05, 0.005, 2.0, False)


# Reductions, weights, soft targets, smoothing ------------------------------------------------------------------------


def test_every_option_against_the_reference(isa):
    for n, c in ((7, 3), (33, 10), (20, 40), (1, 1)):
        logits, target, positive, negative = batch(n, c, seed=n)
        g = torch.Generator().manual_seed(c)
        weight = 3 * torch.rand(n, generator=g)
        weight[::4] = 0
        soft = torch.randn(n, c + 3, generator=g).softmax(dim=-1)[
            :, 2 : c + 2
        ]  # a slice whose rows do not sum to 1
        for y, mask, w, smoothing in itertools.product(
            (target, soft), (None, negative), (None, weight), (0.0, 0.1)
        ):
            for reduction in REDUCTIONS:
                options = {"reduction": reduction, "weight": w, "label_smoothing": smoothing}
                rest = y, positive, mask
                got = value_and_grad(ups_fast.ups_loss, logits, *rest, **options)
                ref = value_and_grad(reference.ups_loss, logits, *rest, **options)
                exact = value_and_grad(reference.ups_loss, logits.double(), *rest, **options)
                assert got[0].dtype == torch.float32 and got[0].shape == ((n,) if reduction == "none" else ())
                for each in zip(got, ref, exact, strict=True):
                    assert_as_good_as_reference(*each)
        for reduction in REDUCTIONS:
            options = {"reduction": reduction, "weight": weight}
            got, ref, exact = (
                value_and_grad(f, z, negative, **options)
                for f, z in (
                    (ups_fast.nce_loss, logits),
                    (reference.nce_loss, logits),
                    (reference.nce_loss, logits.double()),
                )
            )
            for each in zip(got, ref, exact, strict=True):
                assert_as_good_as_reference(*each)


@pytest.mark.parametrize("module", [ups_fast, reference])
def test_positive_rows_have_torchs_cross_entropy(module):
    logits, target, _, negative = batch(20, 7, dtype=torch.float64)
    all_rows = torch.ones(20, dtype=torch.bool)
    soft = logits.flip(0).softmax(dim=-1)
    for y, smoothing in itertools.product((target, soft), (0.0, 0.1, 1.0)):
        for reduction in ("mean", "sum", "none"):
            options = {"reduction": reduction, "label_smoothing": smoothing}
            want = torch.nn.functional.cross_entropy(logits, y, **options)
            torch.testing.assert_close(module.ups_loss(logits, y, all_rows, negative, **options), want)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):  # of the targets, whatever the logits have
        want = module.ups_loss(logits, soft.to(dtype).double(), all_rows)
        torch.testing.assert_close(module.ups_loss(logits, soft.to(dtype), all_rows), want)


@pytest.mark.parametrize("module", [ups_fast, reference])
def test_reductions_are_what_the_formulas_say(module):
    logits, target, positive, negative = batch(30, 10, dtype=torch.float64)
    weight = torch.rand(30, dtype=torch.float64)
    rows = target, positive, negative
    each = module.ups_loss(logits, *rows, reduction="none")
    active = negative.any(dim=1) & ~positive
    assert (each[~(positive | active)] == 0).all() and (each[positive | active] != 0).all()
    total = each.sum()
    torch.testing.assert_close(module.ups_loss(logits, *rows, reduction="sum"), total)
    torch.testing.assert_close(module.ups_loss(logits, *rows, reduction="batchmean"), total / 30)
    torch.testing.assert_close(module.ups_loss(logits, *rows), each[positive].mean() + each[active].mean())
    weighted = module.ups_loss(logits, *rows, reduction="none", weight=weight)
    torch.testing.assert_close(weighted, weight * each)
    mean = sum((weight * each)[group].sum() / weight[group].sum() for group in (positive, active))
    torch.testing.assert_close(module.ups_loss(logits, *rows, weight=weight), mean)
    torch.testing.assert_close(
        module.ups_loss(logits, *rows, weight=torch.full((30,), 7.0)), module.ups_loss(logits, *rows)
    )
    torch.testing.assert_close(
        module.ups_loss(logits, target, positive),
        module.ups_loss(logits, *rows[:2], torch.zeros_like(negative)),
    )
    nce = module.nce_loss(logits, negative, reduction="none", weight=weight)
    assert module.nce_loss(logits, negative, reduction="batchmean", weight=weight) == pytest.approx(
        nce.sum().item() / 30
    )
    assert module.nce_loss(logits, negative, weight=0 * weight) == 0
    for reduction in REDUCTIONS:
        nothing = module.ups_loss(logits[:0], target[:0], positive[:0], reduction=reduction)
        assert nothing.sum() == 0 and nothing.shape == ((0,) if reduction == "none" else ())


@pytest.mark.parametrize("module", [ups_fast, reference])
def test_ranks_that_sum_are_exact(module):
    """Two ranks, of unequal numbers of positives and negatives, divide by counts of both."""
    logits, *rows = batch(24, 6, dtype=torch.float64)
    want, d_want = value_and_grad(module.ups_loss, logits, *rows)
    _, positive, negative = rows
    counts = positive.sum(), (negative.any(dim=1) & ~positive).sum()
    weight = torch.where(positive, 1 / counts[0], 1 / counts[1])
    loss, d_logits = 0, []
    for rank in (slice(0, 5), slice(5, 24)):
        part = [x[rank] for x in rows]
        one, d_one = value_and_grad(
            module.ups_loss, logits[rank], *part, reduction="sum", weight=weight[rank]
        )
        loss, d_logits = loss + one, [*d_logits, d_one]
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.cat(d_logits), d_want)


def test_a_row_of_weight_0_counts_for_nothing(isa):
    logits, target, positive, negative = batch(12, 10)
    weight = torch.ones(12)
    weight[[1, 4]] = 0
    logits[[1, 4]], positive[1], target[1], positive[4], negative[4] = math.nan, True, 99, False, True
    kept = weight != 0
    for function, smoothing in itertools.product((ups_fast.ups_loss, reference.ups_loss), (0.0, 0.2)):
        loss, d_logits = value_and_grad(
            function, logits, target, positive, negative, weight=weight, label_smoothing=smoothing
        )
        alone = function(
            logits[kept], target[kept], positive[kept], negative[kept], label_smoothing=smoothing
        )
        torch.testing.assert_close(loss, alone)
        assert (d_logits[~kept] == 0).all() and d_logits.isfinite().all()


def test_near_certain_soft_rows_keep_their_digits(isa):
    """p = 1 - 1e-6 where the target says 1: the gradient is -1e-6, not a difference of numbers near 1."""
    for c in (2, 10, 40):
        logits, soft = torch.zeros(1, c), torch.zeros(1, c)
        logits[0, 0], soft[0, 0] = math.log(1e6 * (c - 1)), 1
        every = torch.ones(1, dtype=torch.bool)
        loss, d_logits = value_and_grad(ups_fast.ups_loss, logits, soft, every)
        exact, d_exact = value_and_grad(reference.ups_loss, logits.double(), soft.double(), every)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
        torch.testing.assert_close(d_logits.double(), d_exact, rtol=2e-6, atol=0)
        as_class = value_and_grad(ups_fast.ups_loss, logits, torch.zeros(1, dtype=torch.int64), every)
        torch.testing.assert_close((loss, d_logits), as_class)


def test_a_closed_class_without_target_costs_nothing(isa):
    for c in (3, 40):
        logits, soft = batch(6, c)[0], torch.rand(6, c)
        logits[:, 1], soft[:, 1] = -math.inf, 0
        every = torch.ones(6, dtype=torch.bool)
        for function in (ups_fast.ups_loss, reference.ups_loss):
            loss, d_logits = value_and_grad(function, logits, soft, every)
            assert loss.isfinite() and d_logits.isfinite().all()
            assert function(logits, soft, every, label_smoothing=0.1) == math.inf  # as torch's


def test_gradients_of_every_option():
    logits, target, positive, negative = batch(9, 5, dtype=torch.float64, scale=1.5)
    logits.requires_grad_()
    weight, soft = torch.rand(9, dtype=torch.float64), torch.rand(9, 5, dtype=torch.float64)
    for y, reduction in itertools.product((target, soft), REDUCTIONS):
        options = {"reduction": reduction, "weight": weight, "label_smoothing": 0.1}
        assert torch.autograd.gradcheck(
            lambda z, y=y, o=options: ups_fast.ups_loss(z, y, positive, negative, **o),
            logits,
            check_forward_ad=True,
        )
    assert torch.autograd.gradcheck(lambda z: ups_fast.nce_loss(z, negative, weight=weight), logits)


def test_every_option_compiles_whole_and_passes_opcheck():
    logits, target, positive, negative = batch(12, 10)
    weight, soft = torch.rand(12), torch.rand(12, 10)

    def step(z):
        loss = ups_fast.ups_loss(
            z, soft, positive, weight=weight, label_smoothing=0.1, reduction="none"
        ).sum()
        return loss + ups_fast.nce_loss(z, negative, weight=weight, reduction="batchmean")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_grad(compiled, logits), value_and_grad(step, logits))
    ops, z = torch.ops.ups_fast, logits.clone().requires_grad_()
    torch.library.opcheck(ops.ups_loss.default, (z, soft, positive, None, 0, weight, 0.1))
    torch.library.opcheck(ops.ups_loss.default, (z, target, positive, None, 3))
    torch.library.opcheck(ops.nce_loss.default, (z, negative, 3, weight))
    torch.library.opcheck(
        ops.ups_loss_backward.default,
        (torch.ones(12), logits, soft, positive, None, torch.ones(2), weight, 0.1),
    )


def test_targets_and_weights_are_constants():
    """A gradient that would silently be 0 is an error, by the public function and by the raw op, in every mode."""
    logits, _, positive, _ = batch(6, 5)
    soft, weight = torch.rand(6, 5), torch.rand(6)

    def loss(z, t, w):
        return ups_fast.ups_loss(z, t, positive, weight=w)

    for wrong in ((soft.clone().requires_grad_(), weight), (soft, weight.clone().requires_grad_())):
        with pytest.raises(ValueError, match="must not require a gradient"):
            loss(logits, *wrong)
        with torch.no_grad():
            assert loss(logits, *wrong) == loss(logits, soft, weight)
        raw, _ = torch.ops.ups_fast.ups_loss(
            logits.clone().requires_grad_(), wrong[0], positive, None, 1, wrong[1]
        )
        with pytest.raises(RuntimeError, match="detach target and weight"):
            raw.backward()
    for argument in (1, 2):
        with pytest.raises((ValueError, RuntimeError), match=r"must not require|detach target"):
            torch.func.grad(loss, argnums=argument)(logits, soft, weight)
    with pytest.raises(RuntimeError, match="detach target and weight"):
        torch.func.jvp(
            lambda w: torch.ops.ups_fast.ups_loss(logits, soft, positive, None, 1, w)[0], (weight,), (weight,)
        )


def test_gradients_of_each_sample_with_every_option():
    logits, _, positive, _ = batch(6, 5, dtype=torch.float64)
    soft, weight = torch.rand(6, 5, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    args = logits.view(2, 3, 5), soft.view(2, 3, 5), positive.view(2, 3), weight.view(2, 3)

    def of(module):
        return lambda z, t, p, w: module.ups_loss(z, t, p, weight=w, reduction="sum", label_smoothing=0.1)

    got = torch.func.vmap(torch.func.grad(of(ups_fast)))(*args)
    one_by_one = [torch.func.grad(of(reference))(*parts) for parts in zip(*args, strict=True)]
    torch.testing.assert_close(got, torch.stack(one_by_one))


def test_compiled_autograd():
    """All ops that have a derivative, in one graph whose backward pass is compiled too."""
    logits, _, positive, negative = batch(8, 5)
    keys = ups_fast.dropout_keys(torch.arange(8), seed=1, draw=0)

    def gradient():
        z = logits.clone().requires_grad_()
        y = ups_fast.counter_dropout(ups_fast.mish(z), keys, p=0.3)
        found = ups_fast.mc_select(y[None])
        loss = ups_fast.ups_loss(y, found.label, positive, negative, weight=torch.ones(8))
        return z, loss + ups_fast.nce_loss(y, negative)

    z, loss = gradient()
    loss.backward()
    again, loss = gradient()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        loss.backward()
    torch.testing.assert_close(again.grad, z.grad)


def test_modules_are_the_functions():
    logits, target, positive, negative = batch(8, 5)
    weight = torch.rand(8)
    loss = ups_fast.UPSLoss(reduction="sum", label_smoothing=0.1)
    assert repr(loss) == "UPSLoss(reduction='sum', label_smoothing=0.1)" and not list(loss.parameters())
    want = ups_fast.ups_loss(
        logits, target, positive, negative, weight=weight, reduction="sum", label_smoothing=0.1
    )
    assert loss(logits, target, positive, negative, weight=weight) == want
    assert ups_fast.UPSLoss()(logits, target, positive) == ups_fast.ups_loss(logits, target, positive)
    assert repr(ups_fast.NCELoss("none")) == "NCELoss(reduction='none')"
    torch.testing.assert_close(
        ups_fast.NCELoss("none")(logits, negative, weight=weight),
        ups_fast.nce_loss(logits, negative, reduction="none", weight=weight),
    )
    for wrong in ({"reduction": "avg"}, {"label_smoothing": -0.1}):
        with pytest.raises(ValueError, match="must"):
            ups_fast.UPSLoss(**wrong)
    with pytest.raises(ValueError, match="reduction must be"):
        ups_fast.NCELoss(reduction="avg")


@pytest.mark.parametrize("c", [1, 31, 32, 33, 100])
def test_masks_packed_and_back(c):
    mask = torch.rand(9, c) < 0.5
    packed = ups_fast.pack_mask(mask)
    assert packed.dtype == torch.int32 and packed.shape == (9, (c + 31) // 32)
    assert torch.equal(ups_fast.unpack_mask(packed, c), mask)
    assert torch.equal(ups_fast.unpack_mask(packed, n_classes=c), mask)


@pytest.mark.parametrize(
    ("function", "arguments", "error", "sentence"),
    [
        (ups_fast.pack_mask, (Z,), TypeError, "mask must be bool, got float32"),
        (ups_fast.pack_mask, (M[0],), ValueError, r"mask must have shape \[N, C\], got \[4\]"),
        (ups_fast.pack_mask, ([[True]],), TypeError, r"mask must be a tensor \[N, C\], got list"),
        (ups_fast.unpack_mask, (M, 4), TypeError, "packed must be int32, got bool"),
        (ups_fast.unpack_mask, (M.int()[:, :1], 33), ValueError, "packed must have 2 columns for 33 classes"),
        (ups_fast.unpack_mask, (M.int()[:, :1], 0), ValueError, "packed must have 0 columns for 0 classes"),
        (ups_fast.unpack_mask, (M.int()[:, :1], -4), ValueError, "n_classes must be at least 0, got -4"),
        (ups_fast.unpack_mask, (M.int()[:, :1], 4.0), TypeError, "n_classes must be an integer, got 4.0"),
        (ups_fast.unpack_mask, (M.int()[:, :1], True), TypeError, "n_classes must be an integer, got True"),
    ],
)
def test_bad_masks(function, arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        function(*arguments)


@pytest.mark.parametrize("d_loss", [torch.ones(2), torch.ones(1), torch.ones(4, 1), torch.ones(4).double()])
def test_the_gradient_of_other_rows_is_refused_and_not_read(d_loss):
    z, mask, target, positive = (
        torch.zeros(4, 3),
        torch.ones(4, 3) > 0,
        torch.zeros(4).long(),
        torch.ones(4) > 0,
    )
    ops = torch.ops.ups_fast
    with pytest.raises(RuntimeError, match="d_loss must"):
        ops.nce_loss_backward(d_loss, z, mask, torch.ones(()))
    with pytest.raises(RuntimeError, match="d_loss must"):
        ops.ups_loss_backward(d_loss, z, target, positive, None, torch.ones(2))
    with pytest.raises(RuntimeError, match="scale must have 2 elements"):
        ops.ups_loss_backward(torch.ones(4), z, target, positive, None, torch.ones(()))
