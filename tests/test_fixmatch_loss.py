"""fixmatch_loss against its reference, its formulas and finite differences, on every instruction set."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from test_losses import C_HOSTILE, HALF, assert_as_good_as_reference, value_and_grad
from torch.autograd import forward_ad

import ups_fast
from ups_fast import reference

REDUCTIONS = ("none", "mean", "sum", "batchmean")
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
BOTH = [ups_fast, reference]


def views(n, c, *, dtype=torch.float32, seed=0):
    """Logits of both views: rows from undecided to nearly certain."""
    g = torch.Generator().manual_seed(seed)
    strong = 3 * torch.randn(n, c, generator=g)
    weak = torch.randn(n, c, generator=g) * torch.tensor([0.1, 1.0, 12.0])[torch.arange(n) % 3, None]
    return strong.to(dtype), weak.to(dtype)


def options(n, c, seed=0):
    g = torch.Generator().manual_seed(seed)
    weight = 3 * torch.rand(n, generator=g)
    weight[::4] = 0
    taus = (0.95, 0.0, 0.5 + torch.rand(c, generator=g) / 2)
    for tau, temperature, w in itertools.product(taus, (1.0, 0.5), (None, weight)):
        yield {"tau": tau, "temperature": temperature, "weight": w}


@pytest.mark.parametrize("c", C_HOSTILE)
@pytest.mark.parametrize("n", [0, 1, 7, 64])
def test_against_the_reference(isa, n, c):
    strong, weak = views(n, c, seed=n + c)
    for i, each in enumerate(options(n, c)):
        each["reduction"] = REDUCTIONS[i % 4]
        got = value_and_grad(ups_fast.fixmatch_loss, strong, weak, **each)
        ref = value_and_grad(reference.fixmatch_loss, strong, weak, **each)
        exact = value_and_grad(reference.fixmatch_loss, strong.double(), weak.double(), **each)
        assert got[0].dtype == got[1].dtype == torch.float32
        for triple in zip(got, ref, exact, strict=True):
            assert_as_good_as_reference(*triple)
        masks = [m.fixmatch_loss(strong, weak, **each, return_mask=True)[1] for m in BOTH]
        assert torch.equal(*masks) and masks[0].dtype == torch.bool and masks[0].shape == (n,)


@pytest.mark.parametrize("c", [1, 10, 33, 100])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(isa, c, dtype):
    strong, weak = views(50, c, dtype=dtype)
    for each in options(50, c):
        loss, d_strong = value_and_grad(ups_fast.fixmatch_loss, strong, weak, **each)
        loss_64, d_64 = value_and_grad(reference.fixmatch_loss, strong.double(), weak.double(), **each)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert d_strong.dtype == dtype
        digits = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(loss.double(), loss_64, rtol=digits, atol=1e-12)
        atol = 2e-7 if dtype in HALF else 1e-14
        torch.testing.assert_close(d_strong.double(), d_64, rtol=2 * HALF.get(dtype, 1e-12), atol=atol)


@pytest.mark.parametrize("module", BOTH)
def test_the_formulas(module):
    strong, weak = views(30, 10, dtype=torch.float64)
    weight = torch.rand(30, dtype=torch.float64)
    q = (weak / 0.5).softmax(dim=1)
    label = q.argmax(dim=1)
    ce = torch.nn.functional.cross_entropy(strong, label, reduction="none")
    of_class = torch.linspace(0.2, 1, 10)
    for tau, threshold in ((0.8, 0.8), (of_class, of_class.double()[label])):
        masked = q.amax(dim=1) >= threshold
        assert masked.any() and not masked.all()
        for w, weights in ((weight, weight), (None, torch.ones(30).double())):
            kwargs = {"tau": tau, "temperature": 0.5, "weight": w}
            each, mask = module.fixmatch_loss(strong, weak, **kwargs, reduction="none", return_mask=True)
            assert torch.equal(mask, masked)
            rows = torch.where(masked, weights * ce, 0)
            torch.testing.assert_close(each, rows)
            torch.testing.assert_close(module.fixmatch_loss(strong, weak, **kwargs), rows.sum() / 30)
            total = module.fixmatch_loss(strong, weak, **kwargs, reduction="sum")
            torch.testing.assert_close(total, rows.sum())
            mean = module.fixmatch_loss(strong, weak, **kwargs, reduction="mean")
            torch.testing.assert_close(mean, rows.sum() / weights[masked].sum())
    for reduction in REDUCTIONS:
        nothing, mask = module.fixmatch_loss(
            strong[:0], weak[:0], reduction=reduction, tau=of_class, return_mask=True
        )
        assert nothing.shape == ((0,) if reduction == "none" else ()) and nothing.sum() == 0
        assert mask.shape == (0,)
        assert module.fixmatch_loss(strong, 0 * weak, reduction=reduction).sum() == 0


@pytest.mark.parametrize("module", BOTH)
def test_it_is_ups_loss_of_confident_rows(module):
    strong, weak = views(40, 10)
    confidence, label = weak.softmax(dim=1).max(dim=1)
    for reduction in REDUCTIONS:
        got = value_and_grad(module.fixmatch_loss, strong, weak, tau=0.9, reduction=reduction)
        want = value_and_grad(module.ups_loss, strong, label, confidence >= 0.9, reduction=reduction)
        torch.testing.assert_close(got, want)


def test_ties_and_thresholds(isa):
    """The lowest class of a tie; a confidence equal to tau is enough; a threshold that is NaN is never reached."""
    for c in (2, 10, 33, 100):
        for dtype in DTYPES:
            strong, weak = torch.randn(20, c).to(dtype), torch.zeros(20, c, dtype=dtype)
            weak[:, c - 1] = weak[:, 0] = 60
            for module in BOTH:
                loss, mask = module.fixmatch_loss(strong, weak, tau=0.5, reduction="none", return_mask=True)
                assert mask.all()
                want = torch.nn.functional.cross_entropy(
                    strong.double(), torch.zeros(20).long(), reduction="none"
                )
                torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
                of_class = torch.full((c,), math.nan)
                assert not module.fixmatch_loss(strong, weak, tau=of_class, return_mask=True)[1].any()
                of_class[0] = 0.5
                assert module.fixmatch_loss(strong, weak, tau=of_class, return_mask=True)[1].all()


def test_rows_that_are_not_finite(isa):
    for c in (3, 16, 40):
        strong, weak = views(10, c)
        weak[:, 1] = 60  # all rows are confident
        for bad in (math.nan, math.inf, -math.inf):
            broken = weak.clone()
            broken[2, c - 1], broken[5, 0], broken[9] = bad, bad, bad
            hidden = strong.clone()
            hidden[[2, 5, 9]] = math.nan  # nobody looks
            for module in BOTH:
                kwargs = {"reduction": "none", "tau": 0.0}
                mask = module.fixmatch_loss(hidden, broken, **kwargs, return_mask=True)[1]
                assert mask.tolist() == [i not in (2, 5, 9) for i in range(10)]
                loss, d_strong = value_and_grad(module.fixmatch_loss, hidden, broken, **kwargs)
                assert (loss[~mask] == 0).all() and (d_strong[~mask] == 0).all()
                assert loss.isfinite().all() and d_strong.isfinite().all()
                again = module.fixmatch_loss(strong, broken, **kwargs)
                assert torch.equal(loss, again)
        for bad in (math.nan, math.inf):
            broken = strong.clone()
            broken[3, 0] = bad
            for module in BOTH:
                loss, d_strong = value_and_grad(module.fixmatch_loss, broken, weak, reduction="none")
                assert loss.isfinite().tolist() == [i != 3 for i in range(10)]
                assert d_strong.isfinite().all(dim=1).tolist() == [i != 3 for i in range(10)]
        closed = strong.clone()
        closed[:, 0] = -math.inf
        loss, d_strong = value_and_grad(ups_fast.fixmatch_loss, closed, weak)
        want, _ = value_and_grad(reference.fixmatch_loss, closed.double(), weak.double())
        torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
        assert d_strong.isfinite().all() and (d_strong[:, 0].abs() < 1e-30).all()


@pytest.mark.parametrize("module", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_weak_logits_by_a_low_temperature(module, dtype):
    """Their quotient is larger than any float."""
    weak = torch.zeros(4, 3, dtype=dtype)
    weak[:, 1], weak[:2, 0] = torch.finfo(dtype).max, torch.finfo(dtype).min
    loss, mask = module.fixmatch_loss(torch.zeros_like(weak), weak, temperature=0.001, return_mask=True)
    assert mask.all() and loss.item() == pytest.approx(math.log(3))


def test_a_row_of_weight_0_counts_for_nothing(isa):
    strong, weak = views(12, 10)
    weak[:, 1] = 60
    weight = torch.ones(12)
    weight[[1, 4]] = 0
    strong[[1, 4]] = math.nan
    kept = weight != 0
    for module in BOTH:
        loss, d_strong = value_and_grad(module.fixmatch_loss, strong, weak, weight=weight, reduction="mean")
        torch.testing.assert_close(loss, module.fixmatch_loss(strong[kept], weak[kept], reduction="mean"))
        assert (d_strong[~kept] == 0).all() and d_strong.isfinite().all()
        assert module.fixmatch_loss(strong, weak, weight=weight, return_mask=True)[1].all()


def test_nearly_certain_rows_keep_their_digits(isa):
    for c in (2, 10, 40):
        strong = torch.zeros(1, c)
        strong[0, 0] = math.log(1e6 * (c - 1))
        got = value_and_grad(ups_fast.fixmatch_loss, strong, strong)
        exact = value_and_grad(reference.fixmatch_loss, strong.double(), strong.double())
        for a, b in zip(got, exact, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=0)


def test_strides_and_threads(isa):
    strong, weak = views(3000, 20)
    weight, tau = torch.rand(3000), torch.rand(20)
    kwargs = {"weight": weight, "tau": tau}
    want = value_and_grad(ups_fast.fixmatch_loss, strong, weak, **kwargs)
    wide = torch.full((3000, 47), math.nan)
    wide[:, 3:23], wide[:, 25:45] = strong, weak
    for s, w in (
        (wide[:, 3:23], wide[:, 25:45]),
        (strong.t().contiguous().t(), weak.t().contiguous().t()),
    ):
        got = value_and_grad(ups_fast.fixmatch_loss, s, w, **kwargs)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    spaced = {"weight": torch.stack([weight, weight], dim=1)[:, 0], "tau": torch.stack([tau, tau], 1)[:, 1]}
    assert ups_fast.fixmatch_loss(strong, weak, **spaced) == want[0]
    constant = torch.tensor(0.95).expand(20)  # a stride of 0
    assert ups_fast.fixmatch_loss(strong, weak, tau=constant) == ups_fast.fixmatch_loss(strong, weak)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = value_and_grad(ups_fast.fixmatch_loss, strong, weak, **kwargs)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone[0], want[0]) and torch.equal(alone[1], want[1])


@pytest.mark.slow
def test_gradcheck(isa):
    for c in (1, 3, 16, 17, 40):
        strong, weak = views(9, c, dtype=torch.float64)
        strong.requires_grad_()
        weight = torch.rand(9, dtype=torch.float64)
        for reduction in REDUCTIONS:
            kwargs = {"reduction": reduction, "weight": weight, "tau": 0.3}
            assert torch.autograd.gradcheck(
                lambda z, w=weak, k=kwargs: ups_fast.fixmatch_loss(z, w, **k), strong, check_forward_ad=True
            )


def test_weak_is_a_constant_and_so_are_tau_and_weight():
    strong, weak = views(6, 5)
    strong.requires_grad_()
    weak.requires_grad_()
    for module in BOTH:
        loss, mask = module.fixmatch_loss(strong, weak, return_mask=True)
        assert not mask.requires_grad
        assert torch.autograd.grad(loss, weak, allow_unused=True) == (None,)
        for name, size in (("tau", 5), ("weight", 6)):
            wrong = torch.rand(size, requires_grad=True)
            with pytest.raises(ValueError, match=f"{name} must not require a gradient"):
                module.fixmatch_loss(strong, weak, **{name: wrong})
    raw = torch.ops.ups_fast.fixmatch_loss(strong, weak, None, 0.95, 1.0, 3)[0]
    with pytest.raises(RuntimeError, match="detach"):
        raw.backward()


@pytest.mark.slow
def test_opcheck():
    ops = torch.ops.ups_fast
    for n, c in ((6, 10), (0, 3), (20, 70)):
        strong, weak = views(n, c)
        weight, tau = torch.rand(n), torch.rand(c)
        z = strong.clone().requires_grad_()
        for reduction in range(4):
            torch.library.opcheck(ops.fixmatch_loss.default, (z, weak, None, 0.8, 1.0, reduction))
        torch.library.opcheck(ops.fixmatch_loss.default, (z, weak, tau, 1.0, 0.5, 1, weight))
        target, scale = torch.randint(-1, c, (n,)), torch.tensor(0.5)
        torch.library.opcheck(
            ops.fixmatch_loss_backward.default, (torch.ones(n), strong, target, scale, weight)
        )
        torch.library.opcheck(ops.fixmatch_loss_backward.default, (torch.ones(()), strong, target, scale))


def test_second_derivatives_are_refused():
    strong, weak = views(6, 5)
    weak[:, 0] = 60
    z = strong.clone().requires_grad_()
    (d_strong,) = torch.autograd.grad(ups_fast.fixmatch_loss(z, weak), z, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        d_strong.sum().backward()

    def gradient(x):
        return torch.func.grad(ups_fast.fixmatch_loss)(x, weak)

    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.func.jvp(gradient, (strong,), (strong,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no second derivative"):
        dual = forward_ad.make_dual(z, strong)
        torch.autograd.grad(ups_fast.fixmatch_loss(dual, weak), dual)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_forward_mode_and_torch_func(dtype):
    strong, weak = views(9, 5, dtype=dtype)
    tangent = views(9, 5, dtype=dtype, seed=1)[0]

    def transforms(module, *args):
        def loss(z, reduction="batchmean"):
            return module.fixmatch_loss(z, args[1], tau=0.5, reduction=reduction)

        found = [torch.func.jvp(lambda z, r=r: loss(z, r), args[:1], args[2:]) for r in REDUCTIONS]
        return [*found, torch.func.grad(loss)(args[0])]

    want = transforms(reference, strong.double(), weak.double(), tangent.double())
    step = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.02)
    got = transforms(ups_fast, strong, weak, tangent)
    torch.testing.assert_close(got, want, rtol=step, atol=step, check_dtype=False)


def test_gradients_of_each_sample():
    strong, weak = views(6, 5, dtype=torch.float64)
    args = strong.view(2, 3, 5), weak.view(2, 3, 5)

    def of(module):
        return lambda s, w: module.fixmatch_loss(s, w, tau=0.5, reduction="sum")

    got = torch.func.vmap(torch.func.grad(of(ups_fast)))(*args)
    one_by_one = [torch.func.grad(of(reference))(*parts) for parts in zip(*args, strict=True)]
    torch.testing.assert_close(got, torch.stack(one_by_one))
    z = strong.clone().requires_grad_()
    each = ups_fast.fixmatch_loss(z, weak, tau=0.5, reduction="none")
    rows = torch.eye(6, dtype=torch.float64)
    (batched,) = torch.autograd.grad(each, z, rows, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(batched.sum(dim=0), torch.autograd.grad(each.sum(), z)[0])


def test_compiles_whole_and_exports_and_runs_on_meta():
    strong, weak = views(12, 10)
    tau, weight = torch.rand(10), torch.rand(12)

    def step(z):
        loss, mask = ups_fast.fixmatch_loss(2 * z, weak, tau=tau, weight=weight, return_mask=True)
        return loss + 0.0 * mask.sum() + ups_fast.fixmatch_loss(z, weak, reduction="none").sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_grad(compiled, strong), value_and_grad(step, strong))

    class Step(torch.nn.Module):
        def forward(self, s, w):
            return ups_fast.fixmatch_loss(s, w, tau=0.7, return_mask=True)

    loss, mask = torch.export.export(Step(), (strong, weak)).module()(strong, weak)
    want = ups_fast.fixmatch_loss(strong, weak, tau=0.7, return_mask=True)
    assert torch.equal(loss, want[0]) and torch.equal(mask, want[1])
    loss, mask = ups_fast.fixmatch_loss(strong.to("meta"), weak.to("meta"), return_mask=True)
    assert loss.shape == () and mask.shape == (12,) and loss.is_meta and mask.dtype == torch.bool


@pytest.mark.slow
def test_compiles_with_inductor():
    strong, weak = views(32, 10)

    def step(z):
        return ups_fast.fixmatch_loss(z * 2, weak)

    compiled = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(value_and_grad(compiled, strong), value_and_grad(step, strong))


def test_compiled_autograd():
    strong, weak = views(8, 5)

    def gradient():
        z = strong.clone().requires_grad_()
        return z, ups_fast.fixmatch_loss(ups_fast.mish(z), weak, tau=0.5)

    z, loss = gradient()
    loss.backward()
    again, loss = gradient()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        loss.backward()
    torch.testing.assert_close(again.grad, z.grad)


def test_autocast():
    layer = torch.nn.Linear(8, 10)
    x = torch.randn(16, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = layer(x)
        loss = ups_fast.fixmatch_loss(logits, logits, tau=0.1)
    assert loss.dtype == torch.float32
    loss.backward()
    assert layer.weight.grad.isfinite().all() and (layer.weight.grad != 0).any()


Z, T = torch.zeros(3, 4), torch.zeros(4)
BAD = [
    ((Z[0], Z), {}, ValueError, r"strong must have shape \[B, C\], got \[4\]"),
    ((Z.int(), Z), {}, TypeError, "strong must be .* got int32"),
    ((Z, Z.tolist()), {}, TypeError, r"weak must be a tensor \[B, C\], got list"),
    ((Z[:, :0], Z[:, :0]), {}, ValueError, "strong must have at least one class"),
    ((Z, Z[:2]), {}, ValueError, r"weak must have the shape \[3, 4\] of strong, got \[2, 4\]"),
    ((Z, Z.double()), {}, TypeError, "weak must be float32 like strong, got float64"),
    ((Z, Z.to("meta")), {}, ValueError, "weak must be on the device of strong, cpu, got meta"),
    ((Z, Z), {"tau": 1.5}, ValueError, r"tau must lie in \[0.0, 1.0\], got 1.5"),
    ((Z, Z), {"tau": "0.9"}, TypeError, "tau must be a number, got str"),
    ((Z, Z), {"tau": T[0]}, ValueError, r"tau must have shape \[C\], got \[\]"),
    ((Z, Z), {"tau": T[:3]}, ValueError, r"tau must have 4 classes like strong, got \[3\]"),
    ((Z, Z), {"tau": T.long()}, TypeError, "tau must be float16 or .* got int64"),
    ((Z, Z), {"tau": T.to("meta")}, ValueError, "tau must be on the device of strong"),
    ((Z, Z), {"temperature": 0}, ValueError, r"temperature must lie in \[0.001, 1000.0\], got 0"),
    ((Z, Z), {"temperature": None}, TypeError, "temperature must be a number, got NoneType"),
    ((Z, Z), {"reduction": "avg"}, ValueError, "reduction must be .* got 'avg'"),
    ((Z, Z), {"weight": T}, ValueError, r"weight must have 3 rows like strong, got \[4\]"),
    ((Z, Z), {"weight": T[:3].to("meta")}, ValueError, "weight must be on the device of strong, cpu"),
    ((Z, Z), {"weight": 2.0}, TypeError, r"weight must be a tensor \[B\], got float"),
    ((Z, Z), {"return_mask": 1}, TypeError, "return_mask must be True or False, got 1"),
]


@pytest.mark.parametrize("arguments, kwargs, error, sentence", BAD)
def test_bad_arguments(arguments, kwargs, error, sentence):
    for module in BOTH:
        with pytest.raises(error, match=sentence):
            module.fixmatch_loss(*arguments, **kwargs)


def test_direct_calls_of_the_op_are_guarded():
    ops = torch.ops.ups_fast
    with pytest.raises(RuntimeError, match="weak must be of the dtype of strong"):
        ops.fixmatch_loss(Z, Z.double(), None, 0.9, 1.0, 1)
    with pytest.raises(RuntimeError, match="weak must have size 3 in dimension 0, got 2"):
        ops.fixmatch_loss(Z, Z[:2], None, 0.9, 1.0, 1)
    with pytest.raises(RuntimeError, match="tau must have size 4 in dimension 0, got 3"):
        ops.fixmatch_loss(Z, Z, T[:3], 0.9, 1.0, 1)
    target = torch.zeros(3).long()
    with pytest.raises(RuntimeError, match="d_loss must"):
        ops.fixmatch_loss_backward(torch.ones(2), Z, target, torch.ones(()))
    with pytest.raises(RuntimeError, match="target must have size 3"):
        ops.fixmatch_loss_backward(torch.ones(3), Z, target[:2], torch.ones(()))
    with pytest.raises(RuntimeError, match="scale must have 1 elements"):
        ops.fixmatch_loss_backward(torch.ones(3), Z, target, torch.ones(2))


def test_the_module_is_the_function():
    strong, weak = views(8, 5)
    loss = ups_fast.FixMatchLoss(tau=0.6, temperature=0.5, reduction="sum")
    assert repr(loss) == "FixMatchLoss(tau=0.6, temperature=0.5, reduction='sum')"
    kwargs = {"weight": torch.rand(8), "return_mask": True}
    got = loss(strong, weak, **kwargs)
    want = ups_fast.fixmatch_loss(strong, weak, tau=0.6, temperature=0.5, reduction="sum", **kwargs)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    tau = torch.rand(5)
    assert ups_fast.FixMatchLoss()(strong, weak, tau=tau) == ups_fast.fixmatch_loss(strong, weak, tau=tau)
    for wrong in ({"tau": 2.0}, {"temperature": 0.0}, {"reduction": "avg"}):
        with pytest.raises(ValueError, match="must"):
            ups_fast.FixMatchLoss(**wrong)
    with pytest.raises(TypeError, match="to the call"):
        ups_fast.FixMatchLoss(tau=tau)
