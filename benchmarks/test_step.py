"""A training step with its augmented batch, in every mode, against the published recipe's: `make bench`."""

from __future__ import annotations

import os

import published
import pytest
import torch
from test_ops import DEVICES, GPU, measure

from ups_fast import dropout_keys
from ups_fast.data import ResidentImages
from ups_fast.engine import loss_function, plan_step, train_step
from ups_fast.models import build
from ups_fast.policy import POLICIES

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
N, CLASSES = 4096, 10
NAMES = ["published", "eager float32", "eager bfloat16", "compile float32", "compile bfloat16", "ups_fast"]
STEPS = [("wrn-28-2", 128, name) for name in NAMES]
if GPU:  # each compiled step takes a minute first
    STEPS += [("wrn-28-2", 512, name) for name in ("published", "eager bfloat16", "ups_fast")]
# Per image: the activations in bfloat16 that forward and backward write and read.
BYTES = {"wrn-28-2": 13_800_000}


def network(model: str, device: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = (
        build(model, n_classes=CLASSES, channels=3, size=32, dropout=0.3, preact="published")
        .to(device)
        .train()
    )
    return net, torch.optim.SGD(net.parameters(), lr=0.03, momentum=0.9, nesterov=True)


def published_call(model: str, size: int, device: str):
    net, optimizer = network(model, device)
    images = torch.randint(0, 256, (N, 32, 32, 3), dtype=torch.uint8)
    targets, marks = torch.randint(CLASSES, (N,)), torch.rand(N, CLASSES) < 0.4
    chain = published.training_transform(MEAN, STD)
    kinds = [published.MarkedImages(images, targets, each, chain) for each in (torch.ones_like(marks), marks)]
    source = published.batches(*kinds, size, workers=os.cpu_count() or 1)
    return lambda: published.training_step(net, optimizer, next(source), device)


def our_call(model: str, size: int, device: str, step: str, precision: str):
    net, optimizer = network(model, device)
    net = net.to(memory_format=torch.channels_last)
    plan = plan_step(step, precision, torch.device(device))
    loss_of = loss_function(net, compiled=plan.compiled, dtype=plan.dtype)
    pixels = torch.randint(0, 256, (N, 32, 32, 3), dtype=torch.uint8)
    images = ResidentImages(pixels, mean=MEAN, std=STD, device=device, policy=POLICIES["published"])
    target = torch.randint(CLASSES, (N,), device=device)
    negative = torch.randint(0, 2**CLASSES, (N, 1), dtype=torch.int32, device=device)
    positive = torch.arange(size, device=device) < size // 2
    order = torch.randperm(N, device=device)

    def call():
        index = order[torch.randint(N - size, (1,)).item() :][:size]
        batch = images.augmented(index, seed=0, epoch=0)
        keys = dropout_keys(index, seed=0, draw=0)
        return train_step(loss_of, optimizer, batch, keys, target[index], positive, negative[index])

    return call


@pytest.mark.parametrize(("model", "size", "name"), STEPS)
@pytest.mark.parametrize("device", DEVICES)
def test_step(benchmark, device, model, size, name):
    """`ups_fast` is what `auto` picks on this device."""
    if name == "published":
        call = published_call(model, size, device)
    else:
        step, precision = ("auto", "auto") if name == "ups_fast" else name.split()
        call = our_call(model, size, device, step, precision)
    benchmark.extra_info["images"] = size
    moved = BYTES[model] * size if GPU else 0  # a CPU is bound by its arithmetic
    group = f"training step {device} {model} B={size}"
    measure(benchmark, group, name, call, device, 50 if GPU else 8, moved=moved)
