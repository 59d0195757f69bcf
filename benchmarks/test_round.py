"""Labeling, and a whole short round, against the published recipe's: `make bench`."""

from __future__ import annotations

import os
from itertools import count

import published
import pytest
import torch
from test_ops import DEVICES, GPU, MEAN, STD, measure
from test_step import CLASSES, network
from torch.utils.data import DataLoader

from ups_fast.data import ImageSet, ResidentImages
from ups_fast.fullgraph import fullgraph
from ups_fast.selection import labeling_rows, passes_over, pseudo_label

PASSES = 10
WORKERS = (
    (os.cpu_count() or 1) if GPU else 0
)  # a few images on a CPU: starting a worker takes longer than they do


def pixels(n):
    return torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8)


def marked(images, transform):
    n = len(images)
    return published.MarkedImages(images, torch.randint(CLASSES, (n,)), torch.ones(n, CLASSES), transform)


@pytest.mark.parametrize("name", ["published", "ups_fast"])
@pytest.mark.parametrize(
    ("model", "n"), [("wrn-28-2", 46_000 if GPU else 128), ("cnn13", 10_000 if GPU else 64)]
)
@pytest.mark.parametrize("device", DEVICES)
def test_label(benchmark, device, model, n, name):
    """All in float32; on a GPU cuDNN may take its TF32 for both, which is torch's default."""
    net, _ = network(model, device, rival=name == "published")
    images = pixels(n)
    if name == "published":
        loader = DataLoader(marked(images, published.clean_transform(MEAN, STD)), 512, num_workers=WORKERS)
        call = lambda: published.label(net, loader, device, passes=PASSES)  # noqa: E731
    else:
        net = net.to(memory_format=torch.channels_last)
        resident = ResidentImages(images, mean=MEAN, std=STD, device=device)
        index, rows = torch.arange(n, device=device), labeling_rows(torch.device(device), (3, 32, 32))
        kwargs = {"passes": PASSES, "batch_size": rows, "forward": fullgraph(passes_over) if GPU else None}
        call = lambda: pseudo_label(net, resident, index, **kwargs).cpu()  # noqa: E731
    benchmark.extra_info["images"] = n
    measure(benchmark, f"label {device} {model} N={n} P={PASSES}", name, call, device, rounds=3)


@pytest.mark.parametrize("name", ["published", "ups_fast"])
@pytest.mark.parametrize(
    ("labels", "unlabeled", "epochs"), [(4000, 46_000, 8) if GPU else (512, 128, 1)], ids=["round"]
)
@pytest.mark.parametrize("device", DEVICES)
def test_round(benchmark, tmp_path, device, labels, unlabeled, epochs, name):
    """Round 0 of WRN-28-2 at batch 128: some epochs over the labeled images, then labels for all others.

    Ours is `ups_fast.rounds.run` with all that a user gets: it also tests the network, and writes checkpoint, curves
    and tables. Each run compiles its training step where `auto` does; the first, not timed, fills the cache.
    """
    for package in ("yaml", "safetensors", "tensorboard", "rich"):
        pytest.importorskip(package, reason=f"{package} is not installed: ours cannot run")
    size = 128
    images = pixels(labels + unlabeled)
    if name == "published":
        augmented = marked(images[:labels], published.training_transform(MEAN, STD))
        clean = marked(images[labels:], published.clean_transform(MEAN, STD))
        workers = os.cpu_count() or 1

        def call():
            net, optimizer = network("wrn-28-2", device, rival=True)
            published.short_round(
                net, optimizer, augmented, clean, epochs=epochs, size=size, workers=workers, device=device
            )
    else:
        run = our_round(images, labels, epochs, size, device)
        folders = (str(tmp_path / str(i)) for i in count())
        call = lambda: run(next(folders))  # noqa: E731
    benchmark.extra_info["images"] = epochs * (labels // size) * size + unlabeled
    group = f"round {device} wrn-28-2, {labels} labels, {epochs} epoch(s), {unlabeled} to label"
    measure(benchmark, group, name, call, device, rounds=3)


def our_round(images, labels, epochs, size, device):
    from rich.console import Console

    from ups_fast.config import Config, DataConfig, ModelConfig, SelectConfig, TrainConfig, validate
    from ups_fast.rounds import run

    data = ImageSet(
        "random",
        [str(i) for i in range(CLASSES)],
        images,
        torch.randint(CLASSES, (len(images),)),
        images[:16],
        torch.randint(CLASSES, (16,)),
        MEAN,
        STD,
        labeled=torch.arange(labels),
    )

    def call(folder):
        cfg = Config(
            run_dir=folder,
            device=device,
            data=DataConfig(name="npz", flip=True, crop=4, ops="published", jitter=0.4, cutout=16),
            model=ModelConfig(preact="published"),
            train=TrainConfig(rounds=1, epochs=epochs, batch_size=size, weight_decay=0.0),
            select=SelectConfig(passes=PASSES, balance_rounds=1),
        )
        validate(cfg)
        return run(cfg, data, console=Console(quiet=True))

    return call
