"""counter_dropout: equal bits in every implementation and batch, and masks that look random in every direction."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from torch import Tensor

from ups_fast import CounterDropout, counter_dropout, dropout_keys, ops, reference

SHAPES = [
    (5, 3),
    (4, 16, 8, 8),
    (3, 5, 7, 9),
    (2, 1, 6),
    (1, 33, 2, 3, 4),
    (0, 4, 2, 2),
    (3, 0, 2),
    (2, 3, 0, 4),
    (7, 1),
]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def values(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def keys_of(n: int, seed: int = 0, draw: int = 0) -> Tensor:
    return dropout_keys(torch.arange(n), seed=seed, draw=draw)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_layout_gives_the_references_bits(isa, shape, dtype):
    x, keys = values(shape, dtype), keys_of(shape[0])
    for p, layer in ((0.3, 0), (0.0, 1), (0.999, 2), (1e-12, 2**20 - 1)):
        want = reference.counter_dropout(x, keys, p=p, layer=layer)
        layouts = [x, x.flip(0).flip(0), x.transpose(0, -1).contiguous().transpose(0, -1)]
        layouts += [x.to(memory_format=torch.channels_last)] if x.ndim == 4 else []
        layouts += [torch.stack([x, x], dim=-1)[..., 0]]
        for each in layouts:
            got = ops.counter_dropout(each, keys, p=p, layer=layer)
            assert got.dtype == dtype
            assert torch.equal(got, want)
            assert torch.equal(reference.counter_dropout(each, keys, p=p, layer=layer), want)


def test_channels_last_stays_so():
    x = values((4, 16, 8, 8)).to(memory_format=torch.channels_last)
    assert counter_dropout(x, keys_of(4), p=0.5).is_contiguous(memory_format=torch.channels_last)


def test_a_mask_depends_on_its_row_alone(isa):
    x, keys = torch.ones(64, 16, 4, 4), keys_of(64)
    whole = counter_dropout(x, keys, p=0.3, layer=2)
    for size in (1, 7, 50):
        parts = zip(x.split(size), keys.split(size), strict=True)
        assert torch.equal(torch.cat([counter_dropout(a, b, p=0.3, layer=2) for a, b in parts]), whole)
    order = torch.randperm(64)
    assert torch.equal(counter_dropout(x, keys[order], p=0.3, layer=2), whole[order])
    assert not torch.equal(counter_dropout(x, keys, p=0.3, layer=3), whole)


@pytest.mark.parametrize("p", [0.3, *(pytest.param(p, marks=pytest.mark.slow) for p in (0.1, 0.5))])
def test_masks_are_independent_in_every_direction(p):
    """Shares and correlations of 4 million elements within five standard deviations of those of fair coins."""
    n, shape = 256, (256, 64, 16, 16)
    masks = {}
    for name, keys, layer in (
        ("base", keys_of(n), 0),
        ("layer", keys_of(n), 1),
        ("pass", keys_of(n, draw=1), 0),
        ("seed", keys_of(n, seed=1), 0),
    ):
        kept = (counter_dropout(torch.ones(shape), keys, p=p, layer=layer) != 0).double()
        masks[name] = (kept - (1 - p)) / math.sqrt(p * (1 - p))
    base, bound = masks["base"], 5 / math.sqrt(n * 64 * 16 * 16)
    assert abs(base.mean()) < bound
    for axis, size in enumerate(shape):  # every row, channel and place has its share
        means = base.transpose(0, axis).flatten(1).mean(dim=1)
        assert means.abs().max() < 6 / math.sqrt(base.numel() / size)
    for name in ("layer", "pass", "seed"):
        assert abs((base * masks[name]).mean()) < bound, name
    for axis in range(4):  # neighbors, and the ones behind them
        for step in (1, 2, 8):
            a, b = base.narrow(axis, step, shape[axis] - step), base.narrow(axis, 0, shape[axis] - step)
            assert abs((a * b).mean()) < 1.2 * bound, (axis, step)
    counts = (base.flatten(1) > 0).sum(dim=1).double()  # of a row: as spread as a binomial
    wanted = 64 * 16 * 16 * p * (1 - p)
    assert 0.65 * wanted < counts.var() < 1.5 * wanted


def test_keys_differ_and_depend_on_everything():
    index = torch.arange(100_000)
    keys = dropout_keys(index, seed=3, draw=4)
    assert keys.dtype == torch.int32
    assert len(keys.unique()) > 100_000 - 20  # two of 100,000 in 2^32 meet 1.2 times on average
    assert torch.equal(dropout_keys(index, seed=torch.tensor(3), draw=torch.full((100_000,), 4)), keys)
    for other in (
        {"seed": 4, "draw": 4},
        {"seed": 3, "draw": 3},
        {"seed": 3 + 2**40, "draw": 4},
        {"seed": 4, "draw": 3},
    ):
        assert (dropout_keys(index, **other) == keys).sum() < 5
    assert dropout_keys(torch.tensor([2**40]), seed=3, draw=4) != keys[0]
    bits = keys[:, None] >> torch.arange(32) & 1
    assert (bits.double().mean(dim=0) - 0.5).abs().max() < 5 * 0.5 / math.sqrt(100_000)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"index": [0]}, "index must be a tensor [B], got list"),
        ({"index": torch.arange(4, dtype=torch.int32)}, "index must be int64, got int32"),
        ({"index": torch.zeros(4)}, "index must be int64, got float32"),
        ({"index": torch.zeros(2, 2, dtype=torch.int64)}, "index must have shape [B], got [2, 2]"),
        ({"index": torch.tensor(3)}, "index must have shape [B], got []"),
        ({"seed": -1}, "seed must be an integer of 0 .. 2^63 - 1, got -1"),
        ({"seed": 2**63}, "seed must be an integer of 0 .. 2^63 - 1, got 9223372036854775808"),
        ({"seed": True}, "seed must be an integer of 0 .. 2^63 - 1, got True"),
        ({"seed": 1.0}, "seed must be an integer of 0 .. 2^63 - 1, got 1.0"),
        ({"seed": "1"}, "seed must be an integer of 0 .. 2^63 - 1, got '1'"),
        (
            {"seed": torch.arange(4)},
            "seed must be an int or an int64 tensor [] on cpu, got torch.int64 [4] on cpu",
        ),
        (
            {"seed": torch.tensor(1.0)},
            "seed must be an int or an int64 tensor [] on cpu, got torch.float32 []",
        ),
        ({"draw": None}, "draw must be an integer of 0 .. 2^63 - 1, got None"),
        (
            {"draw": torch.arange(3)},
            "draw must be an int or an int64 tensor [] or [4] on cpu, got torch.int64 [3]",
        ),
        (
            {"draw": torch.zeros((), dtype=torch.int64, device="meta")},
            "[] or [4] on cpu, got torch.int64 [] on meta",
        ),
    ],
)
def test_bad_arguments_of_keys_are_named(changed, sentence):
    kwargs = {"index": torch.arange(4), "seed": 0, "draw": 0, **changed}
    with pytest.raises((TypeError, ValueError), match=re.escape(sentence)):
        dropout_keys(kwargs["index"], seed=kwargs["seed"], draw=kwargs["draw"])


def test_numbers_of_numpy():
    index, x = torch.arange(4), values((4, 6))
    want = dropout_keys(index, seed=2**40, draw=7)
    for draw in (np.uint8(7), np.int64(7), np.uint64(7)):
        assert torch.equal(dropout_keys(index, seed=np.int64(2**40), draw=draw), want)
    for function in (ops.counter_dropout, reference.counter_dropout):
        assert torch.equal(
            function(x, want, p=np.float32(0.5), layer=np.uint8(200)), function(x, want, p=0.5, layer=200)
        )


def test_the_module_is_the_op_or_nn_dropout():
    x, keys = values((4, 6, 5, 5)), keys_of(4)
    module = CounterDropout(0.3, layer=2)
    assert repr(module) == "CounterDropout(p=0.3, layer=2)" and not module.state_dict()
    want = counter_dropout(x, keys, p=0.3, layer=2)
    assert torch.equal(module(x, keys), want) and torch.equal(module.eval()(x, keys), want)
    assert torch.equal(module(x), x) and not torch.equal(module.train()(x), x)
    assert torch.equal(CounterDropout(0.0)(x, keys), x)
    for wrong in ({"p": 1.0}, {"p": -0.1}, {"p": "half"}, {"p": 0.3, "layer": -1}, {"p": 0.3, "layer": True}):
        with pytest.raises((TypeError, ValueError), match=r"^(p|layer) must "):
            CounterDropout(**wrong)


def test_known_numbers():
    """Of the two hashes, computed by hand with Python's integers: runs of other versions draw the same."""

    def splitmix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    def lowbias(x: int) -> int:
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    h = 0
    for word in (11, 7, 5):  # seed, draw, id
        h = splitmix(((h ^ word) + 0x9E3779B97F4A7C15) % 2**64)
    key = dropout_keys(torch.tensor([5]), seed=11, draw=7)
    assert int(key) % 2**32 == h % 2**32
    layer = lowbias((h + 3 * 0x9E3779B9) % 2**32)
    got = counter_dropout(torch.ones(1, 4, 5, 6), key, p=0.4, layer=3)[0]
    for c in range(4):
        for s in range(30):
            kept = lowbias(layer ^ (s * 4 + c)) >= int(0.4 * 2**32)
            assert (got[c].flatten()[s] != 0) == kept


def test_derivatives():
    x, keys = values((3, 4, 2), torch.float64).requires_grad_(), keys_of(3)
    f = lambda x: counter_dropout(x, keys, p=0.4, layer=1)  # noqa: E731
    torch.autograd.gradcheck(f, (x,), check_forward_ad=True)
    torch.autograd.gradgradcheck(f, (x,))
    grad = torch.func.grad(lambda x: f(x).sum())(x.detach())
    assert torch.equal(grad, f(torch.ones_like(x)))
    torch.library.opcheck(torch.ops.ups_fast.counter_dropout, (x, keys, 0.4, 1))


@pytest.mark.parametrize(
    ("p", "layer", "sentence"),
    [
        (1.5, 0, "p must lie in [0, 1), got 1.5"),
        (-1e-9, 0, "p must lie in [0, 1), got -1e-09"),
        (0.5, 1 << 20, "layer must lie in 0..2^20 - 1, got 1048576"),
    ],
)
def test_the_op_itself_says_what_it_got(p, layer, sentence):
    with pytest.raises(RuntimeError, match=f"^{re.escape(sentence)}$"):
        torch.ops.ups_fast.counter_dropout(torch.ones(2, 3), torch.zeros(2, dtype=torch.int32), p, layer)


@pytest.mark.slow
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_compiled_is_equal(memory_format):
    x = values((6, 8, 5, 5)).to(memory_format=memory_format).requires_grad_()
    keys = keys_of(6)

    def loss(x: Tensor, keys: Tensor) -> Tensor:
        return (counter_dropout(x * 2, keys, p=0.3, layer=5) + 1).square().sum(dim=(1, 2, 3))

    compiled = torch.compile(loss, fullgraph=True, dynamic=False)
    assert torch.allclose(compiled(x, keys), loss(x, keys), rtol=1e-6)
    grads = [torch.autograd.grad(f(x, keys).sum(), x)[0] for f in (loss, compiled)]
    assert torch.equal(grads[0] == 0, grads[1] == 0)
    assert torch.allclose(*grads, rtol=1e-5)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"x": [1.0]}, "x must be a tensor [B, C, ...], got list"),
        ({"x": torch.ones(4)}, "x must be floating-point [B, C, ...], got float32 [4]"),
        (
            {"x": torch.ones(4, 3, dtype=torch.int64)},
            "x must be floating-point [B, C, ...], got int64 [4, 3]",
        ),
        ({"x": torch.ones(4, 3).to_sparse()}, "x must be a dense tensor"),
        ({"keys": torch.zeros(4, dtype=torch.int64)}, "keys must be int32, got int64"),
        ({"keys": torch.zeros(5, dtype=torch.int32)}, "keys must be [4] on cpu like x, got [5] on cpu"),
        ({"p": 1.0}, "p must be below 1, got 1"),
        ({"p": -0.1}, "p must lie in [0.0, 1.0], got -0.1"),
        ({"p": math.nan}, "p must lie in [0.0, 1.0], got nan"),
        ({"layer": -1}, "layer must be an integer of 0 .. 2^20 - 1, got -1"),
        ({"layer": 2**20}, "layer must be an integer of 0 .. 2^20 - 1, got 1048576"),
    ],
)
def test_bad_arguments_are_named(changed, sentence):
    kwargs = {"x": torch.ones(4, 3), "keys": keys_of(4), "p": 0.3, "layer": 0, **changed}
    for function in (ops.counter_dropout, reference.counter_dropout):
        with pytest.raises((TypeError, ValueError), match=re.escape(sentence)):
            function(kwargs["x"], kwargs["keys"], p=kwargs["p"], layer=kwargs["layer"])
