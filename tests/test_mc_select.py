"""mc_select against the float64 oracle and the reference, on every instruction set of this machine."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch

import ups_fast
from ups_fast import reference

inf, nan = math.inf, math.nan
C_HOSTILE = [1, 2, 3, 10, 16, 17, 31, 32, 33, 100, 257, 1000, 4097]
LOOSE = {"tau_p": 0.4, "tau_n": 0.2, "kappa_p": 0.2, "kappa_n": 0.05}


def logits_of(p, n, c, *, dtype=torch.float32, seed=0, noise=0.5):
    """Rows from near-uniform to near-certain, with passes that agree or not."""
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(1, n, c, generator=g) * torch.rand(1, n, 1, generator=g) * 8
    return (base + noise * torch.rand(1, n, 1, generator=g) * torch.randn(p, n, c, generator=g)).to(dtype)


def check_against_oracle(got, z, **thresholds):
    want = oracle.mc_select(z.double().numpy(), **thresholds)
    sure = ~want["doubt_label"]
    assert (got.label.numpy() == want["label"])[sure].all()
    assert (got.positive.numpy() == want["positive"])[~want["doubt_positive"]].all()
    assert (got.negative.numpy() == want["negative"])[~want["doubt_negative"]].all()
    # The band may excuse a handful of verdicts, not the test.
    assert want["doubt_positive"].mean() <= 0.05 or z.shape[1] < 100
    return want


@pytest.mark.parametrize("c", C_HOSTILE)
@pytest.mark.parametrize("p", [2, 3, 10])
def test_hostile_shapes(isa, p, c):
    for n in (0, 1, 7, 70):
        z = logits_of(p, n, c, seed=c + n)
        for thresholds in ({}, LOOSE):
            got = ups_fast.mc_select(z, **thresholds)
            assert got.negative.shape == (n, c) and got.label.dtype == torch.int64
            if n:
                want = check_against_oracle(got, z, **thresholds)
                np.testing.assert_allclose(got.confidence.numpy(), want["confidence"], atol=2e-6)
                np.testing.assert_allclose(got.std.numpy(), want["std"], atol=2e-6)


@pytest.mark.parametrize(
    ("c", "temp_nl"),
    [
        pytest.param(c, temp_nl, marks=() if temp_nl == 2.0 or c == 10 else pytest.mark.slow)
        for c in (2, 10, 33, 100, 1000)
        for temp_nl in (2.0, 1.0, 3.7)
    ],
)
def test_error_is_at_most_twice_the_references(isa, c, temp_nl):
    z = logits_of(10, 4000 if c <= 100 else 400, c, seed=3)
    want = oracle.mc_select(z.double().numpy(), temp_nl=temp_nl)
    got, ref = (f.mc_select(z, temp_nl=temp_nl) for f in (ups_fast, reference))
    for field in ("confidence", "std"):
        error, allowed = (
            np.abs(getattr(x, field).numpy() - want[field])[~want["doubt_label"]].max() for x in (got, ref)
        )
        assert error <= 2 * allowed + 2**-24, field


@pytest.mark.parametrize("c", [10, 33, 100])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(isa, c, dtype):
    z = logits_of(10, 333, c, dtype=dtype)
    got = ups_fast.mc_select(z, **LOOSE)
    want = check_against_oracle(got, z, **LOOSE)
    assert got.confidence.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    np.testing.assert_allclose(
        got.confidence.numpy(), want["confidence"], atol=1e-13 if dtype == torch.float64 else 2e-6
    )
    np.testing.assert_allclose(got.std.numpy(), want["std"], atol=1e-13 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_value_is_read_right(isa, dtype):
    """Each finite bit pattern, subnormals too, as the logit of class 0 beside a logit of the same value in class 1."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for c in (2, 40):  # both layouts
        z = values[None, :, None].expand(1, -1, c).contiguous()
        got = ups_fast.mc_select(z, kappa_p=inf, kappa_n=inf)
        finite = values.isfinite()
        assert torch.equal(got.label, torch.where(finite, 0, -1))
        torch.testing.assert_close(got.confidence[finite], torch.full_like(got.confidence[finite], 1 / c))
        z = torch.zeros(1, len(values), c, dtype=dtype)
        z[0, :, 0] = values
        got = ups_fast.mc_select(z, kappa_p=inf, kappa_n=inf).confidence[finite]
        want = torch.softmax(z[0, finite].double(), dim=-1).amax(dim=-1).float()
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("c", [1, 2, 10, 31, 32, 33, 64, 100, 257])
@pytest.mark.parametrize("n", [0, 1, 7, 40])
def test_packed_is_the_same_mask(isa, n, c):
    z = logits_of(5, n, c, seed=c)
    plain, packed = (ups_fast.mc_select(z, packed=packed, **LOOSE) for packed in (False, True))
    assert packed.negative.dtype == torch.int32 and packed.negative.shape == (n, (c + 31) // 32)
    assert torch.equal(packed.negative, reference.pack_mask(plain.negative))
    assert torch.equal(reference.unpack_mask(packed.negative, c), plain.negative)
    assert c < 10 or n < 7 or plain.negative.any()


@pytest.mark.parametrize("c", [2, 10, 33, 100])
@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_non_finite_rows_are_selected_for_nothing(isa, c, bad):
    z = logits_of(4, 50, c, noise=0.01)
    z[..., 0] += 100  # every row would be positive
    clean = ups_fast.mc_select(z)
    hit = [0, 15, 16, 31, 49]
    for i, row in enumerate(hit):
        z[i % 4, row, (i * 7) % c] = bad
    for got in (ups_fast.mc_select(z), reference.mc_select(z)):
        rows = torch.tensor(hit)
        assert (
            (got.label[rows] == -1).all()
            and got.confidence[rows].isnan().all()
            and got.std[rows].isnan().all()
        )
        assert not got.positive[rows].any() and not got.negative[rows].any()
        keep = torch.ones(50, dtype=torch.bool)
        keep[rows] = False
        for a, b in zip(got, clean, strict=True):
            torch.testing.assert_close(a[keep], b[keep], atol=1e-6, rtol=0)
        assert got.positive[keep].all()


@pytest.mark.parametrize("c", [2, 10, 40])
def test_huge_logits(isa, c):
    z = torch.zeros(3, 20, c)
    z[..., -1] = 3e38
    z[..., 0] = -3e38
    got = ups_fast.mc_select(z)
    assert (
        (got.label == c - 1).all()
        and (got.confidence == 1).all()
        and (got.std == 0).all()
        and got.positive.all()
    )
    assert got.negative[:, :-1].all() and not got.negative[:, -1].any()
    flat = ups_fast.mc_select(torch.full((3, 20, c), -3e38))
    torch.testing.assert_close(flat.confidence, torch.full((20,), 1 / c))


@pytest.mark.parametrize("module", [ups_fast, reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_logits_by_a_low_temperature(module, dtype):
    """Their quotient is larger than any float."""
    z = torch.zeros(3, 20, 5, dtype=dtype)
    z[..., 2] = torch.finfo(dtype).max
    z[..., 0] = torch.finfo(dtype).min
    got = module.mc_select(z, temp_nl=0.001)
    assert got.positive.all() and got.negative.sum(-1).eq(4).all() and not got.negative[:, 2].any()


@pytest.mark.parametrize("c", [2, 10, 16, 17, 33, 100])
def test_ties_go_to_the_lowest_class(isa, c):
    z = torch.randn(6, 30, c).clamp(max=1)
    for low in range(0, c - 1, max(1, c // 7)):
        tied = z.clone()
        tied[..., low] = tied[..., c - 1] = 2 + torch.rand(6, 30)
        assert (ups_fast.mc_select(tied).label == low).all()


@pytest.mark.parametrize("c", [3, 10, 40, 100])
def test_equal_passes_have_no_std(isa, c):
    got = ups_fast.mc_select(logits_of(1, 4000, c).expand(10, 4000, c))
    assert (got.std == 0).all()
    assert not ups_fast.mc_select(torch.zeros(10, 4, c), kappa_p=0.0, tau_p=0.0, tau_n=0.0).positive.any()


@pytest.mark.parametrize("c", [10, 40])
def test_thresholds_are_strict_as_documented(isa, c):
    p = torch.zeros(2, 1, c)
    p[..., 0] = math.log(c - 1)  # mean p_0 = 1/2 exactly, up to rounding
    got = ups_fast.mc_select(p, kappa_p=1.0, kappa_n=1.0)
    conf = got.confidence.item()
    assert ups_fast.mc_select(p, tau_p=conf).positive.item()  # >=
    above = float(np.nextafter(np.float32(conf), np.float32(2)))
    assert not ups_fast.mc_select(p, tau_p=above).positive.item()
    q = torch.zeros(2, 1, 2)  # mean q = 0.5 exactly
    assert not ups_fast.mc_select(q, tau_n=0.5).negative.any()  # <
    assert ups_fast.mc_select(q, tau_n=0.5000001).negative[0].tolist() == [False, True]  # and never the label


@pytest.mark.parametrize("c", [2, 5, 40])
def test_one_pass_uses_no_kappas(isa, c):
    z = logits_of(1, 90, c)
    want = reference.mc_select(z, kappa_p=inf, kappa_n=inf)
    assert (want.std == 0).all() and torch.equal(want.positive, want.confidence >= 0.70)
    for kappas in ({}, {"kappa_p": inf}, {"kappa_p": 0.0, "kappa_n": 0.0}):
        for function in (ups_fast.mc_select, reference.mc_select):
            got = function(z, **kappas)
            assert torch.equal(got.positive, want.positive) and torch.equal(got.negative, want.negative)
            assert (got.std == 0).all() and want.positive.any() and want.negative.any()
    raw = torch.ops.ups_fast.mc_select(z, 0.7, 0.05, 0.0, 0.0, 2.0, False)
    assert torch.equal(raw[3], want.positive) and torch.equal(raw[4], want.negative)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_probabilities_are_warned_of(dtype):
    z = logits_of(3, 50, 7)
    p = z.softmax(dim=-1).to(dtype)
    for function in (ups_fast.mc_select, reference.mc_select):
        for mistaken in (
            p,
            p[:, :1],
            p[:1],
            p.clone().requires_grad_(),
            p.mT.contiguous().mT,
        ):
            with pytest.warns(
                UserWarning, match="logits look like probabilities.*pass the network's output before"
            ):
                function(mistaken)


@pytest.mark.filterwarnings("error")
def test_logits_are_not_taken_for_probabilities():
    p = logits_of(3, 50, 7).softmax(dim=-1)
    one_is_off = p.clone()
    one_is_off[0, 0, 0] += 0.1
    for z in (logits_of(3, 50, 7), p.log(), p * 2, p - 0.1, one_is_off, torch.zeros(2, 3, 4), torch.ones(2, 3, 1),
              torch.full((2, 3, 4), nan), torch.zeros(2, 0, 4)):  # fmt: skip
        ups_fast.mc_select(z)
        reference.mc_select(z)
    # Where looking would wait for a device, or break a trace or transform, nobody looks.
    torch.compile(ups_fast.mc_select, fullgraph=True, backend="eager")(p)
    torch.func.vmap(lambda z: ups_fast.mc_select(z).label)(p.expand(2, -1, -1, -1))
    with torch._subclasses.FakeTensorMode() as mode:
        ups_fast.mc_select(mode.from_tensor(p))
    torch.fx.experimental.proxy_tensor.make_fx(lambda z: ups_fast.mc_select(z).label)(p)
    reference.mc_select(p.to("meta"))


def test_the_raw_op_gives_constants():
    z = logits_of(3, 8, 4)

    def raw(z):
        return torch.ops.ups_fast.mc_select(z, 0.7, 0.05, 0.05, 0.005, 2.0, False)

    want = raw(z)
    for context in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with context:
            got = raw(z.clone().requires_grad_())
            assert not any(x.requires_grad for x in got) and all(map(torch.equal, got, want))
    _, tangents = torch.func.jvp(lambda z: raw(z)[1:3], (z,), (z,))
    assert not any(t.any() for t in tangents)
    gradient = torch.func.grad(lambda z: (raw(z)[1] * z.sum()).sum())(z)
    torch.testing.assert_close(gradient, torch.full_like(z, want[1].sum().item()))
    both = torch.func.vmap(raw)(torch.stack([z, -z]))
    assert all(map(torch.equal, both, map(torch.stack, zip(want, raw(-z), strict=True))))
    torch.library.opcheck(
        torch.ops.ups_fast.mc_select.default, (z.requires_grad_(), 0.7, 0.05, 0.05, 0.005, 2.0, True)
    )


@pytest.mark.parametrize("c", [10, 50])
def test_strides(isa, c):
    big = logits_of(12, 40, c + 3)
    sliced = big[1:11:2, 3:33:2, 2 : c + 2]
    transposed = logits_of(5, 30, c).permute(0, 2, 1).contiguous().permute(0, 2, 1)
    expanded = logits_of(1, 30, c).expand(5, 30, c)
    for z in (sliced, transposed, expanded):
        assert not z.is_contiguous()
        for a, b in zip(ups_fast.mc_select(z), ups_fast.mc_select(z.contiguous()), strict=True):
            assert torch.equal(a, b)


def test_a_million_rows_and_threads(isa):
    """More rows than a thread's share, an odd last block; each row's result depends on that row alone."""
    z = logits_of(2, 1_000_001, 3)
    whole = ups_fast.mc_select(z)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = ups_fast.mc_select(z)
    finally:
        torch.set_num_threads(before)
    tail = ups_fast.mc_select(z[:, -9:])
    for a, b, c in zip(whole, alone, tail, strict=True):
        assert torch.equal(a, b) and torch.equal(a[-9:], c)


def test_all_instruction_sets_agree(isa):
    z = logits_of(10, 500, 37)
    check_against_oracle(ups_fast.mc_select(z), z)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "shape", [(10, 6, 10), *(pytest.param(each, marks=pytest.mark.slow) for each in ((2, 0, 3), (4, 5, 70)))]
)
def test_opcheck(shape, packed):
    torch.library.opcheck(
        torch.ops.ups_fast.mc_select.default, (torch.randn(shape), 0.7, 0.05, 0.05, 0.005, 2.0, packed)
    )


@pytest.mark.slow
def test_compiles_whole():
    compiled = torch.compile(lambda z: ups_fast.mc_select(z * 2).negative.sum(), fullgraph=True)
    z = logits_of(10, 40, 10)
    assert compiled(z) == ups_fast.mc_select(z * 2).negative.sum()


def test_no_gradient_and_no_change_of_input():
    z = logits_of(3, 8, 4).requires_grad_()
    before = z.detach().clone()
    got = ups_fast.mc_select(z)
    assert not got.confidence.requires_grad and torch.equal(z.detach(), before)
    for function in (ups_fast.mc_select, reference.mc_select):
        _, tangent = torch.func.jvp(lambda z, f=function: f(z).confidence, (before,), (before,))
        assert not tangent.any()


BAD = [
    ({"logits": [[1.0]]}, TypeError, r"logits must be a tensor \[P, N, C\], got list"),
    ({"logits": torch.zeros(3, 4)}, ValueError, r"logits must have shape \[P, N, C\], got \[3, 4\]"),
    (
        {"logits": torch.zeros(2, 3, 4, dtype=torch.int64)},
        TypeError,
        "logits must be float16 or .* got int64",
    ),
    ({"logits": torch.zeros(0, 3, 4)}, ValueError, r"at least one pass, got \[0, 3, 4\]"),
    ({"logits": torch.zeros(2, 3, 0)}, ValueError, r"at least one class, got \[2, 3, 0\]"),
    ({"tau_p": 1.5}, ValueError, r"tau_p must lie in \[0.0, 1.0\], got 1.5"),
    ({"tau_n": -0.1}, ValueError, "tau_n must lie in"),
    ({"tau_n": 0.9}, ValueError, "tau_n must not exceed tau_p = 0.7, got 0.9"),
    ({"kappa_p": nan}, ValueError, r"kappa_p must lie in \[0.0, inf\], got nan"),
    ({"kappa_n": -1.0}, ValueError, "kappa_n must lie in"),
    ({"temp_nl": 0.0}, ValueError, "temp_nl must lie in"),
    ({"tau_p": 10**400}, ValueError, r"tau_p must lie in \[0.0, 1.0\], got a number that no float holds"),
    ({"kappa_p": 10**5000}, ValueError, "kappa_p must lie in .* got a number that no float holds"),
    ({"logits": torch.zeros(2, 3, 4).to_sparse()}, TypeError, "dense tensor .* got layout sparse_coo"),
    ({"temp_nl": "2"}, TypeError, "temp_nl must be a number, got str"),
]


@pytest.mark.parametrize("arguments, error, sentence", BAD)
def test_bad_arguments(arguments, error, sentence):
    for function in (ups_fast.mc_select, reference.mc_select):
        with pytest.raises(error, match=sentence):
            function(**{"logits": torch.zeros(2, 3, 4), **arguments})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("p", [2, 10])
def test_no_samples_are_no_reason_to_warn(p):
    for function in (ups_fast.mc_select, reference.mc_select):
        assert function(torch.zeros(p, 0, 4)).std.shape == (0,)


def test_reference_matches_oracle():
    for p, n, c in ((2, 7, 1), (10, 500, 10), (10, 100, 100)):
        z = logits_of(p, n, c)
        for thresholds in ({}, LOOSE, {"temp_nl": 5.0}):
            check_against_oracle(reference.mc_select(z, **thresholds), z, **thresholds)


@pytest.mark.parametrize("c", [2, 10, 33, 100])
def test_parts_of_a_set_make_the_whole(isa, c):
    """So that logits [P, N, C] that do not fit into memory can be selected from part by part."""
    logits = 3 * torch.randn(5, 257, c, generator=torch.Generator().manual_seed(c))
    whole = ups_fast.mc_select(logits, packed=True)
    for size in (1, 7, 100):
        parts = [ups_fast.mc_select(part, packed=True) for part in logits.split(size, dim=1)]
        assert all(map(torch.equal, whole, map(torch.cat, zip(*parts, strict=True))))
