"""The ops against their reference, eager and under torch.compile, on the same inputs: `make bench`.

On a GPU everything there is measured there and nothing but the rivals that have no GPU on the CPU. A round goes over
COPIES buffers and waits once: in all they are larger than the cache, and the wait weighs little. Rows ", graph" replay
the same calls as one CUDA graph, as they would run inside a captured step; the others are issued from Python.
"""

from __future__ import annotations

from pathlib import Path

import published
import pytest
import rivals
import torch
from PIL import Image

import ups_fast
from ups_fast import reference

GPU = torch.cuda.is_available()
DEVICES = ["cuda" if GPU else "cpu"]
COPIES = 16 if GPU else 1
GRAPHS = ["reference, compiled, graph", "ups_fast, graph"] if GPU else []
IMPLEMENTATIONS = ["reference, eager", "reference, compiled", "ups_fast", *GRAPHS]
SELECTIONS = (
    [(10, 50_000, 10), (10, 50_000, 100)] if GPU else [(10, 8192, 10), (10, 8192, 100), (10, 1024, 1000)]
)
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


def implementation(name, op):
    if name.startswith("ups_fast"):
        return getattr(ups_fast, op)
    function = getattr(reference, op)
    if name == "reference, eager":
        return function
    torch.compiler.reset()  # the rival at its best: static shapes, and compiled anew for each benchmark
    return torch.compile(function, dynamic=False)


def cache_bytes():
    """The last cache before memory; without an answer nothing is called larger than it."""
    if GPU:
        return torch.cuda.get_device_properties().L2_cache_size
    told = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return int(told.read_text().strip().removesuffix("K")) << 10 if told.exists() else 1 << 62


def measure(benchmark, group, name, call, device, rounds=None, *, calls=1, moved=0, finish=dict):
    """Times rounds of `call`, the device's work included.

    calls  of the op in one `call`
    moved  bytes that one of them must read and write at least; a bound where all calls' are beyond the cache
    finish what else to note, once all is done
    """
    if name.endswith(", graph"):
        call = captured(call)

    def timed():
        result = call()
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    benchmark.group = group
    benchmark.extra_info |= {"implementation": name, "calls": calls}
    if moved:
        benchmark.extra_info |= {"bytes": moved, "bounded": moved * calls >= 2 * cache_bytes()}
    rounds = rounds or (100 if "eager" not in name and "Pillow" not in name else 20)
    benchmark.pedantic(timed, warmup_rounds=min(5, max(1, rounds // 3)), rounds=rounds)
    benchmark.extra_info |= finish()


def captured(call):
    """`call` as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles and allocates what a capture cannot
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph.replay


def over(inputs, call):
    """A round: `call` on each of `inputs`."""

    def each():
        for x in inputs:
            result = call(x)
        return result

    return each


def nbytes(*tensors):
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("device", DEVICES)
def test_copy(benchmark, device):
    """The bound of all that only moves memory: what the machine's own copy reaches, read and written."""
    source = torch.ones(1 << (30 if GPU else 28), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    call = lambda: target.copy_(source)  # noqa: E731
    measure(
        benchmark, f"copy {device}, {source.nbytes >> 20} MiB", "torch", call, device, moved=2 * source.nbytes
    )


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("p, n, c", SELECTIONS)
@pytest.mark.parametrize("device", DEVICES)
def test_mc_select(benchmark, device, p, n, c, dtype, name):
    inputs = [(3 * torch.randn(p, n, c, device=device)).to(dtype) for _ in range(COPIES)]
    call = over(inputs, implementation(name, "mc_select"))
    group = f"mc_select {device} P={p} N={n} C={c} {str(dtype)[6:]}"
    moved = nbytes(inputs[0], *ups_fast.mc_select(inputs[0]))
    measure(benchmark, group, name, call, device, calls=COPIES, moved=moved)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("device", DEVICES)
def test_mc_select_multilabel(benchmark, device, name):
    p, n, c = 10, 50_000 if GPU else 8192, 80
    inputs = [3 * torch.randn(p, n, c, device=device) for _ in range(COPIES)]
    call = over(inputs, implementation(name, "mc_select_multilabel"))
    group = f"mc_select_multilabel {device} P={p} N={n} C={c} float32"
    moved = nbytes(inputs[0], *ups_fast.mc_select_multilabel(inputs[0]))
    measure(benchmark, group, name, call, device, calls=COPIES, moved=moved)


def loss_batch(device, b, c):
    logits = torch.randn(b, c, device=device, requires_grad=True)
    positive = torch.rand(b, device=device) < 0.5
    return logits, torch.randint(c, (b,), device=device), positive, torch.rand(b, c, device=device) < 0.5


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("b, c", [(128, 10), (512, 100), (8192, 100)])
@pytest.mark.parametrize("device", DEVICES)
def test_ups_loss(benchmark, device, b, c, name):
    batches = [loss_batch(device, b, c) for _ in range(COPIES)]
    loss = implementation(name, "ups_loss")
    call = over(batches, lambda batch: torch.autograd.grad(loss(*batch), batch[0]))
    moved = nbytes(*batches[0], batches[0][0])  # the last one is the gradient
    group = f"ups_loss forward + backward {device} B={b} C={c}"
    measure(benchmark, group, name, call, device, calls=COPIES, moved=moved)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("b, c", [(128, 10), (512, 100), (8192, 100)])
@pytest.mark.parametrize("device", DEVICES)
def test_nce_loss(benchmark, device, b, c, name):
    batches = [(logits, mask) for logits, _, _, mask in (loss_batch(device, b, c) for _ in range(COPIES))]
    loss = implementation(name, "nce_loss")
    call = over(batches, lambda batch: torch.autograd.grad(loss(*batch), batch[0]))
    moved = nbytes(*batches[0], batches[0][0])
    group = f"nce_loss forward + backward {device} B={b} C={c}"
    measure(benchmark, group, name, call, device, calls=COPIES, moved=moved)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("b, c", [(128, 80), (4096, 80)])
@pytest.mark.parametrize("device", DEVICES)
def test_ups_loss_multilabel(benchmark, device, b, c, name):
    """Some 10 % of the classes are positive, some 60 % negative."""

    def selected():
        share = torch.rand(b, c, device=device)
        return torch.randn(b, c, device=device, requires_grad=True), share < 0.1, share > 0.4

    batches = [selected() for _ in range(COPIES)]
    loss = implementation(name, "ups_loss_multilabel")
    call = over(batches, lambda batch: torch.autograd.grad(loss(*batch), batch[0]))
    moved = nbytes(*batches[0], batches[0][0])
    group = f"ups_loss_multilabel forward + backward {device} B={b} C={c}"
    measure(benchmark, group, name, call, device, calls=COPIES, moved=moved)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("b, c", [(448, 10), (448, 100), (8192, 100)])
@pytest.mark.parametrize("device", DEVICES)
def test_fixmatch_loss(benchmark, device, b, c, name):
    """448: seven unlabeled images for each of 64 labeled ones. Some half of the rows are confident."""

    def views():
        weak = torch.randn(b, c, device=device)
        weak[::2, 0] += 20
        return torch.randn(b, c, device=device, requires_grad=True), weak

    batches = [views() for _ in range(COPIES)]
    loss = implementation(name, "fixmatch_loss")
    call = over(batches, lambda batch: torch.autograd.grad(loss(*batch), batch[0]))
    moved = nbytes(*batches[0], batches[0][0])
    group = f"fixmatch_loss forward + backward {device} B={b} C={c}"
    measure(benchmark, group, name, call, device, calls=COPIES, moved=moved)


@pytest.mark.parametrize("name", [*IMPLEMENTATIONS, "torch's dropout, eager"])
@pytest.mark.parametrize("shape", [(128, 32, 32, 32), (128, 128, 8, 8)], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_counter_dropout(benchmark, device, shape, name):
    def image_like():
        return torch.randn(shape, device=device).to(memory_format=torch.channels_last)

    inputs = [(image_like().requires_grad_(), image_like()) for _ in range(COPIES)]  # x and the gradient of y
    keys = ups_fast.dropout_keys(torch.arange(shape[0], device=device), seed=0, draw=0)
    if name.startswith("torch"):
        drop = lambda x: torch.dropout(x, 0.3, True)  # noqa: E731
    else:
        function = implementation(name, "counter_dropout")
        drop = lambda x: function(x, keys, p=0.3, layer=1)  # noqa: E731
    call = over(inputs, lambda pair: torch.autograd.grad(drop(pair[0]), *pair))
    moved = 4 * inputs[0][0].nbytes  # x and y, and their gradients
    group = f"counter_dropout forward + backward {device} {list(shape)}"
    measure(benchmark, group, name, call, device, calls=COPIES, moved=moved)


@pytest.mark.parametrize("name", [*IMPLEMENTATIONS, "torch's mish, eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("device", DEVICES)
def test_mish(benchmark, device, dtype, name):
    shape = (128, 32, 32, 32)
    inputs = [
        (torch.randn(shape, device=device, dtype=dtype).requires_grad_(), torch.ones(shape, device=device, dtype=dtype))
        for _ in range(COPIES)
    ]  # fmt: skip
    mish = torch.nn.functional.mish if name.startswith("torch") else implementation(name, "mish")
    call = over(inputs, lambda pair: torch.autograd.grad(mish(pair[0]), *pair))
    moved = 5 * inputs[0][0].nbytes  # x, y; x, the gradient of y, that of x
    group = f"mish forward + backward {device} {list(shape)} {str(dtype)[6:]}"
    measure(benchmark, group, name, call, device, calls=COPIES, moved=moved)


AUGMENTATIONS = ["published, Pillow", "reference, Pillow", "torchvision v2", "kornia", "ups_fast"]


# The whole published chain on 32x32. On a CPU all have one thread. On a GPU the Pillow rows are one core of its host;
# images/s compare where the numbers of images differ.
@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("device", DEVICES)
def test_augment(benchmark, device, name):
    n = 50_000 if GPU and name in ("kornia", "ups_fast") else 512
    home = "cpu" if "Pillow" in name else device
    images = torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8, device=home)
    planes = images.movedim(3, 1).contiguous()
    index = torch.randperm(n, device=home)
    kwargs = {"policy": "published", "seed": 0, "draw": 0, "mean": MEAN, "std": STD}
    moved = 0
    if name == "published, Pillow":
        pictures = [Image.fromarray(image.numpy()) for image in images]
        chain = published.training_transform(MEAN, STD)
        call = lambda: torch.stack([chain(picture) for picture in pictures])  # noqa: E731
    elif name == "torchvision v2":
        chain = rivals.torchvision_transform(MEAN, STD, device)
        call = lambda: torch.stack([chain(image) for image in planes])  # noqa: E731
    elif name == "kornia":
        pytest.importorskip("kornia", reason="kornia is not installed")
        chain = rivals.kornia_transform(MEAN, STD)
        call = lambda: chain(planes)  # noqa: E731
    else:
        augment = ups_fast.augment if name == "ups_fast" else reference.augment
        call = lambda: augment(images, index, **kwargs)  # noqa: E731
    if GPU and home == "cuda":
        moved = images.nbytes + index.nbytes + 4 * images.nbytes  # float32 out
    benchmark.extra_info["images"] = n
    rounds = 100 if name == "ups_fast" else 20
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        measure(
            benchmark,
            f"augment {device}" if GPU else "augment cpu, 1 thread",
            name,
            call,
            device,
            rounds,
            moved=moved,
        )
    finally:
        torch.set_num_threads(threads)
