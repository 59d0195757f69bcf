"""The CUDA kernels on a GPU: values, types, memory layouts, streams, graphs, no waiting, determinism.

Their device code is also held against the reference without a GPU (test_cuda_kernels.py); here are the launchers, and
what only a device can show.
"""

from __future__ import annotations

import itertools
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import oracle
import pytest
import torch
from test_augment import hostile_images
from test_cuda_kernels import (
    DTYPES,
    LOOSE,
    assert_close,
    assert_same,
    batch,
    both_gradients,
    inside,
    logits_of,
)
from torch import Tensor

import ups_fast
from ups_fast import reference
from ups_fast.policy import POLICIES
from ups_fast.reference import Selection, pack_mask, unpack_mask

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
inf, nan = math.inf, math.nan
C_HOSTILE = [1, 2, 3, 10, 31, 32, 33, 100, 257, 500, 1000, 2000, 4096, 65536]
OPS = ["mc_select", "mc_select_multilabel", "nce_loss", "ups_loss", "ups_loss_multilabel", "fixmatch_loss"]


def to_device(*xs: Tensor) -> list[Tensor]:
    return [x.to(DEVICE) for x in xs]


def host(selection: Selection) -> Selection:
    return Selection(*(x.cpu() for x in selection))


def gradient(f, z: Tensor) -> Tensor:
    z = z.detach().requires_grad_()
    f(z).backward()
    assert z.grad is not None
    return z.grad


def test_the_kernels_serve_this_device():
    assert ups_fast.backend()["cuda"].startswith("fused kernels")
    ops = (
        "mc_select",
        "nce_loss",
        "nce_loss_backward",
        "ups_loss",
        "ups_loss_backward",
        "fixmatch_loss",
        "fixmatch_loss_backward",
        "mc_select_multilabel",
        "ups_loss_multilabel",
        "ups_loss_multilabel_backward",
        "augment",
        "augment_plan",
        "counter_dropout",
        "mish",
        "mish_backward",
    )
    for op in ops:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ups_fast::{op}", "CUDA")


# Augmentation and dropout --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_augment_is_the_cpus(policy, channels, dtype):
    """Which tests hold against Pillow, bit for bit."""
    for size in ((32, 32), (8, 8), (64, 17), (96, 96), (224, 224), (250, 300)):  # the last in global memory
        images = hostile_images(64, *size, channels)
        index = torch.randint(64, (300,), generator=torch.Generator().manual_seed(0))
        draw = torch.arange(300)
        kwargs = {
            "policy": policy,
            "seed": 5,
            "mean": (0.4,) * channels,
            "std": (0.3,) * channels,
            "dtype": dtype,
        }
        want = ups_fast.augment(images, index, draw=draw, **kwargs)
        images, index, draw = to_device(images, index, draw)
        got = ups_fast.augment(images, index, draw=draw, **kwargs)
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(got.cpu(), want)
        plan = ups_fast.augment_plan(index, policy=policy, size=size, seed=5, draw=draw)
        assert torch.equal(ups_fast.augment(images, index, draw=0, plan=plan, **kwargs), got)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 3), (64, 16, 8, 8), (1, 33, 2, 3, 4), (0, 4, 2, 2), (3, 5, 1000)])
def test_counter_dropout_is_the_cpus(shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    keys = ups_fast.dropout_keys(torch.arange(shape[0]), seed=1, draw=2)
    want = ups_fast.counter_dropout(x, keys, p=0.3, layer=4)
    assert torch.equal(ups_fast.counter_dropout(*to_device(x, keys), p=0.3, layer=4).cpu(), want)
    if x.ndim == 4:
        last = x.to(DEVICE, memory_format=torch.channels_last)
        assert torch.equal(ups_fast.counter_dropout(last, keys.to(DEVICE), p=0.3, layer=4).cpu(), want)
        compiled = torch.compile(ups_fast.counter_dropout, fullgraph=True, dynamic=False)
        assert torch.equal(compiled(last, keys.to(DEVICE), p=0.3, layer=4).cpu(), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mish_is_the_references(dtype):
    """Within two roundings of the result: the exponentials of host and device differ in their last bit.

    Below -87 in float32, and so for what is computed in it, mish stays at 87 e^-87.
    """
    x = torch.cat([torch.linspace(-100, 100, 9999), torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])])
    x = x.to(DEVICE, dtype).requires_grad_()
    want = reference.mish(x.detach().double())
    close = {
        "rtol": 2 * torch.finfo(dtype).eps,
        "atol": max(torch.finfo(dtype).smallest_normal, 0 if dtype == torch.float64 else 2e-36),
        "equal_nan": True,
    }
    torch.testing.assert_close(ups_fast.mish(x).double(), want, **close)
    (got,) = torch.autograd.grad(ups_fast.mish(x).sum(), x)
    exact = x.detach().double().requires_grad_()
    (slope,) = torch.autograd.grad(reference.mish(exact).sum(), exact)
    torch.testing.assert_close(
        got.double(), slope, rtol=4 * torch.finfo(dtype).eps, atol=1e-6, equal_nan=True
    )
    image = torch.randn(3, 8, 5, 5, device=DEVICE).to(memory_format=torch.channels_last)
    assert ups_fast.mish(image).is_contiguous(memory_format=torch.channels_last)


def test_a_graph_of_augment_replays_for_another_epoch():
    images, index = hostile_images(32, 32, 32, 3).to(DEVICE), torch.arange(32, device=DEVICE)
    seed, draw = (torch.tensor(x, device=DEVICE) for x in (3, 1))
    kwargs = {"policy": "ups", "seed": seed, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    ups_fast.augment(images, index, draw=draw, **kwargs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ups_fast.augment(images, index, draw=draw, **kwargs)
    for number in (1, 7):
        draw.fill_(number)
        graph.replay()
        assert torch.equal(out, ups_fast.augment(images, index, **{**kwargs, "draw": number}))


# Values --------------------------------------------------------------------------------------------------------------


def check_mc_select(z: Tensor, **thresholds) -> None:
    got = host(ups_fast.mc_select(z, **thresholds))
    want = oracle.mc_select(z.double().cpu().numpy(), **thresholds)
    sure = ~want["doubt_label"]
    assert (got.label.numpy() == want["label"])[sure].all()
    assert (got.positive.numpy() == want["positive"])[~want["doubt_positive"]].all()
    assert (got.negative.numpy() == want["negative"])[~want["doubt_negative"]].all()
    np.testing.assert_allclose(got.confidence.numpy(), want["confidence"], atol=1e-6, rtol=0)
    np.testing.assert_allclose(got.std.numpy()[sure], want["std"][sure], atol=1e-6, rtol=0)
    bits = host(ups_fast.mc_select(z, packed=True, **thresholds))
    assert_same(bits, got._replace(negative=pack_mask(got.negative)))


@pytest.mark.parametrize("c", C_HOSTILE)
@pytest.mark.parametrize("p", [2, 3, 10, 17])
def test_mc_select_on_hostile_shapes(c, p):
    for n in (0, 1, 7, 70) if c <= 4096 else (1, 3):
        z = logits_of(p, n, c, seed=c + n).to(DEVICE)
        if n == 0:
            assert ups_fast.mc_select(z).negative.shape == (0, c)
            continue
        for thresholds in ({}, LOOSE, {"temp_nl": 3.0}):
            check_mc_select(z, **thresholds)


@pytest.mark.parametrize("c", [2, 10, 33, 100, 1000, 4096])
@pytest.mark.parametrize("temp_nl", [2.0, 1.0, 3.7])
def test_mc_select_error_is_at_most_twice_the_references(c, temp_nl):
    z = logits_of(10, 20000 if c <= 100 else 500, c, seed=3).to(DEVICE)
    want = oracle.mc_select(z.double().cpu().numpy(), temp_nl=temp_nl)
    got, ref = host(ups_fast.mc_select(z, temp_nl=temp_nl)), host(reference.mc_select(z, temp_nl=temp_nl))
    for field in ("confidence", "std"):
        error, allowed = (
            np.abs(getattr(x, field).numpy() - want[field])[~want["doubt_label"]].max() for x in (got, ref)
        )
        assert error <= 2 * allowed, (field, error, allowed)


def test_mc_select_of_many_rows():
    z = logits_of(10, 1_000_001, 10, seed=1).to(DEVICE)
    got = ups_fast.mc_select(z)
    for rows in (slice(0, 5000), slice(-5000, None)):
        check_mc_select(z[:, rows])
        assert_same(host(Selection(*(x[rows] for x in got))), host(ups_fast.mc_select(z[:, rows])))


def test_more_than_2_to_the_31_logits():
    rows = 2**30 // 10 + 1000
    z = torch.zeros(2, rows, 10, dtype=torch.bfloat16, device=DEVICE)
    assert z.numel() > 2**31
    z[:, -500:] = logits_of(2, 500, 10, dtype=torch.bfloat16).to(DEVICE)
    got = ups_fast.mc_select(z, **LOOSE)
    assert_same(
        host(Selection(*(x[-500:] for x in got))), host(ups_fast.mc_select(z[:, -500:].contiguous(), **LOOSE))
    )
    flat = z.view(-1, 10)
    mask = torch.zeros(len(flat), 1, dtype=torch.int32, device=DEVICE)
    mask[-500:] = 0b1010
    d_logits = gradient(lambda x: ups_fast.nce_loss(x, mask), flat)
    want = gradient(lambda x: ups_fast.nce_loss(x, mask[-500:]), flat[-500:].clone())
    assert torch.equal(d_logits[-500:], want) and not d_logits[:-500].any()


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("c", [1, 10, 13, 28, 100, 257, 512, 1000, 2048, 4096])
def test_mc_select_reads_slices_of_larger_tensors(dtype, c):
    z = logits_of(3, 5, c, dtype=dtype, seed=c)
    want = host(ups_fast.mc_select(z.to(DEVICE), **LOOSE))
    for offset in (0, 1, 2, 4):
        large = inside(z, offset)._base
        assert large is not None
        view = large.to(DEVICE)[:3, :5, offset : offset + c]
        assert not view.is_contiguous()
        assert_same(host(ups_fast.mc_select(view, **LOOSE)), want)
    scattered = z.to(DEVICE).transpose(0, 2).contiguous().transpose(0, 2)  # classes not contiguous
    assert_same(host(ups_fast.mc_select(scattered, **LOOSE)), want)
    assert_same(host(ups_fast.mc_select(z.float().to(DEVICE), **LOOSE)), want)


@pytest.mark.parametrize("c", [10, 100, 1000, 4096])
def test_mc_select_ties_equal_passes_and_rows_that_are_not_finite(c):
    z = logits_of(10, 12, c, seed=5).to(DEVICE)
    z[..., c - 1] = z[..., 0] = z.amax(-1) + 0.5
    assert (ups_fast.mc_select(z).label == 0).all()
    same = z[:1].expand(7, -1, -1)
    assert (ups_fast.mc_select(same).std == 0).all()
    for bad in (nan, inf, -inf):
        broken = z.clone()
        broken[3, 4, c // 2] = bad
        got, want = ups_fast.mc_select(broken), ups_fast.mc_select(z)
        assert got.label[4] == -1 and got.confidence[4].isnan() and got.std[4].isnan()
        assert not got.positive[4] and not got.negative[4].any()
        others = torch.arange(12, device=DEVICE) != 4
        assert_same(host(Selection(*(x[others] for x in got))), host(Selection(*(x[others] for x in want))))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", [1, 2, 3, 10, 32, 33, 100, 257, 1000, 1025, 4096])
def test_losses_on_hostile_shapes(c, dtype):
    for n, packed in itertools.product((1, 7, 700), (False, True)):
        z, *rows = to_device(*batch(n, c, dtype=dtype, seed=c, packed=packed))
        truth, d_truth, d_reference = both_gradients(lambda x, rows=rows: reference.ups_loss(x, *rows), z)
        assert_close(ups_fast.ups_loss(z, *rows), truth, reference.ups_loss(z, *rows))
        assert_close(gradient(lambda x, rows=rows: ups_fast.ups_loss(x, *rows), z), d_truth, d_reference)
        for reduction in ("mean", "sum", "none"):

            def f(x, ops=reference, mask=rows[2], reduction=reduction):
                return ops.nce_loss(x, mask, reduction=reduction)

            truth, d_truth, d_reference = both_gradients(f, z)
            assert_close(f(z, ups_fast), truth, f(z))
            assert_close(gradient(lambda x, f=f: f(x, ups_fast).sum(), z), d_truth, d_reference)


def test_losses_pass_gradcheck():
    z, *rows = to_device(*batch(9, 7, dtype=torch.float64, seed=3))
    z.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ups_fast.ups_loss(x, *rows), z)
    for reduction in ("none", "mean", "sum"):
        assert torch.autograd.gradcheck(lambda x, r=reduction: ups_fast.nce_loss(x, rows[2], reduction=r), z)


@pytest.mark.parametrize("c", [10, 100, 1500])
def test_losses_read_slices_of_larger_tensors(c):
    z, target, positive, negative = batch(9, c, seed=2)
    want = ups_fast.ups_loss(*to_device(z, target, positive, negative))
    for offset, mask in itertools.product((1, 2), (negative, pack_mask(negative))):
        big_z, big_mask = inside(z, offset)._base, inside(mask, offset)._base
        assert big_z is not None and big_mask is not None
        z_in = big_z.to(DEVICE)[:9, offset : offset + c]
        mask_in = big_mask.to(DEVICE)[:9, offset : offset + mask.shape[1]]
        pairs = torch.stack([target, target], dim=1).to(DEVICE)  # a column: stride 2
        assert torch.equal(ups_fast.ups_loss(z_in, pairs[:, 0], positive.to(DEVICE), mask_in), want)
        transposed = z.to(DEVICE).T.contiguous().T
        assert torch.equal(ups_fast.ups_loss(transposed, *to_device(target, positive), mask_in), want)


@pytest.mark.parametrize("n", [6, 5000])
def test_ups_loss_of_a_target_out_of_range_is_nan(n):
    z, target, positive, negative = to_device(*batch(n, 10, seed=5))
    target.clamp_(min=0)
    positive[1] = True
    for wrong in (-1, 10, 2**40):
        target[1] = wrong
        z.requires_grad_().grad = None
        loss = ups_fast.ups_loss(z, target, positive, negative)
        loss.backward()
        assert loss.isnan() and z.grad is not None
        assert z.grad.isnan().all(dim=1).nonzero().flatten().tolist() == [1]


def test_mc_select_and_losses_fit_together():
    z = logits_of(10, 3000, 100, seed=7).to(DEVICE)
    bits, plain = ups_fast.mc_select(z, packed=True, **LOOSE), ups_fast.mc_select(z, **LOOSE)
    assert torch.equal(unpack_mask(bits.negative, 100), plain.negative) and plain.negative.any()
    losses = [ups_fast.ups_loss(z[0], s.label, s.positive, s.negative) for s in (bits, plain)]
    assert torch.equal(*losses) and losses[0].isfinite()


def test_wrong_arguments_of_the_bare_ops_raise():
    z, target, positive, negative = to_device(*batch(4, 10))
    ops = torch.ops.ups_fast
    with pytest.raises(RuntimeError, match="logits must be float32, float16 or bfloat16 on a CUDA device"):
        ops.mc_select(z.double()[None], 0.7, 0.05, inf, inf, 2.0, False)
    with pytest.raises(RuntimeError, match="negative must be on the logits' device"):
        ops.ups_loss(z, target, positive, negative.cpu())
    with pytest.raises(RuntimeError, match="mask must have size 10 in dimension 1, got 9"):
        ops.nce_loss(z, negative[:, 1:], 1)
    with pytest.raises(RuntimeError, match="at most 1024 passes with 4096 classes"):
        ops.mc_select(z[:1, :1, None].expand(1025, 1, 4096), 0.7, 0.05, 0.05, 0.005, 2.0, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("n", "c"), [(1, 3), (448, 10), (448, 100), (70, 1000), (9000, 33)])
def test_fixmatch_loss(n, c, dtype):
    g = torch.Generator().manual_seed(n + c)
    strong, weak = (3 * torch.randn(n, c, generator=g) for _ in range(2))
    weak[torch.arange(n) % 3 == 0] *= 5
    strong, weak = to_device(strong.to(dtype), weak.to(dtype))
    tau, weight = to_device(torch.rand(c, generator=g), torch.rand(n, generator=g))
    for options in ({}, {"tau": tau, "weight": weight, "temperature": 0.5, "reduction": "mean"}):

        def f(x, weak=weak, options=options):
            return reference.fixmatch_loss(x, weak.to(x.dtype), **options)

        truth, d_truth, d_reference = both_gradients(f, strong)
        loss, mask = ups_fast.fixmatch_loss(strong, weak, **options, return_mask=True)
        assert torch.equal(mask, reference.fixmatch_loss(strong, weak, **options, return_mask=True)[1])
        assert_close(loss, truth, f(strong), roundings=5)
        d_strong = gradient(lambda x, options=options: ups_fast.fixmatch_loss(x, weak, **options), strong)
        assert_close(d_strong, d_truth, d_reference, roundings=5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", [1, 3, 31, 33, 80, 257, 10_000])
def test_multilabel(c, dtype):
    z = logits_of(10, 300 if c < 1000 else 7, c, dtype=dtype, seed=c).to(DEVICE)
    of_class = {"tau_p": torch.rand(c, device=DEVICE), "kappa_n": torch.rand(c, device=DEVICE) / 20}
    for options in ({}, {"tau_n": 0.2, "kappa_n": 0.05, "temp_nl": 3.0}, of_class):
        got = ups_fast.mc_select_multilabel(z, **options)
        numbers = {k: v.cpu().numpy() if isinstance(v, Tensor) else v for k, v in options.items()}
        want = oracle.mc_select_multilabel(z.double().cpu().numpy(), **numbers)
        for name in ("positive", "negative"):
            sure = ~want[f"doubt_{name}"]
            assert (getattr(got, name).cpu().numpy() == want[name])[sure].all()
        for name in ("confidence", "std"):
            atol = 1e-14 if dtype == torch.float64 else 5e-7
            np.testing.assert_allclose(getattr(got, name).cpu().numpy(), want[name], rtol=0, atol=atol)
        packed = ups_fast.mc_select_multilabel(z, packed=True, **options)
        assert torch.equal(packed.positive, pack_mask(got.positive))
        assert torch.equal(packed.negative, pack_mask(got.negative))
    masks = torch.rand_like(z[0], dtype=torch.float32) < 0.2, torch.rand_like(z[0], dtype=torch.float32) < 0.4
    of_image, of_entry = torch.rand(z.shape[1], device=DEVICE), torch.rand(z.shape[1:], device=DEVICE)
    for weight in (None, of_image, of_entry):

        def f(x, ops=reference, weight=weight, masks=masks):
            return ops.ups_loss_multilabel(x, *masks, weight=weight)

        truth, d_truth, d_reference = both_gradients(f, z[0])
        assert_close(f(z[0], ups_fast), truth, f(z[0]), roundings=5)
        assert_close(gradient(lambda x, f=f: f(x, ups_fast), z[0]), d_truth, d_reference, roundings=5)


# Streams, graphs, waiting, determinism -------------------------------------------------------------------------------


def some_calls() -> dict[str, list[Tensor]]:
    """Inputs of each op, large enough for several blocks."""
    z, target, positive, negative = to_device(*batch(5000, 100, seed=8))
    return {
        "mc_select": [logits_of(10, 5000, 100, seed=9).to(DEVICE)],
        "nce_loss": [z, negative],
        "ups_loss": [z, target, positive, pack_mask(negative)],
        "fixmatch_loss": [z, 4 * z.flip(0)],
        "mc_select_multilabel": [logits_of(10, 5000, 100, seed=9).to(DEVICE)],
        "ups_loss_multilabel": [z, negative.flip(0), pack_mask(negative)],
    }


def run(op: str, inputs: list[Tensor]) -> list[Tensor]:
    """The op's results, and for a loss the gradient."""
    if op.startswith("mc_select"):
        return list(getattr(ups_fast, op)(*inputs))
    z = inputs[0].detach().requires_grad_()
    loss = getattr(ups_fast, op)(z, *inputs[1:])
    loss.backward()
    assert z.grad is not None
    return [loss.detach(), z.grad]


def assert_equal(got: list[Tensor], want: list[Tensor]) -> None:
    assert all(torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_results_repeat_bit_for_bit(op):
    inputs = some_calls()[op]
    want = run(op, inputs)
    for _ in range(20):
        assert_equal(run(op, inputs), want)


@pytest.mark.parametrize("op", OPS)
def test_kernels_run_on_the_current_stream(op):
    """On a side stream whose earlier work is slow; a kernel on another stream would read the zeros before it."""
    inputs = some_calls()[op]
    want = run(op, inputs)
    late = torch.zeros_like(inputs[0])
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        late.copy_(inputs[0])
        got = run(op, [late, *inputs[1:]])
    side.synchronize()
    assert_equal(got, want)


def test_a_graph_of_ups_loss_and_its_gradient_replays():
    z, *rows = some_calls()["ups_loss"]
    held = z.clone().requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm-up, as torch asks for
        ups_fast.ups_loss(held, *rows).backward()
    torch.cuda.current_stream().wait_stream(side)
    held.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = ups_fast.ups_loss(held, *rows)
        loss.backward()
    for seed in range(3):
        fresh, target, positive, negative = to_device(*batch(5000, 100, seed=seed))
        with torch.no_grad():
            held.copy_(fresh)
        for old, new in zip(rows, (target, positive, pack_mask(negative)), strict=True):
            old.copy_(new)
        graph.replay()
        assert held.grad is not None
        assert_equal([loss.detach(), held.grad], run("ups_loss", [fresh, *rows]))


@contextmanager
def no_waiting() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("op", OPS)
def test_the_host_never_waits(op):
    inputs = some_calls()[op]
    run(op, inputs)
    with no_waiting():
        run(op, inputs)
    flag = torch.ones((), device=DEVICE)
    with pytest.raises(RuntimeError, match="synchronizing"), no_waiting():
        flag.item()  # the check itself works


def test_losses_under_autocast_and_compile():
    z, *rows = some_calls()["ups_loss"]
    weight = torch.randn(100, 100, device=DEVICE) / 10

    def step(x: Tensor) -> Tensor:
        return ups_fast.ups_loss(x @ weight, *rows)

    with torch.autocast("cuda", dtype=torch.bfloat16):
        want, d_want = step(z), gradient(step, z)
        compiled = torch.compile(step, fullgraph=True)
        got, d_got = compiled(z), gradient(compiled, z)
    assert want.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=2e-3, atol=0)
    torch.testing.assert_close(d_got, d_want, rtol=0.05, atol=1e-2 * d_want.abs().max().item())


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    z, target, positive, negative = to_device(*batch(20, 10, seed=1))
    z.requires_grad_()
    arguments = {
        "mc_select": (logits_of(3, 20, 10).to(DEVICE), 0.7, 0.05, 0.05, 0.005, 2.0, True),
        "nce_loss": (z, negative, 1),
        "ups_loss": (z, target, positive, pack_mask(negative)),
        "fixmatch_loss": (z, z.detach().flip(0), None, 0.5, 1.0, 3),
        "mc_select_multilabel": (logits_of(3, 20, 10).to(DEVICE), 0.5, 0.05, 0.05, 0.005, 2.0, True),
        "ups_loss_multilabel": (z, negative.flip(0), pack_mask(negative), 1),
    }
    torch.library.opcheck(getattr(torch.ops.ups_fast, op).default, arguments[op])


@pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two GPUs: the choice of device is not proved here"
)
@pytest.mark.parametrize("op", OPS)
def test_a_device_that_is_not_the_current_one(op):
    inputs = some_calls()[op]
    elsewhere = run(op, [x.to("cuda:1") for x in inputs])
    assert all(x.device.index == 1 for x in elsewhere)
    assert_equal([x.to(DEVICE) for x in elsewhere], run(op, inputs))


SANITIZED = """
import torch, ups_fast
from itertools import product
shapes = 1, 3, 10, 14, 28, 33, 100, 224, 300, 512, 1000, 1500, 2500
for c, packed, aligned, dtype in product(shapes, (False, True), (False, True), (torch.float32, torch.bfloat16)):
    z = torch.randn(4, 9, c + 1, device="cuda")[..., 1:].to(dtype)  # a slice: rows lie on no multiple of 2
    z = z.contiguous() if aligned else torch.nn.functional.pad(z, (1, 0))[..., 1:]
    s = ups_fast.mc_select(z, tau_p=0.4, tau_n=0.2, kappa_p=0.2, kappa_n=0.05, packed=packed)
    x = z[0].detach().requires_grad_()
    rows = s.label, s.positive, s.negative
    (ups_fast.ups_loss(x, *rows) + ups_fast.nce_loss(x, s.negative)).backward()
    m = ups_fast.mc_select_multilabel(z, tau_n=0.4, kappa_n=0.4, packed=packed)
    ups_fast.ups_loss_multilabel(x, m.positive, m.negative).backward()
    ups_fast.fixmatch_loss(x, z[1]).backward()
x = torch.randn(3000, 10, device="cuda", requires_grad=True)
ups_fast.nce_loss(x, x.detach() > 0).backward()
ups_fast.mish(x).sum().backward()
for size, channels in ((32, 3), (9, 1)):
    images = torch.randint(0, 256, (50, size, size, channels), dtype=torch.uint8, device="cuda")
    index = torch.randperm(50, device="cuda")
    chain = dict(policy="published", seed=1, draw=2, mean=(0.5,) * channels, std=(0.2,) * channels)
    x = ups_fast.augment(images, index, **chain).requires_grad_()
    plan = ups_fast.augment_plan(index, policy="published", size=(size, size), seed=1, draw=2)
    assert torch.equal(x, ups_fast.augment(images, index, plan=plan, **chain))
    keys = ups_fast.dropout_keys(index, seed=1, draw=2)
    ups_fast.counter_dropout(x, keys, p=0.3, layer=1).sum().backward()
torch.cuda.synchronize()
"""


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer(tool):
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not installed: memory accesses are not proved on a GPU here")
    done = subprocess.run(
        [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED],
        capture_output=True,
        text=True,
    )
    if "Device not supported" in done.stdout:
        pytest.skip(
            "compute-sanitizer cannot reach this GPU (a sandbox?): memory accesses are not proved here"
        )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_processes_with_a_gpu_each(tmp_path):
    """The messages are part of the captured step, and the labels those of one process with the same weights."""
    for name in ("yaml", "rich", "tensorboard", "matplotlib", "PIL", "safetensors"):
        pytest.importorskip(name)
    rows, labels = torch.randn(400, 16), torch.arange(400) % 4
    rows += labels[:, None]
    parts = {"labeled": slice(0, 40), "unlabeled": slice(40, 300), "test": slice(300, 400)}
    arrays = {
        f"{kind}_{part}": (x[at].numpy())
        for part, at in parts.items()
        for kind, x in (("x", rows), ("y", labels))
    }
    np.savez(tmp_path / "rows.npz", **arrays)
    (tmp_path / "run.yaml").write_text("data: {name: features, root: rows.npz}\n")
    words = [tmp_path / "run.yaml", f"data.root={tmp_path / 'rows.npz'}", "device=cuda", "train.rounds=2"]
    words += ["train.epochs=3", "train.batch_size=16", "runtime.timeout=60", f"run_dir={tmp_path / 'run'}"]
    python = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*python, "-m", "ups_fast.train", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout and "training step: graph" in done.stdout
