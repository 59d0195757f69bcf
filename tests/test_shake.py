"""Shake-Shake's gates and the ResNeXt: against their definition, in any split of a batch, and in the step."""

from __future__ import annotations

from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ups_fast import load_model, predict, train
from ups_fast.batches import views_of
from ups_fast.data import ResidentImages
from ups_fast.fullgraph import fullgraph
from ups_fast.methods import UPS, Group, Layout, Options, Setting
from ups_fast.models import Dropout, ShakeShake, build
from ups_fast.models.shake import shake
from ups_fast.policy import POLICIES
from ups_fast.reference import counter_uniform, dropout_keys
from ups_fast.selection import Thresholds, passes_over
from ups_fast.step import StepPlan, TrainStep

ROOT = Path(__file__).parents[1]
DOUBLE = torch.float64
GATES = 1 << 19


def tiny(name: str = "shake-8-2x2d", *, dropout: float = 0.3, seed: int = 0, **changes) -> nn.Module:
    torch.manual_seed(seed)
    return build(name, **{"n_classes": 4, "channels": 1, "size": 8, "dropout": dropout, **changes})


def keys_of(index: Tensor, draw: int = 0) -> Tensor:
    return dropout_keys(index, seed=3, draw=draw)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# The gates ------------------------------------------------------------------------------------------------


def test_forward_has_alpha_and_backward_beta():
    gates = torch.tensor([[0.25, 1.0], [1.0, 0.0], [0.3, 0.7]], dtype=DOUBLE)
    first, second, grad = (noise(3, 2, 4, 5, seed=seed) for seed in range(3))
    first.requires_grad_(), second.requires_grad_()
    alpha, beta = (each.view(3, 1, 1, 1) for each in gates.unbind(1))
    mixed = shake(first, second, gates)
    torch.testing.assert_close(mixed, alpha * first + (1 - alpha) * second, rtol=0, atol=1e-14)
    got = torch.autograd.grad(mixed, (first, second), grad)
    for mine, want in zip(got, (beta * grad, (1 - beta) * grad), strict=True):
        torch.testing.assert_close(mine, want, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_keep_the_dtype(dtype):
    first, second = (noise(4, 2, 3, 3, seed=seed, dtype=torch.float32).to(dtype) for seed in (1, 2))
    gates = torch.rand(4, 2, generator=torch.Generator().manual_seed(0))
    mixed, want = shake(first, second, gates), shake(first.double(), second.double(), gates.double())
    assert mixed.dtype == dtype
    # Four roundings of numbers up to 8, and three of a gate.
    assert (mixed.double() - want).abs().max() < 8 * 7 * torch.finfo(dtype).eps


def test_gates_are_uniform_and_independent():
    """Of 10,000 rows, and all pairs of 12 blocks, forward and backward, within five standard deviations."""
    n = 10_000
    draws = [keys_of(torch.arange(n), draw) for draw in (0, 1)]
    z = torch.cat([counter_uniform(24, keys, layer=GATES) for keys in draws], 1).double()
    assert z.min() > 0 and z.max() <= 1
    assert ((z.mean(0) - 0.5).abs() < 5 * (1 / 12 / n) ** 0.5).all()
    shares = torch.stack([z.mul(8).long().eq(i).double().mean(0) for i in range(8)])
    assert ((shares - 1 / 8).abs() < 5 * (7 / 64 / n) ** 0.5).all()
    corr = torch.corrcoef(z.T) - torch.eye(48, dtype=DOUBLE)
    assert corr.abs().max() < 5 / n**0.5
    # A Dropout of the same keys knows nothing of them.
    kept = Dropout(0.5, layer=0)(torch.ones(n, 24), draws[0]).double()
    both = torch.corrcoef(torch.cat([z[:, :24], kept], 1).T)[:24, 24:]
    assert both.abs().max() < 5 / n**0.5


def shaken_again(model: nn.Module, x: Tensor, gates: Tensor, *, backward: bool) -> Tensor:
    """Logits in training mode without dropout, by plain modules and the definition; gates are [B, blocks, 2]."""
    x = model.stem(x)
    for i, block in enumerate(model.blocks):
        stride = 2 if i and block.shortcut is not None else 1
        gate = gates[:, i, int(backward)].view(-1, 1, 1, 1)
        a = x.relu()
        parts = []
        for branch in (block.first, block.second):
            conv1, bn1, _, conv2, bn2 = branch
            y = bn1(F.conv2d(a, conv1.weight, stride=stride, padding=1)).relu()
            parts.append(bn2(F.conv2d(y, conv2.weight, padding=1)))
        if block.shortcut is not None and stride == 1:
            x = block.shortcut[1](F.conv2d(a, block.shortcut[0].weight))
        elif block.shortcut is not None:
            halves, bn = block.shortcut
            moved = torch.zeros_like(a)
            moved[:, :, 1:, 1:] = a[:, :, :-1, :-1]
            pooled = (F.avg_pool2d(each, 1, stride=2) for each in (a, moved))
            weights = (halves.even.weight, halves.odd.weight)
            x = bn(torch.cat([F.conv2d(p, w) for p, w in zip(pooled, weights, strict=True)], 1))
        x = x + gate * parts[0] + (1 - gate) * parts[1]
    return model.linear(x.relu().mean((2, 3)))


def test_shake_shake_is_its_definition():
    """Values in training mode, and in eval mode with gates of one half. An odd size, and two blocks a stage."""
    model, keys = tiny("shake-14-2x2d", dropout=0.0).double(), keys_of(torch.arange(5))
    x = noise(5, 1, 9, 11)
    gates = counter_uniform(12, keys, layer=GATES).double().view(5, 6, 2)
    want = shaken_again(model, x, gates, backward=False)
    torch.testing.assert_close(model(x, keys), want, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(want, shaken_again(model, x, gates, backward=True), atol=1e-3)
    model.eval()
    half = shaken_again(model, x, torch.full((5, 6, 2), 0.5, dtype=DOUBLE), backward=False)
    torch.testing.assert_close(model(x), half, rtol=1e-10, atol=1e-10)
    assert torch.equal(model(x), model(x, keys)), "without dropout keys do nothing there"


def test_the_gradient_of_a_last_block_has_beta():
    """Of the last block's branches: what it would be with beta in the forward pass too, given the same cotangent."""
    model, keys = tiny(dropout=0.0).double(), keys_of(torch.arange(6))
    seen: dict[str, Tensor] = {}
    for name in ("first", "second"):

        def keep(module: nn.Module, args: tuple, output: Tensor, name: str = name) -> None:
            output.retain_grad()
            seen[name] = output

        getattr(model.blocks[2], name).register_forward_hook(keep)
    model.blocks[2].register_forward_hook(lambda *args: (args[2].retain_grad(), seen.update(sum=args[2]))[0])
    model(noise(6, 1, 8, 8), keys).square().sum().backward()
    beta = counter_uniform(6, keys, layer=GATES).double()[:, 5].view(-1, 1, 1, 1)
    cotangent = seen["sum"].grad
    assert cotangent is not None and cotangent.abs().max() > 0
    torch.testing.assert_close(seen["first"].grad, beta * cotangent, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(seen["second"].grad, (1 - beta) * cotangent, rtol=1e-12, atol=1e-15)


def test_a_row_depends_on_its_key_alone():
    """Where batch-norm mixes no rows: what is random for a row is equal in any split and order of the batch."""
    model, x, keys = tiny().double(), noise(9, 1, 8, 8), keys_of(torch.arange(9))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    whole = model(x, keys)
    for size in (1, 2, 5):
        parts = [model(a, b) for a, b in zip(x.split(size), keys.split(size), strict=True)]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)
    order = torch.tensor([8, 1, 4, 0, 2, 7, 3, 6, 5])
    torch.testing.assert_close(model(x[order], keys[order]), whole[order], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(model(x, keys_of(torch.arange(9), 1)), whole, atol=1e-3)
    same = model(x[:1].expand(9, -1, -1, -1), keys)
    assert same.std(0).min() > 1e-4, "each image has gates of its own"


def test_without_keys_gates_are_torchs():
    model, x = tiny(dropout=0.0), noise(4, 1, 8, 8, dtype=torch.float32)
    torch.manual_seed(5)
    first, second = model(x), model(x)
    torch.manual_seed(5)
    assert torch.equal(model(x), first) and not torch.equal(first, second)
    state = torch.get_rng_state()
    model(x, keys_of(torch.arange(4)))
    assert torch.equal(torch.get_rng_state(), state), "with keys none of torch's numbers are used"


@pytest.mark.parametrize("name", ["shake-14-2x2d", pytest.param("resnext-11-2x1d", marks=pytest.mark.slow)])
def test_labeling_passes_differ_by_dropout_alone(name):
    """They are what `forward` says with each pass's keys, whatever is computed once."""
    model, x, index = tiny(name).double().eval(), noise(3, 1, 8, 8), torch.arange(3)
    n = model.n_dropouts
    assert [m.layer for m in model.modules() if isinstance(m, Dropout)] == list(range(n))
    assert n == (6 if isinstance(model, ShakeShake) else 3)
    with torch.no_grad():
        passes = passes_over(model, x, index, 4, 3)
        want = torch.stack([model(x, keys_of(index, draw)) for draw in range(4)])
        torch.testing.assert_close(passes, want, rtol=1e-10, atol=1e-10)
        assert passes.std(0).min() > 1e-6
        late = passes_over(model, x, index, 4, 3, skip=n - 1)
        for module in [m for m in model.modules() if isinstance(m, Dropout)][:-1]:
            module.p = 0.0
        torch.testing.assert_close(late, passes_over(model, x, index, 4, 3), rtol=1e-10, atol=1e-10)
        assert late.std(0).min() > 1e-6 and not torch.allclose(late, passes)
        [m for m in model.modules() if isinstance(m, Dropout)][-1].p = 0.0
        assert passes_over(model, x, index, 4, 3).std(0).max() < 1e-12


# ResNeXt --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "act"),
    [("mish", lambda x: x * F.softplus(x).tanh()), ("leaky_relu", lambda x: x.maximum(0.1 * x))],
)
def test_resnext_is_its_definition(activation, act):
    """Each group of a grouped convolution as a convolution of its own."""
    model, groups, width = tiny("resnext-11-3x2d", activation=activation).double(), 3, 2
    x = noise(3, 1, 9, 11)
    model(x)  # running statistics other than 0 and 1
    model.eval()
    want = act(model.stem[1](F.conv2d(x, model.stem[0].weight, padding=1)))
    for stage, block in enumerate(model.blocks):
        stride = 2 if stage else 1
        y = act(block.bn1(F.conv2d(want, block.conv1.weight)))
        each = width * 2**stage
        assert y.shape[1] == groups * each and block.conv3.weight.shape[0] == 256 * 2**stage
        pairs = zip(y.split(each, 1), block.conv2.weight.split(each), strict=True)
        y = torch.cat([F.conv2d(part, weight, stride=stride, padding=1) for part, weight in pairs], 1)
        y = block.bn3(F.conv2d(act(block.bn2(y)), block.conv3.weight))
        want = act(block.shortcut[1](F.conv2d(want, block.shortcut[0].weight, stride=stride)) + y)
    want = model.linear(want.mean((2, 3)))
    torch.testing.assert_close(model(x), want, rtol=1e-10, atol=1e-10)


# Compiled -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rows", [16, 7])
def test_compiled_gates_are_the_eager_ones(rows):
    """In one graph, forward and backward, whatever is left of a batch by the widest instructions.

    tests/test_train_step.py compiles the whole step.
    """
    keys, first, second = (
        keys_of(torch.arange(rows)),
        noise(rows, 3, 4, 4, seed=1),
        noise(rows, 3, 4, 4, seed=2),
    )
    first.requires_grad_(), second.requires_grad_()

    def mixed(first: Tensor, second: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        gates = counter_uniform(12, keys, layer=GATES).view(rows, 6, 2)
        return shake(first, second, gates[:, 3]), gates

    ends = []
    for run in (mixed, fullgraph(mixed)):
        value, gates = run(first, second, keys)
        ends.append([gates, value, *torch.autograd.grad(value.square().sum(), (first, second))])
    assert torch.equal(ends[0][0], ends[1][0])
    for eager, compiled in zip(*ends, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=1e-12)


def test_nothing_as_large_as_the_images_is_stored_for_the_gates():
    first, second = (noise(2, 3, 4, 4, seed=seed).requires_grad_() for seed in (1, 2))
    stored: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: stored.append(x) or x, lambda x: x):
        shake(first, second, torch.rand(2, 2))
    assert max((each.numel() for each in stored), default=0) <= 2


# In the step, and in a run --------------------------------------------------------------------------------

TINY = {"shake-8-2x4d": 0.0, "resnext-11-2x1d": 0.3}  # and their dropout


def trained(name: str, *, seed: int = 5) -> list[Tensor]:
    """The weights and the loss after two steps of UPS; `seed` is that of dropout and gates."""
    torch.manual_seed(0)
    make = partial(tiny, name, dropout=TINY[name])
    method = UPS(Setting(make, Options("ups"), Thresholds(), n_images=20, n_classes=4)).train()
    pixels = (40 * noise(20, 8, 8, 1) + 128).clamp(0, 255).to(torch.uint8)
    images = ResidentImages(pixels, mean=(0.5,), std=(0.3,), device="cpu", policy=POLICIES["none"])
    step = TrainStep(method, images, StepPlan("eager", torch.float32, ""), momentum=0.9, weight_decay=0.01)
    target = (torch.arange(20) % 4).where(torch.arange(20) % 3 > 0, -1)
    tables = {"target": target, "negative": torch.full((20, 1), 5, dtype=torch.int32)}
    layout = Layout((Group("positive", 6), Group("negative", 4)), 3)
    views = views_of(layout.groups, {"strong": POLICIES["none"]})
    step.start(layout, views, tables, method.state_dict(), augment_seed=1, dropout_seed=seed)
    for at in range(2):
        step(torch.arange(10) + at, torch.arange(10) + 7 * at, lr=0.05)
    return [*step.method.state_dict().values(), step.loss]


@pytest.mark.parametrize("name", ["shake-8-2x4d", pytest.param("resnext-11-2x1d", marks=pytest.mark.slow)])
def test_a_step_depends_on_its_seed_alone(name):
    """Not on torch's generator: so a run that was stopped goes on in the same bits. Gates alone are random in one."""
    first = trained(name)
    assert all(each.isfinite().all() for each in first)
    assert all(map(torch.equal, trained(name), first))
    assert not torch.equal(trained(name, seed=6)[-1], first[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_a_stopped_run_goes_on_and_its_network_predicts(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [
        f"model.name={name}",
        "train.rounds=2",
        "train.epochs=6",
        "train.round0_epochs=6",
        "select.passes=3",
    ]
    words += ["device=cpu", "threads=1", "report.baselines=false", "select.mc_layers=2", "select.heads=1"]
    digits = str(ROOT / "configs/digits.yaml")
    assert train.main([digits, "run_dir=whole", *words]) == 0

    step, steps = TrainStep._step, count()

    def interrupted(self: TrainStep) -> None:
        if next(steps) == 8:  # in the second round
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "_step", interrupted)
        assert train.main([digits, "run_dir=stopped", *words]) == 130
    assert train.main([digits, "run_dir=stopped", *words]) == 0
    whole, stopped = (load_model(each) for each in ("whole", "stopped"))
    for key, value in whole.state_dict().items():
        assert torch.equal(stopped.state_dict()[key], value), key
    x = torch.rand(4, 1, 8, 8)
    assert torch.equal(whole(x), stopped(x)) and not whole.training
    Image.fromarray(np.full((8, 8), 99, np.uint8)).save("one.png")
    assert predict.main(["whole", "one.png", "--out", "labels.csv"]) == 0
    assert len(Path("labels.csv").read_text().splitlines()) == 2
