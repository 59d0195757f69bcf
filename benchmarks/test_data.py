"""Files and arrays as training batches: DALI against Pillow and against torchvision in a DataLoader: `make bench`.

A round is one pass over all images. All have two threads, torchvision two worker processes that stay alive. torch has
one thread, more would contend with the loader's for the same cores, but for `test_training_waits`.
"""

from __future__ import annotations

import io
import time

import numpy as np
import pytest
import torch
from PIL import Image
from rivals import torchvision_transform
from test_ops import GPU, MEAN, STD, measure

from ups_fast.batches import epoch_order, views_of
from ups_fast.data import ResidentImages, file_images, read_image, resize_crop
from ups_fast.methods import Group, Layout, Options, Setting, Supervised
from ups_fast.models import build
from ups_fast.policy import POLICIES, Policy
from ups_fast.selection import Thresholds
from ups_fast.step import TrainStep, plan_step

IMAGES, BATCH, WORKERS, ROUNDS = 512, 64, 2, 10
SCALE = (0.2, 1.0)


@pytest.fixture(autouse=True)
def one_thread_of_torch():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """JPEG files of 280 x 320 pixels, cut out of scikit-learn's two photographs."""
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    sources, random = datasets.load_sample_images().images, np.random.default_rng(0)
    root = tmp_path_factory.mktemp("photographs")
    for i in range(IMAGES):
        source = sources[i % len(sources)]
        top, left = (
            random.integers(0, extent - cut + 1)
            for extent, cut in zip(source.shape, (280, 320), strict=False)
        )
        file = io.BytesIO()
        Image.fromarray(source[top : top + 280, left : left + 320]).save(file, "JPEG", quality=90)
        (root / f"{i}.jpg").write_bytes(file.getvalue())
    return root, [f"{i}.jpg" for i in range(IMAGES)]


class Torchvision(torch.utils.data.Dataset):
    """Files as torchvision's v2 transforms take them: to uint8 of S x S, or all the way."""

    def __init__(self, root, paths, size, chain):
        from torchvision.transforms import v2

        crop = v2.RandomResizedCrop(size, scale=SCALE, antialias=True)
        rest = [v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        self.root, self.paths, self.transform = root, paths, v2.Compose([crop, *(rest if chain else [])])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        from torchvision.io import decode_image, read_file

        return self.transform(decode_image(read_file(str(self.root / self.paths[i]))))


def passes_over(loader):
    def all_batches():
        for batch in loader():
            result = batch
        return result

    return all_batches


ON_GPU = ["dali, GPU"] if GPU else []


@pytest.mark.parametrize(
    "name", ["torchvision v2, 2 workers", "plain: Pillow, 2 threads", "dali, 2 threads", *ON_GPU]
)
@pytest.mark.parametrize("chain", [False, True], ids=["decode", "chain"])
def test_jpegs(benchmark, photographs, chain, name):
    """224 pixels. decode: to uint8, a random resized crop; chain: and flip and normalize."""
    root, paths = photographs
    if name.startswith("torchvision"):
        pytest.importorskip("torchvision", reason="torchvision is not installed")
        files = Torchvision(root, paths, 224, chain)
        loader = torch.utils.data.DataLoader(
            files, BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True
        )
        call = passes_over(lambda: loader)
    else:
        kind = name.split(",")[0].split(":")[0]
        if kind == "dali":
            pytest.importorskip("nvidia.dali", reason="nvidia-dali is not installed")
        device = "cuda" if name in ON_GPU else "cpu"
        images = file_images(
            kind, root, paths, size=224, channels=3, mean=MEAN, std=STD, device=device,
            policy=Policy(flip=True), resized_crop=SCALE, threads=16 if name in ON_GPU else WORKERS,
        )  # fmt: skip
        plan = torch.randperm(IMAGES).view(-1, BATCH)
        if chain:
            place = torch.empty(BATCH, 3, 224, 224).to(
                memory_format=torch.channels_last
            )  # as a TrainStep has
            steps = [*zip(plan, torch.zeros_like(plan), strict=True)]
            call = passes_over(lambda: images.training(steps, seed=0, out=place))
        else:
            jobs = [(ids, images._drawn(ids, torch.zeros_like(ids), 0)) for ids in plan]
            call = passes_over(lambda: images._streamed(jobs))
    benchmark.extra_info["images"] = IMAGES
    group = f"{IMAGES} JPEGs of 280x320, {'full chain' if chain else 'decode and crop'} to 224"
    measure(benchmark, group, name, call, "cuda" if name in ON_GPU else "cpu", ROUNDS)


class Augmented(torch.utils.data.Dataset):
    """Arrays as the published chain leaves them in torchvision's v2 transforms."""

    def __init__(self, pixels):  # uint8 [N, 32, 32, 3]
        self.images = pixels.permute(0, 3, 1, 2).contiguous()
        self.transform = torchvision_transform(MEAN, STD, "cpu")

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i])


@pytest.mark.parametrize(
    "name",
    ["resident", "plain, 2 threads", "dali, 2 threads", "torchvision v2, 2 workers"]
    + ["resident, GPU", *ON_GPU] * GPU,
)
def test_arrays(benchmark, name):
    """32 pixels, the published chain: arrays that fit into memory need no loader."""
    pixels, n = torch.randint(0, 256, (4096, 32, 32, 3), dtype=torch.uint8), 4096
    plan = torch.randperm(n).view(-1, 128)
    device = "cuda" if name.endswith("GPU") else "cpu"
    plan = plan.to(device) if name == "resident, GPU" else plan
    settings = {"mean": MEAN, "std": STD, "device": device, "policy": POLICIES["published"]}
    if name.startswith("torchvision"):
        loader = torch.utils.data.DataLoader(
            Augmented(pixels), 128, shuffle=True, num_workers=WORKERS, persistent_workers=True
        )
        call = passes_over(lambda: loader)
    elif name.startswith("resident"):
        resident = ResidentImages(pixels, **settings)
        call = passes_over(lambda: (resident.augmented(ids, seed=0, epoch=0) for ids in plan))
    else:
        kind = name.split(",")[0]
        if kind == "dali":
            pytest.importorskip("nvidia.dali", reason="nvidia-dali is not installed")
        images = file_images(kind, None, (), size=32, channels=3, images=pixels, threads=WORKERS, **settings)
        call = passes_over(lambda: images.training(zip(plan, torch.zeros_like(plan), strict=True), seed=0))
    benchmark.extra_info["images"] = n
    rounds = 3 if name.startswith("torchvision") else ROUNDS
    measure(benchmark, f"{n} arrays of 32x32, published chain", name, call, device, rounds)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """1,024 of scikit-learn's handwritten digits as PNG files of 8 x 8 pixels: little but the cost of a file."""
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    root = tmp_path_factory.mktemp("digits")
    for i, pixels in enumerate(datasets.load_digits().images[:1024]):
        Image.fromarray((pixels * 15.9).astype(np.uint8)).save(root / f"{i}.png")
    return root, [f"{i}.png" for i in range(1024)]


# device, network, images, size, channels, batch, threads of torch and of the loader
ROUND = [
    ("cpu", "torchvision:resnet18", "photographs", 224, 3, 32, 2),
    ("cpu", "wrn-28-2", "digits", 8, 1, 32, 1),
]
ROUND += [("cuda", "torchvision:resnet50", "photographs", 224, 3, 128, 16)] if GPU else []


@pytest.mark.parametrize("name", ["resident", "plain: Pillow", "dali"])
@pytest.mark.parametrize(("device", "network", "files", "size", "channels", "batch", "threads"), ROUND)
def test_training_waits(benchmark, request, device, network, files, size, channels, batch, threads, name):
    """An epoch as a run trains it, and the share of its time in which the step waits for its images."""
    kind = name.split(":")[0]
    if network.startswith("torchvision"):
        pytest.importorskip("torchvision", reason="torchvision is not installed")
    if kind == "dali":
        pytest.importorskip("nvidia.dali", reason="nvidia-dali is not installed")
    root, paths = request.getfixturevalue(files)
    paths = paths if GPU or size < 100 else paths[:192]
    torch.set_num_threads(threads)
    common = {"mean": MEAN[:channels], "std": STD[:channels], "device": device, "policy": Policy(flip=True)}
    if kind == "resident":
        pixels = [resize_crop(read_image(root / path, channels), size) for path in paths]
        images = ResidentImages(torch.from_numpy(np.stack(pixels)), **common)
    else:
        images = file_images(kind, root, paths, size=size, channels=channels, threads=threads, **common)
    model = build(network, n_classes=10, channels=channels, size=size, dropout=0.3)
    model = model.to(device, memory_format=torch.channels_last)
    method = Supervised(Setting(lambda: model, Options("supervised"), Thresholds(), len(paths), 10))
    how = plan_step("auto", "auto", torch.device(device))
    step = TrainStep(method, images, how, momentum=0.9, weight_decay=0.0)
    layout = Layout((Group("labeled", batch),), len(paths) // batch)
    views = views_of(layout.groups, {"strong": images.policy})
    tables = {"target": torch.arange(len(paths)) % 10}
    step.start(layout, views, tables, method.state_dict(), augment_seed=0, dropout_seed=0)
    plan, _ = epoch_order({"labeled": torch.arange(len(paths))}, layout, torch.Generator().manual_seed(0), 0)
    place = plan.to(device)
    waited = whole = 0.0

    def epoch():
        nonlocal waited, whole
        start = time.perf_counter()
        batches = images.ahead(zip(plan, plan * 0, strict=True), views, seed=0, out=step.batch)
        for index in place:
            before = time.perf_counter()
            next(batches)
            waited += time.perf_counter() - before
            step(index, index * 0, 0.01)
        whole += time.perf_counter() - start

    group = f"epoch {device} {network} B={batch}, {len(paths)} files to {size}, {threads} threads"
    rounds = ROUNDS if GPU or size < 100 else 3
    measure(benchmark, group, name, epoch, device, rounds, finish=lambda: {"waiting": waited / whole})
