"""augment and the elementwise ops under every mode of torch: what is cached is real, and no mode changes a bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import ups_fast
from ups_fast import policy, reference

IMAGES = torch.randint(0, 256, (9, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
INDEX = torch.arange(5)
RULE = {"policy": "ups", "seed": 0, "draw": 0, "mean": (0.4, 0.5, 0.6), "std": (0.5,) * 3}
WANT = reference.augment(IMAGES, INDEX, **RULE)


def augment(images: Tensor = IMAGES, index: Tensor = INDEX) -> Tensor:
    return ups_fast.augment(images, index, **RULE)


class Augment(nn.Module):
    def forward(self, images: Tensor, index: Tensor) -> Tensor:
        return augment(images, index)


def by_fake_tensors() -> None:
    with FakeTensorMode() as mode:
        fake = augment(mode.from_tensor(IMAGES), mode.from_tensor(INDEX))
    assert fake.shape == WANT.shape and fake.stride() == augment().stride()


def by_fake_cuda_tensors() -> None:
    with FakeTensorMode():
        images = torch.empty(9, 8, 8, 3, dtype=torch.uint8, device="cuda")
        assert augment(images, torch.zeros(4, dtype=torch.int64, device="cuda")).is_cuda


def by_make_fx(mode: str) -> None:
    graph = make_fx(lambda images, index: augment(images, index), tracing_mode=mode)(IMAGES, INDEX)
    assert torch.equal(graph(IMAGES, INDEX), WANT)


def by_export(strict: bool, **kwargs) -> None:
    for _ in range(2):  # the second one of a module
        program = export(Augment(), (IMAGES, INDEX), strict=strict, **kwargs)
        assert torch.equal(program.module()(IMAGES, INDEX), WANT)


def by_dynamo(**kwargs) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda images, index: (augment(images, index), augment(images, index + 1)),
        fullgraph=True, backend="aot_eager", **kwargs,
    )  # fmt: skip
    first, second = compiled(IMAGES, INDEX)
    assert torch.equal(first, WANT) and torch.equal(second, augment(IMAGES, INDEX + 1))


def by_default_dtype() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(augment(), WANT)
    finally:
        torch.set_default_dtype(torch.float32)


def by_default_device() -> None:
    torch.set_default_device("meta")
    try:
        assert torch.equal(augment(), WANT)
    finally:
        torch.set_default_device(None)


def by_context(context: Callable) -> None:
    with context():
        assert torch.equal(augment(), WANT)


def by_torch_func(transform: Callable, point: Tensor) -> None:
    transform(lambda weight: (augment() * weight).sum())(point)


def by_meta() -> None:
    plan = ups_fast.augment_plan(INDEX.to("meta"), policy="ups", size=8, seed=0, draw=0)
    assert plan.draws.shape == (5, 20) and plan.draws.is_meta
    place = torch.empty(5, 8, 8, 3, device="meta").permute(0, 3, 1, 2)
    got = ups_fast.augment(IMAGES.to("meta"), INDEX.to("meta"), plan=plan, out=place, **RULE)
    assert got is place


MODES = {
    "fake": by_fake_tensors,
    "fake cuda": by_fake_cuda_tensors,
    "make_fx": lambda: by_make_fx("real"),
    "make_fx fake": lambda: by_make_fx("fake"),
    "make_fx symbolic": lambda: by_make_fx("symbolic"),
    "export": lambda: by_export(False),
    "export dynamic": lambda: by_export(False, dynamic_shapes=({0: Dim("n")}, {0: Dim("b")})),
    "export strict": lambda: by_export(True),
    "compile": by_dynamo,
    "compile dynamic": lambda: by_dynamo(dynamic=True),
    "inference": lambda: by_context(torch.inference_mode),
    "no_grad": lambda: by_context(torch.no_grad),
    "device": lambda: by_context(lambda: torch.device("meta")),
    "default device": by_default_device,
    "default dtype": by_default_dtype,
    "flop counter": lambda: by_context(lambda: FlopCounterMode(display=False)),
    "func.grad": lambda: by_torch_func(torch.func.grad, torch.tensor(2.0)),
    "func.vmap": lambda: by_torch_func(torch.func.vmap, torch.ones(2)),
    "meta": by_meta,
}


@pytest.fixture
def nothing_cached():
    policy.tables.cache_clear()
    policy.normalization.cache_clear()


SLOW = {"export strict", "export dynamic", "make_fx symbolic", "compile", "compile dynamic"}


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=pytest.mark.slow) if mode in SLOW else mode for mode in MODES]
)
@pytest.mark.parametrize("first", ["mode", "eager"])
def test_augment_is_the_same_before_and_after_a_mode(nothing_cached, mode, first):
    if first == "eager":
        assert torch.equal(augment(), WANT)
    MODES[mode]()
    batch = augment()
    assert torch.equal(batch, WANT) and type(batch) is Tensor
    weight = torch.ones((), requires_grad=True)
    (augment() * weight).sum().backward()  # no tensor of inference mode has got into the graph
    MODES[mode]()


@pytest.mark.slow
def test_many_rules_in_one_graph_and_one_rule_in_many_graphs():
    weak = {**RULE, "policy": "weak", "mean": [0.1, 0.2, 0.3]}

    def views(images: Tensor, index: Tensor, draw: Tensor) -> Tensor:
        return ups_fast.augment(images, index, **{**RULE, "draw": draw}) - ups_fast.augment(
            images, index, **weak
        )

    compiled = torch.compile(views, fullgraph=True, backend="aot_eager")
    for draw in (torch.tensor(0), torch.tensor(7), torch.arange(5)):
        assert torch.equal(compiled(IMAGES, INDEX, draw), views(IMAGES, INDEX, draw))
    assert torch.equal(
        compiled(IMAGES[:, 1:].contiguous(), INDEX, draw), views(IMAGES[:, 1:].contiguous(), INDEX, draw)
    )


@pytest.mark.slow
def test_numbers_that_change_from_call_to_call():
    def view(images: Tensor, index: Tensor, mean: float, draw: int) -> Tensor:
        return ups_fast.augment(images, index, **{**RULE, "mean": [mean] * 3, "draw": draw})

    torch._dynamo.reset()
    compiled = torch.compile(view, fullgraph=True, backend="aot_eager")
    for mean, draw in ((0.1, 0), (0.2, 1), (0.3, 2), (0.1, 3)):
        assert torch.equal(compiled(IMAGES, INDEX, mean, draw), view(IMAGES, INDEX, mean, draw))


def test_an_error_while_tables_are_made_is_not_kept(nothing_cached, monkeypatch):
    monkeypatch.setattr(policy, "blend_table", lambda factor: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        augment()
    monkeypatch.undo()
    assert torch.equal(augment(), WANT)


# counter_dropout and mish --------------------------------------------------------------------------------------------


class Dropped(nn.Module):
    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        return ups_fast.mish(ups_fast.counter_dropout(x * 2, keys, p=0.3, layer=1))


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_dropout_and_mish_export_with_a_dynamic_batch(strict):
    x, keys = torch.randn(6, 4, 5, 5), ups_fast.dropout_keys(torch.arange(6), seed=0, draw=0)
    batch = Dim("batch", min=1, max=4096)
    shapes = ({0: batch, 2: Dim("height")}, {0: batch})
    program = export(Dropped(), (x, keys), dynamic_shapes=shapes, strict=strict).module()
    for n, height in ((6, 5), (1, 9), (200, 2)):
        x, keys = torch.randn(n, 4, height, 5), ups_fast.dropout_keys(torch.arange(n), seed=0, draw=0)
        torch.testing.assert_close(program(x, keys), Dropped()(x, keys))


@pytest.mark.slow
def test_dropout_and_mish_compile_for_every_batch():
    compiled = torch.compile(Dropped(), fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (6, 2, 31):
        x, keys = torch.randn(n, 4, 5, 5), ups_fast.dropout_keys(torch.arange(n), seed=0, draw=0)
        torch.testing.assert_close(compiled(x, keys), Dropped()(x, keys))


def layouts(shape: tuple[int, ...]) -> list[Tensor]:
    """Every order of the dimensions, dense; and slices and expanded ones in some orders."""
    found, n = [], len(shape)
    large = torch.randn([2 * max(1, size) for size in shape])
    parts = [tuple(slice(i, i + size) for size in shape) for i in (0, 1)]
    steps = tuple(slice(None, 2 * size, 2) for size in shape)
    orders = list(itertools.permutations(range(n)))
    for order in orders[:: 1 if n < 4 else 5]:
        back = [order.index(i) for i in range(n)]
        found += [
            torch.randn(shape).permute(order),
            torch.randn(shape).permute(order).contiguous().permute(back),
        ]
        found += [large[part].permute(order) for part in (*parts, steps)]
        found += [
            torch.randn([*shape[:i], 1, *shape[i + 1 :]]).expand(shape).permute(order) for i in range(n)
        ]
    odd = torch.empty_strided(
        shape, [999 if size == 1 else s for size, s in zip(shape, torch.empty(shape).stride(), strict=True)]
    )
    return [*found, odd.normal_()]


@pytest.mark.parametrize(
    "shape", [(4, 6, 5, 7), (4, 1, 5, 7), (1, 6, 5, 7), (4, 6, 1, 1), (4, 6), (1, 6), (3, 4, 5), (0, 3, 2, 2)]
)
def test_strides_are_those_of_torchs_own(shape):
    mode = FakeTensorMode()
    for x in layouts(shape):
        keys = torch.arange(x.shape[0], dtype=torch.int32)
        want = torch.neg(x).stride()
        with mode:
            fake, fake_keys = mode.from_tensor(x), mode.from_tensor(keys)
            fakes = [
                torch.ops.ups_fast.mish(fake),
                torch.ops.ups_fast.counter_dropout(fake, fake_keys, 0.3, 1),
            ]
            fakes += [torch.ops.ups_fast.mish_backward(fake, fake)]
        real = [ups_fast.mish(x), ups_fast.counter_dropout(x, keys, p=0.3, layer=1)]
        real += [torch.ops.ups_fast.mish_backward(x, x)]
        for result in (*fakes, *real):
            assert result.stride() == want, (x.shape, x.stride())
        plain = x.contiguous()
        assert torch.equal(real[0], ups_fast.mish(plain))
        assert torch.equal(real[1], ups_fast.counter_dropout(plain, keys, p=0.3, layer=1))
        assert torch.equal(real[2], torch.ops.ups_fast.mish_backward(plain, plain))
        for result in (reference.mish(x), reference.counter_dropout(x, keys, p=0.3, layer=1)):
            same = [size == 1 or a == b for size, a, b in zip(x.shape, result.stride(), want, strict=True)]
            assert all(same) or not x.numel(), (x.shape, x.stride(), result.stride())


@pytest.mark.slow
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 1, 0, 2)])
def test_opcheck_in_every_layout(order):
    x = torch.randn(2, 3, 4, 5).permute(order)
    keys = torch.arange(x.shape[0], dtype=torch.int32)
    for each in (x, x[..., 1:], x.detach().clone().requires_grad_()):
        torch.library.opcheck(torch.ops.ups_fast.mish, (each,))
        torch.library.opcheck(torch.ops.ups_fast.counter_dropout, (each, keys, 0.3, 1))
        torch.library.opcheck(torch.ops.ups_fast.mish_backward, (each.detach(), each.detach()))
