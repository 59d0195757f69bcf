"""The ops against their reference, eager and under torch.compile, on the same inputs: `make bench`."""

from __future__ import annotations

import published
import pytest
import torch
from PIL import Image

import ups_fast
from ups_fast import reference

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
IMPLEMENTATIONS = ["reference, eager", "reference, compiled", "ups_fast"]


def implementation(name, op):
    if name == "ups_fast":
        return getattr(ups_fast, op)
    function = getattr(reference, op)
    # The rival at its best: static shapes, and compiled anew for each benchmark.
    return function if name == "reference, eager" else torch.compile(function, dynamic=False)


def measure(benchmark, group, name, call, device, rounds=None):
    def timed():
        result = call()
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    benchmark.group, benchmark.extra_info["implementation"] = group, name
    rounds = rounds or (100 if name.endswith(("fast", "compiled")) else 20)
    benchmark.pedantic(timed, warmup_rounds=min(5, rounds), rounds=rounds)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("p, n, c", [(10, 8192, 10), (10, 8192, 100), (10, 1024, 1000)])
@pytest.mark.parametrize("device", DEVICES)
def test_mc_select(benchmark, device, p, n, c, dtype, name):
    logits = (3 * torch.randn(p, n, c, device=device)).to(dtype)
    select = implementation(name, "mc_select")
    group = f"mc_select {device} P={p} N={n} C={c} {str(dtype)[6:]}"
    measure(benchmark, group, name, lambda: select(logits), device)


def loss_batch(device, b, c):
    logits = torch.randn(b, c, device=device, requires_grad=True)
    positive = torch.rand(b, device=device) < 0.5
    return logits, torch.randint(c, (b,), device=device), positive, torch.rand(b, c, device=device) < 0.5


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("b, c", [(128, 10), (512, 100), (8192, 100)])
@pytest.mark.parametrize("device", DEVICES)
def test_ups_loss(benchmark, device, b, c, name):
    batch = loss_batch(device, b, c)
    loss = implementation(name, "ups_loss")
    call = lambda: torch.autograd.grad(loss(*batch), batch[0])  # noqa: E731
    measure(benchmark, f"ups_loss forward + backward {device} B={b} C={c}", name, call, device)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("b, c", [(128, 10), (512, 100), (8192, 100)])
@pytest.mark.parametrize("device", DEVICES)
def test_nce_loss(benchmark, device, b, c, name):
    logits, _, _, mask = loss_batch(device, b, c)
    loss = implementation(name, "nce_loss")
    call = lambda: torch.autograd.grad(loss(logits, mask), logits)  # noqa: E731
    measure(benchmark, f"nce_loss forward + backward {device} B={b} C={c}", name, call, device)


@pytest.mark.parametrize("name", [*IMPLEMENTATIONS, "torch's dropout, eager"])
@pytest.mark.parametrize("shape", [(128, 32, 32, 32), (128, 128, 8, 8)], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_counter_dropout(benchmark, device, shape, name):
    x = torch.randn(shape, device=device).to(memory_format=torch.channels_last).requires_grad_()
    keys = ups_fast.dropout_keys(torch.arange(shape[0], device=device), seed=0, draw=0)
    if name.startswith("torch"):
        call = lambda: torch.autograd.grad(torch.dropout(x, 0.3, True), x, torch.ones_like(x))  # noqa: E731
    else:
        drop = implementation(name, "counter_dropout")
        call = lambda: torch.autograd.grad(drop(x, keys, p=0.3, layer=1), x, torch.ones_like(x))  # noqa: E731
    measure(benchmark, f"counter_dropout forward + backward {device} {list(shape)}", name, call, device)


# The whole published chain, 32x32, on one CPU thread against the same chain in Pillow on one; a GPU row stands alone.
@pytest.mark.parametrize("name", ["published, Pillow", "reference, Pillow", "ups_fast"])
@pytest.mark.parametrize("device", DEVICES)
def test_augment(benchmark, device, name):
    n = 512 if device == "cpu" else 50_000
    if device != "cpu" and name != "ups_fast":
        pytest.skip("Pillow has no GPU")
    mean, std = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
    images = torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8, device=device)
    index = torch.randperm(n, device=device)
    pictures = [Image.fromarray(image.numpy()) for image in images] if name.startswith("published") else []
    chain = published.training_transform(mean, std)
    function = ups_fast.augment if name == "ups_fast" else reference.augment
    kwargs = {"policy": "published", "seed": 0, "epoch": 0, "mean": mean, "std": std}

    def call():
        return torch.stack([chain(p) for p in pictures]) if pictures else function(images, index, **kwargs)

    benchmark.extra_info["images"] = n
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    measure(benchmark, f"augment {device}, 1 thread, {n} images", name, call, device)
    torch.set_num_threads(threads)
