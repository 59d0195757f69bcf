"""The training step: against one written out, in all its modes, from round to round, and without waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from tracing import traced

from ups_fast import reference, step
from ups_fast.batches import views_of
from ups_fast.data import ResidentImages
from ups_fast.fullgraph import fullgraph
from ups_fast.methods import UPS, Batch, Group, Layout, Method, Options, Setting
from ups_fast.models import build
from ups_fast.policy import Policy
from ups_fast.reference import dropout_keys
from ups_fast.selection import Thresholds
from ups_fast.step import StepPlan, TrainStep, as_it_is, plan_step


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ups(
    network: Callable[[], Any] | None = None, kind: type[Method] = UPS, ema: float = 0.0, **options: Any
) -> Method:
    """A method of five classes; options are those of the network."""
    small = {"n_classes": 5, "channels": 1, "size": 8, "dropout": 0.3, **options}
    name = small.pop("name", "wrn-10-1")
    make = network or (lambda: build(name, **small))
    return kind(Setting(make, Options("ups"), Thresholds(), n_images=40, n_classes=5, ema=ema)).train()


def batch_of(images: Tensor, keys: Tensor | None, target: Tensor, negative: Tensor) -> Batch:
    rows = {"target": target, "negative": negative, "readable": torch.ones(len(images), dtype=torch.bool)}
    return Batch(images, keys, torch.arange(len(images)), rows, torch.zeros(()))


# One step.


def mixed_batch(n_classes: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    g = generator(3)
    images = torch.randn(12, 1, 8, 8, generator=g)
    positive = torch.arange(12) < 7
    target = torch.where(positive, torch.randint(0, n_classes, (12,), generator=g), -1)
    mask = torch.rand(12, n_classes, generator=g) < 0.5
    return images, target, reference.pack_mask(mask & ~positive[:, None])


def test_a_step_against_one_written_out() -> None:
    images, target, negative = mixed_batch()
    torch.manual_seed(0)
    method = ups(dropout=0.0)
    ours, twin = method.network, build("wrn-10-1", n_classes=5, channels=1, size=8, dropout=0.0)
    twin.load_state_dict(ours.state_dict())
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    batch = batch_of(images, None, target, negative)
    first, second = (method.step(method.prepare(as_it_is), optimizer, batch) for _ in range(2))

    for want in (first, second):
        logits = twin(images)  # both kinds in one pass, so that batch-norm sees both
        mask = reference.unpack_mask(negative[7:], 5).float()
        ce = nn.functional.cross_entropy(logits[:7], target[:7])
        not_p = (1 - torch.softmax(logits[7:], dim=1)).clamp(1e-7, 1.0)
        nce = -(mask * not_p.log()).sum(dim=1) / (mask.sum(dim=1) + 1e-7)
        loss = ce + nce[mask.any(dim=1)].mean()
        assert torch.allclose(want, loss, rtol=1e-4)
        twin.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter -= 0.1 * parameter.grad
    for a, b in zip(ours.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


# Ways to run the step.


def losses(
    n: int,
    *,
    name: str = "wrn-10-1",
    how: Callable = as_it_is,
    dtype: torch.dtype = torch.float32,
    shaken: int = 0,
) -> torch.Tensor:
    """Of n steps on fresh batches, in which half of the rows are positive; `shaken`: from weights 2^-23 away."""
    torch.manual_seed(0)
    method = ups(name=name, size=12)
    method.dtype = dtype
    model = method.network.to(memory_format=torch.channels_last)
    if shaken:
        with torch.no_grad():
            for weight in model.parameters():
                weight *= 1 + 2**-23 * torch.randint(-1, 2, weight.shape, generator=generator(shaken))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    loss_of = method.prepare(how)
    g, found = generator(1), []
    for at in range(n):
        images = torch.randn(16, 1, 12, 12, generator=g).to(memory_format=torch.channels_last)
        keys = dropout_keys(torch.arange(16), seed=0, draw=at)
        target = torch.randint(5, (16,), generator=g).where(torch.arange(16) < 8, -1)
        negative = torch.randint(0, 32, (16, 1), generator=g, dtype=torch.int32)
        found.append(method.step(loss_of, optimizer, batch_of(images, keys, target, negative)))
    return torch.stack(found).double()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "steps", "how"),
    [
        ("wrn-10-1", 50, fullgraph),
        ("cnn13", 8, fullgraph),
        ("shake-8-2x4d", 8, traced),
        ("resnext-11-2x2d", 8, traced),
    ],
)
def test_compiled_steps_are_the_eager_ones(name: str, steps: int, how: Callable) -> None:
    """With the same dropout, so they drift apart by rounding alone.

    How fast rounding grows is measured: by the drift of eager runs whose weights start one rounding away. A compiled
    step rounds in some ten places as often.
    """
    eager = losses(steps, name=name)
    drifts = [(losses(steps, name=name, shaken=seed) - eager).abs() for seed in (1, 2, 3)]
    allowed = 1e-6 + 10 * torch.stack(drifts).amax(dim=0).cummax(dim=0).values
    compiled = losses(steps, name=name, how=how)
    assert ((compiled - eager).abs() <= allowed).all(), (compiled - eager, allowed)
    assert allowed[: steps // 4].max() < 0.05, "the bound must mean something"


def test_bfloat16_steps_are_near_the_float32_ones() -> None:
    """Logits rounded to 8 bits: a loss of size 2 errs by some 2^-8 of a logit's size, here below 4."""
    half = losses(20, dtype=torch.bfloat16)
    full = losses(20)
    assert 0 < (half - full).abs().max() < 4 * 2**-6


@pytest.mark.slow
def test_a_new_round_compiles_nothing() -> None:
    """The network starts anew in place; only another batch size is another shape."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        method = ups()
        loss_of = method.prepare(traced)

        def batch(rows: int, positive: int, seed: int, at: int) -> Batch:
            keys = dropout_keys(torch.arange(rows), seed=seed, draw=at)
            target = torch.zeros(rows, dtype=torch.int64).where(torch.arange(rows) < positive, -1)
            return batch_of(
                torch.randn(rows, 1, 8, 8), keys, target, torch.ones(rows, 1, dtype=torch.int32)
            )._replace(t=torch.tensor(at / 2))

        for seed in range(3):
            torch.manual_seed(seed)
            method.load_state_dict(ups().state_dict())
            optimizer = torch.optim.SGD(method.parameters(), lr=0.1, momentum=0.9, nesterov=True)
            for at in range(2):  # the shares of a batch differ from round to round
                method.step(loss_of, optimizer, batch(6, 2 * seed, seed, at))
        with pytest.raises(torch._dynamo.exc.RecompileError):  # the test itself must be able to see one
            loss_of(batch(7, 3, 0, 0))


@pytest.mark.slow
def test_nine_networks_compile_in_one_process() -> None:
    """What torch compiled of one piece of code it keeps together, and it refuses a ninth version."""
    for depth in range(9):
        method = ups(lambda depth=depth: Deep(depth))  # type: ignore[misc]
        target, negative = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int32)
        batch = batch_of(torch.ones(2, 3), None, target, negative)
        compiled, eager = (method.prepare(each)(batch) for each in (fullgraph, as_it_is))
        assert torch.allclose(compiled, eager, rtol=1e-5)


class Deep(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(3, 5 if i == depth else 3) for i in range(depth + 1)])

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        return self.layers(x)

    def members(self, x: Tensor, keys: Tensor | None) -> Tensor:
        return self(x, keys)[None]


def test_plan_step(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 1)
    assert plan_step("eager", "float32", cpu)[:2] == ("eager", torch.float32)
    assert plan_step("compile", "bfloat16", cpu)[:2] == ("compile", torch.bfloat16)
    mode, dtype, why = plan_step("auto", "auto", cpu)
    assert (mode, dtype) == ("eager", torch.bfloat16 if step.has_bfloat16(cpu) else torch.float32)
    assert "CPU" in why
    with pytest.raises(ValueError, match="graph needs a GPU with fused kernels, but cpu is no GPU: use auto"):
        plan_step("graph", "auto", cpu)
    monkeypatch.setattr(step, "has_kernels", lambda device: True)
    assert plan_step("auto", "float32", gpu) == StepPlan("graph", torch.float32, "on a GPU")
    assert plan_step("graph", "float32", gpu).mode == "graph"
    assert plan_step("eager", "float32", gpu).mode == "eager"
    monkeypatch.setattr(step, "has_kernels", lambda device: False)
    assert plan_step("auto", "float32", gpu) == StepPlan("compile", torch.float32, "on a GPU without kernels")
    with pytest.raises(ValueError, match=r"graph needs .* but cuda:1 has no fused kernels: use auto"):
        plan_step("graph", "float32", gpu)


# The step with its memory.

N, CLASSES = 40, 5
POLICY = Policy(flip=True, crop=1, cutout=3)


def resident(device: str = "cpu") -> ResidentImages:
    pixels = torch.randint(0, 256, (N, 12, 12, 1), generator=generator(7), dtype=torch.uint8)
    return ResidentImages(pixels, mean=(0.5,), std=(0.3,), device=device, policy=POLICY)


def weights_of(seed: int = 0, ema: float = 0.0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return ups(size=12, ema=ema).state_dict()


def new_step(
    mode: str = "eager", device: str = "cpu", momentum: float = 0.9, ema: float = 0.0, **settings: Any
) -> TrainStep:
    torch.manual_seed(99)
    method = ups(size=12, ema=ema)
    method.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    plan, settings = StepPlan(mode, torch.float32, ""), {"weight_decay": 0.01, **settings}
    return TrainStep(method, resident(device), plan, momentum=momentum, **settings)


def tables_of(seed: int) -> dict[str, Tensor]:
    """Of a round: samples with a true target, or none, and with negative classes."""
    g = generator(seed)
    target = torch.randint(CLASSES, (N,), generator=g)
    negative = torch.randint(1, 2**CLASSES, (N, 1), generator=g, dtype=torch.int32)
    return {"target": target.where(torch.arange(N) >= 4 * seed, -1), "negative": negative}


def layout_of(size: int = 16, negatives: int = 0) -> Layout:
    return Layout((Group("positive", size - negatives), Group("negative", negatives)), 6)


def start(each: TrainStep, layout: Layout, tables: Mapping[str, Tensor], *state: Any, **seeds: int) -> None:
    each.start(layout, views_of(layout.groups, {"strong": POLICY}), tables, *state, **seeds)


def steps_of_round(each: TrainStep, number: int, n: int = 6, size: int = 16) -> Tensor:
    """The sum of the losses after each step of a round, which derives from its number."""
    device, weights = each.device, weights_of(number, each.method.decay)
    start(
        each,
        layout_of(size, 2 * number),
        tables_of(number),
        weights,
        augment_seed=number,
        dropout_seed=100 + number,
    )
    each.loss.zero_()
    sums = []
    for at in range(n):
        index = torch.randint(N, (size,), generator=generator(1000 * number + at)).to(device)
        each(index, torch.arange(size, device=device) + at, lr=0.02 * (n - at) / n, t=at / n)
        sums.append(each.loss.clone())
    return torch.stack(sums).cpu()


def test_a_lost_image_teaches_nothing() -> None:
    """Whatever its target and negatives are, in the round in which it is lost and in the next one."""
    layout, batch = layout_of(6, 3), torch.tensor([3, 7, 9, 3, 11, 12])

    def ends(target: int, lost: bool) -> list[Tensor]:
        each, about, found = new_step(), tables_of(2), []
        about["target"][3], about["negative"][3] = target, 1 << (4 - target)
        for round in range(2):
            start(each, layout, about, weights_of(), augment_seed=1, dropout_seed=2)
            each(batch + 4, batch, lr=0.1)
            if lost:
                each.images.unreadable[3] = "gone"
            each(batch, batch + round, lr=0.1)
            found += [tensor.clone() for tensor in memory(each)]
        return found

    assert all(map(torch.equal, ends(0, True), ends(1, True)))
    assert not torch.equal(ends(0, False)[-1], ends(1, False)[-1])
    assert not torch.equal(ends(0, False)[-1], ends(0, True)[-1])


def memory(each: TrainStep) -> list[Tensor]:
    return [*each.method.state_dict().values(), *each.momentum.values(), each.loss]


def test_the_step_is_the_plain_loop() -> None:
    ours = new_step()
    got = steps_of_round(ours, 2)
    method, images, tables, sums = ups(size=12), resident(), tables_of(2), []
    method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    method.load_state_dict(weights_of(2))
    optimizer = torch.optim.SGD(method.parameters(), lr=1.0, momentum=0.9, nesterov=True, weight_decay=0.01)
    total = torch.zeros(())
    for at in range(6):
        index = torch.randint(N, (16,), generator=generator(2000 + at))
        draw = torch.arange(16) + at
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (6 - at) / 6
        batch = images.augmented(index, seed=2, epoch=draw)
        keys = dropout_keys(index, seed=102, draw=draw)
        given = batch_of(batch, keys, tables["target"][index], tables["negative"][index])
        total = total + method.step(method.prepare(as_it_is), optimizer, given)
        sums.append(total)
    # The fused optimizer rounds in another order than the plain one: some 2^-24 of a weight in each step.
    assert torch.allclose(got, torch.stack(sums), rtol=1e-4)
    for a, b in zip(ours.method.parameters(), method.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_without_momentum() -> None:
    each = new_step(momentum=0.0)
    assert steps_of_round(each, 1).isfinite().all()
    assert not any(buffer.any() for buffer in each.momentum.values())


def test_a_round_starts_in_place_and_anew() -> None:
    each = new_step()
    steps_of_round(each, 1)
    places = [tensor.data_ptr() for tensor in memory(each)]
    second = steps_of_round(each, 2)
    assert [tensor.data_ptr() for tensor in memory(each)] == places
    fresh = new_step()
    assert torch.equal(second, steps_of_round(fresh, 2)), "nothing of round 1 may remain"
    assert all(map(torch.equal, memory(each), memory(fresh)))


def test_a_step_never_waits_for_the_device() -> None:
    """A fake tensor has no values: reading one on the host, as .item() or `if tensor` do, raises."""
    images = resident()
    with FakeTensorMode(allow_non_fake_inputs=True):
        plan, method = StepPlan("eager", torch.float32, ""), ups(size=12)
        method.ema, method.decay = ups(size=12).network.requires_grad_(False).eval(), 0.9  # not to be copied
        each = TrainStep(method, images, plan, momentum=0.9, weight_decay=0)
        each.views = views_of(layout_of().groups, {"strong": POLICY})
        each.rows, each.batch = torch.zeros(2, 16, dtype=torch.int64), torch.zeros(16, 1, 12, 12)
        each.tables = {**tables_of(0), "readable": torch.ones(N, dtype=torch.bool)}
        for at in range(2):
            each(torch.zeros(16, dtype=torch.int64), torch.zeros(16, dtype=torch.int64), lr=0.1 * at)
        with pytest.raises(DataDependentOutputException):
            each.loss.item()  # the test itself must be able to see a wait


def test_the_average_follows_the_weights_in_place() -> None:
    each, decay = new_step(ema=0.9), 0.9
    method = each.method
    start(each, layout_of(), tables_of(1), weights_of(1, ema=0.9), augment_seed=1, dropout_seed=2)
    places = {name: tensor.data_ptr() for name, tensor in method.state_dict().items()}
    assert method.ema is not None and method.answers is method.ema and not method.ema.training
    assert {name.partition(".")[0] for name in places} == {"network", "ema"}
    want = {name: weight.double().clone() for name, weight in method.ema.named_parameters()}
    for at in range(5):
        each(torch.arange(16), torch.arange(16) + at, lr=0.05)
        for name, weight in method.network.named_parameters():
            want[name] = decay * want[name] + (1 - decay) * weight.detach().double()
    for name, weight in method.ema.named_parameters():
        assert torch.allclose(weight.double(), want[name], rtol=1e-5, atol=1e-7), name
        assert not torch.equal(weight, method.network.get_parameter(name)) and not weight.requires_grad
    for name, buffer in method.ema.named_buffers():
        assert torch.equal(buffer, method.network.get_buffer(name)), name
    start(each, layout_of(), tables_of(2), weights_of(2, ema=0.9), augment_seed=1, dropout_seed=2)
    each(torch.arange(16), torch.arange(16), lr=0.05)
    assert {name: tensor.data_ptr() for name, tensor in method.state_dict().items()} == places
    assert set(each.momentum) == {f"network.{name}" for name, _ in method.network.named_parameters()}


def test_the_average_changes_nothing_of_what_is_trained() -> None:
    with_one, without = new_step(ema=0.99), new_step()
    assert torch.equal(steps_of_round(with_one, 1), steps_of_round(without, 1))
    ours = with_one.method.network.state_dict()
    assert all(torch.equal(ours[name], each) for name, each in without.method.network.state_dict().items())


def test_weight_decay_may_spare_biases_and_normalization() -> None:
    """At rate 1, without momentum and gradients, a step takes weight_decay of a weight, or nothing."""
    for decay_norms in (True, False):
        each = new_step(momentum=0.0, weight_decay=0.25, decay_norms=decay_norms)
        before = {name: weight.detach().clone() for name, weight in each.method.trained().items()}
        each.lr.fill_(1.0)
        for weight in each.method.trained().values():
            weight.grad = torch.zeros_like(weight)
        each.optimizer.step()
        spared = set()
        for name, weight in each.method.trained().items():
            kept = 1.0 if not decay_norms and before[name].ndim <= 1 else 0.75
            assert torch.allclose(weight, kept * before[name]), name
            spared |= {name} if kept == 1.0 else set()
        assert any(name.endswith("bias") for name in spared) == (not decay_norms)
    names = {name for name, module in each.method.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert names and {f"{name}.weight" for name in names} <= spared
    assert "network.linear.weight" not in spared and "network.linear.bias" in spared


class Graph:
    """Stands for a CUDA graph on a machine without one: replays by running what was captured anew."""

    captured: ClassVar[list[Graph]] = []

    def __init__(self) -> None:
        self.captured.append(self)
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self.step._step()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """Capture without CUDA: everything of it but the capture as such. As there, nothing that is captured runs."""
    real = TrainStep._step

    class Stream:
        def wait_stream(self, other: Stream) -> None: ...

    @contextmanager
    def context(*args: object, **kwargs: object) -> Iterator[None]:
        yield

    @contextmanager
    def capture(graph: Graph, stream: Stream) -> Iterator[None]:
        monkeypatch.setattr(TrainStep, "_step", lambda self: setattr(graph, "step", self))
        yield
        monkeypatch.setattr(TrainStep, "_step", real)

    monkeypatch.setattr(Graph, "captured", [])
    for name, value in {"CUDAGraph": Graph, "Stream": Stream, "stream": context, "device": context}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return Graph.captured


def test_graph_steps_are_the_eager_ones_and_are_captured_once(graphs: list[Graph]) -> None:
    eager, graph = new_step(), new_step("graph")
    graph.loss_of = eager_loss = graph.method.prepare(
        as_it_is
    )  # what torch.compile does to it is tested above
    for number in (1, 2, 3):
        assert torch.equal(steps_of_round(graph, number), steps_of_round(eager, number))
        assert all(map(torch.equal, memory(graph), memory(eager)))
    assert graph.captures == len(graphs) == 1 and graphs[0].replays == 18
    assert torch.equal(steps_of_round(graph, 1, size=20), steps_of_round(eager, 1, size=20))
    assert graph.captures == len(graphs) == 2, "another batch size is another graph"
    assert graph.loss_of is eager_loss


def test_a_method_that_splits_batches_has_a_graph_for_each_of_their_layouts(
    graphs: list[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a loss knows rows by their place, which would be part of the graph."""
    monkeypatch.setattr(UPS, "splits", True)
    graph = new_step("graph")
    graph.loss_of = graph.method.prepare(as_it_is)
    for number, captures in ((1, 1), (1, 1), (2, 2), (1, 3)):
        steps_of_round(graph, number)
        assert graph.captures == len(graphs) == captures


def test_a_capture_leaves_no_trace(graphs: list[Graph]) -> None:
    graph = new_step("graph")
    graph.loss_of = graph.method.prepare(as_it_is)
    momentum = {name: torch.full_like(buffer, 3.0) for name, buffer in graph.momentum.items()}
    graph.loss.fill_(7.0)
    weights = weights_of(5)
    start(graph, layout_of(16, 4), tables_of(5), weights, momentum, augment_seed=1, dropout_seed=2)
    assert graph.captures == 1 and graph.loss == 7
    assert all(map(torch.equal, graph.method.state_dict().values(), weights.values()))
    assert all((buffer == 3).all() for buffer in graph.momentum.values())


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["compile", "graph"])
def test_modes_agree_on_a_gpu(mode: str) -> None:
    """Over 50 steps, within ten times the drift of eager runs that start one rounding apart; see above."""

    def run(mode: str, shaken: int = 0) -> Tensor:
        each = new_step(mode, "cuda")
        if shaken:
            real = each.method.load_state_dict

            def shake(weights: dict[str, Tensor]) -> None:
                real(weights)
                for weight in each.method.parameters():
                    weight *= (
                        1 + 2**-23 * torch.randint(-1, 2, weight.shape, generator=generator(shaken)).cuda()
                    )

            each.method.load_state_dict = shake  # type: ignore[assignment, method-assign]
        return steps_of_round(each, 2, n=50).double()

    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        eager = run("eager")
        drift = torch.stack([(run("eager", shaken) - eager).abs() for shaken in (1, 2, 3)]).amax(dim=0)
        got = run(mode)
    assert ((got - eager).abs() <= 1e-5 + 10 * drift.cummax(dim=0).values).all(), (got, eager, drift)


@pytest.mark.gpu
def test_a_graph_on_a_gpu_is_captured_once_leaves_no_trace_and_never_waits() -> None:
    graph = new_step("graph", "cuda")
    weights = weights_of(5)
    start(graph, layout_of(16, 4), tables_of(5), weights, augment_seed=1, dropout_seed=2)
    assert all(
        torch.equal(a.cpu(), b)
        for a, b in zip(graph.method.state_dict().values(), weights.values(), strict=True)
    )
    assert not any(buffer.any() for buffer in graph.momentum.values()) and graph.loss == 0
    rows = torch.arange(16, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for at in range(5):
            graph(rows, rows + at, lr=0.01)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert 0 < float(graph.loss) < 50
    first = steps_of_round(graph, 2)
    steps_of_round(graph, 3)
    assert torch.allclose(steps_of_round(graph, 2), first, rtol=1e-4) and graph.captures == 1


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["eager", "compile"])
def test_no_mode_waits_for_a_gpu(mode: str) -> None:
    each = new_step(mode, "cuda")
    steps_of_round(each, 2)
    rows = torch.arange(16, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        each(rows, rows, lr=0.01)
    finally:
        torch.cuda.set_sync_debug_mode("default")
