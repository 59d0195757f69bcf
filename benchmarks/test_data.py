"""Files and arrays as training batches: DALI against Pillow and against torchvision in a DataLoader: `make bench`.

A round is one pass over all images. All have two threads, torchvision two worker processes that stay alive. torch has
one thread: more would contend with the loader's for the same cores.
"""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from test_ops import MEAN, STD, measure

from ups_fast.data import ResidentImages, file_images
from ups_fast.policy import POLICIES, Policy

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


@pytest.mark.parametrize("name", ["torchvision v2, 2 workers", "plain: Pillow, 2 threads", "dali, 2 threads"])
@pytest.mark.parametrize("chain", [False, True], ids=["decode", "chain"])
def test_jpegs(benchmark, photographs, chain, name):
    """224 pixels. decode: to uint8, a random resized crop; chain: and flip and normalise."""
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
        images = file_images(
            kind, root, paths, size=224, channels=3, mean=MEAN, std=STD, device="cpu",
            policy=Policy(flip=True), resized_crop=SCALE, threads=WORKERS,
        )  # fmt: skip
        plan = torch.randperm(IMAGES).view(-1, BATCH)
        if chain:
            call = passes_over(
                lambda: images.training(zip(plan, torch.zeros_like(plan), strict=True), seed=0)
            )
        else:
            jobs = [(ids, images._drawn(ids, torch.zeros_like(ids), 0)) for ids in plan]
            call = passes_over(lambda: images._streamed(jobs))
    benchmark.extra_info["images"] = IMAGES
    group = f"{IMAGES} JPEGs of 280x320, {'full chain' if chain else 'decode and crop'} to 224"
    measure(benchmark, group, name, call, "cpu", ROUNDS)


@pytest.mark.parametrize("name", ["resident", "plain, 2 threads", "dali, 2 threads"])
def test_arrays(benchmark, name):
    """32 pixels, the published chain: arrays that fit into memory need no loader."""
    pixels, n = torch.randint(0, 256, (4096, 32, 32, 3), dtype=torch.uint8), 4096
    plan = torch.randperm(n).view(-1, 128)
    settings = {"mean": MEAN, "std": STD, "device": "cpu", "policy": POLICIES["published"]}
    if name == "resident":
        resident = ResidentImages(pixels, **settings)
        call = passes_over(lambda: (resident.augmented(ids, seed=0, epoch=0) for ids in plan))
    else:
        kind = name.split(",")[0]
        if kind == "dali":
            pytest.importorskip("nvidia.dali", reason="nvidia-dali is not installed")
        images = file_images(kind, None, (), size=32, channels=3, images=pixels, threads=WORKERS, **settings)
        call = passes_over(lambda: images.training(zip(plan, torch.zeros_like(plan), strict=True), seed=0))
    benchmark.extra_info["images"] = n
    measure(benchmark, f"{n} arrays of 32x32, published chain", name, call, "cpu", ROUNDS)
