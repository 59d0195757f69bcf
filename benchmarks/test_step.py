"""A training step with its augmented batch, in every mode, against the published recipe's: `make bench`."""

from __future__ import annotations

import itertools
import os

import published
import pytest
import torch
from test_ops import DEVICES, GPU, measure
from torch import nn

from ups_fast.batches import views_of
from ups_fast.data import ResidentImages
from ups_fast.methods import UPS, Group, Layout, Options, Setting
from ups_fast.models import build
from ups_fast.policy import POLICIES
from ups_fast.selection import Thresholds
from ups_fast.step import TrainStep, plan_step

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
N, CLASSES = 4096, 10
MODES = ["eager float32", "eager bfloat16", "compile float32", "compile bfloat16"]
MODES += ["graph bfloat16"] if GPU else []
NAMES = ["published", *MODES, "ups_fast"]
STEPS = [("wrn-28-2", 128, name) for name in NAMES]
if GPU:  # each compiled step takes a minute first
    STEPS += [("wrn-28-2", 512, name) for name in ("published", "eager bfloat16", "ups_fast")]
# Per image: the activations in bfloat16 that forward and backward write and read.
BYTES = {"wrn-28-2": 13_800_000}


def network(model: str, device: str, rival: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net: nn.Module = build(model, n_classes=CLASSES, channels=3, size=32, dropout=0.3, preact="published")
    net = published.torch_only(net) if rival else net
    net = net.to(device).train()
    return net, torch.optim.SGD(net.parameters(), lr=0.03, momentum=0.9, nesterov=True)


def published_call(model: str, size: int, device: str):
    net, optimizer = network(model, device, rival=True)
    images = torch.randint(0, 256, (N, 32, 32, 3), dtype=torch.uint8)
    targets, marks = torch.randint(CLASSES, (N,)), torch.rand(N, CLASSES) < 0.4
    chain = published.training_transform(MEAN, STD)
    kinds = [published.MarkedImages(images, targets, each, chain) for each in (torch.ones_like(marks), marks)]
    source = published.batches(*kinds, size, workers=os.cpu_count() or 1)
    return lambda: published.training_step(net, optimizer, next(source), device)


def our_call(model: str, size: int, device: str, mode: str, precision: str):
    net, _ = network(model, device)
    net = net.to(memory_format=torch.channels_last)
    method = UPS(Setting(lambda: net, Options("ups"), Thresholds(), N, CLASSES))
    pixels = torch.randint(0, 256, (N, 32, 32, 3), dtype=torch.uint8)
    images = ResidentImages(pixels, mean=MEAN, std=STD, device=device, policy=POLICIES["published"])
    plan = plan_step(mode, precision, torch.device(device))
    step = TrainStep(method, images, plan, momentum=0.9, weight_decay=0.0)
    positive = torch.arange(N) < N // 2  # each batch has as many of them as of negatives
    target = torch.randint(CLASSES, (N,)).where(positive, -1)
    negative = torch.randint(0, 2**CLASSES, (N, 1), dtype=torch.int32)
    groups = Group("positive", size - size // 2), Group("negative", size // 2)
    views = views_of(groups, {"strong": images.policy})
    tables = {"target": target, "negative": negative}
    step.start(Layout(groups, 1), views, tables, method.state_dict(), augment_seed=0, dropout_seed=0)
    order = torch.stack([torch.randperm(N // 2), N // 2 + torch.randperm(N // 2)]).T.flatten().to(device)
    calls = itertools.count()

    def call():
        n = next(calls)
        index = order[n * size % (N - size) :][:size]
        step(index, torch.full_like(index, n), 0.03)

    return call


@pytest.mark.parametrize(("model", "size", "name"), STEPS)
@pytest.mark.parametrize("device", DEVICES)
def test_step(benchmark, device, model, size, name):
    """`ups_fast` is what `auto` picks on this device."""
    if name == "published":
        call = published_call(model, size, device)
    else:
        mode, precision = ("auto", "auto") if name == "ups_fast" else name.split()
        call = our_call(model, size, device, mode, precision)
    benchmark.extra_info["images"] = size
    moved = BYTES[model] * size if GPU else 0  # a CPU is bound by its arithmetic
    group = f"training step {device} {model} B={size}"
    measure(benchmark, group, name, call, device, 50 if GPU else 8, moved=moved)
