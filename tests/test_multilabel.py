"""mc_select_multilabel and ups_loss_multilabel against the float64 oracle, the reference and finite differences."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch
from test_losses import HALF, assert_as_good_as_reference, value_and_grad

import ups_fast
from ups_fast import reference

inf, nan = math.inf, math.nan
BOTH = [ups_fast, reference]
REDUCTIONS = ("none", "mean", "sum", "batchmean")
LOOSE = {"tau_p": 0.5, "tau_n": 0.2, "kappa_p": 0.2, "kappa_n": 0.05}


def logits_of(p, n, c, *, dtype=torch.float32, seed=0):
    """Classes from undecided to certain, with passes that agree or not."""
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(1, n, c, generator=g) * torch.rand(1, n, 1, generator=g) * 10
    return (base + 0.5 * torch.rand(1, n, c, generator=g) * torch.randn(p, n, c, generator=g)).to(dtype)


def batch(n, c, *, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    positive, negative = (torch.rand(n, c, generator=g) < share for share in (0.2, 0.4))  # some are both
    positive[::5] = negative[::5] = False
    weight = 3 * torch.rand(n, generator=g), 3 * torch.rand(n, c, generator=g)
    weight[0][1::4], weight[1][:, ::3] = 0, 0
    return (4 * torch.randn(n, c, generator=g)).to(dtype), positive, negative, weight


def check_selection(got, z, **thresholds):
    want = oracle.mc_select_multilabel(z.double().numpy(), **thresholds)
    for name in ("positive", "negative"):
        sure = ~want[f"doubt_{name}"]
        assert (getattr(got, name).numpy() == want[name])[sure].all()
        assert sure.size < 1000 or sure.mean() > 0.95
    for name in ("confidence", "std"):
        atol = 1e-14 if z.dtype == torch.float64 else 3e-7
        np.testing.assert_allclose(getattr(got, name).numpy(), want[name], rtol=0, atol=atol)


@pytest.mark.parametrize("c", [1, 2, 3, 8, 31, 33, 80, 257, 10_000])
@pytest.mark.parametrize("p", [1, 2, 10])
def test_selection_on_hostile_shapes(isa, p, c):
    for n in (0, 1, 7, 33) if c < 1000 else (2,):
        z = logits_of(p, n, c, seed=n + c)
        of_class = {name: value * torch.linspace(0.8, 1.2, c) for name, value in LOOSE.items()}
        for options in (
            {},
            LOOSE,
            {**LOOSE, "temp_nl": 3.7},
            of_class,
            {**LOOSE, "kappa_n": of_class["kappa_n"]},
        ):
            plain, packed = (ups_fast.mc_select_multilabel(z, packed=k, **options) for k in (False, True))
            assert plain.confidence.dtype == plain.std.dtype == torch.float32
            numbers = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
            check_selection(plain, z, **numbers)
            for a, b in zip(plain, packed, strict=True):
                assert torch.equal(a if a.is_floating_point() else reference.pack_mask(a), b)


def test_selection_error_is_at_most_twice_the_references(isa):
    z = logits_of(10, 500, 80)
    want = oracle.mc_select_multilabel(z.double().numpy())
    got, ref = (f.mc_select_multilabel(z) for f in BOTH)
    for name in ("confidence", "std"):
        error, allowed = (np.abs(getattr(x, name).numpy() - want[name]).max() for x in (got, ref))
        assert error <= 2 * allowed + 2**-24


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_selection_of_other_types_and_strides(isa, dtype):
    z = logits_of(5, 40, 33, dtype=dtype)
    got = ups_fast.mc_select_multilabel(z, **LOOSE)
    check_selection(got, z, **LOOSE)
    wide = torch.full((11, 81, 40), nan, dtype=dtype)
    wide[1::2, 1::2, 4:37] = z
    for view in (wide[1::2, 1::2, 4:37], z.transpose(0, 2).contiguous().transpose(0, 2)):
        assert not view.is_contiguous()
        assert all(map(torch.equal, ups_fast.mc_select_multilabel(view, **LOOSE), got))
        packed = ups_fast.mc_select_multilabel(view, **LOOSE, packed=True)
        assert torch.equal(packed.negative, reference.pack_mask(got.negative))


def test_a_class_that_is_not_finite_spoils_no_other(isa):
    for bad in (nan, inf, -inf):
        z = logits_of(4, 20, 33)
        z[..., ::2] += 100  # every second one would be positive
        clean = ups_fast.mc_select_multilabel(z)
        z[1, 3, 0], z[3, 19, 32] = bad, bad
        hit = torch.zeros(20, 33, dtype=torch.bool)
        hit[3, 0] = hit[19, 32] = True
        for module in BOTH:
            got = module.mc_select_multilabel(z)
            assert torch.equal(got.confidence.isnan(), hit) and torch.equal(got.std.isnan(), hit)
            assert not got.positive[hit].any() and not got.negative[hit].any() and clean.positive[hit].all()
            assert torch.equal(got.positive[~hit], clean.positive[~hit])


def test_equal_passes_have_no_std_and_huge_logits_are_certain(isa):
    for temp_nl in (2.0, 0.001, 3.0):
        got = ups_fast.mc_select_multilabel(logits_of(1, 300, 37).expand(10, -1, -1), temp_nl=temp_nl)
        assert (got.std == 0).all()
        z = torch.tensor([3e38, 1000.0, 100.0, -100.0, -1000.0, -3e38]).expand(3, 5, 6)
        for module in BOTH:
            got = module.mc_select_multilabel(z, temp_nl=temp_nl)
            assert torch.equal(got.positive, z[0] > 0) and torch.equal(got.negative, z[0] < 0)
            assert torch.equal(got.confidence > 0.5, z[0] > 0) and (got.std == 0).all()


def test_thresholds_are_strict_as_documented_and_one_pass_uses_no_kappas(isa):
    z = torch.zeros(2, 1, 3)  # mean exactly 1/2 at both temperatures
    for module in BOTH:
        assert module.mc_select_multilabel(z, tau_p=0.5).positive.all()  # >=
        assert not module.mc_select_multilabel(z, tau_p=0.5, kappa_p=0.0).positive.any()  # <
        assert not module.mc_select_multilabel(z, tau_n=0.5).negative.any()  # <
        assert module.mc_select_multilabel(z, tau_p=0.6, tau_n=0.6).negative.all()
        of_class = torch.tensor([0.4, 0.5, 0.6])
        assert module.mc_select_multilabel(z, tau_p=of_class).positive.tolist() == [[True, True, False]]
        both = module.mc_select_multilabel(z - 0.4, tau_p=0.35, tau_n=0.35, temp_nl=0.5)
        assert both.positive.all() and both.negative.all()  # nothing is cleared
        one = logits_of(1, 40, 7)
        want = module.mc_select_multilabel(one, kappa_p=inf, kappa_n=inf)
        for kappa in (0.0, torch.zeros(7)):
            got = module.mc_select_multilabel(one, kappa_p=kappa, kappa_n=kappa)
            assert all(map(torch.equal, got, want)) and (got.std == 0).all()
            assert want.positive.any() and want.negative.any()


def test_parts_and_threads_make_the_whole(isa):
    z = logits_of(5, 257, 20)
    whole = ups_fast.mc_select_multilabel(z, packed=True)
    parts = [ups_fast.mc_select_multilabel(part, packed=True) for part in z.split(100, dim=1)]
    assert all(map(torch.equal, whole, map(torch.cat, zip(*parts, strict=True))))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1 + (before == 1))
        assert all(map(torch.equal, whole, ups_fast.mc_select_multilabel(z, packed=True)))
    finally:
        torch.set_num_threads(before)


def test_selections_are_constants():
    z = logits_of(3, 4, 5).requires_grad_()
    for module in BOTH:
        assert not module.mc_select_multilabel(z).confidence.requires_grad
        _, tangent = torch.func.jvp(
            lambda x, m=module: m.mc_select_multilabel(x).std, (z.detach(),), (z.detach(),)
        )
        assert not tangent.any()


def test_probabilities_are_warned_of():
    z = logits_of(3, 50, 7)
    for module in BOTH:
        with pytest.warns(UserWarning, match=r"look like probabilities.*output before sigmoid"):
            module.mc_select_multilabel(z.sigmoid())


@pytest.mark.filterwarnings("error")
def test_logits_are_not_taken_for_probabilities():
    for z in (logits_of(3, 50, 7), torch.zeros(2, 9, 4), torch.ones(2, 9, 4), torch.full((2, 9, 4), nan),
              torch.rand(2, 1, 3), torch.zeros(2, 0, 4), 2 * torch.rand(2, 90, 9)):  # fmt: skip
        for module in BOTH:
            module.mc_select_multilabel(z)


@pytest.mark.parametrize("c", [1, 2, 7, 8, 33, 80, 1000])
@pytest.mark.parametrize("n", [0, 1, 30])
def test_loss_against_oracle_and_reference(isa, n, c):
    z, positive, negative, weights = batch(n, c, seed=n + c)
    for i, weight in enumerate((None, *weights)):
        for reduction in REDUCTIONS if n > 1 else REDUCTIONS[i : i + 1]:
            options = {"weight": weight, "reduction": reduction}
            masks = [positive, negative]
            got = value_and_grad(ups_fast.ups_loss_multilabel, z, *masks, **options)
            ref = value_and_grad(reference.ups_loss_multilabel, z, *masks, **options)
            exact = value_and_grad(reference.ups_loss_multilabel, z.double(), *masks, **options)
            assert got[0].dtype == got[1].dtype == torch.float32
            for triple in zip(got, ref, exact, strict=True):
                assert_as_good_as_reference(*triple)
            for at in ((0,), (1,), (0, 1)):  # every mix of bytes and bits
                mixed = [reference.pack_mask(m) if k in at else m for k, m in enumerate(masks)]
                assert all(
                    map(torch.equal, value_and_grad(ups_fast.ups_loss_multilabel, z, *mixed, **options), got)
                )
        each = reference.ups_loss_multilabel(z.double(), positive, negative, weight=weight, reduction="none")
        arrays = [x.numpy() for x in (z, positive, negative)]
        want = oracle.ups_loss_multilabel_rows(*arrays, weight.double().numpy() if i == 2 else None)
        of_image = weight.double().numpy() if i == 1 else 1.0
        np.testing.assert_allclose(each.numpy(), of_image * want, rtol=1e-12, atol=1e-12)


def test_the_mean_is_over_images_with_a_selected_class():
    z, positive, negative, (of_image, of_entry) = batch(20, 6, dtype=torch.float64)
    some = (positive | negative).any(dim=1)
    rows = torch.from_numpy(oracle.ups_loss_multilabel_rows(z.numpy(), positive.numpy(), negative.numpy()))
    for module in BOTH:
        loss = module.ups_loss_multilabel(z, positive, negative)
        torch.testing.assert_close(loss, rows[some].mean())
        loss = module.ups_loss_multilabel(z, positive, negative, weight=of_image)
        torch.testing.assert_close(loss, (of_image * rows)[some].sum() / of_image[some].double().sum())
        each = module.ups_loss_multilabel(z, positive, negative, weight=of_entry, reduction="none")
        loss = module.ups_loss_multilabel(z, positive, negative, weight=of_entry)
        torch.testing.assert_close(loss, each[some].mean())
        labeled = module.ups_loss_multilabel(z, positive, ~positive)
        want = torch.nn.functional.binary_cross_entropy_with_logits(z, positive.double())
        torch.testing.assert_close(labeled, want)
        nothing = torch.zeros_like(positive)
        for reduction in REDUCTIONS:
            assert module.ups_loss_multilabel(z, nothing, nothing, reduction=reduction).sum() == 0
            empty = module.ups_loss_multilabel(z[:0], positive[:0], negative[:0], reduction=reduction)
            assert empty.sum() == 0


def test_logits_of_any_size_keep_their_digits(isa):
    """No probability is formed: log(1 - sigmoid(100)) is -100."""
    z = torch.tensor([[100.0, -100.0, 100.0, -100.0, 20.0, -20.0, 1e30, -1e30]])
    positive = torch.tensor([[True, True, False, False, True, False, True, False]])
    got = value_and_grad(ups_fast.ups_loss_multilabel, z, positive, ~positive, reduction="sum")
    want = value_and_grad(reference.ups_loss_multilabel, z.double(), positive, ~positive, reduction="sum")
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=3e-7, atol=1e-37)
    one = torch.tensor([[20.0]])
    loss = ups_fast.ups_loss_multilabel(
        one, torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.bool)
    )
    assert loss.item() == pytest.approx(math.log1p(math.exp(-20)), rel=1e-6)


def test_only_what_is_selected_is_looked_at(isa):
    z, positive, negative, (of_image, of_entry) = batch(12, 19)
    for module in BOTH:
        for weight, looked in (
            (None, positive | negative),
            (of_image, (positive | negative) & (of_image != 0)[:, None]),
            (of_entry, (positive | negative) & (of_entry != 0)),
        ):
            hidden = torch.where(looked, z, nan)
            loss, d_logits = value_and_grad(
                module.ups_loss_multilabel, hidden, positive, negative, weight=weight
            )
            assert loss.isfinite() and d_logits.isfinite().all() and (d_logits[~looked] == 0).all()
            torch.testing.assert_close(loss, module.ups_loss_multilabel(z, positive, negative, weight=weight))
            row, c = looked.nonzero()[0].tolist()
            for bad in (nan, inf):
                broken = z.clone()
                broken[row, c] = bad if not positive[row, c] else -bad
                each = module.ups_loss_multilabel(broken, positive, negative, weight=weight, reduction="none")
                assert each.isfinite().tolist() == [i != row for i in range(12)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_loss_of_other_types_and_strides(isa, dtype):
    z, positive, negative, weights = batch(40, 33, dtype=dtype)
    wide = torch.full((40, 70), nan, dtype=dtype)
    wide[:, 5:38] = z
    scattered = torch.zeros(40, 66, dtype=torch.bool)
    scattered[:, ::2] = positive
    for weight in (None, *weights):
        got = value_and_grad(ups_fast.ups_loss_multilabel, z, positive, negative, weight=weight)
        want = value_and_grad(reference.ups_loss_multilabel, z.double(), positive, negative, weight=weight)
        assert got[1].dtype == dtype
        rtol = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(got[0].double(), want[0], rtol=rtol, atol=1e-12)
        atol = 2e-7 if dtype in HALF else 1e-14
        torch.testing.assert_close(got[1].double(), want[1], rtol=2 * HALF.get(dtype, 1e-12), atol=atol)
        column = weight.t().contiguous().t() if weight is not None and weight.dim() == 2 else weight
        again = value_and_grad(
            ups_fast.ups_loss_multilabel,
            wide[:, 5:38],
            scattered[:, ::2],
            negative.t().contiguous().t(),
            weight=column,
        )
        assert all(map(torch.equal, again, got))


@pytest.mark.parametrize("c", [1, 5, pytest.param(17, marks=pytest.mark.slow)])
def test_gradcheck(c):
    z, positive, negative, weights = batch(6, c, dtype=torch.float64)
    z.requires_grad_()
    for weight, reduction in zip((None, *weights, weights[1]), REDUCTIONS, strict=True):
        assert torch.autograd.gradcheck(
            lambda x, w=weight, r=reduction: ups_fast.ups_loss_multilabel(
                x, positive, negative, weight=w, reduction=r
            ),
            z,
            check_forward_ad=True,
        )


@pytest.mark.parametrize("n", [6, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 5))])
def test_opcheck(n):
    """Two calls by default, the rest when there is time."""
    ops, c = torch.ops.ups_fast, 10 if n == 6 else 70
    z, positive, negative, weights = batch(n, c)
    packed, numbers = reference.pack_mask(negative), (0.5, 0.05, 0.05, 0.005, 2.0)
    leaf = z.clone().requires_grad_()
    torch.library.opcheck(ops.ups_loss_multilabel.default, (leaf, positive, packed, 0, weights[1]))
    of_class = torch.rand(4, c)
    torch.library.opcheck(ops.mc_select_multilabel.default, (torch.randn(3, n, c), *numbers, True, of_class))
    if n == 6:
        return
    torch.library.opcheck(ops.ups_loss_multilabel.default, (leaf, positive, packed, 1))
    gradient = (torch.ones(n), z, positive, packed, torch.tensor(0.5), weights[0])
    torch.library.opcheck(ops.ups_loss_multilabel_backward.default, gradient)
    torch.library.opcheck(ops.mc_select_multilabel.default, (torch.randn(3, n, c), *numbers, False))


def test_transforms_and_graphs():
    z, positive, negative, (of_image, _) = batch(6, 5, dtype=torch.float64)
    views = z.view(2, 3, 5), positive.view(2, 3, 5), negative.view(2, 3, 5)
    got = torch.func.vmap(torch.func.grad(ups_fast.ups_loss_multilabel))(*views)
    want = [torch.func.grad(reference.ups_loss_multilabel)(*parts) for parts in zip(*views, strict=True)]
    torch.testing.assert_close(got, torch.stack(want))
    leaf = z.clone().requires_grad_()
    (d_logits,) = torch.autograd.grad(
        ups_fast.ups_loss_multilabel(leaf, positive, negative), leaf, create_graph=True
    )
    with pytest.raises(RuntimeError, match="no second derivative"):
        d_logits.sum().backward()

    def step(x):
        found = ups_fast.mc_select_multilabel(
            torch.stack([x, x + 0.01]), tau_p=torch.full((5,), 0.5), packed=True
        )
        return ups_fast.ups_loss_multilabel(2 * x, found.positive, found.negative, weight=of_image)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_grad(compiled, z), value_and_grad(step, z))
    found = ups_fast.mc_select_multilabel(z[None].to("meta"))
    assert found.positive.shape == (6, 5) and found.std.is_meta


@pytest.mark.slow
def test_compiles_with_inductor():
    z, positive, negative, _ = batch(32, 20)

    def step(x):
        return (
            ups_fast.ups_loss_multilabel(x * 2, positive, negative)
            + ups_fast.mc_select_multilabel(x[None])[0].sum()
        )

    compiled = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(value_and_grad(compiled, z), value_and_grad(step, z))


def test_selection_and_loss_fit_together():
    z = logits_of(10, 300, 40)
    student = z[0] / 2
    found = [ups_fast.mc_select_multilabel(z, packed=packed) for packed in (False, True)]
    losses = [ups_fast.ups_loss_multilabel(student, each.positive, each.negative) for each in found]
    assert torch.equal(*losses) and losses[0] > 0


L, Z = torch.zeros(2, 3, 4), torch.zeros(3, 4)
M = torch.zeros(3, 4, dtype=torch.bool)
BAD_SELECTIONS = [
    ({"logits": Z}, ValueError, r"logits must have shape \[P, N, C\], got \[3, 4\]"),
    ({"logits": L[:0]}, ValueError, r"at least one pass, got \[0, 3, 4\]"),
    ({"logits": L[..., :0]}, ValueError, r"at least one class, got \[2, 3, 0\]"),
    ({"logits": L.int()}, TypeError, "logits must be .* got int32"),
    ({"tau_p": 1.5}, ValueError, r"tau_p must lie in \[0.0, 1.0\], got 1.5"),
    ({"tau_p": torch.zeros(())}, ValueError, r"tau_p must have shape \[C\], got \[\]"),
    ({"tau_n": torch.zeros(3)}, ValueError, r"tau_n must have 4 classes like logits, got \[3\]"),
    ({"kappa_p": torch.zeros(4, dtype=torch.int64)}, TypeError, "kappa_p must be float16 or .* got int64"),
    (
        {"kappa_n": torch.zeros(4, device="meta")},
        ValueError,
        "kappa_n must be on the logits' device cpu, got meta",
    ),
    ({"kappa_n": -1.0}, ValueError, "kappa_n must lie in"),
    ({"tau_n": 0.9}, ValueError, "tau_n must not exceed tau_p = 0.5, got 0.9"),
    ({"temp_nl": 0.0}, ValueError, "temp_nl must lie in"),
    ({"packed": 1}, TypeError, "packed must be True or False, got 1"),
]
BAD_LOSSES = [
    ((Z[0], M, M), {}, ValueError, r"logits must have shape \[B, C\], got \[4\]"),
    ((Z, M[:2], M), {}, ValueError, r"positive must have 3 rows like logits, got \[2, 4\]"),
    ((Z, M, M[:, :3]), {}, ValueError, "negative as bool must have 4 columns"),
    ((Z, M.float(), M), {}, TypeError, "positive must be bool or int32, got float32"),
    ((Z, M, None), {}, TypeError, "negative must be a tensor"),
    ((Z, M, M), {"weight": torch.ones(4)}, ValueError, r"weight must have 3 rows like logits, got \[4\]"),
    (
        (Z, M, M),
        {"weight": torch.ones(3, 1)},
        ValueError,
        r"weight must be \[B\] or have the shape of logits",
    ),
    ((Z, M, M), {"weight": 2.0}, TypeError, r"weight must be a tensor \[B\]"),
    (
        (Z, M, M),
        {"weight": torch.ones(3, 4, requires_grad=True)},
        ValueError,
        "weight must not require a gradient",
    ),
    ((Z, M, M), {"reduction": "avg"}, ValueError, "reduction must be .* got 'avg'"),
]


def test_bad_arguments():
    for module in BOTH:
        for arguments, error, sentence in BAD_SELECTIONS:
            with pytest.raises(error, match=sentence):
                module.mc_select_multilabel(**{"logits": L, **arguments})
        for args, options, error, sentence in BAD_LOSSES:
            with pytest.raises(error, match=sentence):
                module.ups_loss_multilabel(*args, **options)


def test_direct_calls_of_the_ops_are_guarded():
    ops, numbers = torch.ops.ups_fast, (0.5, 0.05, 0.05, 0.005, 2.0, False)
    with pytest.raises(RuntimeError, match="class_thresholds must have size 4 in dimension 1, got 3"):
        ops.mc_select_multilabel(L, *numbers, torch.zeros(4, 3))
    with pytest.raises(RuntimeError, match="negative must have size 3 in dimension 0, got 2"):
        ops.ups_loss_multilabel(Z, M, M[:2], 1)
    with pytest.raises(RuntimeError, match="weight must have size 4 in dimension 1, got 3"):
        ops.ups_loss_multilabel(Z, M, M, 1, torch.ones(3, 3))
    with pytest.raises(RuntimeError, match="scale must have 1 elements"):
        ops.ups_loss_multilabel_backward(torch.ones(3), Z, M, M, torch.ones(2))
