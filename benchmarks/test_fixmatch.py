"""A FixMatch step of 64 labeled and 448 unlabeled images in two views, against the published kind: `make bench`."""

from __future__ import annotations

import itertools
import os

import published
import pytest
import torch
from test_ops import DEVICES, GPU, MEAN, STD, measure

from ups_fast.batches import views_of
from ups_fast.data import ResidentImages
from ups_fast.methods import METHODS, Setting
from ups_fast.models import build
from ups_fast.policy import Policy, parse_ops
from ups_fast.selection import Thresholds
from ups_fast.step import TrainStep, plan_step

N, LABELED, CLASSES, SIZE, MU = 8192, 1024, 10, 64, 7
MODES = ["eager float32", "eager bfloat16", *(["graph bfloat16"] if GPU else [])]


def network():
    torch.manual_seed(0)
    return build(
        "wrn-28-2",
        n_classes=CLASSES,
        channels=3,
        size=32,
        dropout=0.0,
        activation="leaky_relu",
        preact="published",
    )


def pixels(n):
    return torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8)


def published_call(device):
    net = network().to(device).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.03, momentum=0.9, nesterov=True)
    targets = torch.randint(CLASSES, (N,))
    parts = [
        published.TwoViews(pixels(n), targets[:n], MEAN, STD, strong=strong)
        for n, strong in ((LABELED, False), (N, True))
    ]
    source = published.fixmatch_batches(*parts, SIZE, MU, workers=os.cpu_count() or 1)
    return lambda: published.fixmatch_step(net, optimizer, next(source), device)


def our_call(device, mode, precision):
    cls = METHODS["fixmatch"]
    setting = Setting(network, cls.Options("fixmatch"), Thresholds(), N, CLASSES, N - LABELED, SIZE)
    method = cls(setting).to(device, memory_format=torch.channels_last)
    strong = Policy(ops=parse_ops("ups"), n_ops=2, flip=True, crop=4, cutout=16)
    policies = {"weak": Policy(flip=True, crop=4), "strong": strong}
    images = ResidentImages(pixels(N), mean=MEAN, std=STD, device=device, policy=strong)
    step = TrainStep(
        method, images, plan_step(mode, precision, torch.device(device)), momentum=0.9, weight_decay=0.0
    )
    layout = method.lay_out({"labeled": LABELED, "unlabeled": N - LABELED}, SIZE)
    target = torch.full((N,), -1)
    target[:LABELED] = torch.randint(CLASSES, (LABELED,))
    views = views_of(layout.groups, policies)
    step.start(layout, views, {"target": target}, method.state_dict(), augment_seed=0, dropout_seed=0)
    calls = itertools.count()

    def call():
        n = next(calls)
        labeled = torch.arange(n, n + SIZE, device=device) % LABELED
        unlabeled = LABELED + torch.arange(n * SIZE, (n + MU) * SIZE, device=device) % (N - LABELED)
        index = torch.cat([labeled, unlabeled, unlabeled])
        step(index, torch.full_like(index, n), 0.03)

    return call


@pytest.mark.parametrize("name", ["published", *MODES, "ups_fast"])
@pytest.mark.parametrize("device", DEVICES)
def test_fixmatch_step(benchmark, device, name):
    """`ups_fast` is what `auto` picks on this device."""
    if name == "published":
        call = published_call(device)
    else:
        call = our_call(device, *(("auto", "auto") if name == "ups_fast" else name.split()))
    rows = SIZE * (1 + 2 * MU)
    benchmark.extra_info["images"] = rows
    measure(
        benchmark, f"FixMatch step {device} wrn-28-2 B={SIZE} mu={MU}", name, call, device, 50 if GPU else 5
    )
