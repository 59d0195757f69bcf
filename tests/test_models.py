"""The networks against their definition, written a second time here, and against hand-derived sizes."""

from __future__ import annotations

import io
import math
import re
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ups_fast.models import build

DEFAULTS = {"n_classes": 10, "channels": 3, "size": 32, "dropout": 0.3}


def small_wrn(**changes) -> nn.Module:
    return build("wrn-10-1", **{"n_classes": 4, "channels": 1, "size": 8, "dropout": 0.3, **changes})


def wrn_parameters(depth: int, width: int, n_classes: int, channels: int) -> int:
    """Counted from the definition: 3x3 and 1x1 kernels without bias, two numbers per batch-norm channel."""
    total = 9 * channels * 16
    inputs = 16
    for outputs in (16 * width, 32 * width, 64 * width):
        for _ in range((depth - 4) // 6):
            total += 9 * inputs * outputs + 9 * outputs * outputs + 2 * inputs + 2 * outputs
            total += inputs * outputs if inputs != outputs else 0
            inputs = outputs
    return total + 2 * inputs + inputs * n_classes + n_classes


def cnn13_parameters(n_classes: int, channels: int) -> int:
    """A convolution has its direction v, a gain g and a bias per output channel; a batch-norm two numbers."""
    convs = [(channels, 128, 9), (128, 128, 9), (128, 128, 9), (128, 256, 9), (256, 256, 9), (256, 256, 9)]
    convs += [(256, 512, 9), (512, 256, 1), (256, 128, 1)]
    linear = 128 * n_classes + n_classes + n_classes
    return sum(i * o * k + o + o + 2 * o for i, o, k in convs) + linear


def shake_parameters(depth: int, width: int, n_classes: int, channels: int) -> int:
    """Two branches a block; where the shape changes 1x1 kernels, in two halves or one, and a batch-norm."""
    total, inputs = 9 * channels * 16 + 2 * 16, 16
    for outputs in (width, 2 * width, 4 * width):
        for _ in range((depth - 2) // 6):
            total += 2 * (9 * inputs * outputs + 9 * outputs * outputs + 4 * outputs)
            total += inputs * outputs + 2 * outputs if inputs != outputs else 0
            inputs = outputs
    return total + inputs * n_classes + n_classes


def resnext_parameters(depth: int, groups: int, width: int, n_classes: int, channels: int) -> int:
    total, inputs = 9 * channels * 64 + 2 * 64, 64
    for stage, outputs in enumerate((256, 512, 1024)):
        each = width * 2**stage  # channels of a group
        inner = groups * each
        for _ in range((depth - 2) // 9):
            total += inputs * inner + 9 * groups * each * each + inner * outputs + 4 * inner + 2 * outputs
            total += inputs * outputs + 2 * outputs if inputs != outputs else 0
            inputs = outputs
    return total + inputs * n_classes + n_classes


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "published"), [("wrn-28-2", 1.47e6), ("wrn-28-8", 23.4e6), ("cnn13", 3.13e6)]
)
def test_parameter_counts(name, published):
    with torch.device("meta"):
        model = build(name, **DEFAULTS)
    _, *shape = name.split("-")
    expected = wrn_parameters(*map(int, shape), 10, 3) if shape else cnn13_parameters(10, 3)
    assert count(model) == expected
    assert float(f"{expected:.3g}") == published  # as printed, three digits


@pytest.mark.parametrize(
    ("name", "shape", "published"),
    [
        ("shake-26-2x96d", (26, 96), 26.2e6),
        ("resnext-29-8x64d", (29, 8, 64), 34.4e6),
        ("resnext-29-16x64d", (29, 16, 64), 68.1e6),
        ("shake-26-2x32d", (26, 32), 2.9e6),
        ("resnext-28-4x4d", (29, 4, 4), None),
    ],
)
def test_parameter_counts_of_the_branched(name, shape, published):
    with torch.device("meta"):
        model = build(name, **DEFAULTS)
    expected = (shake_parameters if name.startswith("shake") else resnext_parameters)(*shape, 10, 3)
    assert count(model) == expected
    assert published is None or abs(expected - published) < 0.1e6


@pytest.mark.parametrize(("name", "mmac"), [("wrn-28-2", 214), ("wrn-28-8", 3360), ("cnn13", 731)])
def test_multiplications(name, mmac):
    """Every stride, padding and pooling is where it belongs: the work per image is the published one."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build(name, **DEFAULTS)(torch.empty(2, 3, 32, 32))
    assert float(f"{counter.get_total_flops() / 2 / 2 / 1e6:.3g}") == mmac


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("wrn-10-1", 8),
        ("cnn13", 12),
        ("shake-8-2x3d", 8),
        pytest.param("resnext-11-2x1d", 8, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_smallest_images(name, least, channels):
    model = build(name, n_classes=5, channels=channels, size=least, dropout=0.0)
    for height, width in ((least, least), (least, least + 5), (least + 1, 33)):
        build(name, n_classes=5, channels=channels, size=(height, width), dropout=0.0)
        logits = model(torch.randn(2, channels, height, width))
        assert logits.shape == (2, 5) and logits.dtype == torch.float32 and logits.isfinite().all()

    for height, width in ((least - 1, least), (least, least - 1), (1, 1)):
        with pytest.raises(ValueError, match=f"size.*{least}x{least}, got {height}x{width}"):
            build(name, n_classes=5, channels=channels, size=[height, width], dropout=0.0)
        with pytest.raises(ValueError, match=rf"{least}x{least}, got \(2, {channels}, {height}, {width}\)"):
            model(torch.randn(2, channels, height, width))
    with pytest.raises(ValueError, match=f"got {least - 1}x{least - 1}"):
        build(name, n_classes=5, channels=channels, size=least - 1, dropout=0.0)


@pytest.mark.parametrize(
    ("depth", "near"),
    [(30, "28 or 34"), (27, "22 or 28"), (33, "28 or 34"), (11, "10 or 16"), (9, "10"), (4, "10"), (0, "10")],
)
def test_depth_names_the_nearest(depth, near):
    with pytest.raises(ValueError, match=rf"got {depth}; nearest: {near}$"):
        build(f"wrn-{depth}-2", **DEFAULTS)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("shake-27-2x96d", "depth of a Shake-Shake must be 6n + 2 with n >= 1, got 27; nearest: 26 or 32"),
        ("shake-2-2x96d", "got 2; nearest: 8"),
        ("resnext-30-8x64d", "depth of a ResNeXt must be 9n + 2 with n >= 1, got 30; nearest: 29 or 38"),
        ("resnext-0-8x64d", "got 0; nearest: 11"),
        ("shake-26-2x0d", "width in [1, 1000], got 26 and 0"),
        ("shake-1000002-2x4d", "got 1000002 and 4"),
        ("resnext-29-0x64d", "cardinality in [1, 128] and width in [1, 1000], got 29, 0 and 64"),
        ("resnext-29-8x1001d", "got 29, 8 and 1001"),
    ],
)
def test_bad_numbers_of_a_name_are_named(name, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        build(name, **DEFAULTS)


@pytest.mark.parametrize(
    "name",
    [
        *("resnet", "wrn", "wrn-28", "wrn-28-2x", "wrn--28-2", "WRN-28-2", "cnn-13", ""),
        *("shake-26-3x32d", "shake-26-2x32", "shake-26", "resnext-29-8-64d", "resnext-29-8x64"),
    ],
)
def test_unknown_name_lists_what_there_is(name):
    with pytest.raises(ValueError, match=rf"'cnn13' or 'wrn-d-k'.*got '{name}'"):
        build(name, **DEFAULTS)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("n_classes", 0),
        ("channels", 2),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("dropout", math.nan),
        ("bn_momentum", 0.0),
        ("bn_momentum", 1.5),
        ("preact", "google"),
        ("activation", "relu"),
    ],
)
@pytest.mark.parametrize("name", ["wrn-10-1", "cnn13"])
def test_bad_argument_is_named(name, argument, value):
    with pytest.raises(ValueError, match=f"{argument}.*got '?{value}"):
        build(name, **{**DEFAULTS, argument: value})
    with pytest.raises(ValueError, match="width"):
        build("wrn-10-0", **DEFAULTS)


def wrn_again(model: nn.Module, x: Tensor, preact: str, act, blocks_per_stage: int) -> Tensor:
    """Eval-mode logits of a WRN from its tensors, straight from the definition."""
    tensors = dict(model.state_dict())

    def bn(name: str, x: Tensor) -> Tensor:
        weight, bias, mean, var = (
            tensors[f"{name}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
        )
        return F.batch_norm(x, mean, var, weight, bias)

    x = F.conv2d(x, tensors["stem.weight"], padding=1)
    for b in range(3 * blocks_per_stage):
        stage, first = b // blocks_per_stage, b % blocks_per_stage == 0
        stride = 2 if first and stage > 0 else 1
        a = act(bn(f"blocks.{b}.bn1", x))
        into_conv1 = x if preact == "published" and first and stage > 0 else a
        y = F.conv2d(into_conv1, tensors[f"blocks.{b}.conv1.weight"], stride=stride, padding=1)
        y = F.conv2d(act(bn(f"blocks.{b}.bn2", y)), tensors[f"blocks.{b}.conv2.weight"], padding=1)
        straight = a if first and stage == 0 else x
        if f"blocks.{b}.shortcut.weight" in tensors:
            straight = F.conv2d(straight, tensors[f"blocks.{b}.shortcut.weight"], stride=stride)
        x = straight + y
    x = act(bn("head.0", x)).mean((2, 3))
    return x @ tensors["linear.weight"].T + tensors["linear.bias"]


@pytest.mark.parametrize("preact", ["published", "fixed"])
@pytest.mark.parametrize(
    ("activation", "act"),
    [("mish", lambda x: x * F.softplus(x).tanh()), ("leaky_relu", lambda x: x.maximum(0.1 * x))],
)
@pytest.mark.parametrize("width", [1, 2])
def test_wrn_is_its_definition(preact, activation, act, width):
    torch.manual_seed(0)
    arguments = {
        "n_classes": 4,
        "channels": 1,
        "size": 9,
        "dropout": 0.3,
        "preact": preact,
        "activation": activation,
    }
    model = build(f"wrn-16-{width}", **arguments).double()
    x = torch.randn(3, 1, 9, 11, dtype=torch.float64)
    model(x)  # running statistics other than 0 and 1
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    model.eval()
    torch.testing.assert_close(
        model(x), wrn_again(model, x, preact, act, blocks_per_stage=2), rtol=1e-10, atol=1e-10
    )


def test_published_preact_kills_two_bn1():
    torch.manual_seed(0)
    published = small_wrn(preact="published", dropout=0.0)
    fixed = small_wrn(preact="fixed", dropout=0.0)
    fixed.load_state_dict(published.state_dict())  # the same parameters, wired differently
    x = torch.randn(4, 1, 8, 8)
    assert not torch.allclose(published.eval()(x), fixed.eval()(x), atol=1e-3)

    published.train()(x).square().sum().backward()
    fixed.train()(x).square().sum().backward()
    dead = {f"blocks.{b}.bn1.{part}" for b in (1, 2) for part in ("weight", "bias")}
    assert {name for name, p in published.named_parameters() if p.grad is None} == dead
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in fixed.parameters())


def test_cnn13_gradient_reaches_every_parameter():
    torch.manual_seed(0)
    model = build("cnn13", n_classes=3, channels=1, size=16, dropout=0.3)
    model(torch.randn(4, 1, 16, 16)).square().sum().backward()
    # In front of batch-norm a bias has no effect: its gradient exists and is rounding noise.
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        if not (name.startswith("features") and name.endswith(".bias")):
            assert parameter.grad.abs().sum() > 0, name


def test_cnn13_is_its_definition():
    torch.manual_seed(0)
    model = build("cnn13", n_classes=3, channels=3, size=13, dropout=0.3).double()
    x = torch.randn(2, 3, 13, 14, dtype=torch.float64)
    model(x)
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)  # a gain that is no longer the norm of v
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(convs) == len(norms) == 9
    before_dropout = [a for a, b in pairwise(model.features) if isinstance(b, nn.Dropout)]
    assert len(before_dropout) == 2 and all(isinstance(module, nn.MaxPool2d) for module in before_dropout)

    def normed(module: nn.Module) -> Tensor:
        g, v = module.parametrizations.weight.original0, module.parametrizations.weight.original1
        return g * v / v.flatten(1).norm(dim=1).view(g.shape)

    y = x
    for i, (conv, bn) in enumerate(zip(convs, norms, strict=True)):
        y = F.conv2d(y, normed(conv), conv.bias, padding=1 if i < 6 else 0)
        y = F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias)
        y = y.maximum(0.1 * y)
        if i in (2, 5):
            y = F.max_pool2d(y, 2)
    expected = y.mean((2, 3)) @ normed(model.linear).T + model.linear.bias
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["wrn-10-1", "cnn13"])
def test_switching_dropout_alone(name):
    """What labeling does: dropout on, batch-norm in eval mode and untouched."""
    torch.manual_seed(0)
    model = build(name, n_classes=3, channels=1, size=12, dropout=0.5).eval()
    mc_layers = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    assert len(mc_layers) == (3 if name == "wrn-10-1" else 2) and all(d.p == 0.5 for d in mc_layers)
    x = torch.randn(4, 1, 12, 12)
    assert torch.equal(model(x), model(x))
    keys = [torch.arange(4, dtype=torch.int32) + 10 * k for k in range(2)]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first, second = (model(x, each) for each in keys)
    assert not torch.equal(first, second)
    assert torch.equal(first, model.suffix(model.prefix(x), keys[0]))
    for dropout in mc_layers:
        dropout.train()
    assert not torch.equal(model(x), model(x)), "without keys it is torch's dropout"
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())

    without = build(name, n_classes=3, channels=1, size=12, dropout=0.0)
    without.load_state_dict(model.state_dict())
    assert torch.equal(without.eval()(x, keys[0]), model.eval()(x))
    assert [d.layer for d in mc_layers] == list(range(len(mc_layers)))


def test_wrn_drops_between_conv1_and_bn2():
    model = build("wrn-28-2", **DEFAULTS).eval()
    order: list[str] = []
    for name, module in model.blocks[5].named_children():
        module.register_forward_hook(lambda *_, name=name: order.append(name))
    model(torch.randn(1, 3, 8, 8))
    assert order == ["bn1", "activation", "conv1", "dropout", "bn2", "activation", "conv2", "shortcut"]
    assert sum(isinstance(m, nn.Dropout) for m in model.modules()) == 12


@pytest.mark.parametrize("name", ["wrn-10-1", "cnn13", "shake-8-2x3d", "resnext-11-2x1d"])
def test_batch_norm_settings(name):
    for momentum in (0.1, 0.001):
        model = build(name, **DEFAULTS, bn_momentum=momentum)
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms and all(bn.momentum == momentum for bn in norms)
        shift = 0.1 if name.startswith("wrn") else 0.0
        assert all((bn.bias == torch.tensor(shift)).all() and (bn.weight == 1).all() for bn in norms)


def test_wrn_initialization():
    torch.manual_seed(0)
    model = build("wrn-10-2", **DEFAULTS)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
            expected = math.sqrt(2 / (module.out_channels * module.weight[0, 0].numel()))  # fan out
            # The sample std of n normal draws is within 5 of its own standard errors, expected / sqrt(2 n).
            n = module.weight.numel()
            assert abs(module.weight.std().item() - expected) < 5 * expected / math.sqrt(2 * n)
    assert (model.linear.bias == 0).all()


@pytest.mark.parametrize("name", ["wrn-10-1", "cnn13", "shake-8-2x3d", "resnext-11-2x1d"])
def test_weights_survive_files(name, tmp_path):
    torch.manual_seed(0)
    arguments = {"n_classes": 3, "channels": 1, "size": 12, "dropout": 0.3}
    model, x = build(name, **arguments), torch.randn(4, 1, 12, 12)
    model(x)
    expected = model.eval()(x)

    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    for state in (
        torch.load(buffer, weights_only=True),
        load_safetensors(save_safetensors(model.state_dict())),
    ):
        fresh = build(name, **arguments).eval()
        assert not torch.equal(fresh(x), expected)
        fresh.load_state_dict(state)
        assert torch.equal(fresh(x), expected)


@pytest.mark.parametrize("name", ["wrn-10-1", "cnn13", "shake-8-2x3d", "resnext-11-2x1d"])
def test_channels_last(name):
    torch.manual_seed(0)
    model = build(name, n_classes=3, channels=3, size=12, dropout=0.0).double()
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    keys = torch.arange(2, dtype=torch.int32)
    expected = model(x, keys)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), next(model.parameters()))
    model.to(memory_format=torch.channels_last)
    got = model(x.to(memory_format=torch.channels_last), keys)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    (grad,) = torch.autograd.grad(got.square().sum(), next(model.parameters()))
    torch.testing.assert_close(grad, expected_grad, rtol=1e-7, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wrn-10-1", "cnn13", "shake-8-2x3d", "resnext-11-2x1d"])
def test_compiles_without_a_graph_break(name):
    torch.manual_seed(0)
    model = build(name, n_classes=3, channels=1, size=12, dropout=0.0).double()
    again = build(name, n_classes=3, channels=1, size=12, dropout=0.0).double()
    again.load_state_dict(model.state_dict())
    x = torch.randn(2, 1, 12, 12, dtype=torch.float64)
    keys = torch.arange(2, dtype=torch.int32)
    compiled = torch.compile(again, backend="aot_eager", fullgraph=True)
    for _ in range(2):  # the second batch sees the running statistics that the first one left
        expected, got = model(x, keys), compiled(x, keys)
        torch.testing.assert_close(got, expected)
        expected.square().sum().backward()
        got.square().sum().backward()
    for (key, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, msg=key)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad)


def test_same_seed_same_weights():
    def weights(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return list(small_wrn().parameters())

    assert all(torch.equal(a, b) for a, b in zip(weights(1), weights(1), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(1), weights(2), strict=True))


@pytest.mark.parametrize(
    "name", ["wrn-10-1", "shake-8-2x8d", "resnext-11-2x2d", pytest.param("cnn13", marks=pytest.mark.slow)]
)
def test_learns(name):
    """A few steps take the loss of a fixed batch down: nothing is detached or wired wrong."""
    torch.manual_seed(0)
    model = build(name, n_classes=4, channels=1, size=12, dropout=0.1)
    x, target = torch.randn(16, 1, 12, 12), torch.arange(16) % 4
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, nesterov=True)
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
